"""Drafts by the extra heads change nothing, and text goes on past the window as a plain loop would write it."""

import copy
import functools
from typing import Any

import pytest
import scipy.stats
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    pipeline,
    set_seed,
)
from transformers.generation import stopping_criteria
from transformers.generation.streamers import BaseStreamer

from modeling_charformer import (
    CharformerConfig,
    CharformerForCausalLM,
    CharformerTokenizer,
    drafting_charformer,
    pace_charformer,
    verification_charformer,
)
from modeling_charformer.compatibility import CACHE
from tests.helpers import TINY


@functools.cache
def half_trained(target_heads: str) -> CharformerForCausalLM:
    """One whose drafts are right now and then: it has learned a text by heart, half-way."""
    set_seed(0)
    settings = {"num_targets": 4, "intermediate_schedule": "constant", "max_position_embeddings": 32}
    model = CharformerForCausalLM(
        CharformerConfig(**(TINY | {"initializer_range": 0.1} | settings), target_heads=target_heads)
    )
    ids = torch.tensor([list(b"the rat and the cat sat on the mat; ")[:32]] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(params=["linear", "sequential"])
def model(request):
    return copy.deepcopy(half_trained(request.param))


PROMPT = torch.tensor([list(b"the ")])


def passes(model, **settings) -> tuple[torch.Tensor, int]:
    """What is generated, and in how many forward passes."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1

    handle = model.model.register_forward_hook(hook)
    ids = model.generate(PROMPT, **settings)
    handle.remove()
    return ids, count


class Collect(BaseStreamer):
    def __init__(self):
        self.ids: list[int] = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


class Shift(LogitsProcessor):
    """Depends on what was written before."""

    def __call__(self, input_ids, scores):
        return scores.scatter_add(1, input_ids[:, -2:], torch.full_like(input_ids[:, -2:], 1, dtype=scores.dtype))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"eos_token_id": ord("c")},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": None, "max_length": 17},
        pytest.param({"logits_processor": LogitsProcessorList([Shift()])}, id="logits_processor"),
        {"no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_greedy_text_is_the_plain_one_in_fewer_passes(model, drafts_in_every_pass, settings):
    settings = {"max_new_tokens": 28, "do_sample": False} | settings
    plain, plain_passes = passes(model, **settings)
    streamer = Collect()
    drafted, drafted_passes = passes(model, use_extra_targets=True, streamer=streamer, **settings)
    assert drafted.equal(plain)
    assert streamer.ids == drafted[0].tolist()
    assert drafted_passes <= plain_passes
    if settings == {"max_new_tokens": 28, "do_sample": False}:
        assert drafted_passes < 0.6 * plain_passes


def test_untrained_heads_do_no_harm(make_model):
    model = make_model(num_targets=3).eval()
    for seed in range(5):
        ids = torch.randint(0, 256, (1, 3), generator=torch.Generator().manual_seed(seed))
        plain = model.generate(ids, max_new_tokens=20, do_sample=False)
        assert model.generate(ids, max_new_tokens=20, do_sample=False, use_extra_targets=True).equal(plain)


@pytest.mark.slow
def test_what_came_before_is_looked_up(make_model, drafts_in_every_pass, monkeypatch):
    """Drafts from the text itself are longer than the heads see ahead, and change nothing."""
    model = make_model(num_targets=2, max_position_embeddings=512, initializer_range=0.3).eval()
    # Each character depends on the one before alone, so that greedy text goes round in circles.
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.position_embeddings.weight)
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    settings = {"max_new_tokens": 400, "do_sample": False}
    monkeypatch.setattr(drafting_charformer, "AGREEMENT", 0.0)  # the heads have learned nothing
    plain, _ = passes(model, **settings)
    drafted, count = passes(model, use_extra_targets=True, **settings)
    assert drafted.equal(plain)
    assert count < 400 / 2  # the heads alone see no more than one character further
    monkeypatch.setattr(verification_charformer, "LOOK_UP", 0)
    drafted, count = passes(model, use_extra_targets=True, **settings)
    assert drafted.equal(plain)
    assert count >= 400 / 2


def test_drafts_that_are_never_right_are_given_up_and_others_are_not():
    rests = []
    for tokens in (1.0, 1.25):
        pace = pace_charformer.Pace()
        pace.rests()
        pace.passed_without(1.0)
        for _ in range(3):
            pace.verified([0.5], 0)
            pace.passed(verified=4, drafts=4, tokens=tokens, drafting=0.1, seconds=1.1)
        rests.append([pace.rests() for _ in range(40)])
    assert rests == [[True] * 32 + [False] * 8, [False] * 40]


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of a chi-squared test; the rare outcomes, fewer than five expected, are one."""
    counts, expected = counts.flatten(), counts.sum() * probabilities.detach().flatten()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(scipy.stats.chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize("drafts", ["linear", "sequential", "looked up", "early exit"])
@pytest.mark.slow
def test_sampled_text_has_the_models_distribution(make_model, drafts, monkeypatch):
    """Of the third character, after one that was drafted; greedy drafts passed off as sampled ones would show."""
    torch.manual_seed(0)
    heads = drafts if drafts == "sequential" else "linear"
    how: dict = {"assistant_early_exit": 2} if drafts == "early exit" else {"use_extra_targets": True}
    model = make_model(num_targets=3, vocab_size=4, initializer_range=0.5, target_heads=heads).eval()
    for block in model.target_blocks.values():
        torch.nn.init.normal_(block.linear.weight, std=0.3)
    if drafts == "looked up":
        monkeypatch.setattr(verification_charformer, "matched_tokens", lambda vocab_size: 1)
    prompt, temperature, draws = torch.tensor([[1, 2]]), 0.9, 500
    exact = torch.zeros(4, 4, 4)
    for first in range(4):
        for second in range(4):
            ids = torch.tensor([[1, 2, first, second]])
            p = (model(ids).logits[0] / temperature).softmax(-1)
            exact[first, second] = p[1, first] * p[2, second] * p[3]

    def counts(**settings) -> torch.Tensor:
        found = torch.zeros(4, 4, 4)
        for _ in range(draws):
            ids = model.generate(
                prompt, max_new_tokens=3, do_sample=True, temperature=temperature, top_k=0, **settings
            )
            found[tuple(ids[0, 2:].tolist())] += 1
        return found

    assert p_value(counts(**how), exact) > 0.001
    if drafts == "linear":
        assert p_value(counts(**how, top_p=0.8), exact) < 0.001  # the test would notice


@pytest.mark.slow
def test_long_drafts_are_sampled_from_the_models_distribution(make_model, monkeypatch):
    """Of six characters out of two, most drafted in chains, some of which stop early."""
    torch.manual_seed(0)
    model = make_model(num_targets=4, vocab_size=2, initializer_range=0.5, target_heads="sequential").eval()
    for block in model.target_blocks.values():
        torch.nn.init.normal_(block.linear.weight, std=0.3)
    monkeypatch.setattr(pace_charformer, "CONFIDENCE", 0.3)
    lengths = []
    forward = verification_charformer.VerifiedDecoding._forward

    def counted(self, drafts):
        lengths.append(drafts.shape[1])
        return forward(self, drafts)

    monkeypatch.setattr(verification_charformer.VerifiedDecoding, "_forward", counted)
    texts = torch.tensor([[1, 0, *(number >> bit & 1 for bit in range(6))] for number in range(64)])
    log_probabilities = model(texts).logits.log_softmax(-1)[:, 1:-1]
    exact = log_probabilities.gather(-1, texts[:, 2:, None]).sum((1, 2)).exp().detach()
    counts = torch.zeros(64)
    for _ in range(500):
        ids = model.generate(texts[:1, :2], max_new_tokens=6, do_sample=True, top_k=0, use_extra_targets=True)
        counts[int((ids[0, 2:] << torch.arange(6)).sum())] += 1
    assert p_value(counts, exact) > 0.001
    assert {1, 2, 3} <= set(lengths)


@pytest.mark.parametrize("drafting", [{"use_extra_targets": True}, {"assistant_early_exit": 2}], ids=str)
@pytest.mark.parametrize("stop", ["cat", "sat", "t on", ["mat", "sat"]], ids=str)
def test_stop_strings_end_the_text_where_they_end_plain_text(model, drafting, stop):
    settings = {"max_new_tokens": 28, "do_sample": False, "stop_strings": stop, "tokenizer": CharformerTokenizer()}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    plain, streamer = model.generate(PROMPT, **settings), Collect()
    drafted = model.generate(PROMPT, streamer=streamer, **settings, **drafting)
    stops = [stop] if isinstance(stop, str) else stop
    assert bytes(plain.sequences[0].tolist()).endswith(tuple(word.encode() for word in stops))
    assert drafted.sequences.equal(plain.sequences)
    assert streamer.ids == plain.sequences[0].tolist()
    assert len(drafted.scores) == len(plain.scores)
    assert drafted[CACHE].get_seq_length() == plain[CACHE].get_seq_length()


class Write(LogitsProcessor):
    """Makes the model write a given text, whatever it would have written."""

    def __init__(self, text: str):
        self.text = text.encode()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = (input_ids.shape[1] - PROMPT.shape[1]) % len(self.text)
        return torch.full_like(scores, -1e9).index_fill(-1, torch.tensor([self.text[place]]), 0.0)


@pytest.mark.parametrize(
    "drafting",
    [{}, {"use_extra_targets": True}, {"assistant_early_exit": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
@pytest.mark.parametrize("stop", ["fin é.", "né", "日", "ён"])
def test_stop_strings_outside_ascii_end_the_text_after_their_last_byte(model, drafting, stop):
    text = f"ab é {stop} c"
    ids = model.generate(
        PROMPT,
        max_new_tokens=20,
        do_sample=False,
        stop_strings=stop,
        tokenizer=CharformerTokenizer(),
        logits_processor=LogitsProcessorList([Write(text)]),
        **drafting,
    )
    assert bytes(ids[0, PROMPT.shape[1] :].tolist()).decode() == f"ab é {stop}"


def test_drafting_as_a_saved_default_is_kept(model, tmp_path):
    expected = model.generate(PROMPT, max_new_tokens=20, do_sample=False)
    model.generation_config.use_extra_targets = True
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.use_extra_targets is True
    used: list[int] = []
    loaded.auxiliary_heads["target_2"].register_forward_hook(lambda *_: used.append(1))
    assert loaded.generate(PROMPT, max_new_tokens=20, do_sample=False).equal(expected) and used
    used.clear()
    loaded.generate(PROMPT, max_new_tokens=20, do_sample=False, use_extra_targets=False)
    assert not used  # the control


def assistant(window: int = 64, vocab_size: int = 256) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_embd=8,
            n_layer=1,
            n_head=1,
            n_positions=window,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def test_another_model_may_draft(model, make_model):
    length = PROMPT.shape[1] + 20
    for drafter in (assistant(length), make_model(num_hidden_layers=1, max_position_embeddings=length)):
        settings = {"max_new_tokens": 20, "do_sample": False}
        assert model.generate(PROMPT, assistant_model=drafter, **settings).equal(model.generate(PROMPT, **settings))
    rolling = {"max_new_tokens": 60, "do_sample": False, "rolling_context": 8}
    drafter = make_model(num_hidden_layers=1, max_position_embeddings=32)
    assert model.generate(PROMPT, assistant_model=drafter, **rolling).equal(model.generate(PROMPT, **rolling))


@pytest.mark.parametrize(
    ("drafter", "settings", "message"),
    [
        (
            assistant(20),
            {},
            "assistant_model has a window of max_position_embeddings=20; for prompt and new characters",
        ),
        (
            assistant(),
            {"rolling_context": 8, "max_new_tokens": 90},
            "window of max_position_embeddings=64; for prompt",
        ),
        (assistant(vocab_size=300), {}, "assistant_model has vocab_size=300 and this model vocab_size=256"),
        ("gpt2", {}, "assistant_model is a str; it must be a language model"),
    ],
    ids=["window", "rolling", "vocabulary", "name"],
)
def test_an_assistant_that_cannot_draft_is_refused(model, drafter, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, assistant_model=drafter, **{"max_new_tokens": 20, "do_sample": False} | settings)


def test_settings_may_stand_in_a_generation_config(model):
    settings = GenerationConfig(max_new_tokens=60, do_sample=False, rolling_context=8, use_extra_targets=True)
    expected = model.generate(PROMPT, max_new_tokens=60, do_sample=False, rolling_context=8)
    used = []
    handle = model.auxiliary_heads["target_2"].register_forward_hook(lambda *_: used.append(1))
    assert model.generate(PROMPT, generation_config=settings).equal(expected)
    handle.remove()
    assert used


def test_through_the_pipeline(model):
    writer = pipeline("text-generation", model=model, tokenizer=CharformerTokenizer())
    settings = {"max_new_tokens": 20, "do_sample": False}
    plain = writer("the ", **settings)
    assert writer("the ", use_extra_targets=True, **settings) == plain
    assert (
        len(writer("the ", use_extra_targets=True, rolling_context=True, max_new_tokens=90)[0]["generated_text"]) > 60
    )


@pytest.mark.parametrize("layer", [1, 2])
def test_early_exit_uses_the_classifier_of_its_layer_and_the_cache_that_is_there(model, layer):
    settings = {"max_new_tokens": 20, "do_sample": False}
    plain = model.generate(PROMPT, **settings)
    used, lengths = [], []
    handles = [
        model.auxiliary_heads[f"layer_{layer}"].register_forward_hook(lambda *_: used.append(1)),
        model.model.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1])),
    ]
    assert model.generate(PROMPT, assistant_early_exit=layer, **settings).equal(plain)
    for handle in handles:
        handle.remove()
    assert used
    assert lengths.count(PROMPT.shape[1]) <= 2  # the prompt is not encoded for the drafts again


def test_early_exit_of_a_padded_prompt(model):
    settings = {"max_new_tokens": 20, "do_sample": False, "assistant_early_exit": 2}
    ids, mask = torch.nn.functional.pad(PROMPT, (3, 0)), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    padded = model.generate(ids, attention_mask=mask, **settings)
    assert padded[:, 3:].equal(model.generate(PROMPT, **settings))


@pytest.mark.parametrize(
    "drafting", [{"use_extra_targets": True}, {"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 2}]
)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_drafts_after_a_prompt_of_embeddings_are_the_plain_text(make_model, drafting, padding, with_ids):
    model = make_model(initializer_range=0.3).eval()
    ids = torch.tensor([list(b"def foo")])
    mask = torch.tensor([[0] * padding + [1] * (7 - padding)])
    settings = {"attention_mask": mask, "max_new_tokens": 17, "do_sample": False}
    plain = model.generate(ids, **settings)[0, 7:].tolist()
    # The control: padding changes this text.
    unpadded = model.generate(ids, **settings | {"attention_mask": torch.ones_like(mask)})[0, 7:].tolist()
    assert (plain == unpadded) == (padding == 0)
    embeddings = model.get_input_embeddings()(ids).detach()
    drafted = model.generate(ids if with_ids else None, inputs_embeds=embeddings, **settings, **drafting)
    assert drafted[0, -17:].tolist() == plain


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_from_a_cache_by_either_name(make_model, name):
    model = make_model(initializer_range=0.3).eval()
    ids = torch.tensor([list(b"def foo")])
    plain = model.generate(ids, max_new_tokens=16, do_sample=False)
    first = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, max_new_tokens=10, do_sample=False, **{name: first[CACHE]})
    assert rest.tolist() == plain.tolist()


def test_an_error_while_drafting_leaves_the_model_as_it_was(model):
    def fails(*_):
        raise RuntimeError("in the draft")

    handle = model.auxiliary_heads["layer_2"].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="in the draft"):
        model.generate(PROMPT, assistant_early_exit=2, max_new_tokens=20)
    handle.remove()
    assert model.generate(PROMPT, max_new_tokens=5).shape == (1, 9)


def rolled(model, prompt: list[int], length: int, keep: int) -> list[int]:
    """The definition: no cache; a window that is full begins anew with its last characters."""
    ids, begin, window = list(prompt), 0, model.config.max_position_embeddings
    while len(ids) < length:
        if len(ids) - begin > window:
            begin = len(ids) - keep
        ids.append(int(model(torch.tensor([ids[begin:]]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("keep", [1, 10, 16, 31])
@pytest.mark.parametrize("drafting", [{}, {"use_extra_targets": True}, {"assistant_early_exit": 2}], ids=str)
def test_rolling_is_the_plain_loop(model, keep, drafting):
    expected = rolled(model, PROMPT[0].tolist(), 100, keep)
    ids = model.generate(PROMPT, max_length=100, do_sample=False, rolling_context=keep, **drafting)
    assert ids[0].tolist() == expected


@pytest.mark.parametrize("drafting", [{}, {"use_extra_targets": True}], ids=str)
def test_rolling_past_the_window_is_no_reason_to_warn(model, drafting, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", told.append)
    model.generate(PROMPT, max_length=50, do_sample=False, rolling_context=5, **drafting)
    assert told == []
    stopping_criteria.MaxLengthCriteria(60, 32)(torch.zeros(1, 50), None)
    assert len(told) == 1


def test_rolling_takes_prompts_longer_than_the_window(model):
    prompt = torch.tensor([list(b"the rat and the cat sat on the mat and the hat and the bat ")])
    expected = rolled(model, prompt[0].tolist(), 80, 12)
    assert model.generate(prompt, max_length=80, do_sample=False, rolling_context=12)[0].tolist() == expected


def test_rolling_a_batch_padded_on_the_left_is_one_by_one(model):
    prompts = [list(b"the "), list(b"the cat sat"), list(b"o")]
    longest = max(map(len, prompts))
    ids = torch.tensor([[255] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = {"max_new_tokens": 21, "do_sample": False}  # up to the window of the longest
    plain = model.generate(ids, attention_mask=mask, **settings)
    batch = model.generate(ids, attention_mask=mask, rolling_context=8, **(settings | {"max_new_tokens": 60}))
    assert batch[:, : plain.shape[1]].equal(plain)
    for row, prompt in enumerate(prompts):
        single = model.generate(torch.tensor([prompt]), **settings)
        assert plain[row, longest:].tolist() == single[0, len(prompt) :].tolist()
    # The longest row rolls where it would by itself.
    alone = model.generate(torch.tensor([prompts[1]]), do_sample=False, rolling_context=8, max_new_tokens=60)
    assert batch[1].tolist() == alone[0].tolist()


def test_half_the_window_is_the_default(model):
    ids = model.generate(PROMPT, max_length=80, do_sample=False, rolling_context=True)
    assert ids.equal(model.generate(PROMPT, max_length=80, do_sample=False, rolling_context=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rolling_context": 0}, "rolling_context is 0; it must be 1 to 31"),
        ({"rolling_context": 32}, "rolling_context is 32"),
        ({"rolling_context": 8, "use_cache": False}, "needs use_cache=True"),
        ({"use_extra_targets": True, "num_beams": 2}, "does not go with beam search"),
        ({"use_extra_targets": True, "assistant_early_exit": 1}, "two ways to draft"),
        ({"use_extra_targets": True, "prompt_lookup_num_tokens": 3}, "two ways to draft"),
        ({"assistant_early_exit": 3}, r"assistant_early_exit is 3; the layers .* are \[1, 2\]"),
        ({"max_new_tokens": 29}, "more than the window .* or give rolling_context"),
        ({"inputs": torch.zeros(1, 32, dtype=torch.long)}, "the prompt is 32 characters long"),
        ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
        ({"inputs": PROMPT.repeat(2, 1), "assistant_early_exit": 2}, "one prompt at a time, and there are 2"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(model, settings, message):
    settings = {"inputs": PROMPT, "max_new_tokens": 8} | settings
    with pytest.raises(ValueError, match=message):
        model.generate(**settings)


def test_a_model_without_extra_targets_says_so(make_model):
    with pytest.raises(ValueError, match="num_targets of 2 or more.*num_targets=1"):
        make_model(num_targets=1).generate(PROMPT, use_extra_targets=True)
