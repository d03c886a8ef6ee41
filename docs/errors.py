"""Every error message of the two packages, read from their source, with what to do where the message does not say it.

python -m docs.errors    # prints them all, by module
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.cures import CURES


ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "modeling_charformer", ROOT / "training" / "charformer_training")


@dataclass(frozen=True)
class Message:
    """A `raise` of the source: the class of the error and its text, with an ellipsis for what is filled in."""

    module: str
    line: int
    error: str
    text: str

    @property
    def cure(self) -> str | None:
        """What to do; `None` where the message says it."""
        return next((cure for part, cure in CURES.get(self.module, {}).items() if part in self.text), None)


def messages(path: Path, functions: dict[str, ast.AST]) -> Iterator[Message]:
    """The messages of the errors that a file makes, raised at once or later, in the order of its lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda found: found.lineno):
        name = _name(call)
        if name in functions or not (name.endswith("Error") or id(call) in raised):
            continue  # a function that makes an error has it on a line of its own
        for text in _texts(call, functions):
            if any(map(str.isalpha, text)):
                yield Message(path.stem, call.lineno, name, " ".join(text.split()))


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).split(".")[-1]


def _texts(call: ast.Call, functions: dict[str, ast.AST]) -> list[str]:
    """The longest argument of an error; if a function composes it, each text that the function can return."""
    for argument in call.args:
        if isinstance(argument, ast.Call) and _name(argument) in functions:
            returned = [node.value for node in ast.walk(functions[_name(argument)]) if isinstance(node, ast.Return)]
            return [_template(value) for value in returned if value is not None]
    inner = [node for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.expr)]
    return [max(map(_template, inner), key=len, default="")]


def _template(node: ast.expr) -> str:
    """The text of an expression, as far as the source has it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    if isinstance(node, ast.IfExp):
        return max(_template(node.body), _template(node.orelse), key=len)
    return "\N{HORIZONTAL ELLIPSIS}"


def all_messages() -> dict[str, list[Message]]:
    """The messages of each module that has any."""
    files = [path for package in PACKAGES for path in sorted(package.glob("*.py"))]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    functions: dict[str, ast.AST] = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    found = {path.stem: list(messages(path, functions)) for path in files}
    return {module: lines for module, lines in found.items() if lines}


if __name__ == "__main__":
    for module, lines in all_messages().items():
        for message in lines:
            print(f"{module}:{message.line}  {message.error}: {message.text}")
            if message.cure:
                print(f"    {message.cure}")
