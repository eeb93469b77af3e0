r"""Statistics of one trajectory, by which verdicts are decided. The unit of replication is the run.

All are functions of a recorded run (an ``xarray.Dataset`` of :mod:`eos_utils.run`) and return one number, nan where
they are not defined (an eigenvalue that never enters EoS). Scaled eigenvalues are :math:`\lambda_i\eta/2`, so that
the edge is 1. Entry is defined in :func:`eos_utils.observers.entry_index`: a running median over 21 measurements
reaches 0.98. "After entry" starts half a window later, where that window ends, and lasts ``horizon`` measurements,
so that runs of different lengths are compared over the same stretch; a fork from a snapshot at entry starts there.
Runs that begin at 0.9 of the edge or above have no progressive sharpening, and no statistic after entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from eos_utils.observers import ENTRY_LEVEL, ENTRY_WINDOW, entry_index

if TYPE_CHECKING:
    import xarray as xr

HALF = ENTRY_WINDOW // 2
HORIZON = 50  # measurements after entry, 750 steps at a stride of 15
Statistic = Callable[..., float]


def scaled(run: xr.Dataset) -> np.ndarray:
    r""":math:`\lambda_i \eta / 2` at the measured steps, (measurements, k) float64."""
    eta = run["eta"].sel(step=run["measured"]).values
    return run["eigenvalue"].values.astype(float) * eta[:, None] / 2


def _entry(run: xr.Dataset, eig: int = 1, level: float = ENTRY_LEVEL) -> int | None:
    return entry_index(scaled(run)[:, eig - 1], level)


def entry_step(run: xr.Dataset, eig: int = 1, level: float = ENTRY_LEVEL) -> float:
    """The step at which the ``eig``-th eigenvalue enters EoS; nan for never."""
    at = _entry(run, eig, level)
    return float("nan") if at is None else float(run["measured"].values[at])


def initial_sharpness(run: xr.Dataset) -> float:
    """λ₁η/2 at the first measurement; EoS claims need it below 0.9."""
    return float(scaled(run)[0, 0])


def rate_to_entry(run: xr.Dataset) -> float:
    """Mean growth of λ1·η/2 a step from the first measurement to its entry; nan for never."""
    at, steps, values = _entry(run), run["measured"].values, scaled(run)[:, 0]
    return float("nan") if not at else float((values[at] - values[0]) / (steps[at] - steps[0]))


def sharpening_ratio(run: xr.Dataset) -> float:
    """Largest running median of λ1 up to its entry (or the end), over its first value."""
    at = _entry(run)
    values = scaled(run)[: None if at is None else at + HALF + 1, 0]
    if len(values) < ENTRY_WINDOW:
        return float("nan")
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, ENTRY_WINDOW), axis=1)
    return float(medians.max() / values[0])


def sharpening_steadiness(run: xr.Dataset) -> float:
    """Share of consecutive measurements before entry between which λ1 rises."""
    at = _entry(run)
    values = scaled(run)[:at, 0]
    return float((np.diff(values) > 0).mean()) if len(values) > 1 else float("nan")


def begins_at_entry(run: xr.Dataset) -> bool:
    """Whether the run is a fork from the snapshot that was taken when its base's entry was established."""
    return (json.loads(run.attrs["experiment"]).get("fork") or {}).get("at") == "entry"


def _begin(run: xr.Dataset) -> int | None:
    """The measurement at which "after entry" begins; None if that is nowhere."""
    if begins_at_entry(run):
        return 0
    at = _entry(run)
    return None if at is None or initial_sharpness(run) >= 0.9 else at + HALF


def _after_entry(run: xr.Dataset, horizon: int) -> np.ndarray | None:
    """Scaled eigenvalues after λ1's entry; None without 21 measurements there."""
    begin = _begin(run)
    if begin is None or len(run["measured"]) - begin < ENTRY_WINDOW:
        return None
    return scaled(run)[begin : begin + horizon]


def hover_level(run: xr.Dataset, horizon: int = HORIZON) -> float:
    """Median of λ1·η/2 after entry, minus 1: how far above the edge the sharpness hovers."""
    after = _after_entry(run, horizon)
    return float("nan") if after is None else float(np.median(after[:, 0]) - 1)


def hover_share(run: xr.Dataset, width: float = 0.1, horizon: int = HORIZON) -> float:
    """Share of the measurements after entry at which λ1·η/2 is within ``width`` of 1."""
    after = _after_entry(run, horizon)
    return float("nan") if after is None else float((np.abs(after[:, 0] - 1) <= width).mean())


def in_eos(run: xr.Dataset, horizon: int = HORIZON) -> float:
    """How many of the measured eigenvalues have entered EoS by the end of the horizon."""
    begin = _begin(run)
    if begin is None:
        return 0.0
    values = scaled(run)[: begin + horizon]
    return float(sum(entry_index(column) is not None for column in values.T))


def gap_closed(run: xr.Dataset, eig: int = 5, horizon: int = HORIZON) -> float:
    """What part of the gap 1 - λ_i·η/2 that eigenvalues 2 to ``eig`` had at λ1's entry is closed at the horizon.

    The smallest over those eigenvalues that had a gap, each end being a median over 21 measurements; 1 is all of it.
    """
    at, values, after = _entry(run), scaled(run), _after_entry(run, horizon)
    if after is None or at is None:
        return float("nan")
    begin = 1 - np.median(values[at - HALF : at + HALF + 1, 1:eig], axis=0)
    end = 1 - np.median(after[-ENTRY_WINDOW:, 1:eig], axis=0)
    open_ = begin > 0
    return float(((begin - end)[open_] / begin[open_]).min()) if open_.any() else float("nan")


def roughness(values: np.ndarray) -> np.ndarray:
    """Median size of the second differences: blind to a smooth trend, sensitive to oscillation of any short period."""
    return np.median(np.abs(np.diff(values, n=2, axis=0)), axis=0)


def roughness_ratio(run: xr.Dataset, eig: int = 5, before: int = 60, horizon: int = HORIZON) -> float:
    """How much rougher eigenvalues 2 to ``eig`` move after λ1's entry than in the ``before`` measurements before it.

    Those before end half a window ahead of entry. The smallest ratio over these eigenvalues.
    """
    at, values = _entry(run), scaled(run)
    after = _after_entry(run, horizon)
    if at is None or after is None or at - HALF < 3:
        return float("nan")
    early = values[max(0, at - HALF - before) : at - HALF, 1:eig]
    return float((roughness(after[:, 1:eig]) / np.maximum(roughness(early), 1e-9)).min())


def _losses_around_entry(run: xr.Dataset, horizon: int) -> tuple[np.ndarray, np.ndarray] | None:
    at = _begin(run)
    if at is None:
        return None
    measured, loss, steps = run["measured"].values, run["loss"].values, run["step"].values
    begin, end = measured[at], measured[min(at + horizon, len(measured) - 1)]
    return loss[steps < measured[max(0, at - 2 * HALF)]], loss[(steps >= begin) & (steps <= end)]


def level_at(run: xr.Dataset, step: float, eig: int = 1) -> float:
    """λ_i·η/2 at the last measurement not after ``step``; nan if that is undefined."""
    before = np.flatnonzero(run["measured"].values <= step)
    return float(scaled(run)[before[-1], eig - 1]) if len(before) else float("nan")


def first_rise(run: xr.Dataset, since: int = 100) -> float:
    """The first step after ``since`` (past the initial transient) at which the loss is higher than the step before."""
    loss, steps = run["loss"].values, run["step"].values
    rises = np.flatnonzero((np.diff(loss) > 0) & (steps[1:] > since))
    return float(steps[1:][rises[0]]) if len(rises) else float("nan")


def loss_rises_before(run: xr.Dataset) -> float:
    """Share of the steps before λ1's entry at which the loss rises."""
    parts = _losses_around_entry(run, HORIZON)
    return float("nan") if parts is None or len(parts[0]) < 2 else float((np.diff(parts[0]) > 0).mean())


def loss_rises_after(run: xr.Dataset, horizon: int = HORIZON) -> float:
    """Share of the steps after λ1's entry at which the loss rises."""
    parts = _losses_around_entry(run, horizon)
    return float("nan") if parts is None or len(parts[1]) < 2 else float((np.diff(parts[1]) > 0).mean())


def loss_falls_long(run: xr.Dataset, block: int = 100, horizon: int = HORIZON) -> float:
    """Share of consecutive blocks of ``block`` steps after entry between which the mean loss falls."""
    parts = _losses_around_entry(run, horizon)
    if parts is None or len(parts[1]) < 3 * block:
        return float("nan")
    count = len(parts[1]) // block
    means = parts[1][: count * block].reshape(count, block).mean(axis=1)
    return float((np.diff(means) < 0).mean())


def start_fact(run: xr.Dataset, name: str) -> float:
    """A fact of the data or the initialisation, from :func:`eos_utils.observers.start_facts`."""
    facts = json.loads(run.attrs.get("start", "{}"))
    return float(facts.get(name, float("nan")))


STATISTICS: dict[str, Statistic] = {
    f.__name__: f
    for f in (
        entry_step,
        initial_sharpness,
        sharpening_ratio,
        sharpening_steadiness,
        hover_level,
        hover_share,
        in_eos,
        gap_closed,
        roughness_ratio,
        first_rise,
        loss_rises_before,
        loss_rises_after,
        loss_falls_long,
        start_fact,
    )
}


def bootstrap(values: np.ndarray, resamples: int = 10_000, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean over runs, from a fixed seed.

    >>> bootstrap(np.array([1.0, 1.0, 1.0]))
    (1.0, 1.0)
    """
    draws = np.random.default_rng(0).choice(values, size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws.mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
