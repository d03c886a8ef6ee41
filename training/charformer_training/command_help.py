"""The text of `--help` and of a call without arguments: examples first, then every field in its group."""

import re
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from .shipped import shipped_path


CONFIGS = shipped_path("configs")
_EXAMPLE = """\
Train a Charformer from a recipe. Fields on the command line override the recipe's.

  charformer-train training/configs/quickstart.yaml
  charformer-train training/configs/quickstart.yaml --data_path my_text.txt --output_dir runs/mine --max_steps 2000
  charformer-train training/configs/quickstart.yaml --resume auto

A GPU is used if there is one; --use_cpu runs without it. TRANSFORMERS_VERBOSITY=debug shows tracebacks."""
_EVALUATION = """\
Measure a trained model on a text, in bits per character and per byte. MODEL is a folder or a Hub id. TEXT is a file, a folder,
or python-stdlib for the sources of Python's standard library.

  charformer-evaluate runs/quickstart my_text.txt
  charformer-evaluate runs/quickstart python-stdlib --stride 64 16 4 --max_bytes 20000

A stride of 1 is the papers' protocol: the lowest figure, and the slowest. Several strides give a table to compare."""
_LOSSES = ("target", "intermediate", "position_", "loss_", "term_", "num_targets", "classifier", "distillation")
# What most runs set; the Trainer has a hundred more fields.
_COMMON = (
    "output_dir",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "muon",
    "seed",
    "bf16",
    "use_cpu",
    "torch_compile",
    "logging_steps",
    "log_loss_terms",
    "log_term_gradients",
    "eval_head_accuracy",
    "eval_loss_terms",
    "gradient_aggregator",
    "log_group_prefix",
    "report_to",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "metric_for_best_model",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
)


# Where the Trainer's words do not fit this program, in which max_steps is required.
_HELP = {
    "output_dir": "Folder for the trained model, its checkpoints and results; required",
    "max_steps": "Number of optimizer steps to train for; required",
    "resume_from_checkpoint": "Not accepted: give --resume",
    "num_train_epochs": "Not accepted: windows are drawn at random for max_steps",
    "do_train": "Always on",
    "do_eval": "Always on: a run ends with an evaluation, and --eval_strategy steps adds others",
    "do_predict": "Not accepted: charformer-evaluate measures a text",
    "gradient_accumulation_steps": "Number of batches whose gradients are added up for one optimizer step",
}


def training_help(usage: str, parts: Iterable[type]) -> str:
    """The help of `charformer-train`, for the settings classes of model, data, run and Trainer."""
    model, data, run, trainer = ({item.name: item for item in fields(part)} for part in parts)
    losses = {name: item for name, item in model.items() if name.startswith(_LOSSES) and name != "intermediate_size"}
    groups = {
        "Data": data,
        "Model": {name: item for name, item in model.items() if name not in losses},
        "Losses": losses,
        "Training": {name: trainer[name] for name in _COMMON if name in trainer},
        "Run": run,
        "Training: all other fields of transformers.TrainingArguments": {
            name: item for name, item in trainer.items() if name not in _COMMON and item.init
        },
    }
    return "\n\n".join([f"usage: {usage}", _EXAMPLE, *_recipes(), *map(_group, groups, groups.values())]) + "\n"


def evaluation_help(usage: str, part: type) -> str:
    """The help of `charformer-evaluate`."""
    items = {item.name: item for item in fields(part)}
    return "\n\n".join([f"usage: {usage}", _EVALUATION, _group("Options", items)]) + "\n"


def how_to_begin_evaluating(usage: str) -> str:
    """What `charformer-evaluate` without arguments says."""
    return "\n\n".join([f"usage: {usage}", _EVALUATION, "--help lists all options."])


def how_to_begin(usage: str) -> str:
    """What a call without arguments says."""
    return "\n\n".join([f"usage: {usage}", _EXAMPLE, *_recipes(), "--help lists all fields."])


def _recipes() -> list[str]:
    paths = sorted(CONFIGS.glob("*.yaml"))
    titles = map(_title, paths)
    lines = [f"  {path.name:<20} {textwrap.shorten(title, 90)}" for path, title in zip(paths, titles, strict=True)]
    return ["\n".join(["Recipes in training/configs:", *lines])]


def _title(path: Path) -> str:
    """The first sentence of a recipe's comment, without what is in parentheses."""
    text = " ".join(re.findall(r"^# (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return re.split(r"(?<! al)\.\s|[:;]\s", re.sub(r"\s*\([^)]*\)", "", text))[0].rstrip(".")


def _group(title: str, items: dict[str, "Field[Any]"]) -> str:
    return "\n".join([f"{title}:", *map(_entry, items.values())])


def _entry(item: "Field[Any]") -> str:
    default = "" if item.name in _HELP or item.default in (MISSING, None, -1) else f" [{_plain(item.default)}]"
    text = _HELP.get(item.name) or " ".join(str(item.metadata.get("help") or "").replace("%%", "%").split())
    first = re.split(r"(?<! al)\.\s", text)[0].rstrip(".")
    return f"  --{item.name}{default}\n" + textwrap.fill(first, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _plain(value: Any) -> str:
    return repr(value.value if isinstance(value, Enum) else value)
