"""The auxiliary losses for any causal language model and any sequence classification model of Transformers."""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from modeling_charformer.auxiliary_heads import TRAINING_ONLY, AuxiliaryHead, ResidualBlock, UncertaintyWeighting
from modeling_charformer.auxiliary_losses import (
    LossStep,
    Targets,
    causal_lm_losses,
    classification_loss,
    last_of_text,
    sequence_problem_type,
)
from modeling_charformer.loss_settings import (
    LAST_POSITION,
    AuxiliaryLossSettings,
    LossFields,
    LossTerm,
    classifier_settings,
)

from .models import HEADS_FILE, OLD_HEADS_FILE, evaluating, is_causal_lm, saved_heads, unwrap_peft
from .probe import Anatomy, anatomy_of, logit_scale, own_loss_of, probe_ids


OWN_ARGUMENTS = ("training_progress", "training_step", "target_counts")
# Names of the settings in earlier versions, and in configurations that these saved.
FORMER_NAMES = {"classifiers": "heads", "loss_weights": "term_weights"}

Model = TypeVar("Model", bound=nn.Module)


def add_auxiliary_losses(model: Model, heads: str | None = None, **settings: Any) -> Model:
    """Add auxiliary losses to `model`, a causal language model or sequence classification model of Transformers.

    The model is changed and returned. In training, `forward` also takes `training_progress` and `training_step`, which
    `AuxiliaryLossTrainer` passes. Its output then has `loss_dict` and `loss_weights`, like that of a Charformer. Without
    labels, and in evaluation, the model computes what it did before. `save_pretrained` writes the plain model, with the
    auxiliary heads in the subfolder `auxiliary_heads/`; `load_auxiliary_losses` loads these.

    Every head reads the output of its layer after the model's final norm, and after any further module that the model
    applies to the output of its last layer. These modules are found by running the model on six tokens.

    Args:
        model: The model, or a PEFT model around it.
        heads: `"shared"` or `"own"`. `"shared"`, the default for language models, uses the model's output embeddings on
            intermediate layers (like LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710). Further targets have a residual
            block before them, which begins as the identity (like Medusa, Cai et al. 2024, arXiv 2401.10774). `"own"`
            gives each term a separate linear head, like Al-Rfou et al. (2018). Sequence classification models accept
            `"own"` only.
        settings: The fields of `LossFields`, with the defaults that they have there; the main term is called `next_token`. A sequence classification model accepts
            `intermediate_layers` (default `"thirds"`), `intermediate_weight` (0.3), `intermediate_schedule`
            (`"constant"`), `term_weights` and `loss_weighting`; its main term is called `classification`.

    Raises:
        ValueError: If the model or a setting is not accepted; the model is then unchanged.
    """
    base = _checked(unwrap_peft(model))
    mixin = _CausalLM if is_causal_lm(type(base)) else _SequenceClassifier
    settings = {FORMER_NAMES.get(name, name): value for name, value in settings.items()}
    heads = settings.pop("heads", heads) or mixin.accepted_heads[0]
    accepted = mixin.accepted_settings
    if wrong := sorted(settings.keys() - accepted):
        raise ValueError(f"add_auxiliary_losses has no settings {wrong} for {type(base).__name__}; it has {accepted}")
    if heads not in mixin.accepted_heads:
        raise ValueError(f"heads is {heads!r}; for {type(base).__name__} it must be one of {mixin.accepted_heads}")
    losses = mixin.settings_for(base.config.get_text_config().num_hidden_layers, **settings)
    losses.weights_at(0.0)  # a schedule that returns an impossible value raises here, not after hours of training
    losses.weights_at(1.0)
    anatomy = anatomy_of(base)
    checked = mixin.check(base, anatomy, heads)
    _check_layers(base, anatomy, losses.layers)
    base.__class__ = _class_with_losses(cast(Any, type(base)), mixin, anatomy.output_kind)
    cast(_WithAuxiliaryLosses, base)._add_heads(losses, anatomy, heads, checked)
    base.config.auxiliary_losses = {"heads": heads, **settings}
    return model


def load_auxiliary_losses(model: Model, name_or_path: str | os.PathLike[str]) -> Model:
    """Add to a loaded plain model the auxiliary losses and heads that were saved with it; the model is changed.

    Args:
        model: The model that `from_pretrained(name_or_path)` returned.
        name_or_path: A folder, or the id of a repository on the Hub.

    Raises:
        ValueError: If the model was saved without auxiliary losses.
    """
    base = unwrap_peft(model)
    settings = getattr(getattr(base, "config", None), "auxiliary_losses", None)
    if not settings:
        raise ValueError(f"{name_or_path} was saved without auxiliary losses; add_auxiliary_losses gives it new ones")
    add_auxiliary_losses(model, **settings)
    cast(_WithAuxiliaryLosses, base)._load_heads(_cached_heads(str(name_or_path)))
    return model


def _cached_heads(name_or_path: str) -> Path:
    try:
        return Path(str(cached_file(name_or_path, Path(HEADS_FILE).name, subfolder=str(Path(HEADS_FILE).parent))))
    except OSError as error:  # raised whatever is missing
        try:
            return Path(str(cached_file(name_or_path, OLD_HEADS_FILE)))
        except OSError:
            raise error from None


class _WithAuxiliaryLosses(PreTrainedModel):
    """The base class that `add_auxiliary_losses` adds in front of a model's class."""

    accepted_settings: list[str]
    accepted_heads: tuple[str, ...]
    main: str
    loss_settings: AuxiliaryLossSettings
    # Set on the class made for a model: the arguments that made it, and the output class with a breakdown of the loss.
    _made_of: tuple[type, type, type[ModelOutput]]
    _output_class: type[ModelOutput]

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        raise NotImplementedError

    @staticmethod
    def check(model: PreTrainedModel, anatomy: Anatomy, heads: str) -> dict[str, Any]:
        """Attributes that the losses need in addition to the anatomy, by name.

        Raises:
            ValueError: If the auxiliary losses do not fit the model.
        """
        raise NotImplementedError

    def _add_heads(
        self, settings: AuxiliaryLossSettings, anatomy: Anatomy, heads: str, checked: dict[str, Any]
    ) -> None:
        self.loss_settings = settings
        self._anatomy = anatomy
        for name, value in checked.items():
            setattr(self, name, value)
        terms = [term for term in settings.terms if not term.is_main]
        modules = {term.name: self._make_head(term, index, heads) for index, term in enumerate(terms, start=1)}
        self.auxiliary_heads = nn.ModuleDict(modules).to(self.device, self.dtype)
        self.loss_uncertainty = None
        if settings.loss_weighting != "fixed":
            names = [term.name for term in settings.terms]
            self.loss_uncertainty = UncertaintyWeighting(names).to(self.device)

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        raise NotImplementedError

    def _linear_head(self, num_outputs: int, index: int) -> nn.Module:
        deviation = getattr(self.config.get_text_config(), "initializer_range", 0.02)
        head = AuxiliaryHead(self._anatomy.width, num_outputs, index)
        head.draw(deviation)
        return head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        progress, number, counts = (kwargs.pop(name, None) for name in OWN_ARGUMENTS)
        if args:
            kwargs |= dict(zip(inspect.signature(super().forward).parameters, args, strict=False))
        if kwargs.get("labels") is None:
            return super().forward(**kwargs)
        step = LossStep(self.loss_settings, True, self.training, progress, number)
        asked = kwargs.get("output_hidden_states") or getattr(self.config, "output_hidden_states", False)
        outputs = super().forward(**{**kwargs, "output_hidden_states": asked or self.training, "return_dict": True})
        share_of_step = self._add_losses(step, outputs, kwargs, counts)
        dropped = ("loss",) if asked else ("loss", "hidden_states")
        values = {name: value for name, value in outputs.items() if name not in dropped}
        return self._output_class(
            **values, **step.breakdown(self.loss_uncertainty if self.training else None, share_of_step)
        )

    def _add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        """Add the values of all active terms; returns a function that computes this batch's share of the optimizer step."""
        raise NotImplementedError

    def _head_input(self, term: LossTerm, outputs: Any) -> Tensor:
        """The output of a term's layer, `(B, S, hidden_size)`; for the last layer, the model's last hidden state."""
        last = term.layer == self.loss_settings.num_layers
        states: tuple[Tensor, ...] = outputs.hidden_states
        return states[-1 if last else self._anatomy.layers[term.layer]]

    def _finished(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        """Apply to the output of a term's layer what the model applies to that of its last layer, like the final norm."""
        if term.layer < self.loss_settings.num_layers:
            for name in self._anatomy.tail or ():
                hidden_states = self.get_submodule(name)(hidden_states)
        return hidden_states

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

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the plain model, like `save_pretrained` of any model, and the auxiliary heads in a subfolder."""
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        plain = {name: weight for name, weight in weights.items() if not name.startswith(TRAINING_ONLY)}
        super().save_pretrained(save_directory, *args, **kwargs, state_dict=plain)  # type: ignore[misc]  # the plain class takes state_dict, which kwargs no longer holds
        if kwargs.get("is_main_process", True):
            self.save_auxiliary_heads(save_directory, weights)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the heads first, since `save_pretrained(push_to_hub=True)` pushes before it returns."""
        self.save_auxiliary_heads(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def save_auxiliary_heads(
        self, folder: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the weights that only training needs into `folder`, as `auxiliary_heads/model.safetensors`."""
        weights = self.state_dict() if state_dict is None else state_dict
        heads = {name: weight.contiguous() for name, weight in weights.items() if name.startswith(TRAINING_ONLY)}
        path = Path(folder, HEADS_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        save_file(heads, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, path)
        Path(folder, OLD_HEADS_FILE).unlink(missing_ok=True)  # of an earlier version; engines would load it

    def load_auxiliary_heads(self, folder: str | os.PathLike[str]) -> None:
        """Load the heads that `save_auxiliary_heads` wrote.

        Raises:
            ValueError: If the file is missing or was written with other settings.
        """
        path = saved_heads(folder)
        if path is None:
            raise ValueError(f"{folder} has no {HEADS_FILE}: it holds a model without auxiliary heads")
        self._load_heads(path)

    def _load_heads(self, path: Path) -> None:
        saved = load_file(path)
        if isinstance(self, _SequenceClassifier):  # saved by earlier versions, but never trained
            saved.pop(f"loss_uncertainty.log_variances.{LAST_POSITION}", None)
        expected = {name for name in self.state_dict() if name.startswith(TRAINING_ONLY)}
        if saved.keys() != expected:
            different = sorted(saved.keys() ^ expected)
            raise ValueError(f"{path} was saved with other auxiliary losses; {different[:4]} are not in both")
        self.load_state_dict(saved, strict=False)


class _CausalLM(_WithAuxiliaryLosses):
    accepted_settings = [field.name for field in fields(LossFields)]
    accepted_heads = ("shared", "own")
    main = "next_token"
    _logit_scale: float
    _follows_shift_labels: bool

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        return AuxiliaryLossSettings(num_layers=num_layers, main="next_token", **settings)

    @staticmethod
    def check(model: PreTrainedModel, anatomy: Anatomy, heads: str) -> dict[str, Any]:
        name = type(model).__name__
        if not anatomy.reads_forward:
            raise ValueError(
                f"{name} reads in both directions: its layers see the tokens that the heads would have to predict"
            )
        own_loss = own_loss_of(model)
        if not own_loss.is_shifted:
            raise ValueError(
                f"the loss of {name} is not the mean cross-entropy of its logits for the next token, so the auxiliary losses"
                " would not be comparable"
            )
        scale = _logit_scale_of(model) if heads == "shared" else 1.0
        if scale is None:
            raise ValueError(
                f"the logits of {name} are not its output embeddings applied to its last hidden state. heads='shared' does not"
                " know the further operations of this model; choose heads='own'"
            )
        return {"_logit_scale": scale, "_follows_shift_labels": own_loss.follows_shift_labels}

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        if heads == "own":
            return self._linear_head(self._vocab_size, index)
        return nn.Identity() if term.offset == 1 else ResidualBlock(self._anatomy.width)

    @property
    def _vocab_size(self) -> int:
        return cast(Tensor, self.get_output_embeddings().weight).shape[0]

    def _logits(self, hidden_states: Tensor) -> Tensor:
        logits = self.get_output_embeddings()(hidden_states)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        cap = _logit_cap(self)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _logits_of(self, term: LossTerm, hidden_states: Tensor) -> list[Tensor]:
        if term.is_main:
            return [self._logits(hidden_states)]
        head, hidden_states = self.auxiliary_heads[term.name], self._finished(term, hidden_states)
        return [head(hidden_states) if isinstance(head, AuxiliaryHead) else self._logits(head(hidden_states))]

    def _add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        if inputs.get("shift_labels") is not None and not self._follows_shift_labels:
            raise ValueError(f"the loss of {type(self).__name__} does not follow shift_labels; give labels alone")
        targets = Targets(inputs, self.loss_settings.num_targets, inputs.get("num_items_in_batch"), target_counts)

        own_loss: Tensor = outputs.loss

        def loss_of(term: LossTerm) -> Tensor:
            if term.name == self.main:
                return own_loss
            logits_of = functools.partial(self._logits_of, term)
            # One term at a time: with a large vocabulary, several at once would run on smaller chunks.
            losses = causal_lm_losses(self._head_input(term, outputs), logits_of, [term], targets, self._vocab_size)
            return losses[term.name]

        if not self.training:
            step.add({self.main: outputs.loss})  # no further head runs in evaluation
            return targets.share_of_step
        step.add_main(loss_of)
        for term in step.terms:
            if not term.is_main:
                step.add({term.name: loss_of(term)})
        return targets.share_of_step


class _SequenceClassifier(_WithAuxiliaryLosses):
    accepted_settings = [
        "intermediate_layers",
        "intermediate_weight",
        "intermediate_schedule",
        "term_weights",
        "loss_weighting",
    ]
    accepted_heads = ("own",)
    main = "classification"
    accepts_loss_kwargs = False  # Transformers' classifiers take means over the batch

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        renamed = {name.removeprefix("intermediate_"): value for name, value in settings.items()}
        return classifier_settings(num_layers, **renamed)

    @staticmethod
    def check(model: PreTrainedModel, anatomy: Anatomy, heads: str) -> dict[str, Any]:
        return {}

    def _make_head(self, term: LossTerm, index: int, heads: str) -> nn.Module:
        return self._linear_head(int(self.config.num_labels or 0), index)

    def _add_losses(
        self, step: LossStep, outputs: Any, inputs: dict[str, Any], target_counts: Tensor | None
    ) -> Callable[[], Tensor | float]:
        labels = inputs["labels"]
        problem_type = sequence_problem_type(self.config.problem_type, int(self.config.num_labels or 0), labels)
        step.add({self.main: outputs.loss})
        for term in step.terms:
            if not term.is_main:
                pooled = self._pooled(self._finished(term, self._head_input(term, outputs)), inputs)
                logits = self.auxiliary_heads[term.name](pooled)
                step.add({term.name: classification_loss(logits, labels, problem_type)})
        return lambda: 1.0

    def _pooled(self, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The state at the first position if the model reads in both directions, else at the last position of text."""
        if not self._anatomy.reads_forward:
            return hidden_states[:, 0]
        mask, pad = inputs.get("attention_mask"), self.config.get_text_config().pad_token_id
        if mask is None and pad is not None and inputs.get("input_ids") is not None:
            mask = inputs["input_ids"] != pad
        return last_of_text(hidden_states, mask)


def _logit_cap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's


def _logit_scale_of(model: PreTrainedModel) -> float | None:
    with evaluating(model):
        outputs: Any = model(input_ids=probe_ids(model), output_hidden_states=True, return_dict=True)
        made = cast(nn.Module, model.get_output_embeddings())(outputs.hidden_states[-1])
    return logit_scale(made, outputs.logits, _logit_cap(model))


@functools.cache
def _class_with_losses(
    kind: type[PreTrainedModel], mixin: type[_WithAuxiliaryLosses], output_kind: type[ModelOutput]
) -> type[_WithAuxiliaryLosses]:
    """A class with the name of `kind`, since configurations, Trainer and loss functions look at the name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    forward.__doc__ = kind.forward.__doc__
    signature = inspect.signature(kind.forward)
    parameters = list(signature.parameters.values())
    end = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_ARGUMENTS]
    if mixin is _SequenceClassifier:
        own = own[:2]
    extended = signature.replace(parameters=[*parameters[:end], *own, *parameters[end:]])
    forward.__signature__ = extended  # type: ignore[attr-defined]  # functions accept it, their type does not say so
    content = {
        "__module__": kind.__module__,
        "forward": forward,
        "_made_of": (kind, mixin, output_kind),
        "_output_class": _output_class(output_kind),
    }
    return type(kind.__name__, (mixin, kind), content)


def _empty_model(
    kind: type[PreTrainedModel], mixin: type[_WithAuxiliaryLosses], output_kind: type[ModelOutput]
) -> Any:
    make_class: Any = _class_with_losses  # mypy does not take classes for hashable in calls of cached functions
    made: Any = make_class(kind, mixin, output_kind)
    return made.__new__(made)


@functools.cache
def _output_class(kind: type[ModelOutput]) -> type[ModelOutput]:
    @dataclass
    class OutputWithBreakdown(kind):  # type: ignore[misc,valid-type]  # a base class known only at run time
        loss_dict: dict[str, Tensor] | None = None
        loss_weights: dict[str, Any] | None = None

        def __reduce__(self) -> Any:
            return (_output, (kind, dict(self)))

    return OutputWithBreakdown


def _output(kind: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return _output_class(kind)(**values)


def _check_layers(model: PreTrainedModel, anatomy: Anatomy, layers: tuple[int, ...]) -> None:
    """Check that the outputs of `layers` are among the hidden states, and that the model's tail can be applied to them."""
    missing = [layer for layer in layers if layer not in anatomy.layers]
    if missing:
        raise ValueError(
            f"the hidden states that {type(model).__name__} returns do not contain the outputs of its layers {missing}, so"
            " these layers cannot have losses; choose intermediate_layers=None"
        )
    if layers and anatomy.tail is None:
        raise ValueError(
            f"{type(model).__name__} does not compute its last hidden state from its last layer's output by a chain of"
            " modules, so heads on other layers cannot do the same; choose intermediate_layers=None"
        )


def _checked(model: nn.Module) -> PreTrainedModel:
    """The model, if `add_auxiliary_losses` accepts it."""
    name = type(model).__name__
    if hasattr(model, "loss_settings"):
        raise ValueError(f"this {name} has auxiliary losses already")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"add_auxiliary_losses takes a model of Transformers (a PreTrainedModel), not {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder; add_auxiliary_losses takes causal language models and sequence classification models"
        )
    if is_causal_lm(type(model)):
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{name} has no output embeddings, so nothing predicts the next token")
        rows, vocab_size = cast(Tensor, head.weight).shape[0], model.config.get_text_config().vocab_size
        if rows != vocab_size:
            raise ValueError(
                f"the output embeddings of {name} have {rows} rows, its vocab_size is {vocab_size}; they must be equal"
            )
    elif not name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"add_auxiliary_losses takes causal language models (...ForCausalLM) and sequence classification models"
            f" (...ForSequenceClassification), not {name}"
        )
    return model
