"""A run's folder: whether a run begins, resumes or is complete there, and the record of its settings."""

import enum
import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from .arguments import Arguments, RunArguments
from .files import append_line, remove, remove_scratch, whole_file
from .locks import LOCK_FILE
from .manifest import inspect_result, newest_good
from .plots import PICTURE
from .pushing import CARD_FILE, COMMAND, RECIPE, RESULT
from .strict_yaml import write_yaml


logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
METRICS = "metrics.json"
# Files that a run writes beside the model.
RUN_FILES = (SAMPLES, RECIPE, COMMAND, RESULT, METRICS, PICTURE, LOCK_FILE, CARD_FILE)
# Files of a trained model in a run's folder.
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
# Fields that a recorded recipe leaves out: secrets, and how the command was to begin or resume.
NOT_IN_RECIPES = {
    "hub_token",
    "resume",
    "accept_changes",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "local_rank",
}


@dataclass(frozen=True)
class Start:
    """How a run begins: anew, from a checkpoint, or with a model that is already trained. `replaced` is deleted first."""

    resume_from: str | None = None
    trained: bool = False
    complete: bool = False
    replaced: tuple[Path, ...] = ()
    settings: dict[str, Any] | None = None


def plan_start(arguments: Arguments) -> Start:
    """Decide how to begin. All processes call this together, while they hold the folder's lock.

    Raises:
        FileExistsError: If the folder holds a model or checkpoints that the run should not continue.
        ValueError: If the settings contradict each other.
    """
    answer: list[Any] = [None, None]
    if arguments.training.process_index == 0:
        try:
            answer[0] = _plan(arguments)
        except (OSError, ValueError) as error:
            answer[1] = error
    if arguments.training.world_size > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    start: Start = answer[0]
    return start


def _plan(arguments: Arguments) -> Start:
    run, training = arguments.run, arguments.training
    folder = Path(str(training.output_dir))
    _check_choices(run, training.resume_from_checkpoint, training.save_only_model)
    remove_scratch(folder)
    held = [path for name in MODEL_FILES if (path := folder / name).exists()] + sorted(folder.glob("checkpoint-*"))
    if run.overwrite_output_dir:
        return Start(replaced=(*held, *(folder / name for name in (SAMPLES, RECIPE, COMMAND, RESULT))))
    if run.resume == "auto":
        return _plan_to_go_on(folder, held, max(1, training.world_size))
    elsewhere = run.resume == "never" or Path(run.resume).resolve().parent != folder.resolve()
    if held and elsewhere:
        raise FileExistsError(
            f"output_dir {folder} already holds a model ({held[0].name}). Resume it with --resume auto, give another"
            " output_dir, or replace it with --overwrite_output_dir"
        )
    return Start(resume_from=None if run.resume == "never" else run.resume)


def _check_choices(run: RunArguments, resume_from_checkpoint: str | None, save_only_model: bool) -> None:
    if resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint is {resume_from_checkpoint!r}; give --resume auto for the newest good checkpoint of"
            " output_dir, or --resume with a checkpoint's folder"
        )
    if run.resume == "":
        raise ValueError("resume is ''; it must be 'auto', 'never', or a checkpoint's folder")
    if run.resume not in ("auto", "never") and not Path(run.resume).is_dir():
        raise ValueError(
            f"resume is {run.resume!r}; it must be 'auto', 'never', or a checkpoint's folder, and there is no such folder"
        )
    if run.resume != "never" and run.overwrite_output_dir:
        raise ValueError(f"resume is {run.resume!r} and overwrite_output_dir is on; give one of the two")
    if run.resume == "auto" and save_only_model:
        raise ValueError(
            "resume is 'auto' and save_only_model is on: checkpoints that hold only the model cannot be resumed; leave"
            " out one of the two"
        )


def _plan_to_go_on(folder: Path, held: Sequence[Path], processes: int) -> Start:
    result = inspect_result(folder, RESULT)
    if result is not None and not result.faults:
        evaluated = result.complete and (folder / METRICS).exists()
        return Start(trained=True, complete=evaluated, settings=dict(result.settings or {}))
    for fault in result.faults if result is not None else ():
        logger.warning("The result in %s is not good: %s", folder, fault)
    good, bad = newest_good(folder, processes)
    for found in bad:
        logger.warning("%s is not good: %s", found.path, "; ".join(found.faults))
    if good is not None:
        return Start(resume_from=str(good.path))
    files = [path for path in held if path.is_file()]
    if files and result is None and not (folder / COMMAND).exists():
        raise FileExistsError(
            f"output_dir {folder} holds a model ({files[0].name}) that is not of this run, and no checkpoint to go on"
            " from. Give another output_dir, or replace it with --overwrite_output_dir"
        )
    if bad:
        logger.warning("There is no good checkpoint in %s: the run begins anew", folder)
    return Start()


def record_run(arguments: Arguments, command: Sequence[str], start: Start) -> None:
    """Write recipe and command line into the run's folder, and delete the files that the run replaces."""
    folder = Path(str(arguments.training.output_dir))
    for path in start.replaced:
        remove(path)
    with whole_file(folder / RECIPE) as file:
        file.write(_as_yaml(effective_recipe(arguments)).encode())
    now = datetime.now().astimezone().isoformat("T", "seconds")
    append_line(folder / COMMAND, f"{now} {shlex.join(without_secrets(command))}")


def effective_recipe(arguments: Arguments) -> dict[str, Any]:
    """All settings of a run as a recipe: with defaults, without secrets."""
    recipe: dict[str, Any] = {}
    # A mapping that was given on the command line is still text in the settings.
    parsed = {name: value for name, value in arguments.model.config_fields().items() if isinstance(value, dict)}
    for part in arguments:
        for item in fields(part):
            value = _as_recipe_value(parsed.get(item.name, getattr(part, item.name)))
            if item.init and item.name not in NOT_IN_RECIPES and value is not None:
                recipe[item.name] = value
    if not arguments.training.report_to:
        recipe["report_to"] = "none"
    return recipe


def _as_recipe_value(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value) if value != type(value)() else None
    if isinstance(value, dict):
        return {key: _as_recipe_value(part) for key, part in value.items()} or None
    if isinstance(value, list | tuple):
        return [_as_recipe_value(part) for part in value] or None
    return value


def _as_yaml(recipe: dict[str, Any]) -> str:
    head = "# All settings of this run, defaults included. To run it again: charformer-train THIS_FILE --output_dir OTHER\n"
    return head + write_yaml(recipe)


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line with its tokens replaced by ***, even if the option's name is misspelt."""
    words, hide = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and "tok" in name.lower()
        words.append("***" if hide else f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    return words
