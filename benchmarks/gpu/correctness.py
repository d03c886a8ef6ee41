"""Whether a model computes on this device what it computes on the CPU, in double precision, bf16, compiled and cached."""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import set_seed

from modeling_charformer import CharformerConfig, CharformerForCausalLM
from modeling_charformer.pretrained_charformer import CharformerPreTrainedModel

from . import trainer_checks
from .report import Report
from .scale import Scale


ROOT = Path(__file__).resolve().parents[2]
LOSSES: dict[str, dict[str, Any]] = {
    "all of the paper's": {},
    "4 targets, sequential": {"num_targets": 4, "target_heads": "sequential"},
    "4 targets, residual": {"num_targets": 4, "target_heads": "residual"},
    "last position": {"position_loss": "last"},
    "learned weights": {"loss_weighting": "uncertainty"},
    "post-norm": {"norm_placement": "post"},
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
FEW_LAYERS = {"num_hidden_layers": 2}
"""Compiling takes seconds for each layer."""
LARGEST_ERRORS = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Relative, by the dtype of the model. Losses are sums in float32 in any case."""


def measure(report: Report, scale: Scale) -> None:
    device = scale.device
    for name, fields in LOSSES.items():
        report.measure(f"losses and gradients: {name}", functools.partial(losses_and_gradients, fields, device))
    report.measure("losses and gradients in bf16", lambda: in_bf16(device))
    report.measure("gradient checkpointing", lambda: checkpointed(device))
    report.measure("attention implementations", lambda: attention_implementations(device))
    report.measure("flash_attention_2", lambda: flash_attention(device))
    report.measure("generation", lambda: generation(device, scale.exact_length))
    for name, check in trainer_checks.CHECKS.items():
        report.measure(name, functools.partial(check, scale))
    if scale.compiler is not None:
        report.measure("compiled training step", functools.partial(compiled, device, scale.compiler))
        report.measure("Trainer, compiled", functools.partial(trainer_checks.compiled, device, scale.compiler))
    report.measure("static cache", lambda: static_cache(device))
    if device != "cpu":  # which takes half a minute to compile it
        report.measure("flex attention", lambda: flex_attention(device))


def measure_tests(report: Report, scale: Scale) -> None:
    if scale.tests:
        report.measure("tests of the project", lambda: tests(scale))


def make_model(dtype: torch.dtype, device: str, **fields: Any) -> CharformerForCausalLM:
    """The same small model in training mode, whatever the device; its text is decided, so that rounding changes none of it."""
    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    sizes |= {"max_position_embeddings": 48, "initializer_range": 0.1, "attention_dropout": 0.0}
    sizes |= {"activation_dropout": 0.0, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
    return CharformerForCausalLM(CharformerConfig(**(sizes | fields))).train().to(device, dtype)


def make_ids(device: str, batch: int = 4, length: int = 48) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def run(model: nn.Module, device: str, **inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a training step by name, as doubles on the CPU."""
    ids = make_ids(device)
    outputs = model(input_ids=ids, labels=ids, use_cache=False, **inputs)
    outputs.loss.backward()
    losses = {"loss": outputs.loss, **outputs.loss_dict}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return _as_doubles(losses), _as_doubles(gradients)


def _as_doubles(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): value.detach().double().cpu() for name, value in values.items()}


def largest_error(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor, or of all if that is much larger.

    Some gradients are 0 but for rounding, such as those of the biases of attention's keys.
    """
    assert values.keys() == expected.keys(), sorted(values.keys() ^ expected.keys())
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(
        float((values[name] - value).abs().max() / value.abs().max().clamp(min=1e-2 * largest))
        for name, value in expected.items()
    )


def checked(what: str, error: float, limit: float) -> float:
    if not error <= limit:
        raise AssertionError(f"{what}: the relative error is {error:.2e}, above {limit:.0e}")
    return error


def losses_and_gradients(fields: dict[str, Any], device: str) -> dict[str, float]:
    expected = run(make_model(torch.float64, "cpu", **fields), "cpu")
    errors = {}
    for dtype, limit in LARGEST_ERRORS.items():
        found = run(make_model(dtype, device, **fields), device)
        for what, values, wanted in zip(("losses", "gradients"), found, expected, strict=True):
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            errors[name] = checked(name, largest_error(values, wanted), limit)
    return errors


def in_bf16(device: str) -> dict[str, float]:
    """Under autocast, and with weights in bf16: the loss, and the direction of the gradient."""
    expected_losses, expected = run(make_model(torch.float64, "cpu"), "cpu")
    figures = {}
    for name, dtype, autocast in (("autocast", torch.float32, True), ("weights", torch.bfloat16, False)):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            losses, gradients = run(make_model(dtype, device), device)
        figures[f"losses, {name}"] = checked(f"losses, {name}", largest_error(losses, expected_losses), 0.02)
        ours = torch.cat([gradients[key].flatten() for key in expected])
        theirs = torch.cat([value.flatten() for value in expected.values()])
        cosine = float(nn.functional.cosine_similarity(ours, theirs, dim=0))
        figures[f"one minus the cosine of the gradients, {name}"] = checked(f"gradients, {name}", 1 - cosine, 0.02)
    return figures


def checkpointed(device: str) -> dict[str, float]:
    expected = run(make_model(torch.float32, device), device)
    model = make_model(torch.float32, device)
    model.gradient_checkpointing_enable()
    found = run(model, device)
    errors = (largest_error(values, wanted) for values, wanted in zip(found, expected, strict=True))
    return {what: checked(what, error, 1e-4) for what, error in zip(("losses", "gradients"), errors, strict=True)}


def compiled(device: str, compiler: str) -> dict[str, float]:
    """In one graph, at the beginning and when no layer has losses any more."""
    errors = {}
    torch._dynamo.reset()
    for progress in (0.0, 0.9):
        expected = run(make_model(torch.float32, device, **FEW_LAYERS), device, training_progress=progress)
        model: Any = make_model(torch.float32, device, **FEW_LAYERS)
        model = torch.compile(model, backend=compiler, fullgraph=True)
        found = run(model, device, training_progress=progress)
        for what, values, wanted in zip(("losses", "gradients"), found, expected, strict=True):
            name = f"{what}, progress {progress}"
            errors[name] = checked(name, largest_error(values, wanted), 1e-3)
    return errors


def attention_implementations(device: str) -> dict[str, Any]:
    """Each kernel of SDPA alone, in bf16, and eager attention beside eager attention in double precision.

    Some kernels do not exist for this device, or not for these sizes.
    """
    figures: dict[str, Any] = {}
    expected = run(make_model(torch.float64, "cpu"), "cpu")

    def error_of(attention: str) -> float:
        model = make_model(torch.bfloat16, device)
        model.set_attn_implementation(attention)
        return largest_error(run(model, device)[0], expected[0])

    figures["eager"] = checked("eager", error_of("eager"), 0.02)
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel([backend]):
                error = error_of("sdpa")
        except RuntimeError as refused:
            figures[name] = f"refused: {str(refused).splitlines()[0]}"
        else:
            figures[name] = checked(f"sdpa, {name}", error, 0.02)
    return figures


def flex_attention(device: str) -> dict[str, float]:
    expected = run(make_model(torch.float32, device, **FEW_LAYERS), device)
    model = make_model(torch.float32, device, **FEW_LAYERS)
    model.set_attn_implementation("flex_attention")
    found = run(model, device)
    return {"losses": checked("losses", largest_error(found[0], expected[0]), 1e-3)}


def flash_attention(device: str) -> dict[str, Any]:
    """Losses, gradients, cached and padded text with flash attention beside SDPA, as if the models declared it."""
    if importlib.util.find_spec("flash_attn") is None:
        return {"installed": False}
    with mock.patch.object(CharformerPreTrainedModel, "_supports_flash_attn", True):
        expected = run(make_model(torch.bfloat16, device), device)
        model = make_model(torch.bfloat16, device)
        model.set_attn_implementation("flash_attention_2")
        found = run(model, device)
        figures: dict[str, Any] = {"installed": True}
        for what, values, wanted in zip(("losses", "gradients"), found, expected, strict=True):
            figures[what] = checked(what, largest_error(values, wanted), 0.05)
        model.eval()
        ids, mask = make_ids(device, 2, 12), torch.ones(2, 12, dtype=torch.long, device=device)
        mask[0, :5] = 0
        with torch.no_grad():
            for name, given in (("plain", None), ("padded", mask)):
                logits = model(ids, attention_mask=given).logits[:, -1]
                model.set_attn_implementation("sdpa")
                wanted = model(ids, attention_mask=given).logits[:, -1]
                model.set_attn_implementation("flash_attention_2")
                figures[name] = checked(name, largest_error({"": logits.float()}, {"": wanted.float()}), 0.05)
    return figures


def generation(device: str, length: int) -> dict[str, Any]:
    """In double precision, so that the text is exact: cached, drafted, by early exit, rolling, padded, all beside the CPU."""
    fields = {"num_targets": 4, "target_heads": "sequential"}
    here, there = (make_model(torch.float64, where, **fields).eval() for where in (device, "cpu"))
    prompt = make_ids("cpu", 1, 8)

    def write(model: CharformerForCausalLM, new: int = length, ids: Tensor = prompt, **settings: Any) -> Tensor:
        settings = {"do_sample": False, **settings}
        return model.generate(ids.to(model.device), max_new_tokens=new, **settings).cpu()

    slow = prompt
    with torch.no_grad():
        for _ in range(length):
            slow = torch.cat([slow, there(slow, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    rolled = write(there, 3 * length, rolling_context=True)
    texts = {
        "cached": (write(here), slow),
        "without a cache": (write(here, use_cache=False), slow),
        "use_extra_targets": (write(here, use_extra_targets=True), slow),
        "assistant_early_exit": (write(here, assistant_early_exit=2), slow),
        "prompt look-up": (write(here, prompt_lookup_num_tokens=4), slow),
        "rolling": (write(here, 3 * length, rolling_context=True), rolled),
        "rolling and drafting": (write(here, 3 * length, rolling_context=True, use_extra_targets=True), rolled),
        "without training heads": (write(here.without_auxiliary_heads()), slow),
        "beams": (write(here, num_beams=3), write(there, num_beams=3)),
    }
    short = make_ids("cpu", 1, 13)[:, 5:]
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), make_ids("cpu", 1, 13)])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    both = write(here, 20, padded, attention_mask=mask.to(device), pad_token_id=0)
    texts["padded"] = (both[:1, 5:], write(there, 20, short))
    wrong = [name for name, (text, wanted) in texts.items() if not text.equal(wanted)]
    if wrong:
        raise AssertionError(f"other text than on the CPU: {wrong}")
    set_seed(0)
    sampled = write(here, do_sample=True, use_extra_targets=True)
    return {"same text": sorted(texts), "sampled, characters": sampled.shape[1] - prompt.shape[1]}


def static_cache(device: str) -> dict[str, Any]:
    """On a GPU `generate` compiles the model for it."""
    model, prompt = make_model(torch.float32, device, **FEW_LAYERS).eval(), make_ids(device, 1, 8)
    dynamic = model.generate(prompt, max_new_tokens=30, do_sample=False)
    static = model.generate(prompt, max_new_tokens=30, do_sample=False, cache_implementation="static")
    if not static.equal(dynamic):
        raise AssertionError(f"other text with a static cache: {static.tolist()} instead of {dynamic.tolist()}")
    return {"same text": True}


def tests(scale: Scale) -> dict[str, Any]:
    """The project's own tests, with their models on this device. Some build other tensors on the CPU and fail for that."""
    if importlib.util.find_spec("pytest") is None:
        return {"installed": False}
    options = "-v -p no:cacheprovider -W ignore --tb=line -m".split()
    command = [sys.executable, "-m", "pytest", *options, "not slow", *scale.tests]
    environment = os.environ | {"CHARFORMER_TEST_DEVICE": scale.device}
    try:
        output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=35).stdout
    except subprocess.TimeoutExpired as late:  # those that ran count
        output = late.stdout or b""
    lines = output.decode(errors="replace").splitlines()
    passed, failed = ([line for line in lines if f" {word} " in line] for word in ("PASSED", "FAILED"))
    if not passed:
        raise AssertionError("no test passed: " + "\n".join(lines[-20:]))
    return {"passed": len(passed), "failed": [line.split()[0] for line in failed], "at the end": lines[-1]}
