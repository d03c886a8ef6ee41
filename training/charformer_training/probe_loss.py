"""How a model computes its logits and its loss, found by comparing what it returns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .probe import Trace, chains, close, looking_at, through


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
    """Compare the model's loss with the cross-entropy of its logits, on the label that these make least likely."""
    logits, inputs = trace.logits.float(), trace.inputs
    nothing = torch.full(logits.shape[:2], -100, device=logits.device)
    with looking_at(model):
        for layout, position in (("shifted", -2), ("aligned", -1)):
            labels, expected = nothing.clone(), logits[0, position]
            labels[0, -1] = expected.argmin()
            if not _accepts(model, expected, labels[0, -1], {**inputs, "labels": labels}):
                continue
            halved = _accepts(model, expected, labels[0, -1], {**inputs, "labels": labels, "num_items_in_batch": 2}, 2)
            aligned = nothing.clone()
            aligned[0, 0] = logits[0, 0].argmin()
            given = {**inputs, "labels": labels, "shift_labels": aligned}
            follows = _accepts(model, logits[0, 0], aligned[0, 0], given)
            return OwnLoss(layout, follows, halved)
    return OwnLoss(None, False, False)


def _accepts(model: PreTrainedModel, logits: Tensor, label: Tensor, inputs: dict[str, Any], divisor: int = 1) -> bool:
    try:
        return _agrees(model, logits, label, inputs, divisor)
    except Exception:  # the model does not accept these inputs
        return False


def _agrees(model: PreTrainedModel, logits: Tensor, label: Tensor, inputs: dict[str, Any], divisor: int = 1) -> bool:
    outputs: Any = model(**inputs, return_dict=True)
    loss, expected = outputs.loss.float(), F.cross_entropy(logits, label) / divisor
    if (balance := getattr(outputs, "aux_loss", None)) is not None:  # a mixture of experts adds it to its loss
        loss = loss - getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * balance
    precision = 1e-4 if outputs.logits.dtype in (torch.float32, torch.float64) else 1e-2
    return bool((loss - expected).abs() <= precision * expected.abs())


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
    state, logits = trace.states[-1], trace.logits
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
