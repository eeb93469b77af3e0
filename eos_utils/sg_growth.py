r"""SG, Lemma 3.2: how the residual grows along :math:`v_1` above the edge, when :math:`v_1` turns.

With :math:`D^+ = (I - \eta M)D`, :math:`R = D - v_1v_1^\top D`, :math:`\Lambda = (2+\tau)/\eta` and :math:`v_1^+ =
\cos\vartheta\,v_1 + \sin\vartheta\,w`, w ⟂ v₁,

.. math::
   v_1^{+\top}D^+ = -(1+\tau)\cos\vartheta\,v_1^\top D + \sin\vartheta\,w^\top(I-\eta M)R .

For :math:`\cos\vartheta \ge 1 - \varepsilon_2` the sine is up to :math:`\sqrt{2\varepsilon_2-\varepsilon_2^2}`. So the
printed factor :math:`(1+\tau)(1-\varepsilon_2-1/c)` follows from :math:`|D^\top v_1| \ge c\sqrt{2\varepsilon_2}\|D\|`.
Assumption 3.6, which asks for :math:`c\varepsilon_2\|D\|`, is too little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from eos_utils.fg_theory import Array, Tested
from eos_utils.sg_live import Live, parts
from eos_utils.sg_section3 import DRAWS, ROUNDING


def sine(eps: Array | float) -> Array:
    """The sine of the angle whose cosine is 1 − ε₂."""
    return np.sqrt(np.asarray(2 * eps - eps**2))


def factor(tau: Array | float, eps: Array | float, c: Array | float) -> Array:
    """The printed factor (1 + τ)(1 − ε₂ − 1/c)."""
    return np.asarray((1 + tau) * (1 - eps - 1 / c))


def worst_growth(tau: float, eps: float, share: Array, rest: float = 1.0) -> Array:
    """The least |D'ᵀv₁'|/|Dᵀv₁| over all turns by 1 − ε₂, for |Dᵀv₁| = ``share`` · ‖D‖ and R in one direction,
    which the step multiplies by ``rest``.
    """
    tangent = np.sqrt(1 - share**2) / share
    return np.maximum(0, (1 + tau) * (1 - eps) - sine(eps) * rest * tangent)


class Growth(NamedTuple):
    """Random single steps that meet the hypotheses of Lemma 3.2, arrays (trials,)."""

    eps: Array
    c: Array
    tau: Array
    claimed: Array  # the factor
    grown: Array  # |D'ᵀv₁'|/|Dᵀv₁|


@lru_cache(maxsize=8)
def growths(version: str, trials: int, n: int = 4) -> Growth:
    r"""Assumption 3.6 as ``printed``, |Dᵀv₁| ≥ cε₂‖D‖, or with its ``root``, c√(2ε₂), equal in half of the draws.

    The basis is that of M's eigenvectors; λ₂, ... anywhere below Λ; v₁ turns at random or so as to lose the most.
    """
    generator = np.random.default_rng(DRAWS)
    eps = 10 ** generator.uniform(-5, -1.3, size=trials)
    small = eps if version == "printed" else np.sqrt(2 * eps)
    least = 1.01 / (1 - eps)
    c = least * (0.999 / small / least) ** generator.uniform(0, 1, size=trials)
    tau = (1 / (1 - eps - 1 / c) - 1) * (1 + 1e-6) + generator.exponential(0.3, size=trials) + 1e-6
    share = np.minimum(c * small * (1 + (generator.random(trials) < 0.5) * generator.exponential(size=trials)), 0.9999)
    rest = generator.normal(size=(trials, n - 1))
    rest *= (np.sqrt(1 - share**2) / np.linalg.norm(rest, axis=1))[:, None]
    scaled = (2 + tau)[:, None] * generator.uniform(0, 1, size=(trials, n - 1)) ** generator.choice(
        [0.1, 1, 8], (trials, 1)
    )
    new, moved = -(1 + tau) * share, (1 - scaled) * rest
    w = generator.normal(size=(trials, n - 1))
    worst = generator.random(trials) < 0.5
    w[worst] = (-np.sign(new)[:, None] * moved)[worst]
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    turn = eps * np.where(generator.random(trials) < 0.5, 1, generator.random(trials))
    grown = np.abs((1 - turn) * new + sine(turn) * (w * moved).sum(axis=1)) / share
    return Growth(eps, c, tau, factor(tau, eps, c), grown)


class Walk(NamedTuple):
    """Many steps in the plane of v₁ and a second direction; arrays (times + 1, trials)."""

    along: Array  # |Dᵀv₁|
    norm: Array  # ‖D‖


def walk(share: Array, tau: Array, turn: Array, rest: Array) -> Walk:
    r"""‖D(0)‖ = 1, |Dᵀv₁| = ``share``; steps with τ (times, trials), then turns of v₁ by ``turn`` (times, trials):
    positive ones lead away from D. The step multiplies the other component by ``rest`` (trials,), 1 − ηλ₂.
    """
    d, r = share, np.sqrt(1 - share**2)
    path = [(d, np.hypot(d, r))]
    for t in range(len(tau)):
        d, r = (1 + tau[t]) * np.abs(d), rest * np.abs(r)
        d, r = d * np.cos(turn[t]) - r * np.sin(turn[t]), r * np.cos(turn[t]) + d * np.sin(turn[t])
        path.append((np.abs(d), np.hypot(d, r)))
    along, norm = zip(*path, strict=True)
    return Walk(np.array(along), np.array(norm))


class Courses(NamedTuple):
    """Random starts of courses that meet the hypotheses of Lemma 3.2 with √(2ε₂), arrays (trials,)."""

    eps: Array
    c: Array
    share: Array  # |Dᵀv₁|/‖D‖, equal to c√(2ε₂)
    tau: Array
    rest: Array  # 1 − ηλ₂
    steady: Array  # 1 where v₁ always turns away from D, 0 where it turns to random sides

    def turns(self, times: int) -> Array:
        """The angles by which v₁ turns, (times, trials)."""
        sides = np.random.default_rng(DRAWS).choice([-1.0, 1.0], size=(times, len(self.eps)))
        return np.where(self.steady > 0, 1.0, sides) * np.arccos(1 - self.eps)


def courses(trials: int) -> Courses:
    """In half of the draws |Dᵀv₁| is the larger part of D, and τ little more than what the lemma asks for."""
    generator = np.random.default_rng(DRAWS)
    eps, large = 10 ** generator.uniform(-5, -1.5, size=trials), generator.random(trials) < 0.5
    root = np.sqrt(2 * eps)
    least = 1.5 / (1 - eps)
    spread = np.where(large, generator.uniform(0.7, 1, size=trials), generator.uniform(0, 1, size=trials))
    c = least * (0.98 / root / least) ** spread
    beyond = np.where(large, 1e-3 + 0.1 * generator.random(trials), generator.exponential(0.3, size=trials) + 1e-3)
    tau = (1 / (1 - eps - 1 / c) - 1) * (1 + beyond)
    rest = np.where(generator.random(trials) < 0.5, 1, generator.uniform(0, 1, size=trials))
    return Courses(eps, c, c * root, tau, rest, (generator.random(trials) < 0.5).astype(float))


def worst_walk(eps: float, c: float, tau: float, steps: int) -> Walk:
    """Assumption 3.6 with √(2ε₂) and equality at the start; λ₂ = 0, and v₁ always turns away from D, by 1 − ε₂."""
    one = np.ones((steps, 1))
    return walk(np.array([c * math.sqrt(2 * eps)]), tau * one, math.acos(1 - eps) * one, np.ones(1))


def growth_counts(run: Live) -> dict[str, int]:
    """Steps with Λ > 2/η at which the hypotheses of Lemma 3.2 hold for some c, and those that miss its factor.

    ε₂ is the largest along the stretch above 2/η; c is as large as |Dᵀv₁| allows at the step, as ``printed`` or with
    the ``root``. ``beyond``: missed by more than the error of Assumption 3.2 explains.
    """
    found, above = parts(run), run.scaled[:-1] > 1
    eps, first = np.zeros(len(above)), 0
    for t in range(len(above) + 1):
        if t == len(above) or not above[t]:
            eps[first:t] = 1 - np.sqrt(1 - np.max(found.turn[first:t], initial=0) ** 2)
            first = t + 1
    along, norm = np.abs(np.einsum("ti,ti->t", run.d, run.vectors[:, :, 0])), np.linalg.norm(run.d, axis=1)
    tau, counts = 2 * run.scaled[:-1] - 2, {"above": int(above.sum())}
    for version, small in (("printed", eps), ("root", np.sqrt(2 * eps))):
        with np.errstate(divide="ignore", invalid="ignore"):
            c = along[:-1] / (small * norm[:-1])
            claimed = factor(tau, eps, c)
        met = above & (c > 1) & (claimed > 1)
        missed = met & (found.grown < claimed)
        beyond = missed & (found.grown < claimed - found.slack * (1 + 1e-6) - 1e-9)
        counts |= {
            version: int(met.sum()),
            f"{version} missed": int(missed.sum()),
            f"{version} beyond": int(beyond.sum()),
        }
    return counts


# ---- what claims rest on -------------------------------------------------------------------------


@lru_cache(maxsize=8)
def growth_missed(version: str, trials: int = 20000) -> Tested:
    """Share of random steps meeting the lemma's hypotheses in which |Dᵀv₁| grows by less than the claimed factor."""
    found = growths(version, trials)
    share = (found.grown < found.claimed * (1 - 1e-9)).mean()
    on = "random steps with ε₂ in (1e-5, 0.05), all admissible c, four directions, half with the turn that costs most"
    return Tested(float(share), trials, on)


@lru_cache(maxsize=8)
def growth_persists(when: str, trials: int = 20000, times: int = 60) -> Tested:
    """Share of random courses with a steady τ that the lemma allows in which |Dᵀv₁| grows by less than the factor at
    some step, where Assumption 3.6 with √(2ε₂) holds at the start; at every step; or at the start, with room for turns.
    """
    draw = courses(trials)
    found = walk(draw.share, np.tile(draw.tau, (times, 1)), draw.turns(times), draw.rest)
    needed = draw.c * np.sqrt(2 * draw.eps) * (1 - ROUNDING)
    held = np.logical_and.accumulate(found.along[:-1] >= needed * found.norm[:-1], axis=0)
    missed: Any = found.along[1:] < found.along[:-1] * factor(draw.tau, draw.eps, draw.c) * (1 - 1e-9)
    missed &= held if when == "every step" else True
    start = np.arcsin(draw.share)
    room = np.arctan((1 + draw.tau) * np.tan(start)) - np.arccos(1 - draw.eps) >= start
    counted: Any = room if when == "start with room" else np.full(trials, True)
    on = f"courses of {times} steps in a plane, v₁ turning always away from D or to random sides"
    return Tested(float(missed.any(axis=0)[counted].mean()), int(counted.sum()), on)


@lru_cache(maxsize=8)
def growth_exceeds(excess: str, trials: int = 20000, times: int = 300) -> Tested:
    """Share of random courses with Λ > 2/η throughout in which ‖D‖ never exceeds ‖Y‖: with τ falling to 0 and v₁ fixed;
    or with a steady τ that the lemma allows, v₁ turning, and Assumption 3.6 with √(2ε₂) at every step. In the latter
    ‖Y‖ has to be exceeded within the time that the factor foretells.
    """
    generator, draw = np.random.default_rng(DRAWS + 1), courses(trials)
    share, y = draw.share, 10 ** generator.uniform(0.3, 3, size=trials)  # ‖D‖ = 1 at the start
    if excess == "falling":
        share = np.minimum(share, 0.01)
        tau, turns = generator.uniform(0, 1, trials) / (1 + np.arange(times)[:, None]) ** 2, np.zeros((times, trials))
        found, on = walk(share, tau, turns, draw.rest), f"courses of {times} steps, τ(t) = τ(0)/(1 + t)², v₁ fixed"
        return Tested(float((found.norm <= y).all(axis=0).mean()), trials, on)
    tau = draw.tau + 0.1
    found = walk(share, np.tile(tau, (times, 1)), draw.turns(times), draw.rest)
    last = np.ceil(np.log(y / share) / np.log(factor(tau, draw.eps, draw.c))).astype(int) + 1
    until = np.arange(times)[:, None] < last
    needed = draw.c * np.sqrt(2 * draw.eps) * (1 - ROUNDING)
    held: Any = ((found.along[:-1] >= needed * found.norm[:-1]) | ~until).all(axis=0) & (last <= times)
    missed: Any = ((found.norm[1:] <= y) | ~until).all(axis=0)
    return Tested(float(missed[held].mean()), int(held.sum()), "courses in a plane, τ steady, v₁ turning")


CHECKS: dict[str, Callable[..., Tested]] = {
    "growth_missed": growth_missed,
    "growth_persists": growth_persists,
    "growth_exceeds": growth_exceeds,
}
