"""Which folders hold a whole checkpoint, and whether it fits the model."""

import json
import os
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from .models import saved_heads


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
