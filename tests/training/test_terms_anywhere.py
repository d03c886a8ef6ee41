"""The terms of a loss in other Trainers, through a callback and in loops of one's own: the figures of `AuxiliaryLossTrainer`."""

from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from charformer_training import (
    AuxiliaryLossMixin,
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    LossTerms,
    LossTermsCallback,
    add_auxiliary_losses,
)
from tests.helpers import assert_same_logs, loss_logs
from tests.training.any_models import build
from tests.training.test_any_model_training import DETR, Pictures, Rows, mixtral


class OwnLossTrainer(Trainer):
    """Computes the main loss itself, past the model's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        labels = inputs["labels"][:, 1:]
        total = nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        loss = total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def mixed(base: type[Trainer]) -> Any:
    return type("Mixed", (AuxiliaryLossMixin, base), {})


def train(
    kind: Any,
    model: Any,
    folder: Any,
    batch: int = 8,
    data: Any = None,
    collator: Any = None,
    args: Any = TrainingArguments,
    prepare: Any = None,
    **changes: Any,
) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 8 // batch,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    set_seed(0)
    data = Rows("next") if data is None else data
    trainer = kind(
        model,
        args(**(settings | changes)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator or default_data_collator,
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


class EqualRows(Rows):
    """Texts of one length, for a Trainer whose loss is a mean over micro-batches."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return {**row, "labels": row["input_ids"]}


class TestMixin:
    @pytest.mark.slow
    @pytest.mark.parametrize("base", [Trainer, Seq2SeqTrainer, OwnLossTrainer])
    def test_any_trainer_has_the_figures_of_ours(self, base, tmp_path):
        args = Seq2SeqTrainingArguments if base is Seq2SeqTrainer else TrainingArguments
        expected = loss_logs(train(AuxiliaryLossTrainer, add_auxiliary_losses(build("llama")), tmp_path))
        for batch in (8, 2):
            trainer = train(mixed(base), add_auxiliary_losses(build("llama")), tmp_path, batch, args=args)
            assert_same_logs(loss_logs(trainer), expected)

    @pytest.mark.slow
    def test_a_mean_over_the_batch_is_averaged_over_micro_batches(self, tmp_path):
        class Mean(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return model(**inputs).loss

        data = EqualRows("next")
        expected = loss_logs(train(AuxiliaryLossTrainer, add_auxiliary_losses(build("gpt2")), tmp_path, data=data))
        found = loss_logs(train(mixed(Mean), add_auxiliary_losses(build("gpt2")), tmp_path, 2, data=data))
        assert_same_logs(found, expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [AuxiliaryLossTrainer, mixed(Trainer)])
    def test_each_model_of_model_init_is_trained_on_its_own_terms(self, kind, tmp_path):
        targets = iter([1, 3, 2])  # the first model is made before training

        def make() -> Any:
            return add_auxiliary_losses(build("llama"), num_targets=next(targets))

        def trainer_of(model: Any, **more: Any) -> Any:
            args = TrainingArguments(
                str(tmp_path),
                train_sampling_strategy="sequential",
                max_steps=2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            )
            return kind(model, args, train_dataset=Rows("next"), data_collator=default_data_collator, **more)

        trainer = trainer_of(None, model_init=make)
        for number in (3, 2):
            trainer.train()
            expected = trainer_of(add_auxiliary_losses(build("llama"), num_targets=number))
            expected.train()
            assert f"loss_target_{number}" in loss_logs(trainer)[0]
            assert_same_logs(loss_logs(trainer), loss_logs(expected))

    @pytest.mark.slow
    def test_t5_logs_the_terms_that_are_added(self, tmp_path):
        sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 61}
        config = AutoConfig.for_model("t5", **sizes, dropout_rate=0.0, decoder_start_token_id=0)
        logs = []
        for batch in (8, 2):
            set_seed(0)

            def prepare(trainer: Any) -> None:
                trainer.add_loss_term("z", lambda outputs, inputs: outputs.logits.logsumexp(-1).square().mean(), 0.1)

            model = AutoModelForSeq2SeqLM.from_config(config)
            settings: dict[str, Any] = {
                "args": Seq2SeqTrainingArguments,
                "data": EqualRows("next"),
                "prepare": prepare,
            }
            trainer = train(mixed(Seq2SeqTrainer), model, tmp_path, batch, **settings)
            logs.append(loss_logs(trainer))
        for entry in logs[0]:
            assert entry["loss"] == pytest.approx(entry["loss_main"] + 0.1 * entry["loss_z"], rel=1e-5)
        assert_same_logs(*logs)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == metrics["eval_loss_main"]
        assert metrics["eval_loss_z"] == pytest.approx(logs[0][-1]["loss_z"], rel=0.2)

    def test_a_loss_that_is_not_finite_ends_training(self, tmp_path):
        model = add_auxiliary_losses(build("gpt2"))
        model.auxiliary_heads["target_2"].linear.bias.data.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="not finite at step 1: loss, target_2"):
            train(mixed(Trainer), model, tmp_path)


class Seen(TensorBoardCallback):
    """Keeps what a logger would have been given."""

    def __init__(self):
        self.tb_writer, self.found = self, {}

    def add_scalar(self, name, value, step):
        self.found.setdefault(name, []).append(value)

    def add_text(self, *_):
        pass

    def flush(self):
        pass

    def on_train_begin(self, *_, **__):
        pass

    def on_train_end(self, *_, **__):
        pass


class TestNames:
    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("loss_", {"loss_terms/target_2", "loss_weights/target_2", "eval_short_loss_terms/next_token"}),
            ("mtp_", {"mtp_terms/target_2", "mtp_weights/target_2", "eval_short_mtp_terms/next_token"}),
            ("none", {"train/loss_target_2", "train/weight_target_2", "eval/short_loss_next_token"}),
        ],
    )
    def test_loggers_group_the_terms_and_the_log_keeps_its_names(self, prefix, expected, tmp_path):
        seen = Seen()

        def prepare(trainer: Any) -> None:
            trainer.eval_dataset = {"short": Rows("next", 8), "long": Rows("next", 16)}
            trainer.add_callback(seen)

        trainer = train(
            AuxiliaryLossTrainer,
            add_auxiliary_losses(build("gpt2"), intermediate_layers=None),
            tmp_path,
            args=AuxiliaryLossTrainingArguments,
            prepare=prepare,
            log_group_prefix=prefix,
            eval_strategy="steps",
            eval_steps=3,
        )
        assert expected | {"train/loss", "train/learning_rate", "eval/short_loss"} <= seen.found.keys()
        assert seen.found[min(name for name in expected if "weight" in name)] == [0.5] * 3
        assert {"loss_target_2", "loss_next_token"} <= trainer.state.log_history[0].keys()
        assert any("eval_short_loss_next_token" in entry for entry in trainer.state.log_history)

    def test_a_prefix_with_a_slash_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="log_group_prefix is 'a/b'; it may hold letters"):
            AuxiliaryLossTrainingArguments(output_dir=str(tmp_path), log_group_prefix="a/b")

    @pytest.mark.slow
    def test_gradients_of_terms_are_logged_and_grouped(self, tmp_path):
        seen, model = Seen(), add_auxiliary_losses(build("gpt2"))
        trainer = train(
            AuxiliaryLossTrainer,
            model,
            tmp_path,
            2,
            args=AuxiliaryLossTrainingArguments,
            prepare=lambda trainer: trainer.add_callback(seen),
            log_term_gradients=1,
        )
        norms = [entry["gradient_norm_target_2"] for entry in trainer.state.log_history[:3]]
        assert seen.found["loss_gradient_norms/target_2"] == norms and min(norms) > 0
        assert len(seen.found["loss_gradient_cosines/target_2"]) == 3

    def test_the_best_model_and_early_stopping_go_by_any_term(self, tmp_path):
        def prepare(trainer: Any) -> None:
            trainer.add_loss_term("own", lambda outputs, inputs: outputs.logits.square().mean(), weight=0.0)
            trainer.add_callback(EarlyStoppingCallback(1))

        trainer = train(
            mixed(Trainer),
            build("gpt2"),
            tmp_path,
            prepare=prepare,
            max_steps=12,
            learning_rate=0.3,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss_own",
        )
        values = [entry["eval_loss_own"] for entry in trainer.state.log_history if "eval_loss_own" in entry]
        assert trainer.state.best_metric == min(values)
        assert len(values) < 12 and values[-1] > values[-2] == min(values) or len(values) == 12


def detr() -> Any:
    set_seed(0)
    return AutoModelForObjectDetection.from_config(AutoConfig.for_model("detr", **DETR))


class TestCallback:
    @pytest.mark.slow
    @pytest.mark.parametrize("batch", [8, 2])
    @pytest.mark.parametrize("kind", ["detr", "mixtral", "llama"])
    def test_it_logs_what_our_trainer_logs(self, kind, batch, tmp_path):
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "detr": (detr, {"data": Pictures(), "collator": Pictures.collate, "learning_rate": 1e-4}),
            "mixtral": (lambda: mixtral(router_aux_loss_coef=0.0), {"data": EqualRows("next")}),
            "llama": (
                lambda: add_auxiliary_losses(build("llama"), intermediate_schedule="constant"),
                {"data": EqualRows("next")},
            ),
        }
        make, settings = kinds[kind]
        expected = train(AuxiliaryLossTrainer, make(), tmp_path / "ours", batch, **settings)
        if kind == "detr" and batch < 8:
            pytest.skip("Transformers adds up DETR's micro-batches")
        seen = Seen()

        def prepare(trainer: Any) -> None:
            trainer.add_callback(seen)
            LossTermsCallback(trainer)

        plain = train(Trainer, make(), tmp_path / "plain", batch, prepare=prepare, **settings)
        assert_same_logs(loss_logs(plain), loss_logs(expected))
        assert any(name.startswith("loss_terms/") for name in seen.found)
        metrics, ours = plain.evaluate(), expected.evaluate()
        # It tells the model nothing, so that an evaluation runs no auxiliary heads.
        found = {name: value for name, value in metrics.items() if "_loss_" in name}
        assert found == pytest.approx({name: ours[name] for name in found}, rel=1e-4)
        assert found.keys() == {name for name in ours if "_loss_" in name} or found.keys() == {"eval_loss_next_token"}


def test_the_callback_logs_what_a_model_without_labels_returns(tmp_path):
    class Router(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs["input_ids"], output_router_logits=True).aux_loss

    trainer = train(Router, mixtral(), tmp_path, prepare=LossTermsCallback)
    first = trainer.state.log_history[0]
    assert first["loss_aux_loss"] == pytest.approx(first["loss"])


def loop(model: Any, optimizer: Any, loader: Any, accumulation: int, backward: Any) -> list[dict[str, float]]:
    terms, logs = LossTerms(model, num_steps=3), []
    for micro_batches in terms.steps(loader, accumulation):
        for batch in micro_batches:
            backward(terms.loss(batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logs.append({"step": terms.steps_done, **terms.means()})
    return logs


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8, 2])
@pytest.mark.parametrize("with_accelerate", [False, True])
def test_a_loop_of_ones_own_has_the_figures_of_the_trainer(batch, with_accelerate, tmp_path):
    changes: dict[str, Any] = {"lr_scheduler_type": "constant", "optim": "sgd"}
    trainer = train(AuxiliaryLossTrainer, add_auxiliary_losses(build("llama")), tmp_path, **changes)
    expected = [
        {key: value for key, value in entry.items() if key not in ("learning_rate", "grad_norm")}
        for entry in loss_logs(trainer)
    ]
    model = add_auxiliary_losses(build("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows("next"), batch_size=batch)
    backward = torch.Tensor.backward
    if with_accelerate:
        accelerator = Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
    assert_same_logs(loop(model, optimizer, loader, 8 // batch, backward), expected)


def test_a_compiled_model_is_told_what_the_plain_one_is():
    model = add_auxiliary_losses(build("llama"))
    of_compiled: Any = torch.compile(model, backend="eager")
    plain, compiled = LossTerms(model, 2), LossTerms(of_compiled, 2)
    for terms in (plain, compiled):
        terms.begin_step(list(DataLoader(Rows("next", 8), batch_size=4)))
    assert plain.model_inputs().keys() == compiled.model_inputs().keys() >= {"training_progress", "target_counts"}
    assert plain.counts is not None and compiled.counts is not None and plain.counts.equal(compiled.counts)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_on_several_processes_whose_heads_drop_out_needs_unused_parameters(compiled):
    def wrapped(model: Any, unused: bool) -> Any:
        wrapper = DistributedDataParallel.__new__(DistributedDataParallel)  # without processes
        nn.Module.__init__(wrapper)
        wrapper.module, wrapper.find_unused_parameters = model, unused
        return torch.compile(wrapper, backend="eager") if compiled else wrapper

    model = add_auxiliary_losses(build("llama"))
    with pytest.raises(ValueError, match=r"heads of \['layer_1_target_2', .* do not run at each step"):
        LossTerms(wrapped(model, False))
    for fine in (wrapped(model, True), wrapped(add_auxiliary_losses(build("llama"), intermediate_layers=None), False)):
        terms = LossTerms(fine)
        assert "target_counts" in terms.takes
        assert isinstance(getattr(fine, "_orig_mod", fine), DistributedDataParallel)  # it is still there


def test_a_loop_counts_on_in_the_next_epoch_and_ends_at_its_last_step():
    terms = LossTerms(add_auxiliary_losses(build("gpt2")), num_steps=5)
    loader = DataLoader(Rows("next", 12), batch_size=2)
    seen = [(terms.step, terms.progress, len(batches)) for _ in range(3) for batches in terms.steps(loader, 4)]
    assert seen == [(0, 0.0, 4), (1, 0.2, 2), (2, 0.4, 4), (3, 0.6, 2), (4, 0.8, 4)]


def test_a_loop_of_a_classifier_takes_means_over_micro_batches():
    model = add_auxiliary_losses(build("bert", AutoModelForSequenceClassification, num_labels=3))
    terms = LossTerms(model)
    batches = list(DataLoader(Rows("class", 8), batch_size=2))
    expected = sum(model(**batch).loss.item() for batch in batches) / 4
    [step] = terms.steps(batches, 4)
    assert sum(terms.loss(batch).item() for batch in step) == pytest.approx(expected, rel=1e-5)
    assert terms.means()["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loop_without_labels_is_refused():
    terms = LossTerms(add_auxiliary_losses(build("gpt2")))
    with pytest.raises(ValueError, match=r"returned no loss for the inputs \['input_ids'\]"):
        terms.loss({"input_ids": Rows("next")[0]["input_ids"][None]})


class TestBases:
    @pytest.mark.parametrize("base", [Trainer, OwnLossTrainer])
    def test_a_trainer_before_the_mixin_is_refused(self, base):
        with pytest.raises(
            TypeError, match=rf"put the mixin first: class Mine\(AuxiliaryLossMixin, {base.__name__}\)"
        ):
            type("Mine", (base, AuxiliaryLossMixin), {})

    def test_the_mixin_without_a_trainer_is_refused(self):
        with pytest.raises(
            TypeError, match=r"AuxiliaryLossMixin is no Trainer.* class Mine\(AuxiliaryLossMixin, Trainer"
        ):
            AuxiliaryLossMixin(build("gpt2"))
