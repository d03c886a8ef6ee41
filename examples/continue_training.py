"""Continue training a model on another text, and print its bits per character there before and after.

python examples/continue_training.py runs/quickstart my_text.txt OUTPUT_FOLDER [STEPS]
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
from modeling_charformer import CharformerForCausalLM, CharformerTokenizer


if len(sys.argv) not in (4, 5):
    sys.exit(__doc__)
folder, text, output_dir = sys.argv[1:4]
steps, batch = int(sys.argv[4]) if len(sys.argv) == 5 else 300, 8

set_seed(0)
# Losses of the model's own configuration; `intermediate_layers=None` here would leave those of the layers out.
model = CharformerForCausalLM.from_pretrained(folder)
window = model.config.max_position_embeddings
splits = split_corpus(load_corpus(DataArguments(data_path=text)), train_share=0.9, validation_share=0.1)
trainer = AuxiliaryLossTrainer(
    model=model,
    args=AuxiliaryLossTrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential",  # the windows are random already
        learning_rate=5e-4,  # lower than at first, so that the model keeps what it knows
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 6),
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=RandomWindows(splits["train"], window, num_windows=steps * batch, seed=0),
    eval_dataset=ConsecutiveWindows(splits["validation"], window, max_bytes=100_000),
    data_collator=default_data_collator,
    processing_class=CharformerTokenizer.for_model(model.config),
)
before = trainer.evaluate()["eval_bpb"]
trainer.train()
after = trainer.evaluate()["eval_bpb"]
trainer.save_model()
print(f"bits per byte of text that training has not seen: {before:.3f} before, {after:.3f} after {steps} steps")
