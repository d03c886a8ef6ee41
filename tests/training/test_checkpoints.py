"""Checkpoints that count only when they are whole, and runs that go on as if they had never stopped."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses
from charformer_training.manifest import inspect, newest_good, write_manifest
from charformer_training.stopping import StoppedBySignal
from tests.helpers import SAVING, loss_logs


DROPOUT = {"activation_dropout": 0.1}


def logs_without_times(trainer: Trainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second", "total_flos"))}
        for entry in trainer.state.log_history
    ]


def assert_same_run(one: Any, other: Any) -> None:
    assert logs_without_times(one) == logs_without_times(other)
    for name, weight in one.model.state_dict().items():
        assert weight.equal(other.model.state_dict()[name]), name


class TestWhole:
    @pytest.mark.slow
    def test_one_changed_byte_of_any_file_is_named(self, checkpoint):
        assert inspect(checkpoint).faults == ()
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        assert {"optimizer.pt", "rng_state.pth", "trainer_state.json", "manifest.json"} <= {
            file.name for file in files
        }
        for path in files:
            content = path.read_bytes()
            for place in (0, len(content) // 2, len(content) - 1):
                for bit in (1, 32):
                    path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
                    faults = inspect(checkpoint).faults
                    assert len(faults) == 1 and faults[0].startswith(f"{path.name} is damaged"), (path.name, place)
            path.write_bytes(content)
        assert inspect(checkpoint).faults == ()

    def test_missing_and_foreign_files_are_named(self, checkpoint):
        for path in [path for path in checkpoint.iterdir() if path.is_file()]:
            content = path.read_bytes()
            path.unlink()
            assert inspect(checkpoint).faults == (f"{path.name} is missing",)
            path.write_bytes(content)
        (checkpoint / "notes.txt").write_text("good run")  # nothing that is read
        assert inspect(checkpoint).faults == () and "notes.txt is not of this run" in inspect(checkpoint).warnings[0]
        (checkpoint / "scaler.pt").write_bytes(b"")
        assert inspect(checkpoint).faults == ("scaler.pt is not of this run",)
        (checkpoint / "scaler.pt").unlink()
        (checkpoint / "pytorch_model_fsdp_0").mkdir()  # the Trainer asks for such a folder by its name
        assert inspect(checkpoint).faults == ("pytorch_model_fsdp_0 is not of this run",)
        os.mkfifo(checkpoint / "model-x.safetensors")  # reading it would wait forever
        assert inspect(checkpoint).faults == ("model-x.safetensors is no regular file",)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("optimizer.pt", b"junk", ""),
            ("scheduler.pt", 5, ""),
            ("rng_state.pth", {}, ""),
            ("running_sums.json", b"[]", ""),
            ("trainer_state.json", b"{}", "it was written after step 0; it must be 1 to max_steps, 8"),
            ("trainer_state.json", b'{"global_step": 9}', "it was written after step 9"),
        ],
    )
    def test_what_cannot_be_read_is_one_sentence(self, make_trainer, checkpoint, name, content, message):
        if isinstance(content, bytes):
            (checkpoint / name).write_bytes(content)
        else:
            torch.save(content, checkpoint / name)
        settings = inspect(checkpoint).settings or {}
        write_manifest(checkpoint, settings)  # as if the run had written it
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*checkpoint-6 cannot be read: .*{message}"):
            make_trainer(**SAVING).train(resume_from_checkpoint=str(checkpoint))

    @pytest.mark.slow
    def test_the_newest_good_one_is_taken_or_named(self, make_trainer, checkpoint, caplog):
        folder = checkpoint.parent
        for name in ("checkpoint-8", "checkpoint-6"):
            (folder / name / "optimizer.pt").unlink()
        with pytest.raises(
            ValueError, match=r"checkpoint-6 is not good: optimizer.pt is missing; .* is .*checkpoint-3$"
        ):
            make_trainer(**SAVING).train(resume_from_checkpoint=str(checkpoint))
        resumed, whole = make_trainer(**SAVING), make_trainer(**SAVING | {"output_dir": str(folder / "whole")})
        resumed.train(resume_from_checkpoint=True)
        assert "checkpoint-8 is not good: optimizer.pt is missing. Training goes on from" in caplog.text
        whole.train()
        assert_same_run(resumed, whole)
        good, bad = newest_good(folder)
        assert good is not None and good.path.name == "checkpoint-8" and not bad  # it was written anew

    @pytest.mark.slow
    def test_a_model_alone_cannot_be_resumed(self, make_trainer):
        trainer = make_trainer(**SAVING, save_only_model=True)
        trainer.train()
        with pytest.raises(ValueError, match=r"holds the model alone \(save_only_model\)"):
            make_trainer(**SAVING).train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-6")

    @pytest.mark.slow
    def test_links_in_the_folder_are_not_followed(self, make_trainer, tmp_path):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").write_text("mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoint-3").symlink_to(tmp_path / "precious")
        make_trainer(**SAVING).train()
        assert [path.name for path in (tmp_path / "precious").iterdir()] == ["file"]
        assert inspect(tmp_path / "run" / "checkpoint-3").faults == ()


class TestOfAnotherTrainer:
    @pytest.fixture
    def plain(self, make_trainer, tmp_path) -> Path:
        """A checkpoint of `transformers.Trainer` itself."""
        other = make_trainer()
        args = TrainingArguments(
            output_dir=str(tmp_path / "plain"),
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=8,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(other.model, args, train_dataset=other.train_dataset, data_collator=default_data_collator).train()
        return tmp_path / "plain" / "checkpoint-4"

    def test_it_is_taken_with_a_warning(self, make_trainer, plain, caplog):
        trainer = make_trainer()
        trainer.train(resume_from_checkpoint=str(plain))
        assert "its files have no checksums" in caplog.text and trainer.state.global_step == 8

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
    def test_not_without_what_training_goes_on_from(self, make_trainer, plain, name):
        (plain / name).unlink()
        message = "its weights are missing" if name.startswith("model") else f"{name} is missing"
        with pytest.raises(ValueError, match=message):
            make_trainer().train(resume_from_checkpoint=str(plain))

    def test_other_processes_states_are_needed_too(self, plain):
        assert "rng_state_0.pth is missing" in " ".join(inspect(plain, processes=2).faults)

    def test_what_it_tells_of_its_run_is_compared(self, make_trainer, plain):
        with pytest.raises(ValueError, match="max_steps: 8 there, 9 now"):
            make_trainer(max_steps=9).train(resume_from_checkpoint=str(plain))


class SendSignal(TrainerCallback):
    """Sends a signal to this process in the middle of a step, or of an evaluation."""

    def __init__(self, step: int, signum: int = signal.SIGTERM, in_evaluation: bool = False):
        self.step, self.signum, self.in_evaluation = step, signum, in_evaluation

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and not self.in_evaluation:
            os.kill(os.getpid(), self.signum)

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.in_evaluation:
            os.kill(os.getpid(), self.signum)


class TestSignals:
    @pytest.fixture(autouse=True)
    def interrupts(self):
        """SIGINT as a terminal's program has it, also where the tests run in the background."""
        old = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, old)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("signum", "step", "in_evaluation"),
        [
            (signal.SIGTERM, 2, False),
            (signal.SIGHUP, 3, False),
            (signal.SIGINT, 4, False),
            (signal.SIGTERM, 4, True),
            (signal.SIGTERM, 8, False),
        ],
    )
    def test_end_the_step_and_save_and_the_run_goes_on(self, make_trainer, tmp_path, signum, step, in_evaluation):
        if signum == signal.SIGHUP:  # under nohup it is ignored, and stays so
            signal.signal(signum, signal.SIG_DFL)
        whole = make_trainer(**SAVING, model=DROPOUT, output_dir=str(tmp_path / "whole"))
        whole.train()
        stopped = make_trainer(**SAVING, model=DROPOUT, callbacks=[SendSignal(step, signum, in_evaluation)])
        with pytest.raises(StoppedBySignal) as error:
            stopped.train()
        assert error.value.code == 128 + signum and f"checkpoint-{step}" in str(error.value)
        assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)
        resumed = make_trainer(**SAVING, model=DROPOUT)
        resumed.train(resume_from_checkpoint=True)
        assert_same_run(resumed, whole)
        assert sorted(path.name for path in (tmp_path / "run").glob("check*")) == sorted(
            path.name for path in (tmp_path / "whole").glob("check*")
        )

    def test_the_switch_of_transformers_turns_it_on_for_plain_arguments(self, make_trainer):
        assert make_trainer().args.enable_jit_checkpoint
        trainer = make_trainer(**SAVING, enable_jit_checkpoint=False, callbacks=[SendSignal(2, signal.SIGINT)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))

    def test_a_handler_of_ones_own_is_left_alone(self, make_trainer):
        seen = []
        old = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
        try:
            make_trainer(callbacks=[SendSignal(2)]).train()
        finally:
            signal.signal(signal.SIGTERM, old)
        assert seen == [signal.SIGTERM]


class TestGoingOn:
    @pytest.mark.slow
    @pytest.mark.parametrize("step", [3, 6, 8])
    def test_logs_and_train_loss_are_those_of_the_uninterrupted_run(self, make_trainer, step):
        whole = make_trainer(**SAVING, model=DROPOUT)
        expected = whole.train()
        resumed = make_trainer(**SAVING, model=DROPOUT)
        output = resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert output.training_loss == expected.training_loss == output.metrics["train_loss"]
        assert_same_run(resumed, whole)

    @pytest.mark.slow
    def test_no_step_is_trained_after_the_last(self, make_trainer):
        changes = {"max_steps": 5, "save_steps": 5, "save_strategy": "steps"}
        trainers = [make_trainer(**changes), make_trainer(**changes)]
        for trainer in trainers:  # 3 steps an epoch
            trainer.train_dataset = torch.utils.data.Subset(trainer.train_dataset, range(24))
        trainers[0].train()
        trainers[1].train(resume_from_checkpoint=True)
        assert trainers[1].state.global_step == 5
        assert_same_run(*trainers)

    @pytest.mark.slow
    def test_early_stopping_goes_on_with_what_it_had_counted(self, make_trainer, tmp_path):
        settings = {
            "max_steps": 12,
            "save_steps": 1,
            "eval_steps": 1,
            "save_strategy": "steps",
            "eval_strategy": "steps",
        }
        settings |= {"load_best_model_at_end": True, "learning_rate": 3.0, "max_grad_norm": 0.0}

        def make(name: str) -> AuxiliaryLossTrainer:
            stopping = EarlyStoppingCallback(early_stopping_patience=3)
            return make_trainer(**settings, output_dir=str(tmp_path / name), callbacks=[stopping])

        whole = make("whole")
        whole.train()
        assert whole.state.global_step < 12
        for step in (whole.state.global_step - 1, whole.state.global_step):
            shutil.copytree(tmp_path / "whole", tmp_path / f"from-{step}")
            resumed = make(f"from-{step}")
            resumed.train(resume_from_checkpoint=str(tmp_path / f"from-{step}" / f"checkpoint-{step}"))
            assert_same_run(resumed, whole)

    @pytest.mark.slow
    def test_a_best_checkpoint_that_is_gone_is_named(self, make_trainer):
        settings = {
            "max_steps": 4,
            "save_steps": 1,
            "eval_steps": 1,
            "save_strategy": "steps",
            "eval_strategy": "steps",
        }
        settings |= {"load_best_model_at_end": True, "learning_rate": 3.0, "max_grad_norm": 0.0}
        trainer = make_trainer(**settings)
        trainer.train()
        best = trainer.state.best_global_step
        assert best < 4
        shutil.rmtree(f"{trainer.args.output_dir}/checkpoint-{best}")
        with pytest.raises(ValueError, match=f"checkpoint-{best} is missing, which holds the best model"):
            make_trainer(**settings).train(resume_from_checkpoint=True)


class Worsen(TrainerCallback):
    """Spoils what is trained, heads too, from a step on."""

    def __init__(self, step: int):
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 >= self.step:
            for weight in model.parameters():
                weight.data.mul_(-20.0 if weight.requires_grad else 1.0)


class TestBestModel:
    @pytest.mark.parametrize(
        ("metric", "lower"),
        [
            ("loss", True),
            ("eval_loss_next_char", True),
            ("eval_bpc", True),
            ("bpb", True),
            ("eval_mine_bpc", True),
            ("eval_mine_loss_layer_2", True),
            ("eval_aux_loss", True),
            ("eval_perplexity", True),
            ("eval_news_nll", True),
            ("eval_map_loss_layer_3", True),
            ("eval_accuracy", False),
            ("eval_f1_glossary", False),
        ],
    )
    def test_lower_is_better_for_every_loss_and_bits_figure(self, metric, lower, tmp_path):
        settings = {"output_dir": str(tmp_path), "metric_for_best_model": metric, "use_cpu": True, "report_to": "none"}
        assert AuxiliaryLossTrainingArguments(**settings).greater_is_better == (not lower)
        assert AuxiliaryLossTrainingArguments(**settings, greater_is_better=True).greater_is_better
        plain = TrainingArguments(**settings)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, n_positions=8))
        assert AuxiliaryLossTrainer(model, plain).args.greater_is_better == (not lower)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["charformer", "added losses", "adapter with added losses"])
    @pytest.mark.parametrize("metric", ["eval_mine_bpc", "eval_mine_loss_next_char"])
    def test_the_best_weights_are_loaded_with_their_heads(self, make_trainer, kind, metric):
        if kind != "charformer":
            metric = metric.replace("bpc", "loss").replace("next_char", "next_token")
        settings = {
            "save_steps": 1,
            "eval_steps": 1,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "max_steps": 5,
        }
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": metric}
        template = make_trainer(**settings)
        model: Any = template.model
        if kind != "charformer":
            set_seed(0)
            model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=24))
            add_auxiliary_losses(model, num_targets=2, intermediate_layers=[1])
        if "adapter" in kind:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
            for name, weight in model.named_parameters():
                weight.requires_grad |= "auxiliary" in name
        trainer: Any = AuxiliaryLossTrainer(
            model,
            template.args,
            train_dataset=template.train_dataset,
            eval_dataset={"mine": template.eval_dataset},
            data_collator=default_data_collator,
            callbacks=[Worsen(3)],
        )
        trainer.train()
        values = {entry["step"]: entry[metric] for entry in trainer.state.log_history if metric in entry}
        best = min(values, key=values.__getitem__)
        assert best < 5 and trainer.state.best_global_step == best
        at_best = next(entry for entry in trainer.state.log_history if entry["step"] == best and metric in entry)
        for name, value in trainer.evaluate().items():
            if "loss" in name or "bpc" in name:
                assert value == pytest.approx(at_best[name], rel=1e-6), name
        at_end = {
            name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "auxiliary" in name
        }
        trainer._load_from_checkpoint(f"{trainer.args.output_dir}/checkpoint-{best}")
        assert at_end and all(
            weight.equal(dict(trainer.model.named_parameters())[name]) for name, weight in at_end.items()
        )


def test_running_sums_hold_nothing_that_is_not_of_the_run(checkpoint):
    assert set(json.loads((checkpoint / "running_sums.json").read_text())) == {
        "total_loss",
        "last_logged_step",
        "pending",
        "processes",
    }


@pytest.mark.slow
def test_logs_are_the_same_whether_checkpoints_are_written_or_not(make_trainer):
    one, other = make_trainer(logging_steps=5), make_trainer(logging_steps=5, save_strategy="steps", save_steps=2)
    one.train(), other.train()
    assert loss_logs(one) == loss_logs(other)
