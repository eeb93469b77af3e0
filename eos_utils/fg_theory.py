r"""The model of FG, section 2: a two-layer ReLU network on orthonormal inputs, exactly, in float64.

.. math::
   h(x) = \sum_{j=1}^m a_j \max(\langle w_j, x\rangle, 0), \qquad
   L = \frac1{2n}\sum_{k=1}^n (h(x_k) - y_k)^2, \qquad \langle x_k, x_l\rangle = \mathbb 1_{k=l}.

Gradient descent is :math:`w_j' = w_j + \eta a_j d_j,\ a_j' = a_j + \eta\langle w_j, d_j\rangle` (equation 1) with
:math:`d_j = -\frac1n\sum_k \mathbb 1_{\langle w_j,x_k\rangle>0}(h(x_k)-y_k)\,x_k`. A neuron is active where its
preactivation is positive; at 0 it is inactive (the derivative of ReLU at 0 is 0 here).

**Closed forms** (ours; :math:`d_\pm = \frac1n\sum_{\pm y_k>0} y_k x_k` as in appendix A). Let the neurons of one sign
be balanced and aligned, :math:`w_j = a_j\hat d`, with :math:`\sum a_j^2 = \sigma\,n\|d\|`: σ is the share of the labels
that is fitted. With :math:`q = \eta\|d\|`, gradient descent is exactly :math:`\sigma' = \sigma(1+q(1-\sigma))^2`, whose
flow is the logistic function of rate :math:`2q`. The Hessian's Rayleigh quotient along the :math:`v_\pm` of Theorem 3.1
is :math:`\|d\|((1+2\rho)\sigma-1)`, of which :math:`2\|d\|\rho\sigma` is the Gauss–Newton part and
:math:`\rho = (\sum|a_j|)^2/(|S|\sum a_j^2)\le 1` comes from v weighing all neurons alike.

Shapes: ``x`` (n, d) and ``y`` (n,), ``w`` (m, d) and ``a`` (m,), parameters ordered :math:`(w_1;a_1;w_2;a_2;\dots)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Tested(NamedTuple):
    """What a check of a mathematical claim found: a number that its rule judges, how many cases, and on what."""

    value: float
    trials: int
    on: str


class Network(NamedTuple):
    """Input weights ``w`` (m, d) and output weights ``a`` (m,)."""

    w: Array
    a: Array


@dataclass(frozen=True)
class Problem:
    r"""Inputs, labels and step size, with the vectors :math:`d_\pm`."""

    x: Array
    y: Array
    eta: float

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"eta={self.eta}: must be positive")
        if self.x.shape[:1] != self.y.shape or not np.all(self.y):
            raise ValueError(f"x has {len(self.x)} rows and y is {self.y}: one non-zero label for each input is needed")

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.y)

    def d(self, sign: int) -> Array:
        r""":math:`d_+` for ``sign`` = 1, :math:`d_-` for -1: (d,)."""
        return (self.y * (sign * self.y > 0)) @ self.x / self.n

    def size(self, sign: int) -> float:
        r""":math:`\|d_\pm\|`."""
        return float(np.linalg.norm(self.d(sign)))

    def q(self, sign: int) -> float:
        r""":math:`q_\pm = \eta\|d_\pm\|`, on which the dynamics of a block depends alone."""
        return self.eta * self.size(sign)


def orthonormal(n: int, d: int | None = None, seed: int | None = None) -> Array:
    """``n`` orthonormal rows in d ≥ n dimensions: the unit vectors, or a random rotation of them."""
    d = d or n
    if d < n:
        raise ValueError(f"d={d}: {n} orthonormal inputs need at least as many dimensions")
    if seed is None:
        return np.eye(n, d)
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0][:n]


def problem(labels: tuple[float, ...] | list[float], eta: float, seed: int | None = None) -> Problem:
    """Orthonormal inputs (the unit vectors, or rotated by ``seed``) with these labels."""
    return Problem(orthonormal(len(labels), seed=seed), np.array(labels, dtype=float), float(eta))


def initial(m: int, d: int, scale: float, seed: int) -> Network:
    r"""FG's initialisation: :math:`w_j = \lambda g_j`, :math:`a_j = \lambda s_j`, g uniform on the sphere, s on ±1."""
    generator = np.random.default_rng(seed)
    g = generator.normal(size=(m, d))
    return Network(scale * g / np.linalg.norm(g, axis=1, keepdims=True), scale * generator.choice([-1.0, 1.0], size=m))


def outputs(net: Network, x: Array) -> Array:
    """h(x_k), (n,)."""
    return np.maximum(x @ net.w.T, 0) @ net.a


def loss(net: Network, p: Problem) -> float:
    """L."""
    return float(((outputs(net, p.x) - p.y) ** 2).sum() / (2 * p.n))


def error_vectors(net: Network, p: Problem) -> Array:
    r""":math:`d_j`, (m, d)."""
    pre = p.x @ net.w.T
    return ((pre > 0) * (p.y - np.maximum(pre, 0) @ net.a)[:, None]).T @ p.x / p.n


def step(net: Network, p: Problem) -> Network:
    """One step of gradient descent, equation (1)."""
    d = error_vectors(net, p)
    return Network(net.w + p.eta * net.a[:, None] * d, net.a + p.eta * (net.w * d).sum(axis=1))


def descend(net: Network, p: Problem, steps: int) -> list[Network]:
    """The trajectory: ``steps`` + 1 networks, the first of which is the one given."""
    path = [net]
    for _ in range(steps):
        path.append(step(path[-1], p))
    return path


def hessian(net: Network, p: Problem) -> tuple[Array, Array]:
    r"""The Hessian of L within the activation pattern, and its Gauss–Newton part :math:`\frac1n J^\top J`.

    Both (m(d+1), m(d+1)). The rest couples :math:`w_j` with :math:`a_j` alone: its block is :math:`-d_j`.
    """
    m, d = net.w.shape
    pre = p.x @ net.w.T
    on = pre > 0
    jacobian = np.empty((p.n, m, d + 1))
    jacobian[:, :, :d] = (on * net.a)[:, :, None] * p.x[:, None, :]
    jacobian[:, :, d] = np.maximum(pre, 0)
    rows = jacobian.reshape(p.n, -1)
    gauss_newton = rows.T @ rows / p.n
    full = gauss_newton.copy().reshape(m, d + 1, m, d + 1)
    dj, j = error_vectors(net, p), np.arange(m)
    full[j, :d, j, d] -= dj
    full[j, d, j, :d] -= dj
    return full.reshape(gauss_newton.shape), gauss_newton


def aligned_set(net: Network, p: Problem, sign: int) -> Indices:
    r"""Indices of :math:`S_{1,\pm}` (Assumption 2.2): output weight of this sign, active on all of its inputs."""
    pre = p.x @ net.w.T
    return np.flatnonzero((sign * net.a > 0) & (pre[sign * p.y > 0] > 0).all(axis=0))


def direction(p: Problem, members: Indices, m: int, sign: int) -> Array:
    r""":math:`v_\pm` of Theorem 3.1: :math:`(d_\pm, \|d_\pm\|)` for the neurons of the set, 0 for the others."""
    d = p.d(sign)
    v = np.zeros((m, len(d) + 1))
    v[members] = np.append(d, np.linalg.norm(d))
    return v.reshape(-1)


def rayleigh(matrix: Array, v: Array) -> float:
    """⟨v, A v⟩ / ‖v‖²."""
    return float(v @ matrix @ v / (v @ v))


def fitted_share(net: Network, p: Problem, members: Indices, sign: int) -> float:
    r""":math:`\sigma_\pm = \sum_S a_j^2 / (n\|d_\pm\|)`, the share of the labels of one sign that S fits."""
    return float((net.a[members] ** 2).sum() / (p.n * p.size(sign)))


def evenness(net: Network, members: Indices) -> float:
    r""":math:`\rho = (\sum_S|a_j|)^2 / (|S|\sum_S a_j^2)`, at most 1, and 1 for weights of one size."""
    a = np.abs(net.a[members])
    return float(a.sum() ** 2 / (len(a) * (a**2).sum()))


def limiting_evenness(net: Network, p: Problem, members: Indices, sign: int) -> float:
    r"""ρ after the alignment, from the initialisation: :math:`|a_j|` grows in proportion to :math:`1 + \cos_j`."""
    d = sign * p.d(sign)
    c = (net.w[members] @ d) / (np.linalg.norm(net.w[members], axis=1) * np.linalg.norm(d))
    return float((1 + c).sum() ** 2 / (len(c) * ((1 + c) ** 2).sum()))


def share_path(start: float, q: float, steps: int) -> Array:
    r"""The map :math:`\sigma' = \sigma(1+q(1-\sigma))^2`, (steps + 1,)."""
    path = np.empty(steps + 1)
    path[0] = start
    for t in range(steps):
        path[t + 1] = path[t] * (1 + q * (1 - path[t])) ** 2
    return path


def seed_mass(net: Network, p: Problem, members: Indices, sign: int) -> float:
    r""":math:`s_0 = \sum_S((a_j + \langle w_j,\hat d_\pm\rangle)/2)^2`: what of the initialisation grows."""
    d = p.d(sign)
    return float((((net.a[members] + net.w[members] @ d / np.linalg.norm(d)) / 2) ** 2).sum())


def midpoint(net: Network, p: Problem, members: Indices, sign: int) -> float:
    r""":math:`\tau_\pm = \ln(n\|d_\pm\|/s_0)/(2\ln(1+q_\pm))`, when half of the labels of this sign are fitted."""
    total = p.n * p.size(sign)
    return float(np.log(total / seed_mass(net, p, members, sign)) / (2 * np.log1p(p.q(sign))))


def quotient(p: Problem, sign: int, share: Array | float, rho: float) -> Array | float:
    r""":math:`\lambda_\pm = \|d_\pm\|((1+2\rho)\sigma - 1)` on aligned balanced neurons."""
    return p.size(sign) * ((1 + 2 * rho) * share - 1)


def quotient_gauss_newton(p: Problem, sign: int, share: Array | float, rho: float) -> Array | float:
    r"""The Gauss–Newton part of it, :math:`2\|d_\pm\|\rho\,\sigma`."""
    return 2 * p.size(sign) * rho * share


def two_cycle(q: float) -> tuple[float, float]:
    r"""The 2-cycle of the map for :math:`1 < q < \sqrt5 - 1`: :math:`[(1+q)\pm\sqrt{(q+3)(q-1)}]/(2q)`.

    >>> low, high = two_cycle(1.1)
    >>> abs(high - low * (1 + 1.1 * (1 - low)) ** 2) < 1e-12
    True
    """
    if q <= 1:
        raise ValueError(f"q={q}: the map has a 2-cycle only above 1")
    root = np.sqrt((q + 3) * (q - 1))
    return float((1 + q - root) / (2 * q)), float((1 + q + root) / (2 * q))
