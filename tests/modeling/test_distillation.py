"""Heads that learn from the distribution of the model's own head."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from charformer_training import add_auxiliary_losses
from modeling_charformer import CharformerConfig, distillation
from modeling_charformer.auxiliary_losses import HeadInput, Targets
from modeling_charformer.loss_settings import LossTerm
from tests.training.any_models import build
from tests.training.any_models import make_ids as make_tokens


def by_hand(student: torch.Tensor, teacher: torch.Tensor, offset: int) -> torch.Tensor:
    """The mean divergence, position by position, of logits `(B, S, V)`."""
    values = []
    for row in range(len(student)):
        for position in range(student.shape[1] - offset):
            p = teacher[row, position + offset - 1].detach().softmax(-1)
            q = student[row, position].softmax(-1)
            values.append((p * (p / q).log()).sum())
    return torch.stack(values).mean()


@pytest.mark.parametrize("pieces", [2**24, 2000])
@pytest.mark.parametrize("heads", ["linear", "sequential"])
def test_divergence_of_a_charformer_is_that_of_the_formula(make_model, make_ids, monkeypatch, heads, pieces):
    monkeypatch.setattr(distillation, "MAX_LOGITS", pieces)  # 3 positions at a time
    model, ids = make_model(num_targets=3, target_heads=heads, distillation=0.5), make_ids()
    for block in model.target_blocks.values():
        torch.nn.init.normal_(block.linear.weight)
    output = model(ids, labels=ids, output_hidden_states=True, return_final_hidden_state=True)
    expected, state = {}, output.final_hidden_state
    for offset in (2, 3):
        ahead = F.pad(ids, (0, offset - 1))[:, offset - 1 :]
        logits, state = model.draft(offset, state, ahead)
        expected[f"target_{offset}"] = by_hand(logits, output.logits, offset)
    for layer in (1, 2):
        normed = model.model.norm(output.hidden_states[layer])
        for offset, name in ((1, f"layer_{layer}"), (3, f"layer_{layer}_target_3")):
            expected[name] = by_hand(model.auxiliary_heads[name](normed), output.logits, offset)
    weights = output.loss_weights
    for name, value in expected.items():
        torch.testing.assert_close(output.loss_dict[f"{name}_distillation"], value)
        assert weights[f"{name}_distillation"] == 0.5 * weights[name] > 0
    total = sum(weights[name] * value for name, value in output.loss_dict.items())
    torch.testing.assert_close(output.loss, total)
    assert len(output.loss_dict) == 2 + 8 + 8
    # The gradients, also through the pieces, are those of the formula.
    parameters = [model.auxiliary_heads["target_2"].weight, model.model.layers[0].mlp.fc1.weight]
    for name in ("target_2", "layer_1"):
        found = torch.autograd.grad(
            output.loss_dict[f"{name}_distillation"], parameters, retain_graph=True, allow_unused=True
        )
        wanted = torch.autograd.grad(expected[name], parameters, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_divergence_of_any_model_is_that_of_the_formula(heads):
    model, ids = build("llama"), make_tokens()
    add_auxiliary_losses(model, heads, num_targets=2, intermediate_layers=[2], distillation=1.0)
    if heads == "shared":
        torch.nn.init.normal_(model.auxiliary_heads["target_2"].linear.weight)
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    ahead = model.auxiliary_heads["target_2"](output.hidden_states[-1])
    lower = model.auxiliary_heads["layer_2"](model.model.norm(output.hidden_states[2]))
    if heads == "shared":
        ahead, lower = model.lm_head(ahead), model.lm_head(lower)
    torch.testing.assert_close(output.loss_dict["target_2_distillation"], by_hand(ahead, output.logits, 2))
    torch.testing.assert_close(output.loss_dict["layer_2_distillation"], by_hand(lower, output.logits, 1))
    output.loss.backward()
    assert model.lm_head.weight.grad is not None


def test_teacher_gets_no_gradient(make_model, make_ids):
    model, ids = make_model(distillation=1.0), make_ids()
    model(ids, labels=ids).loss_dict["layer_1_distillation"].backward()
    assert model.lm_head.weight.grad is None
    assert model.model.layers[1].mlp.fc1.weight.grad is None
    assert model.model.layers[0].mlp.fc1.weight.grad.any()


def test_head_like_the_models_own_has_nothing_to_learn(make_model, make_ids):
    model, ids = make_model(num_targets=1, distillation=1.0), make_ids()
    torch.nn.init.zeros_(model.lm_head.weight), torch.nn.init.zeros_(model.auxiliary_heads["layer_1"].weight)
    losses = model(ids, labels=ids).loss_dict
    assert abs(losses["layer_1_distillation"]) < 1e-6 < losses["layer_2_distillation"]


def test_positions_without_a_target_do_not_count(make_model, make_ids):
    model, ids = make_model(distillation=1.0), make_ids()
    short = model(ids[:1, :15], labels=ids[:1, :15]).loss_dict
    labels = ids.masked_fill(torch.arange(20) >= 15, -100)
    labels[1] = -100
    torch.testing.assert_close(model(ids, labels=labels).loss_dict, short)


def test_last_position_alone_is_distilled(make_model, make_ids):
    model, ids = make_model(num_targets=1, position_loss="last", distillation=1.0), make_ids()
    output = model(ids, labels=ids, output_hidden_states=True)
    logits = model.auxiliary_heads["layer_1"](model.model.norm(output.hidden_states[1]))
    # Position 18 of 20 is the last one with a target.
    expected = by_hand(logits[:, 18:], output.logits[:, 18:], 1)
    torch.testing.assert_close(output.loss_dict["layer_1_distillation"], expected)


def test_share_of_positions_is_an_unbiased_estimate(make_model, make_ids):
    whole, ids = make_model(num_targets=2, distillation=1.0), make_ids(batch=4)
    expected = whole(ids, labels=ids).loss_dict
    model = make_model(num_targets=2, distillation=1.0, position_share=0.25)
    with torch.no_grad():
        drawn = [model(ids, labels=ids, training_step=step).loss_dict for step in range(60)]
    for name in ("target_2_distillation", "layer_1_distillation"):
        values = torch.stack([losses[name] for losses in drawn])
        assert 0 < values.std()
        assert abs(values.mean() - expected[name]) < 4 * values.std() / 60**0.5


def test_evaluation_distils_nothing(make_model, make_ids):
    model, ids = make_model(distillation=1.0).eval(), make_ids()
    output = model(ids, labels=ids)
    assert output.loss == make_model().eval()(ids, labels=ids).loss
    assert set(output.loss_dict) == {"next_char", "last_position"}


def test_settings_without_a_use_are_refused():
    for settings, message in (
        ({"distillation": -1.0}, "distillation is -1.0"),
        ({"distillation": 1.0, "num_targets": 1, "intermediate_layers": None}, "there are no auxiliary heads"),
        ({"distillation": 1.0, "loss_weighting": "uncertainty"}, "it must be 'fixed'"),
    ):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            CharformerConfig(**settings)


def test_inference_model_has_no_distillation(make_model, tmp_path):
    make_model(distillation=1.0).without_auxiliary_heads().save_pretrained(tmp_path)
    assert CharformerConfig.from_pretrained(tmp_path).distillation == 0


def test_masked_language_models_learn_at_the_positions_that_have_a_label():
    model, ids = build("bert", AutoModelForMaskedLM), make_tokens()
    labels = ids.masked_fill(torch.arange(12) % 3 != 0, -100)
    add_auxiliary_losses(model, intermediate_layers=[2], distillation=1.0)
    output = model(input_ids=ids, labels=labels, output_hidden_states=True)
    lower = model.cls(output.hidden_states[2])
    wanted = output.logits.detach().log_softmax(-1)
    each = F.kl_div(lower.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(output.loss_dict["layer_2_distillation"], each[labels != -100].mean())


def test_sum_under_autocast_is_one_of_single_precision():
    states, labels = torch.randn(1, 3000, 11) * 20, torch.randint(0, 11, (1, 3000))
    teacher = torch.randn(1, 3000, 11) * 20
    term, targets = LossTerm("target_2", 2, 2, 1.0, False), Targets({"labels": labels}, 2)
    found = []
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found.append(distillation.divergence(HeadInput(term, states), targets, teacher, lambda rows: [rows]))
    assert found[0] * 2998 > 65_504  # the largest number in half precision
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0.0)
