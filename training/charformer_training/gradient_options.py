"""Settings of a Trainer that look at the gradient of each term: what they need, and the parts that carry them out."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import Trainer

from .gradient_conflicts import AGGREGATORS, ConflictFreeGradients
from .loss_terms import LossTerms
from .term_gradients import Batch, body_parameters, gradients_in_step


def bare_model(trainer: Trainer) -> nn.Module:
    """The trained model without wrappers that synchronize, shard or compile it."""
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model


def check_gradient_options(trainer: Trainer, terms: LossTerms) -> None:
    """Refuse `log_term_gradients` and `gradient_aggregator` where a term's gradient cannot be computed by itself.

    Raises:
        ValueError: Names the setting and what it does not work with.
    """
    args: Any = trainer.args
    aggregator = getattr(args, "gradient_aggregator", None)
    asked = {"log_term_gradients": getattr(args, "log_term_gradients", 0), "gradient_aggregator": aggregator}
    if not any(asked.values()):
        return
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    reasons = {
        "a model without auxiliary losses": terms.settings is None,
        "a model whose body is not trained": terms.settings and not body_parameters(bare_model(trainer)),
        "FSDP or DeepSpeed, which shard gradients": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "fp16, in which gradients vanish without the loss scale": args.fp16,
        "gradient_checkpointing_kwargs={'use_reentrant': True}, which do not know torch.autograd.grad": (
            args.gradient_checkpointing and checkpointing.get("use_reentrant", False)
        ),
    }
    of_aggregator = {
        f"{args.world_size} processes, whose gradients are averaged before they could be compared": args.world_size
        > 1,
        "torch_compile, whose graphs run backward only once": args.torch_compile,
        f"optim={getattr(args.optim, 'value', args.optim)!r}, which steps in the backward pass": any(
            word in str(args.optim).lower() for word in ("lomo", "layerwise")
        ),
    }
    for setting, value in asked.items():
        for reason, is_so in (reasons | (of_aggregator if setting == "gradient_aggregator" else {})).items():
            if value and is_so:
                raise ValueError(f"{setting} is {value!r}; it does not work with {reason}. Leave it out")


def conflict_free_gradients(trainer: Trainer) -> ConflictFreeGradients | None:
    """What `gradient_aggregator` asks for."""
    aggregator = getattr(trainer.args, "gradient_aggregator", None)
    if aggregator is None:
        return None
    if aggregator not in AGGREGATORS:
        raise ValueError(f"gradient_aggregator is {aggregator!r}; it must be one of {list(AGGREGATORS)}, or left out")
    return ConflictFreeGradients(bare_model(trainer))


def measured_gradients(
    trainer: Any, terms: LossTerms, batches: Sequence[Batch], num_items_in_batch: Any
) -> dict[str, float]:
    """The figures of `gradients_in_step` for the present step of a Trainer; all processes call this together."""
    inputs, share = terms.model_inputs(), 1 / terms.parts
    if num_items_in_batch is None:
        inputs.pop("target_counts", None)
    elif trainer.model_accepts_loss_kwargs:
        inputs["num_items_in_batch"] = num_items_in_batch
    if "num_items_in_batch" in inputs or inputs.get("target_counts") is not None:
        share = float(trainer.accelerator.num_processes) if trainer.args.average_tokens_across_devices else 1.0
    average = None
    if trainer.accelerator.num_processes > 1:

        def average(gradient: Any) -> Any:
            return trainer.accelerator.reduce(gradient, "mean")

    with trainer.compute_loss_context_manager():
        prepared = [trainer._prepare_inputs(batch) for batch in batches]
        return gradients_in_step(bare_model(trainer), terms, prepared, inputs, share, average)
