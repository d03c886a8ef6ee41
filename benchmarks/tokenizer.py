"""The speed of CharformerTokenizer compared with ByT5Tokenizer, on the Python sources of the standard library.

    python benchmarks/tokenizer.py [--output benchmarks/results/tokenizer.json]

The text is one string of 5 MB. ByT5's tokenizer makes a Python string of every byte, so it gets a tenth of the text. The two
take turns, three times each. The figures are medians, in MB of UTF-8 per second.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import transformers
from transformers import ByT5Tokenizer

from charformer_training.arguments import DataArguments
from charformer_training.data import load_corpus
from modeling_charformer import CharformerTokenizer


def speed(function: Callable[[], object], megabytes: float) -> float:
    begin = time.perf_counter()
    function()
    return megabytes / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    text = load_corpus(DataArguments(data_path="python-stdlib"))[:5_000_000].tobytes().decode("utf-8", errors="ignore")
    part = text[: len(text) // 10]
    ours, byt5 = CharformerTokenizer(), ByT5Tokenizer()
    ids, byt5_ids = ours(text)["input_ids"], byt5(part)["input_ids"]
    size, part_size = len(text.encode()) / 1e6, len(part.encode()) / 1e6
    cases: dict[str, tuple[Callable[[], object], float]] = {
        "encode, CharformerTokenizer": (lambda: ours(text), size),
        "encode, ByT5Tokenizer": (lambda: byt5(part), part_size),
        "decode, CharformerTokenizer": (lambda: ours.decode(ids), size),
        "decode, ByT5Tokenizer": (lambda: byt5.decode(byt5_ids), part_size),
    }
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(3):
        for name, (function, megabytes) in cases.items():
            speeds[name].append(speed(function, megabytes))
    results = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
    for name, value in results.items():
        print(f"{name:<30} {value:8.2f} MB/s")
    if arguments.output:
        report = {"unit": "MB/s", "transformers": transformers.__version__, **results}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
