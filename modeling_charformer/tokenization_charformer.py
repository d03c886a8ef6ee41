"""Tokenizer of the Charformer model: characters are bytes of UTF-8, and ids are the bytes themselves."""

from collections.abc import Sequence
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from .hub import CharformerPushToHubMixin


# Byte values that no valid UTF-8 text contains.
SPECIAL_TOKEN_IDS = {"pad_token": 0xFF, "eos_token": 0xFE, "bos_token": 0xFD}


class CharformerTokenizer(CharformerPushToHubMixin, PreTrainedTokenizer):
    r"""Text to the ids 0..255 of its UTF-8 bytes and back; `bytes` are taken as they are.

    `bytes(ids)` gives back exactly the bytes that went in, whatever they were. `decode` gives text.

    There are no special tokens by default. Those that are asked for take the place of byte values that never occur in
    UTF-8 (pad 255, eos 254, bos 253), so that no id lies outside the model's 256, and their names have no meaning in
    text: `"<pad>"` in a text is five characters. Only raw binary data can contain these values by itself.

    Args:
        pad_token, eos_token, bos_token: What the special tokens are called; `None` is not to have them.
        errors: What `decode` makes of bytes that are not UTF-8, as in `bytes.decode`: `"replace"` by U+FFFD, or
            `"surrogateescape"`, which `encode` turns back into the same bytes.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        pad_token: str | None = None,
        eos_token: str | None = None,
        bos_token: str | None = None,
        errors: str = "replace",
        **kwargs,
    ):
        self.errors = errors
        tokens = {"pad_token": pad_token, "eos_token": eos_token, "bos_token": bos_token}
        self._added_tokens_decoder: dict[int, AddedToken] = {}
        self._place_special_tokens(tokens)
        kwargs = {
            "split_special_tokens": True,  # the name of a special token in a text is text
            "special_tokens_pattern": "none",
            "token_type_ids_pattern": "all_zeros",
            **kwargs,
        }
        super().__init__(**tokens, errors=errors, **kwargs)

    def _place_special_tokens(self, tokens: dict[str, Any]) -> None:
        for name, token in tokens.items():
            if name not in SPECIAL_TOKEN_IDS:
                raise ValueError(
                    f"CharformerTokenizer has no place for {name} ({token!r}); it can have {sorted(SPECIAL_TOKEN_IDS)}"
                )
            if token is not None:
                self._added_tokens_decoder[SPECIAL_TOKEN_IDS[name]] = AddedToken(
                    str(token), special=True, normalized=False
                )

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args, **kwargs) -> int:
        """As everywhere in Transformers, but only pad, eos and bos tokens, at the ids kept for them."""
        self._place_special_tokens(special_tokens_dict)
        self.added_tokens_decoder = dict(self._added_tokens_decoder)  # refreshes what the base class derives from it
        for name, token in special_tokens_dict.items():
            setattr(self, name, str(token))
        return len(special_tokens_dict)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        new = [str(token) for token in new_tokens if str(token) not in self._added_tokens_encoder]
        if new:
            raise ValueError(
                f"CharformerTokenizer cannot take the tokens {new}: its ids are the 256 byte values. Special tokens"
                f" ({sorted(SPECIAL_TOKEN_IDS)}) are given by their names when it is built, or to add_special_tokens"
            )
        return 0

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Each byte under the character with its number (Latin-1), the special tokens under their own names."""
        vocab = {chr(byte): byte for byte in range(256) if byte not in self._added_tokens_decoder}
        return vocab | {str(token): index for index, token in self._added_tokens_decoder.items()}

    @staticmethod
    def _to_bytes(text: str | bytes) -> bytes:
        return text.encode("utf-8", errors="surrogateescape") if isinstance(text, str) else text

    def _encode_plus(self, text, text_pair=None, *args, **kwargs) -> BatchEncoding:
        # The base class takes lists of ids as they are: that is several dozen times faster than its way through
        # tokens of one character each.
        return super()._encode_plus(self._bytes_as_ids(text), self._bytes_as_ids(text_pair), *args, **kwargs)

    def _bytes_as_ids(self, text):
        if isinstance(text, str | bytes):
            return list(self._to_bytes(text)) or ""  # the base class refuses an empty list of ids
        if isinstance(text, list | tuple) and text and not isinstance(text[0], int):
            return type(text)(self._bytes_as_ids(part) for part in text)
        return text

    def _tokenize(self, text: str | bytes, **kwargs) -> list[str]:
        return list(self._to_bytes(text).decode("latin-1"))

    def _convert_token_to_id(self, token: str) -> int:
        if len(token) == 1 and ord(token) < 256:
            return ord(token)
        raise ValueError(f"{token!r} is no token of CharformerTokenizer; its tokens are single bytes, as Latin-1")

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < 256:
            return chr(index)
        raise ValueError(f"the id {index} is outside 0..255; the ids of CharformerTokenizer are bytes")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = self._added_tokens_encoder
        raw = b"".join(token.encode() if token in special else token.encode("latin-1") for token in tokens)
        return raw.decode("utf-8", errors=self.errors)

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, *args, **kwargs) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if self._added_tokens_decoder:
            if skip_special_tokens:
                ids = [index for index in ids if index not in self._added_tokens_decoder]
            elif not self._added_tokens_decoder.keys().isdisjoint(ids):
                return super()._decode(ids, False, *args, **kwargs)
        try:
            return bytes(ids).decode("utf-8", errors=self.errors)
        except ValueError as error:
            raise ValueError(
                f"ids outside 0..255 cannot be decoded; the ids of CharformerTokenizer are bytes: {error}"
            ) from error

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to save: the vocabulary is the bytes."""
        return ()


CharformerTokenizer.register_for_auto_class()  # its code goes along when it is saved

__all__ = ["CharformerTokenizer"]
