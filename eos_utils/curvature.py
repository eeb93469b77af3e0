r"""The curvature of an objective at a point, as symmetric operators on :math:`\mathbb R^P`.

.. math:: H = \nabla^2 L(\theta), \qquad G = \tfrac1n \sum_k J_k^\top \nabla^2_f\ell_k\, J_k,

with :math:`J_k = \partial f_\theta(x_k) / \partial\theta`. G is the Gauss–Newton matrix (SG's G-term; for
``mse`` its non-zero eigenvalues are those of :math:`M = \frac2n JJ^\top`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eos_utils.objective import Objective, Plane

NUMERICS = 1


class Hessian:
    """:math:`H = \\nabla^2 L(\\theta)` as an operator: ``H @ v`` for (P,) or a block (P, k).

    ``products`` counts Hessian-vector products, one for each direction.

    >>> import torch
    >>> from eos_utils.models import fully_connected
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> model = fully_connected(3, depth=1, width=1, outputs=1, activation="linear", bias=False)
    >>> objective = Objective(model, "half_mse", x, torch.zeros(3, 1, dtype=torch.float64))
    >>> theta = torch.tensor([0.0, 0.0, 0.0, 2.0], dtype=torch.float64)   # W = 0, a = 2
    >>> (Hessian(objective, theta) @ torch.eye(4, dtype=torch.float64)).diag()    # a²/n, and |W|²/n
    tensor([1.3333, 1.3333, 1.3333, 0.0000], dtype=torch.float64)
    """

    gauss_newton = False

    def __init__(self, objective: Objective, theta: Tensor) -> None:
        self.point = objective.linearize(theta)
        self.shape = (objective.P, objective.P)
        self.device, self.dtype = theta.device, theta.dtype
        self.products = 0

    def apply(self, rows: Tensor) -> Tensor:
        """The products for the rows of a (k, P) block, in one sweep over the data."""
        if rows.ndim != 2 or rows.shape[1] != self.shape[0]:
            raise ValueError(f"rows have shape {tuple(rows.shape)}; vectors have P={self.shape[0]} entries")
        self.products += len(rows)
        return self.point.products(rows, self.gauss_newton)

    def coarse(self) -> Compression | None:
        """This operator on the principal plane of the inputs, where that serves (see :meth:`Objective.plane`)."""
        plane = self.point.objective.plane()
        return None if plane is None else Compression(self, plane)

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim == 1:
            return self.apply(v[None])[0]
        return self.apply(v.T.contiguous()).T


class GaussNewton(Hessian):
    """The Gauss–Newton matrix G: the Hessian without the curvature of the network itself; positive semidefinite."""

    gauss_newton = True


class Compression:
    r"""The compression :math:`A = E^\top H E` to directions whose first layer sees only the inputs' principal plane.

    E lifts :math:`(\tilde W_1, \dots)` to :math:`(\tilde W_1 U^\top, \dots)`, with U the plane's axes: an
    isometry, so that eigenvalues of A interlace with those of H and Ritz values of A are Ritz values of H. A
    product with A costs matrix products with the (n, r) compressed inputs instead of the (n, d) inputs; it is exact.
    """

    def __init__(self, operator: Hessian, plane: Plane) -> None:
        self.operator, self.plane = operator, plane
        objective = operator.point.objective
        assert objective.layers is not None
        self.fan_out, self.fan_in = objective.layers[0].fan_out, objective.layers[0].fan_in
        size = objective.P - self.fan_out * (self.fan_in - plane.axes.shape[1])
        self.shape = (size, size)
        self.device, self.dtype = operator.device, operator.dtype
        self.products = 0

    def apply(self, rows: Tensor) -> Tensor:
        """A on the rows of a (k, size) block."""
        self.products += len(rows)
        z = self.plane.x
        return self.operator.point.products(rows, self.operator.gauss_newton, read=z, write=z)

    def images(self, rows: Tensor) -> Tensor:
        """H E on the rows of a (k, size) block: (k, P), at half the price of H on lifted rows."""
        self.operator.products += len(rows)
        return self.operator.point.products(rows, self.operator.gauss_newton, read=self.plane.x)

    def lift(self, rows: Tensor) -> Tensor:
        """E on rows: (k, size) to (k, P)."""
        return self._first(rows, self.plane.axes.T)

    def restrict(self, rows: Tensor) -> Tensor:
        r""":math:`E^\top` on rows: (k, P) to (k, size)."""
        return self._first(rows, self.plane.axes)

    def _first(self, rows: Tensor, matrix: Tensor) -> Tensor:
        split = self.fan_out * matrix.shape[0]
        first = rows[:, :split].view(len(rows), self.fan_out, -1) @ matrix
        return torch.cat([first.flatten(1), rows[:, split:]], dim=1)

    def leakage(self, images: Tensor) -> float:
        r""":math:`\|(I - EE^\top) HQ\|_2` of images :math:`HQ` (k, P)."""
        first = images[:, : self.fan_out * self.fan_in].view(len(images), self.fan_out, self.fan_in)
        gram, axes = torch.zeros(len(images), len(images), dtype=torch.float64), self.plane.axes
        for units in first.split(64, dim=1):  # the other layers lie in the plane
            rest = (units - (units @ axes) @ axes.T).flatten(1)
            gram += (rest @ rest.T).double().cpu()
        return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0)) ** 0.5


def dense(operator: Hessian, block: int = 64) -> Tensor:
    """The whole (P, P) matrix, for small P; symmetric up to rounding, returned as computed."""
    eye = torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    return torch.cat([operator.apply(rows) for rows in eye.split(block)]).T
