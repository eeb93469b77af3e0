r"""Identities behind SG's Figure 3, on random networks in float64: the split of M, equations (2) and (4), R′.

With :math:`f = A^\top h(W, x)`, :math:`L = \frac1n\sum(f - y)^2`, :math:`D = F - Y` and J the Jacobian of F in θ:

- Section 3.2: :math:`M = \frac2nJJ^\top = M_A + M_W`, with
  :math:`(M_W)_{ij} = \frac2n A^\top\frac{\partial h(x_i)}{\partial W}\frac{\partial h(x_j)}{\partial W}^\top A`
  (the factor 2/n, which stands in the definition of M in section 2, is not printed there).
- (2): :math:`\frac{d}{dt}\|A\|^2 = -2\,\partial_A L^\top A = -\frac4nD^\top F`, since :math:`F = \partial_AF\,A`. With
  a bias b it is :math:`-\frac4nD^\top(F - b)`.
- (4): :math:`D^\top F = u^\top(u + Y) + R^\top(R + Y)` with :math:`u = v_1v_1^\top D`, :math:`R = D - u`; it needs
  :math:`u\perp R` and no more.
- R′ is printed with :math:`(I - \eta M(I - v_1v_1^\top))` (section 3.3.2, Lemma 3.5) and with :math:`(I - \eta M)`
  (section 3.4). The two agree while :math:`R'\perp v_1`, which they conserve for a fixed v1 only.
- With fixed eigenvectors and F(0) = 0, R′ has the components :math:`-p_iy_i`, :math:`p_i = \prod(1-\eta\lambda_i)`,
  so that :math:`R'^\top(R' + Y) = -\sum p_i(1 - p_i)y_i^2`: negative for 0 < ηλ < 1 and t ≥ 1, and 0 at t = 0.

Networks have one output, 3 to 8 examples, widths of 3 to 6, standard normal inputs and labels ±1; seeds from 100 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from eos_utils.fg_theory import Array, Tested
from eos_utils.gram import Gram, output_layer
from eos_utils.models import ACTIVATIONS, fully_connected
from eos_utils.objective import Objective

FIRST = 100  # seeds below were used to explore
FULLY_CONNECTED = ("linear", "tanh", "elu", "relu")
OTHERS = ("convolutional", "batch norm")
ON_NETWORKS = "random networks with one to three hidden layers"


def network(kind: str, seed: int, bias: bool = False) -> nn.Sequential:
    """A small random network: fully connected with this activation, 'convolutional' or with 'batch norm'; 16 inputs.

    ``bias``: all layers have random biases, the last one too. Without, the last one has none.
    """
    generator = np.random.default_rng(seed)
    width, depth = int(generator.integers(3, 7)), int(generator.integers(1, 4))
    if kind in ACTIVATIONS:
        return fully_connected(16, width, depth, 1, kind, bias, "pytorch", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "convolutional":
            body = [nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, width, 3), nn.ELU(), nn.Flatten(1)]
            return nn.Sequential(*body, nn.Linear(4 * width, 1, bias=bias))
        if kind == "batch norm":
            norm = nn.BatchNorm1d(width, track_running_stats=False)
            return nn.Sequential(nn.Linear(16, width), norm, nn.Tanh(), nn.Linear(width, 1, bias=bias))
    raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join((*FULLY_CONNECTED, *OTHERS))}")


def problems(trials: int, kinds: tuple[str, ...], bias: bool = False) -> Iterator[tuple[Objective, Tensor]]:
    """Random objectives with random labels ±1, the kinds in turn, and their parameters θ (P,), in float64."""
    generator = np.random.default_rng(FIRST)
    for i in range(trials):
        n = int(generator.integers(3, 9))
        x, y = torch.from_numpy(generator.normal(size=(n, 16))), torch.from_numpy(generator.choice([-1.0, 1.0], (n, 1)))
        objective = Objective(network(kinds[i % len(kinds)], FIRST + i, bias), "mse", x, y)
        yield objective, objective.initial() * float(generator.uniform(0.5, 2))


def jacobian(objective: Objective, theta: Tensor) -> Tensor:
    """∂F/∂θ, (n, P), by autograd."""
    return jacrev(lambda t: objective._call(t, objective.x)[:, 0])(theta)


def feature_jacobian(objective: Objective, theta: Tensor) -> Tensor:
    """∂h(x_i)/∂W for all examples, (n, m, p), by autograd; the last module of the network is its output layer."""
    body = objective.model[:-1]  # type: ignore[index]
    names = {name: p.shape for name, p in body.named_parameters()}

    def features(t: Tensor) -> Tensor:
        pieces = t.split([shape.numel() for shape in names.values()])
        named = {name: piece.view(names[name]) for name, piece in zip(names, pieces, strict=True)}
        return functional_call(body, named, (objective.x,))

    return jacrev(features)(theta[: output_layer(objective).start])


def _relative(difference: Tensor, size: Tensor) -> float:
    return float(torch.linalg.norm(difference) / torch.linalg.norm(size))


def gram_sum(trials: int = 120) -> Tested:
    """Largest difference between M, from the explicit Jacobian, and M_A + M_W, computed layer by layer without one,
    relative to M.
    """
    worst = 0.0
    for objective, theta in problems(trials, FULLY_CONNECTED):
        j, parts = jacobian(objective, theta), Gram(objective).at(theta)
        m = 2 / objective.n * j @ j.T
        worst = max(worst, _relative(parts.M_A + parts.M_W - m, m))
    return Tested(worst, trials, f"{ON_NETWORKS}, {', '.join(FULLY_CONNECTED)}")


def gram_entries(squashed: bool = False, trials: int = 120) -> Tested:
    """Largest difference between the Gram matrix of the layers below the last, from the explicit Jacobian of the
    outputs, and the printed entries with the factor 2/n, relative to the former. Outputs passed through tanh are the
    control (``squashed``).
    """
    worst = 0.0
    for objective, theta in problems(trials, (*FULLY_CONNECTED, *OTHERS)):
        a = output_layer(objective)
        rows = jacobian(objective, theta)[:, : a.start]
        if squashed:
            rows = rows * (1 - torch.tanh(objective.outputs(theta)) ** 2)
        m_w = 2 / objective.n * rows @ rows.T
        back = torch.einsum("m,imp->ip", theta[a], feature_jacobian(objective, theta))
        worst = max(worst, _relative(2 / objective.n * back @ back.T - m_w, m_w))
    control = "; outputs passed through tanh" if squashed else ""
    return Tested(worst, trials, f"{ON_NETWORKS}, {', '.join((*FULLY_CONNECTED, *OTHERS))}{control}")


def norm_flow(bias: bool = False, version: str = "printed", trials: int = 240) -> Tested:
    r"""Largest difference between d‖A‖²/dt under gradient flow, -2⟨∂L/∂A, A⟩ by automatic differentiation, and the
    printed -(4/n)DᵀF, relative to (4/n)‖D‖‖F‖. Networks with a bias in the last layer are the control; version
    'corrected' takes the bias off F.
    """
    if version not in ("printed", "corrected"):
        raise ValueError(f"version={version!r} is unknown; choose printed or corrected")
    worst = 0.0
    for objective, theta in problems(trials, (*FULLY_CONNECTED, *OTHERS), bias):
        _, gradient, f = objective.gradient(theta)
        a = output_layer(objective)
        weight = slice(a.start, a.stop - bias)
        flow, d = -2 * gradient[weight] @ theta[weight], f - objective.y
        moved = f - theta[-1] if bias and version == "corrected" else f
        size = 4 / objective.n * torch.linalg.norm(d) * torch.linalg.norm(f)
        worst = max(worst, float(abs(flow + 4 / objective.n * (d * moved).sum()) / size))
    last = "with a bias in the last layer" if bias else "last layer without bias"
    return Tested(worst, trials, f"{ON_NETWORKS}, {', '.join((*FULLY_CONNECTED, *OTHERS))}, {last}")


def residual_split(length: float = 1.0, trials: int = 240) -> Tested:
    """Largest difference between DᵀF and the two terms of equation (4), relative to ‖D‖‖F‖ + ‖D‖‖Y‖; v1 from M. A v1
    of another length is the control.
    """
    worst = 0.0
    for objective, theta in problems(trials, FULLY_CONNECTED):
        f, y = objective.outputs(theta)[:, 0], objective.y[:, 0]
        d, v = f - y, length * torch.linalg.eigh(Gram(objective).at(theta).M)[1][:, -1]
        u = v * (v @ d)
        r = d - u
        size = torch.linalg.norm(d) * (torch.linalg.norm(f) + torch.linalg.norm(y))
        worst = max(worst, float(abs(d @ f - u @ (u + y) - r @ (r + y)) / size))
    return Tested(worst, trials, f"{ON_NETWORKS}, {', '.join(FULLY_CONNECTED)}")


# ---- the sequence R′ -----------------------------------------------------------------------------


def bases(generator: np.random.Generator, n: int, steps: int, turning: float) -> Iterator[Array]:
    """Orthonormal bases (n, n) whose columns turn by random angles of about ``turning`` a step."""
    v = np.linalg.qr(generator.normal(size=(n, n)))[0]
    for _ in range(steps):
        yield v
        s = generator.normal(size=(n, n)) * turning / np.sqrt(n)
        # Cayley's map of an antisymmetric matrix is a rotation.
        v = v @ np.linalg.solve(np.eye(n) + (s - s.T) / 2, np.eye(n) - (s - s.T) / 2) if turning else v


def recursions_apart(turning: float = 0.02, steps: int = 30, trials: int = 200) -> Tested:
    """Largest distance, over steps and trials, between R′ by (I - ηM(I - v₁v₁ᵀ)) and by (I - ηM), relative to ‖R′(0)‖,
    while the eigenvectors of M turn by ``turning`` a step; 0 for fixed ones. ηΛ = 2.2, other eigenvalues below 1/η.
    """
    generator, worst, size = np.random.default_rng(FIRST), 0.0, 1.0
    for _ in range(trials):
        n = int(generator.integers(3, 9))
        levels = np.append(generator.uniform(0.05, 0.95, size=n - 1), 2.2)
        projected = plain = generator.normal(size=n)
        for t, v in enumerate(bases(generator, n, steps, turning)):
            if t == 0:
                projected = plain = plain - v[:, -1] * (v[:, -1] @ plain)
                size = float(np.linalg.norm(plain))
            eta_m = (v * levels) @ v.T
            projected = projected - eta_m @ (projected - v[:, -1] * (v[:, -1] @ projected))
            plain = plain - eta_m @ plain
            worst = max(worst, float(np.linalg.norm(plain - projected) / size))
    return Tested(worst, trials, f"random M with 3 to 8 eigenvectors that turn by {turning:g} a step, {steps} steps")


def r_prime_product(
    since: int = 0, fitted: float = 0.0, largest: float = 0.98, steps: int = 30, trials: int = 500
) -> Tested:
    """Largest R′ᵀ(R′ + Y)/(‖R′‖‖Y′‖) over trials and times from ``since`` on, Y′ being Y without its part along v₁;
    negative is as stated. Fixed eigenvectors, ηλ from 0.02 to ``largest``, drawn anew at each step, R′(0) from D(0) =
    F(0) - Y with a random F(0) of relative size ``fitted``. The paper's F(0) = 0 is 0; others, and ``largest`` above 1,
    are controls.
    """
    generator, worst = np.random.default_rng(FIRST), -np.inf
    for _ in range(trials):
        # In the basis of the fixed eigenvectors other than v1.
        y = generator.normal(size=int(generator.integers(1, 9)))
        start = generator.normal(size=len(y))
        r = fitted * start * np.linalg.norm(y) / np.linalg.norm(start) - y
        for t in range(steps):
            if t >= since:
                worst = max(worst, float(r @ (r + y) / (np.linalg.norm(r) * np.linalg.norm(y))))
            r = r * (1 - generator.uniform(0.02, largest, size=len(y)))
    shown = "F(0) = 0" if fitted == 0 else f"‖F(0)‖ = {fitted:g}‖Y‖"
    on = f"random labels in 1 to 8 fixed eigendirections, ηλ up to {largest:g}, {shown}, times {since} to {steps - 1}"
    return Tested(worst, trials, on)


CHECKS: dict[str, Callable[..., Tested]] = {
    "gram_sum": gram_sum,
    "gram_entries": gram_entries,
    "norm_flow": norm_flow,
    "residual_split": residual_split,
    "recursions_apart": recursions_apart,
    "r_prime_product": r_prime_product,
}
