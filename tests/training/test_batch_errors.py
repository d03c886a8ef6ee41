"""Batches that a model cannot take: one sentence with the field, the value and what is accepted."""

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.trainer_utils import IntervalStrategy

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses
from charformer_training.batch_errors import reason_in_batch
from tests.training.any_models import build


def trainer_of(model, tmp_path, **row) -> AuxiliaryLossTrainer:
    args = AuxiliaryLossTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    rows = [row] * 8
    return AuxiliaryLossTrainer(add_auxiliary_losses(model), args, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize(
    ("kind", "setting", "limit", "act"),
    [
        ("gpt2", "n_positions", 32, "train"),
        ("gpt2", "n_positions", 32, "evaluate"),
        ("opt", "max_position_embeddings", 32, "evaluate"),
        ("gptj", "n_positions", 32, "evaluate"),
        ("llama", "", 0, "evaluate"),
    ],
)
def test_rows_longer_than_a_table_of_positions_are_refused(tmp_path, kind, setting, limit, act):
    changes = {"gptj": {"rotary_dim": 4, "n_inner": 32}, "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}}
    model = build(kind, **changes.get(kind, {}))
    if not limit:  # rotary positions have no end
        getattr(trainer_of(model, tmp_path, input_ids=[5] * 40, labels=[5] * 40), act)()
        return
    getattr(trainer_of(model, tmp_path, input_ids=[5] * limit, labels=[5] * limit), act)()
    message = (
        rf"input_ids has rows of 33 tokens.* a table of {limit} positions \({setting} is 32\): rows may have {limit}"
    )
    model = build(kind, **changes.get(kind, {}))
    with pytest.raises(ValueError, match=message):
        getattr(trainer_of(model, tmp_path, input_ids=[5] * 33, labels=[5] * 33), act)()


def test_a_table_that_begins_after_the_padding_has_fewer_positions(tmp_path):
    model = build("roberta", AutoModelForMaskedLM, pad_token_id=1)
    with pytest.raises(
        ValueError, match=r"of 31 tokens.* 30 positions \(max_position_embeddings is 32\): .* max_length=30"
    ):
        trainer_of(model, tmp_path, input_ids=[5] * 31, labels=[5] * 31).train()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 61], "labels": 1}, "input_ids holds 61, .* vocab_size=61: ids are 0 to 60$"),
        ({"input_ids": [5, 6], "labels": 2}, "labels holds 2, .* num_labels=2: ids are 0 to 1, or -100"),
    ],
)
def test_ids_that_a_model_does_not_have_are_refused(tmp_path, row, message):
    model = build("bert", AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path, **row).train()


def test_a_mask_that_numbers_packed_texts_is_refused(tmp_path):
    row = {"input_ids": [5] * 6, "labels": [5] * 6}
    trainer_of(build("gpt2"), tmp_path, **row, attention_mask=[1, 1, 1, 1, 0, 0]).train()
    with pytest.raises(ValueError, match="attention_mask holds 2; it must hold 0 and 1.* give position_ids"):
        trainer_of(build("gpt2"), tmp_path, **row, attention_mask=[1, 1, 1, 2, 2, 0]).train()


def test_the_best_model_is_chosen_by_an_evaluation_set_that_there_is(tmp_path):
    trainer = trainer_of(build("gpt2"), tmp_path, input_ids=[5] * 6, labels=[5] * 6)
    trainer.eval_dataset = {"wiki": trainer.eval_dataset}
    trainer.args.metric_for_best_model = "eval_wiki_loss"
    trainer.train()
    trainer.args.metric_for_best_model = "eval_loss"
    trainer.train()  # without evaluations nothing is chosen
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 100
    with pytest.raises(
        ValueError, match=r"'eval_loss'; eval_dataset has the sets \['wiki'\].* such as 'eval_wiki_loss'"
    ):
        trainer.train()


def test_other_errors_stay_as_they_are():
    model, ids, error = build("gpt2"), torch.full((1, 33), 5), IndexError("index out of range in self")
    assert reason_in_batch(error, model, {"input_ids": ids, "labels": ids}) is not None
    for error_, batch in (
        (RuntimeError("CUDA out of memory"), {"input_ids": ids}),
        (RuntimeError("expected Float but found BFloat16"), {"input_ids": ids}),
        (error, {"input_ids": ids, "position_ids": ids}),  # a packed row may be longer
        (error, {"input_ids": ids[:, :32], "labels": torch.full((1, 32), -100)}),
    ):
        assert reason_in_batch(error_, model, batch) is None
    assert reason_in_batch(error, torch.nn.Linear(2, 2), {"input_ids": ids}) is None
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    config.num_labels = 3
    resnet = ResNetForImageClassification(config)
    assert reason_in_batch(error, resnet, {"pixel_values": torch.zeros(1), "labels": torch.tensor([2])}) is None
    assert "num_labels=3" in str(reason_in_batch(error, resnet, {"labels": torch.tensor([3])}))


def test_a_table_of_an_images_positions_is_not_that_of_the_tokens():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
    )
    ids = torch.full((1, 33), 5)
    error = IndexError("index out of range in self")
    assert reason_in_batch(error, LlavaForConditionalGeneration(config), {"input_ids": ids, "labels": ids}) is None


def test_a_mask_that_numbers_packed_texts_is_refused_without_a_trainer_too():
    ids = torch.full((1, 6), 5)
    with pytest.raises(ValueError, match="attention_mask holds 2"):
        add_auxiliary_losses(build("gpt2"))(ids, attention_mask=torch.tensor([[1, 1, 1, 2, 2, 0]]), labels=ids)
