"""A model that is exported, quantized or spread over devices computes what it computed."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, QuantoConfig


ort = pytest.importorskip("onnxruntime")
torchao = pytest.importorskip("torchao.quantization")

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([list(b"the cat sat")])
MASK = torch.tensor([[1] * 13, [0] * 4 + [1] * 9])
LONGER = torch.tensor([list(b"a longer text"), [255] * 4 + list(b"shorter t")])


@pytest.fixture
def model(make_folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_folder()).eval()


class Logits(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def dynamic_shapes() -> dict[str, dict[int, Any]]:
    axes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=2, max=64)}
    return {"input_ids": axes, "attention_mask": axes}


def text(model: Any) -> list[int]:
    return list(model.generate(IDS, max_new_tokens=12, do_sample=False)[0].tolist())


def test_torch_export_takes_other_batches_and_lengths(model):
    example = (IDS.repeat(2, 1), torch.ones_like(IDS).repeat(2, 1))
    program = torch.export.export(Logits(model), example, dynamic_shapes=dynamic_shapes(), strict=False)
    found, expected = program.module()(LONGER, MASK), Logits(model)(LONGER, MASK)
    assert torch.allclose(found[MASK.bool()], expected[MASK.bool()], atol=1e-5)


def test_onnx_takes_other_batches_and_lengths(model, tmp_path):
    example = (IDS.repeat(2, 1), torch.ones_like(IDS).repeat(2, 1))
    path = str(tmp_path / "model.onnx")
    names = list(dynamic_shapes())
    torch.onnx.export(
        Logits(model), example, path, dynamo=True, dynamic_shapes=dynamic_shapes(), input_names=names, verbose=False
    )
    session = ort.InferenceSession(path)
    (found,) = session.run(None, {"input_ids": LONGER.numpy(), "attention_mask": MASK.numpy()})
    expected = Logits(model)(LONGER, MASK)
    assert torch.allclose(torch.from_numpy(found)[MASK.bool()], expected[MASK.bool()], atol=1e-4)


def test_compiled_without_a_break(model):
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    assert torch.allclose(compiled(IDS).logits, model(IDS).logits, atol=1e-5)


def test_exported_for_executorch(model):
    integration = pytest.importorskip("transformers.integrations.executorch")
    settings = {"batch_size": 1, "max_cache_len": 64}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=settings)
    expected = text(copy.deepcopy(model))
    program, written = integration.convert_and_export_with_cache(model).module(), IDS[0].tolist()
    # Not by the `generate` of Transformers' module for this, which leaves one position out after the prompt.
    for position in range(len(expected) - 1):
        logits = program(
            input_ids=torch.tensor([[written[position]]]), cache_position=torch.tensor([position], dtype=torch.long)
        )
        if position == len(written) - 1:
            written.append(int(logits[0, -1].argmax()))
    assert written == expected


def closeness(model: Any, quantized: Any) -> float:
    """Correlation of the logits."""
    both = torch.stack([model(IDS).logits.flatten(), quantized(IDS).logits.flatten()])
    assert len(text(quantized)) == len(text(model))
    return float(torch.corrcoef(both.detach())[0, 1])


def test_eight_bits_by_torchao_are_saved(make_folder, model, tmp_path):
    from transformers import TorchAoConfig

    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(make_folder(), quantization_config=settings, device_map="cpu")
    assert closeness(model, quantized) > 0.999
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    assert torch.equal(loaded(IDS).logits, quantized(IDS).logits)


def test_eight_bits_by_quanto(make_folder, model):
    pytest.importorskip("optimum.quanto")
    settings = QuantoConfig(weights="int8")
    quantized = AutoModelForCausalLM.from_pretrained(make_folder(), quantization_config=settings, device_map="cpu")
    assert closeness(model, quantized) > 0.999


@pytest.mark.parametrize("bits, least", [({"load_in_8bit": True}, 0.999), ({"load_in_4bit": True}, 0.9)])
def test_eight_and_four_bits_by_bitsandbytes(make_folder, model, bits, least):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(**bits)
    quantized = AutoModelForCausalLM.from_pretrained(make_folder(), quantization_config=settings, device_map="cpu")
    assert closeness(model, quantized) > least


def test_eight_bits_while_it_runs(model):
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    assert closeness(model, dynamic) > 0.99


def test_layers_that_lie_on_the_disk(make_folder, model, tmp_path):
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "lm_head", "auxiliary_heads", "model.layers.0"], "cpu")
    spread = AutoModelForCausalLM.from_pretrained(
        make_folder(), device_map=places | {"model.layers.1": "disk"}, offload_folder=str(tmp_path / "disk")
    )
    assert text(spread) == text(model)
    assert text(AutoModelForCausalLM.from_pretrained(make_folder(), device_map="auto")) == text(model)


def test_continuous_batches(model):
    prompts = [list(b"the cat"), list(b"a"), list(b"one two")]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=254, pad_token_id=255)
    found = model.generate_batch(prompts, settings, ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64))
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    assert [one.generated_tokens for one in found.values()] == expected
