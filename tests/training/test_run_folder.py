"""A run's folder: one command given again, what is recorded there, and interruptions."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from charformer_training import AuxiliaryLossTrainer
from charformer_training.manifest import inspect
from charformer_training.recipes import parse_arguments
from charformer_training.run_folder import effective_recipe, without_secrets
from charformer_training.train import build_model, main
from tests.helpers import CONFIGS, training_entries


RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("cache")


class TestFolder:
    """What lies in the place of `output_dir`, or in it, is told before training, and stays as it is."""

    def refused(self, words, capsys) -> str:
        assert main(words) == 1
        shown = capsys.readouterr().err
        assert "Errno" not in shown and "Traceback" not in shown
        return shown

    @pytest.mark.parametrize(
        "name", ["metrics.json", "samples.jsonl", "command.txt", "_run.lock", "recipe.yaml", "README.md", "hub.py"]
    )
    @pytest.mark.parametrize(
        ("kind", "message"),
        [("folder", "is a folder"), ("pipe", "a device or a pipe"), ("link", "links are not followed")],
    )
    def test_what_is_no_file_in_the_place_of_one_is_refused(self, command, tmp_path, capsys, name, kind, message):
        if kind == "link" and name not in ("command.txt", "_run.lock"):
            return  # links are replaced there, see below
        place, kept = tmp_path / "run" / name, tmp_path / "kept"
        kept.write_text("mine")
        place.parent.mkdir()
        {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "link": lambda: place.symlink_to(kept)}[kind]()
        shown = self.refused(command(), capsys)
        assert f"{place} is a" in shown and message in shown
        assert kept.read_text() == "mine" and [path.name for path in place.parent.iterdir()] == [name]

    @pytest.mark.parametrize("text", [b"\xff# Mine", b"---\n[a: {\n---\n# Mine\n"])
    def test_a_card_that_cannot_be_kept_is_refused_before_the_work(self, command, tmp_path, capsys, text):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "README.md").write_bytes(text)
        shown = self.refused(command(), capsys)
        assert "README.md cannot be read, so its text could not be kept" in shown and "repair or delete it" in shown
        assert (tmp_path / "run" / "README.md").read_bytes() == text

    def test_a_place_that_can_be_no_folder_is_refused(self, command, tmp_path, capsys):
        (tmp_path / "loop").symlink_to("loop")
        (tmp_path / "file").touch()
        os.mkfifo(tmp_path / "pipe")
        for name, message in (
            ("loop", "a link that leads to itself"),
            ("loop/x", "a link that leads to itself"),
            ("file", "a file; give a folder"),
            ("file/x", "cannot be made: Not a directory"),
            ("pipe", "a device or a pipe; give a folder"),
        ):
            shown = self.refused(command(output_dir=tmp_path / name), capsys)
            assert "output_dir" in shown and message in shown
        if os.path.isdir("/proc"):
            assert "output_dir /proc cannot be written to" in self.refused(command(output_dir="/proc"), capsys)

    @pytest.mark.slow
    def test_a_link_to_a_folder_is_that_folder(self, command, tmp_path):
        (tmp_path / "link").symlink_to("real")
        assert main(command(output_dir=tmp_path / "link", max_steps=1)) == 0
        assert (tmp_path / "real" / "model.safetensors").is_file() and (tmp_path / "link").is_symlink()


class TestOneCommandGivenAgain:
    @pytest.mark.slow
    def test_it_begins_goes_on_and_says_that_the_run_is_complete(self, command, tmp_path, capsys):
        whole, interrupted = tmp_path / "run", tmp_path / "interrupted"
        assert main(command(resume="auto")) == 0
        again = command(resume="auto", output_dir=interrupted)
        (interrupted / "checkpoint-1").mkdir(parents=True)  # what a kill inside of the first save may leave
        assert main(again) == 0
        assert training_entries(interrupted) == training_entries(whole)
        shutil.rmtree(interrupted)
        shutil.copytree(whole / "checkpoint-2", interrupted / "checkpoint-2")
        assert main(again) == 0
        assert training_entries(interrupted) == training_entries(whole)
        weights = (whole / "model.safetensors").read_bytes()
        assert (interrupted / "model.safetensors").read_bytes() == weights
        written = (interrupted / "model.safetensors").stat().st_mtime_ns
        capsys.readouterr()
        assert main(again) == 0
        assert "is complete; nothing is left to do" in capsys.readouterr().out
        assert (interrupted / "model.safetensors").stat().st_mtime_ns == written
        (interrupted / "model.safetensors").write_bytes(b"damaged")
        assert main(again) == 0
        assert (interrupted / "model.safetensors").read_bytes() == weights

    @pytest.mark.slow
    def test_other_settings_are_refused_also_when_the_run_is_complete(self, command, tmp_path, text_file, capsys):
        assert main(command(resume="auto")) == 0
        text = text_file.read_bytes()
        (tmp_path / "text.txt").write_bytes(text[:-9] + b"X" + text[-8:])  # in the test split alone
        assert main(command(resume="auto", data_path=tmp_path / "text.txt")) == 1
        message = capsys.readouterr().err
        assert "  test_data: " in message and "train_data" not in message and "validation_data" not in message
        assert main(command(resume="auto", max_steps=6, learning_rate=0.1)) == 1
        message = capsys.readouterr().err
        assert re.search(r"learning_rate: 0.\d+ there, 0.1 now", message) and "max_steps: 4 there, 6 now" in message
        longer = command(resume="auto", max_steps=6, learning_rate=0.1, accept_changes="learning_rate max_steps")
        assert main(longer) == 0
        assert [entry["step"] for entry in training_entries(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("how", [{}, {"resume": "auto"}, {"overwrite_output_dir": "true"}], ids=str)
    def test_a_change_of_no_setting_is_refused_at_the_beginning_too(self, command, tmp_path, capsys, how):
        earlier = tmp_path / "run" / "checkpoint-2" / "kept"
        if how == {"overwrite_output_dir": "true"}:
            earlier.parent.mkdir(parents=True)
            earlier.touch()
        assert main(command(**how, accept_changes="learning_rat")) == 1
        message = capsys.readouterr().err
        assert (
            "accept_changes names learning_rat; it takes settings of a run: meant learning_rate?" in message
            and "learning_rate" in message
        )
        left = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "_run.lock"]
        assert left == ([earlier] if earlier.exists() else [])

    def test_a_folder_with_a_foreign_model_is_refused(self, command, tmp_path, capsys):
        build_model(parse_arguments(command()).model).save_pretrained(tmp_path / "run")
        content = (tmp_path / "run" / "model.safetensors").read_bytes()
        assert main(command(resume="auto")) == 1
        assert "is not of this run" in capsys.readouterr().err
        assert (tmp_path / "run" / "model.safetensors").read_bytes() == content

    @pytest.mark.slow
    @pytest.mark.parametrize("failing", ["write_card", "evaluate"])
    def test_what_fails_after_training_leaves_the_weights_and_is_made_up_for(
        self, command, tmp_path, monkeypatch, capsys, failing
    ):
        settings = {"resume": "auto", "save_strategy": "no", "eval_strategy": "no"}
        arguments = command(**settings)
        assert main(command(**settings, output_dir=tmp_path / "whole")) == 0

        def fail(*args, **kwargs):
            raise UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed")

        with monkeypatch.context() as broken:
            broken.setattr(AuxiliaryLossTrainer, failing, fail)
            assert main(arguments) == 1
        message = capsys.readouterr().err
        assert "the trained model is whole in" in message and "surrogates not allowed" in message
        weights = (tmp_path / "run" / "model.safetensors").read_bytes()
        assert weights == (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert main(arguments) == 0
        assert "is in" in capsys.readouterr().out
        for name in ("metrics.json", "README.md", "loss_terms.png"):
            assert (tmp_path / "run" / name).exists()
        results = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("run", "whole")]
        assert results[0]["eval_bpc"] == results[1]["eval_bpc"]

    @pytest.mark.slow
    def test_a_second_run_is_refused_while_the_first_lives(self, command, tmp_path, capsys):
        hold = "import sys\nfrom charformer_training.locks import run_lock\nwith run_lock(sys.argv[1]):\n  print(flush=True); input()"
        words = [sys.executable, "-c", hold, str(tmp_path / "run")]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stdout is not None and first.stdout.readline() == b"\n"
            assert main(command(resume="auto")) == 1
            assert (
                f"another run is at work in output_dir {tmp_path / 'run'} (process {first.pid}"
                in capsys.readouterr().err
            )
            first.kill()
        assert main(command(resume="auto")) == 0


class TestRecord:
    @pytest.mark.slow
    def test_the_recipe_in_the_folder_is_the_run(self, command, tmp_path):
        words = command(max_steps=3, term_weights='{"layer_1":0.5}', hub_token="hf_secret", learning_rate="0.003")
        assert main(words) == 0
        recipe, commands = tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "command.txt"
        assert "hf_secret" not in recipe.read_text() + commands.read_text()
        assert "charformer-train" in commands.read_text() and "--learning_rate 0.003" in commands.read_text()
        arguments = parse_arguments([str(recipe)])
        expected = effective_recipe(parse_arguments(words)) | {"ddp_find_unused_parameters": True}  # by the Trainer
        assert effective_recipe(arguments) == expected
        assert main([str(recipe), "--output_dir", str(tmp_path / "again")]) == 0
        one, other = (tmp_path / name / "model.safetensors" for name in ("run", "again"))
        assert one.read_bytes() == other.read_bytes()

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_every_recipe_comes_back(self, command, tmp_path, recipe):
        arguments = parse_arguments(command(str(CONFIGS / recipe)))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(effective_recipe(arguments)), encoding="utf-8")
        assert effective_recipe(parse_arguments([str(path)])) == effective_recipe(arguments)

    @pytest.mark.parametrize(
        "words",
        [["--hub_token", "SECRET"], ["--hub_token=SECRET"], ["--hub-token", "SECRET"], ["--hub_tokn", "SECRET"]],
    )
    def test_secrets_are_blotted_out(self, words):
        shown = without_secrets(["charformer-train", *words, "--max_steps", "3"])
        assert "SECRET" not in " ".join(shown) and shown[-2:] == ["--max_steps", "3"]


@pytest.mark.slow
def test_samples_hold_each_step_once_and_links_are_not_followed(command, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    for name in ("samples.jsonl", "recipe.yaml", "metrics.json", "README.md"):
        (tmp_path / "run" / name).symlink_to(precious)
    assert main(command()) == 0
    assert precious.read_text() == "mine"
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 4]


@pytest.mark.slow
def test_ctrl_c_leaves_whole_checkpoints_and_says_how_to_go_on(command, tmp_path):
    arguments = command(max_steps=100_000, save_steps=20, logging_steps=20, eval_steps=100_000, save_total_limit=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "charformer_training.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # Where the tests themselves run in the background, the signal would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder = tmp_path / "run"
    with process:
        try:
            deadline = time.monotonic() + 120
            while not list(folder.glob("checkpoint-*/trainer_state.json")):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in errors and "The same command with --resume auto" in errors
    assert not (folder / "model.safetensors").exists()
    checkpoints = list(folder.glob("checkpoint-*"))
    assert checkpoints and not any(inspect(checkpoint).faults for checkpoint in checkpoints)
    assert main([*command(max_steps=3, eval_steps=100_000, save_steps=20), "--overwrite_output_dir"]) == 0
