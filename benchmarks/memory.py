"""Peak memory of a training step of T64 at the paper's batch, 16 windows of 512: with and without losses and checkpointing.

    python benchmarks/memory.py [--batch 16] [--layers 64] [--output benchmarks/results/memory_cpu.json]

The step runs in bf16 (autocast), without dropout. On a CPU the figure is the memory of a separate process beyond its imports,
with an allocator that returns freed memory. A variant takes about 20 GB and, on two cores, some minutes. On a CUDA device the
figure is the largest amount that was allocated.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from benchmarks.measure import Step, in_own_process, machine, peak_memory
from modeling_charformer import CharformerConfig, CharformerForCausalLM


WINDOW = 512
LOSSES: dict[str, dict[str, Any]] = {"none": {"num_targets": 1, "intermediate_layers": None}, "all": {}}


def make_step(losses: str, layers: int, batch: int, checkpointing: bool, device: str) -> Step:
    set_seed(0)
    config = CharformerConfig(
        num_hidden_layers=layers, attention_dropout=0.0, activation_dropout=0.0, **LOSSES[losses]
    )
    model = CharformerForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return Step(model, torch.randint(0, 256, (batch, WINDOW)), device, bf16=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=LOSSES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.layers, arguments.batch)
    if arguments.one:
        make = lambda: make_step(arguments.one, *shape, arguments.checkpointing, arguments.device)  # noqa: E731
        print(peak_memory(make, arguments.device))
        return

    options = ("--layers", arguments.layers, "--batch", arguments.batch, "--device", arguments.device)
    peaks: dict[str, dict[str, float]] = {}
    progress = tqdm(total=4, unit="variant")
    for name, more in (("plain", ()), ("checkpointed", ("--checkpointing",))):
        peaks[name] = {}
        for losses in LOSSES:
            peaks[name][losses] = in_own_process(__file__, *options, *more, "--one", losses)
            progress.update()
    progress.close()
    results = {
        "shape": f"width 512, {arguments.layers} layers, window {WINDOW}, batch {arguments.batch}, bf16",
        **machine(arguments.device),
        "peak_memory_mib": {name: {key: round(value) for key, value in of.items()} for name, of in peaks.items()},
        "all_paper_losses_to_none": {name: round(of["all"] / of["none"], 3) for name, of in peaks.items()},
    }
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
