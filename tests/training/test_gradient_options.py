"""A Trainer that logs the gradients of terms, or combines them."""

import importlib.util

import pytest

from charformer_training import add_auxiliary_losses
from charformer_training.term_gradients import term_gradients
from tests.helpers import assert_same_logs, loss_logs
from tests.training.any_models import DEPRECATED, build


def gradients(entries) -> list[dict[str, float]]:
    return [{key: value for key, value in entry.items() if key.startswith("gradient_")} for entry in entries]


MODEL = {"intermediate_schedule": "constant", "activation_dropout": 0.2, "layer_dropout": 0.2}


@pytest.mark.slow
def test_gradients_are_logged_every_so_many_steps_and_training_stays_the_same(make_trainer):
    plain = make_trainer(MODEL, max_steps=4)
    plain.train()
    logging = make_trainer(MODEL, max_steps=4, log_term_gradients=3)  # which sets the seed again
    logging.train()
    logs = loss_logs(logging)
    assert [entry["step"] for entry, figures in zip(logs, gradients(logs), strict=True) if figures] == [1, 4]
    names = ["next_char", "target_2", "layer_1", "layer_1_target_2", "layer_2", "layer_2_target_2"]
    figures = {f"gradient_norm_{name}" for name in names} | {f"gradient_cosine_{name}" for name in names[1:]}
    assert set(gradients(logs)[0]) == figures
    without = [{key: value for key, value in entry.items() if not key.startswith("gradient_")} for entry in logs]
    assert without == loss_logs(plain)


def test_logged_figures_are_those_of_the_step(make_trainer):
    """At the first step, from the same model and batch; no dropout, which would differ."""
    changes = {"intermediate_schedule": "constant"}
    trainer = make_trainer(changes, log_term_gradients=100, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    trainer.train()
    model.load_state_dict(before)

    def value(name):
        return lambda batch: model(**batch).loss_dict[name]

    expected = term_gradients(model, {name: value(name) for name in ("next_char", "layer_1")}, [batch])
    found = gradients(loss_logs(trainer))[0]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_figures_do_not_depend_on_accumulation(make_trainer):
    logs = []
    for parts in (1, 4):
        trainer = make_trainer(
            {"num_targets": 2},
            max_steps=4,
            log_term_gradients=3,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        )
        trainer.add_loss_term("confidence", lambda outputs, inputs: outputs.logits.amax(-1).mean(), 0.1)
        trainer.train()
        logs.append(loss_logs(trainer))
    assert_same_logs(*logs, rel=1e-3)
    assert {"gradient_norm_confidence", "gradient_cosine_confidence"} <= gradients(logs[0])[0].keys()
    # Layers 1 and 2 have dropped out by then.
    assert set(gradients(logs[0])[3]) == {
        f"gradient_{figure}" for figure in ("norm_next_char", "norm_target_2", "cosine_target_2")
    } | {"gradient_norm_confidence", "gradient_cosine_confidence"}


@pytest.mark.slow
def test_figures_between_two_entries_are_averaged_also_in_a_resumed_run(make_trainer):
    settings = {"log_term_gradients": 1, "logging_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    single = make_trainer(MODEL, log_term_gradients=1, max_steps=2)
    single.train()
    whole = make_trainer(MODEL, **settings)
    whole.train()
    every = gradients(loss_logs(single))
    (entry,) = gradients(loss_logs(whole))
    assert entry == pytest.approx({name: (every[0][name] + every[1][name]) / 2 for name in entry}, rel=1e-4)
    resumed = make_trainer(MODEL, **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")
    assert loss_logs(resumed) == loss_logs(whole)


@pytest.mark.slow
def test_groups_average_over_layers(make_trainer):
    each, groups = (
        make_trainer({"num_targets": 1}, log_term_gradients=1, log_loss_terms=way, max_steps=1)
        for way in ("each", "groups")
    )
    each.train()
    groups.train()
    (one,), (other,) = (gradients(loss_logs(trainer)) for trainer in (each, groups))
    assert set(other) == {"gradient_norm_next_char", "gradient_norm_layers", "gradient_cosine_layers"}
    mean = (one["gradient_cosine_layer_1"] + one["gradient_cosine_layer_2"]) / 2
    assert other["gradient_cosine_layers"] == pytest.approx(mean)


@DEPRECATED
@pytest.mark.parametrize("setting", [{"log_term_gradients": 2}, {"gradient_aggregator": "upgrad"}])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "does not work with gradient_checkpointing_kwargs",
        ),
        ({"model": build("llama")}, "does not work with a model without auxiliary losses"),
        (
            {"model": add_auxiliary_losses(build("llama"), heads_only=True, intermediate_layers=None)},
            "does not work with a model whose body is not trained",
        ),
    ],
)
def test_what_keeps_gradients_from_being_computed_is_refused(make_trainer, setting, changes, message):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*{message}"):
        make_trainer(**setting, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, "does not work with torch_compile"),
        ({"optim": "lomo"}, "does not work with optim='lomo'"),
        ({}, r'needs the package torchjd; install it with pip install "torchjd\[quadprog-projector\]"'),
    ],
)
def test_what_does_not_fit_an_aggregator_is_refused(make_trainer, monkeypatch, changes, message):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchjd" else find_spec(name))
    with pytest.raises(ValueError, match=message):
        make_trainer(gradient_aggregator="upgrad", **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_aggregator": "mgda"}, r"gradient_aggregator is 'mgda'; it must be one of \['upgrad'\]"),
        ({"log_term_gradients": -1}, "log_term_gradients is -1; it must be 0 or more"),
    ],
)
def test_wrong_values_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)
