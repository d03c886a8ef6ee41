"""lm-evaluation-harness scores a saved folder: multiple choice, rolling log-likelihood, generated text."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_charformer import CharformerForCausalLM


lm_eval = pytest.importorskip("lm_eval")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [
    {"question": "the cat é", "choices": [" sat", " xq", " on"], "answer": 0, "text": "Die Größe wächst. " * 8},
    {"question": "one", "choices": [" two", "\n", " ä"], "answer": 2, "text": "short"},
]
TASKS = {
    "choose": """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "roll": """
task: roll
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
""",
    "write": """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: text
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)), encoding="utf-8")
    return str(folder)


def log_likelihood(model: CharformerForCausalLM, context: bytes, text: bytes) -> float:
    ids = torch.tensor([[*context, *text]])
    with torch.no_grad():
        logs = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return float(logs.gather(-1, ids[0, len(context) :, None]).sum())


def test_all_three_kinds_of_tasks(make_folder, tasks):
    folder = make_folder()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = lm_eval.simple_evaluate(
        harness, tasks=["choose", "roll", "write"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )

    right = 0
    for row, sample in zip(ROWS, found["samples"]["choose"], strict=True):
        question = str(row["question"]).encode()
        expected = [log_likelihood(model, question, choice.encode()) for choice in row["choices"]]  # type: ignore[attr-defined]
        given = [float(response[0][0]) for response in sample["resps"]]
        assert given == pytest.approx(expected, rel=1e-4)
        right += max(range(3), key=expected.__getitem__) == row["answer"]
    assert found["results"]["choose"]["acc,none"] == right / 2

    # The harness begins a text with bos, and cuts a longer one into windows, each with one byte of context.
    short = log_likelihood(model, bytes([253]), b"short")
    assert float(found["samples"]["roll"][1]["resps"][0][0]) == pytest.approx(short, rel=1e-4)
    sizes = sum(len(str(row["text"]).encode()) for row in ROWS)
    total = sum(float(sample["resps"][0][0]) for sample in found["samples"]["roll"])
    assert found["results"]["roll"]["bits_per_byte,none"] == pytest.approx(-total / sizes / math.log(2), rel=1e-4)

    for row, sample in zip(ROWS, found["samples"]["write"], strict=True):
        inputs = tokenizer(str(row["question"]), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected_text = str(tokenizer.decode(ids, skip_special_tokens=True)).split("\n")[0]
        assert sample["resps"][0][0] == expected_text
