"""Tokenizer of the Charformer model: characters are UTF-8 bytes, and the ids are the byte values."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedConfig, PreTrainedTokenizer

from .hub import CharformerPushToHubMixin
from .text_encoding import (
    BYTE_NAMES,
    AddedTokenMatch,
    EncodedText,
    Part,
    Span,
    TextEncoding,
    byte_string,
    pair_lengths,
    truncation_windows,
)


NUM_BYTES = len(BYTE_NAMES)
BYTES_BY_NAME = {name: byte for byte, name in enumerate(BYTE_NAMES)}
# Byte values that no valid UTF-8 text contains.
SPECIAL_TOKEN_IDS = {"pad_token": 0xFF, "eos_token": 0xFE, "bos_token": 0xFD}
# U+FDD0 is a noncharacter: Unicode keeps it for uses like this one and out of text.
PAD_TOKEN, EOS_TOKEN, BOS_TOKEN = "<pad\ufdd0>", "<eos\ufdd0>", "<bos\ufdd0>"

Token = str | AddedToken
Sample = tuple[Any, Any]  # a text and its pair, or None
Row = tuple[int, Sequence[EncodedText], list[Span]]  # number of the sample, its texts, what the row holds of each


class CharformerTokenizer(CharformerPushToHubMixin, PreTrainedTokenizer):
    r"""Converts text to the ids 0..255 of its UTF-8 bytes and back; it also accepts `bytes`.

    `bytes(ids)` restores the input bytes exactly. `decode` returns text.

    Pad (255), eos (254) and bos (253) use byte values that never occur in UTF-8, so that every id is one of the model's
    256. They are never added to a text automatically. Their names in a text become the tokens, like everywhere in
    Transformers. The default names contain a Unicode noncharacter, so `"<pad>"` is five ordinary characters. Only binary
    data can contain these bytes.

    Tokens beyond the bytes (`add_tokens`, other special tokens) get the ids from 256 on; the model then needs
    `resize_token_embeddings(len(tokenizer))`.

    Words (`is_split_into_words=True`) are joined without a separator. `word_ids()`, offsets in characters and
    `return_overflowing_tokens` work like those of Transformers' fast tokenizers. In a text that is not split, the white
    space before a word belongs to it.

    Args:
        pad_token, eos_token, bos_token: Names of the special tokens; `None` means that there is none.
        errors: How `decode` treats invalid UTF-8, like in `bytes.decode`: `"replace"` inserts U+FFFD;
            `"surrogateescape"` inserts surrogates that `encode` turns back into the same bytes.
        kwargs: Those of any tokenizer. With `split_special_tokens=True` the names of special tokens are encoded as text.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # generation continues from the last position; classification models accept either side

    def __init__(
        self,
        pad_token: Token | None = PAD_TOKEN,
        eos_token: Token | None = EOS_TOKEN,
        bos_token: Token | None = BOS_TOKEN,
        errors: str = "replace",
        added_tokens_decoder: dict[int, AddedToken] | None = None,
        **kwargs: Any,
    ):
        self.errors = errors
        self._added_tokens_decoder: dict[int, AddedToken] = dict(added_tokens_decoder or {})
        self._added_tokens_encoder = {token.content: index for index, token in self._added_tokens_decoder.items()}
        self._patterns: dict[bool, tuple[dict[str, int], re.Pattern[str], list[int]]] = {}
        tokens = {"pad_token": pad_token, "eos_token": eos_token, "bos_token": bos_token}
        for name, token in tokens.items():
            if token is not None:
                self._place(name, token)
        super().__init__(**tokens, errors=errors, **({"special_tokens_pattern": "none"} | kwargs))

    @classmethod
    def for_model(cls, config: PreTrainedConfig) -> "CharformerTokenizer":
        """The tokenizer that fits a model's configuration: its window and its special tokens."""
        absent: dict[str, Any] = {name: None for name in SPECIAL_TOKEN_IDS if getattr(config, f"{name}_id") is None}
        return cls(model_max_length=config.max_position_embeddings, **absent)

    @property
    def is_fast(self) -> bool:
        """True, because encodings have words, offsets and overflow, which clients infer from this property."""
        return True

    # --- Vocabulary ---------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """The bytes; `len(tokenizer)` counts added tokens too."""
        return NUM_BYTES

    def get_vocab(self) -> dict[str, int]:
        """ASCII by its characters, bytes beyond it as `<0xC3>`, added and special tokens by their own names."""
        vocab = {name: byte for name, byte in BYTES_BY_NAME.items() if byte not in self._added_tokens_decoder}
        return vocab | {token.content: index for index, token in self._added_tokens_decoder.items()}

    def _place(self, name: str, token: Token) -> None:
        """Give the reserved byte of the special token `name` the name of `token`, unless another token has that name."""
        content = str(token)
        self._refuse_byte_names([content])
        if content in self._added_tokens_encoder or content in BYTES_BY_NAME:
            return
        index = SPECIAL_TOKEN_IDS[name]
        if index in self._added_tokens_decoder:
            old = self._added_tokens_decoder[index].content
            del self._added_tokens_encoder[old]
            for role, value in self.__dict__.get("_special_tokens_map", {}).items():
                if str(value) == old:
                    self._special_tokens_map[role] = content
        given = token if isinstance(token, AddedToken) else AddedToken(token)
        self._added_tokens_decoder[index] = AddedToken(
            content,
            single_word=given.single_word,
            lstrip=given.lstrip,
            rstrip=given.rstrip,
            special=True,
            normalized=False,
        )
        self._added_tokens_encoder[content] = index
        self._patterns = {}

    @staticmethod
    def _refuse_byte_names(contents: Sequence[str]) -> None:
        wrong = [content for content in contents if BYTES_BY_NAME.get(content, 0) >= 0x80]
        if wrong:
            raise ValueError(f"CharformerTokenizer cannot take the tokens {wrong}: each is the name of a byte there")

    def __setattr__(self, key: str, value: Any) -> None:
        if value is not None and "_special_tokens_map" in self.__dict__:
            if key in SPECIAL_TOKEN_IDS and isinstance(value, Token):
                self._place(key, value)
            elif key in self.SPECIAL_TOKENS_ATTRIBUTES and isinstance(value, str) and value not in self.get_vocab():
                raise ValueError(
                    f"{key} is {value!r}, which is no token of this tokenizer; add_special_tokens({{{key!r}: {value!r}}})"
                    " adds it"
                )
        super().__setattr__(key, value)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """Add special tokens: pad, eos and bos get their reserved bytes, others the ids from 256 on.

        Returns:
            The number of ids added to the vocabulary.
        """
        before = len(self)
        super().add_special_tokens(special_tokens_dict, *args, **kwargs)
        return len(self) - before

    def _add_tokens(self, new_tokens: Sequence[Token], special_tokens: bool = False) -> int:
        self._refuse_byte_names([str(token) for token in new_tokens])
        tokens: list[Any] = list(new_tokens)
        return int(super()._add_tokens(tokens, special_tokens=special_tokens))

    def _update_total_vocab_size(self) -> None:
        super()._update_total_vocab_size()  # called when tokens have changed
        self._patterns = {}

    def _convert_token_to_id(self, token: str) -> int:
        if token in BYTES_BY_NAME:
            return BYTES_BY_NAME[token]
        if self.unk_token in self._added_tokens_encoder:
            return self._added_tokens_encoder[self.unk_token]
        raise ValueError(
            f"{token!r} is no token of CharformerTokenizer: these are the bytes, as in get_vocab(), and the added tokens"
            f" {sorted(self._added_tokens_encoder)}; add_tokens and add_special_tokens add more"
        )

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < NUM_BYTES:
            return BYTE_NAMES[index]
        raise self._no_such_id(index)

    def _no_such_id(self, index: int) -> ValueError:
        return ValueError(
            f"the id {index} is outside 0..{len(self) - 1}; the ids of CharformerTokenizer are bytes, and from"
            f" {NUM_BYTES} on added tokens"
        )

    # --- Text to ids --------------------------------------------------------------------------------------------

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        return list(self._encode_plus(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens())

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        return list(byte_string(text))

    def _encode_plus(  # type: ignore[override]  # the base class passes resolved strategies
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding_strategy: Any = False,
        truncation_strategy: Any = "do_not_truncate",
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        samples, is_batch = self._samples(text, text_pair, is_split_into_words)
        split_special = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        encoded = [self._encoded_sample(sample, is_split_into_words, split_special, **kwargs) for sample in samples]
        rows: list[Row] = []
        for number, texts in enumerate(encoded):
            num_special = self.num_special_tokens_to_add(pair=len(texts) > 1) if add_special_tokens else 0
            room = None if max_length is None else max_length - num_special
            windows = self._windows(texts, truncation_strategy, room, stride, return_overflowing_tokens)
            rows += [(number, texts, window) for window in (windows if return_overflowing_tokens else windows[:1])]
        data = self._inputs(rows, add_special_tokens, return_token_type_ids)
        for ids in data["input_ids"]:
            self._eventual_warn_about_too_long_sequence(ids, max_length, verbose)
        padding: dict[str, Any] = {
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
            "padding_side": padding_side,
        }
        data = dict(self.pad(data, padding=padding_strategy, return_attention_mask=True, **padding))
        data.setdefault("attention_mask", [])  # where there are no rows

        encodings = self._encodings(data, rows)
        if not return_special_tokens_mask:
            del data["special_tokens_mask"]
        if return_attention_mask is False or "attention_mask" not in self.model_input_names:
            del data["attention_mask"]
        if return_offsets_mapping:
            data["offset_mapping"] = [encoding.offsets for encoding in encodings]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = [number for number, _, _ in rows]
        if return_length:
            data["length"] = [len(ids) for ids in data["input_ids"]]
        if not (is_batch or return_tensors or return_overflowing_tokens):
            data = {name: values[0] for name, values in data.items()}
        return BatchEncoding(data, encodings, tensor_type=return_tensors)  # type: ignore[arg-type]  # the interface of tokenizers.Encoding

    def _samples(self, text: Any, pair: Any, is_split: bool) -> tuple[list[Sample], bool]:
        """The texts, each with its pair or `None`, and whether they came as a batch."""
        first = text[0] if isinstance(text, list | tuple) and text else None
        is_batch = isinstance(text, list | tuple) and (
            isinstance(first, list | tuple) or (not is_split and (not text or isinstance(first, str | bytes)))
        )
        if not is_batch:
            return [(text, pair)], False
        if pair is None:
            return [self._sample(part, is_split) for part in text], True
        if not isinstance(pair, list | tuple) or len(pair) != len(text):
            raise ValueError("text is a batch; text_pair must be a batch of the same length")
        return list(zip(text, pair, strict=True)), True

    @staticmethod
    def _sample(part: Any, is_split: bool) -> Sample:
        """One entry of a batch as a pair; the entry is a text, ids, words, or a pair of these."""
        if isinstance(part, list | tuple) and part and not isinstance(part[0], int):
            if len(part) == 2 and (isinstance(part, tuple) if is_split else True):
                return part[0], part[1]
            if not is_split:
                if len(part) > 1:
                    raise ValueError(
                        f"expected a text or a pair of texts, got {len(part)} texts; for words give"
                        " is_split_into_words=True"
                    )
                return part[0], None
        return part, None

    def _encoded_sample(self, sample: Sample, is_split: bool, split_special: bool, **kwargs: Any) -> list[EncodedText]:
        return [self._encoded_text(part, is_split, split_special, **kwargs) for part in sample if part is not None]

    def _encoded_text(self, part: Any, is_split: bool, split_special: bool, **kwargs: Any) -> EncodedText:
        if kwargs.get("sanitize_control_tokens") and isinstance(part, str):  # by apply_chat_template
            from transformers.utils.chat_template_utils import encode_marked_chat

            part = encode_marked_chat(self, part)
        are_words = is_split and isinstance(part, list | tuple) and not (part and isinstance(part[0], int))
        parts: Sequence[Part] = part if are_words else [part]
        for given in parts:
            is_ids = isinstance(given, list | tuple) and all(isinstance(index, int) for index in given)
            if not (isinstance(given, str | bytes) or (is_ids and not are_words)):
                raise ValueError(
                    f"a text must be a str, bytes or a list of ids, or with is_split_into_words=True a list of words, or"
                    f" a batch of one of these; got {type(given).__name__} ({given!r:.80})"
                )
        return EncodedText(parts, [self._matches(given, split_special) for given in parts], are_words)

    def _matches(self, part: Part, split_special: bool) -> list[AddedTokenMatch]:
        """The added tokens in a text; raw bytes and ids have none."""
        if not isinstance(part, str):
            return []
        if split_special not in self._patterns:
            self._patterns[split_special] = self._pattern(split_special)
        names, pattern, ids = self._patterns[split_special]
        if not any(name in part for name in names):  # much faster than the pattern
            return []
        return [
            AddedTokenMatch(match.start(), match.end(), ids[(match.lastindex or 0) - 1])
            for match in pattern.finditer(part)
        ]

    def _pattern(self, split_special: bool) -> tuple[dict[str, int], re.Pattern[str], list[int]]:
        """The added tokens that count in a text, a pattern with a group for each, and their ids in that order.

        Of several tokens at one position the longest matches. The match includes white space that the token strips.
        """
        tokens = [
            (token.content, index, token)
            for index, token in self._added_tokens_decoder.items()
            if not (split_special and token.special) and token.content != BYTE_NAMES[index % NUM_BYTES]
        ]
        tokens.sort(key=lambda found: len(found[0]), reverse=True)
        groups = []
        for content, _, token in tokens:
            group = re.escape(content)
            if token.single_word:
                group = rf"(?<!\w){group}(?!\w)"
            before, after = (r"\s*" if strip else "" for strip in (token.lstrip, token.rstrip))
            groups.append(f"({before}{group}{after})")
        return (
            {content: index for content, index, _ in tokens},
            re.compile("|".join(groups)),
            [found[1] for found in tokens],
        )

    def _windows(
        self, texts: Sequence[EncodedText], strategy: Any, room: int | None, stride: int, overflow: bool
    ) -> list[list[Span]]:
        """The rows that a text, or a pair, becomes: for each row the span of each text that it holds."""
        lengths = [len(encoded.ids) for encoded in texts]
        strategy = str(getattr(strategy, "value", strategy))
        if room is None or strategy == "do_not_truncate" or sum(lengths) <= room:
            return [[(0, length) for length in lengths]]
        side = self.truncation_side
        if len(texts) == 2 and strategy == "longest_first":
            if overflow:
                raise ValueError(
                    "return_overflowing_tokens does not go with pairs of texts that are both truncated; give"
                    " truncation='only_first' or 'only_second'"
                )
            kept = pair_lengths(lengths[0], lengths[1], room)
            return [[truncation_windows(*both, 0, side)[0] for both in zip(lengths, kept, strict=True)]]
        cut = 1 if strategy == "only_second" and len(texts) == 2 else 0
        others = sum(lengths) - lengths[cut]
        if others >= room and len(texts) == 2:
            raise ValueError(
                f"truncation={strategy!r} leaves nothing of its text: the other one has {others} of {room} tokens"
            )
        windows = truncation_windows(lengths[cut], room - others, stride, side)
        return [
            [window if number == cut else (0, lengths[number]) for number in range(len(texts))] for window in windows
        ]

    def _inputs(self, rows: Sequence[Row], add_special_tokens: bool, type_ids: bool | None) -> dict[str, Any]:
        """The model inputs of the rows, before padding."""
        data: dict[str, Any] = {"input_ids": [], "special_tokens_mask": []}
        with_types = type_ids or (type_ids is None and "token_type_ids" in self.model_input_names)
        for _, texts, windows in rows:
            parts = [encoded.window(*window) for encoded, window in zip(texts, windows, strict=True)]
            ids = self.build_inputs_with_special_tokens(*parts) if add_special_tokens else sum(parts[1:], parts[0])
            pair = parts[1] if len(parts) > 1 else None
            mask = self.get_special_tokens_mask(parts[0], pair) if add_special_tokens else [0] * len(ids)
            data["input_ids"].append(ids)
            data["special_tokens_mask"].append(mask)
            if with_types:
                types = self.create_token_type_ids_from_sequences(*parts) if add_special_tokens else [0] * len(ids)
                data.setdefault("token_type_ids", []).append(types)
        return data

    def _encodings(self, data: dict[str, Any], rows: Sequence[Row]) -> list[TextEncoding]:
        names = {index: token.content for index, token in self._added_tokens_decoder.items()}
        texts = [list(zip(texts, windows, strict=True)) for _, texts, windows in rows]
        masks = data["attention_mask"], data["special_tokens_mask"]
        return [TextEncoding(*row, names) for row in zip(data["input_ids"], *masks, texts, strict=True)]

    # --- Ids to text --------------------------------------------------------------------------------------------

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of `tokens`. Unknown tokens are taken as text, such as words that a pipeline has joined."""
        added = self._added_tokens_encoder
        bytes_by_name = {name: bytes([byte]) for name, byte in BYTES_BY_NAME.items() if name not in added}
        raw = b"".join(bytes_by_name.get(token) or byte_string(token) for token in tokens)
        return raw.decode("utf-8", errors=self.errors)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            special = set(self.all_special_ids)
            ids = ids if special.isdisjoint(ids) else [index for index in ids if index not in special]
        try:
            raw = bytes(ids)
        except ValueError:  # an id beyond the bytes
            return self._decode_by_runs(ids)
        if any(index < NUM_BYTES and index in raw for index in self._added_tokens_decoder):
            return self._decode_by_runs(ids)
        return raw.decode("utf-8", errors=self.errors)

    def _decode_by_runs(self, ids: list[int]) -> str:
        """Decode added tokens to their names, and the runs of bytes between them to text."""
        text, run = "", bytearray()
        for index in ids:
            if index in self._added_tokens_decoder:
                text += run.decode("utf-8", errors=self.errors) + self._added_tokens_decoder[index].content
                run.clear()
            elif 0 <= index < NUM_BYTES:
                run.append(index)
            else:
                raise self._no_such_id(index)
        return text + run.decode("utf-8", errors=self.errors)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Save nothing: the vocabulary is the 256 bytes."""
        return ()


CharformerTokenizer.register_for_auto_class()  # a saved tokenizer includes its code

__all__ = ["CharformerTokenizer"]
