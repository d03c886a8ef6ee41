"""Layer dropout: rates, rows that are skipped, and everything that it must leave as it is."""

from typing import Any

import pytest
import torch
from transformers import set_seed

from modeling_charformer import CharformerConfig, CharformerForSequenceClassification
from modeling_charformer.layers_charformer import rows_to_run
from tests.helpers import TINY


def draws(config: CharformerConfig, rows: int, progress: float | None = None) -> torch.Tensor:
    """Which layers run on which rows, `(layers, rows)`."""
    drawn: Any = rows_to_run(config, torch.zeros(rows, 1, 1), progress, True)
    return torch.stack(drawn)[:, :, 0, 0]


def draw(model, ids, progress=None, seed=3) -> torch.Tensor:
    """The draws that a forward pass makes after `set_seed(seed)`."""
    set_seed(seed)
    return draws(model.config, len(ids), progress)


@pytest.mark.parametrize(
    ("schedule", "progress", "scale"),
    [("constant", None, 1.0), ("constant", 0.5, 1.0), ("exponential", 0.5, 0.41421), ("exponential", 1.0, 1.0)],
)
def test_rates_rise_with_depth_and_follow_the_schedule(schedule, progress, scale):
    config = CharformerConfig(num_hidden_layers=5, layer_dropout=0.4, layer_dropout_schedule=schedule)
    rows = 20_000
    runs = draws(config, rows, progress)
    assert runs.shape == (5, rows)
    dropped = 1 - runs.float().mean(1)
    assert dropped[0] == 0
    expected = 0.4 * scale * torch.tensor([0.0, 0.189207, 0.414214, 0.681793, 1.0])  # 2^(l / 4) - 1
    standard_errors = (expected * (1 - expected) / rows).sqrt()
    assert ((dropped - expected).abs() <= 4 * standard_errors).all()
    # Rows are drawn one by one, and so are layers.
    assert torch.corrcoef(runs[1:].float()).fill_diagonal_(0).abs().max() < 0.03


def test_exponential_schedule_begins_without_dropout(make_model, make_ids):
    model = make_model(layer_dropout=0.9, layer_dropout_schedule="exponential")
    assert draw(model, make_ids(batch=100), progress=0.0).all()
    assert draw(model, make_ids(batch=100), progress=None).all()


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_dropped_rows_leave_a_layer_as_they_came(make_model, make_ids, placement):
    model, ids = make_model(layer_dropout=0.7, norm_placement=placement), make_ids(batch=12)
    runs, states = draw(model, ids), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _layer, inputs, output: states.append((inputs[0], output)))
    set_seed(3)
    model(ids, labels=ids)
    assert runs[0].all()
    assert 0 < runs[1:].sum() < runs[1:].numel()
    changed = torch.stack([(before != after).flatten(1).any(1) for before, after in states])
    assert torch.equal(changed, runs)
    for layer, (before, after), kept in zip(model.model.layers, [*states], runs, strict=True):
        positions = torch.arange(20)[None]
        torch.testing.assert_close(after[kept], layer(before, position_ids=positions)[kept])


def test_dropped_rows_give_a_layer_no_gradient(make_model, make_ids):
    model, ids, gradients = make_model(layer_dropout=0.7), make_ids(batch=12), []
    runs = draw(model, ids)[2]
    assert 0 < runs.sum() < 12
    model.model.layers[2].mlp.register_full_backward_hook(lambda _mlp, _inputs, output: gradients.append(output[0]))
    set_seed(3)
    model(ids, labels=ids).loss.backward()
    assert torch.equal((gradients[0] != 0).flatten(1).any(1), runs)


def test_layer_that_all_rows_skip_has_gradients_of_zero(make_model, make_ids):
    """Not `None`: DistributedDataParallel waits for a gradient of each parameter."""
    model, ids = make_model(layer_dropout=0.9999), make_ids()
    assert not draw(model, ids)[2].any()
    set_seed(3)
    losses = model(ids, labels=ids).loss_dict
    losses["next_char"].backward()
    for parameter in model.model.layers[2].parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    assert model.model.layers[0].mlp.fc2.weight.grad.any()


def test_head_of_a_dropped_layer_reads_the_layer_below(make_model, make_ids):
    model, ids = make_model(layer_dropout=0.9999, num_hidden_layers=4, num_targets=1), make_ids()
    model.auxiliary_heads["layer_3"].load_state_dict(model.auxiliary_heads["layer_2"].state_dict())
    seed = next(seed for seed in range(100) if draw(model, ids, seed=seed).sum(1).tolist() == [2, 2, 0, 0])
    set_seed(seed)
    losses = model(ids, labels=ids).loss_dict
    assert losses["layer_3"] == losses["layer_2"] != losses["layer_1"]


def test_dropped_rows_keep_their_last_positions(make_model, make_ids):
    model, ids = make_model(layer_dropout=0.7).model, make_ids(batch=12)
    results = []
    for positions in (0, 2):
        set_seed(3)
        results.append(model(ids, positions_to_keep=positions).last_hidden_state[:, -2:])
    torch.testing.assert_close(*results)


def test_nothing_is_drawn_without_layer_dropout_or_in_evaluation(make_model, make_ids):
    ids = make_ids()
    for model in (make_model(), make_model(layer_dropout=0.9).eval()):
        state = torch.get_rng_state()
        model(ids, labels=ids)
        assert torch.equal(torch.get_rng_state(), state)
    model = make_model(layer_dropout=0.9)
    model(ids, labels=ids)
    assert not torch.equal(torch.get_rng_state(), state)  # this test would see a draw


def test_evaluation_and_generation_use_every_layer(make_model, make_ids):
    plain, dropping, ids = make_model().eval(), make_model(layer_dropout=0.9).eval(), make_ids()
    torch.testing.assert_close(plain(ids, labels=ids).loss, dropping(ids, labels=ids).loss)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(plain.generate(ids, **settings), dropping.generate(ids, **settings))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_find_the_same_draw(make_model, make_ids, reentrant):
    ids, results = make_ids(batch=8), []
    for checkpointing in (False, True):
        model = make_model(layer_dropout=0.7, activation_dropout=0.1)
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        set_seed(3)
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        results.append((output.loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("embedded", [False, True])
def test_classifiers_and_the_body_pass_on_the_progress(make_ids, embedded):
    fields: dict[str, Any] = {"num_labels": 2, "layer_dropout": 0.9, "layer_dropout_schedule": "exponential"}
    config = CharformerConfig(**(TINY | fields))
    model, ids, states = CharformerForSequenceClassification(config).train(), make_ids(batch=30), []
    inputs = {"inputs_embeds": model.model.embed_tokens(ids)} if embedded else {"input_ids": ids}
    for progress in (0.0, 1.0):
        set_seed(3)
        states.append(model(**inputs, labels=ids[:, 0] % 2, training_progress=progress).logits)
    changed = (states[0] != states[1]).any(1)
    assert torch.equal(~changed, draw(model, ids, 1.0).all(0))
    with pytest.raises(ValueError, match=r"training_progress is 1\.5"):
        model.model(ids, training_progress=1.5)


@pytest.mark.slow
def test_compiled_body_needs_no_graph_for_each_rate(make_model, make_ids):
    model = make_model(layer_dropout=0.9, layer_dropout_schedule="exponential", num_hidden_layers=2).model
    ids, graphs = make_ids(batch=8), torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    compiled, before = torch.compile(model, backend="aot_eager", fullgraph=True), graphs["unique_graphs"]
    for progress in (0.1, 0.4, 0.7, 0.9):
        states = []
        for step in (model, compiled):
            set_seed(3)
            states.append(step(ids, training_progress=progress, use_cache=False).last_hidden_state)
        torch.testing.assert_close(*states)
    assert 1 <= graphs["unique_graphs"] - before <= 2
    torch._dynamo.reset()
