"""`add_auxiliary_losses`: the losses on models of Transformers."""

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForObjectDetection,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    set_seed,
)

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    add_auxiliary_losses,
    load_auxiliary_losses,
)
from charformer_training.models import HEADS_FILE, OLD_HEADS_FILE
from modeling_charformer import CharformerConfig, CharformerForSequenceClassification
from tests.helpers import TINY, assert_same_logs, loss_logs


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ["gpt2", "llama", "qwen3", "gpt_neox", "gemma", "gemma2"]


def build(kind: str, auto: Any = AutoModelForCausalLM, **changes) -> Any:
    set_seed(0)
    sizes: dict[str, Any] = dict(SIZES)
    if kind == "gpt2":
        sizes |= {"n_inner": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        del sizes["intermediate_size"], sizes["num_key_value_heads"], sizes["head_dim"]
    if kind == "bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = AutoConfig.for_model(kind, **(sizes | {"initializer_range": 0.1} | changes))
    return auto.from_config(config, attn_implementation="eager").train()


def make_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def norm_of(model) -> torch.nn.Module:
    base = model.base_model
    return next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))


@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_match_a_reference(kind, heads):
    model, ids = build(kind), make_ids()
    plain = model(ids, labels=ids, output_hidden_states=True)
    outputs_of_layers: dict[int, torch.Tensor] = {}
    layers = getattr(model.base_model, "layers", None) or model.base_model.h
    for number, layer in enumerate(layers, start=1):
        layer.register_forward_hook(
            lambda _, __, out, number=number: outputs_of_layers.__setitem__(
                number, (out[0] if isinstance(out, tuple) else out)
            )
        )
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


# Newer Transformers call it activation checkpointing; the oldest supported does not know that name.
DEPRECATED = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


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


@pytest.mark.parametrize("num_targets", [1, 3])  # with one, shared classifiers have no weights of their own
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_saved_model_is_the_plain_one_with_the_heads_in_a_subfolder(kind, num_targets, tmp_path):
    settings: dict[str, Any] = {
        "num_targets": num_targets,
        "intermediate_layers": [2],
        "term_weights": {"layer_2": 0.25},
    }
    model, ids = add_auxiliary_losses(build(kind), **settings), make_ids()
    for parameter in model.auxiliary_heads.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    plain, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(plain).__module__.startswith("transformers.models") and not hasattr(plain, "auxiliary_heads")
    assert plain(ids).logits.equal(model.eval()(ids).logits)
    architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architectures == [type(plain).__name__]
    restored = load_auxiliary_losses(plain, tmp_path).train()
    assert restored.loss_settings == model.loss_settings
    expected, output = model.train()(ids, labels=ids), restored(ids, labels=ids)
    assert output.loss == expected.loss and output.loss_dict == expected.loss_dict


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_safetensors_beside_the_config_hold_the_models_own_weights_alone(kind, max_shard_size, tmp_path):
    """Engines such as vLLM load every `*.safetensors` that lies there."""
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    model = add_auxiliary_losses(build(kind, auto), classifiers="own")
    save_file({"auxiliary_heads.old.weight": torch.ones(1)}, tmp_path / OLD_HEADS_FILE)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    beside = list(tmp_path.glob("*.safetensors"))
    assert (len(beside) > 1) == (max_shard_size == "10KB")
    saved = {name for path in beside for name in load_file(path)}
    build(kind, auto).save_pretrained(tmp_path / "plain")
    assert saved == load_file(tmp_path / "plain" / "model.safetensors").keys()
    heads = load_file(tmp_path / "auxiliary_heads" / "model.safetensors")
    assert {name.split(".")[1] for name in heads} == set(model.auxiliary_heads)


def test_heads_saved_beside_the_model_still_load(tmp_path):
    model: Any = add_auxiliary_losses(build("gpt2"))
    for parameter in model.auxiliary_heads.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    (tmp_path / HEADS_FILE).rename(tmp_path / OLD_HEADS_FILE)
    restored: Any = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)
    expected = model.auxiliary_heads.state_dict()
    assert all(weight.equal(expected[name]) for name, weight in restored.auxiliary_heads.state_dict().items())
    other = add_auxiliary_losses(build("gpt2"))
    other.load_auxiliary_heads(tmp_path)
    assert other.auxiliary_heads.target_2.linear.weight.equal(model.auxiliary_heads.target_2.linear.weight)
    (tmp_path / OLD_HEADS_FILE).unlink()
    with pytest.raises(OSError, match="auxiliary_heads/model.safetensors"):
        load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)


def test_half_saved_heads_are_refused(tmp_path):
    add_auxiliary_losses(build("gpt2")).save_pretrained(tmp_path)
    other = add_auxiliary_losses(build("gpt2"), num_targets=3)
    with pytest.raises(ValueError, match="saved with other auxiliary losses; .*target_3"):
        other.load_auxiliary_heads(tmp_path)
    (tmp_path / HEADS_FILE).unlink()
    with pytest.raises(ValueError, match="has no auxiliary_heads/model.safetensors"):
        other.load_auxiliary_heads(tmp_path)
    build("gpt2").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="was saved without auxiliary losses"):
        load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "plain")


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
        (lambda: build("llama"), {"targets": 2}, r"no settings \['targets'\] .*'num_targets'"),
        (lambda: build("llama", AutoModel), {}, "not LlamaModel"),
        (lambda: torch.nn.Linear(2, 2), {}, "takes a model of Transformers .*, not Linear"),
        (lambda: add_auxiliary_losses(build("llama")), {}, "has auxiliary losses already"),
        (
            lambda: build("bert", AutoModelForSequenceClassification),
            {"num_targets": 2},
            r"no settings \['num_targets'\] for BertForSequenceClassification",
        ),
        (
            lambda: AutoModelForSequenceClassification.from_config(
                AutoConfig.for_model("bart", d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=61)
            ),
            {},
            "is an encoder-decoder",
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


def test_a_model_with_added_losses_can_be_pickled_and_copied():
    model, ids = add_auxiliary_losses(build("llama"), "own", num_targets=2), make_ids()
    expected = model(ids, labels=ids)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        output = again(ids, labels=ids)
        assert type(again) is type(model) and output.loss == expected.loss
        assert output.loss_dict == expected.loss_dict
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(ids, labels=ids).loss == expected.loss
    assert pickle.loads(pickle.dumps(expected)).loss_weights == expected.loss_weights


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_adding_losses_draws_no_global_random_numbers(heads):
    model = build("llama")
    before = torch.get_rng_state()
    add_auxiliary_losses(model, heads)
    assert torch.get_rng_state().equal(before)


def test_former_names_of_settings_still_load():
    former = add_auxiliary_losses(build("llama"), classifiers="own", loss_weights={"target_2": 0.4})
    assert former.config.auxiliary_losses == {"heads": "own", "term_weights": {"target_2": 0.4}}


def test_shift_labels_are_followed_by_every_term():
    model, ids = add_auxiliary_losses(build("llama"), num_targets=3), make_ids()
    expected = model(ids, labels=ids).loss_dict
    aligned = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=aligned).loss_dict, expected)
    other = aligned.clone()
    other[:, 3] = 4
    changed = model(ids, labels=ids, shift_labels=other).loss_dict
    assert all(changed[name] != value for name, value in expected.items() if name != "last_position")


class Rows(torch.utils.data.Dataset):
    """Texts of different lengths, of random tokens."""

    def __init__(self, labels: str, number: int = 64):
        self.labels, self.number = labels, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 61, (12,), generator=generator)
        if self.labels == "class":
            return {"input_ids": ids, "labels": torch.tensor(index % 3)}
        labels = ids.clone()
        labels[4 + index % 8 :] = -100
        return {"input_ids": ids, "labels": labels}


DETR: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": AutoConfig.for_model(
        "resnet",
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    ),
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "dropout": 0.0,
    "num_queries": 5,
    "num_labels": 3,
    "auxiliary_loss": True,
}


class Pictures(torch.utils.data.Dataset):
    """Noise with one box in each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        box = {"class_labels": torch.tensor([index % 3]), "boxes": 0.2 + 0.3 * torch.rand(1, 4, generator=generator)}
        return {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": box}

    @staticmethod
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }


def train(
    model,
    tmp_path,
    labels: str = "next",
    batch: int = 8,
    accumulation: int = 1,
    prepare=None,
    data=None,
    data_collator=None,
    **changes,
):
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    set_seed(0)
    trainer = AuxiliaryLossTrainer(
        model=model,
        args=AuxiliaryLossTrainingArguments(**(arguments | changes)),
        train_dataset=data or Rows(labels),
        eval_dataset=data or Rows(labels, 10),
        data_collator=data_collator,
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


def mixtral(**changes):
    return build("mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, **changes)


class TestTrainer:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_figures_are_the_same_however_a_batch_is_split(self, kind, tmp_path):
        logs = [
            loss_logs(train(add_auxiliary_losses(build(kind)), tmp_path, batch=batch, accumulation=8 // batch))
            for batch in (8, 2)
        ]
        assert {"loss_next_token", "loss_target_2", "loss_layer_1_target_2", "loss_last_position"} <= set(logs[0][0])
        assert_same_logs(*logs)

    @pytest.mark.parametrize("kind", ["bert", "llama"])
    @pytest.mark.parametrize("added", [False, True])
    def test_a_classifier_that_ignores_the_counts_is_trained_on_means(self, kind, added, tmp_path):
        logs = []
        for batch in (8, 2):
            model = build(kind, AutoModelForSequenceClassification, num_labels=3)
            model = add_auxiliary_losses(model) if added else model
            logs.append(loss_logs(train(model, tmp_path, "class", batch, 8 // batch)))
        assert logs[0][0]["loss"] < 4.0  # a mean, about log 3 and what the auxiliary classifiers add
        assert ("loss_layer_1" in logs[0][0]) == added
        assert_same_logs(*logs)

    @pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
    def test_a_charformer_that_classifies(self, weighting, tmp_path):
        logs = []
        for batch in (8, 2):
            set_seed(0)
            config = CharformerConfig(**(TINY | {"num_labels": 3, "loss_weighting": weighting}))
            model = CharformerForSequenceClassification(config)
            logs.append(loss_logs(train(model, tmp_path, "class", batch, 8 // batch)))
        assert {"loss_classification", "loss_layer_1", "loss_layer_2"} <= set(logs[0][0])
        assert ("loss_uncertainty" in logs[0][0]) == (weighting == "uncertainty")
        assert logs[0][0]["loss_classification"] == pytest.approx(1.0986, rel=0.05)
        assert_same_logs(*logs)

    def test_a_model_with_only_a_loss(self, tmp_path):
        logs = [loss_logs(train(build("gpt2"), tmp_path, batch=batch, accumulation=8 // batch)) for batch in (8, 4)]
        assert set(logs[0][0]) == {"loss", "step", "learning_rate", "grad_norm"}
        assert_same_logs(*logs)
        rows = [Rows("next")[index] for index in range(8)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        assert logs[0][0]["loss"] == pytest.approx(build("gpt2")(**batch).loss.item(), rel=1e-4)

    def test_losses_beside_the_dict_are_logged_as_means(self, tmp_path):
        """The balancing loss of a mixture of experts is one of a batch, whatever the rest of the step holds."""
        logs = []
        for accumulation in (1, 2):
            trainer = train(mixtral(), tmp_path, batch=4, accumulation=accumulation, learning_rate=0.0, max_steps=2)
            logs.append(loss_logs(trainer))
        model, rows = mixtral(), [Rows("next")[index] for index in range(16)]
        expected = []
        for start in range(0, 16, 4):
            batch = {key: torch.stack([row[key] for row in rows[start : start + 4]]) for key in rows[0]}
            expected.append(model(**batch).aux_loss.item())
        assert [entry["loss_aux_loss"] for entry in logs[0]] == pytest.approx(expected[:2], rel=1e-4)
        assert logs[1][0]["loss_aux_loss"] == pytest.approx((expected[0] + expected[1]) / 2, rel=1e-4)
        assert "eval_loss_aux_loss" in trainer.evaluate()

    def test_detr_logs_each_of_its_losses(self, tmp_path):
        logs = []
        for batch in (4, 2):
            set_seed(0)
            config = AutoConfig.for_model("detr", **DETR)
            settings: dict[str, Any] = {
                "batch": batch,
                "accumulation": 4 // batch,
                "max_steps": 2,
                "learning_rate": 1e-4,
            }
            model = AutoModelForObjectDetection.from_config(config)
            trainer = train(model, tmp_path, data=Pictures(), data_collator=Pictures.collate, **settings)
            logs.append(loss_logs(trainer))
        assert_same_logs(*logs)
        entry = logs[0][0]
        parts = ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0")
        assert {*parts, "loss_cardinality_error"} <= set(entry)
        weights = {"ce": 1, "bbox": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
        total = sum(weights[name.split("_")[1]] * entry[name] for name in parts)
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert "eval_loss_giou" in trainer.evaluate()

    def test_a_term_of_ones_own(self, tmp_path):
        def entropy(outputs, inputs):
            p = outputs.logits.softmax(-1)
            return -(p * p.log()).sum(-1).mean()

        def prepare(trainer):
            trainer.add_loss_term("entropy", entropy, weight=0.5, schedule="paper")

        plain = loss_logs(train(build("llama"), tmp_path, learning_rate=0.0))
        logs = []
        for batch in (8, 2):
            trainer = train(
                build("llama"), tmp_path, batch=batch, accumulation=8 // batch, learning_rate=0.0, prepare=prepare
            )
            logs.append(loss_logs(trainer))
        assert_same_logs(*logs)
        for number, (with_term, without) in enumerate(zip(logs[0], plain, strict=True)):
            assert ("loss_entropy" in with_term) == (number < 2)  # dropped after half of training
            extra = 0.5 * with_term.get("loss_entropy", 0.0)
            assert with_term["loss"] == pytest.approx(without["loss"] + extra, rel=1e-5)
            assert (with_term["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)) == (number < 2)

    def test_wrong_terms_are_refused(self, tmp_path):
        def prepare(trainer):
            def one(outputs, inputs):
                return torch.ones(())

            for name, weight, schedule, message in (
                ("layer_1", 1.0, "constant", "'layer_1' exists already"),
                ("own", float("nan"), "constant", "weight of the loss term 'own' is nan"),
                ("own", 1.0, "papr", "'papr'; known schedules"),
            ):
                with pytest.raises(ValueError, match=message):
                    trainer.add_loss_term(name, one, weight, schedule)
            trainer.add_loss_term("own", lambda outputs, inputs: outputs.logits)

        with pytest.raises(ValueError, match=r"'own' returned a tensor of the shape \(8, 12, 61\)"):
            train(add_auxiliary_losses(build("llama")), tmp_path, prepare=prepare)

    @DEPRECATED
    @pytest.mark.parametrize("lora", [False, True])
    def test_a_resumed_run_is_the_uninterrupted_one(self, lora, tmp_path):
        from peft import LoraConfig, get_peft_model

        def make():
            model = build("llama")
            if lora:
                model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
            return add_auxiliary_losses(model, intermediate_schedule="constant")

        whole = train(make(), tmp_path / "whole")
        train(make(), tmp_path / "parts", save_strategy="steps", save_steps=2)
        resumed = AuxiliaryLossTrainer(
            model=make(),
            args=AuxiliaryLossTrainingArguments(**{**whole.args.to_dict(), "output_dir": str(tmp_path / "parts")}),
            train_dataset=Rows("next"),
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        assert_same_logs(loss_logs(whole), loss_logs(resumed))
        assert whole.model is not None and resumed.model is not None
        for name, weight in whole.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], weight, msg=name)

    def test_predictions_hold_no_losses(self, tmp_path):
        model = add_auxiliary_losses(build("llama"))
        trainer = train(model, tmp_path)
        assert trainer.predict(Rows("next", 6)).predictions.shape == (6, 12, 61)
