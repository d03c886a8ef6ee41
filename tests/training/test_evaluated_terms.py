"""The terms of auxiliary heads in evaluations: those that are active then, means over their own targets, beside the loss."""

from typing import Any

import pytest
import torch
from torch.utils.data import default_collate
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainingArguments

from charformer_training import (
    AuxiliaryLossMixin,
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    add_auxiliary_losses,
)
from modeling_charformer import (
    CharformerConfig,
    CharformerForCausalLM,
    CharformerForSequenceClassification,
    linear_cross_entropy,
)
from tests.helpers import TINY
from tests.training.any_models import build
from tests.training.test_any_model_training import Rows


def charformer(**changes: Any) -> Any:
    torch.manual_seed(0)
    return CharformerForCausalLM(CharformerConfig(**(TINY | {"initializer_range": 0.1} | changes)))


def classifier() -> Any:
    torch.manual_seed(0)
    return CharformerForSequenceClassification(
        CharformerConfig(**(TINY | {"num_labels": 3, "initializer_range": 0.1}))
    )


def bert() -> Any:
    return add_auxiliary_losses(build("bert", AutoModelForSequenceClassification, num_labels=3))


MODELS: dict[str, Any] = {
    "charformer": (charformer, "next"),
    "llama": (lambda **changes: add_auxiliary_losses(build("llama"), **changes), "next"),
    "classifier": (classifier, "class"),
    "bert": (bert, "class"),
}


def trainer_of(model: Any, folder: Any, labels: str = "next", kind: Any = AuxiliaryLossTrainer, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    args = AuxiliaryLossTrainingArguments if kind is AuxiliaryLossTrainer else TrainingArguments
    rows = Rows(labels, 16)
    return kind(model, args(**(settings | changes)), train_dataset=rows, eval_dataset=rows)


def terms_of(metrics: dict[str, float], start: str = "eval_loss_") -> dict[str, float]:
    return {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}


@pytest.mark.parametrize("way", ["ours", "mixin", "one pass"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_reports_what_training_would_log_on_its_rows(kind, way, tmp_path, monkeypatch):
    make, labels = MODELS[kind]
    trainer_kind = type("Mixed", (AuxiliaryLossMixin, Trainer), {}) if way == "mixin" else AuxiliaryLossTrainer
    if way == "one pass":  # as for a large vocabulary
        monkeypatch.setattr(linear_cross_entropy, "MIN_VOCABULARY", 1)
    trainer = trainer_of(make(), tmp_path, labels, trainer_kind)
    found = trainer.evaluate()
    rows = Rows(labels, 16)
    batch = default_collate([rows[number] for number in range(16)])
    outputs = make().train()(**batch, training_progress=0.0)
    expected = {name: value.item() for name, value in outputs.loss_dict.items()}
    assert len(expected) >= 2
    assert terms_of(found) == pytest.approx(expected, rel=1e-5)
    main = next(iter(expected))
    assert found["eval_loss"] == pytest.approx(expected[main], rel=1e-5)


def test_without_the_setting_an_evaluation_reports_the_main_head_alone(tmp_path):
    found = trainer_of(charformer(), tmp_path, eval_loss_terms=False).evaluate()
    assert terms_of(found).keys() == {"next_char", "last_position"}


@pytest.mark.parametrize(
    ("schedule", "there"),
    [("paper", [{"layer_1", "layer_2"}, {"layer_2"}, set(), set()]), ("random", [{"layer_1", "layer_2"}] * 4)],
)
def test_terms_that_have_dropped_out_are_absent_and_layers_chosen_at_random_are_all_there(schedule, there, tmp_path):
    model = charformer(intermediate_schedule=schedule, num_targets=1, num_hidden_layers=3)
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    found = [{name for name in terms_of(entry) if name.startswith("layer")} for entry in entries]
    assert found[:4] == there


def test_groups_are_means_over_layers(tmp_path):
    each, groups = (
        terms_of(trainer_of(charformer(), tmp_path, log_loss_terms=how).evaluate()) for how in ("each", "groups")
    )
    layers = [value for name, value in each.items() if name.startswith("layer_") and name.count("_") == 1]
    assert len(layers) == 2
    assert groups["layers"] == pytest.approx(sum(layers) / len(layers))


def test_early_stopping_and_the_best_model_go_by_a_term_of_one_of_several_sets(tmp_path):
    trainer = trainer_of(
        MODELS["llama"][0](intermediate_layers=None),
        tmp_path,
        max_steps=12,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_short_loss_target_2",
    )
    trainer.eval_dataset = {"short": Rows("next", 4), "long": Rows("next", 8)}
    trainer.add_callback(EarlyStoppingCallback(1))
    trainer.train()
    name = "eval_short_loss_target_2"
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert trainer.state.best_metric == min(values) < values[-1]
    assert len(values) < 12  # stopped
    assert trainer.evaluate()[name] == pytest.approx(min(values), rel=1e-5)


@pytest.mark.parametrize("own", [None, lambda _: {"own": 7.0}])
def test_a_search_of_hyperparameters_goes_by_the_loss_or_by_ones_own_metrics_and_not_by_the_sum_of_all(
    own, tmp_path, monkeypatch
):
    trainer = trainer_of(charformer(), tmp_path)
    trainer.compute_metrics = own
    given: list[Any] = []
    monkeypatch.setattr(Trainer, "hyperparameter_search", lambda self, space, objective, **_: given.append(objective))
    trainer.hyperparameter_search(direction="minimize")
    metrics = trainer.evaluate()
    metrics.pop("eval_model_preparation_time")  # there before training alone
    assert given[0](metrics) == (metrics["eval_loss"] if own is None else 7.0)


@pytest.mark.parametrize(
    ("metric", "changes", "message"),
    [
        ("eval_loss_layer_1", {}, r"a term without a weight at the end of training.*\['loss', 'loss_target_2'\]"),
        ("eval_loss_target_9", {}, "'eval_loss_target_9', a term without a weight"),
        ("eval_x_loss_target_2", {"eval_loss_terms": False}, "eval_loss_terms is False"),
    ],
)
def test_a_best_model_by_a_term_that_evaluations_will_lack_is_refused(metric, changes, message, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric, **changes}
    trainer = trainer_of(charformer(num_targets=2), tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not trainer.state.log_history
