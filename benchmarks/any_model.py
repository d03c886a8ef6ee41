"""The cost of `add_auxiliary_losses` for a model with a large vocabulary: GPT-2 (12 layers, width 768, 50,257 tokens).

    python benchmarks/any_model.py [--batch 2] [--window 512] [--repeats 5] [--output benchmarks/results/any_model_cpu.json]

Time and peak memory of a training step (AdamW) are ratios to the same model without auxiliary losses, measured in the same
run. The head of an intermediate layer costs as much as the model's output layer. With a small vocabulary that is almost
nothing, with this one it is not.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from benchmarks.measure import Step, in_own_process, machine, peak_memory, times_by_turns
from charformer_training import add_auxiliary_losses


VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "shared, one layer a step": {"num_targets": 1, "intermediate_schedule": "random"},
    "shared, every fourth layer in rotation": {"num_targets": 1, "intermediate_schedule": "rotate_4"},
    "shared, all layers": {"num_targets": 1},
    "shared, all layers, 2 targets": {"num_targets": 2},
    "shared, 2 targets alone": {"num_targets": 2, "intermediate_layers": None},
    "own, layers 4 and 8": {"num_targets": 1, "intermediate_layers": [4, 8], "classifiers": "own"},
}


def build(variant: str) -> PreTrainedModel:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    settings = VARIANTS[variant]
    return model if settings is None else add_auxiliary_losses(model, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ids = torch.randint(0, 50_257, (arguments.batch, arguments.window))
    if arguments.memory_of:
        print(peak_memory(lambda: Step(build(arguments.memory_of), ids, arguments.device), arguments.device))
        return

    options = ("--batch", arguments.batch, "--window", arguments.window, "--device", arguments.device)
    memory = {variant: in_own_process(__file__, *options, "--memory-of", variant) for variant in VARIANTS}
    times = {"plain": 1.0}
    for variant in VARIANTS:
        if variant != "plain":  # two at a time, since all of them together would not fit in memory
            pair = {name: Step(build(name), ids, arguments.device) for name in ("plain", variant)}
            seconds = times_by_turns(pair, arguments.repeats, variant)
            times[variant] = seconds[variant] / seconds["plain"]
    results = {
        "shape": f"GPT-2 (124 M parameters), window {arguments.window}, batch {arguments.batch},"
        f" {'bf16' if arguments.device == 'cuda' else 'f32'}",
        **machine(arguments.device),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": {variant: round(value) for variant, value in memory.items()},
        "peak_memory_ratios": {variant: round(value / memory["plain"], 3) for variant, value in memory.items()},
        "time_ratios": {variant: round(value, 3) for variant, value in times.items()},
    }
    for variant in VARIANTS:
        print(f"{variant:<40} {times[variant]:6.2f} x time  {memory[variant] / memory['plain']:6.2f} x memory")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
