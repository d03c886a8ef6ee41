"""Shared by the benchmarks of training steps: timing in turns, memory of separate processes."""

import copy
import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, TypeVar

import torch
import transformers
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from charformer_training.optimizer import muon_adamw


Key = TypeVar("Key", bound=Hashable)
# Shares of training done, in the middle of each tenth. The mean cost of a step at these is its average over a schedule.
TENTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
# Kinds of operations, by parts of the names of torch's operators.
KINDS = {
    "attention": ("scaled_dot_product",),
    "matrix multiplication": ("aten::mm", "aten::addmm", "aten::bmm"),
    "optimizer": ("adam",),
    "norms": ("layer_norm",),
    "activation": ("threshold", "clamp", "relu"),
    "copies and casts": ("aten::copy_",),
    "sums": ("aten::add", "aten::sum"),
}


def machine(device: str) -> dict[str, str]:
    """The device and the versions with which a figure was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds until the device is done with `work`."""
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class Step:
    """One optimizer step (AdamW, or with Muon) of a model on random ids; in bf16 on a CUDA device, or if `bf16` says so.

    `compiled="layers"` compiles a layer once for all layers, which takes seconds; `True` compiles the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        device: str,
        compiled: bool | Literal["layers"] = False,
        muon: bool = False,
        bf16: bool | None = None,
        compiler: str = "inductor",
    ):
        self.device = device
        self.inputs: dict[str, Any] = {}
        self.bf16 = device == "cuda" if bf16 is None else bf16
        model = model.to(device).train()
        self.optimizer: torch.optim.Optimizer = (
            muon_adamw(model, [], lr=1e-4) if muon else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        )
        if compiled:  # all steps of a program share one limit, above which torch silently runs eagerly
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.reset()
        if compiled == "layers":
            for layer in repeated_layers(model):
                layer.compile(backend=compiler)
        self.model = torch.compile(model, backend=compiler) if compiled is True else model
        self.ids = ids.to(device)

    def given(self, **inputs: Any) -> "Step":
        """The same model and optimizer, with further inputs."""
        other = copy.copy(self)
        other.inputs = inputs
        return other

    def __call__(self) -> float:
        """Run once; returns seconds."""
        return seconds_of(self._work, self.device)

    def _work(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, **self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are all alike: the longest list of modules of one class."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    alike = [[*modules] for modules in lists if len({type(module) for module in modules}) == 1]
    return max(alike, key=len)


def release_memory() -> None:
    """Free memory of the CUDA device that nothing refers to any more."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class MatrixMultiply:
    """The product of two square matrices, large enough to reach the machine's peak rate, in the dtype of a `Step`."""

    def __init__(self, device: str, size: int | None = None):
        self.device, self.size = device, size or (8192 if device == "cuda" else 2048)
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        self.factor = torch.randn(self.size, self.size, device=device, dtype=kind)
        self.flops = 2 * self.size**3

    def __call__(self) -> float:
        """Run once; returns seconds."""
        return seconds_of(lambda: self.factor @ self.factor, self.device)


def time_by_kind(step: Step) -> dict[str, float]:
    """The share of each kind of operation in the time of a step, the largest first."""
    cuda = step.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step()
    shares = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # CUDA kernels count as part of the operators that launch them
            kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
            shares[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: round(value / total, 3) for kind, value in sorted(shares.items(), key=lambda pair: -pair[1])}


def times_by_turns(steps: Mapping[Key, Callable[[], float]], repeats: int, name: str) -> dict[Key, float]:
    """Median seconds of each step. They take turns, so that other load on the machine affects all of them equally."""
    for step in steps.values():
        step(), step()
    times: dict[Key, list[float]] = {variant: [] for variant in steps}
    for _ in tqdm(range(repeats), desc=name):
        for variant, step in steps.items():
            times[variant].append(step())
    return {variant: statistics.median(values) for variant, values in times.items()}


def peak_memory(make_step: Callable[[], Callable[[], object]], device: str) -> float:
    """Peak memory of two steps in MiB: of this process beyond its present memory, or of the tensors on the CUDA device."""
    if device == "cuda":
        release_memory()
        torch.cuda.reset_peak_memory_stats()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step()
    step(), step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def in_own_process(program: str, *arguments: object) -> float:
    """Run `program` and return the number that it prints. Its allocator returns freed memory, so a peak is memory in use."""
    # glibc then maps each tensor separately and does not keep freed ones.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, program, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
