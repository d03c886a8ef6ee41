"""What is saved loads in a process that has no charformer package."""

import json

import pytest
import torch

from modeling_charformer import CharformerTokenizer
from modeling_charformer.configuration_charformer import AUTO_MAP
from tests.helpers import CODE_FILES, run_without_package


pytestmark = pytest.mark.slow


PROGRAM = """
import json, sys
sys.path = [path for path in sys.path if "charformer" not in path]
folder, trust = sys.argv[1], sys.argv[2] == "trust"
try:
    import modeling_charformer
    sys.exit("the package is on the path; this test would show nothing")
except ImportError:
    pass
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
inputs = tokenizer("abc", return_tensors="pt")
generator = pipeline("text-generation", model=folder, trust_remote_code=trust)
print(json.dumps({
    "class": type(model).__module__,
    "logits": model(**inputs).logits.tolist(),
    "hidden": AutoModel.from_pretrained(folder, trust_remote_code=trust)(**inputs).last_hidden_state.tolist(),
    "ids": model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist(),
    "text": generator("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"],
    "loss": sorted(model.train()(**inputs, labels=inputs["input_ids"]).loss_dict),
}))
"""


@pytest.fixture
def saved(make_model, tmp_path):
    folder = tmp_path / "saved"
    model = make_model().eval()
    model.save_pretrained(folder)
    CharformerTokenizer().save_pretrained(folder)
    return model, folder


def test_saved_model_loads_with_its_own_code(saved, tmp_path):
    model, folder = saved
    result = run_without_package(PROGRAM, folder, tmp_path, "trust")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["class"].startswith("transformers_modules.")
    ids = torch.tensor([[97, 98, 99]])
    assert found["logits"] == model(ids).logits.tolist()
    assert found["hidden"] == model.model(ids).last_hidden_state.tolist()
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert found["ids"] == generated.tolist()
    assert found["text"] == CharformerTokenizer().decode(generated[0])
    assert found["loss"] == sorted(model.train()(ids, labels=ids).loss_dict)


def test_without_trust_it_is_refused_clearly(saved, tmp_path):
    result = run_without_package(PROGRAM, saved[1], tmp_path, "no")
    assert result.returncode != 0 and "trust_remote_code" in result.stderr


def test_saved_folder_has_all_code_and_a_complete_auto_map(saved):
    _, folder = saved
    assert {path.name for path in folder.glob("*.py")} == CODE_FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
