"""How often each head of a language model is right, and how many tokens a pass of drafting by the heads would yield."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_charformer import CharformerForCausalLM
from modeling_charformer.auxiliary_losses import IGNORE_INDEX, Targets
from modeling_charformer.loss_settings import LAST_POSITION, LossTerm

from .causal_lm import CausalLMWithLosses
from .models import label_inputs, shifts_labels, unwrap_peft


TOKENS_PER_PASS = "tokens_per_pass"


def has_heads(model: nn.Module) -> bool:
    """Whether `head_accuracies` knows the model: a language model with auxiliary losses."""
    return isinstance(unwrap_peft(model), CharformerForCausalLM | CausalLMWithLosses)


def head_accuracies(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """The share of targets that each head ranks first, and the number of targets that this is the mean of.

    Targets are the text's. A head that reads the tokens between its position and its target reads the text's too.
    `tokens_per_pass` says how many tokens a pass of drafting by the heads of targets 2..K would yield on this text:

        1 + mean over positions t of  sum over k = 2..K of  [targets 2..k at t are all right]

    Only positions with a target `K` steps ahead count there. 1 is the model's own next token.

    Args:
        model: A model that `has_heads`, in evaluation mode, without wrappers that shard it.
        inputs: A batch with labels.

    Returns:
        `accuracy_<term>` for each head, the main one included, and `tokens_per_pass` if there is more than one target.
    """
    base: Any = unwrap_peft(model)
    settings = base.loss_settings
    targets = Targets(label_inputs(base, inputs), settings.num_targets)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    run = torch.ones_like(targets.ahead(1), dtype=torch.bool)
    length_of_run = torch.zeros_like(targets.ahead(1))
    with torch.no_grad():
        for term, predicted in _predictions(base, model, inputs):
            wanted = targets.ahead(term.offset)
            right, counted = predicted == wanted, wanted != IGNORE_INDEX
            found[f"accuracy_{term.name}"] = _mean(right, counted)
            if term.layer == settings.num_layers and term.offset > 1:  # in the order of their offsets
                run = run & right
                length_of_run += run
    if settings.num_targets > 1:
        mean, count = _mean(length_of_run, targets.ahead(settings.num_targets) != IGNORE_INDEX)
        found[TOKENS_PER_PASS] = 1 + mean, count
    return found


def _mean(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    count = counted.sum()
    return (values * counted).sum() / count.clamp(min=1), count


def _predictions(base: Any, model: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[LossTerm, Tensor]]:
    """For each head the ids `(B, S)` that it ranks first."""
    if shifts_labels(base) is not False:  # an encoder-decoder makes its decoder's input from the labels
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
    own = isinstance(base, CharformerForCausalLM)
    more = {"return_final_hidden_state": True} if own else {}
    outputs = model(**inputs, **more, use_cache=False, output_hidden_states=True, return_dict=True)
    terms = [term for term in base.loss_settings.terms if term.name != LAST_POSITION]
    yield terms[0], outputs.logits.argmax(-1)
    state = outputs.final_hidden_state if own else None
    for term in terms[1:]:
        if not own:
            logits = base.logits_of_head(term, outputs)
        elif term.layer < base.loss_settings.num_layers:
            (logits,) = base.classify([term], outputs.hidden_states[term.layer])
        else:
            ahead = term.offset - 1
            logits, state = base.draft(term.offset, state, F.pad(inputs["input_ids"], (0, ahead))[:, ahead:])
        yield term, logits.argmax(-1)
