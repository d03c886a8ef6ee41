"""The speed of generation: with and without drafting, in batches, with and without a rolling window, T12 and GPT-2.

    python benchmarks/generate.py runs/drafting [--prompts 8] [--output benchmarks/results/generate_cpu.json]

The model is one trained by `charformer-train training/configs/drafting.yaml`. Prompts are parts of the validation split of
its text, a quarter of the window long. All methods take turns, prompt by prompt, so that other load on the machine affects
all of them equally. Figures for drafting are totals over all prompts. `bad_drafts` is the speed, as a ratio to plain
generation, of models whose heads are untrained, or sure of what is wrong. Without a model, only what needs no trained model
is measured.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import set_seed
from transformers.generation.streamers import BaseStreamer

from benchmarks.measure import in_own_process
from benchmarks.train_step import Shape, build
from charformer_training import add_auxiliary_losses
from charformer_training.arguments import DataArguments
from charformer_training.data import load_corpus, split_corpus
from modeling_charformer import CharformerConfig, CharformerForCausalLM


T12 = Shape(layers=12, batch=1)
LENGTH = 300
"""The continuation of a prompt."""

DRAFTING: dict[str, dict[str, Any]] = {
    "plain": {},
    "use_extra_targets": {"use_extra_targets": True},
    "look-up alone (prompt_lookup_num_tokens=8)": {"prompt_lookup_num_tokens": 8},
}
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature 0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "temperature 1": {"do_sample": True, "temperature": 1.0, "top_k": 0},
}


def write(model: Any, prompt: torch.Tensor, length: int, **settings: Any) -> tuple[float, torch.Tensor]:
    """Run once; returns seconds and the text."""
    begin = time.perf_counter()
    ids = model.generate(prompt.to(model.device), max_new_tokens=length, **settings).cpu()
    return time.perf_counter() - begin, ids


def prompts_of(text: np.ndarray, model: CharformerForCausalLM, count: int) -> list[torch.Tensor]:
    """Evenly spaced parts of a text, a quarter of the model's window long, each `(1, S)`."""
    window = model.config.max_position_embeddings
    starts = range(0, len(text) - window, (len(text) - window) // count)
    return [torch.tensor([text[i : i + window // 4].tolist()]) for i in starts[:count]]


def drafting(
    model: CharformerForCausalLM,
    prompts: list[torch.Tensor],
    length: int = LENGTH,
    decodings: Iterable[str] = tuple(DECODING),
) -> dict[str, Any]:
    """Seconds and forward passes of each drafting method, by decoding method, over the same prompts."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.model.register_forward_hook(count)
    report = {}
    for decoding in decodings:
        settings = DECODING[decoding]
        seconds: dict[str, list[float]] = {way: [] for way in DRAFTING}
        total_passes: dict[str, int] = dict.fromkeys(DRAFTING, 0)
        texts: dict[str, list[torch.Tensor]] = {way: [] for way in DRAFTING}
        for number, prompt in enumerate(tqdm(prompts, desc=decoding)):
            for way, more in DRAFTING.items():
                set_seed(number)
                passes = 0
                taken, ids = write(model, prompt, length, rolling_context=True, **settings, **more)
                seconds[way].append(taken)
                total_passes[way] += passes
                texts[way].append(ids)
        report[decoding] = {
            way: {
                "characters_per_pass": round(length * len(prompts) / total_passes[way], 3),
                "milliseconds_per_pass": round(1000 * sum(seconds[way]) / total_passes[way], 3),
                "speed_ratio": round(sum(seconds["plain"]) / sum(seconds[way]), 3),
                "speed_ratio_of_each_prompt": [
                    round(a / b, 2) for a, b in zip(seconds["plain"], seconds[way], strict=True)
                ],
                "prompts_with_the_same_text": sum(a.equal(b) for a, b in zip(texts["plain"], texts[way], strict=True)),
            }
            for way in DRAFTING
        }
    hook.remove()
    return report


def drafted_beside_plain(model: Any, prompts: list[torch.Tensor], length: int, **settings: Any) -> float:
    """How many times as fast as plain generation drafting is, by turns over batches of prompts `(B, S)`; median of ratios."""
    ratios = []
    for number, prompt in enumerate(prompts):
        seconds = []
        for more in ({}, {"use_extra_targets": True}):
            set_seed(number)
            settings = {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)} | settings
            seconds.append(write(model, prompt, length, **settings, **more)[0])
        ratios.append(seconds[0] / seconds[1])
    return round(statistics.median(ratios), 3)


def in_batches(
    model: Any, prompts: list[torch.Tensor], repeats: int, decodings: Iterable[str] = tuple(DECODING)
) -> dict[str, Any]:
    """The speed with drafts beside plain generation, by decoding method and size of the batch, to the end of the window."""
    report: dict[str, Any] = {}
    length = model.config.max_position_embeddings - prompts[0].shape[1]
    for decoding in decodings:
        report[decoding] = {}
        for size in (1, 4, 16):
            batches = [
                torch.cat([prompts[(first * size + row) % len(prompts)] for row in range(size)])
                for first in range(repeats)
            ]
            ratio = drafted_beside_plain(model, batches, length, **DECODING[decoding])
            report[decoding][f"batch {size}"] = ratio
    return report


def with_bad_drafts(repeats: int, model: Any = None, prompts: list[torch.Tensor] | None = None) -> dict[str, Any]:
    """The greedy speed beside plain generation of models whose heads are untrained, or sure of what is wrong."""
    gpt2 = add_auxiliary_losses(build("gpt2", Shape(4, 1, 128, 256), "cpu"), heads="own", num_targets=8).eval()
    models = {"gpt2": gpt2} if model is None else {"gpt2": gpt2, "charformer": copy.deepcopy(model)}
    prompts = prompts or [torch.randint(0, 256, (1, 32)) for _ in range(16)]
    report: dict[str, Any] = {}
    for name, one in models.items():
        for kind, deviation in (("untrained", 0.02), ("sure", 1.0)):
            heads: Any = one.auxiliary_heads
            for weight in heads.parameters():
                torch.nn.init.normal_(weight, std=deviation)
            report[f"{name}, {kind}"] = in_batches(one, prompts, repeats, ["greedy"])["greedy"]
    return report


def peak_mib() -> float:
    """The peak memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**10


class Memory(BaseStreamer):
    """Records the peak memory of the process by the number of characters written."""

    def __init__(self) -> None:
        self.peaks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.peaks.append(peak_mib())

    def end(self) -> None:
        pass


def rolling(model: CharformerForCausalLM, length: int, repeats: int = 5) -> dict[str, float]:
    """Time per character in a rolling window, compared with inside the window; memory over one long text."""
    window, prompt = model.config.max_position_embeddings, torch.tensor([[10]])
    inside, rolled, memory = [], [], Memory()
    for _ in tqdm(range(repeats), desc="rolling"):
        inside.append(write(model, prompt, window - 1, do_sample=False)[0] / (window - 1))
        rolled.append(write(model, prompt, 10 * window, do_sample=False, rolling_context=True)[0] / (10 * window))
    settings = {"do_sample": True, "rolling_context": True, "streamer": memory}
    seconds, _ = write(model, prompt, length, **settings)
    peaks = memory.peaks
    return {
        "time_ratio": round(statistics.median(rolled) / statistics.median(inside), 3),
        "long_text_characters": length,
        "long_text_seconds": round(seconds, 1),
        "mib_more_after_the_first_tenth": round(peaks[-1] - peaks[len(peaks) // 10], 1),
    }


def beside_gpt2(repeats: int, length: int, shape: Shape = T12, device: str = "cpu") -> dict[str, float]:
    models: dict[str, Any] = {
        name: build(variant, shape, device).eval() for name, variant in (("charformer", "none"), ("gpt2", "gpt2"))
    }
    prompt = torch.tensor([[10]])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in tqdm(range(repeats + 1), desc="T12's shape"):
        for name, model in models.items():
            taken, _ = write(model, prompt, length, do_sample=False, pad_token_id=0)
            if number:  # the first is a warm-up
                seconds[name].append(taken / length)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "milliseconds_per_character": round(1000 * medians["charformer"], 2),
        "gpt2_milliseconds_per_character": round(1000 * medians["gpt2"], 2),
        "speed_ratio": round(medians["gpt2"] / medians["charformer"], 3),
    }


def load(folder: str, what: str) -> float:
    """Loading a model and running it once: seconds, or peak memory in MiB beyond that of an empty process."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = peak_mib()
    begin = time.perf_counter()
    model = CharformerForCausalLM.from_pretrained(folder)
    if what == "seconds":
        return time.perf_counter() - begin
    write(model, torch.tensor([[10]]), 2, do_sample=False)
    return peak_mib() - before


def loading(repeats: int) -> dict[str, float]:
    """T12 with all heads, like in training, and without auxiliary heads."""
    full = CharformerForCausalLM(CharformerConfig())
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        full.save_pretrained(f"{folder}/full")
        full.without_auxiliary_heads().save_pretrained(f"{folder}/inference")
        for what in ("seconds", "memory_mib"):
            values: dict[str, list[float]] = {"full": [], "inference": []}
            for _ in range(repeats):
                for name, found in values.items():
                    found.append(in_own_process(__file__, "--load", f"{folder}/{name}", what))
            medians = {name: statistics.median(found) for name, found in values.items()}
            results[f"full_{what}"] = round(medians["full"], 3)
            results[f"inference_{what}_ratio"] = round(medians["inference"] / medians["full"], 3)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a trained model that drafts")
    parser.add_argument("--text", default="python-stdlib", help="the text that the model was trained on")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rolling-length", type=int, default=10_000, help="characters of the long text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(load(*arguments.load))
        return

    results: dict[str, Any] = {
        "device": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if arguments.model:
        model = CharformerForCausalLM.from_pretrained(arguments.model).eval()
        text = split_corpus(load_corpus(DataArguments(data_path=arguments.text)), 0.9, 0.05)["validation"].data
        prompts = prompts_of(text, model, arguments.prompts)
        results["model"] = {
            name: getattr(model.config, name)
            for name in ("num_hidden_layers", "hidden_size", "max_position_embeddings", "num_targets", "target_heads")
        }
        results["drafting"] = drafting(model, prompts)
        if results["drafting"]["greedy"]["use_extra_targets"]["prompts_with_the_same_text"] < len(prompts):
            raise AssertionError("drafting changed greedy text")
        results["rolling"] = rolling(model, arguments.rolling_length)
        results["batches"] = in_batches(model, prompts, arguments.repeats)
        results["bad_drafts"] = with_bad_drafts(arguments.repeats, model, prompts)
    else:
        results["bad_drafts"] = with_bad_drafts(arguments.repeats)
    results["t12"] = beside_gpt2(arguments.repeats, 256)
    results["t12_loading"] = loading(arguments.repeats)
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
