"""Runs training steps of several models on a fake accelerator, for test_devices.py.

The device knows shapes and dtypes, and refuses to mix its tensors with others' and to read a value. Once made, it would change
what other tests see, so this is a program of its own.
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import backend_registration
from transformers import GPT2Config, GPT2LMHeadModel

from charformer_training import add_auxiliary_losses
from charformer_training.running_means import EvaluationTerms, TrainingTerms
from modeling_charformer import CharformerConfig, CharformerForCausalLM
from modeling_charformer.auxiliary_losses import Targets
from tests.helpers import TINY


DEVICE = "fakegpu"
# The eager mask of Transformers 5.17 copies a number to the device, which the fake one cannot.
EAGER = {"attn_implementation": "eager"} if Version(transformers.__version__) >= Version("5.20") else {}
LOSSES: tuple[dict[str, Any], ...] = (
    EAGER | {"attention_dropout": 0.1, "layer_dropout": 0.2},
    {"num_targets": 4, "target_heads": "residual", "loss_weighting": "uncertainty", "norm_placement": "post"},
    {"num_targets": 4, "target_heads": "sequential", "intermediate_schedule": "random"},
    {"position_loss": "last"},
    {"num_targets": 4, "target_heads": "sequential", "position_share": 0.25},
)
LOSSES_OF_ANY_MODEL: tuple[dict[str, Any], ...] = ({}, {"heads": "own", "position_share": 0.25})


def moved(model: nn.Module) -> Any:
    """The model with its weights on the fake device; `to` cannot exchange a parameter for a fake one."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                module._parameters[name] = done.setdefault(id(parameter), nn.Parameter(weight))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
    return model


def random_ids(end: int = 256) -> torch.Tensor:
    return torch.randint(0, end, (4, 20)).to(DEVICE)


def steps(model: Any, end: int = 256) -> None:
    """Training steps with all inputs of a Trainer, logging, an evaluation, a forward pass for inference."""
    ids = random_ids(end)
    counts = Targets({"labels": ids}, model.loss_settings.num_targets).counts()
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    sums, evaluated = TrainingTerms(), EvaluationTerms()
    padding = torch.ones(4, 20, dtype=torch.long, device=DEVICE)
    packed = torch.arange(10).repeat(2).to(DEVICE).expand(4, -1)
    for more in (
        {"attention_mask": padding},
        {"training_progress": 0.1, "training_step": 3, "target_counts": counts, "num_items_in_batch": counts[0, 0]},
        {"position_ids": packed},
    ):
        outputs = model(**inputs, **more)
        assert outputs.loss.device.type == DEVICE
        assert {value.device.type for value in outputs.loss_dict.values()} == {DEVICE}
        sums.add(1, outputs.loss_dict, 1.0)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
        evaluated.add("loss", outputs.loss, counts[0, 0])
        assert model(ids, use_cache=False, logits_to_keep=1).logits.device.type == DEVICE


def main() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        print("this torch has no devices made in Python")
        return
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.ones(3, device=DEVICE)
        for wrong, error in (
            (lambda: there + torch.ones(3), RuntimeError),
            (lambda: float(there.sum()), DataDependentOutputException),
        ):
            try:
                wrong()
            except error:
                continue
            raise AssertionError("the fake device refuses nothing")
    for settings in LOSSES:
        model = CharformerForCausalLM(CharformerConfig(**(TINY | settings))).train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            steps(moved(model))
    for settings in LOSSES_OF_ANY_MODEL:
        config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, bos_token_id=None, eos_token_id=None)
        any_model = add_auxiliary_losses(GPT2LMHeadModel(config), **settings)  # which runs it
        with FakeTensorMode(allow_non_fake_inputs=True):
            steps(moved(any_model).train(), 50)
    print("stays on its device")


if __name__ == "__main__":
    main()
