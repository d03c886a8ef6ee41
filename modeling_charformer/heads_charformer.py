"""How a Charformer's auxiliary heads are run: in training for the losses, in generation for drafts.

Shapes: B batch, S sequence, V vocabulary, K number of targets.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .auxiliary_heads import UncertaintyWeighting
from .auxiliary_losses import HeadInput, LossStep, Targets, causal_lm_losses, linear_losses, sampled_loss
from .configuration_charformer import CharformerConfig
from .layers_charformer import to_autocast_dtype
from .linear_cross_entropy import LinearClassifier, linear_classifier
from .loss_settings import AuxiliaryLossSettings, LossTerm
from .position_sampling import SampledPositions


def _ahead(states: Tensor, number: int) -> Tensor:
    """`states` `(B, S, hidden_size)` moved so that each position holds the one `number` positions later."""
    # The zeros shifted in at the end do not matter: no target belongs to them.
    return nn.functional.pad(states, (0, 0, 0, number))[:, number:]


class CharformerHeadsMixin:
    """The part of `CharformerForCausalLM` that runs its auxiliary heads."""

    config: CharformerConfig
    loss_settings: AuxiliaryLossSettings
    model: Any
    auxiliary_heads: nn.ModuleDict
    target_blocks: nn.ModuleDict
    loss_uncertainty: UncertaintyWeighting | None

    def losses_of_layer(
        self, step: LossStep, targets: Targets, terms: list[LossTerm], hidden_states: Tensor
    ) -> dict[str, Tensor]:
        """The values, by name, of auxiliary `terms` whose heads read the same `hidden_states` `(B, S, hidden_size)`."""
        if (samples := step.samples(terms, targets)) is not None:
            return {
                term.name: self._loss_of_head(step, targets, term, sample.of(hidden_states), sample)
                for term, sample in samples.items()
            }
        if any(self._classifier(term) is not None for term in terms):
            return {term.name: self._loss_of_head(step, targets, term, hidden_states) for term in terms}
        for term in terms:
            step.record(term, hidden_states)
        return causal_lm_losses(hidden_states, partial(self.classify, terms), terms, targets, self.config.vocab_size)

    def _classifier(self, term: LossTerm) -> LinearClassifier | None:
        return linear_classifier(self.auxiliary_heads[term.name]) if term.positions == "all" else None

    def _loss_of_head(
        self,
        step: LossStep,
        targets: Targets,
        term: LossTerm,
        states: Tensor,
        sample: SampledPositions | None = None,
    ) -> Tensor:
        """The value of an auxiliary term, from the states that its head reads: at all positions, or at those of `sample`."""
        step.record(term, states, sample)
        if (classifier := self._classifier(term)) is not None:
            read = HeadInput(term, self._normed(term, states), sample)
            return linear_losses(classifier, [read], targets, step.expected_weights(self.loss_uncertainty))[term.name]
        classify, vocab_size = partial(self.classify, [term]), self.config.vocab_size
        if sample is not None:
            return sampled_loss(states, classify, term, sample, targets, vocab_size)
        return causal_lm_losses(states, classify, [term], targets, vocab_size)[term.name]

    def _normed(self, term: LossTerm, hidden_states: Tensor) -> Tensor:
        return self.model.norm(hidden_states) if term.layer < self.loss_settings.num_layers else hidden_states

    def add_final_losses(
        self,
        step: LossStep,
        targets: Targets,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Any,
    ) -> None:
        """Add the auxiliary terms of the final layer, whose output after the final norm is `hidden_states`."""
        if not step.final_terms:
            return
        if self._is_sequential and inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        samples = step.samples(step.final_terms, targets)
        if samples is None:
            for terms, head_input in self._final_head_inputs(
                step.final_terms, hidden_states, partial(_ahead, inputs_embeds)
            ):
                step.add(self.losses_of_layer(step, targets, terms, head_input))
            return
        for term, sample in samples.items():
            # The blocks too run on these positions alone.
            [(_, head_input)] = self._final_head_inputs(
                [term], sample.of(hidden_states), partial(sample.of, inputs_embeds)
            )
            step.add({term.name: self._loss_of_head(step, targets, term, head_input, sample)})

    def _final_head_inputs(
        self, terms: list[LossTerm], final_hidden_state: Tensor, embedded: Callable[[int], Tensor]
    ) -> Iterator[tuple[list[LossTerm], Tensor]]:
        """The final layer's `terms`, grouped by the input of their heads, each group with this input `(B, S, hidden_size)`.

        `embedded` returns the embeddings of the characters so many steps ahead, for sequential heads.
        """
        if not self.target_blocks:
            yield terms, final_hidden_state
            return
        by_offset = {term.offset: term for term in terms}
        state = final_hidden_state
        for offset in range(2, max(by_offset) + 1):
            previous = embedded(offset - 1) if self._is_sequential else None
            head_input = self._head_input(offset, state, previous)
            if self._is_sequential:
                state = head_input
            if offset in by_offset:
                yield [by_offset[offset]], head_input

    @property
    def _is_sequential(self) -> bool:
        return self.config.target_heads == "sequential"

    def _head_input(self, offset: int, state: Tensor, previous: Tensor | None) -> Tensor:
        """The input of the head of target `offset`. `previous` embeds the character before the target, if sequential."""
        return self.target_blocks[f"target_{offset}"](state, previous) if self.target_blocks else state

    def draft(self, offset: int, state: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, V)` of the character `offset` (2..K) steps ahead, and the `state` to pass for the next offset.

        Args:
            state: `(B, hidden_size)`. For target 2 a position's `final_hidden_state`, then the state that the last call returned.
            previous: Ids `(B,)` of the characters `offset - 1` steps ahead, known or drafted.
        """
        head_input = self._head_input(
            offset, state, self.model.embed_tokens(previous) if self._is_sequential else None
        )
        return self.auxiliary_heads[f"target_{offset}"](head_input), head_input if self._is_sequential else state

    def classify(self, terms: Sequence[LossTerm], hidden_states: Tensor) -> list[Tensor]:
        """Logits `(..., V)` of the heads of auxiliary `terms`, all of one layer.

        Args:
            terms: At least one.
            hidden_states: The layer's output `(..., hidden_size)`. That of the final layer has passed the final norm.
        """
        hidden_states = to_autocast_dtype(self._normed(terms[0], hidden_states))
        return [self.auxiliary_heads[term.name](hidden_states) for term in terms]
