r"""What the chapter "The edge of stability in ten minutes" shows: a quadratic, a small network, and why the edge holds.

**Self-stabilisation** (Damian, Nichani and Lee 2023, section 4, with constant coefficients). Near a point of the edge
let x be the displacement along the unstable eigenvector u and :math:`y = S - 2/\eta` the excess of the sharpness S. The
gradient there is :math:`\nabla L + Sxu + \frac{x^2}2\nabla S`, so that

.. math:: x' = -(1 + \eta y)\,x, \qquad y' = y + \eta\Bigl(\alpha - \frac{\beta x^2}2\Bigr), \qquad
   \alpha = -\nabla L^\top\nabla S, \quad \beta = \|\nabla S\|^2 .

α is progressive sharpening. The oscillation pushes the sharpness down by the same third derivative, and balances it at
:math:`|x| = \delta = \sqrt{2\alpha/\beta}`. To leading order in η the orbits are closed:
:math:`H = \frac{y^2}2 - \alpha\ln\frac{|x|}\delta + \frac\alpha2\bigl(\frac{x^2}{\delta^2} - 1\bigr)` is constant.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from eos_utils.checkpoint import forget
from eos_utils.experiment import Experiment, Measure, rational
from eos_utils.fg_theory import Array
from eos_utils.figures import Curve, Panel
from eos_utils.run import compute

if TYPE_CHECKING:
    import xarray as xr


def quadratic(factor: float, steps: int) -> Array:
    r"""Iterates of gradient descent on :math:`\frac\lambda2\theta^2` from 1: :math:`(1 - \eta\lambda)^t`.

    ``factor`` is ηλ.

    >>> quadratic(2.0, 3)
    array([ 1., -1.,  1., -1.])
    """
    return np.asarray((1.0 - factor) ** np.arange(steps + 1))


@lru_cache(maxsize=8)
def network(eta: str, time: float, width: int = 24, n: int = 200, seed: int = 0) -> xr.Dataset:
    """Gradient descent on a small tanh network that reads digits, in float64, until ηt is ``time``."""
    steps = round(time / float(rational(eta)))
    experiment = Experiment(
        dataset="digits",
        n=n,
        width=width,
        depth=2,
        activation="tanh",
        bias=False,
        init="fan_in",
        loss="mse",
        eta=eta,
        steps=steps,
        seed=seed,
        dtype="float64",
    )
    measure = Measure(k=1, stride=2 * (steps // 300) + 3)
    run, _ = compute(experiment, measure, progress=False)
    forget(experiment, measure)
    return run


def stabilise(x: float, y: float, eta: float, alpha: float, beta: float, steps: int) -> tuple[Array, Array]:
    """The two-variable model of self-stabilisation: x and y, (steps + 1,) each.

    At x = √(2α/β), y = 0 it oscillates with period two for ever:

    >>> xs, ys = stabilise(2.0, 0.0, eta=0.1, alpha=1.0, beta=0.5, steps=3)
    >>> xs, ys
    (array([ 2., -2.,  2., -2.]), array([0., 0., 0., 0.]))
    """
    xs, ys = [x], [y]
    for _ in range(steps):
        x, y = -(1 + eta * y) * x, y + eta * (alpha - beta * x**2 / 2)
        xs.append(x)
        ys.append(y)
    return np.array(xs), np.array(ys)


def energy(x: Array, y: Array, alpha: float, beta: float) -> Array:
    """H, which is constant along an orbit to leading order in η, and 0 where the edge holds without swinging."""
    squared = x**2 * beta / (2 * alpha)
    return np.asarray(y**2 / 2 + alpha / 2 * (squared - 1 - np.log(squared)))


# ---- panels --------------------------------------------------------------------------------------


def quadratic_panels(factors: tuple[float, ...], steps: int) -> list[Panel]:
    """The iterates on a parabola, one panel for each ηλ."""
    grid = np.linspace(-1.6, 1.6, 161)
    found = []
    for i, factor in enumerate(factors):
        theta = quadratic(factor, steps)
        theta = theta[np.abs(theta) <= 1.6]
        curves = [Curve(grid, grid**2, "", "line", 0.85), Curve(theta, theta**2, "", "marked", 0.0)]
        label = "loss" if i == 0 else ""
        found.append(Panel(curves, label, "θ", f"ηλ = {factor:g}", xlim=(-1.65, 1.65), ylim=(-0.1, 2.6)))
    return found


def network_panels(runs: dict[str, xr.Dataset]) -> list[Panel]:
    """Sharpness and loss against the time ηt, one curve for each step size; its 2/η dashed in the same place."""
    tones = np.linspace(0.9, 0.0, len(runs))
    above, below = [], []
    for tone, (name, run) in zip(tones, runs.items(), strict=True):
        eta = float(run["eta"].values[0])
        above.append(Curve(run["measured"].values * eta, run["eigenvalue"].values[:, 0], name, tone=float(tone)))
        below.append(Curve(run["step"].values * eta, run["loss"].values, tone=float(tone)))
        if 2 / eta < 1.2 * float(run["eigenvalue"].max()):
            above.append(Curve(above[-1].x[[0, -1]], [2 / eta, 2 / eta], "", "dashed", float(tone)))
    return [
        Panel(above, "sharpness λ₁", "", legend="lower right", legend_columns=2),
        Panel(below, "loss", "time ηt", log="y"),
    ]


def cycle_panels(x: Array, y: Array, eta: float, alpha: float, beta: float) -> list[Panel]:
    """The model: sharpness and oscillation over the step, and the orbit in the plane of both."""
    t, delta = np.arange(len(x)), np.sqrt(2 * alpha / beta)
    s = 1 + eta * y / 2
    return [
        Panel([Curve(t, s)], "S · η/2", "", level=1.0),
        Panel([Curve(t, np.abs(x) / delta)], "|x| / δ", "step", log="y"),
    ]


def plane_panel(x: Array, y: Array, eta: float, alpha: float, beta: float) -> Panel:
    """The orbit in the plane of sharpness and oscillation; the four quadrants are SG's four phases."""
    delta = np.sqrt(2 * alpha / beta)
    s, r = 1 + eta * y / 2, np.abs(x) / delta
    kinds = {
        "I": (s < 1) & (r < 1),
        "II": (s >= 1) & (r < 1),
        "III": (s >= 1) & (r >= 1),
        "IV": (s < 1) & (r >= 1),
    }
    curves = [Curve(s, r, "", "line", None)]
    curves += [
        Curve(np.where(at, s, np.nan), np.where(at, r, np.nan), name, "points", tone)
        for (name, at), tone in zip(kinds.items(), (0.0, 0.35, 0.7, 1.0), strict=True)
    ]
    return Panel(curves, "|x| / δ", "S · η/2", log="y", marks=[1.0], legend="best")
