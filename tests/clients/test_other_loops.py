"""The terms in sentence-transformers' Trainer, and in the page's snippets for TRL, Lightning and Keras."""

import importlib
import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from charformer_training import AuxiliaryLossMixin, LossTerms, add_auxiliary_losses
from modeling_charformer import CharformerConfig, CharformerModel, CharformerTokenizer
from tests.helpers import ROOT
from tests.training.any_models import build
from tests.training.test_terms_anywhere import EqualRows


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


def llama() -> Any:
    return add_auxiliary_losses(build("llama"), intermediate_schedule="constant")


def loop(optimizer_of: Any, accumulation: int) -> tuple[list[dict[str, float]], Any]:
    """Three steps in a loop of one's own: what it logs, and the model."""
    model = llama()
    terms, optimizer, logs = LossTerms(model, num_steps=3), optimizer_of(model.parameters()), []
    for micro_batches in terms.steps(DataLoader(EqualRows("next"), batch_size=4), accumulation):
        for batch in micro_batches:
            terms.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        logs.append(terms.means())
    return logs, model


def assert_same_weights(one: Any, other: Any) -> None:
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_snippet_for_lightning_trains_and_logs_like_a_loop(accumulation):
    lightning = pytest.importorskip("lightning")
    names: dict[str, Any] = {}
    exec(snippet("lightning").replace("% 10", "% 1"), names)  # noqa: S102
    trainer = lightning.Trainer(
        max_steps=3,
        accumulate_grad_batches=accumulation,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = names["Module"](llama(), 3)
    trainer.fit(module, DataLoader(EqualRows("next"), batch_size=4))
    logs, model = loop(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), accumulation)
    assert {name: value.item() for name, value in trainer.logged_metrics.items()} == pytest.approx(logs[-1], rel=1e-5)
    assert_same_weights(module.model, model)


def test_the_snippet_for_keras_trains_and_logs_like_a_loop(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    names: dict[str, Any] = {}
    exec(snippet("keras"), names)  # noqa: S102
    plain = llama()
    model = names["Model"](plain, 3)
    model.compile(optimizer=keras.optimizers.SGD(1e-2))
    history = model.fit(DataLoader(EqualRows("next", 12), batch_size=4), verbose=0).history
    logs, expected = loop(lambda parameters: torch.optim.SGD(parameters, lr=1e-2), 1)
    assert {name: values[-1] for name, values in history.items()} == pytest.approx(logs[-1], rel=1e-5)
    assert_same_weights(plain, expected)
