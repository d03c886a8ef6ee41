"""How often each head of a language model is right, and how many tokens a pass of drafting by the heads would yield."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from modeling_charformer import CharformerForCausalLM
from modeling_charformer.auxiliary_losses import IGNORE_INDEX, Targets
from modeling_charformer.loss_settings import LAST_POSITION, LossTerm

from .language_models import LanguageModelWithLosses
from .models import label_inputs, shifts_labels, unwrap_peft


TOKENS_PER_PASS = "tokens_per_pass"


def check_head_accuracy(trainer: Trainer) -> None:
    """Refuse `eval_head_accuracy` where heads cannot be run by themselves.

    Raises:
        ValueError: Names the setting and what it does not work with.
    """
    model: Any = trainer.model
    reasons = {
        f"{type(model).__name__}, which is not a language model with auxiliary losses": not isinstance(
            unwrap_peft(model), CharformerForCausalLM | LanguageModelWithLosses
        ),
        "FSDP or DeepSpeed, which shard the heads": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
    }
    for reason, is_so in reasons.items():
        if getattr(trainer.args, "eval_head_accuracy", False) and is_so:
            raise ValueError(f"eval_head_accuracy is true; it does not work with {reason}. Leave it out")


def head_accuracies(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """The share of targets that each head ranks first, and the number of targets that this is the mean of.

    Targets are the text's. A head that reads the tokens between its position and its target reads the text's too.
    `tokens_per_pass` says how many tokens a pass of drafting by the heads of targets 2..K would yield on this text:

        1 + mean over positions t of  sum over k = 2..K of  [targets 2..k at t are all right]

    Only positions with a target `K` steps ahead count there. 1 is the model's own next token.

    Args:
        model: A language model with auxiliary losses, in evaluation mode, without wrappers that shard it.
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
            logits = base.logits_of_head(term, outputs, inputs)
        elif term.layer < base.loss_settings.num_layers:
            (logits,) = base.classify([term], outputs.hidden_states[term.layer])
        else:
            ahead = term.offset - 1
            logits, state = base.draft(term.offset, state, F.pad(inputs["input_ids"], (0, ahead))[:, ahead:])
        yield term, logits.argmax(-1)
