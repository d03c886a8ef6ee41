"""Why a model cannot take a batch: rows longer than its table of positions, ids outside its vocabulary.

Looked for only when a model has failed, so that it costs no step anything.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_charformer.auxiliary_losses import IGNORE_INDEX
from modeling_charformer.compatibility import check_mask

from .models import unwrap_peft


# What models fail with where a table is too short, on the CPU and on a GPU.
_OF_INDICES = re.compile(r"index|out of (bounds|range)|device-side assert|size of (the )?tensor")
_OF_POSITIONS = re.compile(r"(^|[._])(wpe|pos|pos_emb\w*|position\w*|embed_pos\w*)$")
# Whose labels are numbers below `num_labels`.
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")


def reason_in_batch(error: Exception, model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """What in `inputs` made `model` fail with `error`, in a sentence; `None` if it is nothing of these.

    On a GPU, where nothing can be read any more after an error of indices, only lengths are compared.
    """
    base = unwrap_peft(model)
    if not isinstance(base, PreTrainedModel) or not _OF_INDICES.search(str(error)):
        return None
    return _too_long(base, inputs) or _outside(base, inputs)


def check_batch(batch: Any) -> None:
    """Refuse a mask that numbers the texts of a packed row.

    Raises:
        ValueError: If the mask of `batch` holds more than 0 and 1.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    check_mask(mask.cpu() if isinstance(mask, Tensor) else None)


def _too_long(model: Any, inputs: Mapping[str, Any]) -> str | None:
    has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    lengths = {
        name: int(value.shape[1])
        for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels")
        if isinstance(value := inputs.get(name), Tensor) and value.dim() > 1
    }
    for name, limit in _tables_of_positions(model):
        of_decoder = has_encoder and "decoder" in name.split(".")
        read = ("decoder_input_ids", "labels") if of_decoder else ("input_ids", "inputs_embeds")
        field = next((field for field in read if lengths.get(field, 0) > limit), None)
        if field is None or f"{'decoder_' if of_decoder else ''}position_ids" in inputs:
            continue
        config = model.config.get_text_config()
        setting = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        value = getattr(config, setting, None)
        named = f" ({setting} is {value})" if value is not None else ""
        return (
            f"{field} has rows of {lengths[field]} tokens, and {type(model).__name__} has a table of {limit} positions{named}:"
            f" rows may have {limit} tokens at most. Cut them, as by tokenizer(..., truncation=True, max_length={limit})"
        )
    return None


def _tables_of_positions(model: nn.Module) -> list[tuple[str, int]]:
    """The names of the tables in which a model looks up positions of tokens, and how many positions each has."""
    found, embeddings = [], _embeddings_of(model)
    # Those of an image's parts lie in another module than the embeddings of the tokens.
    own = next((name for name, module in model.named_modules() if module is embeddings), "").rpartition(".")[0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _OF_POSITIONS.search(name):
            # RoBERTa's positions begin after the padding's, OPT's after two that are not used.
            before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            found.append((name, int(module.num_embeddings) - int(before)))
    for name, buffer in model.named_buffers():
        if buffer.dim() == 2 and name.endswith("embed_positions"):
            found.append((name, int(buffer.shape[0])))
    return [(name, length) for name, length in found if embeddings is not None and name.startswith(own)]


def _embeddings_of(model: Any) -> nn.Module | None:
    try:
        return cast(nn.Module | None, model.get_input_embeddings())
    except NotImplementedError:  # a model without ids
        return None


def _outside(model: Any, inputs: Mapping[str, Any]) -> str | None:
    head = model.get_output_embeddings()
    limits = {"input_ids": ("vocab_size", getattr(_embeddings_of(model), "num_embeddings", None))}
    if head is None and type(model).__name__.endswith(_CLASSIFIERS):
        limits["labels"] = ("num_labels", getattr(model.config, "num_labels", None))
    elif head is not None:
        limits["labels"] = ("vocab_size", getattr(getattr(head, "weight", None), "shape", [None])[0])
    for field, (setting, limit) in limits.items():
        ids = inputs.get(field)
        if limit is None or not isinstance(ids, Tensor) or ids.is_floating_point():
            continue
        try:
            read = ids.detach().cpu().flatten()
        except RuntimeError:  # the GPU's state is lost
            return None
        wrong = read[((read < 0) | (read >= limit)) & ((read != IGNORE_INDEX) | (field == "input_ids"))]
        if len(wrong):
            ignored = f", or {IGNORE_INDEX} for what is no target" if field == "labels" else ""
            return (
                f"{field} holds {int(wrong[0])}, and {type(model).__name__} has {setting}={limit}: ids are 0 to"
                f" {limit - 1}{ignored}"
            )
    return None
