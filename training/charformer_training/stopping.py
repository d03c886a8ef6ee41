"""Signals that end a run after its current step, the same step on all processes."""

import contextlib
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import distributed as dist


# Terminal and launcher may both pass on the same Ctrl-C, and some schedulers send two signals in a row.
SECONDS_OF_ONE_SIGNAL = 2.0
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class StoppedBySignal(SystemExit):
    """A signal ended training before its last step. Training can be resumed from `checkpoint`.

    The program exits with status 128 + the signal's number: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP. Schedulers
    read this as "not done".
    """

    def __init__(self, signum: int, step: int, checkpoint: str | None):
        super().__init__(128 + signum)
        self.signum, self.step, self.checkpoint = signum, step, checkpoint

    def __str__(self) -> str:
        kept = f"the checkpoint {self.checkpoint} holds all of it" if self.checkpoint else "no checkpoint was written"
        return f"stopped by {signal.Signals(self.signum).name} after step {self.step}; {kept}"


class StopSignals:
    """A context in which the first SIGTERM, SIGINT or SIGHUP is only noted, and a second one ends the process.

    Signals that are ignored (like under nohup) or already have a handler stay so. Outside of the main thread no signal is
    handled. It is enough that one of several processes receives the signal.
    """

    def __init__(self) -> None:
        self._received = 0
        self._time = 0.0
        self._old: dict[int, Any] = {}
        self._agreement: _Agreement | None = None

    def __enter__(self) -> "StopSignals":
        self._agreement = _Agreement()
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        if self._agreement is not None:
            self._agreement.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._time = signum, time.monotonic()
            name = signal.Signals(signum).name
            with contextlib.suppress(OSError, RuntimeError):  # the signal may have interrupted a print
                sys.stderr.write(
                    f"\n{name}: ending the step and saving a checkpoint; send it once more to exit at once\n"
                )
        elif time.monotonic() - self._time > SECONDS_OF_ONE_SIGNAL:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def agreed(self) -> int:
        """The signal at which all processes stop now, or 0. All of them call this at the same places."""
        return self._agreement.highest(self._received) if self._agreement is not None else 0


class _Agreement:
    """Gives every process the highest number that any process gave in the previous call, without stalling the device."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._numbers: torch.Tensor | None = None
        self._under_way: Any = None

    def highest(self, number: int) -> int:
        if self._group is None:
            return number
        agreed = 0
        if self._under_way is not None and self._numbers is not None:
            self._under_way.wait()
            agreed = int(self._numbers)
        self._numbers = torch.tensor(number)
        self._under_way = dist.all_reduce(self._numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        if self._under_way is not None and sys.exc_info()[0] is None:
            self._under_way.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = self._under_way = None


@contextlib.contextmanager
def random_states(restored_by: type[Exception]) -> Iterator[None]:
    """Restore the state of all random number generators if this exception ends the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    except restored_by:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        raise
