import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, TextStreamer, pipeline

from modeling_charformer import (
    CharformerConfig,
    CharformerForCausalLM,
    CharformerModel,
    CharformerTokenizer,
    cross_entropy,
    layers_charformer,
)
from modeling_charformer.compatibility import CACHE
from modeling_charformer.drafting_charformer import as_string, continuation


def reference_logits(model: CharformerForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The architecture once more, straight from its description and for one row at a time."""
    weights, config = model.state_dict(), model.config

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def attention(x, name):
        size = config.hidden_size // config.num_attention_heads
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = (linear(x, f"{name}.{letter}_proj")[:, part] for letter in "qkv")
            scores = q @ k.T / size**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v)
        return linear(torch.cat(heads, -1), f"{name}.o_proj")

    def feed_forward(x, name):
        return linear(F.relu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    rows = []
    for row in ids:
        x = weights["model.embed_tokens.weight"][row]
        for number in range(config.num_hidden_layers):
            layer = f"model.layers.{number}"
            x = x + weights[f"{layer}.position_embeddings.weight"][: len(row)]
            if config.norm_placement == "pre":
                x = x + attention(norm(x, f"{layer}.attention_norm"), f"{layer}.self_attn")
                x = x + feed_forward(norm(x, f"{layer}.mlp_norm"), f"{layer}.mlp")
            else:
                x = norm(x + attention(x, f"{layer}.self_attn"), f"{layer}.attention_norm")
                x = norm(x + feed_forward(x, f"{layer}.mlp"), f"{layer}.mlp_norm")
        rows.append(linear(norm(x, "model.norm") if config.norm_placement == "pre" else x, "lm_head"))
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_logits_match_the_reference(make_model, make_ids, placement, implementation):
    model, ids = make_model(norm_placement=placement).eval(), make_ids()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference_logits(model, ids), rtol=1e-4, atol=1e-5)


# Transformers asks flex attention for its mask in a way that torch has deprecated.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@torch.no_grad()
@pytest.mark.slow
def test_flex_attention_agrees(make_model, make_ids):
    # Power-of-two heads of 16 are the least that flex attention takes.
    model = make_model(hidden_size=32, max_position_embeddings=128).eval()
    ids = make_ids(length=128)
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "inference", "training"), [(12, 41.24, 44.26), (64, 218.79, 235.47)])
def test_parameter_counts_are_the_papers(layers, inference, training):
    with torch.device("meta"):
        model = CharformerForCausalLM(CharformerConfig(num_hidden_layers=layers))
        plain = CharformerForCausalLM(
            CharformerConfig(num_hidden_layers=layers, num_targets=1, intermediate_layers=None)
        )
    assert round(model.num_parameters() / 1e6, 2) == training
    assert round(plain.num_parameters() / 1e6, 2) == inference


def test_hidden_states_and_attentions(make_model, make_ids):
    model, ids = make_model().eval(), make_ids(length=7)
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 7, 16)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, 7, 7)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 2, 7))
    assert model(ids).hidden_states is None
    assert isinstance(model(ids, return_dict=False), tuple)


def test_logits_to_keep(make_model, make_ids):
    model, ids = make_model().eval(), make_ids()
    every = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, every[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, every[:, [0, 5]])
    order = torch.arange(19, -1, -1)
    torch.testing.assert_close(model(ids, labels=ids, logits_to_keep=order).loss, model(ids, labels=ids).loss)
    kept = model(ids, labels=ids, logits_to_keep=1)
    assert kept.logits.shape == (2, 1, 256)
    torch.testing.assert_close(kept.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(make_model, make_ids, reentrant):
    ids, results = make_ids(), []
    for checkpointing in (False, True):
        model = make_model(activation_dropout=0.1, attention_dropout=0.1)
        if checkpointing:
            if hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            else:  # its name in Transformers 5.17
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        results.append((output.loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])


def test_inputs_embeds_replace_ids(make_model, make_ids):
    model, ids = make_model().eval(), make_ids()
    embeds = model.get_input_embeddings()(ids)
    expected, given = model(ids, labels=ids), model(inputs_embeds=embeds, labels=ids)
    torch.testing.assert_close(given.logits, expected.logits)
    torch.testing.assert_close(given.loss, expected.loss)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeds)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(make_model, make_ids, side):
    model, ids = make_model().eval(), make_ids(batch=1, length=9)
    expected = model(ids, labels=ids)
    pads = torch.full((1, 4), 7)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    text = slice(4, None) if side == "left" else slice(0, 9)
    mask = torch.zeros_like(padded)
    mask[:, text] = 1
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, text.start] = -100  # the first character: in front of it there is only padding to predict it from
    output = model(padded, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.logits[:, text], expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


def test_packed_rows_are_separate_texts(make_model, make_ids):
    model, a, b = make_model().eval(), make_ids(1, 8, seed=1), make_ids(1, 5, seed=2)
    positions = torch.cat([torch.arange(8), torch.arange(5)])[None]
    for use_cache in (False, True):
        packed = model(torch.cat([a, b], 1), position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(packed, torch.cat([model(a).logits, model(b).logits], 1))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cached_forward_by_either_name_equals_full_forward(make_model, make_ids, name):
    model, ids = make_model().eval(), make_ids(length=12)
    cache = model(ids[:, :5], use_cache=True)[CACHE]
    parts = [model(ids[:, start:end], **{name: cache}).logits for start, end in ((5, 6), (6, 12))]
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


def test_two_caches_are_refused(make_model, make_ids):
    model = make_model().eval()
    full, other = (model(make_ids(1, 4), use_cache=True)[CACHE] for _ in range(2))
    for part in (model, model.model):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            part(make_ids(1, 4), cache=full, past_key_values=other)
    found = model(make_ids(1, 4), cache=DynamicCache(), past_key_values=other)  # as PEFT hands a prefix over
    assert found[CACHE].get_seq_length() == 8


def greedy_reference(model, row: torch.Tensor, count: int) -> list[int]:
    ids = row.tolist()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_greedy_generation_equals_repeated_full_forwards(make_model, make_ids, placement):
    model, ids = make_model(norm_placement=placement).eval(), make_ids(batch=2, length=5)
    expected = [greedy_reference(model, row, 15) for row in ids]
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        prompts = ids[:1] if "prompt_lookup_num_tokens" in settings else ids
        generated = model.generate(prompts, max_new_tokens=15, do_sample=False, disable_compile=True, **settings)
        assert generated.tolist() == expected[: len(prompts)], settings


def test_left_padded_batch_generates_what_each_prompt_does_alone(make_model):
    model = make_model().eval()
    tokenizer = CharformerTokenizer(pad_token="<pad>", padding_side="left")
    prompts = ["a", "bcd", "efghijk"]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=255)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert row[-8:].tolist() == alone[0, -8:].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "eos_token_id": 10},
    ],
    ids=str,
)
def test_generation_modes_with_and_without_cache_agree(make_model, make_ids, settings):
    model, ids = make_model().eval(), make_ids(batch=1, length=5)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"pad_token_id": 0, "max_new_tokens": 10} | settings
        results.append(model.generate(ids, use_cache=use_cache, **options).tolist())
    assert results[0] == results[1] and len(results[0][0]) > 5


def test_assisted_generation_is_exact(make_model, make_ids):
    model, ids = make_model().eval(), make_ids(batch=1, length=5)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.bias.normal_()
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert model.generate(ids, max_new_tokens=10, do_sample=False, assistant_model=assistant).equal(expected)


def test_drafts_stop_at_the_end_of_the_window(make_model):
    model = make_model().eval()
    for number in range(8):
        ids = torch.randint(97, 99, (1, 6), generator=torch.Generator().manual_seed(number))
        expected = model.generate(ids, max_new_tokens=18, do_sample=False)
        drafted = model.generate(ids, max_new_tokens=18, do_sample=False, prompt_lookup_num_tokens=10)
        assert drafted.equal(expected) and expected.shape == (1, 24)


def test_streaming_and_pipeline(make_model, capsys):
    model, tokenizer = make_model().eval(), CharformerTokenizer()
    inputs = tokenizer("ab", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.startswith("ab")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generator("ab", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0])


def test_default_generation_length_stays_inside_the_window(make_model, make_ids):
    """The window's end is the default; a length of the model's own generation config is cut there, one that is asked for is not."""
    model = make_model().eval()
    assert model.generate(make_ids(1, 4), do_sample=False).shape[1] == 24
    model.generation_config.max_new_tokens = 256
    assert model.generate(make_ids(1, 20), do_sample=False).shape[1] == 24
    assert model.generate(make_ids(1, 20), do_sample=False, max_new_tokens=2).shape[1] == 22
    model.generation_config.max_new_tokens = None
    assert model.generate(make_ids(1, 20), do_sample=False, max_length=23).shape[1] == 23


def test_generation_past_the_window_raises_before_it_begins(make_model, make_ids):
    model = make_model().eval()
    with pytest.raises(
        ValueError, match=r"prompt \(20\) and new characters \(5\) come to 25.*=24.*max_new_tokens to 4"
    ):
        model.generate(make_ids(1, 20), max_new_tokens=5)
    with pytest.raises(ValueError, match="prompt is 24 characters long.*last 23"):
        model.generate(make_ids(1, 24), max_new_tokens=1)
    assert model.generate(make_ids(1, 20), max_new_tokens=4).shape == (1, 24)


def test_sequence_past_the_window_raises(make_model, make_ids):
    model = make_model().eval()
    with pytest.raises(ValueError, match="25 characters long, longer than the window of max_position_embeddings=24"):
        model(make_ids(1, 25))
    cache = model(make_ids(1, 20), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=r"25 characters long \(20 of them cached\)"):
        model(make_ids(1, 5), cache=cache)
    with pytest.raises(ValueError, match=r"position_ids contains 24; it must be in 0..23"):
        model(make_ids(1, 2), position_ids=torch.tensor([[23, 24]]))


@pytest.mark.parametrize("value", [256, -1])
def test_ids_outside_the_vocabulary_raise(make_model, make_ids, value):
    model, ids = make_model(), make_ids()
    wrong = ids.clone()
    wrong[1, 2] = value
    with pytest.raises(ValueError, match=rf"input_ids contains {value}; it must be in 0..255 \(vocab_size=256\)"):
        model(wrong)
    with pytest.raises(ValueError, match=f"labels contains {value}"):
        model(ids, labels=wrong)


def test_a_mask_that_numbers_packed_texts_raises(make_model, make_ids):
    mask = torch.tensor([[1] * 10 + [2] * 10])
    with pytest.raises(ValueError, match=r"attention_mask holds 2; it must hold 0 and 1.*give position_ids"):
        make_model()(make_ids(1, 20), attention_mask=mask)


def test_labels_of_another_shape_raise(make_model, make_ids):
    with pytest.raises(ValueError, match=r"labels have the shape \(2, 19\), the input \(2, 20\)"):
        make_model()(make_ids(), labels=make_ids(2, 19))


def test_save_and_load_give_the_same_logits_and_losses(make_model, make_ids, tmp_path):
    model, ids = make_model(num_targets=3), make_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CharformerForCausalLM
    assert loaded.eval()(ids).logits.equal(model.eval()(ids).logits)
    expected, output = model.train()(ids, labels=ids), loaded.train()(ids, labels=ids)
    assert output.loss_dict == expected.loss_dict


def test_base_model_loads_from_the_language_model(make_model, make_ids, tmp_path):
    model, ids = make_model().eval(), make_ids()
    model.save_pretrained(tmp_path)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is CharformerModel and not info["missing_keys"] and not info["unexpected_keys"]
    assert base(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)


def test_heads_that_a_checkpoint_lacks_are_new_and_the_rest_is_kept(make_model, make_ids, tmp_path):
    plain, ids = make_model(num_targets=1, intermediate_layers=None).eval(), make_ids()
    plain.save_pretrained(tmp_path)
    wider = CharformerForCausalLM.from_pretrained(tmp_path, num_targets=3, intermediate_layers=[1])
    assert wider(ids).logits.equal(plain(ids).logits)
    weights = [weight for name, weight in wider.state_dict().items() if "auxiliary" in name and "weight" in name]
    assert all(0.05 < float(weight.std()) < 0.2 for weight in weights)
    assert not weights[0].equal(weights[1])


def test_tied_embeddings_stay_tied(make_model, make_ids, tmp_path):
    model, ids = make_model(tie_word_embeddings=True).eval(), make_ids()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = CharformerForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded(ids).logits.equal(model(ids).logits)


def test_without_auxiliary_heads_is_the_same_language_model(make_model, make_ids, tmp_path):
    model, ids = make_model(num_targets=3).eval(), make_ids()
    smaller = model.without_auxiliary_heads()
    assert smaller(ids).logits.equal(model(ids).logits)
    assert not smaller.auxiliary_heads and len(model.auxiliary_heads) == 8
    smaller.save_pretrained(tmp_path)
    loaded: Any
    info: Any
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[misc]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded(ids).logits.equal(model(ids).logits)
    smaller.lm_head.weight.data.zero_()
    assert model.lm_head.weight.any()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_head_follows_a_resized_vocabulary(make_model, make_ids, tmp_path, tied):
    model, ids = make_model(tie_word_embeddings=tied), make_ids()
    with torch.no_grad():
        before = model(ids, labels=ids)
    old = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.resize_token_embeddings(260)
    for name, weight in model.state_dict().items():
        assert weight[: len(old[name])].equal(old[name]), name  # those of the bytes are as they were
    assert {head.out_features for head in model.auxiliary_heads.values()} == {260}
    assert (model.config.vocab_size, model.lm_head.out_features) == (260, 260)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    after = model(ids, labels=ids)
    assert after.logits[..., :256].allclose(before.logits) and after.loss_dict.keys() == before.loss_dict.keys()
    added = torch.full_like(ids, 259)
    model(added, labels=added).loss.backward()
    assert all(head.weight.grad[259].any() for head in model.auxiliary_heads.values())
    with pytest.raises(ValueError, match="labels contains 260; it must be in 0..259"):
        model(ids, labels=ids + 260 - ids)
    model.save_pretrained(tmp_path)
    loaded = CharformerForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded(added).logits.equal(model.eval()(added).logits)
    assert model.resize_token_embeddings(256).num_embeddings == model.config.vocab_size == 256
    assert model(ids).logits.allclose(before.logits)


def test_drafts_look_up_added_tokens_too():
    ids = [300, 44, 256, 0, 65, 66, 67, 68, 69, 7, 300 - 256, 300, 44, 256, 0, 65, 66, 67, 68, 69]
    assert continuation(as_string(ids), 3, 8) == [7, 44, 300]
    assert continuation(as_string([*ids[:-1], ids[-1] + 256]), 3, 8) == []


@pytest.mark.slow
def test_compiled_training_step_is_the_eager_one(make_model, make_ids):
    """In one graph; `aot_eager` needs no compiler on the machine."""
    ids, results = make_ids(), []
    for compiled in (False, True):
        model = make_model()
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        output = step(ids, labels=ids, training_progress=0.2, use_cache=False)
        output.loss.backward()
        results.append(
            (output.loss_dict, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(results[0], results[1])
    ids = make_ids(length=21)
    torch.testing.assert_close(step(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_backward_takes_the_losses_of_a_layer_right_before_it(make_model, make_ids):
    """Otherwise the gradients of all layers' outputs are in memory at once."""
    model, ids, order = make_model(num_hidden_layers=4), make_ids(), []
    watched = {f"layer {number}": layer.mlp.fc2 for number, layer in enumerate(model.model.layers, start=1)}
    watched |= {f"losses {layer}": model.auxiliary_heads[f"layer_{layer}"] for layer in (1, 2, 3)}
    for name, module in watched.items():
        module.weight.register_post_accumulate_grad_hook(lambda _weight, name=name: order.append(name))
    model(ids, labels=ids, training_progress=0.0).loss.backward()
    assert order == ["layer 4", "losses 3", "layer 3", "losses 2", "layer 2", "losses 1", "layer 1"]


def test_intermediate_losses_keep_no_hidden_states_of_their_own(make_model, make_ids, monkeypatch):
    """They read what the next layer keeps for the backward pass anyway."""
    ids, sizes, hidden_state = make_ids(), {}, 2 * 20 * 16 * 4
    for layers in (None, "all"):
        model = make_model(num_hidden_layers=8, num_targets=1, intermediate_layers=layers)
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        def checkpoint(function, read, *inputs, **options):
            keep(read)  # positions and targets are small
            return torch.utils.checkpoint.checkpoint(function, read, *inputs, **options)

        monkeypatch.setattr(layers_charformer, "checkpoint", checkpoint)
        monkeypatch.setattr(cross_entropy, "checkpoint", checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, labels=ids, training_progress=0.0)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        sizes[layers] = sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights)
    assert sizes[None] > 8 * hidden_state
    assert sizes["all"] - sizes[None] < hidden_state


def test_autocast_casts_the_input_of_attention_once(make_model, make_ids):
    model, ids, inputs = make_model(num_hidden_layers=1), make_ids(), []
    for linear in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
        linear.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    query, key = inputs
    assert query.dtype == torch.bfloat16 and query.data_ptr() == key.data_ptr()
    torch.testing.assert_close(output.loss, model(ids, labels=ids).loss, rtol=0.02, atol=0.0)


def test_autocast_leaves_float64_and_the_meta_device_alone(make_model, make_ids):
    model, ids = make_model().double(), make_ids()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).logits.dtype == torch.float64
    assert model.to("meta")(ids.to("meta"), labels=ids.to("meta")).logits.shape == (2, 20, 256)
