"""`add_auxiliary_losses` on masked language models, encoder-decoders, and classifiers of tokens and images."""

import json
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    BigBirdConfig,
    set_seed,
)

from benchmarks.model_table import attempt, table
from benchmarks.tiny_models import classes
from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses
from tests.helpers import ROOT, loss_logs
from tests.training.any_models import build, make_ids


MASKED = torch.tensor([[-100, -100, 5, -100, -100, 9, 7, -100], [-100, 3, -100, -100, -100, -100, -100, -100]])


def build_t5(**changes: Any) -> Any:
    set_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    sizes |= {"num_decoder_layers": 3, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **(sizes | changes))).train()


def build_image_model(kind: str, **changes: Any) -> Any:
    set_seed(0)
    sizes: dict[str, dict[str, Any]] = {
        "vit": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3,
                "image_size": 16, "patch_size": 8, "hidden_dropout_prob": 0.0},
        "convnext": {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "num_stages": 3, "patch_size": 2, "drop_path_rate": 0.0},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "layer_type": "basic"},
    }  # fmt: skip
    config = AutoConfig.for_model(kind, num_labels=3, initializer_range=0.1, **(sizes[kind] | changes))
    return AutoModelForImageClassification.from_config(config).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("causal language models", "Gemma3nForCausalLM"),
        ("causal language models", "MiniCPM3ForCausalLM"),
        ("masked language models", "DistilBertForMaskedLM"),
        ("causal language models", "LongcatFlashForCausalLM"),
        ("encoder-decoders", "FSMTForConditionalGeneration"),
        ("encoder-decoders", "BartForConditionalGeneration"),
        ("language models with images", "VisionEncoderDecoderModel"),
        ("sequence classifiers", "T5ForSequenceClassification"),
        ("token classifiers", "XLNetForTokenClassification"),
        ("image classifiers", "Dinov2WithRegistersForImageClassification"),
        ("image classifiers", "SwinForImageClassification"),
    ],
)
def test_classes_of_each_kind_work(kind, name):
    (model_type,) = {listed[1] for listed in classes() if (listed[0], listed[2]) == (kind, name)}
    result, why = attempt(kind, model_type, name)
    assert result == "works", why


def test_page_of_models_holds_the_results_of_every_class():
    results = json.loads((ROOT / "benchmarks/results/models.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{table(results)}")
    assert {row["result"] for row in results["models"]} == {"works", "refused", "not tried"}
    tried = {(row["kind"], row["class"]) for row in results["models"]}
    assert len(tried) == len(results["models"])
    if results["transformers"] == transformers.__version__:
        assert tried == {(kind, name) for kind, _, name in classes()}


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_masked_language_models_predict_the_masked_tokens_from_their_layers(heads):
    model, ids = build("bert", AutoModelForMaskedLM, num_hidden_layers=3), make_ids(length=8)
    plain = model(ids, labels=MASKED, output_hidden_states=True)
    add_auxiliary_losses(model, heads, intermediate_weight=0.5)
    output = model(ids, labels=MASKED)
    assert set(output.loss_dict) == {"masked_token", "layer_1", "layer_2"}
    torch.testing.assert_close(output.loss_dict["masked_token"], plain.loss)
    for layer in (1, 2):
        head = model.cls if heads == "shared" else model.auxiliary_heads[f"layer_{layer}"]
        logits = head(plain.hidden_states[layer])
        expected = F.cross_entropy(logits.flatten(0, 1), MASKED.flatten())
        torch.testing.assert_close(output.loss_dict[f"layer_{layer}"], expected)
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * sum(output.loss_dict[f"layer_{n}"] for n in (1, 2)))
    evaluated = model.eval()(ids, labels=MASKED)
    assert evaluated.loss == plain.loss and set(evaluated.loss_dict) == {"masked_token"}


def test_encoder_decoders_predict_the_labels_from_the_decoders_layers():
    model, ids, labels = build_t5(), make_ids(), make_ids(length=7)
    labels[0, 5:] = -100
    plain = model(ids, labels=labels, output_hidden_states=True)
    add_auxiliary_losses(model, num_targets=2, intermediate_schedule="constant")
    torch.nn.init.normal_(model.auxiliary_heads["target_2"].linear.weight, std=0.1)
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss_dict["next_token"], plain.loss)
    assert set(output.loss_dict) == {
        "next_token", "last_position", "target_2", "layer_1", "layer_1_target_2", "layer_2", "layer_2_target_2"
    }  # fmt: skip
    assert output.decoder_hidden_states is None and output.encoder_hidden_states is None

    def loss(hidden, offset):
        logits = model.lm_head(hidden * 16**-0.5)[:, : 7 - offset + 1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, offset - 1 :].flatten())

    final = plain.decoder_hidden_states[-1]
    torch.testing.assert_close(output.loss_dict["target_2"], loss(model.auxiliary_heads["target_2"](final), 2))
    for layer in (1, 2):
        normed = model.decoder.final_layer_norm(plain.decoder_hidden_states[layer])
        torch.testing.assert_close(output.loss_dict[f"layer_{layer}"], loss(normed, 1))
        torch.testing.assert_close(output.loss_dict[f"layer_{layer}_target_2"], loss(normed, 2))
    last = F.cross_entropy(plain.logits[[0, 1], [4, 6]], labels[[0, 1], [4, 6]])
    torch.testing.assert_close(output.loss_dict["last_position"], last)


def test_whispers_decoder_predicts_the_labels_from_its_layers():
    set_seed(0)
    sizes: dict[str, Any] = {f"{part}_{name}": size for part in ("encoder", "decoder")
                             for name, size in {"layers": 3, "attention_heads": 2, "ffn_dim": 32}.items()}  # fmt: skip
    sizes |= {
        "vocab_size": 61,
        "d_model": 16,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 16,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model: Any = AutoModelForSpeechSeq2Seq.from_config(AutoConfig.for_model("whisper", **sizes, **tokens)).train()
    outputs: list[torch.Tensor] = []
    for layer in model.model.decoder.layers:
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    add_auxiliary_losses(model, num_targets=2, intermediate_layers=[2], intermediate_schedule="constant")
    outputs.clear()
    ids, sounds = make_ids(2, 8), torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    losses = model(input_features=sounds, labels=ids, training_progress=0.0).loss_dict
    for layer, offset, name in [(2, 1, "layer_2"), (2, 2, "layer_2_target_2"), (3, 2, "target_2")]:
        state = outputs[layer - 1] if isinstance(outputs[layer - 1], torch.Tensor) else outputs[layer - 1][0]
        normed = model.model.decoder.layer_norm(state)  # new residual blocks are the identity
        logits = model.proj_out(normed)[:, : 8 - (offset - 1)].flatten(0, 1)
        torch.testing.assert_close(losses[name], F.cross_entropy(logits, ids[:, offset - 1 :].flatten()))


def test_classifiers_of_tokens():
    model, ids = build("bert", AutoModelForTokenClassification, num_hidden_layers=3, num_labels=3), make_ids(length=8)
    labels = torch.where(MASKED > 0, MASKED % 3, -100)
    plain = model(ids, labels=labels, output_hidden_states=True)
    output = add_auxiliary_losses(model)(ids, labels=labels)
    assert output.loss_weights == {"classification": 1.0, "layer_1": 0.3, "layer_2": 0.3}
    for layer in (1, 2):
        logits = model.auxiliary_heads[f"layer_{layer}"](plain.hidden_states[layer])
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(output.loss_dict[f"layer_{layer}"], expected)


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet"])
def test_classifiers_of_images_pool_like_the_models(kind):
    model, labels = build_image_model(kind), torch.tensor([2, 0])
    pixels = torch.randn(
        2, 3, 16 if kind == "vit" else 32, 16 if kind == "vit" else 32, generator=torch.Generator().manual_seed(1)
    )
    model.eval()  # the norms of a ResNet depend on the batch in training
    plain = model(pixels, labels=labels, output_hidden_states=True)
    add_auxiliary_losses(model)
    model.training = True
    output = model(pixels, labels=labels)
    torch.testing.assert_close(output.loss_dict["classification"], plain.loss)
    assert output.loss_weights == {"classification": 1.0, "layer_1": 0.3, "layer_2": 0.3}
    for layer in (1, 2):
        state, head = plain.hidden_states[layer], model.auxiliary_heads[f"layer_{layer}"]
        if kind == "vit":
            logits = head(model.vit.layernorm(state)[:, 0])
        else:
            norm, linear = head
            assert linear.in_features == (8, 12)[layer - 1] == state.shape[1]
            logits = linear(norm(state.mean(dim=(2, 3))))
        torch.testing.assert_close(output.loss_dict[f"layer_{layer}"], F.cross_entropy(logits, labels))


def rows(kind: str) -> list[dict[str, torch.Tensor]]:
    """Rows with different numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(16):
        ids = torch.randint(3, 61, (12,), generator=generator)
        labels = ids % 3 if kind == "token" else ids.clone()
        labels[1 + number % 9 :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


MAKERS = {
    "masked": lambda: build("bert", AutoModelForMaskedLM, num_hidden_layers=3),
    "token": lambda: build("bert", AutoModelForTokenClassification, num_hidden_layers=3, num_labels=3),
    "seq2seq": build_t5,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_logged_terms_do_not_depend_on_how_a_batch_is_split(kind, tmp_path):
    logs, evaluations = [], []
    for batch, parts in ((4, 1), (1, 4)):
        arguments = AuxiliaryLossTrainingArguments(
            output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none",
            per_device_train_batch_size=batch, gradient_accumulation_steps=parts, per_device_eval_batch_size=batch, seed=1,
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = AuxiliaryLossTrainer(
            add_auxiliary_losses(MAKERS[kind]()), arguments, train_dataset=rows(kind), eval_dataset=rows(kind)
        )
        trainer.train()
        logs.append(loss_logs(trainer))
        evaluations.append({name: value for name, value in trainer.evaluate().items() if "loss" in name})
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-3)
    assert len(logs[0]) == 3 and {"loss_layer_1", "loss_layer_2"} <= logs[0][0].keys()
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_run_on_a_small_input_leaves_the_model_as_it_was():
    """BigBird gives up its sparse attention on short inputs, for good."""
    config = BigBirdConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, is_decoder=False,
        block_size=2, num_random_blocks=1, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config)
    attention = model.bert.encoder.layer[0].attention.self
    add_auxiliary_losses(model)
    assert model.bert.attention_type == "block_sparse" and model.bert.encoder.layer[0].attention.self is attention


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (MAKERS["masked"], {"num_targets": 2}, r"no settings \['num_targets'\] for BertForMaskedLM"),
        (MAKERS["token"], {"heads": "shared"}, r"heads is 'shared'; for BertForTokenClassification .*\('own',\)"),
        (MAKERS["seq2seq"], {"intermediate_layers": [3]}, r"intermediate_layers contains \[3\].* are 1 to 2"),
        (lambda: build_image_model("vit"), {"intermediate_layers": [0]}, "intermediate_layers contains"),
        (
            lambda: AutoModelForSequenceClassification.from_config(
                AutoConfig.for_model(
                    "reformer", vocab_size=61, axial_pos_embds=False, hidden_size=16, attn_layers=["local"], is_decoder=False
                )
            ),
            {},
            "reads neither one position nor the mean of its last hidden state",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(make, settings, message):
    model = make()
    kind = type(model)
    with pytest.raises(ValueError, match=message):
        add_auxiliary_losses(model, **settings)
    assert type(model) is kind and not hasattr(model, "loss_settings")
