r"""FG, Lemma A.1: how long the network stays small and balanced, measured on many networks at once.

:math:`\tau(A,B)` is the first step at which some neuron has :math:`\|w\| > A\lambda`, or :math:`|a| > A\lambda`, or
:math:`\|w\|-|a| > B\lambda`, or another sign of its output weight than at the start (equation 4). With
:math:`L = \|d_+\| + mA^2\lambda^2` and :math:`x = \eta L < 1` the lemma bounds it below by the largest of

.. math:: \frac1x\ln\frac{A}{1+B}, \qquad \frac1x\ln\frac{B+1}{B}, \qquad \frac1{x^2}\ln\frac{A^2}{A^2-B^2} .

Shapes: ``y`` (R, n), ``w`` (R, m, d), ``a`` (R, m) for R networks; the inputs are the first n unit vectors of d
dimensions, which is no restriction, since the dynamics commute with rotations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eos_utils.fg_theory import Array, Tested

Flags = NDArray[np.bool_]

# Positive and negative labels, width, dimensions.
SHAPES = ((1, 1, 10, 2), (2, 1, 20, 3), (1, 2, 20, 5), (2, 2, 40, 4), (3, 2, 60, 8))


class Batch(NamedTuple):
    """Networks at their start, all of one shape. ``scale`` is λ; ``x`` the product ηL; each (R,)."""

    y: Array
    w: Array
    a: Array
    eta: Array
    scale: Array
    x: Array
    A: Array
    B: Array

    @property
    def sizes(self) -> tuple[Array, Array]:
        r""":math:`\|d_+\|` and :math:`\|d_-\|`, each (R,)."""
        n = self.y.shape[1]
        plus, minus = (np.sqrt((np.maximum(s * self.y, 0) ** 2).sum(axis=1)) / n for s in (1, -1))
        return plus, minus

    @property
    def room(self) -> Array:
        r""":math:`mA^2\lambda^2`, (R,)."""
        return self.a.shape[1] * self.A**2 * self.scale**2

    @property
    def starts(self) -> tuple[Flags, Flags]:
        r"""Which neurons are in :math:`S_{1,+}` and in :math:`S_{1,-}`, each (R, m)."""
        on = self.w[:, :, : self.y.shape[1]] > 0
        plus, minus = (((s * self.a) > 0) & (on | (s * self.y < 0)[:, None, :]).all(axis=2) for s in (1, -1))
        return plus, minus

    def of(self, which: Flags | NDArray[np.intp]) -> Batch:
        """Some of the networks."""
        return Batch(*(part[which] for part in self))

    def at(self, scale: float) -> Batch:
        """The same starts with another λ, and with the step size that leaves ηL as it is."""
        change = scale / self.scale
        other = self._replace(
            w=self.w * change[:, None, None], a=self.a * change[:, None], scale=np.full_like(self.scale, scale)
        )
        return other._replace(eta=self.x / (other.sizes[0] + other.room))


def advance(w: Array, a: Array, y: Array, eta: Array) -> tuple[Array, Array, Array]:
    """One step of gradient descent, equation (1), of all networks; also their error vectors d_j, (R, m, n)."""
    n = y.shape[1]
    pre = w[:, :, :n]
    d = (pre > 0) * ((y - (np.maximum(pre, 0) * a[:, :, None]).sum(axis=1)) / n)[:, None, :]
    moved = w.copy()
    moved[:, :, :n] += eta[:, None, None] * a[:, :, None] * d
    return moved, a + eta[:, None] * (pre * d).sum(axis=2), d


def draw(shape: tuple[int, int, int, int], count: int, seed: int, assumed: bool = True, steepest: float = 9.0) -> Batch:
    r"""Random problems, step sizes and starts that meet all hypotheses of Lemma A.1, with A and B to go with them.

    Labels :math:`\pm U(0.3, 1.5)` with :math:`1 < \|d_+\|/\|d_-\| <` ``steepest`` and both sets non-empty; ηL from
    0.02 to 0.98, B from 0.02 to 2 and A/(1+B) from 1.05 to 8, log-uniformly. In every other network the first two
    neurons point along :math:`d_+`, one with either sign: the fastest growth and the fastest decay. λ is such that
    :math:`mA^2\lambda^2\le\min|y_k|`; not so if not ``assumed``.
    """
    plus, minus, m, d = shape
    generator = np.random.default_rng((seed, *shape))
    total = 12 * count + 50

    def log_uniform(low: float, high: float) -> Array:
        return np.asarray(np.exp(generator.uniform(np.log(low), np.log(high), total)))

    y = generator.uniform(0.3, 1.5, (total, plus + minus)) * np.repeat([1.0, -1.0], [plus, minus])
    g = generator.normal(size=(total, m, d))
    s = generator.choice([-1.0, 1.0], size=(total, m))
    g[1::2, :2], s[1::2, :2] = (np.pad(np.maximum(y, 0), ((0, 0), (0, d - plus - minus)))[1::2, None], (1.0, -1.0))
    g /= np.linalg.norm(g, axis=2, keepdims=True)
    B = log_uniform(0.02, 2)
    A, x = (1 + B) * log_uniform(1.05, 8), log_uniform(0.02, 0.98)
    scale = np.sqrt(np.abs(y).min(axis=1) / m) / A * (log_uniform(1e-3, 1) if assumed else log_uniform(1, 10))
    batch = Batch(y, scale[:, None, None] * g, scale[:, None] * s, x, scale, x, A, B)
    ratio = batch.sizes[0] / batch.sizes[1]
    usable = (ratio > 1) & (ratio < steepest) & (scale < 1)
    usable &= batch.starts[0].any(axis=1) & batch.starts[1].any(axis=1)
    batch = batch._replace(eta=x / (batch.sizes[0] + batch.room)).of(usable)
    return batch.of(np.arange(len(batch.y)) < count)


def batches(trials: int, seed: int, assumed: bool = True, steepest: float = 9.0) -> list[Batch]:
    """Random networks of all of :data:`SHAPES`, equally many of each, about ``trials`` in all."""
    return [draw(shape, -(-trials // len(SHAPES)), seed, assumed, steepest) for shape in SHAPES]


def leaves(batch: Batch, w: Array, a: Array) -> Flags:
    """Which networks meet a condition of equation (4), (R,)."""
    size, a_size = np.linalg.norm(w, axis=2), np.abs(a)
    A, B = (batch.A * batch.scale)[:, None], (batch.B * batch.scale)[:, None]
    return ((size > A) | (a_size > A) | (size - a_size > B) | (np.sign(a) != np.sign(batch.a))).any(axis=1)


def terms(x: Array, A: Array, B: Array) -> Array:
    """The three terms of Lemma A.1, (3, R)."""
    return np.stack([np.log(A / (1 + B)) / x, np.log((B + 1) / B) / x, -np.log1p(-((B / A) ** 2)) / x**2])


# ---- Lemma A.1 -------------------------------------------------------------------------------------

BOUNDS = ("output", "error", "d", "growth_a", "growth_w", "one_step")


class Exits(NamedTuple):
    """What happened until the exits: their step (inf if later than tried), x = ηL, terms (3, R), ratios to the bounds.

    ``still``, ``wrong`` and ``pairs``: of ``pairs`` products :math:`\\langle d_{j,\\pm}, w_j\\rangle`, how many
    are 0 and how many have the sign that the proof excludes.
    """

    tau: Array
    x: Array
    terms: Array
    ratios: dict[str, Array]
    still: int
    wrong: int
    pairs: int


@lru_cache(maxsize=4)
def exits(trials: int, seed: int, assumed: bool) -> Exits:
    """Follows random networks until each leaves phase 1 in the sense of equation (4), and measures on the way."""
    longest = 4000 if assumed else 400  # what starts large may fit its labels and never leave
    parts = [_until_exit(batch, longest) for batch in batches(trials, seed, assumed=assumed)]
    tau, x, found = (np.concatenate(p, axis=-1) for p in zip(*((e.tau, e.x, e.terms) for e in parts), strict=True))
    ratios = {name: np.concatenate([part.ratios[name] for part in parts]) for name in BOUNDS}
    still, wrong, pairs = (int(sum(c)) for c in zip(*((e.still, e.wrong, e.pairs) for e in parts), strict=True))
    return Exits(tau, x, found, ratios, still, wrong, pairs)


def _until_exit(batch: Batch, longest: int) -> Exits:
    tau, ratios = np.full(len(batch.y), np.inf), {name: np.full(len(batch.y), -np.inf) for name in BOUNDS}
    found, alive, now, w, a = np.zeros(3, dtype=np.int64), np.arange(len(tau)), batch, batch.w, batch.a
    for t in range(longest):
        out = leaves(now, w, a)
        tau[alive[out]] = t
        alive, now, w, a = alive[~out], now.of(~out), w[~out], a[~out]
        if not len(alive):
            break
        w_next, a_next, d = advance(w, a, now.y, now.eta)
        for name, values in _against_bounds(now, w, a, d, a_next, t).items():
            ratios[name][alive] = np.maximum(ratios[name][alive], values)
        found += _signs(now, w, d)
        w, a = w_next, a_next
    return Exits(tau, batch.x, terms(batch.x, batch.A, batch.B), ratios, *map(int, found))


def _against_bounds(b: Batch, w: Array, a: Array, d: Array, a_next: Array, t: int) -> dict[str, Array]:
    """The largest ratio of what the proof bounds to its bound, (R,) each."""
    h = (np.maximum(w[:, :, : b.y.shape[1]], 0) * a[:, :, None]).sum(axis=1)
    grown, offset = ((1 + b.x) ** t * (1 + b.B) * b.scale)[:, None], (b.B * b.scale)[:, None]
    parts = (
        np.linalg.norm(d * (s * b.y > 0)[:, None, :], axis=2) / (size + b.room)[:, None]
        for s, size in zip((1, -1), b.sizes, strict=True)
    )
    per_neuron = {
        "d": np.maximum(*parts),
        "growth_a": np.abs(a) / (grown - offset),
        "growth_w": np.linalg.norm(w, axis=2) / grown,
        "one_step": np.abs(a_next - a) / (b.x[:, None] * (np.abs(a) + offset)),
    }
    per_input = {"output": np.abs(h) / b.room[:, None], "error": h / b.y}
    return {name: values.max(axis=1) for name, values in {**per_input, **per_neuron}.items()}


def _signs(b: Batch, w: Array, d: Array) -> NDArray[np.int64]:
    signed = [s * (w[:, :, : b.y.shape[1]] * d * (s * b.y > 0)[:, None, :]).sum(axis=2) for s in (1, -1)]
    products = np.stack(signed)
    return np.array([(products == 0).sum(), (products < 0).sum(), products.size])


def aligned_example(eta: float, A: float = 2.0, B: float = 0.5, scale: float = 1e-3) -> tuple[float, Array]:
    r"""Exit time and terms where :math:`y = (1,-\frac12)` and one neuron of each sign lies along its input.

    The larger one grows by the factor :math:`1+\eta/2` in each step, so that it leaves after
    :math:`\ln A/\ln(1+\eta/2)` of them.
    """
    y, w, a = np.array([[1.0, -0.5]]), scale * np.eye(2)[None], scale * np.array([[1.0, -1.0]])
    given = [np.array([value]) for value in (eta, scale, eta * (0.5 + 2 * A**2 * scale**2), A, B)]
    batch = Batch(y, w, a, *given)
    return float(_until_exit(batch, 100_000).tau[0]), terms(batch.x, batch.A, batch.B)[:, 0]


def _drawn(assumed: bool = True) -> str:
    small = "mA²λ² ≤ min|y|" if assumed else "mA²λ² > min|y|"
    return f"random runs with ηL from 0.02 to 0.98, {small}, 2 to 5 labels and 10 to 60 neurons, until their exit"


def exit_bound(which: str, trials: int, seed: int) -> Tested:
    """Share of the runs whose exit time is smaller than the largest (``which`` = max) or the smallest (min) term."""
    e = exits(trials, seed, True)
    bound = {"max": e.terms.max(axis=0), "min": e.terms.min(axis=0)}[which]
    return Tested(float((e.tau < bound).mean()), len(e.tau), _drawn())


def exits_at_start(trials: int, seed: int, stretch: float = 1.0) -> Tested:
    """Number of networks that meet a condition of equation (4) at their very start.

    ``stretch``: a control, the factor by which the input weights are longer than section 2.1 makes them.
    """
    found = [leaves(b, stretch * b.w, b.a) for b in batches(trials, seed)]
    return Tested(float(sum(f.sum() for f in found)), sum(map(len, found)), "random starts and pairs A, B")


def excess(bound: str, trials: int, seed: int, assumed: bool = True) -> Tested:
    r"""By how much the bounded quantity exceeds its bound at most, relative to the bound; negative if it stays below.

    Over all steps before the exit, all neurons and all inputs. For the sign of the error the quantity is h(x)/y, and
    its bound 1. ``assumed``: whether :math:`mA^2\lambda^2\le\min|y_k|`.
    """
    e = exits(trials, seed, assumed)
    return Tested(float(e.ratios[bound].max() - 1), len(e.tau), _drawn(assumed))


def wrong_products(strict: bool, trials: int, seed: int) -> Tested:
    r"""Share of the products ⟨d_j,₊, w_j⟩ that are not positive, and of the ⟨d_j,₋, w_j⟩ that are not negative.

    Not ``strict``: that are negative, and positive; 0 is then allowed.
    """
    e = exits(trials, seed, True)
    return Tested((e.wrong + strict * e.still) / e.pairs, e.pairs, "neurons and steps of " + _drawn())


CHECKS: dict[str, Callable[..., Tested]] = {f.__name__: f for f in (exit_bound, exits_at_start, excess, wrong_products)}
