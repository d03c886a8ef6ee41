"""What travels to a Hub repository stands alone, and nothing of the project depends on where it lies."""

import ast
import re
import subprocess
import sys

import pytest

import modeling_charformer
from tests.conftest import ROOT


MODEL_FILES = sorted((ROOT / "modeling_charformer").glob("*.py"))


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_model_files_import_torch_and_transformers_alone(path):
    # huggingface_hub comes with transformers, whose own configurations take `strict` from there.
    allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                # `from .x import y` of this folder: the only form that Transformers follows
                assert node.level == 1 and node.module and (path.parent / f"{node.module}.py").is_file()
            else:
                assert node.module and node.module.split(".")[0] in allowed


def test_model_package_is_flat():
    assert not [
        path for path in (ROOT / "modeling_charformer").iterdir() if path.is_dir() and path.name != "__pycache__"
    ]


def test_versions_agree():
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found and found[1] == modeling_charformer.__version__
    assert f"## {found[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_importing_the_model_needs_no_training_dependency():
    program = (
        "import sys; import modeling_charformer;"
        "print(sorted(set(sys.modules) & {'datasets', 'accelerate', 'matplotlib', 'charformer_training'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stdout)
    assert "charformer_training" not in loaded and "matplotlib" not in loaded and "datasets" not in loaded


def test_card_template_is_found_where_the_package_looks():
    from charformer_training.card import TEMPLATE

    assert TEMPLATE.read_text(encoding="utf-8") == (ROOT / "model_card.md").read_text(encoding="utf-8")


def test_readme_names_the_two_commands_and_only_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make quickstart" in readme and "make test" in readme
    tree = readme.split("## What is where")[1].split("```")[1]
    folders: list[str] = []
    for line in tree.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4
        folders = [*folders[:depth], name]
        path = ROOT.joinpath(*folders)
        assert list(path.parent.glob(path.name)), f"README.md names {path}"
