"""Train draft heads alone, for any causal language model, on any text: the model stays as it is and drafts for itself.

python examples/train_draft_heads.py MODEL OUTPUT_FOLDER TEXT_FILE [TEXT_FILE ...] [--heads sequential] [--steps 800]

MODEL is a folder or an id on the Hub. OUTPUT_FOLDER gets the model with its heads, for
`generate(use_extra_targets=True)`. With --heads shared it also gets the folder `medusa`, for vLLM.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    add_auxiliary_losses,
    export_draft_heads,
    frequent_tokens,
)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("output_folder", type=Path)
parser.add_argument("text", type=Path, nargs="+", help="files in UTF-8, like what the model will write")
parser.add_argument("--heads", choices=["shared", "sequential"], default="shared", help="vLLM takes shared heads only")
parser.add_argument("--targets", type=int, default=4, help="tokens that a pass predicts, the next one included")
parser.add_argument("--vocabulary", type=int, default=4096, help="tokens that are drafted; 0: all")
parser.add_argument("--steps", type=int, default=800)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--learning-rate", type=float, default=1e-3)
arguments = parser.parse_args()

set_seed(0)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
ids = [id for path in arguments.text for id in tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids]
windows = [ids[start : start + arguments.length] for start in range(0, len(ids), arguments.length)]
data = [{"input_ids": window, "labels": window} for window in windows if len(window) == arguments.length]
held_out = max(1, min(16, len(data) // 20))

vocabulary = frequent_tokens([ids], arguments.vocabulary) if arguments.vocabulary else None
add_auxiliary_losses(
    model,
    heads=arguments.heads,
    heads_only=True,
    draft_vocabulary=vocabulary,
    num_targets=arguments.targets,
    target_weights=[1.0] * (arguments.targets - 1),
    intermediate_layers=None,
    distillation=1.0,
)
trainer = AuxiliaryLossTrainer(
    model=model,
    args=AuxiliaryLossTrainingArguments(
        output_dir=str(arguments.output_folder),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        warmup_steps=min(20, arguments.steps // 4),
        weight_decay=0.0,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=max(1, arguments.steps // 20),
        eval_head_accuracy=True,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data[held_out:],
    eval_dataset=data[:held_out],
    data_collator=default_data_collator,
)
print(f"{len(data)} windows of {arguments.length} tokens; drafts are of {len(vocabulary or [])} tokens (0: all)")
begin = time.perf_counter()
trainer.train()
print(f"trained {arguments.steps} steps in {time.perf_counter() - begin:.0f} seconds")
print(trainer.evaluate())
trainer.save_model()
tokenizer.save_pretrained(arguments.output_folder)
if arguments.heads == "shared":
    export_draft_heads(model, arguments.output_folder / "medusa", base_model=arguments.model)
