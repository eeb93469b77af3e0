r"""The papers' networks, and their structure where curvature products can use it.

FG (Appendix B): ``Flatten, Linear(3072, 128), ReLU | Tanh, Linear(128, outputs)`` with biases in PyTorch's
default initialisation. SG: fully connected nets without biases, :math:`W \sim N(0, 1/\text{fan-in})`, and
ResNet-18 with a head without bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

NUMERICS = 1

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "linear": nn.Identity,
}
INITIALISATIONS = ("pytorch", "fan_in")


@dataclass(frozen=True)
class Layer:
    """One affine map of a fully connected network, as slices of the flat parameter vector."""

    weight: slice
    bias: slice | None
    fan_in: int
    fan_out: int
    activation: str  # applied after the affine map


def fully_connected(
    inputs: int,
    width: int = 128,
    depth: int = 1,
    outputs: int = 10,
    activation: str = "relu",
    bias: bool = True,
    init: str = "pytorch",
    seed: int = 0,
) -> nn.Sequential:
    r""":math:`h_\theta(x) = W_{L}\,\phi(\dots\phi(W_1 x + b_1)\dots) + b_L` with ``depth`` hidden layers.

    ``init='pytorch'``: weights and biases uniform in :math:`\pm 1/\sqrt{\text{fan-in}}`; ``'fan_in'``: weights
    :math:`N(0, 1/\text{fan-in})`, biases 0. The seed alone fixes the parameters, on every machine. float32, CPU.
    Raises ``ValueError`` for an unknown activation or initialisation and for sizes below 1.

    >>> fully_connected(3072)    # FG's network for CIFAR-10
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=3072, out_features=128, bias=True)
      (2): ReLU()
      (3): Linear(in_features=128, out_features=10, bias=True)
    )
    >>> sg = fully_connected(3072, 64, depth=3, outputs=1, bias=False, init="fan_in")
    >>> sum(p.numel() for p in sg.parameters())    # 3072·64 + 2·64² + 64
    204864
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if init not in INITIALISATIONS:
        raise ValueError(f"init={init!r} is unknown; choose one of {', '.join(INITIALISATIONS)}")
    for name, value in {"inputs": inputs, "width": width, "depth": depth, "outputs": outputs}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    modules: list[nn.Module] = [nn.Flatten(1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in range(depth + 1):
            affine = nn.Linear(inputs if layer == 0 else width, outputs if layer == depth else width, bias=bias)
            if init == "fan_in":
                nn.init.normal_(affine.weight, std=affine.in_features**-0.5)
                if bias:
                    nn.init.zeros_(affine.bias)
            modules += [affine] if layer == depth else [affine, ACTIVATIONS[activation]()]
    return nn.Sequential(*modules)


def resnet18(outputs: int = 1, seed: int = 0) -> nn.Sequential:
    """torchvision's ResNet-18 on flat 3×32×32 inputs, head without bias (SG, eq. 2 needs that).

    BatchNorm uses the statistics of the batch and keeps no running buffers, so the loss is a pure function of
    the parameters; it couples the examples, so that the full batch is one chunk.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = torchvision_resnet18(
            num_classes=outputs,
            norm_layer=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
        )
        body.fc = nn.Linear(body.fc.in_features, outputs, bias=False)
    return nn.Sequential(nn.Unflatten(1, (3, 32, 32)), body)


def couples_examples(model: nn.Module) -> bool:
    """Whether an output depends on other examples of the batch (BatchNorm), so that chunks change the result."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def layers_of(model: nn.Module) -> list[Layer] | None:
    """The affine layers if ``model`` is exactly Flatten, Linear, activation, ..., Linear; otherwise None.

    >>> first, last = layers_of(fully_connected(5, width=3, outputs=2))
    >>> first.weight, first.bias, first.activation    # of θ: 3·5 entries, then 3
    (slice(0, 15, None), slice(15, 18, None), 'relu')
    >>> theta = torch.arange(26)    # 26 parameters
    >>> theta[last.weight].view(last.fan_out, last.fan_in).tolist()
    [[18, 19, 20], [21, 22, 23]]
    """
    if not isinstance(model, nn.Sequential):
        return None
    names = {kind: name for name, kind in ACTIVATIONS.items()}
    layers: list[Layer] = []
    start = 0
    for module in model:
        if type(module) is nn.Linear:
            stop = start + module.weight.numel()
            weight, start = slice(start, stop), stop
            bias = None
            if module.bias is not None:
                bias, start = slice(start, start + module.out_features), start + module.out_features
            layers.append(Layer(weight, bias, module.in_features, module.out_features, "linear"))
        elif type(module) in names and layers and layers[-1].activation == "linear":
            if isinstance(module, nn.ELU) and module.alpha != 1.0:
                return None
            last = layers.pop()
            layers.append(Layer(last.weight, last.bias, last.fan_in, last.fan_out, names[type(module)]))
        elif not (type(module) is nn.Flatten and not layers):
            return None
    if not layers or layers[-1].activation != "linear":
        return None
    return layers
