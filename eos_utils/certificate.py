r"""Upper bounds for eigenvalues: the proof that no eigenvalue was missed.

Small residuals show only that *some* eigenvalue is near each Ritz value; a cluster or a repeated eigenvalue can
hide another. So a fresh random unit vector :math:`u \perp Q` starts a short Lanczos run on the complement,
:math:`C = (I - QQ^\top) H (I - QQ^\top)`, with orthonormal polynomials :math:`\pi_0, \pi_1, \dots`. If C had an
eigenvalue :math:`\mu` above all Ritz values of that run, with eigenvector w, then

.. math:: \langle u, w\rangle^2 \sum_{i<q} \pi_i(\mu)^2 \le 1 ,

and since u is uniform on the sphere of :math:`\mathbb R^N`, :math:`P(|\langle u, w\rangle| \le \varepsilon) \le
\varepsilon\sqrt{2N/\pi}`. Hence :math:`\lambda_{\max}(C) \le \mu^*` but for a chosen failure probability, where
:math:`\mu^*` solves :math:`\sum_i\pi_i(\mu^*)^2 = 2N/(\pi\delta^2)`. With :math:`E = (I - QQ^\top)HQ`, Haynsworth's
inertia formula then bounds every eigenvalue from above: for :math:`\zeta > \mu^*`, H has at most as many
eigenvalues above :math:`\zeta` as :math:`T + E^\top E / (\zeta - \mu^*)`. So
:math:`\theta_i \le \lambda_i \le \bar\lambda_i`, all copies counted, up to rounding (about 1e-6 ‖H‖ in float32).

Background: Kuczyński and Woźniakowski (1992) for random starts; Parlett (1998) for Rayleigh–Ritz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eos_utils.basis import Basis, random_rows

NUMERICS = 1


@dataclass
class Probe:
    """Lanczos from a random vector in the complement of a basis, and what it shows of the top there.

    >>> class Diagonal:    # a repeated 5, of which the basis below has one copy only
    ...     shape, device, dtype = (4, 4), torch.device("cpu"), torch.float64
    ...     def apply(self, rows):
    ...         return rows * torch.tensor([5.0, 5.0, 1.0, 0.0])
    >>> basis = Basis(Diagonal())
    >>> _ = basis.extend(torch.eye(4, dtype=torch.float64)[:1])
    >>> probe = Probe.start(basis, 1e-3, torch.Generator().manual_seed(0))
    >>> while not probe.exhausted: probe.step()
    >>> round(probe.ceiling(), 4)    # the other copy
    5.0
    """

    basis: Basis
    delta: float
    alpha: list[float]
    beta: list[float]
    rows: list[Tensor]
    images: list[Tensor]
    exhausted: bool = False

    @classmethod
    def start(cls, basis: Basis, delta: float, generator: torch.Generator) -> Probe:
        """A fresh random unit vector orthogonal to the basis."""
        row = basis.orthonormal(random_rows(1, basis.operator, generator))
        return cls(basis, delta, [], [], list(row.split(1)), [], exhausted=len(row) == 0)

    def step(self) -> None:
        """One product; the probe's rows are orthonormalised against the basis and among themselves."""
        row = self.rows[-1]
        image = self.basis.operator.apply(row)
        self.basis.products += 1
        self.images.append(image)
        self.alpha.append(float((row * image).sum()))
        if not math.isfinite(self.alpha[-1]):
            raise FloatingPointError("the operator returned NaN or infinite values; the point is not finite")
        known, rest = torch.cat(self.rows), image
        for _ in range(2):
            for rows in (self.basis.q, known):
                rest = rest - (rest @ rows.T) @ rows
        size = float(rest.norm())
        scale = max(1e-30, *(abs(a) for a in self.alpha), *self.beta)
        if size <= 64 * torch.finfo(row.dtype).eps * scale or len(self.basis) + len(known) >= row.shape[1]:
            self.exhausted = True  # an invariant subspace: all that u touches has been seen
        else:
            self.beta.append(size)
            self.rows.append(rest / size)

    def ritz_top(self) -> float:
        """The largest Ritz value on the complement so far."""
        m = len(self.alpha)
        t = torch.diag(torch.tensor(self.alpha, dtype=torch.float64))
        for i, b in enumerate(self.beta[: m - 1]):
            t[i, i + 1] = t[i + 1, i] = b
        return float(torch.linalg.eigvalsh(t)[-1])

    def _log_kernel(self, mu: float) -> float:
        """log of the sum of squares of the orthonormal polynomials at mu, by their three-term recurrence."""
        before, now, total, log_scale = 0.0, 1.0, 1.0, 0.0
        for i, b in enumerate(self.beta):
            back = self.beta[i - 1] * before if i else 0.0
            before, now = now, ((mu - self.alpha[i]) * now - back) / b
            total += now * now
            if total > 1e200:
                before, now, total, log_scale = (
                    before / 1e100,
                    now / 1e100,
                    total / 1e200,
                    log_scale + 200 * math.log(10),
                )
        return math.log(total) + log_scale

    def ceiling(self) -> float:
        """The smallest mu* that λ_max of the complement exceeds with probability at most delta."""
        if not self.alpha:
            return -math.inf
        top = self.ritz_top()
        if self.exhausted:
            return top
        n = self.basis.q.shape[1] - len(self.basis)
        needed = math.log(2 * n / (math.pi * self.delta**2))
        spread = max(abs(top), max(self.beta, default=0.0), 1e-30)
        low, high = top, top + spread
        while self._log_kernel(high) < needed:
            high = top + 2 * (high - top)
            if high - top > 1e12 * spread:
                return math.inf
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self._log_kernel(middle) >= needed else (middle, high)
        return high


def defect_gram(basis: Basis, coordinates: Tensor, values: Tensor, allowance: float = 0.0) -> Tensor:
    """EᵀE in Ritz coordinates, float64 (m, m), E = (I - QQᵀ) H Q, with ``allowance ** 2`` on the diagonal."""
    turn, theta = coordinates.to(basis.q).T, values[:, None].to(basis.q)
    gram = torch.zeros(len(values), len(values), dtype=torch.float64, device=basis.q.device)
    for q, hq in zip(basis.q.split(2**15, dim=1), basis.hq.split(2**15, dim=1), strict=True):
        error = turn @ hq - theta * (turn @ q)
        gram += (error @ error.T).double()
    gram = gram.cpu()
    return (gram + gram.T) / 2 + allowance**2 * torch.eye(len(gram), dtype=gram.dtype)


def eigenvalues_above(zeta: float, values: Tensor, defect: Tensor, ceiling: float) -> int:
    """How many eigenvalues the operator can have above ζ > μ*, at most (Haynsworth)."""
    if ceiling == -math.inf:
        return int((values > zeta).sum())
    shifted = torch.linalg.eigvalsh(torch.diag(values) + defect / (zeta - ceiling))
    return int((shifted > zeta).sum())


def upper_bounds(values: Tensor, defect: Tensor, ceiling: float, k: int, precision: float) -> Tensor:
    """For i < k a ζ above which at most i eigenvalues lie, by bisection to ``precision``.

    >>> ritz = torch.tensor([3.0]).double()    # of [[3, 2], [2, 0]], on its first axis
    >>> defect = torch.tensor([[4.0]]).double()    # EᵀE, with E = (0, 2)
    >>> bound = upper_bounds(ritz, defect, ceiling=0.0, k=1, precision=1e-9)
    >>> round(bound.item(), 4)    # its eigenvalues are 4 and -1
    4.0
    """
    if ceiling == math.inf:
        return torch.full((k,), math.inf, dtype=torch.float64)
    result = []
    precision = max(precision, 8 * torch.finfo(torch.float64).eps * float(values.abs().max()))
    for i in range(k):
        low = max(ceiling, float(values[i]))
        high = low + precision
        while eigenvalues_above(high, values, defect, ceiling) > i:
            low, high = high, high + 2 * (high - low)
        while high - low > precision:
            middle = (low + high) / 2
            low, high = (middle, high) if eigenvalues_above(middle, values, defect, ceiling) > i else (low, middle)
        result.append(high)
    return torch.tensor(result, dtype=torch.float64)


def run_probe(probe: Probe, values: Tensor, defect: Tensor, k: int, tolerance: float, max_products: int) -> bool:
    """Steps until the upper bounds are within the tolerance; True if something larger than θ_k turned up."""
    threshold = float(values[k - 1])
    while not probe.exhausted and len(probe.alpha) < 120 and probe.basis.products < max_products:
        probe.step()
        if len(probe.alpha) % 3 and not probe.exhausted:
            continue
        if probe.ritz_top() > threshold + tolerance:
            for _ in range(k):  # a few steps more, so that what was found is worth taking in
                if not probe.exhausted:
                    probe.step()
            return True
        ceiling = probe.ceiling()
        gap = threshold + tolerance - ceiling
        if gap > 0:
            fits = [eigenvalues_above(float(values[i]) + tolerance, values, defect, ceiling) <= i for i in range(k)]
            # A ceiling far below can not help much more: then the basis must grow.
            if all(fits) or gap > 0.8 * (threshold - probe.ritz_top()):
                return False
    return False
