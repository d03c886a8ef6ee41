"""Shared by the benchmarks that train by a recipe: the arguments of `charformer-train`, and the Trainer of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed

from charformer_training import AuxiliaryLossTrainer, Split, load_corpus, split_corpus
from charformer_training.arguments import Arguments
from charformer_training.recipes import parse_arguments
from charformer_training.train import build_model, build_trainer
from modeling_charformer import CharformerTokenizer


CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"


def arguments_of(recipe: str, fields: Mapping[str, Any]) -> Arguments:
    """The arguments of `charformer-train` for a recipe of `training/configs/` with other values in place of its own."""
    words = [str(CONFIGS / recipe)]
    for name, value in fields.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    return parse_arguments(words)


def trainer_of(arguments: Arguments) -> tuple[AuxiliaryLossTrainer, dict[str, Split]]:
    """The Trainer of a run, with a new model, and the splits of its text."""
    model_arguments, data, _, training = arguments
    set_seed(training.seed)
    model = build_model(model_arguments)
    splits = split_corpus(load_corpus(data), data.train_share, data.validation_share)
    return build_trainer(arguments, model, CharformerTokenizer.for_model(model.config), splits), splits
