"""Run by a launcher on several processes: trains cases of `CASES`, writes the first process's logs. Not a test by itself.

distributed_program.py TEXT FOLDER CASE...
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from charformer_training import Split, add_auxiliary_losses, bits_per_character
from charformer_training.running_means import EvaluationTerms
from modeling_charformer import CharformerConfig, CharformerForCausalLM, linear_cross_entropy
from tests.helpers import TINY, loss_logs, tiny_trainer


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "last_position": {"model": {"position_loss": "last", "num_targets": 3}},
    "checkpointed": {"gradient_checkpointing": True},
    "learned_weights": {
        "model": {"loss_weighting": "uncertainty", "intermediate_schedule": "rotate_2", "position_share": 0.3}
    },
    "saved": {"save_strategy": "steps", "save_steps": 3, "model": {"position_share": 0.2}},
    "added": {"model": "llama", "gradient_accumulation_steps": 2},
    "half": {"bf16": True},
    "muon": {"muon": True},
    "ignores_counts": {"model": "bert", "gradient_accumulation_steps": 2},
    "gradients": {"log_term_gradients": 3, "gradient_accumulation_steps": 2},
}
# These compute cross-entropy in one pass, as models with a large vocabulary do.
IN_ONE_PASS = ("added", "half", "learned_weights")
ROWS_PER_STEP = 8


class RecordingWindows(torch.utils.data.Dataset):
    """Windows that remember which of them were read."""

    def __init__(self, windows: Any):
        self.windows, self.split = windows, windows.split
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.read.append(index)
        return self.windows[index]


def case_settings(case: str, num_processes: int) -> dict[str, Any]:
    """Arguments of `tiny_trainer`, such that each step has eight windows."""
    settings = dict(CASES[case])
    parts = num_processes * settings.get("gradient_accumulation_steps", 1)
    settings["per_device_train_batch_size"] = ROWS_PER_STEP // parts
    if isinstance(settings.get("model"), str):
        settings["model"] = {"llama": llama_with_losses, "bert": bert}[settings["model"]]()
    return settings


def llama_with_losses() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if "dropout" not in name}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    return add_auxiliary_losses(model, num_targets=3, intermediate_weight=0.3, distillation=0.5)


def bert() -> PreTrainedModel:
    """A model that is handed `num_items_in_batch` and takes no notice of it."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if "dropout" not in name}
    sizes["num_labels"] = 256
    dropouts: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForTokenClassification(BertConfig(vocab_size=256, **sizes, **dropouts))


def run(case: str, text: Path, folder: Path) -> dict:
    data = np.frombuffer(text.read_bytes(), np.uint8)
    splits = {"train": Split("train", data[:10_000]), "validation": Split("validation", data[10_000:10_600])}
    num_processes = int(os.environ["WORLD_SIZE"])
    linear_cross_entropy.MIN_VOCABULARY = 1 if case in IN_ONE_PASS else 4096

    def make():
        settings: dict[str, Any] = {"output_dir": str(folder / case), "per_device_eval_batch_size": 4}
        return tiny_trainer(splits=splits, **(settings | case_settings(case, num_processes)))

    trainer = make()
    trainer.train_dataset = windows = RecordingWindows(trainer.train_dataset)
    if case == "added":
        trainer.add_loss_term("confidence", lambda outputs, inputs: outputs.logits.amax(-1).mean(), 0.1, "cosine")
    trainer.train()
    metrics = trainer.evaluate()
    logs = loss_logs(trainer)
    # With Transformers 5.17 and Accelerate 1.12, checkpoints do not load on several CPU processes ("cpu:0").
    if case == "saved" and not transformers.__version__.startswith("5.17."):
        resumed = make()
        resumed.train_dataset = again = RecordingWindows(resumed.train_dataset)
        resumed.train(resume_from_checkpoint=str(folder / case / "checkpoint-3"))
        assert loss_logs(resumed) == logs
        assert again.read[-20:] == windows.read[-20:], "other windows after the run was resumed"
    return {
        "logs": logs,
        "metrics": {key: value for key, value in metrics.items() if "loss" in key or key in ("eval_bpc", "eval_bpb")},
        "read": gather_object([windows.read]),
        "processes": trainer.accelerator.num_processes,
        "kind": trainer.accelerator.distributed_type.value,
    }


def use_fsdp_on_cpus() -> None:
    """Accelerate shards models on GPUs only; torch's `fully_shard`, which it calls, does so on CPUs too."""
    initialize = AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = __init__


if __name__ == "__main__":
    use_fsdp_on_cpus()
    text, folder = Path(sys.argv[1]), Path(sys.argv[2])
    terms = EvaluationTerms()
    results: dict[str, Any] = {case: run(case, text, folder) for case in sys.argv[3:]}
    model = CharformerForCausalLM(CharformerConfig(**TINY))
    model.load_state_dict(torch.load(folder / "weights.pt"))
    results["evaluation"] = bits_per_character(model, text.read_bytes()[:700], stride=5, batch_size=3).bpc
    # A process that had no batch has nothing to add, and must not be waited for.
    if torch.distributed.get_rank() == 0:
        terms.add("loss", torch.tensor(2.0), 3)
    assert terms.totals() == {"loss": (6.0, 3)}
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()  # whoever leaves first can take the others down with it
    torch.distributed.destroy_process_group()
    # What `fully_shard` keeps of the group outlives it, and gloo's threads, if they find the interpreter half taken down,
    # abort the process ("terminate called without an active exception"; pytorch/pytorch, issue 190489).
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
