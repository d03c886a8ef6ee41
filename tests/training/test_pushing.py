"""Cards and what is staged for a push, without a Hub."""

import logging
import re
import shutil
from concurrent.futures import Future

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments
from charformer_training.card import merged_card, run_card
from charformer_training.pushing import stage_checkpoint
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerForSequenceClassification
from modeling_charformer.hub import is_unfilled_form
from tests.helpers import TINY


@pytest.fixture
def trained(make_trainer):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.fixture
def card(trained):
    return lambda: run_card(trained.facts(), "mine")


def without_holes(card: ModelCard) -> bool:
    text = card.content
    return not re.search(r"more information needed|unknown|undefined|\{\{|\{%|None\b", text, re.IGNORECASE)


def test_card_says_what_the_run_knows(trained, card):
    text = card().content
    assert without_holes(card())
    for split in (trained.train_dataset.split, trained.eval_dataset.split):
        assert split.sha256 in text
    for name in ("next_char", "target_2", "layer_1", "layer_2_target_2"):
        assert re.search(rf"^\| {name} \| \d+ \| \d\.\d{{4}} \|$", text, re.MULTILINE)
    bpc = next(entry["eval_bpc"] for entry in trained.state.log_history if "eval_bpc" in entry)
    assert f"| Bits per character, validation | **{bpc:.4f}** |" in text
    data = card().data.to_dict()
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and "charformer" in data["tags"]
    metric = data["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == "bits_per_character" and metric["value"] == round(bpc, 4)
    inference = trained.model.without_auxiliary_heads().num_parameters()
    assert f"| Parameters for inference | {inference:,} |" in text


def test_card_before_any_evaluation(make_trainer):
    assert without_holes(run_card(make_trainer().facts(), "untrained"))


def test_card_of_another_model(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    args = AuxiliaryLossTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    trainer = AuxiliaryLossTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(tags="mine", dataset="numbers", language="en", license="mit", model_name="counting")
    card = ModelCard.load(tmp_path / "README.md")
    assert without_holes(card) and "# counting" in card.text and "numbers" in card.text and "`eval_loss`" in card.text
    assert "4 rows for training" in card.text and "A character-level language model" not in card.text
    data = card.data.to_dict()
    assert data["license"] == "mit" and data["language"] == "en" and "mine" in data["tags"]
    assert data["pipeline_tag"] == "text-generation"
    assert (tmp_path / "loss_terms.png").exists()


class TestMerging:
    def test_nothing_there(self, card):
        assert merged_card(card(), None).content == card().content

    def test_unfilled_form_is_replaced(self, card):
        form = ModelCard.from_template(ModelCardData(tags=["poems"]), model_description="")
        assert is_unfilled_form(form)
        merged = merged_card(card(), form)
        assert merged.text == card().text and "poems" in merged.data["tags"]

    def test_text_around_the_block_is_kept(self, card):
        old = card()
        old.text = "# Before\n" + old.text.replace("\n", "\r\n") + "After\n"
        new = card()
        new.text = new.text.replace("mine", "renewed")
        merged = merged_card(new, old)
        assert merged.text.startswith("# Before") and merged.text.endswith("After\n")
        assert "renewed" in merged.text and "# mine" not in merged.text
        assert merged_card(card(), merged).text.count("charformer: begin") == 1

    def test_an_edited_block_is_kept_whole(self, card, caplog):
        old = card()
        old.text = old.text.replace("mine", "MY MODEL")
        with caplog.at_level(logging.WARNING):
            merged = merged_card(card(), old)
        assert merged.text == old.text and "edited by hand" in caplog.text

    def test_a_card_of_ones_own_is_kept(self, card):
        own = ModelCard("---\nlicense: cc0-1.0\ntags:\n- poems\n---\n# My poems\n")
        merged = merged_card(card(), own)
        assert merged.text.strip() == "# My poems"
        assert merged.data["license"] == "cc0-1.0" and {"poems", "charformer"} <= set(merged.data["tags"])
        assert merged.data.to_dict()["model-index"]


class TestStage:
    def test_a_checkpoint_becomes_a_repository(self, trained, tmp_path):
        checkpoint = tmp_path / "run" / "checkpoint-2"
        stage_checkpoint(checkpoint, tmp_path / "stage", "last-checkpoint")
        names = {path.name for path in (tmp_path / "stage").iterdir()}
        assert {"config.json", "model.safetensors", "modeling_charformer.py", "last-checkpoint"} <= names
        assert not names & {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
        assert (tmp_path / "stage" / "last-checkpoint" / "optimizer.pt").exists()

    def test_the_heads_of_added_losses_go_along(self, tmp_path):
        heads = tmp_path / "checkpoint" / "auxiliary_heads" / "model.safetensors"
        heads.parent.mkdir(parents=True)
        heads.write_bytes(b"heads")
        stage_checkpoint(tmp_path / "checkpoint", tmp_path / "stage", None)
        assert (tmp_path / "stage" / "auxiliary_heads" / "model.safetensors").read_bytes() == b"heads"

    def test_no_pickle_of_the_arguments_is_written(self, trained, tmp_path):
        trained.save_model()
        assert not list(tmp_path.rglob("*.bin"))

    def test_the_tokenizer_is_there_without_being_asked_for(self, trained, tmp_path):
        assert trained.processing_class is None
        trained.save_model(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)("é")["input_ids"] == [0xC3, 0xA9]

    def test_pickles_are_refused(self, trained, tmp_path):
        trained.save_model()
        (tmp_path / "run" / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=r"holds pytorch_model\.bin"):
            trained.push_to_hub()


def test_training_resumes_only_from_the_full_model(trained, make_trainer, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    trained.model.without_auxiliary_heads().save_pretrained(checkpoint)
    for name in ("manifest.json", "running_sums.json"):  # as if another Trainer had written it
        (checkpoint / name).unlink()
    with pytest.raises(ValueError, match="an inference-only model cannot be resumed"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_card_of_a_classifier(tmp_path):
    model = CharformerForSequenceClassification(CharformerConfig(**(TINY | {"num_labels": 3})))
    args = AuxiliaryLossTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": torch.arange(8) + row, "labels": torch.tensor(row % 3)} for row in range(4)]
    trainer = AuxiliaryLossTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert without_holes(card) and "A character-level classifier of texts" in card.text
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text and "generate" not in card.text
    assert "`classifier_layers`" in card.text and re.search(
        r"^\| layer_2 \| 2 \| \d\.\d{4} \|$", card.text, re.MULTILINE
    )
    assert card.data.pipeline_tag == "text-classification"


def test_a_model_for_inference_alone_is_not_resumed_and_says_so(trained, make_trainer, tmp_path):
    trained.model.without_auxiliary_heads().save_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match="holds a model, but not the state of a training .* inference only cannot be"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "export"))


def test_a_folder_that_is_gone_is_no_base_model(make_trainer, tmp_path):
    source = tmp_path / "begun"
    make_trainer().model.save_pretrained(source)
    trainer = make_trainer(CharformerForCausalLM.from_pretrained(source))
    shutil.rmtree(source)
    assert "base_model" not in run_card(trainer.facts(), "mine").data.to_dict()


@pytest.mark.parametrize("stop", [FloatingPointError, KeyboardInterrupt])
def test_a_push_that_failed_is_reported_also_when_the_run_stops(make_trainer, caplog, stop):
    trainer = make_trainer()
    failed: Future = Future()
    failed.set_exception(ConnectionError("the line was cut"))
    trainer.hub_model_id, trainer._pushes = "user/mine", [failed]

    def stops(*args, **kwargs):
        raise stop("stopped")

    trainer.training_step = stops
    with pytest.raises(stop, match="stopped"):
        trainer.train()
    assert "pushing to 'user/mine' failed: the line was cut" in caplog.text
