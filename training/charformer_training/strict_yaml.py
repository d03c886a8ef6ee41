"""A strict YAML reader for recipes: no key twice, no aliases, and one clear error."""

import re
from typing import Any

import yaml

from .terminal import one_line


MAX_LENGTH = 1_000_000


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, and aliases, with which a few lines can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name) is not accepted; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "a merge (<<) is not accepted; write its fields out", key_node.start_mark
                )
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _QuotingDumper(yaml.SafeDumper):
    """Quotes each text that `_StrictLoader` would read as a number."""


def _decimal(loader: _StrictLoader, node: Any) -> int:
    """A whole number as people read it: YAML 1.1 has 010 for 8 and 12:30 for 750."""
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", loader.construct_scalar(node)):
        raise yaml.constructor.ConstructorError(
            None, None, "a whole number must be decimal and not begin with 0; text needs quotes", node.start_mark
        )
    return int(loader.construct_yaml_int(node))


def _number(loader: _StrictLoader, node: Any) -> float:
    """A decimal number. 1:30.5, which is 90.5 in YAML 1.1, is refused."""
    if ":" in loader.construct_scalar(node):
        raise yaml.constructor.ConstructorError(
            None, None, "a number must be decimal; text needs quotes", node.start_mark
        )
    return float(loader.construct_yaml_float(node))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _decimal)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _number)
# YAML 1.1 takes 1e-3 for text; people mean a number. So such a text is written in quotes.
_EXPONENT = "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("+-.0123456789")
_StrictLoader.add_implicit_resolver(*_EXPONENT)
_QuotingDumper.add_implicit_resolver(*_EXPONENT)


def write_yaml(mapping: dict[str, Any]) -> str:
    """YAML that `read_yaml` reads back, with the keys in their order."""
    return str(yaml.dump(mapping, Dumper=_QuotingDumper, sort_keys=False))


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML or JSON; errors call the text `source`.

    Raises:
        ValueError: If it is not valid, longer than a million characters, holds an alias or gives a key twice. The message
            does not quote the text, which may hold a secret.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{source} has {len(text):,} characters; it must have {MAX_LENGTH:,} or fewer")
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{source} is not valid YAML{place}: {one_line(error.problem or error.context)}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{source} is not valid YAML: {one_line(error.reason)} at character {error.position}"
        ) from error
    except RecursionError:
        raise ValueError(f"{source} is not valid YAML: its brackets are nested too deep") from None
    except Exception as error:  # PyYAML raises errors of many kinds for odd dates and numbers
        raise ValueError(f"{source} is not valid YAML: a value cannot be read ({one_line(error)[:80]})") from error
