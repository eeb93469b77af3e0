r"""Training of FG's model on orthonormal inputs, many runs side by side, and the curvature of its two blocks, exactly.

Inputs enter through their inner products alone, so that they are the unit vectors here. Once no neuron with a positive
output weight is active on a negative label and vice versa, the network has *decoupled*: the Hessian has one block for
the neurons with a > 0, one for those with a < 0, and zeros between them. It stays so while no output weight changes
sign, since a neuron that is inactive on an input remains inactive (Lemma 2.2).

Shapes: T + 1 steps of B runs, ``w`` (T + 1, B, m, n), ``a`` (T + 1, B, m), ``error`` (T + 1, B, n).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eos_utils.fg_course import parse_labels
from eos_utils.fg_theory import Array, aligned_set, initial, problem

Mask = NDArray[np.bool_]
LABELS = "1, 1, -0.8, -0.8"


class Path(NamedTuple):
    """Runs side by side: labels (n,), step sizes (B,), weights and errors :math:`(y_k - h(x_k))/n` over the steps."""

    y: Array
    eta: Array
    w: Array
    a: Array
    error: Array


def sizes(y: Array) -> tuple[float, float]:
    r""":math:`\|d_+\|, \|d_-\|`: norms of the positive and of the negative labels over n."""
    return float(np.linalg.norm(y[y > 0]) / len(y)), float(np.linalg.norm(y[y < 0]) / len(y))


def descend(y: Array, eta: Array, w: Array, a: Array, steps: int, keep: int | None = None) -> Path:
    """Gradient descent, equation (1) of FG, from ``w`` (B, m, n), ``a`` (B, m); the last ``keep`` steps are kept.

    Errors are kept for all steps. A run that overflows goes on as nan.

    >>> y = np.array([1.0, 1.0])    # one neuron along d₊ fits a share σ of y
    >>> size, q, share = sizes(y)[0], 0.5, 0.01    # q = η‖d₊‖; σ = a²/(n‖d₊‖)
    >>> a = np.full((1, 1), (share * 2 * size) ** 0.5)
    >>> w = a[..., None] * np.array([0.5, 0.5]) ** 0.5
    >>> path = descend(y, np.array([q / size]), w, a, steps=2)
    >>> for t in (1, 2):
    ...     share *= (1 + q * (1 - share)) ** 2    # the closed form
    ...     print(round(share, 6), round(float(path.a[t, 0, 0] ** 2 / (2 * size)), 6))
    0.02235 0.02235
    0.049542 0.049542
    """
    keep = steps if keep is None else min(keep, steps)
    ws, outs = np.empty((keep + 1, *w.shape)), np.empty((keep + 1, *a.shape))
    errors = np.empty((steps + 1, len(w), len(y)))
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps + 1):
            errors[t] = (y - np.einsum("bjk,bj->bk", np.maximum(w, 0), a)) / len(y)
            if t >= steps - keep:
                ws[t - steps + keep], outs[t - steps + keep] = w, a
            d = (w > 0) * errors[t][:, None]
            w, a = w + eta[:, None, None] * a[:, :, None] * d, a + eta[:, None] * np.einsum("bjk,bjk->bj", w, d)
    return Path(y, eta, ws, outs, errors)


def starts(y: Array, m: int, scale: float, seed: int, seeds: int) -> tuple[Array, Array]:
    """The first ``seeds`` initialisations from ``seed`` on that meet Assumption 2.2: w (seeds, m, n), a (seeds, m)."""
    p, found = problem(list(y), 1.0), []
    for trial in range(seed, seed + 100 * seeds):
        net = initial(m, len(y), scale, trial)
        if aligned_set(net, p, 1).size and aligned_set(net, p, -1).size:
            found.append(net)
        if len(found) == seeds:
            return np.stack([net.w for net in found]), np.stack([net.a for net in found])
    raise ValueError(f"m={m}: hardly any initialisation has neurons that are active on all labels of a sign; take more")


@lru_cache(maxsize=4)
def train(labels: str, q: float, m: int, scale: float, steps: int, seed: int, seeds: int = 1) -> Path:
    r"""Runs at :math:`\eta = q/\|d_+\|` from consecutive seeds.

    >>> path = train(LABELS, q=0.3, m=40, scale=1e-5, steps=300, seed=0)
    >>> bool(losses(path, 1)[-1, 0] < 1e-20), bool(coupled(path)[-1, 0])    # at the end
    (True, False)
    >>> positive, negative = (tops(path, sign)[-1, 0] for sign in (1, -1))
    >>> round(float(positive), 2), round(2 * sizes(path.y)[0], 2)    # nearly 2‖d₊‖
    (0.71, 0.71)
    >>> np.allclose(tops(path, 0)[-1], max(positive, negative))    # λ1 is a block's
    True
    """
    y = np.array(parse_labels(labels))
    w, a = starts(y, m, scale, seed, seeds)
    return descend(y, np.full(seeds, q / sizes(y)[0]), w, a, steps)


def cut(path: Path, first: int, last: int) -> Path:
    """The steps ``first`` to ``last`` - 1 of a path that was kept whole."""
    return path._replace(w=path.w[first:last], a=path.a[first:last], error=path.error[:last])


def losses(path: Path, sign: int) -> Array:
    """What the labels of one sign contribute to the loss at all steps, (T + 1, B)."""
    with np.errstate(over="ignore"):
        return np.asarray((path.error**2)[..., path.y * sign > 0].sum(axis=2) * len(path.y) / 2)


def coupled(path: Path) -> NDArray[np.bool_]:
    """Whether some neuron is active on a label of the sign opposite to its output weight's, (T + 1, B)."""
    return np.asarray(((path.w > 0) & (path.a[..., None] * path.y < 0)).any(axis=(2, 3)))


def tops(path: Path, sign: int) -> Array:
    r"""Largest eigenvalue of the Hessian's block of neurons with sign·a > 0 (``sign`` 0: of all), (T + 1, B), exactly.

    Where a neuron is inactive, rows are zero. Neurons with the same active set A enter the Gauss–Newton part only
    through the products of the columns :math:`a, w_{\cdot k}` (k in A). Replacing the columns by the R of their QR
    decomposition keeps these, and with it the Hessian on an invariant subspace; on the rest of the group it is
    :math:`-e_A` between :math:`w_A` and a, with largest eigenvalue :math:`\|e_A\|`, which no block is below.
    Patterns seldom change, so all steps with the same one are done together.
    """
    _, _, m, n = path.w.shape
    kept = len(path.w)
    w, a, e = path.w.reshape(-1, m, n), path.a.reshape(-1, m), path.error[-kept:].reshape(-1, n)
    active = w > 0
    if sign:
        active = active & (sign * a > 0)[..., None]
    found = np.full(len(w), np.nan)
    finite = np.flatnonzero(np.isfinite(w).all(axis=(1, 2)) & np.isfinite(a).all(axis=1))
    if finite.size:
        _, which = np.unique(np.packbits(active[finite].reshape(finite.size, -1), axis=1), axis=0, return_inverse=True)
        order = np.argsort(which.ravel(), kind="stable")
        for rows in np.split(finite[order], np.flatnonzero(np.diff(which.ravel()[order])) + 1):
            found[rows] = _top(w[rows], a[rows], e[rows], active[rows[0]])
    return found.reshape(kept, -1)


def _top(w: Array, a: Array, e: Array, active: Mask) -> Array:
    """The largest eigenvalue for networks (N, m, n) with one pattern of activity (m, n)."""
    n, groups = active.shape[1], []
    for on in np.unique(active[active.any(axis=1)], axis=0):
        members, k = (active == on).all(axis=1), np.flatnonzero(on)
        columns = np.concatenate([a[:, members, None], w[:, members][:, :, k]], axis=2)
        if members.sum() > k.size + 1:
            columns = np.asarray(np.linalg.qr(columns, mode="r"))
        groups.append((k, columns))
    size = sum(c.shape[1] * (k.size + 1) for k, c in groups)
    if not size:
        return np.zeros(len(w))
    jacobian, rest, at = np.zeros((len(w), n, size)), np.zeros((len(w), size, size)), 0
    for k, columns in groups:
        for neuron in range(columns.shape[1]):
            weights, output = at + np.arange(k.size), at + k.size
            jacobian[:, k, weights] = columns[:, neuron, :1]
            jacobian[:, k, output] = columns[:, neuron, 1:]
            rest[:, weights, output] = rest[:, output, weights] = -e[:, k]
            at = output + 1
    return np.asarray(np.linalg.eigvalsh(jacobian.transpose(0, 2, 1) @ jacobian / n + rest)[:, -1])


def quotients(path: Path, sign: int) -> Array:
    r""":math:`\lambda_\pm` of Theorem 3.1 on the full Hessian, with the :math:`S_{1,\pm}` of the first step kept."""
    side = path.y * sign > 0
    d = np.where(side, path.y / len(path.y), 0)
    size = float(np.linalg.norm(d))
    members = (sign * path.a[0] > 0) & (path.w[0][..., side] > 0).all(axis=2)
    on = (path.w > 0) & members[..., None]
    jv = np.einsum("tbjk,tbj->tbk", on * d, path.a) + size * (on * path.w).sum(axis=2)
    rest = 2 * size * (on * (path.error[-len(path.w) :, :, None] * d)).sum(axis=(2, 3))
    return np.asarray(((jv**2).sum(axis=2) / len(path.y) - rest) / (2 * size**2 * members.sum(axis=1)))
