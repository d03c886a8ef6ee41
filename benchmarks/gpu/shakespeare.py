"""Tiny Shakespeare at nanoGPT's GPU setting, by the recipe and the Trainer that users have; without the losses beside it.

nanoGPT reports a validation loss of 1.4697 nats, its best evaluation in 5,000 steps, as ours is.
"""

import tempfile
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.ablation.grids import NONE
from benchmarks.recipe_runs import arguments_of, trainer_of

from .report import Report
from .scale import Scale


NANOGPT = 1.4697


class Curve(TrainerCallback):
    """Records each evaluation as soon as it is done: a run that is cut off leaves its curve."""

    def __init__(self, report: Report):
        self.report, self.begin = report, time.perf_counter()
        self.points: list[list[float]] = []

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        self.points.append([state.global_step, round(time.perf_counter() - self.begin, 1), round(loss, 4)])
        self.report.record("steps, seconds, validation loss", self.points)


def measure(report: Report, scale: Scale) -> None:
    report.measure("run", lambda: train(report, scale, {}))


def measure_without_losses(report: Report, scale: Scale) -> None:
    report.measure("run", lambda: train(report, scale, NONE))


def train(report: Report, scale: Scale, losses: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"data_path": scale.text, "save_strategy": "no", "load_best_model_at_end": False}
    fields |= {"report_to": "none", "disable_tqdm": True, "sample_length": 0, "logging_steps": 500}
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_of(
            "shakespeare-gpu.yaml", fields | losses | scale.shakespeare | {"output_dir": f"{folder}/run"}
        )
        trainer, _ = trainer_of(arguments)
        curve = Curve(report)
        trainer.add_callback(curve)
        begin = time.perf_counter()
        trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    best = min(curve.points, key=lambda point: point[2])
    return {
        "best_validation_loss": best[2],
        "best_step": best[0],
        "final_validation_loss": curve.points[-1][2],
        "nanogpt": NANOGPT,
        "steps": trainer.state.global_step,
        "seconds_with_evaluations": round(time.perf_counter() - begin, 1),
        "inference_parameters": model.without_auxiliary_heads().num_parameters(),
    }
