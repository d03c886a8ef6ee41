"""`charformer-evaluate MODEL TEXT [--stride s ...] [--field value ...]`: bits per character of a text, exactly."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from transformers import HfArgumentParser

from modeling_charformer import CharformerForCausalLM

from .arguments import DataArguments, EvaluateArguments
from .data import load_corpus, split_corpus
from .evaluation import Evaluation, bits_by_position, bits_per_character
from .plots import plot_bits_by_position


def evaluate(model_path: str, text: str, arguments: EvaluateArguments) -> list[Evaluation]:
    """Evaluate at each stride; prints a table, writes the JSON and the picture that are asked for."""
    processes = PartialState(cpu=arguments.device == "cpu")
    device = arguments.device or str(processes.device)
    model: Any = CharformerForCausalLM.from_pretrained(model_path, dtype=getattr(torch, arguments.dtype))
    model.to(device)
    data_arguments = DataArguments(data_path=text)
    with processes.main_process_first():
        data = load_corpus(data_arguments, write=processes.is_local_main_process)
    if arguments.split != "all":
        data = split_corpus(data, arguments.train_share, arguments.validation_share)[arguments.split].data
    data = data[: arguments.max_bytes]

    results = []
    for stride in arguments.stride:
        state = None if arguments.state_file is None else f"{arguments.state_file}.{stride}"
        results.append(
            bits_per_character(model, data, arguments.window, stride, arguments.batch_size, state_file=state)
        )
    if processes.is_main_process:
        print(_table(results, f"{data_arguments.source}, {arguments.split}"))
        report = {
            "model": Path(model_path).name if Path(model_path).exists() else model_path,
            "text": data_arguments.source,
            "split": arguments.split,
            "device": device,
            "dtype": arguments.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "results": [asdict(result) for result in results],
        }
        if arguments.output is not None:
            _write(Path(arguments.output), json.dumps(report, indent=2) + "\n")
        if arguments.plots is not None:
            plot_bits_by_position(
                bits_by_position(model, data, arguments.window, arguments.batch_size), Path(arguments.plots)
            )
            print(f"Bits by position and layer: {arguments.plots}")
    return results


def _table(results: Sequence[Evaluation], source: str) -> str:
    first = results[0]
    lines = [
        f"{source}: {first.bytes:,} bytes, sha256 {first.sha256}",
        f"window {first.window}; counted are all bytes but the first: {first.counted_bytes:,} bytes,"
        f" {first.counted_characters:,} characters",
        "",
        "  stride  bits per character         bits per byte   seconds",
    ]
    for result in results:
        error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
        lines.append(f"  {result.stride:6}  {result.bpc:9.4f}{error:<12}  {result.bpb:18.4f}  {result.seconds:8.1f}")
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The console program; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        [EvaluateArguments],  # type: ignore[list-item]  # typed for one class
        prog="charformer-evaluate",
        description="Bits per character of a text (a file, a folder, or python-stdlib) under a trained model.",
        usage="charformer-evaluate MODEL TEXT [--stride s ...] [--field value ...]",
        allow_abbrev=False,
    )
    try:
        if len(words) < 2 or any(word.startswith("-") for word in words[:2]):
            if words not in (["-h"], ["--help"]):
                raise ValueError(f"give a model and a text; got {words}. {parser.usage}")
        (arguments,) = parser.parse_args_into_dataclasses(words[2:] or words, look_for_args_file=False)
        evaluate(words[0], words[1], arguments)
        PartialState().destroy_process_group()  # as charformer-train
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"\ncharformer-evaluate: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
