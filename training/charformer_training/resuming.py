"""Checks before a run is resumed: it is the only run in its folder, and the checkpoint is good and fits the model."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import nn
from transformers import TrainerState, TrainingArguments

from .arguments import AuxiliaryLossTrainingArguments
from .locks import run_lock
from .manifest import RUNNING_SUMS, Checkpoint, inspect, newest_good
from .metrics import lower_is_better
from .models import saved_heads
from .terminal import one_line


logger = logging.getLogger(__name__)


@contextlib.contextmanager
def changed(args: TrainingArguments | None, **values: Any) -> Iterator[None]:
    """Set fields of `args` for the length of the block."""
    fields = {} if args is None else vars(args)
    old = {name: fields[name] for name in values if name in fields}
    fields.update(values)
    try:
        yield
    finally:
        fields.update(old)


def let_lower_be_better(args: TrainingArguments) -> None:
    """Set `greater_is_better` right for losses, bits and errors, which Transformers knows by one name only."""
    metric = args.metric_for_best_model
    if isinstance(args, AuxiliaryLossTrainingArguments) or not metric or not args.greater_is_better:
        return  # AuxiliaryLossTrainingArguments has done this already
    if lower_is_better(metric):
        args.greater_is_better = False
        logger.warning(
            "metric_for_best_model is %s, and lower is better: greater_is_better is set to False (to choose True, give it in"
            " AuxiliaryLossTrainingArguments)",
            metric,
        )


@contextlib.contextmanager
def only_run(args: TrainingArguments) -> Iterator[bool]:
    """Keep other runs out of `output_dir`, see `run_lock`. All processes of a run call this together.

    Raises:
        FileExistsError: If another run is at work there.
    """
    first = args.process_index == 0
    with contextlib.ExitStack() as stack:
        answer: list[Any] = [None, False]
        for turn in (True, False):
            if first == turn:
                try:
                    answer = [None, stack.enter_context(run_lock(str(args.output_dir), first))]
                except OSError as error:
                    answer = [error, False]
            if turn and args.world_size > 1:
                broadcast_object_list(answer)
            if answer[0] is not None:
                raise answer[0]
        yield bool(answer[1])


def find_checkpoint(folder: str | os.PathLike[str], newest: bool, args: TrainingArguments) -> Checkpoint:
    """The checkpoint `folder`, or with `newest` the newest good checkpoint in it.

    Raises:
        ValueError: If it is not good, or there is none. The message says what is wrong, and names a good one.
    """
    processes = max(1, args.world_size)
    if newest:
        good, bad = newest_good(folder, processes)
        told = [f"{found.path} is not good: {'; '.join(found.faults)}" for found in bad]
        if good is None:
            raise ValueError(". ".join([f"resume_from_checkpoint: {folder} holds no complete checkpoint", *told]))
        found = good
        for line in told:
            logger.warning("%s. Training goes on from %s", line, good.path)
    else:
        found = inspect(folder, processes)
        if found.faults:
            other, _ = newest_good(Path(folder).parent, processes)
            hint = f"the newest good checkpoint of this run is {other.path}" if other else "the run has no good one"
            raise ValueError(f"resume_from_checkpoint: {folder} is not good: {'; '.join(found.faults)}; {hint}")
    for warning in found.warnings:
        logger.warning(warning)
    return found


@contextlib.contextmanager
def reading(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn an error of the libraries that read a checkpoint into one that names the checkpoint, if there is one.

    Raises:
        ValueError: If something in the checkpoint cannot be read, or does not fit the run.
    """
    try:
        yield
    except Exception as error:  # pickles and states raise errors of many kinds
        if folder is None:
            raise
        reason = one_line(str(error).strip().split("\n")[0])[:300] or type(error).__name__
        raise ValueError(f"resume_from_checkpoint: {folder} cannot be read: {reason}") from error


def read_sums(folder: Path, max_steps: int) -> dict[str, Any] | None:
    """The running sums of a checkpoint; `None` if another Trainer wrote it.

    Raises:
        ValueError: If they or the state cannot be read, or the checkpoint's step lies beyond the end of the run.
    """
    with reading(folder):
        step = int(TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step)
        if step < 1 or 0 < max_steps < step:
            raise ValueError(f"it was written after step {step}; it must be 1 to max_steps, {max_steps}")
        if not (folder / RUNNING_SUMS).exists():
            return None
        sums: dict[str, Any] = json.loads((folder / RUNNING_SUMS).read_text(encoding="utf-8"))
        float(sums["total_loss"]), int(sums["last_logged_step"]), [part["loss"] for part in sums["processes"]]
        return {"pending": None, **sums}


def check_same_weights(folder: Path, model: nn.Module) -> None:
    """Check that a checkpoint's weights are those of `model`, by name and shape.

    Raises:
        ValueError: If they are not.
    """
    saved: dict[str, tuple[int, ...]] = {}
    weights_files = sorted(folder.glob("model*.safetensors"))
    heads = saved_heads(folder)
    if weights_files and heads:  # a PEFT adapter comes without the whole model
        weights_files.append(heads)
    for path in weights_files:
        with safe_open(path, framework="pt") as weights:
            saved |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    if not saved:
        return
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
            f" {'; '.join(differences)}. A run can be resumed only with the settings it began with, and an inference-only"
            " model cannot be resumed"
        )
