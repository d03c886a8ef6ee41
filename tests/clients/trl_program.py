"""Trainers of TRL with `AuxiliaryLossMixin`, for tests; as a program, run by a launcher, SFT on two processes.

trl_program.py FOLDER CASE...
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import trl  # type: ignore[import-not-found]  # not in every environment
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from charformer_training import AuxiliaryLossMixin, add_auxiliary_losses
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer
from tests.helpers import loss_logs
from tests.training.distributed_program import use_fsdp_on_cpus


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
        "per_device_eval_batch_size": 2,
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
    folder: Path,
    model: Any,
    rows: dict[str, list[str]] | None = None,
    kind: Any = SFTTrainer,
    eval: bool = False,
    **changes: Any,
) -> Any:
    more = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
    if eval:
        more["eval_dataset"] = datasets.Dataset.from_dict({"text": TEXTS[:7]})
    return kind(
        model,
        trl.SFTConfig(**settings(folder, max_length=32, **changes)),
        train_dataset=datasets.Dataset.from_dict(rows or {"text": TEXTS}),
        processing_class=tokenizer(),
        **more,
    )


def dpo(folder: Path, model: Any, reference: Any, **changes: Any) -> Any:
    """Answers of one length, so that a mean over micro-batches is that over all."""
    rows = {"prompt": TEXTS[:8], "chosen": [" sat"] * 8, "rejected": [" xqzé"] * 8}
    return DPOTrainer(
        model,
        reference,
        args=trl.DPOConfig(**settings(folder, max_steps=2, **changes), max_length=64),
        train_dataset=datasets.Dataset.from_dict(rows),
        eval_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )


# What a program on two processes trains, four rows a step.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "packing": {"packing": True},
    "dpo": {},
    "adapter": {"peft_config": peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", r=2)},
}


def case_settings(case: str, processes: int) -> dict[str, Any]:
    """Arguments of `sft`, such that each step has four rows, however many processes there are."""
    changes = dict(CASES[case])
    rows = 2 if changes.get("packing") else 4
    parts = processes * changes.get("gradient_accumulation_steps", 1)
    return {**changes, "per_device_train_batch_size": rows // parts}


if __name__ == "__main__":
    use_fsdp_on_cpus()
    folder, results = Path(sys.argv[1]), {}
    for case in sys.argv[2:]:
        for kind, make in MODELS.items():
            torch._dynamo.reset()
            place, changes = folder / f"{case}-{kind}", case_settings(case, 2)
            if case == "dpo":
                trainer = dpo(place, make(), make(), **changes)
            else:
                trainer = sft(place, make(), eval=True, **changes)
            trainer.train()
            results[f"{case}-{kind}"] = {
                "logs": loss_logs(trainer),
                "metrics": {name: value for name, value in trainer.evaluate().items() if "loss" in name},
                "kind": trainer.accelerator.distributed_type.value,
            }
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # see distributed_program.py
