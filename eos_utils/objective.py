r"""The full-batch loss :math:`L(\theta) = \frac1n \sum_k \ell(f_\theta(x_k), y_k)` of one flat vector θ.

θ holds the module's parameters one after the other, in the order of ``model.parameters()``. The batch is swept
in chunks, which bound the memory and change results only by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eos_utils.linearize import FullyConnectedPoint, ModulePoint
from eos_utils.losses import Loss, get_loss
from eos_utils.models import couples_examples, layers_of

NUMERICS = 1

FLOATS_PER_CHUNK = 2**27  # activations kept for one chunk: 512 MiB in float32
PLANE = 128  # dimension of the principal plane of the inputs


@dataclass(frozen=True)
class Plane:
    r"""An orthonormal basis ``axes`` (d, r) of the inputs' leading principal directions, ``x`` (n, r) = X axes."""

    axes: Tensor
    x: Tensor


class Objective:
    r"""Loss, gradient and linearisation of a network on a data set, as functions of :math:`\theta\in\mathbb R^P`.

    ``model``: any ``nn.Module``; ``loss``: a name from :mod:`eos_utils.losses` or a :class:`Loss`; ``x``: (n, ...)
    inputs, ``y``: (n, c) targets, same device and dtype. ``chunk``: examples per sweep (default: all, within
    512 MiB of activations for fully connected networks). Raises ``ValueError`` when x and y disagree, when they
    contain NaN, and when a model whose examples are coupled (BatchNorm) is given ``chunk`` < n.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)    # f = θx
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(model, "half_mse", x, y)
    >>> objective
    Objective(P=1, n=2, loss=half_mse, chunk=2)
    >>> loss, gradient, outputs = objective.gradient(torch.tensor([4.0]))
    >>> loss.item(), gradient.tolist(), outputs.tolist()    # 5θ²/4, 5θ/2, and θx
    (20.0, [10.0], [[4.0], [8.0]])
    """

    def __init__(self, model: nn.Module, loss: str | Loss, x: Tensor, y: Tensor, chunk: int | None = None) -> None:
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x has {len(x)} examples and y has {len(y)}; both need the same number, at least 1")
        if y.ndim != 2:
            raise ValueError(f"y has shape {tuple(y.shape)}; targets have shape (n, outputs), (n, 1) for one output")
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise ValueError("the data contain NaN or infinite values")
        self.model = model.to(device=x.device, dtype=x.dtype)
        self.loss = get_loss(loss) if isinstance(loss, str) else loss
        self.x, self.y, self.n = x, y, len(x)
        self.layers = layers_of(model)
        if self.layers and self.layers[-1].fan_out != y.shape[1]:
            raise ValueError(f"the network has {self.layers[-1].fan_out} outputs, y has {y.shape[1]}")
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.P = sum(shape.numel() for shape in self.shapes.values())
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk}: must be at least 1")
        if couples_examples(model):
            if chunk is not None and chunk < self.n:
                raise ValueError(f"chunk={chunk}: BatchNorm couples the examples, so the chunk must be n={self.n}")
            chunk = self.n
        if chunk is None:
            width = sum(4 * c.fan_out for c in self.layers) if self.layers else 1
            chunk = max(1, FLOATS_PER_CHUNK // width)
        self.chunk = min(chunk, self.n)
        self._plane: Plane | None = None
        self._plane_known = False

    def __repr__(self) -> str:
        return f"Objective(P={self.P}, n={self.n}, loss={self.loss.name}, chunk={self.chunk})"

    @property
    def device(self) -> torch.device:
        """Where the data and the products live."""
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of θ and of the products."""
        return self.x.dtype

    def initial(self) -> Tensor:
        """The module's own parameters as one flat vector (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).clone()

    def _call(self, theta: Tensor, x: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in self.shapes.values()])
        named = {k: p.view(s) for (k, s), p in zip(self.shapes.items(), pieces, strict=True)}
        return functional_call(self.model, named, (x,))

    def _share(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self._call(theta, x)
        if outputs.shape != y.shape:
            raise ValueError(f"the network gives outputs of shape {tuple(outputs.shape)}, y has {tuple(y.shape)}")
        return self.loss.value(outputs, y) / self.n, outputs

    def _chunks(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(self.chunk), self.y.split(self.chunk), strict=True))

    def outputs(self, theta: Tensor) -> Tensor:
        r""":math:`f_\theta(x_k)` for all examples, (n, c)."""
        with torch.no_grad():
            return torch.cat([self._call(theta, x) for x, _ in self._chunks()])

    def value(self, theta: Tensor) -> Tensor:
        r""":math:`L(\theta)`, a scalar tensor."""
        with torch.no_grad():
            return torch.stack([self._share(theta, x, y)[0] for x, y in self._chunks()]).sum()

    def gradient(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r""":math:`L(\theta)`, :math:`\nabla L(\theta)` (P,) and the outputs (n, c), in one sweep."""
        leaf = theta.detach().requires_grad_(True)
        total, gradient, outputs = theta.new_zeros(()), None, []
        for x, y in self._chunks():
            with torch.enable_grad():
                value, f = self._share(leaf, x, y)
                (g,) = torch.autograd.grad(value, leaf)
            total += value.detach()
            gradient = g if gradient is None else gradient.add_(g)
            outputs.append(f.detach())
        assert gradient is not None
        return total, gradient, outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def plane(self) -> Plane | None:
        r"""The inputs' leading principal directions (randomised subspace iteration), computed once.

        None where they would not help: for networks that are not fully connected, few inputs or examples, or a
        spectrum of :math:`X^\top X` so flat that the directions left out matter.
        """
        if not self._plane_known:
            self._plane, self._plane_known = self._find_plane(), True
        return self._plane

    def _find_plane(self) -> Plane | None:
        x = self.x.flatten(1)
        if self.layers is None or x.shape[1] < 4 * PLANE or self.n < 2 * PLANE:
            return None
        axes = torch.randn(x.shape[1], PLANE, generator=torch.Generator().manual_seed(0)).to(x)
        for _ in range(3):
            axes = torch.linalg.qr(axes)[0]
            axes = torch.stack([part.T @ (part @ axes) for part in x.split(self.chunk)]).sum(dim=0)
        axes = torch.linalg.qr(axes)[0]
        inside = x @ axes
        spectrum = torch.linalg.eigvalsh(inside.T @ inside)
        return Plane(axes, inside) if bool(spectrum[0] < 0.02 * spectrum[-1]) else None

    def linearize(self, theta: Tensor) -> Linearization:
        """The cached point at θ, for :class:`eos_utils.curvature.Hessian` and its kin."""
        return Linearization(self, theta.detach())


class Linearization:
    """Products with the Hessian or the Gauss–Newton matrix at one θ; passes are cached where memory allows.

    >>> import torch
    >>> from eos_utils.models import fully_connected
    >>> model = fully_connected(1, width=1, outputs=1, activation="linear", bias=False)
    >>> x, y = torch.ones(1, 1), torch.zeros(1, 1)
    >>> objective = Objective(model, "half_mse", x, y)    # f = awx, so L = a²w²/2
    >>> point = objective.linearize(torch.tensor([3.0, 2.0]))    # w = 3, a = 2
    >>> point.products(torch.eye(2)).tolist()    # H: a² and w², 2aw beside them
    [[4.0, 12.0], [12.0, 9.0]]
    >>> point.products(torch.eye(2), gauss_newton=True).tolist()    # G: aw beside them
    [[4.0, 6.0], [6.0, 9.0]]
    """

    def __init__(self, objective: Objective, theta: Tensor) -> None:
        if theta.shape != (objective.P,):
            raise ValueError(f"theta has shape {tuple(theta.shape)}; this objective has P={objective.P} parameters")
        self.objective, self.theta = objective, theta
        # One chunk's passes are kept; a larger batch is swept again for every block of directions.
        single = objective.chunk == objective.n
        self.kept = self._point(objective.x, objective.y) if single else None

    def _point(self, x: Tensor, y: Tensor) -> FullyConnectedPoint | ModulePoint:
        o = self.objective
        if o.layers is not None:
            return FullyConnectedPoint(o.layers, o.loss, self.theta, x.flatten(1), y, o.n)
        return ModulePoint(lambda t: o._share(t, x, y), self.theta)

    def products(
        self, v: Tensor, gauss_newton: bool = False, read: Tensor | None = None, write: Tensor | None = None
    ) -> Tensor:
        """H v for the rows of ``v``, (k, P) to (k, P).

        ``read`` and ``write`` (n, r), for fully connected networks: see :class:`FullyConnectedPoint`.
        """
        if self.kept is not None:
            return _products(self.kept, v, gauss_newton, read, write)
        total: Tensor | None = None
        for i in range(0, self.objective.n, self.objective.chunk):
            rows = slice(i, i + self.objective.chunk)
            point = self._point(self.objective.x[rows], self.objective.y[rows])
            parts = [None if z is None else z[rows] for z in (read, write)]
            share = _products(point, v, gauss_newton, *parts)
            total = share if total is None else total.add_(share)
        assert total is not None
        return total


def _products(
    point: FullyConnectedPoint | ModulePoint, v: Tensor, gauss_newton: bool, read: Tensor | None, write: Tensor | None
) -> Tensor:
    if isinstance(point, FullyConnectedPoint):
        return point.products(v, gauss_newton, read, write)
    return point.products(v, gauss_newton)
