r"""SG's Assumptions 3.2, 3.3 and 3.5 and equations (1) and (3), live, in float64.

- (1): :math:`\dot F = J\dot\theta = -J\nabla L` and :math:`\nabla L = \frac2nJ^\top D`, so that :math:`\dot D = -MD`
  with :math:`M = \frac2nJJ^\top`, exactly.
- (3) is one step of Euler's method for (1) and (2): its error is of order η², for a smooth network.
- 3.5 (ii), :math:`F^\top\dot v_i < \lambda_iD^\top v_i`, changes sign on both sides with v_i: it holds for one of v_i
  and -v_i. With the sign rule :math:`D^\top v_i > 0` it says something: :math:`F^\top v_i` decreases under the flow.
- "Increasingly weaker": fixed eigenvectors make the left side of (ii) 0, and (ii) is then
  :math:`\lambda_iD^\top v_i > 0`, true by the sign rule alone. (ii) restricts :math:`\dot v_1` in the direction of F,
  from one side, so that v₁ may turn as fast as it likes: (iii) does not follow. From (i) it does, with ε₂ = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.autograd.functional import jvp

from eos_utils.data import digits
from eos_utils.fg_theory import Array, Tested
from eos_utils.gram import Gram, output_layer
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.sg_identities import FIRST, FULLY_CONNECTED, ON_NETWORKS, OTHERS, jacobian, problems
from eos_utils.sg_section3 import Turning, orthogonal
from eos_utils.sg_section3 import turning as turning_flow

SMOOTH = ("linear", "tanh", "elu")
UNIT = 30  # width of the small network of a flow
TOLERANCE = 1e-9  # of the solver of a flow


# ---- equations (1) and (3) -----------------------------------------------------------------------


def flow_of_residual(scale: float = 1.0, trials: int = 60) -> Tested:
    r"""Largest difference between dD/dt under gradient flow, the derivative of the outputs along -∇L by automatic
    differentiation, and -``scale``·MD with M from the explicit Jacobian, relative to the latter; another scale than 1
    is the control.
    """
    worst = 0.0
    for objective, theta in problems(trials, (*FULLY_CONNECTED, *OTHERS)):
        _, gradient, f = objective.gradient(theta)
        moved = jvp(lambda t, o=objective: o._call(t, o.x)[:, 0], theta, -gradient)[1]
        j = jacobian(objective, theta)
        md = 2 / objective.n * j @ (j.T @ (f - objective.y)[:, 0])
        worst = max(worst, float((moved + scale * md).norm() / md.norm()))
    return Tested(worst, trials, f"{ON_NETWORKS}, {', '.join((*FULLY_CONNECTED, *OTHERS))}")


def step_order(of: str = "D", scale: float = 1.0, trials: int = 60, size: float = 1e-3) -> Tested:
    r"""The smallest order in η of the error of equation (3) for D, or for ‖A‖² (``of`` 'A'): the base-2 logarithm of
    the error's ratio when η, ``size``/Λ, is halved. "To first order" is an order above 1. The printed terms times
    another ``scale`` than 1 are the control.
    """
    if of not in ("D", "A"):
        raise ValueError(f"of={of!r} is unknown; choose D or A")
    lowest = np.inf
    for objective, theta in problems(trials, SMOOTH):
        _, gradient, f = objective.gradient(theta)
        m, a, errors = Gram(objective).at(theta).M, output_layer(objective), []
        d, largest = f - objective.y, float(torch.linalg.matrix_norm(m, 2))
        for eta in (size / largest, size / largest / 2):
            after = theta - eta * gradient
            if of == "D":
                errors.append(objective.outputs(after) - f + scale * eta * m @ d)
            else:
                change = after[a].square().sum() - theta[a].square().sum()
                errors.append(change + scale * 4 * eta / objective.n * (d * f).sum())
        lowest = min(lowest, float(torch.log2(errors[0].norm() / errors[1].norm())))
    return Tested(lowest, trials, f"{ON_NETWORKS}, {', '.join(SMOOTH)}, η = {size:g}/Λ and half of it")


# ---- Assumption 3.5 ------------------------------------------------------------------------------


def _turning_of(objective: Objective, theta: Tensor) -> tuple[Array, Array]:
    r"""The two sides of 3.5 (ii) for every eigenvector, :math:`F^\top\dot v_i`, :math:`\lambda_iD^\top v_i`: (n,) each.

    :math:`\dot v_i = \sum_{j\ne i}v_j\,v_j^\top\dot Mv_i/(\lambda_i - \lambda_j)`, and :math:`\dot M` is a central
    difference along -∇L.
    """
    gram = Gram(objective)
    _, gradient, f = objective.gradient(theta)
    f, y = f[:, 0], objective.y[:, 0]
    values, vectors = torch.linalg.eigh(gram.at(theta).M)
    h = 1e-4 * theta.norm() / gradient.norm()
    rate = (gram.at(theta - h * gradient).M - gram.at(theta + h * gradient).M) / (2 * h)
    gaps = (values[:, None] - values[None, :]).fill_diagonal_(float("inf"))
    turning = ((vectors.T @ rate @ vectors) / gaps) @ (vectors.T @ f)
    return turning.numpy(), (values * (vectors.T @ (f - y))).numpy()


def slowness_flips(sign_rule: bool = False, trials: int = 60) -> Tested:
    """Share of the eigenvectors for which Assumption 3.5 (ii) is true of v_i and false of -v_i, or the reverse. With
    ``sign_rule`` both are first given the sign with Dᵀv_i ≥ 0.
    """
    changed = total = 0
    for objective, theta in problems(trials, SMOOTH):
        turning, side = _turning_of(objective, theta)
        sides = [(sign * turning, sign * side) for sign in (1, -1)]
        if sign_rule:
            sides = [(np.sign(b) * a, np.abs(b)) for a, b in sides]
        changed += int(((sides[0][0] < sides[0][1]) != (sides[1][0] < sides[1][1])).sum())
        total += len(turning)
    rule = ", signs with Dᵀv ≥ 0" if sign_rule else ""
    return Tested(changed / total, total, f"eigenvectors of M of {ON_NETWORKS}, {', '.join(SMOOTH)}{rule}")


def fixed_not_slow(sign_rule: bool = False, trials: int = 2000) -> Tested:
    """Share of random flows with fixed eigenvectors of random signs, and eigenvalues above 0, in which 3.5 (ii) fails
    for some i at some time. With ``sign_rule`` the signs are those with Dᵀv_i > 0 at the start.
    """
    generator = np.random.default_rng(FIRST)
    values = 10 ** generator.uniform(-2, 0.5, size=(trials, 4))
    start = np.einsum("kji,kj->ki", orthogonal(generator, trials, 4), generator.choice([-1.0, 1.0], size=(trials, 4)))
    start = np.abs(start) if sign_rule else start
    found = turning_flow(values, np.zeros((trials, 4, 4)), start, 4.0, 40)
    rule = ", signs with Dᵀv > 0" if sign_rule else ", signs at random"
    return Tested(float(1 - found.condition[:, -1].mean()), trials, f"flows of four examples from F = 0{rule}")


@lru_cache(maxsize=8)
def turning_flows(fastest: float, trials: int, times: int = 60) -> tuple[Turning, Array]:
    r"""Random flows from F = 0 over a time of at most 1/Λ, and by which angle v₁ turns in it, (trials,).

    The first two of three eigenvectors turn in their plane at one rate, by at most ``fastest`` radians. ``condition``
    also asks for the sign rule, Dᵀv_i > 0, at all times.
    """
    generator = np.random.default_rng(FIRST)
    values = np.sort(10 ** generator.uniform(-0.5, 0, size=(trials, 3)), axis=1)[:, ::-1]
    angle = generator.uniform(0, fastest, size=trials) * generator.choice([-1, 1], size=trials)
    time = 10 ** generator.uniform(-2, 0, size=trials)  # in units of 1/Λ: all flows run for the time 1
    values = values / values[:, :1] * time[:, None]
    omega = np.zeros((trials, 3, 3))
    omega[:, 0, 1], omega[:, 1, 0] = angle, -angle
    start = np.abs(np.einsum("kji,kj->ki", orthogonal(generator, trials, 3), generator.choice([-1.0, 1], (trials, 3))))
    found = turning_flow(values, omega, start, 1.0, times)
    signed = np.logical_and.accumulate((found.d > 0).all(axis=2), axis=1)
    return Turning(found.d, found.f, found.condition & signed), np.abs(angle)


def slow_yet_turned(fastest: float = 1.5, trials: int = 5000) -> Tested:
    """The largest 1 - ⟨v₁, v₁'⟩ between the ends of a random flow of a time of at most 1/Λ along which 3.5 (ii), with
    the sign rule, holds for all i at all times. Eigenvectors turn by at most ``fastest``; 0 is the control.
    """
    found, angle = turning_flows(fastest, trials)
    met = found.condition[:, -1].astype(bool)
    value = float((1 - np.cos(angle[met])).max()) if met.any() else float("nan")
    return Tested(value, int(met.sum()), "flows of three examples from F = 0 whose first two eigenvectors turn")


CHECKS: dict[str, Callable[..., Tested]] = {
    f.__name__: f for f in (flow_of_residual, step_order, slowness_flips, fixed_not_slow, slow_yet_turned)
}


# ---- a gradient flow, solved ---------------------------------------------------------------------


class Beside(NamedTuple):
    """Gradient descent and gradient flow at equal times, up to the first step with Λ > 2/η; (T,) each."""

    d: Array  # (T, n) of gradient descent
    flow_d: Array  # (T, n)
    small_d: Array  # (T, n) of gradient descent with a twentieth of η
    sharpness: Array  # Λη/2
    flow_sharpness: Array

    @property
    def apart(self) -> Array:
        """‖D - D_flow‖/‖D_flow‖."""
        return np.asarray(np.linalg.norm(self.d - self.flow_d, axis=1) / np.linalg.norm(self.flow_d, axis=1))

    @property
    def solver(self) -> Array:
        """The same for the step size η/20 in place of η: how far that is from a flow."""
        return np.asarray(np.linalg.norm(self.small_d - self.flow_d, axis=1) / np.linalg.norm(self.flow_d, axis=1))

    @property
    def loss_apart(self) -> Array:
        """Relative difference of the losses."""
        a, b = ((d * d).sum(axis=1) for d in (self.d, self.flow_d))
        return np.asarray(np.abs(a / b - 1))


@lru_cache(maxsize=8)
def beside_flow(activation: str, start: float = 0.5, steps: int = 120, n: int = 60, refine: int = 20) -> Beside:
    r"""A network 64-30-30-1 on n digits, 0 against 4: gradient descent beside the flow, :math:`\dot\theta = -\nabla L`.

    ``start`` is Λ(0)η/2. The flow is solved by an eighth-order Runge–Kutta method, to a relative error of 10⁻⁹ a step.
    """
    data = digits(n, "pair", classes=(0, 4))
    model = fully_connected(data.x.shape[1], UNIT, 2, 1, activation, False, "fan_in", FIRST).double()
    objective = Objective(model, "mse", data.x.double(), data.y.double())
    gram, theta = Gram(objective), objective.initial()
    largest = float(torch.linalg.eigvalsh(gram.at(theta).M)[-1])
    eta = 2 * start / largest

    def descend(step: float, count: int, every: int) -> list[Tensor]:
        path, at = [theta], theta
        for t in range(1, count + 1):
            at = at - step * objective.gradient(at)[1]
            if t % every == 0:
                path.append(at)
                if every == 1 and level(at) > 1:
                    break
        return path

    def level(at: Tensor) -> float:
        return float(torch.linalg.eigvalsh(gram.at(at).M)[-1]) * eta / 2

    path = descend(eta, steps, 1)
    last = len(path) - 1
    solved = solve_ivp(
        lambda _, at: -objective.gradient(torch.from_numpy(at))[1].numpy(),
        (0, eta * last),
        theta.numpy(),
        "DOP853",
        eta * np.arange(last + 1),
        rtol=TOLERANCE,
        atol=TOLERANCE / 100,
    )
    flow = [torch.from_numpy(column.copy()) for column in solved.y.T]
    small = descend(eta / refine, refine * last, refine)
    d, flow_d, small_d = (
        np.array([(objective.outputs(at) - objective.y).numpy()[:, 0] for at in p]) for p in (path, flow, small)
    )
    return Beside(d, flow_d, small_d, np.array([level(at) for at in path]), np.array([level(at) for at in flow]))
