"""The ablation's report says what its runs say."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import scipy.stats
import torch

from benchmarks.ablation import comparison, grids, one_run, report, runs, sweep
from charformer_training.train import build_model
from tests.conftest import ROOT


GRID = grids.Grid(
    "recipe.yaml",
    {"eval_steps": 50},
    {"none": {}, "better": {}, "worse": {}, "unsure": {}, "wild": {}},
    (0.1, 0.2),
    seeds=(2, 3),
)
COSTS = {"none": 2.0, "better": 3.0, "worse": 2.0, "unsure": 2.0, "wild": 2.0}


def run(cell: str, learning_rate: float, seed: int, final: float | None) -> dict:
    """Falls in a straight line from 3 bits at step 0 to `final` at step 100."""
    return {
        "grid": "cpu",
        "cell": cell,
        "learning_rate": learning_rate,
        "seed": seed,
        "settings": {"eval_steps": 50},
        "final_bpc": final,
        "curve": [] if final is None else [[0, 0.0, 3.0], [100, 7.0, final]],  # diverged before the first evaluation
        "gradient_norms": [
            {"step": 0, "next_char": 3.0, "layer_1": 0.6, "target_2": 0.4},
            {"step": 100, "next_char": 2.0},
        ],
        "steps": 100,
        "parameters": 30,
        "inference_parameters": 20,
        "device": "a machine",
        "threads": 1,
        "torch": "2",
        "transformers": "5",
        "data_sha256": "0",
    }


RUNS = [
    # The first seed chooses the learning rate, and counts no further.
    *(run("none", rate, 1, final) for rate, final in ((0.1, 2.6), (0.2, 2.4), (0.3, 2.5))),
    run("none", 0.2, 2, 2.5),
    run("none", 0.2, 3, 2.52),
    run("better", 0.1, 1, 2.0),
    run("better", 0.2, 1, None),
    run("better", 0.1, 2, 2.0),
    run("better", 0.1, 3, 2.04),
    run("worse", 0.2, 1, 2.7),
    run("worse", 0.2, 2, 2.7),
    run("worse", 0.2, 3, 2.71),
    run("unsure", 0.2, 1, 2.4),
    run("unsure", 0.2, 2, 2.4),
    run("unsure", 0.2, 3, 2.6),
    run("wild", 0.2, 1, 2.4),
    run("wild", 0.2, 2, None),
    run("wild", 0.2, 3, 2.4),
]


def test_each_cell_is_compared_at_its_own_best_learning_rate():
    none, better, worse, unsure, wild = comparison.rows(RUNS, GRID, COSTS)
    assert (none.learning_rate, better.learning_rate) == (0.2, 0.1)  # a run that diverged is the worst
    assert (none.at_edge, better.at_edge) == (False, True)
    assert better.bpc == pytest.approx(2.02) and better.error == pytest.approx(0.02)
    assert better.gain == pytest.approx((0.5 + 0.48) / 2) and better.gain_error == pytest.approx(0.01)
    # From 3 to 2 in 100 steps, at 2.5 after half of them; each step costs one and a half.
    assert better.steps_ratio is not None
    assert better.steps_ratio == pytest.approx((0.5 / 1.0 + 0.48 / 0.96) / 2, abs=0.01)
    assert better.seconds_ratio == pytest.approx(better.steps_ratio * 1.5)
    assert worse.steps_ratio is None
    assert unsure.steps_ratio is None  # reached with one seed, not with the other
    assert none.training_only == 10
    assert better.gradient_shares == pytest.approx((0.25, 0.0))


def test_conclusions_are_those_of_a_t_test():
    better, worse, unsure, wild, chance = report.conclusions(comparison.rows(RUNS, GRID, COSTS), GRID)
    assert better.startswith("- better, beside none: helps (+0.4900") and worse.startswith(
        "- worse, beside none: hurts"
    )
    # -0.1950 +- 0.0050 would do with two errors; with two seeds it takes 12.7.
    assert unsure.startswith("- unsure, beside none: makes no difference that these seeds can show")
    assert wild.startswith("- wild, beside none: diverged with 1 of 2 seeds")
    assert "Of 4 comparisons at 5% each, 0.2 would" in chance
    two_seeds = [found for found in RUNS if found["seed"] < 3]
    assert (
        "better, beside none: has too few seeds to tell"
        in report.conclusions(comparison.rows(two_seeds, GRID, COSTS), GRID)[0]
    )
    freedom = 2
    assert comparison.T_QUANTILES[freedom] == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=1e-3)


def test_a_value_is_reached_on_the_line_between_two_evaluations():
    curve = [[0, 0.0, 3.0], [10, 20.0, 2.0], [20, 40.0, 2.5], [30, 60.0, 1.0]]
    assert comparison.reaches(curve, 2.5, 0) == 5
    assert comparison.reaches(curve, 2.5, 1) == 10
    assert comparison.reaches(curve, 0.5, 0) is None


def test_report_and_figure(tmp_path, monkeypatch, figures):
    monkeypatch.setitem(grids.GRIDS, "cpu", GRID)
    path = tmp_path / "runs.jsonl"
    whole = "".join(json.dumps(found) + "\n" for found in RUNS)
    path.write_text(whole + whole[:50])  # of a run that was killed while it wrote
    (tmp_path / "runs_cpu_costs.json").write_text(json.dumps(COSTS))
    page = report.report(path)
    assert "| better | 0.1* | 2 | 2.0200 +- 0.0200 | +0.4900 +- 0.0100 | 0.50 | 0.75 | 1.50 | 25%, 0% |" in page
    (figure,) = figures
    by_step, by_second = figure.axes
    # Of the seeds that count, at each cell's best rate; a run that diverged is left out of its cell's mean.
    ends = {"none": 2.51, "better": 2.02, "worse": 2.705, "unsure": 2.5, "wild": 2.4}
    assert {line.get_label(): [*line.get_ydata()] for line in by_step.lines} == {
        cell: pytest.approx([3.0, end]) for cell, end in ends.items()
    }
    assert all([*line.get_xdata()] == [0, 100] for line in by_step.lines)
    assert {line.get_label(): line.get_xdata()[-1] for line in by_second.lines} == {
        cell: 100 * seconds for cell, seconds in COSTS.items()
    }
    assert by_step.get_ylabel() == "validation bits per character" and by_second.get_xlabel() == "seconds of training"
    assert (tmp_path / "runs_cpu.png").read_bytes().startswith(b"\x89PNG")
    other = run("none", 0.2, 4, 2.0) | {"threads": 2}
    path.write_text(whole + json.dumps(other) + "\n")
    with pytest.raises(ValueError, match="differ in threads"):
        report.report(path)


@pytest.mark.slow
def test_committed_report_is_that_of_the_committed_runs(tmp_path):
    results = ROOT / "benchmarks" / "results"
    for path in [results / "ablation.jsonl", *results.glob("ablation_*_costs.json")]:
        shutil.copy(path, tmp_path)
    assert report.report(tmp_path / "ablation.jsonl") == (results / "ablation.md").read_text()


@pytest.mark.parametrize(("text", "message"), [("", "holds no runs"), ("cpu", "no run of cpu has the settings")])
def test_report_without_runs_says_so(tmp_path, text, message):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(run("none", 0.2, 1, 2.0)) if text else "")
    with pytest.raises(ValueError, match=message):
        report.report(path)


def test_what_is_done_is_not_run_again(tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("text")
    first = sweep.Sweep("cpu", str(data), tmp_path / "runs.jsonl", workers=1)
    keys = [("none", 0.002, 1), ("none", 0.004, 1)]
    assert first.missing(keys) == keys
    done = runs.key_of("cpu", *keys[0], first.data_sha256) | {"threads": first.threads, "final_bpc": 2.0}
    first.output.write_text(json.dumps(done) + "\n")
    assert first.missing(keys) == keys[1:]
    data.write_text("another text")
    another = sweep.Sweep("cpu", str(data), tmp_path / "runs.jsonl", workers=1)
    assert another.missing(keys) == keys


@pytest.mark.slow
@pytest.mark.parametrize("name", grids.GRIDS)
def test_the_cells_of_all_grids_are_settings_that_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each is parsed and built into a model, before anyone's hours depend on it."""
    grid = grids.GRIDS[name]
    assert all(baseline in grid.cells for baseline in grid.baselines.values())
    # What only a GPU has is refused elsewhere.
    without_gpu = dataclasses.replace(grid, fields=grid.fields | {"bf16": False, "use_cpu": True})
    monkeypatch.setitem(grids.GRIDS, name, without_gpu)
    for cell, fields in grid.cells.items():
        arguments = one_run.arguments_of(name, cell, grid.learning_rates[0], 1, "text.txt", str(tmp_path / "run"))
        assert arguments.model.config_fields()["num_hidden_layers"] >= 4
        with torch.device("meta"):
            settings = build_model(arguments.model).loss_settings
        assert settings.num_targets == fields["num_targets"]
        assert bool(settings.layers) == (fields["intermediate_layers"] != "none")
        assert arguments.training.muon == fields.get("muon", False)
