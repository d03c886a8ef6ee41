"""`export_draft_heads` writes what engines read: a second implementation of theirs computes the same drafts."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.nn.functional import silu

from charformer_training import add_auxiliary_losses, export_draft_heads
from tests.training.any_models import build


@pytest.fixture(params=["charformer linear", "charformer residual", "shared", "own"])
def model(request, make_model):
    if request.param.startswith("charformer"):
        made = make_model(num_targets=3, target_heads=request.param.split()[1])
    else:
        made = add_auxiliary_losses(build("llama"), heads=request.param, num_targets=3, intermediate_layers=None)
    torch.manual_seed(0)
    for name, weight in made.named_parameters():
        if "target_" in name:
            (torch.nn.init.zeros_ if name.endswith("bias") and weight.shape[0] > 32 else torch.nn.init.normal_)(weight)
    for head in made.auxiliary_heads.values():
        if isinstance(head, torch.nn.Linear):
            torch.nn.init.constant_(head.bias, 0.5)  # of no consequence, being the same for all
    return made.eval()


def medusa_logits(folder, states: torch.Tensor) -> list[torch.Tensor]:
    """As vLLM's Medusa model computes them."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["model_type"] == "medusa"
    assert config["truncated_vocab_size"] == config["vocab_size"] == weights["lm_heads.0.weight"].shape[0]
    logits = []
    for number in range(config["num_heads"]):
        name = f"blocks.{number}.layers.0"
        block = states + silu(states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
        matrix = 0 if config["original_lm_head"] else number
        logits.append(block @ weights[f"lm_heads.{matrix}.weight"].T)
    heads = 1 if config["original_lm_head"] else config["num_heads"]
    assert len(weights) == 2 * config["num_heads"] + heads
    return logits


def test_medusa_files_hold_the_models_own_heads(model, tmp_path):
    export_draft_heads(model, tmp_path / "heads", base_model="someone/a-model")
    states = torch.randn(5, model.config.hidden_size)
    state, previous = states, torch.zeros(5, dtype=torch.long)
    for number, found in enumerate(medusa_logits(tmp_path / "heads", states)):
        expected, state = model.draft(number + 2, state, previous)
        torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert number == 1
    card = ModelCard.load(tmp_path / "heads" / "README.md")
    assert card.data.base_model == "someone/a-model"
    assert '"num_speculative_tokens": 2' in card.text
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_medusa_v2_holds_the_blocks_of_shared_heads(tmp_path):
    model = add_auxiliary_losses(build("llama"), num_targets=3, intermediate_layers=None)
    for head in model.auxiliary_heads.values():
        torch.nn.init.normal_(head.linear.weight)
    export_draft_heads(model, tmp_path, format="medusa-v2", base_model="someone/a-model")
    config, weights = (
        json.loads((tmp_path / "config.json").read_text()),
        load_file(tmp_path / "medusa_lm_head.safetensors"),
    )
    assert config == {
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "base_model_name_or_path": "someone/a-model",
        "version": "2",
    }
    assert sorted(weights) == ["0.0.linear.bias", "0.0.linear.weight", "1.0.linear.bias", "1.0.linear.weight"]
    assert weights["1.0.linear.weight"].equal(model.auxiliary_heads["target_3"].linear.weight)


def test_a_bias_that_the_layout_cannot_hold_is_named(make_model, tmp_path):
    model = make_model(num_targets=2)
    torch.nn.init.zeros_(model.auxiliary_heads["target_2"].bias)
    model.auxiliary_heads["target_2"].bias.data[3] = 2.0
    with pytest.warns(UserWarning, match=r"no bias on a vocabulary matrix; biases of up to 2 are left out"):
        export_draft_heads(model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "format", "message"),
    [
        ({"num_targets": 3, "target_heads": "sequential"}, "medusa", "target_2 also reads the tokens drafted before"),
        ({"num_targets": 1}, "medusa", "no heads of further targets"),
        ({"num_targets": 2}, "medusa-v2", "no vocabulary matrix of its own"),
        ({"num_targets": 2}, "mtp", "is a decoder layer"),
        ({"num_targets": 2}, "eagle", "format is 'eagle'; it must be one of"),
    ],
)
def test_heads_that_a_layout_cannot_hold_are_refused_before_anything_is_written(
    make_model, tmp_path, settings, format, message
):
    with pytest.raises(ValueError, match=message):
        export_draft_heads(make_model(**settings), tmp_path / "heads", format=format)
    assert not (tmp_path / "heads").exists()


def test_a_plain_model_has_no_heads_to_export(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no heads of further targets"):
        export_draft_heads(build("llama"), tmp_path)


def test_a_draft_vocabulary_is_written_as_a_map_of_tokens(tmp_path):
    model = add_auxiliary_losses(
        build("llama"), num_targets=3, intermediate_layers=None, draft_vocabulary=[50, 3, 7, 21]
    ).eval()
    for head in model.auxiliary_heads.values():
        torch.nn.init.normal_(head.linear.weight)
    export_draft_heads(model, tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    weights = load_file(tmp_path / "heads" / "model.safetensors")
    assert (config["vocab_size"], config["truncated_vocab_size"]) == (61, 4)
    assert weights["token_map"].tolist() == [3, 7, 21, 50]
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "They draft 4 of the model's tokens" in card and '{"enable_weights_track": false}' in card
    states = torch.randn(5, 16)
    for target in (2, 3):
        name = f"blocks.{target - 2}.layers.0"
        block = states + silu(states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
        logits = block @ weights["lm_heads.0.weight"].T
        expected, _ = model.draft(target, states, torch.zeros(5, dtype=torch.long))
        torch.testing.assert_close(logits, expected[:, weights["token_map"]])
    with pytest.warns(UserWarning, match="no draft vocabulary: heads trained to draft 4 tokens will draft any"):
        export_draft_heads(model, tmp_path / "v2", format="medusa-v2")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("own", "only where all heads share one vocabulary matrix"),
        ("sequential", "also reads the tokens drafted before"),
    ],
)
def test_heads_of_any_model_that_the_layout_cannot_hold_are_refused(tmp_path, heads, message):
    model = add_auxiliary_losses(
        build("llama"), heads=heads, num_targets=3, intermediate_layers=None, draft_vocabulary=[3, 7, 21]
    )
    with pytest.raises(ValueError, match=message):
        export_draft_heads(model, tmp_path / "heads")
    assert not (tmp_path / "heads").exists()
