"""What an earlier version of the package saved computes the same with this one, and with its own code."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT
from tests.helpers import run_without_package


VERSIONS = sorted(path.parent for path in (ROOT / "tests" / "fixtures").glob("*/expected.json"))

PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).train()
ids = torch.tensor(json.load(open(sys.argv[1] + "/expected.json"))["ids"])
outputs = model(ids, labels=ids, training_progress=0.1)
print(json.dumps({
    "logits": outputs.logits[:, -1].tolist(),
    "loss": outputs.loss.item(),
    "loss_dict": {name: value.item() for name, value in outputs.loss_dict.items()},
    "loss_weights": outputs.loss_weights,
}))
"""


def check(found: dict, expected: dict) -> None:
    assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), atol=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["loss_dict"] == pytest.approx(expected["loss_dict"], rel=1e-5)
    assert found["loss_weights"] == expected["loss_weights"]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_with_this_package(folder):
    expected = json.loads((folder / "expected.json").read_text())
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values())
    ids = torch.tensor(expected["ids"])
    outputs = model.train()(ids, labels=ids, training_progress=0.1)
    found = {
        "logits": outputs.logits[:, -1].tolist(),
        "loss": outputs.loss.item(),
        "loss_weights": outputs.loss_weights,
    }
    check(found | {"loss_dict": {name: value.item() for name, value in outputs.loss_dict.items()}}, expected)
    assert AutoTokenizer.from_pretrained(folder)("characters")["input_ids"] == expected["ids"][0]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
@pytest.mark.slow
def test_with_its_own_code(folder, tmp_path):
    result = run_without_package(PROGRAM, folder, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    check(json.loads(result.stdout.splitlines()[-1]), json.loads((folder / "expected.json").read_text()))
