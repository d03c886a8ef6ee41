"""Muon for the linear layers of a model's body, AdamW for the rest: one optimizer, one learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_charformer.auxiliary_heads import TRAINING_ONLY

from .models import unwrap_peft


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on matrices, AdamW on all else.

    Muon's updates are scaled to the size that AdamW's have (Liu et al. 2025, arXiv 2502.16982), so that learning rate and
    weight decay mean the same for both.

    Args:
        matrices: Parameters with two dimensions.
        decayed: Further parameters that weight decay applies to.
        others: Parameters that it does not.
        lr, weight_decay, betas, eps: As in AdamW.
        fused: Whether AdamW runs as one kernel.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        decayed: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool = True,
    ):
        groups: list[dict[str, Any]] = [
            {"params": list(decayed), "weight_decay": weight_decay},
            {"params": list(others), "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts: list[torch.optim.Optimizer] = [muon]
        if groups:  # adapters are matrices only
            self.parts.append(AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused))
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if len(self.param_groups) == sum(len(part.param_groups) for part in self.parts):
            raise NotImplementedError("MuonAdamW takes no further parameters once it is made; make it anew")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A checkpoint that was loaded, or a wrapper, may have put other groups and another state in place of the parts'.
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
            part.step()
        return loss


def muon_adamw(model: nn.Module, decayed_names: Sequence[str], **settings: Any) -> MuonAdamW:
    """`MuonAdamW` of a model of Transformers: Muon trains the weights of the linear layers of its body.

    That leaves AdamW the embeddings, the classifier of a language model, auxiliary heads, what is outside of the base model
    (a classifier of sequences has its head there), and what is not a linear layer with a matrix (experts that are kept in
    one tensor, their routers).

    Args:
        model: With or without adapters of PEFT.
        decayed_names: Names of the parameters that weight decay applies to.
        settings: Of `MuonAdamW`.

    Raises:
        ValueError: If it is not a model of Transformers, or has no such matrix to train.
    """
    whole = unwrap_peft(model)
    if not isinstance(whole, PreTrainedModel):
        raise ValueError(f"muon takes models of Transformers; of this {type(whole).__name__} it cannot tell the body")
    embeddings = (whole.get_input_embeddings(), whole.get_output_embeddings())
    not_body = {id(embedding.weight) for embedding in embeddings if embedding is not None}
    not_body |= {id(p) for name, p in whole.named_parameters() if name.startswith(TRAINING_ONLY)}
    linear = [module.weight for module in whole.base_model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    ids = {id(weight) for weight in linear if weight.requires_grad} - not_body
    parameters: dict[str, nn.Parameter] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in parameters.values() if id(p) in ids]
    if not matrices:
        raise ValueError(f"{type(whole).__name__} has no linear layer in its body that is trained, for Muon to train")
    rest = {name: p for name, p in parameters.items() if id(p) not in ids}
    decayed = [p for name, p in rest.items() if name in decayed_names]
    others = [p for name, p in rest.items() if name not in decayed_names]
    return MuonAdamW(matrices, decayed, others, **settings)
