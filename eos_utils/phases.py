r"""The four phases of a trajectory, and hovering, from two series: the sharpness in units of 2/η, s, and the loss.

SG, section 3.1, divides the trajectory: I, :math:`\Lambda<2/\eta`, the sharpness grows and the loss falls; II,
:math:`\Lambda>2/\eta`, it still grows; III, :math:`\Lambda>2/\eta`, it falls; IV, :math:`\Lambda<2/\eta`, "until the
loss decreases to a level that is around its value right before phase III". How this is decided step by step is not in
our copy; here it is read so:

- Both series are smoothed by :math:`\frac14(1,2,1)`, which takes motion of period two out exactly.
- *Above* has hysteresis: it begins where s exceeds 1 + ``level`` and ends where s is less than 1 - ``level``.
- *Rising* has hysteresis too: s turns at an extremum from which it has moved by more than ``turn``. The turn is put at
  the extremum, so that a label may depend on a few later steps.
- II is above and rising, III above and falling. Below, it is IV after an excursion until s rises and the loss is at
  most 1 + ``loss`` times its value right before the excursion's first III, and I otherwise.
- *Hovering* takes precedence: motion of period two around the edge. Among the inner steps of a ``window`` around t, s
  turns at ``share`` of them or more; its mean there is within ``near`` of 1; and this holds for at least ``least``
  steps in a row, so that a spike, which alternates for a few steps too, is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]

I, II, III, IV, HOVERING = range(1, 6)  # noqa: E741 (the paper's names)
NAMES = {I: "I", II: "II", III: "III", IV: "IV", HOVERING: "hovering"}
CYCLE = (II, III, IV, I)
START = 0.9  # a run that begins at this share of 2/η or above has no progressive sharpening


@dataclass(frozen=True)
class Labeller:
    """The parameters of the labeller; :func:`label` says what they do. ``hovering=False``: no fifth label."""

    smoothing: int = 1
    level: float = 0.01
    turn: float = 0.01
    loss: float = 0.1
    hovering: bool = True
    window: int = 11
    share: float = 0.8
    near: float = 0.25
    least: int = 22

    def __post_init__(self) -> None:
        for name in ("smoothing", "level", "turn", "loss", "near", "least"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.window < 5 or self.window % 2 == 0:
            raise ValueError(f"window={self.window}: must be odd and at least 5")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: must be above 0 and at most 1")


class Segment(NamedTuple):
    """A stretch of steps ``begin`` to ``end`` - 1 with one label."""

    begin: int
    end: int
    label: int


def smooth(values: Array, times: int = 1) -> Array:
    """The series convolved with (1, 2, 1)/4; at its ends the mean of two neighbours, which is free of period two too.

    >>> smooth(np.array([1.0, -1.0, 1.0, -1.0]))
    array([0., 0., 0., 0.])
    """
    values = np.asarray(values, dtype=float)
    for _ in range(times):
        if len(values) < 3:
            return values
        inner = (values[:-2] + 2 * values[1:-1] + values[2:]) / 4
        values = np.concatenate([[values[:2].mean()], inner, [values[-2:].mean()]])
    return values


def above(s: Array, level: float = 0.0) -> Mask:
    """Where s is above 1, with hysteresis ``level``; its first value is compared with 1 alone."""
    state, found = bool(s[0] > 1), np.empty(len(s), dtype=bool)
    for t, value in enumerate(s):
        state = value > 1 + level or (state and value >= 1 - level)
        found[t] = state
    return found


def rising(s: Array, turn: float = 0.0) -> Mask:
    """Whether step t belongs to a rise: up to a maximum, from which s then falls by more than ``turn``.

    The step at an extremum belongs to the stretch that it ends.
    """
    found = np.empty(len(s), dtype=bool)
    begin = low = high = 0
    state: bool | None = None
    for t in range(len(s)):
        low, high = (t if s[t] < s[low] else low), (t if s[t] > s[high] else high)
        if state is not False and s[t] < s[high] - turn:  # the rise ended at the maximum
            found[begin : high + 1] = True
            state, begin, low = False, high + 1, t
        elif state is not True and s[t] > s[low] + turn:
            found[begin : low + 1] = False
            state, begin, high = True, low + 1, t
        if state is True and s[t] >= s[high]:
            high = t
        if state is False and s[t] <= s[low]:
            low = t
    found[begin:] = s[-1] >= s[0] if state is None else state
    found[0] = found[min(1, len(s) - 1)]  # the first step ends no stretch
    return found


def period_two(s: Array, window: int = 11, share: float = 0.8) -> Mask:
    """Whether, of the inner steps of the window around t, at least ``share`` are turns of s (cut off at the ends)."""
    moves = np.diff(s)
    turns = np.zeros(len(s))
    turns[1:-1] = moves[1:] * moves[:-1] < 0
    inner, half = np.ones(len(s)), window // 2 - 1
    inner[[0, -1]] = 0
    kernel = np.ones(2 * half + 1)
    counts = (np.convolve(x, kernel)[half : half + len(s)] for x in (turns, inner))
    hits, total = counts
    return np.asarray((total > 0) & (hits >= share * total - 1e-9))


def hovering(s: Array, window: int = 11, share: float = 0.8, near: float = 0.25, least: int = 22) -> Mask:
    """Steps of a motion of period two around the edge: see the module's head."""
    if len(s) < window:
        return np.zeros(len(s), dtype=bool)
    kernel, ones = np.ones(window), np.ones(len(s))
    half = window // 2
    mean = np.convolve(s, kernel)[half : half + len(s)] / np.convolve(ones, kernel)[half : half + len(s)]
    found = period_two(s, window, share) & (np.abs(mean - 1) <= near)
    for begin, end, on in segments(found.astype(np.int64)):
        found[begin:end] = on and end - begin >= least
    return found


def label(sharpness: Array, loss: Array, rules: Labeller | None = None) -> Labels:
    """The label of every step, (T,): 1 to 4 for the phases I to IV, 5 for hovering.

    ``sharpness`` in units of 2/η. Raises ``ValueError`` for series of different lengths, empty ones, or ones that are
    not finite.
    """
    rules = rules or Labeller()
    sharpness, loss = np.asarray(sharpness, dtype=float), np.asarray(loss, dtype=float)
    if sharpness.shape != loss.shape or sharpness.ndim != 1 or not len(loss):
        raise ValueError(
            f"sharpness has shape {sharpness.shape} and loss {loss.shape}: they must be two series of one length"
        )
    if not (np.isfinite(sharpness).all() and np.isfinite(loss).all()):
        raise ValueError("the series contain values that are not finite")
    s, ell = smooth(sharpness, rules.smoothing), smooth(loss, rules.smoothing)
    up, over = rising(s, rules.turn), above(s, rules.level)
    labels = np.empty(len(s), dtype=np.int64)
    before, fallen, owed = np.inf, False, False  # the loss to come back to; whether III has begun; whether in IV
    for t in range(len(s)):
        if over[t]:
            if t == 0 or not over[t - 1]:
                before, fallen = ell[t], False
            fallen, owed = fallen or not up[t], True
            before = before if fallen else ell[t]
            labels[t] = II if up[t] else III
        else:
            owed = owed and not (up[t] and ell[t] <= (1 + rules.loss) * before)
            labels[t] = IV if owed else I
    if rules.hovering:
        labels[hovering(sharpness, rules.window, rules.share, rules.near, rules.least)] = HOVERING
    return labels


def segments(labels: Labels) -> list[Segment]:
    """The stretches of equal labels, in order.

    >>> segments(np.array([1, 1, 2]))
    [Segment(begin=0, end=2, label=1), Segment(begin=2, end=3, label=2)]
    """
    cuts = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return [Segment(a, b, int(labels[a])) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if b > a]


def strict_cycles(labels: Labels) -> list[tuple[int, int]]:
    """Begin and end of every II, III, IV, I that follow one another without anything between."""
    found = segments(labels)
    order = [x.label for x in found]
    return [(found[i].begin, found[i + 3].end) for i in range(len(order) - 3) if tuple(order[i : i + 4]) == CYCLE]


def upcrossings(sharpness: Array, rules: Labeller | None = None) -> list[int]:
    """Steps at which the smoothed sharpness goes from below the edge to above it, with hysteresis."""
    rules = rules or Labeller()
    over = above(smooth(sharpness, rules.smoothing), rules.level)
    return [int(t) + 1 for t in np.flatnonzero(~over[:-1] & over[1:])]


# ---- of a recorded run ---------------------------------------------------------------------------


def scaled(run: xr.Dataset) -> Array:
    r"""The sharpness :math:`\Lambda\eta/2` at the observed steps."""
    eta = run["eta"].sel(step=run["observed"]).values.astype(float)
    return np.asarray(run["sharpness"].values.astype(float) * eta / 2)


def losses(run: xr.Dataset) -> Array:
    r"""The loss :math:`\|D\|^2/n` at the observed steps."""
    return np.asarray(run["loss"].sel(step=run["observed"]).values.astype(float))


def examples(run: xr.Dataset) -> float:
    r"""n, which is :math:`\|Y\|^2` for labels ±1."""
    return float(np.median(run["norm_D2"].values / losses(run)))


def labels_of(run: xr.Dataset, **parameters: Any) -> Labels:
    """The labels of a run; ``parameters`` are those of :class:`Labeller`."""
    return label(scaled(run), losses(run), Labeller(**parameters))


def first_crossing(run: xr.Dataset, **parameters: Any) -> int | None:
    """The first step above the edge, of a run that begins below 0.9 of it; None without one.

    A run that begins higher has no progressive sharpening: nothing before or after can be told apart in it.
    """
    s = scaled(run)
    found = upcrossings(s, Labeller(**parameters))
    return found[0] if found and s[0] < START else None


def sensitivity(
    statistic: Callable[..., float], run: xr.Dataset, choices: dict[str, Sequence[Any]], **arguments: Any
) -> dict[tuple[str, Any], float]:
    """A statistic of a run for other values of the labeller's parameters, one changed at a time: by (name, value)."""
    return {
        (name, value): statistic(run, **{**arguments, name: value})
        for name, values in choices.items()
        for value in values
    }
