"""Trainers of TRL with `AuxiliaryLossMixin`, for `test_trl_losses.py`; as a program, run by torchrun, SFT on two processes.

trl_program.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import trl  # type: ignore[import-not-found]  # not in every environment
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from charformer_training import AuxiliaryLossMixin, add_auxiliary_losses
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer
from tests.helpers import loss_logs


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
TEXTS = ["the cat sat down", "a dog é sat", "one and two", "two of three and four"] * 4


class SFTTrainer(AuxiliaryLossMixin, trl.SFTTrainer):
    pass


class DPOTrainer(AuxiliaryLossMixin, trl.DPOTrainer):
    pass


class KTOTrainer(AuxiliaryLossMixin, trl.KTOTrainer):
    pass


class GRPOTrainer(AuxiliaryLossMixin, trl.GRPOTrainer):
    pass


class RLOOTrainer(AuxiliaryLossMixin, trl.RLOOTrainer):
    pass


class RewardTrainer(AuxiliaryLossMixin, trl.RewardTrainer):
    pass


def charformer(**changes: Any) -> Any:
    set_seed(0)
    dropouts: dict[str, Any] = {"attention_dropout": 0.0, "activation_dropout": 0.0}
    return CharformerForCausalLM(CharformerConfig(**(SIZES | dropouts | changes)))


def llama(**changes: Any) -> Any:
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, pad_token_id=255, eos_token_id=254, bos_token_id=None, **SIZES)
    )
    return add_auxiliary_losses(model, **changes)


MODELS = {"charformer": charformer, "llama": llama}


def tokenizer() -> CharformerTokenizer:
    return CharformerTokenizer.for_model(CharformerConfig(**SIZES))


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    } | changes


def sft(
    folder: Path, model: Any, rows: dict[str, list[str]] | None = None, kind: Any = SFTTrainer, **changes: Any
) -> Any:
    more = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
    return kind(
        model,
        trl.SFTConfig(**settings(folder, max_length=32, **changes)),
        train_dataset=datasets.Dataset.from_dict(rows or {"text": TEXTS}),
        processing_class=tokenizer(),
        **more,
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    logs = {}
    for name, make in MODELS.items():
        trainer = sft(folder / name, make(), per_device_train_batch_size=1, gradient_accumulation_steps=2)
        assert trainer.args.world_size == 2
        trainer.train()
        logs[name] = loss_logs(trainer)
    if torch.distributed.get_rank() == 0:
        (folder / "logs.json").write_text(json.dumps(logs))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
