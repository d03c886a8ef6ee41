"""Fixtures: small runs of the Trainer and of charformer-train."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from charformer_training import AuxiliaryLossTrainer, Split
from charformer_training import data as data_module
from tests.helpers import QUICKSTART, SAVING, small_command, tiny_trainer


@pytest.fixture
def corpus(text_file: Path) -> dict[str, Split]:
    data = np.frombuffer(text_file.read_bytes(), np.uint8)
    return {"train": Split("train", data[:10_000]), "validation": Split("validation", data[10_000:10_600])}


@pytest.fixture
def make_trainer(corpus: dict[str, Split], tmp_path: Path) -> Callable[..., AuxiliaryLossTrainer]:
    def make(model: dict | PreTrainedModel | None = None, **changes) -> AuxiliaryLossTrainer:
        return tiny_trainer(**({"output_dir": str(tmp_path / "run"), "splits": corpus, "model": model} | changes))

    return make


@pytest.fixture
def checkpoint(make_trainer: Callable[..., AuxiliaryLossTrainer]) -> Path:
    """Of step 6 of 8, beside that of step 3."""
    trainer = make_trainer(**SAVING)
    trainer.train()
    return Path(str(trainer.args.output_dir)) / "checkpoint-6"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a cache of corpora that is the test's alone."""
    monkeypatch.setattr(data_module, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def command(text_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a small run of the quickstart recipe on the test's own text."""

    def make(recipe: str = QUICKSTART, **changes) -> list[str]:
        return small_command(recipe, **({"data_path": text_file, "output_dir": tmp_path / "run"} | changes))

    return make


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package logs."""
    monkeypatch.setattr(data_module.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog
