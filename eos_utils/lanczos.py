r"""The largest eigenvalues of a symmetric operator, with a certificate that none was missed.

**Method.** An orthonormal basis Q (kept orthonormal by repeated Gram–Schmidt) is grown by block Lanczos steps from
a random start, or by residuals from vectors that are nearly eigenvectors; Rayleigh–Ritz on it gives Ritz values
:math:`\theta_1 \ge \theta_2 \ge \dots`, which never exceed the eigenvalues.

**Coarse space.** An operator may know a subspace, spanned by an isometry E, on which its compression
:math:`A = E^\top H E` is cheap and keeps the leading eigenvectors (:class:`eos_utils.curvature.Compression`: the
principal plane of the inputs). Then the work is done there, and H itself is applied once to the result. Ritz
values of A are Ritz values of H, so nothing is approximated: what the subspace leaves out shows in the residuals,
and where these are too large, H takes over.

**Certificate.** See :mod:`eos_utils.certificate`: :math:`\theta_i \le \lambda_i \le \bar\lambda_i`, all copies
counted, but for a stated failure probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from eos_utils.basis import Basis, Operator, random_rows
from eos_utils.certificate import Probe, defect_gram, run_probe, upper_bounds

NUMERICS = 1

LEAKAGE_GROWTH = 1.5  # what the leakage may do between checks
WHICH = ("largest", "smallest", "magnitude")


class CoarseOperator(Operator, Protocol):
    r"""The compression :math:`E^\top H E` of an operator H to the range of an isometry E."""

    def lift(self, rows: Tensor) -> Tensor:
        """E on rows."""

    def restrict(self, rows: Tensor) -> Tensor:
        r""":math:`E^\top` on rows."""

    def images(self, rows: Tensor) -> Tensor:
        """H E on rows."""

    def leakage(self, images: Tensor) -> float:
        r""":math:`\|(I - EE^\top) HQ\|_2` of images HQ."""


@dataclass(frozen=True)
class Eigenpairs:
    r"""The k eigenvalues asked for, the outermost first.

    ``values`` (k,) float64: Ritz values; ``vectors`` (P, k); ``residuals`` :math:`\|Hv_i - \theta_i v_i\|`;
    ``upper`` (k,): the bound on the far side (above for the largest, below for the smallest, in magnitude otherwise):
    no more than i eigenvalues lie beyond ``upper[i]``; this holds with ``failure_probability`` if ``checked``, else
    it assumes that nothing outside of the basis rose since the last check. ``converged``: bounds (or, where
    there are none, residuals) are within the tolerance. ``products``: Hessian-vector products used, of which
    ``probe_products`` for the check; ``coarse_products``: products with the compression. ``basis``: rows worth
    recycling (of the coarse space, where a tracker stayed in it); ``ceiling``: bound for what they leave out;
    ``leakage``: how far H leads out of the coarse space there, infinite if that space did not suffice.
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
    coarse_products: int = 0
    leakage: float = math.inf


class _Negated:
    """-H."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype

    def apply(self, rows: Tensor) -> Tensor:
        return -self.operator.apply(rows)


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    start: Tensor | None = None,
    check: bool = True,
    ceiling: float | None = None,
    failure_probability: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
) -> Eigenpairs:
    r"""``k`` outermost eigenvalues of a symmetric operator, each with a bound on both sides.

    ``which``: 'largest' or 'smallest' (algebraically), or largest in 'magnitude', which costs both.
    ``tol``: the wanted bound on every :math:`|\bar\lambda_i - \theta_i|`, relative to the largest size of a Ritz value.
    ``start``: rows (m, P) to begin from, as an earlier result's ``basis``; without it a random vector is used.
    ``check``: certify completeness with a fresh random vector; without it ``ceiling`` from an
    earlier check stands in. Raises ``ValueError`` for k < 1 or k > P and ``FloatingPointError`` if a product is not
    finite. A result that ran out of ``max_products`` has ``converged=False``, keeps valid bounds
    and may hold fewer than k values.

    >>> import torch
    >>> class Diagonal:
    ...     shape, device, dtype = (100, 100), torch.device("cpu"), torch.float64
    ...     def apply(self, rows):
    ...         return rows * torch.cat([torch.tensor([5.0, 5.0, -9.0]), torch.linspace(0, 1, 97)])
    >>> top_eigenpairs(Diagonal(), 2, tol=1e-6).values.round(decimals=3)    # the repeated 5 is found
    tensor([5., 5.], dtype=torch.float64)
    >>> top_eigenpairs(Diagonal(), 2, which="magnitude", tol=1e-6).values.round(decimals=3)
    tensor([-9.,  5.], dtype=torch.float64)
    """
    if which not in WHICH:
        raise ValueError(f"which={which!r} is unknown; choose one of {', '.join(WHICH)}")
    search = _Search(k, tol, check, failure_probability, max_products, seed)
    if which == "largest":
        return search.run(operator, start, ceiling)
    if which == "smallest":
        return _flip(search.run(_Negated(operator), start, None if ceiling is None else -ceiling))
    if start is not None or ceiling is not None:
        raise ValueError("which='magnitude' looks at both ends of the spectrum and takes neither start nor ceiling")
    return _outermost(search.run(operator), _flip(search.run(_Negated(operator))), k)


def _flip(pairs: Eigenpairs) -> Eigenpairs:
    return replace(pairs, values=-pairs.values, upper=-pairs.upper, ceiling=-pairs.ceiling)


def _outermost(top: Eigenpairs, bottom: Eigenpairs, k: int) -> Eigenpairs:
    """The k of largest magnitude of both; a direction found from both ends counts once."""
    values, vectors = torch.cat([top.values, bottom.values]), torch.cat([top.vectors, bottom.vectors], dim=1)
    # The sign tells the end where an eigenvalue is one of the outermost; zeros are taken from the upper end.
    outward = torch.cat([top.values, -bottom.values])
    rounding = 64 * torch.finfo(vectors.dtype).eps * float(values.abs().max())
    outward = outward.where(outward.abs() > rounding, torch.zeros_like(outward))
    chosen: list[int] = []
    for i in outward.argsort(descending=True, stable=True).tolist():
        known = vectors[:, chosen]
        if len(chosen) < k and float((vectors[:, i] - known @ (known.T @ vectors[:, i])).norm()) > 0.7:
            chosen.append(i)
    # Beyond the i-th of all bounds, both ends together have at most i eigenvalues.
    bounds = torch.cat([top.upper.clamp(min=0), (-bottom.upper).clamp(min=0)]).sort(descending=True).values
    values = values[chosen]
    return Eigenpairs(
        values,
        vectors[:, chosen],
        torch.cat([top.residuals, bottom.residuals])[chosen],
        torch.where(values < 0, -bounds[: len(values)], bounds[: len(values)]),
        checked=top.checked and bottom.checked,
        converged=top.converged and bottom.converged and len(chosen) == k,
        failure_probability=min(1.0, top.failure_probability + bottom.failure_probability),
        products=top.products + bottom.products,
        probe_products=top.probe_products + bottom.probe_products,
        ceiling=max(top.ceiling, -bottom.ceiling),
        basis=vectors[:, chosen].T,
        coarse_products=top.coarse_products,
    )


def _coarse_of(operator: Operator) -> CoarseOperator | None:
    """The operator's compression, if it has one that serves."""
    return operator.coarse() if hasattr(operator, "coarse") else None


@dataclass(frozen=True)
class _Search:
    """The settings of :func:`top_eigenpairs`; ``keep``: how many Ritz vectors to hand on; ``plane``: whether to
    use a coarse space."""

    k: int
    tol: float
    check: bool
    failure_probability: float
    max_products: int
    seed: int
    keep: int = 0
    plane: bool = True

    def run(
        self,
        operator: Operator,
        start: Tensor | None = None,
        ceiling: float | None = None,
        allowance: float | None = None,
    ) -> Eigenpairs:
        """The k largest. ``allowance``: the operator is a compression, and ‖(I - EEᵀ)HQ‖ is at most that."""
        k, tol, size = self.k, self.tol, operator.shape[0]
        if isinstance(k, bool) or not isinstance(k, int) or k < 1 or k > size:
            raise ValueError(f"k={k!r}: the number of eigenvalues must lie between 1 and P={size}")
        if not tol > 0:
            raise ValueError(f"tol={tol!r}: must be positive")
        generator = torch.Generator().manual_seed(self.seed)
        basis, keep = Basis(operator), self.keep or 2 * k
        coarse = _coarse_of(operator) if self.check and self.plane and 8 * k < size else None
        inner, leakage, krylov = None, math.inf, start is None and coarse is None
        if coarse is not None:
            # The larger the basis, the lower the top of what it leaves out, and the fewer products the check takes.
            keep = self.keep or 2 * k + 12
            narrow = replace(self, k=min(2 * k, k + 8), check=False, tol=0.15 * math.sqrt(tol), keep=keep)
            inner = narrow.run(coarse, None if start is None else coarse.restrict(start))
            images = coarse.images(inner.basis)
            leakage, basis.products = coarse.leakage(images), len(images)
            new = basis.extend(coarse.lift(inner.basis), images)
        else:
            new = basis.extend(random_rows(1, operator, generator) if start is None else start.to(operator.device))
        if krylov:
            new = basis.lanczos(min(3 * k, self.max_products) - 1) or new
        checked, known, probed, good = False, ceiling, 0, False
        stalls, narrowest, again = 0, math.inf, 0
        while True:
            values, coordinates = basis.ritz()
            wanted = min(k, len(basis))
            top, images = basis.rotate(coordinates[:, :wanted])
            scale = max(float(values.abs().max()), 1e-30)
            errors = images - values[:wanted, None].to(top) * top
            residuals = errors.norm(dim=1).double().cpu()
            full, spent = len(basis) == size, basis.products >= self.max_products
            if wanted < k and not full and not spent:
                # An invariant subspace smaller than k is left by a fresh random direction.
                new = basis.lanczos(1) if krylov else basis.extend(basis.hq[-new:])
                new = new or basis.extend(random_rows(1, operator, generator))
                continue
            upper = torch.full((wanted,), math.inf, dtype=torch.float64)
            good = wanted == k and not self.check and known is None and bool((residuals <= tol * scale).all())
            # Errors of eigenvalues are quadratic in the residuals, once a ceiling is known.
            if bool((residuals <= math.sqrt(tol) * scale).all()) or full or spent or new == 0:
                defect = defect_gram(basis, coordinates, values, allowance or 0.0)
                if full and allowance is None:
                    known, checked = -math.inf, True
                # A ceiling of an earlier point that reaches into the wanted values is of no use any more.
                stale = known is not None and known > float(values[wanted - 1]) + tol * scale
                if stale and allowance is not None:
                    break
                if (self.check or stale) and not checked and not spent:
                    # Up to four probes may be tried for one certificate: each gets its share of the risk.
                    probe = Probe.start(basis, self.failure_probability / 4, generator)
                    before = basis.products
                    # With room for the evaluations that stay in the coarse space until the next check.
                    room = 0.0 if math.isinf(leakage) else (LEAKAGE_GROWTH * leakage) ** 2
                    roomy = defect + room * torch.eye(len(defect), dtype=defect.dtype)
                    aim = (0.7 if room else 1.0) * tol * scale
                    missed = run_probe(probe, values, roomy, wanted, aim, self.max_products)
                    probed += basis.products - before
                    known, checked, krylov = None if missed else probe.ceiling(), not missed, False
                    if missed:  # keep the best so far, add what the probe saw, and look again with another probe
                        basis.q, basis.hq = basis.rotate(coordinates[:, :keep])
                        leakage = math.inf  # what the coarse space missed may lie outside of it
                    # Its products are paid for, and a larger basis keeps the ceiling valid.
                    if probe.images and (missed or not again):
                        new = basis.extend(torch.cat(probe.rows[: len(probe.images)]), torch.cat(probe.images))
                        continue
                if known is not None:
                    upper = upper_bounds(values, defect, known, wanted, 0.05 * tol * scale)
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
                new = basis.lanczos(min(3, self.max_products - basis.products))
            else:
                floor = 64 * torch.finfo(operator.dtype).eps * scale
                loose = (upper - values[:wanted] > 0.5 * tol * scale) & (residuals > floor)
                if checked and known is not None:  # below the ceiling (a dense spectrum) a larger basis does not help
                    loose &= values[:wanted] + 0.5 * tol * scale > known
                new = basis.extend(errors[loose.to(errors.device)])
                leakage = math.inf if new else leakage
        kept = min(keep if math.isfinite(leakage) or self.keep else 2 * k, len(basis))
        rows = basis.vectors(coordinates[:, :kept])
        if known is not None and kept < len(basis):
            # The complement of what is kept is larger: its top is bounded in the same way.
            rest = defect_gram(basis, coordinates, values)[kept:, kept:]
            known = float(upper_bounds(values[kept:], rest, known, 1, 0.05 * tol * scale)[0])
        return Eigenpairs(
            values[:wanted],
            top.T,
            residuals,
            upper,
            checked=checked,
            converged=good,
            failure_probability=0.0 if full else self.failure_probability if checked else 1.0,
            products=basis.products,
            probe_products=probed,
            ceiling=math.inf if known is None else known,
            basis=rows,
            coarse_products=0 if inner is None else inner.products,
            leakage=leakage,
        )


class EigenTracker:
    r"""The k largest eigenvalues along a trajectory, each evaluation starting from the last one's Ritz vectors.

    Every evaluation does Rayleigh–Ritz on the last Ritz vectors at the new point and expands by residuals until
    the bounds are within ``tol``. Every ``check_every``-th evaluation is certified by a fresh random probe, whose
    ceiling serves as an estimate in between; a probe that meets something missed takes it in. Where the operator
    has a coarse space that suffices, evaluations between checks stay in it, and take 1.5 times the leakage seen at
    the last check into their bounds; bounds that do not close that way cause a check. The probe of evaluation j
    depends on ``seed`` and j alone, so a resumed tracker repeats exactly what it would have done.
    """

    def __init__(self, k: int, *, tol: float = 1e-3, check_every: int = 20, seed: int = 0) -> None:
        if check_every < 1:
            raise ValueError(f"check_every={check_every}: must be at least 1")
        self.k, self.tol, self.check_every, self.seed = k, tol, check_every, seed
        self.evaluations = 0
        self.basis: Tensor | None = None
        self.ceiling: float | None = None
        self.allowance: float | None = None  # None: the work is done in the whole space
        self.failures = 0

    def update(self, operator: Operator) -> Eigenpairs:
        """Evaluates at the operator's point."""
        search = _Search(self.k, self.tol, True, 1e-3, 1000, self.seed + 7919 * self.evaluations)
        pairs: Eigenpairs | None = None
        spent = 0
        if self.evaluations % self.check_every and self.basis is not None:
            pairs = self._between_checks(operator, replace(search, check=False))
            if self.allowance is not None:
                self.failures = 0 if pairs.converged else self.failures + 1
                if not pairs.converged:
                    spent, pairs = pairs.coarse_products, None
        if pairs is None:
            pairs = self._checked(operator, replace(search, plane=self.failures < 3))
            pairs = replace(pairs, coarse_products=pairs.coarse_products + spent)
        self.evaluations += 1
        return pairs

    def _between_checks(self, operator: Operator, search: _Search) -> Eigenpairs:
        if self.allowance is None:
            pairs = search.run(operator, self.basis, self.ceiling)
            self.basis, self.ceiling = pairs.basis, pairs.ceiling if pairs.checked else self.ceiling
            return pairs
        coarse = _coarse_of(operator)
        assert coarse is not None and self.basis is not None
        search = replace(search, keep=len(self.basis))
        pairs = search.run(coarse, self.basis, self.ceiling, self.allowance)
        if pairs.converged:
            self.basis = pairs.basis
        return replace(
            pairs,
            vectors=coarse.lift(pairs.vectors.T).T,
            residuals=(pairs.residuals**2 + self.allowance**2).sqrt(),
            products=0,
            coarse_products=pairs.products,
            leakage=self.allowance,
        )

    def _checked(self, operator: Operator, search: _Search) -> Eigenpairs:
        coarse, start = _coarse_of(operator), self.basis
        if start is not None and coarse is not None and self.allowance is not None:
            start = coarse.lift(start)
        pairs = search.run(operator, start)
        self.ceiling = pairs.ceiling
        if coarse is not None and math.isfinite(pairs.leakage):
            self.basis, self.allowance = coarse.restrict(pairs.basis), LEAKAGE_GROWTH * pairs.leakage
        else:
            self.basis, self.allowance = pairs.basis, None
        return pairs

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {name: getattr(self, name) for name in ("evaluations", "basis", "ceiling", "allowance", "failures")}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value)
