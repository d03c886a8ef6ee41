"""What `AuxiliaryLossTrainer` adds, for any Trainer."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

from modeling_charformer.loss_settings import AuxiliaryLossSettings

from .batch_errors import check_batch
from .differentiated import depends_on
from .evaluated_terms import EvaluatesTerms
from .fused_head import check_same_heads, fused_head_of, has_fused_head
from .gradient_options import check_gradient_options, conflict_free_gradients, measured_gradients
from .head_accuracy import check_head_accuracy
from .heads_file import keep_heads_beside_adapter
from .logger_names import LoggerNames
from .loss_terms import LossTerms, auxiliary_loss, loss_dict_of
from .models import heads_as_adapters, shifts_labels
from .resuming import let_lower_be_better
from .running_means import EvaluationTerms


class Pass(NamedTuple):
    """One forward pass of the model within a `compute_loss`."""

    outputs: Any
    is_share: bool
    """Whether its loss is a share of the optimizer step's, and not the mean of the batch."""

    @property
    def had_labels(self) -> bool:
        return isinstance(self.outputs, Mapping) and self.outputs.get("loss_dict") is not None

    @property
    def losses(self) -> list[Tensor]:
        """The loss and its terms."""
        loss = self.outputs.get("loss") if isinstance(self.outputs, Mapping) else None
        return [*loss_dict_of(self.outputs).values(), *([loss] if isinstance(loss, Tensor) else [])]


logger = logging.getLogger(__name__)


class AuxiliaryLossMixin(EvaluatesTerms):
    """Trains the auxiliary losses of a model in any Trainer, and logs each term: `class Mine(AuxiliaryLossMixin, SFTTrainer)`.

    It tells the model how far training is and how many targets the whole optimizer step has, however `compute_loss`
    calls the model. The log holds each term, unweighted, as `loss_<name>`. With `eval_loss_terms`, an evaluation
    reports the active terms as `eval_loss_<name>`, means over targets; `eval_loss` is that of the model's output head.
    No value depends on how a batch is split over accumulation steps and processes. An evaluation of a model of bytes
    also reports `eval_bpb`, bits per byte, and `eval_bpc`, bits per character of UTF-8.

    Two corrections of `transformers.Trainer` apply to any model. It counts one target too many in each row of causal
    language models whose class name does not end in `ForCausalLM`, such as GPT-2's. It also adds up the micro-batch
    losses of models that accept `num_items_in_batch` and ignore it; they are averaged here.

    Args:
        args, kwargs: The arguments of the Trainer.

    Raises:
        TypeError: If a class has a Trainer before the mixin, or none.
        ValueError: If a setting would replace or distort the model's losses.
    """

    log_group_prefix = "loss_"
    """Prefix of the groups in which loggers show terms, see `LoggerNames`; a field of that name in `args` goes first."""
    eval_loss_terms = True
    """Whether evaluations report the terms of auxiliary heads; a field of that name in `args` takes precedence."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for kind in cls.__mro__[: cls.__mro__.index(AuxiliaryLossMixin)]:
            if issubclass(kind, Trainer) and not issubclass(kind, AuxiliaryLossMixin):
                raise TypeError(
                    f"{cls.__name__} has {kind.__name__} before AuxiliaryLossMixin, whose methods would not be called; put the"
                    f" mixin first: class {cls.__name__}(AuxiliaryLossMixin, {kind.__name__})"
                )

    def __init__(self, *args: Any, **kwargs: Any):
        if not isinstance(self, Trainer):
            raise TypeError(
                f"{type(self).__name__} is no Trainer; AuxiliaryLossMixin goes in front of one:"
                " class Mine(AuxiliaryLossMixin, Trainer)"
            )
        with heads_as_adapters(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        let_lower_be_better(self.args)
        model: Any = self.model
        keep_heads_beside_adapter(model)
        if (shifts := shifts_labels(model)) is not None:
            # Transformers looks for ForCausalLM at the end of the class name, and counts one target too many in GPT-2's rows.
            self._loss_shifts_labels = shifts
        self.loss_terms = LossTerms(model, seed=self.args.seed)
        settings = self.loss_terms.settings
        if "training_progress" in self.loss_terms.takes:
            self._find_unused_parameters()
            self._check_model_losses()
        if settings is not None:
            for percent in range(101):  # a wrong schedule raises here, before anything is trained
                settings.weights_at(percent / 100, percent)
        if self.args.torch_compile and settings is not None:
            # Each layer that drops out causes a recompilation; above its limit torch would silently run eagerly.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 + len(settings.terms))
        is_fused, self._fused_head = has_fused_head(model), fused_head_of(model)
        if self._fused_head is not None:
            check_same_heads(self)
        # Known for this project's losses, for TRL's, and if a subclass sets `loss_is_scaled_for_ga`
        # (Transformers 5.19).
        self._knows_how_losses_are_scaled = (
            (settings is not None and type(self).compute_loss is Trainer.compute_loss)
            or is_fused
            or getattr(self, "loss_is_scaled_for_ga", None) is not None
            or self.compute_loss_func is not None
        )
        check_gradient_options(self, self.loss_terms)
        check_head_accuracy(self)
        self._conflict_free = conflict_free_gradients(self)
        self._to_measure: tuple[list[dict[str, Any]], Tensor | int | None] | None = None
        self._lacks_losses: bool | None = None
        self._evaluation_terms = EvaluationTerms()
        self.evaluates_terms = getattr(self.args, "eval_loss_terms", self.eval_loss_terms)
        self.logger_names = LoggerNames(getattr(self.args, "log_group_prefix", self.log_group_prefix))
        # Around the method of whatever class, so that a `compute_loss` of one's own need not know of the terms.
        self.compute_loss = self._compute_loss_with_terms  # type: ignore[method-assign]

    def add_loss_term(
        self,
        name: str,
        function: Callable[[Any, Mapping[str, Any]], Tensor],
        weight: float = 1.0,
        schedule: str = "constant",
    ) -> None:
        """Add `weight * function(outputs, inputs)` to the loss in training, and log its raw value as `loss_<name>`.

        The arguments, and what is refused, are those of `LossTerms.add_term`.
        """
        self.loss_terms.add_term(name, function, weight, schedule)

    def _find_unused_parameters(self) -> None:
        """Heads that drop out in the middle of training leave parameters without a gradient."""
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True
            if (handler := self.accelerator.ddp_handler) is not None:
                handler.find_unused_parameters = True

    def _check_model_losses(self) -> None:
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}; it would replace the model's own losses,"
                " including the auxiliary ones, by a loss of the Trainer. It must be 0"
            )
        if callable(self.compute_loss_func):  # TRL sets it to a text
            raise ValueError(
                "compute_loss_func would replace the model's own losses, including the auxiliary ones; leave it out, and add"
                " a term to the loss with add_loss_term"
            )
        if "target_counts" not in self.loss_terms.takes:
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

    # ---- Training ----

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # Training that begins again, with a smaller batch because memory ran out, logs no part of its first try.
        self.loss_terms.forget()
        if (model := self.model) is not None and model is not self.loss_terms.model:
            self.loss_terms.use(model)  # `model_init` has made it, for a trial of its own
            keep_heads_beside_adapter(model)
            self._lacks_losses = None
        trained: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        self._check_best_set()
        if self.loss_terms.settings is not None:
            self.loss_terms.settings.check_schedules_are_on(self.state.max_steps)
            missed = self.loss_terms.settings.never_trained(self.state.max_steps)
            if missed and self.is_world_process_zero():
                logger.warning(
                    "%d steps are too few to train %s by its schedule", self.state.max_steps, ", ".join(missed)
                )
            self._check_best_metric()
        return trained

    def _check_best_set(self) -> None:
        """Refuse to choose the best model by a figure of none of several evaluation sets."""
        own = type(self).evaluate.__module__.partition(".")[0] not in (
            "transformers",
            "trl",
            __name__.partition(".")[0],
        )
        if own or self.args.eval_strategy == "no":  # it may return a figure of its own, or is never called
            return
        metric, sets = (self.args.metric_for_best_model or "").removeprefix("eval_"), self.eval_dataset
        if metric and isinstance(sets, dict) and not any(metric.startswith(f"{name}_") for name in sets):
            raise ValueError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}; eval_dataset has the sets {list(sets)}, so it"
                f" must be a figure of one of them, such as 'eval_{next(iter(sets), 'NAME')}_loss'"
            )

    def _check_best_metric(self) -> None:
        """Refuse to choose the best model by a term that evaluations will not report."""
        metric, settings = self.args.metric_for_best_model or "", self.loss_terms.settings
        found = re.search(r"(?:^|_)loss_(layer_\d+(?:_target_\d+)?|target_\d+)$", metric)
        if settings is None or found is None or found[1] in self.loss_terms.added_names():
            return
        if not self.evaluates_terms:
            raise ValueError(
                f"metric_for_best_model is {metric!r}, and eval_loss_terms is False, so that evaluations do not report"
                " auxiliary terms; set it to True, or choose by 'loss'"
            )
        if found[1] not in (lasting := settings.evaluated_at(1.0, self.state.max_steps)):
            raise ValueError(
                f"metric_for_best_model is {metric!r}, a term without a weight at the end of training, so that later"
                f" evaluations do not report it; choose by one of {['loss', *(f'loss_{each}' for each in lasting)]}"
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items_in_batch is not None and not self._knows_how_losses_are_scaled:
            self._knows_how_losses_are_scaled = True
            if self.model_accepts_loss_kwargs and not self._is_scaled_by_items(batch_samples[0]):
                self.model_accepts_loss_kwargs = False
                num_items_in_batch = None
        settings = self.loss_terms.settings
        if self._lacks_losses is None and settings is not None and settings.has_last_position:
            for batch in batch_samples:
                check_batch(batch)  # of the first step only: it stalls the device
        self.loss_terms.begin_step(
            batch_samples,
            self.state.global_step,
            self._training_progress,
            over_processes=self.args.average_tokens_across_devices,
        )
        every = getattr(self.args, "log_term_gradients", 0)
        is_due = every and batch_samples and self.state.global_step % every == 0
        self._to_measure = (batch_samples, num_items_in_batch) if is_due else None
        if self._conflict_free is not None:
            self._conflict_free.begin_step()
        return batch_samples, num_items_in_batch

    def _is_scaled_by_items(self, batch: dict[str, Any]) -> bool:
        """Whether the loss is divided by `num_items_in_batch`, found by computing it with 1 and with 2 items.

        A loss that is divided by the number halves; any other stays the same. Transformers does not test this: it
        treats the loss of every model that accepts the argument as divided.
        """
        model: Any = self.model
        was_training = model.training
        model.eval()
        losses = []
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(batch)
                for items in (1, 2):
                    losses.append(float(self._given_compute_loss(model, dict(inputs), num_items_in_batch=items)))
        finally:
            model.train(was_training)
        once, twice = losses
        return abs(once - 2 * twice) < abs(once - twice)

    @contextlib.contextmanager
    def _watching(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[list[Pass]]:
        """Tell the model how far training is at each call that trains it, and record these calls."""
        passes: list[Pass] = []

        def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if not torch.is_grad_enabled():
                return args, kwargs
            told = self.loss_terms.model_inputs()
            if kwargs.get("num_items_in_batch") is None and not kwargs.get("fused_lm_head"):
                told.pop("target_counts", None)  # a mean over the batch is asked for
            return args, {**told, **kwargs}

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
            if torch.is_grad_enabled():
                counted = ("num_items_in_batch", "target_counts")
                passes.append(Pass(outputs, any(kwargs.get(name) is not None for name in counted)))

        with self._hooked(model, tell, record, inputs):
            yield passes

    def _compute_loss_with_terms(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return self._evaluate_with_terms(model, inputs, return_outputs)
        given = dict(inputs)  # compute_loss may take things out
        with self._watching(model, given) as passes:
            try:
                computed = self._given_compute_loss(
                    model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
                )
            except ValueError as error:
                self._check_labels(error, given)
                raise
        loss = computed[0] if return_outputs else computed
        if not passes:  # a Trainer that calls parts of the model
            passes = [Pass(computed[1] if return_outputs else None, False)]
        loss = self._hold_terms(loss, passes, given, num_items_in_batch)
        return (loss, computed[1]) if return_outputs else loss

    def _check_labels(self, error: ValueError, inputs: Mapping[str, Any]) -> None:
        """Say what to do if the `error` is that of Transformers about a model without a loss, and for want of labels."""
        names = self.label_names or ["labels"]
        if "did not return a loss" not in str(error) or any(inputs.get(name) is not None for name in names):
            return
        wanted = " and ".join(f"`{name}`" for name in names)
        more = ""
        if shifts_labels(self.loss_terms.model):
            more = (
                ", for a language model a copy of `input_ids`; or give the Trainer"
                " data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), which makes them"
            )
        raise ValueError(
            f"train_dataset has no {wanted}: its batches hold {sorted(inputs)}, of which the model computes no loss."
            f" Give each row {wanted}{more}"
        ) from error

    def _hold_terms(
        self, loss: Tensor, passes: list[Pass], inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Keep the terms of a micro-batch for the log; returns the loss, with the terms that it lacks added."""
        # Training sets it; before training, a batch counts as a whole optimizer step.
        self.loss_terms.parts = getattr(self, "current_gradient_accumulation_steps", 1)
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)  # subclasses may set it, from Transformers 5.19
        if is_scaled is None:
            is_scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        loss_scale = 1.0 if is_scaled else 1 / self.loss_terms.parts
        # A model may be called more than once, such as with and without an adapter.
        outputs, is_share = next((each for each in reversed(passes) if each.losses), passes[-1])
        terms, settings = loss_dict_of(outputs), self.loss_terms.settings
        lacks = self._lacks_auxiliary_losses(loss, passes)
        if lacks and not is_share and self.loss_terms.counts is not None:
            terms, is_share = self.loss_terms.shares_of(outputs, inputs), True
        scale = 1 / self.loss_terms.parts
        if is_share:
            # Logging takes the mean over processes, like the Trainer does for the loss.
            scale = float(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1.0
        if lacks and settings is not None and terms:
            added = auxiliary_loss(terms, outputs["loss_weights"], settings)
            loss = loss + added * (scale / loss_scale)
        loss = self.loss_terms.hold(loss, outputs, inputs, loss_scale=loss_scale, scale=scale, terms=terms)
        if self._conflict_free is not None:
            parts = self.loss_terms.auxiliary_parts(terms, outputs["loss_weights"], scale)
            self._conflict_free.add(loss * loss_scale, parts)
        return loss

    def _lacks_auxiliary_losses(self, loss: Tensor, passes: list[Pass]) -> bool:
        """Whether `compute_loss` leaves out auxiliary losses that the model has computed; found at the first micro-batch.

        Raises:
            ValueError: If the model has auxiliary losses, and `compute_loss` leaves no way to train them.
        """
        settings = self.loss_terms.settings
        if self._lacks_losses is None:
            if settings is None or not any(term.weight and not term.is_main for term in settings.terms):
                self._lacks_losses = False
            elif any(depends_on(loss, each.losses) for each in passes):
                self._lacks_losses = False
            else:
                self._check_can_be_added(passes, settings)
                # A micro-batch without any target says nothing.
                self._lacks_losses = any(each.losses for each in passes) or None
        return bool(self._lacks_losses)

    def _check_can_be_added(self, passes: list[Pass], settings: AuxiliaryLossSettings) -> None:
        owner = next(kind for kind in type(self).__mro__ if "compute_loss" in vars(kind)).__name__
        if not any(each.had_labels for each in passes):
            raise ValueError(
                f"compute_loss of {owner} calls the model without labels, so that its auxiliary losses cannot be computed."
                " Leave the labels in the inputs of the model, or train a model without auxiliary losses"
            )
        if settings.loss_weighting != "fixed":
            raise ValueError(
                f"loss_weighting is {settings.loss_weighting!r}, which learns a weight of the main loss, too; {owner} computes"
                " that loss without the model. It must be 'fixed'"
            )
        weights = {term.name: term.weight for term in settings.terms if term.is_main}
        if weights != settings.evaluation_weights:
            raise ValueError(
                f"the model gives the losses of its own head the weights {weights}; {owner} computes the main loss without the"
                f" model, with the weights {settings.evaluation_weights}. Leave position_loss and term_weights of these out"
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._to_measure is not None:  # here, because a run that is resumed restores its random numbers only now
            batches, self._to_measure = self._to_measure, None
            self.loss_terms.keep(measured_gradients(self, self.loss_terms, *batches))
        self.loss_terms.drop_held()
        loss = super().training_step(*args, **kwargs)
        self.loss_terms.keep_held()
        if self._conflict_free is not None and self.accelerator.sync_gradients:
            self._conflict_free.end_step()
        return loss

    # ---- Logs ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # an entry of the training loop
            if (found := self.loss_terms.first_not_finite()) is not None:
                raise self._not_finite_error(*found)
            means = self.loss_terms.means(over_layers=getattr(self.args, "log_loss_terms", "each") == "groups")
            means.pop("loss", None)
            logs.update(means)
            self.logger_names.add(means)
            self.logger_names.show_weights(self.loss_terms.weights)
        self.logger_names.use_in(self.callback_handler.callbacks)
        super().log(logs, *args, **kwargs)
