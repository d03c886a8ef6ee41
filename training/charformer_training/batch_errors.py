"""Why a model cannot take a batch: rows longer than its table of positions, ids outside its vocabulary.

Looked for only when a model has failed, so that it costs no step anything.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from modeling_charformer.auxiliary_losses import IGNORE_INDEX
from modeling_charformer.compatibility import check_mask

from .models import unwrap_peft


_OF_POSITIONS = re.compile(r"(^|[._])(wpe|pos|pos_emb\w*|position\w*|embed_pos\w*)$")


def reason_in_batch(error: Exception, model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """What in `inputs` made `model` fail with `error`, in a sentence; `None` if it is nothing of these.

    On a GPU, where nothing can be read any more after an error of indices, only lengths are compared.
    """
    if "out of memory" in str(error):
        return None
    base = unwrap_peft(model)
    return _too_long(base, inputs) or _outside(base, inputs)


def check_batch(batch: Any) -> None:
    """Refuse a mask that numbers the texts of a packed row.

    Raises:
        ValueError: If the mask of `batch` holds more than 0 and 1.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        check_mask(mask.cpu())


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
    """The names of the tables in which a model looks up positions, and how many positions each has."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _OF_POSITIONS.search(name):
            # RoBERTa's positions begin after the padding's, OPT's after two that are not used.
            before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            found.append((name, module.num_embeddings - int(before)))
    for name, buffer in model.named_buffers():
        if buffer.dim() == 2 and name.endswith("embed_positions"):
            found.append((name, int(buffer.shape[0])))
    return found


def _outside(model: Any, inputs: Mapping[str, Any]) -> str | None:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    limits = {"input_ids": ("vocab_size", getattr(embeddings, "num_embeddings", None))}
    if head is None:
        limits["labels"] = ("num_labels", getattr(model.config, "num_labels", None))
    else:
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
