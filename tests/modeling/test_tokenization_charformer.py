import pickle
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_charformer import CharformerTokenizer


TEXTS = ["", "plain", "äöü €", "日本語\r\n\0\t", "🙂🙃" * 3, "<pad></s><s> <|eos|>", "a" * 1000]
NO_SPECIAL: dict[str, Any] = {"pad_token": None, "eos_token": None, "bos_token": None}
NAMED: dict[str, Any] = {"pad_token": "[P]", "eos_token": "[E]", "bos_token": "[B]"}


@pytest.fixture(params=[{}, NAMED, NO_SPECIAL], ids=["default", "named", "none"])
def tokenizer(request) -> CharformerTokenizer:
    return CharformerTokenizer(**request.param)


@pytest.fixture
def rust() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the tokenizers library with the same ids: the control."""
    names = bytes_to_unicode()
    vocab = {names[byte]: byte for byte in range(255)} | {"<pad\ufdd0>": 255}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"model_max_length": 8, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad\ufdd0>", **options)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes_and_decode_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode(text) == ids


def test_any_bytes_round_trip(tokenizer):
    raw = bytes(range(256)) * 2
    ids = tokenizer(raw)["input_ids"]
    assert bytes(ids) == raw
    assert isinstance(tokenizer.decode(ids), str)


@pytest.mark.parametrize("special", [{}, NO_SPECIAL], ids=["default", "none"])
def test_text_with_every_byte_survives_decoding_and_encoding(special):
    exact = CharformerTokenizer(errors="surrogateescape", **special)
    assert bytes(exact(exact.decode(list(range(256))))["input_ids"]) == bytes(range(256))


def test_invalid_utf8_decodes_without_raising():
    assert CharformerTokenizer().decode([0x61, 0xF8, 0xE2, 0x82]) == "a\ufffd\ufffd"


def test_vocabulary_is_256_ids_with_and_without_special_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 256
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))


class TestSpecialTokens:
    def test_they_are_there_by_default_and_take_bytes_that_utf8_never_uses(self):
        tokenizer = CharformerTokenizer()
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (255, 254, 253)
        assert tokenizer.all_special_ids == [253, 254, 255]
        assert tokenizer("hi")["input_ids"] == list(b"hi") and tokenizer.num_special_tokens_to_add() == 0

    def test_their_names_in_a_text_are_the_tokens(self, tokenizer):
        if tokenizer.eos_token is None:
            return
        assert tokenizer("hi" + tokenizer.eos_token)["input_ids"] == [*b"hi", 254]  # as TRL's trainers end a text
        assert tokenizer("hi" + tokenizer.eos_token, split_special_tokens=True)["input_ids"][2:] == list(
            tokenizer.eos_token.encode()
        )

    def test_decoding_names_or_skips_them(self):
        tokenizer = CharformerTokenizer(**NAMED)
        assert tokenizer.decode([104, 105, 254, 255]) == "hi[E][P]"
        assert tokenizer.decode([104, 105, 254, 255], skip_special_tokens=True) == "hi"
        assert tokenizer.decode([0xE2, 255, 0x82, 0xAC], skip_special_tokens=True) == "€"
        assert tokenizer.decode(254) == "[E]"

    def test_without_a_pad_token_padding_raises(self):
        with pytest.raises(ValueError, match="pad"):
            CharformerTokenizer(pad_token=None)(["a", "bc"], padding=True)

    @pytest.mark.parametrize("how", ["attribute", "method", "loading"])
    def test_a_new_name_takes_the_old_ones_place(self, how, tmp_path):
        tokenizer = CharformerTokenizer()
        if how == "attribute":
            tokenizer.pad_token = "<pad>"
        elif how == "method":
            assert tokenizer.add_special_tokens({"pad_token": "<pad>"}) == 0
        else:
            tokenizer.save_pretrained(tmp_path)
            tokenizer = CharformerTokenizer.from_pretrained(tmp_path, pad_token="<pad>")
        assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", 255, 256)
        assert tokenizer("<pad>\ufdd0")["input_ids"] == [255, *"\ufdd0".encode()]
        assert "<pad\ufdd0>" not in tokenizer.get_vocab()

    def test_two_roles_can_share_a_token(self, tmp_path):
        tokenizer = CharformerTokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 254
        tokenizer.save_pretrained(tmp_path)
        assert CharformerTokenizer.from_pretrained(tmp_path).pad_token_id == 254
        tokenizer.eos_token = "<end>"
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 254

    def test_a_character_can_be_one(self):
        tokenizer = CharformerTokenizer(eos_token="\n")
        assert tokenizer.eos_token_id == 10 and len(tokenizer) == 256
        assert tokenizer("a\n")["input_ids"] == [97, 10]
        assert tokenizer.decode([97, 10], skip_special_tokens=True) == "a"

    @pytest.mark.parametrize("role", ["unk_token", "sep_token", "cls_token", "mask_token"])
    def test_other_roles_get_ids_of_their_own(self, role):
        tokenizer = CharformerTokenizer()
        with pytest.raises(ValueError, match=rf"{role} is '<x>'.*add_special_tokens"):
            setattr(tokenizer, role, "<x>")
        assert tokenizer.add_special_tokens({role: "<x>"}) == 1
        assert getattr(tokenizer, f"{role}_id") == 256 and len(tokenizer) == 257
        assert tokenizer("a<x>")["input_ids"] == [97, 256]
        options: dict[str, Any] = {role: "<x>"}
        assert CharformerTokenizer(**options)("a<x>")["input_ids"] == [97, 256]

    def test_a_role_without_a_token_has_no_id(self):
        assert CharformerTokenizer(**NO_SPECIAL).pad_token_id is None
        assert CharformerTokenizer().sep_token_id is None

    def test_a_saved_tokenizer_without_them_stays_so(self, tmp_path):
        CharformerTokenizer(**NO_SPECIAL).save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.all_special_tokens == [] and len(loaded) == 256


class TestAddedTokens:
    def test_their_ids_follow_the_bytes_and_they_are_found_in_text(self):
        tokenizer = CharformerTokenizer()
        assert tokenizer.add_tokens(["<a>", "<a>b", "€"]) == 3 and tokenizer.add_tokens("<a>") == 0
        assert len(tokenizer) == 259 and tokenizer.vocab_size == 256
        text = "x<a>y<a>b€é"
        ids = [120, 256, 121, 257, 258, *"é".encode()]
        assert tokenizer(text)["input_ids"] == ids  # of two that fit the longer one
        assert tokenizer.decode(ids) == text == tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.tokenize(text) == ["x", "<a>", "y", "<a>b", "€", "<0xC3>", "<0xA9>"]
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
        assert tokenizer.convert_ids_to_tokens(ids) == tokenizer.tokenize(text)
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
        assert tokenizer(text.encode())["input_ids"] == list(text.encode())  # raw bytes are taken as they are

    def test_special_ones_are_left_out_by_skip_special_tokens(self):
        tokenizer = CharformerTokenizer()
        assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]}) == 2
        assert tokenizer("<|user|>hi<|end|>")["input_ids"] == [256, *b"hi", 257]
        assert tokenizer.decode([256, *b"hi", 257], skip_special_tokens=True) == "hi"
        assert tokenizer("<|end|>", split_special_tokens=True)["input_ids"] == list(b"<|end|>")
        tokenizer.eos_token = "<|end|>"
        assert tokenizer.eos_token_id == 257

    def test_white_space_and_word_borders_count_as_asked_for(self):
        tokenizer = CharformerTokenizer()
        tokenizer.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
        tokenizer.add_tokens([AddedToken("cat", single_word=True)])
        assert tokenizer("a <l> b")["input_ids"] == [97, 256, 32, 98]
        assert tokenizer("a <r> b")["input_ids"] == [97, 32, 257, 98]
        assert tokenizer("a cat.")["input_ids"] == [97, 32, 258, 46]
        assert tokenizer("concat")["input_ids"] == list(b"concat")

    def test_they_are_saved(self, tmp_path):
        tokenizer = CharformerTokenizer()
        tokenizer.add_tokens([AddedToken("<a>", lstrip=True), "<b>"])
        tokenizer.add_special_tokens({"sep_token": "<sep>", "additional_special_tokens": ["<x>"]})
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "1 <a><b><sep><x>"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"] == [49, 256, 257, 258, 259]
        assert (len(loaded), loaded.sep_token_id, loaded.extra_special_tokens) == (260, 258, ["<x>"])
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.add_tokens("<c>") == 1 and loaded.convert_tokens_to_ids("<c>") == 260

    def test_names_of_bytes_are_refused(self):
        with pytest.raises(ValueError, match="name of a byte"):
            CharformerTokenizer().add_tokens(["<0xC3>"])
        with pytest.raises(ValueError, match="name of a byte"):
            CharformerTokenizer(eos_token="<0xFF>")
        assert CharformerTokenizer().add_tokens(["a"]) == 0  # is there already

    def test_unknown_names_and_ids_raise(self):
        tokenizer = CharformerTokenizer()
        with pytest.raises(ValueError, match="'<a>' is no token.*add_tokens"):
            tokenizer.convert_tokens_to_ids("<a>")
        for ids in ([256], [-1], [97, 1000]):
            with pytest.raises(ValueError, match=r"outside 0..255"):
                tokenizer.decode(ids)
        tokenizer.add_special_tokens({"unk_token": "<unk>"})
        assert tokenizer.convert_tokens_to_ids("<a>") == 256


CALLS: list[tuple[Any, dict[str, Any]]] = [
    ("aé€🙂", {}),
    ("", {"return_offsets_mapping": True}),
    (["", "ab"], {"padding": True, "return_offsets_mapping": True}),
    (["aé b", "x"], {"padding": True, "return_special_tokens_mask": True, "return_offsets_mapping": True}),
    (["abc", "x"], {"padding": "max_length", "padding_side": "right", "return_offsets_mapping": True}),
    (["abc", "x"], {"padding": True, "pad_to_multiple_of": 8}),
    ("abcdefghijkl", {"truncation": True}),
    (["abcdefghijkl", "é"], {"truncation": True, "max_length": 5, "padding": True, "return_tensors": "pt"}),
    ("abcdefghijkl", {"truncation": True, "max_length": 5, "stride": 2, "return_overflowing_tokens": True}),
    (["abcdefghijkl", "é"], {"truncation": True, "stride": 3, "return_overflowing_tokens": True, "padding": True}),
    (("ab", "cde"), {}),  # a batch
    ([("ab", "cdé"), ("a", "b")], {"padding": True, "return_token_type_ids": True}),
    ([("abcdefg", "xyz")], {"truncation": True, "max_length": 6, "return_offsets_mapping": True}),
    ([("abc", "uvwxyz")], {"truncation": True, "max_length": 7}),
    ([("abcdefg", "xy")], {"truncation": "only_first", "max_length": 4, "return_overflowing_tokens": True}),
    (
        [("ab", "uvwxyz")],
        {"truncation": "only_second", "max_length": 5, "stride": 1, "return_overflowing_tokens": True},
    ),
    (["ab", "é", "d"], {"is_split_into_words": True, "return_offsets_mapping": True}),
    ([["ab", "é"], ["d"]], {"is_split_into_words": True, "return_offsets_mapping": True, "padding": True}),
    ([(["ab", "é"], ["d", "e"])], {"is_split_into_words": True, "return_offsets_mapping": True}),
    (["ab", "cdefghi", "j"], {"is_split_into_words": True, "truncation": True, "max_length": 4}),
    ("abc", {"return_tensors": "pt"}),
    ("abc", {"return_attention_mask": False, "return_token_type_ids": False}),
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_each_call_gives_what_a_tokenizer_of_the_tokenizers_library_gives(rust, call, side):
    text, options = call
    ours = CharformerTokenizer(model_max_length=8, truncation_side=side)
    rust.truncation_side = side
    expected, got = rust(text, **{"return_token_type_ids": False} | options), ours(text, **options)
    assert set(got) == set(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name
    for row in range(len(expected.encodings)):
        assert got.sequence_ids(row) == expected.sequence_ids(row)
        if options.get("is_split_into_words"):
            assert got.word_ids(row) == expected.word_ids(row)
            for word in range(3):
                assert got.word_to_tokens(row, word) == expected.word_to_tokens(row, word)
        for token in range(len(expected.encodings[row].ids)):
            assert got.token_to_chars(row, token) == expected.token_to_chars(row, token)
            assert got.token_to_sequence(row, token) == expected.token_to_sequence(row, token)
        for character in range(4):
            assert got.char_to_token(row, character) == expected.char_to_token(row, character)


class TestWords:
    def test_words_become_one_row_with_their_numbers(self):
        encoded = CharformerTokenizer()(["ab", "é"], is_split_into_words=True)
        assert encoded["input_ids"] == list("abé".encode()) and encoded["attention_mask"] == [1] * 4
        assert encoded.word_ids() == [0, 0, 1, 1] and encoded.tokens() == ["a", "b", "<0xC3>", "<0xA9>"]
        assert encoded.word_to_chars(1) == (0, 1) and encoded.char_to_word(0) == 0

    def test_words_of_a_text_begin_with_the_space_before_them(self):
        encoded = CharformerTokenizer()("ein Tür  ")
        assert encoded.word_ids() == [0] * 3 + [1] * 5 + [2] * 2
        assert encoded.token_to_word(4) == 1 and encoded.word_to_tokens(1) == (3, 8)
        assert encoded.word_to_tokens(7) is None
        assert encoded.char_to_word(5) == 1

    def test_added_tokens_count_as_their_characters(self):
        tokenizer = CharformerTokenizer()
        tokenizer.add_tokens(["<é>"])
        encoded = tokenizer("ä <é>b", return_offsets_mapping=True)
        assert encoded["input_ids"] == [*"ä ".encode(), 256, 98]
        assert encoded["offset_mapping"] == [(0, 1), (0, 1), (1, 2), (2, 5), (5, 6)]
        assert encoded.word_ids() == [0, 0, 1, 1, 1]

    def test_bytes_that_are_not_utf8_are_characters_of_their_own(self):
        tokenizer = CharformerTokenizer(errors="surrogateescape")
        text = tokenizer.decode([97, 0xFC, 98])
        assert tokenizer(text, return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 2), (2, 3)]
        assert tokenizer(b"a\xfcb", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 2), (2, 3)]

    def test_encodings_can_be_pickled(self):
        encoded = pickle.loads(pickle.dumps(CharformerTokenizer()("a é")))
        assert encoded.word_ids() == [0, 1, 1, 1]


class TestWrongInput:
    @pytest.mark.parametrize("text", [5, None, [None], [1.5], {"a": 1}, ["a", 5]], ids=repr)
    def test_what_is_no_text_is_refused(self, text):
        with pytest.raises(ValueError, match="must be|specify"):
            CharformerTokenizer()(text)

    def test_three_texts_at_one_place_are_refused(self):
        with pytest.raises(ValueError, match="3 texts; for words give is_split_into_words=True"):
            CharformerTokenizer()([["a", "b", "c"]])

    def test_pairs_must_match(self):
        with pytest.raises(ValueError, match="same length"):
            CharformerTokenizer()(["a", "b"], ["c"])

    def test_a_stride_of_the_whole_length_is_refused(self):
        with pytest.raises(ValueError, match="stride is 4; it must be below max_length"):
            CharformerTokenizer()("abcdefgh", truncation=True, max_length=4, stride=4, return_overflowing_tokens=True)

    def test_truncation_that_leaves_nothing_is_refused(self):
        with pytest.raises(ValueError, match="leaves nothing"):
            CharformerTokenizer()("ab", "abcdefgh", truncation="only_first", max_length=4)

    def test_overflow_of_both_texts_is_refused(self):
        with pytest.raises(ValueError, match="only_first"):
            CharformerTokenizer()("abc", "abc", truncation=True, max_length=4, return_overflowing_tokens=True)

    def test_names_of_methods_are_refused(self):
        with pytest.raises(AttributeError, match="conflicts with the method"):
            CharformerTokenizer(get_vocab=lambda: {})


class TestChat:
    TEMPLATE = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    MESSAGES = [{"role": "user", "content": "hé?"}, {"role": "assistant", "content": "ja"}]

    def test_without_a_template_it_is_refused(self):
        with pytest.raises(ValueError, match="chat_template"):
            CharformerTokenizer().apply_chat_template(self.MESSAGES)

    def test_a_template_writes_special_tokens_and_the_mask_of_the_answer(self, tmp_path):
        tokenizer = CharformerTokenizer()
        tokenizer.chat_template = self.TEMPLATE
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        encoded: Any = loaded.apply_chat_template(self.MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
        assert encoded["input_ids"] == [*"hé?\nja".encode(), 254]
        assert encoded["assistant_masks"] == [0] * 5 + [1] * 3


class TestSaving:
    def test_it_loads_as_it_was(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert type(loaded) is CharformerTokenizer and len(loaded) == 256
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.all_special_ids == tokenizer.all_special_ids and loaded.errors == tokenizer.errors
        for text in TEXTS:
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]

    def test_its_longest_text_is_saved_and_can_be_given(self, tmp_path):
        CharformerTokenizer(model_max_length=3).save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)("abcd", truncation=True)["input_ids"] == list(b"abc")
        longer = AutoTokenizer.from_pretrained(tmp_path, model_max_length=4)
        assert longer("abcdefg", truncation=True)["input_ids"] == list(b"abcd")

    def test_it_can_be_pickled(self, tokenizer):
        tokenizer.add_tokens(["<a>"])
        loaded = pickle.loads(pickle.dumps(tokenizer))
        assert loaded("a<a>")["input_ids"] == [97, 256] and loaded.pad_token_id == tokenizer.pad_token_id


class TestCollators:
    def test_padding(self):
        tokenizer = CharformerTokenizer()
        batch = DataCollatorWithPadding(tokenizer)([tokenizer("ab"), tokenizer("é€")])
        assert batch["input_ids"].tolist() == [[255, 255, 255, 97, 98], list("é€".encode())]
        assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]

    def test_labels_of_a_language_model_leave_padding_out(self):
        tokenizer = CharformerTokenizer()
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([tokenizer("ab"), tokenizer("abc\0")])
        assert batch["labels"].tolist() == [[-100, -100, 97, 98], [97, 98, 99, 0]]

    def test_labels_of_characters(self):
        tokenizer = CharformerTokenizer()
        encoded = tokenizer([["ab", "é"], ["c"]], is_split_into_words=True)
        rows: list[dict[str, Any]] = [
            {"input_ids": encoded["input_ids"][row], "labels": [word or 0 for word in encoded.word_ids(row)]}
            for row in range(2)
        ]
        batch = DataCollatorForTokenClassification(tokenizer)(rows)
        assert batch["labels"].tolist() == [[0, 0, 1, 1], [-100, -100, -100, 0]]


def test_a_mask_of_special_tokens_finds_those_that_are_there():
    tokenizer = CharformerTokenizer()
    assert tokenizer.get_special_tokens_mask([97, 254, 255], already_has_special_tokens=True) == [0, 1, 1]
    assert tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"] == [0]


def test_tokens_that_are_added_to_each_text_can_be_asked_for():
    tokenizer = CharformerTokenizer(special_tokens_pattern="bos_eos")
    encoded = tokenizer("abcdef", truncation=True, max_length=5, return_special_tokens_mask=True)
    assert encoded["input_ids"] == [253, *b"abc", 254] and encoded["special_tokens_mask"] == [1, 0, 0, 0, 1]
    assert encoded.word_ids() == [None, 0, 0, 0, None]
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == list(b"ab")
