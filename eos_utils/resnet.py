"""A small residual network without normalisation: a function of each example alone, so that it has a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUMERICS = 1


class ResidualBlock(nn.Module):
    r""":math:`x \mapsto \text{ReLU}(Sx + W_2 * \text{ReLU}(W_1 * x))`, 3×3 convolutions without biases.

    The shortcut S is the identity; where the block halves the resolution, S takes every other position and fills the
    new channels with zeros, so that it has no parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, scale: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.stride, self.new = stride, outputs - inputs
        for convolution in (self.first, self.second):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        with torch.no_grad():
            self.second.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        return torch.relu(shortcut + self.second(torch.relu(self.first(x))))


def small_resnet(width: int = 8, blocks: int = 2, outputs: int = 1, seed: int = 0) -> nn.Sequential:
    r"""A residual network without normalisation on flat 3×32×32 inputs: a function of each example alone.

    A 3×3 convolution of stride 2, three stages of ``blocks`` blocks with ``width``, 2 ``width`` and 4 ``width``
    channels at 16, 8 and 4 pixels, the mean over positions, and a head without bias (SG, eq. 2 needs that).
    Convolutions are drawn from :math:`N(0, 2/\text{fan-in})`, the head from :math:`N(0, 1/\text{fan-in})`; the second
    convolution of each block is divided by the square root of the number of blocks, which keeps the signal bounded at
    any depth. 42,872 parameters as it stands. Raises ``ValueError`` for sizes below 1.

    >>> model = small_resnet()
    >>> sum(p.numel() for p in model.parameters())
    42872
    >>> x = torch.randn(4, 3072, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(model(x)[:1], model(x[:1]), atol=1e-4)    # each row by itself
    True
    """
    for name, value in {"width": width, "blocks": blocks, "outputs": outputs}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem, channels = nn.Conv2d(3, width, 3, 2, 1, bias=False), width
        nn.init.kaiming_normal_(stem.weight, nonlinearity="relu")
        modules: list[nn.Module] = [nn.Unflatten(1, (3, 32, 32)), stem, nn.ReLU()]
        for stage in range(3):
            for block in range(blocks):
                out, stride = width * 2**stage, 2 if stage and block == 0 else 1
                modules.append(ResidualBlock(channels, out, stride, (3 * blocks) ** -0.5))
                channels = out
        head = nn.Linear(channels, outputs, bias=False)
        nn.init.normal_(head.weight, std=channels**-0.5)
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), head)
