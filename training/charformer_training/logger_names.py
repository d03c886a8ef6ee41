"""Names that TensorBoard, W&B, trackio, MLflow and others group: `loss_terms/next_char`, in place of `train/loss_next_char`.

Transformers' callbacks put every figure of training under `train/`, where many terms would bury the others.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils


# What a figure's name in the log begins with, and the group that it belongs to.
GROUPS = {
    "loss_": "terms",
    "weight_": "weights",
    "accuracy_": "accuracies",
    "gradient_norm_": "gradient_norms",
    "gradient_cosine_": "gradient_cosines",
}
UNGROUPED = "none"
LOGGERS = tuple(integration_utils.INTEGRATION_TO_CALLBACK.values())


class LoggerNames:
    """Passes the figures of a run on to its loggers under names that group.

    Args:
        prefix: Beginning of the names of the groups: `"loss_"` gives `loss_terms`, `loss_weights`, `loss_accuracies` and
            `loss_gradient_norms`, and `eval_loss_terms` for an evaluation. `"none"` leaves all names to Transformers.
    """

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._names: dict[str, str] = {}
        self.further: dict[str, float] = {}
        """Figures that loggers get with the next entry of training, and that the log does not hold."""

    def show_weights(self, weights: Mapping[str, Any]) -> None:
        """Give loggers the weights of terms, by name, beside the next entry of training."""
        self.further = {f"weight_{name}": float(weight) for name, weight in weights.items()}

    def add(self, keys: Iterable[str], evaluation: str = "") -> None:
        """Take note of names in the log, those of an evaluation without its prefix, such as `eval`."""
        for key in keys:
            start = next((start for start in GROUPS if key.startswith(start)), None)
            if self._prefix != UNGROUPED and start is not None:
                before = f"{evaluation}_" if evaluation else ""
                self._names[before + key] = f"{before}{self._prefix}{GROUPS[start]}/{key.removeprefix(start)}"

    def use_in(self, callbacks: Iterable[TrainerCallback]) -> None:
        """Have the loggers among `callbacks` show these names; one that names figures itself is left alone."""
        for callback in callbacks:
            is_ours = type(callback).__module__.partition(".")[0] == __name__.partition(".")[0]
            if isinstance(callback, LOGGERS) and not is_ours and "on_log" not in vars(callback):
                callback.on_log = functools.partial(self._on_log, callback.on_log)  # type: ignore[method-assign]

    def _on_log(
        self, on_log: Callable[..., Any], args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> Any:
        logs = dict(logs or {})
        if "loss" in logs:
            self.add(self.further)
            logs |= self.further
        with _unchanged(set(self._names.values())):
            return on_log(args, state, control, logs={self._names.get(k, k): v for k, v in logs.items()}, **kwargs)


@contextlib.contextmanager
def _unchanged(names: set[str]) -> Iterator[None]:
    """Keep Transformers from putting these names under `train/`, for the length of the block."""
    rewrite = integration_utils.rewrite_logs

    def rewrite_others(logs: Mapping[str, Any]) -> dict[str, Any]:
        grouped = {name: value for name, value in logs.items() if name in names}
        return {**rewrite({name: value for name, value in logs.items() if name not in names}), **grouped}

    integration_utils.rewrite_logs = rewrite_others
    try:
        yield
    finally:
        integration_utils.rewrite_logs = rewrite
