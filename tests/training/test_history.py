import pytest

from charformer_training.history import curve, drop_steps, final_terms, last_evaluation, term_curves
from modeling_charformer import CharformerConfig


LOG = [
    {"step": 1, "loss": 3.0, "loss_next_char": 2.0, "loss_layer_1": 2.5, "learning_rate": 0.1},
    {"step": 1, "eval_loss": 1.9, "eval_loss_next_char": 1.9, "eval_bpc": 2.8},
    {"step": 2, "loss": 2.0, "loss_next_char": 1.5},
    {"step": 2, "eval_loss": 1.8, "eval_loss_next_char": 1.8, "eval_bpc": 2.6, "eval_runtime": 9.0},
    {"step": 2, "train_loss": 2.5, "train_runtime": 3.0},
]


def test_terms_are_those_of_training_alone():
    assert term_curves(LOG) == {"next_char": ([1, 2], [2.0, 1.5]), "layer_1": ([1], [2.5])}
    assert final_terms(LOG) == {"next_char": (2, 1.5), "layer_1": (1, 2.5)}


def test_curve_of_a_key_has_the_steps_that_logged_it():
    assert curve(LOG, "loss") == ([1, 2], [3.0, 2.0])
    assert curve(LOG, "eval_bpc") == ([1, 2], [2.8, 2.6])
    assert curve(LOG, "eval_bpb") == ([], [])


def test_last_evaluation_is_without_its_speed():
    assert last_evaluation(LOG) == {"eval_loss": 1.8, "eval_loss_next_char": 1.8, "eval_bpc": 2.6}
    assert last_evaluation([]) == {}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {1: 14, 2: 26, 3: 39}),
        ({"intermediate_schedule": "constant"}, {}),
        ({"intermediate_schedule": "linear", "intermediate_layers": [2]}, {2: 26}),
        ({"intermediate_layers": None}, {}),
        ({"intermediate_schedule": "rotate_2"}, {}),
    ],
    ids=str,
)
def test_drop_steps_are_the_first_without_the_layer(settings, expected):
    # 4 layers, 100 steps: layer l has its losses while step / 100 < l / 8
    config = CharformerConfig(num_hidden_layers=4, **settings)
    assert drop_steps(config.language_model_losses(), 100) == expected


def test_drop_steps_are_exact_in_a_long_run():
    config = CharformerConfig(num_hidden_layers=3)
    # While step / 1,000,001 < l / 6.
    assert drop_steps(config.language_model_losses(), 1_000_001) == {1: 166_668, 2: 333_335}
