"""Peak memory of a training step of T64 at the paper's batch, 16 windows of 512: with and without losses and checkpointing.

    python benchmarks/memory.py [--batch 16] [--layers 64] [--output benchmarks/results/memory_cpu.json]

The step runs in bf16 (autocast), without dropout. The figure is the memory of a separate process beyond its imports, with an
allocator that returns freed memory. A variant takes about 20 GB and, on two cores, some minutes. For a CUDA device there is
`python -m benchmarks.gpu`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import train_step
from benchmarks.measure import Step, in_own_process, machine, peak_memory
from benchmarks.train_step import Shape


VARIANTS = {
    f"{losses}, {memory}": (losses, memory == "checkpointed")
    for memory in ("plain", "checkpointed")
    for losses in ("none", "all")
}
"""By name, the losses and whether gradients are checkpointed."""


def make_step(variant: str, shape: Shape, device: str) -> Step:
    losses, checkpointing = VARIANTS[variant]
    model: Any = train_step.build(losses, shape, device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return Step(model, train_step.random_ids(shape), device, bf16=True)


def report(shape: Shape, device: str, peaks: Mapping[str, float]) -> dict[str, Any]:
    """The figures from the peak of each of `VARIANTS` in MiB."""
    ways = ("plain", "checkpointed")
    return {
        "shape": f"width {shape.width}, {shape.layers} layers, window {shape.window}, batch {shape.batch}, bf16",
        **machine(device),
        "peak_memory_mib": {
            way: {losses: round(peaks[f"{losses}, {way}"]) for losses in ("none", "all")} for way in ways
        },
        "all_paper_losses_to_none": {way: round(peaks[f"all, {way}"] / peaks[f"none, {way}"], 3) for way in ways},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = Shape(arguments.layers, arguments.batch)
    if arguments.one:
        print(peak_memory(lambda: make_step(arguments.one, shape, "cpu"), "cpu"))
        return

    options = ("--layers", arguments.layers, "--batch", arguments.batch)
    peaks = {
        variant: in_own_process(__file__, *options, "--one", variant) for variant in tqdm(VARIANTS, unit="variant")
    }
    results = report(shape, "cpu", peaks)
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
