import struct

import pytest

from charformer_training.plots import drop_steps, plot_loss_terms
from modeling_charformer import CharformerConfig


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


@pytest.mark.parametrize("layers", [0, 3, 20])
def test_picture_is_drawn_from_the_log(tmp_path, layers):
    history = [
        {"step": step, "loss": 3.0, "loss_next_char": 2.0 / step, "loss_last_position": 2.1, "loss_target_2": 2.5}
        | {f"loss_layer_{layer}": 3.0 / step for layer in range(1, layers + 1)}
        for step in range(1, 6)
    ]
    history.append({"step": 5, "eval_loss": 1.9, "eval_loss_next_char": 1.9})
    path = tmp_path / "terms.png"
    plot_loss_terms(history, {1: 3} if layers else {}, path, "a run")
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:24])
    assert width > 800 and height > (900 if layers else 500)
