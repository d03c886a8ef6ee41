"""What a run shows while it trains: a line for each log entry, TensorBoard, text written by the model."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from modeling_charformer import CharformerForCausalLM, CharformerTokenizer

from . import history
from .files import whole_files
from .logger_names import GROUPS
from .models import evaluating
from .running_means import group_by_layer
from .terminal import printable


logger = logging.getLogger(__name__)

SHOWN_OF_EVALUATIONS = ("eval_loss", "eval_bpc", "eval_bpb")


def show_in_use(trainer: Trainer, bytes_per_step: int) -> None:
    """Replace the progress bar and TensorBoard callback of `trainer` by `LossTermProgress` and `GroupedTensorBoard`.

    Args:
        trainer: A Trainer of a byte-level model, before training. With `disable_tqdm` it keeps Transformers' lines.
        bytes_per_step: Number of bytes in an optimizer step, over all processes.
    """
    speed = Speed(bytes_per_step)
    trainer.add_callback(speed)  # before the callbacks that read it
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossTermProgress(speed))
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(GroupedTensorBoard(speed))


class Speed(TrainerCallback):
    """Measures training steps per second and the time left; other callbacks read both when they log."""

    def __init__(self, bytes_per_step: int):
        self.bytes_per_step = bytes_per_step
        self.steps_per_second: float | None = None
        """Since the previous log entry, without evaluations and checkpoints; `None` before the first entry."""
        self.seconds_left: float | None = None
        """At the mean pace so far, with evaluations and checkpoints; `None` before the first log entry."""

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.steps_per_second is None else self.bytes_per_step * self.steps_per_second

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = self._logged_step = state.global_step
        self._begin = self._logged_at = self._step_end = time.perf_counter()
        self._idle, self._interrupted = 0.0, False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._interrupted:
            self._idle += time.perf_counter() - self._step_end
            self._interrupted = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_end = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._interrupted = True

    on_save = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not history.is_training(logs or {}):  # an evaluation may run without any training
            return
        steps = state.global_step - self._logged_step
        if not steps:
            return
        now = time.perf_counter()
        self.steps_per_second = steps / (now - self._logged_at - self._idle)
        pace = (now - self._begin) / (state.global_step - self._first_step)
        self.seconds_left = pace * (state.max_steps - state.global_step)
        self._logged_step, self._logged_at, self._idle, self._step_end = state.global_step, now, 0.0, now


class LossTermProgress(ProgressCallback):
    """One readable line for each log entry: the terms of the loss, the learning rate, the speed and the time left.

    A separate line reports the step from which a layer has no losses any more. On a terminal there is also a progress
    bar; a log file holds the lines alone.
    """

    def __init__(self, speed: Speed):
        super().__init__()
        self.speed = speed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._told_step = self.current_step = state.global_step
        settings = getattr(kwargs.get("model"), "loss_settings", None)
        self._drops = {} if settings is None else history.drop_steps(settings, state.max_steps)
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)
        self._show("Losses are in nats per byte, bpc in bits per character, bpb in bits per byte")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        parts: list[str] = []
        if history.is_training(logs):
            shown = {"loss": logs["loss"], **group_by_layer(history.terms(logs))}
            parts = self._pace(logs)
            self._tell_dropped_layers(state.global_step)
        else:
            shown = {name: logs[name] for name in SHOWN_OF_EVALUATIONS if name in logs}
        if shown:
            step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
            self._show("  ".join([step, *(f"{name} {value:.4f}" for name, value in shown.items()), *parts]))

    def _pace(self, logs: Mapping[str, float]) -> list[str]:
        parts = [f"lr {logs['learning_rate']:.3g}"] if "learning_rate" in logs else []
        if self.speed.steps_per_second is not None and self.speed.seconds_left is not None:
            parts += [
                f"{self.speed.steps_per_second:.3g} steps/s",
                f"{self.speed.bytes_per_second:,.0f} bytes/s",
                f"{tqdm.format_interval(self.speed.seconds_left)} left",
            ]
        return parts

    def _tell_dropped_layers(self, step: int) -> None:
        for layer, at in self._drops.items():
            if self._told_step < at <= step:
                self._show(f"layer_{layer} dropped out at step {at}: from this step on the weight of its losses is 0")
        self._told_step = step

    def _show(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


class GroupedTensorBoard(TensorBoardCallback):
    """Transformers' TensorBoard callback, with groups of curves, so that `train/loss` stays easy to find.

    `loss_terms` and `eval_loss_terms` hold the unweighted terms of the loss, `loss_weights` their weights. `speed` holds
    runtimes and the rates of steps, samples and bytes.
    """

    def __init__(self, speed: Speed):
        super().__init__()
        self.speed = speed

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        grouped, others = _grouped(logs)
        super().on_log(args, state, control, logs=others)
        if history.is_training(logs):
            settings = getattr(kwargs.get("model"), "loss_settings", None)
            if settings is not None:
                done = max(0, state.global_step - 1)
                weights = settings.weights_at(done / state.max_steps, done)
                grouped |= {f"loss_weights/{name}": weight for name, weight in weights.items()}
            if self.speed.steps_per_second is not None:
                grouped["speed/steps_per_second"] = self.speed.steps_per_second
                grouped["speed/bytes_per_second"] = self.speed.bytes_per_second
        if self.tb_writer is not None:
            for name, value in grouped.items():
                self.tb_writer.add_scalar(name, value, state.global_step)
            self.tb_writer.flush()


def _grouped(logs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `logs` into the figures of a group, renamed to `group/name`, and all others, unchanged."""
    grouped, others = {}, {}
    for name, value in logs.items():
        evaluation = "eval_" if name.startswith("eval_") else ""
        key = name.removeprefix(evaluation)
        start = next((start for start in GROUPS if key.startswith(start)), None)
        if name.endswith(("_runtime", "_per_second")):
            grouped[f"speed/{name}"] = value
        elif start is not None:
            grouped[f"{evaluation}loss_{GROUPS[start]}/{key.removeprefix(start)}"] = value
        else:
            others[name] = value
    return grouped, others


class SampleText(TrainerCallback):
    """At each evaluation, prints text written by the model and appends it to a file of JSON lines.

    The random numbers have a separate seed, so that training is the same with and without samples. A resumed run keeps
    the samples up to its checkpoint and removes later ones.
    """

    def __init__(self, tokenizer: CharformerTokenizer, path: Path, prompt: str, length: int, seed: int):
        self.tokenizer, self.path, self.prompt, self.length, self.seed = tokenizer, path, prompt, length, seed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and (self.path.is_symlink() or self.path.exists()):
            kept = _lines_up_to(self.path, state.global_step)
            with whole_files(self.path.parent) as scratch:  # replaces a symbolic link, does not follow it
                (scratch / self.path.name).write_text(kept, encoding="utf-8")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: CharformerForCausalLM | None = None,
        **kwargs: Any,
    ) -> None:
        if model is None:
            return
        # All processes write together, since the weights may be spread over them.
        text = sample_text(model, self.tokenizer, self.prompt, self.length, self.seed)
        if not state.is_world_process_zero:
            return
        print(f"\n--- text written at step {state.global_step} ---\n{printable(text)}\n---", flush=True)
        line = _json_line({"step": state.global_step, "text": text})
        try:
            with open(self.path, "a", encoding="utf-8", opener=_open_no_link) as file:
                file.write(line)
        except OSError as error:  # a lost sample must not end the run
            logger.warning("The sample of step %d is not in %s: %s", state.global_step, self.path, error)


def _lines_up_to(path: Path, step: int) -> str:
    """The lines of a file of samples up to a step, without lines that a killed run left incomplete."""
    kept = []
    if not path.is_symlink():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (KeyError, RecursionError, TypeError, ValueError):
                continue
    return "".join(kept)


def _json_line(entry: Mapping[str, Any]) -> str:
    """One line of JSON; control characters, and those that some programs treat as a line break, are escaped."""
    text = json.dumps(entry, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text) + "\n"


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def sample_text(
    model: CharformerForCausalLM, tokenizer: CharformerTokenizer, prompt: str, length: int, seed: int
) -> str:
    """`prompt` and a continuation of `length` bytes at temperature 0.8; it may be longer than the window."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs, max_new_tokens=length, do_sample=True, temperature=0.8, use_cache=True, rolling_context=True
        )
    return str(tokenizer.decode(ids[0]))
