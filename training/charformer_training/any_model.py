"""The auxiliary losses for models of Transformers: any causal language model, any classifier of sequences."""

import functools
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from modeling_charformer.auxiliary_heads import TRAINING_ONLY, AuxiliaryHead, ResidualBlock, UncertaintyWeighting
from modeling_charformer.auxiliary_losses import (
    causal_lm_losses,
    classification_loss,
    cross_entropy_sum,
    last_target_positions,
    mean_denominators,
    sequence_problem_type,
    share_of_step,
    shifted_targets,
    weighted_loss,
)
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossTerm, classifier_settings

from .models import HEADS_FILE, OLD_HEADS_FILE, evaluating, is_causal_lm, saved_heads, unwrap_peft


OWN_ARGUMENTS = ("training_progress", "training_step", "target_counts")

Model = TypeVar("Model", bound=nn.Module)


def add_auxiliary_losses(model: Model, classifiers: str | None = None, **settings: Any) -> Model:
    """Train `model`, a causal language model or a classifier of sequences of Transformers, with auxiliary losses too.

    The model is changed and returned. In training, its `forward` takes `training_progress` and `training_step` (which
    `AuxiliaryLossTrainer` gives it), and its output has `loss_dict` and `loss_weights`, as a Charformer's. Without labels
    and in evaluation it is what it was; `save_pretrained` writes the plain model, loadable anywhere, with the auxiliary
    heads in a subfolder (`auxiliary_heads/`), from which `load_auxiliary_losses` goes on.

    All classifiers read the output of their layer after the model's final norm, where it has one.

    Args:
        model: The model, or a PEFT model around it.
        classifiers: `"shared"` (the default for language models): the classifier of an intermediate layer is the
            model's own, which costs no parameters (as in LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710); a further
            target has a residual block before it, which begins as the identity (as in Medusa, Cai et al. 2024, arXiv
            2401.10774). `"own"`: each term has a linear classifier of its own, as in Al-Rfou et al. (2018); the only
            kind for classifiers of sequences.
        settings: The fields of `AuxiliaryLossSettings`, with the same meaning and defaults as those of
            `CharformerConfig`; the main term is called `next_token`. For a classifier of sequences
            `intermediate_layers` (by default `"thirds"`), `intermediate_weight` (0.3), `intermediate_schedule`
            (`"constant"`), `loss_weights` and `loss_weighting`; the main term is called `classification`.

    Raises:
        ValueError: If the model or a setting is not accepted, before anything is changed.
    """
    base = _checked(unwrap_peft(model))
    mixin = _CausalLM if is_causal_lm(type(base)) else _SequenceClassifier
    accepted = mixin.accepted_settings
    if wrong := sorted(settings.keys() - accepted):
        raise ValueError(f"add_auxiliary_losses has no settings {wrong} for {type(base).__name__}; it has {accepted}")
    classifiers = mixin.accepted_classifiers[0] if classifiers is None else classifiers
    if classifiers not in mixin.accepted_classifiers:
        raise ValueError(
            f"classifiers is {classifiers!r}; for {type(base).__name__} it must be one of {mixin.accepted_classifiers}"
        )
    losses = mixin.settings_for(base.config.get_text_config().num_hidden_layers, **settings)
    losses.weights_at(0.0)  # a schedule that returns nonsense does so here already, not after hours of training
    losses.weights_at(1.0)
    norm, output_class = _final_norm(base)
    original = base.__class__
    base.__class__ = _class_with_losses(cast(Any, original), mixin)
    changed = cast(_WithAuxiliaryLosses, base)
    try:
        changed._add_heads(losses, classifiers, norm, output_class)
    except BaseException:
        base.__class__ = original
        raise
    base.config.auxiliary_losses = {"classifiers": classifiers, **settings}
    return model


def load_auxiliary_losses(model: Model, name_or_path: str | os.PathLike) -> Model:
    """Give a loaded plain model the auxiliary losses and heads that were saved beside it; the model is changed.

    Args:
        model: What `from_pretrained(name_or_path)` returned.
        name_or_path: A folder, or an id on the Hub.

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
    except OSError as error:  # whatever is missing
        try:
            return Path(str(cached_file(name_or_path, OLD_HEADS_FILE)))
        except OSError:
            raise error from None


class _WithAuxiliaryLosses(PreTrainedModel):
    """What `add_auxiliary_losses` puts before the class of a model."""

    accepted_settings: list[str]
    accepted_classifiers: tuple[str, ...]
    main: str
    loss_settings: AuxiliaryLossSettings

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        raise NotImplementedError

    def _add_heads(
        self, settings: AuxiliaryLossSettings, classifiers: str, norm: str | None, output_class: type[ModelOutput]
    ) -> None:
        self._check_logits()
        self.loss_settings = settings
        self._final_norm_name = norm
        self._output_class = output_class
        heads = {
            term.name: self._make_head(term, index, classifiers)
            for index, term in enumerate(settings.terms)
            if not term.is_main
        }
        self.auxiliary_heads = nn.ModuleDict(heads).to(self.device, self.dtype)
        self.loss_uncertainty = None
        if settings.loss_weighting != "fixed":
            names = [*(term.name for term in settings.terms), "last_position"]
            self.loss_uncertainty = UncertaintyWeighting(names).to(self.device)

    def _check_logits(self) -> None:
        """Raise a ValueError if the classifier that the heads share is not what the model does."""

    def _make_head(self, term: LossTerm, index: int, classifiers: str) -> nn.Module:
        raise NotImplementedError

    def _own_head(self, num_outputs: int, index: int) -> nn.Module:
        config = self.config.get_text_config()
        head = AuxiliaryHead(config.hidden_size, num_outputs, index)
        nn.init.normal_(head.weight, 0.0, getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(head.bias)
        return head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: kwargs.pop(name, None) for name in OWN_ARGUMENTS}
        if args:
            kwargs |= dict(zip(inspect.signature(super().forward).parameters, args, strict=False))
        labels = kwargs.get("labels")
        if labels is None:
            return super().forward(**kwargs)
        if not self.training:
            outputs = super().forward(**{**kwargs, "return_dict": True})
            return self._with_breakdown(outputs, outputs.loss, {self.main: outputs.loss}, {self.main: 1.0})
        weights = self.loss_settings.weights_at(own["training_progress"], own["training_step"])
        terms = [term for term in self.loss_settings.terms if not term.is_main and weights[term.name]]
        wanted = kwargs.get("output_hidden_states") or getattr(self.config, "output_hidden_states", False)
        outputs = super().forward(**{**kwargs, "output_hidden_states": True, "return_dict": True})
        losses = self._losses(outputs, terms, weights, kwargs, own["target_counts"])
        if not wanted:
            outputs = {name: value for name, value in outputs.items() if name != "hidden_states"}
        share = self._share_of_step(kwargs, own["target_counts"])
        loss, losses, in_force = weighted_loss(losses, weights, self.loss_uncertainty, share)
        return self._with_breakdown(outputs, loss, losses, in_force)

    def _with_breakdown(
        self, outputs: Mapping[str, Any], loss: Tensor, losses: dict[str, Tensor], weights: dict[str, Any]
    ) -> ModelOutput:
        values = {name: value for name, value in outputs.items() if name != "loss"}
        return self._output_class(loss=loss, **values, loss_dict=losses, loss_weights=weights)

    def _losses(
        self,
        outputs: Any,
        terms: list[LossTerm],
        weights: dict[str, float],
        inputs: dict[str, Any],
        target_counts: Tensor | None,
    ) -> dict[str, Tensor]:
        """The value of the main term and of each of `terms`, by name."""
        raise NotImplementedError

    def _auxiliary_norm(self, hidden_states: Tensor) -> Tensor:
        norm = self._final_norm_name
        return hidden_states if norm is None else self.get_submodule(norm)(hidden_states)

    def _share_of_step(self, inputs: dict[str, Any], target_counts: Tensor | None) -> Tensor | float:
        """How much of what the terms are divided by is in this batch."""
        return 1.0

    def _normed(self, outputs: Any, layer: int) -> Tensor:
        """The output of `layer`, `(B, S, hidden_size)`, after the final norm."""
        hidden = outputs.hidden_states[layer]
        return hidden if layer == self.loss_settings.num_layers else self._auxiliary_norm(hidden)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As everywhere in Transformers, the plain model; and the auxiliary heads beside it."""
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        plain = {name: weight for name, weight in weights.items() if not name.startswith(TRAINING_ONLY)}
        super().save_pretrained(save_directory, *args, **kwargs, state_dict=plain)  # type: ignore[misc]  # taken out above
        if kwargs.get("is_main_process", True):
            self.save_auxiliary_heads(save_directory, weights)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """`save_pretrained(push_to_hub=True)` pushes before it returns, and the heads too."""
        self.save_auxiliary_heads(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def save_auxiliary_heads(self, folder: str | os.PathLike, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the weights that only training needs into `folder`, as `auxiliary_heads/model.safetensors`."""
        weights = self.state_dict() if state_dict is None else state_dict
        own = {name: weight.contiguous() for name, weight in weights.items() if name.startswith(TRAINING_ONLY)}
        path = Path(folder, HEADS_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        save_file(own, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, path)
        Path(folder, OLD_HEADS_FILE).unlink(missing_ok=True)  # of an earlier model: engines would load it

    def load_auxiliary_heads(self, folder: str | os.PathLike) -> None:
        """Load what `save_auxiliary_heads` wrote.

        Raises:
            ValueError: If it is missing, or was written with other settings.
        """
        path = saved_heads(folder)
        if path is None:
            raise ValueError(f"{folder} has no {HEADS_FILE}: it holds a model without auxiliary heads")
        self._load_heads(path)

    def _load_heads(self, path: Path) -> None:
        saved = load_file(path)
        expected = {name for name in self.state_dict() if name.startswith(TRAINING_ONLY)}
        if saved.keys() != expected:
            different = sorted(saved.keys() ^ expected)
            raise ValueError(f"{path} was saved with other auxiliary losses; {different[:4]} are not in both")
        self.load_state_dict(saved, strict=False)


class _CausalLM(_WithAuxiliaryLosses):
    accepted_settings = [
        field.name for field in fields(AuxiliaryLossSettings) if field.name not in ("num_layers", "main")
    ]
    accepted_classifiers = ("shared", "own")
    main = "next_token"

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        return AuxiliaryLossSettings(num_layers, main="next_token", **settings)

    def _check_logits(self) -> None:
        with evaluating(self):
            ids = torch.tensor([[1, 2]], device=self.device)  # 0 may be padding, embedded as nothing
            outputs = super().forward(input_ids=ids, output_hidden_states=True, return_dict=True)
            logits, expected = self._logits(outputs.hidden_states[-1]).float(), outputs.logits.float()
        if bool(
            (logits - expected).abs().max() > 0.02 * expected.abs().max()
        ):  # half precision is no better than that
            raise ValueError(
                f"the logits of {type(self).__name__} are not what its output embeddings make of its last hidden state;"
                " add_auxiliary_losses does not know what else this model does to them"
            )

    def _make_head(self, term: LossTerm, index: int, classifiers: str) -> nn.Module:
        if classifiers == "own":
            return self._own_head(self._vocab_size, index)
        return nn.Identity() if term.offset == 1 else ResidualBlock(self.config.get_text_config().hidden_size)

    @property
    def _vocab_size(self) -> int:
        return cast(Tensor, self.get_output_embeddings().weight).shape[0]

    def _logits(self, normed: Tensor) -> Tensor:
        logits = self.get_output_embeddings()(normed)
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _classify(self, term: LossTerm, hidden_states: Tensor) -> list[Tensor]:
        if term.layer < self.loss_settings.num_layers:
            hidden_states = self._auxiliary_norm(hidden_states)
        head = self.auxiliary_heads[term.name]
        return [head(hidden_states) if isinstance(head, AuxiliaryHead) else self._logits(head(hidden_states))]

    def _denominators(self, inputs: dict[str, Any], target_counts: Tensor | None) -> Tensor:
        num_targets, num_items = self.loss_settings.num_targets, inputs.get("num_items_in_batch")
        return mean_denominators(inputs["labels"], num_targets, num_items, target_counts)

    def _share_of_step(self, inputs, target_counts):
        return share_of_step(inputs["labels"], self._denominators(inputs, target_counts))

    def _losses(self, outputs, terms, weights, inputs, target_counts):
        labels, settings = inputs["labels"], self.loss_settings
        denominators = self._denominators(inputs, target_counts)
        losses = {self.main: outputs.loss}
        with torch.set_grad_enabled(torch.is_grad_enabled() and weights["last_position"] > 0):
            targets = shifted_targets(labels, 1)
            last = last_target_positions(targets)
            logits = self._logits(outputs.hidden_states[-1].take_along_dim(last[..., None], dim=1))
            total = cross_entropy_sum(logits, targets.take_along_dim(last, dim=1))
            losses["last_position"] = total / denominators[1, 0]
        for term in terms:
            losses |= causal_lm_losses(
                outputs.hidden_states[term.layer],
                functools.partial(self._classify, term),
                [term],  # one at a time: with a large vocabulary, several at once would run on smaller pieces
                labels,
                denominators,
                self._vocab_size,
                last_position_only=settings.position_loss == "last",
            )
        return losses


class _SequenceClassifier(_WithAuxiliaryLosses):
    accepted_settings = [
        "intermediate_layers",
        "intermediate_weight",
        "intermediate_schedule",
        "loss_weights",
        "loss_weighting",
    ]
    accepted_classifiers = ("own",)
    main = "classification"
    accepts_loss_kwargs = False  # Transformers' classifiers take means over their batch, whatever the whole step holds

    @staticmethod
    def settings_for(num_layers: int, **settings: Any) -> AuxiliaryLossSettings:
        renamed = {name.removeprefix("intermediate_"): value for name, value in settings.items()}
        return classifier_settings(num_layers, **renamed)

    def _make_head(self, term: LossTerm, index: int, classifiers: str) -> nn.Module:
        return self._own_head(int(self.config.num_labels or 0), index)

    def _losses(self, outputs, terms, weights, inputs, target_counts):
        labels = inputs["labels"]
        problem_type = sequence_problem_type(self.config.problem_type, int(self.config.num_labels or 0), labels)
        losses = {self.main: outputs.loss}
        for term in terms:
            pooled = self._pooled(self._normed(outputs, term.layer), inputs)
            losses[term.name] = classification_loss(self.auxiliary_heads[term.name](pooled), labels, problem_type)
        return losses

    def _pooled(self, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The first state of a model that reads in both directions, the last of text in one that reads forward."""
        if not hasattr(self, "score"):
            return hidden_states[:, 0]
        mask = inputs.get("attention_mask")
        pad = self.config.get_text_config().pad_token_id
        if mask is None and pad is not None and inputs.get("input_ids") is not None:
            mask = inputs["input_ids"] != pad
        if mask is None:
            return hidden_states[:, -1]
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        last = (positions * mask.to(positions.dtype)).argmax(dim=-1)
        return hidden_states[torch.arange(len(last), device=last.device), last]


@functools.cache
def _class_with_losses(kind: type, mixin: type) -> type:
    """A class of the same name as `kind`, which configurations, Trainer and loss functions go by."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    forward.__doc__ = kind.forward.__doc__  # type: ignore[attr-defined]
    signature = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    parameters = list(signature.parameters.values())
    end = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_ARGUMENTS]
    if mixin is _SequenceClassifier:
        own = own[:2]
    forward.__signature__ = signature.replace(parameters=[*parameters[:end], *own, *parameters[end:]])  # type: ignore[attr-defined]
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "forward": forward})


@functools.cache
def _output_class(kind: type[ModelOutput]) -> type[ModelOutput]:
    @dataclass
    class OutputWithBreakdown(kind):  # type: ignore[misc,valid-type]
        loss_dict: dict[str, Tensor] | None = None
        loss_weights: dict[str, Any] | None = None

    return OutputWithBreakdown


def _checked(model: nn.Module) -> PreTrainedModel:
    """The model, if it is one that `add_auxiliary_losses` takes."""
    name = type(model).__name__
    if hasattr(model, "loss_settings"):
        raise ValueError(f"this {name} has auxiliary losses already")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"add_auxiliary_losses takes a model of Transformers (a PreTrainedModel), not {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder; add_auxiliary_losses takes causal language models and classifiers of sequences"
        )
    if is_causal_lm(type(model)):
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{name} has no output embeddings, which predict the next token")
        rows, vocab_size = cast(Tensor, head.weight).shape[0], model.config.get_text_config().vocab_size
        if rows != vocab_size:
            raise ValueError(
                f"the output embeddings of {name} have {rows} rows, its vocab_size is {vocab_size}; they must be equal"
            )
    elif not name.endswith("ForSequenceClassification"):
        raise ValueError(
            f"add_auxiliary_losses takes causal language models (...ForCausalLM) and classifiers of sequences"
            f" (...ForSequenceClassification), not {name}"
        )
    return model


def _final_norm(model: PreTrainedModel) -> tuple[str | None, type[ModelOutput]]:
    """The name of the norm after the last layer, and the class of the model's output with a breakdown of its loss.

    The norm is found by what it does: its output is the model's last hidden state.
    """
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not any(part.isdigit() for part in name.split("."))
    ]
    try:
        with evaluating(model):
            ids = torch.tensor([[1, 2]], device=model.device)
            outputs = model(input_ids=ids, output_hidden_states=True, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    states = getattr(outputs, "hidden_states", None)
    expected = model.config.get_text_config().num_hidden_layers + 1
    if states is None or len(states) != expected:
        raise ValueError(
            f"{type(model).__name__} returns {'no' if states is None else len(states)} hidden states; it must return"
            f" {expected}, its input's and each layer's"
        )
    last = states[-1]
    matches = [name for name, out in seen.items() if out.numel() == last.numel() and out.view_as(last).equal(last)]
    return matches[-1] if matches else None, _output_class(cast(Any, type(outputs)))
