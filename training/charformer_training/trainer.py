"""A Trainer that tells the model how far training is, and logs every term of its loss."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from modeling_charformer.auxiliary_losses import IGNORE_INDEX, Targets
from modeling_charformer.loss_settings import ScheduleContext, scheduled

from .checkpoints import SafeTrainer
from .models import label_inputs, shifts_labels, unwrap_peft
from .optimizer import muon_adamw
from .running_means import EvaluationTerms, TrainingTerms, group_by_layer
from .units import NATS_PER_BIT, begins_character


class UserTerm(NamedTuple):
    """A loss term added by the user of a Trainer."""

    function: Callable[[Any, Mapping[str, Any]], Tensor]
    weight: float
    schedule: str


class AuxiliaryLossTrainer(SafeTrainer):
    """A `transformers.Trainer` for models whose loss has several terms; it logs each of them.

    It tells the model how far training is and how many targets the whole optimizer step has. The log holds each
    term, unweighted, as `loss_<name>`. An evaluation holds the terms of the model's output head as `eval_loss_<name>`,
    means over targets. No value depends on how a batch is split over accumulation steps and processes. An evaluation of a model of bytes also reports `eval_bpb`,
    bits per byte, and `eval_bpc`, bits per character of UTF-8. A loss that is not finite ends training with a
    `FloatingPointError`.

    Two corrections of `transformers.Trainer` apply to any model. It counts one target too many in each row of causal
    language models whose class name does not end in `ForCausalLM`, such as GPT-2's. It also adds up the micro-batch
    losses of models that accept `num_items_in_batch` and ignore it; this Trainer averages them.

    Example:

        from transformers import AutoModelForCausalLM
        from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses

        model = add_auxiliary_losses(AutoModelForCausalLM.from_pretrained("openai-community/gpt2"))
        row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
        args = AuxiliaryLossTrainingArguments(output_dir="run", max_steps=10, logging_steps=1)
        AuxiliaryLossTrainer(model, args, train_dataset=[row] * 80).train()

    Args:
        model: A Charformer, a model from `add_auxiliary_losses`, or any other model of Transformers. Terms are taken from
            `loss_dict` in the model's output and from scalars whose name ends in `loss`.
        args: `AuxiliaryLossTrainingArguments`, or plain `TrainingArguments`.
        kwargs: Further arguments of `transformers.Trainer`, such as `train_dataset` and `data_collator`.

    Raises:
        ValueError: If a setting would replace or distort the model's losses, or does not fit the optimizer Muon.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any):
        if args is not None and args.ddp_find_unused_parameters is None and _takes(model, "training_progress"):
            # Heads that drop out in the middle of training leave parameters without a gradient.
            args.ddp_find_unused_parameters = True
        super().__init__(model=model, args=args, **kwargs)
        if getattr(self.args, "muon", False):
            self._check_muon()
        if (shifts := shifts_labels(cast(nn.Module, self.model))) is not None:
            # Transformers looks for ForCausalLM at the end of the class name, and counts one target too many in GPT-2's rows.
            self._loss_shifts_labels = shifts
        if _takes(self.model, "training_progress"):
            self._check_model_losses()
        settings = getattr(self.model, "loss_settings", None)
        if settings is not None:
            for percent in range(101):  # a wrong schedule raises here, before anything is trained
                settings.weights_at(percent / 100, percent)
        if self.args.torch_compile and settings is not None:
            # Each layer that drops out causes a recompilation; above its limit torch would silently run eagerly.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 + len(settings.terms))
        self._user_terms: dict[str, UserTerm] = {}
        # Known for this project's losses, and if a subclass sets `loss_is_scaled_for_ga` (Transformers 5.19).
        self._knows_how_losses_are_scaled = (
            settings is not None
            or getattr(self, "loss_is_scaled_for_ga", None) is not None
            or self.compute_loss_func is not None
        )
        self._takes_training_progress = _takes(self.model, "training_progress")
        self._takes_training_step = _takes(self.model, "training_step")
        self._takes_target_counts = _takes(self.model, "target_counts")
        self._target_counts: Tensor | None = None
        self._training_terms = TrainingTerms()
        self._terms_of_part: list[tuple[dict[str, Tensor], float]] | None = None
        self._evaluation_terms = EvaluationTerms()

    def add_loss_term(
        self,
        name: str,
        function: Callable[[Any, Mapping[str, Any]], Tensor],
        weight: float = 1.0,
        schedule: str = "constant",
    ) -> None:
        """Add `weight * function(outputs, inputs)` to the loss in training, and log its raw value as `loss_<name>`.

        Args:
            name: Name of the term; the model must not have a term of that name.
            function: Takes the model's output and the batch; returns a scalar, the mean over this batch. All
                micro-batches of an optimizer step, on all processes, have the same weight.
            weight: Any finite number.
            schedule: How the weight changes in training: one of `modeling_charformer.schedule_names()`. The term counts
                as layer 1 of 1. So `"paper"` drops it after half of training, and `"linear"` and `"cosine"` reduce it
                to 0 by then.

        Raises:
            ValueError: If the name is taken, the weight not finite or the schedule unknown.
        """
        settings = getattr(self.model, "loss_settings", None)
        taken = [term.name for term in settings.terms] if settings is not None else []
        if name in (*taken, *self._user_terms):
            raise ValueError(
                f"a loss term {name!r} exists already; choose a name other than {[*taken, *self._user_terms]}"
            )
        if not math.isfinite(weight):
            raise ValueError(f"the weight of the loss term {name!r} is {weight}; it must be a finite number")
        term = UserTerm(function, weight, schedule)
        for progress in (0.0, 0.5, 1.0):  # a wrong schedule raises here
            self._user_weight(term, progress)
        self._user_terms[name] = term

    def _user_weight(self, term: UserTerm, progress: float) -> float:
        at = ScheduleContext(
            1, 1, num_layers=1, num_targets=1, layers=(1,), progress=progress, step=self.state.global_step
        )
        return term.weight * scheduled(term.schedule, at)

    def _check_model_losses(self) -> None:
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}; it would replace the model's own losses,"
                " including the auxiliary ones, by a loss of the Trainer. It must be 0"
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func would replace the model's own losses, including the auxiliary ones; leave it out, and add"
                " a term to the loss with add_loss_term"
            )
        if not _takes(self.model, "target_counts"):
            return
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False)):
            raise ValueError(
                "parallelism_config splits rows over processes (context or sequence parallelism); targets 2..K and last"
                " positions would be wrong at the borders. Leave both kinds of parallelism out"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"this process sees {self.args.n_gpu} GPUs, on which Transformers would use torch's DataParallel. That cannot"
                " split the inputs of the losses. Start one process per GPU with torchrun or accelerate launch, or make"
                " a single GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )

    def _check_muon(self) -> None:
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError("muon is on, and the Trainer was given an optimizer too; leave one of the two out")
        if self.is_deepspeed_enabled or (
            self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2
        ):
            raise ValueError(
                "muon is on, and DeepSpeed or FSDP 1 would flatten the matrices that Muon needs; use FSDP 2"
                " (training/accelerate/fsdp2.yaml), or leave muon out"
            )

    # ---- Training ----

    def _forget(self) -> None:
        super()._forget()
        self._training_terms = TrainingTerms()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # Training that begins again, with a smaller batch because memory ran out, logs no part of its first try.
        self._training_terms = TrainingTerms()
        return super()._init_training_state(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and getattr(self.args, "muon", False):
            trained = cast(nn.Module, self.model if model is None else model)
            self.optimizer = muon_adamw(
                trained,
                self.get_decay_parameter_names(trained),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=self.args.optim == "adamw_torch_fused",
            )
        return super().create_optimizer(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items_in_batch is not None and not self._knows_how_losses_are_scaled:
            self._knows_how_losses_are_scaled = True
            if self.model_accepts_loss_kwargs and not self._is_scaled_by_items(batch_samples[0]):
                self.model_accepts_loss_kwargs = False
                num_items_in_batch = None
        if self._takes_target_counts and batch_samples and "labels" in batch_samples[0]:
            model = self.accelerator.unwrap_model(self.model)
            targets = [Targets(label_inputs(model, batch), model.loss_settings.num_targets) for batch in batch_samples]
            counts = torch.stack([of_batch.counts() for of_batch in targets]).sum(0).to(device)
            if self.args.average_tokens_across_devices:
                counts = self.accelerator.reduce(counts, "sum")
            self._target_counts = counts
        return batch_samples, num_items_in_batch

    def _is_scaled_by_items(self, batch: dict[str, Any]) -> bool:
        """Whether the model divides its loss by `num_items_in_batch`, found by running it with 1 and with 2 items.

        A loss that is divided by the number halves; any other stays the same. Transformers does not test this: it
        treats the loss of every model that accepts the argument as divided.
        """
        model = cast(nn.Module, self.model)
        was_training = model.training
        model.eval()
        losses = []
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(batch)
                for items in (1, 2):
                    loss: Any = super().compute_loss(model, dict(inputs), num_items_in_batch=items)
                    losses.append(float(loss))
        finally:
            model.train(was_training)
        once, twice = losses
        return abs(once - 2 * twice) < abs(once - twice)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if model.training:
            loss, outputs = super().compute_loss(
                model, {**inputs, **self._progress_inputs()}, True, num_items_in_batch=num_items_in_batch
            )
            loss = self._add_training_terms(loss, outputs, inputs, num_items_in_batch)
        else:
            # Without counts of the whole step, the losses are means over this batch; they are weighted below.
            inputs = self._without_repeated_rows(inputs)
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=None)
            self._add_evaluation_terms(loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    @property
    def _training_progress(self) -> float:
        # max_steps is 0 before training.
        return min(1.0, self.state.global_step / self.state.max_steps) if self.state.max_steps > 0 else 0.0

    def _progress_inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if self._takes_training_progress:
            inputs["training_progress"] = self._training_progress
        if self._takes_training_step:
            inputs["training_step"] = self.state.global_step
        if self._takes_target_counts:
            inputs["target_counts"] = self._target_counts
        return inputs

    def _add_training_terms(
        self, loss: Tensor, outputs: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Keep the terms of a micro-batch for the log; returns the loss with the user's terms added."""
        terms, means = _loss_dict(outputs), _further_losses(outputs)
        # Training sets it; before training, a batch counts as a whole optimizer step.
        part = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)  # subclasses may set it, from Transformers 5.19
        if is_scaled is None:
            is_scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        if is_scaled:
            # The model has divided the terms by the counts of the whole step. Logging takes the mean over processes,
            # like the Trainer does for the loss.
            scale = float(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1.0
            loss_scale = 1.0  # the Trainer has scaled it already
        else:
            scale = loss_scale = part
        for name, term in self._user_terms.items():
            if name in terms or name in means:
                raise ValueError(f"the model has a loss term {name!r} too; give the term that was added another name")
            if weight := self._user_weight(term, self._training_progress):
                means[name] = _scalar(name, term.function(outputs, inputs))
                loss = loss + weight * means[name] * (part / loss_scale)
        self._terms_of_part = [({"loss": loss}, loss_scale), (terms, scale), (means, part)]
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._terms_of_part = None
        loss = super().training_step(*args, **kwargs)
        if self._terms_of_part is None and (self._user_terms or self._takes_training_progress):
            raise ValueError(
                f"compute_loss of {type(self).__name__} does not call super().compute_loss(). That call passes the progress of"
                " training to the model, adds the terms of add_loss_term and keeps all terms for the log"
            )
        # After the backward pass: a micro-batch that ran out of memory there runs again, and must count once.
        parts: list[tuple[dict[str, Tensor], float]] = self._terms_of_part or []
        for terms, scale in parts:
            if terms:
                self._training_terms.add(self.state.global_step + 1, terms, scale)
        self._terms_of_part = None
        return loss

    # ---- Evaluation ----

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Leave out the rows that fill the last batches on several processes; they are repeats of the first rows."""
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
        labels, terms = inputs.get("labels"), _loss_dict(outputs) | _further_losses(outputs)
        if not isinstance(labels, Tensor):
            positions = rows = find_batch_size(inputs) or 1
        elif labels.dim() == 2 and self._loss_shifts_labels:
            positions, rows = Targets(inputs, 1).counts()[:, 0]
        else:
            positions = rows = labels.ne(IGNORE_INDEX).sum()
        self._evaluation_terms.add("loss", loss, positions)
        for name, value in terms.items():
            self._evaluation_terms.add(_log_key(name), value, rows if name == "last_position" else positions)
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if "next_char" in terms and isinstance(labels, Tensor) and getattr(config, "vocab_size", None) == 256:
            targets = Targets(inputs, 1).ahead(1)
            characters = ((targets != IGNORE_INDEX) & begins_character(targets)).sum()
            self._evaluation_terms.add("characters", torch.zeros_like(terms["next_char"]), characters)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if ignore_keys is None:
            config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        return super().prediction_step(
            model, inputs, prediction_loss_only, [*ignore_keys, "loss_dict", "loss_weights"]
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluation_terms = EvaluationTerms()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        totals = self._evaluation_terms.totals()
        _, characters = totals.pop("characters", (0.0, 0))
        metrics = {name: total / count for name, (total, count) in totals.items() if count}
        if characters:
            nats, num_bytes = totals["loss_next_char"]
            metrics["bpb"] = nats / NATS_PER_BIT / num_bytes
            if getattr(dataloader.dataset, "is_utf8", True):  # characters can be counted in UTF-8 only
                metrics["bpc"] = nats / NATS_PER_BIT / characters
        if self.is_in_train and (names := [name for name, value in metrics.items() if not math.isfinite(value)]):
            raise self._not_finite_error(self.state.global_step, [f"{metric_key_prefix}_{name}" for name in names])
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    # ---- Logs ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # an entry of the training loop
            self._raise_if_not_finite()
            means = self._training_terms.means()
            means.pop("loss", None)
            if getattr(self.args, "log_loss_terms", "each") == "groups":
                means = group_by_layer(means)
            logs.update({_log_key(name): value for name, value in means.items()})
            self._training_terms = TrainingTerms()
        super().log(logs, *args, **kwargs)

    def _running_sums(self) -> dict[str, Any]:
        return {**super()._running_sums(), "terms": self._training_terms.state()}

    def _take_up(self, sums: dict[str, Any]) -> None:
        super()._take_up(sums)
        self._training_terms = TrainingTerms(sums["terms"], self.args.device)

    def _first_not_finite(self) -> tuple[int, list[str]] | None:
        return self._training_terms.first_not_finite()


def _takes(model: nn.Module | None, parameter: str) -> bool:
    if model is None:
        return False
    model = unwrap_peft(model)  # a PEFT wrapper passes all arguments on
    return parameter in inspect.signature(model.forward).parameters


def _log_key(term: str) -> str:
    return term if term.startswith("loss_") else f"loss_{term}"


def _further_losses(outputs: Any) -> dict[str, Tensor]:
    """Scalars of the output whose name ends in `loss`, such as `aux_loss`: means over the batch."""
    values = outputs.items() if isinstance(outputs, Mapping) else ()
    return {
        name: value
        for name, value in values
        if name != "loss" and name.endswith("loss") and isinstance(value, Tensor) and value.numel() == 1
    }


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the function of the loss term {name!r} returned {kind}; it must return a scalar tensor")
    return value.reshape(())


def _loss_dict(outputs: Any) -> dict[str, Tensor]:
    terms = outputs.get("loss_dict") if isinstance(outputs, Mapping) else None
    return {name: value for name, value in (terms or {}).items() if isinstance(value, Tensor) and value.numel() == 1}
