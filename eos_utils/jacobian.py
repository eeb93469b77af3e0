r"""The Jacobian of the outputs of a convolutional network, and M from it, where no layer factors give M without it.

For one output the gradients of all examples come from one backward sweep of :math:`\sum_i f(x_i)`: examples do not
depend on one another, so that :math:`\partial\sum_i f(x_i)/\partial z_{l,i} = \partial f(x_i)/\partial z_{l,i} =:
\delta_{l,i}` in every layer l. The row of example i is then :math:`\delta_{l,i}\alpha_{l,i}^\top`, in a convolution
summed over positions: :math:`\sum_p \delta_{l,ip}\,u_{l,ip}^\top` with the patches u of its input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from eos_utils.gram import Parts, _checked, _scale, output_layer
from eos_utils.models import couples_examples
from eos_utils.objective import Objective

NUMERICS = 1


class Sweep(NamedTuple):
    """Outputs F, (n,), and their Jacobian J, (n, P), at one θ."""

    F: Tensor
    J: Tensor


class ModuleGram:
    r"""M of a network of convolutions and affine layers with one output, from its explicit Jacobian.

    Memory: J, (n, P), and the patches of one layer; meant for small networks on some hundred examples. The methods
    are those of :class:`eos_utils.gram.Gram`. Raises ``ValueError`` for several outputs, for layers of other kinds that
    have parameters, for groups, for padding that is not by zeros, for BatchNorm, and where a layer is used twice.

    >>> from eos_utils.models import fully_connected
    >>> model = fully_connected(2, depth=1, width=1, outputs=1, activation="linear", bias=False)    # f = a w·x
    >>> objective = Objective(model, "mse", torch.eye(2), torch.ones(2, 1))
    >>> ModuleGram(objective).at(torch.tensor([3.0, 1.0, 2.0])).M_W    # (2/n) a² X Xᵀ
    tensor([[4., 0.],
            [0., 4.]])
    """

    def __init__(self, objective: Objective) -> None:
        if objective.y.shape[1] != 1:
            raise ValueError(f"the Jacobian is taken of one output; these labels have {objective.y.shape[1]}")
        if couples_examples(objective.model):
            raise ValueError("BatchNorm couples the examples: no example has a gradient of its own")
        self.objective, self.scale = objective, _scale(objective)
        self.layers: list[nn.Conv2d | nn.Linear] = []
        for name, module in objective.model.named_modules():
            if not list(module.parameters(recurse=False)):
                continue
            if not isinstance(module, nn.Conv2d | nn.Linear):
                raise ValueError(f"{name} is a {type(module).__name__}; only Conv2d and Linear have a Jacobian here")
            if isinstance(module, nn.Conv2d) and (
                module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
            ):
                raise ValueError(f"{name} has groups, or a padding that is not a number of zeros")
            self.layers.append(module)

    def factors(self, theta: Tensor) -> Sweep:
        """The outputs and the Jacobian at θ, from one forward and one backward sweep."""
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            if module in inputs:
                raise ValueError(f"{module} is used twice in one pass; it has no single input")
            inputs[module], outputs[module] = given[0].detach(), made

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        try:
            with torch.enable_grad():
                f = self.objective._call(_checked(self.objective, theta).requires_grad_(True), self.objective.x)[:, 0]
        finally:
            for hook in hooks:
                hook.remove()
        deltas = torch.autograd.grad(f.sum(), [outputs[layer] for layer in self.layers])
        rows = []
        for layer, delta in zip(self.layers, deltas, strict=True):
            alpha = inputs[layer]
            if isinstance(layer, nn.Conv2d):
                assert not isinstance(layer.padding, str)
                geometry = layer.kernel_size, layer.dilation, layer.padding, layer.stride
                patches = nn.functional.unfold(alpha, *geometry)  # (n, patch, positions)
                delta = delta.flatten(2)
                rows.append((delta @ patches.mT).flatten(1))
            else:
                rows.append((delta[:, :, None] * alpha[:, None, :]).flatten(1))
                delta = delta[:, :, None]
            if layer.bias is not None:
                rows.append(delta.sum(dim=2))
        return Sweep(f.detach(), torch.cat(rows, dim=1))

    def outputs(self, theta: Tensor, factors: Sweep) -> Tensor:
        """The outputs F, (n, 1)."""
        return factors.F[:, None]

    def at(self, theta: Tensor, factors: Sweep | None = None) -> Parts:
        """M, M_A and M_W at θ, (n, n)."""
        j, last = (factors or self.factors(theta)).J, output_layer(self.objective)
        m_a, m_w = (self.scale * part @ part.T for part in (j[:, last], j[:, : last.start]))
        m_a, m_w = ((part + part.T) / 2 for part in (m_a, m_w))
        return Parts(m_a + m_w, m_a, m_w)
