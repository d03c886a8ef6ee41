"""Each way to generate writes what full forward passes write, with the package and with the code that is saved."""

import inspect
import json
from typing import Any

import pytest
import torch

from modeling_charformer import CharformerTokenizer
from tests.helpers import run_without_package
from tests.modeling.test_generation_charformer import half_trained


PROMPTS = [list(b"the "), list(b"cat sat")]
ROLLING = 10
# What `generate` is told, for one prompt.
MODES: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "drafted by extra targets": {"use_extra_targets": True},
    "drafted by an early exit": {"assistant_early_exit": 2},
    "drafted by look-up": {"prompt_lookup_num_tokens": 3},
    "rolling": {"rolling_context": ROLLING, "max_new_tokens": 60},
    "rolling, static cache": {"rolling_context": ROLLING, "max_new_tokens": 60, "cache_implementation": "static"},
    "rolling, drafted by extra targets": {"rolling_context": ROLLING, "max_new_tokens": 60, "use_extra_targets": True},
    "rolling, drafted by an early exit": {"rolling_context": ROLLING, "max_new_tokens": 60, "assistant_early_exit": 2},
}
OTHERS = ("padded batch", "rolling padded batch", "embeddings", "embeddings, drafted", "going on", "going on, drafted", "continuous batching")  # fmt: skip


def texts(model: Any, prompts: list[list[int]], modes: dict[str, dict]) -> dict[str, list]:
    """The new ids of every mode; of both prompts where they make a batch. This source also runs beside the saved code."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    def new(count=20, **settings):
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0} | settings
        return model.generate(**settings)[:, -settings["max_new_tokens"] :].tolist()

    ids, length = torch.tensor(prompts[:1]), max(map(len, prompts))
    found = {name: new(input_ids=ids, **settings)[0] for name, settings in modes.items()}
    batch = {
        "input_ids": torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }
    found["padded batch"] = new(**batch)
    found["rolling padded batch"] = new(**batch, rolling_context=10, max_new_tokens=60)
    embeddings = model.get_input_embeddings()(ids)
    for name, drafting in (("", {}), (", drafted", {"use_extra_targets": True})):
        found["embeddings" + name] = new(inputs_embeds=embeddings, **drafting)[0]
        first = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        cache_name = "cache" if "cache" in first else "past_key_values"
        rest = new(12, input_ids=first["sequences"], **{cache_name: first[cache_name]}, **drafting)[0]
        found["going on" + name] = first["sequences"][0, -8:].tolist() + rest
    settings = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default the paged cache takes a share of all memory that is free.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    results = model.generate_batch(prompts, settings, small, progress_bar=False)
    found["continuous batching"] = [results[name].generated_tokens for name in sorted(results)]
    return found


@torch.no_grad()
def reference(
    model, prompt: list[int], count: int, window: int | None = None, width: int = 0, num_beams: int = 1
) -> list[int]:
    """The model's own text, one full forward pass for each character; from `window` on its end is encoded anew.

    A batch rolls as one, so there `width`, that of the padded prompts, counts. With `num_beams`, that many texts of the
    highest total log-probability are kept after each character, and the first of them is returned.
    """
    beams = [(0.0, list(prompt))]
    context = width or len(prompt)
    for _ in range(count):
        if window and context > window:
            context = ROLLING
        longer = []
        for score, ids in beams:
            logits = model(torch.tensor([ids[-context:]]), use_cache=False).logits[0, -1]
            best = logits.log_softmax(-1).topk(num_beams)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            longer += [(score + value, [*ids, index]) for value, index in pairs]
        beams = sorted(longer, reverse=True)[:num_beams]
        context += 1
    return beams[0][1][len(prompt) :]


@pytest.fixture(scope="module", params=["package", pytest.param("saved code", marks=pytest.mark.slow)])
def found(request, tmp_path_factory) -> dict[str, list]:
    model = half_trained("linear")
    if request.param == "package":
        return texts(model, PROMPTS, MODES)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    CharformerTokenizer().save_pretrained(folder)
    program = inspect.getsource(texts) + (
        "import json, sys\nfrom typing import Any\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules.')\n"
        "print(json.dumps(texts(model, *map(json.loads, sys.argv[2:]))))\n"
    )
    arguments = (json.dumps(PROMPTS), json.dumps(MODES))
    result = run_without_package(
        "from typing import Any\n" + program, folder, tmp_path_factory.mktemp("work"), *arguments
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", [*MODES, *OTHERS])
def test_text_is_that_of_full_forward_passes(found, mode):
    model, batched = half_trained("linear"), isinstance(found[mode][0], list)
    rolling = {"count": 60, "window": 32} if mode.startswith("rolling") else {"count": 20}
    width = max(map(len, PROMPTS)) if batched else 0
    expected = [reference(model, prompt, **rolling, width=width) for prompt in PROMPTS]
    assert found[mode] == (expected if batched else expected[0])


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"rolling_context": ROLLING, "max_new_tokens": 30}],
    ids=str,
)
def test_beams_are_those_of_full_forward_passes(make_model, settings):
    model = make_model(initializer_range=0.5).eval()
    settings = {"max_new_tokens": 15, "do_sample": False, "num_beams": 5} | settings
    count, window = settings["max_new_tokens"], 24 if "rolling_context" in settings else None
    expected = reference(model, PROMPTS[0], count, window, num_beams=5)
    ids = model.generate(torch.tensor(PROMPTS[:1]), **settings)
    assert ids[0, len(PROMPTS[0]) :].tolist() == expected
    assert expected != reference(model, PROMPTS[0], count, window)  # the greedy text
