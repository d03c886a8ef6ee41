"""Auxiliary losses on a model of Transformers: GPT-2 with losses on intermediate layers and on the token after the next one.

python examples/any_model.py OUTPUT_FOLDER
"""

import math
import sys

import torch
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    add_auxiliary_losses,
    load_auxiliary_losses,
)


if len(sys.argv) != 2:
    sys.exit(__doc__)
(output_dir,) = sys.argv[1:]
set_seed(0)
# Any causal language model: AutoModelForCausalLM.from_pretrained(...). This one is small and new.
config = GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
model = AutoModelForCausalLM.from_config(config)
add_auxiliary_losses(
    model,
    num_targets=2,
    intermediate_layers=[1, 2, 3],
    intermediate_schedule="random",  # one layer per step: with a large vocabulary each loss costs as much as the main one
    term_weights={"target_2": 0.4, "layer_1": 0.3, "layer_2": 0.3, "layer_3": 0.3},
)

numbers = [torch.arange(start, start + 32) % 100 for start in range(100)]
trainer = AuxiliaryLossTrainer(
    model=model,
    args=AuxiliaryLossTrainingArguments(
        output_dir=output_dir, max_steps=60, learning_rate=1e-2, logging_steps=15, save_strategy="no", report_to="none"
    ),
    train_dataset=[{"input_ids": ids, "labels": ids} for ids in numbers],
    eval_dataset=[{"input_ids": ids, "labels": ids} for ids in numbers[:8]],
)


def confidence(outputs, inputs):
    """Mean probability of the likeliest token: a loss term defined by the user, which here makes the model less confident."""
    return outputs.logits.softmax(-1).amax(-1).mean()


trainer.add_loss_term("confidence", confidence, weight=0.1, schedule="paper")
trainer.train()
result = trainer.evaluate()
print(f"next-token loss {result['eval_loss_next_token']:.3f} nats; guessing costs {math.log(100):.3f}")
trainer.save_model()

plain = AutoModelForCausalLM.from_pretrained(output_dir)  # a plain GPT-2
print(type(plain).__name__, plain.num_parameters())
print(load_auxiliary_losses(plain, output_dir).auxiliary_heads)
