"""What several tests, and the programs they start, build alike."""

from typing import Any

from transformers import default_data_collator, set_seed

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    ConsecutiveWindows,
    RandomWindows,
    Split,
)
from modeling_charformer import CharformerConfig, CharformerForCausalLM


TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


def tiny_trainer(
    output_dir: str, splits: dict[str, Split], model: dict | None = None, callbacks=None, **changes
) -> AuxiliaryLossTrainer:
    """A run of 8 steps of 8 windows with the paper's schedule; `model` changes the tiny model's configuration."""
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    args = AuxiliaryLossTrainingArguments(**(settings | changes))
    set_seed(0)
    return AuxiliaryLossTrainer(
        model=CharformerForCausalLM(CharformerConfig(**(TINY | (model or {})))),
        args=args,
        train_dataset=RandomWindows(splits["train"], 24, 8 * args.max_steps, seed=0),
        eval_dataset=ConsecutiveWindows(splits["validation"], 24),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def loss_logs(trainer: AuxiliaryLossTrainer) -> list[dict[str, float]]:
    """The log entries of the training loop, without times."""
    kept = ("step", "learning_rate", "grad_norm")
    return [
        {key: value for key, value in entry.items() if key in kept or key.startswith("loss")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
