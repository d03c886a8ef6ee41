"""Heads of further targets in the layouts of engines that draft with them."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import whole_files
from .models import unwrap_peft


@dataclass(frozen=True)
class MedusaHeads:
    """Heads that read the final hidden state `h` each by itself: a block `h + SiLU(W h + b)`, then a vocabulary matrix."""

    blocks: list[tuple[Tensor, Tensor]]
    """`W` and `b` of each head, from target 2 on; zeros where a head has no block."""
    matrices: list[Tensor]
    """`(V, d)` of each head; a single one if all heads share the model's."""
    shared: bool
    biases: list[Tensor]
    """Of the vocabulary matrices."""
    vocabulary: Tensor | None = None
    """Ids `(n,)`, the only ones that the heads draft."""


def frequent_tokens(texts: Iterable[Any], count: int) -> list[int]:
    """The ids of a text's most frequent tokens, ascending, for `draft_vocabulary` of `add_auxiliary_losses`.

    Args:
        texts: Sequences of ids, or mappings with `input_ids`, like the rows of a dataset.
        count: The highest number of ids. There are fewer if the text has fewer different tokens.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more")
    found: Counter[int] = Counter()
    for one in texts:
        ids = one["input_ids"] if isinstance(one, Mapping) else one
        found.update(torch.as_tensor(ids).flatten().tolist())
    return sorted(token for token, _ in found.most_common(count))


def export_draft_heads(
    model: nn.Module, folder: str | os.PathLike[str], format: str = "medusa", base_model: str | None = None
) -> None:
    """Write the heads of targets 2..K into `folder`, for an engine that serves the model and drafts with them.

    Args:
        model: A Charformer or a causal language model with auxiliary losses, like `load_auxiliary_losses` returns.
        folder: Gets `config.json`, the weights and a model card; other files there stay.
        format: `"medusa"`, which vLLM reads, or `"medusa-v2"`, which Text Generation Inference reads.
        base_model: The model's folder or its id on the Hub, for the card.

    Raises:
        ValueError: If the model has no such heads, or the layout cannot hold them; nothing is written then.
    """
    base: Any = unwrap_peft(model)
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {[*FORMATS]}")
    layout = FORMATS[format]
    if layout is None:
        raise ValueError(
            "format 'mtp': each module of Transformers' multi-token prediction is a decoder layer that reads the next token's"
            " embedding and has a cache of its own; these heads are one block on the hidden state. Choose 'medusa'"
        )
    heads = medusa_heads(base)
    if format == "medusa-v2" and not heads.shared:
        raise ValueError(
            "format 'medusa-v2' has no vocabulary matrix of its own: its heads share the model's, and those of this model are"
            " linear or their own. Choose 'medusa', or train with heads='shared'"
        )
    if format == "medusa" and heads.vocabulary is not None and not heads.shared:
        raise ValueError(
            "format 'medusa' holds a draft vocabulary only where all heads share one vocabulary matrix, and these have their own."
            " Train with heads='shared', or without draft_vocabulary"
        )
    if format == "medusa-v2" and heads.vocabulary is not None:
        warnings.warn(
            f"the layout has no draft vocabulary: heads trained to draft {len(heads.vocabulary)} tokens will draft any. The text does"
            " not change",
            stacklevel=2,
        )
    _warn_of_biases(heads)
    name = base_model or getattr(base.config, "_name_or_path", "") or None
    config, file, weights = layout(heads, name)
    with whole_files(folder) as scratch:
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # A copy each: safetensors does not save tensors that share their memory.
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}, scratch / file)
        _card(format, heads, name).save(scratch / "README.md")


def medusa_heads(model: Any) -> MedusaHeads:
    """The heads of targets 2..K of a model.

    Raises:
        ValueError: If there are none, or they are no Medusa heads.
    """
    settings = getattr(model, "loss_settings", None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if settings is None or output is None or settings.num_targets < 2:
        raise ValueError(
            f"{type(model).__name__} has no heads of further targets: it needs num_targets of 2 or more, and"
            " load_auxiliary_losses where its heads lie beside it"
        )
    if hasattr(output, "base_layer"):
        raise ValueError("the output embeddings have an adapter; merge it first, by model.merge_and_unload()")
    blocks, classifiers = [], []
    own_blocks = getattr(model, "target_blocks", {})
    size, width = output.weight.shape
    vocabulary = getattr(model, "draft_vocabulary", None)
    for target in range(2, settings.num_targets + 1):
        name = f"target_{target}"
        head = model.auxiliary_heads[name]
        is_linear = isinstance(head, nn.Linear)
        block = (own_blocks[name] if name in own_blocks else None) if is_linear else head
        classifiers.append(head if is_linear else output)
        expected = (size if vocabulary is None or not is_linear else len(vocabulary), width)
        if classifiers[-1].weight.shape != expected:
            raise ValueError(
                f"the head {name} has the shape {tuple(classifiers[-1].weight.shape)}, the model's output embeddings {(size, width)}"
            )
        if block is None:
            blocks.append((output.weight.new_zeros(width, width), output.weight.new_zeros(width)))
        elif block.linear.weight.shape != (width, width):
            raise ValueError(
                f"the head {name} also reads the tokens drafted before it (sequential heads); the heads of this layout read the"
                " hidden state alone. Train with target_heads 'residual' or 'linear'; with add_auxiliary_losses, heads='shared'"
            )
        else:
            blocks.append((block.linear.weight, block.linear.bias))
    shared = all(one is output for one in classifiers)
    used = [output] if shared else classifiers
    biases = [one.bias for one in used if getattr(one, "bias", None) is not None]
    return MedusaHeads(blocks, [one.weight for one in used], shared, biases, vocabulary)


def _warn_of_biases(heads: MedusaHeads) -> None:
    # Adding the same number to all logits changes nothing.
    largest = max((float((bias.detach() - bias.detach().mean()).abs().max()) for bias in heads.biases), default=0.0)
    if largest > 1e-3:
        warnings.warn(
            f"the layout has no bias on a vocabulary matrix; biases of up to {largest:.2g} are left out. The text does not change,"
            " fewer drafts may be right",
            stacklevel=3,
        )


Layout = Callable[[MedusaHeads, str | None], tuple[dict[str, Any], str, dict[str, Tensor]]]


def _medusa(heads: MedusaHeads, base_model: str | None) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    size, width = heads.matrices[0].shape
    vocabulary = heads.vocabulary
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": width,
        "vocab_size": size,
        "truncated_vocab_size": size if vocabulary is None else len(vocabulary),
        "num_heads": len(heads.blocks),
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": heads.shared,
    }
    matrices = heads.matrices if vocabulary is None else [matrix[vocabulary] for matrix in heads.matrices]
    weights = {f"lm_heads.{number}.weight": matrix for number, matrix in enumerate(matrices)}
    if vocabulary is not None:
        weights["token_map"] = vocabulary
    for number, (weight, bias) in enumerate(heads.blocks):
        weights |= {f"blocks.{number}.layers.0.weight": weight, f"blocks.{number}.layers.0.bias": bias}
    return config, "model.safetensors", weights


def _medusa_v2(heads: MedusaHeads, base_model: str | None) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    config = {
        "medusa_num_heads": len(heads.blocks),
        "medusa_num_layers": 1,
        "base_model_name_or_path": base_model,
        "version": "2",
    }
    weights: dict[str, Tensor] = {}
    for number, (weight, bias) in enumerate(heads.blocks):
        weights |= {f"{number}.0.linear.weight": weight, f"{number}.0.linear.bias": bias}
    return config, "medusa_lm_head.safetensors", weights


FORMATS: dict[str, Layout | None] = {"medusa": _medusa, "medusa-v2": _medusa_v2, "mtp": None}


def _card(format: str, heads: MedusaHeads, base_model: str | None) -> ModelCard:
    count = len(heads.blocks)
    on_hub = base_model if base_model and not Path(base_model).exists() else None
    data = ModelCardData(tags=["medusa", "speculative-decoding"], base_model=on_hub, pipeline_tag="text-generation")
    model = base_model or "MODEL"
    if format == "medusa":
        settings = json.dumps({"method": "medusa", "model": "THIS_FOLDER", "num_speculative_tokens": count})
        use = f"vllm serve {model} --speculative-config '{settings}'"
        if heads.vocabulary is not None:
            # vLLM 0.32 sets `token_map` from the file, and then misses it among the weights that it has loaded.
            use += """ --model-loader-extra-config '{"enable_weights_track": false}'"""
    else:
        use = f"text-generation-launcher --model-id THIS_FOLDER   # base model: {model}"
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# Draft heads for {model}\n\n{count} Medusa heads (Cai et al. 2024, arXiv 2401.10774):"
        f" head k drafts the token k + 1 steps ahead, and the model verifies. {_drafted(heads)}Greedy text is the model's own.\n\n"
        f"```sh\n{use}\n```\n\nExported with `charformer_training.export_draft_heads`.\n"
    )


def _drafted(heads: MedusaHeads) -> str:
    return "" if heads.vocabulary is None else f"They draft {len(heads.vocabulary):,} of the model's tokens. "
