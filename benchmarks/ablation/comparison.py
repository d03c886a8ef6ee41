"""Comparison of each cell with its baseline, seed by seed."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from .grids import Grid
from .runs import of_cell, result


# Two-sided 95% quantiles of Student's t, by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; nan if a run diverged or there is only one."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def reaches(curve: list[list[float]], bpc: float, axis: int) -> float | None:
    """Steps (axis 0) or seconds (axis 1) until a curve falls to `bpc`, by linear interpolation."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after[2] <= bpc < before[2]:
            return float(before[axis] + (after[axis] - before[axis]) * (before[2] - bpc) / (before[2] - after[2]))
    return None


@dataclass(frozen=True)
class Row:
    """A cell in the report. Ratios divide the cell's steps or seconds until it first reaches the baseline's result by the
    baseline's, seed by seed. They are `None` if a seed never reaches it."""

    cell: str
    learning_rate: float
    at_edge: bool
    """Whether the best learning rate is the lowest or highest of the grid, so that a better one may be outside."""
    seeds: int
    diverged: int
    bpc: float
    error: float
    gain: float
    gain_error: float
    steps_ratio: float | None
    seconds_ratio: float | None
    step_cost: float
    training_only: int
    """Number of parameters that only training needs."""
    gradient_shares: tuple[float, float]
    """The auxiliary terms' share of the gradient norms on the layers, at the first and at the last evaluation."""

    @property
    def verdict(self) -> str:
        """Whether the difference is significant in a paired t-test at 5%."""
        if self.diverged:
            return f"diverged with {self.diverged} of {self.seeds} seeds"
        if math.isnan(self.gain_error):
            return "has too few seeds to tell"
        if abs(self.gain) <= T_QUANTILES[self.seeds - 1] * self.gain_error:
            return "makes no difference that these seeds can show"
        return "helps" if self.gain > 0 else "hurts"


def auxiliary_share(norms: dict[str, float]) -> float:
    """The share of the auxiliary terms in the sum of all terms' gradient norms."""
    terms = {name: norm for name, norm in norms.items() if name != "step"}
    main = sum(norm for name, norm in terms.items() if name in ("next_char", "last_position"))
    return 1 - main / sum(terms.values()) if any(terms.values()) else math.nan


def rows(runs: list[dict[str, Any]], grid: Grid, costs: dict[str, float]) -> list[Row]:
    table = []
    for cell in grid.cells:
        baseline = grid.baseline(cell)
        own, base = of_cell(runs, cell, grid), of_cell(runs, baseline, grid)
        shared = sorted(own.keys() & base.keys())
        if not shared:
            continue
        bpc, error = mean_and_error([result(own[seed], grid) for seed in shared])
        gain, gain_error = mean_and_error([result(base[seed], grid) - result(own[seed], grid) for seed in shared])
        ratios = []
        for seed in shared:
            bpc_to_reach = result(base[seed], grid)
            steps, of_base = (reaches(run["curve"], bpc_to_reach, 0) for run in (own[seed], base[seed]))
            if steps is not None and of_base is not None:
                ratios.append(steps / of_base)
        steps_ratio = statistics.mean(ratios) if len(ratios) == len(shared) else None
        cost = costs[cell] / costs[baseline]
        first = own[shared[0]]
        gradients = [own[seed]["gradient_norms"] for seed in shared if own[seed]["gradient_norms"]]
        tried = sorted({run["learning_rate"] for run in runs if run["cell"] == cell})
        table.append(
            Row(
                cell=cell,
                learning_rate=first["learning_rate"],
                at_edge=first["learning_rate"] in (tried[0], tried[-1]),
                seeds=len(shared),
                diverged=sum(math.isinf(result(own[seed], grid)) for seed in shared),
                bpc=bpc,
                error=error,
                gain=gain,
                gain_error=gain_error,
                steps_ratio=steps_ratio,
                seconds_ratio=None if steps_ratio is None else steps_ratio * cost,
                step_cost=cost,
                training_only=first["parameters"] - first["inference_parameters"],
                gradient_shares=(
                    statistics.mean(auxiliary_share(norms[0]) for norms in gradients) if gradients else math.nan,
                    statistics.mean(auxiliary_share(norms[-1]) for norms in gradients) if gradients else math.nan,
                ),
            )
        )
    return table
