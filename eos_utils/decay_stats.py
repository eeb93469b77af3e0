r"""Statistics of a run whose step size was divided, and of shapes of trajectories; conventions of ``eos_stats``.

Eigenvalues are scaled by the step size *before* the decay: the old edge is at 1, the new one at 4.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from eos_utils.eos_stats import HALF, entry_step, scaled
from eos_utils.experiment import rational
from eos_utils.observers import ENTRY_WINDOW, entry_index

if TYPE_CHECKING:
    import xarray as xr

SETTLE = 3  # measurements after a decay in which what oscillated dies away


def after_decay(run: xr.Dataset, eig: int = 1) -> tuple[np.ndarray, np.ndarray]:
    r"""Steps since the decay, and :math:`\lambda_i\eta/2` with the η before it, at the measurements from then on."""
    at = int(run.attrs["decayed_at"])
    if at < 0:
        return np.empty(0), np.empty(0)
    fields = json.loads(run.attrs["experiment"])
    eta = float(rational(fields.get("eta", "2/30")))
    steps = run["measured"].values
    chosen = steps >= at
    return (steps[chosen] - at).astype(float), run["eigenvalue"].values[chosen, eig - 1].astype(float) * eta / 2


def _loss_after(run: xr.Dataset, settle: int) -> np.ndarray:
    at = int(run.attrs["decayed_at"])
    return run["loss"].values[run["step"].values >= at + settle] if at >= 0 else np.empty(0)


def reversals(values: np.ndarray, slack: float = 0.0) -> float:
    """Share of the inner points at which a series turns; differences of at most ``slack`` do not count as motion."""
    moves = np.sign(np.diff(values)) * (np.abs(np.diff(values)) > slack)
    return float((moves[1:] * moves[:-1] < 0).mean()) if len(moves) > 1 else float("nan")


def _oscillated(run: xr.Dataset) -> bool:
    """Whether the loss turned at a third of the last 100 steps before the decay; True where these are not in the run.

    What has not oscillated cannot stop to.
    """
    at, steps = int(run.attrs["decayed_at"]), run["step"].values
    before = run["loss"].values[(steps >= at - 100) & (steps < at)]
    return len(before) < 50 or reversals(before) >= 1 / 3


def _error(run: xr.Dataset) -> float:
    """Error of λ1·η/2 after the decay: the median distance of its bounds."""
    at, eta = int(run.attrs["decayed_at"]), float(rational(json.loads(run.attrs["experiment"]).get("eta", "2/30")))
    chosen = run["measured"].values >= at
    gap = run["upper"].values[chosen, 0].astype(float) - run["eigenvalue"].values[chosen, 0].astype(float)
    return float(np.median(gap[np.isfinite(gap)])) * eta / 2 if np.isfinite(gap).any() else float("nan")


def sharpness_reversals(run: xr.Dataset) -> float:
    """Share of the measurements after the decay at which λ1 turns; about two thirds where it moves at random.

    The first three measurements, in which the oscillation dies away, are left out, and differences below the error of
    an eigenvalue do not count as motion. nan where the loss did not oscillate before the decay.
    """
    values = after_decay(run)[1][SETTLE:]
    return reversals(values, _error(run)) if len(values) and _oscillated(run) else float("nan")


def loss_reversals(run: xr.Dataset, settle: int = 20) -> float:
    """Share of the steps after the decay at which the loss turns, the first ``settle`` steps left out.

    nan where the loss did not oscillate before the decay.
    """
    loss = _loss_after(run, settle)
    return reversals(loss) if len(loss) and _oscillated(run) else float("nan")


def loss_rises_decayed(run: xr.Dataset, settle: int = 20) -> float:
    """Share of the steps after the decay at which the loss rises, the first ``settle`` steps left out."""
    loss = _loss_after(run, settle)
    return float((np.diff(loss) > 0).mean()) if len(loss) > 1 else float("nan")


def undetermined_share(run: xr.Dataset, span: int = 5) -> float:
    """Share of the changes of λ1 over ``span`` measurements after the decay that are below three times its error."""
    values = after_decay(run)[1][SETTLE:]
    if len(values) <= span:
        return float("nan")
    return float((np.abs(values[span:] - values[:-span]) < 3 * _error(run)).mean())


def falls_after_decay(run: xr.Dataset, span: int = 5) -> float:
    """Share of the changes of λ1 over ``span`` measurements after the decay that are falls, the first three left out.

    Of those that are at least three times the error of an eigenvalue; nan where these are less than half.
    """
    values = after_decay(run)[1][SETTLE:]
    if len(values) <= span or not undetermined_share(run, span) <= 0.5:
        return float("nan")
    changes = values[span:] - values[:-span]
    return float((changes[np.abs(changes) >= 3 * _error(run)] < 0).mean())


def calm_before_decay(run: xr.Dataset) -> float:
    """Steps before the decay since the loss rose last; nan where it never did, or without a decay."""
    before = run["loss"].values[run["step"].values <= run.attrs["decayed_at"]]
    rises = np.flatnonzero(np.diff(before) > 0)
    return float(len(before) - 2 - rises[-1]) if len(rises) else float("nan")


def scaled_at_decay(run: xr.Dataset) -> float:
    """λ1·η/2 at the last measurement before the decay, nan without a decay; η is that before it."""
    before = run["measured"].values < run.attrs["decayed_at"]
    return float(run["eigenvalue"].values[before, 0][-1] * run["eta"].values[0] / 2) if before.any() else float("nan")


def growth_after_decay(run: xr.Dataset) -> float:
    """By how much λ1 grows from three measurements after the decay to the end, relative to its value there."""
    values = after_decay(run)[1][SETTLE:]
    return float(values[-1] / values[0] - 1) if len(values) > 1 else float("nan")


def growth_rate(run: xr.Dataset, part: tuple[float, float] = (0.0, 1.0)) -> float:
    """Least-squares slope of λ1·η/2 per step after the decay, over a ``part`` of that time; first three left out."""
    steps, values = (x[SETTLE:] for x in after_decay(run))
    chosen = slice(round(part[0] * len(steps)), round(part[1] * len(steps)))
    if len(steps[chosen]) < 5:
        return float("nan")
    return float(np.polyfit(steps[chosen], values[chosen], 1)[0])


def _ratio(a: float, b: float) -> float:
    """a / b, or 10 where one of them is no growth."""
    return float("nan") if np.isnan([a, b]).any() else a / b if a > 0 and b > 0 else 10.0


def rate_change(run: xr.Dataset) -> float:
    """The growth rate of λ1 over the second half of the time after the decay, over that of the first half.

    10 where λ1 does not grow in one of them.
    """
    return _ratio(growth_rate(run, (0.5, 1.0)), growth_rate(run, (0.0, 0.5)))


def rate_change_of_seed(mine: list[xr.Dataset], others: list[xr.Dataset]) -> float:
    """The rate of growth in the second half over that in the first; of a seed's runs, the one farthest from 1."""
    changes = [rate_change(run) for run in mine]
    return max(changes, key=lambda change: abs(np.log(change)))


def rate_ratio(mine: list[xr.Dataset], others: list[xr.Dataset]) -> float:
    """Largest over least growth rate of λ1 after the decay, among runs of one seed that decay at different times.

    10 where one of them does not grow.
    """
    rates = [growth_rate(run) for run in mine]
    return _ratio(max(rates), min(rates))


def _fitted(design: np.ndarray, values: np.ndarray) -> np.ndarray:
    return design @ np.linalg.lstsq(design, values, rcond=None)[0]


def model_fits(steps: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    r"""Least-squares fits of :math:`a + bt`, :math:`a + b\ln(1 + t/c)` and :math:`a - be^{-t/c}`, c from a grid."""
    one, grid = np.ones_like(steps), np.geomspace(steps[-1] / 200, steps[-1] * 20, 80)
    shapes = {
        "line": [steps],
        "logarithm": [np.log1p(steps / c) for c in grid],
        "approach": [np.exp(-steps / c) for c in grid],
    }
    fits = {name: [_fitted(np.column_stack([one, s]), values) for s in shape] for name, shape in shapes.items()}
    return {name: min(found, key=lambda fit: float(((fit - values) ** 2).sum())) for name, found in fits.items()}


def residuals(run: xr.Dataset) -> dict[str, float]:
    """Residual sums of squares of the three shapes on λ1·η/2 after the decay."""
    steps, values = (x[SETTLE:] for x in after_decay(run))
    return {name: float(((fit - values) ** 2).sum()) for name, fit in model_fits(steps, values).items()}


def logarithm_advantage(run: xr.Dataset) -> float:
    """How much better a logarithm of time fits λ1 after the decay than a line and an exponential approach do.

    The ratio of residual sums of squares, the better of theirs over the logarithm's; 1 is a tie. 0 where λ1 falls, or
    grows faster in the second half than in the first, which is no logarithm.
    """
    if len(after_decay(run)[0]) < SETTLE + 10:
        return float("nan")
    if growth_after_decay(run) <= 0 or rate_change(run) > 1:
        return 0.0
    rest = residuals(run)
    return min(rest["line"], rest["approach"]) / rest["logarithm"]


def shape_diversity(run: xr.Dataset, eig: int = 5, block: int = 6) -> float:
    """How far the trajectories of λ1 to λ_eig are from one shape at different scales, from half of the edge on.

    Increments of means over ``block`` measurements, taken from the odd and from the even ones apart: what the two do
    not share is no shape. The share of the covariance between them that its first eigenvector does not explain; 0 if
    all are multiples of one curve.
    """
    values = scaled(run)[:, :eig]
    values = values[int(np.argmax(values[:, 0] >= 0.5)) :]
    count = len(values) // block
    if count < 5:
        return float("nan")
    parts = values[: count * block].reshape(count, block, -1)
    odd, even = (np.diff(parts[:, offset::2].mean(axis=1), axis=0) for offset in (1, 0))
    shared = (odd * even).sum(axis=0)
    if (shared <= 0).any():
        return float("nan")
    covariance = odd.T @ even / np.sqrt(np.outer(shared, shared))
    found = np.clip(np.linalg.eigvalsh((covariance + covariance.T) / 2), 0, None)
    return float(1 - found.max() / found.sum())


def onsets(values: np.ndarray, quiet: int, factor: float) -> np.ndarray:
    """The measurement at which each series becomes ``factor`` times rougher than before ``quiet``; nan for never.

    Roughness is the running median over 21 of the absolute second difference, before: its median from the tenth on.
    """
    rough = np.abs(np.diff(values, n=2, axis=0))
    before = np.maximum(np.median(rough[10:quiet], axis=0), 1e-9)
    running = np.median(np.lib.stride_tricks.sliding_window_view(rough, ENTRY_WINDOW, axis=0), axis=-1)
    late = running[quiet - HALF :] >= factor * before
    return np.where(late.any(axis=0), late.argmax(axis=0) + quiet + 1, np.nan)


def apart_from_first(run: xr.Dataset, eig: int = 15, factor: float = 3.0, within: int = ENTRY_WINDOW) -> float:
    """Share of λ2 to λ_eig that do not begin to oscillate when λ1 does: not within 21 measurements of it.

    The onset is where the roughness exceeds ``factor`` times what it was before, the quiet time ending 21 measurements
    before λ1's entry. nan where λ1 has none.
    """
    enters = entry_step(run)
    quiet = -1 if np.isnan(enters) else int(np.searchsorted(run["measured"].values, enters)) - ENTRY_WINDOW
    if quiet < 20:
        return float("nan")
    found = onsets(scaled(run)[:, :eig], quiet, factor)
    if np.isnan(found[0]):
        return float("nan")
    return float(1 - (np.abs(found[1:] - found[0]) <= within).mean())


def not_entered_share(run: xr.Dataset, eig: int = 20) -> float:
    """Share of λ2 to λ_eig that have not entered by the end of a run to its stopping accuracy; nan for others."""
    if run.attrs["status"] != "accuracy" or run.sizes["eig"] < eig:
        return float("nan")
    return float(np.mean([entry_index(column) is None for column in scaled(run)[:, 1:eig].T]))


def before_first(run: xr.Dataset, eig: int = 20) -> float:
    """Share of λ2 to λ_eig that enter before λ1 does; 0 for sorted eigenvalues, by definition."""
    entries = [entry_index(column) for column in scaled(run)[:, :eig].T]
    if entries[0] is None:
        return float("nan")
    return float(np.mean([at is not None and at < entries[0] for at in entries[1:]]))


def distance_at_end(run: xr.Dataset, eig: int = 15) -> float:
    """Largest distance of λ1 to λ_eig from 2/η at the end, in units of it: medians over the last 21 measurements.

    For runs to their stopping accuracy; nan for others.
    """
    if run.attrs["status"] != "accuracy" or run.sizes["eig"] < eig:
        return float("nan")
    return float(np.abs(np.median(scaled(run)[-ENTRY_WINDOW:, :eig], axis=0) - 1).max())


STATISTICS = {
    f.__name__: f
    for f in (
        sharpness_reversals,
        loss_reversals,
        loss_rises_decayed,
        falls_after_decay,
        growth_after_decay,
        rate_change,
        logarithm_advantage,
        shape_diversity,
        apart_from_first,
        not_entered_share,
        before_first,
        distance_at_end,
    )
}
GROUPED = {f.__name__: f for f in (rate_ratio, rate_change_of_seed)}
