import math
from collections import Counter

import numpy as np
import pytest

from charformer_training import ngrams
from charformer_training.ngrams import ngram_bits_per_byte


def reference_bits(train: bytes, text: bytes, order: int) -> float:
    """Witten-Bell interpolation with dictionaries."""

    def probability(target: int, context: bytes) -> float:
        lower = probability(target, context[1:]) if context else 1 / 256
        followers = Counter(
            train[start + len(context)]
            for start in range(len(train) - len(context))
            if train[start : start + len(context)] == context
        )
        seen, distinct = sum(followers.values()), len(followers)
        return (followers[target] + distinct * lower) / (seen + distinct) if seen else lower

    bits = [-math.log2(probability(text[i], text[max(0, i - order + 1) : i])) for i in range(1, len(text))]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_bits_match_the_reference(order, chunk, monkeypatch):
    monkeypatch.setattr(ngrams, "_CHUNK", chunk)
    train, text = b"abracadabra, a banana and a bandana" * 2, b"a banana, an \xff alabama cab"
    computed = ngram_bits_per_byte(np.frombuffer(train, np.uint8), np.frombuffer(text, np.uint8), order)
    assert computed == pytest.approx(reference_bits(train, text, order))


def test_longer_contexts_predict_better():
    text = np.frombuffer(b"the cat sat on the mat and the rat sat on the cat. " * 20, np.uint8)
    bits = [ngram_bits_per_byte(text, text, order) for order in (1, 2, 3)]
    assert bits == sorted(bits, reverse=True)


def test_order_outside_its_range_raises():
    with pytest.raises(ValueError, match="order is 4"):
        ngram_bits_per_byte(np.zeros(9, np.uint8), np.zeros(9, np.uint8), 4)
