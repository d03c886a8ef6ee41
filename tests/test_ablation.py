"""The ablation's report says what its runs say."""

import importlib.util
import json
import math

import pytest
import torch

from tests.conftest import ROOT


spec = importlib.util.spec_from_file_location("ablation", ROOT / "benchmarks" / "ablation.py")
assert spec is not None and spec.loader is not None
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)

GRID = ablation.Grid("recipe.yaml", {}, {"none": {}, "better": {}, "worse": {}, "unsure": {}}, (0.1, 0.2))


def run(cell: str, learning_rate: float, seed: int, final: float | None, cost: float = 1.0) -> dict:
    """Falls in a straight line from 3 bits at step 0 to `final` at step 100."""
    last = 9.0 if final is None else final
    return {
        "grid": "cpu",
        "cell": cell,
        "learning_rate": learning_rate,
        "seed": seed,
        "final_bpc": final,
        "seconds_per_step": cost,
        "curve": [[0, 0.0, 3.0], [100, 100 * cost, last]],
        "steps": 100,
        "parameters": 30,
        "inference_parameters": 20,
        "device": "a machine",
        "torch": "2",
        "transformers": "5",
        "data_sha256": "0",
    }


RUNS = [
    run("none", 0.1, 1, 2.6),
    run("none", 0.2, 1, 2.5),
    run("none", 0.2, 2, 2.52),
    run("better", 0.1, 1, 2.0, cost=1.5),
    run("better", 0.2, 1, None),
    run("better", 0.1, 2, 2.04, cost=1.5),
    run("worse", 0.2, 1, 2.7),
    run("worse", 0.2, 2, 2.71),
    run("unsure", 0.2, 1, 2.4),
    run("unsure", 0.2, 2, 2.6),
]


def test_each_cell_is_compared_at_its_own_best_learning_rate():
    none, better, worse, unsure = ablation.rows(RUNS, GRID)
    assert (none.learning_rate, better.learning_rate) == (0.2, 0.1)  # a run that diverged is the worst
    assert better.bpc == pytest.approx(2.02) and better.error == pytest.approx(0.02)
    assert better.gain == pytest.approx((0.5 + 0.48) / 2) and better.gain_error == pytest.approx(0.01)
    # From 3 to 2 in 100 steps, at 2.5 after half of them; each step costs one and a half.
    assert better.steps_ratio == pytest.approx((0.5 / 1.0 + 0.48 / 0.96) / 2, abs=0.01)
    assert better.seconds_ratio == pytest.approx(better.steps_ratio * 1.5)
    assert worse.steps_ratio is None
    assert unsure.steps_ratio is None  # reached with one seed, not with the other
    assert none.training_only == 10


def test_conclusions_need_more_than_twice_the_error():
    lines = "\n".join(ablation.conclusions(ablation.rows(RUNS, GRID), GRID))
    assert "- better: helps (+0.4900" in lines and "- worse: hurts" in lines
    assert "- unsure: makes no difference that these seeds can show" in lines
    one_seed = [found for found in RUNS if found["seed"] == 1]
    assert "better: has one seed only" in "\n".join(ablation.conclusions(ablation.rows(one_seed, GRID), GRID))


def test_a_value_is_reached_on_the_line_between_two_evaluations():
    curve = [[0, 0.0, 3.0], [10, 20.0, 2.0], [20, 40.0, 2.5], [30, 60.0, 1.0]]
    assert ablation.reaches(curve, 2.5, 0) == 5
    assert ablation.reaches(curve, 2.5, 1) == 10
    assert ablation.reaches(curve, 0.5, 0) is None


def test_report_and_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(ablation.GRIDS, "cpu", GRID)
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(found) + "\n" for found in RUNS))
    page = ablation.report(path)
    assert "| better | 0.1 | 2 | 2.0200 +- 0.0200 | +0.4900 +- 0.0100 | 0.50 | 0.75 | 1.50 |" in page
    assert (tmp_path / "runs_cpu.png").stat().st_size > 10_000
    assert math.isinf(ablation.final(RUNS[4]))


def test_the_cells_of_all_grids_are_settings_that_exist(tmp_path):
    """Each is parsed and built into a model, before anyone's hours depend on it."""
    text = tmp_path / "text.txt"
    text.write_text("text")
    for name, grid in ablation.GRIDS.items():
        assert all(baseline in grid.cells for baseline in grid.baselines.values())
        for cell in grid.cells:
            if "gpu" in grid.recipe and not torch.cuda.is_available():
                continue  # bf16 is refused elsewhere
            arguments = ablation.arguments_of(name, cell, grid.learning_rates[0], 1, str(text), str(tmp_path / "run"))
            assert arguments[0].config_fields()["num_hidden_layers"] >= 4
