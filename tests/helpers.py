"""What several tests, and the programs they start, build alike."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, default_data_collator, set_seed

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    ConsecutiveWindows,
    RandomWindows,
    Split,
)
from charformer_training.history import is_training
from modeling_charformer import CharformerConfig, CharformerForCausalLM


ROOT = Path(__file__).parents[1]
# What travels with a saved model: all of the package but what makes it one.
CODE_FILES = {path.name for path in (ROOT / "modeling_charformer").glob("*.py")} - {"__init__.py"}
CONFIGS = ROOT / "training" / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
# What makes any recipe a matter of seconds.
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "warmup_steps": 0,
    "num_attention_heads": 2,
    "report_to": "none",
    "max_eval_bytes": 300,
    "sample_length": 10,
    "use_cpu": "true",
    "bf16": "false",
    "dataloader_pin_memory": "false",
    "dataloader_num_workers": 0,
}

# A run of the Trainer that saves, evaluates and logs at different steps.
SAVING = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 5}

TINY: dict[str, Any] = {
    # Random weights write, and random ids are, any byte: none of them is padding or ends a text.
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


def tiny_trainer(
    output_dir: str, splits: dict[str, Split], model: dict | PreTrainedModel | None = None, callbacks=None, **changes
) -> AuxiliaryLossTrainer:
    """A run of 8 steps of 8 windows with the paper's schedule; `model` changes the tiny model's configuration, or is another model."""
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    args = AuxiliaryLossTrainingArguments(**(settings | changes))
    set_seed(0)
    return AuxiliaryLossTrainer(
        model=model
        if isinstance(model, PreTrainedModel)
        else CharformerForCausalLM(CharformerConfig(**(TINY | (model or {})))),
        args=args,
        train_dataset=RandomWindows(splits["train"], 24, 8 * args.max_steps, seed=0),
        eval_dataset=ConsecutiveWindows(splits["validation"], 24),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def small_command(recipe: str = QUICKSTART, **settings: Any) -> list[str]:
    """Arguments of charformer-train for a recipe made small, with other settings in their place."""
    settings = SMALL | settings
    return [recipe, *(word for name, value in settings.items() for word in (f"--{name}", *str(value).split()))]


def loss_logs(trainer: AuxiliaryLossTrainer) -> list[dict[str, float]]:
    """The log entries of the training loop, without times."""
    kept = ("step", "learning_rate", "grad_norm")
    return [
        {key: value for key, value in entry.items() if key in kept or key.startswith(("loss", "gradient_"))}
        for entry in trainer.state.log_history
        if is_training(entry)
    ]


def assert_same_logs(first: list[dict[str, float]], second: list[dict[str, float]], *, rel: float = 1e-4) -> None:
    """That two runs have logged the same, to float rounding."""
    assert [set(entry) for entry in first] == [set(entry) for entry in second]
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=rel)


def run_without_package(
    program: str, folder: Path, tmp_path: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program, with `folder` and `arguments` for its own, where the package cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    # -S leaves out site-packages' .pth files, through which an editable installation puts the package on the path.
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    return subprocess.run(
        [sys.executable, "-S", "-c", program, str(folder), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": packages},
    )


def training_entries(folder: Path) -> list[dict]:
    """The log entries of training that a run has left in its folder."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
