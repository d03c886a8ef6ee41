"""One run of one cell, with its learning curve and gradients."""

import json
import math
import tempfile
import time
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from benchmarks import recipe_runs
from charformer_training.arguments import Arguments

from .grids import GRIDS
from .runs import key_of


class Curve(TrainerCallback):
    """Records validation bits per character, seconds of training alone, and each term's gradient on the layers."""

    def __init__(self, batch: dict[str, torch.Tensor], metric: str):
        self.batch, self.metric, self.seconds = batch, metric, 0.0
        self.points: list[list[float]] = []
        self.gradients: list[dict[str, float]] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += time.perf_counter() - self.begin

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics, model = kwargs["metrics"], kwargs["model"]
        if self.metric == "last_position":
            bits = metrics["eval_loss_last_position"] / math.log(2)  # the windows are ASCII, so bytes are characters
        else:
            bits = metrics["eval_bpc"]
        self.points.append([state.global_step, round(self.seconds, 2), round(bits, 5)])
        self.gradients.append({"step": state.global_step, **self.gradient_norms(model, state)})

    def gradient_norms(self, model: Any, state: TrainerState) -> dict[str, float]:
        """Norm of the weighted gradient of each loss term with respect to all layers."""
        progress = min(state.global_step / state.max_steps, 0.999)
        batch = {name: value.to(model.device) for name, value in self.batch.items()}
        model.train()
        outputs = model(**batch, use_cache=False, training_progress=progress, training_step=state.global_step)
        trunk = list(model.model.layers.parameters())
        norms = {}
        for name, value in outputs.loss_dict.items():
            if outputs.loss_weights[name]:
                gradients = torch.autograd.grad(value, trunk, retain_graph=True, allow_unused=True)
                norm = math.sqrt(sum(float(g.float().square().sum()) for g in gradients if g is not None))
                norms[name] = round(outputs.loss_weights[name] * norm, 5)
        return norms


def arguments_of(grid: str, cell: str, learning_rate: float, seed: int, data: str, folder: str) -> Arguments:
    """The arguments of `charformer-train` for one run."""
    # The cell chooses the optimizer, not the recipe.
    fields = {"muon": False, **GRIDS[grid].fields, **GRIDS[grid].cells[cell]}
    fields |= {"learning_rate": learning_rate, "seed": seed}
    fields |= {"data_path": data, "output_dir": folder, "sample_length": 0, "save_strategy": "no"}
    fields |= {"load_best_model_at_end": False, "disable_tqdm": True, "logging_steps": fields["eval_steps"]}
    if fields.get("optim") == "sgd":
        fields["adam_beta2"] = 0.999  # the default: that of the recipe is AdamW's
    fields["lr_scheduler_kwargs"] = json.dumps({"min_lr": learning_rate / 10})
    return recipe_runs.arguments_of(GRIDS[grid].recipe, fields)


def run_one(grid: str, cell: str, learning_rate: float, seed: int, data: str, data_sha256: str) -> dict[str, Any]:
    """A whole run, in this process."""
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_of(grid, cell, learning_rate, seed, data, f"{folder}/run")
        trainer, _ = recipe_runs.trainer_of(arguments)
        model, training = trainer.accelerator.unwrap_model(trainer.model), arguments.training
        rows = [trainer.train_dataset[index] for index in range(training.per_device_train_batch_size)]  # type: ignore[index]  # may be None in general
        curve = Curve(
            {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}, GRIDS[grid].metric
        )
        trainer.add_callback(curve)
        diverged = None
        try:
            trainer.train()
        except FloatingPointError as error:
            diverged = str(error)
    return {
        **key_of(grid, cell, learning_rate, seed, data_sha256),
        "final_bpc": curve.points[-1][2] if curve.points and diverged is None else None,
        "best_bpc": min((point[2] for point in curve.points), default=None),
        "seconds_per_step": round(curve.seconds / max(1, trainer.state.global_step), 5),
        "curve": curve.points,
        "gradient_norms": curve.gradients,
        "diverged": diverged,
        "steps": training.max_steps,
        "parameters": model.num_parameters(),
        "inference_parameters": model.without_auxiliary_heads().num_parameters(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
