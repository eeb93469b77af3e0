r"""A point :math:`\theta` at which everything that does not depend on the direction is computed once.

A Hessian product :math:`Hv` differentiates the gradient along :math:`v` (Pearlmutter 1994). For fully connected
networks the forward and the backward pass at :math:`\theta` are kept, and one product costs, in the first layer,
the two matrix products :math:`X V_1^\top` and :math:`\dot G_1^\top X`; nothing is approximated. Blocks of k
directions go through in one sweep, in layout (example, direction, unit). Any other module takes double
backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from eos_utils.losses import Loss
from eos_utils.models import Layer

NUMERICS = 1

LEAST_PIECE = 1024  # fewer examples in a sweep would starve the matrix products


def _derivatives(activation: str, z: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r""":math:`\phi, \phi', \phi''` at z; None stands for a constant 1 (:math:`\phi'`) or 0 (:math:`\phi''`)."""
    if activation == "relu":
        return torch.relu(z), (z > 0).to(z.dtype), None
    if activation == "tanh":
        a = torch.tanh(z)
        slope = 1 - a * a
        return a, slope, -2 * a * slope
    if activation == "elu":
        a = torch.nn.functional.elu(z)
        bend = torch.where(z > 0, torch.zeros_like(z), a + 1)
        return a, torch.where(z > 0, torch.ones_like(z), bend), bend
    return z, None, None


class FullyConnectedPoint:
    """Forward and backward pass of a fully connected network on one chunk of examples, kept for products."""

    def __init__(self, layers: list[Layer], loss: Loss, theta: Tensor, x: Tensor, y: Tensor, n: int) -> None:
        self.layers, self.loss, self.n, self.y = layers, loss, n, y
        self.weights = [theta[c.weight].view(c.fan_out, c.fan_in) for c in layers]
        self.a: list[Tensor] = [x]
        self.slope: list[Tensor | None] = []
        bends = []
        for c, w in zip(layers, self.weights, strict=True):
            z = self.a[-1] @ w.T if c.bias is None else torch.addmm(theta[c.bias], self.a[-1], w.T)
            a, slope, bend = _derivatives(c.activation, z)
            self.a.append(a)
            self.slope.append(slope)
            bends.append(bend)
        self.f = self.a[-1]
        self.g = [loss.gradient(self.f, y) / n]  # d loss / d z, one for each layer
        self.bent: list[Tensor | None] = []  # (d loss / d a) φ''(z) of the hidden layers
        for i in range(len(layers) - 1, 0, -1):
            s = self.g[0] @ self.weights[i]
            slope, bend = self.slope[i - 1], bends[i - 1]
            self.bent.insert(0, None if bend is None else s * bend)
            self.g.insert(0, s if slope is None else s * slope)

    def products(
        self, v: Tensor, gauss_newton: bool = False, read: Tensor | None = None, write: Tensor | None = None
    ) -> Tensor:
        """H v for the rows of ``v`` (k, P), this chunk's share; with ``gauss_newton`` its first part alone.

        ``read``, ``write`` (n, r): stand-ins for the inputs where the first layer of v is multiplied by them, and
        where the first layer of the result is made from them; its fan-in changes accordingly.
        """
        # What a sweep needs besides: a few arrays of (examples, directions, width), bounded by pieces of both.
        budget, widest = 2**26 if v.is_cuda else 2**22, max(c.fan_out for c in self.layers)
        directions = max(1, budget // (LEAST_PIECE * widest))
        examples = max(LEAST_PIECE, budget // (min(len(v), directions) * widest))
        shares = []
        for block in v.split(directions):
            total = None
            for start in range(0, len(self.f), examples):
                part = slice(start, start + examples)
                share = self._share(block, gauss_newton, part, *(self.a[0] if z is None else z for z in (read, write)))
                total = share if total is None else total.add_(share)
            assert total is not None
            shares.append(total)
        return shares[0] if len(shares) == 1 else torch.cat(shares)

    def _share(self, v: Tensor, gauss_newton: bool, part: slice, read: Tensor, write: Tensor) -> Tensor:
        k, last = v.shape[0], len(self.layers) - 1
        into, back = with_inputs(self.layers, read.shape[1]), with_inputs(self.layers, write.shape[1])
        vw = [v[:, c.weight].view(k, c.fan_out, c.fan_in) for c in into]
        rz: list[Tensor] = []
        ra: list[Tensor] = []
        for i, c in enumerate(into):
            a = self.a[i][part] if i else read[part]
            z = (a @ vw[i].reshape(k * c.fan_out, c.fan_in).T).view(-1, k, c.fan_out)
            if i:
                z += ra[i - 1] @ self.weights[i].T
            if c.bias is not None:
                z += v[:, c.bias]
            rz.append(z)
            slope = self.slope[i]
            ra.append(z if slope is None else z * slope[part].unsqueeze(1))
        out = v.new_empty(k, _parameters(back))
        rg = self.loss.hessian_product(self.f[part], self.y[part], rz[last]) / self.n
        for i in range(last, -1, -1):
            c = back[i]
            a = self.a[i][part] if i else write[part]
            block = (rg.reshape(-1, k * c.fan_out).T @ a).view(k, c.fan_out, c.fan_in)
            if i and not gauss_newton:
                inner = self.g[i][part].T @ ra[i - 1].reshape(-1, k * c.fan_in)
                block += inner.view(c.fan_out, k, c.fan_in).transpose(0, 1)
            out[:, c.weight] = block.reshape(k, -1)
            if c.bias is not None:
                out[:, c.bias] = rg.sum(dim=0)
            if i == 0:
                break
            rs = rg @ self.weights[i]
            if not gauss_newton:
                mixed = vw[i].transpose(0, 1).reshape(c.fan_out, k * c.fan_in)
                rs += (self.g[i][part] @ mixed).view(-1, k, c.fan_in)
            slope, bent = self.slope[i - 1], self.bent[i - 1]
            rg = rs if slope is None else rs.mul_(slope[part].unsqueeze(1))
            if bent is not None and not gauss_newton:
                rg.addcmul_(bent[part].unsqueeze(1), rz[i - 1])
        return out


def with_inputs(layers: list[Layer], inputs: int) -> list[Layer]:
    """The layers of the same network on ``inputs`` inputs, as slices of its shorter (or longer) flat vector."""
    shift = layers[0].fan_out * (inputs - layers[0].fan_in)
    if shift == 0:
        return layers

    def moved(part: slice) -> slice:
        return slice(part.start + shift, part.stop + shift)

    result = [replace(c, weight=moved(c.weight), bias=c.bias and moved(c.bias)) for c in layers]
    result[0] = replace(result[0], weight=slice(0, layers[0].fan_out * inputs), fan_in=inputs)
    return result


def _parameters(layers: list[Layer]) -> int:
    return sum(c.fan_out * (c.fan_in + (c.bias is not None)) for c in layers)


class ModulePoint:
    """Double backpropagation through any module; the graph of the gradient is kept and used for all products."""

    def __init__(self, share: Callable[[Tensor], tuple[Tensor, Tensor]], theta: Tensor) -> None:
        self.share = share  # theta -> (this chunk's share of the loss, outputs)
        self.theta = theta.detach().requires_grad_(True)
        self.gradient: Tensor | None = None

    def products(self, v: Tensor, gauss_newton: bool = False) -> Tensor:
        """H v for the rows of ``v`` (k, P), or the Gauss–Newton product."""
        if gauss_newton:
            return torch.stack([self._gauss_newton(row) for row in v])
        if self.gradient is None:
            with torch.enable_grad():
                value, _ = self.share(self.theta)
                (self.gradient,) = torch.autograd.grad(value, self.theta, create_graph=True)
        rows = [torch.autograd.grad(self.gradient, self.theta, row, retain_graph=True)[0] for row in v]
        return torch.stack(rows).detach()

    def _gauss_newton(self, v: Tensor) -> Tensor:
        jv = torch.func.jvp(lambda t: self.share(t)[1], (self.theta.detach(),), (v,))[1]
        with torch.enable_grad():
            value, outputs = self.share(self.theta)
            (g,) = torch.autograd.grad(value, outputs, create_graph=True)
            (hjv,) = torch.autograd.grad(g, outputs, jv, retain_graph=True)
            return torch.autograd.grad(outputs, self.theta, hjv)[0].detach()
