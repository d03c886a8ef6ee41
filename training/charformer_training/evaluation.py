"""Exact bits per character of a whole text: the model predicts each byte once, in a sliding window.

`stride=1` is the protocol of the papers: each character is predicted from the full window before it (Al-Rfou et al.
2018, section 3). A stride of `s` is `s` times as fast and gives most characters less context.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from torch.nn import functional as F
from tqdm.auto import tqdm

from modeling_charformer import CharformerForCausalLM
from modeling_charformer.loss_settings import LAST_POSITION

from .arguments import check_text
from .files import whole_file
from .models import evaluating
from .terminal import one_line
from .units import NATS_PER_BIT, count_characters, is_utf8


# Standard errors are computed from means over blocks of this many bytes, since neighbouring bytes are correlated.
BYTES_PER_BLOCK = 1000
SECONDS_BETWEEN_SAVES = 20.0


@dataclass(frozen=True)
class Evaluation:
    """The result of `bits_per_character`, and its settings.

    `bpb` is in bits per byte, `bpc` in bits per character of UTF-8; they are equal in ASCII text. In a text that is not
    UTF-8, characters cannot be counted, so `bpc` and `counted_characters` are `None`. `standard_error` is that of `bpc`,
    or of `bpb` if there is no `bpc`. It is computed from means over blocks of 1,000 bytes, and is `None` for a single
    block. `counted_bytes` is one less than `bytes`, because the first byte is not predicted. `sha256` is the checksum of
    the text.
    """

    bpc: float | None
    bpb: float
    standard_error: float | None
    bytes: int
    counted_bytes: int
    counted_characters: int | None
    sha256: str
    window: int
    stride: int
    seconds: float


def bits_per_character(
    model: CharformerForCausalLM,
    text: str | bytes | np.ndarray | os.PathLike[str],
    window: int | None = None,
    stride: int = 1,
    batch_size: int = 32,
    progress: bool = True,
    state_file: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """The code length of a text under a model, in a window that slides by `stride` bytes.

    In the first window all predictions count, each from the bytes before it. In every later window the last `stride`
    predictions count, each from at least `window - stride + 1` bytes. The last window ends with the text. Every byte
    except the first therefore counts once. Probability that the model gives to added tokens counts as lost, because
    the text is coded in bytes. Under torchrun or accelerate launch the processes share the windows, and each returns
    the whole result.

    Args:
        model: On its device, in any dtype; bits are added up in double precision.
        text: The text, its bytes (an array of uint8 may be memory-mapped), or the path of a file.
        window: Number of bytes that the model sees at once; default: `max_position_embeddings`.
        stride: 1 to `window`.
        batch_size: Number of windows in a batch.
        progress: Whether to show a progress bar with the time left.
        state_file: File that keeps the progress. A later call with the same text, model and settings continues from it
            and removes it at the end.

    Raises:
        ValueError: If the text has fewer than two bytes or two characters, or if window, stride or batch size are out of
            range.
        FloatingPointError: If a prediction of the model is not finite.
    """
    data = _bytes_of(text)
    limit = model.config.max_position_embeddings
    window = limit if window is None else window
    if not 1 <= window <= limit:
        raise ValueError(f"window is {window}; it must be 1 to {limit}, the model's max_position_embeddings")
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; it must be 1 to the window, {window}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    if len(data) < 2:
        raise ValueError(f"the text has {len(data)} bytes; it must have 2 or more, because the first is not predicted")
    characters = count_characters(data) if is_utf8(data) else None
    if characters == 0:
        raise ValueError(
            "the text is a single character; bits per character need a character that begins after the first byte"
        )
    windows = _Windows(len(data) - 1, window, stride, batch_size)
    processes = PartialState()
    rank = processes.process_index
    own = range(rank, len(windows), processes.num_processes)
    sha256 = hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()
    key = f"{sha256} {window} {stride} {batch_size} {processes.num_processes} {_fingerprint(model)}"
    state = _State(
        Path(f"{state_file}.{rank}") if state_file is not None else None, key, -(-len(data) // BYTES_PER_BLOCK)
    )
    with evaluating(model):
        todo = tqdm(
            own[state.done :],
            desc=f"bits per byte, stride {stride}",
            unit="batch",
            initial=state.done,
            total=len(own),
            disable=True if not progress or rank > 0 else None,  # None: not in a log file
        )
        for number in todo:
            positions, bits = bits_of_positions(model, data, *windows[number])
            np.add.at(state.bits, positions // BYTES_PER_BLOCK, bits)
            state.finish_batch()
    result = _evaluation(
        data,
        characters,
        np.sum(gather_object([state.bits]), axis=0),
        sha256,
        window,
        stride,
        max(gather_object([state.seconds])),
    )
    state.remove()
    return result


def bits_by_position(
    model: CharformerForCausalLM, data: np.ndarray, window: int | None = None, batch_size: int = 32
) -> dict[str, np.ndarray]:
    """Mean bits per byte by position in the window, for the model and for the heads of its intermediate layers.

    The fall along the window shows the gain from context, the fall from layer to layer the gain from depth.

    Args:
        model: A model with or without auxiliary heads; layers without a head are not reported.
        data: `(num_bytes,)` uint8, longer than `window`. It is cut into consecutive windows; the rest is left out.
        window: Number of bytes that the model sees at once; default: `max_position_embeddings`.
        batch_size: Number of windows in a batch.

    Returns:
        `next_char`, `layer_1`, ... to float64 `(window,)`, the mean at each position.
    """
    window = window or model.config.max_position_embeddings
    count = (len(data) - 1) // window
    if count < 1:
        raise ValueError(f"the text has {len(data)} bytes; bits by position need more than a window of {window}")
    terms = [term for term in model.loss_settings.terms if term.offset == 1 and term.name != LAST_POSITION]
    sums = {term.name: np.zeros(window) for term in terms}
    with evaluating(model):
        starts = range(0, count, batch_size)
        for start in tqdm(starts, desc="bits by position and layer", unit="batch", disable=None):
            rows = np.arange(start, min(start + batch_size, count))[:, None] * window + np.arange(window + 1)
            ids = torch.from_numpy(data[rows].astype(np.int64)).to(model.device)
            layers: dict[int, torch.Tensor] = {}
            readers = {term.layer: partial(layers.__setitem__, term.layer) for term in terms if not term.is_main}
            outputs = model.model(ids[:, :-1], use_cache=False, on_layer_output=readers)
            for term in terms:
                if term.is_main:
                    logits = model.lm_head(outputs.last_hidden_state)
                else:
                    (logits,) = model.classify([term], layers[term.layer])
                nats = F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
                sums[term.name] += nats.double().sum(0).cpu().numpy()
    return {name: total / count / NATS_PER_BIT for name, total in sums.items()}


class _Windows:
    """The batches of windows, as a sequence of `(ends, counted, length)`.

    `ends` are the numbers of the windows' last predictions, `counted` how many of their last predictions count.
    Prediction `t` predicts byte `t + 1` from the bytes up to `t`. All windows of a batch have the same `length`.
    """

    def __init__(self, num_predictions: int, window: int, stride: int, batch_size: int):
        self.first = min(window, num_predictions)
        self.window, self.stride, self.batch_size = window, stride, batch_size
        self.last = num_predictions - 1
        self.later = -(-(num_predictions - self.first) // stride)

    def __len__(self) -> int:
        return 1 + -(-self.later // self.batch_size)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """`ends` and `counted`, both `(B,)`, and `length`."""
        if number == 0:
            return np.array([self.first - 1]), np.array([self.first]), self.first
        index = np.arange((number - 1) * self.batch_size, min(number * self.batch_size, self.later))
        ends = np.minimum(self.first - 1 + (index + 1) * self.stride, self.last)
        return ends, ends - (self.first - 1 + index * self.stride), self.window


def bits_of_positions(
    model: CharformerForCausalLM, data: np.ndarray, ends: np.ndarray, counted: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The positions in the text of the bytes that count in a batch of windows, and the bits of each, float64."""
    inputs = ends[:, None] + np.arange(1 - length, 1)
    keep = int(counted.max())
    ids = torch.from_numpy(data[inputs].astype(np.int64)).to(model.device)
    hidden = model.model(ids, use_cache=False, positions_to_keep=keep).last_hidden_state
    log_probabilities = model.lm_head(hidden).float().log_softmax(-1)
    targets = inputs[:, -keep:] + 1
    wanted = torch.from_numpy(data[targets].astype(np.int64)).to(model.device)
    nats = -log_probabilities.gather(-1, wanted[..., None])[..., 0]
    chosen = np.arange(keep) >= keep - counted[:, None]
    positions, bits = targets[chosen], nats.double().cpu().numpy()[chosen] / NATS_PER_BIT
    if not bool(np.isfinite(bits).all()):
        raise FloatingPointError(
            f"the model's prediction of byte {int(positions[~np.isfinite(bits)][0]):,} is not finite: its weights are damaged,"
            " or too large for this dtype"
        )
    return positions, bits


class _State:
    """Bits by block and the number of finished batches; regularly saved to a file if there is a path."""

    def __init__(self, path: Path | None, key: str, num_blocks: int):
        self.path, self.key = path, key
        self.bits, self.done, self.seconds = np.zeros(num_blocks), 0, 0.0
        if path is not None and path.exists():
            saved = _read_state(path)
            if str(saved["key"]) != key or saved["bits"].shape != (num_blocks,):
                raise ValueError(
                    f"state_file: {one_line(path)} belongs to an evaluation of another text or model, or with other"
                    " settings; delete it, or give another file"
                )
            self.bits, self.done, self.seconds = saved["bits"], int(saved["done"]), float(saved["seconds"])
        self._last = self._saved = time.perf_counter()

    def finish_batch(self) -> None:
        now = time.perf_counter()
        self.done, self.seconds, self._last = self.done + 1, self.seconds + now - self._last, now
        if self.path is not None and now - self._saved > SECONDS_BETWEEN_SAVES:
            with whole_file(self.path) as file:
                np.savez(file, key=self.key, bits=self.bits, done=self.done, seconds=self.seconds)
            self._saved = now

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _read_state(path: Path) -> dict[str, np.ndarray]:
    try:
        if not path.is_file():
            raise ValueError("it is a folder, a device or a pipe")
        with np.load(path, allow_pickle=False) as saved:
            values = {name: saved[name] for name in ("key", "bits", "done", "seconds")}
        if values["bits"].dtype != np.float64 or int(values["done"]) < 0 or float(values["seconds"]) < 0:
            raise ValueError("its values have another type")
        if not bool((values["bits"] >= 0).all()):  # nan too
            raise ValueError("its values are no bits")
        return values
    except Exception as error:  # damaged archives raise errors of many kinds
        raise ValueError(
            f"state_file: {one_line(path)} is damaged or not that of an evaluation; delete it, or give another file"
        ) from error


def _evaluation(
    data: np.ndarray, characters: int | None, bits: np.ndarray, sha256: str, window: int, stride: int, seconds: float
) -> Evaluation:
    counted = len(data) - 1
    units = counted if characters is None else characters
    sizes = np.full(len(bits), BYTES_PER_BLOCK)
    sizes[0] -= 1
    sizes[-1] -= len(bits) * BYTES_PER_BLOCK - len(data)
    error = None
    if len(bits) > 1:
        # The standard error of a ratio of sums over blocks of different sizes (Cochran 1977, section 6.3).
        residuals = bits - bits.sum() / counted * sizes
        error = math.sqrt(len(bits) / (len(bits) - 1) * float((residuals**2).sum())) / units
    total = float(bits.sum())
    return Evaluation(
        bpc=None if characters is None else total / characters,
        bpb=total / counted,
        standard_error=error,
        bytes=len(data),
        counted_bytes=counted,
        counted_characters=characters,
        sha256=sha256,
        window=window,
        stride=stride,
        seconds=round(seconds, 3),
    )


def _bytes_of(text: str | bytes | np.ndarray | os.PathLike[str]) -> np.ndarray:
    if isinstance(text, str):
        check_text("text", text)
        text = text.encode()
    if isinstance(text, bytes):
        return np.frombuffer(text, np.uint8)
    if isinstance(text, np.ndarray):
        if text.dtype != np.uint8 or text.ndim != 1:
            raise ValueError(f"text is an array of {text.dtype}, shape {text.shape}; it must be (num_bytes,) uint8")
        return text
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"text: there is no file {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"the file {path} is empty")
    return np.fromfile(path, np.uint8)  # a memory map would see changes of the file, and crash if it is truncated


def _fingerprint(model: CharformerForCausalLM) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for weight in _plain_weights(model):
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_weights(model: CharformerForCausalLM) -> Iterator[torch.Tensor]:
    return (weight for name, weight in model.named_parameters() if name.startswith(("model.", "lm_head.")))
