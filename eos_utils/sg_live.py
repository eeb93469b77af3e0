r"""SG, section 3: small networks on which its lemmas can be watched, live and in float64.

Of a run the residual :math:`D = F - Y`, the spectrum of M and ‖A‖² are kept. From them come the part of D across v₁,
:math:`R = (I - v_1v_1^\top)D`, its follower :math:`R'`, with :math:`R'(0) = R(0)` and
:math:`R'(t+1) = (I - \eta M(t)(I - v_1v_1^\top))R'(t)`, and the error of Assumption 3.2,
:math:`D(t+1) - (I - \eta M(t))D(t)`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from eos_utils.data import digits
from eos_utils.fg_theory import Array
from eos_utils.gram import Gram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

FIRST = 100  # the first seed of a network


class Live(NamedTuple):
    """Gradient descent on a small network: T steps, n examples. The sign of v₁ is carried along."""

    eta: float
    y: Array  # (n,)
    d: Array  # (T + 1, n) residuals
    values: Array  # (T + 1, n) eigenvalues of M, the largest first
    vectors: Array  # (T + 1, n, n) their eigenvectors, in columns
    a2: Array  # (T + 1,) ‖A‖²
    output: Array  # (T + 1,) λmax(M_A)
    quadratic: Array  # (T + 1,) DᵀM_A D

    @property
    def f(self) -> Array:
        """The outputs F, (T + 1, n)."""
        return self.d + self.y

    @property
    def df(self) -> Array:
        """DᵀF, (T + 1,)."""
        return np.einsum("ti,ti->t", self.d, self.f)

    @property
    def scaled(self) -> Array:
        """Λη/2, (T + 1,)."""
        return self.values[:, 0] * self.eta / 2

    def linear(self, u: Array, t: int) -> Array:
        """(I − ηM(t)) u."""
        v = self.vectors[t]
        return u - self.eta * v @ (self.values[t] * (v.T @ u))


@lru_cache(maxsize=32)
def live(activation: str, start: float, steps: int = 400, n: int = 60, seed: int = FIRST, output: float = 1.0) -> Live:
    r"""A network 64-30-30-1 without biases on n digits, 0 against 4, centred, labels ±1, in float64.

    ``start``: Λ(0)η/2, which sets η; ``output``: a factor for the initial output layer. With 0, F(0) = 0, and η is what
    it is with 1. Ends early, before a loss beyond 10⁶.
    """
    data = digits(n, "pair", classes=(0, 4))
    x, y = data.x.double(), data.y.double()
    model = fully_connected(x.shape[1], 30, 2, 1, activation, False, "fan_in", seed).double()
    objective = Objective(model, "mse", x, y)
    gram, theta, last = Gram(objective), objective.initial(), slice(objective.P - 30, objective.P)
    theta[last] *= output or 1.0
    eta = 2 * start / float(torch.linalg.eigvalsh(gram.at(theta).M)[-1])
    theta[last] *= output != 0
    rows: list[tuple[Any, ...]] = []
    for _ in range(steps + 1):
        loss, gradient, f = objective.gradient(theta)
        if not float(loss) < 1e6:
            break
        parts = gram.at(theta)
        values, vectors = np.linalg.eigh(parts.M.numpy())
        d = (f - y).numpy()[:, 0]
        top = vectors[:, -1]
        sign = 1.0 if not rows or top @ rows[-1][2][:, 0] >= 0 else -1.0
        vectors = np.column_stack([sign * top, vectors[:, -2::-1]])
        m_a = parts.M_A.numpy()
        rows.append((d, values[::-1], vectors, float(theta[last] @ theta[last]), np.linalg.norm(m_a, 2), d @ m_a @ d))
        theta = theta - eta * gradient
    d, values, vectors, a2, largest, quadratic = (np.array(column) for column in zip(*rows, strict=True))
    return Live(eta, y.numpy()[:, 0], d, values, vectors, a2, largest, quadratic)


class Parts(NamedTuple):
    """The lemmas' quantities along a live run, arrays (T,), for the step from t to t + 1, unless said."""

    turn: Array  # sin ϑ
    grown: Array  # |D'ᵀv₁'|/|Dᵀv₁|
    bound: Array  # its least value by the corrected Lemma 3.2, for D' = (I − ηM)D
    slack: Array  # what the error of Assumption 3.2 along v₁' can take from it
    e1: Array  # ‖R' − (I − ηM)R‖
    sharp: Array  # sin ϑ max(1, ηΛ − 1) ‖D‖
    error: Array  # ‖D' − (I − ηM)D‖
    r: Array  # (T + 1,) ‖R‖
    follower: Array  # (T + 1,) ‖R′‖
    apart: Array  # (T + 1,) ‖R − R′‖
    leaked: Array  # (T + 1,) |v₁ᵀR′|, a part of it that does not decay


def parts(run: Live) -> Parts:
    """R, R′ and the lemmas' bounds along a run, with its exact D, M and v₁."""
    v = run.vectors[:, :, 0]
    along = np.einsum("ti,ti->t", run.d, v)
    r = run.d - along[:, None] * v
    follower, rows = [r[0]], []
    for t in range(len(run.d) - 1):
        moved = run.linear(run.d[t], t)
        cosine = min(1.0, abs(float(v[t] @ v[t + 1])))
        sin = float(np.linalg.norm(v[t + 1] - (v[t] @ v[t + 1]) * v[t]))
        top, others = run.eta * run.values[t, 0], run.eta * run.values[t, 1:]
        rest = float(np.abs(1 - others).max()) * float(np.linalg.norm(r[t]))
        error = run.d[t + 1] - moved
        size = abs(float(along[t]))
        rows.append(
            (
                *(sin, abs(float(along[t + 1])) / size, (abs(top - 1) * cosine * size - sin * rest) / size),
                *(abs(float(error @ v[t + 1])) / size, np.linalg.norm(r[t + 1] - run.linear(r[t], t))),
                *(sin * max(1.0, top - 1) * np.linalg.norm(run.d[t]), np.linalg.norm(error)),
            )
        )
        last = follower[-1]
        inside = (last @ v[t]) * v[t]
        follower.append(inside + run.linear(last - inside, t))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    shadow = np.array(follower)
    norms = [np.linalg.norm(u, axis=1) for u in (r, shadow, r - shadow)]
    return Parts(*[*columns, *norms, np.abs(np.einsum("ti,ti->t", shadow, v))])
