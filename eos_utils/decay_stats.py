r"""Statistics of a run whose step size was divided, and of shapes of trajectories; conventions of ``eos_stats``.

Eigenvalues are scaled by the step size *before* the decay: the old edge is at 1, the new one at 4.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from eos_utils.eos_stats import HALF, entry_step, roughness, scaled
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


def sharpness_reversals(run: xr.Dataset) -> float:
    """Share of the measurements after the decay at which λ1 turns; about two thirds where it moves at random.

    The first three measurements, in which the oscillation dies away, are left out.
    """
    return reversals(after_decay(run)[1][SETTLE:])


def loss_reversals(run: xr.Dataset, settle: int = 20) -> float:
    """Share of the steps after the decay at which the loss turns, the first ``settle`` steps left out."""
    return reversals(_loss_after(run, settle))


def loss_rises_decayed(run: xr.Dataset, settle: int = 20) -> float:
    """Share of the steps after the decay at which the loss rises, the first ``settle`` steps left out."""
    loss = _loss_after(run, settle)
    return float((np.diff(loss) > 0).mean()) if len(loss) > 1 else float("nan")


def rises_after_decay(run: xr.Dataset) -> float:
    """Share of consecutive measurements after the decay between which λ1 rises, the first three left out."""
    values = after_decay(run)[1][SETTLE:]
    return float((np.diff(values) > 0).mean()) if len(values) > 1 else float("nan")


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


def rate_change(run: xr.Dataset) -> float:
    """The growth rate of λ1 over the second half of the time after the decay, over that of the first half."""
    return growth_rate(run, (0.5, 1.0)) / growth_rate(run, (0.0, 0.5))


def rate_ratio(mine: list[xr.Dataset], others: list[xr.Dataset]) -> float:
    """Largest over least growth rate of λ1 after the decay, among runs of one seed that decay at different times."""
    rates = [growth_rate(run) for run in mine]
    return float(max(rates) / min(rates)) if min(rates) > 0 else float("nan")


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


def logarithm_advantage(run: xr.Dataset) -> float:
    """How much better a logarithm of time fits λ1 after the decay than a line and an exponential approach do.

    The ratio of residual sums of squares, the better of theirs over the logarithm's; 1 is a tie.
    """
    steps, values = (x[SETTLE:] for x in after_decay(run))
    if len(steps) < 10:
        return float("nan")
    rest = {name: float(((fit - values) ** 2).sum()) for name, fit in model_fits(steps, values).items()}
    return min(rest["line"], rest["approach"]) / rest["logarithm"]


def shape_diversity(run: xr.Dataset, eig: int = 5, block: int = 5) -> float:
    """How far the trajectories of λ1 to λ_eig are from one shape at different scales, from half of the edge on.

    Increments of means over ``block`` measurements, standardised: the share of their variance that the first singular
    vector does not explain. 0 if all are multiples of one curve.
    """
    values = scaled(run)[:, :eig]
    begin = int(np.argmax(values[:, 0] >= 0.5))
    values = values[begin:]
    count = len(values) // block
    if count < 5:
        return float("nan")
    steps = np.diff(values[: count * block].reshape(count, block, -1).mean(axis=1), axis=0)
    s = np.linalg.svd(steps / np.sqrt((steps**2).sum(axis=0)), compute_uv=False)
    return float(1 - s[0] ** 2 / (s**2).sum())


def destabilised_share(run: xr.Dataset, eig: int = 15, factor: float = 3.0) -> float:
    """Share of λ2 to λ_eig that become rougher by ``factor`` within the window of 21 measurements around λ1's entry.

    Against the 21 measurements that end 21 before it.
    """
    enters = entry_step(run)
    if np.isnan(enters):
        return float("nan")
    at, values = int(np.searchsorted(run["measured"].values, enters)), scaled(run)[:, 1:eig]
    begin = max(0, at - HALF - 2 * ENTRY_WINDOW)
    early, late = values[begin : begin + ENTRY_WINDOW], values[at - HALF : at + HALF + 1]
    if at - HALF - begin < ENTRY_WINDOW or len(late) < ENTRY_WINDOW:
        return float("nan")
    return float((roughness(late) >= factor * np.maximum(roughness(early), 1e-9)).mean())


def entered_share(run: xr.Dataset, eig: int = 20) -> float:
    """Share of λ2 to λ_eig that enter after λ1 and before the end of a run to its stopping accuracy; nan for others."""
    first = entry_step(run)
    if run.attrs["status"] != "accuracy" or np.isnan(first) or run.sizes["eig"] < eig:
        return float("nan")
    later = [entry_index(column) for column in scaled(run)[:, 1:eig].T]
    return float(np.mean([at is not None and run["measured"].values[at] >= first for at in later]))


def first_is_first(run: xr.Dataset, eig: int = 20) -> float:
    """Share of λ2 to λ_eig that do not enter before λ1 does; 1 for sorted eigenvalues, by definition."""
    entries = [entry_index(column) for column in scaled(run)[:, :eig].T]
    if entries[0] is None:
        return float("nan")
    return float(np.mean([at is None or at >= entries[0] for at in entries[1:]]))


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
        rises_after_decay,
        growth_after_decay,
        rate_change,
        logarithm_advantage,
        shape_diversity,
        destabilised_share,
        entered_share,
        first_is_first,
        distance_at_end,
    )
}
GROUPED = {f.__name__: f for f in (rate_ratio,)}
