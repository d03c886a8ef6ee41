"""The file of one part: its measurements so far, whole at any time."""

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


FINISHED = "finished"


def read(path: Path) -> dict[str, Any]:
    """What a part has written, or nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write(path: Path, report: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(report, indent=2) + "\n").encode())


class Report:
    """The measurements of a part by name. Each is written as soon as it is done, or its traceback if it failed.

    Measurements that an interrupted try on the same machine has written are not repeated.

    Args:
        path: The part's file.
        facts: Device, versions, scale.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self.path, self.facts, self.begin = path, dict(facts), time.perf_counter()
        earlier = read(path)
        same = {name: earlier.get(name) for name in facts} == self.facts
        self.results: dict[str, Any] = earlier.get("results", {}) if same else {}
        self.errors: dict[str, str] = {}
        self._write("running")

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, recorded under `name`; `None` if it raises, with the traceback recorded."""
        if name in self.results:
            return self.results[name]
        print(f"{self.path.stem}: {name} ...", flush=True)
        try:
            self.results[name] = work()
        except Exception:  # whatever it is, the other measurements go on
            self.errors[name] = traceback.format_exc()
            print(self.errors[name], flush=True)
        self._write("running")
        return self.results.get(name)

    def record(self, name: str, value: Any) -> None:
        """Write a result that is not final."""
        self.results[name] = value
        self._write("running")

    def finish(self) -> bool:
        """Mark the part as finished, or failed if a measurement failed; returns whether none did."""
        self._write("failed" if self.errors else FINISHED)
        return not self.errors

    def _write(self, status: str) -> None:
        write(
            self.path,
            {
                "status": status,
                **self.facts,
                "seconds": round(time.perf_counter() - self.begin, 1),
                "results": self.results,
                "errors": self.errors,
            },
        )
