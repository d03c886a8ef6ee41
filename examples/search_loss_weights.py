"""Search the weights of two losses by `Trainer.hyperparameter_search`, and print the best beside a run without the losses.

python examples/search_loss_weights.py TEXT.txt OUTPUT_FOLDER [TRIALS] [STEPS]

Needs `pip install optuna`. One seed and one text: a small gain is chance, see docs/evidence.md.
"""

import sys
from typing import Any

from transformers import default_data_collator, set_seed

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    ConsecutiveWindows,
    RandomWindows,
    load_corpus,
    split_corpus,
)
from charformer_training.arguments import DataArguments
from modeling_charformer import CharformerConfig, CharformerForCausalLM


WINDOW, BATCH = 64, 8


NAMES = ("target_2", "layer_1", "layer_2")


def model_init(trial: Any = None) -> CharformerForCausalLM:
    """A model whose losses have the weights of the trial. Without a trial it has none but the main loss."""
    # Asked for here, since the Trainer builds the model before it calls `hp_space`.
    weights = {name: trial.suggest_float(name, 0.01, 1.0, log=True) if trial else 0.0 for name in NAMES}
    set_seed(0)
    return CharformerForCausalLM(
        CharformerConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=WINDOW,
            attention_dropout=0.0,
            activation_dropout=0.0,
            num_targets=2,
            intermediate_layers=[1, 2],
            term_weights=weights | {"layer_1_target_2": 0.0, "layer_2_target_2": 0.0},
        )
    )


def main() -> None:
    if len(sys.argv) not in (3, 4, 5):
        sys.exit(__doc__)
    text, output_dir = sys.argv[1:3]
    trials, steps = (int(word) for word in (sys.argv[3:] + ["8", "300"][len(sys.argv) - 3 :]))
    splits = split_corpus(load_corpus(DataArguments(data_path=text)), train_share=0.9, validation_share=0.1)
    trainer = AuxiliaryLossTrainer(
        model_init=model_init,
        args=AuxiliaryLossTrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",  # the windows are random already, and each trial sees the same
            muon=True,
            learning_rate=1e-2,
            warmup_steps=steps // 10,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=RandomWindows(splits["train"], WINDOW, num_windows=steps * BATCH, seed=0),
        eval_dataset=ConsecutiveWindows(splits["validation"], WINDOW, max_bytes=100_000),
        data_collator=default_data_collator,
    )
    trainer.train()
    without = trainer.evaluate()["eval_bpb"]
    best: Any = trainer.hyperparameter_search(
        hp_space=lambda trial: {},  # or fields of the arguments: {"learning_rate": trial.suggest_float(...)}
        n_trials=trials,
        direction="minimize",
        backend="optuna",
        compute_objective=lambda metrics: metrics["eval_bpb"],
    )
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in best.hyperparameters.items())
    print(f"bits per byte: {best.objective:.3f} with the weights {weights}; {without:.3f} without these losses")


if __name__ == "__main__":
    main()
