"""What the benchmarks of training steps share: time by turns, memory in processes of their own."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from tqdm import tqdm

from charformer_training.optimizer import muon_adamw


Key = TypeVar("Key", bound=Hashable)
# Shares of training done, in the middle of each tenth: the mean of a step's cost at these is its average over a schedule.
TENTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


def machine(device: str) -> dict[str, str]:
    """What a figure was measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Step:
    """One optimizer step (AdamW, or with Muon) of a model on random ids; in bf16 on a CUDA device, or where asked for."""

    def __init__(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        device: str,
        compiled: bool = False,
        muon: bool = False,
        bf16: bool | None = None,
        **inputs: Any,
    ):
        self.device, self.inputs = device, inputs
        self.bf16 = device == "cuda" if bf16 is None else bf16
        model = model.to(device).train()
        self.optimizer: torch.optim.Optimizer = (
            muon_adamw(model, [], lr=1e-4) if muon else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        )
        if compiled:  # all steps of a program count against one limit, past which torch silently runs eagerly
            torch._dynamo.config.recompile_limit = 64
        self.model = torch.compile(model) if compiled else model
        self.ids = ids.to(device)

    def __call__(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False, **self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def times_by_turns(steps: Mapping[Key, Step], repeats: int, name: str) -> dict[Key, float]:
    """Median seconds of each step. They take turns, so that whatever else the machine does hits all alike."""
    for step in steps.values():
        step(), step()
    times: dict[Key, list[float]] = {variant: [] for variant in steps}
    for _ in tqdm(range(repeats), desc=name):
        for variant, step in steps.items():
            times[variant].append(step())
    return {variant: statistics.median(values) for variant, values in times.items()}


def peak_memory(make_step: Callable[[], Step], device: str) -> float:
    """Peak of two steps in MiB: of this process beyond what it holds now, or of the CUDA device."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step()
    step(), step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def in_own_process(program: str, *arguments: object) -> float:
    """What `program` prints: a number. Its allocator gives back what is freed, so that a peak is of what is in use."""
    # glibc then maps every tensor by itself instead of keeping freed ones.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, program, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
