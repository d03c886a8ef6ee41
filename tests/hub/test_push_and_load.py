"""What is pushed loads: everywhere, at every commit that holds weights, and nothing secret is in it."""

import pytest

from modeling_charformer import CharformerTokenizer
from tests.hub.conftest import (
    AUTO_CLASSES,
    LOAD_EXAMPLE,
    PUSH_EXAMPLE,
    WRITE_TOKEN,
    check_repository,
    result,
    with_weights,
)


pytestmark = pytest.mark.slow


COMPARED = ("logits", "hidden", "ids", "text")


@pytest.fixture(scope="module")
def pushed(run) -> dict:
    """What the models that `user/parts` holds compute: before its tag, and now."""
    return run("push_program.py", "parts", "user/parts")


def test_model_and_tokenizer_by_calls_of_their_own(hub, pushed):
    commits = with_weights(hub, "user/parts")
    for oid in commits:
        check_repository(hub.files("user/parts", oid))
    assert len(commits) >= 2


@pytest.fixture(scope="module")
def loaded(hub, run, pushed) -> dict[str, dict]:
    """What a stranger gets: the newest revision, that of a tag, that of a commit, and the model for inference."""
    tagged = hub.files("user/parts", "v1")
    commit = next(oid for oid in with_weights(hub, "user/parts") if hub.files("user/parts", oid) == tagged)
    places = {
        "main": "user/parts@main",
        "tag": "user/parts@v1",
        "commit": f"user/parts@{commit}",
        "inference": "user/parts-inference@main",
    }
    return dict(zip(places, run("remote_program.py", "load", *places.values(), token=None), strict=True))


def test_a_stranger_loads_every_revision(pushed, loaded):
    for name, expected in (("main", pushed["second"]), ("tag", pushed["first"]), ("commit", pushed["first"])):
        assert {key: loaded[name][key] for key in COMPARED} == {key: expected[key] for key in COMPARED}
        assert loaded[name]["module"].startswith("transformers_modules.")
        assert loaded[name]["warnings"] == [] and loaded[name]["loading"] == {}
        assert set(loaded[name]["auto_map"]) >= AUTO_CLASSES
        assert {"next_char", "target_2", "layer_1"} <= set(loaded[name]["loss_terms"])


def test_pipeline_by_name(run, pushed):
    assert run("remote_program.py", "by_pipeline", "user/parts", token=None) == pushed["second"]["text"]


def test_no_code_runs_without_trust(hub, fail, pushed):
    hub.requests.clear()
    assert "trust_remote_code=True" in fail("remote_program.py", "refused", "user/parts", token=None)
    assert not [request for request in hub.requests if ".py" in request.path]


def test_no_code_is_fetched_with_the_package(hub, run, pushed):
    hub.requests.clear()
    loaded = run("push_program.py", "load", "user/parts", token=None)
    assert {key: loaded[key] for key in COMPARED} == {key: pushed["second"][key] for key in COMPARED}
    assert loaded["modules"] == [
        "modeling_charformer.modeling_charformer",
        "modeling_charformer.tokenization_charformer",
    ]
    assert not [request for request in hub.requests if ".py" in request.path]


def test_inference_export(hub, pushed, loaded):
    inference, full = loaded["inference"], loaded["main"]
    assert {key: inference[key] for key in COMPARED} == {key: pushed["second"][key] for key in COMPARED}
    assert inference["warnings"] == [] and inference["loading"] == {}
    assert inference["loss_terms"] == ["last_position", "next_char"]
    assert inference["parameters"] < full["parameters"]
    sizes = [len(hub.files(repo, "main")["model.safetensors"]) for repo in ("user/parts-inference", "user/parts")]
    assert sizes[0] < sizes[1]


def test_added_losses_come_back_from_the_hub(hub, run):
    saved, *loaded = run("push_program.py", "added_losses", "user/added")
    assert any(saved) and loaded == [saved] * 3
    for repo in ("user/added", "user/added-saved"):
        weights = {name for name in hub.files(repo, "main") if name.endswith(".safetensors")}
        assert weights == {"model.safetensors", "auxiliary_heads/model.safetensors"}


CHECKPOINTS = {
    "end": set(),
    "every_save": set(),
    "checkpoint": {"last-checkpoint"},
    "all_checkpoints": {"checkpoint-2", "checkpoint-4"},
}


@pytest.fixture(scope="module")
def trained(hub, start, run, text_file, tmp_path_factory) -> dict[str, dict]:
    """For each strategy, what the trained model computes and what each commit with weights does where it is loaded."""
    folder = tmp_path_factory.mktemp("trained")
    token = ("--hub_token", WRITE_TOKEN)  # not the place for it, which is why it must not end up in a file
    processes = {
        strategy: start("push_program.py", "train", f"user/{strategy}", strategy, text_file, folder / strategy, *token)
        for strategy in CHECKPOINTS
    }
    trained = {strategy: {"expected": result(process)} for strategy, process in processes.items()}
    places = [(strategy, oid) for strategy in CHECKPOINTS for oid in with_weights(hub, f"user/{strategy}")]
    loaded = run("remote_program.py", "load", *(f"user/{strategy}@{oid}" for strategy, oid in places), token=None)
    for (strategy, _), outputs in zip(places, loaded, strict=True):
        trained[strategy].setdefault("loaded", []).append(outputs)
    for strategy in CHECKPOINTS:
        assert not list((folder / strategy).glob("_push-*"))
        assert not [path for path in (folder / strategy).rglob("*") if path.name == "training_args.bin"]
    return trained


@pytest.mark.parametrize("strategy", CHECKPOINTS)
def test_training_with_each_strategy(hub, trained, strategy):
    repo, expected, loaded = f"user/{strategy}", trained[strategy]["expected"], trained[strategy]["loaded"]
    oids = with_weights(hub, repo)
    # Saves at steps 2 and 4, of which only one checkpoint is kept, and the end, whose weights are those of step 4.
    assert len(oids) == len(loaded) == (1 if strategy == "end" else 3)
    for oid in oids:
        check_repository(hub.files(repo, oid))
    assert {key: loaded[-1][key] for key in COMPARED} == {key: expected[key] for key in COMPARED}
    titles = [commit.title for commit in hub.commits(repo)]
    assert titles[-1] == "End of training"
    assert {name.split("/")[0] for name in hub.files(repo, "main") if "/" in name} == CHECKPOINTS[strategy]
    if strategy != "end":
        assert titles[-3:-1] == ["Training in progress, step 2", "Training in progress, step 4"]
        assert loaded[0]["logits"] != loaded[1]["logits"] == loaded[2]["logits"]


def test_card_of_a_run(hub, run, text_file, tmp_path):
    """What a person writes into it is kept, and what the program wrote is renewed."""
    arguments = ("push_program.py", "train", "user/card", "end", text_file)
    run(*arguments, tmp_path / "first")
    card = hub.files("user/card", "main")["README.md"].decode()
    assert "Bits per character, validation" in card and 'path = "user/card"' in card and "text.txt" in card
    assert "After 4 optimizer steps" in card and "loss_terms.png" in hub.files("user/card", "main")
    hub.write(
        "user/card",
        "README.md",
        card.replace("license: apache-2.0", "license: mit") + "\n## My notes\n\nWritten by me.\n",
    )
    run(*arguments, tmp_path / "second", "--max_steps", "3")
    renewed = hub.files("user/card", "main")["README.md"].decode()
    assert "Written by me." in renewed and "license: mit" in renewed
    assert "After 3 optimizer steps" in renewed and "After 4 optimizer steps" not in renewed
    assert "Written by me." in (tmp_path / "second" / "README.md").read_text()


def test_checkpoint_on_the_hub_resumes(hub, run, trained, text_file, tmp_path):
    """What `hub_strategy="checkpoint"` leaves is what another machine goes on from."""
    commits = hub.commits("user/checkpoint")
    half = next(commit for commit in commits if commit.title == "Training in progress, step 2")
    (tmp_path / "last-checkpoint").mkdir()
    for name, content in half.files.items():
        if name.startswith("last-checkpoint/"):
            (tmp_path / name).write_bytes(content)
    resume = ("--resume", tmp_path / "last-checkpoint")
    resumed = run("push_program.py", "train", "user/resumed", "end", text_file, tmp_path / "second", *resume)
    assert resumed["logits"] == trained["checkpoint"]["expected"]["logits"]


def test_code_travels_on(hub, run, pushed):
    """Fine-tuned from a repository's own code, with and without PEFT, and pushed elsewhere: complete again."""
    logits = run("remote_program.py", "finetune", "user/parts", "user/mine")
    hub.rename("user/parts", "user/renamed")
    try:
        for repo in ("user/mine", "user/mine-merged"):
            check_repository(hub.files(repo, "main"))
            assert b"parts" not in hub.files(repo, "main")["config.json"]
        hub.rename("user/mine-merged", "user/merged")
        (loaded,) = run("remote_program.py", "load", "user/merged@main", token=None)
        assert loaded["logits"] == logits
        assert {"layer_1", "target_2"} <= set(loaded["loss_terms"])
    finally:
        hub.rename("user/renamed", "user/parts")


def test_examples(hub, start, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    CharformerTokenizer().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# What the run knows\n")
    (tmp_path / "loss_terms.png").write_bytes(b"a picture")
    (tmp_path / "optimizer.pt").write_bytes(b"a pickle")
    for example, arguments in ((PUSH_EXAMPLE, [tmp_path, "user/shared"]), (LOAD_EXAMPLE, ["user/shared", "def "])):
        process = start(example, *arguments)
        shown, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    assert shown.startswith("def ")
    for repo in ("user/shared", "user/shared-inference"):
        check_repository(hub.files(repo, "main"))
