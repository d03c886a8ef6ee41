"""What the site needs beside Sphinx: formulas as MathML, the list of error messages, pages from the READMEs."""

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from docs.errors import all_messages


DOCS = Path(__file__).parent
INCLUDE = re.compile(
    r'^```\{include\} (?P<path>\S+)\n(?::start-after: "(?P<start>.+)"\n)?(?::end-before: "(?P<end>.+)"\n)?```$',
    re.MULTILINE,
)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<path>[^)#\s]+)")
LONG_NAME = re.compile(r'<span class="pre">(?P<name>[^<]{25,})</span>')
BREAKS = re.compile(r"(?<=[_./(=,])(?=[A-Za-z])|(?<=[a-z])(?=[A-Z])")
# Files outside docs/ whose text is a page of the site.
PAGES = {
    "../README.md": "index.md",
    "../benchmarks/results/ablation.md": "results.md",
    "../examples/)": "examples/index.md)",
    "../training/README.md": "training.md",
}


def with_included_files(app: Sphinx, name: str, source: list[str]) -> None:
    """Put the READMEs into the pages that include them, and let each link lead where it does in a repository's files."""
    text = INCLUDE.sub(lambda found: _included(found["path"], found["start"], found["end"]), source[0])
    up = "../" * name.count("/")
    for path, page in PAGES.items():
        text = text.replace(f"]({up}{path}", f"]({up}{page}")
    source[0] = text.replace(" +- ", " ± ")


def _included(path: str, start: str | None, end: str | None) -> str:
    file = DOCS / path
    text = file.read_text(encoding="utf-8").split(end or "\0")[0]
    text = text.split(start, 1)[1] if start else text
    return LINK.sub(lambda found: _from_docs(file.parent, found["path"]), text)


def _from_docs(folder: Path, link: str) -> str:
    relative = os.path.relpath(folder / link, DOCS)
    return relative + "/" * link.endswith("/")


def with_breaks_in_names(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Let long names break between their words, where a column or a phone is narrower than the name."""
    if "body" in context:
        context["body"] = LONG_NAME.sub(
            lambda found: f'<span class="long pre">{BREAKS.sub("<wbr>", found["name"])}</span>', context["body"]
        )


class ErrorMessages(SphinxDirective):
    """Lists the messages of the modules that are named, with their cures.

    `others` stands for all modules that the page has not named before.
    """

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        known = all_messages()
        named = self.env.temp_data.setdefault("modules_of_errors", set())
        asked = self.arguments[0].split()
        modules = [module for module in known if module not in named] if asked == ["others"] else asked
        listed = nodes.bullet_list(classes=["errors"])
        for module in modules:
            if module not in known:
                raise self.error(f"no module {module} raises an error; those that do are {', '.join(known)}")
            named.add(module)
            once = {message.text: message for message in known[module]}  # a text may be raised in several places
            for message in once.values():
                item = nodes.paragraph()
                item += [nodes.strong(text=message.error), nodes.Text(": "), nodes.literal(text=message.text)]
                entry = nodes.list_item("", item)
                if message.cure is not None:
                    cure, _ = self.parse_inline(message.cure)
                    entry += nodes.paragraph("", "", *cure, classes=["cure"])
                listed += entry
        return [listed]


def inline_formula(self: Any, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def formula(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", with_included_files)
    app.connect("html-page-context", with_breaks_in_names)
    app.add_directive("errors", ErrorMessages)
    # Browsers draw MathML themselves: no script is loaded from elsewhere.
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
