r"""The largest eigenvalues of a symmetric operator, with a certificate that none was missed.

**Method.** An orthonormal basis :math:`Q` (kept orthonormal by repeated Gram–Schmidt) is grown by block Lanczos
steps from a random start, or by residuals from vectors of an earlier evaluation; Rayleigh–Ritz on it,
:math:`T = Q^\top H Q`, gives Ritz values :math:`\theta_1 \ge \theta_2 \ge \dots`. By Courant–Fischer
:math:`\theta_i \le \lambda_i`, always.

**Certificate.** Small residuals show only that *some* eigenvalue is near each Ritz value; a cluster or a repeated
eigenvalue can hide another. So a fresh random unit vector :math:`u \perp Q` starts a short Lanczos run on the
complement, :math:`C = (I - QQ^\top) H (I - QQ^\top)`, with orthonormal polynomials :math:`\pi_0, \pi_1, \dots`.
If C had an eigenvalue :math:`\mu` above all Ritz values of that run, with eigenvector w, then

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
from typing import Any, Protocol

import torch
from torch import Tensor

NUMERICS = 1


class Operator(Protocol):
    """A symmetric operator on R^P: its shape, device, dtype, and products with the rows of a block."""

    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    def apply(self, rows: Tensor) -> Tensor:
        """(k, P) to (k, P)."""


@dataclass(frozen=True)
class Eigenpairs:
    r"""The k largest eigenvalues found, in falling order.

    ``values`` (k,) float64; ``vectors`` (P, k); ``residuals`` :math:`\|Hv_i - \theta_i v_i\|`; ``upper`` (k,):
    no more than i eigenvalues lie above ``upper[i]``; this holds with ``failure_probability`` if ``checked``, else
    it assumes that nothing rose in the complement since the last check. ``converged``: residuals and
    ``upper - values`` are within the tolerance. ``products``: Hessian-vector products used, of which
    ``probe_products`` for the check. ``basis``: rows worth recycling.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    upper: Tensor
    checked: bool
    converged: bool
    failure_probability: float
    products: int
    probe_products: int
    ceiling: float
    basis: Tensor


class _Basis:
    """Orthonormal rows q, their images hq, and t = q H qᵀ."""

    def __init__(self, operator: Operator) -> None:
        self.operator, self.products = operator, 0
        self.q = torch.empty(0, operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.hq = self.q.clone()

    def __len__(self) -> int:
        return len(self.q)

    def orthonormal(self, rows: Tensor) -> Tensor:
        """An orthonormal basis of what ``rows`` add to the span; what adds nothing but rounding is dropped."""
        floor = 64 * torch.finfo(rows.dtype).eps
        for _ in range(2):
            norms = rows.norm(dim=1)
            rows = rows[norms > 0] / norms[norms > 0].unsqueeze(1)
            rows = rows - (rows @ self.q.T) @ self.q
            if len(rows) > 1:
                columns, r = torch.linalg.qr(rows.T)
                rows = columns.T[r.diagonal().abs() > floor]
            else:
                rows = rows[rows.norm(dim=1) > floor]
        norms = rows.norm(dim=1, keepdim=True)
        return rows / norms

    def extend(self, rows: Tensor, images: Tensor | None = None) -> int:
        """Adds directions (orthonormal already where ``images`` are given); returns how many were new."""
        if images is None:
            rows = self.orthonormal(rows)[: self.q.shape[1] - len(self)]
            if len(rows) == 0:
                return 0
            images = self.operator.apply(rows)
            self.products += len(rows)
            if not bool(torch.isfinite(images).all()):
                raise FloatingPointError("the operator returned NaN or infinite values; the point is not finite")
        self.q, self.hq = torch.cat([self.q, rows]), torch.cat([self.hq, images])
        return len(rows)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, falling (float64, CPU), and coordinates of the Ritz vectors as columns."""
        t = (self.q @ self.hq.T).double().cpu()
        # Squares of its entries must be finite too, in norms and Gram matrices.
        if not float(t.abs().max()) ** 2 < torch.finfo(self.q.dtype).max:
            raise FloatingPointError("the curvature at this point is beyond the range of floating-point numbers")
        values, vectors = torch.linalg.eigh((t + t.T) / 2)
        return values.flip(0), vectors.flip(1)

    def rotate(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and images in other coordinates (columns)."""
        c = coordinates.to(self.q).T
        return c @ self.q, c @ self.hq


def _random_rows(count: int, operator: Operator, generator: torch.Generator) -> Tensor:
    """Gaussian rows, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(count, operator.shape[0], generator=generator).to(operator.device, operator.dtype)


@dataclass
class _Probe:
    """Lanczos from a random vector in the complement of a basis, and what it shows of the top there."""

    basis: _Basis
    delta: float
    alpha: list[float]
    beta: list[float]
    rows: list[Tensor]
    images: list[Tensor]
    exhausted: bool = False

    @classmethod
    def start(cls, basis: _Basis, delta: float, generator: torch.Generator) -> _Probe:
        row = basis.orthonormal(_random_rows(1, basis.operator, generator))
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
        known = torch.cat([self.basis.q, *self.rows])
        rest = image
        for _ in range(2):
            rest = rest - (rest @ known.T) @ known
        size = float(rest.norm())
        scale = max(1e-30, *(abs(a) for a in self.alpha), *self.beta)
        if size <= 64 * torch.finfo(row.dtype).eps * scale or len(known) >= self.basis.q.shape[1]:
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


def _above(zeta: float, values: Tensor, defect: Tensor, ceiling: float) -> int:
    """How many eigenvalues the operator can have above ζ > μ*, at most (Haynsworth)."""
    if ceiling == -math.inf:
        return int((values > zeta).sum())
    shifted = torch.linalg.eigvalsh(torch.diag(values) + defect / (zeta - ceiling))
    return int((shifted > zeta).sum())


def _upper_bounds(values: Tensor, defect: Tensor, ceiling: float, k: int, precision: float) -> Tensor:
    """For i < k a ζ above which at most i eigenvalues lie, by bisection to ``precision``."""
    if ceiling == math.inf:
        return torch.full((k,), math.inf, dtype=torch.float64)
    result = []
    precision = max(precision, 8 * torch.finfo(torch.float64).eps * float(values.abs().max()))
    for i in range(k):
        low = max(ceiling, float(values[i]))
        high = low + precision
        while _above(high, values, defect, ceiling) > i:
            low, high = high, high + 2 * (high - low)
        while high - low > precision:
            middle = (low + high) / 2
            low, high = (middle, high) if _above(middle, values, defect, ceiling) > i else (low, middle)
        result.append(high)
    return torch.tensor(result, dtype=torch.float64)


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    tol: float = 1e-3,
    start: Tensor | None = None,
    check: bool = True,
    ceiling: float | None = None,
    failure_probability: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
) -> Eigenpairs:
    r"""The ``k`` largest eigenvalues of a symmetric operator, each with a lower and an upper bound.

    ``tol``: the wanted bound on every :math:`\bar\lambda_i - \theta_i`, relative to the largest |Ritz value|.
    ``start``: rows (m, P) to begin from, as an earlier result's ``basis``; without it a random vector is used.
    ``check``: certify completeness with a fresh random vector (see the module); without it ``ceiling`` from an
    earlier check stands in. Raises ``ValueError`` for k < 1 or k > P and ``FloatingPointError`` if a product is not
    finite. A result that ran out of ``max_products`` has ``converged=False``, keeps valid bounds
    and may hold fewer than k values.

    >>> import torch
    >>> class Diagonal:
    ...     shape, device, dtype = (100, 100), torch.device("cpu"), torch.float64
    ...     def apply(self, rows):
    ...         return rows * torch.cat([torch.tensor([5.0, 5.0, 3.0]), torch.linspace(0, 1, 97)])
    >>> top_eigenpairs(Diagonal(), 3).values.round(decimals=3)    # the repeated 5 is found
    tensor([5., 5., 3.], dtype=torch.float64)
    """
    size = operator.shape[0]
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or k > size:
        raise ValueError(f"k={k!r}: the number of eigenvalues must lie between 1 and P={size}")
    if not tol > 0:
        raise ValueError(f"tol={tol!r}: must be positive")
    generator = torch.Generator().manual_seed(seed)
    basis = _Basis(operator)
    krylov = start is None
    new = basis.extend(_random_rows(1, operator, generator) if start is None else start.to(operator.device))
    checked, known, probed, good = False, ceiling, 0, False
    stalls, narrowest, again = 0, math.inf, 0
    while True:
        values, coordinates = basis.ritz()
        wanted = min(k, len(basis))
        top, images = basis.rotate(coordinates[:, :wanted])
        scale = max(float(values.abs().max()), 1e-30)
        errors = images - values[:wanted, None].to(top) * top
        residuals = errors.norm(dim=1).double().cpu()
        full, spent = len(basis) == size, basis.products >= max_products
        if wanted < k and not full and not spent:
            # An invariant subspace smaller than k is left by a fresh random direction.
            new = basis.extend(basis.hq[-new:]) or basis.extend(_random_rows(1, operator, generator))
            continue
        upper = torch.full((wanted,), math.inf, dtype=torch.float64)
        good = wanted == k and not check and known is None and bool((residuals <= tol * scale).all())
        # Errors of eigenvalues are quadratic in the residuals, once a ceiling is known.
        if bool((residuals <= math.sqrt(tol) * scale).all()) or full or spent or new == 0:
            defect = _defect(basis, coordinates, values)
            if full:
                known, checked = -math.inf, True
            # A ceiling of an earlier point that reaches into the wanted values is of no use any more.
            stale = known is not None and known > float(values[wanted - 1]) + tol * scale
            if (check or stale) and not checked and not spent:
                # Up to four probes may be tried for one certificate: each gets its share of the risk.
                probe = _Probe.start(basis, failure_probability / 4, generator)
                before = basis.products
                missed = _run_probe(probe, values, defect, wanted, tol * scale, max_products)
                probed += basis.products - before
                known, checked, krylov = None if missed else probe.ceiling(), not missed, False
                if missed:  # keep the best so far, add what the probe saw, and look again with another probe
                    basis.q, basis.hq = basis.rotate(coordinates[:, : 2 * k])
                # Its products are paid for, and a larger basis keeps the ceiling valid.
                if probe.images and (missed or not again):
                    new = basis.extend(torch.cat(probe.rows[: len(probe.images)]), torch.cat(probe.images))
                    continue
            if known is not None:
                upper = _upper_bounds(values, defect, known, wanted, 0.05 * tol * scale)
                good = wanted == k and bool((upper - values[:wanted] <= tol * scale).all())
                width = float((upper - values[:wanted]).clamp(max=1e300).sum())
                stalls, narrowest = (0, width) if width < 0.9 * narrowest else (stalls + 1, narrowest)
            if checked and not (good or full or spent) and (new == 0 or stalls > 3) and again < 3:
                # Unconverged directions in the basis hold the bounds up: certify the wanted ones alone.
                basis.q, basis.hq = basis.rotate(coordinates[:, :wanted])
                known, checked, stalls, narrowest, again, new = None, False, 0, math.inf, again + 1, wanted
                continue
            if good or full or spent or new == 0 or stalls > 3:
                break
        if krylov:
            new = basis.extend(basis.hq[-new:])
        else:
            floor = 64 * torch.finfo(operator.dtype).eps * scale
            loose = (upper - values[:wanted] > 0.5 * tol * scale) & (residuals > floor)
            if checked and known is not None:  # below the ceiling (a dense spectrum) a larger basis does not help
                loose &= values[:wanted] + 0.5 * tol * scale > known
            new = basis.extend(errors[loose.to(errors.device)])
    kept = min(2 * k, len(basis))
    keep, _ = basis.rotate(coordinates[:, :kept])
    if known is not None and kept < len(basis):
        # The complement of what is kept is larger: its top is bounded in the same way.
        rest = _defect(basis, coordinates, values)[kept:, kept:]
        known = float(_upper_bounds(values[kept:], rest, known, 1, 0.05 * tol * scale)[0])
    return Eigenpairs(
        values[:wanted],
        top.T,
        residuals,
        upper,
        checked=checked,
        converged=good,
        failure_probability=0.0 if full else failure_probability if checked else 1.0,
        products=basis.products,
        probe_products=probed,
        ceiling=math.inf if known is None else known,
        basis=keep,
    )


def _defect(basis: _Basis, coordinates: Tensor, values: Tensor) -> Tensor:
    """EᵀE in Ritz coordinates, float64 (m, m), with E = (I - QQᵀ) H Q."""
    top, images = basis.rotate(coordinates)
    error = images - values[:, None].to(top) * top
    gram = (error @ error.T).double().cpu()
    return (gram + gram.T) / 2


def _run_probe(probe: _Probe, values: Tensor, defect: Tensor, k: int, tolerance: float, max_products: int) -> bool:
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
            fits = [_above(float(values[i]) + tolerance, values, defect, ceiling) <= i for i in range(k)]
            # A ceiling far below can not help much more: then the basis must grow.
            if all(fits) or gap > 0.8 * (threshold - probe.ritz_top()):
                return False
    return False


class EigenTracker:
    r"""The k largest eigenvalues along a trajectory, each evaluation starting from the last one's Ritz vectors.

    Every evaluation does Rayleigh–Ritz on the last 2k Ritz vectors at the new point and expands by residuals until
    the bounds are within ``tol``. Every ``check_every``-th evaluation is certified by a fresh random probe, whose
    ceiling serves as an estimate in between; a probe that meets something missed takes it in. The probe of
    evaluation j depends on ``seed`` and j alone, so a resumed tracker repeats exactly what it would have done.
    """

    def __init__(self, k: int, *, tol: float = 1e-3, check_every: int = 20, seed: int = 0) -> None:
        if check_every < 1:
            raise ValueError(f"check_every={check_every}: must be at least 1")
        self.k, self.tol, self.check_every, self.seed = k, tol, check_every, seed
        self.evaluations = 0
        self.basis: Tensor | None = None
        self.ceiling: float | None = None

    def update(self, operator: Operator) -> Eigenpairs:
        """Evaluates at the operator's point."""
        check = self.evaluations % self.check_every == 0 or self.basis is None
        pairs = top_eigenpairs(
            operator,
            self.k,
            tol=self.tol,
            start=self.basis,
            check=check,
            ceiling=self.ceiling,
            seed=self.seed + 7919 * self.evaluations,
        )
        self.evaluations += 1
        self.basis = pairs.basis
        if pairs.checked:
            self.ceiling = pairs.ceiling
        return pairs

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"evaluations": self.evaluations, "basis": self.basis, "ceiling": self.ceiling}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        self.evaluations, self.basis, self.ceiling = state["evaluations"], state["basis"], state["ceiling"]
