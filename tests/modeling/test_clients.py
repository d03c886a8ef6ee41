"""What Transformers' own clients do with a model and the tokenizer as they come, without any setting up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, pipeline, set_seed

from modeling_charformer import (
    CharformerConfig,
    CharformerForCausalLM,
    CharformerForSequenceClassification,
    CharformerForTokenClassification,
    CharformerModel,
    CharformerTokenizer,
)


TEXTS = ["def ", "the cät sat", "a"]
LABELS = {0: "contradiction", 1: "neutral", 2: "entailment"}
TAGS = {0: "O", 1: "B-X", 2: "I-X"}


@pytest.fixture
def make() -> Callable[..., tuple[PreTrainedModel, CharformerTokenizer]]:
    """A model with the tokenizer that agrees with it."""

    def made(kind: Any, **changes: Any) -> tuple[PreTrainedModel, CharformerTokenizer]:
        set_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32}
        config = CharformerConfig(**(sizes | {"initializer_range": 0.5} | changes))
        return kind(config).eval(), CharformerTokenizer.for_model(config)

    return made


def test_a_model_and_its_tokenizer_agree(make):
    model, tokenizer = make(CharformerForCausalLM)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == ids == (255, 254, 253)
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_a_model_without_special_symbols_has_a_tokenizer_without_them(make):
    model, tokenizer = make(CharformerForCausalLM, pad_token_id=None, eos_token_id=None, bos_token_id=None)
    assert model.generation_config.eos_token_id is None and tokenizer.all_special_tokens == []
    assert (
        CharformerConfig(vocab_size=255).pad_token_id is None and CharformerConfig(vocab_size=255).eos_token_id == 254
    )


def test_texts_generated_in_batches_are_those_generated_one_by_one(make):
    model, tokenizer = make(CharformerForCausalLM)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    batch = writer(TEXTS, batch_size=2, **settings)
    assert batch == [writer(text, **settings) for text in TEXTS]
    assert all(len(found[0]["generated_text"]) > len(text) for found, text in zip(batch, TEXTS, strict=True))


def test_texts_classified_in_batches_are_those_classified_one_by_one(make):
    model, tokenizer = make(CharformerForSequenceClassification, num_labels=3)
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
    batch, single = classifier(TEXTS, batch_size=3), [classifier(text)[0] for text in TEXTS]
    for found, expected in zip(batch, single, strict=True):
        assert found["label"] == expected["label"] and found["score"] == pytest.approx(expected["score"], abs=1e-5)


def test_a_long_text_is_cut_to_the_window(make):
    model, tokenizer = make(CharformerForSequenceClassification, num_labels=3)
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert classifier("ab" * 500, truncation=True) == classifier("ab" * 16)


def test_labels_are_ranked_by_what_follows_from_a_text(make):
    label2id = {label: index for index, label in LABELS.items()}
    model, tokenizer = make(CharformerForSequenceClassification, id2label=LABELS, label2id=label2id)
    classifier = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    template = "On {}."
    batch = classifier(TEXTS, ["cats", "code"], hypothesis_template=template, batch_size=2)
    for found, text in zip(batch, TEXTS, strict=True):
        with torch.no_grad():
            rows = [tokenizer(f"{text}On {label}.", return_tensors="pt") for label in found["labels"]]
            logits = torch.cat([model(**row).logits for row in rows])
        expected = logits[:, 2].softmax(0)
        assert found["scores"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_characters_are_tagged_in_batches_with_their_places(make):
    model, tokenizer = make(CharformerForTokenClassification, id2label=TAGS)
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, ignore_labels=[])
    batch = tagger(TEXTS, batch_size=3)
    for found, text in zip(batch, TEXTS, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].argmax(-1)
        assert [one["entity"] for one in found] == [TAGS[int(tag)] for tag in expected]
        spans = [(index, index + 1) for index, character in enumerate(text) for _ in character.encode()]
        assert [(one["start"], one["end"]) for one in found] == spans


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_tagged_characters_become_words(make):
    model, tokenizer = make(CharformerForTokenClassification, id2label=TAGS)
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")
    text = "the cät sat on a mat "
    words: Any = tagger(text, ignore_labels=[])
    assert "".join(text[one["start"] : one["end"]] for one in words).replace(" ", "") == text.replace(" ", "")
    assert all(one["word"] == text[one["start"] : one["end"]] for one in words)
    # Longer than the window, in overlapping pieces.
    far = tagger(text * 4, stride=8, ignore_labels=[])
    assert far[-1]["end"] == 4 * len(text)
    split = tagger(["the", "cät"], is_split_into_words=True, ignore_labels=[])
    assert [one["word"] for one in split[0]] == ["the cät"] or split[0][0]["start"] == 0


def test_hidden_states_in_batches_are_those_of_single_texts(make):
    model, tokenizer = make(CharformerModel)
    reader = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for found, text in zip(reader(TEXTS, batch_size=3), TEXTS, strict=True):
        alone = torch.tensor(reader(text)[0])
        assert torch.allclose(torch.tensor(found[0])[-len(alone) :], alone, atol=1e-5)


def test_a_trainer_pads_by_the_tokenizer(make, tmp_path):
    model, tokenizer = make(CharformerForSequenceClassification, num_labels=2)
    rows = [tokenizer(text) | {"labels": len(text) % 2} for text in TEXTS * 2]
    settings = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    trainer = Trainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().global_step == 2
    trainer.save_model(str(tmp_path))
    loaded = CharformerTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token_id, loaded.model_max_length) == (255, 32)
