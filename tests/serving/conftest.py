"""Fixtures of the tests that serve models by vLLM: `make test-serving`, in an environment of its own."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar

from tests.serving.models import MODELS, make_models
from tests.serving.server import Server


# Nothing of this folder belongs to `make test`, whose environment has no vLLM.
collect_ignore = [] if find_spec("vllm") else ["test_serving.py", "test_drafting.py"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    disable_progress_bar()
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=MODELS)
def server(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Server]:
    """One model after the other, each by a server of its own; the first one as vLLM runs by default, compiled."""
    options = [] if request.param == MODELS[0] else ["--enforce-eager"]
    with Server(folders[request.param], *options) as server:
        yield server
