"""Every example runs as its first lines say."""

import ast
import subprocess
import sys

import pytest

from charformer_training import bits_per_character
from modeling_charformer import CharformerForCausalLM, CharformerTokenizer
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


def test_no_example_is_left_out():
    # Those of the Hub are run beside its other tests.
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "any_model.py",
        "compress.py",
        "generate.py",
        "image_classifier.py",
        "load_from_hub.py",
        "own_training_loop.py",
        "push_to_hub.py",
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
    assert float(entries[-1]["eval_loss_next_token"]) < 1.5  # chance is ln 100 = 4.6
    assert "GPT2LMHeadModel" in shown and "(layer_3_target_2): ResidualBlock(" in shown


def test_image_classifier(tmp_path):
    shown = run("image_classifier.py", tmp_path / "run")
    logged = [entry for entry in printed_figures(shown) if "loss_classification" in entry]
    assert all({"loss_layer_2", "loss_layer_3"} <= entry.keys() for entry in logged)
    trained, nearest, chance = (float(word.rstrip("%,")) for word in shown.split() if "%" in word)
    assert trained > nearest + 5 > chance + 20


def test_compress_and_restore(make_model, tmp_path):
    """The size of the file is the reported code length: the figure is honest."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"the rat and the cat sat on the mat; " * 12 + bytes(range(0, 250, 7)) * 40)
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

    for damaged in (code.read_bytes()[:-4], code.read_bytes()[:5], code.read_bytes()[:-1] + b"\0\0"):
        (tmp_path / "damaged").write_bytes(damaged)
        assert "the file is cut" in refused(
            "compress.py", tmp_path / "model", "restore", tmp_path / "damaged", restored
        )


def test_without_arguments_an_example_says_what_it_needs():
    assert "python examples/generate.py " in refused("generate.py")
    for path in (ROOT / "examples").glob("*.py"):  # the others do it in the same words
        text = path.read_text(encoding="utf-8")
        assert "sys.argv" not in text or "sys.exit(__doc__)" in text or path.name == "compress.py"
