"""A loss term of one's own: the z-loss of PaLM, which keeps logits small, on a model with auxiliary losses.

python examples/own_loss_term.py OUTPUT_FOLDER [STEPS]

The term is scheduled, weighted and logged like all others. The program prints what it changes beside a run without it.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses


def z_loss(outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The mean square of the logarithm of the partition function (Chowdhery et al. 2022, section 5)."""
    return outputs.logits.logsumexp(-1).pow(2).mean()


def run(output_dir: str, steps: int, weight: float) -> tuple[float, float]:
    """The next-token loss and the z-loss after training with this weight of the z-loss."""
    set_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    add_auxiliary_losses(model, num_targets=2, intermediate_layers=[2])
    numbers = [torch.arange(start, start + 32) % 100 for start in range(100)]
    trainer = AuxiliaryLossTrainer(
        model=model,
        args=AuxiliaryLossTrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            learning_rate=1e-2,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in numbers],
        eval_dataset=[{"input_ids": ids, "labels": ids} for ids in numbers[:8]],
    )
    # "constant" keeps the weight; "paper", "linear" or a function of your own changes it in the course of training.
    trainer.add_loss_term("z_loss", z_loss, weight=weight, schedule="constant")
    trainer.train()
    loss = trainer.evaluate()["eval_loss_next_token"]
    with torch.no_grad():
        return loss, float(z_loss(model.eval()(torch.stack(numbers[:8])), {}))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    steps = int(sys.argv[2]) if len(sys.argv) == 3 else 60
    for weight in (0.0, 0.01):
        loss, z = run(sys.argv[1], steps, weight)
        print(f"weight {weight}: next-token loss {loss:.3f} nats, z-loss {z:.2f}")
