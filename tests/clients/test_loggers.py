"""The terms of the loss arrive in the logger that a run reports to, in groups, in evaluations of several sets too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charformer_training import ConsecutiveWindows, Split
from tests.helpers import tiny_trainer


pytestmark = pytest.mark.filterwarnings("ignore")
TERMS = {
    "train/loss",
    "train/learning_rate",
    "loss_terms/next_char",
    "loss_terms/target_2",
    "loss_terms/layer_2",
    "loss_weights/target_2",
    "eval/short_loss",
    "eval/long_bpc",
    "eval_short_loss_terms/next_char",
    "eval_short_loss_terms/layer_2",
    "eval_long_loss_terms/target_2",
    "eval_long_loss_accuracies/target_2",
}


@pytest.fixture
def splits() -> dict[str, Split]:
    data = np.frombuffer(b"round and round the rugged rock " * 40, np.uint8)
    return {name: Split(name, data) for name in ("train", "validation", "test")}


def train(folder: Path, splits: dict[str, Split], logger: str) -> None:
    changes: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_head_accuracy": True}
    trainer = tiny_trainer(str(folder), splits, report_to=logger, run_name="run", **changes)
    split = splits["validation"]
    trainer.eval_dataset = {
        "short": ConsecutiveWindows(Split("short", split.data[:100]), 24),
        "long": ConsecutiveWindows(split, 24),
    }
    trainer.train()


@pytest.mark.slow
def test_tensorboard(splits, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(tmp_path / "run", splits, "tensorboard")
    found = events.EventAccumulator(str(tmp_path / "events")).Reload().Tags()["scalars"]
    assert TERMS <= set(found)


def test_wandb_offline(splits, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "run", splits, "wandb")
    found = dict(wandb.run.summary)
    wandb.finish()
    assert TERMS <= found.keys()


def test_mlflow_in_a_file(splits, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(tmp_path / "run", splits, "mlflow")
    client = mlflow.MlflowClient(f"file://{tmp_path / 'mlruns'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    of_mlflow = {name.replace("train/", "").replace("eval/", "eval_") for name in TERMS}  # it has no groups of its own
    assert run.data.metrics.keys() >= of_mlflow


def test_trackio_in_a_folder(splits, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    monkeypatch.setenv("TRACKIO_PROJECT", "terms")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    train(tmp_path / "run", splits, "trackio")
    [project] = storage.get_projects()
    found = set().union(*storage.get_logs(project, "run"))
    assert TERMS <= found
