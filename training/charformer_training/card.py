"""The model card of a run: what the run knows, filled into the template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_charformer import CharformerForCausalLM


TEMPLATE = Path(__file__).with_name("model_card.md")


def write_model_card(
    path: Path,
    model: CharformerForCausalLM,
    name: str,
    source: str,
    splits: Mapping[str, tuple[int, str]],
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float],
    terms: Mapping[str, tuple[int, float]],
) -> None:
    """Write the card.

    Args:
        path: File to write.
        model: The trained model.
        name: What the model is called.
        source: The corpus in words.
        splits: Split name to its number of bytes and SHA-256.
        recipe: The training settings to list.
        metrics: `eval_bpc`, `eval_bpb` and `eval_loss` of the last evaluation.
        terms: Term name to the step and value (nats) it was last logged with.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["charformer", "character-level", "byte-level", "auxiliary-losses"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name="Character-level language modeling",
                dataset_type="text",
                dataset_name=source,
                dataset_split="validation",
                metric_type="bits_per_character",
                metric_name="Bits per character",
                metric_value=round(metrics["eval_bpc"], 4),
            )
        ],
    )
    heads = sum(weight.numel() for weight in model.auxiliary_heads.parameters())
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        config=model.config,
        source=source,
        splits=splits,
        recipe=recipe,
        metrics=metrics,
        terms=terms,
        inference_parameters=model.num_parameters() - heads,
        training_parameters=model.num_parameters(),
    )
    path.write_text(card.content, encoding="utf-8")
