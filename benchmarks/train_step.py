"""Time and peak memory of a training step at T12's shape: with the paper's losses, with none, and beside the peers.

    python benchmarks/train_step.py [--batch 4] [--repeats 5] [--output benchmarks/results/train_step_cpu.json]

The peers are GPT-2 and Llama of Transformers, and x-transformers (`pip install x-transformers`; left out otherwise), of the
same depth, width and heads, and as many weights in the feed-forward layers. `all_averaged` is the mean over training of a
step with the paper's schedule, by which layers drop out.

Steps of the variants take turns in one process, so that whatever else the machine does hits all alike; the figures are
ratios of median times. Memory is what a process of its own needs beyond its imports, at its peak, with an allocator that
gives back what is freed (so that the peak is of what is in use). On a machine with a CUDA device the same is measured there
in bf16, eager and compiled.
"""

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import TENTHS, Step, in_own_process, machine, peak_memory, times_by_turns
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from modeling_charformer import CharformerConfig, CharformerForCausalLM


WINDOW = 512
LABELS = {
    "none": "Charformer, no auxiliary losses",
    "all": "Charformer, all paper losses",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "x-transformers": "x-transformers",
}
PEERS = ("gpt2", "llama", *(["x-transformers"] if importlib.util.find_spec("x_transformers") else []))
VARIANTS = ("none", "all", *PEERS)


def build(variant: str) -> nn.Module:
    """T12's shape without dropout, which the machine's random numbers would otherwise dominate."""
    set_seed(0)
    if variant == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=256, n_positions=WINDOW, n_embd=512, n_layer=12, n_head=2, n_inner=2048,
                activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    if variant == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=512, num_hidden_layers=12, num_attention_heads=2, intermediate_size=1365,
                max_position_embeddings=WINDOW, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
    if variant == "x-transformers":
        return XTransformer()
    losses: dict[str, Any] = {} if variant == "all" else {"num_targets": 1, "intermediate_layers": None}
    return CharformerForCausalLM(CharformerConfig(attention_dropout=0.0, activation_dropout=0.0, **losses))


class XTransformer(nn.Module):
    """That of x-transformers, called as a model of Transformers is."""

    def __init__(self) -> None:
        super().__init__()
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        layers = Decoder(dim=512, depth=12, heads=2, attn_dim_head=256, attn_flash=True)
        self.model = AutoregressiveWrapper(TransformerWrapper(num_tokens=256, max_seq_len=WINDOW, attn_layers=layers))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(loss=self.model(input_ids))


def make_step(variant: str, batch: int, device: str, compiled: bool = False) -> Step:
    return Step(build(variant), torch.randint(0, 256, (batch, WINDOW)), device, compiled)


def ratios(values: dict[str, float]) -> dict[str, float]:
    """The comparisons that count."""
    compared = {"all_paper_losses_to_none": ("all", "none"), **{f"none_to_{peer}": ("none", peer) for peer in PEERS}}
    return {name: round(values[one] / values[other], 3) for name, (one, other) in compared.items()}


def costs_over_the_schedule(batch: int, device: str, repeats: int, compiled: bool) -> dict[str, float]:
    """Time of a step with all of the paper's losses as a ratio to one with none: at the start, and averaged over training."""
    ids = torch.randint(0, 256, (batch, WINDOW))
    steps = {"none": Step(build("none"), ids, device, compiled)}
    steps |= {str(at): Step(build("all"), ids, device, compiled, training_progress=at) for at in (0.0, *TENTHS)}
    times = times_by_turns(steps, repeats, "over the schedule")
    averaged = statistics.mean(times[str(at)] for at in TENTHS)
    return {
        "all_paper_losses_to_none": round(times["0.0"] / times["none"], 3),
        "all_averaged_to_none": round(averaged / times["none"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_memory(lambda: make_step(arguments.memory_of, arguments.batch, arguments.device), arguments.device))
        return

    results: dict[str, Any] = {
        "shape": f"T12, window {WINDOW}, batch {arguments.batch}, {'bf16' if arguments.device == 'cuda' else 'f32'}",
        **machine(arguments.device),
        "threads": torch.get_num_threads(),
    }
    options = ("--batch", arguments.batch, "--device", arguments.device)
    memory = {variant: in_own_process(__file__, *options, "--memory-of", variant) for variant in VARIANTS}
    results["peak_memory_mib"] = {variant: round(value) for variant, value in memory.items()}
    results["peak_memory_ratios"] = ratios(memory)
    for compiled in (False, True) if arguments.device == "cuda" else (False,):
        mode = "compiled" if compiled else "eager"
        steps = {variant: make_step(variant, arguments.batch, arguments.device, compiled) for variant in VARIANTS}
        times = times_by_turns(steps, arguments.repeats, mode)
        results[f"{mode}_seconds"] = {variant: round(value, 4) for variant, value in times.items()}
        of_schedule = costs_over_the_schedule(arguments.batch, arguments.device, arguments.repeats, compiled)
        results[f"{mode}_time_ratios"] = ratios(times) | of_schedule
        for variant, value in times.items():
            print(f"{LABELS[variant]:<34} {value:8.3f} s  {memory[variant]:8.0f} MiB  ({mode})")
    print(json.dumps({name: value for name, value in results.items() if name.endswith("ratios")}, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
