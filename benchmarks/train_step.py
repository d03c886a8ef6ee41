"""Time and peak memory of a training step at T12's shape: with all the paper's losses, with none, and GPT-2's.

    python benchmarks/train_step.py [--batch 4] [--repeats 5] [--output benchmarks/results/train_step_cpu.json]

Steps of the variants take turns in one process, so that whatever else the machine does hits all alike; the figures are
ratios of median times. Memory is what a process of its own needs beyond its imports, at its peak, with an allocator that
gives back what is freed (so that the peak is of what is in use). On a machine with a CUDA device the same is measured there
in bf16, eager and compiled.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from modeling_charformer import CharformerConfig, CharformerForCausalLM


WINDOW = 512
VARIANTS = ("none", "all", "gpt2")
LABELS = {"none": "Charformer, no auxiliary losses", "all": "Charformer, all paper losses", "gpt2": "GPT2LMHeadModel"}


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
    losses: dict[str, Any] = {} if variant == "all" else {"num_targets": 1, "intermediate_layers": None}
    return CharformerForCausalLM(CharformerConfig(attention_dropout=0.0, activation_dropout=0.0, **losses))


class Step:
    """One optimizer step of a variant on random bytes."""

    def __init__(self, variant: str, batch: int, device: str, compiled: bool = False):
        self.device = device
        model = build(variant).to(device).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.model = torch.compile(model) if compiled else model
        self.ids = torch.randint(0, 256, (batch, WINDOW)).to(device)

    def __call__(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.model(self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def measure_times(batch: int, repeats: int, device: str, compiled: bool = False) -> dict[str, float]:
    """Median seconds of a step of each variant, taking turns."""
    steps = {variant: Step(variant, batch, device, compiled) for variant in VARIANTS}
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in tqdm(range(repeats), desc="compiled" if compiled else "eager"):
        for variant, step in steps.items():
            times[variant].append(step())
    return {variant: statistics.median(values) for variant, values in times.items()}


def peak_memory(variant: str, batch: int, device: str) -> float:
    """Peak of two steps in MiB: of the process beyond its imports, or of the CUDA device."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(variant, batch, device)
    step(), step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def measure_memory(batch: int, device: str) -> dict[str, float]:
    """`peak_memory` of each variant, in processes of their own."""
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--batch", str(batch), "--memory-of", variant, "--device", device]
        # glibc then maps every tensor by itself instead of keeping freed ones.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[variant] = float(result.stdout)
    return peaks


def ratios(values: dict[str, float]) -> dict[str, float]:
    """The two comparisons that count."""
    return {
        "all_paper_losses_to_none": round(values["all"] / values["none"], 3),
        "none_to_gpt2": round(values["none"] / values["gpt2"], 3),
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
        print(peak_memory(arguments.memory_of, arguments.batch, arguments.device))
        return

    results: dict[str, Any] = {
        "shape": f"T12, window {WINDOW}, batch {arguments.batch}, {'bf16' if arguments.device == 'cuda' else 'f32'}",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    memory = measure_memory(arguments.batch, arguments.device)
    results["peak_memory_mib"] = {variant: round(value) for variant, value in memory.items()}
    results["peak_memory_ratios"] = ratios(memory)
    for compiled in (False, True) if arguments.device == "cuda" else (False,):
        times = measure_times(arguments.batch, arguments.repeats, arguments.device, compiled)
        mode = "compiled" if compiled else "eager"
        results[f"{mode}_seconds"] = {variant: round(value, 4) for variant, value in times.items()}
        results[f"{mode}_time_ratios"] = ratios(times)
        for variant, value in times.items():
            print(f"{LABELS[variant]:<34} {value:8.3f} s  {memory[variant]:8.0f} MiB  ({mode})")
    print(json.dumps({name: value for name, value in results.items() if name.endswith("ratios")}, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
