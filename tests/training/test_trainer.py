import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils.generic import ModelOutput

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments
from modeling_charformer import register_schedule
from tests.helpers import assert_same_logs, loss_logs


class TestLogs:
    def test_every_term_is_logged_and_their_weighted_sum_is_the_loss(self, make_trainer):
        trainer = make_trainer()
        trainer.train()
        config = trainer.model.config
        logs = loss_logs(trainer)
        assert len(logs) == 8
        for entry in logs:
            progress = (entry["step"] - 1) / 8
            weights = config.language_model_losses().weights_at(progress)
            present = {name for name, weight in weights.items() if weight} | {"last_position"}
            assert {key.removeprefix("loss_") for key in entry if key.startswith("loss_")} == present
            total = sum(weights[name] * entry[f"loss_{name}"] for name in present)
            assert entry["loss"] == pytest.approx(total, rel=1e-5)
        # layer 1 of 3 has its losses while p < 1/6, layer 2 while p < 1/3
        assert [entry["step"] for entry in logs if "loss_layer_1" in entry] == [1, 2]
        assert [entry["step"] for entry in logs if "loss_layer_2_target_2" in entry] == [1, 2, 3]

    @pytest.mark.slow
    def test_training_lowers_the_terms(self, make_trainer):
        trainer = make_trainer(max_steps=60, model={"intermediate_schedule": "constant"})
        trainer.train()
        first, *_, last = loss_logs(trainer)
        for name in ("loss_next_char", "loss_target_2", "loss_layer_1", "loss_layer_2_target_2"):
            assert last[name] < first[name] - 1.0

    @pytest.mark.slow
    def test_an_interval_averages_each_term_over_the_steps_it_was_in(self, make_trainer):
        single = make_trainer()
        single.train()
        every = loss_logs(single)
        pairs = make_trainer(logging_steps=2)
        pairs.train()
        for number, entry in enumerate(loss_logs(pairs)):
            for key, value in entry.items():
                if "loss" in key:
                    values = [one[key] for one in every[2 * number : 2 * number + 2] if key in one]
                    assert value == pytest.approx(sum(values) / len(values), rel=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "model", [{}, {"position_loss": "last"}, {"num_targets": 4}, {"loss_weighting": "uncertainty"}], ids=str
    )
    @pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4)])
    def test_accumulation_gives_the_same_figures(self, make_trainer, model, batch, accumulation):
        whole = make_trainer(model)
        whole.train()
        split = make_trainer(model, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        split.train()
        assert_same_logs(loss_logs(whole), loss_logs(split))

    @pytest.mark.slow
    def test_accumulation_gives_the_same_figures_for_rows_of_different_lengths(self, make_trainer):
        def ragged(features):
            batch = default_data_collator(features)
            lengths = batch["labels"][:, 0] % 20 + 3
            batch["labels"][torch.arange(24) >= lengths[:, None]] = -100
            return batch

        runs = []
        for batch, accumulation in ((8, 1), (2, 4)):
            trainer = make_trainer(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
            trainer.data_collator = ragged
            trainer.train()
            runs.append(loss_logs(trainer))
        assert_same_logs(runs[0], runs[1])

    @pytest.mark.slow
    def test_groups_are_means_over_layers(self, make_trainer):
        each, groups = make_trainer(), make_trainer(log_loss_terms="groups")
        each.train()
        groups.train()
        first, grouped = loss_logs(each)[0], loss_logs(groups)[0]
        assert set(grouped) - set(first) == {"loss_layers", "loss_layers_target_2"}
        assert grouped["loss_layers"] == pytest.approx((first["loss_layer_1"] + first["loss_layer_2"]) / 2)

    def test_a_schedule_that_fails_late_is_refused_at_the_start(self, make_trainer):
        register_schedule("late", lambda at: float("nan") if at.progress > 0.5 else 1.0)
        with pytest.raises(ValueError, match="schedule 'late' returned nan for layer 1"):
            make_trainer({"intermediate_schedule": "late"})

    def test_wrong_grouping_raises(self, tmp_path):
        with pytest.raises(ValueError, match="log_loss_terms is 'all'; it must be 'each' or 'groups'"):
            AuxiliaryLossTrainingArguments(output_dir=str(tmp_path), log_loss_terms="all")

    def test_tensorboard_gets_every_term(self, make_trainer, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = tmp_path / "board"
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
        try:
            trainer = make_trainer(report_to="tensorboard", eval_strategy="steps", eval_steps=8)
            trainer.train()
        finally:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        (file,) = folder.rglob("events.*")
        events = EventAccumulator(str(file)).Reload()
        tags = set(events.Tags()["scalars"])
        assert {"train/loss", "loss_terms/next_char", "loss_terms/layer_1_target_2", "loss_weights/layer_1"} <= tags
        assert {"eval/loss", "eval_loss_terms/next_char", "eval/bpc"} <= tags
        assert not any(tag.startswith(("train/loss_", "eval/loss_")) for tag in tags)
        assert len(events.Scalars("loss_terms/layer_1")) == 2
        assert [event.value for event in events.Scalars("loss_weights/layer_1")] == [1, 1, 0, 0, 0, 0, 0, 0]

    def test_plain_training_arguments_will_do(self, make_trainer, tmp_path):
        model = make_trainer().model
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, logging_steps=1, disable_tqdm=True
        )
        trainer = AuxiliaryLossTrainer(model=model, args=args, train_dataset=make_trainer().train_dataset)
        trainer.train()
        assert "loss_layer_1" in loss_logs(trainer)[0]

    @pytest.mark.slow
    def test_the_plain_trainer_trains_the_model_too(self, make_trainer):
        ours = make_trainer()
        plain = Trainer(
            model=make_trainer(model={"intermediate_schedule": "constant"}).model,
            args=ours.args,
            train_dataset=ours.train_dataset,
            data_collator=default_data_collator,
        )
        plain.train()
        constant = make_trainer(model={"intermediate_schedule": "constant"})
        constant.train()
        expected = [entry["loss"] for entry in constant.state.log_history if "loss" in entry]
        assert [entry["loss"] for entry in plain.state.log_history if "loss" in entry] == pytest.approx(expected)


@dataclass
class DetectorOutput(ModelOutput):
    loss: torch.Tensor | None = None
    loss_dict: dict | None = None


class Detector(PreTrainedModel):
    """A model with a `loss_dict` of its own that normalises by nothing, as the DETR family."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(()))
        self.post_init()

    def forward(self, input_ids, labels=None):
        value = self.weight * labels.float().mean() / 100
        return DetectorOutput(loss=3 * value, loss_dict={"loss_ce": value, "error": 2 * value})


class TestOtherModels:
    @pytest.mark.slow
    def test_terms_of_another_model_are_averaged_over_micro_batches(self, make_trainer, corpus):
        runs = []
        for batch, accumulation in ((8, 1), (2, 4)):
            trainer = make_trainer(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
            other = AuxiliaryLossTrainer(
                model=Detector(PreTrainedConfig()),
                args=trainer.args,
                train_dataset=trainer.train_dataset,
                eval_dataset=trainer.eval_dataset,
                data_collator=default_data_collator,
            )
            other.train()
            runs.append(loss_logs(other))
            assert runs[-1][0]["loss"] == pytest.approx(3 * runs[-1][0]["loss_ce"], rel=1e-5)
            assert "loss_error" in runs[-1][0]
        assert_same_logs(runs[0], runs[1])

    def test_gpt2_logs_its_loss(self, make_trainer):
        trainer = make_trainer()
        config = GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=24)
        other = AuxiliaryLossTrainer(
            model=GPT2LMHeadModel(config),
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            data_collator=default_data_collator,
        )
        other.train()
        assert set(loss_logs(other)[0]) == {"loss", "step", "learning_rate", "grad_norm"}
        metrics = other.evaluate()
        assert "eval_loss" in metrics and "eval_bpc" not in metrics


class TestCost:
    def test_nothing_waits_for_the_device_between_log_entries(self, make_trainer):
        """Reading a number off a device makes the program wait for all it has been told to do."""
        waited = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                    waited.append(function)
                return function(*args, **(kwargs or {}))

        trainer = make_trainer(logging_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=4)
        trainer.add_loss_term("own", lambda outputs, inputs: outputs.logits.mean())
        hold, add = trainer._hold_terms, []

        def watched(*arguments):
            with Watch():
                add.append(trainer.state.global_step)
                return hold(*arguments)

        trainer._hold_terms = watched
        trainer.train()
        assert len(add) == 16 and not waited
        with Watch():
            torch.ones(()).item()
        assert waited  # it would have been noticed

    @pytest.mark.parametrize("schedule", ["paper", "random"])
    @pytest.mark.slow
    def test_compiled_training_never_falls_back_to_eager(self, make_trainer, schedule):
        """Three layers drop out, and torch is told to make two graphs of a function at most; the Trainer knows better."""
        model = {"num_hidden_layers": 4, "num_targets": 1, "intermediate_schedule": schedule}
        eager = make_trainer(model, max_steps=12)
        eager.train()
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            compiled = make_trainer(model, max_steps=12, torch_compile=True, torch_compile_backend="aot_eager")
            compiled.train()
        assert_same_logs(loss_logs(eager), loss_logs(compiled), rel=1e-3)
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] >= 4
        assert not counters["graph_break"]
        torch._dynamo.reset()


class TestEvaluation:
    @pytest.mark.parametrize("batch", [1, 4, 7, 32])
    def test_figures_are_exact_and_weighted_by_characters(self, make_trainer, corpus, batch):
        trainer = make_trainer(per_device_eval_batch_size=batch)
        metrics = trainer.evaluate()
        data = corpus["validation"].data.astype(np.int64)
        nats, model = 0.0, trainer.model.eval()
        for start in range(0, len(data) - 1, 23):
            ids = torch.from_numpy(data[start : start + 24])[None]
            logits = model(ids).logits[0, :-1].double()
            nats += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").detach())
        characters = len(data[1:].astype(np.uint8).tobytes().decode("utf-8", errors="ignore"))
        assert characters < len(data) - 1  # the text is not ASCII alone
        assert (
            metrics["eval_loss"] == metrics["eval_loss_next_char"] == pytest.approx(nats / (len(data) - 1), rel=1e-6)
        )
        assert metrics["eval_bpb"] == pytest.approx(nats / (len(data) - 1) / math.log(2), rel=1e-6)
        assert metrics["eval_bpc"] == pytest.approx(nats / characters / math.log(2), rel=1e-6)
        assert {"eval_loss_last_position", "eval_loss_target_2", "eval_loss_layer_1"} <= metrics.keys()

    @pytest.mark.slow
    def test_evaluation_leaves_training_as_it_is(self, make_trainer):
        without, with_evaluation = make_trainer(), make_trainer(eval_strategy="steps", eval_steps=2)
        without.train()
        with_evaluation.train()
        assert loss_logs(without) == loss_logs(with_evaluation)

    @pytest.mark.slow
    def test_best_model_can_be_chosen_by_bpc(self, make_trainer):
        trainer = make_trainer(
            eval_strategy="steps",
            eval_steps=4,
            save_strategy="steps",
            save_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_bpc",
            greater_is_better=False,
        )
        trainer.train()
        assert trainer.state.best_metric == min(e["eval_bpc"] for e in trainer.state.log_history if "eval_bpc" in e)

    def test_predictions_are_logits_alone(self, make_trainer):
        trainer = make_trainer()
        assert trainer.predict(trainer.eval_dataset).predictions.shape == (len(trainer.eval_dataset), 24, 256)


def interrupted_run(make_trainer, step: int, **settings) -> Path:
    """Train, and return a copy of the checkpoint written at `step`."""
    trainer = make_trainer(save_strategy="steps", save_steps=step, **settings)
    trainer.train()
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


class TestCheckpoints:
    @pytest.mark.slow
    @pytest.mark.parametrize("logging_steps", [1, 2, 5])
    def test_a_resumed_run_goes_on_as_if_never_stopped(self, make_trainer, logging_steps):
        settings = {
            "logging_steps": logging_steps,
            "save_strategy": "steps",
            "save_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "model": {"activation_dropout": 0.1, "intermediate_schedule": "cosine"},
        }
        whole = make_trainer(**settings)
        whole.train()
        resumed = make_trainer(**settings)
        resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
        assert loss_logs(resumed) == loss_logs(whole)
        for name, weight in whole.model.state_dict().items():
            assert weight.equal(resumed.model.state_dict()[name])

    def test_no_checkpoint_raises(self, make_trainer, tmp_path):
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            make_trainer().train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="there is no folder .*elsewhere"):
            make_trainer().train(resume_from_checkpoint=str(tmp_path / "elsewhere"))

    @pytest.mark.slow
    def test_tied_weights_are_not_missed(self, make_trainer):
        settings = {"tie_word_embeddings": True}
        checkpoint = interrupted_run(make_trainer, 4, model=settings)
        make_trainer(model=settings).train(resume_from_checkpoint=str(checkpoint))

    @pytest.mark.slow
    def test_what_fails_while_it_is_saved_is_removed_and_the_last_one_stays(self, make_trainer, monkeypatch):
        full = False
        save = torch.save

        def disk_full(content, path, *args, **kwargs):
            if full and str(path).endswith("optimizer.pt"):
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            return save(content, path, *args, **kwargs)

        class FillDisk(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                nonlocal full
                full = state.global_step > 4

        monkeypatch.setattr(torch, "save", disk_full)
        trainer = make_trainer(save_strategy="steps", save_steps=3, callbacks=[FillDisk()])
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
        folder = Path(trainer.args.output_dir)
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3"]
        monkeypatch.undo()
        whole = make_trainer(output_dir=str(folder / "whole"))
        whole.train()
        resumed = make_trainer()
        resumed.train(resume_from_checkpoint=True)
        assert loss_logs(resumed) == loss_logs(whole)


class BreakAfterStep(TrainerCallback):
    """Makes a weight infinite in a step whose loss was finite."""

    def __init__(self, step: int):
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.lm_head.bias.data.fill_(float("inf"))


class BreakWeight(TrainerCallback):
    """Makes a weight nan before the given step (counted from 1)."""

    def __init__(self, step: int, name: str):
        self.step, self.name = step, name

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            dict(model.named_parameters())[self.name].data.fill_(float("nan"))


class TestLossThatIsNotFinite:
    @pytest.mark.slow
    def test_stops_with_step_and_term_and_keeps_the_last_checkpoint(self, make_trainer):
        trainer = make_trainer(
            model={"intermediate_schedule": "constant"},
            logging_steps=8,
            save_strategy="steps",
            save_steps=3,
            callbacks=[BreakWeight(5, "auxiliary_heads.layer_2.bias")],
        )
        with pytest.raises(FloatingPointError, match=r"not finite at step 5: loss, layer_2\. .*checkpoint-3"):
            trainer.train()
        assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]

    def test_says_when_there_is_no_checkpoint(self, make_trainer):
        trainer = make_trainer(callbacks=[BreakWeight(2, "lm_head.bias")])
        with pytest.raises(FloatingPointError, match="step 2: loss, next_char.*No checkpoint had been written"):
            trainer.train()

    def test_no_checkpoint_with_weights_that_are_not_finite(self, make_trainer):
        trainer = make_trainer(save_strategy="steps", save_steps=3, callbacks=[BreakAfterStep(6)])
        with pytest.raises(FloatingPointError, match="not finite at step 6: lm_head.bias"):
            trainer.train()
        assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]

    def test_an_evaluation_stops_the_run_too(self, make_trainer):
        trainer = make_trainer(eval_strategy="steps", eval_steps=3, callbacks=[BreakAfterStep(3)])
        with pytest.raises(FloatingPointError, match="not finite at step 3: eval_loss, eval_loss_next_char"):
            trainer.train()


def test_settings_that_would_replace_the_losses_are_refused(make_trainer, monkeypatch):
    with pytest.raises(ValueError, match="label_smoothing_factor is 0.1; it would replace the model's own losses"):
        make_trainer(label_smoothing_factor=0.1)
    monkeypatch.setattr(AuxiliaryLossTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="sees 2 GPUs.*torchrun"):
        make_trainer()


def test_progress_is_the_share_of_steps_done(make_trainer):
    seen = []
    trainer = make_trainer(max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    forward = trainer.model.forward

    @functools.wraps(forward)
    def recording(*args, training_progress=None, **kwargs):
        seen.append(training_progress)
        return forward(*args, training_progress=training_progress, **kwargs)

    trainer.model.forward = recording
    trainer.train()
    assert seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
