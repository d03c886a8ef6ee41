"""Every example runs as its first lines say."""

import ast
import json
import re
import runpy
import subprocess
import sys

import pytest

from benchmarks import real_model
from charformer_training import bits_per_character
from modeling_charformer import CharformerForCausalLM, CharformerForSequenceClassification, CharformerTokenizer
from tests.conftest import ROOT


pytestmark = pytest.mark.slow


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def printed_figures(shown: str) -> list[dict[str, str]]:
    """The dictionaries that the Trainer prints: log entries and evaluations."""
    lines = [ast.literal_eval(line) for line in shown.splitlines() if line.startswith("{")]
    return [{name: str(value) for name, value in line.items()} for line in lines]


def refused(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    return result.stderr


def test_every_example_is_on_the_page_of_examples():
    page = (ROOT / "docs" / "examples" / "index.md").read_text(encoding="utf-8")
    assert all(f"[{path.name}](../../examples/{path.name})" in page for path in (ROOT / "examples").glob("*.py"))


def test_no_example_is_left_out():
    # Those of the Hub are run beside its other tests.
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "any_model.py",
        "classify_texts.py",
        "compress.py",
        "continue_training.py",
        "generate.py",
        "image_classifier.py",
        "load_from_hub.py",
        "own_loss_term.py",
        "own_training_loop.py",
        "push_to_hub.py",
        "search_loss_weights.py",
        "tag_tokens.py",
        "train_draft_heads.py",
        "train_with_trainer.py",
    }


def test_generate(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    CharformerTokenizer().save_pretrained(tmp_path)
    assert run("generate.py", tmp_path, "def ").startswith("def ")


def test_own_training_loop():
    lines = run("own_training_loop.py").splitlines()
    assert "1 * layer_1" in lines[0] and "layer_1" not in lines[-2]
    assert float(lines[-1].split()[2]) < 2.5


@pytest.mark.filterwarnings("ignore")
def test_train_with_trainer(text_file, tmp_path):
    shown = printed_figures(run("train_with_trainer.py", text_file, tmp_path / "run"))
    first, last = (entry for entry in shown if "loss_next_char" in entry and entry["epoch"] in ("0.1667", "1"))
    assert (
        float(last["loss_next_char"]) < float(first["loss_next_char"]) and "loss_layer_1" in first.keys() - last.keys()
    )
    final = shown[-1]
    # The text is not ASCII, so a character has more bits than a byte; the trained model knows more than its trigrams.
    assert float(final["eval_bpb"]) < float(final["eval_bpc"]) < 2.0
    model = CharformerForCausalLM.from_pretrained(tmp_path / "run")
    assert bits_per_character(model, text_file, stride=32, progress=False).bpb < 2.0


def test_any_model(tmp_path):
    shown = run("any_model.py", tmp_path / "run")
    entries = printed_figures(shown)
    logged = [entry for entry in entries if "loss_next_token" in entry]
    assert float(logged[-1]["loss_next_token"]) < float(logged[0]["loss_next_token"]) / 2
    # "paper" drops the term after half of training; "random" leaves every layer some of the steps.
    assert ["loss_confidence" in entry for entry in logged] == [True, True, False, False]
    assert all({"loss_layer_1", "loss_layer_2", "loss_layer_3"} <= entry.keys() for entry in logged)
    trained, guessing = map(float, re.findall(r"\d+\.\d{3}", next(x for x in shown.splitlines() if "guessing" in x)))
    assert trained < 1.5 and guessing == 4.605
    assert "GPT2LMHeadModel" in shown and "(layer_3_target_2): ResidualBlock(" in shown


def run_here(name: str, monkeypatch, capsys, *arguments: object) -> tuple[dict, list[float]]:
    """Runs an example in this process; its names, and the figures of the last line that it prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    names = runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    return names, [float(figure) for figure in re.findall(r"\d+\.\d+", last)]


@pytest.fixture
def trained(make_model, tmp_path):
    """A small model with its tokenizer, as a run leaves it."""
    model = make_model(max_position_embeddings=32, pad_token_id=255, initializer_range=0.02)
    model.save_pretrained(tmp_path / "trained")
    CharformerTokenizer.for_model(model.config).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.filterwarnings("ignore")
def test_continue_training_learns_the_other_text(trained, text_file, tmp_path, monkeypatch, capsys):
    _, (before, after) = run_here(
        "continue_training.py", monkeypatch, capsys, trained, text_file, tmp_path / "out", 60
    )
    assert 7.5 < before < 8.5 and after < before - 0.5
    model = CharformerForCausalLM.from_pretrained(tmp_path / "out")
    assert bits_per_character(model, text_file, stride=31, progress=False).bpb == pytest.approx(after, abs=0.5)


@pytest.mark.filterwarnings("ignore")
def test_classify_texts_learns_a_dataset_that_is_named(trained, tmp_path, monkeypatch, capsys):
    """The labels differ in the order of letters alone, which naive Bayes on single bytes cannot see."""
    rows = [json.dumps({"text": text, "label": label}) for label, text in enumerate(("abc" * 5, "acb" * 5))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows * 40))
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(rows * 10))
    names, (accuracy, letters, fourgrams, commonest) = run_here(
        "classify_texts.py", monkeypatch, capsys, trained, tmp_path / "out", tmp_path / "data", "--steps", 200
    )
    assert (letters, fourgrams, commonest) == (0.5, 1, 0.5) and accuracy > 0.9
    assert CharformerForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2
    assert [len(text) for part in names["of_dataset"](str(tmp_path / "data"), 4) for text, _ in part] == [4] * 100

    train, test = names["snippets"](500)
    assert {label for _, label in train} == {label for _, label in test} == set(range(6))
    assert not set(train) & set(test) and all(len(text) == 500 for text, _ in train + test)


@pytest.mark.filterwarnings("ignore")
def test_tag_tokens_labels_what_python_reads(trained, tmp_path, monkeypatch, capsys):
    names, (accuracy, baseline) = run_here("tag_tokens.py", monkeypatch, capsys, trained, tmp_path / "out", 20)
    assert 0.2 < accuracy < 1 and 0.4 < baseline < 0.8
    source = 'if x:  # y\n    z = """a\nb""" + 1\n'
    data, labels = names["labelled"](source)
    assert data.decode() == source
    # keyword, name, number, string, comment, operator; the rest is other
    assert "".join("_kn1sco"[label] for label in labels) == "kk_no__ccc_____n_o_sssssssss_o_1_"


@pytest.mark.filterwarnings("ignore")
def test_own_loss_term_lowers_what_it_is_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_loss_term.py", str(tmp_path), "30"])
    runpy.run_path(str(ROOT / "examples" / "own_loss_term.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weight")]
    without, with_term = ([float(figure) for figure in re.findall(r"\d+\.\d+", line)] for line in lines)
    assert (without[0], with_term[0]) == (0.0, 0.01)
    assert with_term[2] < without[2]


@pytest.mark.filterwarnings("ignore")
def test_search_loss_weights_tries_other_weights_in_each_trial(text_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    _, (best, *weights, without) = run_here("search_loss_weights.py", monkeypatch, capsys, text_file, tmp_path, 3, 10)
    assert len(weights) == 3 and all(0.01 <= weight <= 1 for weight in weights)
    assert best != without and 4 < best < 8


def test_image_classifier(tmp_path):
    shown = run("image_classifier.py", tmp_path / "run")
    logged = [entry for entry in printed_figures(shown) if "loss_classification" in entry]
    assert all({"loss_layer_2", "loss_layer_3"} <= entry.keys() for entry in logged)
    trained, nearest, chance = (float(word.rstrip("%,")) for word in shown.split() if "%" in word)
    assert trained > nearest + 5 > chance + 20


def test_compress_and_restore(make_model, tmp_path):
    """The size of the file is the reported code length: the figure is honest."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"the rat and the cat sat on the mat; " * 6 + bytes(range(0, 250, 7)) * 18)
    model = make_model(max_position_embeddings=32).eval()
    model.save_pretrained(tmp_path / "model")
    code, restored = tmp_path / "code", tmp_path / "restored"
    shown = run("compress.py", tmp_path / "model", "compress", text, code)
    assert "bits per byte" in shown
    run("compress.py", tmp_path / "model", "restore", code, restored)
    assert restored.read_bytes() == text.read_bytes()

    result = bits_per_character(model, text, stride=16, progress=False)
    # Beside the model's code length: the header, the first byte, which costs 8 bits, and the rest of a word.
    bits = 8 * (code.stat().st_size - 16) - 8
    expected = result.bpb * result.counted_bytes
    assert -0.001 * expected < bits - expected < 0.001 * expected + 64

    (tmp_path / "damaged").write_bytes(code.read_bytes()[:-4])
    assert "the file is cut" in refused("compress.py", tmp_path / "model", "restore", tmp_path / "damaged", restored)


def test_without_arguments_an_example_says_what_it_needs():
    assert "python examples/generate.py " in refused("generate.py")
    for path in (ROOT / "examples").glob("*.py"):  # the others do it in the same words
        text = path.read_text(encoding="utf-8")
        assert (
            "sys.argv" not in text or "sys.exit(__doc__)" in text or path.name in ("compress.py", "classify_texts.py")
        )


def test_train_draft_heads_as_the_benchmark_of_a_real_model_does(tmp_path):
    """The toy size of `benchmarks.real_model` runs the example, then drafts with the heads."""
    given = {"--folder": tmp_path / "runs", "--heads": "shared", "--output": tmp_path / "found.json", "--prompts": 2}
    real_model.main(["--toy", *(str(one) for pair in given.items() for one in pair)])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {way["prompts_with_the_same_text"] for way in found["greedy"].values()} == {2}
    assert found["heads"]["draft_vocabulary"] <= 64
    assert "accuracy_target_4" in found["accuracies_on_held_out_files"]
    exported = json.loads((tmp_path / "runs" / "shared" / "medusa" / "config.json").read_text())
    assert exported["truncated_vocab_size"] == found["heads"]["draft_vocabulary"]
