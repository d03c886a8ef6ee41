"""charformer-train like its user meets it: recipes, results and wrong inputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from charformer_training import evaluate_cli
from charformer_training import train as train_module
from charformer_training.data import load_corpus
from charformer_training.recipes import parse_arguments
from charformer_training.train import build_model, main
from modeling_charformer import CharformerForCausalLM
from tests.helpers import CONFIGS, QUICKSTART, training_entries


RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.filterwarnings("ignore:The hidden_size")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_every_recipe_runs(command, tmp_path, recipe, capsys):
    layers = yaml.safe_load((CONFIGS / recipe).read_text())["num_hidden_layers"]
    assert main(command(str(CONFIGS / recipe))) == 0, capsys.readouterr().err
    folder = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == layers and model.config.use_cache
    assert len(training_entries(folder)) == 4


@pytest.mark.slow
def test_a_run_leaves_a_folder_that_explains_and_loads_itself(command, tmp_path, capsys, figures):
    assert main([*command(sample_prompt="Zeile"), "--compare_ngrams"]) == 0
    folder, shown = tmp_path / "run", capsys.readouterr().out
    assert not (folder / ".incomplete").exists()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is CharformerForCausalLM
    ids = model.generate(**tokenizer("Zeile", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("Zeile")
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    symbols = [(one.pad_token_id, one.eos_token_id) for one in (tokenizer, model.config, model.generation_config)]
    # The Trainer of Transformers 5.17 makes a list of it.
    assert symbols[:2] == [(255, 254)] * 2 and symbols[2] in [(255, 254), (255, [254])]

    final_layer, layers = figures[-1].axes
    logged = training_entries(folder)
    (drawn,) = [line for line in final_layer.lines if line.get_label() == "next_char"]
    assert [*drawn.get_xdata()] == [1, 2, 3, 4]
    assert [*drawn.get_ydata()] == [entry["loss_next_char"] for entry in logged]
    assert {"layer_1", "layer_3_target_2"} <= {line.get_label() for line in layers.lines}
    assert layers.get_ylabel() == "loss (nats per byte)"
    assert (folder / "loss_terms.png").read_bytes().startswith(b"\x89PNG")

    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["trigram_bpc"] < metrics["unigram_bpc"] and metrics["eval_bpc"] > metrics["eval_bpb"]
    assert list(metrics["splits"]) == ["train", "validation", "test"]

    card = (folder / "README.md").read_text()
    for fact in (
        f"{metrics['eval_bpc']:.4f}",
        metrics["splits"]["validation"][1],
        "loss_terms.png",
        "| layer_1_target_2 |",
        "pipeline_tag: text-generation",
        "trust_remote_code=True",
    ):
        assert fact in card
    assert "More information needed" not in card and "{{" not in card and "{%" not in card

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 4]
    assert all(sample["text"].startswith("Zeile") for sample in samples)

    for line in (
        "Validation:",
        "counted trigram",
        "The model writes:",
        "loss_terms.png",
        "import modeling_charformer",
    ):
        assert line in shown
    assert metrics["splits"]["train"][1] in shown  # the checksum


@pytest.mark.slow
def test_raw_binary_data_makes_a_model_without_special_symbols(command, tmp_path, capsys):
    data = tmp_path / "raw.dat"
    data.write_bytes(bytes(range(1, 256)) * 40)
    assert main(command(data_path=data, sample_length=0)) == 0
    assert "253 to 255 are not pad, eos and bos" in capsys.readouterr().out
    folder = tmp_path / "run"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id is None and model.generation_config.eos_token_id is None
    assert tokenizer.all_special_tokens == []


@pytest.mark.slow
def test_the_shown_lines_load_the_model(command, tmp_path, capsys):
    assert main(command()) == 0
    lines = capsys.readouterr().out.split("Load it with:")[1]
    program = (
        "\n".join(line.strip() for line in lines.splitlines()) + "\nprint(type(model).__name__, tokenizer.vocab_size)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.split() == ["CharformerForCausalLM", "256"]


@pytest.mark.slow
def test_fine_tuning_begins_with_the_given_model(command, tmp_path):
    assert main(command()) == 0
    first = str(tmp_path / "run")
    settings = {"output_dir": str(tmp_path / "tuned"), "model_name_or_path": first}
    assert main(command(**settings, learning_rate=0.0, intermediate_layers="none")) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (first, tmp_path / "tuned"))
    assert after.config.language_model_losses().terms[2:] == (("target_2", 4, 2, 0.5, False, "all"),)
    for name, weight in after.state_dict().items():
        assert weight.equal(before.state_dict()[name])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["recipe", "command line"])
def test_weights_of_single_terms_reach_the_saved_model(command, tmp_path, place):
    weights = {"target_2": 0.4, "layer_1": 0.8}
    words = command(
        loss_weighting="uncertainty",
        target_schedule="forward",
        target_heads="sequential",
        intermediate_schedule="rotate_2",
    )
    if place == "recipe":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**yaml.safe_load(Path(QUICKSTART).read_text()), "term_weights": weights}))
        words[0] = str(recipe)
    else:
        words += ["--term_weights", json.dumps(weights)]
    assert main(words) == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert config.term_weights == weights and config.loss_weighting == "uncertainty"
    assert config.target_heads == "sequential"
    first, *_, last = training_entries(tmp_path / "run")
    assert "loss_uncertainty" in first
    assert "loss_target_2" not in first and "loss_target_2" in last  # comes in after a quarter of training
    assert ("loss_layer_2" in first) != ("loss_layer_1" in first)


@pytest.mark.slow
def test_fine_tuning_keeps_the_architecture(command, tmp_path, capsys):
    assert main(command()) == 0
    assert main(command(model_name_or_path=tmp_path / "run", output_dir=tmp_path / "tuned", hidden_size=32)) == 1
    assert "hidden_size is 32, but the model to fine-tune" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_gives_linear_heads_blocks_but_changes_none(command, tmp_path, capsys):
    assert main(command(target_heads="sequential")) == 0
    tuned = {"model_name_or_path": tmp_path / "run", "output_dir": tmp_path / "tuned"}
    for heads in ("linear", "residual"):
        assert main(command(**tuned, target_heads=heads)) == 1
        assert f"target_heads is {heads!r}, but the model to fine-tune" in capsys.readouterr().err
    assert main(command(**tuned)) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").config.target_heads == "sequential"
    linear = {"overwrite_output_dir": "true", "output_dir": tmp_path / "run"}
    assert main(command(**linear)) == 0
    assert main(command(**tuned, overwrite_output_dir="true", target_heads="sequential")) == 0


@pytest.mark.slow
def test_fine_tuning_says_that_schedules_begin_anew(command, tmp_path, capsys):
    assert main(command()) == 0
    assert main(command(output_dir=tmp_path / "tuned", model_name_or_path=tmp_path / "run")) == 0
    assert "learning rate and losses follow their schedules from the beginning" in capsys.readouterr().out


def test_a_dataset_replaces_the_recipes_text(text_file, tmp_path):
    Dataset.from_dict({"text": ["one text", "another"]}).to_parquet(tmp_path / "part.parquet")
    _, data, _, _ = parse_arguments([QUICKSTART, "--dataset_name", str(tmp_path)])
    assert data.data_path is None and load_corpus(data).tobytes() == b"one text\nanother"
    _, data, _, _ = parse_arguments([QUICKSTART, f"--data_path={text_file}"])
    assert data.data_path == str(text_file) and data.dataset_name is None


def test_command_line_overrides_the_recipe(command):
    model, data, run, training = parse_arguments(
        [
            *command(learning_rate="3e-4"),
            "--intermediate_layers",
            "1",
            "2",
            "--target_weights",
            "0.25",
            "--num_targets",
            "2",
        ]
    )
    assert training.learning_rate == 3e-4 and training.max_steps == 4
    fields = model.config_fields()
    assert fields["intermediate_layers"] == [1, 2] and fields["target_weights"] == [0.25]
    assert fields["intermediate_weight"] == yaml.safe_load(Path(QUICKSTART).read_text())["intermediate_weight"]


def test_one_target_needs_no_weights_of_the_recipes_further_ones(command):
    recipe = str(CONFIGS / "drafting.yaml")
    model, _, _, _ = parse_arguments(command(recipe, num_targets=1, target_heads="linear"))
    assert build_model(model).config.target_weights is None
    with pytest.raises(ValueError, match="target_weights"):
        parse_arguments(command(recipe, num_targets=1, target_weights=0.3))


@pytest.mark.parametrize(("words", "layers"), [(["all"], "all"), (["none"], None), (["3", "1"], [3, 1])])
def test_layers_on_the_command_line(command, words, layers):
    arguments = parse_arguments([*command(), "--intermediate_layers", *words])
    assert arguments.model.config_fields()["intermediate_layers"] == layers


@pytest.mark.parametrize("none", ["none", "null"])
def test_yaml_values_are_what_they_look_like(tmp_path, text_file, none):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data_path: {text_file}\nmax_steps: 5\nlearning_rate: 1e-3\nintermediate_layers: {none}\noutput_dir: runs/x\n"
    )
    model, _, _, training = parse_arguments([str(recipe)])
    assert training.learning_rate == 0.001 and model.config_fields() == {"intermediate_layers": None}


class TestWrongInput:
    """Each is refused with a message that says what is wrong, before any work is done."""

    def refused(self, capsys, arguments: list[str]) -> str:
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        (line,) = [line for line in captured.err.splitlines() if line.startswith("charformer-train: error: ")]
        return captured.err[captured.err.index(line) :]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_attention_heads": 3}, "num_attention_heads (3) does not divide hidden_size (16)"),
            ({"intermediate_layers": "9"}, "intermediate_layers contains [9]"),
            ({"intermediate_layers": "1 x"}, "intermediate_layers is ['1', 'x']"),
            (
                {"intermediate_layers": "2,9"},
                "intermediate_layers is '2,9'; give 'all', 'none', or layer numbers, on the command line as"
                " --intermediate_layers 2 9, in a recipe as [2, 9]",
            ),
            ({"intermediate_layers": "some"}, "--intermediate_layers 1 2, in a recipe as [1, 2]"),
            (
                {"intermediate_schedule": "papr"},
                "known schedules: ['constant', 'cosine', 'forward', 'linear', 'paper'",
            ),
            ({"intermediate_weight": "nan"}, "intermediate_weight is nan"),
            ({"target_weights": "-1"}, "target_weights contains -1"),
            ({"max_steps": -1}, "max_steps is -1"),
            ({"max_position_embeddings": 5000}, "max_position_embeddings=5000"),
            ({"data_path": "missing.txt"}, "no file or folder 'missing.txt'"),
            ({"train_share": 0.99}, "come to more than 1"),
        ],
        ids=str,
    )
    def test_value(self, command, tmp_path, capsys, changes, message):
        assert message in self.refused(capsys, command(**changes))
        assert not list((tmp_path / "run").glob("checkpoint-*"))

    def test_empty_file_and_folder_without_text(self, command, tmp_path, capsys):
        (tmp_path / "empty.txt").touch()
        (tmp_path / "folder").mkdir()
        assert "empty.txt is empty" in self.refused(capsys, command(data_path=tmp_path / "empty.txt"))
        assert "holds no text file" in self.refused(capsys, command(data_path=tmp_path / "folder"))

    def test_text_shorter_than_a_window_names_split_and_window(self, command, tmp_path, capsys):
        (tmp_path / "short.txt").write_text("A short text. " * 10)
        message = self.refused(capsys, command(data_path=tmp_path / "short.txt"))
        assert "the validation split has 7 bytes" in message and "max_position_embeddings=32" in message

    def test_recipe(self, tmp_path, capsys):
        assert "no recipe 'missing.yaml'" in self.refused(capsys, ["missing.yaml"])
        assert "; meant quickstart.yaml? Those of this project" in self.refused(capsys, ["quikstart.yaml"])
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("num_target: 3\n")
        assert "no field 'num_target'; meant num_targets?" in self.refused(capsys, [str(recipe)])
        recipe.write_text("a: [\n")
        assert "not valid YAML" in self.refused(capsys, [str(recipe)])
        recipe.write_text("just text\n")
        assert "'field: value' lines" in self.refused(capsys, [str(recipe)])

    def test_a_former_name_of_a_field_is_told_its_new_one(self, command, tmp_path, capsys):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("loss_weights: {target_2: 0.4}\n")
        assert "no field 'loss_weights'; its name is term_weights now" in self.refused(capsys, [str(recipe)])
        words = [*command(), "--max_eval_characters", "9"]
        assert "no option --max_eval_characters; its name is --max_eval_bytes now" in self.refused(capsys, words)

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (ImportError("this needs the package somewhere"), "this needs the package somewhere"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory"),
            (SafetensorError("header too large"), "header too large"),
            (MemoryError(), "MemoryError"),
        ],
    )
    def test_an_error_of_a_later_stage_is_one_line(self, command, tmp_path, monkeypatch, capsys, error, message):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(train_module, "build_model", fail)
        monkeypatch.setattr(evaluate_cli, "evaluate", fail)
        assert message in self.refused(capsys, command())
        assert evaluate_cli.main([str(tmp_path), str(tmp_path)]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith(f"\ncharformer-evaluate: error: {message}") and "Traceback" not in shown

    @pytest.mark.slow
    def test_damaged_results_of_a_complete_run(self, command, tmp_path, capsys, caplog):
        assert main(command(resume="auto")) == 0
        metrics = tmp_path / "run" / "metrics.json"
        expected = json.loads(metrics.read_text())
        for content in ("{", "[1]"):
            metrics.write_text(content)
            assert "metrics.json is damaged; delete it, and the same" in self.refused(capsys, command(resume="auto"))
        metrics.unlink()
        assert main(command(resume="auto")) == 0
        assert json.loads(metrics.read_text()) == expected  # measured again, without training
        (tmp_path / "run" / "config.json").write_text("{}")
        assert main(command(resume="auto")) == 0
        assert "config.json has 2 bytes, not the" in caplog.text
        assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "charformer"

    @pytest.mark.slow
    def test_bits_per_character_of_text_that_is_not_utf8(self, command, tmp_path, capsys):
        (tmp_path / "koi8").write_bytes(("Щедрая осень, жёлтый лес. " * 400).encode("koi8-r"))
        words = command(data_path=tmp_path / "koi8", metric_for_best_model="eval_bpc", load_best_model_at_end="true")
        assert "not UTF-8, so it must be eval_bpb or eval_loss" in self.refused(capsys, words)
        assert main([*command(data_path=tmp_path / "koi8"), "--compare_ngrams"]) == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert metrics["eval_bpb"] > 0 and "unigram_bpb" in metrics and not [key for key in metrics if "bpc" in key]
        assert "bits per byte" in capsys.readouterr().out

    @pytest.mark.slow
    def test_a_name_that_is_not_utf8_costs_no_model(self, command, text_file, tmp_path, capsys):
        path = os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J.txt"
        with open(path, "wb") as file:
            file.write(text_file.read_bytes())
        assert main(command(data_path=os.fsdecode(path))) == 0
        shown = capsys.readouterr()
        assert r"caf\xe9\x1b[2J.txt" in shown.out and "\x1b[2J" not in shown.out + shown.err
        assert r"caf\xe9" in (tmp_path / "run" / "README.md").read_text()
        assert "must be text in UTF-8" in self.refused(capsys, command(output_dir=os.fsdecode(path)))

    @pytest.mark.slow
    def test_a_corpus_does_not_grow_by_its_runs(self, command, text_file, tmp_path):
        folder = tmp_path / "project"
        folder.mkdir()
        shutil.copy(text_file, folder)
        found = []
        for further in ([], ["--resume", "auto"], ["--overwrite_output_dir"]):
            words = command(data_path=folder, output_dir=folder / "runs" / "a")
            assert main([*words, *further]) == 0
            found.append(json.loads((folder / "runs" / "a" / "metrics.json").read_text())["splits"])
        assert found[0] == found[1] == found[2]
        assert sum(size for size, _ in found[0].values()) == text_file.stat().st_size

    def test_unknown_field_on_the_command_line(self, command, capsys):
        assert "--num_target_x" in self.refused(capsys, [*command(), "--num_target_x", "3"])
        assert "--num_target" in self.refused(capsys, [*command(), "--num_target", "3"])

    @pytest.mark.slow
    def test_folder_with_another_model(self, command, tmp_path, capsys):
        assert main(command()) == 0
        weights = (tmp_path / "run" / "model.safetensors").read_bytes()
        message = self.refused(capsys, command(seed=5))
        assert "already holds a model" in message and "--overwrite_output_dir" in message
        assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
        (tmp_path / "run" / "notes.txt").write_text("mine")
        assert main([*command(seed=5, max_steps=2), "--overwrite_output_dir"]) == 0
        assert (tmp_path / "run" / "model.safetensors").read_bytes() != weights
        assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]

    @pytest.mark.slow
    def test_overwriting_deletes_nothing_before_the_new_run_can_begin(self, command, tmp_path, capsys):
        assert main(command()) == 0
        weights = (tmp_path / "run" / "model.safetensors").read_bytes()
        for changes in ({"data_path": "missing.txt"}, {"max_position_embeddings": 5000}, {"sample_prompt": "x" * 99}):
            self.refused(capsys, [*command(**changes), "--overwrite_output_dir"])
        assert "already holds a model" in self.refused(
            capsys, command(resume=self.copy_of(tmp_path / "run" / "checkpoint-2", tmp_path))
        )
        assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
        assert (tmp_path / "run" / "checkpoint-4").is_dir()

    @staticmethod
    def copy_of(checkpoint: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name))

    @pytest.mark.slow
    def test_resuming_a_damaged_checkpoint_or_in_two_ways(self, command, tmp_path, capsys):
        assert main(command()) == 0
        broken = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
        broken.write_bytes(broken.read_bytes()[:1000])
        message = self.refused(capsys, command(resume=broken.parent))
        assert "checkpoint-4 is not good: model.safetensors has 1,000 bytes" in message and "checkpoint-2" in message
        message = self.refused(capsys, command(resume_from_checkpoint=broken.parent))
        assert "give --resume auto" in message
        assert "give one of the two" in self.refused(capsys, [*command(resume="auto"), "--overwrite_output_dir"])
        assert "cannot be resumed" in self.refused(capsys, command(resume="auto", save_only_model="true"))
        assert "resume is ''" in self.refused(capsys, [*command(), "--resume", ""])

    def test_a_loss_that_is_not_finite(self, command, capsys):
        message = self.refused(capsys, command(learning_rate="1e30", max_steps=30, max_grad_norm=0))
        assert "not finite" in message and "step" in message


@pytest.mark.slow
def test_the_best_model_is_the_one_reported(command, tmp_path):
    best = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "eval_steps": 1, "save_steps": 1}
    chosen = {"load_best_model_at_end": "true", "metric_for_best_model": "eval_bpc", "greater_is_better": "false"}
    assert main(command(**best, **chosen, max_grad_norm=0, max_steps=6)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert metrics["eval_bpc"] == pytest.approx(min(entry["eval_bpc"] for entry in history if "eval_bpc" in entry))
