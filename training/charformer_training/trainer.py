"""A Trainer that tells the model how far training is, and logs every term of its loss."""

import inspect
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_charformer.auxiliary_losses import IGNORE_INDEX, count_targets

from .checkpoints import check_checkpoint, is_complete, last_complete_checkpoint, saving_failed
from .hub import PushingTrainer
from .loss_terms import EvaluationTerms, TrainingTerms, group_by_layer


class LogWhenSaving(TrainerCallback):
    """Logs at every step that saves, so that no sum is under way in a checkpoint and a resumed run logs the same."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class AuxiliaryLossTrainer(PushingTrainer):
    """`transformers.Trainer` for models whose output has a `loss_dict`, as Charformer's and the DETR family's.

    - Passes `training_progress` (share of training done, 0..1), `training_step` (optimizer steps done) and
      `target_counts` (how many targets each term has in the whole optimizer step) to models whose `forward` takes them.
    - Logs each term of `loss_dict`, raw and unweighted, as `loss_<name>` (or by its own name, if that begins so) beside
      `loss`: the mean per optimizer step, the same however a batch is split over accumulation steps and processes. A
      term that has dropped out is absent.
    - Evaluation reports `eval_loss` and `eval_loss_<name>` as means over targets, not over batches. For a byte-level
      model (256 symbols, a `next_char` term) also `eval_bpb`, bits per byte, and `eval_bpc`, bits per character of
      UTF-8; the two are the same in ASCII text. Rows that are only there to fill the last batch are not counted.
    - Stops with a `FloatingPointError` when a loss is not finite, at the next log entry, in an evaluation and before any
      checkpoint is written (then also when a weight is not); the message names the step and the term.
    - Checkpoints are whole: what fails while it is written is removed, and `resume_from_checkpoint` is checked first.
    - Pushes to the Hub are whole too, see `PushingTrainer`.

    `args` may be plain `TrainingArguments` or `AuxiliaryLossTrainingArguments`.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs):
        if args is not None and args.ddp_find_unused_parameters is None and _takes(model, "training_progress"):
            # Heads that drop out in the middle of training leave parameters without a gradient.
            args.ddp_find_unused_parameters = True
        super().__init__(model=model, args=args, **kwargs)
        if _takes(self.model, "target_counts"):
            self._check_own_losses()
        settings = getattr(self.model, "loss_settings", None)
        if self.args.torch_compile and settings is not None:
            # Each layer that drops out makes a new graph; past its limit torch would silently run eagerly.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 + len(settings.terms))
        self._takes_training_progress = _takes(self.model, "training_progress")
        self._takes_training_step = _takes(self.model, "training_step")
        self._takes_target_counts = _takes(self.model, "target_counts")
        self._target_counts: Tensor | None = None
        self._training_terms = TrainingTerms()
        self._evaluation_terms = EvaluationTerms()
        self.add_callback(LogWhenSaving())

    def _check_own_losses(self) -> None:
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}; it would replace the model's own losses,"
                " auxiliary ones and all, by one of the Trainer's. It must be 0"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"this process sees {self.args.n_gpu} GPUs, which Transformers would use by torch's DataParallel: that"
                " cannot split what the losses need. Start one process for each GPU with torchrun or accelerate launch,"
                " or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
            )

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
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
        self._training_terms = TrainingTerms()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._raise_if_not_finite()  # in the steps since the last log entry
        return output

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._takes_target_counts and batch_samples and "labels" in batch_samples[0]:
            num_targets = self.accelerator.unwrap_model(self.model).loss_settings.num_targets
            counts = (
                torch.stack([count_targets(batch["labels"], num_targets) for batch in batch_samples]).sum(0).to(device)
            )
            if self.args.average_tokens_across_devices:
                counts = self.accelerator.reduce(counts, "sum")
            self._target_counts = counts
        return batch_samples, num_items_in_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        if model.training:
            loss, outputs = super().compute_loss(
                model, {**inputs, **self._progress_inputs()}, True, num_items_in_batch=num_items_in_batch
            )
            self._add_training_terms(loss, outputs, num_items_in_batch)
        else:
            # Alone, a batch's losses are its own means, which are weighted below. (Counts over all processes would
            # make them shares.)
            inputs = self._without_repeated_rows(inputs)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=None)
            self._add_evaluation_terms(loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def _progress_inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if self._takes_training_progress:
            inputs["training_progress"] = min(1.0, self.state.global_step / self.state.max_steps)
        if self._takes_training_step:
            inputs["training_step"] = self.state.global_step
        if self._takes_target_counts:
            inputs["target_counts"] = self._target_counts
        return inputs

    def _add_training_terms(self, loss: Tensor, outputs: Any, num_items_in_batch: Tensor | int | None) -> None:
        terms = _loss_dict(outputs)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # The terms were divided by the counts of the whole step; the mean over processes is taken when they are
            # logged, as the Trainer does it with the loss.
            scale = float(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1.0
            loss_scale = 1.0  # the Trainer has scaled it already
        else:
            scale = loss_scale = 1 / self.current_gradient_accumulation_steps
        step = self.state.global_step + 1
        self._training_terms.add(step, {"loss": loss}, loss_scale)
        if terms:
            self._training_terms.add(step, terms, scale)

    # ---- Evaluation ----

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On several processes the last batches are filled up with rows from the beginning: these count for nothing."""
        labels, loader = inputs.get("labels"), self.accelerator.gradient_state
        if self.args.world_size == 1 or not isinstance(labels, Tensor):
            return inputs
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return inputs
        rows = labels.shape[0]
        kept = min(max(loader.remainder - self.args.process_index * rows, 0), rows)
        labels = labels.clone()
        labels[kept:] = IGNORE_INDEX
        return {**inputs, "labels": labels}

    def _add_evaluation_terms(self, loss: Tensor, outputs: Any, inputs: dict[str, Any]) -> None:
        labels, terms = inputs.get("labels"), _loss_dict(outputs)
        if not isinstance(labels, Tensor):
            positions = rows = find_batch_size(inputs) or 1
        elif labels.dim() == 2 and self._loss_shifts_labels:
            positions, rows = count_targets(labels, 1)[:, 0]
        else:
            positions = rows = labels.ne(IGNORE_INDEX).sum()
        self._evaluation_terms.add("loss", loss, positions)
        for name, value in terms.items():
            self._evaluation_terms.add(_log_key(name), value, rows if name == "last_position" else positions)
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if "next_char" in terms and isinstance(labels, Tensor) and getattr(config, "vocab_size", None) == 256:
            # A character of UTF-8 is one byte that is not a continuation byte (10xxxxxx), and those that follow.
            targets = labels[..., 1:]
            characters = ((targets != IGNORE_INDEX) & (targets & 0xC0 != 0x80)).sum()
            self._evaluation_terms.add("characters", torch.zeros_like(terms["next_char"]), characters)

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        self._evaluation_terms = EvaluationTerms()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        totals = self._evaluation_terms.totals()
        _, characters = totals.pop("characters", (0.0, 0))
        metrics = {name: total / count for name, (total, count) in totals.items() if count}
        if characters:
            nats, num_bytes = totals["loss_next_char"]
            metrics["bpb"] = nats / math.log(2) / num_bytes
            metrics["bpc"] = nats / math.log(2) / characters
        if self.is_in_train and (names := [name for name, value in metrics.items() if not math.isfinite(value)]):
            raise self._not_finite_error(self.state.global_step, [f"{metric_key_prefix}_{name}" for name in names])
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    # ---- Logs and checkpoints ----

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # an entry of the training loop
            self._raise_if_not_finite()
            means = self._training_terms.means()
            means.pop("loss", None)
            if getattr(self.args, "log_loss_terms", "each") == "groups":
                means = group_by_layer(means)
            logs.update({_log_key(name): value for name, value in means.items()})
            self._training_terms = TrainingTerms()
        super().log(logs, *args, **kwargs)

    def _raise_if_not_finite(self) -> None:
        if (found := self._training_terms.first_not_finite()) is not None:
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
                raise OSError(saving_failed(folder, error)) from error
            raise


def _takes(model: nn.Module | None, parameter: str) -> bool:
    if model is None:
        return False
    base = getattr(model, "get_base_model", None)  # of a PEFT wrapper, which hands everything through
    model = base() if callable(base) else model
    return parameter in inspect.signature(model.forward).parameters


def _log_key(term: str) -> str:
    return term if term.startswith("loss_") else f"loss_{term}"


def _loss_dict(outputs: Any) -> dict[str, Tensor]:
    terms = outputs.get("loss_dict") if isinstance(outputs, Mapping) else None
    return {name: value for name, value in (terms or {}).items() if isinstance(value, Tensor) and value.numel() == 1}
