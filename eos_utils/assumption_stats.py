r"""How far SG's Assumptions 3.1 to 3.7 hold along recorded runs, beside :mod:`anomalies` and :mod:`residual_stats`.

**Gradient flow** (3.3). Beside a run of gradient descent stands one from the same initialisation with a step size that
is smaller by a whole factor k: its step kt is at the time of step t. No residual is kept whole, so that the distance of
the two D is known from below only: by the difference of their norms, of :math:`Y^\top D/\|Y\|`, and of
:math:`D^\top v_1`, the sign of v₁ being that with :math:`Y^\top v_1 \ge 0`.

After a return to phase I there is no such run. There the flow is that of the assumption, :math:`\dot D = -M(t)D` with
the M of the run. With fixed eigenvectors the difference of gradient descent from it has along v₁ the component

.. math:: \delta(t+1) = e^{-\eta\Lambda}\delta(t) + (1 - \eta\Lambda - e^{-\eta\Lambda})\,D^\top v_1(t),

which begins at 0 with the phase. The mismatch :math:`1 - x - e^{-x}` is -1.1 at the edge, x = 2, and -0.4 at x = 1,
below which all other eigenvalues are said to be.

**Directions** (3.5). The angle by which v₁ turns over a phase is at most the sum of those of its steps, and at least
the difference of the angles to v₁(0) at two steps of it; the latter are known at every spectrum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils.phases import II, III, Array, I, Labels, Segment, first_crossing, labels_of, losses, segments
from eos_utils.residual_stats import _c, upper_bound

if TYPE_CHECKING:
    import xarray as xr

NAN = float("nan")
OF_FLOW = ("loss", "sharpness", "residual")


# ---- 3.2 and 3.4 ---------------------------------------------------------------------------------


def norm_error(run: xr.Dataset) -> float:
    """Error of (3) for ‖A‖², summed over all steps, over the sum of the changes of ‖A‖², both as absolute values."""
    changes = np.abs(np.diff(run["norm_A2"].values))
    return float((run["A_error"].values[1:] * changes).sum() / changes.sum())


def level_bound(run: xr.Dataset, linear: float = 1.0, other: float = 1.0) -> float:
    """The largest ηΛ along the run, over ``linear`` or, for another activation, ``other``; 0 for a run that diverges.

    Assumption 3.4 speaks of runs that do not diverge.
    """
    if run.attrs.get("status") == "diverged":
        return 0.0
    activation = json.loads(run.attrs["experiment"]).get("activation")
    return upper_bound(run) / (linear if activation == "linear" else other)


# ---- 3.3, gradient flow --------------------------------------------------------------------------


def pair_up(descent: xr.Dataset, flow: xr.Dataset, **rules: Any) -> tuple[Labels, Labels]:
    """Steps of the two runs at equal times, up to the first crossing of 2/η by gradient descent, (T,) each.

    Empty without a crossing, or if the flow ends before. Raises ``ValueError`` if one step size is not a multiple of
    the other.
    """
    ratio = float(descent["eta"].values[0] / flow["eta"].values[0])
    if abs(ratio - round(ratio)) > 1e-6 * ratio or ratio < 1.5:
        raise ValueError(f"the step sizes have the ratio {ratio:g}: not a whole number, at least 2")
    at = first_crossing(descent, **rules)
    if at is None or at * round(ratio) >= flow.sizes["observed"]:
        return np.array([], dtype=np.int64), np.array([], dtype=np.int64)
    steps = np.arange(at + 1, dtype=np.int64)
    return steps, steps * round(ratio)


def known_of_residual(run: xr.Dataset) -> Array:
    """What is known of D in a basis that two runs share: ‖D‖, YᵀD/‖Y‖ and Dᵀv₁ with Yᵀv₁ ≥ 0, (T, 3)."""
    d2, along = run["norm_D2"].values, run["Dv"].values * np.where(run["Yv"].values < 0, -1, 1)
    n = float(np.median(d2 / losses(run)))
    return np.column_stack([np.sqrt(d2), (run["DF"].values - d2) / np.sqrt(n), along])


def gaps(descent: xr.Dataset, flow: xr.Dataset, of: str, **rules: Any) -> Array:
    """Relative differences at equal times of the loss, the sharpness, or D (from below), up to the crossing, (T,)."""
    if of not in OF_FLOW:
        raise ValueError(f"of={of!r} is unknown; choose one of {', '.join(OF_FLOW)}")
    here, there = pair_up(descent, flow, **rules)
    if of == "residual":
        a, b = known_of_residual(descent)[here], known_of_residual(flow)[there]
        return np.asarray(np.abs(a - b).max(axis=1) / b[:, 0]) if len(here) else np.array([])
    x, y = (losses(r) if of == "loss" else r["sharpness"].values for r in (descent, flow))
    return np.asarray(np.abs(x[here] - y[there]) / np.abs(y[there]))


def flow_gap(
    mine: Sequence[xr.Dataset], others: Sequence[xr.Dataset], of: str = "loss", quantile: float = 0.95, **rules: Any
) -> float:
    """Relative difference of gradient descent from gradient flow at equal times up to the first crossing; a quantile.

    Of a seed's runs, each followed by its flow; the largest over these pairs. nan if a flow ends before the crossing.
    """
    found = [gaps(a, b, of, **rules)[1:] for a, b in zip(mine[::2], mine[1::2], strict=True)]
    return max(float(np.quantile(g, quantile)) for g in found) if all(len(g) for g in found) else NAN


def departures(run: xr.Dataset, begin: int, end: int) -> Array:
    """|δ|/‖D‖ of the steps from ``begin`` on, where it is 0."""
    x = run["eta"].sel(step=run["observed"]).values * run["sharpness"].values
    along, size, delta = run["Dv"].values, np.sqrt(run["norm_D2"].values), [0.0]
    for t in range(begin, end - 1):
        delta.append(float(np.exp(-x[t]) * delta[-1] + (1 - x[t] - np.exp(-x[t])) * along[t]))
    return np.abs(np.array(delta)) / size[begin:end]


def return_departure(run: xr.Dataset, quantile: float = 0.95, least: int = 5, **rules: Any) -> float:
    """Distance of D from the flow dD/dt = -M(t)D along v₁, relative to ‖D‖, in later returns to phase I; a quantile.

    The flow starts with the phase. Over all steps of the returns with ``least`` steps or more, the first left out.
    """
    at = first_crossing(run, **rules)
    if at is None:
        return NAN
    found = [x for x in segments(labels_of(run, **rules)) if x.label == I and x.begin > at and x.end - x.begin >= least]
    values = [departures(run, x.begin, x.end)[1:] for x in found]
    return float(np.quantile(np.concatenate(values), quantile)) if values else NAN


# ---- 3.5, directions -----------------------------------------------------------------------------


def turned(run: xr.Dataset, number: int = 0, **rules: Any) -> float:
    """1 - |⟨v_i(0), v_i(t)⟩| at the last spectrum before the first crossing: by how much v_i turns in phase I.

    ``number``: which i of those that are recorded, 0 for the largest of all. nan without a crossing.
    """
    at = first_crossing(run, **rules)
    if at is None:
        return NAN
    kept = run["kept"].values[int((run["spectral"].values < at).sum()) - 1]
    chosen = kept if number == 0 else kept[run["kept_eig"].values == number]
    return float((1 - chosen).max()) if len(chosen) else NAN


def not_slow(run: xr.Dataset, weighted: bool = False) -> float:
    """Share of the eigenvectors, over all recorded spectra, for which Assumption 3.5 (ii) fails, with signs Dᵀv_i ≥ 0.

    ``weighted``: by their part of ‖D‖².
    """
    return float(1 - run["aligned_energy" if weighted else "aligned_share"].values.mean())


def phase_angles(run: xr.Dataset, segment: Segment) -> tuple[float, float]:
    """The least and the largest angle between v₁ at the first and at the last step of a stretch that are possible.

    The least: between some two steps of it.
    """
    turns = np.clip(run["turn"].values[segment.begin + 1 : segment.end], -1, 1)
    most = float(np.arccos(turns).sum())
    spectra = run["spectral"].values
    inside = (spectra >= segment.begin) & (spectra < segment.end)
    angles = np.arccos(np.clip(run["kept"].values[inside, 0], 0, 1))
    return (float(np.ptp(angles)) if len(angles) else 0.0), most


def phases_turned(run: xr.Dataset, limit: float = 0.1, **rules: Any) -> float:
    """Share of the phases II and III over which v₁ turns by more than 1 - ⟨v₁, v₁'⟩ = ``limit``, of those decided.

    Not decided: it may and need not be. nan with fewer than half decided, or without such phases of two steps or more.
    """
    found = [s for s in segments(labels_of(run, **rules)) if s.label in (II, III) and s.end - s.begin > 1 and s.begin]
    bounds = [phase_angles(run, s) for s in found]
    edge = float(np.arccos(1 - limit))
    turned, still = sum(low > edge for low, _ in bounds), sum(high <= edge for _, high in bounds)
    return turned / (turned + still) if bounds and turned + still >= len(bounds) / 2 else NAN


# ---- 3.6 -----------------------------------------------------------------------------------------


def missed_at_start(run: xr.Dataset, **rules: Any) -> float:
    """Share of the phases II at whose first step c of Assumption 3.6 is not above 1; ε₂ is that of the phase."""
    found = [float(c[0]) <= 1 for c, _ in _c(run, **rules)]
    return float(np.mean(found)) if found else NAN


STATISTICS: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (norm_error, level_bound, return_departure, turned, not_slow, phases_turned, missed_at_start)
}
GROUPED: dict[str, Callable[..., float]] = {"flow_gap": flow_gap}
