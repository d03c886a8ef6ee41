"""The gradients of single terms, measured beside training."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from charformer_training import add_auxiliary_losses
from charformer_training.term_gradients import body_parameters, only_term, term_gradients
from tests.training.any_models import build
from tests.training.any_models import make_ids as make_tokens


def terms_of(model, names, **inputs) -> dict[str, Any]:
    """A function for each term that computes its value on a batch of ids."""

    def value(name):
        def of(batch):
            with only_term(model, name):
                losses = model(**batch, labels=batch["input_ids"], **inputs).loss_dict
            return losses[name]

        return of

    return {name: value(name) for name in names}


def flat_gradient(loss, parameters) -> torch.Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    return torch.cat([(zero if one is None else one).flatten() for one, zero in zip(found, zeros, strict=True)])


@pytest.mark.parametrize("kind", ["charformer", "gpt2", "classifier"])
def test_figures_are_those_of_gradients_computed_one_by_one(make_model, make_ids, kind):
    if kind == "charformer":
        model, ids, names = make_model(), make_ids(), ["next_char", "target_2", "layer_1", "layer_2_target_2"]
        body = [weight for name, weight in model.named_parameters() if name.startswith("model.")]
    elif kind == "gpt2":  # whose classifier is the embedding, and so belongs to the body
        model, ids, names = build("gpt2"), make_tokens(), ["next_token", "target_2", "layer_1"]
        add_auxiliary_losses(model, num_targets=2, intermediate_layers=[1])
        body = [weight for name, weight in model.named_parameters() if name.startswith("transformer.")]
    else:
        model, ids = build("bert", AutoModelForSequenceClassification), make_tokens()
        add_auxiliary_losses(model, intermediate_layers=[1, 3])
        names = ["classification", "layer_1", "layer_3"]
        body = [weight for name, weight in model.named_parameters() if name.startswith("bert.")]
    assert {id(weight) for weight in body} == {id(weight) for weight in body_parameters(model)}
    labels = ids if kind != "classifier" else ids[:, 0] % 2
    losses = model(input_ids=ids, labels=labels).loss_dict
    gradients = {name: flat_gradient(losses[name], body) for name in names}

    def value(name):
        def of(batch):
            with only_term(model, name):
                return model(**batch).loss_dict[name]

        return of

    found = term_gradients(model, {name: value(name) for name in names}, [{"input_ids": ids, "labels": labels}])
    assert [*found] == [f"gradient_norm_{names[0]}"] + [
        f"gradient_{figure}_{name}" for name in names[1:] for figure in ("norm", "cosine")
    ]
    for name, gradient in gradients.items():
        assert found[f"gradient_norm_{name}"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        if name != names[0]:
            cosine = torch.cosine_similarity(gradient, gradients[names[0]], dim=0)
            assert found[f"gradient_cosine_{name}"] == pytest.approx(float(cosine), rel=1e-4)
            assert abs(cosine) < 0.999


def test_micro_batches_add_up_to_one_batch(make_model, make_ids):
    model, ids = make_model(), make_ids(batch=6)
    terms = terms_of(model, ["next_char", "layer_1"])
    whole = term_gradients(model, terms, [{"input_ids": ids}])
    thirds = {name: lambda batch, term=term: term(batch) / 3 for name, term in terms.items()}
    parts = term_gradients(model, thirds, [{"input_ids": part} for part in ids.split(2)])
    assert parts == pytest.approx(whole, rel=1e-4)
    assert term_gradients(model, terms, [{"input_ids": ids[:2]}]) != pytest.approx(whole, rel=1e-2)


def test_gradients_are_averaged_before_they_are_measured(make_model, make_ids):
    model, ids = make_model(), make_ids(batch=4)
    terms = terms_of(model, ["next_char", "layer_1"])
    others: list[list[torch.Tensor]] = []

    def keep(gradient):
        others.append(gradient)
        return gradient

    term_gradients(model, terms, [{"input_ids": ids[2:]}], keep)

    def average(gradient):
        return [(one + other) / 2 for one, other in zip(gradient, others.pop(0), strict=True)]

    averaged = term_gradients(model, terms, [{"input_ids": ids[:2]}], average)
    assert averaged == pytest.approx(term_gradients(model, terms, [{"input_ids": ids}]), rel=1e-4)


def test_model_and_random_numbers_are_left_as_they_were(make_model, make_ids):
    model, ids = make_model(activation_dropout=0.5, layer_dropout=0.5), make_ids()
    model.norm_of_batch = nn.BatchNorm1d(16)
    model.model.layers[0].register_forward_hook(
        lambda _layer, _inputs, output: model.norm_of_batch(output.transpose(1, 2)).transpose(1, 2)
    )
    model.model.layers[2].mlp.eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    statistics, state = model.norm_of_batch.running_mean.clone(), torch.get_rng_state()
    settings, terms = model.loss_settings, terms_of(model, ["next_char", "target_2"])
    first, second = (term_gradients(model, terms, [{"input_ids": ids}]) for _ in range(2))
    assert first == second  # the same dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.norm_of_batch.running_mean, statistics)
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == ["lm_head.weight"]
    assert model.lm_head.weight.grad.eq(1).all()
    assert model.loss_settings is settings
    assert model.training and not model.model.layers[2].mlp.training
    model(ids, labels=ids)
    assert not torch.equal(model.norm_of_batch.running_mean, statistics)  # this test would see a change


def test_terms_see_the_same_dropout(make_model, make_ids):
    """Otherwise a term would seem to disagree with itself."""
    model, ids = make_model(activation_dropout=0.5), make_ids()
    term = terms_of(model, ["next_char"])["next_char"]
    found = term_gradients(model, {"main": term, "again": lambda batch: 2 * term(batch)}, [{"input_ids": ids}])
    assert found["gradient_cosine_again"] == pytest.approx(1, abs=1e-5)
    assert found["gradient_norm_again"] == pytest.approx(2 * found["gradient_norm_main"], rel=1e-5)


def test_gradient_of_0_has_no_cosine(make_model, make_ids):
    model, ids = make_model(), make_ids()
    terms = terms_of(model, ["next_char"]) | {
        "bias": lambda batch: model.lm_head.bias.sum(),
        "one": lambda batch: torch.ones(()),
    }
    found = term_gradients(model, terms, [{"input_ids": ids}])
    assert {name: value for name, value in found.items() if value == 0} == {
        "gradient_norm_bias": 0,
        "gradient_norm_one": 0,
    }
    assert [*found] == ["gradient_norm_next_char", "gradient_norm_bias", "gradient_norm_one"]


def test_frozen_body_is_refused(make_model, make_ids):
    model = make_model()
    model.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the body of CharformerForCausalLM is trained"):
        term_gradients(model, terms_of(model, ["next_char"]), [{"input_ids": make_ids()}])


def test_one_term_runs_one_head(make_model, make_ids):
    model, ids, ran = make_model(), make_ids(), []
    for name, head in model.auxiliary_heads.items():
        head.register_forward_hook(lambda *_, name=name: ran.append(name))
    with only_term(model, "layer_1"):
        model(ids, labels=ids)
    assert ran == ["layer_1"]
