"""A model whose auxiliary losses nothing trains says so, once, at the first step; no other model does."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, set_seed

from charformer_training import AuxiliaryLossMixin, add_auxiliary_losses
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerForSequenceClassification
from tests.helpers import TINY
from tests.training.any_models import DEPRECATED, build, make_ids


def charformer() -> Any:
    set_seed(0)
    return CharformerForCausalLM(CharformerConfig(**TINY)).train()


def classifier() -> Any:
    set_seed(0)
    return CharformerForSequenceClassification(CharformerConfig(**(TINY | {"num_labels": 2}))).train()


MODELS = {
    "charformer": charformer,
    "gpt2": lambda: add_auxiliary_losses(build("gpt2")),
    "charformer classifier": classifier,
    "bert": lambda: add_auxiliary_losses(build("bert", AutoModelForSequenceClassification, num_labels=2)),
}


@pytest.fixture
def warnings(caplog) -> Any:
    caplog.set_level(logging.WARNING)
    return lambda: [message for message in caplog.messages if message.startswith("The auxiliary losses of this")]


def labels_of(kind: str, ids: torch.Tensor) -> torch.Tensor:
    return ids if kind in ("charformer", "gpt2") else torch.tensor([0, 1])


@pytest.mark.parametrize("kind", MODELS)
class TestWatch:
    def test_no_labels_are_told_once(self, kind, warnings):
        model, ids = MODELS[kind](), make_ids()
        for _ in range(2):
            model(input_ids=ids).logits.sum().backward()
        [told] = warnings()
        assert "not trained: without labels it was differentiated in the first step" in told

    def test_a_loss_that_is_not_used_is_told(self, kind, warnings):
        model, ids = MODELS[kind](), make_ids()
        model(input_ids=ids, labels=labels_of(kind, ids)).logits.sum().backward()
        [told] = warnings()
        assert "the loss that it returned is not part of what was differentiated" in told

    @pytest.mark.parametrize("used", ["loss", "terms"])
    def test_a_loss_that_is_used_is_not_told(self, kind, used, warnings):
        model, ids = MODELS[kind](), make_ids()
        for _ in range(2):
            outputs = model(input_ids=ids, labels=labels_of(kind, ids))
            loss = outputs.loss if used == "loss" else 0.3 * outputs.loss_dict["layer_1"] + outputs.logits.sum()
            loss.backward()
        model(input_ids=ids).logits.sum().backward()
        assert not warnings()

    def test_evaluation_is_not_told(self, kind, warnings):
        model, ids = MODELS[kind](), make_ids()
        model.eval()(input_ids=ids).logits.sum().backward()
        with torch.no_grad():
            model.train()(input_ids=ids)
        assert not warnings()

    def test_a_copy_is_watched_by_itself(self, kind, warnings):
        model, ids = MODELS[kind](), make_ids()
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for each in copies:
            each(input_ids=ids).logits.sum().backward()
        assert len(warnings()) == 2
        model(input_ids=ids, labels=labels_of(kind, ids)).loss.backward()
        assert len(warnings()) == 2


def test_losses_that_have_all_dropped_out_are_not_told(warnings):
    model, ids = charformer(), make_ids()
    model(ids, labels=ids, training_progress=1.0).loss.backward()
    assert not warnings()


def test_a_model_without_auxiliary_losses_is_not_told(warnings):
    config = CharformerConfig(**TINY, num_targets=1, intermediate_layers=None)
    CharformerForCausalLM(config).train()(make_ids()).logits.sum().backward()
    assert not warnings()


@DEPRECATED
def test_frozen_heads_and_checkpointing_are_not_told(warnings):
    model, ids = charformer(), make_ids()
    model.auxiliary_heads.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert not warnings()


def test_a_frozen_body_is_not_told(warnings):
    model, ids = charformer(), make_ids()
    model.model.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    assert not warnings()


@pytest.mark.slow
def test_a_compiled_model_is_not_told(warnings):
    model, ids = charformer(), make_ids()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(ids, labels=ids).loss.backward()
    assert not warnings()
    torch._dynamo.reset()


def test_generation_in_training_mode_is_not_told(warnings):
    model = charformer()
    model.generate(make_ids(), max_new_tokens=2, do_sample=True)
    assert not warnings()


class OwnLoss(Trainer):
    """The example of Transformers' documentation: a loss that leaves the model's out."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class OwnLossWithTerms(AuxiliaryLossMixin, OwnLoss):
    pass


@pytest.mark.parametrize("kind", [OwnLoss, OwnLossWithTerms])
def test_a_trainer_that_leaves_the_loss_out_is_told(kind, make_trainer, warnings):
    plain = make_trainer(max_steps=2)
    kind(plain.model, plain.args, train_dataset=plain.train_dataset, data_collator=plain.data_collator).train()
    assert len(warnings()) == (kind is OwnLoss)
