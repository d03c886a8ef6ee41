"""How a model computes its logits and its loss, found by comparing what it returns."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .probe import Trace, chains, close, looking_at, no_cache, through


@dataclass(frozen=True)
class OwnLoss:
    """How a model computes its own loss."""

    layout: str | None
    """`"shifted"` if the loss is the mean cross-entropy of each position's logits for the next label, `"aligned"` if for the
    label at that position; `None` if it is neither."""
    follows_shift_labels: bool
    """Whether the loss follows `shift_labels`, targets that are shifted already."""
    follows_num_items: bool
    """Whether the loss is divided by `num_items_in_batch`."""


def own_loss_of(model: PreTrainedModel, trace: Trace) -> OwnLoss:
    """Compare the model's loss with the cross-entropy of its logits, on one label that tells two positions apart."""
    logits, inputs = trace.logits[0].float(), trace.inputs
    labels = torch.full(trace.logits.shape[:2], -100, device=logits.device)
    log_probabilities = logits[-2:].log_softmax(-1)
    labels[0, -1] = (log_probabilities[0] - log_probabilities[1]).abs().argmax()
    with looking_at(model):
        loss = _loss(model, {**inputs, "labels": labels})
        values = {"shifted": _cross_entropy(logits[-2], labels), "aligned": _cross_entropy(logits[-1], labels)}
        layout = min(values, key=lambda layout: abs(values[layout] - loss))
        if not _agree(loss, values[layout], trace.logits.dtype):
            return OwnLoss(None, False, False)
        halved = _loss(model, {**inputs, "labels": labels, "num_items_in_batch": 2})
        aligned = torch.full_like(labels, -100)
        aligned[0, 0] = logits[0].argmin()
        followed = _loss(model, {**inputs, "labels": labels, "shift_labels": aligned})
    dtype = trace.logits.dtype
    return OwnLoss(
        layout,
        follows_shift_labels=_agree(followed, _cross_entropy(logits[0], aligned), dtype),
        follows_num_items=_agree(halved, values[layout] / 2, dtype),
    )


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """That of one position's logits `(V,)` for the only label that is not -100."""
    return float(F.cross_entropy(logits, labels[labels != -100].squeeze()))


def _agree(loss: float, expected: float, dtype: torch.dtype) -> bool:
    precision = 1e-4 if dtype in (torch.float32, torch.float64) else 1e-2
    return abs(loss - expected) <= precision * abs(expected)


def _loss(model: PreTrainedModel, inputs: dict[str, Any]) -> float:
    """The model's loss without that of a mixture of experts, or NaN if it does not accept these inputs."""
    try:
        outputs: Any = model(**inputs, **no_cache(model), return_dict=True)
    except Exception:
        return math.nan
    loss = outputs.loss.float()
    if (balance := getattr(outputs, "aux_loss", None)) is not None:
        loss = loss - getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * balance
    return float(loss)


@dataclass(frozen=True)
class LogitsPath:
    """How a language model's last hidden state becomes logits: modules, then `cap * tanh((scale * x + bias) / cap)`."""

    modules: tuple[str, ...] = ()
    """Names of modules; the last one is the output embeddings where the model calls these."""
    scale: float = 1.0
    bias: str | None = None
    """Name of a parameter or buffer of the model."""
    cap: float | None = None

    def logits(self, model: nn.Module, hidden_states: Tensor) -> Tensor:
        """Logits `(..., V)` of hidden states `(..., hidden_size)`."""
        return self.finish(model, through(model, self.modules, hidden_states))

    def finish(self, model: nn.Module, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.bias is not None:
            module, _, name = self.bias.rpartition(".")
            logits = logits + getattr(model.get_submodule(module), name).flatten()
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def logits_path(model: PreTrainedModel, trace: Trace) -> LogitsPath | None:
    """The path from the last hidden state to the logits; `None` if there is none of this form."""
    state, logits = trace.last, trace.logits
    embeddings = model.get_output_embeddings()
    own = next((name for name, module in model.named_modules() if module is embeddings), None)
    found = [names for made, names in chains(trace.calls, state) if names and made.shape == logits.shape]
    # Those that end in the output embeddings come first, since losses can work with their matrix alone; but before them
    # come modules around them that hold a bias of their own, which may be zero now.
    biases = {names: _vectors(model, names, logits.shape[-1]) for names in found}
    most = max(biases.values(), default=0)
    candidates = sorted(found, key=lambda names: (biases[names] < most, names[-1] != own, len(names)))
    if own is not None:
        candidates.append((own,))
    with looking_at(model):
        for names in candidates:
            try:  # as rows, since the losses run the modules on some of the positions
                made = through(model, names, state.flatten(0, 1)).view_as(logits)
            except Exception:  # a module takes further arguments, or mixes positions
                continue
            paths = {path: _error(path.finish(model, made), logits) for path in _finishes(model, names, made, logits)}
            path = min(paths, key=lambda path: paths[path])
            if paths[path] <= 0.02:  # the tolerance is that of half precision
                return path
    return None


def _error(made: Tensor, logits: Tensor) -> float:
    """The largest difference, compared with the largest logit, in steps of the precision of float32."""
    difference = (made.double() - logits.double()).abs().max() / logits.double().abs().max().clamp(min=1e-30)
    return max(1e-6, float(difference))


def _vectors(model: nn.Module, names: tuple[str, ...], length: int) -> int:
    """The number of different vectors of that length among the parameters of modules."""
    found = {id(p) for name in names for p in model.get_submodule(name).parameters() if p.shape == (length,)}
    return len(found)


def _finishes(model: PreTrainedModel, names: tuple[str, ...], made: Tensor, logits: Tensor) -> Iterator[LogitsPath]:
    """Paths by which logits may follow from what the modules made, the simplest first."""
    config = vars(model.config.get_text_config())
    caps = [
        value for name, value in config.items() if "cap" in name and "attn" not in name and "attention" not in name
    ]
    # Of those that fit equally well the first is taken: a cap may do almost nothing to the logits of untrained models.
    for cap in (*(value for value in caps if isinstance(value, int | float) and value > 0), None):
        wanted = logits.double()
        if cap is not None:
            wanted = torch.atanh((wanted / cap).clamp(-1 + 1e-9, 1 - 1e-9)) * cap
        square = float(made.double().square().sum())
        scale = float((made.double() * wanted).sum()) / square if square else 1.0
        yield LogitsPath(names, 1.0 if abs(scale - 1.0) < 1e-4 else scale, None, cap)
    shift = (logits - made)[0, 0]
    if close(made + shift, logits):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.numel() == shift.numel() and close(tensor.flatten(), shift):
                yield LogitsPath(names, 1.0, name)
