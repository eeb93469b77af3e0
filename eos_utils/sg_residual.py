r"""SG, Lemmas 3.4 and 3.5: the part R of the residual across :math:`v_1`, and the sequence R′ that follows it.

With :math:`D^+ = (I - \eta M)D` and :math:`\langle v_1, v_1^+\rangle = \cos\vartheta`,

.. math:: e_1 = R^+ - (I-\eta M)R = (v_1v_1^\top - v_1^+v_1^{+\top})D^+ .

The difference of the projections has norm :math:`\sin\vartheta \le \sqrt{2\varepsilon_2}`, so that
:math:`\|e_1\| \le \sqrt{2\varepsilon_2}\max(1, B_\Lambda - 1)\|D\|`, which is sharp.

**A constant for Lemma 3.5** (ours). :math:`x = \sin\vartheta_{max}/(\eta\lambda_r)`, :math:`b = \max(1, B_\Lambda-1)`.
:math:`I - \eta M(I - v_1v_1^\top)` leaves :math:`v_1` alone, so it contracts on the complement only. For
:math:`\alpha = v_1^\top R'`, :math:`q = \|R' - \alpha v_1\|`: :math:`\|R'\|` never grows,
:math:`|\alpha^+| \le |\alpha| + q\sin\vartheta`, :math:`q^+ \le (1-\eta\lambda_r)q + |\alpha|\sin\vartheta`. While
:math:`q > 2x\|R(0)\|` it falls by the factor :math:`1 - \eta\lambda_r/2`, so that :math:`|\alpha| \le 2x\|R(0)\|`;
from then on :math:`\alpha^2 \le 4x^2\|R(0)\|^2 + q^2`. So :math:`|\alpha| \le \sqrt8\,x B_D`. The part of R − R′
across v₁ contracts and is fed by at most :math:`(|\alpha| + bB_D)\sin\vartheta` a step: it stays below
:math:`x(1+b)B_D`. Together
:math:`\|R-R'\| \le x B_D\sqrt{8+(1+b)^2} \le c_r b B_D\sqrt{\varepsilon_2}/(\eta\lambda_r)` with :math:`c_r = 2\sqrt6`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from eos_utils.fg_theory import Array, Tested
from eos_utils.sg_growth import sine
from eos_utils.sg_live import Live
from eos_utils.sg_section3 import DRAWS, orthogonal

if TYPE_CHECKING:
    import xarray as xr

C_R = 2 * math.sqrt(6)
NO_BOUND = 20.0  # decades: stands for an infinite bound, so that means over runs exist


class Residuals(NamedTuple):
    """Random single steps, arrays (trials,)."""

    largest: Array  # B_Λ
    printed: Array  # ‖e₁‖ over 6√ε₂ ‖D‖ (B_Λ − 1)
    sharp: Array  # ‖e₁‖ over √(2ε₂) max(1, B_Λ − 1) ‖D‖


@lru_cache(maxsize=8)
def residuals(trials: int, low: float = 1.0, high: float = 4.0, n: int = 4) -> Residuals:
    r"""ηΛ = B_Λ between ``low`` and ``high`` (in a quarter of the draws, less than B_Λ); v₁ turns by 1 − ε₂ or less.

    Half of the draws have D near v₁, an eighth of the rest near a direction that the step leaves alone.
    """
    generator = np.random.default_rng(DRAWS)
    bound = generator.uniform(low, high, size=trials)
    values = bound[:, None] * generator.uniform(0, 1, size=(trials, n))
    values[:, 0] = bound * np.where(generator.random(trials) < 0.25, generator.random(trials), 1)
    values[:, 1:] = np.minimum(values[:, 1:], values[:, :1])
    values[:, 1] *= generator.random(trials) < 0.5
    d = generator.normal(size=(trials, n))
    kind = generator.random(trials)
    d[kind < 0.5, 1:] *= 0.01
    d[kind > 0.75, 1] += 30
    eps = 10 ** generator.uniform(-6, -0.7, size=trials)
    turn = eps * np.where(generator.random(trials) < 0.5, 1, generator.random(trials))
    w = generator.normal(size=(trials, n - 1))
    w[kind > 0.75, 1:] *= 0.01
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    v = np.column_stack([1 - turn, sine(turn)[:, None] * w])
    new, r = (1 - values) * d, np.where(np.arange(n) > 0, d, 0)
    e = new - (new * v).sum(axis=1)[:, None] * v - (1 - values) * r
    norm, size = np.linalg.norm(e, axis=1), np.linalg.norm(d, axis=1)
    sharp = norm / (np.sqrt(2 * eps) * np.maximum(1, bound - 1) * size)
    return Residuals(bound, norm / (6 * np.sqrt(eps) * size * (bound - 1)), sharp)


class Tracking(NamedTuple):
    """Random courses of M, arrays (paths,)."""

    largest: Array  # B_Λ
    x: Array  # √ε₂/(ηλ_r)
    ratio: Array  # largest ‖R − R'‖ over B_D x max(1, B_Λ − 1)
    trivial: Array  # largest ‖R − R'‖ over B_D


@lru_cache(maxsize=8)
def tracking(paths: int, steps: int = 300, low: float = 1.0, high: float = 4.0, n: int = 4) -> Tracking:
    r"""D⁺ = (I − ηM)D while v₁ turns: at random, steadily, or so as to turn R′ into v₁; R′ beside it.

    The other eigenvalues lie between λ_r and 1/η. Λ is B_Λ/η, or 1/η for as long as |Dᵀv₁| exceeds 1, so that D stays
    bounded.
    """
    generator = np.random.default_rng(DRAWS)
    bound = generator.uniform(low, high, size=paths)
    floor = 10 ** generator.uniform(-2, -0.3, size=paths)  # ηλ_r
    angle = np.minimum(floor * 10 ** generator.uniform(-1.5, 1, size=paths), 1.2)
    spread = np.where(generator.random(paths) < 0.5, 1, 0)[:, None] * generator.random((paths, n))
    basis = orthogonal(generator, paths, n)
    inner = np.einsum("kij,kj,klj->kil", basis, floor[:, None] + (1 - floor[:, None]) * spread, basis)
    kind, stop = generator.integers(4, size=paths), generator.integers(2, steps, size=paths)
    fixed = generator.normal(size=(paths, n))
    v, d = np.tile(np.eye(n)[0], (paths, 1)), generator.normal(size=(paths, n))
    d[:, 0] *= 0.1

    def across(u: Array) -> Array:
        return u - (u * v).sum(axis=1)[:, None] * v

    r, b_d, apart, eps = across(d), np.linalg.norm(d, axis=1), np.zeros(paths), np.zeros(paths)
    for t in range(steps):
        moved = across(np.einsum("kij,kj->ki", inner, across(d)))
        along = (d * v).sum(axis=1)[:, None] * v
        top = np.where(np.abs((d * v).sum(axis=1)) > 1, np.minimum(1, bound), bound)
        shrunk = across(r) - across(np.einsum("kij,kj->ki", inner, across(r)))
        d, r = d - moved - top[:, None] * along, r - across(r) + shrunk
        choices = np.array([generator.normal(size=(paths, n)), fixed, shrunk, across(d) * (-1) ** t])
        w = across(choices[kind, np.arange(paths)])
        size = np.linalg.norm(w, axis=1)
        now = angle * (t < stop) * (size > 1e-100)
        v = np.cos(now)[:, None] * v + (np.sin(now) / np.maximum(size, 1e-100))[:, None] * w
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        eps = np.maximum(eps, 1 - np.cos(now))
        b_d = np.maximum(b_d, np.linalg.norm(d, axis=1))
        apart = np.maximum(apart, np.linalg.norm(across(d) - r, axis=1))
    x = np.sqrt(eps) / floor
    return Tracking(bound, x, apart / (b_d * x * np.maximum(1, bound - 1)), apart / b_d)


class Constants(NamedTuple):
    """What Lemma 3.5 is fed with along a live run, and the bound with ``C_R``."""

    b: float  # B_Λ
    b_d: float
    eps: float  # ε₂
    least: float  # smallest λ_min(M) / Λ
    second: float  # largest ηλ₂
    bound: float


def constants(run: Live) -> Constants:
    """Measured over the whole run; the bound is infinite where the smallest eigenvalue is 0 to rounding."""
    v = run.vectors[:, :, 0]
    b, b_d = float((run.eta * run.values[:, 0]).max()), float(np.linalg.norm(run.d, axis=1).max())
    # 1 − cos ϑ from the difference, which does not cancel.
    eps = float((np.linalg.norm(np.diff(v, axis=0), axis=1) ** 2 / 2).max())
    least = float((run.values[:, -1] / run.values[:, 0]).min())
    smallest = run.eta * float(run.values[:, -1].min())
    bound = C_R * max(1.0, b - 1) * b_d * math.sqrt(eps) / smallest if least > 1e-12 else math.inf
    return Constants(b, b_d, eps, least, float((run.eta * run.values[:, 1]).max()), bound)


# ---- what claims rest on -------------------------------------------------------------------------


def residual_violated(version: str, low: float = 1.0, trials: int = 20000) -> Tested:
    """Share of random steps in which ‖e₁‖ exceeds the bound (as printed; the sharp form), for B_Λ from ``low`` to 4."""
    found = residuals(trials, low)
    ratio = found.printed if version == "printed" else found.sharp
    on = f"random steps with B_Λ in ({low:g}, 4), ε₂ in (1e-6, 0.2), four directions"
    return Tested(float((ratio > 1 + 1e-9).mean()), trials, on)


def tracking_ratio(paths: int = 2000, steps: int = 300, scale: float = 1.0) -> Tested:
    """Largest ‖R − R′‖ over the lemma's bound with c_r = 2√6 max(1, 1/(B_Λ − 1)). A scale below 1 is the control."""
    found = tracking(paths, steps)
    on = f"courses of M over {steps} steps, B_Λ in (1, 4), ηλ_r in (0.01, 0.5), v₁ turning in four ways"
    return Tested(float(found.ratio.max() / (C_R * scale)), paths, on)


CHECKS: dict[str, Callable[..., Tested]] = {"residual_violated": residual_violated, "tracking_ratio": tracking_ratio}

# ---- recorded runs -------------------------------------------------------------------------------


def smallest_decades(run: xr.Dataset) -> float:
    """How many decades the smallest eigenvalue of M lies below the largest, at the worst recorded step; at most 16."""
    share = run["smallest"].values / run["gram_eigenvalue"].values[:, 0]
    return float(min(16.0, -np.log10(max(share.min(), 1e-16))))


def bound_decades(run: xr.Dataset, c_r: float = C_R) -> float:
    """log₁₀ of Lemma 3.5's bound over the largest ‖R‖, with the run's own constants: it says something below 0.

    B_Λ, B_D and ε₂ are the largest over the run, λ_r the smallest recorded λ_min(M); 20 where that is 0 to rounding
    (below 10⁻¹² of Λ).
    """
    eta = run["eta"].sel(step=run["observed"]).values
    if smallest_decades(run) > 12:
        return NO_BOUND
    b = float((eta * run["sharpness"].values).max())
    eps = max(0.0, 1 - float(np.nanmin(run["turn"].values)))
    lowest = float(eta.min() * run["smallest"].values.min())
    bound = c_r * max(1.0, b - 1) * math.sqrt(float(run["norm_D2"].max()) * eps) / lowest
    return min(NO_BOUND, math.log10(max(bound, 1e-300) / math.sqrt(float(run["norm_R2"].max()))))


STATISTICS: dict[str, Callable[..., float]] = {"smallest_decades": smallest_decades, "bound_decades": bound_decades}
