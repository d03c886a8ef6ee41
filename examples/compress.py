"""Compress a text with a trained model, and restore it.

python examples/compress.py runs/quickstart compress my_text.txt my_text.compressed
python examples/compress.py runs/quickstart restore my_text.compressed my_text.txt

Needs `pip install constriction` for the arithmetic coder. Probable text takes few bits: the size of the
file is the model's bits per byte (`charformer-evaluate`) times the length of the text. Restoring needs the same model, and
the same machine and library versions: the probabilities must come out the same to the last bit. If they do not, a checksum
tells.
"""

import struct
import sys
import zlib
from pathlib import Path

import constriction
import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache

from modeling_charformer import CharformerForCausalLM


HEADER = struct.Struct("<QII")  # length and checksum (CRC-32) of the text, checksum of the code
MODEL = constriction.stream.model.Categorical(perfect=False)


class Predictor:
    """Probabilities of the next byte given the bytes so far, like `charformer-evaluate` with a stride of half a window."""

    def __init__(self, model: CharformerForCausalLM):
        self.model = model.eval()
        self.window = model.config.max_position_embeddings
        self.stride = max(1, self.window // 2)
        self.seen: list[int] = []
        self.cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def __call__(self) -> np.ndarray:
        """`(1, 256)` float32. Nothing comes before the first byte, so all values are equally probable."""
        if not self.seen:
            return np.full((1, 256), 1 / 256, np.float32)
        if self.cache.get_seq_length() == self.window:  # full: its later part is encoded again
            self.cache = DynamicCache(config=self.model.config)
            new = self.seen[-(self.window - self.stride + 1) :]
        else:
            new = self.seen[-1:]
        logits = self.model(torch.tensor([new]), cache=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].double().softmax(-1).float().numpy()


def compress(model: CharformerForCausalLM, text: bytes) -> bytes:
    """Length and checksum of `text`, and the arithmetic code of its bytes."""
    predict, encoder = Predictor(model), constriction.stream.queue.RangeEncoder()
    for value in tqdm(text, desc="compress", unit="byte"):
        encoder.encode(np.array([value], np.int32), MODEL, predict())
        predict.seen.append(value)
    code = encoder.get_compressed().astype("<u4").tobytes()
    return HEADER.pack(len(text), zlib.crc32(text), zlib.crc32(code)) + code


def restore(model: CharformerForCausalLM, compressed: bytes) -> bytes:
    """The text that `compress` was given.

    Raises:
        ValueError: If `compressed` is cut or damaged; if the text is another one: the model, the machine or the
            libraries are not those that compressed it.
    """
    if len(compressed) < HEADER.size:
        raise ValueError("the file is cut, or was not compressed by this program")
    length, checksum, code_checksum = HEADER.unpack_from(compressed)
    if zlib.crc32(compressed[HEADER.size :]) != code_checksum:
        raise ValueError("the file is cut or damaged, or was not compressed by this program")
    code = np.frombuffer(compressed[HEADER.size :], "<u4").astype(np.uint32)
    predict, decoder = Predictor(model), constriction.stream.queue.RangeDecoder(code)
    for _ in tqdm(range(length), desc="restore", unit="byte"):
        predict.seen.append(int(decoder.decode(MODEL, predict())[0]))
    text = bytes(predict.seen)
    if zlib.crc32(text) != checksum:
        raise ValueError(
            "the text is not the one that was compressed: another model, machine or library version did it"
        )
    return text


def main() -> None:
    if len(sys.argv) != 5 or sys.argv[2] not in ("compress", "restore"):
        sys.exit(f"usage: {sys.argv[0]} MODEL compress|restore INPUT OUTPUT")
    folder, action, source, target = sys.argv[1:]
    torch.set_num_threads(1)  # with another number, sums may round differently
    model = CharformerForCausalLM.from_pretrained(folder)
    data = Path(source).read_bytes()
    if not data:
        sys.exit(f"{source} is empty")
    try:
        result = compress(model, data) if action == "compress" else restore(model, data)
    except ValueError as error:
        sys.exit(f"{source}: {error}")
    Path(target).write_bytes(result)
    text, code = (data, result) if action == "compress" else (result, data)
    print(f"{len(text):,} bytes of text, {len(code):,} compressed: {8 * len(code) / len(text):.4f} bits per byte")


if __name__ == "__main__":
    main()
