"""What travels to a Hub repository stands alone, and nothing of the project depends on where it lies."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import modeling_charformer
from charformer_training.shipped import FOLDERS, shipped_path
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
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == found[1]
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


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make quickstart" in readme and "make test" in readme


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_trees_name_only_files_that_exist(page):
    tree = (ROOT / page).read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    folders: list[str] = []
    for line in tree.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 4
        folders = [*folders[:depth], name]
        path = ROOT.joinpath(*folders)
        assert list(path.parent.glob(path.name)), f"{page} names {path}"


def test_contributing_names_every_file_of_the_packages():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = [*(ROOT / "modeling_charformer").glob("*.py"), *(ROOT / "training/charformer_training").glob("*.py")]
    assert [path.name for path in files if path.name != "__init__.py" and f" {path.name} " not in text] == []


# What an installed package has beside Python files: the table of pyproject.toml, read without tomllib, which 3.10 lacks.
FORCED = dict(
    re.findall(
        r'^"(training/\w+)" = "(charformer_training/\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
)


def test_a_wheel_has_the_folders_that_the_package_looks_for():
    assert FORCED == {f"training/{folder}": f"charformer_training/{folder}" for folder in FOLDERS}
    assert shipped_path("configs/quickstart.yaml").is_file()
    with pytest.raises(FileNotFoundError, match=r"no file 'configs/x.yaml' .*accelerate/fsdp2.yaml"):
        shipped_path("configs/x.yaml")


PROGRAM = """
import evaluate, runpy, sys
from charformer_training.shipped import shipped_path
from charformer_training.train import main

assert "site" in str(shipped_path("accelerate/fsdp2.yaml"))
small = "--max_steps 2 --hidden_size 16 --intermediate_size 32 --max_eval_bytes 300 --sample_length 5 --report_to none"
assert main(["quickstart.yaml", *small.split(), "--data_path", sys.argv[1], "--output_dir", "run", "--use_cpu", "true"]) == 0
metric = evaluate.load(str(shipped_path("bits_per_character")))
print(metric.compute(predictions=["To be"], model_id="run", stride=32)["bpc"])
"""


@pytest.mark.slow
def test_an_installed_package_trains_by_a_recipe_and_measures_without_a_clone(text_file, tmp_path):
    """The files as a wheel lays them out, in a folder where nothing of the repository can be imported."""
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "modeling_charformer", site / "modeling_charformer", ignore=ignored)
    shutil.copytree(ROOT / "training" / "charformer_training", site / "charformer_training", ignore=ignored)
    for source, target in FORCED.items():
        shutil.copytree(ROOT / source, site / target, ignore=ignored)
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), *packages]),
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONWARNINGS": "ignore",
    }
    result = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(text_file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert 5.0 < float(result.stdout.split()[-1]) < 12.0
