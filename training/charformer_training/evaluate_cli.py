"""`charformer-evaluate MODEL TEXT [--stride s ...] [--field value ...]`: exact bits per character of a text."""

import json
import stat
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import PartialState
from transformers.utils import logging

from .arguments import SHARES, SPLIT_NAMES, DataArguments, EvaluateArguments
from .checks import checked_path
from .command_help import evaluation_help, how_to_begin_evaluating
from .data import Split, load_corpus, split_corpus
from .evaluation import Evaluation, bits_by_position, bits_per_character
from .files import whole_file
from .plots import plot_bits_by_position
from .pretrained import load_language_model, read_config
from .recipes import Parser
from .run_folder import RUN_FILES
from .terminal import USER_ERRORS, one_line, report_error, use_safe_streams


_OF_MODELS = (*RUN_FILES, "config.json", "generation_config.json", "tokenizer_config.json", "trainer_state.json")
USAGE = "charformer-evaluate MODEL TEXT [--stride s ...] [--field value ...]"


def evaluate(model_path: str, text: str, arguments: EvaluateArguments) -> list[Evaluation]:
    """Evaluate at each stride and print a table; write a JSON file and a figure if `arguments` name them.

    Raises:
        ValueError: If an argument is not accepted, the model is no language model, or the text is too short.
        OSError: If the model or the text does not exist, or a result cannot be written.
    """
    check_places(arguments)
    _check_nothing_lost(model_path, text, arguments)
    processes = PartialState(cpu=arguments.device == "cpu")
    device = _device(arguments.device or str(processes.device))
    _check_windows(arguments, read_config(model_path).max_position_embeddings)
    data_arguments = DataArguments(data_path=text, text_column=arguments.text_column)
    with processes.main_process_first():
        corpus = load_corpus(data_arguments, processes.is_local_main_process, field="TEXT")
    part, data = choose_part(model_path, corpus, arguments)
    data = np.array(
        data[: arguments.max_bytes]
    )  # a memory map would see changes of the file, and crash if it is truncated
    model: Any = load_language_model(model_path, dtype=getattr(torch, arguments.dtype))
    model.to(device)

    results = []
    for stride in arguments.stride:
        state = None if arguments.state_file is None else f"{arguments.state_file}.{stride}"
        results.append(
            bits_per_character(model, data, arguments.window, stride, arguments.batch_size, state_file=state)
        )
    if processes.is_main_process:
        report = {
            "model": one_line(Path(model_path).name) if Path(model_path).exists() else model_path,
            "text": data_arguments.source,
            "split": part,
            "device": str(device),
            "dtype": arguments.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "results": [asdict(result) for result in results],
        }
        try:
            if arguments.output is not None:
                with whole_file(arguments.output) as file:
                    file.write((json.dumps(report, indent=2) + "\n").encode())
        finally:  # neither is lost with the other
            print(table(results, f"{data_arguments.source}, {_in_words(part)}"))
        if arguments.plots is not None:
            curves = bits_by_position(model, data, arguments.window, arguments.batch_size)
            plot_bits_by_position(curves, Path(arguments.plots))
            print(f"Bits by position and layer: {one_line(arguments.plots)}")
    return results


def check_places(arguments: EvaluateArguments) -> None:
    """Check that all results can be written, before hours of work.

    Raises:
        OSError: If a path is a folder, a device or a link to a device, or its folder is not writable.
        ValueError: If a picture's name has an unknown ending.
    """
    for name in ("output", "plots", "state_file"):
        if getattr(arguments, name) is None:
            continue
        path = checked_path(name, getattr(arguments, name))
        shown = one_line(path)
        if path.is_dir():
            raise IsADirectoryError(f"{name}: {shown} is a folder; give a file in it")
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise OSError(f"{name}: {shown} is a device or a pipe; give a regular file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{name}: the folder of {shown} cannot be made: {error.strerror}") from error
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise OSError(f"{name}: the folder of {shown} cannot be written to: {error.strerror}") from error
        if name == "plots" and path.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"plots: {shown} does not end in .png, .pdf or .svg, the pictures that are drawn")


def _check_nothing_lost(model_path: str, text: str, arguments: EvaluateArguments) -> None:
    """Refuse an output file that would replace another output, the text, or a file of the model."""
    places: dict[Path, str] = {_resolved("TEXT", text): "TEXT"}
    for file in Path(model_path).expanduser().rglob("*"):
        if file.suffix in (".bin", ".pt", ".pth", ".py", ".safetensors") or file.name in _OF_MODELS:
            places[file.resolve()] = "a file of MODEL"
    for name in ("output", "plots", "state_file"):
        given = getattr(arguments, name)
        path = _resolved(name, given) if given is not None else None
        if path in places:
            raise ValueError(f"{name} is {one_line(given)}, which is {places[path]}; give another file")
        if path is not None:
            places[path] = name


def _resolved(name: str, given: str) -> Path:
    try:
        return Path(given).expanduser().resolve()
    except (OSError, RuntimeError):  # the second before Python 3.13
        raise ValueError(f"{name} is {one_line(given)}, a link that leads to itself; give a file") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds shapes without values")
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = one_line(str(error).split("\n")[0])
        raise ValueError(f"device is {one_line(name)!r}, which is not available or not known: {reason}") from error
    return device


def _check_windows(arguments: EvaluateArguments, limit: int) -> None:
    window = limit if arguments.window is None else arguments.window
    if window > limit:
        raise ValueError(f"window is {window}; it must be 1 to {limit}, the model's max_position_embeddings")
    for stride in arguments.stride:
        if stride > window:
            raise ValueError(f"stride is {stride}; it must be 1 to the window, {window}")


def choose_part(model_path: str, corpus: np.ndarray, arguments: EvaluateArguments) -> tuple[str, np.ndarray]:
    """The name of the part to evaluate, `all` or a split, and its bytes.

    Checksums in the output folder of a run show whether the model was trained on this text. If so, the splits are those
    of the run, and the default is the validation split. For any other text the default is the whole text.
    """
    ends = _ends_in_training(model_path, corpus)
    part = arguments.split or ("all" if ends is None else "validation")
    if part == "all":
        if ends is not None:
            print("Note: the model was trained on a part of this text (--split validation leaves that part out).")
        return part, corpus
    if ends is None or arguments.train_share is not None or arguments.validation_share is not None:
        shares = [
            default if share is None else share
            for share, default in zip((arguments.train_share, arguments.validation_share), SHARES, strict=True)
        ]
        return part, split_corpus(corpus, shares[0], shares[1])[part].data
    start, end = ends[SPLIT_NAMES.index(part)]
    return part, corpus[start:end]


def _ends_in_training(model_path: str, corpus: np.ndarray) -> list[tuple[int, int]] | None:
    """Beginning and end of each split of the run, if the run was trained on `corpus`; else `None`."""
    path = Path(model_path).expanduser() / "metrics.json"
    if not path.is_file():
        return None
    try:
        described = json.loads(path.read_text(encoding="utf-8"))["splits"]
        lengths = [int(described[name][0]) for name in SPLIT_NAMES]
        checksums = [described[name][1] for name in SPLIT_NAMES]
    except (KeyError, IndexError, RecursionError, TypeError, ValueError):
        print(f"Note: {one_line(path)} is damaged, so the text is not compared with the training text.")
        return None
    if sum(lengths) != len(corpus) or min(lengths) < 0:
        return None
    ends = np.cumsum([0, *lengths]).tolist()
    places = list(zip(ends, ends[1:], strict=False))
    found = [Split(name, corpus[start:end]).sha256 for name, (start, end) in zip(SPLIT_NAMES, places, strict=True)]
    return places if found == checksums else None


def _in_words(part: str) -> str:
    return "all of it" if part == "all" else f"the {part} split"


def table(results: Sequence[Evaluation], source: str) -> str:
    """A table of the results at several strides, as text."""
    first = results[0]
    counted = f"{first.counted_bytes:,} bytes"
    if first.counted_characters is None:
        note = [
            "The text is not UTF-8, so its characters cannot be counted: bits per byte only. (iconv -f ENCODING -t UTF-8"
            " converts it.)"
        ]
    else:
        counted, note = f"{counted}, {first.counted_characters:,} characters", []
    lines = [
        f"{source}: {first.bytes:,} bytes, sha256 {first.sha256}",
        f"window {first.window}; all bytes but the first are counted: {counted}",
        *note,
        "",
        "  stride  bits per character         bits per byte          seconds",
    ]
    for result in results:
        error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
        if result.bpc is None:
            characters, of_bytes = f"{'-':>9}{'':<12}", f"{result.bpb:12.4f}{error}"
        else:
            characters, of_bytes = f"{result.bpc:9.4f}{error:<12}", f"{result.bpb:12.4f}"
        lines.append(f"  {result.stride:6}  {characters}  {of_bytes:<24}  {result.seconds:8.1f}")
    return "\n".join(lines)


def parse_arguments(words: Sequence[str]) -> tuple[str, str, EvaluateArguments]:
    """Model, text and settings from the command line.

    Raises:
        ValueError: If an argument is missing or not accepted.
        SystemExit: After `--help`.
    """
    parser = Parser(
        [EvaluateArguments],  # type: ignore[list-item]  # the parser accepts a list, its annotation does not
        prog="charformer-evaluate",
        usage=USAGE,
        allow_abbrev=False,
    )
    parser.format_help = lambda: evaluation_help(USAGE, EvaluateArguments)  # type: ignore[method-assign]  # the help of argparse cannot be configured otherwise
    if "-h" in words or "--help" in words:
        parser.parse(["--help"])
    if len(words) < 2 or any(word.startswith("-") for word in words[:2]):
        raise ValueError(f"give a model and a text first: {USAGE}")
    for name, word in zip(("MODEL", "TEXT"), words, strict=False):
        if not word.strip():
            raise ValueError(f"{name} is empty: {USAGE}")
        checked_path(name, word)
    return words[0], words[1], EvaluateArguments(**parser.parse(words[2:]))


def main(argv: Sequence[str] | None = None) -> int:
    """The console program; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    use_safe_streams()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # a log file holds lines
    if not words:
        print(how_to_begin_evaluating(USAGE), file=sys.stderr)
        return 2
    try:
        evaluate(*parse_arguments(words))
        PartialState().destroy_process_group()  # like charformer-train
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        report_error("charformer-evaluate", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
