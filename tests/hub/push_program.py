"""Pushes to the Hub that HF_ENDPOINT names, with the package. Started by tests; prints JSON on its last line."""

import contextlib
import io
import json
import os
import sys
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import GPT2Config, GPT2LMHeadModel

from charformer_training import add_auxiliary_losses, load_auxiliary_losses
from charformer_training.models import HEADS_FILE, OLD_HEADS_FILE
from charformer_training.train import main
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer
from tests.helpers import TINY, small_command


def make_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return CharformerForCausalLM(CharformerConfig(**(TINY | {"initializer_range": 0.1}))).eval()


def outputs(model: Any) -> dict[str, Any]:
    ids = torch.tensor([list(b"abc")])
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    return {
        "logits": model(ids).logits.tolist(),
        "hidden": model.model(ids).last_hidden_state.tolist(),
        "ids": generated.tolist(),
        "text": CharformerTokenizer().decode(generated[0]),
    }


def parts(repo: str) -> dict[str, Any]:
    """The model and the tokenizer by calls of their own; other weights after a tag; the model for inference."""
    first, second = make_model(0), make_model(1)
    first.push_to_hub(repo)
    CharformerTokenizer().push_to_hub(repo)
    HfApi().create_tag(repo, tag="v1")
    second.push_to_hub(repo)
    second.without_auxiliary_heads().push_to_hub(f"{repo}-inference")
    CharformerTokenizer().push_to_hub(f"{repo}-inference")
    return {"first": outputs(first), "second": outputs(second)}


def added_losses(repo: str) -> list[list[float]]:
    """Weights of a head of a plain model with added losses: its own, and what comes back of each way to push it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 256, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
    plain: Any = GPT2LMHeadModel(GPT2Config(**sizes))
    model: Any = add_auxiliary_losses(plain, num_targets=2)
    torch.nn.init.normal_(model.auxiliary_heads.target_2.linear.bias)
    model.push_to_hub(repo)
    model.save_pretrained("saved", push_to_hub=True, repo_id=f"{repo}-saved")
    saved: Any = GPT2LMHeadModel.from_pretrained("saved")
    saved.push_to_hub(f"{repo}-old")
    HfApi().upload_file(path_or_fileobj=f"saved/{HEADS_FILE}", path_in_repo=OLD_HEADS_FILE, repo_id=f"{repo}-old")
    repositories = (repo, f"{repo}-saved", f"{repo}-old")
    loaded: Any = [load_auxiliary_losses(GPT2LMHeadModel.from_pretrained(name), name) for name in repositories]
    return [each.auxiliary_heads.target_2.linear.bias.tolist() for each in (model, *loaded)]


def train(repo: str, strategy: str, text: str, output_dir: str, *more: str) -> dict[str, Any]:
    """`charformer-train` with the flags that push, and `more`; `--field=value` there replaces one of a small run."""
    hub: dict[str, Any] = {
        "push_to_hub": True,
        "hub_model_id": repo,
        "hub_strategy": strategy,
        "hub_always_push": True,
    }
    hub |= dict(word[2:].split("=", 1) for word in more if "=" in word)
    further = [word for word in more if "=" not in word]
    if status := main([*small_command(data_path=text, output_dir=output_dir, save_total_limit=1, **hub), *further]):
        sys.exit(status)
    return outputs(CharformerForCausalLM.from_pretrained(output_dir).eval())


def load(repo: str) -> dict[str, Any]:
    """What is loaded where the package is installed, without trust in remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(repo)
    tokenizer = AutoTokenizer.from_pretrained(repo)
    return outputs(model) | {"modules": [type(model).__module__, type(tokenizer).__module__]}


def refusals(text: str, output_dir: str) -> dict[str, str]:
    """What charformer-train says to those who cannot push."""
    cases = {
        "wrong token": ("hf_wrong", "user/failed"),
        "no token": (None, "user/failed"),
        "read-only token": ("hf_read", "user/failed"),
        "read-only token, existing": ("hf_read", "user/existing"),
        "someone else's": ("hf_other", "user/failed"),
        "invalid name": ("hf_write", "user/not a name"),
    }
    said = {}
    for case, (token, repo) in cases.items():
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        hub = [f"--hub_model_id={repo}", "--push_to_hub", "true"]
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            assert main([*small_command(data_path=text, output_dir=output_dir), *hub]) == 1
        said[case] = errors.getvalue()
    return said


def load_with_tokens(repo: str) -> dict[str, str]:
    """What those see who may not read it, and who may."""
    said = {}
    for token in ("", "hf_other", "hf_write"):
        os.environ["HF_TOKEN"] = token
        try:
            CharformerForCausalLM.from_pretrained(repo)
            said[token] = "loaded"
        except OSError as error:
            said[token] = str(error)
    return said


def push_again(folder: str, repo: str) -> None:
    """What is on disk, after a push that failed."""
    model: Any = CharformerForCausalLM.from_pretrained(folder)
    model.push_to_hub(repo)
    CharformerTokenizer.from_pretrained(folder).push_to_hub(repo)


if __name__ == "__main__":
    commands: Any = (parts, added_losses, train, load, refusals, load_with_tokens, push_again)
    command = next(command for command in commands if command.__name__ == sys.argv[1])
    print(json.dumps(command(*sys.argv[2:])))
