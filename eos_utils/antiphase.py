r"""Why the sharpness and the output layer's norm move in antiphase, or in phase, at the edge of stability.

An explanation of ours, which SG does not give, and the interventions that test it. Let :math:`v_1` be the first
eigenvector of M, :math:`\varphi = v_1^\top F` the outputs along it, :math:`\delta = v_1^\top D`, and
:math:`g = \nabla\varphi = J^\top v_1`. Since :math:`J^\top R` is orthogonal to g, a step of gradient descent is a sum
of two orthogonal ones: :math:`-\eta\frac2n\delta g`, the *oscillation*, and :math:`-\eta\frac2nJ^\top R`, the *drift*.

Along g both quantities have a slope. The outputs are linear in A, so :math:`g\cdot\nabla\|A\|^2 = 2\varphi`. With
:math:`v_1` fixed, which is enough to first order, :math:`\Lambda = \frac2n\|\nabla\varphi\|^2`, so
:math:`g\cdot\nabla\Lambda = \frac4n\,g^\top\nabla^2\varphi\,g`. To first order the oscillation changes them by

.. math:: \Delta\|A\|^2 = -\frac{4\eta}n\,\varphi^2\,\frac\delta\varphi,\qquad
   \frac{\Delta\Lambda}\Lambda = -2\eta\Lambda\,\chi\,\frac\delta\varphi,\qquad
   \chi = \frac{\varphi\;g^\top\nabla^2\varphi\,g}{\|g\|^4} :

in phase for :math:`\chi>0` and in antiphase for :math:`\chi<0`, whatever the sign of δ. χ is positive where φ grows
faster than linearly along its own gradient, as a product of weights does, and negative where it saturates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eos_utils.data import digits
from eos_utils.gram import Gram, output_layer
from eos_utils.linearize import _derivatives
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

Array = NDArray[np.float64]

FIRST = 100  # the first seed of a network
# What a step takes of the residual: multiples of δ v1 and of R.
KEPT = {"all": (1.0, 1.0), "first": (1.0, 0.0), "rest": (0.0, 1.0), "flipped": (-1.0, 1.0)}


def pull(gram: Gram, theta: Tensor, w: Tensor) -> Tensor:
    r""":math:`J^\top w`, (P,), for weights w, (n,), of the examples.

    For one output and no biases; ``ValueError`` otherwise.
    """
    if gram.objective.y.shape[1] != 1 or any(layer.bias is not None for layer in gram.layers):
        raise ValueError("the outputs along v1 are taken of networks with one output and without biases")
    return torch.cat([((b[:, 0] * w[:, None]).T @ a).reshape(-1) for a, b in gram.factors(theta)])


def second(objective: Objective, theta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\ddot F` along a line through θ, (n,), and its part without :math:`\phi''`, from products of weights.

    Layer by layer :math:`\ddot z = W\ddot a + 2\dot W\dot a` and :math:`\ddot a = \phi'\ddot z + \phi''\dot z^2`.
    """
    assert objective.layers is not None
    a = objective.x.flatten(1)
    moved = bent = straight = torch.zeros_like(a)
    for i, layer in enumerate(objective.layers):
        w, dw = (u[layer.weight].view(layer.fan_out, layer.fan_in) for u in (theta, direction))
        both = 2 * moved @ dw.T
        z, dz, bent, straight = a @ w.T, a @ dw.T + moved @ w.T, bent @ w.T + both, straight @ w.T + both
        if i == len(objective.layers) - 1:
            break
        a, slope, bend = _derivatives(layer.activation, z)
        slope = torch.ones_like(z) if slope is None else slope
        bent, straight, moved = slope * bent, slope * straight, slope * dz
        bent = bent if bend is None else bent + bend * dz * dz
    return bent[:, 0], straight[:, 0]


class Response(NamedTuple):
    """Λ, φ, δ, χ, and the part of χ that comes from the products of weights, at one θ; v1 and D with them."""

    sharpness: float
    output: float
    residual: float
    chi: float
    product: float
    v: Tensor
    d: Tensor


def respond(gram: Gram, theta: Tensor) -> Response:
    """The response of the sharpness to a motion along the gradient of the outputs along v1."""
    o = gram.objective
    values, vectors = torch.linalg.eigh(gram.at(theta).M)
    v, f = vectors[:, -1], o.outputs(theta)[:, 0]
    g = pull(gram, theta, v)
    d, phi, size = f - o.y[:, 0], float(v @ f), float(g @ g)
    whole, straight = (phi * float(v @ part) / size**2 for part in second(o, theta, g))
    return Response(float(values[-1]), phi, float(v @ d), whole, straight, v, d)


class Course(NamedTuple):
    """Gradient descent for T steps; what a single step would change is taken at every one of them."""

    eta: float
    n: int
    sharpness: Array  # (T + 1,) Λη/2
    norm: Array  # (T + 1,) ‖A‖²
    loss: Array  # (T + 1,)
    output: Array  # (T + 1,) φ
    residual: Array  # (T + 1,) δ
    chi: Array  # (T + 1,)
    product: Array  # (T + 1,) the part of χ from products of weights
    changes: dict[str, Array]  # for each of KEPT, (T, 2): of Λη/2 and of ‖A‖² in one step that keeps this of D


@lru_cache(maxsize=16)
def course(
    activation: str,
    start: float = 0.7,
    steps: int = 240,
    n: int = 80,
    width: int = 40,
    depth: int = 2,
    seed: int = FIRST,
    without: int = -1,
) -> Course:
    r"""A network without biases on n digits, 5 to 9 against 0 to 4, centred, labels ±1, in float64.

    ``start``: Λ(0)η/2, which sets η. ``without``: the step from which on the oscillation is taken out, so that θ moves
    by the drift alone; -1 for never. Then a single step's changes are not taken. Ends early before a loss beyond 10⁶.
    """
    data = digits(n, "vehicles")
    x, y = data.x.double(), data.y.double()
    objective = Objective(fully_connected(x.shape[1], width, depth, 1, activation, False, "fan_in", seed), "mse", x, y)
    gram, theta, last = Gram(objective), objective.initial(), output_layer(objective)
    eta, rows = 0.0, []
    changes: dict[str, list[tuple[float, float]]] = {name: [] for name in KEPT if without < 0}
    for t in range(steps + 1):
        here = respond(gram, theta)
        eta = eta or 2 * start / here.sharpness
        norm, loss = float(theta[last].square().sum()), float(here.d @ here.d) / n
        if not loss < 1e6:
            break
        rows.append((here.sharpness * eta / 2, norm, loss, here.output, here.residual, here.chi, here.product))
        if t == steps:
            break
        first = here.residual * here.v
        steps_of = {"first": pull(gram, theta, first), "rest": pull(gram, theta, here.d - first)}
        for name in changes:
            one, rest = KEPT[name]
            after = theta - 2 * eta / n * (one * steps_of["first"] + rest * steps_of["rest"])
            level = float(torch.linalg.eigvalsh(gram.at(after).M)[-1]) * eta / 2
            changes[name].append((level - rows[-1][0], float(after[last].square().sum()) - norm))
        kept = steps_of["rest"] if 0 <= without <= t else steps_of["first"] + steps_of["rest"]
        theta = theta - 2 * eta / n * kept
    levels, norms, losses, outputs, residuals, chi, product = (np.array(c) for c in zip(*rows, strict=True))
    taken = {name: np.array(found[: len(rows) - 1]).reshape(-1, 2) for name, found in changes.items()}
    return Course(eta, n, levels, norms, losses, outputs, residuals, chi, product, taken)


def opposite(run: Course, kept: str, where: slice | Array = slice(None)) -> float:
    """Share of the steps of a course at which one step with ``kept`` of D moves Λ and ‖A‖² in opposite directions."""
    found = run.changes[kept][where]
    return float((found[:, 0] * found[:, 1] < 0).mean()) if len(found) else float("nan")


def foretold(run: Course, where: slice | Array = slice(None)) -> float:
    """Share of the steps at which the sign of χ says rightly whether the two move in opposite directions."""
    found = run.changes["all"][where]
    return float(((run.chi[:-1][where] > 0) == (found[:, 0] * found[:, 1] > 0)).mean()) if len(found) else float("nan")


def first_order(run: Course) -> Array:
    """What the formulas give for a step that keeps δv1 alone: changes of Λη/2 and ‖A‖², (T, 2)."""
    level, ratio = run.sharpness[:-1], run.residual[:-1] / run.output[:-1]
    return np.column_stack(
        [-4 * level**2 * run.chi[:-1] * ratio, -4 * run.eta / run.n * run.output[:-1] * run.residual[:-1]]
    )


def turning_point(run: Course, least: int = 10) -> int | None:
    """The first step from which on χ is negative for ``least`` steps; None without one."""
    below = np.convolve(run.chi < 0, np.ones(least), mode="valid") == least
    return int(np.argmax(below)) if below.any() else None


def one_unit(a: float, w: float, x: float) -> float:
    r"""χ of :math:`f = a\tanh(wx)`, one unit and one example.

    :math:`\chi = 2t^2u^2(1 - u^2/s)/(t^2+u^2)^2` with :math:`t = \tanh wx`, :math:`s = 1 - t^2`, :math:`u = axs`: in
    antiphase exactly for :math:`a^2x^2s > 1`.
    """
    t = np.tanh(w * x)
    s = 1 - t**2
    u = a * x * s
    return float(2 * t**2 * u**2 * (1 - u**2 / s) / (t**2 + u**2) ** 2)
