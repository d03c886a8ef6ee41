"""Helpers for any model: its kind, its saved auxiliary heads, temporary evaluation mode."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_charformer.auxiliary_losses import Targets


# The weights of the auxiliary heads, in the folder of a saved plain model. They are in a subfolder because engines such
# as vLLM load every *.safetensors next to `config.json` into the model.
HEADS_FILE = "auxiliary_heads/model.safetensors"
# The path in earlier versions.
OLD_HEADS_FILE = "auxiliary_heads.safetensors"


def saved_heads(folder: str | os.PathLike[str]) -> Path | None:
    """The file of the auxiliary heads in a folder, at its present or former path; `None` if there is none."""
    paths = (Path(folder, name) for name in (HEADS_FILE, OLD_HEADS_FILE))
    return next((path for path in paths if path.is_file()), None)


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The model of Transformers inside a PEFT model, or a compiled one; any other model is returned unchanged."""
    model = getattr(model, "_orig_mod", model)  # of `torch.compile`
    base = getattr(model, "get_base_model", None)
    return unwrap_peft(base()) if callable(base) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of Transformers inside any wrappers: of DistributedDataParallel, `torch.compile`, PEFT."""
    # Accelerate would take a compiled model's wrappers off for good.
    inner = extract_model_from_parallel(unwrap_peft(model), keep_torch_compile=False)
    return unwrap_peft(inner)


def is_causal_lm(kind: type) -> bool:
    """Whether a class is a causal language model of Transformers, by its name."""
    return "ForCausalLM" in kind.__name__ or kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def loss_unit(model: nn.Module) -> str | None:
    """The unit over which a language model's loss is a mean, `"byte"` or `"token"`; `None` for other models."""
    base = unwrap_peft(model)
    if not is_causal_lm(type(base)):
        return None
    return "byte" if getattr(getattr(base, "config", None), "vocab_size", None) == 256 else "token"


def shifts_labels(model: nn.Module) -> bool | None:
    """Whether a position's target is the label after it, as in causal language models, and not the label at the position.

    `None` if this is not known.
    """
    base = unwrap_peft(model)
    known = getattr(base, "shifts_labels", None)
    return known if isinstance(known, bool) else is_causal_lm(type(base)) or None


def targets_of(
    model: Any, inputs: Mapping[str, Any], num_items: Tensor | int | None = None, counts: Tensor | None = None
) -> Targets:
    """The targets of a batch for a model with auxiliary losses."""
    base: Any = unwrap_peft(model)
    vocabulary = getattr(base, "draft_vocabulary", None)
    return Targets(label_inputs(base, inputs), base.loss_settings.num_targets, num_items, counts, vocabulary)


def label_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs of a model, for `Targets`: labels that the model does not shift count as shifted already."""
    if shifts_labels(model) is not False:
        return inputs
    return {"shift_labels": inputs.get("labels")}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; its former mode is restored at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def runs_reference(model: nn.Module) -> bool:
    """Whether a PEFT model runs without the adapter that is trained, like TRL's reference model."""
    # A layer with an adapter, `BaseTunerLayer`; models of Transformers have methods of like names.
    layers = (module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool))
    layer: Any = next(layers, None)
    return layer is not None and (layer.disable_adapters or "ref" in layer.active_adapters)


@contextlib.contextmanager
def with_own_class(model: Any) -> Iterator[None]:
    """Give a model that FSDP 2 has sharded its own class back while it is saved.

    `fully_shard` gives the model a derived class, and Transformers would save the code of that class.
    """
    kind = type(model)
    plain = next((base for base in kind.__mro__[1:] if not base.__module__.startswith("torch.distributed")), kind)
    model.__class__ = plain if kind.__module__.startswith("torch.distributed") else kind
    try:
        yield
    finally:
        model.__class__ = kind


@contextlib.contextmanager
def heads_as_adapters(model: Any) -> Iterator[None]:
    """Let a Trainer take a quantized model whose heads alone are trained.

    Transformers refuses to train a quantized model that has no adapters of PEFT. Heads on a frozen model are as good.
    """
    base = unwrap_peft(model) if isinstance(model, nn.Module) else None
    if not (getattr(base, "heads_only", False) and getattr(base, "is_quantized", False)):
        yield
        return
    held: Any = base
    before = held._hf_peft_config_loaded
    held._hf_peft_config_loaded = True
    try:
        yield
    finally:
        held._hf_peft_config_loaded = before
