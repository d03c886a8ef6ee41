"""The settings of a run that affect its result. They are saved with each checkpoint, and compared on resuming."""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from .arguments import AuxiliaryLossTrainingArguments, DataArguments, RunArguments
from .models import unwrap_peft
from .terminal import one_line


# Fields of `TrainingArguments` that affect speed, or what is shown, saved or pushed, but not what is learned.
FREE_PREFIXES = (
    "activation_checkpointing",
    "dataloader_in_order",
    "dataloader_multiprocessing",
    "dataloader_num",
    "dataloader_persistent",
    "dataloader_pin",
    "dataloader_prefetch",
    "ddp_",
    "do_",
    "eval_",
    "gradient_checkpointing",
    "hub_",
    "include_",
    "log_",
    "logging_",
    "push_to_hub",
    "save_",
    "torch_compile",
    "torch_empty",
    "trackio_",
)
FREE_FIELDS = {
    "batch_eval_metrics",
    "bf16_full_eval",
    "debug",
    "deepspeed",
    "disable_tqdm",
    "enable_jit_checkpoint",
    "fp16_full_eval",
    "fsdp",
    "fsdp_config",
    "local_rank",
    "output_dir",
    "parallelism_config",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "use_cache",
    "use_cpu",
}
# Fields of a model's configuration that do not affect the result, or that the Trainer sets.
FREE_MODEL_FIELDS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
_WITH_FREE_FIELDS = (AuxiliaryLossTrainingArguments, RunArguments)
# A resumed optimizer takes these from its checkpoint, unless a change was accepted.
OPTIMIZER_FIELDS = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "optim_args",
    "optimizer",
    "warmup_steps",
    "weight_decay",
}


def run_settings(trainer: Trainer, own_optimizer: Any = None) -> dict[str, Any]:
    """All settings that affect the result, by name, in the form that they have after a round trip through JSON.

    They include the number of processes and the data. A dataset is compared by its `fingerprint`, if it has one, or by
    that of Hugging Face datasets.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    settings = {
        "processes": max(1, args.world_size),
        "device": args.device.type,
        "fsdp": trainer.is_fsdp_enabled,
        "deepspeed": trainer.is_deepspeed_enabled,
        "train_data": _fingerprint(trainer.train_dataset),
        "validation_data": _fingerprint(trainer.eval_dataset),
        "test_data": _fingerprint(getattr(trainer, "test_dataset", None)),
        **_argument_settings(args),
        **_model_settings(model),
    }
    if own_optimizer is not None:
        settings["optimizer"] = {"class": type(own_optimizer).__name__, **own_optimizer.defaults}
    normal: dict[str, Any] = json.loads(json.dumps(settings, default=_as_json))
    return normal


def _argument_settings(args: TrainingArguments) -> dict[str, Any]:
    settings = {
        item.name: getattr(args, item.name)
        for item in dataclasses.fields(args)
        if item.init and item.name not in FREE_FIELDS and not item.name.startswith(FREE_PREFIXES)
    }
    if args.max_steps > 0:
        settings.pop("num_train_epochs")
    return settings


def _model_settings(model: nn.Module) -> dict[str, Any]:
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    settings: dict[str, Any] = {"model_class": type(unwrap_peft(model)).__name__, "trained_parameters": trained}
    config = getattr(model, "config", None)
    if config is not None:
        fields = {name: value for name, value in config.to_dict().items() if name not in FREE_MODEL_FIELDS}
        settings |= {"auxiliary_losses": None, **fields}
    adapters = getattr(model, "peft_config", None) or {}
    for name, adapter in adapters.items() if isinstance(adapters, Mapping) else ():
        settings[f"adapter_{name}"] = {
            key: value for key, value in adapter.to_dict().items() if key not in ("inference_mode", "revision")
        }
    return settings


def _fingerprint(dataset: Any) -> Any:
    if isinstance(dataset, Mapping):
        return {name: _fingerprint(part) for name, part in dataset.items()}
    split: Any = dataset if hasattr(dataset, "sha256") else getattr(dataset, "split", None)
    if hasattr(split, "sha256"):
        return f"sha256 {split.sha256}, {len(getattr(dataset, 'data', split.data)):,} bytes"
    return getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))  # an object's address differs between processes


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that both runs have and that differ, as `(saved, now)` by name."""
    common = [name for name in saved if name in now]
    known = [name for name in common if not name.endswith("_data") or None not in (saved[name], now[name])]
    return {name: (saved[name], now[name]) for name in known if saved[name] != now[name]}


def check_same_settings(
    folder: str | os.PathLike[str], saved: Mapping[str, Any], now: Mapping[str, Any], accepted: Collection[str]
) -> set[str]:
    """Check that a run is resumed with the settings it began with. Returns the names of accepted differences.

    Raises:
        ValueError: If a setting differs that is not accepted, or an accepted name is not a setting.
    """
    check_accepted(accepted, {*saved, *now})
    changed = differences(saved, now)
    if changed.keys() & saved.keys() - {"trained_parameters"} and "trained_parameters" not in accepted:
        changed.pop("trained_parameters", None)  # follows from the other changes
    if refused := sorted(changed.keys() - set(accepted)):
        lines = [f"  {name}: {_short(changed[name][0])} there, {_short(changed[name][1])} now" for name in refused]
        raise ValueError(
            f"resume: the run that wrote {folder} had other settings:\n" + "\n".join(lines) + "\nGive the same"
            f" settings, or resume with the new ones by --accept_changes {' '.join(refused)} (from Python,"
            f" accept_changes={refused})"
        )
    return changed.keys() & set(accepted)


def check_accepted(accepted: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are no settings of a run, also when nothing is resumed.

    Raises:
        ValueError: Names them, and those that were meant or all settings.
    """
    unknown = sorted(set(accepted) - set(known))
    of_text = [item.name for item in dataclasses.fields(DataArguments) if item.name in unknown]
    if of_text and "train_data" in known:
        data = ", ".join(name for name in ("train_data", "validation_data", "test_data") if name in known)
        raise ValueError(
            f"accept_changes names {', '.join(of_text)}; a text is compared by its bytes: give those of {data} that differ"
        )
    free = {item.name for part in _WITH_FREE_FIELDS for item in dataclasses.fields(part)} - set(known)
    if found := [name for name in unknown if name in free]:
        raise ValueError(
            f"accept_changes names {', '.join(found)}, which may change freely; leave them out of accept_changes"
        )
    if unknown:
        near = [match for word in unknown for match in difflib.get_close_matches(word, [*known, *free], n=1)]
        close = [f"{name} (it may change freely, without being named)" if name in free else name for name in near]
        hint = f": meant {', '.join(close)}?" if close else f", which are {', '.join(sorted(known))}"
        raise ValueError(f"accept_changes names {one_line(', '.join(unknown))}; it takes settings of a run{hint}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
