"""What the logging of every loss term costs: its share of the time of T12's training steps with all paper losses.

    python benchmarks/trainer_overhead.py [--batch 4] [--steps 8] [--output benchmarks/results/trainer_overhead_cpu.json]

The clock runs in what `AuxiliaryLossTrainer` does beside `transformers.Trainer`: counting targets, telling the model how
far training is, and adding up the terms. On an accelerator that is the time to give orders; nothing there waits for the
device (a test sees to it), but at log entries. The first step is left out.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator, set_seed

from benchmarks.measure import machine
from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, RandomWindows, Split
from modeling_charformer import CharformerConfig, CharformerForCausalLM
from modeling_charformer.auxiliary_losses import Targets


class Clock:
    """Seconds that each call of the watched functions takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - begin)

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    set_seed(0)
    model = CharformerForCausalLM(CharformerConfig(intermediate_schedule="constant"))
    data = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        run = AuxiliaryLossTrainer(
            model=model,
            args=AuxiliaryLossTrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch,
                logging_steps=arguments.steps,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=RandomWindows(Split("train", data), 512, arguments.steps * arguments.batch, seed=0),
            data_collator=default_data_collator,
        )
        own, steps, own_terms = Clock(), Clock(), run.loss_terms
        calls = 3  # of what is watched, in each step
        Targets.counts = own.watch(Targets.counts)  # type: ignore[method-assign]
        own_terms.model_inputs = own.watch(own_terms.model_inputs)  # type: ignore[method-assign]
        run._hold_terms = own.watch(run._hold_terms)  # type: ignore[method-assign]
        run.training_step = steps.watch(run.training_step)  # type: ignore[method-assign]
        run.train()
    share = sum(own.seconds[calls:]) / sum(steps.seconds[1:])
    results = {
        "shape": f"T12, window 512, batch {arguments.batch}, {len(model.loss_settings.terms)} terms",
        **machine("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "seconds_per_step": round(sum(steps.seconds[1:]) / len(steps.seconds[1:]), 4),
        "logging_share_of_a_step": round(share, 6),
    }
    print(f"Logging takes {share:.3%} of a step of {results['seconds_per_step']} s")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
