"""The cost of `add_auxiliary_losses` for models with a large vocabulary, as ratios to the same model without losses.

    python benchmarks/any_model.py [--shape gpt2] [--batch 2] [--window 512] [--repeats 5] [--output FILE]

Shapes, with random weights: `gpt2` (12 layers, width 768, 50,257 tokens; 124 M parameters) and `qwen` (a Qwen 2 of 12 layers,
width 512, 151,936 tokens). Time and peak memory of a training step (AdamW) are measured in one run: the time by turns, on a CPU
as the time that the process used it, and the memory in processes of their own. The head of an intermediate layer costs as much as the model's output layer: with a small vocabulary almost
nothing, with these most of a step. `position_share` computes a term on some of the positions.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

from benchmarks.measure import Step, in_own_process, machine, peak_memory, times_by_turns
from charformer_training import add_auxiliary_losses


SHARE = 1 / 32
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "all layers, 2 targets, 1/32 of the positions": {"num_targets": 2, "position_share": SHARE},
    "all layers, 1/32 of the positions": {"num_targets": 1, "position_share": SHARE},
    "2 targets": {"num_targets": 2, "intermediate_layers": None},
    "one layer a step": {"num_targets": 1, "intermediate_schedule": "random"},
    "every fourth layer in rotation": {"num_targets": 1, "intermediate_schedule": "rotate_4"},
    "all layers": {"num_targets": 1},
    "all layers, 2 targets": {"num_targets": 2},
    "own heads, layers 4 and 8": {"num_targets": 1, "intermediate_layers": [4, 8], "heads": "own"},
}


def plain_model(shape: str, window: int) -> PreTrainedModel:
    if shape == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, n_positions=max(window, 1024))
        )
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=max(window, 1024), tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def build(shape: str, window: int, variant: str) -> PreTrainedModel:
    set_seed(0)
    model, settings = plain_model(shape, window), VARIANTS[variant]
    return model if settings is None else add_auxiliary_losses(model, **settings)


def cpu_seconds(step: Callable[[], object]) -> float:
    """Run a step; returns the seconds that it used the CPU, which other programs on the machine hardly change."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("gpt2", "qwen"), default="gpt2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape, window, device = arguments.shape, arguments.window, arguments.device

    def make_step(variant: str) -> Step:
        model = build(shape, window, variant)
        ids = torch.randint(0, int(model.config.vocab_size), (arguments.batch, window))
        return Step(model, ids, device)

    if arguments.memory_of:
        print(peak_memory(lambda: make_step(arguments.memory_of), device))
        return

    options = ("--shape", shape, "--batch", arguments.batch, "--window", window, "--device", device)
    variants = [variant for variant in VARIANTS if variant in {"plain", *arguments.variants}]
    memory = {variant: in_own_process(__file__, *options, "--memory-of", variant) for variant in variants}
    times = {"plain": 1.0}
    for variant in variants[1:]:  # two at a time, since all of them together would not fit in memory
        pair = {name: make_step(name) for name in ("plain", variant)}
        timed = pair if device == "cuda" else {name: partial(cpu_seconds, step) for name, step in pair.items()}
        seconds = times_by_turns(timed, arguments.repeats, variant)
        times[variant] = seconds[variant] / seconds["plain"]
    model = plain_model(shape, window)
    results = {
        "shape": f"{shape} ({model.num_parameters() / 1e6:.0f} M parameters, {model.config.vocab_size:,} tokens), window {window},"
        f" batch {arguments.batch}, {'bf16' if device == 'cuda' else 'f32'}",
        **machine(device),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": {variant: round(value) for variant, value in memory.items()},
        "peak_memory_ratios": {variant: round(value / memory["plain"], 3) for variant, value in memory.items()},
        "time_ratios": {variant: round(value, 3) for variant, value in times.items()},
    }
    for variant in variants:
        print(f"{variant:<46} {times[variant]:6.2f} x time  {memory[variant] / memory['plain']:6.2f} x memory")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
