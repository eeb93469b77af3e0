r"""FG, Lemmas 2.2 and A.2: which inputs a neuron is active on, and a linear recursion.

On orthonormal inputs a step changes :math:`\langle w_j, x_k\rangle` by :math:`\eta a_j\langle d_j, x_k\rangle`, and of
:math:`d_j` only the term of :math:`x_k` survives: an inactive neuron is not moved. With correlated inputs the other
terms push it too.

With :math:`B = AC - C`, :math:`a' = Aa + B` is :math:`a' + C = A(a + C)`. With :math:`B = AC - A`, as printed in Lemma
A.2, :math:`a' + C = A(a + C) + (C - A)`, so that the upper bound fails exactly for C > A and the lower one for C < A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from eos_utils import fg_balance
from eos_utils.fg_balance import FIRST, LABELS, RANDOM, ROUNDING, correlated, draws
from eos_utils.fg_theory import Array, Problem, Tested, descend, initial, loss, orthonormal, problem, step

# ---- Lemma 2.2 -----------------------------------------------------------------------------------


class Activity(NamedTuple):
    """Pairs of a neuron and an input along runs, added up over seeds."""

    same: Array  # (steps + 1,) pairs that are active, the label of the sign that the output weight then has
    opposite: Array  # ... or of the other
    kept: float  # share of the pairs active at the start, with signs that agreed then, that are so at the end
    reactivated: int  # changes from inactive to active
    deactivated: int
    pairs: int
    flipped: int  # output weights that end with the other sign
    dead: int  # runs that end with an input on which no neuron is active
    loss: float  # at the end, relative to that of the zero network, median over seeds


@lru_cache(maxsize=64)
def activity(
    correlation: float, q: float, seeds: int, steps: int, rotated: bool = False, m: int = 40, scale: float = 1e-2
) -> Activity:
    r"""Runs from FG's initialisation with :math:`\eta\|d_+\|` = ``q`` (for orthonormal inputs), one for each seed."""
    eta, runs, ends = q / problem(LABELS, 1.0).size(1), [], []
    for seed in range(FIRST, FIRST + seeds):
        x = correlated(orthonormal(len(LABELS), seed=seed if rotated else None), correlation)
        p = Problem(x, np.array(LABELS), eta)
        path = descend(initial(m, p.n, scale, seed), p, steps)
        on = np.array([net.w @ x.T > 0 for net in path])
        agree = np.array([net.a[:, None] * p.y > 0 for net in path])
        turned = on[1:].astype(int) - on[:-1]
        right = on[0] & agree[0]
        runs.append(
            (
                *((on & agree).sum(axis=(1, 2)), (on & ~agree).sum(axis=(1, 2)), right.sum(), (right & on[-1]).sum()),
                *((turned > 0).sum(), (turned < 0).sum(), right.size),
                *((path[-1].a * path[0].a < 0).sum(), (~on[-1]).all(axis=0).any()),
            )
        )
        ends.append(loss(path[-1], p) / float((p.y**2).sum() / (2 * p.n)))
    same, opposite, first, last, *counts = (np.sum(column, axis=0) for column in zip(*runs, strict=True))
    back, gone, pairs, flipped, dead = map(int, counts)
    return Activity(same, opposite, float(last / first), back, gone, pairs, flipped, dead, float(np.median(ends)))


# ---- Lemma A.2 -----------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """Random instances of the recursion, arrays (N,)."""

    a: Array  # the factor A
    c: Array  # C
    excess: Array  # how far a_t is beyond the bound, relative to the sizes met; positive is a violation


@lru_cache(maxsize=16)
def sequences(side: str, version: str, trials: int, slack: bool = True) -> Sequences:
    r"""Sequences that meet the hypothesis of Lemma A.2, against its bound.

    :math:`a_{t+1} = Aa_t + B \mp` a random slack ≥ 0 (none in half of them), for up to eight steps, A in (0.2, 3) and C
    in (−2, 4). ``side``: 'upper' or 'lower'. ``version``: 'printed' is B = AC − A, 'corrected' B = AC − C.
    """
    generator = np.random.default_rng(FIRST)
    sign = {"upper": 1.0, "lower": -1.0}[side]
    factor, c = generator.uniform(0.2, 3, size=trials), generator.uniform(-2, 4, size=trials)
    b = factor * c - {"printed": factor, "corrected": c}[version]
    start, length = generator.normal(size=trials) * 2, generator.integers(1, 9, size=trials)
    loose = (generator.random(trials) < 0.5) * slack
    value, excess = start.copy(), np.full(trials, -np.inf)
    for t in range(1, 9):
        value = factor * value + b - sign * loose * generator.exponential(size=trials)
        bound = factor**t * (start + c) - c
        size = 1 + np.abs(value) + factor**t * (np.abs(start) + np.abs(c))
        excess = np.where(t <= length, np.maximum(excess, sign * (value - bound) / size), excess)
    return Sequences(factor, c, excess)


def sequence(factor: float, b: float, start: float, steps: int) -> Array:
    """The sequence :math:`a_{t+1} = Aa_t + B`, (steps + 1,)."""
    values = [start]
    for _ in range(steps):
        values.append(factor * values[-1] + b)
    return np.array(values)


# ---- what claims rest on -------------------------------------------------------------------------


def preactivation_step(part: str, correlation: float = 0.0, trials: int = 2000) -> Tested:
    """Largest difference between the change of ⟨w_j, x_k⟩ in a step of gradient descent and the lemma's formula (part
    'inactive': its change where it is not positive), relative to ‖w_j‖ + ‖the change of w_j‖. Inputs with equal
    correlations are the control.
    """
    worst, cases = 0.0, 0
    for net, p in draws(trials, correlation=correlation):
        pre, new = net.w @ p.x.T, step(net, p)
        change = new.w @ p.x.T - pre
        if part == "inactive":
            counted, expected = pre <= 0, np.zeros_like(pre)
        else:
            error = np.maximum(pre, 0).T @ net.a - p.y
            counted, expected = np.full(pre.shape, True), -p.eta / p.n * net.a[:, None] * (pre > 0) * error
        size = np.linalg.norm(net.w, axis=1) + np.linalg.norm(new.w - net.w, axis=1)
        worst = max(worst, float((np.abs(change - expected) * counted / size[:, None]).max()))
        cases += int(counted.sum())
    inputs = f"; inputs with correlation {correlation:g}" if correlation else ""
    return Tested(worst, cases, f"pairs of a neuron and an input, {RANDOM} 2{inputs}")


def reactivations(correlation: float, sizes: Sequence[float], seeds: int = 10, steps: int = 600) -> Tested:
    """How often a neuron that was inactive on an input becomes active on it. Inputs with equal correlations are the
    control.
    """
    runs = [activity(correlation, q, seeds, steps, rotated) for q in sizes for rotated in (False, True)]
    shown = " and ".join(f"{size:g}" for size in sizes)
    on = f"pairs of a neuron and an input over {steps} steps, {seeds} seeds on unit vectors and on rotated ones, "
    return Tested(float(sum(run.reactivated for run in runs)), sum(run.pairs for run in runs), on + f"η‖d₊‖ = {shown}")


def recursion_violated(side: str, version: str, trials: int = 20000) -> Tested:
    """Share of random sequences that meet the lemma's hypothesis and violate its bound at some t."""
    found = sequences(side, version, trials)
    on = "random sequences of up to eight steps, A in (0.2, 3), C in (−2, 4), with and without slack"
    return Tested(float((found.excess > ROUNDING).mean()), trials, on)


CHECKS: dict[str, Callable[..., Tested]] = {
    **fg_balance.CHECKS,
    "preactivation_step": preactivation_step,
    "reactivations": reactivations,
    "recursion_violated": recursion_violated,
}
