r"""Statistics of runs that differ in their width or depth, by seed; conventions of :mod:`eos_utils.eos_stats`.

A statement such as "the narrower, the earlier" is one about an order. Within a seed, Spearman's rank correlation
:math:`\rho` between the size and a number of the run is 1 where that number grows with the size without an exception,
-1 where it falls, and near 0 where there is no order. An eigenvalue that never enters EoS enters last. Runs that begin
at 0.9 of the edge or above have no progressive sharpening and are left out; with fewer than four others there is no
order (nan).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from eos_utils.eos_stats import HALF, entry_step, initial_sharpness, scaled
from eos_utils.experiment import Experiment
from eos_utils.observers import ENTRY_LEVEL, ENTRY_WINDOW, entry_index

if TYPE_CHECKING:
    import xarray as xr

AXES = ("width", "depth")
LEAST = 4  # sizes that an order needs


def size(run: xr.Dataset, axis: str) -> int:
    """The width or the depth of a run's network."""
    if axis not in AXES:
        raise ValueError(f"axis={axis!r}: choose one of {', '.join(AXES)}")
    return int(json.loads(run.attrs["experiment"]).get(axis, getattr(Experiment, axis)))


def entry_or_never(run: xr.Dataset) -> float:
    """The step at which λ1 enters; infinity for never."""
    at = entry_step(run)
    return float("inf") if np.isnan(at) else at


def _medians(run: xr.Dataset) -> np.ndarray:
    """Running medians of λ1·η/2 over 21 measurements."""
    values = scaled(run)[:, 0]
    if len(values) < ENTRY_WINDOW:
        return np.empty(0)
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(values, ENTRY_WINDOW), axis=1))


def mean_rate(run: xr.Dataset) -> float:
    """Growth of λ1·η/2 a step from the first measurement to the entry; without one, to the highest running median."""
    at, steps, medians = entry_index(scaled(run)[:, 0]), run["measured"].values, _medians(run)
    if not len(medians):
        return float("nan")
    last = HALF + int(medians.argmax()) if at is None else at
    return float((medians[last - HALF] - scaled(run)[0, 0]) / (steps[last] - steps[0]))


def steepest_rate(run: xr.Dataset, span: int = 10) -> float:
    """The largest growth of λ1·η/2 a step over ``span`` measurements, of its running median, up to the entry."""
    at, medians = entry_index(scaled(run)[:, 0]), _medians(run)
    before = medians[: None if at is None else at - HALF + 1]
    if len(before) <= span:
        return float("nan")
    return float((before[span:] - before[:-span]).max() / (span * int(run.attrs["stride"])))


def steps_at_edge(run: xr.Dataset) -> float:
    """Steps from the entry of λ1 to the last measurement whose running median is at the level of entry; 0 for never.

    For runs to their stopping accuracy; nan for those that were cut off while they were still at the edge.
    """
    at, medians = entry_index(scaled(run)[:, 0]), _medians(run)
    if at is None:
        return 0.0
    last, steps = int(np.flatnonzero(medians >= ENTRY_LEVEL)[-1]), run["measured"].values
    if last < len(medians) - 1:
        return float(steps[last + HALF] - steps[at])
    return float(steps[-1] - steps[at]) if run.attrs["status"] == "accuracy" else float("nan")


def order(runs: list[xr.Dataset], axis: str, number: Callable[[xr.Dataset], float]) -> float:
    """Spearman's ρ between the size of some runs and a number of each; 0 where that is the same for all."""
    kept = [run for run in runs if initial_sharpness(run) < 0.9]
    sizes, values = [size(run, axis) for run in kept], [number(run) for run in kept]
    if len(set(sizes)) < LEAST or np.isnan(values).any():
        return float("nan")
    return 0.0 if len(set(values)) == 1 else float(spearmanr(sizes, values).statistic)


def entry_order(mine: list[xr.Dataset], others: list[xr.Dataset], axis: str) -> float:
    """ρ between size and the step at which λ1 enters; negative: the larger, the earlier."""
    return order(mine, axis, entry_or_never)


def rate_order(mine: list[xr.Dataset], others: list[xr.Dataset], axis: str) -> float:
    """ρ between size and the mean rate of sharpening; negative: the larger, the slower."""
    return order(mine, axis, mean_rate)


def steepness_order(mine: list[xr.Dataset], others: list[xr.Dataset], axis: str) -> float:
    """ρ between size and the steepest sharpening; negative: the larger, the more gradual."""
    return order(mine, axis, steepest_rate)


def stay_order(mine: list[xr.Dataset], others: list[xr.Dataset], axis: str) -> float:
    """ρ between size and the steps spent at the edge; negative: the larger, the shorter."""
    return order(mine, axis, steps_at_edge)


def _apart(mine: list[xr.Dataset], number: Callable[[xr.Dataset], float]) -> float:
    wide = [run for run in mine if size(run, "depth") == Experiment.depth]
    deep = [run for run in mine if size(run, "width") == Experiment.width]
    return abs(order(wide, "width", number) - order(deep, "depth", number))


def entry_orders_apart(mine: list[xr.Dataset], others: list[xr.Dataset]) -> float:
    """|ρ(width, entry), at depth 1, - ρ(depth, entry), at width 128|: 0 for the same order, 2 for opposite ones."""
    return _apart(mine, entry_or_never)


def stay_orders_apart(mine: list[xr.Dataset], others: list[xr.Dataset]) -> float:
    """The same of the steps spent at the edge."""
    return _apart(mine, steps_at_edge)


GROUPED = {
    f.__name__: f for f in (entry_order, rate_order, steepness_order, stay_order, entry_orders_apart, stay_orders_apart)
}
