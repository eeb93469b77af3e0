r"""The full-batch loss where each rank holds a part of the examples.

Rank r of p holds :math:`n_r` of the n examples and computes with their mean, :math:`L_r`. Then

.. math:: L = \sum_r \frac{n_r}{n} L_r, \qquad \nabla L = \sum_r \frac{n_r}{n}\nabla L_r, \qquad
   Hv = \sum_r \frac{n_r}{n} H_r v, \qquad Mv = \frac\kappa n J \sum_r J_r^\top v_r :

one all-reduce of :math:`P + 1 + nc` numbers for a gradient with the outputs, of P for each direction of a Hessian or
Gauss–Newton product, of P + nc for each of a Gram product. θ, Krylov bases and everything made of them are the same
on all ranks.
"""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from eos_utils.gram import GramOperator, _scale
from eos_utils.models import couples_examples
from eos_utils.objective import Linearization, Objective, Plane
from eos_utils.ranks import Ranks

NUMERICS = 1


class ShardedObjective(Objective):
    """``whole``, of which this rank keeps its part: ``local``, the examples ``rows``.

    :class:`eos_utils.curvature.Hessian`, :class:`eos_utils.curvature.GaussNewton` and gradient descent take it as they
    take any :class:`Objective`; all ranks must ask for the same things in the same order. y is held whole by all, the
    inputs are not. Raises ``ValueError`` for a model with BatchNorm, and for fewer examples than ranks.

    >>> from eos_utils.models import fully_connected
    >>> x, y = torch.eye(5, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)
    >>> whole = Objective(fully_connected(5, width=3, outputs=1), "half_mse", x, y)
    >>> theta = torch.linspace(-1, 1, whole.P, dtype=torch.float64)
    >>> parts = [ShardedObjective(whole, Ranks(r, 2, theta.device)) for r in (0, 1)]
    >>> [(part.rows.start, part.rows.stop, part.weight) for part in parts]
    [(0, 2, 0.4), (2, 5, 0.6)]
    >>> gradient = sum(part.weight * part.local.gradient(theta)[1] for part in parts)
    >>> torch.allclose(gradient, whole.gradient(theta)[1])    # the all-reduce
    True
    """

    def __init__(self, whole: Objective, ranks: Ranks) -> None:
        if couples_examples(whole.model):
            raise ValueError("BatchNorm couples the examples, which ranks do not share: run it in a single process")
        if whole.n < ranks.size:
            raise ValueError(f"n={whole.n} examples for {ranks.size} ranks: each needs at least one")
        self.ranks = ranks
        self.rows = slice(whole.n * ranks.rank // ranks.size, whole.n * (ranks.rank + 1) // ranks.size)
        x, y = whole.x[self.rows].clone(), whole.y[self.rows].clone()  # a view would keep the whole in memory
        self.local = Objective(whole.model, whole.loss, x, y, whole.chunk)
        self.weight = self.local.n / whole.n
        self.model, self.loss, self.layers = whole.model, whole.loss, whole.layers
        self.shapes, self.P = whole.shapes, whole.P
        self.y, self.n, self.chunk = whole.y, whole.n, self.local.chunk
        plane = whole.plane()
        self._plane = None if plane is None else Plane(plane.axes, plane.x[self.rows].clone())
        self._plane_known = True

    def __getattr__(self, name: str) -> NoReturn:
        why = "; a rank holds a part of the inputs only, in .local.x" if name == "x" else ""
        raise AttributeError(f"{type(self).__name__} has no {name}{why}")

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.local.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of θ and of the products."""
        return self.local.dtype

    def placed(self, part: Tensor, dim: int = 0) -> Tensor:
        """This rank's rows of something with one row an example, zeros at those of the others: the sum is the whole."""
        shape = list(part.shape)
        shape[dim] = self.n
        whole = part.new_zeros(shape)
        whole.narrow(dim, self.rows.start, self.local.n).copy_(part)
        return whole

    def outputs(self, theta: Tensor) -> Tensor:
        r""":math:`f_\theta(x_k)` for all examples, (n, c)."""
        return self.ranks.sum(self.placed(self.local.outputs(theta)))

    def value(self, theta: Tensor) -> Tensor:
        r""":math:`L(\theta)`, a scalar tensor."""
        return self.ranks.sum(self.local.value(theta) * self.weight)

    def gradient(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r""":math:`L(\theta)`, :math:`\nabla L(\theta)` (P,) and the outputs (n, c), in one all-reduce."""
        value, gradient, outputs = self.local.gradient(theta)
        mine = torch.cat([gradient * self.weight, value[None] * self.weight, self.placed(outputs).flatten()])
        gradient, value, outputs = self.ranks.sum(mine).split([self.P, 1, self.y.numel()])
        return value[0], gradient, outputs.view(self.y.shape)

    def linearize(self, theta: Tensor) -> Linearization:
        """The cached point at θ, of which each rank keeps its examples' passes."""
        return ShardedLinearization(self, theta.detach())


class ShardedLinearization(Linearization):
    """Products at one θ: of this rank's examples, then summed over the ranks, one all-reduce for each block."""

    def __init__(self, objective: ShardedObjective, theta: Tensor) -> None:
        self.objective, self.theta = objective, theta
        self.ranks, self.weight = objective.ranks, objective.weight
        self.share = Linearization(objective.local, theta)

    def products(
        self, v: Tensor, gauss_newton: bool = False, read: Tensor | None = None, write: Tensor | None = None
    ) -> Tensor:
        """H v for the rows of ``v``, (k, P) to (k, P); ``read`` and ``write`` have this rank's rows."""
        return self.ranks.sum(self.share.products(v, gauss_newton, read, write) * self.weight)


class ShardedGram(GramOperator):
    r"""M as an operator on :math:`\mathbb R^{nc}`; vectors are held whole by all ranks. Arguments: see its base."""

    def __init__(self, objective: ShardedObjective, theta: Tensor, part: str = "all") -> None:
        super().__init__(objective.local, theta, part)
        self.whole, self.scale = objective, _scale(objective)
        self.shape = (objective.y.numel(),) * 2

    def apply(self, rows: Tensor) -> Tensor:
        """The products for the rows of a (k, nc) block, in two sweeps over the data and two all-reduces."""
        o, t = self.objective, self.theta[self.part]
        mine = rows.reshape(-1, *self.whole.y.shape)[:, self.whole.rows]
        u = rows.new_zeros(len(rows), len(t))  # Jᵀv
        for x, v in zip(o.x.split(o.chunk), mine.split(o.chunk, dim=1), strict=True):
            leaf, f = self.kept or self._graph(x)
            u += torch.stack([torch.autograd.grad(f, leaf, row, retain_graph=True)[0] for row in v])
        u = self.whole.ranks.sum(u)
        images = [
            torch.stack([torch.func.jvp(partial(self._outputs, x=x), (t,), (row,))[1] for row in u])
            for x in o.x.split(o.chunk)
        ]
        return self.scale * self.whole.ranks.sum(self.whole.placed(torch.cat(images, dim=1), dim=1)).flatten(1)
