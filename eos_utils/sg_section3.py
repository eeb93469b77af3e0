r"""SG, section 3.3: Lemma 3.1 with Propositions 3.1 and 3.2, Lemma 3.3.

:math:`D = F - Y` is the residual, M = (2/n) JJᵀ the Gram matrix, A the output layer. Three facts carry the module.

**Sign.** :math:`D^\top F = \|F - Y/2\|^2 - \|Y\|^2/4`: it is negative exactly where F lies inside of the sphere over
the segment from 0 to Y. Under the flow :math:`\dot D = -MD` with fixed eigenvectors and F(0) = 0, with
:math:`s_i = \int\lambda_i`, :math:`z_i = v_i^\top Y`: :math:`D_i = -e^{-s_i}z_i`, :math:`F_i = (1 - e^{-s_i})z_i`.

**Output layer.** A step of gradient descent moves A by :math:`-\frac{2\eta}n H^\top D`, H the features (n, m): exactly,
:math:`\Delta\|A\|^2 = -\frac{4\eta}n D^\top F + \frac{2\eta^2}n D^\top M_A D` with :math:`M_A = \frac2n HH^\top`.

**Turning eigenvectors.** With :math:`\dot v_i = \sum_j\omega_{ij}v_j`, ω antisymmetric, the components obey
:math:`\dot D_i = -\lambda_i D_i + \sum_j\omega_{ij}D_j`, :math:`\dot F_i = -\lambda_i D_i + \sum_j\omega_{ij}F_j`.
Assumption 3.5(ii), :math:`F^\top\dot v_i < \lambda_i D_i`, says :math:`\dot F_i < 0`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.linalg import expm

from eos_utils.fg_theory import Array, Tested
from eos_utils.sg_live import FIRST, live

if TYPE_CHECKING:
    pass

DRAWS = 200  # of random draws; 100 was used while the checks were written, before the rules
ROUNDING = 1e-12
PIECES = 12  # of a flow with piecewise constant M

# ---- Lemma 3.1 -----------------------------------------------------------------------------------


def orthogonal(generator: np.random.Generator, trials: int, n: int) -> Array:
    """Random orthogonal matrices, (trials, n, n)."""
    return np.linalg.qr(generator.normal(size=(trials, n, n)))[0]


@lru_cache(maxsize=8)
def flows(trials: int, turning: bool = False, zero: bool = True, n: int = 5) -> Array:
    r""":math:`D^\top F/\|Y\|^2` at the ends of the pieces of random flows, (trials, PIECES + 1).

    M is constant on each piece, with eigenvalues between 0 (a fifth of them) and 3, and acts through the exponential
    of the matrix, not through the formula for D_i. ``turning``: each piece has eigenvectors of its own. Labels ±1;
    ``zero``: F(0) = 0, else random outputs of the size of Y.
    """
    generator = np.random.default_rng(DRAWS)
    y = generator.choice([-1.0, 1.0], size=(trials, n))
    d = -y + (0 if zero else generator.normal(size=(trials, n)))
    basis, found = orthogonal(generator, trials, n), []
    for _ in range(PIECES + 1):
        found.append(np.einsum("ki,ki->k", d, d + y) / n)
        values = 10 ** generator.uniform(-2, 0.5, size=(trials, n)) * (generator.random((trials, n)) > 0.2)
        values[:, 0] += 0.01  # M is not 0
        decay = np.exp(-values * generator.uniform(0.05, 1, size=(trials, 1)))
        d = np.einsum("kij,kj->ki", basis, decay * np.einsum("kji,kj->ki", basis, d))
        basis = orthogonal(generator, trials, n) if turning else basis
    return np.array(found).T


def planar(angles: list[float], ratio: float, times: int = 60) -> Array:
    r"""F along a flow in the plane with Y = (1, 0) and F(0) = 0, (len(angles) · times + 1, 2).

    M has eigenvalues 1 and ``ratio``, the first along the direction at the given angle, for eight units of time each.
    """
    y, path = np.array([1.0, 0]), [np.zeros(2)]
    for angle in angles:
        v = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        start = path[-1] - y
        for t in np.linspace(0, 8, times + 1)[1:]:
            path.append(y + v.T @ (np.exp(-t * np.array([1, ratio])) * (v @ start)))
    return np.array(path)


class Turning(NamedTuple):
    """Flows whose eigenvectors turn at constant rates: (trials, times, n) components along them, and the condition."""

    d: Array
    f: Array
    condition: Array  # (trials, times) bool: Assumption 3.5(ii) has held so far


def turning(values: Array, omega: Array, start: Array, time: float, times: int) -> Turning:
    r"""The flow for eigenvalues (trials, n), ω (trials, n, n) antisymmetric, from D_i = ``start`` and F = 0."""
    trials, n = values.shape
    diagonal = values[:, :, None] * np.eye(n)
    matrix = np.block([[omega - diagonal, np.zeros_like(omega)], [-diagonal, omega]])
    step = expm(matrix * (time / times))
    state, path = np.concatenate([start, np.zeros_like(start)], axis=1), []
    for _ in range(times + 1):
        path.append(state)
        state = np.einsum("kij,kj->ki", step, state)
    whole = np.array(path).transpose(1, 0, 2)
    d, f = whole[..., :n], whole[..., n:]
    falling = np.einsum("kij,ktj->kti", omega, f) < values[:, None] * d
    return Turning(d, f, np.logical_and.accumulate(falling.all(axis=2), axis=1))


def by_hand(times: int = 2000) -> Turning:
    """Three directions, eigenvalues 0.1, 0.01 and 10; v₁ turns towards v₂ and v₂ towards v₃ at rate 1, up to time 4."""
    omega = np.array([[[0.0, 1, 0], [-1, 0, 1], [0, -1, 0]]])
    start = np.array([[5.0, 1, 1]]) / np.sqrt(27)
    return turning(np.array([[0.1, 0.01, 10]]), omega, start, 4.0, times)


@lru_cache(maxsize=8)
def turnings(trials: int) -> Turning:
    """Random flows in three directions: half at random, half near the one found by hand. All start with D_i > 0."""
    generator = np.random.default_rng(DRAWS)
    near = generator.random(trials) < 0.5
    wide = 10 ** generator.uniform(-2, 0.5, size=(trials, 3))
    close = np.array([0.1, 0.01, 10]) * 10 ** generator.uniform(-0.3, 0.3, size=(trials, 3))
    rates = np.where(near[:, None], [1, 0, 1], 0) + generator.normal(size=(trials, 3)) * np.where(near, 0.1, 1)[:, None]
    omega = np.zeros((trials, 3, 3))
    omega[:, 0, 1], omega[:, 0, 2], omega[:, 1, 2] = rates.T
    start = np.where(near[:, None], [5, 1, 1], 1) * 10 ** generator.uniform(-0.3, 0.3, size=(trials, 3))
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    return turning(np.where(near[:, None], close, wide), omega - omega.transpose(0, 2, 1), start, 4.0, 100)


# ---- Propositions 3.1 and 3.2 --------------------------------------------------------------------


class OutputSteps(NamedTuple):
    """Random states with ‖D‖ > ‖Y‖ and what a step does to ‖A‖²; arrays (trials,)."""

    first_order: Array  # −(4η/n) DᵀF
    exact: Array  # ‖A'‖² − ‖A‖²
    bound: Array  # −(4η/n)(‖D‖ − ‖Y‖)²
    size: Array  # ηλmax(M_A)
    room: Array  # 2‖Y‖(‖D‖ − ‖Y‖)/‖D‖², below which ηλmax(M_A) leaves the bound valid


@lru_cache(maxsize=8)
def output_steps(trials: int, n: int = 6, m: int = 4) -> OutputSteps:
    r"""Features H (n, m), one column of them near Y, output weights A, and a step with ηλmax(M_A) up to 2.

    The step of the output layer depends on the rest of the network through H alone, so H is any matrix. In half of the
    draws F is close to a negative multiple of Y, where :math:`D^\top F` is least for its ‖D‖.
    """
    generator = np.random.default_rng(DRAWS)
    y = generator.choice([-1.0, 1.0], size=(trials, n))
    h = generator.normal(size=(trials, n, m)) * 10 ** generator.uniform(-1, 1, size=(trials, 1, 1))
    scale = 10 ** generator.uniform(-1, 1, size=(trials, 1))
    h[:, :, 0] = scale * (y + 0.1 * generator.normal(size=(trials, n)))
    a = generator.normal(size=(trials, m)) * 10 ** generator.uniform(-1, 1, size=(trials, 1))
    a[:, 1:] *= np.where(generator.random((trials, 1)) < 0.5, 1, 1e-3)
    wanted = 10 ** generator.uniform(-2, 1.5, size=trials)  # DᵀF > 0 from here on: A is scaled so that ‖D‖ > ‖Y‖
    f = np.einsum("kij,kj->ki", h, a)
    factor = np.sqrt(n) * (2 + wanted) / np.linalg.norm(f, axis=1)
    towards = np.einsum("ki,ki->k", f, y) > 0
    opposite = np.where(towards, -1, 1) * np.sqrt(n) * (0.3 + wanted) / np.linalg.norm(f, axis=1)
    a *= np.where(generator.random(trials) < 0.5, factor, opposite)[:, None]
    d = np.einsum("kij,kj->ki", h, a) - y
    m_a = 2 / n * np.linalg.norm(h, 2, axis=(1, 2)) ** 2
    size = 10 ** generator.uniform(-3, np.log10(2), size=trials)
    eta, norm = size / m_a, np.linalg.norm(d, axis=1)
    new = a - 2 * eta[:, None] / n * np.einsum("kij,ki->kj", h, d)
    kept = norm > 1.001 * np.sqrt(n)
    steps = (
        -4 * eta / n * np.einsum("ki,ki->k", d, d + y),
        (new**2).sum(axis=1) - (a**2).sum(axis=1),
        -4 * eta / n * (norm - np.sqrt(n)) ** 2,
        size,
        2 * np.sqrt(n) * (norm - np.sqrt(n)) / norm**2,
    )
    return OutputSteps(*(column[kept] for column in steps))


def one_neuron(eta: float, w: float = 3.0, a: float = 1.0, y: float = 1.0) -> tuple[float, float, float]:
    """f = a w on the input 1: Δa² of gradient descent, its first order, and the bound of Proposition 3.2."""
    d = a * w - y
    return (a - 2 * eta * w * d) ** 2 - a**2, -4 * eta * d * a * w, -4 * eta * (abs(d) - abs(y)) ** 2


class Drops(NamedTuple):
    """Steps with ‖D‖ > ‖Y‖ of a live run that survives them, and how many violate Proposition 3.2's bound."""

    start: float  # Λ(0)η/2
    steps: int
    violations: int
    survives: bool
    size: float  # the largest ηλmax(M_A) among them
    identity: float  # largest deviation from the exact formula for Δ‖A‖², relative to its terms


def drops(activation: str, start: float, output: float = 3.0, steps: int = 100, seed: int = FIRST) -> Drops:
    """Proposition 3.2 along gradient descent, from large outputs."""
    run = live(activation, start, steps, seed=seed, output=output)
    n, norm = len(run.y), np.linalg.norm(run.d[:-1], axis=1)
    change, y = np.diff(run.a2), np.sqrt(len(run.y))
    first, second = -4 * run.eta / n * run.df[:-1], 2 * run.eta**2 / n * run.quadratic[:-1]
    above = norm > y
    broken = above & (change >= -4 * run.eta / n * (norm - y) ** 2)
    off = np.abs(change - first - second) / (np.abs(first) + second + run.a2[:-1])
    largest = float((run.eta * run.output[:-1] * above).max(initial=0))
    return Drops(start, int(above.sum()), int(broken.sum()), len(run.d) == steps + 1, largest, float(off.max()))


# ---- what claims rest on -------------------------------------------------------------------------


def flow_sign(at_zero: bool, fixed: bool = True, zero: bool = True, trials: int = 5000) -> Tested:
    """Share of random flows with DᵀF ≥ 0 at some time. Flows whose eigenvectors jump, or that do not start at F = 0,
    are the controls.
    """
    share = (flows(trials, not fixed, zero)[:, 0 if at_zero else 1 :] >= 0).any(axis=1).mean()
    on = f"random flows in five directions, {PIECES} spectra each, some eigenvalues 0"
    return Tested(float(share), trials, on + (", t = 0 included" if at_zero else ", t > 0"))


@lru_cache(maxsize=8)
def turning_sign(sign_rule: bool, trials: int = 5000) -> Tested:
    """Share of random flows with turning eigenvectors in which DᵀF > 0 at a time up to which Assumption 3.5(ii) has
    held throughout (and all D_i have stayed positive, if the sign rule asks for it).
    """
    found = turnings(trials)
    met = found.condition.astype(bool)
    if sign_rule:
        met &= np.logical_and.accumulate((found.d > 0).all(axis=2), axis=1)
    positive = np.einsum("kti,kti->kt", found.d, found.f) > 1e-9
    cases = int(met[:, 1].sum())
    on = "flows in three directions with constant rates of turning, half of them near the one found by hand"
    return Tested(float((met & positive).any(axis=1).sum() / cases), cases, on)


def sign_above(ratio: float, trials: int = 5000) -> Tested:
    """Share of random vectors with DᵀF ≤ 0 among those with ‖D‖ above ratio · ‖Y‖; a ratio below 1 is the control."""
    generator = np.random.default_rng(DRAWS)
    y = generator.choice([-1.0, 1.0], size=(trials, 5))
    d = generator.normal(size=(trials, 5)) - generator.choice([0.0, 3.0], size=(trials, 1)) * y
    near = generator.random(trials) < 0.3
    d[near] = -y[near] + 0.05 * generator.normal(size=(int(near.sum()), 5))
    size = ratio * (1 + 10 ** generator.uniform(-6, 1, size=trials)) * np.sqrt(5)
    d *= (size / np.linalg.norm(d, axis=1))[:, None]
    share = (np.einsum("ki,ki->k", d, d + y) <= 0).mean()
    return Tested(float(share), trials, "random vectors in five dimensions, a third of them near −Y")


def drop_violated(step: str, trials: int = 5000) -> Tested:
    """Share of random states with ‖D‖ > ‖Y‖ in which the step (to first order; of gradient descent; of gradient descent
    with a small M_A) does not decrease ‖A‖² by more than the bound.
    """
    found = output_steps(trials)
    change = found.first_order if step == "first order" else found.exact
    counted = found.size < found.room if step == "small M_A" else np.full(len(change), True)
    share = (change >= found.bound)[counted].mean()
    return Tested(float(share), int(counted.sum()), "random features, output weights and step sizes, six examples")


def contraction_violated(power: int, trials: int = 5000) -> Tested:
    """Share of random vectors u and matrices M below the edge with ‖(I − ηM)u‖ > (1 − ηα)^power ‖u‖; some of them
    are eigenvectors, for which the bound is an equality.
    """
    generator = np.random.default_rng(DRAWS)
    top = generator.uniform(0.05, 2, size=trials)  # Λη
    values = top[:, None] * generator.uniform(0, 1, size=(trials, 4)) ** generator.choice(
        [0.02, 1, 3], size=(trials, 1)
    )
    values[:, 0] = top
    u = generator.normal(size=(trials, 4))
    kind = generator.integers(3, size=trials)
    u[kind == 1] = np.eye(4)[0]
    least = values.argmin(axis=1)
    u[kind == 2] = np.eye(4)[least[kind == 2]]
    alpha = np.minimum(2 - top, values.min(axis=1))
    bound = (1 - alpha) ** power * np.linalg.norm(u, axis=1)
    share = (np.linalg.norm((1 - values) * u, axis=1) > bound * (1 + ROUNDING) + ROUNDING).mean()
    return Tested(float(share), trials, "random spectra with Λη in (0.05, 2), in the basis of the eigenvectors")


CHECKS: dict[str, Callable[..., Tested]] = {
    "flow_sign": flow_sign,
    "turning_sign": turning_sign,
    "sign_above": sign_above,
    "drop_violated": drop_violated,
    "contraction_violated": contraction_violated,
}
