"""Cross-entropy of a linear classifier over a large vocabulary: values and gradients in one pass, without all logits in memory.

`chunked_cross_entropy_sums` runs a classifier twice, because its backward pass needs the logits again. Here the gradients are
computed piece by piece while the logits are there. Of N rows of width d, over V symbols, this keeps until the backward pass:

- the gradient on the rows, N x d;
- for the gradient on the classifier, the smaller of two: the gradient on the logits, N x V, or its product with the rows, V x d.

The product is a sum over all rows. The weight of each row is known for certain in the backward pass only. The caller
therefore says what it expects, up to a factor that all rows share, like the scale of the loss. If the backward pass
finds other proportions, it runs the classifier again. The gradients are exact in any case. Second derivatives are
refused.

The gradient on the classifier has a node of its own in the graph, `_Entry`. The backward pass runs the node that was
created last among those that are ready. If `_Entry` is created before the model runs, its V x d gradient is formed when
the activations are no longer in memory.

Shapes: N rows, d their width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cross_entropy import IGNORE_INDEX


# A piece has so many logits at most, 128 MiB in float32. In smaller pieces, matrix products read the classifier too often.
MAX_LOGITS = 2**25
# The softmax of a piece takes as much memory again, so it is computed for so many logits at a time.
SOFTMAX_LOGITS = 2**22
# With fewer symbols, running a classifier twice costs less than keeping the gradients.
MIN_VOCABULARY = 4096
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LinearClassifier(NamedTuple):
    """Logits `z = scale * (W h + b)`, or `cap * tanh(z / cap)`."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    entry: "ClassifierEntry | None" = None

    def with_entry(self) -> "LinearClassifier":
        """The same, with the node that computes its gradient, for the first call of `row_cross_entropies`."""
        return self._replace(entry=ClassifierEntry.of(self.weight, self.bias))

    def to(self, dtype: torch.dtype) -> "LinearClassifier":
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)


class _Waiting:
    """The parts of the gradient on a classifier, which one node of the graph hands to another."""

    sums: "_Sums | None" = None
    has_user = False


class ClassifierEntry(NamedTuple):
    """The node of the graph that computes the gradient on a classifier."""

    token: Tensor
    """A scalar that stands for the classifier's parameters in the graph."""
    waiting: _Waiting

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> "ClassifierEntry":
        waiting = _Waiting()
        return cls(cast(Tensor, _Entry.apply(waiting, weight, bias)), waiting)


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, waiting: _Waiting, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.waiting = waiting
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The token has one user, whose backward pass has just set this. It is taken out, so that its tensors are freed.
        sums, ctx.waiting.sums = ctx.waiting.sums, None
        with _without_autocast(gradient.device.type):
            of_weight, of_bias = sums.total()
        return None, of_weight if ctx.needs_input_grad[1] else None, of_bias if ctx.needs_input_grad[2] else None


def linear_classifier(module: Any, scale: float = 1.0, cap: float | None = None) -> LinearClassifier | None:
    """The function that a module, a scale and a cap compute, if `row_cross_entropies` can take its place; else `None`.

    It can take the place of a linear layer with `MIN_VOCABULARY` or more outputs that its parameters alone describe.
    That excludes hooks (those of CPU offloading, or of FSDP 2 on this layer), adapters like LoRA's, parametrizations,
    quantized matrices, and matrices that are split over devices. It never can in a function that torch.compile traces.
    """
    if (
        torch.compiler.is_compiling()
        or getattr(type(module), "forward", None) is not nn.Linear.forward
        or "forward" in vars(module)
        or hasattr(module, "parametrizations")  # its matrix is computed anew each time that it is read
        or any(getattr(module, hooks) for hooks in _HOOKS)
        or module.out_features < MIN_VOCABULARY
    ):
        return None
    for parameter, shape in ((module.weight, (module.out_features, module.in_features)), (module.bias, None)):
        if parameter is None:
            continue
        if type(parameter) not in (Tensor, nn.Parameter) or not parameter.is_floating_point():
            return None
        if shape is not None and parameter.shape != shape:  # DeepSpeed leaves split matrices empty
            return None
    return LinearClassifier(module.weight, module.bias, scale, cap)


def row_cross_entropies(rows: Tensor, classifier: LinearClassifier, targets: Tensor, expected: Tensor) -> Tensor:
    """Cross-entropy `(N,)` in nats, float32, of each row; 0 where the target is -100.

    Args:
        rows: `(N, d)`.
        targets: `(N,)`.
        expected: `(N,)`, the gradient that each of these values is expected to get, up to a factor common to all.
    """
    device = rows.device.type
    if rows.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        rows = rows.to(torch.get_autocast_dtype(device))
    weight, bias, scale, cap, entry = classifier
    if entry is None or entry.waiting.has_user:
        entry = ClassifierEntry.of(weight, bias)
    entry.waiting.has_user = True
    parameters = (weight.detach(), None if bias is None else bias.detach())  # their gradients take the entry
    with _without_autocast(device):
        given = (*entry, *parameters, targets, expected, scale, cap, torch.is_grad_enabled())
        return cast(Tensor, _RowCrossEntropies.apply(rows, *given))


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _RowCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        token: Tensor,
        waiting: _Waiting,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        expected: Tensor,
        scale: float,
        cap: float | None,
        differentiable: bool,
    ) -> Tensor:
        of_rows, of_classifier = (differentiable and needed for needed in ctx.needs_input_grad[:2])
        classifier = LinearClassifier(weight, bias, scale, cap).to(rows.dtype)
        counted = scale * (targets != IGNORE_INDEX)  # 0 for a row without a target
        # At most 1: small numbers, like 1 / N, would be lost in half precision.
        expected = expected * counted / (expected * counted).abs().max().clamp(min=1e-30)
        row_gradient = torch.zeros_like(rows) if of_rows else None
        # For the gradient on the classifier: those on the logits, or their product with the rows.
        ctx.kept, ctx.product, logits = None, None, len(rows) * len(weight)
        keeps = of_classifier and logits <= max(weight.numel(), MAX_LOGITS)
        if of_classifier and not keeps:
            ctx.product = _ClassifierGradient(bias is not None)
        values = []
        for part, value, gradient in _pieces(rows, classifier, targets, logits if keeps else MAX_LOGITS):
            values.append(value)
            if row_gradient is not None:
                row_gradient[part] = (gradient @ classifier.weight) * counted[part, None]
            if ctx.product is not None:
                ctx.product.add(gradient, rows[part], expected[part])
            elif keeps:
                ctx.kept = gradient
            del gradient  # before the next piece is computed
        ctx.waiting, ctx.form = waiting, (scale, cap)
        ctx.save_for_backward(rows, weight, bias, targets, expected, counted, row_gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "auxiliary losses over a large vocabulary have no second derivatives; leave create_graph=True out"
            )
        rows, weight, bias, targets, expected, counted, row_gradient = ctx.saved_tensors
        of_rows, of_classifier = ctx.needs_input_grad[:2]
        # Kept for the first backward pass alone: the node may outlive it, and what it gives away may change.
        (kept, product), ctx.kept, ctx.product = (ctx.kept, ctx.product), None, None
        if of_classifier:
            classifier, rows = LinearClassifier(weight, bias, *ctx.form), rows.detach()
            ctx.waiting.sums = _Sums(classifier, rows, targets, gradient * counted, expected, kept, product)
        on_rows = (row_gradient * gradient[:, None]).to(rows.dtype) if of_rows else None
        return on_rows, weight.new_zeros(()) if of_classifier else None, *[None] * 8


class _Sums(NamedTuple):
    """The parts of the gradient on a classifier, which is a sum over N rows."""

    classifier: LinearClassifier
    rows: Tensor
    targets: Tensor
    on_outputs: Tensor
    expected: Tensor
    kept: Tensor | None
    """The gradient on the logits `(N, V)`."""
    product: "_ClassifierGradient | None"

    def total(self) -> tuple[Tensor, Tensor | None]:
        """The gradients on the matrix and the bias. It may change `product`."""
        weight, bias, *_ = self.classifier
        factor = None if self.product is None else _factor(self.on_outputs, self.expected)
        if self.product is not None and factor is not None:
            found = self.product.times(factor)
        else:
            found = _ClassifierGradient(bias is not None)
            # At most 1, as in the forward pass: large numbers, like a scaled loss, would overflow in half precision.
            largest = self.on_outputs.abs().max().clamp(min=1e-30)
            if self.kept is not None:
                found.add(self.kept, self.rows, self.on_outputs / largest)
            else:
                classifier = self.classifier.to(self.rows.dtype)
                for part, _, piece in _pieces(self.rows, classifier, self.targets, MAX_LOGITS):
                    found.add(piece, self.rows[part], self.on_outputs[part] / largest)
                    del piece
            found = found.times(float(largest))
        of_weight, of_bias = cast(Tensor, found.of_weight), found.of_bias
        return of_weight.to(weight.dtype), None if bias is None or of_bias is None else of_bias.to(bias.dtype)


class _ClassifierGradient:
    """The gradient on a classifier's matrix `(V, d)` and bias `(V,)`: a sum over rows, added up in float32 or more."""

    def __init__(self, has_bias: bool):
        self._has_bias = has_bias
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None

    def add(self, gradient: Tensor, rows: Tensor, counts: Tensor) -> None:
        """Add the part of `rows` `(n, d)`, each counted `counts` `(n,)` times; `gradient` `(n, V)` is that on their outputs."""
        weighted = (rows * counts[:, None]).to(rows.dtype)
        if self.of_weight is None:
            product = gradient.T @ weighted
            self.of_weight = product.to(torch.promote_types(product.dtype, torch.float32))
        elif self.of_weight.dtype == rows.dtype:
            self.of_weight.addmm_(gradient.T, weighted)
        else:
            self.of_weight += gradient.T @ weighted
        if self._has_bias:
            product = (gradient.T @ counts.to(rows.dtype)).to(self.of_weight.dtype)
            self.of_bias = product if self.of_bias is None else self.of_bias + product

    def times(self, factor: float) -> "_ClassifierGradient":
        """Multiply in place; returns itself."""
        for product in (self.of_weight, self.of_bias):
            if product is not None and abs(factor - 1.0) > 1e-6:
                product *= factor
        return self


def _factor(gradient: Tensor, expected: Tensor) -> float | None:
    """The number that turns `expected` `(N,)` into `gradient`, to float rounding; `None` if there is none."""
    factor = (gradient @ expected) / (expected @ expected)
    return float(factor) if torch.allclose(gradient, factor * expected, rtol=1e-5, atol=0.0) else None


def _pieces(
    rows: Tensor, classifier: LinearClassifier, targets: Tensor, max_logits: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of some rows at a time: which they are, their cross-entropies `(n,)`, and the gradient of these before the scale `(n, V)`.

    The gradient of a row without a target is not 0.
    """
    for part in _parts(len(rows), len(classifier.weight), max_logits):
        logits = F.linear(rows[part], classifier.weight, classifier.bias)
        values = [
            _turn_into_gradient(logits[some], classifier, targets[part][some])
            for some in _parts(len(logits), len(classifier.weight), SOFTMAX_LOGITS)
        ]
        yield part, torch.cat(values), logits
        del logits


def _parts(rows: int, vocab_size: int, max_logits: int) -> Iterator[slice]:
    """Equal parts of rows, with `max_logits` logits at most."""
    number = max(1, -(-rows * vocab_size // max_logits))
    size = max(1, -(-rows // number))
    return (slice(start, start + size) for start in range(0, max(1, rows), size))


def _turn_into_gradient(logits: Tensor, classifier: LinearClassifier, targets: Tensor) -> Tensor:
    """The cross-entropies `(n,)` of `logits` `(n, V)`, which then hold the gradient of these."""
    scale, cap, bent = classifier.scale, classifier.cap, None
    outputs = logits.float()
    if scale != 1.0:
        outputs = outputs * scale
    if cap is not None:
        bent = (outputs / cap).tanh_()
        outputs = bent * cap
    log_probabilities = outputs.log_softmax(-1)
    wanted = targets.clamp(min=0)[:, None]
    values = -log_probabilities.gather(1, wanted)[:, 0].masked_fill(targets == IGNORE_INDEX, 0.0)
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, wanted, torch.full_like(values, -1.0)[:, None])
    if bent is not None:
        gradient *= 1 - bent * bent
    logits.copy_(gradient)
    return values
