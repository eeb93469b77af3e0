r"""A point :math:`\theta` at which everything that does not depend on the direction is computed once.

A Hessian product :math:`Hv` differentiates the gradient along :math:`v` (Pearlmutter 1994). For fully connected
networks the forward and the backward pass at :math:`\theta` are kept, and one product costs, in the first layer,
the two matrix products :math:`X V_1^\top` and :math:`\dot G_1^\top X`; nothing is approximated. Blocks of k
directions go through in one sweep, in layout (example, direction, unit). Any other module takes double
backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eos_utils.losses import Loss
from eos_utils.models import Layer

NUMERICS = 1


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
        self.a, self.slope, self.bend = [x], [], []
        for c, w in zip(layers, self.weights, strict=True):
            z = self.a[-1] @ w.T if c.bias is None else torch.addmm(theta[c.bias], self.a[-1], w.T)
            a, slope, bend = _derivatives(c.activation, z)
            self.a.append(a)
            self.slope.append(slope)
            self.bend.append(bend)
        self.f = self.a[-1]
        g = loss.gradient(self.f, y) / n
        self.g = [g]  # d loss / d z, one for each layer
        self.s: list[Tensor] = []  # d loss / d a of the hidden layers
        for i in range(len(layers) - 1, 0, -1):
            s = self.g[0] @ self.weights[i]
            slope = self.slope[i - 1]
            self.s.insert(0, s)
            self.g.insert(0, s if slope is None else s * slope)

    def products(self, v: Tensor, gauss_newton: bool = False) -> Tensor:
        """H v for the rows of ``v`` (k, P), this chunk's share; with ``gauss_newton`` its first part alone."""
        k, last = v.shape[0], len(self.layers) - 1
        vw = [v[:, c.weight].view(k, c.fan_out, c.fan_in) for c in self.layers]
        rz: list[Tensor] = []
        ra: list[Tensor] = []
        for i, c in enumerate(self.layers):
            z = (self.a[i] @ vw[i].reshape(k * c.fan_out, c.fan_in).T).view(-1, k, c.fan_out)
            if i:
                z += ra[i - 1] @ self.weights[i].T
            if c.bias is not None:
                z += v[:, c.bias]
            rz.append(z)
            slope = self.slope[i]
            ra.append(z if slope is None else z * slope.unsqueeze(1))
        out = torch.empty_like(v)
        rg = self.loss.hessian_product(self.f, self.y, rz[last]) / self.n
        for i in range(last, -1, -1):
            c = self.layers[i]
            block = (rg.reshape(-1, k * c.fan_out).T @ self.a[i]).view(k, c.fan_out, c.fan_in)
            if i and not gauss_newton:
                inner = self.g[i].T @ ra[i - 1].reshape(-1, k * c.fan_in)
                block += inner.view(c.fan_out, k, c.fan_in).transpose(0, 1)
            out[:, c.weight] = block.reshape(k, -1)
            if c.bias is not None:
                out[:, c.bias] = rg.sum(dim=0)
            if i == 0:
                break
            rs = rg @ self.weights[i]
            if not gauss_newton:
                mixed = vw[i].transpose(0, 1).reshape(c.fan_out, k * c.fan_in)
                rs += (self.g[i] @ mixed).view(-1, k, c.fan_in)
            slope, bend = self.slope[i - 1], self.bend[i - 1]
            rg = rs if slope is None else rs * slope.unsqueeze(1)
            if bend is not None and not gauss_newton:
                rg = rg + (self.s[i - 1] * bend).unsqueeze(1) * rz[i - 1]
        return out


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
