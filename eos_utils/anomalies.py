r"""Anomaly points (SG, Figure 2): steps at which the sharpness and the output layer's norm move in opposite directions.

.. math:: a_t = \mathbb 1\bigl[\operatorname{sign}(\Lambda_{t+1}-\Lambda_t)
   \ne \operatorname{sign}(\|A_{t+1}\|-\|A_t\|)\bigr]

A step is *undetermined* where :math:`|\Delta\Lambda|` is below three times the error of an eigenvalue (its residual, an
upper bound); such steps are left out. What a share of anomalies means depends on how it would be without any relation:

- signs that are independent, with the frequencies of rises seen, give the share :math:`p(1-q)+q(1-p)`; Cohen's κ is
  1 - observed/expected, 1 for full agreement and -1 for two series of as many rises as falls in antiphase;
- the circular shifts of one series against the other keep the correlation in time of each. Motion of period two makes
  even and odd shifts differ, so they are counted apart; where more than half of the steps hover with period two, a
  shifted series is no less in phase or in antiphase than the original, and this null is not used (nan).

Parts of a run: 'all'; 'before' and 'after' the first crossing of 2/η; 'late', the second half of 'after'. An increment
has the label of the step at which it ends. Statistics take the parameters of :class:`eos_utils.phases.Labeller` too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eos_utils.phases import HOVERING, NAMES, Array, Mask, first_crossing, labels_of, smooth

if TYPE_CHECKING:
    import xarray as xr

NAN = float("nan")
ERRORS = 3.0
LEAST = 20  # increments below which a share is not taken
PARTS = ("all", "before", "after", "late")


class Signs(NamedTuple):
    """Increments, (T - 1,): whether each rises, and whether that is determined."""

    sharpness: Mask
    norm: Mask
    determined: Mask


def signs(sharpness: Array, norm: Array, error: Array | float = 0.0, factor: float = ERRORS) -> Signs:
    """The signs of the increments of two series; ``error``: of the first, by step.

    An increment of exactly zero has no sign, and is undetermined. Raises ``ValueError`` for different lengths.
    """
    sharpness, norm = np.asarray(sharpness, dtype=float), np.asarray(norm, dtype=float)
    if sharpness.shape != norm.shape or sharpness.ndim != 1 or len(norm) < 2:
        raise ValueError(
            f"sharpness has shape {sharpness.shape} and norm {norm.shape}: two series of one length needed"
        )
    error = np.broadcast_to(np.asarray(error, dtype=float), sharpness.shape)
    ds, da = np.diff(sharpness), np.diff(norm)
    limit = factor * np.maximum(error[:-1], error[1:])
    return Signs(ds > 0, da > 0, (np.abs(ds) >= limit) & (ds != 0) & (da != 0))


def share(found: Signs) -> float:
    """Share of anomalies among the determined increments; nan where fewer than half of them are determined."""
    if not len(found.norm) or found.determined.mean() < 0.5:
        return NAN
    return float((found.sharpness != found.norm)[found.determined].mean())


def expected(found: Signs) -> float:
    """The share that independent signs with the same frequencies of rises would give."""
    if not found.determined.any():
        return NAN
    p, q = (x[found.determined].mean() for x in (found.sharpness, found.norm))
    return float(p * (1 - q) + q * (1 - p))


def kappa(found: Signs) -> float:
    """Cohen's κ, 1 - observed/expected; nan where independent signs would give no anomalies either.

    >>> import numpy as np
    >>> wave = (-1.0) ** np.arange(101)
    >>> [kappa(signs(wave, norm)) for norm in (wave, -wave)]    # in phase, in antiphase
    [1.0, -1.0]
    """
    base = expected(found)
    return 1 - share(found) / base if base > 0 else NAN


def shifted(found: Signs, parity: str, least: int = LEAST) -> Array:
    """The shares of anomalies for all circular shifts by an 'even' or 'odd' number of steps, at least ``least``."""
    if parity not in ("even", "odd"):
        raise ValueError(f"parity={parity!r} is unknown; choose even or odd")
    total = len(found.norm)
    shifts = [k for k in range(least, total - least + 1) if k % 2 == (parity == "odd")]
    # An odd number of steps would turn an even shift into an odd one where it wraps round.
    series, kept = found.norm[: total - total % 2], slice(total - total % 2)
    rises, determined = found.sharpness[kept], found.determined[kept]
    return np.array([(rises != np.roll(series, k))[determined].mean() for k in shifts])


def near_turns(norm: Array, width: int = 2) -> Mask:
    r"""Whether an increment, (T - 1,), is within ``width`` of a turn of the series.

    A turn lies between two increments of opposite signs, and both are within one of it.
    """
    rises = np.diff(norm) > 0
    turns = np.flatnonzero(rises[1:] != rises[:-1])  # between increments i and i + 1
    near = np.zeros(len(rises), dtype=bool)
    for i in turns:
        near[max(i + 1 - width, 0) : i + 1 + width] = True
    return near


# ---- of a recorded run ---------------------------------------------------------------------------


def part_of(run: xr.Dataset, part: str = "all", **rules: Any) -> slice | None:
    """The increments of a part of the run; None where it has none."""
    total, at = run.sizes["observed"] - 1, first_crossing(run, **rules)
    if part not in PARTS:
        raise ValueError(f"part={part!r} is unknown; choose one of {', '.join(PARTS)}")
    if part == "all":
        return slice(0, total)
    if at is None or at >= total:
        return None
    return {"before": slice(0, at), "after": slice(at, total), "late": slice(at + (total - at) // 2, total)}[part]


def _signs(run: xr.Dataset, part: str, times: int = 0, **rules: Any) -> Signs | None:
    where = part_of(run, part, **rules)
    if where is None or where.stop - where.start < LEAST:
        return None
    sharpness, norm = (smooth(run[name].values, times) for name in ("sharpness", "norm_A2"))
    found = signs(sharpness, norm, run["sharpness_error"].values)
    return Signs(*(x[where] for x in found))


def anomaly_share(run: xr.Dataset, part: str = "all", smoothing: int = 0, phase: str = "", **rules: Any) -> float:
    """Share of the steps at which the sharpness and the output layer's norm move in opposite directions.

    ``part``: of the whole run, before or after its first crossing of 2/η, or the second half of what is after it.
    ``smoothing``: how often both series are first smoothed by (1, 2, 1)/4. ``phase``: only steps with this label.

    >>> import numpy as np, xarray as xr
    >>> t = np.arange(201)
    >>> sharpness = 1.5 - abs(t - 100) / 100    # up to step 100, then down; 2/η = 1
    >>> run = xr.Dataset({
    ...     "eta": ("step", np.full(201, 2.0)), "sharpness": ("observed", sharpness),
    ...     "norm_A2": ("observed", t), "sharpness_error": ("observed", np.zeros(201)),
    ... }, {"step": t, "observed": t})    # ‖A‖² rises at every step
    >>> [anomaly_share(run, part) for part in ("all", "before", "late")]
    [0.5, 0.0, 1.0]
    """
    found = _signs(run, part, smoothing, **rules)
    if found is None:
        return NAN
    if phase:
        codes = {name: code for code, name in NAMES.items()}
        where = part_of(run, part, **rules)
        found = Signs(*(x[labels_of(run, **rules)[1:][where] == codes[phase]] for x in found))
    return share(found)


def undetermined_share(run: xr.Dataset, part: str = "all", **rules: Any) -> float:
    """Share of the steps at which the sharpness moves by less than three times its error."""
    found = _signs(run, part, **rules)
    return NAN if found is None else float(1 - found.determined.mean())


def expected_share(run: xr.Dataset, part: str = "all", **rules: Any) -> float:
    """The share of anomalies that independent signs with the same frequencies of rises would give."""
    found = _signs(run, part, **rules)
    return NAN if found is None else expected(found)


def agreement(run: xr.Dataset, part: str = "all", **rules: Any) -> float:
    """Cohen's κ of the signs of the increments: 1 for agreement, 0 for independent signs, negative for antiphase."""
    found = _signs(run, part, **rules)
    return NAN if found is None else kappa(found)


def _hovers(run: xr.Dataset, part: str, **rules: Any) -> float:
    return float((labels_of(run, **rules)[1:][part_of(run, part, **rules)] == HOVERING).mean())


def shift_share(run: xr.Dataset, parity: str = "even", part: str = "all", **rules: Any) -> float:
    """Mean share of anomalies over circular shifts of one series by an even or odd number of steps, at least 20.

    nan where more than half of the steps hover with period two, and with fewer than twenty shifts.
    """
    found = _signs(run, part, **rules)
    if found is None or _hovers(run, part, **rules) > 0.5:
        return NAN
    values = shifted(found, parity)
    return float(values.mean()) if len(values) >= LEAST else NAN


def shift_rank(run: xr.Dataset, parity: str = "even", part: str = "all", **rules: Any) -> float:
    """Share of the circular shifts, by an even or odd number of steps, with as few anomalies as without a shift.

    nan where more than half of the steps hover with period two, and with fewer than twenty shifts.
    """
    found = _signs(run, part, **rules)
    if found is None or _hovers(run, part, **rules) > 0.5:
        return NAN
    values = shifted(found, parity)
    return float((values <= share(found)).mean()) if len(values) >= LEAST else NAN


def turn_share(run: xr.Dataset, width: int = 2, part: str = "all", baseline: bool = False, **rules: Any) -> float:
    """Share of the anomalies that are within ``width`` steps of a turn of ‖A‖²; ``baseline``: of all steps."""
    found, where = _signs(run, part, **rules), part_of(run, part, **rules)
    if found is None:
        return NAN
    near = near_turns(run["norm_A2"].values, width)[where]
    chosen = found.determined if baseline else found.determined & (found.sharpness != found.norm)
    return float(near[chosen].mean()) if chosen.any() else NAN


def turn_excess(run: xr.Dataset, width: int = 2, part: str = "all", **rules: Any) -> float:
    """Share of the anomalies within ``width`` steps of a turn of ‖A‖², less the share of all steps that are.

    nan where more than half of all steps are near a turn, so that it would say nothing, and without anomalies.
    """
    base = turn_share(run, width, part, baseline=True, **rules)
    return turn_share(run, width, part, **rules) - base if base <= 0.5 else NAN


def _correlation(x: Array, y: Array) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else NAN


def level_correlation(run: xr.Dataset, part: str = "all", **rules: Any) -> float:
    """Pearson correlation of the sharpness and ‖A‖², their values and not their increments."""
    where = part_of(run, part, **rules)
    if where is None or where.stop - where.start < LEAST:
        return NAN
    return _correlation(*(run[name].values[where.start : where.stop + 1] for name in ("sharpness", "norm_A2")))


def trend_correlation(run: xr.Dataset, window: int = 11, part: str = "late", **rules: Any) -> float:
    """Correlation of running means of the sharpness and of ‖A‖² over ``window`` steps, which have no fast oscillation.

    ``window`` is odd; (1, 2, 1)/4 is applied first, since an odd mean leaves some of a motion of period two.
    """
    where = part_of(run, part, **rules)
    if where is None or where.stop + 1 - where.start < window + LEAST:
        return NAN
    kernel = np.ones(window) / window
    slow = (
        np.convolve(smooth(run[name].values)[where.start : where.stop + 1], kernel, mode="valid")
        for name in ("sharpness", "norm_A2")
    )
    return _correlation(*slow)


def turning_ratio(run: xr.Dataset, part: str = "late", **rules: Any) -> float:
    """How many times as often the sharpness turns as ‖A‖²; nan where ‖A‖² does not turn at all."""
    found = _signs(run, part, **rules)
    if found is None:
        return NAN
    often = [float((x[1:] != x[:-1]).sum()) for x in (found.sharpness, found.norm)]
    return often[0] / often[1] if often[1] else NAN


STATISTICS: dict[str, Callable[..., float]] = {
    f.__name__: f
    for f in (
        anomaly_share,
        undetermined_share,
        expected_share,
        agreement,
        shift_share,
        shift_rank,
        turn_share,
        turn_excess,
        level_correlation,
        trend_correlation,
        turning_ratio,
    )
}
