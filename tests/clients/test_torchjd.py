"""TorchJD combines the gradients of terms that oppose each other."""

import pytest
import torch
from torch import nn


pytest.importorskip("torchjd")

from charformer_training.gradient_conflicts import ConflictFreeGradients


class TwoTerms(nn.Module):
    """Two terms whose gradients on the body are given."""

    def __init__(self, first: list[float], second: list[float]):
        super().__init__()
        self.body = nn.Linear(2, 1, bias=False)
        self.unused = nn.Linear(2, 2)
        self.wanted = first, second

    def terms(self) -> list[torch.Tensor]:
        return [self.body.weight[0] @ torch.tensor(row) for row in self.wanted]


def combined(first: list[float], second: list[float], parts: int = 1) -> torch.Tensor:
    model = TwoTerms(first, second)
    gradients = ConflictFreeGradients(model)
    gradients.begin_step()
    for _ in range(parts):
        one, other = (term / parts for term in model.terms())
        loss = one + other
        gradients.add(loss, [other])
        loss.backward()
    gradients.end_step()
    assert not hasattr(model.body.weight, "jac")
    assert model.body.weight.grad is not None
    return model.body.weight.grad[0]


@pytest.mark.parametrize("parts", [1, 3])
def test_terms_that_agree_are_added_up(parts):
    torch.testing.assert_close(combined([1.0, 0.5], [0.2, 1.0], parts), torch.tensor([1.2, 1.5]))


@pytest.mark.parametrize("parts", [1, 3])
def test_combination_opposes_no_term(parts):
    """By hand: each of the two is projected onto what is orthogonal to the other."""
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert (first + second) @ first < 0  # their sum would oppose the first
    expected = (first - first @ second / 5 * second) + (second - second @ first * first)
    found = combined([1.0, 0.0], [-2.0, 1.0], parts)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert found @ first > -2e-3
    assert found @ second > 0
