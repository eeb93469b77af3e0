r"""Losses per example :math:`\ell(f, y)`, with first and second derivatives in the outputs :math:`f`.

=================  ==========================================================  ==============
``half_mse``       :math:`\tfrac12\|f - y\|^2`, summed over outputs            FG, section 2.1
``mse``            :math:`\|f - y\|^2`, without ½                              SG, section 2
``cross_entropy``  :math:`-\sum_c y_c \log\mathrm{softmax}(f)_c`; with one     FG, appendix C
                   output and :math:`y = \pm1`, :math:`\log(1 + e^{-yf})`
=================  ==========================================================  ==============

The objective is their mean over the examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

NUMERICS = 1


@dataclass(frozen=True)
class Loss:
    """``value(f, y)`` summed over examples; ``gradient(f, y)`` and ``hessian_product(f, y, u)`` in f.

    f, y: (n, c); u: (n, k, c), a block of k directions; the product has u's shape.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    hessian_product: Callable[[Tensor, Tensor, Tensor], Tensor]


def _entropy(f: Tensor, y: Tensor) -> Tensor:
    if f.shape[1] == 1:
        return -functional.logsigmoid(y * f).sum()
    return -(y * torch.log_softmax(f, dim=1)).sum()


def _entropy_gradient(f: Tensor, y: Tensor) -> Tensor:
    if f.shape[1] == 1:
        return -y * torch.sigmoid(-y * f)
    return torch.softmax(f, dim=1) * y.sum(dim=1, keepdim=True) - y


def _entropy_hessian(f: Tensor, y: Tensor, u: Tensor) -> Tensor:
    if f.shape[1] == 1:
        s = torch.sigmoid(f)
        return (s * (1 - s)).unsqueeze(1) * u
    p = torch.softmax(f, dim=1).unsqueeze(1)
    pu = p * u
    return (pu - p * pu.sum(dim=2, keepdim=True)) * y.sum(dim=1)[:, None, None]


LOSSES = {
    "half_mse": Loss("half_mse", lambda f, y: 0.5 * ((f - y) ** 2).sum(), lambda f, y: f - y, lambda f, y, u: u),
    "mse": Loss("mse", lambda f, y: ((f - y) ** 2).sum(), lambda f, y: 2 * (f - y), lambda f, y, u: 2 * u),
    "cross_entropy": Loss("cross_entropy", _entropy, _entropy_gradient, _entropy_hessian),
}


def get_loss(name: str) -> Loss:
    """The loss called ``name``; ``ValueError`` if there is none.

    >>> f, y, u = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, 1)
    >>> for name in LOSSES:    # at f = 0, y = 1: value, slope and curvature in f
    ...     loss = get_loss(name)
    ...     value, slope = loss.value(f, y), loss.gradient(f, y)
    ...     curvature = loss.hessian_product(f, y, u)
    ...     print(name, *(round(v.item(), 4) for v in (value, slope, curvature)))
    half_mse 0.5 -1.0 1.0
    mse 1.0 -2.0 2.0
    cross_entropy 0.6931 -0.5 0.25
    """
    if name not in LOSSES:
        raise ValueError(f"loss={name!r} is unknown; choose one of {', '.join(LOSSES)}")
    return LOSSES[name]


def accuracy(f: Tensor, y: Tensor) -> float:
    """Share of examples classified rightly: argmax for several outputs, the sign for one.

    >>> y = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    >>> accuracy(torch.tensor([[0.1], [2.0], [0.3], [-1.0]]), y)    # the third is wrong
    0.75
    """
    right = (f.sign() == y.sign()).all(dim=1) if f.shape[1] == 1 else f.argmax(dim=1) == y.argmax(dim=1)
    return right.float().mean().item()
