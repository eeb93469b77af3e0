r"""Directions followed through a run by maximal overlap, and what can be said of them that sorted eigenvalues hide.

Sorted eigenvalues repel and swap where they come close, so that their order and their correlations are artefacts. A run
measured with ``overlaps`` knows :math:`O = V_t^\top V_{t'}` between consecutive sets of leading eigenvectors. An
orthonormal frame :math:`U_t = V_t C_t` is carried along by the orthogonal Procrustes problem: of all orthonormal frames
in the span of :math:`V_t` it overlaps most with the one before,

.. math:: C_t = \operatorname{polar}(O\,C_{t'}),

and its *curvatures* are the Rayleigh quotients :math:`u_d^\top H u_d = \sum_i C_{id}^2\lambda_i`. They are smooth where
eigenvalues cross. The singular values of :math:`O\,C_{t'}` say how much of the frame stays in the span: where one is
below 0.5, a direction has been lost.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from eos_utils.eos_stats import HALF, entry_step, roughness, scaled
from eos_utils.observers import ENTRY_WINDOW, entry_index

if TYPE_CHECKING:
    import xarray as xr

HELD_AMONG = 3  # eigenvectors among which a projection finds the first direction again
LOST = 0.5  # a singular value below this: a direction has left the span
LEADING = 8  # eigenvectors that a frame may mix, so that runs with more of them are treated alike


class Followed(NamedTuple):
    """Steps (T,), curvatures times η/2 (T, count), smallest singular value of each transport (T,)."""

    step: np.ndarray
    curvature: np.ndarray
    kept: np.ndarray


def follow(run: xr.Dataset, count: int = 5, begin: float | None = None, leading: int = LEADING) -> Followed:
    """The first ``count`` eigenvectors at the measurement at step ``begin`` (default: the first), followed to the end.

    Raises ``ValueError`` for a run without overlaps or with fewer than ``count`` eigenvectors.

    >>> import numpy as np, xarray as xr
    >>> same, swap = np.eye(2), np.eye(2)[::-1]    # the eigenvectors swap at a crossing
    >>> run = xr.Dataset({
    ...     "eta": ("step", [2.0] * 4),    # η/2 = 1
    ...     "eigenvalue": (("measured", "eig"), [[4, 1], [4, 3], [5, 4], [7, 4]]),
    ...     "overlap": (("measured", "eig", "eig_before"), [same, same, swap, same]),
    ... }, {"step": range(4), "measured": range(4)})
    >>> follow(run, count=2).curvature.T.round(3).tolist()    # one is constant
    [[4.0, 4.0, 4.0, 4.0], [1.0, 3.0, 5.0, 7.0]]
    """
    if "overlap" not in run:
        raise ValueError("this run was measured without overlaps, so its directions cannot be followed")
    leading = min(leading, run.sizes["eig"])
    if not 1 <= count <= leading:
        raise ValueError(f"count={count}: between 1 and {leading} directions can be followed here")
    steps, values = run["measured"].values, scaled(run)[:, :leading]
    start = 0 if begin is None else int(np.searchsorted(steps, begin))
    if start >= len(steps):
        raise ValueError(f"begin={begin}: the last measurement is at step {steps[-1]}")
    frame = np.eye(leading, count)
    curvature, kept = [np.einsum("id,i->d", frame**2, values[start])], [1.0]
    for t in range(start + 1, len(steps)):
        left, s, right = np.linalg.svd(run["overlap"].values[t, :leading, :leading] @ frame, full_matrices=False)
        frame = left @ right
        curvature.append(np.einsum("id,i->d", frame**2, values[t]))
        kept.append(float(s.min()))
    return Followed(steps[start:], np.array(curvature), np.array(kept))


def growth_rates_before(run: xr.Dataset, count: int = 5, window: int = 24) -> np.ndarray:
    """Slopes of followed curvatures, a measurement, over the ``window`` measurements that end before λ1's entry.

    They end half a window of entry before it. nan where there are fewer, and where a direction is lost.
    """
    enters = entry_step(run)
    end = -1 if np.isnan(enters) else int(np.searchsorted(run["measured"].values, enters)) - HALF
    if end - window < 0:
        return np.full(count, np.nan)
    found = follow(run, count, run["measured"].values[end - window])
    if found.kept[:window].min() < LOST:
        return np.full(count, np.nan)
    return np.polyfit(np.arange(window), found.curvature[:window], 1)[0]


def rate_spread(run: xr.Dataset, count: int = 5, window: int = 24) -> float:
    """How far apart the rates are at which followed curvatures grow before λ1 enters: (largest - least) / mean.

    nan where the mean does not grow.
    """
    rates = growth_rates_before(run, count, window)
    return float((rates.max() - rates.min()) / rates.mean()) if rates.mean() > 0 else float("nan")


def _motion(run: xr.Dataset, count: int, horizon: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Slow increments and changes of the amplitude of followed curvatures after λ1's entry, each (T, count).

    At an odd stride all directions alternate with period 2, which correlates whatever they do to each other: x is split
    into the means of neighbours, whose increments are slow, and the alternation, whose size is the amplitude.
    """
    enters = entry_step(run)
    if np.isnan(enters):
        return None
    begin = int(np.searchsorted(run["measured"].values, enters)) + HALF
    if len(run["measured"]) < begin + horizon:
        return None
    found = follow(run, count, run["measured"].values[begin])
    if found.kept[:horizon].min() < LOST:
        return None
    x = found.curvature[:horizon]
    amplitude = np.diff(x, axis=0) * ((-1.0) ** np.arange(len(x) - 1))[:, None]
    return np.diff((x[1:] + x[:-1]) / 2, axis=0), amplitude - amplitude.mean(axis=0)


def _excess(own: np.ndarray, foreign: list[np.ndarray]) -> float:
    count = own.shape[1]
    pairs = list(itertools.permutations(range(count), 2))
    within = np.mean([abs(np.corrcoef(own[:, i], own[:, j])[0, 1]) for i, j in pairs])
    across = np.mean([abs(np.corrcoef(own[:, i], x[:, j])[0, 1]) for x in foreign for i, j in pairs])
    return float(within - across)


def dependence_excess(mine: list[xr.Dataset], others: list[xr.Dataset], count: int = 5, horizon: int = 50) -> float:
    """Mean size of the correlation of the motions of two followed directions of one run, less that of two runs.

    Over pairs of ``count`` directions, ``horizon`` measurements from entry on; the comparison pairs direction i of this
    run with direction j of each other seed, aligned at their entries. Slow increments and amplitudes of the alternation
    are compared apart, and the larger excess counts. Independent directions give 0.
    """
    own = _motion(mine[0], count, horizon)
    foreign = [x for x in (_motion(other, count, horizon) for other in others) if x is not None]
    if own is None or not foreign:
        return float("nan")
    return max(_excess(own[part], [x[part] for x in foreign]) for part in (0, 1))


def _beside(run: xr.Dataset, begin: int, among: int) -> np.ndarray | None:
    """Scaled eigenvalues from step ``begin`` on without that of the first direction there, which is followed.

    None where that direction leaves the first ``among`` eigenvectors: a held one is sought among three.
    """
    from_begin = run["measured"].values >= begin
    values, frame = scaled(run)[from_begin], np.eye(run.sizes["eig"], 1)
    kept: list[np.ndarray] = []
    for row, overlap in zip(values, run["overlap"].values[from_begin], strict=True):
        if kept:
            moved = overlap @ frame
            if np.linalg.norm(moved) < LOST:
                return None
            frame = moved / np.linalg.norm(moved)
        first = int(np.abs(frame[:, 0]).argmax())
        if first >= among:
            return None
        kept.append(np.delete(row, first))
    return np.array(kept)


def _same_start(base: xr.Dataset, held: xr.Dataset) -> bool:
    """Whether the two runs are at the same point where the second begins."""
    begin = int(held["step"].values[0])
    there, here = (float(run["loss"].sel(step=begin)) for run in (base, held))
    return abs(here / there - 1) < 1e-3


def entries_beside_first(base: xr.Dataset, held: xr.Dataset) -> np.ndarray:
    """Steps of entry of the eigenvalues beside the first direction, in the two runs: (2, k - 1), nan for never.

    Over the time that both runs cover, each with the base's measurements before ``held`` begins in front, so that an
    entry near its beginning is seen. All nan where the direction is lost or the runs do not begin alike.
    """
    begin = int(held["measured"].values[0])
    last = min(base["measured"].values[-1], held["measured"].values[-1])
    steps = base["measured"].values
    steps, before = steps[steps <= last], (steps < begin).sum()
    entries = np.full((2, base.sizes["eig"] - 1), np.nan)
    if not _same_start(base, held):
        return entries
    for row, run, among in ((entries[0], base, base.sizes["eig"]), (entries[1], held, HELD_AMONG)):
        later = _beside(run, begin, among)
        if later is None:
            return np.full_like(entries, np.nan)
        series = np.vstack([scaled(base)[:before, 1:], later])[: len(steps)]
        for i, column in enumerate(series.T):
            at = entry_index(column)
            row[i] = np.nan if at is None else steps[at]
    return entries


def entry_shift(mine: list[xr.Dataset], others: list[xr.Dataset], eigs: int = 2, yardstick: float = 100.0) -> float:
    """By how much the entries of the others move without the motion along v1: mean shift, over that of forks.

    ``mine``: the base run and its continuation with the first direction held. Over the first ``eigs`` eigenvalues
    beside it that have not entered when that begins and do so later in one of the two; one that does not enter in the
    other counts as entering at the end. ``yardstick``: mean difference in steps between forks; they would give 1.
    """
    base, held = mine
    begin, last = held["measured"].values[0], min(base["measured"].values[-1], held["measured"].values[-1])
    entries = entries_beside_first(base, held)
    established = begin - HALF * int(base.attrs["stride"])
    waiting = [e for e in entries.T if not np.isnan(e).all() and np.nanmin(e) > established]
    if len(waiting) < eigs:
        return float("nan")
    ends = np.nan_to_num(np.array(waiting[:eigs]), nan=float(last))
    return float(np.abs(ends[:, 1] - ends[:, 0]).mean() / yardstick)


def roughness_without(mine: list[xr.Dataset], others: list[xr.Dataset], first: int = 2, last: int = 5) -> float:
    """Roughness of λ2 to λ5 without the motion along v1, over that in the base run; geometric mean.

    ``mine``: the base run and its continuation with that direction held, from before λ1 oscillates. Roughness is the
    median absolute second difference over the 21 measurements from λ1's entry in the base on; the held direction is
    left out of both. nan where it is lost.
    """
    base, held = mine
    enters, begin = entry_step(base), int(held["measured"].values[0])
    if np.isnan(enters) or not _same_start(base, held):
        return float("nan")
    rough = []
    for run, among in ((base, base.sizes["eig"]), (held, HELD_AMONG)):
        steps, values = run["measured"].values, _beside(run, begin, among)
        if values is None:
            return float("nan")
        at = int(np.searchsorted(steps[steps >= begin], enters))
        window = values[at : at + ENTRY_WINDOW, first - 2 : last - 1]
        if len(window) < ENTRY_WINDOW:
            return float("nan")
        rough.append(np.maximum(roughness(window), 1e-9))
    return float(np.exp(np.log(rough[1] / rough[0]).mean()))


STATISTICS = {f.__name__: f for f in (rate_spread,)}
# Of the runs of one seed, and all others: see eos_utils.claims.
GROUPED = {f.__name__: f for f in (dependence_excess, entry_shift, roughness_without)}
