"""Arguments of `forward` and `generate`: what would change the result is never ignored."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_charformer import CharformerForSequenceClassification


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"head_mask": torch.ones(2)}, "no argument 'head_mask' \\(given as Tensor\\)"),
        ({"encoder_hidden_states": torch.ones(2, 20, 16)}, "no argument 'encoder_hidden_states'"),
        ({"layer_past": 1}, "no argument 'layer_past'"),
        ({"token_type_ids": torch.ones(2, 20)}, "token_type_ids are not all 0"),
        ({"seq_idx": torch.zeros(2, 20)}, "seq_idx alone does not keep packed texts apart"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_result_is_not_ignored(make_model, make_ids, argument, message):
    model = make_model().eval()
    for part in (model, model.model, CharformerForSequenceClassification(model.config)):
        with pytest.raises(TypeError, match=message):
            part(make_ids(), **argument)


def test_what_changes_nothing_is_taken(make_model, make_ids):
    model, ids = make_model().eval(), make_ids()
    harmless = {"head_mask": None, "token_type_ids": ids * 0, "cache_position": torch.arange(20), "return_dict": True}
    assert model(ids, **harmless).logits.equal(model(ids).logits)


def test_an_engine_passes_what_its_own_attention_reads(make_model, make_ids):
    model, ids, seen = make_model().eval(), make_ids(), []

    def attention(module, query, key, value, mask, attention_instances=None, **kwargs):
        seen.append(attention_instances[module.layer_idx])
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    expected = model(ids).logits
    ALL_ATTENTION_FUNCTIONS.register("an engine's", attention)
    model.config._attn_implementation = "an engine's"
    assert model(ids, attention_instances="abc").logits.allclose(expected)
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, dtype=torch.long), "has the shape \\(4,\\)"),
        (torch.zeros(1, 2, 4, dtype=torch.long), "has the shape \\(1, 2, 4\\)"),
        (torch.zeros(1, 4), "is a tensor of torch.float32"),
        (b"text", "is of the type bytes"),
        ([[1, 2]], "is of the type list"),
    ],
    ids=["1d", "3d", "float", "bytes", "list"],
)
def test_ids_that_are_none_are_named(make_model, ids, message):
    model = make_model().eval()
    for call in (model, model.model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=f"input_ids {message}; give a tensor of torch.long"):
            call(input_ids=ids)
    with pytest.raises(ValueError, match=f"inputs {message}"):
        model.generate(ids, max_new_tokens=2)
