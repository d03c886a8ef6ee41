"""A Markdown page and figures of the runs in a file."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from .comparison import Row, rows
from .grids import GRIDS, JUDGED_BY, Grid
from .runs import of_cell, read


def report(path: Path) -> str:
    """A Markdown page of the runs in `path`; draws a figure of each grid into the same folder.

    Raises:
        ValueError: If there are no runs, or those of a grid are not of one text, device and number of threads.
    """
    runs = read(path)
    if not runs:
        raise ValueError(f"{path} holds no runs")
    pages = ["# Ablation of the auxiliary losses", ""]
    for name in dict.fromkeys(run["grid"] for run in runs):
        grid = GRIDS[name]
        settings = {cell: {**grid.fields, **fields} for cell, fields in grid.cells.items()}
        own = [run for run in runs if run["grid"] == name and settings.get(run["cell"]) == run["settings"]]
        if not own:
            raise ValueError(f"{path}: no run of {name} has the settings of a cell in grids.py")
        for field_name in ("data_sha256", "device", "threads", "torch", "transformers"):
            if len(values := {run[field_name] for run in own}) > 1:
                raise ValueError(f"{path}: the runs of {name} differ in {field_name}: {sorted(map(str, values))}")
        costs = json.loads(path.with_name(f"{path.stem}_{name}_costs.json").read_text(encoding="utf-8"))
        table, one = rows(own, grid, costs), own[0]
        tried = sorted({run["learning_rate"] for run in own if run["seed"] == grid.tuning_seed})
        with_muon = all(fields.get("muon") for fields in grid.cells.values())
        optimizer = "Muon in all cells" if with_muon else "AdamW where a cell says nothing else"
        figure = path.with_name(f"{path.stem}_{name}.png")
        draw(own, grid, costs, figure)
        pages += [
            f"## {name}",
            "",
            f"{one['steps']:,} steps, {grid.recipe} with {grid.fields}, {optimizer};"
            f" {one['device']}, {one['threads']} thread(s) a run, torch {one['torch']}, transformers {one['transformers']}; data sha256 {one['data_sha256']}. Each cell has"
            f" the learning rate that was best for it with seed {grid.tuning_seed} (tried: {tried}); the figures are of seeds"
            f" {list(grid.seeds)}.",
            "",
            f"{'Best' if grid.at_its_best else 'Final'} validation bits {JUDGED_BY[grid.metric]}, mean and standard error;"
            " gain over the baseline seed by seed (same data order); steps and seconds to the baseline's value, as shares of"
            " the baseline's (a dash: not reached with every seed); cost of a step; what of the gradient on the layers is the auxiliary terms' (of the norms of all"
            f" terms' weighted gradients, added up) after {int(grid.fields['eval_steps']):,} steps and at the end. `*`: the best"
            " learning rate is at the edge of those tried.",
            "",
            "| Cell | learning rate | seeds | bpc | gain | steps | seconds | cost of a step | gradient |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in table:
            ratios = ["-" if value is None else f"{value:.2f}" for value in (row.steps_ratio, row.seconds_ratio)]
            pages.append(
                f"| {row.cell} | {row.learning_rate:g}{'*' if row.at_edge else ''} | {row.seeds} |"
                f" {row.bpc:.4f} +- {row.error:.4f} | {row.gain:+.4f} +- {row.gain_error:.4f} | {ratios[0]} | {ratios[1]} |"
                f" {row.step_cost:.2f} | {row.gradient_shares[0]:.0%}, {row.gradient_shares[1]:.0%} |"
            )
        pages += ["", f"![Learning curves]({figure.name})", "", *conclusions(table, grid), ""]
    return "\n".join(pages)


def conclusions(table: list[Row], grid: Grid) -> list[str]:
    """The rows of the table, one for each cell that is compared with another."""
    compared = [row for row in table if row.cell != grid.baseline(row.cell)]
    return [
        f"- {row.cell}, beside {grid.baseline(row.cell)}: {row.verdict} ({row.gain:+.4f} +- {row.gain_error:.4f} bpc,"
        f" {row.step_cost:.2f} x a step)."
        for row in compared
    ] + [f"\nOf {len(compared)} comparisons at 5% each, {len(compared) * 0.05:.1f} would show a difference by chance."]


def draw(runs: list[dict[str, Any]], grid: Grid, costs: dict[str, float], path: Path) -> None:
    """Validation bpc against steps and against seconds: the mean of the seeds of each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    lowest, highest = math.inf, 0.0
    for number, cell in enumerate(grid.cells):
        own = [run for run in of_cell(runs, cell, grid).values() if run["final_bpc"] is not None]
        if not own:
            continue
        points = list(zip(*(run["curve"] for run in own), strict=True))
        bpc = [statistics.mean(point[2] for point in group) for group in points]
        steps = [group[0][0] for group in points]
        lowest, highest = min(lowest, min(bpc)), max(highest, bpc[-1])
        style = {
            "label": cell,
            "color": plt.get_cmap("tab20")(number % 20),
            "linewidth": 2.5 if cell == "none" else 1.2,
            "linestyle": "-" if number < 10 else "--",
        }
        axes[0].plot(steps, bpc, **style)
        axes[1].plot([step * costs[cell] for step in steps], bpc, **style)
    axes[0].set(xlabel="steps", ylabel=f"validation bits {JUDGED_BY[grid.metric]}")
    axes[1].set(xlabel="seconds of training")
    axes[0].set_ylim(lowest - 0.03, max(lowest + 0.6, highest + 0.3))  # shows the end of every curve
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
