"""Recipes and the command line of `charformer-train`, read into settings."""

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from modeling_charformer import CharformerConfig

from .arguments import (
    CONFIG_TYPES,
    Arguments,
    AuxiliaryLossTrainingArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    check_text,
)
from .checks import check_ranges, check_type, checked_path, shown
from .command_help import CONFIGS, training_help
from .pretrained import check_batches, check_size
from .strict_yaml import MAX_LENGTH, read_yaml
from .terminal import one_line
from .trainer_options import check_best_is_kept, check_optimizer, check_options


USAGE = "charformer-train RECIPE.yaml [--field value ...]"
# What an argument is, by the type that argparse names in its errors.
_ACCEPTED = {
    "int": "a whole number",
    "float": "a number",
    "DebugOption": "'underflow_overflow'",
    "ParallelismConfig": "left out; accelerate's own configuration sets it",
    "dict": "left out, or a mapping in a recipe",
}
# Fields that recipes of earlier versions may hold.
_FORMER_NAMES = {"loss_weights": "term_weights", "max_eval_characters": "max_eval_bytes"}
_PARTS = (ModelArguments, DataArguments, RunArguments, AuxiliaryLossTrainingArguments)


class Parser(HfArgumentParser):
    """Reads the command line of a program. Wrong words raise `ValueError`; a misplaced value, maybe a secret, is not shown."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument --(\w+)(/--[\w-]+)?: ", r"\1: ", message)  # argparse names both spellings
        for kind, accepted in _ACCEPTED.items():
            message = re.sub(rf"^(\w+): invalid {kind} value: (.*)$", rf"\1 is \2; it must be {accepted}", message)
        message = re.sub(
            r"^(\w+): invalid choice: (.*) \(choose from (.*)\)$", r"\1 is \2; it must be one of \3", message
        )
        message = re.sub(
            r"^(\w+): Truthy value expected: got (.*) but expected .*$",
            r"\1 is '\2'; it must be true or false",
            message,
        )
        raise ValueError(one_line(message))

    def known(self) -> set[str]:
        """The names of all fields."""
        return {action.dest for action in self._actions} - {"help"}

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The fields' values, from the command line or else the parser's defaults.

        Raises:
            ValueError: If a word is not an option or its value.
        """
        given = [word.split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        twice = [name for name in given if given.count(name) > 1 and name.strip("_") in self.known()]
        if twice:
            raise ValueError(f"{twice[0].strip('_')} is given twice; give it once")
        namespace, left = self.parse_known_args(list(words))
        for word in left:
            if word.startswith("--"):
                name = word[2:].split("=")[0]
                raise ValueError(f"there is no option --{one_line(name)}{hint(name, self.known(), '--')}")
        if left:
            before = [word.split("=")[0] for word in words[: list(words).index(left[0])] if word.startswith("--")]
            place = f" (after {one_line(before[-1])})" if before else ""
            if left[0].startswith("-") and not left[0][1:2].isdigit():
                raise ValueError(f"a word with one dash is no option{place}; options begin with two, like --max_steps")
            advice = (
                "the recipe stands first" if left[0].endswith((".yaml", ".yml")) else "text with spaces needs quotes"
            )
            raise ValueError(f"a word belongs to no option{place}; {advice}")
        return vars(namespace)


def hint(name: object, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the name that was probably meant."""
    if name in _FORMER_NAMES:
        return f"; its name is {prefix}{_FORMER_NAMES[str(name)]} now"
    close = difflib.get_close_matches(str(name).replace("-", "_"), list(known), n=1)
    return f"; meant {prefix}{close[0]}?" if close else "; --help lists them all"


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The settings of a recipe, overridden by the command line and checked.

    Raises:
        ValueError: If the recipe is not a mapping of known fields, or a value is not accepted.
        FileNotFoundError: If there is no such recipe.
    """
    parser = _parser()
    defaults = vars(parser.parse_args([]))
    words, recipe = list(argv), dict[str, Any]()
    given = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    if words and not words[0].startswith("-"):
        recipe = read_recipe(checked_path("the recipe", words.pop(0)))
        # A text on the command line replaces either of the recipe's.
        if "data_path" in given:
            of_dataset = ("dataset_", "text_column") if "dataset_name" in recipe else ("dataset_",)
            recipe = {name: value for name, value in recipe.items() if not name.startswith(of_dataset)}
        elif "dataset_name" in given:
            recipe.pop("data_path", None)
        parser.set_defaults(**recipe)
    values = parser.parse(words)
    if values["num_targets"] == 1 and "num_targets" in given and "target_weights" not in given:
        values["target_weights"] = None  # the recipe's weights are of targets that there are not
    for kind, its_settings in (("optim", "optim_args"), ("lr_scheduler_type", "lr_scheduler_kwargs")):
        if kind in given and its_settings not in given:
            values[its_settings] = None  # the recipe's are of its own choice
    _check_program(values)
    changed = {name for name, value in values.items() if value != defaults[name]}
    check_options(values, {*recipe, *given}, changed)
    check_ranges({name: value for name, value in values.items() if name not in CONFIG_TYPES})
    model = ModelArguments(**_fields_of(ModelArguments, values))
    _check_model(model)
    data = DataArguments(**_fields_of(DataArguments, values))
    run = RunArguments(**_fields_of(RunArguments, values))
    training = _trainer_settings(values)
    check_optimizer(training)
    check_best_is_kept(training)
    if training.fp16 and training.device.type == "cpu":
        raise ValueError("fp16 is true; on a CPU it would have no effect: leave it out, or give bf16")
    if model.model_name_or_path is None:
        check_batches(model.config_fields(), training)
    # The windows themselves are random; shuffling their numbers would only cost memory.
    training.train_sampling_strategy = "sequential"
    return Arguments(model, data, run, training)


def _trainer_settings(values: dict[str, Any]) -> AuxiliaryLossTrainingArguments:
    try:
        training = AuxiliaryLossTrainingArguments(**_fields_of(AuxiliaryLossTrainingArguments, values))
        _ = training.device
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if values["ddp_backend"] is not None and "process group" in str(error):
            raise ValueError(
                f"ddp_backend is {shown('', values['ddp_backend'])}; it must be left out: this is a single process"
            ) from error
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"the Trainer does not accept its settings: {one_line(error)}") from error
    return training


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe, each known and of its type.

    A name like `quickstart.yaml` or `training/configs/quickstart.yaml`, where there is no such file, is that of a recipe
    which comes with the package.

    Raises:
        ValueError: Names file, field, value and what is accepted.
        FileNotFoundError: If there is no such file.
    """
    name = one_line(path)
    if not path.exists() and path.parent in (Path(), Path("training/configs")) and (CONFIGS / path.name).is_file():
        path = CONFIGS / path.name
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{name} is not a recipe, but a folder, a device or a pipe; give a file of 'field: value' lines"
        )
    if not path.is_file():
        own = sorted(file.name for file in CONFIGS.glob("*.yaml"))
        close = difflib.get_close_matches(path.name, own, n=1)
        meant = f"meant {close[0]}? Those" if close else "those"
        raise FileNotFoundError(f"there is no recipe {name!r}; {meant} of this project are {', '.join(own)}")
    if path.stat().st_size > 4 * MAX_LENGTH:
        raise ValueError(f"{name} has {path.stat().st_size:,} bytes; a recipe has {MAX_LENGTH:,} characters or fewer")
    try:
        recipe = read_yaml(path.read_text(encoding="utf-8-sig"), name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a recipe: it is not text in UTF-8 (byte {error.start})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{name} must hold 'field: value' lines, like the recipes in training/configs")
    hints = field_types()
    for field_name, value in recipe.items():
        if field_name not in hints:
            raise ValueError(f"{name}: there is no field {shown('', field_name)}{hint(field_name, hints)}")
        try:
            check_type(field_name, value, hints[field_name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        recipe[field_name] = _for_parser(field_name, value)
    return recipe


@cache
def field_types() -> dict[str, Any]:
    """The type of each field of a recipe, by its name."""
    hints: dict[str, Any] = {}
    for part in _PARTS:
        hints |= {name: kind for name, kind in get_type_hints(part).items() if not name.startswith("_")}
    known = _parser().known()
    return {name: kind for name, kind in (hints | CONFIG_TYPES).items() if name in known}


def _for_parser(name: str, value: Any) -> Any:
    """A recipe's value in the form of the command line, where `None` means that a field is left out."""
    if name not in CONFIG_TYPES or value is not None:
        return value
    if str in get_args(CONFIG_TYPES[name]):
        return "none"
    if getattr(CharformerConfig, name, None) is not None:
        raise ValueError(f"{name} is null; give a value, or leave it out for {getattr(CharformerConfig, name)!r}")
    return None


def _parser() -> Parser:
    parser = Parser(
        _PARTS,  # type: ignore[arg-type]  # declared for one class, but takes several
        prog="charformer-train",
        usage=USAGE,
        allow_abbrev=False,  # a misspelt field must not be taken for the beginning of another
    )
    parser.set_defaults(do_train=True, do_eval=True)
    for action in parser._actions:
        if action.dest == "include_num_input_tokens_seen":  # true, false or a word
            action.type = lambda word: word if word in ("all", "non_padding") else string_to_bool(word)
    parser.format_help = lambda: training_help(parser.usage or "", _PARTS)  # type: ignore[method-assign]  # argparse groups no fields as we do
    return parser


def _fields_of(part: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name, item in part.__dataclass_fields__.items() if item.init}


def _check_program(values: dict[str, Any]) -> None:
    """Refuse what the Trainer accepts, but this program cannot use."""
    if not values["output_dir"] or not values["output_dir"].strip():
        raise ValueError("output_dir is missing; give the folder for the trained model")
    checked_path("output_dir", values["output_dir"])
    check_text("output_dir", values["output_dir"])  # the model card shows it
    if values["max_steps"] <= 0:
        raise ValueError(
            f"max_steps is {values['max_steps']}; give the number of optimizer steps: windows are drawn at random, so"
            " there are no epochs to count"
        )
    folder = Path(values["output_dir"])
    try:
        folder.resolve().exists()
    except (OSError, RuntimeError):
        raise ValueError(
            f"output_dir is {shown('', str(folder))}, a link that leads to itself; give a folder"
        ) from None
    if folder.exists() and not folder.is_dir():
        kind = "a file" if folder.is_file() else "a device or a pipe"
        raise ValueError(f"output_dir is {shown('', str(folder))}, {kind}; give a folder")
    if values["ignore_data_skip"]:
        raise ValueError("ignore_data_skip is true; it must be false: a resumed run would see its first windows again")
    if values["train_sampling_strategy"] not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy is {shown('', values['train_sampling_strategy'])}; leave it out: windows are drawn at"
            " random, and all have one length"
        )
    if values["dataloader_persistent_workers"] and not values["dataloader_num_workers"]:
        raise ValueError("dataloader_persistent_workers is true; it needs dataloader_num_workers of 1 or more")
    if values["dataloader_drop_last"]:
        raise ValueError(
            "dataloader_drop_last is true; it must be false: the evaluation would leave out a part of the text"
        )
    if values["label_names"] not in (None, ["labels"]):
        raise ValueError(
            f"label_names is {shown('', values['label_names'])}; it must be left out: windows have 'labels'"
        )


def _check_model(model: ModelArguments) -> None:
    if model.model_name_or_path is not None:
        return  # the other fields are those of the trained model
    fields = model.config_fields()
    check_size(fields)
    try:
        config = CharformerConfig(**fields)
    except (StrictDataclassError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(one_line(error.__cause__ or error)) from error
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} is {value}; it must be null or from 0 to below vocab_size, {config.vocab_size}"
                )
    terms = config.language_model_losses().terms
    if not any(term.weight for term in terms):
        raise ValueError(
            f"the weights of all loss terms are 0 ({', '.join(term.name for term in terms)}): give one above 0"
        )
