"""The speed of a model that drafts for itself: `drafting.yaml`, trained here, and T12 beside GPT-2."""

import functools
import tempfile
import time
from typing import Any

from transformers import set_seed

from benchmarks import generate
from benchmarks.recipe_runs import arguments_of, trainer_of
from modeling_charformer import CharformerForCausalLM

from .report import Report
from .scale import Scale


def measure(report: Report, scale: Scale) -> None:
    trained: dict[str, Any] = {}
    report.measure("training", lambda: _train(scale, trained))
    if not trained:  # an earlier try measured its training; the model is gone with it
        _train(scale, trained)
    model, prompts = trained["model"], trained["prompts"]
    for decoding in generate.DECODING:
        report.measure(decoding, functools.partial(generate.drafting, model, prompts, scale.length, (decoding,)))
    report.measure(
        "T12 beside GPT-2", lambda: generate.beside_gpt2(2, scale.length, scale.shapes["T12"], scale.device)
    )


def _train(scale: Scale, trained: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    fields |= {"sample_length": 0, "logging_steps": 500}
    with tempfile.TemporaryDirectory() as folder:
        trainer, splits = trainer_of(
            arguments_of("drafting.yaml", fields | scale.drafting | {"output_dir": f"{folder}/run"})
        )
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        loss = trainer.evaluate()["eval_loss"]
    model: CharformerForCausalLM = trainer.accelerator.unwrap_model(trainer.model).eval()
    model.config.use_cache = True  # the Trainer has switched it off
    prompts = generate.prompts_of(splits["validation"].data, model, scale.prompts)
    set_seed(0)
    generate.write(model, prompts[0], 8, do_sample=False)  # the first call prepares the device
    trained |= {"model": model, "prompts": prompts}
    return {"steps": trainer.state.global_step, "seconds": round(seconds, 1), "validation_loss": round(loss, 4)}
