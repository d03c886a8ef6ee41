"""Heads that are trained alone on a model that another library has quantized."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    add_auxiliary_losses,
    load_auxiliary_losses,
)
from tests.training.any_models import build, make_ids


pytestmark = pytest.mark.filterwarnings("ignore")


def plain() -> Any:
    return build("llama", hidden_size=64, intermediate_size=128, head_dim=32)


def torchao(tmp_path: Path) -> Any:
    quantization, model = pytest.importorskip("torchao.quantization"), plain()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return model


def quanto(tmp_path: Path) -> Any:
    library, model = pytest.importorskip("optimum.quanto"), plain()
    library.quantize(model.model, weights=library.qint8)
    library.freeze(model.model)
    return model


def bitsandbytes(tmp_path: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    plain().save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, device_map="cpu")


@pytest.mark.parametrize("quantized", [torchao, quanto, bitsandbytes])
def test_heads_learn_on_a_quantized_model(tmp_path, quantized: Callable[[Path], Any]):
    model, ids = quantized(tmp_path), make_ids()
    add_auxiliary_losses(model, heads_only=True, num_targets=2, intermediate_layers=None, distillation=1.0)
    model.train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    losses = []
    for _ in range(5):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: value.detach() for name, value in output.loss_dict.items()})
    assert losses[-1]["target_2"] < losses[0]["target_2"] - 0.1
    assert losses[-1]["next_token"] == losses[0]["next_token"]


def test_trainer_takes_them_and_saves_a_plain_model(tmp_path):
    model = bitsandbytes(tmp_path)
    add_auxiliary_losses(model, heads_only=True, num_targets=2, intermediate_layers=None)
    row = {"input_ids": [*range(3, 15)], "labels": [*range(3, 15)]}
    args = AuxiliaryLossTrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, report_to="none", use_cpu=True, learning_rate=0.01
    )
    trainer = AuxiliaryLossTrainer(model, args, train_dataset=[row] * 16)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "auxiliary" in name]
    loaded = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"), folder).train()
    # The model itself is bitsandbytes' to save; on a CPU its packed weights do not come back exactly.
    torch.testing.assert_close(loaded.auxiliary_heads.state_dict(), model.auxiliary_heads.state_dict())
    assert model.auxiliary_heads["target_2"].linear.weight.any()
    assert not model._hf_peft_config_loaded
