"""The layers of a Charformer: attention, feed-forward, learned positions.

Shapes: B batch, S sequence (of queries), H heads, D head size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compatibility import CACHE
from .configuration_charformer import CharformerConfig


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for `attn_implementation="eager"`: it alone returns the weights, `(B, H, S, S_key)`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def to_autocast_dtype(hidden_states: Tensor) -> Tensor:
    """What several linear layers read, in the type of autocast, where it is on.

    Each would cast it by itself otherwise, and keep a copy of its own for the backward pass.
    """
    kind = hidden_states.device.type
    # The meta device has no autocast, and float64 is not cast.
    if (
        hidden_states.dtype == torch.float32
        and torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
    ):
        return hidden_states.to(torch.get_autocast_dtype(kind))
    return hidden_states


class CharformerAttention(nn.Module):
    """Causal multi-head self-attention, computed by Transformers' attention interface."""

    def __init__(self, config: CharformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        positions_to_keep: int = 0,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """`positions_to_keep`: compute the output of so many last positions only; 0 is all."""
        hidden_states = to_autocast_dtype(hidden_states)
        by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        asking = hidden_states[:, -positions_to_keep:]
        query = self.q_proj(asking).view(*asking.shape[:-1], -1, self.head_dim).transpose(1, 2)  # (B, H, S, D)
        key = self.k_proj(hidden_states).view(by_head).transpose(1, 2)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        if isinstance(cache, Cache) or (cache is not None and CACHE == "cache"):
            # A paged cache reads, and writes, what attention is told of the lengths.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        elif cache is not None:
            kwargs["cache"] = cache  # a paged one, which attention itself updates

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*asking.shape[:-1], -1)), weights


class CharformerMLP(nn.Module):
    def __init__(self, config: CharformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.activation(self.fc1(hidden_states))))


class CharformerLayer(GradientCheckpointingLayer):
    """One layer, with a learned position table of its own that is added to its input (paper, section 2)."""

    def __init__(self, config: CharformerConfig, layer_idx: int):
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.self_attn = CharformerAttention(config, layer_idx)
        self.mlp = CharformerMLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        positions_to_keep: int = 0,
        input_is_kept: bool = False,
        **kwargs,
    ) -> Tensor:
        """`input_is_kept`: a classifier keeps this layer's input for the backward pass; the sum with the positions and its norm
        are computed from it again there, instead of being kept too.
        """
        if input_is_kept and self.norm_first and not (self.gradient_checkpointing and self.training):
            hidden_states, attended = checkpoint(
                self._with_positions, hidden_states, position_ids, use_reentrant=False, preserve_rng_state=False
            )
        else:
            hidden_states, attended = self._with_positions(hidden_states, position_ids)
        attended = self.self_attn(attended, positions_to_keep=positions_to_keep, **kwargs)[0]
        hidden_states = hidden_states[:, -positions_to_keep:] + attended
        if self.norm_first:
            return hidden_states + self.mlp(self.mlp_norm(hidden_states))
        hidden_states = self.attention_norm(hidden_states)
        return self.mlp_norm(hidden_states + self.mlp(hidden_states))

    def _with_positions(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and what attention reads of it."""
        hidden_states = hidden_states + self.position_embeddings(position_ids)
        return hidden_states, self.attention_norm(hidden_states) if self.norm_first else hidden_states
