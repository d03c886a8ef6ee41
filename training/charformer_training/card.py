"""The model card of a run: a template filled with the run's facts, and merged with an existing card."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from modeling_charformer.hub import KINDS, TAGS, TASKS, is_unfilled_form

from .data import Split
from .plots import PICTURE


logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md")
# Marks around the generated text of a card. The checksum shows whether a person has edited it.
OWN_BLOCK = re.compile(r"<!-- charformer: begin ([0-9a-f]{16}) .*?-->\r?\n(.*?)<!-- charformer: end -->", re.DOTALL)


@dataclass(frozen=True)
class RunFacts:
    """What a card shows of a run, which may still be going on."""

    config: Any
    """The model's configuration, or `None`."""
    class_name: str
    """Of the model's class."""
    auto_class: str | None = None
    """The Auto class that loads a model whose code lies in its repository."""
    is_transformers_class: bool = False
    inference_parameters: int = 0
    training_parameters: int = 0
    repo_id: str | None = None
    finetuned_from: str | None = None
    """Hub id of the model that was fine-tuned."""
    splits: Sequence[Split] = ()
    num_rows: Mapping[str, int] = field(default_factory=dict)
    """Of the datasets, by their role."""
    evaluated_bytes: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the training, for people to read."""
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics of the last evaluation, `eval_...`."""
    terms: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """The last value of each term of the loss, as `(step, nats)`."""


def run_card(
    facts: RunFacts,
    name: str,
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
    task: str | None = None,
    source: str | None = None,
) -> ModelCard:
    """The card of a model.

    Args:
        facts: The facts about its run.
        name: The model's name.
        license: Identifier of the model's licence, as the Hub spells it.
        tags: Further tags.
        task: The pipeline tag; by default that of the model's class in Transformers.
        source: The data's name; by default that of the splits.
    """
    source = source or next((split.source for split in facts.splits if split.source), None)
    if source is not None:  # a file's name may hold bytes that are not UTF-8
        source = source.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    task = task or TASKS.get(facts.auto_class or "") or _task(facts.class_name)
    metric = _headline_metric(facts.metrics)
    charformer = is_charformer(facts.config)
    result = EvalResult(
        task_type=task or "other",
        dataset_type="text" if facts.splits else "other",
        dataset_name=source or "evaluation data",
        dataset_split="validation",
        **(metric or {"metric_type": "loss", "metric_value": None}),
    )
    data = ModelCardData(
        library_name="transformers",
        license=license,
        base_model=facts.finetuned_from,
        pipeline_tag=task,
        tags=[*dict.fromkeys([*(TAGS if charformer else TAGS[-1:]), *tags])],
        model_name=name if metric else None,
        eval_results=[result] if metric else None,
    )
    known = {item.name: getattr(facts, item.name) for item in fields(facts)}
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **known
        | {
            "name": name,
            "is_charformer": charformer,
            "is_language_model": task == "text-generation",
            "kind": KINDS.get(task or "", "model"),
            "auto_class": facts.auto_class or "AutoModel",
            "source": source,
            "picture": PICTURE,
        },
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
    mappings: Mapping[str, Mapping[str, str | tuple[str, ...]]] = TASK_MAPPING  # type: ignore[assignment]  # declared as one kind of OrderedDict
    for task, mapping in mappings.items():
        names = (name for value in mapping.values() for name in ([value] if isinstance(value, str) else value))
        if class_name in names:
            return task
    return None


def merged_card(new: ModelCard, old: ModelCard | None) -> ModelCard:
    """The card `new`, with everything that a person wrote into `old`.

    Text outside the generated block is kept, and so are metadata except for the measured results. If a person has edited
    the block, the whole text is kept, and its figures are not updated.
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
