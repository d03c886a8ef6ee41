"""The table of private hooks in CONTRIBUTING.md: each is there with its signature, and none is missing from it."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizer, Trainer
from transformers.generation.utils import GenerationMixin
from transformers.utils.hub import PushToHubMixin

import charformer_training
import modeling_charformer
from tests.conftest import ROOT


ROW = re.compile(r"^\| `(\w+)\.(_\w+)(?:\((.*)\))?` \| `([\w.`, ]+)` \| .+ \| ([\d.]+) \|$", re.MULTILINE)
TABLE = ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def is_theirs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformers"


def our_modules() -> list[ModuleType]:
    return [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for package in (modeling_charformer, charformer_training)
        for module in pkgutil.iter_modules(package.__path__)
    ]


@functools.cache
def our_classes() -> set[type]:
    return {
        kind
        for module in our_modules()
        for kind in vars(module).values()
        if inspect.isclass(kind) and kind.__module__ == module.__name__
    }


# Those that ours derive from, and that of a model's generation config.
THEIRS: dict[str, type] = {
    base.__name__: base for kind in our_classes() for base in kind.__mro__ if is_theirs(base)
} | {"GenerationConfig": GenerationConfig}


# Looking up a class's source takes long, and Transformers' are asked for each name.
source = functools.cache(inspect.getsource)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_abc_"))


source = functools.cache(inspect.getsource)  # which parses the whole file


def holds(kind: type, name: str) -> bool:
    """Whether a class has an attribute, or gives one to its instances."""
    if name in vars(kind):
        return True
    return re.search(rf"\bself\.{name}(:.*)? = ", source(kind)) is not None


@functools.cache
def overridden() -> set[tuple[str, str]]:
    found = set()
    for kind in our_classes():
        bases: list[Any] = list(kind.__mro__)
        for place, base in enumerate(bases):
            if not is_theirs(base) and base is not object:
                after = [other for other in bases[place + 1 :] if is_theirs(other)]
                for name in filter(is_private, vars(base)):
                    found |= {(other.__name__, name) for other in after if name in vars(other)}
    return found


@functools.cache
def used() -> set[tuple[str, str]]:
    """Names of private attributes that our code reads or calls without defining them, with those of their classes that hold them."""
    trees = [ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")) for module in our_modules()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)} - ours
    return {(kind.__name__, name) for name in names for kind in THEIRS.values() if holds(kind, name)}


@pytest.mark.parametrize(
    ("owner", "name", "parameters", "where", "since"), TABLE, ids=lambda value: value or "attribute"
)
def test_hook_is_there_as_the_table_has_it(owner, name, parameters, where, since):
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"{owner}.{name} is in Transformers from {since} on")
    assert owner in THEIRS, f"no class of ours derives from {owner} any more"
    assert holds(THEIRS[owner], name), f"Transformers {transformers.__version__} has no {owner}.{name} any more"
    member = inspect.getattr_static(THEIRS[owner], name, None)
    found = ", ".join(list(inspect.signature(member).parameters)[1:]) if inspect.isfunction(member) else ""
    assert found == parameters, f"{owner}.{name} of Transformers {transformers.__version__} takes ({found})"
    files = [f"{module.__name__.partition('.')[2]}.py" for module in our_modules()]
    for file in where.replace("`", "").split(", "):
        assert file in files, f"{file}, which the table names for {name}, is gone"


@pytest.mark.slow
def test_no_hook_is_missing_from_the_table():
    listed = {(owner, name) for owner, name, *_ in TABLE}
    # A name is listed once, with the class that it is taken from.
    names = {name for _, name in listed}
    assert sorted(hook for hook in overridden() | used() if hook[1] not in names) == []
    present = {name for _, name, _, _, since in TABLE if Version(transformers.__version__) >= Version(since)}
    assert sorted(present - {name for _, name in overridden() | used()}) == []
    assert len(listed) == len(names)


def test_the_scan_finds_hooks_of_each_kind():
    assert ("Trainer", "_save") in overridden()
    assert ("GenerationMixin", "_assisted_decoding") in overridden()
    assert ("PreTrainedModel", "_tied_weights_keys") in overridden()
    assert ("Trainer", "_prepare_inputs") in used()
    assert {PreTrainedModel, PreTrainedTokenizer, Trainer, GenerationMixin, PushToHubMixin} <= set(THEIRS.values())
