r"""What SG, section 3.1, says of the four phases, as numbers of one recorded run; the labels are those of ``phases``.

Every statistic takes the parameters of :class:`eos_utils.phases.Labeller` too. Steps: an increment belongs to the step
at which it ends, so that the first step of phase III is the first fall. ``scaled`` sharpness is :math:`\Lambda\eta/2`;
it is smoothed as for the labels, which takes period two out of it; the loss and :math:`|D^\top v_1|` are not. A run
that begins at 0.9 of 2/η or above has no progressive sharpening, and what happens before or after its first crossing
is not defined (nan). Labels are ±1, so that ‖D‖ > ‖Y‖ is a loss above 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils.phases import (
    CYCLE,
    HOVERING,
    II,
    III,
    IV,
    START,
    Array,
    I,
    Labeller,
    Mask,
    Segment,
    above,
    first_crossing,
    labels_of,
    losses,
    rising,
    scaled,
    segments,
    smooth,
    strict_cycles,
    upcrossings,
)

if TYPE_CHECKING:
    import xarray as xr

PHASES = {"I": I, "II": II, "III": III, "IV": IV, "hovering": HOVERING}
NAN = float("nan")


def _mean(values: list[float] | Array | Mask) -> float:
    return float(np.mean(values)) if len(values) else NAN


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else NAN


def _smoothed(run: xr.Dataset, **rules: Any) -> Array:
    return smooth(scaled(run), Labeller(**rules).smoothing)


def _series(run: xr.Dataset, name: str, **rules: Any) -> Array:
    """'sharpness' (smoothed), 'loss' or 'Dv', the size of D's component along v1."""
    if name == "sharpness":
        return _smoothed(run, **rules)
    if name == "loss":
        return losses(run)
    if name == "Dv":
        return np.abs(run["Dv"].values)
    raise ValueError(f"series={name!r} is unknown; choose one of sharpness, loss, Dv")


def _where(run: xr.Dataset, where: str, **rules: Any) -> list[Segment]:
    """The segments of a phase, or the one stretch 'before' or 'after' the first crossing, or 'all'."""
    total = run.sizes["observed"]
    if where == "all":
        return [Segment(0, total, 0)]
    if where in ("before", "after"):
        at = first_crossing(run, **rules)
        return [] if at is None else [Segment(0, at, 0) if where == "before" else Segment(at, total, 0)]
    if where not in PHASES:
        raise ValueError(f"where={where!r} is unknown; choose one of all, before, after, {', '.join(PHASES)}")
    return [x for x in segments(labels_of(run, **rules)) if x.label == PHASES[where]]


def _against(changes: Array, expected: str) -> Mask:
    if expected not in ("rises", "falls"):
        raise ValueError(f"expected={expected!r} is unknown; choose rises or falls")
    return np.asarray(changes <= 0 if expected == "rises" else changes >= 0)


# ---- anywhere ------------------------------------------------------------------------------------


def start_level(run: xr.Dataset) -> float:
    """The sharpness at the initialisation, in units of 2/η."""
    return float(scaled(run)[0])


def peak_level(run: xr.Dataset, **rules: Any) -> float:
    """The largest smoothed sharpness, in units of 2/η; nan for a run that begins at 0.9 or above."""
    return float(_smoothed(run, **rules).max()) if start_level(run) < START else NAN


def phase_share(run: xr.Dataset, where: str, **rules: Any) -> float:
    """Share of all steps that carry a label: I, II, III, IV or hovering."""
    return sum(x.end - x.begin for x in _where(run, where, **rules)) / run.sizes["observed"]


def share_against(run: xr.Dataset, where: str, series: str, expected: str, **rules: Any) -> float:
    """Share of the steps in a phase, or before the first crossing, at which a series does not do what is said of it.

    ``series``: the smoothed sharpness, the loss, or Dv for the size of D's component along v1; ``expected``: rises or
    falls.
    """
    values, hits = _series(run, series, **rules), []
    for begin, end, _ in _where(run, where, **rules):
        hits.extend(_against(np.diff(values[max(begin - 1, 0) : end]), expected).tolist())
    return _mean(hits)


def segments_against(run: xr.Dataset, where: str, series: str, expected: str, **rules: Any) -> float:
    """Share of the segments of a phase over which a series, from the step before it to its last, goes the other way."""
    values = _series(run, series, **rules)
    found = [x for x in _where(run, where, **rules) if x.begin > 0]
    return _mean([bool(_against(values[x.end - 1] - values[x.begin - 1], expected)) for x in found])


# ---- around 2/η ----------------------------------------------------------------------------------


def crossing_count(run: xr.Dataset, **rules: Any) -> float:
    """How often the smoothed sharpness crosses 2/η upwards; nan for a run that begins at 0.9 of it or above."""
    return float(len(upcrossings(scaled(run), Labeller(**rules)))) if start_level(run) < START else NAN


def edge_share(run: xr.Dataset, width: float = 0.2, **rules: Any) -> float:
    """Share of the steps after the first crossing at which the sharpness is within ``width`` of 2/η, relative to it."""
    at = first_crossing(run, **rules)
    return NAN if at is None else _mean(np.abs(scaled(run)[at:] - 1) <= width)


def rises_while_falling(run: xr.Dataset, span: int = 50, **rules: Any) -> float:
    """Share of the steps after the first crossing at which the loss rises; 0 unless it is lower at the end.

    At the end: its median over the last ``span`` steps, against that over the ``span`` steps before the crossing.
    0 also for a run that diverges; nan with fewer than twice ``span`` steps after the crossing.
    """
    at, loss = first_crossing(run, **rules), losses(run)
    if run.attrs.get("status") == "diverged":
        return 0.0
    if at is None or len(loss) - at < 2 * span:
        return NAN
    lower = np.median(loss[-span:]) < np.median(loss[max(at - span, 0) : at])
    return float((np.diff(loss[at:]) > 0).mean()) if lower else 0.0


def cycle_count(run: xr.Dataset, **rules: Any) -> float:
    """How often the phases II, III, IV, I follow one another with nothing between; the end may cut the last I short."""
    return float(len(strict_cycles(labels_of(run, **rules))))


def out_of_order(run: xr.Dataset, whole: int = 2, **rules: Any) -> float:
    """Share of the steps after the first crossing outside of stretches in the order II, III, IV, I.

    The last stretch may be cut off by the end of the run. 1 with fewer than ``whole`` whole cycles: "again and again".
    """
    at = first_crossing(run, **rules)
    if at is None:
        return NAN
    labels = labels_of(run, **rules)
    cycles = strict_cycles(labels)
    if len(cycles) < whole:
        return 1.0
    inside = np.zeros(len(labels), dtype=bool)
    for begin, end in cycles:
        inside[begin:end] = True
    tail = [x for x in segments(labels) if x.begin >= cycles[-1][1]]
    if tuple(x.label for x in tail) == CYCLE[: len(tail)]:
        inside[cycles[-1][1] :] = True
    return float(1 - inside[at:].mean())


def time_above(run: xr.Dataset, **rules: Any) -> float:
    """Share of the steps from the first to the last upward crossing of 2/η that are spent above it."""
    up = upcrossings(scaled(run), Labeller(**rules))
    over = above(_smoothed(run, **rules), Labeller(**rules).level)
    return float(over[up[0] : up[-1]].mean()) if len(up) > 1 else NAN


def drop_time(run: xr.Dataset, **rules: Any) -> float:
    """Median number of steps from the peak of the sharpness to below 2/η, over the phases III that end in IV."""
    found = segments(labels_of(run, **rules))
    return _median(
        [
            float(a.end - a.begin + 1)
            for a, b in zip(found[:-1], found[1:], strict=True)
            if (a.label, b.label) == (III, IV)
        ]
    )


# ---- of one phase --------------------------------------------------------------------------------


def above_in_phase_one(run: xr.Dataset, margin: float = 0.02, **rules: Any) -> float:
    """Share of the steps of phase I at which the sharpness itself, not smoothed, is above 2/η by ``margin``."""
    return _mean(scaled(run)[labels_of(run, **rules) == I] > 1 + margin)


def returns(run: xr.Dataset, **rules: Any) -> float:
    """How often phase I follows on phase IV."""
    labels = labels_of(run, **rules)
    return float(((labels[:-1] == IV) & (labels[1:] == I)).sum())


def growth_ratio(run: xr.Dataset, floor: float = 0.02, **rules: Any) -> float:
    r"""Growth of ln\|Dᵀv₁\| in phases II and III over the sum of ln(1 + τ), where Λ = (2 + τ)/η: 1 if exponential.

    Over the steps from Λ > 2/η on at which the component along v1 is at least ``floor`` of ‖D‖.
    """
    labels, dv = labels_of(run, **rules), np.abs(run["Dv"].values)
    tau = 2 * scaled(run) - 2
    here = np.isin(labels, (II, III)) & (tau > 0) & (dv >= floor * np.sqrt(run["norm_D2"].values))
    here[-1] = False
    at = np.flatnonzero(here)
    return float(np.log(dv[at + 1] / dv[at]).sum() / np.log1p(tau[at]).sum()) if len(at) else NAN


def _entries(run: xr.Dataset, **rules: Any) -> list[tuple[int, int]]:
    """Where phase II begins from below, and the end of that excursion."""
    labels = labels_of(run, **rules)
    over = above(_smoothed(run, **rules), Labeller(**rules).level)
    ends = {x.begin: x.end for x in segments(over.astype(np.int64)) if x.label}
    return [(t, end) for t, end in ends.items() if t > 0 and labels[t] == II and labels[t - 1] != HOVERING]


def steps_to_exceed(run: xr.Dataset, **rules: Any) -> float:
    """Median steps from the beginning of phase II until ‖D‖ exceeds ‖Y‖; infinite where it never does above 2/η."""
    loss, times = losses(run), []
    for begin, end in _entries(run, **rules):
        hits = np.flatnonzero(loss[begin:end] > 1)
        if len(hits) or end < len(loss):
            times.append(float(hits[0]) if len(hits) else np.inf)
    return _median(times)


def not_within(run: xr.Dataset, few: int = 20, **rules: Any) -> float:
    """Share of the beginnings of phase II after which ‖D‖ does not exceed ‖Y‖ within ``few`` steps."""
    loss = losses(run)
    entries = [begin for begin, _ in _entries(run, **rules) if begin + few < len(loss)]
    return _mean([bool((loss[begin : begin + few + 1] <= 1).all()) for begin in entries])


def _turns(run: xr.Dataset, **rules: Any) -> list[int]:
    """The last steps of phases II that III follows on: where the smoothed sharpness is at its peak."""
    labels = labels_of(run, **rules)
    return np.flatnonzero((labels[:-1] == II) & (labels[1:] == III)).tolist()


def not_exceeded_at_turn(run: xr.Dataset, slack: int = 1, **rules: Any) -> float:
    """Share of the changes from phase II to III at which ‖D‖ is not above ‖Y‖, within ``slack`` steps of the peak."""
    loss = losses(run)
    return _mean([bool((loss[max(t - slack, 0) : t + slack + 1] <= 1).all()) for t in _turns(run, **rules)])


def fallen_before(run: xr.Dataset, of: str = "norm", **rules: Any) -> float:
    """Share of the fall of the smoothed sharpness from its peak to 2/η that is over when ‖D‖ first exceeds ‖Y‖.

    Mean over the changes from phase II to III; 0 where ‖D‖ does so before the peak, 1 where it does not above 2/η.
    ``of='push'``: the same for DᵀF, as the mean of two steps since it alternates, being positive.
    """
    if of not in ("norm", "push"):
        raise ValueError(f"of={of!r} is unknown; choose norm or push")
    s, df = _smoothed(run, **rules), run["DF"].values
    exceeds = losses(run) > 1 if of == "norm" else df + np.append(df[1:], df[-1]) > 0
    found, shares = segments(above(s, Labeller(**rules).level).astype(np.int64)), []
    for t in _turns(run, **rules):
        begin, end = next((x.begin, x.end) for x in found if x.begin <= t < x.end)
        hits = begin + np.flatnonzero(exceeds[begin:end])
        share = (s[t] - s[hits[0]]) / (s[t] - 1) if len(hits) else 1.0
        shares.append(0.0 if len(hits) and hits[0] <= t else float(np.clip(share, 0, 1)))
    return _mean(shares)


def loss_at_turn(run: xr.Dataset, **rules: Any) -> float:
    """Median loss, that is ‖D‖²/‖Y‖², at the peak of the sharpness that ends phase II."""
    loss = losses(run)
    return _median([float(loss[t]) for t in _turns(run, **rules)])


def third_not_final(run: xr.Dataset, **rules: Any) -> float:
    """Share of the phases III after which the sharpness does not go below 2/η: II or hovering follows."""
    found = segments(labels_of(run, **rules))
    pairs = list(zip(found[:-1], found[1:], strict=True))
    return _mean([b.label != IV for a, b in pairs if a.label == III])


def fourth_factor(run: xr.Dataset, **rules: Any) -> float:
    """Factor a step of the loss or of |Dᵀv₁|, whichever falls more slowly, over phase IV; median over its segments."""
    both = [_series(run, name) for name in ("loss", "Dv")]
    factors = [
        max(float((x[s.end - 1] / x[s.begin - 1]) ** (1 / (s.end - s.begin))) for x in both)
        for s in _where(run, "IV", **rules)
        if s.begin > 0
    ]
    return _median(factors)


def _fourth_falls(run: xr.Dataset, **rules: Any) -> list[tuple[Segment, int]]:
    """Phases IV that follow on III, each with how many of its steps end a fall of the smoothed sharpness."""
    found = segments(labels_of(run, **rules))
    up = rising(_smoothed(run, **rules), Labeller(**rules).turn)
    pairs = zip(found[:-1], found[1:], strict=True)
    return [(b, int((~up[b.begin : b.end]).sum())) for a, b in pairs if (a.label, b.label) == (III, IV)]


def falls_on(run: xr.Dataset, **rules: Any) -> float:
    """Steps for which the smoothed sharpness goes on falling once it is below 2/η, median over phases IV."""
    return _median([float(max(falls - 1, 0)) for _, falls in _fourth_falls(run, **rules)])


def loss_at_fourth_end(run: xr.Dataset, **rules: Any) -> float:
    """Loss where the sharpness stops falling in phase IV, over the loss right before phase III; median.

    The labeller's own end of IV asks the loss, so it cannot tell. Both losses are smoothed.
    """
    ell, found = smooth(losses(run), Labeller(**rules).smoothing), segments(labels_of(run, **rules))
    thirds = {x.end: x.begin - 1 for x in found if x.label == III and x.begin > 0}
    ratios = [
        float(ell[s.begin + max(falls, 1) - 1] / ell[thirds[s.begin]])
        for s, falls in _fourth_falls(run, **rules)
        if s.begin in thirds
    ]
    return _median(ratios)


STATISTICS: dict[str, Callable[..., float]] = {
    f.__name__: f
    for f in (
        start_level,
        peak_level,
        phase_share,
        share_against,
        segments_against,
        crossing_count,
        edge_share,
        rises_while_falling,
        cycle_count,
        out_of_order,
        time_above,
        drop_time,
        above_in_phase_one,
        returns,
        growth_ratio,
        steps_to_exceed,
        not_within,
        not_exceeded_at_turn,
        fallen_before,
        loss_at_turn,
        third_not_final,
        fourth_factor,
        falls_on,
        loss_at_fourth_end,
    )
}
