"""`use_extra_targets` of any causal language model: the heads draft, and the text is the model's own."""

import copy
import functools
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, set_seed
from transformers.generation.streamers import BaseStreamer

from charformer_training import add_auxiliary_losses, load_auxiliary_losses
from modeling_charformer import drafting_charformer, verification_charformer
from modeling_charformer.compatibility import CACHE
from tests.training.any_models import build


TEXT = torch.tensor([[5, 9, 14, 5, 33, 21, 40, 7, 5, 9, 50, 11, 12, 33, 21, 60, 3, 17, 9, 14, 22, 5, 33, 8, 29, 41]])
PROMPT = TEXT[:, :3]
# Position embeddings that are learned, rotary, linear biases; sliding windows; experts.
KINDS = ["gpt2", "llama", "qwen3", "gpt_neox", "gemma2", "mistral", "mixtral", "bloom", "opt"]
SLIDING = {"sliding_window": 6}
MORE: dict[str, dict[str, Any]] = {
    "mistral": SLIDING,
    "gemma2": SLIDING,
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "bloom": {"n_layer": 4, "n_head": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
}


@functools.cache
def half_trained(kind: str, heads: str = "shared"):
    """One whose drafts are right now and then: it has learned a text by heart, half-way."""
    model = add_auxiliary_losses(
        build(kind, **MORE.get(kind, {})), heads=heads, num_targets=4, intermediate_layers=None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        model(input_ids=TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def passes(model, prompt=PROMPT, **settings):
    """What is generated, and in how many forward passes."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1

    handle = model.get_decoder().register_forward_hook(hook)
    ids = model.generate(prompt, **{"max_new_tokens": 24, "do_sample": False, "eos_token_id": None} | settings)
    handle.remove()
    return ids, count


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_of_any_model_is_the_plain_one_in_fewer_passes(kind):
    model = half_trained(kind)
    plain, plain_passes = passes(model)
    drafted, drafted_passes = passes(model, use_extra_targets=True)
    assert drafted.tolist() == plain.tolist()
    assert drafted_passes < 0.7 * plain_passes


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "inputs": torch.tensor([[0] * (longest - len(one)) + one for one in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts]),
    }


pytestmark = pytest.mark.usefixtures("drafts_in_every_pass")
BATCH = left_padded([[5, 9, 14], [33, 21, 40, 7, 5], [9], [12, 33, 21, 60]])


@pytest.mark.parametrize("eos", [None, 21])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "mixtral", "bloom"])
def test_rows_of_a_batch_are_accepted_each_at_its_own_pace(kind, eos):
    model = half_trained(kind)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    plain = model.generate(**BATCH, **settings)
    kept = []
    forward = type(model).forward
    handle = model.get_decoder().register_forward_hook(lambda _, __, out: kept.append(out[0].shape[1]))
    drafted = model.generate(**BATCH, use_extra_targets=True, **settings)
    handle.remove()
    assert drafted.tolist() == plain.tolist()
    assert max(kept[1:]) > 1
    assert len(kept) < 20
    assert forward is type(model).forward


def test_finished_rows_are_not_passed_through_the_model(drafts_in_every_pass):
    model, sizes = half_trained("llama"), []
    settings = BATCH | {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**settings)
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    drafted = model.generate(use_extra_targets=True, **settings)
    handle.remove()
    assert drafted.tolist() == plain.tolist()
    assert sizes[0] == 4
    assert sizes[-1] <= 2


def test_the_rows_that_are_behind_decide_how_much_is_drafted(monkeypatch):
    deciding, lengths = [], []
    write = drafting_charformer.write_drafts

    def watched(*args):
        deciding.append(args[-1])
        return write(*args)

    def draft(self, behind):
        lengths.append([self.lengths[row] if row in self.live else None for row in range(self.rows)])
        return of_drafts(self, behind)

    of_drafts = verification_charformer.VerifiedDecoding._draft
    monkeypatch.setattr(verification_charformer, "write_drafts", watched)
    monkeypatch.setattr(verification_charformer.VerifiedDecoding, "_draft", draft)
    half_trained("llama").generate(
        use_extra_targets=True, **BATCH, max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert any(len(rows) < 4 for rows in deciding)
    for rows, written in zip(deciding, lengths, strict=False):  # the last passes have no place for drafts
        live = sorted(length for length in written if length is not None)
        slow = [
            row for row, length in enumerate(written) if length is not None and length <= live[(len(live) - 1) // 2]
        ]
        assert rows == slow
        assert 2 * len(rows) >= len(live)


def test_a_repetition_penalty_leaves_the_padding_of_each_row_out():
    model = half_trained("llama")
    settings = BATCH | {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.3}
    assert model.generate(use_extra_targets=True, **settings).tolist() == model.generate(**settings).tolist()


def test_several_texts_of_one_prompt():
    model = half_trained("llama")
    settings = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": True, "use_extra_targets": True, "top_k": 0}
    set_seed(3)
    ids = model.generate(PROMPT, num_return_sequences=5, **settings)
    assert ids.shape == (5, 23)
    assert len({tuple(row) for row in ids.tolist()}) == 5


@pytest.mark.parametrize("batch", [{"inputs": PROMPT}, BATCH], ids=["one", "batch"])
def test_sampled_text_does_not_depend_on_the_drafts(batch):
    """The same seed writes the same text with good, bad and no drafts, which no other sampling would."""
    model = half_trained("llama")
    settings = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": True, "use_extra_targets": True, "top_k": 0}
    bad = copy.deepcopy(model)
    for head in bad.auxiliary_heads.values():
        torch.nn.init.normal_(head.linear.weight, std=3.0)
    texts = []
    for one in (model, bad):
        set_seed(3)
        texts.append(one.generate(**batch, **settings).tolist())
        texts.append([float(torch.rand(()))])
    assert texts[:2] == texts[2:]
    set_seed(4)
    assert model.generate(**batch, **settings).tolist() != texts[0]


class Collect(BaseStreamer):
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ids.append("end")


def test_streamed_scored_and_stopped_text_is_the_plain_one():
    model, streamer = half_trained("qwen3"), Collect()
    settings: dict[str, Any] = {
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": 60,
        "return_dict_in_generate": True,
    }
    settings |= {"output_scores": True, "output_logits": True, "repetition_penalty": 1.05}
    plain = model.generate(PROMPT, **settings)
    drafted = model.generate(PROMPT, use_extra_targets=True, streamer=streamer, **settings)
    assert plain.sequences[0, -1] == 60
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert streamer.ids == [*plain.sequences[0].tolist(), "end"]
    for name in ("scores", "logits"):
        for one, other in zip(drafted[name], plain[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert drafted[CACHE].get_seq_length() == plain[CACHE].get_seq_length()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"cache_implementation": "static"}, "cannot be taken out of a StaticCache"),
        ("llama", {"use_cache": False}, "use_cache is False"),
        ("llama", {"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ("mistral", BATCH, "a batch of a model with sliding windows"),
        (
            "llama",
            BATCH | {"prefix_allowed_tokens_fn": lambda row, ids: [row + 3]},
            "PrefixConstrainedLogitsProcessor",
        ),
        ("llama", BATCH | {"logits_processor": "own"}, "a batch with a Own"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_cannot_be_drafted_is_plain_text_with_one_warning(kind, settings, message):
    class Own(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(1, dims=0)

    model = half_trained(kind)
    settings = {"inputs": PROMPT, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None} | settings
    if settings.get("logits_processor"):
        settings["logits_processor"] = LogitsProcessorList([Own()])
    plain = model.generate(**settings)
    with pytest.warns(UserWarning, match=message) as warned:
        drafted = model.generate(use_extra_targets=True, **settings)
    assert len(warned) == 1
    plain, drafted = (getattr(one, "sequences", one) for one in (plain, drafted))
    assert drafted.tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "does not go with beam search"),
        ({"prompt_lookup_num_tokens": 2}, "two ways to draft"),
        ({"assistant_early_exit": 2}, "two ways to draft"),
        ({"guidance_scale": 2.0}, "must see each character once"),
        ({"use_extra_targets": "yes"}, "use_extra_targets is 'yes'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        half_trained("llama").generate(PROMPT, **{"use_extra_targets": True, "max_new_tokens": 8} | settings)


def test_an_assistant_beside_the_heads_is_refused():
    model = half_trained("llama")
    with pytest.raises(ValueError, match="two ways to draft"):
        model.generate(PROMPT, use_extra_targets=True, assistant_model=copy.deepcopy(model), max_new_tokens=8)


def test_a_model_without_further_targets_says_so():
    model = add_auxiliary_losses(build("llama"), num_targets=1)
    with pytest.raises(ValueError, match="num_targets of 2 or more.*num_targets=1"):
        model.generate(PROMPT, use_extra_targets=True)


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_heads_of_a_saved_folder_draft(tmp_path, heads):
    model = half_trained("llama", heads)
    model.save_pretrained(tmp_path)
    loaded = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path).eval()
    expected, count = passes(model, use_extra_targets=True)
    assert passes(model)[0].tolist() == expected.tolist()
    found, again = passes(loaded, use_extra_targets=True)
    assert found.tolist() == expected.tolist()
    assert count < 20
    assert again < 20


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_heads_draft_with_adapters_and_outlive_merging(tmp_path):
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        copy.deepcopy(half_trained("llama")),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False),
    ).eval()
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = model.generate(input_ids=PROMPT, **settings)
    drafted = model.generate(input_ids=PROMPT, use_extra_targets=True, **settings)
    assert drafted.tolist() == plain.tolist()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = load_auxiliary_losses(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path).eval()
    for name, weight in half_trained("llama").auxiliary_heads.state_dict().items():
        assert loaded.auxiliary_heads.state_dict()[name].equal(weight)
    assert loaded.generate(PROMPT, use_extra_targets=True, **settings).tolist() == plain.tolist()


@pytest.mark.parametrize("tokens", [50, 80])
def test_heads_of_a_vocabulary_resized_since_draft_all_the_same(tokens):
    model = copy.deepcopy(half_trained("llama", "own"))
    model.resize_token_embeddings(tokens, mean_resizing=False)
    expected, plain = passes(model)
    found, count = passes(model, use_extra_targets=True)
    assert found.tolist() == expected.tolist()
    assert count < plain
    drafted = model.generate(PROMPT, use_extra_targets=True, do_sample=True, max_new_tokens=20)
    assert int(drafted.max()) < tokens


@pytest.mark.parametrize("sizes", [{"vocab_size": 97}, {"hidden_size": 64}], ids=str)
def test_heads_of_another_model_are_refused(tmp_path, sizes):
    model = half_trained("llama", "own")
    model.save_pretrained(tmp_path)
    other = build("llama", **sizes)
    other.config.auxiliary_losses = model.config.auxiliary_losses
    with pytest.raises(
        ValueError, match=r"another model: its auxiliary_heads\.target_2\.weight has the shape \(61, 16\)"
    ):
        load_auxiliary_losses(other, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
def test_one_scale_for_all_tokens_is_plain_text_with_one_warning():
    model = copy.deepcopy(half_trained("llama"))
    torch.ao.quantization.quantize_dynamic(model.model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    settings = BATCH | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**settings)
    with pytest.warns(UserWarning, match="quantize all tokens of a pass together"):
        drafted = model.generate(use_extra_targets=True, **settings)
    assert drafted.tolist() == plain.tolist()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_heads_are_saved_beside_an_adapter(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model: Any = add_auxiliary_losses(get_peft_model(build("llama"), lora), num_targets=3, intermediate_layers=None)
    for weight in model.get_base_model().auxiliary_heads.parameters():
        torch.nn.init.normal_(weight)
    copy.deepcopy(pickle.loads(pickle.dumps(model))).save_pretrained(tmp_path)
    loaded: Any = load_auxiliary_losses(PeftModel.from_pretrained(build("llama"), tmp_path), tmp_path)
    expected = model.get_base_model().auxiliary_heads.state_dict()
    found = loaded.get_base_model().auxiliary_heads.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(weight) for name, weight in expected.items())


@pytest.mark.slow
def test_stock_early_exit_drafts_by_a_trained_layer_without_the_package(tmp_path):
    """Shared heads of layers are the model's own output embeddings, which is what Transformers' early exit runs."""
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
prompt = torch.tensor([[int(one) for one in sys.argv[2].split()]])
settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
plain = model.generate(prompt, **settings)
passes = []
model.model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
drafted = model.generate(prompt, assistant_early_exit=2, **settings)
assert drafted.tolist() == plain.tolist()
assert not [name for name in sys.modules if "charformer" in name]
print(len(passes))
"""
    model = add_auxiliary_losses(
        build("llama"), num_targets=1, intermediate_layers=[2], intermediate_schedule="constant"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=TEXT, labels=TEXT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path), " ".join(map(str, PROMPT[0].tolist()))]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 14  # passes of the last layer, for 20 tokens
