import numpy as np
import pytest

from charformer_training.plots import plot_bits_by_position, plot_loss_terms


def history(layers: int) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = [
        {"step": step, "loss": 3.0, "loss_next_char": 2.0 / step, "loss_last_position": 2.1, "loss_target_2": 2.5}
        | {f"loss_layer_{layer}": layer / step for layer in range(1, layers + 1)}
        for step in range(1, 6)
    ]
    del entries[3:][0]["loss_target_2"]
    return [*entries, {"step": 5, "eval_loss": 1.9, "eval_loss_next_char": 1.9}]


def drawn(axis) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): ([*line.get_xdata()], [*line.get_ydata()]) for line in axis.lines}


def test_each_term_is_drawn_at_the_steps_that_logged_it(tmp_path, figures):
    plot_loss_terms(history(3), {1: 3}, tmp_path / "terms.png", "a run", "byte")
    (figure,) = figures
    final, intermediate = figure.axes
    assert drawn(final) == {
        "next_char": ([1, 2, 3, 4, 5], [2.0, 1.0, 2 / 3, 0.5, 0.4]),
        "last_position": ([1, 2, 3, 4, 5], [2.1] * 5),
        "target_2": ([1, 2, 3, 5], [2.5] * 4),
        "next_char, validation": ([5], [1.9]),
    }
    terms = drawn(intermediate)
    assert terms["layer_2"] == ([1, 2, 3, 4, 5], [2.0, 1.0, 2 / 3, 0.5, 0.4])
    (dropped,) = terms.keys() - {"layer_1", "layer_2", "layer_3"}
    assert terms[dropped][0] == [3, 3]  # a vertical line
    assert [text.get_text() for text in intermediate.texts] == ["layer 1 drops out"]
    assert final.get_title() == "a run\nfinal layer" and intermediate.get_xlabel() == "step"
    assert {axis.get_ylabel() for axis in figure.axes} == {"loss (nats per byte)"}
    assert (tmp_path / "terms.png").read_bytes().startswith(b"\x89PNG")


def test_many_layers_are_drawn_without_names(tmp_path, figures):
    plot_loss_terms(history(20), dict.fromkeys(range(1, 20), 3), tmp_path / "terms.png", "a run", "byte")
    _, intermediate = figures[0].axes
    assert len(intermediate.lines) == 20 + 19 and intermediate.get_legend() is None and not intermediate.texts


@pytest.mark.parametrize(("unit", "label"), [(None, "loss (nats)"), ("token", "loss (nats per token)")])
def test_a_model_without_terms_has_its_loss_drawn(tmp_path, figures, unit, label):
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"train_loss": 2.5}]
    plot_loss_terms(log, {}, tmp_path / "terms.png", "a $run_{$\x1b", unit)  # no name is worth a picture
    (axis,) = figures[0].axes
    assert drawn(axis) == {"loss": ([1, 2], [3.0, 2.0]), "loss, validation": ([2], [2.5])}
    assert axis.get_ylabel() == label and axis.get_title() == "a $run_{$\\x1b\nfinal layer"


def test_bits_by_position_draws_every_layer_and_their_means(tmp_path, figures):
    bits = {"next_char": np.array([4.0, 2.0]), "layer_1": np.array([6.0, 4.0])}
    plot_bits_by_position(bits, tmp_path / "bits.png")
    context, depth = figures[0].axes
    assert drawn(context) == {"layer 1": ([0, 1], [6.0, 4.0]), "the model": ([0, 1], [4.0, 2.0])}
    assert [*drawn(depth).values()] == [([1, 2], [5.0, 3.0])]
    assert context.get_ylabel() == "bits per byte"
