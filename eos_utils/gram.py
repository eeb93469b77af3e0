r"""The Gram matrix of the gradients of the outputs (the empirical tangent kernel), :math:`M = \frac\kappa n JJ^\top`.

The row :math:`ic + a` of :math:`J = \partial F/\partial\theta`, (nc, P), belongs to output a of example i: the order
of ``outputs.reshape(-1)``. κ is the curvature of the loss in an output: 2 for ``mse``, SG's :math:`\frac2n JJ^\top`
(section 2), and 1 for ``half_mse``. The non-zero eigenvalues of M are those of the Gauss–Newton matrix, and gradient
flow moves the residual by :math:`\dot D = -MD`. SG, section 3.2, splits :math:`M = M_A + M_W`: A is the last layer
(with its bias, if it has one), W all others. Both carry the factor :math:`\kappa/n`, which is not printed there.

**Without J.** The gradient of output a of example i in an affine layer :math:`z_l = W_l\alpha_l + b_l` is
:math:`\beta_{l,ia}\alpha_{l,i}^\top`, with :math:`\beta_{l,ia} = \partial f_{ia}/\partial z_{l,i}`. So

.. math:: (JJ^\top)_{ia,jb} = \sum_l \bigl(\langle\alpha_{l,i}, \alpha_{l,j}\rangle + [b_l\text{ exists}]\bigr)
   \langle\beta_{l,ia}, \beta_{l,jb}\rangle:

Hadamard products of small Gram matrices, of cost :math:`n^2\cdot\text{width}` where J has :math:`n\cdot P` entries.
The one large product, :math:`XX^\top`, does not depend on θ.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eos_utils.linearize import _derivatives
from eos_utils.objective import Objective

NUMERICS = 1

CURVATURE = {"half_mse": 1.0, "mse": 2.0}  # d²ℓ/df² where it is the same everywhere


def _scale(objective: Objective) -> float:
    """κ/n."""
    name = objective.loss.name
    if name not in CURVATURE:
        raise ValueError(f"loss={name!r} has no constant curvature in the outputs; M needs {' or '.join(CURVATURE)}")
    return CURVATURE[name] / objective.n


def _checked(objective: Objective, theta: Tensor) -> Tensor:
    if theta.shape != (objective.P,):
        raise ValueError(f"theta has shape {tuple(theta.shape)}; this objective has P={objective.P} parameters")
    return theta.detach()


def output_layer(objective: Objective) -> slice:
    """Where SG's A, the last layer, lies in θ; ``ValueError`` if the parameters do not end in those of a ``Linear``."""
    owner = list(objective.shapes)[-1].rpartition(".")[0]
    last = objective.model.get_submodule(owner)
    if not isinstance(last, nn.Linear):
        raise ValueError(f"the last parameters belong to {type(last).__name__} {owner!r}, so there is no last layer A")
    size = sum(s.numel() for name, s in objective.shapes.items() if name.rpartition(".")[0] == owner)
    return slice(objective.P - size, objective.P)


class Parts(NamedTuple):
    """M = M_A + M_W, each (nc, nc) and exactly symmetric."""

    M: Tensor
    M_A: Tensor
    M_W: Tensor


class Gram:
    r"""M of a fully connected network, dense, at any θ; keeps :math:`XX^\top` from one θ to the next.

    Memory: a few matrices of (nc, nc), and the factors. Raises ``ValueError`` for ``cross_entropy``, whose curvature in
    the outputs is not constant, for other modules (:class:`GramOperator` takes those, and of convolutions
    :class:`eos_utils.jacobian.ModuleGram`), and for a θ of another size.

    >>> import torch
    >>> from eos_utils.models import fully_connected
    >>> model = fully_connected(2, depth=1, width=1, outputs=1, activation="linear", bias=False)    # f = a w·x
    >>> objective = Objective(model, "mse", torch.eye(2), torch.ones(2, 1))
    >>> parts = Gram(objective).at(torch.tensor([3.0, 1.0, 2.0]))    # w = (3, 1), a = 2
    >>> parts.M_A    # (2/n) X wwᵀ Xᵀ
    tensor([[9., 3.],
            [3., 1.]])
    >>> parts.M_W    # (2/n) a² X Xᵀ
    tensor([[4., 0.],
            [0., 4.]])
    """

    def __init__(self, objective: Objective) -> None:
        if objective.layers is None:
            raise ValueError("the network is not fully connected: M has no factors, but GramOperator takes any module")
        self.objective, self.scale, self.layers = objective, _scale(objective), objective.layers
        self.x = objective.x.flatten(1)
        self.inputs = self.x @ self.x.T

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        r"""For each layer :math:`\alpha_l`, (n, fan_in), and :math:`\beta_l`, (n, c, fan_out).

        β has shape (1, c, fan_out) where it is the same for all examples: in the last layer, and in linear networks.
        """
        theta = _checked(self.objective, theta)
        weights = [theta[c.weight].view(c.fan_out, c.fan_in) for c in self.layers]
        alpha, slopes = [self.x], []
        for c, w in zip(self.layers[:-1], weights[:-1], strict=True):
            z = nn.functional.linear(alpha[-1], w, None if c.bias is None else theta[c.bias])
            a, slope, _ = _derivatives(c.activation, z)
            alpha.append(a)
            slopes.append(slope)
        beta = [torch.eye(self.layers[-1].fan_out, dtype=theta.dtype, device=theta.device)[None]]
        for w, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
            b = beta[-1] @ w
            beta.append(b if slope is None else b * slope[:, None])
        return list(zip(alpha, beta[::-1], strict=True))

    def outputs(self, theta: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The outputs F, (n, c), from the factors at θ: a small product where the objective would sweep the data."""
        last, alpha = self.layers[-1], factors[-1][0]
        weight = theta[last.weight].view(last.fan_out, last.fan_in)
        return nn.functional.linear(alpha, weight, None if last.bias is None else theta[last.bias])

    def at(self, theta: Tensor, factors: list[tuple[Tensor, Tensor]] | None = None) -> Parts:
        """M, M_A and M_W at θ, from one forward and one backward sweep, or from the ``factors`` if they are known."""
        n, c = self.objective.y.shape
        m_a, m_w = theta.new_zeros(2, n, c, n, c)
        for i, (alpha, beta) in enumerate(factors or self.factors(theta)):
            inner = alpha @ alpha.T if i else self.inputs
            if self.layers[i].bias is not None:
                inner = inner + 1
            rows = beta.flatten(0, 1)
            outer = (rows @ rows.T).view(len(beta), c, len(beta), c)
            part = m_a if i == len(self.layers) - 1 else m_w
            part.addcmul_(inner[:, None, :, None], outer, value=self.scale / 2)
        # A product of a matrix and its transpose is symmetric only up to rounding; twice its symmetric part exactly.
        m_a, m_w = (half + half.T for half in (m_a.view(n * c, n * c), m_w.view(n * c, n * c)))
        return Parts(m_a + m_w, m_a, m_w)


class Matrix:
    """A dense symmetric matrix as an operator.

    ``EigenTracker(2, tol=1e-6).update(Matrix(M))`` takes a few products where ``eigh`` takes :math:`O(n^3)`.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"the matrix has shape {tuple(matrix.shape)}; it must be square")
        self.matrix, self.shape = matrix, (len(matrix), len(matrix))
        self.device, self.dtype = matrix.device, matrix.dtype

    def apply(self, rows: Tensor) -> Tensor:
        """The products for the rows of a (k, n) block."""
        return rows @ self.matrix


class GramOperator:
    r"""M of any module as an operator on :math:`\mathbb R^{nc}`: :math:`v \mapsto \frac\kappa n J(J^\top v)`.

    ``part``: 'all', 'A' (the last layer's parameters alone) or 'W' (all others). J belongs to the outputs of the whole
    batch, so it is well defined where BatchNorm couples the examples too; otherwise it is swept in the objective's
    chunks. Raises ``ValueError`` for ``cross_entropy``, for a θ of another size, for another ``part``, and for 'A' and
    'W' where the module does not end in a ``Linear``.
    """

    def __init__(self, objective: Objective, theta: Tensor, part: str = "all") -> None:
        if part not in ("all", "A", "W"):
            raise ValueError(f"part={part!r} is unknown; choose one of all, A, W")
        self.objective, self.scale, self.theta = objective, _scale(objective), _checked(objective, theta)
        a = slice(0, objective.P) if part == "all" else output_layer(objective)
        self.part = slice(0, a.start) if part == "W" else a
        self.shape, self.device, self.dtype = (objective.y.numel(),) * 2, theta.device, theta.dtype
        # One chunk's forward pass is kept; a larger batch is swept again for every block.
        self.kept = self._graph(objective.x) if objective.chunk == objective.n else None

    def _outputs(self, t: Tensor, x: Tensor) -> Tensor:
        """The chunk's outputs, (chunk, c), as a function of the chosen part of θ."""
        return self.objective._call(torch.cat([self.theta[: self.part.start], t, self.theta[self.part.stop :]]), x)

    def _graph(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            t = self.theta[self.part].clone().requires_grad_(True)
            return t, self._outputs(t, x)

    def apply(self, rows: Tensor) -> Tensor:
        """The products for the rows of a (k, nc) block, in two sweeps over the data."""
        if rows.ndim != 2 or rows.shape[1] != self.shape[0]:
            raise ValueError(f"rows have shape {tuple(rows.shape)}; vectors have nc={self.shape[0]} entries")
        o, t = self.objective, self.theta[self.part]
        u = rows.new_zeros(len(rows), len(t))  # Jᵀv
        for x, v in zip(o.x.split(o.chunk), rows.reshape(-1, *o.y.shape).split(o.chunk, dim=1), strict=True):
            leaf, f = self.kept or self._graph(x)
            u += torch.stack([torch.autograd.grad(f, leaf, row, retain_graph=True)[0] for row in v])
        images = [
            torch.stack([torch.func.jvp(partial(self._outputs, x=x), (t,), (row,))[1] for row in u])
            for x in o.x.split(o.chunk)
        ]
        return self.scale * torch.cat(images, dim=1).flatten(1)
