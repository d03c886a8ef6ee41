"""What the documentation says is there: links, error messages, figures. `make docs` checks the site itself."""

import ast
import re
from pathlib import Path

import pytest

import charformer_training
import modeling_charformer
from docs.cures import CURES
from docs.errors import PACKAGES, all_messages
from docs.figures.draw import PANELS, weights
from modeling_charformer import CharformerConfig
from tests.conftest import ROOT


MARKDOWN = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "training").glob("*.md"))
    if path.name != "model_card.md"
)
# Words by which a message says itself what to do, or what is accepted.
ADVICE = re.compile(
    r"\b(must|give|leave|choose|set|delete|lower|train (on|with|a)|start|install|unpack|merge|use|move|write|put|goes in front|shorten|resume"
    r"|generate them|build a new one|it (needs|takes|has)|needs|may hold|a schedule returns|or (more|less|fewer)"
    r"|from 0 to 1|known schedules|knows|the most|the terms of|layers are|own are|end in|lines, like|text needs quotes"
    r"|gives it|adds? (it|more)|measures the model|begins the run anew|those that do)\b",
    re.IGNORECASE,
)
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The headings of a page, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_page_is_in_the_navigation():
    shown = (ROOT / "docs" / "index.md").read_text() + (ROOT / "docs" / "examples" / "index.md").read_text()
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    missing = [page for page in pages if not re.search(rf"^({page}|{page.name})$", shown, re.MULTILINE)]
    assert set(map(str, missing)) <= {"index"}


@pytest.mark.parametrize("package", [charformer_training, modeling_charformer], ids=lambda package: package.__name__)
def test_the_reference_has_all_that_a_package_exports(package):
    listed = re.findall(r"^.. auto\w+:: (\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(package.__all__) - {"__version__"} <= set(listed)


@pytest.mark.slow
def test_no_error_message_is_missing():
    """Each text that follows a `raise` in the source is in the list that the site shows."""
    shown = [message.text for messages in all_messages().values() for message in messages]
    found = 0
    for path in (path for package in PACKAGES for path in package.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
                longest = max((text for text in texts if isinstance(text, str)), key=len, default="")
                found += 1
                assert any(" ".join(longest.split()) in text for text in shown), f"{path}:{node.lineno}"
    assert found > 200


@pytest.mark.slow
def test_messages_that_functions_compose_are_listed():
    shown = [message.text for messages in all_messages().values() for message in messages]
    assert any(text.startswith("saving") and "failed" in text for text in shown)
    assert any(text.startswith("pushing to") for text in shown)


def test_every_message_has_a_cure():
    """In its own words or in the list of cures, each of which belongs to a message."""
    found = [message for messages in all_messages().values() for message in messages]
    missing = [message for message in found if message.cure is None and not ADVICE.search(message.text)]
    assert not missing, "say in the message what to do, or write a cure into docs/cures.py: " + str(missing)
    for module, cures in CURES.items():
        texts = [message.text for message in found if message.module == module]
        used = {next((part for part in cures if part in text), None) for text in texts}
        assert cures.keys() <= used, f"no message of {module} has these words, or an entry before takes it"
    assert not ADVICE.search("num_heads is …, which is wrong")


@pytest.mark.slow
def test_troubleshooting_names_modules_that_raise_errors_once():
    named = [module for line in re.findall(r"^```\{errors\} (.+)$", PAGE, re.MULTILINE) for module in line.split()]
    assert len(named) == len(set(named)) and named[-1] == "others"
    assert set(named[:-1]) <= all_messages().keys()


def test_figures_show_what_a_model_does():
    assert weights("intermediate_schedule", "paper", 8)["layer_2"] == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert weights("target_schedule", "forward", 8)["target_3"] == [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    terms = {term.name: term for term in CharformerConfig(num_hidden_layers=4).language_model_losses().terms}
    for title, layer, positions, offset in PANELS:
        term = terms[title.split("\n")[0]]
        assert (term.layer, term.offset, term.positions) == (layer, offset, "all" if len(positions) > 1 else "last")
