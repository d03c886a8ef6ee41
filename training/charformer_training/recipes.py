"""Recipes and the command line of `charformer-train`, read into settings."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .arguments import Arguments, AuxiliaryLossTrainingArguments, DataArguments, ModelArguments, RunArguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """A recipe's fields, overridden by those of the command line.

    Raises:
        ValueError: If the recipe is not a mapping of known fields, or a value is not accepted.
        FileNotFoundError: If there is no such recipe.
    """
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, RunArguments, AuxiliaryLossTrainingArguments],  # type: ignore[list-item]  # typed for one class
        prog="charformer-train",
        description="Train a Charformer from a recipe. Fields on the command line override the recipe's.",
        usage="charformer-train RECIPE.yaml [--field value ...]",
        allow_abbrev=False,  # a misspelt field must not pass for the beginning of another
    )
    arguments = list(argv)
    given = {word.split("=")[0] for word in arguments}
    if arguments and not arguments[0].startswith("-"):
        recipe = _read_recipe(Path(arguments.pop(0)), parser)
        for source, other in (("data_path", "dataset_name"), ("dataset_name", "data_path")):
            if f"--{source}" in given:  # replaces the recipe's text, wherever that comes from
                recipe.pop(other, None)
        parser.set_defaults(**recipe)
    model, data, run, training = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if model.num_targets == 1 and "--num_targets" in given and "--target_weights" not in given:
        model.target_weights = None  # the recipe's weights are of targets that are not wanted
    if training.output_dir is None:
        raise ValueError("output_dir is missing; give the folder for the trained model")
    if training.max_steps <= 0:
        raise ValueError(
            f"max_steps is {training.max_steps}; give the number of optimizer steps: windows are drawn at random, so"
            " there are no epochs to count"
        )
    # The windows themselves are random; shuffling their numbers would only cost memory.
    training.train_sampling_strategy = "sequential"
    return Arguments(model, data, run, training)


def _read_recipe(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}; training/configs holds those of this project")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold 'field: value' lines, as the recipes in training/configs do")
    known = {action.dest for action in parser._actions}
    for name in recipe:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; meant {close[0]!r}?" if close else "; charformer-train --help lists them"
            raise ValueError(f"{path}: there is no field {name!r}{hint}")
    if "intermediate_layers" in recipe and recipe["intermediate_layers"] is None:
        recipe["intermediate_layers"] = "none"  # as CharformerConfig means it, not as a field that is left out
    return recipe
