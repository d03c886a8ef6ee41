"""vLLM drafts with exported heads: the text that it writes without, and as many drafts right as in our own greedy drafting."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from charformer_training import add_auxiliary_losses, export_draft_heads, frequent_tokens, load_auxiliary_losses
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer
from tests.serving.models import CHARFORMER, CORPUS, SIZES, TEXTS, train


PROMPTS = [list(text.encode()[:length]) for text in TEXTS for length in (5, 12)]
TARGETS, LENGTH = 3, 60
PROGRAM = Path(__file__).with_name("drafting_program.py")
REAL = Path(os.environ.get("REAL_MODEL", "runs/real_model")).absolute()
REAL_PROMPTS = (
    "import os\n\ndef read_lines(path):",
    "class Stack:\n    def __init__(self):",
    "def fibonacci(n):",
    "The capital of France is",
)


def make(name: str) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        llama: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, **(SIZES | {"bos_token_id": None})))
        # All bytes of the texts but some: they are never drafted.
        drafted = frequent_tokens([list(CORPUS)], len({*CORPUS}) - 10)
        return add_auxiliary_losses(llama, num_targets=TARGETS, intermediate_layers=None, draft_vocabulary=drafted)
    return CharformerForCausalLM(
        CharformerConfig(**(CHARFORMER | {"num_targets": TARGETS, "target_heads": name.split("-")[1]}))
    )


def served(folder: Path, heads: Path | str, prompts: list[list[int]], drafts: int) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), str(folder), str(heads), str(drafts), str(LENGTH)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run(
        command, input=json.dumps(prompts), capture_output=True, text=True, env=environment, timeout=900
    )
    found = [line for line in run.stdout.splitlines() if line.startswith("RESULTS")]
    assert found, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(found[0].removeprefix("RESULTS"))


@torch.no_grad()
def accepted_by_hand(model: Any, prompt: list[int], text: list[int]) -> tuple[int, int]:
    """Accepted drafts and passes with drafts, if each pass drafts with all heads, one candidate each."""
    written, accepted, passes = 1, 0, 0
    while written < len(text):
        ids = torch.tensor([prompt + text[: written - 1]])
        state = model.get_decoder()(ids).last_hidden_state[:, -1]
        drafts = [
            int(model.draft(k, state, ids[:, -1])[0].argmax()) for k in range(2, model.loss_settings.num_targets + 1)
        ]
        right = 0
        while right < len(drafts) and text[written + right : written + right + 1] == [drafts[right]]:
            right += 1
        accepted, passes, written = accepted + right, passes + 1, written + right + 1
    return accepted, passes


@pytest.mark.parametrize("name", ["charformer-linear", "charformer-residual", "llama"])
@pytest.mark.filterwarnings("ignore:the layout has no bias:UserWarning")
def test_exported_heads_draft_in_vllm_as_in_transformers(name, tmp_path):
    model = train(make(name))
    model.save_pretrained(tmp_path / "model")
    CharformerTokenizer().save_pretrained(tmp_path / "model")
    export_draft_heads(model, tmp_path / "heads")
    check(name, model, tmp_path / "model", tmp_path / "heads", PROMPTS)


def check(name: str, model: Any, folder: Path, heads: Path, prompts: list[list[int]]) -> None:
    drafts = model.loss_settings.num_targets - 1
    plain, drafted = served(folder, "none", prompts, drafts), served(folder, heads, prompts, drafts)
    assert drafted["texts"] == plain["texts"]
    assert len({tuple(text) for text in plain["texts"]}) == len(prompts)
    counts = [accepted_by_hand(model, *one) for one in zip(prompts, plain["texts"], strict=True)]
    expected = sum(one[0] for one in counts) / sum(one[1] for one in counts)
    counters = drafted["counters"]
    found = counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_drafts"]
    print(f"\n{name}: {1 + found:.3f} tokens a pass in vLLM, {1 + expected:.3f} by hand")
    assert found > 0.1
    assert 1 + found == pytest.approx(1 + expected, rel=0.05)


@pytest.mark.skipif(
    not (REAL / "shared").exists(), reason=f"python -m benchmarks.real_model --heads shared makes {REAL}"
)
def test_heads_of_a_real_model_draft_in_vllm_as_in_transformers():
    model = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(REAL / "shared"), REAL / "shared").eval()
    tokenizer = AutoTokenizer.from_pretrained(REAL / "shared")
    prompts = [tokenizer(text).input_ids for text in REAL_PROMPTS]
    check("SmolLM2-135M", model, REAL / "model", REAL / "shared" / "medusa", prompts)
