import pytest
import torch
from transformers import AutoTokenizer

from modeling_charformer import CharformerTokenizer


TEXTS = ["", "plain", "äöü €", "日本語\r\n\0\t", "🙂🙃" * 3, "<pad></s><s>", "a" * 1000]


@pytest.fixture(params=[{}, {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}], ids=["plain", "special"])
def tokenizer(request) -> CharformerTokenizer:
    return CharformerTokenizer(**request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes_and_decode_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode(text) == ids


def test_any_bytes_round_trip(tokenizer):
    raw = bytes(range(256)) * 2
    assert bytes(tokenizer(raw)["input_ids"]) == raw
    assert isinstance(tokenizer.decode(list(raw)), str)


def test_invalid_utf8_decodes_without_raising():
    assert CharformerTokenizer().decode([0x61, 0xFF, 0xE2, 0x82]) == "a\ufffd\ufffd"
    exact = CharformerTokenizer(errors="surrogateescape")
    text = exact.decode(list(range(256)))
    assert bytes(exact(text)["input_ids"]) == bytes(range(256))


def test_vocabulary_is_256_ids_with_and_without_special_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 256
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))


def test_special_tokens_take_byte_values_that_utf8_never_uses():
    tokenizer = CharformerTokenizer(pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (255, 254, 253)
    assert tokenizer.decode([104, 105, 254, 255]) == "hi</s><pad>"
    assert tokenizer.decode([104, 105, 254, 255], skip_special_tokens=True) == "hi"
    assert CharformerTokenizer().pad_token_id is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_and_masked(side):
    tokenizer = CharformerTokenizer(pad_token="<pad>", padding_side=side)
    batch = tokenizer(["ab", "ä", "xyz!"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (3, 4)
    assert batch["attention_mask"].sum(1).tolist() == [2, 2, 4]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["ab", "ä", "xyz!"]
    assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 255).all())


def test_padding_without_a_pad_token_raises():
    with pytest.raises(ValueError, match="pad"):
        CharformerTokenizer()(["a", "bc"], padding=True)


def test_truncation_and_tensors(tokenizer):
    batch = tokenizer("abcdef", truncation=True, max_length=4, return_tensors="pt")
    assert torch.equal(batch["input_ids"], torch.tensor([[97, 98, 99, 100]]))


def test_special_tokens_added_later_take_the_same_places():
    tokenizer = CharformerTokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 255 and len(tokenizer) == 256
    assert tokenizer("<pad>")["input_ids"] == list(b"<pad>")
    tokenizer.pad_token = tokenizer.eos_token = "<pad>"
    assert tokenizer.eos_token_id == 255


def test_tokens_beyond_the_256_bytes_are_refused():
    tokenizer = CharformerTokenizer()
    with pytest.raises(ValueError, match=r"cannot take the tokens \['<mask>'\]"):
        tokenizer.add_tokens(["<mask>"])
    with pytest.raises(ValueError, match="no place for cls_token"):
        tokenizer.add_special_tokens({"cls_token": "<cls>"})
    with pytest.raises(ValueError, match="<unk>"):
        CharformerTokenizer(unk_token="<unk>")


@pytest.mark.parametrize("ids", [[256], [-1], [97, 1000]])
def test_ids_that_are_no_bytes_do_not_decode(ids):
    with pytest.raises(ValueError, match="outside 0..255"):
        CharformerTokenizer().decode(ids)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is CharformerTokenizer and len(loaded) == 256
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.errors) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.errors,
    )
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_slow_way_through_tokens_agrees(tokenizer):
    text = "Größe 🙂"
    tokens = tokenizer.tokenize(text)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(text.encode())
    assert tokenizer.convert_tokens_to_string(tokens) == text
