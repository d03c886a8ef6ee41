"""Losses on the layers of models that do more than call modules after their last layer."""

import importlib
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from charformer_training import add_auxiliary_losses, load_auxiliary_losses
from tests.training.any_models import DEPRECATED, build, make_ids


def gemma3n(**changes: Any) -> Any:
    """With streams that differ: a new model's coefficients leave the further streams close to the first."""
    small = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    model = build("gemma3n_text", **small, num_kv_shared_layers=0, final_logit_softcapping=3.0, **changes)
    for name, weight in model.named_parameters():
        if "altup" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def outputs_of_layers(model: Any) -> list[torch.Tensor]:
    """What the layers give in the next forward pass."""
    outputs: list[torch.Tensor] = []
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    return outputs


def after_the_last_layer(model: Any, streams: torch.Tensor) -> torch.Tensor:
    """What Gemma 3n makes of a layer's streams `(4, B, S, d)`, written down again."""
    size = streams[0].square().mean(-1, keepdim=True).sqrt()
    made = [streams[0]]
    for projection, stream in zip(model.model.altup_unembed_projections, streams[1:], strict=True):
        projected = projection(stream)
        made.append(projected * size / projected.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt())
    return model.model.norm(torch.stack(made).mean(0))


def logits_of(model: Any, states: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.tanh(model.lm_head(states) / 3.0)


def mean_loss(logits: torch.Tensor, ids: torch.Tensor, offset: int = 1) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-offset].flatten(0, 1), ids[:, offset:].flatten())


SETTINGS: dict[str, Any] = {"num_targets": 2, "intermediate_layers": [1, 3], "intermediate_schedule": "constant"}


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_terms_and_gradients_of_gemma3ns_layers_are_those_of_a_reference(heads):
    reference, model, ids = gemma3n(), gemma3n(), make_ids()
    outputs = outputs_of_layers(reference)
    expected = {"next_token": reference(ids, labels=ids, use_cache=False).loss}
    add_auxiliary_losses(model, heads, **SETTINGS)
    for head in model.auxiliary_heads.values():
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    for layer, offset, name in [(1, 1, "layer_1"), (3, 1, "layer_3"), (3, 2, "layer_3_target_2"), (4, 2, "target_2")]:
        states, head = after_the_last_layer(reference, outputs[layer - 1]), model.auxiliary_heads[name]
        if heads == "own":
            logits = head(states)
        else:
            logits = logits_of(reference, states if offset == 1 else head(states))
        expected[name] = mean_loss(logits, ids, offset)
    # The streams matter: the first one alone gives another loss.
    first_alone = mean_loss(logits_of(reference, reference.model.norm(outputs[0][0])), ids)
    output = model(ids, labels=ids, use_cache=False, training_progress=0.0)
    for name, value in expected.items():
        torch.testing.assert_close(output.loss_dict[name], value)
    assert abs(first_alone - expected["layer_1"]) > 1e-2
    (output.loss_dict["layer_1"] + output.loss_dict["layer_3_target_2"]).backward()
    (expected["layer_1"] + expected["layer_3_target_2"]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("auxiliary_heads")}
    torch.testing.assert_close(gradients, {name: p.grad for name, p in reference.named_parameters()})
    assert gradients["model.altup_unembed_projections.2.weight"].any()
    assert not any(p.any() for name, p in gradients.items() if "layers.3." in name and p is not None)


def test_gemma3n_with_towers_for_images_and_sounds_has_the_layers_of_its_language_model(monkeypatch):
    modeling_gemma3n: Any = importlib.import_module("transformers.models.gemma3n.modeling_gemma3n")
    language_model = gemma3n()
    parts = {"gemma3n_text": language_model.model}  # the towers need a package of their own
    made = lambda config, **_: parts.get(config.model_type, torch.nn.Identity())  # noqa: E731
    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", made)
    config = modeling_gemma3n.Gemma3nConfig(text_config=language_model.config)
    kind, ids = modeling_gemma3n.Gemma3nForConditionalGeneration, make_ids()
    model = kind._from_config(config, attn_implementation="eager").train()
    outputs = outputs_of_layers(language_model)
    add_auxiliary_losses(model, num_targets=1, intermediate_layers=[2])
    outputs.clear()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss_dict["layer_2"]
    states = after_the_last_layer(language_model, outputs[1])
    logits = 3.0 * torch.tanh(model.lm_head(states) / 3.0)
    torch.testing.assert_close(loss, mean_loss(logits, ids))


def test_sampled_positions_give_the_mean_over_draws_of_the_whole_term():
    model, ids = (
        add_auxiliary_losses(gemma3n(), intermediate_layers=[2], num_targets=1, position_share=0.5),
        make_ids(),
    )
    whole = add_auxiliary_losses(gemma3n(), intermediate_layers=[2], num_targets=1)
    expected = whole(ids, labels=ids, use_cache=False).loss_dict["layer_2"]
    draws = torch.stack(
        [
            model(ids, labels=ids, use_cache=False, training_step=step, training_seed=0).loss_dict["layer_2"].detach()
            for step in range(16)
        ]
    )
    assert draws.std() > 1e-3
    assert abs(draws.mean() - expected) < 4 * draws.std() / 16**0.5


@DEPRECATED
def test_checkpointed_layers_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, ids = add_auxiliary_losses(gemma3n(), **SETTINGS), make_ids()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False, training_progress=0.0).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_saved_and_loaded_layers_have_the_same_terms(tmp_path):
    model, ids = add_auxiliary_losses(gemma3n(), "own", **SETTINGS), make_ids()
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    loaded = load_auxiliary_losses(plain, tmp_path).train()
    expected, output = (one(ids, labels=ids, use_cache=False, training_progress=0.0) for one in (model, loaded))
    assert "layer_3_target_2" in output.loss_dict
    torch.testing.assert_close(output.loss_dict, expected.loss_dict)


def test_an_adapter_on_the_projections_after_the_last_layer_is_used_and_trained():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=r".*(q_proj|altup_unembed_projections\.\d)", r=2, init_lora_weights=False)
    model, ids = get_peft_model(gemma3n(), config), make_ids()
    add_auxiliary_losses(model, num_targets=1, intermediate_layers=[2])
    base: Any = model.get_base_model()
    outputs = outputs_of_layers(base)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss_dict["layer_2"]
    expected = mean_loss(logits_of(base, after_the_last_layer(base, outputs[1])), ids)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert base.model.altup_unembed_projections[2].lora_A.default.weight.grad.any()


def test_half_precision_keeps_the_terms():
    model, ids = add_auxiliary_losses(gemma3n().bfloat16(), **SETTINGS), make_ids()
    whole = add_auxiliary_losses(gemma3n(), **SETTINGS)
    output, expected = (one(ids, labels=ids, use_cache=False, training_progress=0.0) for one in (model, whole))
    for name in ("layer_1", "layer_3", "layer_3_target_2"):
        torch.testing.assert_close(output.loss_dict[name].float(), expected.loss_dict[name], rtol=0.02, atol=0)
