"""PEFT's kinds of adapters train, generate, are saved and, where they can be, are merged."""

from typing import Any

import peft
import pytest
import torch

from modeling_charformer import CharformerForCausalLM


pytestmark = pytest.mark.filterwarnings("ignore")
QUERY = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, Any] = {
    "LoRA": (peft.LoraConfig, QUERY),
    "LoRA of all linear layers": (peft.LoraConfig, {"target_modules": "all-linear"}),
    "LoRA and a whole classifier": (peft.LoraConfig, QUERY | {"modules_to_save": ["lm_head"]}),
    "LoRA and single characters": (peft.LoraConfig, QUERY | {"trainable_token_indices": [97, 98]}),
    "DoRA": (peft.LoraConfig, QUERY | {"use_dora": True}),
    "AdaLoRA": (peft.AdaLoraConfig, QUERY | {"total_step": 10, "init_r": 4, "target_r": 2}),
    "IA3": (peft.IA3Config, {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}),
    "LoHa": (peft.LoHaConfig, QUERY),
    "OFT": (peft.OFTConfig, QUERY | {"oft_block_size": 4}),
    "VeRA": (peft.VeraConfig, QUERY),
    "layer norms": (peft.LNTuningConfig, {"target_modules": ["attention_norm", "mlp_norm"]}),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    "P-tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 4}),
    "prefix tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
}


def inputs(text: bytes) -> dict[str, torch.Tensor]:
    ids = torch.tensor([list(text)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def continued(model: Any, text: bytes, length: int) -> list[int]:
    """Greedy text by whole forward passes."""
    ids = inputs(text)["input_ids"]
    for _ in range(length):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_generates_and_is_saved(make_model, tmp_path, kind):
    config, options = KINDS[kind]
    model = peft.get_peft_model(
        make_model(max_position_embeddings=32), config(task_type="CAUSAL_LM", **options)
    ).train()
    rows = inputs(b"the cat sat")
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    losses = []
    for _ in range(3):
        outputs = model(**rows, labels=rows["input_ids"])
        assert {"next_char", "layer_1", "target_2"} <= outputs.loss_dict.keys()  # the auxiliary losses are trained too
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[2] < losses[0]

    model.eval()
    generated = model.generate(**rows, max_new_tokens=6, do_sample=False)
    assert generated[0].tolist() == continued(model, b"the cat sat", 6)
    logits = model(**rows).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(max_position_embeddings=32), tmp_path).eval()
    assert torch.allclose(loaded(**rows).logits, logits, atol=1e-5)
    if hasattr(model, "merge_and_unload"):
        merged = model.merge_and_unload().eval()
        assert type(merged) is CharformerForCausalLM
        assert torch.allclose(merged(**rows).logits, logits, atol=1e-4)
