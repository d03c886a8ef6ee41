"""The commands that README, docs and --help print run as they stand there; training is made small by further options."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from charformer_training import compare, evaluate_cli
from charformer_training import data as data_module
from charformer_training.recipes import parse_arguments
from charformer_training.train import main
from tests.helpers import ROOT, SMALL


PAGES = [ROOT / "README.md", ROOT / "training" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HELP = ROOT / "training" / "charformer_training" / "command_help.py"
COMMAND = re.compile(
    r"(?:^|[`\s])((?:\w+=\S+ +)?(?:\.venv/bin/)?(?:charformer-(?:train|evaluate|compare)|accelerate launch|torchrun --)[ ]?[^`\n]*)",
    re.M,
)


def commands() -> list[str]:
    pages = (page.read_text(encoding="utf-8").replace("$weight", "0.3") for page in (*PAGES, HELP))  # of a loop
    texts = (re.sub(r" \\\n\s*", " ", page) for page in pages)
    found = [match[1] for text in texts for match in COMMAND.finditer(text)]
    # What has words in capitals or brackets shows the form of a command.
    whole = [line.split("  #")[0].strip() for line in found if not re.search(r"\b(MODEL|TEXT|RUN|RECIPE)\b|\[", line)]
    return list(dict.fromkeys(line for line in whole if len(line.split()) > 1 and re.search(r" \S*[/.]\S*", line)))


def small(words: list[str]) -> list[str]:
    """The arguments of charformer-train, and options for what they do not set."""
    settings = SMALL | {"max_position_embeddings": 64, "max_steps": 2, "data_path": "my_text.txt"}
    given = {word.lstrip("-") for word in words if word.startswith("--")} - {"max_steps"}
    if "--max_steps" in words:
        place = words.index("--max_steps")
        words = words[:place] + words[place + 2 :]
    return [
        *words,
        *(word for name, value in settings.items() if name not in given for word in (f"--{name}", str(value))),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder as a reader of the README has it: a text, and what the quick start leaves."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(text_file, folder / "my_text.txt")
    (folder / "training").symlink_to(ROOT / "training")
    quickstart = ["training/configs/quickstart.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(small(quickstart)) == 0
    # Runs that the pages compare or evaluate; those that a command trains are made by it.
    read = [command for command in commands() if re.match(r"\S*charformer-(compare|evaluate)", command)]
    for name in set(re.findall(r"runs/([\w.-]+)", " ".join(read))) - {"quickstart", "comparison.png"}:
        shutil.copytree(folder / "runs" / "quickstart", folder / "runs" / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_printed_command_runs(place, monkeypatch, tmp_path, command, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(data_module, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(data_module, "_standard_library_files", lambda: [Path(re.__file__)])
    words = [word for word in shlex.split(command) if not re.match(r"\w+=", word)]
    program = Path(words[0]).name
    if program in ("torchrun", "accelerate"):
        recipe = words.index("charformer_training.train") + 1
        assert parse_arguments([*words[recipe:], "--use_cpu", "true", "--bf16", "false"])
        if "--config_file" in words:
            assert load_config_from_file(words[words.index("--config_file") + 1]).distributed_type
    elif "--push_to_hub" in words:
        training = parse_arguments(words[1:]).training
        assert training.push_to_hub and training.hub_model_id
    elif program == "charformer-train":
        if "--resume" not in words:  # in a folder where nothing was trained yet
            for name in ("my_text.txt", "training"):
                (tmp_path / name).symlink_to(place / name)
            monkeypatch.chdir(tmp_path)
        assert main(small(words[1:])) == 0
        assert "Load it with:" in (shown := capsys.readouterr().out) or "is complete" in shown
    elif program == "charformer-evaluate":
        assert evaluate_cli.main([*words[1:], *([] if "--max_bytes" in words else ["--max_bytes", "200"])]) == 0
        assert "bits per character" in capsys.readouterr().out
    else:
        assert compare.main(words[1:]) == 0
        assert "steps" in capsys.readouterr().out


def test_the_commands_are_found():
    programs = {Path(word).name for command in commands() for word in command.split()}
    assert {"charformer-train", "charformer-evaluate", "charformer-compare", "torchrun", "accelerate"} <= programs
    assert len(commands()) >= 9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_and_programs_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M))
    assert named <= targets
    programs = re.findall(r"python ((?:[\w.]+/)*\w+\.py)\b", text)
    assert not [program for program in programs if not any((base / program).is_file() for base in (ROOT, page.parent))]
