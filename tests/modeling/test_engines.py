"""What engines that serve models rely on (vLLM's Transformers modeling backend; `tests/serving` runs it)."""

import ast
import inspect
import re
import textwrap

import pytest
import torch
from transformers import AutoModel, set_seed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modeling_charformer
from modeling_charformer import CharformerConfig, CharformerModel
from modeling_charformer.layers_charformer import CharformerAttention
from tests.helpers import TINY


LANGUAGE_MODEL, CLASSIFIERS = (
    "CharformerForCausalLM",
    ("CharformerForSequenceClassification", "CharformerForTokenClassification"),
)
KINDS = ("CharformerModel", LANGUAGE_MODEL, *CLASSIFIERS)
# All that a configuration can add to a model.
EVERYTHING = TINY | {
    "num_targets": 3,
    "target_heads": "sequential",
    "loss_weighting": "uncertainty",
    "num_labels": 3,
    "initializer_range": 0.1,
}


def build(kind: str, **changes):
    set_seed(0)
    return getattr(modeling_charformer, kind)(CharformerConfig(**(EVERYTHING | changes))).eval()


def left_out(model, names) -> set[str]:
    """Of the names of weights, those that an engine does not load."""
    patterns = model._keys_to_ignore_on_load_unexpected
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_of_a_model_is_left_out_on_loading(kind):
    model = build(kind)
    assert not left_out(model, model.state_dict())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_on_the_base_model_an_engine_leaves_out_what_only_training_needs(kind):
    """It builds a `CharformerModel`, and beside it the head that predicts."""
    full = build(kind)
    inference, base = full.without_auxiliary_heads(), AutoModel.from_config(full.config)
    assert type(base) is CharformerModel
    assert full.state_dict().keys() - left_out(base, full.state_dict()) == inference.state_dict().keys()
    assert len(full.state_dict()) > len(inference.state_dict())


@pytest.mark.parametrize("loaded", KINDS)
@pytest.mark.parametrize("saved", KINDS)
def test_a_kind_loads_from_the_checkpoint_of_another_without_a_report(saved, loaded, tmp_path):
    build(saved).save_pretrained(tmp_path)
    _, info = getattr(modeling_charformer, loaded).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {
        "lm_head",
        "score",
        "auxiliary_heads",
        "auxiliary_classifiers",
        "loss_uncertainty",
        "target_blocks",
    }


def test_attention_calls_the_interface_where_engines_look_for_it():
    """vLLM reads the source of a layer's attention: one call of what it took from the interface, with its scaling."""
    forward = ast.parse(textwrap.dedent(inspect.getsource(CharformerAttention.forward)))
    names = {
        assigned.target.id
        for assigned in ast.walk(forward)
        if isinstance(assigned, ast.AnnAssign)
        and isinstance(assigned.target, ast.Name)
        and assigned.value is not None
        and ast.unparse(assigned.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    }
    calls = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    assert len(calls) == 1
    assert {word.arg: ast.unparse(word.value) for word in calls[0].keywords}["scaling"] == "self.scaling"
    attention = build("CharformerModel").layers[2].self_attn
    assert (attention.layer_idx, attention.is_causal, attention.scaling) == (2, True, 8**-0.5)


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_requests_that_an_engine_lays_end_to_end_do_not_see_each_other(norm_placement, make_ids, monkeypatch):
    """As vLLM calls the model: no mask, positions of each request, attention of its own, no cache of Transformers."""
    model = build("CharformerModel", norm_placement=norm_placement)
    requests = [make_ids(1, length, seed=length) for length in (5, 9, 3)]
    expected = torch.cat([model(request).last_hidden_state for request in requests], dim=1)
    seen: list[object] = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        seen.append(attention_mask)
        lengths = [request.shape[1] for request in requests]
        attended = [
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            for q, k, v in zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
        ]
        # vLLM returns no batch dimension.
        return torch.cat(attended, dim=2).transpose(1, 2).reshape(query.shape[2], -1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", attend)
    model.config._attn_implementation = "engine"
    positions = torch.cat([torch.arange(request.shape[1]) for request in requests])
    outputs = model(
        input_ids=torch.cat(requests, dim=1),
        inputs_embeds=None,
        use_cache=False,
        position_ids=positions[None],
        return_dict=False,
    )
    assert isinstance(outputs, tuple) and seen == [None] * 3
    torch.testing.assert_close(outputs[0], expected)
