"""Small models of Transformers for the tests of `add_auxiliary_losses`."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ["gpt2", "llama", "qwen3", "gpt_neox", "gemma", "gemma2"]
# Newer Transformers call it activation checkpointing; the oldest supported does not know that name.
DEPRECATED = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def build(kind: str, auto: Any = AutoModelForCausalLM, **changes) -> Any:
    set_seed(0)
    sizes: dict[str, Any] = dict(SIZES)
    if kind == "gpt2":
        sizes |= {"n_inner": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        del sizes["intermediate_size"], sizes["num_key_value_heads"], sizes["head_dim"]
    if kind == "bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.for_model(kind, **(sizes | {"initializer_range": 0.1} | changes))
    return auto.from_config(config, attn_implementation="eager").train()


def make_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def norm_of(model) -> torch.nn.Module:
    base = model.base_model
    return next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
