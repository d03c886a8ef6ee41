"""`position_share`: terms computed on some of the positions have the expected value and gradient of the whole term."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from modeling_charformer import CharformerConfig, position_sampling
from modeling_charformer.auxiliary_losses import Targets, causal_lm_losses, sampled_loss
from modeling_charformer.loss_settings import AuxiliaryLossSettings, LossTerm
from modeling_charformer.position_sampling import PositionSampler, SampledPositions


TERM = LossTerm("layer_1_target_2", 1, 2, 0.5, False)


def sampler(share: float, step: int | None = 0, seed: int | None = 0) -> PositionSampler:
    return PositionSampler(AuxiliaryLossSettings(num_layers=3, position_share=share), seed, step)


def ragged_labels() -> torch.Tensor:
    """Rows of different numbers of targets: all, some in two parts, few, none."""
    labels = torch.randint(0, 11, (4, 24), generator=torch.Generator().manual_seed(3))
    labels[1, 9:13], labels[2, 5:], labels[3] = -100, -100, -100
    return labels


@pytest.mark.parametrize("share", [0.01, 1 / 7, 0.5, 0.9])
def test_draws_are_one_position_of_each_stratum_of_each_row(share):
    targets = Targets({"labels": ragged_labels()}, 2).ahead(2)
    for step in range(20):
        sample = sampler(share, step).sample(TERM, targets)
        for row, row_targets in enumerate(targets.tolist()):
            counted = [position for position, target in enumerate(row_targets) if target != -100]
            strata = math.ceil(share * len(counted))
            borders = [number * len(counted) // strata for number in range(strata + 1)] if strata else []
            kept = sample.targets[row] != -100
            assert int(kept.sum()) == strata
            drawn = sample.positions[row, kept].tolist()
            for number, position in enumerate(drawn):
                assert position in counted[borders[number] : borders[number + 1]]
                assert row_targets[position] == sample.targets[row, number]
                assert sample.weights[row, number] == borders[number + 1] - borders[number]
            assert not sample.weights[row, ~kept].any()


def test_every_position_is_drawn_equally_often_for_its_stratum():
    targets, draws = torch.zeros(1, 40, dtype=torch.long), 1500
    positions = torch.cat([sampler(0.1, step).sample(TERM, targets).positions for step in range(draws)])
    frequencies = positions.flatten().bincount(minlength=40) / draws
    # Five standard errors of a frequency of 1/10.
    assert ((frequencies - 0.1).abs() < 5 * math.sqrt(0.1 * 0.9 / draws)).all()
    # The draws of different strata, of successive steps and of different terms have nothing to do with each other.
    centred = positions.double() - positions.double().mean(0)
    other = torch.cat([sampler(0.1, s).sample(TERM._replace(offset=1), targets).positions for s in range(draws)])
    other = other.double() - other.double().mean(0)
    series = [(centred[:, 0], centred[:, 1]), (centred[1:, 0], centred[:-1, 0]), (centred[:, 0], other[:, 0])]
    for one, two in series:
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / math.sqrt(draws)


def deviations(draw, draws: int = 400) -> torch.Tensor:
    """Of the mean over draws of the value and of each gradient, in standard errors, from the term on all positions."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(4, 24, 3, generator=generator, requires_grad=True)
    weight = torch.randn(11, 3, generator=generator, requires_grad=True)
    targets = Targets({"labels": ragged_labels()}, 2)

    def results(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value.detach()[None], *(g.flatten() for g in torch.autograd.grad(value, (hidden, weight)))])

    def head(states: torch.Tensor) -> list[torch.Tensor]:
        return [states @ weight.T]

    whole = results(causal_lm_losses(hidden, head, [TERM], targets, 11)[TERM.name])
    estimates = []
    for step in range(draws):
        sample = draw(step, targets.ahead(2))
        estimates.append(results(sampled_loss(sample.of(hidden), head, TERM, sample, targets, 11)))
    mean, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / math.sqrt(draws)
    # Some gradients are known exactly, like those of the states of rows without targets.
    return (mean - whole) / error.clamp(min=1e-6)


@pytest.mark.slow
def test_expected_value_and_gradients_are_those_of_all_positions(monkeypatch):
    found = deviations(lambda step, targets: sampler(0.6, step).sample(TERM, targets))
    assert found.abs().max() < 5 and 0.5 < found[found.abs() > 1e-3].square().mean() < 2

    def unweighted(step: int, targets: torch.Tensor) -> SampledPositions:
        sample = sampler(0.6, step).sample(TERM, targets)
        even = (targets != -100).sum(1, keepdim=True) / (sample.targets != -100).sum(1, keepdim=True).clamp(min=1)
        return sample._replace(weights=even.expand_as(sample.weights))

    # Controls: strata that count alike although they differ in length; positions from the first half of each stratum.
    assert deviations(unweighted).square().mean() > 2
    mixed = position_sampling._mixed
    monkeypatch.setattr(position_sampling, "_mixed", lambda numbers: mixed(numbers) >> 1)
    assert deviations(lambda step, targets: sampler(0.6, step).sample(TERM, targets)).square().mean() > 2


SETTINGS = [
    {"target_heads": "sequential", "num_targets": 3},
    {"target_heads": "residual", "norm_placement": "post"},
    {"loss_weighting": "uncertainty"},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_losses_of_a_model_keep_their_expectation(make_model, make_ids, settings):
    """On padded and on packed rows."""
    whole, part = make_model(**settings), make_model(**settings, position_share=0.25)
    for block in whole.target_blocks.values():
        torch.nn.init.normal_(block.linear.weight, std=0.3)
    part.load_state_dict(whole.state_dict())
    ids = make_ids(batch=2, length=20)
    labels, places = ids.clone(), torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    labels[1, 15:] = -100
    inputs = {"labels": labels, "position_ids": places, "use_cache": False}
    expected, draws = whole(ids, **inputs).loss_dict, 100
    with torch.no_grad():
        values = [part(ids, **inputs, training_step=step).loss_dict for step in range(draws)]
    for name, value in expected.items():
        drawn = torch.stack([one[name] for one in values])
        if name in ("next_char", "last_position", "uncertainty"):
            torch.testing.assert_close(drawn, value.detach().expand(draws))
        else:
            assert drawn.std() > 0.01
            assert abs(drawn.mean() - value) < 4 * drawn.std() / math.sqrt(draws), name


def test_all_drawn_is_the_whole_loss_with_its_gradient(make_model, make_ids):
    """One position in each stratum: the estimate is exact."""
    ids, results = make_ids(length=9), []
    for share in (1.0, 0.999):
        model = make_model(num_targets=3, target_heads="sequential", position_share=share)
        output = model(ids, labels=ids, training_step=3)
        output.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((output.loss_dict, gradients))
    torch.testing.assert_close(results[0], results[1])


def test_heads_norms_and_blocks_run_on_the_share_alone(make_model, make_ids):
    model = make_model(num_targets=3, target_heads="residual", position_share=0.25)
    rows: dict[str, list[int]] = {}
    watched = dict(model.auxiliary_heads) | {"norm": model.model.norm, "block": model.target_blocks["target_3"]}
    for name, module in watched.items():
        module.register_forward_hook(
            lambda _module, args, _output, name=name: rows.setdefault(name, []).append(args[0].shape[:-1].numel())
        )
    ids = make_ids(batch=2, length=20)
    model(ids, labels=ids, training_step=0, use_cache=False)
    assert all(rows[name] == [10] for name in (*model.auxiliary_heads, "block"))
    assert sorted(rows["norm"]) == [10] * 6 + [40]  # two layers of three terms, and the final layer's own


def test_parts_of_a_step_see_the_same_positions(make_model, make_ids):
    """So the parts of a batch add up to the whole batch, whether they are micro-batches or on processes."""
    model, ids = make_model(num_targets=3, position_share=0.2), make_ids(batch=4, length=12)
    labels = ids.clone()
    labels[0, 3:], labels[1, 7:], labels[3, :] = -100, -100, -100
    counts = Targets({"labels": labels}, 3).counts()
    inputs = {"training_step": 7, "training_seed": 5}
    whole = model(ids, labels=labels, **inputs)
    parts = [
        model(ids[rows], labels=labels[rows], target_counts=counts, num_items_in_batch=counts[0, 0], **inputs)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    for name, value in whole.loss_dict.items():
        torch.testing.assert_close(sum(part.loss_dict[name] for part in parts), value)


def test_draw_follows_from_seed_and_step_or_from_torchs_random_numbers(make_model, make_ids):
    model, ids = make_model(position_share=0.1), make_ids()

    def value(**inputs) -> float:
        return model(ids, labels=ids, **inputs).loss_dict["layer_1"].item()

    given = value(training_step=4, training_seed=2)
    assert given == value(training_step=4, training_seed=2)
    assert given not in (value(training_step=5, training_seed=2), value(training_step=4, training_seed=3))
    assert value(training_step=2**33 + 1, training_seed=-1) > 0
    # Without a step the positions change from pass to pass.
    torch.manual_seed(1)
    drawn = [value() for _ in range(4)]
    assert len(set(drawn)) == 4
    torch.manual_seed(1)
    assert drawn == [value() for _ in range(4)]


@pytest.mark.slow
def test_compiled_draws_are_the_eager_ones_in_one_graph(make_model, make_ids):
    ids, model, graphs = make_ids(), make_model(position_share=0.2, num_targets=2), []
    other = make_model(position_share=0.3, num_targets=2)

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, backend=backend, fullgraph=True)
    for number in range(5):
        inputs = {"labels": ids, "training_step": number, "training_seed": 3, "use_cache": False}
        torch.testing.assert_close(step(ids, **inputs).loss_dict, model(ids, **inputs).loss_dict)
    assert len(graphs) <= 2  # torch compiles anew where a number first changes
    # A second model with another share, in the same process.
    compiled = torch.compile(other, backend=backend, fullgraph=True)(ids, **inputs)
    torch.testing.assert_close(compiled.loss_dict, other(ids, **inputs).loss_dict)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), float("inf"), True, "half", None])
def test_wrong_shares_are_refused(share):
    with pytest.raises(ValueError, match="position_share is .*; it must be a number above 0, at most 1"):
        AuxiliaryLossSettings(num_layers=4, position_share=share)


def test_share_does_not_fit_a_loss_at_the_last_position(make_model):
    with pytest.raises(StrictDataclassClassValidationError, match="position_share is 0.5 and position_loss 'last'"):
        make_model(position_loss="last", position_share=0.5)
    assert CharformerConfig(position_loss="last", position_share=1).position_share == 1


def test_share_can_change_in_training(make_model, make_ids):
    model, ids = make_model(position_share=0.5), make_ids()
    sampled = model(ids, labels=ids, training_step=0).loss_dict["layer_1"]
    model.loss_settings.position_share = 0.2
    other = make_model(position_share=0.2)
    expected = other(ids, labels=ids, training_step=0).loss_dict["layer_1"]
    assert model(ids, labels=ids, training_step=0).loss_dict["layer_1"] == expected != sampled
