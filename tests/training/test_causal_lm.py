"""Heads of further targets that read the tokens between, and heads that predict a part of the vocabulary."""

import copy
import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from charformer_training import add_auxiliary_losses, frequent_tokens, load_auxiliary_losses
from charformer_training.head_accuracy import head_accuracies
from charformer_training.models import targets_of
from modeling_charformer import linear_cross_entropy
from tests.training.any_models import build, make_ids
from tests.training.test_any_model_drafting import PROMPT, TEXT, passes


KEPT = [3, 7, 9, 14, 20, 21, 33, 40, 41, 50, 57, 60]
HEADS = ["shared", "own", "sequential"]


def make(heads: str, kind: str = "llama", **settings: Any) -> Any:
    model = add_auxiliary_losses(
        build(kind), heads=heads, **{"num_targets": 3, "intermediate_layers": None, **settings}
    )
    torch.manual_seed(2)
    for weight in model.auxiliary_heads.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def logits_by_hand(model: Any, heads: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of targets 2 and 3, over the heads' vocabulary."""
    state = states = model.model(ids).last_hidden_state
    found = []
    for target in (2, 3):
        head = model.auxiliary_heads[f"target_{target}"]
        if heads == "own":
            found.append(head(states))
            continue
        if heads == "sequential":
            between = model.get_input_embeddings()(ids.roll(1 - target, dims=1))
            between = between / between.square().mean(-1, keepdim=True).sqrt()
            state = state + F.silu(head.linear(torch.cat([state, between], dim=-1)))
        else:
            state = states + F.silu(head.linear(states))
        logits = model.lm_head(state)
        found.append(logits if model.draft_vocabulary is None else logits[..., model.draft_vocabulary])
    return found


@pytest.fixture(params=["pieces", "one pass"])
def one_pass(request, monkeypatch):
    if request.param == "one pass":
        monkeypatch.setattr(linear_cross_entropy, "MIN_VOCABULARY", 1)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("vocabulary", [None, KEPT], ids=["all", "some"])
@pytest.mark.parametrize("heads", HEADS)
def test_losses_are_those_of_the_tokens_that_heads_predict(heads, vocabulary):
    model, ids = make(heads, draft_vocabulary=vocabulary, distillation=0.5), make_ids()
    outputs = model(input_ids=ids, labels=ids)
    own = model(input_ids=ids).logits
    for target, logits in zip((2, 3), logits_by_hand(model, heads, ids), strict=True):
        values, divergences = [], []
        for row in range(len(ids)):
            for position in range(ids.shape[1] - target):
                token = int(ids[row, position + target])
                if vocabulary is not None and token not in vocabulary:
                    continue
                found = logits[row, position].log_softmax(-1)
                values.append(-found[token if vocabulary is None else vocabulary.index(token)])
                taught = own[row, position + target - 1]
                taught = (taught if vocabulary is None else taught[vocabulary]).log_softmax(-1)
                divergences.append((taught.exp() * (taught - found)).sum())
        assert 0 < len(values) <= ids.numel()
        torch.testing.assert_close(outputs.loss_dict[f"target_{target}"], torch.stack(values).mean())
        torch.testing.assert_close(outputs.loss_dict[f"target_{target}_distillation"], torch.stack(divergences).mean())
        assert targets_of(model, {"labels": ids}).counts()[0, target - 1] == len(values)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("vocabulary", [None, KEPT], ids=["all", "some"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_drafts_are_what_the_heads_predict_in_training(kind, heads, vocabulary):
    model, ids = make(heads, kind, draft_vocabulary=vocabulary).eval(), make_ids(1)
    outputs = model(input_ids=ids, output_hidden_states=True)
    state = outputs.hidden_states[-1][:, 4]
    for term in model.loss_settings.terms[2:]:  # after the model's own two
        logits, state = model.draft(term.offset, state, ids[:, 3 + term.offset])
        expected = model.logits_of_head(term, outputs, {"input_ids": ids})[:, 4]
        torch.testing.assert_close(logits, expected)
        assert logits.shape == (1, 61)
        if vocabulary is not None:
            assert [*torch.where(logits[0] > -1e3)[0]] == vocabulary


def test_sequential_heads_read_embeddings_beside_layers_of_another_width():
    model = add_auxiliary_losses(
        build("opt", ffn_dim=32, word_embed_proj_dim=8, dropout=0.0),
        heads="sequential",
        num_targets=3,
        intermediate_layers=[2],
        intermediate_schedule="constant",
    )
    ids = make_ids()
    outputs = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    for name in ("target_3", "layer_2_target_3"):
        assert model.auxiliary_heads[name].linear.weight.shape == (8, 16)
        assert model.auxiliary_heads[name].linear.weight.grad[:, 8:].abs().sum() > 0
    by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids)
    torch.testing.assert_close(by_embeddings.loss_dict, outputs.loss_dict)


@pytest.mark.parametrize("heads", ["shared", "sequential"])
@pytest.mark.usefixtures("drafts_in_every_pass")
def test_greedy_text_is_the_plain_one_in_fewer_passes(heads, tmp_path):
    model = add_auxiliary_losses(
        build("llama"), heads=heads, num_targets=4, intermediate_layers=None, draft_vocabulary=KEPT
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    assert model.config.auxiliary_losses["draft_vocabulary"] == len(KEPT)
    loaded = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path).eval()
    assert loaded.draft_vocabulary.tolist() == KEPT
    plain, plain_passes = passes(model)
    for one in (model, loaded):
        drafted, drafted_passes = passes(one, use_extra_targets=True)
        assert drafted.tolist() == plain.tolist()
        assert drafted_passes < 0.9 * plain_passes
    # A processor that forbids all that the heads draft.
    forbidden = {"suppress_tokens": KEPT, "use_extra_targets": True}
    assert passes(model, **forbidden)[0].tolist() == passes(model, suppress_tokens=KEPT)[0].tolist()


@pytest.mark.usefixtures("one_pass")
def test_drafts_follow_the_classifier_when_it_changes():
    model = make("shared", draft_vocabulary=KEPT).eval()
    state, previous = torch.randn(1, 16), torch.tensor([3])
    with torch.inference_mode():
        before = model.draft(2, state, previous)[0]
        assert model.draft(2, state, previous)[0].equal(before)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
        after = model.draft(2, state, previous)[0]
    torch.testing.assert_close(after[:, KEPT], 2 * before[:, KEPT])
    model.requires_grad_(False)  # as with heads_only
    model.auxiliary_heads.requires_grad_(True)
    with torch.inference_mode():
        model.draft(2, state, previous)
    model.train()(input_ids=make_ids(), labels=make_ids()).loss.backward()


@pytest.mark.parametrize("heads", HEADS)
def test_accuracies_count_tokens_outside_the_vocabulary_as_misses(heads):
    model, ids = make(heads, draft_vocabulary=KEPT).eval(), make_ids()
    found = head_accuracies(model, {"input_ids": ids, "labels": ids})
    for target, logits in zip((2, 3), logits_by_hand(model, heads, ids), strict=True):
        predicted = torch.tensor(KEPT)[logits.argmax(-1)][:, :-target]
        value, count = found[f"accuracy_target_{target}"]
        assert float(value) == pytest.approx(float((predicted == ids[:, target:]).float().mean()))
        assert count == predicted.numel()


def test_heads_of_another_vocabulary_are_not_loaded(tmp_path):
    make("shared", draft_vocabulary=KEPT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another draft_vocabulary, of 12 tokens"):
        make("shared", draft_vocabulary=[*KEPT[:-1], 59]).load_auxiliary_heads(tmp_path)
    with pytest.raises(ValueError, match="other auxiliary losses"):
        make("shared").load_auxiliary_heads(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_vocabulary": 100}, "draft_vocabulary is 100; it must be a list of ids"),
        ({"draft_vocabulary": [1.5, 2.0]}, "must be a list of ids of tokens"),
        ({"draft_vocabulary": "frequent"}, "must be a list of ids of tokens"),
        ({"draft_vocabulary": [[1, 2]]}, "must be a list of ids of tokens"),
        ({"draft_vocabulary": []}, "must be a list of ids of tokens"),
        ({"draft_vocabulary": [5]}, "has 1 ids"),
        ({"draft_vocabulary": [4, 4, 5]}, "has 3 ids, 2 different ones, from 4 to 5"),
        ({"draft_vocabulary": [4, 61]}, r"from 4 to 61; .* in 0..60"),
        ({"draft_vocabulary": [-1, 4]}, r"from -1 to 4"),
        ({"draft_vocabulary": list(range(61))}, "fewer than the 61 tokens"),
        ({"draft_vocabulary": KEPT, "num_targets": 1}, "has num_targets=1"),
        ({"heads": "sequential", "num_targets": 1, "heads_only": True}, "no heads to train"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_and_the_model_stays_as_it_was(settings, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        add_auxiliary_losses(model, **{"num_targets": 2, "intermediate_layers": None, **settings})
    assert not hasattr(model, "loss_settings")


def test_masked_models_have_neither_sequential_heads_nor_a_draft_vocabulary():
    from transformers import AutoModelForMaskedLM

    model = build("bert", AutoModelForMaskedLM)
    with pytest.raises(ValueError, match="draft_vocabulary is what heads of further targets predict"):
        add_auxiliary_losses(copy.deepcopy(model), draft_vocabulary=KEPT, intermediate_layers=[1])
    with pytest.raises(ValueError, match=re.escape("must be one of ('shared', 'own')")):
        add_auxiliary_losses(model, heads="sequential")


def test_frequent_tokens_are_counted_over_all_rows():
    rows = [[5, 5, 9, 2], {"input_ids": torch.tensor([9, 5, 7])}, torch.tensor([7, 7, 7])]
    assert frequent_tokens(rows, 2) == [5, 7]
    assert frequent_tokens(rows, 99) == [2, 5, 7, 9]
    with pytest.raises(ValueError, match="count is 0"):
        frequent_tokens(rows, 0)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_alone_with_a_vocabulary_train_nothing_else(heads):
    model = make(heads, draft_vocabulary=KEPT, heads_only=True)
    ids = make_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("auxiliary_heads.")}
    assert passes(model.eval(), PROMPT, use_extra_targets=True)[0].equal(passes(model, PROMPT)[0])
