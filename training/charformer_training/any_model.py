"""The auxiliary losses for any language model and any classification model of Transformers."""

import difflib
import inspect
import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from modeling_charformer.loss_settings import AuxiliaryLossSettings

from .added_losses import ModelWithLosses, class_with_losses
from .causal_lm import CausalLMWithLosses
from .checks import shown
from .classifiers import ImageClassifierWithLosses, SequenceClassifierWithLosses, TokenClassifierWithLosses
from .heads_file import cached_heads, keep_heads_beside_adapter, saved_settings, vocabulary_of_heads
from .language_models import MaskedLMWithLosses, Seq2SeqLMWithLosses
from .models import is_causal_lm, unwrap_peft
from .probe import Trace, trace_of
from .probe_layers import Anatomy, anatomy_of
from .probe_loss import own_loss_of


# Names of the settings in earlier versions, and in configurations that these saved.
FORMER_NAMES = {"classifiers": "heads", "loss_weights": "term_weights"}

KINDS = "causal and masked language models, encoder-decoders that predict text, and classification models of sequences, tokens and images"

Model = TypeVar("Model", bound=nn.Module)


def add_auxiliary_losses(
    model: Model,
    heads: str | None = None,
    heads_only: bool = False,
    draft_vocabulary: Sequence[int] | Tensor | None = None,
    **settings: Any,
) -> Model:
    """Add auxiliary losses to `model`: a language model (causal, masked, encoder-decoder) or a classification model.

    Classification models of sequences, tokens and images are accepted. The model is changed and returned. In training,
    `forward` also takes `training_progress`, `training_step` and `training_seed`, which `AuxiliaryLossTrainer` passes. Its
    output then has `loss_dict` and `loss_weights`, like that of a Charformer. Without labels the model computes what it
    did before. In evaluation its loss is the plain model's; with `training_progress`, `loss_dict` also holds the active
    auxiliary terms. `save_pretrained` writes the plain model, or the adapters of a PEFT model, with the
    auxiliary heads in the subfolder `auxiliary_heads/`; `load_auxiliary_losses` loads these.

    Every head reads the output of its layer after the model's final norm, and after any further module that the model
    applies to the output of its last layer. These modules are found by running the model on six tokens, an image or a sound. A
    head of an image classifier pools as the model's own head does. If the layers differ in width, or the model's norm comes
    after its pooling, each head has a layer norm of its own. The layers of an encoder-decoder are the decoder's.

    Args:
        model: The model, or a PEFT model around it.
        heads: `"shared"`, `"own"` or `"sequential"`. `"shared"`, the default for language models, uses the model's
            output embeddings on intermediate layers (like LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710). Further
            targets have a residual block before them, which begins as the identity (like Medusa, Cai et al. 2024, arXiv
            2401.10774). `"own"` gives each term a separate linear head, like Al-Rfou et al. (2018). `"sequential"` is
            `"shared"` with blocks in a chain, which also read the tokens between their position and their target (like
            Hydra, Ankner et al. 2024, arXiv 2402.05109). Only causal language models accept it. Classification models
            accept `"own"` only.
        heads_only: Train the heads alone, on a frozen model that may be quantized (like Medusa-1, Cai et al. 2024, section
            2.2.1). No other weight is trained, the model runs without a backward pass and without dropout, and its own
            loss is only reported. Each term needs weights of its own: with shared heads, further targets alone have any.
        draft_vocabulary: Ids of the only tokens that the heads of further targets predict, like those of
            `frequent_tokens`. With a large vocabulary, drafts then cost less. Other tokens are never their targets.
            Only causal language models accept it.
        settings: The fields of `LossFields`, with the defaults that they have there. A masked language model does not accept
            `position_loss` and those of targets. A classification model accepts `intermediate_layers` (default
            `"thirds"`), `intermediate_weight` (0.3), `intermediate_schedule` (`"constant"`), `term_weights` and
            `loss_weighting`. The main term is called `next_token`, `masked_token` or `classification`.

    Raises:
        ValueError: If the model or a setting is not accepted; the model is then unchanged.
    """
    base = _checked(unwrap_peft(model))
    trace = trace_of(base)
    mixin = _kind_of(base, trace)
    settings = {FORMER_NAMES.get(name, name): value for name, value in settings.items()}
    heads = settings.pop("heads", heads) or mixin.accepted_heads[0]
    accepted = mixin.accepted_settings
    if wrong := sorted(settings.keys() - accepted):
        close = [near for name in wrong for near in difflib.get_close_matches(name, accepted, n=1, cutoff=0.7)]
        meant = f" (meant {', '.join(close)}?)" if close else ""
        raise ValueError(
            f"add_auxiliary_losses has no settings {wrong} for {type(base).__name__}{meant}; it has {accepted}"
        )
    if heads not in mixin.accepted_heads:
        raise ValueError(f"heads is {heads!r}; for {type(base).__name__} it must be one of {mixin.accepted_heads}")
    anatomy = anatomy_of(base, trace)
    losses = mixin.settings_for(anatomy.num_layers, **settings)
    losses.weights_at(0.0)  # a schedule that returns an impossible value raises here, not after hours of training
    losses.weights_at(1.0)
    checked = mixin.check(base, anatomy, trace, heads)
    vocabulary = None if draft_vocabulary is None else _checked_vocabulary(base, mixin, losses, draft_vocabulary)
    _check_layers(base, anatomy, losses.layers, "num_targets" in accepted)
    if heads_only:
        _check_heads_alone(losses, heads)
    base.__class__ = class_with_losses(cast(Any, type(base)), cast(Any, mixin), anatomy.output_kind)
    cast(ModelWithLosses, base).add_heads(losses, anatomy, heads, checked, heads_only, vocabulary)
    keep_heads_beside_adapter(model)
    more = {"heads_only": heads_only or None, "draft_vocabulary": None if vocabulary is None else len(vocabulary)}
    given = {name: value for name, value in more.items() if value is not None}
    base.config.auxiliary_losses = {"heads": heads, **given, **settings}
    return model


def load_auxiliary_losses(model: Model, name_or_path: str | os.PathLike[str]) -> Model:
    """Add to a loaded plain model the auxiliary losses and heads that were saved with it; the model is changed.

    Args:
        model: The model that `from_pretrained(name_or_path)` returned, with or without an adapter of PEFT.
        name_or_path: A folder, or the id of a repository on the Hub.

    Raises:
        ValueError: If the model was saved without auxiliary losses.
        OSError: If there is no file of heads.
    """
    base = unwrap_peft(model)
    settings = getattr(getattr(base, "config", None), "auxiliary_losses", None)
    file = cached_heads(str(name_or_path)) if settings or model is not base else None
    if file is not None and not settings:
        settings = saved_settings(file)
    if file is None or not settings:
        raise ValueError(f"{name_or_path} was saved without auxiliary losses; add_auxiliary_losses gives it new ones")
    if settings.get("draft_vocabulary"):  # the configuration has their number, the file of the heads which they are
        settings = settings | {"draft_vocabulary": vocabulary_of_heads(file)}
    add_auxiliary_losses(model, **settings)
    cast(ModelWithLosses, base).load_heads_file(file)
    return model


def _checked_vocabulary(
    model: PreTrainedModel, mixin: type[ModelWithLosses], losses: AuxiliaryLossSettings, vocabulary: Any
) -> Tensor:
    """The ids of a draft vocabulary, in ascending order."""
    if mixin is not CausalLMWithLosses or losses.num_targets < 2:
        raise ValueError(
            f"draft_vocabulary is what heads of further targets predict; this {type(model).__name__} has"
            f" num_targets={losses.num_targets}. Leave it out, or give a causal language model num_targets of 2 or more"
        )
    size = cast(Tensor, model.get_output_embeddings().weight).shape[0]
    try:
        ids = torch.as_tensor(vocabulary)
        is_right = ids.dim() == 1 and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    except (TypeError, ValueError, RuntimeError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"draft_vocabulary is {shown('draft_vocabulary', vocabulary)}; it must be a list of ids of tokens"
        )
    kept: Tensor = ids.unique().long()
    if not 1 < len(kept) < size or len(kept) != len(ids) or kept[0] < 0 or kept[-1] >= size:
        raise ValueError(
            f"draft_vocabulary has {len(ids)} ids, {len(kept)} different ones, from {min(ids.tolist(), default=None)} to"
            f" {max(ids.tolist(), default=None)}; it must have at least 2, fewer than the {size} tokens of the model, each once,"
            f" in 0..{size - 1}"
        )
    return kept


def _check_layers(model: PreTrainedModel, anatomy: Anatomy, layers: tuple[int, ...], has_other_terms: bool) -> None:
    """Check that the outputs of `layers` are among the hidden states, and that the model's tail can be applied to them."""
    choose = "; choose intermediate_layers=None" if has_other_terms else ""
    missing = [layer for layer in layers if layer not in anatomy.layers]
    if missing:
        raise ValueError(
            f"the hidden states that {type(model).__name__} returns do not contain the outputs of its layers {missing}, so"
            f" these layers cannot have losses{choose}"
        )
    if anatomy.tail is None and anatomy.readout is None and (layers or anatomy.ends_with_layer):
        raise ValueError(
            f"{type(model).__name__} does not compute its last hidden state from its last layer's output alone, so heads on"
            f" {'its' if anatomy.ends_with_layer else 'other'} layers cannot do the same{'' if anatomy.ends_with_layer else choose}"
        )


def _check_heads_alone(losses: AuxiliaryLossSettings, heads: str) -> None:
    """Check that each auxiliary term trains weights of its own."""
    terms = [term for term in losses.terms if not term.is_main]
    if not terms:
        raise ValueError(
            "heads_only is true, and these settings give no heads to train; set num_targets or intermediate_layers"
        )
    shared = [term.name for term in terms if heads != "own" and term.offset == 1]
    if shared:
        raise ValueError(
            f"heads_only is true, and with heads={heads!r} the terms {shared} have no weights of their own to train; choose"
            " heads='own', or intermediate_layers=None"
        )


def _checked(model: nn.Module) -> PreTrainedModel:
    """The model, if `add_auxiliary_losses` accepts it."""
    name = type(model).__name__
    if hasattr(model, "loss_settings"):
        raise ValueError(f"this {name} has auxiliary losses already")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"add_auxiliary_losses takes a model of Transformers (a PreTrainedModel), not {name}")
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"add_auxiliary_losses takes {KINDS}, not {name}, which takes no labels")
    return model


def _kind_of(model: PreTrainedModel, trace: Trace) -> type[ModelWithLosses]:
    """The class of losses for a model, by what it takes and returns."""
    name, logits, head = type(model).__name__, trace.logits, model.get_output_embeddings()
    num_labels = int(getattr(model.config, "num_labels", None) or 0)
    if logits.shape == (1, num_labels):
        return ImageClassifierWithLosses if trace.ids_name is None else SequenceClassifierWithLosses
    if trace.ids_name is None or logits.dim() != 3 or logits.shape[:2] != trace.inputs[trace.ids_name].shape:
        raise ValueError(
            f"add_auxiliary_losses takes {KINDS}; the logits of {name} have the shape {tuple(logits.shape)} on"
            f" {trace.described()}, which is that of none of these"
        )
    if head is None and logits.shape[-1] == num_labels:
        return TokenClassifierWithLosses
    if head is None:
        raise ValueError(f"{name} has no output embeddings, so nothing predicts a token")
    rows, vocab_size = cast(Tensor, head.weight).shape[0], logits.shape[-1]
    named = getattr(model.config.get_text_config(), "vocab_size", rows)
    if rows != vocab_size or (rows != named and trace.ids_name != "decoder_input_ids"):
        raise ValueError(
            f"the output embeddings of {name} have {rows} rows, its vocab_size is {named}; they must be equal"
        )
    if trace.ids_name == "decoder_input_ids":
        return Seq2SeqLMWithLosses
    is_masked = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or not is_causal_lm(type(model))
    return MaskedLMWithLosses if is_masked and own_loss_of(model, trace).layout != "shifted" else CausalLMWithLosses
