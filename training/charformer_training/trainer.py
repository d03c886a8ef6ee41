"""A Trainer that tells the model how far training is, and logs every term of its loss."""

from typing import Any, cast

import torch
from torch import nn
from transformers import TrainingArguments

from .checkpoints import SafeTrainer
from .mixin import AuxiliaryLossMixin
from .optimizer import muon_adamw


class AuxiliaryLossTrainer(AuxiliaryLossMixin, SafeTrainer):
    """A `transformers.Trainer` for models whose loss has several terms; it logs each of them.

    It is `AuxiliaryLossMixin` on a Trainer with reliable checkpoints, `SafeTrainer`, and has the optimizer Muon. A loss that
    is not finite ends training with a `FloatingPointError`.

    Example:

        from transformers import AutoModelForCausalLM
        from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses

        model = add_auxiliary_losses(AutoModelForCausalLM.from_pretrained("openai-community/gpt2"))
        row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
        args = AuxiliaryLossTrainingArguments(output_dir="run", max_steps=10, logging_steps=1)
        AuxiliaryLossTrainer(model, args, train_dataset=[row] * 80).train()

    Args:
        model: A Charformer, a model from `add_auxiliary_losses`, or any other model of Transformers. Terms are taken from
            `loss_dict` in the model's output and from scalars whose name ends in `loss`.
        args: `AuxiliaryLossTrainingArguments`, or plain `TrainingArguments`.
        kwargs: Further arguments of `transformers.Trainer`, such as `train_dataset` and `data_collator`.

    Raises:
        ValueError: If a setting would replace or distort the model's losses, or does not fit the optimizer Muon.
    """

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        if getattr(self.args, "muon", False):
            self._check_muon()

    def _check_muon(self) -> None:
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError("muon is on, and the Trainer was given an optimizer too; leave one of the two out")
        if self.is_deepspeed_enabled or (
            self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2
        ):
            raise ValueError(
                "muon is on, and DeepSpeed or FSDP 1 would flatten the matrices that Muon needs; use FSDP 2"
                " (training/accelerate/fsdp2.yaml), or leave muon out"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and getattr(self.args, "muon", False):
            trained = cast(nn.Module, self.model if model is None else model)
            self.optimizer = muon_adamw(
                trained,
                self.get_decay_parameter_names(trained),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=self.args.optim == "adamw_torch_fused",
            )
        return super().create_optimizer(model)

    # ---- The terms in checkpoints ----

    def _running_sums(self) -> dict[str, Any]:
        return {**super()._running_sums(), "terms": self.loss_terms.state()}

    def _take_up(self, sums: dict[str, Any]) -> None:
        super()._take_up(sums)
        self.loss_terms.load_state(sums["terms"], self.args.device)

    def _first_not_finite(self) -> tuple[int, list[str]] | None:
        return self.loss_terms.first_not_finite()

    def _not_finite_error(self, step: int, names: list[str]) -> FloatingPointError:
        return SafeTrainer._not_finite_error(self, step, names)
