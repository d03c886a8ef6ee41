"""A model of Transformers with auxiliary losses: the class that `add_auxiliary_losses` gives it.

`causal_lm` and `classifiers` hold what differs between kinds of models.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from modeling_charformer.auxiliary_heads import TRAINING_ONLY, AuxiliaryHead, UncertaintyWeighting
from modeling_charformer.auxiliary_losses import LossStep
from modeling_charformer.compatibility import check_mask
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossTerm
from modeling_charformer.unused_losses import LossWatch

from .heads_file import SavesHeads
from .probe import Trace, through
from .probe_layers import Anatomy
from .probe_loss import OwnLoss


logger = logging.getLogger(__name__)
OWN_ARGUMENTS = ("training_progress", "training_step", "training_seed", "target_counts")
# The fields of an output that hold the outputs of layers.
STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states", "reshaped_hidden_states")


class ModelWithLosses(SavesHeads):
    """The base class that `add_auxiliary_losses` adds in front of a model's class."""

    accepted_settings: list[str]
    accepted_heads: tuple[str, ...]
    main: str
    takes_target_counts = False
    shifts_labels: bool
    _own_loss = OwnLoss(None, False, False)
    heads_only = False
    """Whether nothing but the heads is trained."""
    _heads_checked = False
    # Set on the class made for a model: the arguments that made it, and the output class with a breakdown of the loss.
    _made_of: tuple[type, type, type[ModelOutput]]
    _output_class: type[ModelOutput]

    @classmethod
    def settings_for(cls, num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        raise NotImplementedError

    @classmethod
    def check(cls, model: PreTrainedModel, anatomy: Anatomy, trace: Trace, heads: str) -> dict[str, Any]:
        """Attributes that the losses need in addition to the anatomy, by name.

        Raises:
            ValueError: If the auxiliary losses do not fit the model.
        """
        raise NotImplementedError

    def add_heads(
        self,
        settings: AuxiliaryLossSettings,
        anatomy: Anatomy,
        heads: str,
        checked: dict[str, Any],
        heads_only: bool = False,
        draft_vocabulary: Tensor | None = None,
    ) -> None:
        self.loss_settings, self.heads_only = settings, heads_only
        self._anatomy, self._own_heads = anatomy, heads == "own"
        for name, value in checked.items():
            setattr(self, name, value)
        terms = [term for term in settings.terms if not term.is_main]
        self.auxiliary_heads = nn.ModuleDict()
        if draft_vocabulary is not None:
            self.auxiliary_heads.register_buffer("draft_vocabulary", draft_vocabulary)
        self.auxiliary_heads.update({term.name: self._make_head(term, i, heads) for i, term in enumerate(terms, 1)})
        self.auxiliary_heads.to(self.device, self.dtype)
        self.loss_uncertainty = None
        if settings.loss_weighting != "fixed":
            names = [term.name for term in settings.terms]
            self.loss_uncertainty = UncertaintyWeighting(names).to(self.device)
        self.loss_watch = LossWatch(type(self).__name__, self.base_model, settings)
        if heads_only:
            for name, parameter in self.named_parameters():
                if not name.startswith(TRAINING_ONLY):
                    parameter.requires_grad_(False)
            self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """Set the mode. With `heads_only` the body stays in evaluation mode, so that heads see the states of inference."""
        super().train(mode)
        if self.heads_only:
            for name, module in self.named_children():
                if f"{name}." not in TRAINING_ONLY:
                    module.eval()
        return self

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        raise NotImplementedError

    def linear_head(self, num_outputs: int, index: int, width: int | None = None) -> nn.Module:
        head = AuxiliaryHead(width or self._anatomy.width, num_outputs, index)
        head.draw(self._deviation)
        return head

    @property
    def _deviation(self) -> float:
        return float(getattr(self.config.get_text_config(), "initializer_range", 0.02))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        progress, number, seed, counts = (kwargs.pop(name, None) for name in OWN_ARGUMENTS)
        if args:
            kwargs |= dict(zip(inspect.signature(super().forward).parameters, args, strict=False))
        if kwargs.get("labels") is None:
            return super().forward(**kwargs)
        if self.loss_settings.has_last_position:
            check_mask(kwargs.get("attention_mask"))
        step = LossStep(self.loss_settings, True, self.training, progress, number, seed)
        asked = kwargs.get("output_hidden_states") or getattr(self.config, "output_hidden_states", False)
        inputs = {**self._plain_inputs(kwargs), "output_hidden_states": asked or step.runs_heads, "return_dict": True}
        self._check_heads_are_trained()
        self.prepare(step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.heads_only):
            outputs = super().forward(**inputs)
        share_of_step = self.add_losses(step, outputs, kwargs, counts)
        dropped = ("loss",) if asked else ("loss", *STATES)
        values = {name: value for name, value in outputs.items() if name not in dropped}
        losses = step.breakdown(self.loss_uncertainty if self.training else None, share_of_step)
        return self._output_class(**values, **self.loss_watch.watched(losses))

    def _check_heads_are_trained(self) -> None:
        """Warn once if the heads are frozen while other weights train, or if PEFT will not save them.

        Raises:
            ValueError: If the heads have adapters of PEFT, without which they could not be loaded.
        """
        if self._heads_checked or not self.training or torch.compiler.is_compiling():
            return
        if any(".base_layer." in name for name, _ in self.auxiliary_heads.named_parameters()):
            raise ValueError(
                f"PEFT has put adapters on the auxiliary heads of this {type(self).__name__}, which could not be loaded without"
                " them; call add_auxiliary_losses after get_peft_model"
            )
        self._heads_checked = True
        if getattr(self, "peft_config", None) and not (self._hf_peft_config_loaded or self.is_saved_beside_adapter):
            logger.warning(
                "PEFT saves its adapter without the auxiliary heads of this %s. To save them beside it, call"
                " add_auxiliary_losses after get_peft_model, train with AuxiliaryLossTrainer, or call"
                " model.get_base_model().save_auxiliary_heads(folder)",
                type(self).__name__,
            )
        heads = [*self.auxiliary_heads.parameters()]
        if (
            heads
            and not any(weight.requires_grad for weight in heads)
            and any(w.requires_grad for w in self.parameters())
        ):
            logger.warning(
                "The auxiliary heads of this %s are frozen, so they stay as they are. PEFT freezes what a model has when it"
                " adds adapters. To train the heads, call add_auxiliary_losses after get_peft_model",
                type(self).__name__,
            )

    def _plain_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs without a divisor that the plain model does not follow."""
        if self._own_loss.follows_num_items:
            return inputs
        return {name: value for name, value in inputs.items() if name != "num_items_in_batch"}

    def prepare(self, step: LossStep) -> None:
        """Create the nodes of the graph whose backward pass is to run after that of the model."""

    def add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        """Add the values of all active terms; returns a function that computes this batch's share of the optimizer step."""
        raise NotImplementedError

    def _head_input(self, term: LossTerm, outputs: Any) -> Tensor:
        """The output of a term's layer, `(B, S, n)`; for the last layer, the model's last hidden state."""
        states: tuple[Tensor, ...] = getattr(outputs, self._anatomy.states_name)
        last, readout = term.layer == self.loss_settings.num_layers, self._anatomy.readout
        state = states[-1 if last else self._anatomy.layers[term.layer]]
        if readout is None or (last and not self._anatomy.ends_with_layer):
            return state
        return readout(self, readout.flat(state)) if last else readout.flat(state)

    def _finished(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        """Apply to the output of a term's layer what the model applies to that of its last layer, like the final norm."""
        if term.layer == self.loss_settings.num_layers:
            return hidden_states
        if self._anatomy.readout is not None:
            return self._anatomy.readout(self, hidden_states)
        return through(self, self._anatomy.tail or (), hidden_states)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Loading makes the class again, since pickle finds classes by name and this one cannot be imported."""
        for module in self.modules():
            # Transformers' hooks that record hidden states cannot be pickled; the next call that needs them adds new ones.
            for key, hook in [*module._forward_hooks.items()]:
                if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                    del module._forward_hooks[key]
            module.__dict__.pop("_output_capturing_hooks_installed", None)
        state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:]
        return (_empty_model, self._made_of, *state)


@functools.cache
def class_with_losses(
    kind: type[PreTrainedModel], mixin: type[ModelWithLosses], output_kind: type[ModelOutput]
) -> type[ModelWithLosses]:
    """A class with the name of `kind`, since configurations, Trainer and loss functions look at the name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    forward.__doc__ = kind.forward.__doc__
    signature = inspect.signature(kind.forward)
    parameters = list(signature.parameters.values())
    end = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_ARGUMENTS]
    if not mixin.takes_target_counts:
        own.pop()
    extended = signature.replace(parameters=[*parameters[:end], *own, *parameters[end:]])
    forward.__signature__ = extended  # type: ignore[attr-defined]  # functions accept it, their type does not say so
    content = {
        "__module__": kind.__module__,
        "forward": forward,
        "_made_of": (kind, mixin, output_kind),
        "_output_class": output_class(output_kind),
    }
    return type(kind.__name__, (mixin, kind), content)


def _empty_model(kind: type[PreTrainedModel], mixin: type[ModelWithLosses], output_kind: type[ModelOutput]) -> Any:
    make_class: Any = class_with_losses  # mypy does not take classes for hashable in calls of cached functions
    made: Any = make_class(kind, mixin, output_kind)
    return made.__new__(made)


@functools.cache
def output_class(kind: type[ModelOutput]) -> type[ModelOutput]:
    @dataclass
    class OutputWithBreakdown(kind):  # type: ignore[misc,valid-type]  # a base class known only at run time
        loss_dict: dict[str, Tensor] | None = None
        loss_weights: dict[str, Any] | None = None

        def __reduce__(self) -> Any:
            return (_output, (kind, dict(self)))

    return OutputWithBreakdown


def _output(kind: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return output_class(kind)(**values)
