"""Fixtures: small runs of the Trainer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from charformer_training import AuxiliaryLossTrainer, Split
from tests.helpers import tiny_trainer


@pytest.fixture
def corpus(text_file: Path) -> dict[str, Split]:
    data = np.frombuffer(text_file.read_bytes(), np.uint8)
    return {"train": Split("train", data[:10_000]), "validation": Split("validation", data[10_000:10_600])}


@pytest.fixture
def make_trainer(corpus: dict[str, Split], tmp_path: Path) -> Callable[..., AuxiliaryLossTrainer]:
    def make(model: dict | PreTrainedModel | None = None, **changes) -> AuxiliaryLossTrainer:
        return tiny_trainer(**({"output_dir": str(tmp_path / "run"), "splits": corpus, "model": model} | changes))

    return make
