"""Whether a tree of drafts would pay: the tokens that it and a chain of as many drafts bring, and what they cost.

    python -m benchmarks.tree_drafts runs/drafting [--output benchmarks/results/tree_drafts_cpu.json]

The model is one trained by `charformer-train training/configs/drafting.yaml`. It continues prompts from the validation split
of its text. At places in these texts, drafts are written by its heads: as a chain, and as the tree of the candidates that
are most often right (best first, Li et al. 2024, arXiv 2406.16858, section 4.1). How often a candidate is right is counted
beforehand in other texts, by its rank and by the probability of the first. `speed` is the number of tokens of a pass,
divided by its time: that of the model for so many tokens, plus that of the heads. It is beside a pass without drafts,
without the work around the passes, and for a tree without that of its mask and its cache. All times are medians, taken by turns.
"""

import argparse
import heapq
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.generate import prompts_of
from charformer_training.arguments import DataArguments
from charformer_training.data import load_corpus, split_corpus
from modeling_charformer import CharformerForCausalLM
from modeling_charformer.compatibility import CACHE


DRAFTS = (1, 2, 3, 4, 6, 8, 12, 16)
WIDTH, BINS = 3, 5
STRIDE = 5
"""Drafts are written at each so-manieth place of a text."""

Rates = dict[tuple[int, int], float]
"""How often a candidate is right, by the bin of the first candidate's probability and by its rank."""


class Text:
    """A text that the model wrote after a prompt, with the hidden states and the noise by which it did."""

    def __init__(self, model: CharformerForCausalLM, prompt: Tensor, temperature: float, length: int):
        noise = torch.empty(length, model.config.vocab_size).exponential_().log_().neg_()
        self.noise, self.temperature = noise if temperature else torch.zeros_like(noise), temperature
        self.model, self.begin, ids = model, prompt.shape[1], prompt
        while ids.shape[1] < length:
            logits = model(ids, logits_to_keep=1).logits[0, -1]
            ids = torch.cat([ids, self.scores(logits, ids.shape[1]).argmax()[None, None]], dim=1)
        self.ids = ids[0].tolist()
        self.states = model.get_decoder()(ids).last_hidden_state[0]

    def scores(self, logits: Tensor, place: int) -> Tensor:
        """Log-probabilities `(V,)`, and the noise of the place, in which drafts and text agree."""
        return (logits / (self.temperature or 1)).log_softmax(-1) + self.noise[place]

    def candidates(self, place: int, depth: int, state: Tensor, previous: int) -> tuple[list[int], int, Tensor]:
        """The best tokens for `depth` places after `place`, the bin of the first one's probability, and the next state."""
        logits, state = self.model.draft(depth, state, torch.tensor([previous]))
        best = self.scores(logits[0], place + depth).topk(WIDTH).indices
        probability = float((logits[0] / (self.temperature or 1)).softmax(-1)[best[0]])
        return best.tolist(), min(int(probability * BINS), BINS - 1), state


def places(text: Text, depth: int) -> range:
    return range(text.begin, len(text.ids) - depth - 1, STRIDE)


def rates_of(texts: list[Text], depths: int) -> Rates:
    """Count how often candidates are right that follow right ones."""
    right, of = Counter[tuple[int, int]](), Counter[int]()
    for text in texts:
        for place in places(text, depths):
            state = text.states[place : place + 1]
            for depth in range(2, depths + 1):
                tokens, bin_, state = text.candidates(place, depth, state, text.ids[place + depth - 1])
                of[bin_] += 1
                right.update((bin_, rank) for rank, token in enumerate(tokens) if token == text.ids[place + depth])
    return {(bin_, rank): (right[bin_, rank] + 0.1) / (of[bin_] + 1) for bin_ in range(BINS) for rank in range(WIDTH)}


def accepted(text: Text, place: int, depths: int, rates: Rates, width: int) -> dict[int, tuple[int, int]]:
    """Drafts that are right, and calls of heads, by the number of drafts: those that are most probably right."""
    heap: list[tuple[float, int, int, int, bool, Tensor]] = []
    order, found, best, calls = count(), {}, 0, 0

    def grow(depth: int, state: Tensor, previous: int, chance: float, is_right: bool) -> None:
        tokens, bin_, state = text.candidates(place, depth, state, previous)
        for rank, token in enumerate(tokens[:width]):
            right = is_right and token == text.ids[place + depth]
            heapq.heappush(heap, (-chance * rates[bin_, rank], next(order), depth, token, right, state))

    grow(2, text.states[place : place + 1], text.ids[place + 1], 1.0, True)
    calls += 1
    for number in range(1, max(DRAFTS) + 1):
        if heap:
            chance, _, depth, token, right, state = heapq.heappop(heap)
            best = max(best, depth - 1 if right else 0)
            # The heads run for a draft when one after it may be chosen.
            if number < max(DRAFTS) and depth < depths:
                grow(depth + 1, state, token, -chance, right)
        found[number] = (best, calls)
        calls += bool(heap) and depth < depths
    return {number: found[number] for number in DRAFTS}


def milliseconds(model: CharformerForCausalLM, repeats: int) -> tuple[dict[int, float], float]:
    """The time of a pass by the number of tokens, and of one call of a head."""
    ids = torch.randint(0, model.config.vocab_size, (1, 64 + max(DRAFTS) + 1))
    cache = model(ids[:, :64], use_cache=True)[CACHE]
    cache.activate_past_recording()
    state, last = torch.zeros(1, model.config.hidden_size), torch.tensor([0])

    def one_pass(tokens: int) -> None:
        model(ids[:, 64 : 64 + tokens], use_cache=True, **{CACHE: cache})
        cache.crop(-tokens)

    ways: dict[int, Callable[[], Any]] = {n: lambda n=n: one_pass(n) for n in (1, *(n + 1 for n in DRAFTS))}  # type: ignore[misc]
    ways[0] = lambda: model.draft(2, state, last)
    times: dict[int, list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(repeats), desc="times"):
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            times[way].append(1000 * (time.perf_counter() - begin))
    medians = {way: statistics.median(found) for way, found in times.items()}
    return medians, medians.pop(0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model that drafts")
    parser.add_argument("--text", default="python-stdlib", help="the text that the model was trained on")
    parser.add_argument("--prompts", type=int, default=16, help="one half for counting, one for the result")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = CharformerForCausalLM.from_pretrained(arguments.model).eval()
    corpus = split_corpus(load_corpus(DataArguments(data_path=arguments.text)), 0.9, 0.05)["validation"].data
    prompts, depths = prompts_of(corpus, model, arguments.prompts), model.config.num_targets
    of_pass, of_head = milliseconds(model, arguments.repeats)
    results: dict[str, Any] = {
        "device": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "milliseconds_of_a_pass_by_tokens": {n: round(value, 3) for n, value in sorted(of_pass.items())},
        "milliseconds_of_a_head": round(of_head, 3),
    }
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        window = model.config.max_position_embeddings
        texts = [Text(model, prompt, temperature, window) for prompt in tqdm(prompts, desc=name)]
        rates = rates_of(texts[::2], depths)
        at = [(text, place) for text in texts[1::2] for place in places(text, depths)]
        results[name] = {}
        for shape, width in (("chain", 1), ("tree", WIDTH)):
            found = [accepted(text, place, depths, rates, width) for text, place in tqdm(at, desc=shape)]
            results[name][shape] = {}
            for drafts in DRAFTS:
                right, calls = (statistics.mean(one[drafts][part] for one in found) for part in (0, 1))
                speed = (1 + right) * of_pass[1] / (of_pass[drafts + 1] + calls * of_head)
                row = {"tokens": 1 + right, "calls_of_heads": calls, "speed": speed}
                results[name][shape][drafts] = {key: round(value, 3) for key, value in row.items()}
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
