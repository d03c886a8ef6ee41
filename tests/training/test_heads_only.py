"""Heads that are trained alone, on a frozen model."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from charformer_training import add_auxiliary_losses, load_auxiliary_losses
from modeling_charformer.auxiliary_heads import TRAINING_ONLY
from tests.training.any_models import build, make_ids


def trained(model, ids, steps=3, **inputs):
    """The model after some steps, and its weights before."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_heads_learn_and_nothing_else_changes(heads):
    model, ids = build("llama"), make_ids()
    add_auxiliary_losses(
        model, heads, heads_only=True, num_targets=3, intermediate_layers=[2] if heads == "own" else None
    )
    first = {name: value.detach() for name, value in model(input_ids=ids, labels=ids).loss_dict.items()}
    before = trained(model, ids)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) is not name.startswith(TRAINING_ONLY), name
    last = model(input_ids=ids, labels=ids).loss_dict
    assert last["next_token"] == first["next_token"]
    heads_of_terms = first.keys() - {"next_token", "last_position"}
    assert heads_of_terms and all(last[name] < first[name] for name in heads_of_terms)


def test_gradients_of_heads_are_those_of_training_the_whole_model():
    ids, gradients = make_ids(), []
    for heads_only in (False, True):
        model = build("gpt2")
        add_auxiliary_losses(model, heads_only=heads_only, num_targets=3, intermediate_layers=None)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        heads = {name: weight.grad for name, weight in model.named_parameters() if name.startswith(TRAINING_ONLY)}
        gradients.append((output.loss.detach(), heads))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_model_keeps_nothing_for_a_backward_pass():
    inside: list[bool] = []
    for heads_only in (False, True):
        model = build("llama")
        add_auxiliary_losses(model, heads_only=heads_only, num_targets=2, intermediate_layers=None)
        model.model.layers[0].mlp.register_forward_hook(
            lambda _mlp, _inputs, output: inside.append(output.requires_grad)
        )
        model(input_ids=make_ids(), labels=make_ids())
    assert inside == [True, False]


def test_heads_see_the_states_of_inference():
    model, ids = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), make_ids()
    add_auxiliary_losses(model, heads_only=True, num_targets=2, intermediate_layers=None)
    model.eval().train()
    assert model.training and model.auxiliary_heads.training and not model.transformer.training
    losses = [model(input_ids=ids, labels=ids).loss_dict["target_2"] for _ in range(2)]
    assert losses[0] == losses[1]
    torch.testing.assert_close(
        model(input_ids=ids, labels=ids).loss_dict["next_token"], model.eval()(input_ids=ids, labels=ids).loss
    )


def test_classifiers_are_trained_alone_too():
    model, ids = build("bert", AutoModelForSequenceClassification), make_ids()
    add_auxiliary_losses(model, heads_only=True, intermediate_layers=[1, 2])
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {
        f"auxiliary_heads.layer_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"with heads='shared' the terms \['layer_1', 'layer_2', 'layer_3'\] have no weights of their own"),
        ({"num_targets": 1, "intermediate_layers": None}, "these settings give no heads to train"),
    ],
)
def test_terms_without_weights_are_refused(settings, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        add_auxiliary_losses(model, heads_only=True, **settings)
    assert not hasattr(model, "loss_settings") and all(weight.requires_grad for weight in model.parameters())


def test_loaded_heads_are_still_trained_alone(tmp_path):
    model, ids = build("llama"), make_ids()
    add_auxiliary_losses(model, heads_only=True, num_targets=2, intermediate_layers=None)
    trained(model, ids)
    model.save_pretrained(tmp_path)
    loaded = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path).train()
    assert [name for name, weight in loaded.named_parameters() if weight.requires_grad] == [
        "auxiliary_heads.target_2.linear.weight",
        "auxiliary_heads.target_2.linear.bias",
    ]
    torch.testing.assert_close(loaded(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).loss)


class EightBits(nn.Module):
    """A linear layer whose weights are whole numbers, as those of a quantized model are."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ (self.weight * self.scale).T


def test_quantized_body_serves_as_well():
    model, ids = build("llama"), make_ids()
    exact = build("llama").eval()(input_ids=ids, labels=ids).loss.detach()
    for name, module in [*model.model.named_modules()]:
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, EightBits(module))
    add_auxiliary_losses(model, heads_only=True, num_targets=2, intermediate_layers=None)
    quantized = model(input_ids=ids, labels=ids).loss_dict
    assert 0 < abs(quantized["next_token"] - exact) < 0.1
    trained(model, ids)
    assert model(input_ids=ids, labels=ids).loss_dict["target_2"] < quantized["target_2"]
