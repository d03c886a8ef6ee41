"""The cost of exact evaluation at stride 1, in which each byte is predicted from the full window before it, for T12.

    python benchmarks/evaluation.py [--windows 96] [--batch 16] [--repeats 5] [--output benchmarks/results/evaluation_cpu.json]

`bits_per_character` is compared with a naive loop and with a lower bound, both measured in the same run. The naive loop does
one forward pass per byte, one window at a time. The lower bound is the time of a batched forward pass of all positions, times
a share of its floating-point operations: those that the prediction at the last position needs. These are all operations of
the layers before the last; in the last layer, the keys, the values and one position.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from charformer_training import bits_per_character
from modeling_charformer import CharformerConfig, CharformerForCausalLM


def operations(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = CharformerForCausalLM(CharformerConfig()).without_auxiliary_heads().eval()
    window = model.config.max_position_embeddings
    text = np.random.default_rng(0).integers(0, 256, window + arguments.windows, dtype=np.uint8)
    ids = torch.from_numpy(text[:window].astype(np.int64))[None]
    batch = ids.repeat(arguments.batch, 1)
    full = operations(lambda: model(ids, use_cache=False))
    needed = operations(
        lambda: model.lm_head(model.model(ids, use_cache=False, positions_to_keep=1).last_hidden_state)
    )

    def naive() -> None:
        for end in range(window, window + 4):
            one = torch.from_numpy(text[end - window : end].astype(np.int64))[None]
            model(one, use_cache=False).logits[0, -1].log_softmax(-1)

    ways: dict[str, tuple[Callable[[], object], int]] = {
        # The first window, in which all predictions count, is an additional one.
        "ours": (
            lambda: bits_per_character(model, text, batch_size=arguments.batch, progress=False),
            arguments.windows,
        ),
        "batched": (lambda: model(batch, use_cache=False), arguments.batch),
        "naive": (naive, 4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(arguments.repeats + 1)):
        for name, (function, windows) in ways.items():
            begin = time.perf_counter()
            function()
            if number:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - begin) / windows)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = medians["batched"] * needed / full
    results = {
        "shape": f"T12, window {window}, stride 1, batch {arguments.batch}, {arguments.windows} bytes",
        "device": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "operations_needed_share": round(needed / full, 4),
        "time_over_floor": round(medians["ours"] / floor, 3),
        "naive_over_ours": round(medians["naive"] / medians["ours"], 3),
        "milliseconds_per_byte": round(1000 * medians["ours"], 1),
    }
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
