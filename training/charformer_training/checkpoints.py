"""A Trainer with complete and finite checkpoints that stops at signals and resumes without any difference in the result."""

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput, rotate_checkpoints

from .files import SCRATCH_PREFIX, give_default_permissions, remove, saving_failed_message
from .heads_file import keep_heads_beside_adapter
from .manifest import RUNNING_SUMS, inspect, is_scheduled, newest_good, write_manifest
from .models import unwrap_peft, with_own_class
from .pushing import HubTrainer
from .resuming import (
    changed,
    check_same_weights,
    find_checkpoint,
    let_lower_be_better,
    only_run,
    read_sums,
    reading,
)
from .run_settings import OPTIMIZER_FIELDS, check_accepted, check_same_settings, run_settings
from .stopping import StoppedBySignal, StopSignals, random_states


logger = logging.getLogger(__name__)

STATE = "trainer_state.json"


class EvaluationStopped(Exception):
    """A signal came during an evaluation. The resumed run repeats that evaluation."""


class WatchSignals(TrainerCallback):
    """Asks after each step, and each batch of an evaluation, whether any process has received a signal."""

    def __init__(self, trainer: "SafeTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.take_up_sums()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.at_epoch_end = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.at_epoch_end = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.ask_for_signals()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # With different numbers of batches, processes would wait for each other forever.
        if self.trainer.accelerator.even_batches and self.trainer.ask_for_signals():
            raise EvaluationStopped


class SafeTrainer(HubTrainer):
    """`transformers.Trainer` with reliable checkpoints.

    - A checkpoint appears whole or not at all, with the files of all processes and a checksum of each. Only a checkpoint
      without any changed byte is resumed, and only with the settings of its run; differences are listed.
    - A loss or weight that is not finite stops the run with a `FloatingPointError` before a checkpoint is written. The
      message names the step and what is not finite.
    - A resumed run equals the uninterrupted one. Running sums are saved, so that each log entry and `train_loss` are the
      same. Callbacks such as `EarlyStoppingCallback` keep their counts.
    - With `enable_jit_checkpoint`, SIGTERM, SIGHUP and Ctrl-C end the step on all processes and write a checkpoint. Then
      `StoppedBySignal`, a `SystemExit`, is raised, so that code after `train()` does not take the model for the result.
    - Only one run writes to `output_dir` at a time, see `run_lock`.
    - If `metric_for_best_model` is a loss, a number of bits or a perplexity, lower is better.
    - Auxiliary heads are saved and loaded together with a PEFT adapter.
    """

    test_dataset: Any = None
    """What the trained model will be tested on, if it is known: not read, but a resumed run must have the same."""

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any):
        self._given_optimizer = (kwargs.get("optimizers") or (None, None))[0]
        self._scratch: Path | None = None  # where a checkpoint is being written
        # Transformers' handler saves in the middle of a step, and then `train` returns like after the last one.
        with changed(args, enable_jit_checkpoint=False):
            super().__init__(model=model, args=args, **kwargs)
        let_lower_be_better(self.args)
        self._signals: StopSignals | None = None
        self._forget()
        self.add_callback(WatchSignals(self))

    def _forget(self) -> None:
        """Reset the state of one call of `train`."""
        self._settings: dict[str, Any] | None = None
        self._accepted: set[str] = set()
        self._resumed: dict[str, Any] | None = None  # the running sums of all processes, from the checkpoint
        self._resumed_step: int | None = None
        self._to_catch_up: dict[str, bool] | None = None  # what a signal prevented at the checkpoint's step
        self._pending = {"evaluate": False, "save": False}  # what a signal prevents at this step
        self._signum = 0
        self.at_epoch_end = False

    # ---- Training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        accept_changes: Collection[str] = (),
        **kwargs: Any,
    ) -> TrainOutput:
        """Like `Trainer.train`; `resume_from_checkpoint=True` takes the newest good checkpoint of `output_dir`.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True.
            args: Like those of `Trainer.train`.
            accept_changes: Settings that may differ from those of the run that wrote the checkpoint, such as
                `["learning_rate", "max_steps"]`. The new values apply from the first step after resuming.
            kwargs: Like those of `Trainer.train`.

        Raises:
            ValueError: If the checkpoint is missing, incomplete or damaged, or belongs to another model or to a run
                with other settings.
            FileExistsError: If another run is at work in `output_dir`.
            FloatingPointError: If a loss turns nan or infinite.
            StoppedBySignal: If a signal ended the run, see `SafeTrainer`.
        """
        self._forget()
        with self._alone(), self._watching_signals():
            if self.hp_search_backend is not None:
                self._settings = None  # of each trial, whose model is not built yet
            elif self.args.should_save:
                self.run_settings()  # read now, before training changes model and configuration
            folder = self._checked(resume_from_checkpoint, accept_changes)
            with changed(self.args, eval_on_start=self.args.eval_on_start and folder is None):
                output: TrainOutput = super().train(folder, *args, **kwargs)
        self._raise_if_not_finite()  # in the steps since the last log entry
        return output._replace(training_loss=output.metrics["train_loss"])

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        if self.args.save_strategy == SaveStrategy.NO:
            return contextlib.nullcontext()
        return only_run(self.args)

    @contextlib.contextmanager
    def _watching_signals(self) -> Iterator[None]:
        if not self.args.enable_jit_checkpoint:
            yield
            return
        try:
            with StopSignals() as self._signals:
                yield
        finally:
            self._signals = None

    def ask_for_signals(self) -> int:
        """The signal at which all processes stop, or 0. All processes call this together."""
        if self._signals is not None and self.is_in_train and not self._signum:
            self._signum = self._signals.agreed()
        return self._signum

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        control = self.control
        due = {"evaluate": control.should_evaluate, "save": control.should_save}
        if self._signum:
            control.should_evaluate = control.should_save = False
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            logger.info("The resumed run will repeat the evaluation")
        if not self._signum:
            return
        self._pending = {name: self._pending[name] or due[name] for name in due}
        ends_epoch = float(self.state.epoch or 0).is_integer() or control.should_epoch_stop
        if not self.at_epoch_end and (ends_epoch or control.should_training_stop):
            return  # the end of the epoch comes next, and what is due there
        self._stop(model, trial)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with random_states(restored_by=EvaluationStopped):
            return super()._evaluate(*args, **kwargs)

    def _stop(self, model: nn.Module, trial: Any) -> None:
        folder = None
        if not self.args.save_only_model:
            self._save_checkpoint(model, trial)
            folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        for callback in self.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.flush()
        raise StoppedBySignal(self._signum, self.state.global_step, folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == self._resumed_step and self._is_over():
            # Transformers checks for the end only after a step, so it would train one step too many.
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _is_over(self) -> bool:
        control: Any = self.state.stateful_callbacks.get("TrainerControl", {})  # type: ignore[union-attr]  # a dict by now
        stopped_early = self._resumed is not None and control.get("args", {}).get("should_training_stop", False)
        return self.state.global_step >= self.state.max_steps or bool(stopped_early and not self._accepted)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)
        self._catch_up()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._catch_up()
        output: TrainOutput = super()._finalize_training(*args, **kwargs)
        return output

    def _catch_up(self) -> None:
        """Do the evaluation and saving that a signal prevented at the checkpoint's step."""
        due, self._to_catch_up = self._to_catch_up, None
        if due is not None:
            self.at_epoch_end = True  # otherwise a signal now would wait for the next step
            self.control.should_evaluate, self.control.should_save = True, due["save"]
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, 0.0)
            self.at_epoch_end = False

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._scratch or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        keep_heads_beside_adapter(self.model)
        with with_own_class(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            give_default_permissions(Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._raise_if_not_finite()
        weights = self.accelerator.unwrap_model(model).named_parameters()
        broken = [name for name, weight in weights if not bool(weight.isfinite().all())]
        if broken:  # a step can make weights infinite though its loss was finite
            raise self._not_finite_error(self.state.global_step, broken)
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        sums = gather_object([self._running_sums()])
        scratch, writes = self._make_scratch(run_dir)
        try:
            # Nothing is pushed, and no other checkpoint deleted, before this one is whole.
            with changed(self.args, save_total_limit=None, push_to_hub=False):
                self._scratch = scratch
                super()._save_checkpoint(model, trial)
            self._complete(scratch / folder.name, folder, sums, writes)
        except BaseException as error:
            if writes:
                shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, Exception):  # each library raises another error when a disk is full
                raise OSError(saving_failed_message(folder, error)) from error
            raise
        finally:
            self._scratch = None
        if self._signum:
            return
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            self._delete_older(run_dir, folder)

    def _make_scratch(self, run_dir: Path) -> tuple[Path, bool]:
        """The folder where all processes write a checkpoint, and whether this process makes and moves it.

        It is made by the first process, and by the first process of each machine that does not share its disk.
        """
        first = self.is_world_process_zero()
        names = [""]
        if first:
            run_dir.mkdir(parents=True, exist_ok=True)
            names = [tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=run_dir)]
        broadcast_object_list(names)
        scratch = Path(names[0])
        writes = first or (self.is_local_process_zero() and not scratch.exists())
        if writes:
            scratch.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        return scratch, writes

    def _complete(self, written: Path, folder: Path, sums: list[dict[str, Any]], writes: bool) -> None:
        """Make a checkpoint of what all processes have written: add the manifest, then move it into place."""
        if self.state.best_global_step is not None:
            best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best == folder or best.is_dir() else None
        self.accelerator.wait_for_everyone()
        if writes:
            written.mkdir(exist_ok=True)
            if self.args.should_save:
                self.state.save_to_json(str(written / STATE))
            common = {"total_loss": self._total_loss_scalar, "last_logged_step": self._globalstep_last_logged}
            missed = self._pending if self._pending["evaluate"] else None
            content = {**common, "pending": missed, "processes": sums}
            (written / RUNNING_SUMS).write_text(json.dumps(content), encoding="utf-8")
            give_default_permissions(written)
            scheduled = not self._signum or self._pending["save"]
            write_manifest(
                written, self.run_settings(), scheduled=scheduled, save_only_model=self.args.save_only_model
            )
            if os.path.lexists(folder):  # an older one of that name
                os.replace(folder, written.with_name("replaced"))
            os.replace(written, folder)
            shutil.rmtree(written.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _delete_older(self, run_dir: Path, newest: Path) -> None:
        for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path != newest and not is_scheduled(path):  # written at a signal; the new one replaces it
                remove(path)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _running_sums(self) -> dict[str, Any]:
        """The running sums of this process since the last log entry, as values for JSON."""
        return {"loss": float(self._tr_loss)}

    # ---- Resuming ----

    def run_settings(self) -> dict[str, Any]:
        """The settings that affect the result. They are saved with each checkpoint, and compared on resuming."""
        if self._settings is None:
            self._settings = run_settings(self, self._given_optimizer)
        return self._settings

    def _checked(self, resume: str | bool | None, accepted: Collection[str]) -> str | None:
        """The checkpoint to resume from, after checking every byte of it. All processes call this together."""
        if not resume:
            if accepted:
                check_accepted(accepted, self.run_settings())
            return None
        answer: list[Any] = [None, None, set()]
        if self.is_world_process_zero():
            try:
                found = find_checkpoint(
                    self._get_output_dir(None) if resume is True else resume, resume is True, self.args
                )
                if isinstance(self.model, nn.Module):
                    answer[2] = check_same_settings(found.path, found.settings or {}, self.run_settings(), accepted)
                    check_same_weights(found.path, self.model)
                read_sums(found.path, self.args.max_steps)
                answer[0] = str(found.path)
            except ValueError as error:
                answer[1] = error
        broadcast_object_list(answer)
        folder, refusal, self._accepted = answer
        if refusal is not None:
            raise refusal
        self._resumed = read_sums(Path(folder), self.args.max_steps)
        self._to_catch_up = None if self._resumed is None else self._resumed["pending"]
        return str(folder)

    def take_up_sums(self) -> None:
        """Continue the running sums of the checkpoint, if a run is resumed."""
        if self._resumed is None:
            return
        self._total_loss_scalar = self._resumed["total_loss"]
        if len(self._resumed["processes"]) == max(1, self.args.world_size):
            self._globalstep_last_logged = self._resumed["last_logged_step"]
            self._take_up(self._resumed["processes"][self.args.process_index])

    def _take_up(self, sums: dict[str, Any]) -> None:
        """Continue the sums that `_running_sums` returned."""
        self._tr_loss += sums["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" in logs and self._resumed is not None:  # Transformers counts only the steps after resuming
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if not self.state.global_step:
            return trained
        self._resumed_step = self.state.global_step
        # Otherwise Transformers keeps the logging, evaluation and saving intervals of the checkpoint's run.
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.state.best_global_step is not None:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if (best := Path(self._get_output_dir(None), name)).is_dir():
                self.state.best_model_checkpoint = str(best)  # the run's folder may have moved
            elif self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
                raise ValueError(
                    f"resume: {name} is missing, which holds the best model so far (load_best_model_at_end)"
                )
        states: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                saved = states.setdefault(type(callback).__name__, callback.state())
                if isinstance(saved, dict):
                    vars(callback).update(saved.get("attributes", {}))
        return trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        renewed = checkpoint is not None and bool(self._accepted & OPTIMIZER_FIELDS)
        fresh = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        rates = list(getattr(scheduler, "base_lrs", ()))
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if not renewed:
            return
        for group, values in zip(optimizer.param_groups, fresh, strict=True):
            group.update(values)
        if hasattr(scheduler, "lr_lambdas"):
            scheduler.base_lrs = rates
            scheduler._last_lr = [
                rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_auxiliary_heads(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        if self.is_world_process_zero() and (faults := inspect(folder, max(1, self.args.world_size)).faults):
            faults = tuple(fault for fault in faults if "save_only_model" not in fault)
            if faults:
                raise ValueError(f"the best model's checkpoint {folder} is not whole: {'; '.join(faults)}")
        super()._load_best_model()
        self._load_auxiliary_heads(folder)

    def _load_auxiliary_heads(self, folder: str) -> None:
        base: Any = unwrap_peft(cast(nn.Module, self.model))
        if hasattr(base, "load_auxiliary_heads") and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            base.load_auxiliary_heads(folder)  # FSDP and DeepSpeed load the heads with the other weights

    # ---- Losses and weights that are not finite ----

    def _first_not_finite(self) -> tuple[int, list[str]] | None:
        """The step since the last log entry whose loss was not finite, and the names of the terms concerned.

        All processes call this together.
        """
        finite = math.isfinite(float(self._tr_loss))
        return None if finite else (self.state.global_step, ["loss"])

    def _raise_if_not_finite(self) -> None:
        if (found := self._first_not_finite()) is not None:
            raise self._not_finite_error(*found)

    def _not_finite_error(self, step: int, names: list[str]) -> FloatingPointError:
        last, _ = newest_good(self._get_output_dir(None), max(1, self.args.world_size))
        return FloatingPointError(
            f"not finite at step {step}: {', '.join(names)}. "
            + (f"The last good checkpoint is {last.path}. " if last else "No checkpoint had been written. ")
            + "Lower the learning rate, warm it up for longer, or clip gradients (max_grad_norm)"
        )
