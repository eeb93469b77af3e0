r"""FG, Assumptions 2.1 and 2.2 and the statements of Appendix A.1: the start, and phase 1.

**Assumption 2.2.** With orthonormal inputs and :math:`g_j` uniform on the sphere the signs of a neuron's preactivations
are independent fair coins, and :math:`s_j` is another. A neuron is in :math:`S_{1,\pm}` with probability
:math:`p_\pm = 2^{-(n_\pm+1)}`, never in both, so that among m independent neurons

.. math:: P(\text{both non-empty}) = 1 - (1-p_+)^m - (1-p_-)^m + (1-p_+-p_-)^m .

**Phase 1.** While h is negligible the dynamics are linear in (w, a), so that angles do not depend on λ. An aligned
neuron of :math:`S_{1,\pm}` grows by :math:`1+q_\pm` in each step and what is orthogonal to :math:`d_\pm` stays; to be
aligned up to a factor :math:`1-f` it must have grown to about :math:`\lambda/\sqrt{2f}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from eos_utils import fg_exit
from eos_utils.eos_stats import start_fact
from eos_utils.fg_exit import advance, batches
from eos_utils.fg_theory import (
    Array,
    Network,
    Problem,
    Tested,
    aligned_set,
    descend,
    initial,
    orthonormal,
    outputs,
    problem,
    step,
)

if TYPE_CHECKING:
    import xarray as xr

# ---- Assumption 2.2 --------------------------------------------------------------------------------


def log10_both(positives: int, negatives: int, width: int) -> float:
    """log₁₀ of the probability that both sets are non-empty, in exact arithmetic: it may be far below any float.

    >>> round(10 ** log10_both(2, 2, 40), 3)
    0.99
    """
    if min(positives, negatives, width) < 1:
        raise ValueError(f"{positives} positive and {negatives} negative labels, width {width}: all must be positive")
    bits = max(positives, negatives) + 1
    one, plus, minus = (1 << k for k in (bits, bits - positives - 1, bits - negatives - 1))
    ways = one**width - (one - plus) ** width - (one - minus) ** width + (one - plus - minus) ** width
    return (math.log2(ways) - bits * width) * math.log10(2) if ways else -math.inf


def narrowest(positives: int, negatives: int, chance: float = 0.99) -> int:
    """The smallest width with which both sets are non-empty with at least this probability."""
    enough = 1
    while log10_both(positives, negatives, enough) < math.log10(chance):
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        if log10_both(positives, negatives, middle) < math.log10(chance):
            short = middle
        else:
            enough = middle
    return enough


def log10_width(examples: int, chance: float = 0.99) -> float:
    """log₁₀ of the width needed where one sign has many more examples: then only (1 − p)^m of that sign counts."""
    return math.log10(-math.log(1 - chance)) + (examples + 1) * math.log10(2)


def wilson(hits: int, draws: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval (95 %) of a frequency."""
    share, pull = hits / draws, z * z / draws
    middle = share + pull / 2
    half = z * math.sqrt(share * (1 - share) / draws + pull / draws / 4)
    return (middle - half) / (1 + pull), (middle + half) / (1 + pull)


def frequency(positives: int, negatives: int, width: int, draws: int, seed: int) -> tuple[float, float, float]:
    """How often both sets are non-empty among drawn networks on rotated orthonormal inputs, with its interval."""
    generator = np.random.default_rng(seed)
    x = orthonormal(positives + negatives, positives + negatives + 2, seed)
    hits = 0
    for some in np.array_split(np.arange(draws), max(1, draws * width // 50_000)):
        on = generator.normal(size=(len(some), width, x.shape[1])) @ x.T > 0
        s = generator.random((len(some), width)) < 0.5
        plus = (s & on[..., :positives].all(axis=-1)).any(axis=1)
        hits += int((plus & (~s & on[..., positives:].all(axis=-1)).any(axis=1)).sum())
    return (hits / draws, *wilson(hits, draws))


def frequencies(draws: int, seed: int) -> dict[int, tuple[Array, Array]]:
    """For 1 to 5 labels of each sign: widths, and the frequency with its interval at each, (3, widths)."""
    widths = np.array([5.0, 10, 20, 40, 80, 160])
    return {n: (widths, np.array([frequency(n, n, int(m), draws, seed) for m in widths]).T) for n in range(1, 6)}


def facts(run: xr.Dataset | None) -> list[tuple[str, str, float]]:
    """What of data and initialisation, what the assumptions ask for, and what a recorded run has (nan without one)."""
    asked = {
        "largest |cosine| of two inputs": ("cosine_largest", "0"),
        "median |cosine| of two inputs": ("cosine_median", "0"),
        "smallest norm of an input": ("norm_smallest", "1"),
        "largest norm of an input": ("norm_largest", "1"),
        "share of labels that are 0": ("labels_zero", "0"),
        "imbalance of the labels": ("labels_imbalance", "not 0"),
        "positive labels": ("positives", "–"),
        "negative labels": ("negatives", "–"),
        "best neuron: share of the positive inputs it is active on": ("active_positive_largest", "1"),
        "best neuron: share of the negative inputs it is active on": ("active_negative_largest", "1"),
    }
    found = {name: start_fact(run, name) if run is not None else math.nan for name, _ in asked.values()}
    return [(what, wanted, found[name]) for what, (name, wanted) in asked.items()]


def both_sets(positives: int, negatives: int, width: int) -> Tested:
    """Logarithm to base 10 of the probability that both sets are non-empty, exactly, on orthonormal inputs."""
    on = f"the closed form, with {positives:,} positive and {negatives:,} negative labels and {width} neurons"
    return Tested(log10_both(positives, negatives, width), 1, on)


def mirror_difference(trials: int, steps: int, seed: int, labels_only: bool = False) -> Tested:
    r"""Largest difference between a run and its mirror image, in which all labels and all output weights change sign.

    The mirror of :math:`(w, a)` is :math:`(w, -a)`, and it exchanges the two sets. ``labels_only``: a control that
    leaves the output weights as they are, and is no mirror.
    """
    worst = 0.0
    for batch in batches(trials, seed):
        w, a, v, b = batch.w, batch.a, batch.w, batch.a if labels_only else -batch.a
        for _ in range(steps):
            w, a, _ = advance(w, a, batch.y, batch.eta)
            v, b, _ = advance(v, b, -batch.y, batch.eta)
        worst = max(worst, float(np.abs(w - v).max()), float(np.abs(a + b).max()))
    return Tested(worst, trials, f"random networks on orthonormal inputs, {steps} steps")


def boundary_network(scale: float) -> tuple[Network, Problem]:
    r"""A network that meets Assumption 2.2 as printed and never learns its positive label.

    :math:`w_1 = -\lambda x_2` is orthogonal to the positive input :math:`x_1`, so :math:`\langle w_1, x_1\rangle\ge0`.
    """
    w, a = scale * np.array([[0.0, -1.0], [0.0, 1.0]]), scale * np.array([1.0, -1.0])
    return Network(w, a), problem((1.0, -0.5), 0.5)


def members(net: Network, p: Problem, strict: bool) -> tuple[int, int]:
    """Sizes of the two sets with > 0 (``strict``), or with ≥ 0 as printed, at the start."""
    if strict:
        return len(aligned_set(net, p, 1)), len(aligned_set(net, p, -1))
    pre = p.x @ net.w.T
    plus, minus = (int(((s * net.a > 0) & (pre[s * p.y > 0] >= 0).all(axis=0)).sum()) for s in (1, -1))
    return plus, minus


def unfitted(strict: bool, trials: int, seed: int, steps: int = 800) -> Tested:
    """Largest share of the loss on positive labels that is left after training, over networks that meet the assumption.

    Among the networks are drawn ones and the boundary network; which of them meet Assumption 2.2 depends on the
    reading: as printed (≥ 0), or ``strict`` (> 0).
    """
    p = problem((1.0, 1.0, -0.8, -0.8), 0.5, seed)
    tried = [(initial(40, 4, 0.01, seed + i), p) for i in range(trials)] + [boundary_network(0.01)]
    left = []
    for net, task in tried:
        if min(members(net, task, strict)) > 0:
            positive, end = task.y > 0, net
            for _ in range(steps):
                end = step(end, task)
            before, after = (((outputs(n, task.x) - task.y)[positive] ** 2).sum() for n in (net, end))
            left.append(float(after / before))
    return Tested(max(left), len(left), f"networks that meet the assumption in this reading, {steps} steps")


# ---- Appendix A.1 ----------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Phase 1 of random networks: from the start until all of both sets are aligned up to a factor 1 - f.

    ``x``: ηL; ``steps``: its length (inf if longer than tried); ``size`` and ``unbalance``: the smallest A and B that
    serve; ``flips`` and ``flips_inside``: whether an output weight changes its sign, of any neuron and of the sets.
    """

    x: Array
    steps: Array
    size: Array
    unbalance: Array
    flips: Array
    flips_inside: Array


@lru_cache(maxsize=8)
def phase(trials: int, seed: int, factor: float, scale: float, longest: int = 4000) -> Phase:
    r"""Phase 1 of networks drawn as for Lemma A.1, with :math:`\|d_+\| < 2\|d_-\|` and the given λ."""
    parts = [_until_aligned(b.at(scale), factor, longest) for b in batches(trials, seed, steepest=2.0)]
    return Phase(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def cosines(b: fg_exit.Batch, w: Array) -> tuple[Array, Array]:
    r""":math:`\langle\hat w_j, \hat d_\pm\rangle` of all neurons, each (R, m)."""
    n = b.y.shape[1]
    plus, minus = (
        np.einsum("rmn,rn->rm", w[:, :, :n], np.where(s * b.y > 0, b.y, 0))
        / (n * size[:, None])
        / np.linalg.norm(w, axis=2)
        for s, size in zip((1, -1), b.sizes, strict=True)
    )
    return plus, minus


def _until_aligned(b: fg_exit.Batch, factor: float, longest: int) -> Phase:
    count = len(b.y)
    steps, size, unbalance, flips, inside = (np.full(count, v) for v in (np.inf, 1.0, 0.0, 0.0, 0.0))
    alive, w, a = np.arange(count), b.w, b.a
    sets = b.starts
    for t in range(longest):
        now = b.of(alive)
        plus, minus = cosines(now, w)
        norm, flipped = np.linalg.norm(w, axis=2), np.sign(a) != np.sign(now.a)
        size[alive] = np.maximum(size[alive], np.maximum(norm, np.abs(a)).max(axis=1) / now.scale)
        unbalance[alive] = np.maximum(unbalance[alive], (norm - np.abs(a)).max(axis=1) / now.scale)
        flips[alive] = np.maximum(flips[alive], flipped.any(axis=1))
        inside[alive] = np.maximum(inside[alive], (flipped & (sets[0] | sets[1])[alive]).any(axis=1))
        aligned = np.all((plus >= 1 - factor) | ~sets[0][alive], axis=1)
        aligned &= np.all((-minus >= 1 - factor) | ~sets[1][alive], axis=1)
        steps[alive[aligned]] = t
        alive, w, a = alive[~aligned], w[~aligned], a[~aligned]
        if not len(alive):
            break
        w, a, _ = advance(w, a, b.y[alive], b.eta[alive])
    return Phase(b.x, steps, size, unbalance, flips, inside)


PHASE = "random networks with ηL from 0.02 to 0.98 and ‖d₊‖ < 2‖d₋‖, until S₁,± are aligned up to a factor 1 − {}"


def size_depends_on_scale(trials: int, seed: int, factor: float, scale: float) -> Tested:
    """Largest relative change of the smallest A that serves when λ becomes a thousandth.

    0: one A serves for all λ, as "‖w‖, |a| ≤ Aλ for some A" asks for.
    """
    here, there = phase(trials, seed, factor, scale), phase(trials, seed, factor, scale / 1000)
    return Tested(float(np.abs(there.size / here.size - 1).max()), len(here.x), PHASE.format(factor))


def needing_large_B(trials: int, seed: int, factor: float, scale: float) -> Tested:
    """Number of networks in which ‖w_j‖ − |a_j| reaches λ for some neuron during phase 1, so that no B < 1 serves."""
    found = phase(trials, seed, factor, scale)
    return Tested(float((found.unbalance >= 1).sum()), len(found.x), PHASE.format(factor))


def sign_changes(inside: bool, trials: int, seed: int, factor: float, scale: float) -> Tested:
    """Number of networks in which an output weight changes its sign during phase 1.

    ``inside``: counting the neurons of the two sets of Assumption 2.2 alone.
    """
    found = phase(trials, seed, factor, scale)
    count = (found.flips_inside if inside else found.flips).sum()
    return Tested(float(count), len(found.x), PHASE.format(factor))


def sign_example(eta: float, steps: int, scale: float = 1e-9) -> Array:
    r"""The output weight of a neuron that changes its sign, in units of λ: (steps + 1,).

    :math:`y = (1, 1, -\frac12)`, :math:`a_1 = -\lambda`, and :math:`w_1 = \lambda(u, \sqrt{1-u^2}, 0)` with
    :math:`u = \eta/3`: the first step takes it to 0 on the first input and leaves :math:`\langle w_1, x_2\rangle`
    larger than :math:`|a_1|`, for every η. Two more neurons are aligned, one of each sign.
    """
    u, half = eta / 3, math.sqrt(0.5)
    w = scale * np.array([[u, math.sqrt(1 - u * u), 0], [half, half, 0], [0, 0, 1]])
    path = descend(Network(w, scale * np.array([-1.0, 1.0, -1.0])), problem((1.0, 1.0, -0.5), eta), steps)
    return np.array([net.a[0] / scale for net in path])


def at_size(b: fg_exit.Batch, growth: float, longest: int = 4000) -> Array:
    """Input weights of each network at the last step at which none of its weights exceeds ``growth`` λ, (R, m, d)."""
    end, w, a, alive = b.w.copy(), b.w, b.a, np.arange(len(b.y))
    for _ in range(longest):
        small = np.maximum(np.linalg.norm(w, axis=2), np.abs(a)).max(axis=1) <= growth * b.scale[alive]
        alive, w, a = alive[small], w[small], a[small]
        if not len(alive):
            break
        end[alive] = w
        w, a, _ = advance(w, a, b.y[alive], b.eta[alive])
    return end


@lru_cache(maxsize=2)
def _cosines_at_size(growth: float, trials: int, seed: int) -> tuple[Array, Array]:
    """Cosines of all members of the two sets with d₊ and with d₋, at the end of phase 1."""
    found: tuple[list[Array], list[Array]] = ([], [])
    for batch in batches(trials, seed, steepest=2.0):
        small = batch.at(1e-9)
        for some, values, inside in zip(found, cosines(small, at_size(small, growth)), small.starts, strict=True):
            some.append(values[inside])
    return np.concatenate(found[0]), np.concatenate(found[1])


def alignment(sign: int, towards: int, growth: float, trials: int, seed: int) -> Tested:
    """Largest value of 1 minus the cosine between a neuron of S₁,± and ``towards`` times d±.

    ``sign``: which of the two sets. Over random networks at the end of phase 1, read as the last step before a weight
    exceeds ``growth`` times λ. They start so small that all of them are still far from fitting a label then.
    """
    found = towards * _cosines_at_size(growth, trials, seed)[(1 - sign) // 2]
    on = f"neurons of random networks when the first weight reaches {growth:g} λ"
    return Tested(float(1 - found.min()), len(found), on)


def alignment_path(eta: float, seed: int, steps: int, scale: float = 1e-6) -> tuple[Array, Array]:
    """Cosines of the members of the two sets with d₊ and with d₋, (steps + 1, members) each, in one network."""
    p = problem((1.0, 1.0, -2 / 3, -2 / 3), eta)
    path = descend(initial(40, 4, scale, seed), p, steps)
    found = []
    for sign in (1, -1):
        w = np.stack([net.w[aligned_set(path[0], p, sign)] for net in path])
        found.append(w @ p.d(sign) / (np.linalg.norm(w, axis=2) * p.size(sign)))
    return found[0], found[1]


CHECKS: dict[str, Callable[..., Tested]] = {
    **fg_exit.CHECKS,
    **{
        f.__name__: f
        for f in (
            both_sets,
            mirror_difference,
            unfitted,
            size_depends_on_scale,
            needing_large_B,
            sign_changes,
            alignment,
        )
    },
}
