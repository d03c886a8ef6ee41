"""TRL's trainers take a model and its tokenizer as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["the cat ", "a dog é ", "one ", "two "]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
    }


def load(folder: str, auto: Any = AutoModelForCausalLM) -> tuple[Any, PreTrainedTokenizerBase]:
    return auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def finish(trainer: Any) -> dict[str, Any]:
    """Trains; the weights have changed, those of auxiliary heads have not. Returns the first row of the log."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert any("layers.0." in name for name in changed)
    assert not any("auxiliary_" in name for name in changed)  # TRL computes losses of its own, from the logits
    first = trainer.state.log_history[0]
    assert first["loss"] == first["loss"]
    return dict(first)


def test_sft_ends_each_text_with_eos(make_folder, settings):
    model, tokenizer = load(make_folder())
    rows = datasets.Dataset.from_dict({"text": [f"{prompt}sat down" for prompt in PROMPTS]})
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**settings, max_length=32), train_dataset=rows, processing_class=tokenizer
    )
    assert trainer.train_dataset[0]["input_ids"] == [*b"the cat sat down", tokenizer.eos_token_id]
    finish(trainer)
    assert trainer.model.config.pad_token_id == 255


def test_sft_trains_on_the_answers_of_a_chat(make_folder, settings):
    model, tokenizer = load(make_folder())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in PROMPTS]
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings, max_length=32, assistant_only_loss=True),
        train_dataset=datasets.Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"].tolist() == [[*b"the cat \nyes", 254]]
    assert batch["labels"].tolist() == [[-100] * 9 + [*b"yes", 254]]
    finish(trainer)


def test_sft_of_an_adapter(make_folder, settings):
    peft = pytest.importorskip("peft")
    model, tokenizer = load(make_folder())
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**settings, max_length=32),
        train_dataset=datasets.Dataset.from_dict({"text": PROMPTS}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    finish(trainer)


def preferences() -> Any:
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": ["sat"] * 4, "rejected": ["xqzé"] * 4})


def test_dpo(make_folder, settings):
    model, tokenizer = load(make_folder())
    trainer = trl.DPOTrainer(
        model, args=trl.DPOConfig(**settings, max_length=32), train_dataset=preferences(), processing_class=tokenizer
    )
    assert finish(trainer)["loss"] == pytest.approx(0.693, abs=0.01)  # ln 2: no preference yet


def test_kto(make_folder, settings):
    model, tokenizer = load(make_folder())
    rows = datasets.Dataset.from_dict(
        {"prompt": PROMPTS, "completion": ["sat", "xqz", "sat", "é"], "label": [True, False, True, False]}
    )
    trainer = trl.KTOTrainer(
        model, args=trl.KTOConfig(**settings, max_length=32), train_dataset=rows, processing_class=tokenizer
    )
    finish(trainer)


def test_grpo(make_folder, settings):
    model, tokenizer = load(make_folder())
    given = []

    def share_of_letters(completions: list[str], **_: Any) -> list[float]:
        given.extend(completions)
        return [sum(character.isalpha() for character in text) / 8 for text in completions]

    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=share_of_letters,
        args=trl.GRPOConfig(**settings, num_generations=2, max_completion_length=8),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    finish(trainer)
    assert given and all(len(text.encode()) <= 8 * 3 for text in given)


def test_reward(make_folder, settings):
    model, tokenizer = load(
        make_folder("CharformerForSequenceClassification", num_labels=1), AutoModelForSequenceClassification
    )
    trainer = trl.RewardTrainer(
        model,
        args=trl.RewardConfig(**settings, max_length=32),
        train_dataset=preferences(),
        processing_class=tokenizer,
    )
    finish(trainer)
