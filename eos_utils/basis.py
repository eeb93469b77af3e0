r"""Symmetric operators, and orthonormal bases on which Rayleigh–Ritz is done.

For orthonormal rows Q, :math:`T = Q H Q^\top` has the Ritz values :math:`\theta_1 \ge \theta_2 \ge \dots`;
by Courant–Fischer :math:`\theta_i \le \lambda_i(H)`, always (Parlett 1998).
"""

from __future__ import annotations

from typing import Protocol

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


class Basis:
    """Orthonormal rows q, their images hq, and t = q H qᵀ.

    >>> import torch
    >>> class Diagonal:    # eigenvalues 5, 2 and -1
    ...     shape, device, dtype = (3, 3), torch.device("cpu"), torch.float64
    ...     def apply(self, rows):
    ...         return rows * torch.tensor([5.0, 2.0, -1.0])
    >>> basis = Basis(Diagonal())
    >>> basis.extend(torch.ones(1, 3).double()), basis.lanczos(2)    # new rows
    (1, 2)
    >>> [round(v, 4) for v in basis.ritz()[0].tolist()]    # 3 rows span R³: exact
    [5.0, 2.0, -1.0]
    """

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
        self.q = torch.cat([self.q, rows]) if len(self) else rows
        self.hq = torch.cat([self.hq, images]) if len(self.hq) else images
        return len(rows)

    def lanczos(self, steps: int) -> int:
        """Up to ``steps`` Lanczos steps from the last row; returns how many directions were new.

        The host waits for the device once, at the end: what a breakdown left behind is dropped then.
        """
        sizes, before = [], len(self)
        row, image = self.q[-1:], self.hq[-1:]
        rows, images = row[:0], row[:0]
        for _ in range(min(steps, self.q.shape[1] - before)):
            rest = image / image.norm()
            for _ in range(2):
                rest = rest - (rest @ self.q.T) @ self.q
                rest = rest - (rest @ rows.T) @ rows
            sizes.append(rest.norm())
            row = rest / sizes[-1]
            image = self.operator.apply(row)
            self.products += 1
            rows, images = torch.cat([rows, row]), torch.cat([images, image])
        if not sizes:
            return 0
        floor, new = 64 * torch.finfo(row.dtype).eps, 0
        for size in torch.stack(sizes).tolist():
            if not size > floor:
                break
            new += 1
        if not bool(torch.isfinite(images[:new]).all() & torch.isfinite(self.hq[-1]).all()):
            raise FloatingPointError("the operator returned NaN or infinite values; the point is not finite")
        return self.extend(rows[:new], images[:new])

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
        return self.vectors(coordinates), coordinates.to(self.q).T @ self.hq

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Rows in other coordinates (columns)."""
        return coordinates.to(self.q).T @ self.q


def random_rows(count: int, operator: Operator, generator: torch.Generator) -> Tensor:
    """Gaussian rows, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(count, operator.shape[0], generator=generator).to(operator.device, operator.dtype)
