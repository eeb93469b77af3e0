r"""SG's Figure 3: the two largest eigenvalues of M and that of M_A, and the residual beside v1, of one recorded run.

With :math:`R = (I - v_1v_1^\top)D`, :math:`\|D\|^2 = \|R\|^2 + (D^\top v_1)^2`, and equation (4) is

.. math:: D^\top F = \underbrace{D^\top v_1\,(D^\top v_1 + Y^\top v_1)}_{\text{first term}} + R^\top(R + Y) .

R′ begins at R and follows :math:`R'(t+1) = (I - \eta M(t)(I - v_1v_1^\top))R'(t)` with the M and v1 of the trajectory.
Statistics that speak of phases take the parameters of :class:`eos_utils.phases.Labeller` too. What is "steady" is
measured by the sum of all rises of a series, :math:`\sum_t\max(x_{t+1}-x_t, 0)`: 0 where it only falls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils.phases import II, IV, NAMES, Array, first_crossing, labels_of, losses, segments

if TYPE_CHECKING:
    import xarray as xr

NAN = float("nan")
SERIES = ("loss", "R", "Rp")


def _eta(run: xr.Dataset) -> Array:
    return np.asarray(run["eta"].sel(step=run["observed"]).values.astype(float))


def _series(run: xr.Dataset, series: str) -> Array:
    """The loss, ‖R‖²/n or ‖R′‖²/n."""
    if series not in SERIES:
        raise ValueError(f"series={series!r} is unknown; choose one of {', '.join(SERIES)}")
    loss = losses(run)
    return loss if series == "loss" else run[f"norm_{series}2"].values * loss / run["norm_D2"].values


# ---- Figure 3 (a) --------------------------------------------------------------------------------


def second_level(run: xr.Dataset, quantile: float = 1.0) -> float:
    """ηλ₂(M), its largest value along the run (or a quantile); 1 is 1/η."""
    return float(np.quantile(_eta(run) * run["second"].values, quantile))


def second_above(run: xr.Dataset) -> float:
    """Share of the steps at which λ₂(M) is at 1/η or above."""
    return float((_eta(run) * run["second"].values >= 1).mean())


def outlier_ratio(run: xr.Dataset, quantile: float = 0.5) -> float:
    """λ₁(M)/λ₂(M), its median along the run (or another quantile)."""
    return float(np.quantile(run["sharpness"].values / run["second"].values, quantile))


def output_share(run: xr.Dataset, quantile: float = 0.5) -> float:
    """λmax(M_A)/λmax(M), its median along the run (or another quantile; 1 for the largest value)."""
    return float(np.quantile(run["sharpness_A"].values / run["sharpness"].values, quantile))


def rest_share(run: xr.Dataset, quantile: float = 0.5) -> float:
    """1 - λmax(M_A)/λmax(M), a lower bound of the share of M_W in the sharpness; a quantile along the run."""
    return float(np.quantile(1 - run["sharpness_A"].values / run["sharpness"].values, quantile))


def upper_bound(run: xr.Dataset) -> float:
    """B_Λ of Assumption 3.4, the largest ηΛ along the run."""
    return float((_eta(run) * run["sharpness"].values).max())


# ---- Figure 3 (b) --------------------------------------------------------------------------------


def _rises(values: Array) -> float:
    return float(np.maximum(np.diff(values), 0).sum())


def sum_of_rises(run: xr.Dataset, series: str = "loss") -> float:
    """The sum of all rises of the loss, of ‖R‖²/n or of ‖R′‖²/n, relative to its value at the start."""
    values = _series(run, series)
    return _rises(values) / float(values[0])


def share_of_rises(run: xr.Dataset, series: str = "loss") -> float:
    """Share of the steps at which the loss, ‖R‖²/n or ‖R′‖²/n rises."""
    return float((np.diff(_series(run, series)) > 0).mean())


def rises_ratio(run: xr.Dataset, series: str = "R") -> float:
    """The sum of all rises of ‖R‖²/n (or ‖R′‖²/n) over the sum of all rises of the loss; nan if that never rises."""
    base = _rises(_series(run, "loss"))
    return _rises(_series(run, series)) / base if base > 0 else NAN


def rise_beside(run: xr.Dataset) -> float:
    """Of what the loss rises at the steps where it does, the share that is in ‖R‖²/n and not along v₁.

    The change of ‖R‖² over that of ‖D‖² there, negative where R falls meanwhile; nan if the loss never rises.
    """
    d, r = np.diff(run["norm_D2"].values), np.diff(run["norm_R2"].values)
    return float(r[d > 0].sum() / d[d > 0].sum()) if (d > 0).any() else NAN


def _apart(run: xr.Dataset) -> Array:
    return np.asarray(np.sqrt(run["apart2"].values / run["norm_R2"].values))


def apart_largest(run: xr.Dataset, quantile: float = 1.0) -> float:
    """‖R - R′‖/‖R‖, its largest value along the run (or a quantile)."""
    return float(np.quantile(_apart(run), quantile))


def apart_at(run: xr.Dataset, when: str = "end", **rules: Any) -> float:
    """‖R - R′‖/‖R‖ at the end of the run, or at the first 'crossing' of 2/η."""
    if when not in ("end", "crossing"):
        raise ValueError(f"when={when!r} is unknown; choose end or crossing")
    at = -1 if when == "end" else first_crossing(run, **rules)
    return NAN if at is None else float(_apart(run)[at])


def apart_from_start(run: xr.Dataset) -> float:
    """The largest ‖R - R′‖ along the run, over ‖R(0)‖."""
    return float(np.sqrt(run["apart2"].values.max() / run["norm_R2"].values[0]))


# ---- equation (4) --------------------------------------------------------------------------------


def first_term(run: xr.Dataset) -> Array:
    r"""Dᵀv₁(Dᵀv₁ + Yᵀv₁), (T,)."""
    return np.asarray(run["Dv"].values * (run["Dv"].values + run["Yv"].values))


def split_error(run: xr.Dataset) -> float:
    """The largest error of equation (4) along the run, relative to ‖D‖² + |RᵀY| + |DᵀF|."""
    df, second = run["DF"].values, run["RRY"].values
    size = run["norm_D2"].values + np.abs(second) + np.abs(df)
    return float((np.abs(df - first_term(run) - second) / size).max())


def first_term_factor(run: xr.Dataset, **rules: Any) -> float:
    """Factor a step by which the size of (4)'s first term changes over phase IV; median over its segments.

    From the last step before phase IV to its last step. nan without a phase IV.
    """
    term = np.abs(first_term(run))
    factors = [
        float((term[x.end - 1] / term[x.begin - 1]) ** (1 / (x.end - x.begin)))
        for x in segments(labels_of(run, **rules))
        if x.label == IV and x.begin > 0
    ]
    return float(np.median(factors)) if factors else NAN


def second_term_positive(run: xr.Dataset, series: str = "R", since: int = 1) -> float:
    """Share of the steps from ``since`` on at which (4)'s second term Rᵀ(R + Y), or R′ᵀ(R′ + Y), is not negative."""
    names = {"R": "RRY", "Rp": "RpRpY"}
    if series not in names:
        raise ValueError(f"series={series!r} is unknown; choose R or Rp")
    return float((run[names[series]].values[since:] >= 0).mean())


def fourth_ends_otherwise(run: xr.Dataset, small: float = 0.01, **rules: Any) -> float:
    """Share of the phases IV after which neither DᵀF is negative nor the loss below ``small``.

    DᵀF is averaged over the two steps after the phase, since it alternates with the sign of the component along v1. A
    phase IV that the run cuts off does not count; nan without another.
    """
    df, loss = run["DF"].values, losses(run)
    ends = [x.end for x in segments(labels_of(run, **rules)) if x.label == IV and x.end < len(loss)]
    return float(np.mean([df[t : t + 2].sum() >= 0 and loss[t] >= small for t in ends])) if ends else NAN


def positive_share(run: xr.Dataset, phase: str = "I", since: int = 1, **rules: Any) -> float:
    """Share of the steps of a phase, from step ``since`` on, at which DᵀF is not negative (Lemma 3.1: phase I)."""
    codes = {name: code for code, name in NAMES.items()}
    chosen = labels_of(run, **rules) == codes[phase]
    chosen[:since] = False
    return float((run["DF"].values[chosen] >= 0).mean()) if chosen.any() else NAN


# ---- the assumptions -----------------------------------------------------------------------------


def step_error(run: xr.Dataset, of: str = "D", quantile: float = 0.5, phase: str = "", **rules: Any) -> float:
    """Error of equation (3) for D, or for ‖A‖² (``of='A'``), relative to the step's own change; a quantile.

    ``phase``: only of steps that end in this phase.
    """
    if of not in ("D", "A"):
        raise ValueError(f"of={of!r} is unknown; choose D or A")
    values = run[f"{of}_error"].values
    chosen = np.isfinite(values)
    if phase:
        codes = {name: code for code, name in NAMES.items()}
        chosen = chosen & (labels_of(run, **rules) == codes[phase])
    return float(np.quantile(values[chosen], quantile)) if chosen.any() else NAN


def turn_of_v1(run: xr.Dataset, quantile: float = 1.0) -> float:
    """ε₂ of Assumption 3.5 (iii): the largest 1 - ⟨v₁(t), v₁(t+1)⟩ along the run, or a quantile."""
    turns = run["turn"].values
    return float(np.quantile(1 - turns[np.isfinite(turns)], quantile))


def _c(run: xr.Dataset, **rules: Any) -> list[tuple[Array, bool]]:
    r""":math:`c = |D^\top v_1|/(\epsilon_2\|D\|)` along every phase II, with its own ε₂, and whether it has ended."""
    found, last = [], run.sizes["observed"]
    ratio = np.abs(run["Dv"].values) / np.sqrt(run["norm_D2"].values)
    for x in segments(labels_of(run, **rules)):
        if x.label == II and x.begin > 0 and x.end - x.begin > 1:
            epsilon = float((1 - run["turn"].values[x.begin + 1 : x.end]).max())
            found.append((np.asarray(ratio[x.begin : x.end] / max(epsilon, 1e-16)), x.end < last))
    return found


def c_at_second(run: xr.Dataset, **rules: Any) -> float:
    """c of Assumption 3.6 at the first step of phase II, median over the phases II; the assumption asks for c > 1.

    ε₂ is that of the phase: the largest 1 - ⟨v₁(t), v₁(t+1)⟩ in it.
    """
    found = [float(c[0]) for c, _ in _c(run, **rules)]
    return float(np.median(found)) if found else NAN


def wait_for_c(run: xr.Dataset, least: float = 2.0, **rules: Any) -> float:
    """Share of phase II that passes until c of Assumption 3.6 is at least ``least``; median over the phases II.

    1 where c stays below. A phase that is cut off by the end of the run does not count.
    """
    shares = [
        float(np.argmax(c >= least) / len(c)) if c.max() >= least else 1.0 for c, ended in _c(run, **rules) if ended
    ]
    return float(np.median(shares)) if shares else NAN


STATISTICS: dict[str, Callable[..., float]] = {
    f.__name__: f
    for f in (
        second_level,
        second_above,
        outlier_ratio,
        output_share,
        rest_share,
        upper_bound,
        sum_of_rises,
        share_of_rises,
        rises_ratio,
        rise_beside,
        apart_largest,
        apart_at,
        apart_from_start,
        split_error,
        first_term_factor,
        second_term_positive,
        fourth_ends_otherwise,
        positive_share,
        step_error,
        turn_of_v1,
        c_at_second,
        wait_for_c,
    )
}
