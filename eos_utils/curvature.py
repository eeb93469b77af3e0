r"""The curvature of an objective at a point, as symmetric operators on :math:`\mathbb R^P`.

.. math:: H = \nabla^2 L(\theta), \qquad G = \tfrac1n \sum_k J_k^\top \nabla^2_f\ell_k\, J_k,

with :math:`J_k = \partial f_\theta(x_k) / \partial\theta`. G is the Gauss–Newton matrix (SG's G-term; for
``mse`` its non-zero eigenvalues are those of :math:`M = \frac2n JJ^\top`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eos_utils.objective import Objective

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

    def __matmul__(self, v: Tensor) -> Tensor:
        if v.ndim == 1:
            return self.apply(v[None])[0]
        return self.apply(v.T.contiguous()).T


class GaussNewton(Hessian):
    """The Gauss–Newton matrix G: the Hessian without the curvature of the network itself; positive semidefinite."""

    gauss_newton = True


def dense(operator: Hessian, block: int = 64) -> Tensor:
    """The whole (P, P) matrix, for small P; symmetric up to rounding, returned as computed."""
    eye = torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    return torch.cat([operator.apply(rows) for rows in eye.split(block)]).T
