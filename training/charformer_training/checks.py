"""Checks of the type and range of values from recipes and the command line."""

import math
import os
import types
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from .terminal import one_line


_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # of Linux; other systems take less or the same
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def shown(name: str, value: Any) -> str:
    """A value for a message: on one line, not too long, and without secrets."""
    if "token" in name and isinstance(value, str | list | dict):
        return "(hidden)"
    try:
        text = one_line(repr(value))
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked_path(name: str, value: str) -> Path:
    """A path, with the home directory in place of `~`.

    Raises:
        ValueError: If no file can have this name: it is empty, too long or holds a zero byte, or there is no such user.
    """
    if not value.strip():
        raise ValueError(f"{name} is empty; give a path")
    if "\0" in value:
        raise ValueError(f"{name} is {shown('', value)}; a path holds no zero byte")
    longest = max(len(os.fsencode(part)) for part in value.split("/"))
    if longest > _LONGEST_NAME or len(os.fsencode(value)) > _LONGEST_PATH:
        raise ValueError(
            f"{name} is {shown('', value)}, {len(os.fsencode(value)):,} bytes long; a path has {_LONGEST_PATH:,} or fewer,"
            f" and {_LONGEST_NAME} or fewer from one / to the next"
        )
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} is {shown('', value)}; there is no home directory of this user") from None


def check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a recipe's value that is not of the field's type. Nothing is converted.

    Raises:
        ValueError: Names the field, the value and what is accepted.
    """
    if _fits(value, hint):
        return
    accepted = " or ".join(dict.fromkeys(_described(hint)))
    note = ""
    if isinstance(value, bool) and str in _members(hint):
        note = "; YAML reads yes, no, on and off as true and false: put the word in quotes"
    elif isinstance(value, float) and value.is_integer() and int in _members(hint):
        note = f": {int(value)} without a point"
    raise ValueError(f"{name} is {shown(name, value)}; it must be {accepted}{note}")


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; without `str` where an enumeration says which words are accepted."""
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    members = get_args(hint)
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        return tuple(member for member in members if member is not str)
    return members


def _fits(value: Any, hint: Any) -> bool:
    members = _members(hint)
    if len(members) > 1:
        return any(_fits(value, member) for member in members)
    (hint,) = members
    kind = get_origin(hint) or hint
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if kind is Literal:
        return any(value is choice or (isinstance(choice, str) and value == choice) for choice in get_args(hint))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (bool, int, str):
        return type(value) is kind
    if kind in (list, tuple):
        (item, *_) = get_args(hint) or (Any,)
        return isinstance(value, list) and all(_fits(entry, item) for entry in value)
    if kind is dict:
        keys, values = get_args(hint) or (Any, Any)
        return isinstance(value, dict) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [choice.value for choice in kind]
    return False  # objects that no recipe can hold


def _described(hint: Any) -> list[str]:
    words = []
    for member in _members(hint):
        kind = get_origin(member) or member
        if kind is Literal:
            words += [repr(choice) for choice in get_args(member)]
        elif kind in (list, tuple):
            (item, *_) = get_args(member) or (Any,)
            inner = " or ".join(dict.fromkeys(_described(item))).replace("a whole number", "whole numbers")
            words.append(f"a list of {inner.replace('a number', 'numbers')}")
        elif kind is dict:
            words.append("a mapping")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            words.append(f"one of {[choice.value for choice in kind]}")
        else:
            words.append(_NAMES.get(member, "left out"))
    if _NAMES[float] in words and _NAMES[int] in words:
        words.remove(_NAMES[int])
    return sorted(words, key="null".__eq__)


Range = tuple[Callable[[Any], bool], str]
AT_LEAST_0: Range = (lambda value: value >= 0, "0 or more")
AT_LEAST_1: Range = (lambda value: value >= 1, "1 or more")
ABOVE_0: Range = (lambda value: value > 0, "above 0")
SHARE: Range = (lambda value: 0 <= value < 1, "from 0 to below 1")
SEED: Range = (lambda value: 0 <= value < 2**32, "from 0 to 4,294,967,295")
STEPS: Range = (
    lambda value: 0 < value < 1 or (value >= 1 and float(value).is_integer()),
    "a whole number of 1 or more, or a share of all steps, above 0 and below 1",
)
WARMUP: Range = (
    lambda value: 0 <= value < 1 or (value >= 1 and float(value).is_integer()),
    "a whole number of 0 or more, or a share of all steps below 1",
)
# Any number that is not listed here must be finite and 0 or more.
_MOST_WORKERS = max(64, 4 * (os.cpu_count() or 1))
RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "torch_empty_cache_steps",
            "save_total_limit",
            "dataloader_prefetch_factor",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
        ),
        AT_LEAST_1,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("adam_epsilon", "num_train_epochs", "neftune_noise_alpha"), ABOVE_0),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), STEPS),
    "warmup_steps": WARMUP,
    "dataloader_num_workers": (
        lambda value: 0 <= value <= _MOST_WORKERS,
        f"from 0 to {_MOST_WORKERS}, since each is a process",
    ),
    "max_steps": AT_LEAST_1,
}
# Launchers set local_rank; -1 means that there is no launcher.
_UNCHECKED = {"local_rank"}
# Larger steps and counts cannot be stored exactly: floats are exact up to here.
_LARGEST = 2**53


def check_ranges(values: Mapping[str, Any]) -> None:
    """Refuse meaningless numbers: nan and infinity, negative counts, sizes of 0.

    Raises:
        ValueError: Names the field, the value and what is accepted.
    """
    for name, value in values.items():
        if name in _UNCHECKED or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        inside, accepted = RANGES.get(name, AT_LEAST_0)
        if isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"{name} is {shown(name, value)}; it must be {_LARGEST:,} at most")
        if not math.isfinite(value) or not inside(value):
            finite = "" if math.isfinite(value) else "a finite number, "
            raise ValueError(f"{name} is {shown(name, value)}; it must be {finite}{accepted}")
