"""Cross-entropy of a linear classifier over a large vocabulary: time and peak memory of the methods.

    python benchmarks/cross_entropy.py [--shape gpt2] [--rows 512] [--repeats 3] [--output FILE]

Shapes: `gpt2` (width 768, 50,257 symbols) and `qwen` (width 512, 151,936 symbols). Each method computes the sum of the
rows' cross-entropies, and the gradients on the rows and on the classifier. Rows have different weights where the method
accepts weights. Time is CPU time, by turns in one run. Memory is that of separate processes, and includes the rows, the
matrix and its gradient.

- `plain`: all logits in memory.
- `pieces`: piece by piece, each run again in the backward pass (`chunked_cross_entropy_sums`).
- `one pass`: piece by piece, with the gradients computed in the forward pass (`row_cross_entropies`).
- `torch, sum`: `torch.nn.functional.linear_cross_entropy` with pieces of the same size. It has no weights of rows.
- `torch, rows`: the same with `reduction="none"`, for weights of rows. It runs the classifier again in the backward pass.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.any_model import cpu_seconds
from benchmarks.measure import in_own_process, machine, peak_memory, times_by_turns
from modeling_charformer.cross_entropy import chunked_cross_entropy_sums
from modeling_charformer.linear_cross_entropy import MAX_LOGITS, LinearClassifier, row_cross_entropies


SHAPES = {"gpt2": (768, 50_257), "qwen": (512, 151_936)}


def of_torch(reduction: str, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    size = MAX_LOGITS // len(weight)
    options: Any = torch.nn.LinearCrossEntropyOptions(
        acc_policy="compact", chunking_method=None, batch_chunk_size=size
    )
    return F.linear_cross_entropy(rows, weight, targets, reduction=reduction, options=options)


def plain(rows: Tensor, weight: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight), targets, reduction="none") @ counts


def pieces(rows: Tensor, weight: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    def classify(some: Tensor) -> list[Tensor]:
        return [F.linear(some, weight)]

    return chunked_cross_entropy_sums(rows[None], targets[None, None], classify, len(weight), counts[None, None])[0]


def one_pass(rows: Tensor, weight: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    return row_cross_entropies(rows, LinearClassifier(weight), targets, counts) @ counts


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "pieces": pieces,
    "one pass": one_pass,
    "torch, sum": lambda rows, weight, targets, counts: of_torch("sum", rows, weight, targets),
    "torch, rows": lambda rows, weight, targets, counts: of_torch("none", rows, weight, targets) @ counts,
}


def make_step(way: str, shape: str, number: int) -> Callable[[], float]:
    width, vocab_size = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(number, width, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(vocab_size, width, generator=generator)).requires_grad_()
    targets = torch.randint(0, vocab_size, (number,), generator=generator)
    counts = torch.rand(number, generator=generator) + 0.5

    def step() -> float:
        rows.grad = weight.grad = None
        loss = WAYS[way](rows, weight, targets, counts)
        loss.backward()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, rows = arguments.shape, arguments.rows
    if arguments.memory_of:
        print(peak_memory(lambda: make_step(arguments.memory_of, shape, rows), "cpu"))
        return
    ways = [way for way in WAYS if "torch" not in way or hasattr(F, "linear_cross_entropy")]
    memory = {way: in_own_process(__file__, "--shape", shape, "--rows", rows, "--memory-of", way) for way in ways}
    steps = {way: partial(cpu_seconds, make_step(way, shape, rows)) for way in ways}
    seconds = times_by_turns(steps, arguments.repeats, shape)
    width, vocab_size = SHAPES[shape]
    results = {
        "shape": f"{rows} rows of width {width}, {vocab_size:,} symbols, f32",
        **machine("cpu"),
        "threads": torch.get_num_threads(),
        "seconds": {way: round(value, 3) for way, value in seconds.items()},
        "peak_memory_mib": {way: round(value) for way, value in memory.items()},
    }
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
