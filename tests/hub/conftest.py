"""Fixtures: a Hub on this machine, and programs that talk to it with the real client from processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import CODE_FILES
from tests.hub.loopback import LoopbackHub


PROGRAMS = Path(__file__).parent
WRITE_TOKEN = "hf_write"
AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
PUSH_EXAMPLE, LOAD_EXAMPLE = "../../examples/push_to_hub.py", "../../examples/load_from_hub.py"


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def start(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen]:
    """Starts a program of this folder in an empty folder, with an empty cache; those of strangers without the package."""

    def start(program: str, *arguments: object, token: str | None = WRITE_TOKEN, **changes: str) -> subprocess.Popen:
        package = program not in ("remote_program.py", LOAD_EXAMPLE)
        folder = tmp_path_factory.mktemp("client")
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))
        }
        environment |= hub.environment(folder / "hf", token) | changes
        command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
        if not package:
            # -S leaves out site-packages' .pth files, through which an editable installation puts the package on the path.
            command[1:1] = ["-S"]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
        )

    return start


@pytest.fixture(scope="module")
def run(start: Callable[..., subprocess.Popen]) -> Callable[..., Any]:
    """Runs a program to its end and returns what it printed last."""

    def run(program: str, *arguments: object, **options: Any) -> Any:
        return result(start(program, *arguments, **options))

    return run


def result(process: subprocess.Popen) -> Any:
    """What a program printed last, which must have ended well."""
    shown, errors = process.communicate()
    assert process.returncode == 0, errors[-5000:]
    return json.loads(shown.splitlines()[-1])


@pytest.fixture(scope="module")
def fail(start: Callable[..., subprocess.Popen]) -> Callable[..., str]:
    """Runs a program that must fail, and returns what it said."""

    def fail(program: str, *arguments: object, **options: Any) -> str:
        process = start(program, *arguments, **options)
        _, errors = process.communicate()
        assert process.returncode != 0
        return errors

    return fail


def check_repository(files: Mapping[str, bytes]) -> None:
    """That a commit holds all that loading needs, and nothing that must not be there."""
    assert (
        CODE_FILES
        | {"tokenizer_config.json", "config.json", "generation_config.json", "model.safetensors", "README.md"}
        <= files.keys()
    )
    assert json.loads(files["config.json"])["auto_map"].keys() >= AUTO_CLASSES
    assert not [name for name in files if "/" not in name and name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [name for name in files if "training_args" in name]
    assert not [name for name, content in files.items() if WRITE_TOKEN.encode() in content]
    card = files["README.md"].decode()
    assert (
        card.startswith("---\n") and "More Information Needed" not in card and "more information" not in card.lower()
    )


def with_weights(hub: LoopbackHub, repo: str) -> list[str]:
    commits = [commit.oid for commit in hub.commits(repo)]
    return [oid for oid in commits if "model.safetensors" in hub.files(repo, oid)]
