"""Time and peak memory of a training step at the paper's shapes: with losses, without, and of comparable models.

    python benchmarks/train_step.py [--shape T12] [--batch 4] [--repeats 5] [--output benchmarks/results/train_step_cpu.json]

The comparable models are GPT-2 and Llama of Transformers, and x-transformers (`pip install x-transformers`; otherwise left
out). They have the same depth, width and number of heads, and as many weights in the feed-forward layers. `all_averaged` is
the mean step over training with the paper's schedule, in which layers drop out. `of_matrix_multiply_rate` compares a step
without auxiliary losses with one large matrix multiplication, which takes turns with the steps: it is the ratio of their
operations per second. It counts the matrix multiplications of a step (6 operations per weight and byte) and the half of
attention that is not masked. `time_by_kind` divides the time of a step among kinds of operations.

The variants take turns in one process, so that other load on the machine affects all of them equally; the figures are ratios
of median times. Memory is the peak of a separate process beyond its imports, with an allocator that returns freed memory. On
a machine with a CUDA device the same is measured there in bf16, eager and compiled.
"""

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


WINDOW, WIDTH = 512, 512
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


def build(variant: str, layers: int) -> nn.Module:
    """Without dropout, since drawing its random numbers would dominate the time."""
    set_seed(0)
    if variant == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256, n_positions=WINDOW, n_embd=WIDTH, n_layer=layers, n_head=2, n_inner=2048,
                activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    if variant == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=1365,
                max_position_embeddings=WINDOW, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    if variant == "x-transformers":
        return XTransformer(layers)
    fields: dict[str, Any] = {} if variant == "all" else {"num_targets": 1, "intermediate_layers": None}
    fields |= {"num_hidden_layers": layers, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return CharformerForCausalLM(CharformerConfig(**fields))


class XTransformer(nn.Module):
    """A model of x-transformers, with the interface of Transformers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        decoder = Decoder(dim=WIDTH, depth=layers, heads=2, attn_dim_head=256, attn_flash=True)
        self.model = AutoregressiveWrapper(TransformerWrapper(num_tokens=256, max_seq_len=WINDOW, attn_layers=decoder))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(loss=self.model(input_ids))


def flops(layers: int, batch: int) -> int:
    """Operations of a training step without auxiliary losses: matrix products, and the unmasked half of attention."""
    weights = layers * 12 * WIDTH**2 + WIDTH * 256
    return batch * WINDOW * (6 * weights + 6 * layers * WIDTH * WINDOW)


def ratios(values: dict[str, float]) -> dict[str, float]:
    """The main ratios."""
    compared = {"all_paper_losses_to_none": ("all", "none"), **{f"none_to_{peer}": ("none", peer) for peer in PEERS}}
    return {name: round(values[one] / values[other], 3) for name, (one, other) in compared.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=LAYERS, default="T12")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batch, device, layers = arguments.batch, arguments.device, LAYERS[arguments.shape]

    def make_step(variant: str, compiled: bool = False) -> Step:
        return Step(build(variant, layers), torch.randint(0, 256, (batch, WINDOW)), device, compiled)

    if arguments.memory_of:
        print(peak_memory(lambda: make_step(arguments.memory_of), device))
        return

    results: dict[str, Any] = {
        "shape": f"{arguments.shape}, window {WINDOW}, batch {batch}, {'bf16' if device == 'cuda' else 'f32'}",
        **machine(device),
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
    }
    options = ("--shape", arguments.shape, "--batch", batch, "--device", device)
    memory = {variant: in_own_process(__file__, *options, "--memory-of", variant) for variant in VARIANTS}
    results["peak_memory_mib"] = {variant: round(value) for variant, value in memory.items()}
    results["peak_memory_ratios"] = ratios(memory)
    for compiled in (False, True) if device == "cuda" else (False,):
        mode = "compiled" if compiled else "eager"
        multiply = MatrixMultiply(device)
        steps = {variant: make_step(variant, compiled) for variant in VARIANTS}
        tenths = {f"all at {at}": steps["all"].given(training_progress=at) for at in TENTHS}
        times = times_by_turns({"multiply": multiply, **steps, **tenths}, arguments.repeats, mode)
        rate = multiply.flops / times.pop("multiply")
        times["all, averaged"] = statistics.mean(times.pop(name) for name in tenths)
        results[f"{mode}_seconds"] = {variant: round(value, 4) for variant, value in times.items()}
        results[f"{mode}_time_ratios"] = ratios(times) | {
            "all_averaged_to_none": round(times["all, averaged"] / times["none"], 3)
        }
        results[f"{mode}_of_matrix_multiply_rate"] = round(flops(layers, batch) / times["none"] / rate, 3)
        results[f"{mode}_time_by_kind"] = time_by_kind(steps["none"])
        for variant in VARIANTS:
            print(f"{LABELS[variant]:<34} {times[variant]:8.3f} s  {memory[variant]:8.0f} MiB  ({mode})")
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
