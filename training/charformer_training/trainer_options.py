"""Checks of the Trainer's options that Transformers, Accelerate or torch refuse late, without the field's name, or ignore."""

import copy
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from .checks import check_type, shown
from .terminal import one_line


_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_BEST = re.compile(
    r"(eval_)?(loss|bpc|bpb|loss_next_char|loss_last_position|loss_target_\d+|loss_layer_\d+(_target_\d+)?)"
)
_MAY_BE_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
_CHECKPOINTING = {
    "use_reentrant": bool,
    "preserve_rng_state": bool,
    "early_stop": bool,
    "debug": bool,
    "determinism_check": str,
}
_WITH_ADAM = re.compile(r"adam|adema|lion")  # these read adam_beta1 and adam_beta2
_WITH_TARGET_MODULES = re.compile(r"galore|apollo")
_OF_METRICS = "it is for metrics of your own, which only a Trainer in Python can be given"
_OF_HALF_EVALUATION = "evaluations during training would ignore it (charformer-evaluate has --dtype)"
# Fields that would change nothing here, and why. Only their defaults are accepted.
_WITHOUT_USE = {
    "batch_eval_metrics": _OF_METRICS,
    "bf16_full_eval": _OF_HALF_EVALUATION,
    "do_predict": "charformer-evaluate measures a text",
    "eval_accumulation_steps": _OF_METRICS,
    "eval_do_concat_batches": _OF_METRICS,
    "eval_use_gather_object": _OF_METRICS,
    "fp16_full_eval": _OF_HALF_EVALUATION,
    "include_for_metrics": _OF_METRICS,
    "length_column_name": "all windows have one length",
    "num_train_epochs": "windows are drawn at random for max_steps, so there are no epochs",
}
_ALWAYS_ON = {
    "do_train": "charformer-train trains; charformer-evaluate measures a trained model",
    "do_eval": "a run ends with an evaluation; eval_strategy 'no' leaves out those before",
}
# Fields that have an effect only with another field. They are accepted if that field is given, like
# eval_strategy: 'no'.
_NEEDED = {
    "eval_strategy": (" 'steps'", ("eval_delay", "eval_steps", "metric_for_best_model")),
    "push_to_hub": (" true", ("hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy")),
    "report_to": (" trackio", ("project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id")),
    "dataset_name": ("", ("dataset_config", "dataset_split", "dataset_streaming")),
}


def check_options(values: dict[str, Any], given: Collection[str], changed: Collection[str]) -> None:
    """Refuse options before anything is read.

    Args:
        values: All fields of a run by their names.
        given: The names of the fields that the recipe or the command line gives.
        changed: The names of the fields whose value is not the default.

    Raises:
        ValueError: Names the field, the value and what is accepted.
    """
    _check_mappings(values)
    _check_words(values)
    _check_reports(values)
    _check_best_model(values)
    _check_compilation(values)
    _check_without_effect(values)
    _check_use(values, changed)
    _check_needed(values, given, changed)


def _check_use(values: dict[str, Any], changed: Collection[str]) -> None:
    for name, why in _ALWAYS_ON.items():
        if not values[name]:
            raise ValueError(f"{name} is false; it must be true or left out: {why}")
    for name, why in _WITHOUT_USE.items():
        if name in changed:
            raise ValueError(f"{name} is {_in_words(name, values[name])}; it must be left out: {why}")
    for name in ("eval_strategy", "logging_strategy", "save_strategy"):
        if values[name] == "epoch":
            raise ValueError(
                f"{name} is 'epoch'; it must be 'steps' or 'no': windows are drawn at random, so there are no epochs"
            )


def _check_needed(values: dict[str, Any], given: Collection[str], changed: Collection[str]) -> None:
    for needed, (state, names) in _NEEDED.items():
        for name in names if needed not in given else ():
            if name in changed:
                value = _in_words(name, values[name])
                raise ValueError(f"{name} is {value}; it has an effect only with {needed}{state}")


def _in_words(name: str, value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else shown(name, value)


def _check_mappings(values: dict[str, Any]) -> None:
    for name, kind in get_type_hints(TrainingArguments).items():
        value = values.get(name)
        if dict not in {get_origin(member) or member for member in get_args(kind)} or not value:
            continue
        if isinstance(value, str) and not value.lstrip().startswith("{") and name in _MAY_BE_FILES:
            if not Path(value).is_file():
                raise ValueError(f"{name} is {shown(name, value)}; it must be a mapping in JSON, or a file of one")
            content = Path(value).read_text(encoding="utf-8", errors="replace")
        else:
            content = json.dumps(value) if isinstance(value, dict) else str(value)
        try:
            mapping = json.loads(content)
        except (RecursionError, ValueError):
            mapping = None
        if not isinstance(mapping, dict):
            raise ValueError(f"{name} is {shown(name, value)}; it must be a mapping in JSON")
        _check_entries(name, mapping)


def _check_entries(name: str, mapping: dict[str, Any]) -> None:
    hints: dict[str, Any] | None = None
    if name == "accelerator_config":
        hints = get_type_hints(AcceleratorConfig)
    elif name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        hints = _CHECKPOINTING
    elif name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("deepspeed is given; the package deepspeed is not installed here")
    for key, value in mapping.items() if hints is not None else ():
        if key not in (hints or {}):
            raise ValueError(f"{name} has no entry {shown('', key)}; it takes {', '.join(sorted(hints or {}))}")
        check_type(f"{name}: {key}", value, (hints or {})[key])
        if key == "gradient_accumulation_kwargs" and "num_steps" in (value or {}):
            raise ValueError("accelerator_config sets num_steps; give gradient_accumulation_steps")


def _check_words(values: dict[str, Any]) -> None:
    accepted: dict[str, Any] = dict.fromkeys(("log_level", "log_level_replica"), list(trainer_log_levels))
    accepted["debug"] = [option.value for option in DebugOption if option is not DebugOption.TPU_METRICS_DEBUG]
    accepted["fsdp"] = [option.value for option in FSDPOption] + ["true", "false"]
    accepted["include_num_input_tokens_seen"] = ["all", "non_padding", "no"]
    for name, choices in accepted.items():
        value = values[name]
        words = value if isinstance(value, list) else value.split() if isinstance(value, str) else []
        for word in words:
            word = word.value if isinstance(word, DebugOption) else word
            if str(word).lower() not in choices:
                raise ValueError(f"{name} is {shown(name, word)}; it must be one of {choices}")


def _check_reports(values: dict[str, Any]) -> None:
    names = values["report_to"] if isinstance(values["report_to"], list) else [values["report_to"]]
    for name in names:
        if name in ("none", "all") and len(names) > 1:
            raise ValueError(f"report_to is {shown('', names)}; {name!r} must stand alone")
        if name in (None, "none", "all"):
            continue
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ValueError(f"report_to is {shown('', name)}; {one_line(error)}") from None
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to is {shown('', name)}, which is not installed here")


def _check_best_model(values: dict[str, Any]) -> None:
    metric, evaluates = values["metric_for_best_model"], values["eval_strategy"] != "no"
    if values["load_best_model_at_end"] and (not evaluates or values["save_strategy"] == "no"):
        raise ValueError(
            "load_best_model_at_end is true; it needs eval_strategy 'steps', and save_strategy 'steps' or 'best'"
        )
    if metric is not None and not _BEST.fullmatch(metric):
        raise ValueError(
            f"metric_for_best_model is {shown('', metric)}; it must be one of eval_loss, eval_bpc, eval_bpb,"
            " eval_loss_next_char, eval_loss_last_position, and terms like eval_loss_target_2 and eval_loss_layer_1"
        )
    if metric is not None and values["greater_is_better"]:
        raise ValueError(f"greater_is_better is true; it must be left out or false: lower {metric} is better")
    if values["save_strategy"] == "best" and (metric is None or not evaluates):
        missing = "metric_for_best_model" if metric is None else "eval_strategy 'steps'"
        raise ValueError(f"save_strategy is 'best'; it needs {missing}")


def _check_compilation(values: dict[str, Any]) -> None:
    backend, mode = values["torch_compile_backend"], values["torch_compile_mode"]
    if mode not in (None, *_COMPILE_MODES):
        raise ValueError(f"torch_compile_mode is {shown('', mode)}; it must be one of {list(_COMPILE_MODES)}")
    if backend is not None and backend not in (known := _compile_backends()):
        raise ValueError(f"torch_compile_backend is {shown('', backend)}; it must be one of {known}")
    if mode not in (None, "default") and backend not in (None, "inductor"):
        raise ValueError(f"torch_compile_mode is {mode!r}; only torch_compile_backend 'inductor' has modes")


def _compile_backends() -> list[str]:
    from accelerate.utils import DynamoBackend  # what the Trainer hands the name to

    usable: Callable[..., list[str]] = torch.compiler.list_backends
    installed = {"tvm": importlib.util.find_spec("tvm") is not None}
    names = {backend.value.lower() for backend in DynamoBackend}
    return sorted(name for name in names & set(usable(exclude_tags=())) if installed.get(name, True))


def _check_without_effect(values: dict[str, Any]) -> None:
    """Refuse what would be ignored without a word, or fails at the first batch."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        both = values.get("activation_checkpointing") or values.get("gradient_checkpointing")
        if values.get(f"{name}_kwargs") and not both:
            raise ValueError(f"{name}_kwargs is given; it needs {name}")
    if values["fsdp_config"] and not values["fsdp"]:
        raise ValueError("fsdp_config is given; it needs fsdp")
    if values["dataloader_multiprocessing_context"] and not values["dataloader_num_workers"]:
        raise ValueError("dataloader_multiprocessing_context is given; it needs dataloader_num_workers of 1 or more")
    if values["use_liger_kernel"] or values["liger_kernel_config"]:
        name = "use_liger_kernel" if values["use_liger_kernel"] else "liger_kernel_config"
        raise ValueError(f"{name} is given; it must be left out: Liger has no kernels for this model")
    optim = str(OptimizerNames(values["optim"]).value)
    if values["optim_target_modules"] and not _WITH_TARGET_MODULES.search(optim):
        raise ValueError(f"optim_target_modules is given; optim {optim!r} takes none")
    if not _WITH_ADAM.search(optim):
        for item in fields(TrainingArguments):
            if item.name.startswith("adam_") and values[item.name] not in (item.default, MISSING):
                raise ValueError(f"{item.name} is {shown('', values[item.name])}; optim {optim!r} does not use it")


def check_best_is_kept(training: TrainingArguments) -> None:
    """Refuse intervals of evaluation and saving with which the best model would not be found, or not be saved.

    Raises:
        ValueError: Names the fields, the values and what is accepted.
    """
    best = training.load_best_model_at_end or training.save_strategy == "best"
    if not best or training.eval_strategy == "no":
        return
    every = _in_steps(training.eval_steps, training.max_steps)
    first = every * max(1, math.ceil(training.eval_delay / every))
    field = "load_best_model_at_end is true" if training.load_best_model_at_end else "save_strategy is 'best'"
    if first > training.max_steps:
        raise ValueError(
            f"{field}; the first evaluation would be at step {first} (eval_steps {training.eval_steps:g}, eval_delay"
            f" {training.eval_delay:g}), and max_steps={training.max_steps} ends before it"
        )
    if training.save_strategy == "steps" and _in_steps(training.save_steps, training.max_steps) != every:
        raise ValueError(
            f"{field} and save_steps is {training.save_steps:g}; it must be eval_steps, {training.eval_steps:g}: otherwise"
            " the best model may be one that was not saved"
        )


def _in_steps(value: float | None, max_steps: int) -> int:
    """A number of steps that may be given as a share of all steps."""
    return math.ceil(max_steps * value) if value and value < 1 else int(value or 1)


def check_optimizer(training: TrainingArguments) -> None:
    """Refuse what fails at the first step, when an earlier model may have been deleted already.

    Raises:
        ValueError: Names the field, the value and what is accepted.
    """
    check_optimizer_arguments(training)
    optim = OptimizerNames(training.optim).value
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(training)
    except (AttributeError, ImportError, ValueError) as error:
        if re.search(r"pass a `?model", str(error)):
            return  # there is none yet
        raise ValueError(f"optim is {optim!r}; {one_line(error)}") from error
    weight = torch.nn.Parameter(torch.zeros(1))
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        try:
            kind([weight], **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"optim is {optim!r}, which does not accept its settings"
                f" (optim_args is {shown('', training.optim_args)}): {one_line(error)}"
            ) from error
    _check_schedule(training, weight)


def _check_schedule(training: TrainingArguments, weight: torch.nn.Parameter) -> None:
    kwargs: Any = training.lr_scheduler_kwargs or {}  # a mapping by now
    kind = SchedulerType(training.lr_scheduler_type)
    warmup = training.get_warmup_steps(training.max_steps)
    if warmup > training.max_steps:
        raise ValueError(
            f"warmup_steps is {warmup}, and max_steps={training.max_steps} ends before the learning rate is reached; give"
            f" {training.max_steps} or fewer, or a share of all steps below 1"
        )
    make: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
    if warmup and "num_warmup_steps" not in inspect.signature(make).parameters:
        raise ValueError(
            f"lr_scheduler_type is {kind.value!r}, which has no warm-up; warmup_steps is {warmup}, it must be 0"
        )
    optimizer = torch.optim.SGD([weight], training.learning_rate)
    try:
        get_scheduler(kind, optimizer, warmup, training.max_steps, kwargs)
        if kind == SchedulerType.WARMUP_STABLE_DECAY and warmup + kwargs["num_decay_steps"] > training.max_steps:
            raise ValueError(
                f"warmup_steps and num_decay_steps come to {warmup + kwargs['num_decay_steps']}, more than"
                f" max_steps={training.max_steps}"
            )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs is {shown('', training.lr_scheduler_kwargs)}, which lr_scheduler_type {kind.value!r} does not"
            f" accept: {one_line(error)}"
        ) from error


def check_optimizer_arguments(training: TrainingArguments) -> None:
    """Refuse names in `optim_args` that the optimizer does not read, since Transformers ignores them.

    Raises:
        ValueError: Names the field, the value and what is accepted.
    """
    given = training.optim_args
    if not given:
        return
    pairs = [pair.split("=") for pair in given.replace(" ", "").split(",")]
    names = [pair[0] for pair in pairs]
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or len(set(names)) < len(names):
        raise ValueError(
            f"optim_args is {shown('', given)}; it must be name=value pairs with commas between, each name once"
        )
    optim = OptimizerNames(training.optim).value
    for name in names:
        if name == "weight_decay":
            raise ValueError("optim_args names weight_decay, which the field weight_decay overrides; give that field")
        if _reads(training, name) is False:
            kind, _ = Trainer.get_optimizer_cls_and_kwargs(_with_arguments(training, None))
            offered = [word for word in inspect.signature(kind).parameters if word != "weight_decay"]
            taken = sorted(word for word in offered if _reads(training, word))
            adam = (
                "; adam_beta1, adam_beta2 and adam_epsilon are fields of their own" if _WITH_ADAM.search(optim) else ""
            )
            raise ValueError(
                f"optim_args names {shown('', name)}, which optim {optim!r} does not take; it takes"
                f" {', '.join(taken) or 'none'}{adam}"
            )


def _reads(training: TrainingArguments, name: str) -> bool | None:
    """Whether the optimizer's settings depend on an argument of this name; `None` if it cannot be known here."""
    try:
        _, without = Trainer.get_optimizer_cls_and_kwargs(_with_arguments(training, None))
    except (AttributeError, ImportError, ValueError):
        return None  # it needs a package or a model
    for probe in ("true", "?"):
        try:
            _, found = Trainer.get_optimizer_cls_and_kwargs(_with_arguments(training, f"{name}={probe}"))
        except (AttributeError, ValueError):
            return True  # it was read as a number or a type
        if found != without:
            return True
    return False


def _with_arguments(training: TrainingArguments, optim_args: str | None) -> Any:
    changed = copy.copy(training)
    changed.optim_args = optim_args
    return changed
