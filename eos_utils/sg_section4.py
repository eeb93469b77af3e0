r"""SG, section 4: gradient descent on the two-layer linear network :math:`f(x) = \frac1{\sqrt m}A^\top Wx`, exactly.

The loss is :math:`\frac1n\|D\|^2`, :math:`D = F - Y`, :math:`F = \frac1{\sqrt m}X^\top W^\top A`. With :math:`a =
\|A\|^2`, :math:`b = W^\top A`, :math:`G = W^\top W` and :math:`g = \frac2{n\sqrt m}XD`, one step is

.. math:: a' = a - 2\eta\,g^\top b + \eta^2 g^\top Gg, \quad b' = b - \eta(G + a)g + \eta^2(b^\top g)\,g, \quad
   G' = G - \eta(bg^\top + gb^\top) + \eta^2 a\,gg^\top,

a **closed recursion**: no m-vector is left, so that the width costs nothing. By the rotation that diagonalises
:math:`X^\top X = \sum_{i\le r}\lambda_i v_iv_i^\top` all of it lives in r coordinates, and the data enter through
:math:`(\lambda_i, z_i = Y^\top v_i)` alone. F, D and M below are in the basis :math:`(v_i)`; what Y has outside of it
is a constant in the loss. In that basis

.. math:: M = \frac2{mn}\bigl(a\Lambda + \Lambda^{1/2}G\Lambda^{1/2}\bigr), \qquad
   M^* = M - \frac{4\eta}{n^2m}(D^\top F)\Lambda, \qquad \Lambda = \mathrm{diag}(\lambda_i),

the paper's Gram matrix and its matrix of the exact update :math:`D(t+1) = (I - \eta M^*(t))D(t)` (section 4.1).

**Γ** is defined in the appendix, which we do not have. Two readings are kept apart: :math:`\Gamma_d = M^* -
\frac2{mn}(a + \frac md)\Lambda`, the remainder of the approximation in section 4.2, and :math:`\Gamma_0 = M^* -
\frac2{mn}(a\Lambda + \Lambda^{1/2}G(0)\Lambda^{1/2})`, in which :math:`G(0)` stands for its mean :math:`\frac mdI`.
The initialisation is our reading too: :math:`A_q \sim N(0, 1/m)`, :math:`W_{qj} \sim N(0, 1/d)`, with which that mean
is right.

Runs are batched: arrays begin with the run, (B, ...), and m and η may differ between runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from eos_utils import data
from eos_utils.fg_theory import Array
from eos_utils.store import root

FIRST = 300  # seed of the first run
RECORD = "bench/results/sg_pair_spectrum.json"
SIZES = (124, 248, 496, 990)  # of the balanced subsets on which λ1 is compared with n


class Spectrum(NamedTuple):
    r"""What section 4 sees of the data: :math:`\lambda_1 \ge \dots \ge \lambda_r > 0` and the :math:`z_i`, (r,) each.

    ``outside``: the share of :math:`\|Y\|^2` that no linear function of the inputs fits.
    """

    lam: Array
    z: Array
    n: int
    d: int
    outside: float = 0.0


class State(NamedTuple):
    """B runs: a (B,), b (B, r), G (B, r, r)."""

    a: Array
    b: Array
    g: Array


class Width(NamedTuple):
    """Widths and step sizes of B runs, (B,) each; the arithmetic needs them together."""

    m: Array
    eta: Array


# ---- data ----------------------------------------------------------------------------------------


def synthetic(n: int = 500, d: int = 10) -> Spectrum:
    r"""Data made to satisfy the premises: :math:`r = d`, :math:`\lambda = n(1, .45, .36, \dots)`, equal :math:`z_i`.

    So λ1 is of order n and at least 2λ2, successive eigenvalues differ by at most 2.3, :math:`z_i/\sqrt n = r^{-1/2}`
    is above 1/r, and Y lies in the span. Only ‖Y‖² = n is asked of Y, not that each label is ±1.
    """
    if not 2 <= d < n:
        raise ValueError(f"n={n}, d={d}: the rank has to be at least 2 and below n")
    return Spectrum(n * np.array([1.0, *0.45 * 0.8 ** np.arange(d - 1)]), np.full(d, np.sqrt(n / d)), n, d)


def inputs(spectrum: Spectrum, seed: int) -> tuple[Array, Array]:
    r"""A design X, (d, n), and labels Y, (n,), with this spectrum, in random directions; labels are then not ±1."""
    generator = np.random.default_rng(seed)
    r = len(spectrum.lam)
    v = np.linalg.qr(generator.normal(size=(spectrum.n, r)))[0]
    u = np.linalg.qr(generator.normal(size=(spectrum.d, r)))[0]
    return u * np.sqrt(spectrum.lam) @ v.T, v @ spectrum.z


def spectrum_of(x: Array, y: Array, centred: bool = True) -> Spectrum:
    """The spectrum of inputs (n, d) and labels (n,); eigenvalues below 1e-10 of the largest count as zero.

    The sign of each v_i is chosen so that z_i ≥ 0, without which Assumption 4.2 would have no meaning.
    """
    x = x - x.mean(axis=0) if centred else x
    lam, v = (part[..., ::-1] for part in np.linalg.eigh(x @ x.T))
    r = int((lam > 1e-10 * lam[0]).sum())
    z = np.abs(v[:, :r].T @ y)
    n, d = x.shape
    return Spectrum(lam[:r], z, n, d, max(0.0, 1 - float(z @ z / (y @ y))))


class Pair(NamedTuple):
    """CIFAR-10's airplanes (+1) against automobiles (−1): balanced, as they come, and λ1/n of balanced subsets."""

    balanced: Spectrum
    unbalanced: Spectrum
    top: dict[int, float]


def _balanced(x: Array, y: Array, n: int) -> Spectrum:
    chosen = np.sort(np.concatenate([np.flatnonzero(y == sign)[: n // 2] for sign in (1, -1)]))
    return spectrum_of(x[chosen], y[chosen])


def measure_pair() -> Pair:
    """The first 1,000 images of the two classes, 495 and 505; balanced: the first 495 of each. Needs CIFAR-10."""
    found = data.load("cifar10", n=1000, labels="pair", classes=(1, 0), preprocessing="scale")
    x, y = found.x.double().numpy(), found.y.double().numpy()[:, 0]
    top = {n: float(_balanced(x, y, n).lam[0] / n) for n in SIZES}
    return Pair(_balanced(x, y, SIZES[-1]), spectrum_of(x, y), top)


@lru_cache(maxsize=1)
def pair() -> Pair:
    """:func:`measure_pair` as it is kept in the repository: 4,000 numbers, so that nobody needs the images."""
    kept = json.loads((root() / RECORD).read_text(encoding="utf-8"))
    one, two = (Spectrum(np.array(s["lam"]), np.array(s["z"]), s["n"], s["d"], s["outside"]) for s in kept["spectra"])
    return Pair(one, two, {int(n): value for n, value in kept["top"].items()})


def keep_pair() -> None:
    """Measures the images and writes the file that :func:`pair` reads."""
    found = measure_pair()
    short = {"lam": 12, "z": 12}  # digits: what lies below is rounding, and differs between processors
    spectra = [
        {**s._asdict(), **{k: [float(f"{v:.{c}g}") for v in getattr(s, k)] for k, c in short.items()}}
        for s in (found.balanced, found.unbalanced)
    ]
    text = json.dumps({"spectra": spectra, "top": found.top}, separators=(",", ":"))
    (root() / RECORD).write_text(text + "\n", encoding="utf-8")


# ---- dynamics ------------------------------------------------------------------------------------


def start(spectrum: Spectrum, widths: Sequence[int], seeds: int, first: int = FIRST) -> tuple[Array, State]:
    """The initialisation of len(widths)·seeds runs, seeds of one width beside each other, and their m.

    The joint Gram matrix of the columns of W and of A is a Wishart matrix. Bartlett's factor is drawn, not the m·d
    weights: the same law at a cost that does not depend on m. Narrow networks (m ≤ r) are drawn weight by weight.

    >>> spectrum = synthetic(d=10)    # with λ1 = n
    >>> m, state = start(spectrum, widths=[10**8], seeds=1)
    >>> low, high = extreme(gram(spectrum, m, state))
    >>> round(float(high[0]), 3)    # wide: 2λ1/(nd)
    0.2
    """
    r, runs = len(spectrum.lam), []
    for m in widths:
        for seed in range(first, first + seeds):
            generator = np.random.default_rng([seed, m])
            scale = np.append(np.full(r, spectrum.d**-0.5), m**-0.5)
            if m > r:
                factor = np.tril(generator.normal(size=(r + 1, r + 1)), -1)
                np.fill_diagonal(factor, np.sqrt(generator.chisquare(m - np.arange(r + 1))))
            else:
                factor = generator.normal(size=(r + 1, m))
            runs.append(scale[:, None] * (factor @ factor.T) * scale)
    joint = np.array(runs)
    return np.repeat(np.array(widths, float), seeds), State(joint[:, -1, -1], joint[:, -1, :-1], joint[:, :-1, :-1])


def outputs(spectrum: Spectrum, m: Array, state: State) -> Array:
    """F in the basis of the v_i, (B, r)."""
    return np.sqrt(spectrum.lam) * state.b / np.sqrt(m)[:, None]


def gram(spectrum: Spectrum, m: Array, state: State, g: Array | None = None) -> Array:
    """M, (B, r, r); with ``g`` in place of G."""
    root_lam = np.sqrt(spectrum.lam)
    inner = (state.g if g is None else g) * np.outer(root_lam, root_lam) + state.a[:, None, None] * np.diag(
        spectrum.lam
    )
    return 2 / (spectrum.n * m)[:, None, None] * inner


def second_order(spectrum: Spectrum, w: Width, state: State) -> Array:
    r""":math:`M^* - M = -\frac{4\eta}{n^2m}(D^\top F)\Lambda`, (B, r, r)."""
    f = outputs(spectrum, w.m, state)
    inner = ((f - spectrum.z) * f).sum(axis=1)
    return -(4 * w.eta * inner / (spectrum.n**2 * w.m))[:, None, None] * np.diag(spectrum.lam)


def step(spectrum: Spectrum, w: Width, state: State) -> State:
    """One step of gradient descent.

    >>> spectrum = synthetic(n=20, d=3)
    >>> m, state = start(spectrum, widths=[50], seeds=1)
    >>> w = Width(m, eta=np.array([0.1]))
    >>> d = outputs(spectrum, m, state) - spectrum.z
    >>> star = gram(spectrum, m, state) + second_order(spectrum, w, state)    # M*
    >>> after = outputs(spectrum, m, step(spectrum, w, state)) - spectrum.z
    >>> np.allclose(after, d - w.eta * (star @ d[0]))    # D(t+1) = (I - ηM*) D(t)
    True
    """
    a, b, gram_w = state
    residual = outputs(spectrum, w.m, state) - spectrum.z
    g = 2 / (spectrum.n * np.sqrt(w.m))[:, None] * np.sqrt(spectrum.lam) * residual
    eta, gg, bg = w.eta[:, None], np.einsum("bij,bj->bi", gram_w, g), (b * g).sum(axis=1)
    new_b = b - eta * (gg + a[:, None] * g) + eta**2 * bg[:, None] * g
    outer = b[:, :, None] * g[:, None, :]
    new_g = gram_w - eta[..., None] * (outer + outer.swapaxes(1, 2))
    new_g += (w.eta**2 * a)[:, None, None] * g[:, :, None] * g[:, None, :]
    return State(a - 2 * w.eta * bg + w.eta**2 * (g * gg).sum(axis=1), new_b, new_g)


def outputs_of(x: Array, a: Array, w: Array) -> Array:
    """F, (n,), for inputs x, (d, n), and the weights A, (m,), and W, (m, d)."""
    return x.T @ w.T @ a / np.sqrt(len(a))


def explicit_step(x: Array, y: Array, eta: float, a: Array, w: Array) -> tuple[Array, Array]:
    """The same step on the weights A, (m,), and W, (m, d), with inputs x, (d, n), and labels y, (n,)."""
    pull = 2 / (len(y) * np.sqrt(len(a))) * x @ (outputs_of(x, a, w) - y)
    return a - eta * w @ pull, w - eta * np.outer(a, pull)


def printed_star(x: Array, y: Array, eta: float, a: Array, w: Array, factor: float = 1.0) -> tuple[Array, Array]:
    r"""M* as printed in section 4.1, (n, n), and its second-order term, which enters ``factor`` times."""
    m, n, kernel = len(a), len(y), x.T @ x
    f = outputs_of(x, a, w)
    second = -4 * eta / (n**2 * m) * ((f - y) @ f) * kernel
    return 2 / (m * n) * (a @ a * kernel + x.T @ w.T @ w @ x) + factor * second, second


def extreme(matrices: Array) -> tuple[Array, Array]:
    """The smallest and the largest eigenvalue of symmetric matrices (..., r, r); nan where one is not finite."""
    finite = np.asarray(np.isfinite(matrices).all(axis=(-2, -1)))
    values = np.linalg.eigvalsh(np.where(finite[..., None, None], matrices, 0.0))
    return np.where(finite, values[..., 0], np.nan), np.where(finite, values[..., -1], np.nan)


def norm(matrices: Array) -> Array:
    """The spectral norm of symmetric matrices."""
    low, high = extreme(matrices)
    return np.maximum(-low, high)
