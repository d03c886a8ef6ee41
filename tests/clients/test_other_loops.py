"""The terms in sentence-transformers' Trainer, and in the page's snippet for TRL."""

import importlib
import re
from typing import Any

import pytest
from transformers import set_seed

from charformer_training import AuxiliaryLossMixin
from modeling_charformer import CharformerConfig, CharformerModel, CharformerTokenizer
from tests.helpers import ROOT


pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def snippet(package: str) -> str:
    [found] = [text for text in SNIPPETS if f"import {package}\n" in text]
    return found


def test_sentence_transformers_trains_and_evaluates_terms_of_ones_own(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    config = CharformerConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    set_seed(0)
    CharformerModel(config).save_pretrained(tmp_path / "body")
    CharformerTokenizer.for_model(config).save_pretrained(tmp_path / "body")
    models, losses = (importlib.import_module(f"sentence_transformers.{name}") for name in ("models", "losses"))
    body = models.Transformer(str(tmp_path / "body"), max_seq_length=32)
    model = library.SentenceTransformer(modules=[body, models.Pooling(32)], device="cpu")
    pairs = {"one": ["the cat", "a dog", "one", "two"] * 2, "other": ["cats", "dogs", "1", "2"] * 2}
    rows = datasets.Dataset.from_dict(pairs)
    kinds: list[Any] = [library.SentenceTransformerTrainer]
    kinds.append(type("Mixed", (AuxiliaryLossMixin, *kinds), {}))
    logs = []
    for kind in kinds:
        set_seed(0)
        args = library.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            learning_rate=0.0,
        )
        loss = losses.MultipleNegativesRankingLoss(model)
        trainer = kind(model, args, train_dataset=rows, eval_dataset=rows, loss=loss)
        if kind is kinds[1]:
            trainer.add_loss_term("size", lambda outputs, _: outputs["sentence_embedding"].square().mean(), 0.5)
        trainer.train()
        logs.append([*trainer.state.log_history[:2], trainer.evaluate()])
    for plain, ours in zip(*logs, strict=True):
        start = "eval_" if "eval_loss" in plain else ""
        assert ours[f"{start}loss_main"] == pytest.approx(plain[f"{start}loss"], rel=1e-5)
        assert ours[f"{start}loss_size"] > 0
    first = logs[1][0]
    assert first["loss"] == pytest.approx(first["loss_main"] + 0.5 * first["loss_size"], rel=1e-5)


def test_the_snippet_for_trl_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.clients import trl_program

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "model": trl_program.llama(),
        "tokenizer": trl_program.tokenizer(),
        "texts": datasets.Dataset.from_dict({"text": trl_program.TEXTS}),
    }
    before = names["model"].auxiliary_heads["target_2"].linear.weight.detach().clone()
    small = "max_steps=2, use_cpu=True, bf16=False, report_to='none', save_strategy='no', max_length=32"
    exec(snippet("trl").replace("max_steps=1000", small), names)  # noqa: S102
    assert not names["model"].auxiliary_heads["target_2"].linear.weight.equal(before)
