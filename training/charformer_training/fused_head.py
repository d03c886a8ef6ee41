"""Auxiliary losses in TRL's Trainers, which compute their main loss past the model's own forward.

`trl.trainer.utils.add_fused_lm_head` replaces the forward of a language model. Called with `fused_lm_head=True`, it runs
the body and computes the log-probabilities of the labels alone, tile by tile, without all logits in memory. This module
computes the auxiliary losses from the same pass of the body, also without all logits in memory.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from modeling_charformer import CharformerForCausalLM
from modeling_charformer.auxiliary_losses import IGNORE_INDEX, LossStep, Targets, last_targets
from modeling_charformer.loss_settings import LossTerm

from .added_losses import OWN_ARGUMENTS, output_class
from .causal_lm import CausalLMWithLosses
from .models import targets_of, unwrap_peft


def _all_rows(inputs: Mapping[str, Any], labels: Tensor) -> Tensor | None:
    return None


def _chosen_rows(inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """The first half of the rows; the others hold the rejected answers."""
    rows = torch.arange(len(labels), device=labels.device)
    return rows < len(labels) // 2


def _desirable_rows(inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    return torch.as_tensor(inputs["label"], dtype=torch.bool, device=labels.device)


Rows = Callable[[Mapping[str, Any], Tensor], Tensor | None]
# The rows of a batch whose completions auxiliary heads learn, by TRL's Trainer: no head learns what the main head unlearns.
LEARNED_ROWS: Mapping[str, Rows] = {
    "SFTTrainer": _all_rows,
    "DPOTrainer": _chosen_rows,
    "KTOTrainer": _desirable_rows,
    "GRPOTrainer": _all_rows,
    "RLOOTrainer": _all_rows,
}


class FusedHead:
    """The forward of a model that TRL has given a fused head, with the model's auxiliary losses.

    Args:
        model: A Charformer or a model of `add_auxiliary_losses`.
        fused: TRL's forward.
    """

    def __init__(self, model: Any, fused: Callable[..., Any]):
        self.model, self.fused = model, fused
        self.rows: Callable[[Tensor], Tensor | None] | None = None
        """Which rows of the labels are learned, as truth values `(B,)`, or all for `None`; without it, no losses."""

    def forward(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        told = {name: kwargs.pop(name, None) for name in OWN_ARGUMENTS}
        if not fused_lm_head:
            return self.fused(*args, **kwargs, **{name: value for name, value in told.items() if value is not None})
        labels = kwargs.get("labels")
        in_training = self.model.training and torch.is_grad_enabled()
        in_evaluation = not self.model.training and told["training_progress"] is not None
        if self.rows is None or labels is None or not (in_training or in_evaluation):
            return self.fused(*args, fused_lm_head=True, **kwargs)
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels are given; auxiliary losses beside TRL's fused head need labels alone")
        if args:
            kwargs |= dict(zip(inspect.signature(self.model.forward).parameters, args, strict=False))
        learned = self.learned(labels)
        if learned is not labels and not bool(learned.ne(IGNORE_INDEX).any()):
            outputs = self.fused(fused_lm_head=True, **kwargs)
            return _with_breakdown(outputs, {"loss_dict": {}, "loss_weights": {}})
        return self._with_losses(kwargs, learned, told)

    def learned(self, labels: Tensor) -> Tensor:
        """The labels `(B, S)` that auxiliary heads learn from; -100 in the other rows."""
        rows = self.rows(labels) if self.rows is not None else None
        return labels if rows is None else labels.masked_fill(~rows[:, None], IGNORE_INDEX)

    def _with_losses(self, kwargs: dict[str, Any], labels: Tensor, told: dict[str, Any]) -> Any:
        model = self.model
        if model.loss_settings.distillation and model.training:
            raise ValueError(
                f"distillation is {model.loss_settings.distillation}: heads learn from the logits of the model's own head, which"
                " TRL's fused head does not compute. It must be 0"
            )
        inputs = {**kwargs, "labels": labels}
        targets = targets_of(model, inputs, None, told["target_counts"])
        step = LossStep(
            model.loss_settings,
            True,
            model.training,
            told["training_progress"],
            told["training_step"],
            told["training_seed"],
        )
        states: list[Any] = []
        hook = model.base_model.register_forward_hook(lambda module, args, output: states.append(output))
        try:
            if isinstance(model, CharformerForCausalLM):
                losses_of = functools.partial(model.losses_of_layer, step, targets)
                outputs = self.fused(fused_lm_head=True, **kwargs, on_layer_output=step.on_layer_output(losses_of))
            else:
                model.prepare(step)
                outputs = self.fused(**{**kwargs, "fused_lm_head": True, "output_hidden_states": True})
        finally:
            hook.remove()
        if isinstance(model, CharformerForCausalLM):
            last = states[-1].last_hidden_state
            model.add_final_losses(step, targets, last, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        else:
            seen = types.SimpleNamespace(loss=None, hidden_states=states[-1].hidden_states)
            model.add_losses(step, seen, inputs, told["target_counts"])
        step.add_main(functools.partial(_of_log_probs, outputs.log_probs, targets))
        losses = step.breakdown(model.loss_uncertainty if model.training else None, targets.share_of_step)
        return _with_breakdown(outputs, model.loss_watch.watched(losses))


def _with_breakdown(outputs: Any, breakdown: dict[str, Any]) -> Any:
    make: Any = output_class  # mypy does not take classes for hashable in calls of cached functions
    return make(type(outputs))(**{**outputs, **breakdown})


def _of_log_probs(log_probs: Tensor, targets: Targets, term: LossTerm) -> Tensor:
    """The value of a term of the model's own head, from the log-probabilities `(B, S - 1)` of the labels."""
    wanted = targets.ahead(1)
    if term.positions == "last":
        documents = torch.zeros_like(wanted) if targets.documents is None else targets.documents
        wanted = last_targets(wanted, documents)
    return -log_probs.float().masked_fill(wanted[:, :-1] == IGNORE_INDEX, 0.0).sum() / targets.denominator(term)


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL has replaced the model's forward."""
    fused = vars(unwrap_peft(model)).get("forward")
    # The signature is that of the forward which it replaces.
    return "fused_lm_head" in getattr(getattr(fused, "__code__", None), "co_varnames", ())


def fused_head_of(model: nn.Module) -> FusedHead | None:
    """Bring a model's auxiliary losses into the forward that TRL has given it; `None` if TRL has given it none."""
    base = unwrap_peft(model)
    if not isinstance(base, CausalLMWithLosses | CharformerForCausalLM) or not has_fused_head(base):
        return None
    fused = vars(base)["forward"]
    head = FusedHead(base, fused)

    # Transformers reads which inputs a model takes off its signature.
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return head.forward(*args, **kwargs)

    base.forward = types.MethodType(forward, base)  # type: ignore[method-assign]
    return head


def check_same_heads(trainer: Trainer) -> None:
    """Refuse a Trainer of TRL whose heads may run on some processes only, if sharding needs all processes to run them.

    Raises:
        ValueError: With FSDP or DeepSpeed, if a micro-batch may have no row that heads learn from.
    """
    shards = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if shards and any(LEARNED_ROWS.get(kind.__name__) is _desirable_rows for kind in type(trainer).__mro__):
        raise ValueError(
            "KTOTrainer with auxiliary losses does not work with FSDP or DeepSpeed: heads do not run on a process whose"
            " micro-batch has no desirable answer, and the other processes would wait for it. Leave sharding out"
        )


def learned_rows(trainer: type) -> Rows:
    """Which rows of a batch auxiliary heads learn in a Trainer of TRL.

    Raises:
        ValueError: If that is not defined for this Trainer.
    """
    for kind in trainer.__mro__:
        if kind.__module__.partition(".")[0] == "trl" and kind.__name__ in LEARNED_ROWS:
            return LEARNED_ROWS[kind.__name__]
    known = ", ".join(LEARNED_ROWS)
    raise ValueError(
        f"{trainer.__name__} computes its loss past the model, and which tokens auxiliary heads are to learn there is not"
        f" defined; it is defined for {known}"
    )
