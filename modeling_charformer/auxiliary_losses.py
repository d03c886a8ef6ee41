"""The values of the losses of Al-Rfou et al. (2018, arXiv 1808.04444), and the plan of a training step's losses.

With `n` layers, `h_l` the output of layer `l` and a linear head `W_{l,k}` for each layer and target offset `k`:

    CE_{l,k} = mean over positions t of  -log softmax(W_{l,k} h_l[t])[ x_{t+k} ]                (nats)
    loss     = sum over l, k of  weight_{l,k}(p) * CE_{l,k}            p = share of training done, in [0, 1]

`Targets` holds the targets of a language model and the divisor of each sum. `LossStep` holds the active terms, their values
and their weighted sum. Everything else is a function of tensors.
Shapes: B batch, S sequence, V vocabulary, K number of targets.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .auxiliary_heads import UncertaintyWeighting
from .cross_entropy import IGNORE_INDEX as IGNORE_INDEX
from .cross_entropy import chunked_cross_entropy_sums, cross_entropy_sum
from .linear_cross_entropy import LinearClassifier, row_cross_entropies
from .loss_settings import AuxiliaryLossSettings, LossTerm
from .position_sampling import PositionSampler, SampledPositions


def shifted_targets(labels: Tensor, offset: int) -> Tensor:
    """`labels` `(B, S)` moved so that position `t` holds the symbol `offset` steps ahead; -100 where there is none."""
    return F.pad(labels, (0, offset), value=IGNORE_INDEX)[..., offset:]


def last_target_positions(targets: Tensor) -> Tensor:
    """Index `(B, 1)` of the last position of each row of `targets` `(B, S)` that is not -100 (0 in a row of only -100)."""
    positions = torch.arange(targets.shape[-1], device=targets.device)
    return torch.where(targets != IGNORE_INDEX, positions, 0).amax(dim=-1, keepdim=True)


def last_targets(targets: Tensor, documents: Tensor) -> Tensor:
    """`targets` `(B, S)` with all but the last target of each document set to -100. `documents` are numbers `(B, S)`."""
    length, counted = targets.shape[-1], targets != IGNORE_INDEX
    positions = torch.where(counted, torch.arange(length, device=targets.device), length)
    # Of each position, the next one that counts; `length` if there is none.
    following = F.pad(positions[..., 1:], (0, 1), value=length).flip(-1).cummin(-1).values.flip(-1)
    is_last = F.pad(documents, (0, 1), value=-1).gather(-1, following) != documents
    return targets.masked_fill(~(counted & is_last), IGNORE_INDEX)


def packed_documents(inputs: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    """The document number of each position, rising along a row, if the inputs of a model mark packed documents.

    `position_ids` mark a new document where they do not increase by one, `seq_idx` where it changes. Each entry of
    `cu_seq_lens_q`, as for flash attention, marks one, and so does a mask `(B, 1, S, S)` that hides the preceding position.

    Returns:
        `(B, S)`, or `None` if none of these is given. Inputs of other shapes are ignored.
    """
    starts = []
    position_ids, seq_idx, ends, mask = (
        inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q", "attention_mask")
    )
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and position_ids.shape[1] == shape[1]:
        starts.append((position_ids.diff(dim=1) != 1).expand(shape[0], -1))
    if isinstance(seq_idx, Tensor) and seq_idx.shape == shape:
        starts.append(seq_idx.diff(dim=1) != 0)
    if isinstance(ends, Tensor):
        first = torch.zeros(shape.numel() + 1, dtype=torch.bool, device=ends.device)
        starts.append(first.index_fill(0, ends.long(), True)[:-1].view(shape)[:, 1:])
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == (shape[1], shape[1]):
        seen = mask[:, 0].diagonal(offset=-1, dim1=1, dim2=2)
        starts.append((~seen if seen.dtype == torch.bool else seen < -1).expand(shape[0], -1))
    if not starts:
        return None
    return F.pad(torch.stack(starts).any(0).cumsum(-1), (1, 0))


def _numbers(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """The indices of `ids` in the sorted `vocabulary` `(n,)`; -100 for ids that it does not hold."""
    places = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
    return torch.where(vocabulary[places] == ids, places, IGNORE_INDEX)


class Targets:
    """The targets of a language model: for each position of `(B, S)` the symbols that follow it in its document.

    No target lies in another document of a packed row, see `packed_documents`. A single -100 between
    two labels also begins a document, because packing collators mark the beginning that way.

    Args:
        inputs: The model's inputs. `labels` `(B, S)` are shifted here. `shift_labels` `(B, S)` are shifted already and
            replace `labels`. Without either there are no targets.
        num_targets: `K`.
        num_items_in_batch: Number of next symbols in the whole optimizer step, as `transformers.Trainer` counts them.
        target_counts: `(2, K)`, the sum of `counts()` over the whole optimizer step.
        draft_vocabulary: Ids `(n,)` in ascending order, the only ones that heads of targets 2..K predict. Their targets
            are indices in this list; other symbols are no targets.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        num_targets: int,
        num_items_in_batch: Tensor | int | None = None,
        target_counts: Tensor | None = None,
        draft_vocabulary: Tensor | None = None,
    ):
        self.draft_vocabulary = draft_vocabulary
        labels, following = inputs.get("labels"), inputs.get("shift_labels")
        if following is None and labels is not None:
            following = shifted_targets(labels, 1)
        self.given = following is not None
        self.num_targets = num_targets
        self._num_items, self._target_counts = num_items_in_batch, target_counts
        self._ahead: dict[int, Tensor] = {}
        self._denominators: Tensor | None = None
        if following is not None:
            self._ahead[1] = self._following = following
            self.documents = packed_documents(inputs, following.shape)
            if self.documents is not None or num_targets > 1:
                self._borders = self._numbered(inputs.get("attention_mask"))
            if self.documents is not None:
                self._ahead[1] = self._in_document(following, 1)

    def _numbered(self, mask: Any) -> Tensor:
        """The number of the document of each symbol, and of the one after the last, `(B, S + 1)`."""
        following = self._following
        counted = F.pad(following != IGNORE_INDEX, (1, 1))
        lone = counted[:, :-2] & ~counted[:, 1:-1] & counted[:, 2:]
        numbers = F.pad(lone.cumsum(-1), (1, 0))
        if self.documents is not None:
            numbers = numbers + F.pad(self.documents, (0, 1), mode="replicate")
        return numbers

    def _in_document(self, targets: Tensor, offset: int) -> Tensor:
        there = F.pad(self._borders, (0, offset - 1))[:, offset:]
        return targets.masked_fill(self._borders[:, :-1] != there, IGNORE_INDEX)

    def ahead(self, offset: int) -> Tensor:
        """At each position of `(B, S)` the symbol `offset` (1..K) steps ahead; -100 where there is none in its document."""
        if offset not in self._ahead:
            wanted = self._in_document(shifted_targets(self._following, offset - 1), offset)
            self._ahead[offset] = wanted if self.draft_vocabulary is None else _numbers(wanted, self.draft_vocabulary)
        return self._ahead[offset]

    def counts(self) -> Tensor:
        """Numbers `(2, K)` of positions, and of documents with one or more, that have a target 1..K steps ahead.

        A row that is not packed is one document.
        """
        targets = torch.stack([self.ahead(offset) for offset in range(1, self.num_targets + 1)])
        if self.documents is None:
            ends = (targets != IGNORE_INDEX).any(dim=2)
        else:
            ends = last_targets(targets, self.documents.expand_as(targets)) != IGNORE_INDEX
        return torch.stack([(targets != IGNORE_INDEX).sum(dim=(1, 2)), ends.flatten(1).sum(dim=1)])

    @property
    def denominators(self) -> Tensor:
        """The divisors that turn the sum of each term into a mean: `(2, K)` like `counts`, at least 1.

        - By default they are the counts of this batch.
        - With `target_counts` they are the counts of the whole optimizer step, over all its batches and processes. The
          parts then add up to the mean over one big batch.
        - With `num_items_in_batch` alone, the other counts are this batch's, scaled up by its share of the next symbols:
          exact where all rows are alike.
        """
        if self._denominators is None:
            if self._target_counts is not None:
                counts = self._target_counts.to(self._following.device).clamp(min=1)
            else:
                counts = self.counts().clamp(min=1)
                if self._num_items is not None:
                    counts = counts * (self._num_items / counts[0, 0])
            self._denominators = counts
        return self._denominators

    def denominator(self, term: LossTerm) -> Tensor:
        return self.denominators[int(term.positions == "last"), term.offset - 1]

    def share_of_step(self) -> Tensor:
        """The share of the optimizer step's next symbols that this batch holds; 1 if it holds all."""
        return (self.ahead(1) != IGNORE_INDEX).sum() / self.denominators[0, 0]


class LossStep:
    """The losses of one forward pass: which terms are active, their values so far, their weighted sum.

    It lives for one call and holds no parameters. Without labels no term is active, and `breakdown` is empty.

    Args:
        settings: The terms of the model. In evaluation the loss is that of the model's own head.
        labelled: Whether there are labels.
        training: Whether the model is in training mode.
        progress, step: Share of training and number of optimizer steps done, for the schedules. In evaluation with
            `progress`, the auxiliary terms that are active at that point are computed, too, but are not part of the
            loss.
        seed: With `step`, determines the positions of the terms if `settings.position_share` is below 1; see
            `PositionSampler`.
    """

    def __init__(
        self,
        settings: AuxiliaryLossSettings,
        labelled: bool,
        training: bool,
        progress: float | None = None,
        step: int | None = None,
        seed: int | None = None,
    ):
        self.runs_heads = training or progress is not None
        """Whether auxiliary heads with a weight are run, as in training and in evaluations that report their terms."""
        weights: dict[str, float] = {}
        reported: list[str] = []
        if training:
            weights = settings.weights_at(progress, step)
        elif labelled:
            reported = settings.evaluated_at(progress, step) if self.runs_heads else []
            weights = {**settings.evaluation_weights, **dict.fromkeys(reported, 0.0)}
        self.weights = weights if labelled else {}
        # A head whose weight is 0 is not run. The model's own head runs anyway, so its losses are reported.
        self.terms = [
            term
            for term in (settings.terms if self.weights else [])  # generation asks for none, at each character
            if self.weights.get(term.name) or (term.name in self.weights and (term.is_main or term.name in reported))
        ]
        self.values: dict[str, Tensor] = {}
        self.reads: list[HeadInput] = []
        """What the auxiliary heads have read, recorded if they are to be distilled."""
        self.classifiers: dict[str, LinearClassifier] = {}
        """The classifiers of the terms that `linear_losses` can compute; terms with the same matrix share one."""
        self._distillation = settings.distillation if training else 0.0
        self._distilled: list[str] = []
        self._num_layers = settings.num_layers
        self._sampler = PositionSampler(settings, seed, step) if training and settings.position_share < 1 else None

    def samples(self, terms: Sequence[LossTerm], targets: Targets) -> dict[LossTerm, SampledPositions] | None:
        """The positions on which each of the auxiliary `terms` is computed; `None` if they are computed on all."""
        if self._sampler is None:
            return None
        return {term: self._sampler.sample(term, targets.ahead(term.offset)) for term in terms}

    def expected_weights(self, weighting: UncertaintyWeighting | None) -> dict[str, Any]:
        """The weights that `breakdown` will give the terms, without gradients."""
        if weighting is None:
            return dict(self.weights)
        with torch.no_grad():
            return {**self.weights, **weighting(self.weights, [term.name for term in self.terms])[0]}

    @property
    def final_terms(self) -> list[LossTerm]:
        """The active terms of the final layer that need auxiliary heads."""
        return [term for term in self.terms if term.layer == self._num_layers and not term.is_main]

    def on_layer_output(
        self, losses_of: Callable[[list[LossTerm], Tensor], Mapping[str, Tensor]]
    ) -> dict[int, Callable[[Tensor], None]]:
        """Callbacks by intermediate layer number: each computes and adds the layer's active terms from its output."""
        by_layer: dict[int, list[LossTerm]] = {}
        for term in self.terms:
            if term.layer < self._num_layers:
                by_layer.setdefault(term.layer, []).append(term)

        def add(terms: list[LossTerm], hidden_states: Tensor) -> None:
            self.add(losses_of(terms, hidden_states))

        return {layer: partial(add, terms) for layer, terms in by_layer.items()}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the raw values of terms by name."""
        self.values.update(values)

    def record(self, term: LossTerm, states: Tensor, sample: SampledPositions | None = None) -> None:
        """Record what the head of an auxiliary term reads, if it is to be distilled."""
        if self._distillation:
            self.reads.append(HeadInput(term, states, sample))

    def add_distilled(self, term: LossTerm, value: Tensor) -> None:
        """Add the divergence of a term's head from the model's own; its weight follows from the term's."""
        name = f"{term.name}_distillation"
        self.values[name], self.weights[name] = value, self._distillation * self.weights[term.name]
        self._distilled.append(name)

    def add_main(self, loss_of: Callable[[LossTerm], Tensor]) -> None:
        """Add the terms of the model's own head. A term of weight 0 is only reported and gets no gradient."""
        for term in self.terms:
            if term.is_main:
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights[term.name] > 0):
                    self.values[term.name] = loss_of(term)

    def breakdown(
        self, weighting: UncertaintyWeighting | None, share_of_step: Callable[[], Tensor | float]
    ) -> dict[str, Any]:
        """`loss`, the weighted sum of the terms, with their values in `loss_dict` and their weights in `loss_weights`.

        Learned weighting adds the term `uncertainty`, which keeps the weights from going to 0. `share_of_step` returns the
        part of the optimizer step that this batch makes up; scaled by it, `uncertainty` adds up over the batches of a
        step like the other terms.
        """
        if not self.terms:
            return {"loss": None, "loss_dict": None, "loss_weights": None}
        names = [*(term.name for term in self.terms), *self._distilled]
        losses = {name: self.values[name] for name in names if name in self.values}
        weights: dict[str, Any] = {name: self.weights[name] for name in losses}
        if weighting is not None:
            weights, uncertainty = weighting(weights, list(losses))
            losses["uncertainty"], weights["uncertainty"] = uncertainty * share_of_step(), 1.0
        summands = [weight * losses[name] for name, weight in weights.items() if isinstance(weight, Tensor) or weight]
        detached = {
            name: weight.detach() if isinstance(weight, Tensor) else weight for name, weight in weights.items()
        }
        return {"loss": torch.stack(summands).sum(), "loss_dict": losses, "loss_weights": detached}


def causal_lm_losses(
    head_input: Tensor,
    heads: Callable[[Tensor], Sequence[Tensor]],
    terms: Sequence[LossTerm],
    targets: Targets,
    vocab_size: int,
) -> dict[str, Tensor]:
    """The raw, unweighted value in nats of each of `terms`, as float32 scalars by name. Their heads share one input.

    Args:
        head_input: The input of the heads, `(B, S, hidden_size)`.
        heads: Maps `(..., hidden_size)` to the logits `(..., V)` of the head of each of `terms`; deterministic.
        terms: The terms to compute, at least one, with different offsets and the same `positions`.
        targets: The targets of the batch.
        vocab_size: `V`.
    """
    wanted = torch.stack([targets.ahead(term.offset) for term in terms])
    if terms[0].positions == "last" and targets.documents is not None:
        wanted = last_targets(wanted, targets.documents.expand_as(wanted))
    elif terms[0].positions == "last":
        # One position for each row and term: the heads run on these few alone.
        last = last_target_positions(wanted)  # (T, B, 1)
        head_input = head_input.take_along_dim(last.permute(1, 0, 2), dim=1)
        # Each head's target counts at its own one of the T positions only.
        others = ~torch.eye(len(terms), dtype=torch.bool, device=wanted.device)[:, None]
        wanted = wanted.take_along_dim(last, dim=2).masked_fill(others, IGNORE_INDEX)
    sums = chunked_cross_entropy_sums(head_input, wanted, heads, vocab_size)
    return {term.name: total / targets.denominator(term) for term, total in zip(terms, sums, strict=True)}


def sampled_loss(
    head_input: Tensor,
    head: Callable[[Tensor], Sequence[Tensor]],
    term: LossTerm,
    sample: SampledPositions,
    targets: Targets,
    vocab_size: int,
) -> Tensor:
    """An estimate of the raw value in nats of `term`, a float32 scalar, from the positions of `sample` alone.

    Args:
        head_input: The input of the term's head at these positions, `(B, P, hidden_size)`.
        head: Maps `(..., hidden_size)` to a list of the term's logits `(..., V)`; deterministic.
        targets: The targets of the batch; their number at all positions is the divisor.
        vocab_size: `V`.
    """
    sums = chunked_cross_entropy_sums(head_input, sample.targets[None], head, vocab_size, sample.weights[None])
    return sums[0] / targets.denominator(term)


class HeadInput(NamedTuple):
    """What a term's classifier reads and should predict, at all positions or at those of a sample."""

    term: LossTerm
    states: Tensor
    """`(B, P, hidden_size)`."""
    sample: SampledPositions | None = None


def linear_losses(
    classifier: LinearClassifier, inputs: Sequence[HeadInput], targets: Targets, expected_weights: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The raw values in nats, float32 scalars by name, of terms at all positions that share a linear classifier.

    Args:
        inputs: At least one.
        expected_weights: The weights of the terms in the loss. The results are right with any; the gradient takes longest
            if the loss weighs the terms in other proportions. See `linear_cross_entropy`.
    """
    rows, wanted, counts, expected = [], [], [], []
    for term, states, sample in inputs:
        symbols = (targets.ahead(term.offset) if sample is None else sample.targets).flatten()
        counts.append(torch.ones_like(symbols, dtype=torch.float32) if sample is None else sample.weights.flatten())
        rows.append(states.flatten(0, 1))
        wanted.append(symbols)
        expected.append(counts[-1] * (expected_weights[term.name] / targets.denominator(term)))
    values = row_cross_entropies(torch.cat(rows), classifier, torch.cat(wanted), torch.cat(expected))
    parts = values.split([len(one) for one in wanted])
    return {
        one.term.name: (part * count).sum() / targets.denominator(one.term)
        for one, part, count in zip(inputs, parts, counts, strict=True)
    }


def loss_of_logits(logits: Tensor, term: LossTerm, targets: Targets) -> Tensor:
    """The value in nats of a term, a float32 scalar, from its logits `(B, S, V)`."""
    wanted = targets.ahead(term.offset)
    if term.positions == "last" and targets.documents is not None:
        wanted = last_targets(wanted, targets.documents)
    elif term.positions == "last":
        last = last_target_positions(wanted)
        logits, wanted = logits.take_along_dim(last[..., None], dim=1), wanted.take_along_dim(last, dim=1)
    return cross_entropy_sum(logits, wanted) / targets.denominator(term)


def last_of_text(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The hidden state `(B, hidden_size)` at the last position of each row that the mask `(B, S)` counts as text."""
    if attention_mask is None:
        return hidden_states[:, -1]
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    last = (positions * attention_mask.to(positions.dtype)).argmax(dim=-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The loss of a sequence or token classification model, as Transformers defines it, a float32 scalar.

    The sum over the labels is divided by `num_items_in_batch`, the number of labels in the whole optimizer step, or by
    their number in this batch.

    Args:
        logits: `(..., num_labels)`.
        labels: `(...)` class numbers, -100 for none; or `(..., num_labels)` numbers.
        problem_type: `"single_label_classification"` (cross-entropy), `"multi_label_classification"` (binary
            cross-entropy of each label) or `"regression"` (squared error).
    """
    logits = logits.float()
    count = labels.ne(IGNORE_INDEX).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if problem_type == "regression":
        return F.mse_loss(logits.reshape(labels.shape), labels.float(), reduction="sum") / count
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / count
    return cross_entropy_sum(logits, labels) / count


def sequence_problem_type(given: str | None, num_labels: int, labels: Tensor) -> str:
    """The problem type of a sequence classification model: `given`, or inferred from the labels as Transformers does."""
    if given is not None:
        return given
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
