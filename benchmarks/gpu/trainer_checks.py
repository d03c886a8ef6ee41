"""Whether the Trainer logs on this device what it logs on the CPU, and in bf16, compiled, accumulated and resumed."""

import math
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import default_data_collator, set_seed

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    ConsecutiveWindows,
    RandomWindows,
    Split,
)
from charformer_training.history import is_training
from modeling_charformer import CharformerConfig, CharformerForCausalLM

from .scale import Scale


STEPS, WINDOW = 4, 24
NOT_COMPARED = ("epoch", "grad_norm", "learning_rate", "step")


def make_trainer(folder: str, device: str, **settings: Any) -> AuxiliaryLossTrainer:
    """A few steps with the paper's losses; each device draws the same windows and the same weights."""
    text = np.frombuffer("".join(f"Line {n}: {n * 7 % 13} trees.\n" for n in range(300)).encode(), np.uint8)
    fields: dict[str, Any] = {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    args = AuxiliaryLossTrainingArguments(**(fields | settings))
    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"max_position_embeddings": WINDOW, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return AuxiliaryLossTrainer(
        CharformerForCausalLM(CharformerConfig(**sizes)),
        args,
        train_dataset=RandomWindows(Split("train", text), WINDOW, 8 * args.max_steps, seed=0),
        eval_dataset=ConsecutiveWindows(Split("validation", text[:500]), WINDOW),
        data_collator=default_data_collator,
    )


def logs(trainer: AuxiliaryLossTrainer) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if name not in NOT_COMPARED}
        for entry in trainer.state.log_history
        if is_training(entry)
    ]


def trained(device: str, **settings: Any) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, device, **settings)
        trainer.train()
        return logs(trainer)


def largest_error(entries: list[dict[str, float]], expected: list[dict[str, float]], limit: float) -> float:
    assert [set(entry) for entry in entries] == [set(entry) for entry in expected]
    error = max(
        abs(entry[name] - value) / abs(value)
        for entry, other in zip(entries, expected, strict=True)
        for name, value in other.items()
        if value
    )
    if not error <= limit:
        raise AssertionError(f"the logged terms differ by {error:.2e}, more than {limit:.0e}: {entries}, {expected}")
    return error


def as_on_the_cpu(scale: Scale) -> dict[str, float]:
    expected = trained("cpu")
    return {
        "float32": largest_error(trained(scale.device), expected, 1e-3),
        "accumulated": largest_error(
            trained(scale.device, per_device_train_batch_size=2, gradient_accumulation_steps=4), expected, 1e-3
        ),
        "bf16": largest_error(trained(scale.device, bf16=True), expected, 0.05),
        "Muon": largest_error(trained(scale.device, muon=True), trained("cpu", muon=True), 0.05),
    }


def resumed(scale: Scale) -> dict[str, float]:
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, scale.device, **saving)
        trainer.train()
        again = make_trainer(folder, scale.device, **saving)
        again.train(f"{folder}/checkpoint-{STEPS // 2}")
        return {"resumed": largest_error(logs(again), logs(trainer), 1e-6)}


def evaluated(scale: Scale) -> dict[str, float]:
    bits = {}
    for device in ("cpu", scale.device):
        with tempfile.TemporaryDirectory() as folder:
            bits[device] = make_trainer(folder, device).evaluate()["eval_bpb"]
    if not math.isclose(bits[scale.device], bits["cpu"], rel_tol=1e-5):
        raise AssertionError(f"bits per byte on the devices: {bits}")
    return bits


def compiled(device: str, compiler: str) -> dict[str, float]:
    # A single step, since the model is compiled anew for each layer that drops out.
    settings = {"torch_compile": True, "torch_compile_backend": compiler, "max_steps": 1}
    return {"compiled": largest_error(trained(device, **settings), trained("cpu", max_steps=1), 1e-3)}


CHECKS: dict[str, Callable[[Scale], dict[str, float]]] = {
    "Trainer": as_on_the_cpu,
    "Trainer, resumed": resumed,
    "Trainer, evaluation": evaluated,
}
