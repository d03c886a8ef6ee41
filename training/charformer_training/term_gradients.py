"""The gradient of each term of a loss on the body of a model: its size, and whether it agrees with the main term's.

For a term `i` with the raw value `L_i` and the parameters `b` of the body, `g_i = dL_i / db`:

    gradient_norm_i   = |g_i|
    gradient_cosine_i = <g_i, g_main> / (|g_i| |g_main|)

A term pulls the body by its weight times `g_i`. Where the cosine is below 0, a small step that lowers the term raises the main one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from modeling_charformer.auxiliary_heads import TRAINING_ONLY

from .loss_terms import LossTerms, loss_dict_of
from .models import unwrap_peft


Batch = Mapping[str, Any]


def term_gradients(
    model: nn.Module,
    terms: Mapping[str, Callable[[Batch], Tensor]],
    batches: Sequence[Batch],
    average: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> dict[str, float]:
    """The norm of each term's gradient on the body, and its cosine to that of the first term.

    Every term runs the model on every batch, forward and backward, with the same random numbers. Two gradients are in
    memory at a time. Afterwards the model, its `.grad` and torch's random numbers are as before.

    Args:
        model: The model without wrappers that synchronize or shard it, or compile it.
        terms: For each term a function that runs the model on a batch, and returns the batch's share of the raw value. Shares
            of all `batches` add up to it.
        batches: The micro-batches of one optimizer step in this process.
        average: Takes the mean of tensors over processes. Shares are then such that the mean is the value.

    Returns:
        `gradient_norm_<name>` for each term, and `gradient_cosine_<name>` for all but the first. A gradient of 0 has no cosine.

    Raises:
        ValueError: If no parameter of the body is trained.
    """
    body = body_parameters(model)
    if not body:
        raise ValueError(
            f"no parameter of the body of {type(model).__name__} is trained, so terms have no gradient there"
        )
    figures: dict[str, Tensor] = {}
    main: list[Tensor] | None = None
    with _left_as_it_was(model):
        for name, term in terms.items():
            gradient = _gradient(term, batches, body)
            if average is not None:
                gradient = average(gradient)
            norm = figures[f"gradient_norm_{name}"] = get_total_norm(gradient)
            if main is None:
                main, main_norm = gradient, norm
            else:
                product = torch.stack([(one * other).sum() for one, other in zip(gradient, main, strict=True)]).sum()
                figures[f"gradient_cosine_{name}"] = product / norm / main_norm
    names, values = [*figures], torch.stack([*figures.values()]).tolist()
    gradients_of_0 = {
        name.replace("norm", "cosine", 1) for name, value in zip(names, values, strict=True) if value == 0
    }
    if values[0] == 0:
        gradients_of_0 |= {name for name in names if name.startswith("gradient_cosine_")}
    return {name: value for name, value in zip(names, values, strict=True) if name not in gradients_of_0}


def _gradient(term: Callable[[Batch], Tensor], batches: Sequence[Batch], body: list[nn.Parameter]) -> list[Tensor]:
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in body]
    with _same_random_numbers(body[0].device), torch.enable_grad():
        for batch in batches:
            value = term(batch)
            if value.requires_grad:
                # Not `backward`, which would add to `.grad`, and start DistributedDataParallel's reduction.
                for sum_, part in zip(total, torch.autograd.grad(value, body, allow_unused=True), strict=True):
                    if part is not None:
                        sum_ += part
    return total


def gradients_in_step(
    model: nn.Module,
    terms: LossTerms,
    batches: Sequence[Batch],
    inputs: Mapping[str, Any],
    share: float,
    average: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> dict[str, float]:
    """`term_gradients` of those terms that have a weight in the present optimizer step.

    Args:
        model: A model with auxiliary losses, without wrappers that synchronize or shard it, or compile it.
        terms: The terms in the training loop, after `begin_step`.
        batches: The step's micro-batches in this process.
        inputs: What the model takes beside each batch.
        share: Factor that makes a value in `loss_dict` the micro-batch's share of the step's.
        average: See `term_gradients`.

    Raises:
        ValueError: If a batch has no labels, so that the model computes no terms.
    """
    settings = terms.settings
    assert settings is not None
    weights = settings.weights_at(terms.progress, terms.step)
    main = next(term.name for term in settings.terms if term.is_main and term.positions == settings.position_loss)
    names = [main, *(term.name for term in settings.terms if not term.is_main and weights[term.name])]

    def outputs_of(name: str, batch: Batch) -> Any:
        with only_term(model, name):
            outputs = model(**batch, **inputs)
        if name not in loss_dict_of(outputs):
            raise ValueError(
                f"the gradient of {name} cannot be measured: the batch has no labels, but {sorted(batch)}"
            )
        return outputs

    def own(name: str) -> Callable[[Batch], Tensor]:
        return lambda batch: loss_dict_of(outputs_of(name, batch))[name] * share

    def added(name: str) -> Callable[[Batch], Tensor]:
        return lambda batch: terms.added_value(name, outputs_of(main, batch), batch) / terms.parts

    values = {name: own(name) for name in names} | {name: added(name) for name in terms.added_names()}
    return term_gradients(model, values, batches, average)


def body_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of a model that are no head's. A matrix that the embedding shares with a head is the body's."""
    base = unwrap_peft(model)
    body = getattr(base, "base_model", base)
    heads: set[int] = set()
    if body is base:  # a model that has no module for its body
        heads = {id(weight) for name, weight in base.named_parameters() if name.startswith(TRAINING_ONLY)}
        output, embedding = (
            getattr(base, name, lambda: None)() for name in ("get_output_embeddings", "get_input_embeddings")
        )
        if output is not None:
            shared = {id(weight) for weight in embedding.parameters()} if embedding is not None else set()
            heads |= {id(weight) for weight in output.parameters()} - shared
    return [weight for weight in body.parameters() if weight.requires_grad and id(weight) not in heads]


@contextlib.contextmanager
def only_term(model: nn.Module, name: str) -> Iterator[None]:
    """Give all terms of a model with auxiliary losses but one the weight 0, so that it computes no other head."""
    base: Any = unwrap_peft(model)
    settings = base.loss_settings
    base.loss_settings = replace(
        settings, term_weights={term.name: float(term.name == name) for term in settings.terms}, distillation=0.0
    )
    try:
        yield
    finally:
        base.loss_settings = settings


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode; in the end restore its mode, and what a forward pass changes in it."""
    was_training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    if not was_training:
        model.train()
    try:
        yield
    finally:
        if not was_training:
            model.eval()
        for buffer, value in buffers:  # running statistics, of batch norms for example
            buffer.copy_(value)


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """At the end set back the random numbers of the CPU and the device."""
    sources: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    states = [source.get_rng_state() for source in sources]
    try:
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set_rng_state(state)
