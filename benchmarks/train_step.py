"""Time and peak memory of a training step at the paper's shapes: with losses, without, and of comparable models.

    python benchmarks/train_step.py [--shape T12] [--batch 4] [--repeats 5] [--output benchmarks/results/train_step_cpu.json]

The comparable models are GPT-2 and Llama of Transformers, and x-transformers (`pip install x-transformers`; otherwise left
out). They have the same depth, width and number of heads, and as many weights in the feed-forward layers. `all_averaged` is
the mean step over training with the paper's schedule, in which layers drop out. `of_matrix_multiply_rate` compares a step
without auxiliary losses with one large matrix multiplication, which takes turns with the steps: it is the ratio of their
operations per second. It counts the matrix multiplications of a step (6 operations per weight and byte) and the half of
attention that is not masked. `time_by_kind` divides the time of a step among kinds of operations.

The variants take turns in one process, so that other load on the machine affects all of them equally; the figures are ratios
of median times. Memory is the peak of a separate process beyond its imports, with an allocator that returns freed memory.
For a CUDA device there is `python -m benchmarks.gpu`.
"""

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from benchmarks.measure import (
    TENTHS,
    MatrixMultiply,
    Step,
    in_own_process,
    machine,
    peak_memory,
    time_by_kind,
    times_by_turns,
)
from modeling_charformer import CharformerConfig, CharformerForCausalLM


class Shape(NamedTuple):
    """The size of a model and of its batch."""

    layers: int
    batch: int
    window: int = 512
    width: int = 512

    @property
    def flops(self) -> int:
        """Operations of a training step without auxiliary losses: matrix products, and the unmasked half of attention."""
        weights = self.layers * 12 * self.width**2 + self.width * 256
        return self.batch * self.window * (6 * weights + 6 * self.layers * self.width * self.window)


LAYERS = {"T12": 12, "T64": 64}
LABELS = {
    "none": "Charformer, no auxiliary losses",
    "all": "Charformer, all paper losses",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "x-transformers": "x-transformers",
}
PEERS = ("gpt2", "llama", *(["x-transformers"] if importlib.util.find_spec("x_transformers") else []))
VARIANTS = ("none", "all", *PEERS)


def _build(variant: str, shape: Shape) -> nn.Module:
    """Without dropout, since drawing its random numbers would dominate the time."""
    set_seed(0)
    if variant == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256, n_positions=shape.window, n_embd=shape.width, n_layer=shape.layers, n_head=2,
                n_inner=4 * shape.width,
                activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    if variant == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=2,
                intermediate_size=8 * shape.width // 3, max_position_embeddings=shape.window, bos_token_id=None,
                eos_token_id=None,
            )
        )  # fmt: skip
    if variant == "x-transformers":
        return XTransformer(shape)
    fields: dict[str, Any] = {} if variant == "all" else {"num_targets": 1, "intermediate_layers": None}
    fields |= {"num_hidden_layers": shape.layers, "hidden_size": shape.width, "intermediate_size": 4 * shape.width}
    fields |= {"max_position_embeddings": shape.window, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return CharformerForCausalLM(CharformerConfig(**fields))


class XTransformer(nn.Module):
    """A model of x-transformers, with the interface of Transformers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        decoder = Decoder(
            dim=shape.width, depth=shape.layers, heads=2, attn_dim_head=shape.width // 2, attn_flash=True
        )
        self.model = AutoregressiveWrapper(
            TransformerWrapper(num_tokens=256, max_seq_len=shape.window, attn_layers=decoder)
        )

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(loss=self.model(input_ids))


def build(variant: str, shape: Shape, device: str) -> nn.Module:
    """The model of a variant, on a device from the beginning: large ones are slow to build on a CPU."""
    with torch.device(device):
        return _build(variant, shape)


def random_ids(shape: Shape) -> torch.Tensor:
    return torch.randint(0, 256, (shape.batch, shape.window))


def make_step(variant: str, shape: Shape, device: str, **settings: Any) -> Step:
    """A step of `variant` on random ids; `settings` are those of `Step`."""
    return Step(build(variant, shape, device), random_ids(shape), device, **settings)


def ratios(values: dict[str, float]) -> dict[str, float]:
    """The main ratios."""
    compared = {"all_paper_losses_to_none": ("all", "none"), **{f"none_to_{peer}": ("none", peer) for peer in PEERS}}
    return {name: round(values[one] / values[other], 3) for name, (one, other) in compared.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=LAYERS, default="T12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = Shape(LAYERS[arguments.shape], arguments.batch)
    if arguments.memory_of:
        print(peak_memory(lambda: make_step(arguments.memory_of, shape, "cpu"), "cpu"))
        return

    options = ("--shape", arguments.shape, "--batch", arguments.batch)
    memory = {variant: in_own_process(__file__, *options, "--memory-of", variant) for variant in VARIANTS}
    multiply = MatrixMultiply("cpu")
    steps = {variant: make_step(variant, shape, "cpu") for variant in VARIANTS}
    tenths = {f"all at {at}": steps["all"].given(training_progress=at) for at in TENTHS}
    times = times_by_turns({"multiply": multiply, **steps, **tenths}, arguments.repeats, "eager")
    rate = multiply.flops / times.pop("multiply")
    times["all, averaged"] = statistics.mean(times.pop(name) for name in tenths)
    results: dict[str, Any] = {
        "shape": f"{arguments.shape}, window {shape.window}, batch {shape.batch}, f32",
        **machine("cpu"),
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "peak_memory_mib": {variant: round(value) for variant, value in memory.items()},
        "peak_memory_ratios": ratios(memory),
        "eager_seconds": {variant: round(value, 4) for variant, value in times.items()},
        "eager_time_ratios": ratios(times)
        | {"all_averaged_to_none": round(times["all, averaged"] / times["none"], 3)},
        "eager_of_matrix_multiply_rate": round(shape.flops / times["none"] / rate, 3),
        "eager_time_by_kind": time_by_kind(steps["none"]),
    }
    for variant in VARIANTS:
        print(f"{LABELS[variant]:<34} {times[variant]:8.3f} s  {memory[variant]:8.0f} MiB")
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
