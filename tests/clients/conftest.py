"""What the tests of other people's programs share: a folder with a tiny model, as training leaves it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import set_seed

import modeling_charformer
from modeling_charformer import CharformerConfig, CharformerTokenizer


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., str]:
    """Saves a tiny model of the named class with its tokenizer."""

    def make(kind: str = "CharformerForCausalLM", **changes: Any) -> str:
        set_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
        config = CharformerConfig(
            **(sizes | {"initializer_range": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0} | changes)
        )
        folder = tmp_path / kind
        getattr(modeling_charformer, kind)(config).save_pretrained(folder)
        CharformerTokenizer.for_model(config).save_pretrained(folder)
        return str(folder)

    return make
