r"""SG, section 4: runs of the two-layer linear network at and below the edge, in four ways of setting the step size.

What happens at the edge follows from a few lines (ours). Let :math:`\tau = \eta\Lambda - 2` be small, R small and D1 =
:math:`D^\top v_1`. Averaged over two steps, in which D1 changes sign,

.. math:: \dot D_1 = \tau D_1, \qquad \dot\tau = -\frac{8\eta^2\lambda_1}{mn^2}D_1^2, \qquad\text{so that}\qquad
   \tau^2 + \frac{8\eta^2\lambda_1}{mn^2}D_1^2 \text{ is conserved:}

Λ ends as far below 2/η as it was above. The term comes from :math:`v_1^\top W^\top Wv_1`; in ‖A‖² first and second
order in η cancel. So :math:`m\|\Gamma_0\|`, which is of the order of :math:`m\tau`, stays bounded as m grows only if
both :math:`\tau = O(1/m)` and :math:`D_1 = O(\sqrt{n/m})` at the entry; D1 of order √n takes :math:`O(\sqrt m)` steps
to die out and makes it grow like √m.

Below the edge, and for large m, :math:`\Lambda` grows from start to end by the factor (:func:`lazy_gain`)
:math:`1 + \frac{d^2}m\bigl(\sum_iz_i^2/\lambda_i + z_1^2/\lambda_1\bigr)`, the sum from ‖A‖², the last term from W.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eos_utils import sg_section4 as section4
from eos_utils.fg_theory import Array
from eos_utils.sg_section4 import Spectrum, State, Width, extreme, gram, norm, outputs, second_order, step, synthetic

# ηΛ at the start (for 'entry': at the entry) as a function of m, and what it means.
SCALINGS = {
    "2.2": "ηΛ(0) = 2.2",
    "3": "ηΛ(0) = 3",
    "near": "ηΛ(0) = 2/(1 + 30/m)",
    "entry": "ηΛ = 2/(1 + 100/m), Dᵀv₁ of order √(n/m)",
}
C3 = 4.0  # of Assumption 4.5: at the entry Dᵀv1 is between C3 and 2·C3 times √(n/m), where the warm-up lands


class Course(NamedTuple):
    """B runs: every step, (T+1, B), and every ``stride``-th, (K, B). A diverged run is nan from there on."""

    w: Width
    sharpness: Array  # Λ, the largest eigenvalue of M
    a: Array  # ‖A‖²
    d: Array  # (T+1, B, r) D
    tracked: Array  # ‖R − R′‖
    across: Array  # ... without the component of R′ along v1
    stride: int
    star: Array  # largest eigenvalue of M*
    gamma_0: Array
    gamma_d: Array
    apart: Array  # ‖M − (2/mn)(a + m/d)XᵀX‖ / ‖M‖
    overlap: Array  # smallest |⟨u_i, v_i⟩| over the eigenvectors u_i of M

    @property
    def size(self) -> Array:
        """‖D‖², (T+1, B), without what no network fits."""
        return np.asarray((self.d**2).sum(axis=-1))

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Runs that have stayed finite."""
        return np.isfinite(self.sharpness[-1])

    @property
    def excess(self) -> Array:
        """ηΛ/2 − 1, positive above the edge."""
        return self.w.eta * self.sharpness / 2 - 1

    def crossing(self) -> NDArray[np.int64]:
        """The first step above 2/η, −1 for never."""
        above = self.excess > 0
        return np.where(above.any(axis=0), above.argmax(axis=0), -1)

    def back(self) -> NDArray[np.int64]:
        """The first step at which Λ is below 2/η again, −1 for never."""
        steps = np.arange(len(self.excess))[:, None]
        below = (self.excess < 0) & (steps > self.crossing()) & (self.crossing() >= 0)
        return np.where(below.any(axis=0), below.argmax(axis=0), -1)


def follow(spectrum: Spectrum, w: Width, state: State, steps: int, stride: int = 1) -> Course:
    r"""Runs with what section 4 speaks of; a run whose :math:`\|D\|^2` exceeds :math:`10^{12}n` has diverged.

    :math:`R'(t+1) = (I - \eta M^*(t)(I - v_1v_1^\top))R'(t)` from :math:`R'(0) = R(0)`, with the first eigenvector of
    :math:`X^\top X` for :math:`v_1`, as section 4.1 introduces it. (Printed is :math:`R'(t)` from :math:`M^*(t)` and
    :math:`R'(t-1)`; we take the matrix of the same time.) R has no component along v1, R′ gets one.
    """
    start, each, some = state, [], []
    shadow = outputs(spectrum, w.m, state) - spectrum.z
    shadow[:, 0] = 0
    mean = np.eye(len(spectrum.lam)) * (w.m / spectrum.d)[:, None, None]
    with np.errstate(all="ignore"):
        for t in range(steps + 1):
            d = outputs(spectrum, w.m, state) - spectrum.z
            dead = ~(np.square(d).sum(axis=1) < 1e12 * spectrum.n)
            if dead.any():
                state = State(*(np.where(dead.reshape(-1, *[1] * (v.ndim - 1)), np.nan, v) for v in state))
            matrix = gram(spectrum, w.m, state)
            star = matrix + second_order(spectrum, w, state)
            top = extreme(matrix)[1]
            far = d - shadow
            far[:, 0] = shadow[:, 0]
            each.append((top, state.a, d, np.linalg.norm(far, axis=1), np.linalg.norm(far[:, 1:], axis=1)))
            if t % stride == 0:
                about, drawn = gram(spectrum, w.m, state, mean), gram(spectrum, w.m, state, start.g)
                some.append(
                    (extreme(star)[1], norm(star - drawn), norm(star - about), norm(matrix - about) / top, same(matrix))
                )
            cut = shadow.copy()
            cut[:, 0] = 0
            shadow = shadow - w.eta[:, None] * np.einsum("bij,bj->bi", star, cut)
            state = step(spectrum, w, state)
    top, a, d, tracked, across = (np.array(column) for column in zip(*each, strict=True))
    star_top, gamma_0, gamma_d, apart, overlap = (np.array(column) for column in zip(*some, strict=True))
    return Course(w, top, a, d, tracked, across, stride, star_top, gamma_0, gamma_d, apart, overlap)


def same(matrices: Array) -> Array:
    """The smallest |⟨u_i, e_i⟩| over the eigenvectors u_i, in falling order of eigenvalues; nan if not finite."""
    finite = np.asarray(np.isfinite(matrices).all(axis=(1, 2)))
    vectors = np.linalg.eigh(np.where(finite[:, None, None], matrices, 0.0))[1][..., ::-1]
    return np.where(finite, np.abs(np.diagonal(vectors, axis1=1, axis2=2)).min(axis=1), np.nan)


def enter(spectrum: Spectrum, m: Array, state: State) -> State:
    """Steps with ηΛ(0) = 1/2 until Dᵀv1 is at most 2·C3·√(n/m), run by run: each step halves it."""
    w = Width(m, 0.5 / extreme(gram(spectrum, m, state))[1])
    while True:
        waiting = np.abs((outputs(spectrum, m, state) - spectrum.z)[:, 0]) > 2 * C3 * np.sqrt(spectrum.n / m)
        if not waiting.any():
            return state
        moved = step(spectrum, w, state)
        chosen = (waiting.reshape(-1, *[1] * (v.ndim - 1)) for v in state)
        state = State(*(np.where(c, new, old) for c, new, old in zip(chosen, moved, state, strict=True)))


@lru_cache(maxsize=64)
def sharpening(m: int, seeds: int, edge: float, n: int = 500, d: int = 10) -> Course:
    """Phase I on the synthetic data, from ηΛ(0) = ``edge``: as many steps as the loss needs to vanish."""
    spectrum = synthetic(n, d)
    width, state = section4.start(spectrum, [m], seeds)
    return follow(spectrum, Width(width, edge / extreme(gram(spectrum, width, state))[1]), state, int(90 / edge))


@lru_cache(maxsize=64)
def at_edge(scaling: str, m: int, seeds: int, n: int = 500, d: int = 10) -> Course:
    """Runs at the edge on the synthetic data in one of the :data:`SCALINGS`, until Λ has come to rest.

    Time to rest: a few hundred steps, but :math:`O(\\sqrt m)` where Dᵀv1 starts large just above the edge, and
    :math:`O(m)` where it starts small.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r} is unknown; choose one of {', '.join(SCALINGS)}")
    spectrum = synthetic(n, d)
    width, state = section4.start(spectrum, [m], seeds)
    if scaling == "entry":
        state = enter(spectrum, width, state)
    level = {"near": 2 / (1 + 30 / m), "entry": 2 / (1 + 100 / m)}.get(scaling) or float(scaling)
    steps = 200 + {"near": 100 + 4 * int(m**0.5), "entry": 100 + m // 150}.get(scaling, 0)
    eta = level / extreme(gram(spectrum, width, state))[1]
    return follow(spectrum, Width(width, eta), state, steps, stride=1 if steps < 700 else 7)


def lazy_gain(spectrum: Spectrum) -> tuple[float, float]:
    r""":math:`m(\Lambda_{end}/\Lambda_0-1)` for large m: what ‖A‖² adds, :math:`d^2\sum z_i^2/\lambda_i`, and W."""
    by_direction = spectrum.d**2 * spectrum.z**2 / spectrum.lam
    return float(by_direction.sum()), float(by_direction[0])


def real_sharpening(
    spectrum: Spectrum, m: int, edge: float, steps: int, seed: int = section4.FIRST
) -> tuple[Array, Array, float]:
    """One run on a spectrum of high rank: Λ and ‖A‖² over steps, and η; Λ by Lanczos, warm from step to step."""
    from scipy.sparse.linalg import eigsh

    width, state = section4.start(spectrum, [m], 1, seed)
    vector, eta, sharpness, norms = np.eye(len(spectrum.lam))[0], 0.0, [], []
    for _ in range(steps + 1):
        value, vectors = eigsh(gram(spectrum, width, state)[0], k=1, v0=vector, tol=1e-12)
        vector, eta = vectors[:, 0], eta or edge / value[0]
        sharpness.append(value[0])
        norms.append(state.a[0])
        state = step(spectrum, Width(width, np.array([eta])), state)
    return np.array(sharpness), np.array(norms), float(eta)


def slope(widths: Sequence[int], values: Sequence[float] | Array) -> float:
    """The exponent of m in a least-squares line through log-log points."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])
