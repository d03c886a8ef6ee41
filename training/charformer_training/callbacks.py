"""What a run shows while it goes on: one line for each log entry, and text the model writes."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from modeling_charformer import CharformerForCausalLM, CharformerTokenizer

from .files import append_line, cut_samples
from .running_means import group_by_layer


class LossTermProgress(ProgressCallback):
    """The Trainer's progress bar, with the terms of the loss on one readable line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            terms = {name.removeprefix("loss_"): value for name, value in logs.items() if name.startswith("loss_")}
            shown = {"loss": logs["loss"], **group_by_layer(terms)}
        else:
            shown = {name: logs[name] for name in ("eval_loss", "eval_bpc", "eval_bpb") if name in logs}
        if shown:
            values = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step:>{len(str(state.max_steps))}}  {values}")


class SampleText(TrainerCallback):
    """Prints text the model writes at each evaluation, and appends it to a file of JSON lines.

    Random numbers are drawn from a seed of their own, so that training is the same with and without samples.
    """

    def __init__(self, tokenizer: CharformerTokenizer, path: Path, prompt: str, length: int, seed: int):
        self.tokenizer, self.path, self.prompt, self.length, self.seed = tokenizer, path, prompt, length, seed

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            cut_samples(self.path, state.global_step)

    def on_evaluate(self, args, state, control, model: CharformerForCausalLM | None = None, **kwargs):
        if not state.is_world_process_zero or model is None:
            return
        text = sample_text(model, self.tokenizer, self.prompt, self.length, self.seed)
        append_line(self.path, json.dumps({"step": state.global_step, "text": text}, ensure_ascii=False))
        print(f"\n--- text written at step {state.global_step} ---\n{text}\n---", flush=True)


def sample_text(
    model: CharformerForCausalLM, tokenizer: CharformerTokenizer, prompt: str, length: int, seed: int
) -> str:
    """`prompt` and `length` characters (or as many as the window holds) that follow, at temperature 0.8."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _evaluating(model):
        torch.manual_seed(seed)
        ids = model.generate(  # type: ignore[misc]  # Transformers types `self` as a protocol
            **inputs, max_new_tokens=min(length, room), do_sample=True, temperature=0.8, use_cache=True
        )
    return str(tokenizer.decode(ids[0]))


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def final_terms(log_history: Sequence[Mapping[str, float]]) -> dict[str, tuple[int, float]]:
    """The last logged value of each term of the training loss, as `(step, nats)` by name (without `loss_`)."""
    last: dict[str, tuple[int, float]] = {}
    for entry in log_history:
        if "loss" in entry:
            for name, value in entry.items():
                if name.startswith("loss_"):
                    last[name.removeprefix("loss_")] = (int(entry["step"]), value)
    return last
