"""The measurements for a GPU run, at toy size on the CPU; a part that fails or takes too long stops no other."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import any_model, train_step
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import correctness, pictures, runner, scale, trainer_checks, training_step
from benchmarks.gpu.report import Report, read
from benchmarks.gpu.scale import toy


# What the program of a part does in its place: it waits for its line, and then does this.
ENDINGS = {
    "good": "report('finished')",
    "failing": "report('failed'); sys.exit(1)",
    "crashing": "os.kill(os.getpid(), 9)",
    "slow": "report('running'); time.sleep(60)",
}
STAND_IN = """
import json, os, sys, time
from pathlib import Path

def report(status):
    path = Path(sys.argv[1], sys.argv[3] + ".json")
    path.write_text(json.dumps({"status": status, "results": {"a": 1}, "order": time.time()}))

if sys.stdin.readline():
    exec(json.loads(sys.argv[2])[sys.argv[3]])
"""


def stand_in(folder: Path, **endings: str) -> list[str]:
    return [sys.executable, "-c", STAND_IN, str(folder), json.dumps(ENDINGS | endings)]


def statuses(folder: Path) -> dict[str, str]:
    return {path.stem: read(path)["status"] for path in folder.glob("*.json")}


# Compilers warn, and so does Transformers on a CPU; what counts here is that every part runs.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_parts_measure_what_they_name(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch):
    # Tracing takes longer than all else; see the test below.
    monkeypatch.setattr(scale, "toy", lambda text: dataclasses.replace(toy(text), compiler=None))
    # A process that has held more before shows no peak.
    monkeypatch.setattr(training_step, "peak_memory", lambda make, device: 100 + make()())
    for name in program.PARTS:
        assert program.run_part(name, tmp_path, str(text_file), is_toy=True, wait=False), read(
            tmp_path / f"{name}.json"
        )
    results = {name: read(tmp_path / f"{name}.json")["results"] for name in program.PARTS}
    assert {name for name in results["training_step"] if name.endswith(" eager")} == {
        f"T12, {variant}, eager" for variant in train_step.VARIANTS
    }
    assert results["memory"]["peak"]["peak_memory_mib"].keys() == {"plain", "checkpointed"}
    for part in ("shakespeare", "shakespeare_without_losses"):
        points = results[part]["steps, seconds, validation loss"]
        assert [point[0] for point in points] == [2, 4]
        assert results[part]["run"]["best_validation_loss"] == min(point[2] for point in points)
    assert results["shakespeare"]["run"]["best_validation_loss"] != pytest.approx(
        results["shakespeare_without_losses"]["run"]["best_validation_loss"], abs=1e-9
    )
    assert results["drafting"]["greedy"]["greedy"]["use_extra_targets"]["prompts_with_the_same_text"] == 1
    assert set(results["vocabulary"]["ratios of seconds"]) == set(any_model.VARIANTS)
    assert results["vocabulary"]["ratios of seconds"]["plain"] == 1
    pictures.draw(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(pictures.PICTURES)
    table = pictures.table(tmp_path, program.PARTS)
    assert "## shakespeare: finished" in table and "T12, none, eager" in table and "**failed**" not in table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_parts_run(text_file: Path):
    small = toy(str(text_file))
    for mode in ("compiled by layers", "compiled"):
        figures = training_step._of_step("none", small.shapes["T12"], mode, small, tflops=1e-6)
        assert figures["first_seconds"] > 0 and figures["of_matrix_multiply_rate"] > 0
    assert max(correctness.compiled("cpu", "eager").values()) < 1e-6
    assert trainer_checks.compiled("cpu", "eager")["compiled"] < 1e-6


def test_checks_of_correctness_find_wrong_values(monkeypatch: pytest.MonkeyPatch):
    right = correctness.make_model

    def wrong(dtype: torch.dtype, device: str, **fields: Any) -> Any:
        model = right(dtype, device, **fields)
        if dtype == torch.float32:
            with torch.no_grad():
                model.lm_head.bias[0] += 0.1
        return model

    monkeypatch.setattr(correctness, "make_model", wrong)
    with pytest.raises(AssertionError, match="float32: the relative error is"):
        correctness.losses_and_gradients({}, "cpu")


@pytest.mark.slow
def test_parts_that_fail_or_take_too_long_stop_no_other(tmp_path: Path):
    waves = [runner.Wave(("failing",), 2), runner.Wave(("crashing",), 1)]
    waves += [runner.Wave(("slow", "beside"), 1), runner.Wave(("good",), 15)]
    command = stand_in(tmp_path, beside="report('finished')")
    assert not runner.run(tmp_path, command, waves)
    assert statuses(tmp_path) == {
        "failing": "failed",
        "crashing": "ended with exit status -9",
        "slow": "stopped when its time was over",
        "beside": "finished",
        "good": "finished",
    }
    assert read(tmp_path / "slow.json")["results"] == {"a": 1}  # what it had measured by then
    order = {name: read(tmp_path / f"{name}.json").get("order", 0.0) for name in ("failing", "slow", "good")}
    assert order["failing"] < order["slow"] < order["good"]


def test_finished_parts_run_again_only_if_asked(tmp_path: Path):
    waves = [runner.Wave(("good", "other"), 15)]
    (tmp_path / "good.json").write_text('{"status": "finished", "results": {"a": 7}}')
    command = stand_in(tmp_path, other="report('finished')")
    assert runner.run(tmp_path, command, waves)
    assert [read(tmp_path / f"{name}.json")["results"]["a"] for name in ("good", "other")] == [7, 1]
    assert runner.run(tmp_path, command, waves, again=True)
    assert read(tmp_path / "good.json")["results"]["a"] == 1
    assert not runner.run(tmp_path, command, waves, minutes=0, again=True)
    assert statuses(tmp_path) == {"good": "no time was left", "other": "no time was left"}


def test_limits_leave_no_more_than_eight_minutes():
    assert {name for wave in runner.WAVES for name in wave.parts} == program.PARTS.keys()
    assert sum(wave.seconds for wave in runner.WAVES[:-1]) <= 60 * runner.MINUTES == 480


def test_report_keeps_what_an_interrupted_try_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, calls = tmp_path / "part.json", []

    def work() -> int:
        calls.append(1)
        return len(calls)

    first = Report(path, {"device": "a"})
    assert first.measure("one", work) == 1 and first.measure("broken", lambda: 1 / 0) is None
    assert read(path)["status"] == "running" and "ZeroDivisionError" in read(path)["errors"]["broken"]
    again = Report(path, {"device": "a"})
    assert again.measure("one", work) == 1 and again.measure("broken", work) == 2
    assert again.finish() and read(path) | {"seconds": 0} == {
        "status": "finished", "device": "a", "seconds": 0, "results": {"one": 1, "broken": 2}, "errors": {}
    }  # fmt: skip
    elsewhere = Report(path, {"device": "b"})
    assert elsewhere.measure("one", work) == 3
    assert elsewhere.measure("broken", lambda: 1 / 0) is None and not elsewhere.finish()
    assert read(path)["status"] == "failed"
