"""Cross-entropy in one pass, against plain PyTorch: values, gradients, memory, and the models that fall back."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from charformer_training import add_auxiliary_losses
from modeling_charformer import linear_cross_entropy
from modeling_charformer.cross_entropy import cross_entropy_sum
from modeling_charformer.linear_cross_entropy import LinearClassifier, linear_classifier, row_cross_entropies


N, V, D = 20, 50, 7


@pytest.fixture(autouse=True)
def any_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "MIN_VOCABULARY", 1)
    monkeypatch.setattr(linear_cross_entropy, "SOFTMAX_LOGITS", 2 * V)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of three rows; the gradient on the matrix is then added up in the forward pass."""
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 3 * V)


def given(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows, matrix and bias, and targets, one of which is ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, D), (V, D), *([(V,)] if bias else [])]
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[2] = -100
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes], targets


def classifier_of(inputs: list[torch.Tensor]) -> LinearClassifier:
    return LinearClassifier(inputs[1], inputs[2])


def reference(inputs: list[torch.Tensor], targets: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    logits = F.linear(*inputs) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits.float(), targets, reduction="none")


@pytest.mark.parametrize("pieces", ["one", "small"])
@pytest.mark.parametrize(("scale", "cap", "bias"), [(1.0, None, True), (0.7, None, False), (0.7, 3.0, True)])
@pytest.mark.parametrize("as_expected", [True, False])
def test_values_and_gradients_are_those_of_plain_pytorch(request, pieces, scale, cap, bias, as_expected):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    inputs, targets = given(bias)
    expected = torch.rand(N)
    gradient = 3 * expected if as_expected else torch.rand(N)
    classifier = LinearClassifier(inputs[1], inputs[2] if bias else None, scale, cap)
    values, wanted = (
        row_cross_entropies(inputs[0], classifier, targets, expected),
        reference(inputs, targets, scale, cap),
    )
    torch.testing.assert_close(values, wanted)
    for _ in range(2):  # the second time nothing of the forward pass may be spent or changed
        found = torch.autograd.grad(values, inputs, gradient, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, inputs, gradient, retain_graph=True))


def test_classifier_runs_once_if_the_loss_weighs_as_expected(small_pieces, monkeypatch):
    inputs, targets = given()
    computed: list[int] = []
    linear = F.linear

    def counting(rows: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.append(len(rows))
        return linear(rows, *rest)

    monkeypatch.setattr(F, "linear", counting)
    for gradient, runs in ((torch.full((N,), 0.25), 1), (torch.arange(N) / N, 2)):
        computed.clear()
        values = row_cross_entropies(inputs[0], classifier_of(inputs), targets, torch.ones(N))
        values.backward(gradient)
        assert sum(computed) == runs * N and max(computed) <= 3


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_what_is_trained_gets_a_gradient(small_pieces, trained):
    inputs, targets = given()
    for tensor, is_trained in zip(inputs, trained, strict=True):
        tensor.requires_grad_(is_trained)
    values = row_cross_entropies(inputs[0], classifier_of(inputs), targets, torch.ones(N))
    assert values.requires_grad == any(trained)
    if any(trained):
        values.sum().backward()
        found = [tensor.grad for tensor in inputs]
        wanted = torch.autograd.grad(
            reference(inputs, targets, 1.0, None).sum(), [tensor for tensor in inputs if tensor.requires_grad]
        )
        torch.testing.assert_close([one for one in found if one is not None], [*wanted])
    assert [tensor.grad is not None for tensor in inputs] == [*trained]
    with torch.no_grad():
        assert not row_cross_entropies(inputs[0], classifier_of(inputs), targets, torch.ones(N)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision(small_pieces, dtype):
    inputs, targets = given(dtype=dtype)
    values = row_cross_entropies(inputs[0], classifier_of(inputs), targets, torch.ones(N))
    wanted = reference(inputs, targets, 1.0, None)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, wanted, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(values.sum(), inputs)
    assert [one.dtype for one in found] == [dtype] * 3
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), inputs), rtol=0.03, atol=0.05)


def test_autocast_runs_the_classifier_in_its_dtype(small_pieces):
    inputs, targets = given()
    with torch.autocast("cpu", torch.bfloat16):
        values = row_cross_entropies(inputs[0], classifier_of(inputs), targets, torch.ones(N))
        wanted = reference(inputs, targets, 1.0, None)
    torch.testing.assert_close(values, wanted, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(values.sum(), inputs)
    assert all(one.dtype == torch.float32 for one in found)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), inputs), rtol=0.05, atol=0.1)
    exact = torch.autograd.grad(reference(inputs, targets, 1.0, None).sum(), inputs)
    assert (found[1] - exact[1]).abs().max() > 1e-4


@pytest.mark.parametrize("pieces", ["one", "small"])
def test_small_weights_are_not_lost_in_half_precision(request, pieces):
    """Weights like those of a mean over a large batch, and the scaled loss with which fp16 is trained."""
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    inputs, targets = given(bias=False)
    expected, scale = torch.full((N,), 1e-7), 2.0**16
    classifier = LinearClassifier(inputs[1])
    with torch.autocast("cpu", torch.float16):
        values = row_cross_entropies(inputs[0], classifier, targets, expected)
    found = torch.autograd.grad(values, inputs, scale * expected)
    wanted = torch.autograd.grad(reference(inputs, targets, 1.0, None), inputs, scale * expected)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01 * float(other.abs().max()))


def test_gradients_of_gradients_are_refused(small_pieces):
    inputs, targets = given()
    values = row_cross_entropies(inputs[0], classifier_of(inputs), targets, torch.ones(N))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(values.sum(), inputs[0], create_graph=True)


def test_gradient_checkpointing_around_it(small_pieces):
    inputs, targets = given()

    def run(rows: torch.Tensor) -> torch.Tensor:
        return row_cross_entropies(rows * 2, classifier_of(inputs), targets, torch.ones(N)).sum()

    found = torch.autograd.grad(checkpoint(run, inputs[0], use_reentrant=False), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(run(inputs[0]), inputs))


def test_what_is_more_than_its_parameters_is_left_to_the_module(monkeypatch):
    plain = nn.Linear(D, V)
    assert linear_classifier(plain, 2.0, 5.0) == LinearClassifier(plain.weight, plain.bias, 2.0, 5.0)
    hooked, replaced, empty, quantized = (nn.Linear(D, V) for _ in range(4))
    hooked.register_forward_pre_hook(lambda *_: None)
    vars(replaced)["forward"] = replaced.forward  # as Accelerate does
    empty.weight.data = torch.empty(0)
    quantized.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    adapted = type("Adapted", (nn.Linear,), {"forward": lambda self, states: states})(D, V)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, V))
    for module in (hooked, replaced, empty, quantized, adapted, normed, nn.Identity(), nn.Conv1d(D, V, 1)):
        assert linear_classifier(module) is None, module
    monkeypatch.setattr(linear_cross_entropy, "MIN_VOCABULARY", V + 1)
    assert linear_classifier(plain) is None


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    tied = settings.pop("tied", True)
    config = LlamaConfig(vocab_size=61, **sizes, tie_word_embeddings=tied, initializer_range=0.1)
    return add_auxiliary_losses(LlamaForCausalLM(config).train(), num_targets=3, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": False}, {"loss_weighting": "uncertainty"}, {"heads": "own"}, {"position_share": 0.3}],
    ids=str,
)
def test_model_has_the_losses_and_gradients_of_the_other_way(settings, monkeypatch):
    """In pieces, and with a factor on the loss."""
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 61 * 5)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    results = []
    for least in (1, 10**6):
        monkeypatch.setattr(linear_cross_entropy, "MIN_VOCABULARY", least)
        model = llama(**settings)
        if model.loss_uncertainty is not None:
            for number, weight in enumerate(model.loss_uncertainty.parameters()):
                nn.init.constant_(weight, number / 10)
        output = model(input_ids=ids, labels=ids, training_step=1)
        (output.loss / 4).backward()
        results.append(
            (dict(output.loss_dict), {name: w.grad for name, w in model.named_parameters() if w.grad is not None})
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_terms_that_share_a_matrix_run_through_it_together(monkeypatch):
    calls: list[int] = []
    run = linear_cross_entropy._RowCrossEntropies.apply

    def apply(rows: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(rows))
        return run(rows, *rest)

    monkeypatch.setattr(linear_cross_entropy._RowCrossEntropies, "apply", apply)
    ids = torch.randint(0, 61, (2, 12))
    llama(position_share=0.25)(input_ids=ids, labels=ids, training_step=0)
    assert calls == [8 * 2 * 3]  # terms, rows, positions
    calls.clear()
    llama().eval()(input_ids=ids, labels=ids)
    assert calls == []


def test_single_term_reaches_the_layers_below_alone():
    ids, model = torch.randint(0, 61, (2, 12)), llama()
    model(input_ids=ids, labels=ids).loss_dict["layer_1"].backward()
    weights = [layer.mlp.up_proj.weight.grad for layer in model.model.layers]
    assert weights[0].any() and not any(weight.any() for weight in weights[1:] if weight is not None)


@pytest.mark.parametrize("pieces", ["one", "small"])
def test_gradient_on_the_classifier_can_be_left_out(request, pieces):
    """As `term_gradients` does: what the backward pass for the rows left behind belongs to no later one."""
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    inputs, targets = given()
    values, wanted = (
        row_cross_entropies(inputs[0], classifier_of(inputs), targets, torch.ones(N)),
        reference(inputs, targets, 1.0, None),
    )
    weights = torch.rand(N)
    for gradient, asked in ((weights, inputs[:1]), (2 * weights, inputs), (weights, inputs[1:])):
        found = torch.autograd.grad(values, asked, gradient, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, asked, gradient, retain_graph=True))


@pytest.mark.parametrize("settings", [{}, {"position_share": 0.3}, {"heads": "own"}], ids=str)
def test_gradient_on_a_matrix_is_formed_after_the_backward_pass_of_the_layers(settings, monkeypatch):
    """By then their activations are gone."""
    events: list[str] = []
    total = linear_cross_entropy._Sums.total

    def formed(self: Any) -> Any:
        events.append("formed")
        return total(self)

    monkeypatch.setattr(linear_cross_entropy._Sums, "total", formed)
    ids, model = torch.randint(0, 61, (2, 12)), llama(**settings)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda _: events.append("layer"))
    model(input_ids=ids, labels=ids, training_step=0).loss.backward()
    assert events[:3] == ["layer"] * 3 and "formed" in events[3:]


def test_labels_of_no_target_give_zeros():
    ids, model = torch.randint(0, 61, (2, 12)), llama()
    model(input_ids=ids, labels=torch.full_like(ids, -100)).loss_dict["layer_1"].backward()
    assert not any(w.grad.any() for w in model.parameters() if w.grad is not None)
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_under_autocast_are_summed_in_single_precision(dtype, monkeypatch):
    ids, results = torch.randint(0, 61, (4, 20)), []
    for least in (1, 10**6):
        monkeypatch.setattr(linear_cross_entropy, "MIN_VOCABULARY", least)
        with torch.autocast("cpu", dtype):
            results.append(dict(llama()(input_ids=ids, labels=ids).loss_dict))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0.0)


def test_classifier_with_an_entry_can_be_used_twice(small_pieces):
    inputs, targets = given()
    classifier = classifier_of(inputs).with_entry()
    found, wanted = torch.zeros(()), torch.zeros(())
    for factor in (1.0, 2.0):
        rows = inputs[0] * factor
        found = found + factor * row_cross_entropies(rows, classifier, targets, torch.ones(N)).sum()
        wanted = wanted + factor * reference([rows, *inputs[1:]], targets, 1.0, None).sum()
    gradients = torch.autograd.grad(found, inputs, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, inputs))


def test_weighted_sum_under_autocast_is_one_of_single_precision():
    """A sum in half precision would be infinite from 65,504 nats on."""
    logits, targets = torch.randn(3000, 11) * 20, torch.randint(0, 11, (3000,))
    whole = cross_entropy_sum(logits, targets)
    assert whole > 65_504
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            weighted = cross_entropy_sum(logits, targets, torch.ones(3000))
        torch.testing.assert_close(weighted, whole, rtol=1e-5, atol=0.0)
