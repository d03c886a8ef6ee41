"""Values, weights and gradients of the losses, against references written out in plain PyTorch."""

import math
from typing import Any

import pytest
import torch

from modeling_charformer import CharformerConfig, CharformerForCausalLM, cross_entropy, loss_settings
from modeling_charformer.auxiliary_losses import (
    Targets,
    causal_lm_losses,
    last_target_positions,
    shifted_targets,
)
from modeling_charformer.cross_entropy import chunked_cross_entropy_sums, cross_entropy_sum
from modeling_charformer.loss_settings import (
    AuxiliaryLossSettings,
    LossTerm,
    ScheduleContext,
    classifier_settings,
    register_schedule,
)


def reference_losses(model: CharformerForCausalLM, ids, labels, attention_mask=None) -> dict[str, torch.Tensor]:
    """Every loss of the definition, position by position."""
    n, window_last = model.config.num_hidden_layers, model.config.position_loss == "last"
    outputs = model.model(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    losses = {}
    for layer in range(1, n + 1):
        hidden = outputs.last_hidden_state if layer == n else model.model.norm(outputs.hidden_states[layer])
        for offset in range(1, model.config.num_targets + 1):
            name = {(n, 1): "next_char"}.get((layer, offset))
            if name is None:
                name = (
                    f"target_{offset}"
                    if layer == n
                    else f"layer_{layer}" + (f"_target_{offset}" if offset > 1 else "")
                )
            if name != "next_char" and name not in model.auxiliary_heads:
                continue
            head = model.lm_head if name == "next_char" else model.auxiliary_heads[name]
            by_row = []
            for row in range(ids.shape[0]):
                terms = []
                for position in range(ids.shape[1] - offset):
                    target = labels[row, position + offset]
                    if target != -100:
                        logits = head(hidden[row, position]).float()
                        terms.append(torch.logsumexp(logits, 0) - logits[target])
                by_row.append(terms)
            last = [terms[-1] for terms in by_row if terms]
            every = [term for terms in by_row for term in terms]
            if name == "next_char":
                losses["next_char"] = torch.stack(every).mean()
                losses["last_position"] = torch.stack(last).mean()
            else:
                losses[name] = torch.stack(last if window_last else every).mean()
    return losses


def reference_weights(config: CharformerConfig, progress: float) -> dict[str, float]:
    n = config.num_hidden_layers
    targets = [1.0] + list(config.target_weights or [0.5] * (config.num_targets - 1))
    chosen: Any = config.intermediate_layers
    layers = range(1, n) if chosen == "all" else (chosen or [])
    weights = {"next_char": 1.0, "last_position": 0.0}
    if config.position_loss == "last":
        weights = {"next_char": 0.0, "last_position": 1.0}
    for offset in range(2, config.num_targets + 1):
        weights[f"target_{offset}"] = targets[offset - 1]
    for layer in layers:
        end = layer / (2 * n)
        factor = {
            "constant": 1.0,
            "paper": 1.0 if progress < end else 0.0,
            "linear": max(0.0, 1 - progress / end),
            "cosine": 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress / end)),
        }[config.intermediate_schedule]
        for offset in range(1, config.num_targets + 1):
            name = f"layer_{layer}" + (f"_target_{offset}" if offset > 1 else "")
            weights[name] = targets[offset - 1] * config.intermediate_weight * factor
    return weights


GRID = [
    {"num_targets": 1, "intermediate_layers": None},
    {"num_targets": 2},
    {"num_targets": 2, "norm_placement": "post"},
    {"num_targets": 3, "target_weights": [0.7, 0.2], "intermediate_layers": [2], "intermediate_weight": 0.3},
    {"num_targets": 4, "intermediate_schedule": "linear"},
    {"num_targets": 2, "intermediate_schedule": "cosine", "intermediate_layers": [1]},
    {"num_targets": 2, "intermediate_schedule": "constant", "intermediate_weight": 0.1},
    {"num_targets": 3, "position_loss": "last"},
    {"num_targets": 2, "target_weights": [0.0], "intermediate_weight": 0.0},
]


@pytest.mark.parametrize("progress", [None, 0.25, 0.7])
@pytest.mark.parametrize("labelling", ["all", "ignored", "padded_left", "padded_right"])
@pytest.mark.parametrize("settings", GRID, ids=str)
def test_losses_weights_and_gradients_match_the_reference(make_model, make_ids, settings, labelling, progress):
    model, ids = make_model(**settings), make_ids(batch=2, length=9)
    labels, mask = ids.clone(), None
    if labelling == "ignored":
        labels[0, 3:6], labels[1, -2:] = -100, -100
    elif labelling.startswith("padded"):
        mask = torch.ones_like(ids)
        mask[1, : 4 if labelling == "padded_left" else 0] = 0
        mask[1, 6 if labelling == "padded_right" else 9 :] = 0
        labels[mask == 0] = -100

    output = model(ids, attention_mask=mask, labels=labels, training_progress=progress, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    weights = reference_weights(model.config, progress or 0.0)
    expected = reference_losses(model, ids, labels, mask)
    computed = {name for name, weight in weights.items() if weight > 0} | {"next_char", "last_position"}
    assert set(output.loss_dict) == computed == set(output.loss_weights)
    for name, value in output.loss_dict.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert value.shape == () and value.dtype == torch.float32
        assert output.loss_weights[name] == pytest.approx(weights[name])

    model.zero_grad()
    total = torch.stack([weight * expected[name] for name, weight in weights.items() if weight > 0]).sum()
    torch.testing.assert_close(output.loss, total, rtol=1e-5, atol=1e-6)
    total.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
        else:
            assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32_for_half_precision_models(make_model, make_ids, dtype):
    model, ids = make_model(), make_ids()
    exact = model(ids, labels=ids).loss_dict
    output = model.to(dtype)(ids, labels=ids)
    assert output.logits.dtype == dtype
    for name, value in output.loss_dict.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.4, 0.9])
def test_active_heads_get_a_gradient_and_dropped_heads_none(make_model, make_ids, progress):
    model, ids = make_model(num_targets=3), make_ids()
    output = model(ids, labels=ids, training_progress=progress)
    output.loss.backward()
    for name, head in model.auxiliary_heads.items():
        if output.loss_weights.get(name, 0.0) > 0:
            assert head.weight.grad.abs().sum() > 0 and head.bias.grad.abs().sum() > 0, name
        else:
            assert head.weight.grad is None and head.bias.grad is None, name
    layers_left = sum(1 for layer in (1, 2) if progress < layer / 6)
    assert sum(name.startswith("layer") for name in output.loss_dict) == 3 * layers_left


def test_intermediate_losses_reach_only_the_layers_below(make_model, make_ids):
    model, ids = make_model(num_targets=1), make_ids()
    model(ids, labels=ids).loss_dict["layer_2"].backward()
    reached = [layer.mlp.fc1.weight.grad is not None for layer in model.model.layers]
    assert reached == [True, True, False]


def test_last_position_monitor_carries_no_gradient(make_model, make_ids):
    ids = make_ids()
    assert not make_model()(ids, labels=ids).loss_dict["last_position"].requires_grad
    output = make_model(position_loss="last")(ids, labels=ids)
    assert output.loss_dict["last_position"].requires_grad and not output.loss_dict["next_char"].requires_grad


def test_heads_of_weight_zero_are_not_run(make_model, make_ids):
    model, ids = make_model(num_targets=2, target_weights=[0.0], intermediate_weight=0.0), make_ids()
    for head in model.auxiliary_heads.values():
        head.register_forward_hook(lambda *_: pytest.fail("a head of weight 0 was run"))
    model(ids, labels=ids)


def test_evaluation_has_the_language_model_loss_alone(make_model, make_ids):
    ids = make_ids()
    for settings in ({}, {"position_loss": "last"}):
        model = make_model(**settings).eval()
        output = model(ids, labels=ids)
        assert set(output.loss_dict) == {"next_char", "last_position"}
        assert output.loss_weights == {"next_char": 1.0, "last_position": 0.0}
        assert output.loss == output.loss_dict["next_char"]


def test_zero_weights_train_like_the_plain_model_at_the_same_seed(make_model, make_ids):
    def losses(**settings) -> list[float]:
        model = make_model(attention_dropout=0.1, activation_dropout=0.1, **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        values = []
        for step in range(5):
            ids = make_ids(seed=step)
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    plain = losses(num_targets=1, intermediate_layers=None)
    assert losses(num_targets=3, target_weights=[0.0, 0.0], intermediate_weight=0.0) == plain
    assert losses(num_targets=3) != plain


def test_paper_schedule_drops_the_first_layer_first_and_all_by_half():
    settings = AuxiliaryLossSettings(num_layers=4)

    def layers_at(progress: float) -> set[int]:
        weights = settings.weights_at(progress)
        return {term.layer for term in settings.terms if term.layer < 4 and weights[term.name] > 0}

    assert layers_at(0.0) == layers_at(0.1249) == {1, 2, 3}
    assert layers_at(0.125) == {2, 3}
    assert layers_at(0.25) == {3}
    assert layers_at(0.375) == layers_at(1.0) == set()


def moment(layer: int = 8, offset: int = 1, progress: float = 0.0, step: int = 0) -> ScheduleContext:
    return ScheduleContext(
        layer, offset, num_layers=8, num_targets=4, layers=(1, 2, 3, 4, 5, 6, 7), progress=progress, step=step
    )


@pytest.mark.parametrize("name", ["paper", "constant", "linear", "cosine"])
def test_schedules_stay_in_the_unit_interval_and_never_rise(name):
    for layer in (1, 3, 7):
        values = [loss_settings._SCHEDULES[name](moment(layer, progress=step / 100)) for step in range(101)]
        assert values[0] == 1.0 and all(0.0 <= value <= 1.0 for value in values)
        assert values == sorted(values, reverse=True)
        assert values[-1] == (1.0 if name == "constant" else 0.0)


def test_terms_of_two_targets_and_chosen_layers():
    settings = AuxiliaryLossSettings(
        num_layers=4,
        target_weights=[0.25],
        intermediate_layers=[3, 1],
        intermediate_weight=0.5,
        term_weights={"layer_3": 0.8},
    )
    assert settings.terms == (
        LossTerm("next_char", 4, 1, 1.0, True, "all"),
        LossTerm("last_position", 4, 1, 0.0, True, "last"),
        LossTerm("target_2", 4, 2, 0.25, False),
        LossTerm("layer_1", 1, 1, 0.5, False),
        LossTerm("layer_1_target_2", 1, 2, 0.125, False),
        LossTerm("layer_3", 3, 1, 0.8, False),
        LossTerm("layer_3_target_2", 3, 2, 0.125, False),
    )


def test_forward_schedule_brings_targets_in_one_after_the_other():
    settings = AuxiliaryLossSettings(num_layers=2, num_targets=4, target_schedule="forward", intermediate_layers=None)

    def targets_at(progress: float) -> set[int]:
        weights = settings.weights_at(progress)
        return {term.offset for term in settings.terms if weights[term.name] > 0}

    assert targets_at(0.0) == targets_at(0.12) == {1}
    assert targets_at(0.125) == {1, 2}
    assert targets_at(0.25) == {1, 2, 3}
    assert targets_at(0.375) == targets_at(1.0) == {1, 2, 3, 4}


def test_random_schedule_takes_one_layer_a_step_and_all_equally_often():
    counts = dict.fromkeys(range(1, 8), 0)
    for step in range(7000):
        chosen = [layer for layer in counts if loss_settings.random_schedule(moment(layer, step=step))]
        assert len(chosen) == 1
        counts[chosen[0]] += 1
    assert all(900 < count < 1100 for count in counts.values()), counts


@pytest.mark.parametrize("interval", [2, 4, 8])
def test_rotating_schedule_takes_every_layer_once_an_interval(interval):
    settings = AuxiliaryLossSettings(num_layers=9, num_targets=1, intermediate_schedule=f"rotate_{interval}")
    for layer in settings.layers:
        active = [settings.weights_at(0.5, step)[f"layer_{layer}"] for step in range(3 * interval)]
        assert sum(active) == 3 and active[:interval] == active[interval : 2 * interval]
    for step in range(interval):
        weights = settings.weights_at(0.5, step)
        chosen = [layer for layer in settings.layers if weights[f"layer_{layer}"]]
        assert chosen == sorted({*range(1 + step % interval, 9, interval)})


def test_terms_that_a_short_training_never_reaches_are_named():
    rotating = AuxiliaryLossSettings(num_layers=6, intermediate_schedule="rotate_4")
    assert rotating.never_trained(2) == ["layer_3", "layer_3_target_2", "layer_4", "layer_4_target_2"]
    assert rotating.never_trained(4) == []
    forward = AuxiliaryLossSettings(num_layers=1, num_targets=3, target_schedule="forward")
    assert forward.never_trained(1) == ["target_2", "target_3"]
    assert forward.never_trained(2) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"term_weights": {"layer_9": 1.0}}, "term_weights names 'layer_9'; the terms"),
        ({"term_weights": {"target_2": float("nan")}}, r"term_weights\['target_2'\] is nan"),
        ({"target_schedule": "backward"}, "target_schedule is 'backward'; known schedules"),
        ({"loss_weighting": "magic"}, "loss_weighting is 'magic'"),
        ({"num_targets": 0}, "num_targets is 0"),
        ({"intermediate_layers": [4]}, r"intermediate_layers contains \[4\]"),
    ],
    ids=str,
)
def test_wrong_settings_name_field_value_and_choice(settings, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryLossSettings(num_layers=4, **settings)


@pytest.mark.parametrize(("num_layers", "expected"), [(12, (4, 8)), (4, (1, 3)), (2, (1,)), (1, ())])
def test_classifiers_sit_after_one_and_two_thirds(num_layers, expected):
    settings = classifier_settings(num_layers)
    assert settings.layers == expected
    assert settings.weights_at(0.9) == {
        "classification": 1.0,
        **{f"layer_{layer}": 0.3 for layer in expected},
    }


def test_chunks_give_the_same_losses_and_gradients(monkeypatch):
    heads, hidden = [torch.nn.Linear(6, 11) for _ in range(2)], torch.randn(3, 7, 6, requires_grad=True)
    targets = torch.randint(0, 11, (2, 3, 7))
    targets[0, 1, 2:] = -100
    weights = [hidden, *heads[0].parameters(), *heads[1].parameters()]
    whole = torch.stack([cross_entropy_sum(head(hidden), own) for head, own in zip(heads, targets, strict=True)])
    expected = torch.autograd.grad(whole @ torch.tensor([1.0, 0.3]), weights)
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 5 * 2 * 11)  # pieces of five rows
    pieces = chunked_cross_entropy_sums(hidden, targets, lambda rows: [head(rows) for head in heads], 11)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces @ torch.tensor([1.0, 0.3]), weights), expected)


def test_uncertainty_weighting_is_the_papers_and_learns(make_model, make_ids):
    model, ids = make_model(loss_weighting="uncertainty"), make_ids()
    optimizer = torch.optim.SGD(model.loss_uncertainty.parameters(), lr=0.1)
    for _ in range(3):
        output = model(ids, labels=ids)
        total = torch.zeros(())
        for name, value in output.loss_dict.items():
            fixed = model.loss_settings.weights_at(0.0).get(name, 0.0)
            if fixed:
                s = model.loss_uncertainty.log_variances[name].squeeze()
                total = total + fixed * (torch.exp(-s) * value + s / 2)
                torch.testing.assert_close(output.loss_weights[name], fixed * torch.exp(-s.detach()))
        torch.testing.assert_close(output.loss, total)
        sums = sum(output.loss_weights[name] * value for name, value in output.loss_dict.items())
        torch.testing.assert_close(output.loss, sums)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Losses far above 1/2 nat make each term look uncertain.
    assert all(value > 0 for name, value in model.loss_uncertainty.log_variances.items() if name != "last_position")
    assert set(model.eval()(ids, labels=ids).loss_dict) == {"next_char", "last_position"}


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_outside_its_range_raises(make_model, make_ids, progress):
    ids = make_ids()
    with pytest.raises(ValueError, match="training_progress is"):
        make_model()(ids, labels=ids, training_progress=progress)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_schedule_with_an_impossible_value_raises(make_model, make_ids, value):
    name = f"broken_{value}".replace("-", "minus_")
    register_schedule(name, lambda at: value)
    ids = make_ids()
    with pytest.raises(ValueError, match=f"'{name}' returned .* for layer 1 of 3"):
        make_model(intermediate_schedule=name)(ids, labels=ids)


def test_shifted_targets_and_their_counts():
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100], [7, -100, -100, -100]])
    assert shifted_targets(labels, 1).tolist() == [[2, 3, 4, -100], [6, -100, -100, -100], [-100] * 4]
    assert shifted_targets(labels, 3).tolist()[0] == [4, -100, -100, -100]
    assert Targets({"labels": labels}, 3).counts().tolist() == [[4, 2, 1], [2, 1, 1]]
    assert last_target_positions(shifted_targets(labels, 1)).tolist() == [[2], [0], [0]]


@pytest.mark.parametrize("position_loss", ["all", "last"])
def test_parts_of_a_step_add_up_to_the_whole_batch(make_model, make_ids, position_loss):
    """With the counts of the whole step, however ragged the parts are."""
    model, ids = make_model(num_targets=4, position_loss=position_loss), make_ids(batch=4, length=12)
    labels = ids.clone()
    labels[0, 3:], labels[1, 7:], labels[3, :] = -100, -100, -100
    whole = model(ids, labels=labels)
    counts = Targets({"labels": labels}, 4).counts()
    parts = [
        model(ids[rows], labels=labels[rows], target_counts=counts, num_items_in_batch=counts[0, 0])
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    for name, value in whole.loss_dict.items():
        torch.testing.assert_close(sum(part.loss_dict[name] for part in parts), value)
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)


def test_parts_add_up_with_the_plain_trainers_count_when_rows_are_alike(make_model, make_ids):
    model, ids = make_model(num_targets=3), make_ids(batch=4, length=12)
    whole = model(ids, labels=ids)
    parts = [model(rows, labels=rows, num_items_in_batch=4 * 11) for rows in (ids[:1], ids[1:])]
    for name, value in whole.loss_dict.items():
        torch.testing.assert_close(sum(part.loss_dict[name] for part in parts), value)


def test_a_batch_without_targets_has_zero_losses(make_model, make_ids):
    ids = make_ids()
    output = make_model()(ids, labels=torch.full_like(ids, -100))
    assert output.loss == 0 and all(value == 0 for value in output.loss_dict.values())


def test_losses_of_plain_tensors_without_a_model():
    """The functions need nothing of Charformer's: any hidden states and classifiers will do."""
    hidden, heads = torch.randn(2, 6, 3), {name: torch.nn.Linear(3, 7) for name in ("next_char", "target_2")}
    labels = torch.randint(0, 7, (2, 6))
    labels[1, 4:] = -100
    for last_position_only in (False, True):
        positions = "last" if last_position_only else "all"
        terms = [LossTerm("next_char", 1, 1, 1.0, True, positions), LossTerm("target_2", 1, 2, 0.5, False, positions)]

        def classify(read, terms=terms):
            return [heads[term.name](read) for term in terms]

        losses = causal_lm_losses(hidden, classify, terms, Targets({"labels": labels}, 2), 7)
        for term in terms:
            logits, ends = heads[term.name](hidden), (6, 4)
            values = [
                torch.nn.functional.cross_entropy(
                    logits[row, : end - term.offset][-1 if last_position_only else 0 :],
                    labels[row, term.offset : end][-1 if last_position_only else 0 :],
                    reduction="none",
                )
                for row, end in enumerate(ends)
            ]
            torch.testing.assert_close(losses[term.name], torch.cat(values).mean())


@pytest.mark.parametrize("target_heads", ["residual", "sequential"])
def test_targets_with_blocks_against_the_definition(make_model, make_ids, target_heads):
    model, ids = make_model(num_targets=4, target_heads=target_heads), make_ids()
    for block in model.target_blocks.values():
        torch.nn.init.normal_(block.linear.weight, std=0.2)
        torch.nn.init.normal_(block.linear.bias, std=0.2)
    labels = ids.clone()
    labels[0, 5:9] = -100
    output = model(ids, labels=labels)
    embedded = model.model.embed_tokens(ids)
    hidden = model(ids, return_final_hidden_state=True).final_hidden_state
    silu = torch.nn.functional.silu
    states = {1: hidden}
    for k in (2, 3, 4):
        block = model.target_blocks[f"target_{k}"].linear
        if target_heads == "residual":
            states[k] = hidden + silu(hidden @ block.weight.T + block.bias)
        else:
            before = states[k - 1][:, : 20 - k + 1]
            read = torch.cat([before, embedded[:, k - 1 :]], dim=-1)
            states[k] = before + silu(read @ block.weight.T + block.bias)
        logits = model.auxiliary_heads[f"target_{k}"](states[k])[:, : 20 - k]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, k:].flatten())
        torch.testing.assert_close(output.loss_dict[f"target_{k}"], expected)
    # Drafting computes the same, one position at a time.
    state = hidden[:, 3]
    for k in (2, 3, 4):
        logits, state = model.draft(k, state, ids[:, 3 + k - 1])
        torch.testing.assert_close(logits, model.auxiliary_heads[f"target_{k}"](states[k])[:, 3])
    torch.testing.assert_close(model(inputs_embeds=embedded, labels=labels).loss, output.loss)
    output.loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.target_blocks.parameters())


def test_blocks_begin_as_the_identity_and_change_no_other_weight(make_model, make_ids, tmp_path):
    linear, ids = make_model(num_targets=3), make_ids()
    for target_heads in ("residual", "sequential"):
        model = make_model(num_targets=3, target_heads=target_heads)
        torch.testing.assert_close(model(ids, labels=ids).loss, linear(ids, labels=ids).loss)
        torch.nn.init.normal_(model.target_blocks["target_3"].linear.weight)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).train()
        assert again(ids, labels=ids).loss == model(ids, labels=ids).loss
        assert again.without_auxiliary_heads().num_parameters() == linear.without_auxiliary_heads().num_parameters()
