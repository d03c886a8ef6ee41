"""The Python code of README and documentation runs, page by page, each in one namespace and in a folder of its own.

Nothing of the code is skipped. What a reader has and a test has not (a Hub's model, a trained run, a text) lies in the folder
under the same name, tiny; a name that a page leaves to the reader (`train_dataset`) is in `GIVEN`; `SMALLER` makes a long run short.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    default_data_collator,
)

from charformer_training import (
    ConsecutiveWindows,
    RandomWindows,
    add_auxiliary_losses,
    load_corpus,
    split_corpus,
)
from charformer_training.arguments import DataArguments
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer
from tests.conftest import ROOT
from tests.helpers import TINY


pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries say to readers

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    str(path.relative_to(ROOT)): blocks
    for path in (ROOT / "README.md", ROOT / "training" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if (blocks := BLOCK.findall(path.read_text(encoding="utf-8")))
}
SMALLER = {"max_steps=1000": "max_steps=2", "max_new_tokens=5000": "max_new_tokens=50"}


def tiny_charformer(**changes: Any) -> CharformerForCausalLM:
    return CharformerForCausalLM(
        CharformerConfig(**(TINY | {"num_targets": 2, "max_position_embeddings": 64} | changes))
    )


def tiny_gpt2(folder: Path) -> None:
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 12, "n_head": 2, "n_positions": 64, "vocab_size": 256}
    AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def run_of(folder: Path) -> None:
    tiny_charformer().save_pretrained(folder)
    CharformerTokenizer().save_pretrained(folder)


def tiny_resnet(folder: Path) -> None:
    sizes: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_labels": 3,
    }
    AutoModelForImageClassification.from_config(ResNetConfig(**sizes)).save_pretrained(folder)


def llama_with_losses(folder: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    add_auxiliary_losses(model, num_targets=2, intermediate_layers=None)
    model.save_pretrained(folder)


# The folders and files that a reader has.
FILES: dict[str, Callable[[Path], object]] = {
    "gpt2": tiny_gpt2,
    "microsoft/resnet-50": tiny_resnet,
    "runs/llama": llama_with_losses,
    "runs/quickstart": run_of,
    "runs/mine": run_of,
    "user/my-model": run_of,
    "my_text.txt": lambda path: path.write_text("To be, or not to be, that is the question.\n" * 60),
}


def datasets() -> dict[str, Any]:
    """Windows of a text, for the pages that train on a reader's own."""
    splits = split_corpus(load_corpus(DataArguments(data_path="my_text.txt")), 0.8, 0.2)
    return {
        "train_dataset": RandomWindows(splits["train"], 24, 16, seed=0),
        "eval_dataset": ConsecutiveWindows(splits["validation"], 24),
        "data_collator": default_data_collator,
    }


class OpenAI:
    """A server's client as far as the page uses it: tests/serving asks a real server the same."""

    def __init__(self, **settings: str):
        assert settings["base_url"].endswith("/v1")
        self.completions = SimpleNamespace(
            create=lambda **request: iter([SimpleNamespace(choices=[SimpleNamespace(text="f")])])
        )


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": datasets,
    "docs/trainer.md": datasets,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace(OpenAI=OpenAI))
    text = "\n".join(PAGES[page])
    for name, make in FILES.items():
        if name in text or name == "my_text.txt" and page in GIVEN:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            make(tmp_path / name)
    names = GIVEN.get(page, dict)()
    for number, block in enumerate(PAGES[page], 1):
        for long, short in SMALLER.items():
            block = block.replace(long, short)
        exec(compile(block, f"{page}, block {number}", "exec"), names)  # noqa: S102


def test_readme_shows_what_a_loss_consists_of(tmp_path, monkeypatch):
    """What the comments of README's first snippet promise."""
    names: dict[str, Any] = {}
    exec(PAGES["README.md"][0], names)
    outputs = names["outputs"]
    assert list(outputs.loss_dict)[0] == "next_char" and {"target_2", "layer_1"} <= outputs.loss_dict.keys()
    assert all(5.0 < float(value) < 6.5 for value in outputs.loss_dict.values())
    weighted = sum(outputs.loss_weights[name] * value for name, value in outputs.loss_dict.items())
    torch.testing.assert_close(outputs.loss, weighted)


def test_every_mapping_is_used():
    text = json.dumps(PAGES)
    assert [name for name in (*FILES, *SMALLER) if name not in text] == []
    assert GIVEN.keys() <= PAGES.keys()
