"""A Trainer whose checkpoints are whole and finite; which folders hold one, and whether it fits the model."""

import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .files import saving_failed_message
from .models import saved_heads, unwrap_peft
from .pushing import HubTrainer


class LogWhenSaving(TrainerCallback):
    """Logs at every step that saves, so that no sum is under way in a checkpoint and a resumed run logs the same."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class SafeTrainer(HubTrainer):
    """`transformers.Trainer` whose checkpoints can be relied on.

    - Checkpoints are whole: what fails while it is written is removed, and `resume_from_checkpoint` is checked first.
    - They are finite: a loss or a weight that is not stops the run with a `FloatingPointError` before they are written;
      the message names the step and what is not finite.
    - Auxiliary heads beside a PEFT adapter are saved and loaded with it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(LogWhenSaving())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last *complete* checkpoint of `output_dir`.

        Raises:
            ValueError: If the checkpoint is missing, incomplete, damaged or that of another model.
            FloatingPointError: If a loss turns nan or infinite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self._get_output_dir(None))
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} holds no complete checkpoint")
        if resume_from_checkpoint and self.model is not None:
            check_checkpoint(resume_from_checkpoint, self.model)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._raise_if_not_finite()  # in the steps since the last log entry
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        base: Any = unwrap_peft(cast(nn.Module, self.model))
        folder = output_dir or str(self.args.output_dir)
        if base is not self.model and hasattr(base, "save_auxiliary_heads"):  # PEFT saves its adapter alone
            base.save_auxiliary_heads(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_auxiliary_heads(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_auxiliary_heads(str(self.state.best_model_checkpoint))

    def _load_auxiliary_heads(self, folder: str) -> None:
        base: Any = unwrap_peft(cast(nn.Module, self.model))
        if hasattr(base, "load_auxiliary_heads") and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            base.load_auxiliary_heads(folder)  # those two load all weights together

    def _first_not_finite(self) -> tuple[int, list[str]] | None:
        """The step since the last log entry at which a loss was not finite, and the names of those that were not.

        All processes call this together.
        """
        finite = math.isfinite(float(self._tr_loss))
        return None if finite else (self.state.global_step, ["loss"])

    def _raise_if_not_finite(self) -> None:
        if (found := self._first_not_finite()) is not None:
            raise self._not_finite_error(*found)

    def _not_finite_error(self, step: int, names: list[str]) -> FloatingPointError:
        last = last_complete_checkpoint(self._get_output_dir(None))
        return FloatingPointError(
            f"not finite at step {step}: {', '.join(names)}. "
            + (f"The last good checkpoint is {last}. " if last else "No checkpoint had been written. ")
            + "Lower the learning rate, warm it up for longer, or clip gradients (max_grad_norm)"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._raise_if_not_finite()
        weights = self.accelerator.unwrap_model(model).named_parameters()
        broken = [name for name, weight in weights if not bool(weight.isfinite().all())]
        if broken:  # a step can break the weights while its own loss still was finite
            raise self._not_finite_error(self.state.global_step, broken)
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # an older one of that name is complete no more
            Path(folder, "trainer_state.json").unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            if is_complete(folder):
                raise  # what failed came after it
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, Exception):  # of many kinds: each library words a full disk in its own way
                raise OSError(saving_failed_message(folder, error)) from error
            raise


def _trainer_state(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether the Trainer finished writing this checkpoint; `trainer_state.json` is what it writes last."""
    return _trainer_state(Path(folder)) is not None


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint with the highest step in a run's folder; `None` if there is none."""
    steps = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and is_complete(path)
    }
    return str(steps[max(steps)]) if steps else None


def check_checkpoint(folder: str | os.PathLike, model: nn.Module) -> None:
    """Check that training of `model` can go on from `folder`, before anything is loaded.

    Raises:
        ValueError: If the folder is missing, holds no complete checkpoint or a damaged file, or if its weights are
            those of another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {folder}")
    if not (folder / "trainer_state.json").exists() and (folder / "config.json").exists():
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds a model, but not the state of a training (trainer_state.json). Training"
            " is resumed from the checkpoint-* folders of a run, with the full model; one for inference only cannot be"
            " resumed. To begin a new training with its weights, give it as model_name_or_path"
        )
    if not is_complete(folder):
        raise ValueError(
            f"resume_from_checkpoint: {folder} is not a complete checkpoint (its trainer_state.json is missing or"
            " damaged); resume from an earlier one"
        )
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"resume_from_checkpoint: {path} is damaged or truncated; resume from an earlier checkpoint"
            )
    saved: dict[str, tuple[int, ...]] = {}
    weights_files = sorted(folder.glob("model*.safetensors"))
    heads = saved_heads(folder)
    if weights_files and heads:  # beside a PEFT adapter alone there is no whole model to compare
        weights_files.append(heads)
    for path in weights_files:
        try:
            with safe_open(path, framework="pt") as weights:
                saved |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"resume_from_checkpoint: {path} is damaged or truncated ({error}); resume from an earlier checkpoint"
            ) from error
    if saved:
        _check_same_weights(folder, saved, model)


def _check_same_weights(folder: Path, saved: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(expected.keys() - saved.keys() - tied)
    unexpected = sorted(saved.keys() - expected.keys())
    reshaped = sorted(name for name in saved.keys() & expected.keys() if saved[name] != expected[name])
    differences = [
        *(f"{name} is missing" for name in missing[:3]),
        *(f"{name} is unknown to the model" for name in unexpected[:3]),
        *(f"{name} has the shape {saved[name]}, not {expected[name]}" for name in reshaped[:3]),
    ]
    if differences:
        total = len(missing) + len(unexpected) + len(reshaped)
        raise ValueError(
            f"resume_from_checkpoint: {folder} is the checkpoint of another model ({total} weights differ):"
            f" {'; '.join(differences)}. Training goes on only with the settings it began with; an inference-only"
            " model cannot be resumed"
        )
