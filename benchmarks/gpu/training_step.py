"""Time of a training step beside comparable models, its peak memory, and the cost of a large vocabulary's losses."""

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from benchmarks import any_model, memory
from benchmarks.measure import TENTHS, MatrixMultiply, Step, peak_memory, release_memory, time_by_kind
from benchmarks.train_step import VARIANTS, Shape, make_step
from charformer_training import add_auxiliary_losses

from .report import Report
from .scale import Scale


Mode = bool | Literal["layers"]
MODES: dict[str, Mode] = {"eager": False, "compiled by layers": "layers", "compiled": True}


def median_seconds(step: Callable[[], float], repeats: int) -> float:
    """One model alone on a device that nobody else uses needs no turns; together they would not fit in its memory."""
    for _ in range(3):
        step()
    return statistics.median(step() for _ in range(repeats))


def measure(report: Report, scale: Scale) -> None:
    """The steps that matter most come first: those behind them may be cut off by the time limit."""
    multiply = MatrixMultiply(scale.device, scale.multiply)
    rate = report.measure("matrix_multiply_tflops", lambda: _tflops(multiply, scale.repeats))

    def measure_mode(mode: str, names: Sequence[str], variants: Sequence[str]) -> None:
        if MODES[mode] and scale.compiler is None:
            return
        for name, variant in itertools.product(names, variants):
            work = functools.partial(_of_step, variant, scale.shapes[name], mode, scale, rate)
            report.measure(f"{name}, {variant}, {mode}", work)

    measure_mode("eager", [*scale.shapes], VARIANTS)
    # The layers of x-transformers are of several kinds.
    measure_mode("compiled by layers", [*scale.shapes], [name for name in VARIANTS if name != "x-transformers"])
    report.measure("T12, all, eager, averaged over the schedule", lambda: _averaged(scale.shapes["T12"], scale))
    for name, shape in scale.shapes.items():
        report.measure(f"{name}, none, eager, by kind", functools.partial(_by_kind, shape, scale.device))
    measure_mode("compiled", ["T12"], ("none", "all"))  # T64 takes minutes to compile as a whole


def _tflops(multiply: MatrixMultiply, repeats: int) -> float:
    return round(multiply.flops / median_seconds(multiply, 5 * repeats) / 1e12, 2)


def _of_step(variant: str, shape: Shape, mode: str, scale: Scale, tflops: float | None) -> dict[str, float]:
    release_memory()
    step = make_step(variant, shape, scale.device, compiled=MODES[mode], compiler=scale.compiler or "inductor")
    first = step()
    seconds = median_seconds(step, scale.repeats)
    figures = {"seconds": round(seconds, 5), "first_seconds": round(first, 2)}
    if variant == "none" and tflops:
        figures["of_matrix_multiply_rate"] = round(shape.flops / seconds / 1e12 / tflops, 3)
    return figures


def _by_kind(shape: Shape, device: str) -> dict[str, float]:
    release_memory()
    return time_by_kind(make_step("none", shape, device))


def _averaged(shape: Shape, scale: Scale) -> dict[str, float]:
    release_memory()
    step = make_step("all", shape, scale.device)
    seconds = [median_seconds(step.given(training_progress=at), scale.repeats) for at in TENTHS]
    return {"seconds": round(statistics.mean(seconds), 5)}


def measure_memory(report: Report, scale: Scale) -> None:
    peaks = {}
    for variant in memory.VARIANTS:
        make = functools.partial(memory.make_step, variant, scale.memory, scale.device)
        peaks[variant] = report.measure(f"{variant}, MiB", functools.partial(peak_memory, make, scale.device))
    if all(peaks.values()):  # a process that already holds more memory shows none on a CPU
        report.record("peak", memory.report(scale.memory, scale.device, peaks))


def measure_vocabulary(report: Report, scale: Scale) -> None:
    """GPT-2 (124M) with each of the losses of `benchmarks/any_model.py`, alone on the device."""
    for variant in any_model.VARIANTS:
        report.measure(variant, functools.partial(_of_gpt2, variant, scale))

    plain = report.results.get("plain")
    if plain is not None:
        others = {name: report.results[name] for name in any_model.VARIANTS if name in report.results}
        for figure in plain:
            ratios = {name: round(values[figure] / plain[figure], 3) for name, values in others.items()}
            report.record(f"ratios of {figure}", ratios)


def _of_gpt2(variant: str, scale: Scale) -> dict[str, float]:
    settings = any_model.VARIANTS[variant]

    def make() -> Step:
        set_seed(0)
        with torch.device(scale.device):
            fields: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **scale.gpt2}
            model = GPT2LMHeadModel(GPT2Config(**fields))
        if settings is not None:
            model = add_auxiliary_losses(model, **settings)
        ids = torch.randint(0, model.config.vocab_size, (scale.gpt2_batch, scale.gpt2_window))
        return Step(model, ids, scale.device)

    peak = peak_memory(make, scale.device)
    release_memory()
    return {"seconds": median_seconds(make(), scale.repeats), "peak_memory_mib": peak}
