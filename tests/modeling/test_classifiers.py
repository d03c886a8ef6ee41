"""Classifiers of sequences and of characters, with auxiliary classifiers on intermediate layers."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, set_seed

from modeling_charformer import (
    CharformerConfig,
    CharformerForSequenceClassification,
    CharformerForTokenClassification,
)
from tests.helpers import TINY


def build(kind, **changes):
    set_seed(0)
    return kind(CharformerConfig(**({**TINY, "initializer_range": 0.1, "num_labels": 4} | changes))).train()


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_sequence_losses_match_a_reference(make_ids, norm_placement):
    model, ids = build(CharformerForSequenceClassification, norm_placement=norm_placement), make_ids(batch=3)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 15:] = 0, 0
    labels = torch.tensor([3, 0, 2])
    output = model(ids, attention_mask=mask, labels=labels)
    output.loss.backward()

    states = model.model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    last = torch.tensor([19, 14, 19])

    def loss(classifier, hidden):
        return F.cross_entropy(classifier(hidden[torch.arange(3), last]), labels)

    expected = {"classification": loss(model.score, states[3])}
    for layer in (1, 2):  # after one and two thirds of three layers
        hidden = model.model.norm(states[layer])
        expected[f"layer_{layer}"] = loss(model.auxiliary_classifiers[f"layer_{layer}"], hidden)
    torch.testing.assert_close(output.loss_dict, expected)
    assert output.loss_weights == {"classification": 1.0, "layer_1": 0.3, "layer_2": 0.3}
    torch.testing.assert_close(
        output.loss, expected["classification"] + 0.3 * expected["layer_1"] + 0.3 * expected["layer_2"]
    )
    for name, parameter in model.named_parameters():
        if not name.endswith("position_embeddings.weight"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_token_losses_match_a_reference(make_ids):
    model, ids = build(CharformerForTokenClassification, classifier_layers=[2], classifier_weight=0.5), make_ids()
    labels = torch.randint(0, 4, ids.shape)
    labels[0, 5:9] = -100
    output = model(ids, labels=labels)
    assert output.logits.shape == (2, 20, 4)
    states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    auxiliary = model.auxiliary_classifiers["layer_2"](model.model.norm(states[2]))
    expected = {
        "classification": F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()),
        "layer_2": F.cross_entropy(auxiliary.flatten(0, 1), labels.flatten()),
    }
    torch.testing.assert_close(output.loss_dict, expected)
    torch.testing.assert_close(output.loss, expected["classification"] + 0.5 * expected["layer_2"])


@pytest.mark.parametrize("kind", [CharformerForSequenceClassification, CharformerForTokenClassification])
def test_auxiliary_classifiers_are_not_run_in_evaluation_or_without_labels(make_ids, kind):
    model, ids = build(kind), make_ids()
    for classifier in model.auxiliary_classifiers.values():
        classifier.register_forward_hook(lambda *_: pytest.fail("an auxiliary classifier was run"))
    model(ids)
    labels = torch.zeros(ids.shape[: 1 if kind is CharformerForSequenceClassification else 2], dtype=torch.long)
    output = model.eval()(ids, labels=labels)
    assert set(output.loss_dict) == {"classification"} and output.loss_weights == {"classification": 1.0}


@pytest.mark.parametrize("position", ["left", "right"])
def test_padding_does_not_change_the_class(make_ids, position):
    model, ids = build(CharformerForSequenceClassification).eval(), make_ids(batch=1, length=12)
    padding = torch.full((1, 6), 255)
    padded = torch.cat([padding, ids] if position == "left" else [ids, padding], dim=1)
    mask = torch.cat(
        [torch.zeros(1, 6), torch.ones(1, 12)] if position == "left" else [torch.ones(1, 12), torch.zeros(1, 6)], dim=1
    ).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "labels", "loss"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
        (
            {"problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]),
            F.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["regression", "multi_label"],
)
def test_other_kinds_of_labels_have_transformers_losses(make_ids, changes, labels, loss):
    output = build(CharformerForSequenceClassification, **changes)(make_ids(), labels=labels)
    torch.testing.assert_close(output.loss_dict["classification"], loss(output.logits, labels))


def test_saved_classifier_loads_by_its_auto_class_and_begins_with_a_language_model(tmp_path, make_ids, make_model):
    ids = make_ids()
    for kind, auto in (
        (CharformerForSequenceClassification, AutoModelForSequenceClassification),
        (CharformerForTokenClassification, AutoModelForTokenClassification),
    ):
        model = build(kind).eval()
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = auto.from_pretrained(tmp_path / kind.__name__)
        assert type(loaded) is kind
        assert loaded(ids).logits.equal(model(ids).logits)
        plain = model.without_auxiliary_heads()
        assert plain(ids).logits.equal(model(ids).logits)
        assert not any("auxiliary" in name for name in plain.state_dict())
    language_model = make_model()
    language_model.save_pretrained(tmp_path / "lm")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=4)
    for name, weight in language_model.model.state_dict().items():
        assert tuned.model.state_dict()[name].equal(weight)
