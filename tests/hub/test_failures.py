"""What goes wrong between here and the Hub is said clearly, breaks nothing, and is made up for by the next push."""

import signal

import pytest

from tests.hub.conftest import check_repository, with_weights


pytestmark = pytest.mark.slow


COMMIT = "POST /api/models/[^ ]*/commit"


@pytest.fixture
def train(text_file, tmp_path):
    """Arguments that train a tiny model into `folder` and push it to `repo`."""

    def arguments(repo: str, strategy: str = "end", folder: str = "run", *more: str) -> tuple:
        return ("push_program.py", "train", repo, strategy, text_file, tmp_path / folder, *more)

    return arguments


@pytest.fixture(scope="module")
def existing(run, text_file, tmp_path_factory) -> str:
    """A private repository with a trained model."""
    folder = tmp_path_factory.mktemp("existing") / "run"
    run("push_program.py", "train", "user/existing", "end", text_file, folder, "--hub_private_repo", "true")
    return "user/existing"


def test_refused_before_training(run, existing, text_file, tmp_path):
    """One program, one token after the other: none of them trains."""
    said = run("push_program.py", "refusals", text_file, tmp_path / "run")
    for name, words in {
        "wrong token": ["pushing to 'user/failed' failed", "401", "Invalid credentials", "hf auth login"],
        "no token": ["pushing to 'user/failed' failed", "hf auth login"],
        "read-only token": ["pushing to 'user/failed' failed", "403", "right to write"],
        # `create_repo` succeeds where the repository can be read
        "read-only token, existing": ["pushing to 'user/existing' failed", "403", "right to write"],
        "someone else's": ["pushing to 'user/failed' failed", "403", "right to write"],
        "invalid name": ["pushing to 'user/not a name' failed", "user/not a name"],
    }.items():
        assert [word for word in words if word not in said[name]] == [], said[name]
        assert said[name].count("pushing to") == 1 and "Traceback" not in said[name] and "step" not in said[name]
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {"_run.lock"}


def test_private_repository(run, existing):
    said = run("push_program.py", "load_with_tokens", existing)
    assert said["hf_write"] == "loaded"
    for token in ("", "hf_other"):
        assert "is not a valid model identifier" in said[token] and "private repository" in said[token]


def test_hub_out_of_reach(fail, train):
    errors = fail(*train("user/failed"), HF_ENDPOINT="http://127.0.0.1:9")
    assert "charformer-train: error: pushing to" in errors and "Can this machine reach the Hub?" in errors


def test_server_error_at_the_last_commit(hub, run, fail, existing, train, tmp_path):
    """The model is on disk, the revision before it stays, and pushing again completes."""
    before = hub.files(existing, "main")
    hub.fail(COMMIT, times=1, kind="status", status=500)
    errors = fail(*train(existing, "end", "run", "--seed", "7"))
    assert "500" in errors and "Push again later" in errors and f"The model is in {tmp_path / 'run'}" in errors
    assert hub.files(existing, "main") == before
    run("push_program.py", "push_again", tmp_path / "run", existing)
    saved = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert hub.files(existing, "main")["model.safetensors"] == saved != before["model.safetensors"]
    check_repository(hub.files(existing, "main"))


def test_failed_background_push_is_reported(hub, start, train):
    hub.fail(COMMIT, times=1, kind="status", status=500)
    process = start(*train("user/background", "every_save"))
    shown, errors = process.communicate()
    assert process.returncode == 0, errors[-5000:]
    assert errors.count("pushing to 'user/background' failed") == 1 and "500" in errors
    titles = [commit.title for commit in hub.commits("user/background")]
    assert titles[-2:] == ["Training in progress, step 4", "End of training"]
    check_repository(hub.files("user/background", "main"))


def test_interrupted_upload_and_killed_process(hub, run, start, existing, train, tmp_path):
    """What is half uploaded is never seen."""
    before = hub.files(existing, "main")
    hub.fail("PUT ", times=1, kind="stall")
    process = start(*train(existing, "every_save", "run", "--seed", "8"))
    hub.wait_for("PUT ", timeout=120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.release()
    assert hub.files(existing, "main") == before
    hub.fail("PUT ", times=1, kind="drop", after_bytes=1000)  # which the client tries again by itself
    run(*train(existing, "end", "run", "--seed", "8", "--overwrite_output_dir", "true"))
    saved = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert hub.files(existing, "main")["model.safetensors"] == saved != before["model.safetensors"]
    assert not list((tmp_path / "run").glob("_push-*"))


def test_lost_answer_of_a_commit(hub, fail, run, train, tmp_path):
    """The commit is there, the client does not know: pushing again finds the weights in place."""
    hub.fail(COMMIT, times=1, kind="lost_answer")
    assert "pushing to 'user/lost' failed" in fail(*train("user/lost"))
    (oid,) = with_weights(hub, "user/lost")
    check_repository(hub.files("user/lost", oid))
    uploads = len([request for request in hub.requests if request.method == "PUT"])
    run("push_program.py", "push_again", tmp_path / "run", "user/lost")
    assert hub.files("user/lost", "main")["model.safetensors"] == hub.files("user/lost", oid)["model.safetensors"]
    assert len([request for request in hub.requests if request.method == "PUT"]) == uploads


def test_interrupted_download(hub, run, existing):
    """Cut off by the network, weights are fetched again; a half file is never loaded."""
    hub.fail(f"GET /{existing}/[0-9a-f]{{64}}", times=1, kind="cut", after_bytes=1000)
    assert run("push_program.py", "load", existing)["modules"][0] == "modeling_charformer.modeling_charformer"
    downloads = [request for request in hub.requests if request.storage and request.method == "GET"]
    assert len(downloads) >= 2 and not [request for request in downloads if request.token]
