"""What a run shows: on a terminal, in a log file, in TensorBoard, in its samples."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState, TrainingArguments

from charformer_training import history
from charformer_training.callbacks import LossTermProgress, SampleText, Speed, sample_text, show_in_use
from modeling_charformer import CharformerTokenizer


ESCAPE = "\x1b[2J"  # clears a screen


@pytest.fixture
def in_use(make_trainer):
    def make(**changes):
        trainer = make_trainer(**({"disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 4} | changes))
        show_in_use(trainer, bytes_per_step=8 * 24)
        return trainer

    return make


def test_log_file_has_a_plain_line_for_each_entry(in_use, capsys):
    trainer = in_use()
    trainer.train()
    out, err = capsys.readouterr()
    assert not re.search(r"[\x1b\r]", out) and not err
    lines = out.splitlines()
    assert "nats per byte" in lines[0] and "bits per character" in lines[0]
    first = trainer.state.log_history[0]
    # Layers 1 and 2 of 3, as one figure.
    layers = (first["loss_layer_1"] + first["loss_layer_2"]) / 2
    assert lines[1].startswith(f"step 1/8  loss {first['loss']:.4f}  next_char {first['loss_next_char']:.4f}  ")
    assert f"  layers {layers:.4f}  " in lines[1]
    assert re.search(r"  lr 0\.01  [\d.]+ steps/s  [\d,]+ bytes/s  00:\d\d left$", lines[1])
    (evaluated,) = [line for line in lines if line.startswith("step 4/8  eval_loss")]
    (entry,) = [entry for entry in trainer.state.log_history if entry["step"] == 4 and history.is_evaluation(entry)]
    assert evaluated.split("  ")[1:3] == [f"eval_loss {entry['eval_loss']:.4f}", f"eval_bpc {entry['eval_bpc']:.4f}"]


@pytest.mark.parametrize("logging_steps", [1, 8])
def test_a_layer_that_drops_out_is_named_with_its_step(in_use, capsys, logging_steps):
    in_use(logging_steps=logging_steps).train()
    # Of 3 layers and 8 steps: layer l has its losses while step / 8 < l / 6.
    told = re.findall(r"^(layer_\d+ dropped out at step \d+): ", capsys.readouterr().out, re.MULTILINE)
    assert told == ["layer_1 dropped out at step 3", "layer_2 dropped out at step 4"]


@pytest.mark.slow
def test_a_resumed_run_tells_of_no_layer_twice(in_use, tmp_path, capsys):
    in_use(save_strategy="steps", save_steps=3).train()
    capsys.readouterr()
    in_use().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    out = capsys.readouterr().out
    assert "layer_1 dropped" not in out and "layer_2 dropped out at step 4" in out


def test_a_terminal_has_a_bar_besides(in_use, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    in_use().train()
    out, err = capsys.readouterr()
    assert "8/8" in err and "\r" in err
    assert "step 8/8  loss" in out


def test_speed_is_that_of_training_alone(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    speed, args, state, control = Speed(100), TrainingArguments(), TrainerState(max_steps=10), TrainerControl()

    def step() -> None:
        speed.on_step_begin(args, state, control)
        clock[0] += 0.5
        state.global_step += 1
        speed.on_step_end(args, state, control)

    speed.on_train_begin(args, state, control)
    assert speed.bytes_per_second is None
    step()
    clock[0] += 7  # an evaluation
    speed.on_evaluate(args, state, control)
    step()
    speed.on_log(args, state, control, logs={"loss": 1.0})
    assert speed.steps_per_second == 2.0 and speed.bytes_per_second == 200.0
    assert speed.seconds_left == 8 * (8.0 / 2)  # the pace so far, with the evaluation
    clock[0] += 5  # what comes between two steps without an evaluation is training: waiting for data
    step()
    speed.on_log(args, state, control, logs={"loss": 1.0})
    assert speed.steps_per_second == pytest.approx(1 / 5.5)
    speed.on_log(args, state, control, logs={"eval_loss": 1.0})
    assert speed.steps_per_second == pytest.approx(1 / 5.5)


def test_tensorboard_groups_terms_weights_and_speed(in_use, tmp_path):
    trainer = in_use(report_to="tensorboard")
    trainer.train()
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()

    def scalars(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    log = trainer.state.log_history
    for tag, key in (
        ("train/loss", "loss"),
        ("loss_terms/next_char", "loss_next_char"),
        ("loss_terms/layer_1_target_2", "loss_layer_1_target_2"),
        ("eval/bpc", "eval_bpc"),
        ("eval_loss_terms/next_char", "eval_loss_next_char"),
    ):
        assert scalars(tag) == pytest.approx(dict(zip(*history.curve(log, key), strict=True)))
    weights = {name: scalars(f"loss_weights/{name}") for name in ("next_char", "layer_1", "layer_2_target_2")}
    assert weights["next_char"] == dict.fromkeys(range(1, 9), 1.0)
    assert weights["layer_1"] == {1: 1.0, 2: 1.0} | dict.fromkeys(range(3, 9), 0.0)
    assert weights["layer_2_target_2"] == {1: 0.5, 2: 0.5, 3: 0.5} | dict.fromkeys(range(4, 9), 0.0)
    assert scalars("speed/bytes_per_second")[8] == pytest.approx(8 * 24 * scalars("speed/steps_per_second")[8])
    tags = events.Tags()["scalars"]
    assert not [tag for tag in tags if tag.startswith(("train/loss_", "eval/loss_", "train/train_runtime"))]


def test_lines_of_transformers_are_left_where_they_are_asked_for(in_use):
    kinds = [type(callback) for callback in in_use(disable_tqdm=True).callback_handler.callbacks]
    assert LossTermProgress not in kinds and "PrinterCallback" in [kind.__name__ for kind in kinds]


class TestSamples:
    def test_length_is_that_asked_for_past_the_window_too(self, monkeypatch, make_model):
        model, tokenizer = make_model(), CharformerTokenizer()  # a window of 24
        monkeypatch.setattr(tokenizer, "decode", lambda ids: " ".join(map(str, ids.tolist())))
        torch.manual_seed(7)
        expected = torch.rand(1)
        torch.manual_seed(7)
        long = sample_text(model, tokenizer, "ab", 60, seed=0).split()
        assert torch.rand(1) == expected and model.training  # training goes on as without it
        assert len(long) == 62 and long[:2] == ["97", "98"]
        assert long[:24] == sample_text(model, tokenizer, "ab", 22, seed=0).split()

    def sampled(self, path: Path, monkeypatch: pytest.MonkeyPatch, make_model, step: int, text: str) -> None:
        monkeypatch.setattr("charformer_training.callbacks.sample_text", lambda *args: text)
        callback = SampleText(CharformerTokenizer(), path, "a", 5, seed=0)
        state = TrainerState(global_step=step)
        callback.on_evaluate(TrainingArguments(), state, TrainerControl(), model=make_model())

    def begin(self, path: Path, step: int) -> None:
        callback = SampleText(CharformerTokenizer(), path, "a", 5, seed=0)
        callback.on_train_begin(TrainingArguments(), TrainerState(global_step=step), TrainerControl())

    def test_file_keeps_the_text_and_the_terminal_is_safe(self, tmp_path, monkeypatch, make_model, capsys):
        path, text = tmp_path / "samples.jsonl", f"день{ESCAPE}\u2028\x9b\U000e0001"
        self.sampled(path, monkeypatch, make_model, 4, text)
        (line,) = path.read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == {"step": 4, "text": text}
        assert "день" in line and line.isprintable()
        shown = capsys.readouterr().out
        assert "--- text written at step 4 ---" in shown and "день\\x1b[2J" in shown and "\x1b" not in shown

    def test_a_run_that_goes_on_has_each_step_once(self, tmp_path):
        path = tmp_path / "samples.jsonl"
        lines = [json.dumps({"step": step, "text": "a\n"}) + "\n" for step in (2, 4, 6)]
        path.write_text("".join(lines) + '{"step": 8, "te')  # killed while it wrote
        self.begin(path, 4)
        assert path.read_text() == "".join(lines[:2])
        self.begin(path, 0)
        assert path.read_text() == ""

    def test_a_link_is_replaced_and_not_followed(self, tmp_path, monkeypatch, make_model, caplog):
        other, path = tmp_path / "other", tmp_path / "samples.jsonl"
        other.write_text("mine")
        path.symlink_to(other)
        self.sampled(path, monkeypatch, make_model, 2, "a")
        assert other.read_text() == "mine" and "The sample of step 2 is not in" in caplog.text
        self.begin(path, 2)
        self.sampled(path, monkeypatch, make_model, 4, "b")
        assert other.read_text() == "mine"
        assert path.read_text() == '{"step": 4, "text": "b"}\n' and not path.is_symlink()
