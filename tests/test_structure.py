"""The size of files and functions, and the direction of imports: what CONTRIBUTING asks of the code."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from .helpers import ROOT


MAX_FILE, MAX_FUNCTION = 500, 60
PACKAGES = [ROOT / "modeling_charformer", ROOT / "training/charformer_training"]
SOURCES = sorted(
    path
    for folder in ("modeling_charformer", "training", "benchmarks", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "fixtures" not in path.parts
)


def too_long(source: str) -> list[str]:
    """What of a file is above the limits; a function's docstring does not count."""
    found = [f"{len(source.splitlines())} lines"] if len(source.splitlines()) > MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - len(documentation.splitlines())
            found += [f"{node.name}: {length} lines"] if length > MAX_FUNCTION else []
    return found


def imported(path: Path) -> set[str]:
    """The files of the same package that a file imports, also inside of functions."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {name.name for node in nodes if node.level == 1 and not node.module for name in node.names}
    return names | {node.module for node in nodes if node.level == 1 and node.module}


def test_no_file_and_no_function_is_too_long():
    assert {str(path): found for path in SOURCES if (found := too_long(path.read_text()))} == {}
    assert too_long("\n".join(["def long():", *["    pass"] * 60])) == ["long: 61 lines"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_imports_of_a_package_form_no_circle(package):
    files = [path for path in package.glob("*.py") if path.stem != "__init__"]
    order = list(TopologicalSorter({path.stem: imported(path) for path in files}).static_order())
    assert {path.stem for path in files} <= set(order)


def test_the_model_does_not_import_the_trainer():
    imports = re.compile(r"^\s*(from|import) +charformer_training", re.MULTILINE)
    assert [str(path) for path in PACKAGES[0].glob("*.py") if imports.search(path.read_text())] == []
    assert imports.search("    from charformer_training import files")
