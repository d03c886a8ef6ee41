"""`add_auxiliary_losses`: the losses on models of Transformers, and which models are refused."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    set_seed,
)

from charformer_training import (
    add_auxiliary_losses,
    load_auxiliary_losses,
)
from modeling_charformer.loss_settings import AuxiliaryLossSettings
from tests.training.any_models import DEPRECATED, KINDS, build, make_ids, norm_of


def record_outputs(model) -> dict[int, torch.Tensor]:
    """What each layer gives in the next forward pass, by the layer's number from 1."""
    outputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(getattr(model.base_model, "layers", None) or model.base_model.h, start=1):
        layer.register_forward_hook(
            lambda _, __, out, number=number: outputs.__setitem__(number, out[0] if isinstance(out, tuple) else out)
        )
    return outputs


@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_match_a_reference(kind, heads):
    model, ids = build(kind), make_ids()
    plain = model(ids, labels=ids, output_hidden_states=True)
    outputs_of_layers = record_outputs(model)
    add_auxiliary_losses(
        model,
        heads,
        num_targets=3,
        target_weights=[0.4, 0.2],
        intermediate_layers=[1, 3],
        intermediate_weight=0.3,
    )
    for head in model.auxiliary_heads.values():  # residual blocks begin as the identity: that would hide mistakes
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    output = model(ids, labels=ids, training_progress=0.2)
    torch.testing.assert_close(output.logits, plain.logits)
    torch.testing.assert_close(output.loss_dict["next_token"], plain.loss)
    cap = getattr(model.config, "final_logit_softcapping", None)

    def shared(hidden):
        logits = model.get_output_embeddings()(hidden)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def reference(layer: int, offset: int, name: str):
        hidden, head = norm_of(model)(outputs_of_layers[layer]), model.auxiliary_heads[name]
        if heads == "own":
            logits = F.linear(hidden, head.weight, head.bias)
        elif offset == 1:
            logits = shared(hidden)
        else:
            logits = shared(hidden + F.silu(F.linear(hidden, head.linear.weight, head.linear.bias)))
        return F.cross_entropy(logits[:, :-offset].flatten(0, 1), ids[:, offset:].flatten())

    # layer 1 of 4 dropped out at 1/8 of training
    expected = {
        "target_2": (0.4, reference(4, 2, "target_2")),
        "target_3": (0.2, reference(4, 3, "target_3")),
        "layer_3": (0.3, reference(3, 1, "layer_3")),
        "layer_3_target_2": (0.3 * 0.4, reference(3, 2, "layer_3_target_2")),
        "layer_3_target_3": (0.3 * 0.2, reference(3, 3, "layer_3_target_3")),
    }
    assert set(output.loss_dict) == {"next_token", "last_position", *expected}
    total = plain.loss
    for name, (weight, value) in expected.items():
        torch.testing.assert_close(output.loss_dict[name], value)
        assert output.loss_weights[name] == pytest.approx(weight)
        total = total + weight * value
    torch.testing.assert_close(output.loss, total)
    last = F.cross_entropy(plain.logits[:, -2], ids[:, -1])
    torch.testing.assert_close(output.loss_dict["last_position"], last)
    output.loss.backward()
    for name, head in model.auxiliary_heads.items():
        for parameter in head.parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_and_in_evaluation_it_is_the_plain_model(kind):
    model, ids = build(kind).eval(), make_ids()
    plain = model(ids, labels=ids)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    add_auxiliary_losses(model)
    output = model(ids, labels=ids)
    assert output.loss == plain.loss and output.logits.equal(plain.logits) and set(output.loss_dict) == {"next_token"}
    assert model.generate(ids, max_new_tokens=5, do_sample=False).equal(generated)


def test_last_position_takes_the_main_weight():
    model, ids = add_auxiliary_losses(build("llama"), position_loss="last", num_targets=1), make_ids()
    output = model(ids, labels=ids)
    assert output.loss_weights["last_position"] == 1.0 and output.loss_weights["next_token"] == 0.0
    torch.testing.assert_close(output.loss_dict["last_position"], F.cross_entropy(output.logits[:, -2], ids[:, -1]))


@DEPRECATED
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradient_checkpointing_and_tied_embeddings_give_the_same_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        model, ids = add_auxiliary_losses(build(kind, tie_word_embeddings=True)), make_ids()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow
def test_compiled_in_one_graph():
    model, ids = add_auxiliary_losses(build("llama")), make_ids()
    expected = model(ids, labels=ids, use_cache=False, training_progress=0.2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(input_ids=ids, labels=ids, use_cache=False, training_progress=0.2)
    torch.testing.assert_close(output.loss_dict, expected.loss_dict)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_classifiers_of_sequences(kind):
    model, ids = build(kind, AutoModelForSequenceClassification, num_labels=3, num_hidden_layers=3), make_ids()
    ids[0, 9:] = 0
    mask = (ids != 0).long()
    labels = torch.tensor([2, 0])
    plain = model(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    add_auxiliary_losses(model)
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.loss_weights == {"classification": 1.0, "layer_1": 0.3, "layer_2": 0.3}
    total = plain.loss
    for layer in (1, 2):
        hidden = plain.hidden_states[layer]
        hidden = hidden[:, 0] if kind == "bert" else norm_of(model)(hidden)[torch.arange(2), [8, 11]]
        expected = F.cross_entropy(model.auxiliary_heads[f"layer_{layer}"](hidden), labels)
        torch.testing.assert_close(output.loss_dict[f"layer_{layer}"], expected)
        total = total + 0.3 * expected
    torch.testing.assert_close(output.loss, total)
    evaluated = model.eval()(ids, attention_mask=mask, labels=labels)
    assert evaluated.logits.equal(
        build(kind, AutoModelForSequenceClassification, num_labels=3, num_hidden_layers=3)
        .eval()(ids, attention_mask=mask)
        .logits
    )
    assert set(evaluated.loss_dict) == {"classification"}


@DEPRECATED
def test_peft_trains_adapters_and_heads():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    add_auxiliary_losses(model, num_targets=2)
    ids = make_ids()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = None
    for _ in range(5):
        output = model(input_ids=ids, labels=ids, training_progress=0.0)
        first = first or output.loss_dict["layer_1_target_2"].item()
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert output.loss_dict["layer_1_target_2"].item() < first
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert "layer_1_target_2" in trained


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: build("llama"), {"intermediate_layers": [4]}, r"intermediate_layers contains \[4\].* 1 to 3"),
        (lambda: build("llama"), {"intermediate_weight": float("nan")}, "intermediate_weight is nan"),
        (lambda: build("llama"), {"heads": "none"}, "heads is 'none'.*'shared', 'own'"),
        (
            lambda: build("llama"),
            {"targets": 2},
            r"no settings \['targets'\] .*meant num_targets\?\); it has .*'num_targets'",
        ),
        (lambda: build("llama", AutoModel), {}, "not LlamaModel"),
        (lambda: torch.nn.Linear(2, 2), {}, "takes a model of Transformers .*, not Linear"),
        (lambda: add_auxiliary_losses(build("llama")), {}, "has auxiliary losses already"),
        (
            lambda: build("bert", AutoModelForSequenceClassification),
            {"num_targets": 2},
            r"no settings \['num_targets'\] for BertForSequenceClassification;",
        ),
        (
            lambda: BartForCausalLM(BartConfig(d_model=16, decoder_layers=2, vocab_size=61)),
            {},
            "the loss of BartForCausalLM is not the mean cross-entropy of its logits for the next token",
        ),
    ],
)
def test_wrong_models_and_settings_are_refused_and_nothing_is_changed(make, settings, message):
    model = make()
    kind = type(model)
    with pytest.raises(ValueError, match=message):
        add_auxiliary_losses(model, **settings)
    assert type(model) is kind


def test_vocabulary_mismatch_is_refused():
    model = build("llama")
    model.config.vocab_size = 60
    with pytest.raises(ValueError, match="have 61 rows, its vocab_size is 60"):
        add_auxiliary_losses(model)


class LlamaForCausalLMWithAPrior(LlamaForCausalLM):
    """Whose logits are no multiple of what its output embeddings make."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, **kwargs)
        outputs.logits = outputs.logits - 0.1 * torch.arange(61)
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, 61)
        return outputs


def test_a_model_that_changes_its_logits_in_its_own_way_is_refused_or_has_its_own_heads():
    config, ids = build("llama").config, make_ids()
    model = LlamaForCausalLMWithAPrior(config).train()
    with pytest.raises(ValueError, match="does not know the further operations of this model; choose heads='own'"):
        add_auxiliary_losses(model)
    assert type(model) is LlamaForCausalLMWithAPrior and not hasattr(model, "loss_settings")
    output = add_auxiliary_losses(model, "own")(input_ids=ids, labels=ids)
    assert output.loss_weights["layer_1"] == 1.0


@pytest.mark.parametrize(
    ("kind", "scaling"), [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.25})]
)
@pytest.mark.parametrize("heads", ["shared", "own"])
def test_logits_of_shared_heads_are_scaled_like_the_models(kind, scaling, heads):
    model, ids = build(kind, **scaling), make_ids()
    hidden = model(ids, output_hidden_states=True).hidden_states[2]
    add_auxiliary_losses(model, heads, num_targets=1, intermediate_layers=[2])
    loss = model(ids, labels=ids).loss_dict["layer_2"]
    normed = norm_of(model)(hidden)
    logits = model.lm_head(normed) * 0.25 if heads == "shared" else model.auxiliary_heads["layer_2"](normed)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_a_layers_loss_is_that_layers_where_hidden_states_begin_with_the_first_layer(kind):
    set_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 4, "state_size": 4}
    if kind == "mamba2":
        sizes |= {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).train()
    outputs: list[torch.Tensor] = []
    model.backbone.layers[2].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    ids = make_ids()
    model(ids)
    add_auxiliary_losses(model, num_targets=1, intermediate_layers=[3])
    loss = model(ids, labels=ids).loss_dict["layer_3"]
    logits = model.lm_head(model.backbone.norm_f(outputs[0])).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_models_whose_loss_is_of_another_kind_are_refused():
    set_seed(0)
    config = AutoConfig.for_model("xlnet", vocab_size=61, d_model=16, n_layer=2, n_head=2, d_inner=32)
    with pytest.raises(ValueError, match="XLNetLMHeadModel reads in both directions"):
        add_auxiliary_losses(AutoModelForCausalLM.from_config(config))

    class UnshiftedForCausalLM(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            outputs = super().forward(input_ids, **kwargs)
            if labels is not None:
                outputs.loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
            return outputs

    with pytest.raises(ValueError, match="is not the mean cross-entropy of its logits for the next token"):
        add_auxiliary_losses(UnshiftedForCausalLM(build("llama").config))


def test_projected_word_embeddings_have_heads_of_their_width():
    """Like OPT-350m's: layers of 16, embeddings of 8, and a projection between."""
    set_seed(0)
    config = AutoConfig.for_model(
        "opt", vocab_size=61, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2,
        word_embed_proj_dim=8, do_layer_norm_before=False, dropout=0.0, max_position_embeddings=32,
    )  # fmt: skip
    for heads in ("shared", "own"):
        model, ids = AutoModelForCausalLM.from_config(config).train(), make_ids()
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
        output = add_auxiliary_losses(model, heads, num_targets=2)(ids, labels=ids)
        output.loss.backward()
        if heads == "shared":
            logits = model.lm_head(model.model.decoder.project_out(hidden))
            expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            torch.testing.assert_close(output.loss_dict["layer_2"], expected)


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_adding_losses_draws_no_global_random_numbers(heads):
    model = build("llama")
    before = torch.get_rng_state()
    add_auxiliary_losses(model, heads)
    assert torch.get_rng_state().equal(before)


def test_shift_labels_are_followed_by_every_term():
    model, ids = add_auxiliary_losses(build("llama"), num_targets=3), make_ids()
    expected = model(ids, labels=ids).loss_dict
    aligned = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=aligned).loss_dict, expected)
    other = aligned.clone()
    other[:, 3] = 4
    changed = model(ids, labels=ids, shift_labels=other).loss_dict
    assert all(changed[name] != value for name, value in expected.items() if name != "last_position")


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_heads_follow_a_vocabulary_resized_after_they_were_added(heads, tmp_path):
    model = add_auxiliary_losses(build("llama"), num_targets=2, heads=heads)
    old = {name: weight.clone() for name, weight in model.auxiliary_heads.state_dict().items()}
    model.resize_token_embeddings(70, mean_resizing=False)
    for name, weight in model.auxiliary_heads.state_dict().items():
        assert weight[: len(old[name])].equal(old[name]), name
    added = torch.full((1, 6), 69)
    output = model(input_ids=added, labels=added, training_progress=0.0)
    output.loss.backward()
    assert len(output.loss_dict) > 5 and model.get_output_embeddings().weight.grad[69].any()
    if heads == "own":
        assert all(head.weight.grad[69].any() for head in model.auxiliary_heads.values())
    model.save_pretrained(tmp_path)
    loaded = load_auxiliary_losses(type(build("llama")).from_pretrained(tmp_path), tmp_path).train()
    again = loaded(input_ids=added, labels=added, training_progress=0.0).loss_dict
    torch.testing.assert_close(dict(again), dict(output.loss_dict))


def test_own_head_in_an_adapter_is_still_its_terms_head():
    """PEFT's `target_modules="all-linear"` puts one around each head."""
    model, ids = add_auxiliary_losses(build("llama"), heads="own", num_targets=2), make_ids()
    before = model(input_ids=ids, labels=ids, training_progress=0.0).loss_dict
    for name, head in list(model.auxiliary_heads.items()):
        model.auxiliary_heads[name] = torch.nn.Sequential(head)
    torch.testing.assert_close(dict(model(input_ids=ids, labels=ids, training_progress=0.0).loss_dict), dict(before))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("num_targets", 2.0, "a whole number, 1 or more"),
        ("num_targets", True, "a whole number, 1 or more"),
        ("target_weights", 0.5, "a list of weights, or None"),
        ("term_weights", [1], "a mapping of terms to weights, or None"),
        ("term_weights", {"layer_1": "1"}, "a finite number that is 0 or more"),
        ("intermediate_layers", 2, "'all', a list of layer numbers, or None"),
        ("intermediate_layers", ["1"], "layers are whole numbers"),
        ("intermediate_weight", True, "a finite number that is 0 or more"),
        ("intermediate_schedule", ["random"], "known schedules: "),
        ("distillation", "1", "a finite number that is 0 or more"),
    ],
    ids=str,
)
def test_settings_of_a_wrong_type_are_refused_with_what_is_accepted(field, value, accepted):
    with pytest.raises(ValueError, match=f"^{field}.*{accepted}"):
        AuxiliaryLossSettings(num_layers=4, **{field: value})


def test_frozen_heads_are_reported_once(caplog):
    model, ids = add_auxiliary_losses(build("llama"), num_targets=2), make_ids()
    for parameter in model.auxiliary_heads.parameters():
        parameter.requires_grad_(False)  # as get_peft_model does
    for _ in range(2):
        model(input_ids=ids, labels=ids)
    assert caplog.text.count("are frozen") == 1 and "call add_auxiliary_losses after get_peft_model" in caplog.text
    caplog.clear()
    model = add_auxiliary_losses(build("llama"), num_targets=2)
    model(input_ids=ids, labels=ids)
    assert "frozen" not in caplog.text
