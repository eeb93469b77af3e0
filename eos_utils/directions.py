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

LEADING = 8  # eigenvectors that a frame may mix, so that runs with more of them are treated alike


class Followed(NamedTuple):
    """Steps (T,), curvatures times η/2 (T, count), smallest singular value of each transport (T,)."""

    step: np.ndarray
    curvature: np.ndarray
    kept: np.ndarray


def follow(run: xr.Dataset, count: int = 5, begin: float | None = None, leading: int = LEADING) -> Followed:
    """The first ``count`` eigenvectors at the measurement at step ``begin`` (default: the first), followed to the end.

    Raises ``ValueError`` for a run without overlaps or with fewer than ``count`` eigenvectors.
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


def growth_rates_before(run: xr.Dataset, count: int = 5, window: int = 40) -> np.ndarray:
    """Slopes of followed curvatures, a measurement, over the ``window`` measurements that end before λ1's entry.

    They end half a window of entry before it. nan where there are fewer.
    """
    enters = entry_step(run)
    end = -1 if np.isnan(enters) else int(np.searchsorted(run["measured"].values, enters)) - HALF
    if end - window < 0:
        return np.full(count, np.nan)
    found = follow(run, count, run["measured"].values[end - window])
    return np.polyfit(np.arange(window), found.curvature[:window], 1)[0]


def rate_spread(run: xr.Dataset, count: int = 5, window: int = 40) -> float:
    """How far apart the rates are at which followed curvatures grow before λ1 enters: (largest - least) / mean."""
    rates = growth_rates_before(run, count, window)
    return float((rates.max() - rates.min()) / rates.mean())


def _increments(run: xr.Dataset, count: int, horizon: int) -> np.ndarray | None:
    """Increments of the followed curvatures over ``horizon`` measurements from the end of the window of entry on."""
    enters = entry_step(run)
    if np.isnan(enters):
        return None
    begin = int(np.searchsorted(run["measured"].values, enters)) + HALF
    if len(run["measured"]) < begin + horizon:
        return None
    found = follow(run, count, run["measured"].values[begin])
    return np.diff(found.curvature[:horizon], axis=0)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(np.corrcoef(a, b)[0, 1]))


def dependence_excess(mine: list[xr.Dataset], others: list[xr.Dataset], count: int = 5, horizon: int = 50) -> float:
    """Mean |correlation| of the increments of two followed directions of one run, less that of two runs.

    Over pairs of ``count`` directions, ``horizon`` measurements from entry on; the comparison pairs direction i of this
    run with direction j of each other seed, aligned at their entries. Independent directions give 0.
    """
    own = _increments(mine[0], count, horizon)
    foreign = [x for x in (_increments(other, count, horizon) for other in others) if x is not None]
    if own is None or not foreign:
        return float("nan")
    pairs = list(itertools.combinations(range(count), 2))
    within = np.mean([_correlation(own[:, i], own[:, j]) for i, j in pairs])
    across = np.mean(
        [_correlation(own[:, i], x[:, j]) for x in foreign for i, j in (*pairs, *((j, i) for i, j in pairs))]
    )
    return float(within - across)


def _others(run: xr.Dataset, begin: int) -> np.ndarray:
    """Scaled eigenvalues from step ``begin`` on without that of the first direction there, which is followed."""
    from_begin = run["measured"].values >= begin
    values, frame = scaled(run)[from_begin], np.eye(run.sizes["eig"], 1)
    kept: list[np.ndarray] = []
    for row, overlap in zip(values, run["overlap"].values[from_begin], strict=True):
        if kept:
            moved = overlap @ frame
            frame = moved / np.linalg.norm(moved)
        kept.append(np.delete(row, int(np.abs(frame[:, 0]).argmax())))
    return np.array(kept)


def entries_beside_first(run: xr.Dataset, held: xr.Dataset, eigs: int = 2) -> np.ndarray:
    """Steps at which the first ``eigs`` eigenvalues beside the first direction enter, from where ``held`` begins on.

    Over the time that both runs cover; nan for never.
    """
    begin = int(held["measured"].values[0])
    steps = run["measured"].values
    steps = steps[(steps >= begin) & (steps <= held["measured"].values[-1])]
    values = _others(run, begin)[: len(steps)]
    entries = [entry_index(values[:, i]) for i in range(eigs)]
    return np.array([np.nan if at is None else float(steps[at]) for at in entries])


def entry_shift(mine: list[xr.Dataset], others: list[xr.Dataset], eigs: int = 2, yardstick: float = 300.0) -> float:
    """By how much the other eigenvalues enter later without the motion along v1, in units of the spread of forks.

    ``mine``: the base run and its projected continuation. The mean over the first ``eigs`` eigenvalues beside the
    direction that is held, of the step of entry in the projected run less that in its base; an eigenvalue that does not
    enter counts as entering at the end. ``yardstick``: steps by which forks of one run differ in these entries.
    """
    base, held = mine
    last = float(min(base["measured"].values[-1], held["measured"].values[-1]))
    with_it, without = (entries_beside_first(run, held, eigs) for run in (base, held))
    if np.isnan(with_it).all():
        return float("nan")
    return float((np.nan_to_num(without, nan=last) - np.nan_to_num(with_it, nan=last)).mean() / yardstick)


def roughness_without(mine: list[xr.Dataset], others: list[xr.Dataset], first: int = 2, last: int = 5) -> float:
    """Roughness of λ2 to λ5 without the motion along v1, over that in the base run; geometric mean.

    ``mine``: the base run and its projected continuation, from before λ1 oscillates. Roughness is the median absolute
    second difference over the 21 measurements from λ1's entry in the base on; the held direction is left out of both.
    """
    base, projected = mine
    enters, begin = entry_step(base), int(projected["measured"].values[0])
    if np.isnan(enters):
        return float("nan")
    rough = []
    for run in (base, projected):
        steps = run["measured"].values
        at = int(np.searchsorted(steps[steps >= begin], enters))
        window = _others(run, begin)[at : at + ENTRY_WINDOW, first - 2 : last - 1]
        if len(window) < ENTRY_WINDOW:
            return float("nan")
        rough.append(np.maximum(roughness(window), 1e-9))
    return float(np.exp(np.log(rough[1] / rough[0]).mean()))


STATISTICS = {f.__name__: f for f in (rate_spread,)}
# Of the runs of one seed, and all others: see eos_utils.claims.
GROUPED = {f.__name__: f for f in (dependence_excess, entry_shift, roughness_without)}
