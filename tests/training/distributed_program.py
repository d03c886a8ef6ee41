"""Run by torchrun: trains the cases of `CASES` and writes the first process's logs. Not a test by itself."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from charformer_training import Split
from charformer_training.loss_terms import EvaluationTerms
from tests.helpers import loss_logs, tiny_trainer


# Per device: two processes make batches of eight of them.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"per_device_train_batch_size": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "last_position": {"per_device_train_batch_size": 4, "model": {"position_loss": "last", "num_targets": 3}},
    "checkpointed": {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
    "saved": {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3},
}


def run(case: str, text: Path, folder: Path) -> dict:
    data = np.frombuffer(text.read_bytes(), np.uint8)
    splits = {"train": Split("train", data[:10_000]), "validation": Split("validation", data[10_000:10_600])}
    settings: dict[str, Any] = {"output_dir": str(folder / case), "per_device_eval_batch_size": 4}
    trainer = tiny_trainer(splits=splits, **(settings | CASES[case]))
    trainer.train()
    metrics = trainer.evaluate()
    logs = loss_logs(trainer)
    # With Transformers 5.17 and Accelerate 1.12, checkpoints do not load on several CPU processes ("cpu:0").
    if case == "saved" and not transformers.__version__.startswith("5.17."):
        resumed = tiny_trainer(splits=splits, **(settings | CASES[case]))
        resumed.train(resume_from_checkpoint=str(folder / case / "checkpoint-3"))
        assert loss_logs(resumed) == logs
    return {
        "logs": logs,
        "metrics": {key: value for key, value in metrics.items() if "loss" in key or key in ("eval_bpc", "eval_bpb")},
        "processes": trainer.accelerator.num_processes,
    }


if __name__ == "__main__":
    text, folder = Path(sys.argv[1]), Path(sys.argv[2])
    terms = EvaluationTerms()
    results = {case: run(case, text, folder) for case in CASES}
    # A process that had no batch has nothing to add, and must not be waited for.
    if torch.distributed.get_rank() == 0:
        terms.add("loss", torch.tensor(2.0), 3)
    assert terms.totals() == {"loss": (6.0, 3)}
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
