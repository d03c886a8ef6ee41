"""TorchJD combines the gradients of terms that oppose each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from charformer_training import Split


pytest.importorskip("torchjd")

from charformer_training.gradient_conflicts import ConflictFreeGradients
from charformer_training.term_gradients import body_parameters
from tests.helpers import loss_logs, tiny_trainer


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


class Gradients(TrainerCallback):
    """Keeps the gradients of each step on the body and on the heads."""

    def __init__(self) -> None:
        self.of_body: list[torch.Tensor] = []
        self.of_heads: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        body = {id(weight) for weight in body_parameters(model)}
        for kept, inside in ((self.of_body, True), (self.of_heads, False)):
            found = [
                weight.grad.flatten()
                for weight in model.parameters()
                if weight.grad is not None and (id(weight) in body) is inside
            ]
            kept.append(torch.cat(found).clone())


def run(tmp_path: Path, **settings: Any) -> tuple[Any, Gradients]:
    data = (np.arange(3000) * 7 % 251).astype(np.uint8)
    splits = {"train": Split("train", data[:2000]), "validation": Split("validation", data[2000:])}
    gradients = Gradients()
    model = {"intermediate_schedule": "constant"}
    options: dict[str, Any] = {"max_steps": 2, "max_grad_norm": 0.0} | settings
    trainer = tiny_trainer(str(tmp_path / "run"), splits, model, [gradients], **options)
    trainer.train()
    return trainer, gradients


def test_trainer_combines_gradients_whatever_the_accumulation(tmp_path):
    _, summed = run(tmp_path)
    whole, combined = run(tmp_path, gradient_aggregator="upgrad")
    parts, accumulated = run(
        tmp_path, gradient_aggregator="upgrad", per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    # The heads' gradients are those of the sum; the body's are others, since the terms oppose each other.
    torch.testing.assert_close(combined.of_heads[0], summed.of_heads[0])
    assert not torch.allclose(combined.of_body[0], summed.of_body[0], rtol=1e-2)
    torch.testing.assert_close(accumulated.of_body[0], combined.of_body[0], rtol=1e-2, atol=1e-4)
    assert loss_logs(parts)[0]["loss"] == pytest.approx(loss_logs(whole)[0]["loss"])
    assert len(combined.of_body) == 2
