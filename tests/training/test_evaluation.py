"""Exact evaluation against a naive loop: one forward pass for each character, with all the context it may have."""

import hashlib
import json
import math
import os

import evaluate
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from charformer_training import bits_per_character, evaluation
from charformer_training.evaluate_cli import main
from charformer_training.evaluation import bits_by_position
from modeling_charformer import CharformerForCausalLM, CharformerForSequenceClassification
from tests.conftest import ROOT


TEXT = ("Größe und Maß; " * 9).encode()[:100]


def naive_bits(model, data: bytes, window: int, stride: int) -> list[float]:
    """Bits of each byte but the first."""
    bits: list[float] = []
    ids = torch.tensor(list(data))
    end = 0  # predictions done
    while end < len(data) - 1:
        begin = end
        end = min(window if not begin else begin + stride, len(data) - 1)
        for position in range(begin, end):
            context = ids[max(0, end - window) : position + 1]
            log_probabilities = model(context[None]).logits[0, -1].double().log_softmax(-1)
            bits.append(-log_probabilities[ids[position + 1]].item() / math.log(2))
    return bits


@pytest.mark.parametrize("settings", [{}, {"norm_placement": "post"}, {"attn_implementation": "eager"}], ids=str)
@pytest.mark.parametrize(("window", "stride"), [(24, 1), (24, 24), (24, 7), (10, 3), (1, 1)])
def test_equals_the_naive_loop(make_model, settings, window, stride):
    model = make_model(**settings).eval()
    with torch.no_grad():
        bits = naive_bits(model, TEXT, window, stride)
    result = bits_per_character(model.train(), TEXT, window, stride, batch_size=4, progress=False)
    assert model.training  # as it was
    assert result.bpb == pytest.approx(sum(bits) / 99, rel=1e-6)
    assert result.bpc == pytest.approx(sum(bits) / (len(TEXT.decode()) - 1), rel=1e-6)
    assert (result.window, result.stride, result.bytes, result.counted_bytes) == (window, stride, 100, 99)
    assert result.counted_characters == len(TEXT.decode()) - 1


def test_with_added_tokens_bytes_are_counted_as_before(make_model):
    model = make_model(vocab_size=260).eval()
    with torch.no_grad():
        bits = naive_bits(model, TEXT, 24, 5)
    result = bits_per_character(model, TEXT, stride=5, progress=False)
    assert result.counted_bytes == 99 and result.bpb == pytest.approx(sum(bits) / 99, rel=1e-6)


@pytest.mark.parametrize("length", [2, 3, 24, 25, 26])
def test_short_texts(make_model, length):
    model = make_model().eval()
    with torch.no_grad():
        bits = naive_bits(model, TEXT[30 : 30 + length], 24, 5)
    result = bits_per_character(model, TEXT[30 : 30 + length], stride=5, progress=False)
    assert result.bpb == pytest.approx(sum(bits) / (length - 1), rel=1e-6) and result.standard_error is None


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_result_does_not_depend_on_the_batch(make_model, batch_size):
    model = make_model()
    expected = bits_per_character(model, TEXT, stride=2, progress=False)
    assert bits_per_character(model, TEXT, stride=2, batch_size=batch_size, progress=False).bpb == pytest.approx(
        expected.bpb, rel=1e-6
    )


def test_text_bytes_array_and_file_are_the_same(make_model, tmp_path):
    model = make_model()
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    texts = (TEXT.decode(), TEXT, np.frombuffer(TEXT, np.uint8), path)
    results = [bits_per_character(model, text, stride=8, progress=False) for text in texts]
    assert len({(result.bpc, result.sha256) for result in results}) == 1


def test_standard_error_is_that_of_block_means(make_model, text_file):
    data = text_file.read_bytes()[:8001]
    model = make_model()
    result = bits_per_character(model, data, stride=24, progress=False)
    blocks = []
    for start in range(0, 8000, 1000):  # blocks by the byte that is predicted; the first lacks the text's first byte
        part = [index for index in range(max(1, start), start + 1000)]
        blocks.append(sum(_bits_of(model, data, part)) / len(part))
    expected = np.std(blocks, ddof=1) / math.sqrt(len(blocks)) * result.counted_bytes / result.counted_characters
    assert result.standard_error == pytest.approx(expected, rel=0.02)  # the ninth block is one byte


def _bits_of(model, data, places):
    model.eval()
    windows = evaluation._Windows(len(data) - 1, 24, 24, 64)
    bits: dict[int, float] = {}
    for number in range(len(windows)):
        with torch.no_grad():
            positions, values = evaluation.bits_of_positions(model, np.frombuffer(data, np.uint8), *windows[number])
        bits |= dict(zip(positions.tolist(), values.tolist(), strict=True))
    return [bits[place] for place in places]


def test_an_interrupted_evaluation_goes_on(make_model, tmp_path, monkeypatch):
    model, state = make_model(), tmp_path / "state"
    expected = bits_per_character(model, TEXT, batch_size=2, progress=False)
    monkeypatch.setattr(evaluation, "SECONDS_BETWEEN_SAVES", 0.0)
    work = evaluation.bits_of_positions
    done: list[int] = []

    def interrupted(*arguments):
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(1)
        return work(*arguments)

    monkeypatch.setattr(evaluation, "bits_of_positions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bits_per_character(model, TEXT, batch_size=2, progress=False, state_file=state)
    assert (tmp_path / "state.0").exists()

    monkeypatch.setattr(evaluation, "bits_of_positions", work)
    with pytest.raises(ValueError, match="belongs to an evaluation of another text or model"):
        bits_per_character(model, TEXT, batch_size=3, progress=False, state_file=state)
    calls = []

    def counted(*arguments):
        calls.append(1)
        return work(*arguments)

    monkeypatch.setattr(evaluation, "bits_of_positions", counted)
    result = bits_per_character(model, TEXT, batch_size=2, progress=False, state_file=state)
    assert result.bpc == expected.bpc and len(calls) == 39 - 20
    assert not (tmp_path / "state.0").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 25}, "window is 25; it must be 1 to 24"),
        ({"window": 0}, "window is 0"),
        ({"stride": 0}, "stride is 0; it must be 1 to the window, 24"),
        ({"stride": 25}, "stride is 25"),
        ({"window": 8, "stride": 9}, "stride is 9; it must be 1 to the window, 8"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"text": b"x"}, "the text has 1 bytes; it must have 2 or more"),
        ({"text": "é"}, "the text is a single character"),
        ({"text": np.zeros(9)}, "array of float64"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(make_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        bits_per_character(make_model(), **({"text": TEXT, "progress": False} | arguments))


def test_a_missing_file_is_named(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file '.*gone'"):
        bits_per_character(make_model(), tmp_path / "gone")


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_bits_by_position_and_layer(make_model, norm_placement):
    model = make_model(norm_placement=norm_placement)
    data = np.frombuffer(TEXT, np.uint8)
    bits = bits_by_position(model, data, window=12, batch_size=3)
    assert set(bits) == {"next_char", "layer_1", "layer_2"} and model.training
    rows = torch.from_numpy(data[: 8 * 12].astype(np.int64)).view(8, 12)
    targets = torch.from_numpy(data[1 : 8 * 12 + 1].astype(np.int64)).view(8, 12)
    model.eval()
    with torch.no_grad():
        states = model.model(rows, output_hidden_states=True).hidden_states
        for name, logits in {
            "next_char": model(rows).logits,
            "layer_2": model.auxiliary_heads["layer_2"](model.model.norm(states[2])),
        }.items():
            expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(0) / math.log(2)
            assert bits[name] == pytest.approx(expected.numpy(), rel=1e-5)
    assert set(bits_by_position(model.without_auxiliary_heads(), data, window=12)) == {"next_char"}
    with pytest.raises(ValueError, match="has 24 bytes; bits by position need more than a window of 24"):
        bits_by_position(model, data[:24])


class TestProgram:
    @pytest.fixture
    def model_folder(self, make_model, tmp_path):
        make_model().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    def test_table_json_and_picture(self, model_folder, text_file, tmp_path, capsys):
        words = ["--stride", "24", "8", "--split", "validation", "--device", "cpu", "--max_bytes", "300"]
        files = ["--output", str(tmp_path / "new" / "result.json"), "--plots", str(tmp_path / "curves.png")]
        assert main([model_folder, str(text_file), *words, *files]) == 0
        shown, report = capsys.readouterr().out, json.loads((tmp_path / "new" / "result.json").read_text())
        data = text_file.read_bytes()
        part = data[int(len(data) * 0.9) :][:300]
        model = CharformerForCausalLM.from_pretrained(model_folder)
        for result, stride in zip(report["results"], (24, 8), strict=True):
            expected = bits_per_character(model, part, stride=stride, progress=False)
            assert result["bpc"] == pytest.approx(expected.bpc, rel=1e-6) and result["stride"] == stride
            assert result["sha256"] == expected.sha256 == hashlib.sha256(part).hexdigest()
            assert f"{expected.bpc:.4f}" in shown
        assert report["split"] == "validation" and report["text"] == text_file.name and report["model"] == "model"
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--stride", "0"], "stride is 0; it must be 1 or more"),
            (["--stride", "8", "25"], "stride is 25; it must be 1 to the window, 24"),
            (["--device", "no_such"], "device is 'no_such', which is not available or not known"),
            (["--device", "meta:x"], "device is 'meta:x'"),
            (["--device", "meta"], "device is 'meta', which is not available or not known: it holds shapes"),
            (["--output", "a.png", "--plots", "a.png"], "plots is a.png, which is output; give another file"),
            (["--strid", "8"], "there is no option --strid; meant --stride?"),
            (["--batch_size", "-1"], "batch_size is -1; it must be 1 or more"),
            (["--max_bytes", "1"], "max_bytes is 1; it must be 2 or more"),
            (["--window", "99"], "window is 99; it must be 1 to 24"),
            (["--split", "some"], "split is 'some'"),
            (["--dtype", "int8"], "dtype is 'int8'"),
        ],
    )
    def test_wrong_values_are_one_clear_line(self, model_folder, text_file, capsys, words, message):
        assert main([model_folder, str(text_file), *words]) == 1
        assert message in capsys.readouterr().err

    def test_what_is_missing_is_named(self, model_folder, tmp_path, capsys):
        assert main([model_folder]) == 1
        assert "give a model and a text" in capsys.readouterr().err
        assert main([model_folder, str(tmp_path / "gone"), "--device", "cpu"]) == 1
        shown = capsys.readouterr().err
        assert "TEXT: there is no file or folder" in shown and "--dataset_name" not in shown
        assert main([model_folder, ""]) == 1
        assert "TEXT is empty" in capsys.readouterr().err

    def test_without_options_and_without_arguments(self, model_folder, tmp_path, capsys):
        (tmp_path / "text").write_bytes(TEXT)
        assert main([model_folder, str(tmp_path / "text")]) == 0
        assert "text, all of it: 100 bytes" in capsys.readouterr().out
        assert main([]) == 2
        assert "charformer-evaluate runs/quickstart my_text.txt" in capsys.readouterr().err
        with pytest.raises(SystemExit) as left:
            main(["--help"])
        assert left.value.code == 0
        assert "--max_bytes" in capsys.readouterr().out

    def test_text_and_model_are_not_replaced_by_results(self, model_folder, text_file, tmp_path, capsys):
        weights = tmp_path / "model" / "model.safetensors"
        before = weights.read_bytes(), text_file.read_bytes()
        places = {text_file: "which is TEXT"}
        for name in ("recipe.yaml", "README.md", "command.txt", "checkpoint-2/trainer_state.json"):
            place = tmp_path / "model" / name
            place.parent.mkdir(exist_ok=True)
            place.write_text("of the run")
            places[place] = "which is a file of MODEL"
        for place, message in {weights: "which is a file of MODEL", **places}.items():
            assert main([model_folder, str(text_file), "--output", str(place)]) == 1
            assert f"output is {place}, {message}; give another file" in capsys.readouterr().err
        assert (weights.read_bytes(), text_file.read_bytes()) == before
        assert {place.read_text() for place in places if place != text_file} == {"of the run"}

    @pytest.mark.parametrize("option", ["--output", "--plots", "--state_file"])
    def test_places_that_cannot_be_written_are_refused_before_the_work(self, tmp_path, capsys, option):
        (tmp_path / "link").symlink_to("/dev/full")
        for place, message in (
            (tmp_path, "is a folder; give a file in it"),
            ("/dev/full", "is a device or a pipe"),
            (tmp_path / "link", "is a device or a pipe"),
            ("/dev/null/x", "cannot be made"),
        ):
            assert main(["no_model", "no_text", option, str(place)]) == 1  # neither is looked for
            assert message in capsys.readouterr().err

    def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(self, tmp_path, capsys):
        assert main(["no_model", "no_text", "--plots", str(tmp_path / "curves.jpgg")]) == 1
        assert "curves.jpgg does not end in .png, .pdf or .svg" in capsys.readouterr().err

    def test_the_text_of_the_training_is_evaluated_on_its_validation_split(self, model_folder, tmp_path, capsys):
        corpus = TEXT * 4
        (tmp_path / "text").write_bytes(corpus)
        ends = {"train": (0, 250), "validation": (250, 330), "test": (330, 400)}
        splits = {
            name: [end - start, hashlib.sha256(corpus[start:end]).hexdigest()] for name, (start, end) in ends.items()
        }
        metrics = tmp_path / "model" / "metrics.json"
        metrics.write_text(json.dumps({"splits": splits}))
        for words, part, shown in (
            ([], corpus[250:330], "text, the validation split: 80 bytes"),
            (["--split", "test"], corpus[330:], "text, the test split: 70 bytes"),
            (["--split", "test", "--train_share", "0.9"], corpus[380:], "text, the test split: 20 bytes"),
            (["--split", "all"], corpus, "the model was trained on a part of this text"),
        ):
            assert main([model_folder, str(tmp_path / "text"), "--stride", "24", *words]) == 0
            out = capsys.readouterr().out
            assert shown in out and hashlib.sha256(part).hexdigest() in out
        (tmp_path / "text").write_bytes(corpus[:-1] + b"x")  # another text of the same length
        assert main([model_folder, str(tmp_path / "text"), "--stride", "24"]) == 0
        assert "text, all of it: 400 bytes" in capsys.readouterr().out
        metrics.write_text("{")
        assert main([model_folder, str(tmp_path / "text"), "--stride", "24"]) == 0
        assert "metrics.json is damaged" in capsys.readouterr().out

    def test_models_that_are_no_language_models_are_refused(self, make_model, tmp_path, capsys):
        def error(name) -> str:
            assert main([str(name), str(tmp_path / "text")]) == 1
            shown = capsys.readouterr().err
            assert "Traceback" not in shown
            return shown.strip().splitlines()[-1]

        (tmp_path / "text").write_bytes(TEXT)
        config = make_model().config
        CharformerForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
        assert "is a 'CharformerForSequenceClassification'; it must be a language model" in error(
            tmp_path / "classifier"
        )
        folder = tmp_path / "classifier"
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"architectures": None}))
        assert "lacks weights of a language model: lm_head" in error(folder)
        for changes, message in (
            ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10,000,000; it must be 2,000 or fewer"),
            ({"hidden_size": 10**9}, "GB of memory here"),
            ({"hidden_size": "16"}, "hidden_size is '16'; it must be a whole number"),
            ({"model_type": "gpt2"}, "is a model of type 'gpt2'; it must be a Charformer"),
            ({"num_attention_heads": 3}, "does not divide"),
        ):
            (folder / "config.json").write_text(json.dumps(values | {"architectures": None} | changes))
            assert message in error(folder)
        for content in ("[]", "{", "null", "{}"):
            (folder / "config.json").write_text(content)
            assert "config.json" in error(folder) or "of type None" in error(folder)
        (folder / "config.json").unlink()
        assert "holds no config.json" in error(folder)
        assert "there is no folder" in error("./mistyped/path/of/a/model")
        assert "there is no folder 'mistyped'" in error("mistyped")

    def test_damaged_weights_are_one_clear_line(self, model_folder, tmp_path, capsys):
        weights = tmp_path / "model" / "model.safetensors"
        whole = weights.read_bytes()
        (tmp_path / "text").write_bytes(TEXT)
        for content in (whole[:-10], whole[:5], b"", b"\xff" * 100):
            weights.write_bytes(content)
            assert main([model_folder, str(tmp_path / "text")]) == 1
            assert "are damaged or truncated" in capsys.readouterr().err
        weights.unlink()
        for name, content in (
            ("gone", b""),
            ("pytorch_model.bin", b"\x80\x04"),
            ("model.safetensors.index.json", b"{}"),
        ):
            (tmp_path / "model" / name).write_bytes(content)
            assert main([model_folder, str(tmp_path / "text")]) == 1
            shown = capsys.readouterr().err
            assert "cannot be read" in shown and "Traceback" not in shown
            (tmp_path / "model" / name).unlink()

    def test_weights_that_are_not_finite_have_no_result(self, make_model, tmp_path, capsys):
        model = make_model()
        model.lm_head.weight.data[7] = float("nan")
        model.save_pretrained(tmp_path / "model")
        (tmp_path / "text").write_bytes(TEXT)
        assert main([str(tmp_path / "model"), str(tmp_path / "text")]) == 1
        assert "the model's prediction of byte 1 is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["koi8-r", "cp866", "utf-16"])
def test_text_that_is_not_utf8_has_bits_per_byte_alone(make_model, tmp_path, capsys, encoding):
    model = make_model()
    data = ("Щедрая осень, жёлтый лес. " * 90).encode(encoding)
    result = bits_per_character(model, data, stride=24, progress=False)
    assert result.bpc is None and result.counted_characters is None and result.bpb > 0
    assert result.standard_error is not None
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(data)
    assert main([str(tmp_path / "model"), str(tmp_path / "text"), "--stride", "24"]) == 0
    out = capsys.readouterr().out
    assert "not UTF-8, so its characters cannot be counted" in out and f"{result.bpb:.4f} +- " in out
    inside = "жёлтый лес".encode() * 3
    assert (
        bits_per_character(model, inside[1:-1], stride=8, progress=False).bpc is not None
    )  # cut characters are no fault


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 99, b"\x93NUMPY", "pickle", "object", "shape", "nan", "pipe"])
def test_a_damaged_state_file_is_named(make_model, tmp_path, content):
    state = tmp_path / "state.0"
    values = {"key": "k", "bits": np.zeros(1), "done": 1, "seconds": 1.0}
    if content == "pickle":
        np.save(state.with_suffix(".npy"), np.array([{}], dtype=object))
        state.with_suffix(".npy").rename(state)
    elif content == "pipe":
        os.mkfifo(state)
    elif isinstance(content, str):
        wrong = {"object": np.array([None]), "shape": np.zeros(1, dtype=int), "nan": np.array([np.nan])}[content]
        with state.open("wb") as file:
            np.savez(file, **(values | {"bits": wrong}))  # type: ignore[arg-type]
    else:
        state.write_bytes(content)
    with pytest.raises(ValueError, match="state_file: .*state.0 is damaged or not that of an evaluation"):
        bits_per_character(make_model(), TEXT, progress=False, state_file=tmp_path / "state")


def test_an_error_leaves_the_model_in_training(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.model, "forward", lambda *arguments, **settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bits_by_position(model, np.frombuffer(TEXT, np.uint8))
    assert model.training


@pytest.mark.filterwarnings("ignore")  # of a library's making
def test_metric_of_the_library_evaluate(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    model = make_model().eval()
    model.save_pretrained(tmp_path / "model")
    metric = evaluate.load(str(ROOT / "training" / "bits_per_character"))
    texts = ["Größe und Maß; " * 5, "mit Muße"]
    found = metric.compute(predictions=texts, model_id=str(tmp_path / "model"), stride=7)
    one, two = (bits_per_character(model, text, stride=7, progress=False) for text in texts)
    bits = one.bpb * one.counted_bytes + two.bpb * two.counted_bytes
    assert one.counted_characters and two.counted_characters
    assert found["bpc"] == pytest.approx(bits / (one.counted_characters + two.counted_characters))
    assert found["bpb"] == pytest.approx(bits / (one.counted_bytes + two.counted_bytes))
    assert [text["sha256"] for text in found["texts"]] == [one.sha256, two.sha256]
    with pytest.raises(ValueError, match="stride is 0"):
        metric.compute(predictions=texts, model_id=str(tmp_path / "model"), stride=0)
