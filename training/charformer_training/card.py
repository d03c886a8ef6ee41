"""The model card of a run: what the Trainer knows, filled into the template, and merged into a card that is there."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.modelcard import TASK_MAPPING
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from modeling_charformer.auxiliary_heads import TRAINING_ONLY
from modeling_charformer.hub import KINDS, TAGS, TASKS, is_unfilled_form

from .data import ConsecutiveWindows, RandomWindows
from .history import final_terms, last_evaluation
from .plots import PICTURE


if TYPE_CHECKING:
    from .pushing import HubTrainer

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md")
# Around what the program writes into a card, with a checksum by which it knows its own text again.
OWN_BLOCK = re.compile(r"<!-- charformer: begin ([0-9a-f]{16}) .*?-->\r?\n(.*?)<!-- charformer: end -->", re.DOTALL)


def trainer_card(
    trainer: "HubTrainer",
    name: str,
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
    finetuned_from: str | None = None,
    task: str | None = None,
    source: str | None = None,
) -> ModelCard:
    """The card of the model that `trainer` trains, as far as the run has got.

    Args:
        trainer: Its model, arguments, datasets and log history are what the card tells of.
        name: What the model is called.
        license: Identifier of the model's licence, as the Hub spells it.
        tags: Further tags.
        finetuned_from: Id of the model that training began with; by default where the model was loaded from, if that
            is no local folder.
        task: The pipeline tag; by default what Transformers knows for the model's class.
        source: What the data is called, where the datasets do not know it themselves.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = getattr(model, "config", None)
    finetuned_from = finetuned_from or trainer.finetuned_from
    datasets = {"training": trainer.train_dataset, "evaluation": trainer.eval_dataset}
    splits = [data.split for data in datasets.values() if isinstance(data, RandomWindows | ConsecutiveWindows)]
    source = source or next((split.source for split in splits if split.source), None)
    metrics = last_evaluation(trainer.state.log_history)
    task = task or TASKS.get(getattr(model, "_auto_class", None) or "") or _task(type(model).__name__)
    metric = _headline_metric(metrics)
    data = ModelCardData(
        library_name="transformers",
        license=license,
        base_model=finetuned_from,
        pipeline_tag=task,
        tags=[*dict.fromkeys([*(TAGS if is_charformer(config) else TAGS[-1:]), *tags])],
        model_name=name if metric else None,
        eval_results=[
            EvalResult(
                task_type=task or "other",
                dataset_type="text" if splits else "other",
                dataset_name=source or "evaluation data",
                dataset_split="validation",
                **metric,
            )
        ]
        if metric
        else None,
    )
    heads = sum(weight.numel() for key, weight in model.named_parameters() if key.startswith(TRAINING_ONLY))
    parameters = sum(weight.numel() for weight in model.parameters())
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=trainer.hub_model_id,
        config=config,
        is_charformer=is_charformer(config),
        is_language_model=task == "text-generation",
        kind=KINDS.get(task or "", "model"),
        auto_class=getattr(model, "_auto_class", None) or "AutoModel",
        class_name=type(model).__name__,
        is_transformers_class=type(model).__module__.startswith("transformers.models."),
        finetuned_from=finetuned_from,
        source=source,
        splits=splits,
        num_rows={role: len(data) for role, data in datasets.items() if isinstance(data, Sized)},
        evaluated_bytes=len(trainer.eval_dataset.data)
        if isinstance(trainer.eval_dataset, ConsecutiveWindows)
        else None,
        recipe=_recipe(trainer.args, trainer.state.max_steps),
        step=trainer.state.global_step,
        metrics=metrics,
        terms=final_terms(trainer.state.log_history),
        picture=PICTURE,
        inference_parameters=parameters - heads,
        training_parameters=parameters,
    )
    card.text = _as_block(card.text)
    return card


def is_charformer(config: Any) -> bool:
    """Whether a model with this configuration is a Charformer, of this package or of a repository's own code."""
    return getattr(config, "model_type", None) == "charformer"


def _headline_metric(metrics: Mapping[str, float]) -> dict[str, Any] | None:
    for key, metric_type, metric_name in (
        ("eval_bpc", "bits_per_character", "Bits per character"),
        ("eval_loss", "loss", "Loss"),
    ):
        if key in metrics:
            return {"metric_type": metric_type, "metric_name": metric_name, "metric_value": round(metrics[key], 4)}
    return None


def _task(class_name: str) -> str | None:
    mappings: Mapping[str, Mapping[str, str | tuple[str, ...]]] = TASK_MAPPING  # type: ignore[assignment]
    for task, mapping in mappings.items():
        names = (name for value in mapping.values() for name in ([value] if isinstance(value, str) else value))
        if class_name in names:
            return task
    return None


def _recipe(args: TrainingArguments, max_steps: int) -> dict[str, Any]:
    processes = max(1, args.world_size)
    return {
        "Optimizer steps": f"{max_steps:,}",
        "Rows per step": args.train_batch_size * args.gradient_accumulation_steps * processes,
        "Optimizer": f"{'muon and ' if getattr(args, 'muon', False) else ''}"
        f"{OptimizerNames(args.optim).value} {args.optim_args or ''}".strip(),
        "Learning rate": f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}",
        "Warm-up steps": args.get_warmup_steps(max_steps),
        "Weight decay": args.weight_decay,
        "Gradient clipping": args.max_grad_norm,
        "Precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "f32",
        "Seed": args.seed,
    }


def merged_card(new: ModelCard, old: ModelCard | None) -> ModelCard:
    """`new`, a `trainer_card`, with all that a person wrote into `old`.

    Text outside the block that the program writes is kept, and so are metadata, but for the measured results. A block
    that was edited is no longer the program's: then the whole text is kept, and its figures are not renewed.
    """
    if old is None:
        return new
    if old.text.strip() and not is_unfilled_form(old):
        block = OWN_BLOCK.search(old.text)
        if block and block[1] == _digest(block[2]):
            new.text = old.text[: block.start()] + new.text.strip() + old.text[block.end() :]
        else:
            logger.warning("The model card has been written or edited by hand; its text is kept as it is")
            new.text = old.text
    for key, value in old.data.to_dict().items():
        if key == "tags":
            new.data[key] = [*dict.fromkeys([*(value or []), *new.data.get(key, [])])]
        elif key != "model-index" and value:
            new.data[key] = value
    return new


def _as_block(text: str) -> str:
    text = text.strip() + "\n"
    return (
        f"\n<!-- charformer: begin {_digest(text)} (Renewed by the next push if it is unchanged; what stands before or"
        f" after it is kept.) -->\n{text}<!-- charformer: end -->\n"
    )


def _digest(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
