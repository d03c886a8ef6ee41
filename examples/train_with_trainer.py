"""Train on a text file from Python, with AuxiliaryLossTrainer: what charformer-train does, in a page.

python examples/train_with_trainer.py TEXT.txt OUTPUT_FOLDER
"""

import sys

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
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer


if len(sys.argv) != 3:
    sys.exit(__doc__)
text, output_dir = sys.argv[1:]
window, steps, batch = 64, 300, 8

set_seed(0)
config = CharformerConfig(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=window,
    attention_dropout=0.0,
    activation_dropout=0.0,
    # loss = next_char + 0.5 * target_2 + 0.3 * (layer_1 + 0.5 * layer_1_target_2 + layer_2 + ...), layers until they drop
    num_targets=2,
    target_weights=[0.5],
    intermediate_layers="all",
    intermediate_weight=0.3,
    intermediate_schedule="paper",
)
splits = split_corpus(load_corpus(DataArguments(data_path=text)), train_share=0.9, validation_share=0.05)
trainer = AuxiliaryLossTrainer(
    model=CharformerForCausalLM(config),
    args=AuxiliaryLossTrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential",  # the windows are random already
        learning_rate=3e-3,
        warmup_steps=20,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=150,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=RandomWindows(splits["train"], window, num_windows=steps * batch, seed=0),
    eval_dataset=ConsecutiveWindows(splits["validation"], window),
    data_collator=default_data_collator,
    processing_class=CharformerTokenizer.for_model(config),
)
trainer.train()
print({name: value for name, value in trainer.evaluate().items() if name in ("eval_loss", "eval_bpc", "eval_bpb")})
trainer.save_model()
