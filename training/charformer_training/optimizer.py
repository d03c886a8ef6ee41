"""One optimizer that trains the linear layers of a model's body with Muon and the rest with AdamW."""

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
    """Muon (Jordan et al. 2024) for matrices, AdamW for all other parameters.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982). Learning rate and weight decay
    therefore mean the same for both.

    Args:
        matrices: Parameters with two dimensions.
        decayed: Further parameters with weight decay.
        others: Parameters without weight decay.
        lr, weight_decay, betas, eps: The same as for AdamW.
        fused: Whether to use the fused kernel of AdamW.
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
        if groups:  # adapters consist of matrices only
            self.parts.append(AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused))
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if len(self.param_groups) == sum(len(part.param_groups) for part in self.parts):
            raise NotImplementedError("MuonAdamW takes no further parameters after its construction; build a new one")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint, or a wrapper, may have replaced the groups and the state that the parts refer to.
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
            part.step()
        return loss


def muon_adamw(model: nn.Module, decayed_names: Sequence[str], **settings: Any) -> MuonAdamW:
    """Build `MuonAdamW` for a model of Transformers: Muon trains the weights of the linear layers in its body.

    AdamW trains the embeddings, the output layer of a language model, the auxiliary heads, and everything outside the base
    model, such as the head of a sequence classification model. It also trains what is not a linear layer: experts that
    share one tensor, and their routers.

    Args:
        model: The model, or a PEFT model around it.
        decayed_names: Names of the parameters with weight decay.
        settings: Further arguments of `MuonAdamW`.

    Raises:
        ValueError: If the model is not one of Transformers, or has no such matrix to train.
    """
    whole = unwrap_peft(model)
    if not isinstance(whole, PreTrainedModel):
        raise ValueError(f"muon takes models of Transformers; the body of this {type(whole).__name__} is not known")
    embeddings = (whole.get_input_embeddings(), whole.get_output_embeddings())
    not_body = {id(embedding.weight) for embedding in embeddings if embedding is not None}
    not_body |= {id(p) for name, p in whole.named_parameters() if name.startswith(TRAINING_ONLY)}
    linear = [module.weight for module in whole.base_model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    ids = {id(weight) for weight in linear if weight.requires_grad} - not_body
    parameters: dict[str, nn.Parameter] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for p in parameters.values() if id(p) in ids]
    if not matrices:
        raise ValueError(f"{type(whole).__name__} has no linear layer in its body that is trained; Muon needs one")
    rest = {name: p for name, p in parameters.items() if id(p) not in ids}
    decayed = [p for name, p in rest.items() if name in decayed_names]
    others = [p for name, p in rest.items() if name not in decayed_names]
    return MuonAdamW(matrices, decayed, others, **settings)
