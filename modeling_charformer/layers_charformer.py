"""The layers of a Charformer: attention, feed-forward, learned positions.

Shapes: B batch, S sequence (of queries), H heads, D head size.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention for `attn_implementation="eager"`, the only one that returns the attention weights `(B, H, S, S_key)`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def to_autocast_dtype(hidden_states: Tensor) -> Tensor:
    """`hidden_states` in autocast's dtype, if autocast is on.

    Cast here, several linear layers share one copy. Otherwise each would make a copy and keep it for the backward pass.
    """
    device_type = hidden_states.device.type
    # The meta device has no autocast, and float64 is not cast.
    if (
        hidden_states.dtype == torch.float32
        and torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    ):
        return hidden_states.to(torch.get_autocast_dtype(device_type))
    return hidden_states


def _last(hidden_states: Tensor, positions: int) -> Tensor:
    """The last `positions` of `(B, S, hidden_size)`; 0 means all, without a slice."""
    return hidden_states[:, -positions:] if positions else hidden_states


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
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention's output `(B, S, hidden_size)` and, if `eager`, its weights.

        `positions_to_keep` is the number of last positions to compute the output of; 0 means all.
        """
        hidden_states = to_autocast_dtype(hidden_states)
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries = _last(hidden_states, positions_to_keep)
        query = self.q_proj(queries).view(*queries.shape[:-1], -1, self.head_dim).transpose(1, 2)  # (B, H, S, D)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if isinstance(cache, Cache) or (cache is not None and CACHE == "cache"):
            # A paged cache reads the sequence lengths from attention's arguments, and writes to them.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        elif cache is not None:
            kwargs["cache"] = cache  # a paged cache, which the attention function updates

        attention_interface: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
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
        return self.o_proj(output.reshape(*queries.shape[:-1], -1)), weights


class CharformerMLP(nn.Module):
    """The feed-forward part of a layer."""

    def __init__(self, config: CharformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.activation(self.fc1(hidden_states))
        if self.dropout.training:  # a call that does nothing takes its time in generation
            hidden_states = self.dropout(hidden_states)
        output: Tensor = self.fc2(hidden_states)
        return output


def rows_to_run(
    config: CharformerConfig, hidden_states: Tensor, progress: float | None, training: bool
) -> Sequence[Tensor | None]:
    """Draw which rows of `hidden_states` `(B, S, hidden_size)` each layer runs on, `(B, 1, 1)`, true where it runs.

    `None` for a layer means all rows. Without layer dropout, and in evaluation, nothing is drawn.

    Layer dropout of LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710, section 4.1.1). Layer `l` of `L`, counted from 0, is
    dropped for a row with the probability `S * D(l) * config.layer_dropout`. `D(l) = exp(l ln 2 / (L - 1)) - 1` rises from 0
    to 1. `S` is 1 with the schedule `"constant"`, and `exp(p ln 2) - 1` with `"exponential"`, where `p` is `progress`, the
    share of training done; `None` means 0.

    Raises:
        ValueError: If `progress` is outside 0..1.
    """
    if not (training and config.layer_dropout):
        return [None] * config.num_hidden_layers
    progress = 0.0 if progress is None else progress
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"training_progress is {progress}; it is the share of training done, from 0 to 1")
    scale = 2.0**progress - 1 if config.layer_dropout_schedule == "exponential" else 1.0
    layers, device = config.num_hidden_layers, hidden_states.device
    rates = scale * config.layer_dropout * ((torch.arange(layers, device=device) / (layers - 1)).exp2() - 1)
    # Drawn at once, outside the layers: a checkpointed layer that runs again in the backward pass must see the same draw.
    return (torch.rand(layers, len(hidden_states), 1, 1, device=device) >= rates[:, None, None, None]).unbind()


class CharformerLayer(GradientCheckpointingLayer):
    """One layer. A learned position table, one for each layer, is added to its input (paper, section 2)."""

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
        runs: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's output `(B, S, hidden_size)`.

        Args:
            positions_to_keep: Number of last positions to compute; 0 means all.
            input_is_kept: Whether an auxiliary head already stores this layer's input for the backward pass. The sum with
                the position embeddings and its norm are then recomputed from it rather than stored as well.
            runs: `(B, 1, 1)`, false for the rows whose output is this layer's input, unchanged. The layer is computed for them
                all the same: shapes that depend on a draw would break a compiled graph, and a parameter that no row uses on
                one process would stop DistributedDataParallel.
        """
        layer_input = hidden_states
        if input_is_kept and self.norm_first and not (self.gradient_checkpointing and self.training):
            hidden_states, attended = checkpoint(
                self._with_positions, hidden_states, position_ids, use_reentrant=False, preserve_rng_state=False
            )
        else:
            hidden_states, attended = self._with_positions(hidden_states, position_ids)
        attended = self.self_attn(attended, positions_to_keep=positions_to_keep, **kwargs)[0]
        hidden_states = _last(hidden_states, positions_to_keep) + attended
        if self.norm_first:
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        else:
            hidden_states = self.attention_norm(hidden_states)
            hidden_states = self.mlp_norm(hidden_states + self.mlp(hidden_states))
        if runs is not None:
            hidden_states = torch.where(runs, hidden_states, _last(layer_input, positions_to_keep))
        return hidden_states

    def _with_positions(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The input plus the position embeddings, and the input of attention, which in a pre-norm layer is the norm of it."""
        hidden_states = hidden_states + self.position_embeddings(position_ids)
        return hidden_states, self.attention_norm(hidden_states) if self.norm_first else hidden_states
