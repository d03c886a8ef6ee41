"""Fixtures: tiny models, real-looking text, and no network."""

import os


# Before anything imports torch or huggingface_hub. No test may reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Models this small gain nothing from threads, and lose much where these wait for busy cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
# For the programs that tests start.
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'training'}"

import pytest
import torch
from matplotlib.figure import Figure
from transformers import set_seed

from modeling_charformer import CharformerConfig, CharformerForCausalLM, loss_settings, pace_charformer
from tests.helpers import TINY


# Set by the benchmark that runs tests on a GPU.
DEVICE = os.environ.get("CHARFORMER_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def seed() -> None:
    set_seed(0)


@pytest.fixture(autouse=True)
def schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that a test registers is gone after it."""
    monkeypatch.setattr(loss_settings, "_SCHEDULES", dict(loss_settings._SCHEDULES))


@pytest.fixture
def make_model() -> Callable[..., CharformerForCausalLM]:
    """A tiny model in training mode, the same for the same settings."""

    def make(**changes) -> CharformerForCausalLM:
        set_seed(0)
        return (
            CharformerForCausalLM(CharformerConfig(**(TINY | {"initializer_range": 0.1} | changes))).train().to(DEVICE)
        )

    return make


@pytest.fixture
def make_ids() -> Callable[..., torch.Tensor]:
    def make(batch: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (batch, length), generator=generator, device="cpu").to(DEVICE)

    return make


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What a test draws: each figure as it is when it is saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with structure to learn, beyond ASCII too."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"Zeile {number}: Die Größe von {number * 7 % 13} wächst täglich.\n" for number in range(400)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def drafts_in_every_pass(monkeypatch):
    """How many drafts pay is measured while they run; a test that counts passes must not depend on the clock."""
    confidence = pace_charformer.CONFIDENCE
    monkeypatch.setattr(pace_charformer.Pace, "rests", lambda pace: pace.plain.append(1.0))
    monkeypatch.setattr(pace_charformer.Pace, "thresholds", lambda pace: (confidence, confidence))
