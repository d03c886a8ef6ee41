"""Models with added losses: saved, loaded, pickled and copied."""

import copy
import io
import json
import pickle
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
)

from charformer_training import (
    AuxiliaryLossMixin,
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    add_auxiliary_losses,
    any_model,
    load_auxiliary_losses,
)
from charformer_training.heads_file import cached_heads
from charformer_training.models import HEADS_FILE, OLD_HEADS_FILE
from tests.training.any_models import build, make_ids


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


def test_former_names_of_settings_still_load():
    former = add_auxiliary_losses(build("llama"), classifiers="own", loss_weights={"target_2": 0.4})
    assert former.config.auxiliary_losses == {"heads": "own", "term_weights": {"target_2": 0.4}}


def adapted(model: Any, target_modules: Any = ("q_proj",)) -> Any:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules, r=2, init_lora_weights=False)
    return peft.get_peft_model(model, lora).train()


def model_with_trained_heads() -> Any:
    model: Any = add_auxiliary_losses(build("llama"), num_targets=2, intermediate_layers=None)
    torch.nn.init.normal_(model.auxiliary_heads.target_2.linear.weight)
    return model


class PlainTrainer(AuxiliaryLossMixin, Trainer):
    """The mixin without this package's checkpoints."""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.slow
@pytest.mark.parametrize("trainer", [AuxiliaryLossTrainer, PlainTrainer])
def test_an_adapter_added_after_the_losses_is_saved_with_the_heads_by_a_trainer(trainer, tmp_path, monkeypatch):
    model, ids = adapted(model_with_trained_heads()), make_ids()
    arguments = AuxiliaryLossTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    run = trainer(model=model, args=arguments, train_dataset=rows)
    run.train()
    run.save_model(str(tmp_path / "saved by the trainer"))
    model.save_pretrained(tmp_path / "saved by PEFT")
    expected = model.get_base_model().auxiliary_heads.target_2.linear.weight
    looked_up: list[str] = []

    def find(name: str) -> Any:
        looked_up.append(name)
        return cached_heads(name)

    monkeypatch.setattr(any_model, "cached_heads", find)
    for name in ("checkpoint-1", "saved by the trainer", "saved by PEFT"):
        folder = tmp_path / name
        loaded: Any = load_auxiliary_losses(peft.PeftModel.from_pretrained(build("llama"), folder), folder)
        assert loaded.get_base_model().auxiliary_heads.target_2.linear.weight.equal(expected)
    assert len(looked_up) == 3  # once each: on the Hub a look-up is a request


def test_a_loop_of_ones_own_is_told_that_an_adapter_is_saved_without_heads(caplog, tmp_path):
    model, ids = adapted(model_with_trained_heads()), make_ids()
    for _ in range(2):
        model(input_ids=ids, labels=ids)
    assert caplog.text.count("PEFT saves its adapter without the auxiliary heads") == 1
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds an adapter without auxiliary_heads/.*the base model's folder"):
        load_auxiliary_losses(peft.PeftModel.from_pretrained(build("llama"), tmp_path), tmp_path)
    model.get_base_model().save_auxiliary_heads(tmp_path)  # as the message says
    load_auxiliary_losses(peft.PeftModel.from_pretrained(build("llama"), tmp_path), tmp_path)
    caplog.clear()
    add_auxiliary_losses(adapted(build("llama")))(input_ids=ids, labels=ids)
    assert "PEFT saves" not in caplog.text


def test_adapters_on_the_heads_themselves_are_refused_before_training():
    model = adapted(model_with_trained_heads(), "all-linear")
    with pytest.raises(ValueError, match="adapters on the auxiliary heads .* after get_peft_model"):
        model(input_ids=make_ids(), labels=make_ids())
