r"""FG, Lemma 2.1 with equations (1) to (3): the balance of a neuron; random networks to test the lemmas on.

With :math:`q = \eta\|d_j\|`, :math:`p = \eta\langle d_j, w_j\rangle` and the balance :math:`D = \|w_j\|^2 - a_j^2`, a
step of gradient descent takes D to

.. math::
   D' = D + q^2a_j^2 - p^2 = (1-q^2)\,D + q^2\|w_j\|^2 - p^2 ,

equation (2) and the correct form of (3). By Cauchy–Schwarz :math:`p^2\le q^2\|w_j\|^2`, so that :math:`q\le1` and
:math:`D\ge0` give :math:`D'\ge0`. With c the cosine of the angle of :math:`w_j` and :math:`d_j` the exact condition is
:math:`\|w_j\|^2(1-q^2c^2)\ge a_j^2(1-q^2)`.

A neuron is called *heavy* here where :math:`\|w_j\| \ge |a_j|`. Random problems have orthonormal inputs unless a
correlation is asked for; seeds are counted from 100 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from eos_utils.fg_theory import (
    Array,
    Network,
    Problem,
    Tested,
    descend,
    error_vectors,
    initial,
    orthonormal,
    problem,
    step,
)

FIRST = 100  # seeds below were used to explore
ROUNDING = 1e-10  # a balance as negative as this, relative to ‖w‖² + a², is no violation
UNEQUAL = (1.5, 1.0, -0.8, -0.5)  # the labels on which the balance is followed over time
LABELS = (1.0, 1.0, -2 / 3, -2 / 3)
RANDOM = "random networks on 1 to 5 orthonormal inputs, weights of order 1, η‖d_j‖ up to"


# ---- random networks -----------------------------------------------------------------------------


def correlated(x: Array, correlation: float) -> Array:
    """Unit vectors of which any two have this inner product, from orthonormal ones, (n, d)."""
    n = len(x)
    gram = (1 - correlation) * np.eye(n) + correlation * np.ones((n, n))
    return x if correlation == 0 else np.linalg.cholesky(gram) @ x


def draws(
    trials: int, q_max: float = 2.0, heavy: bool = False, correlation: float = 0.0, first: int = FIRST
) -> Iterator[tuple[Network, Problem]]:
    r"""Random networks with random labels; the largest :math:`\eta\|d_j\|` is uniform on (0, ``q_max``).

    One to five inputs, the unit vectors or rotated, one to four neurons, weights of order 1. With ``heavy``, all
    neurons have :math:`|a_j| \le \|w_j\|`, a quarter of them equal.
    """
    generator = np.random.default_rng(first)
    for i in range(trials):
        n, m = int(generator.integers(1, 6)), int(generator.integers(1, 5))
        x = orthonormal(n, n + int(generator.integers(0, 2)), seed=None if i % 2 else first + i)
        w = generator.normal(size=(m, x.shape[1])) * generator.uniform(0.2, 1.5)
        a = generator.normal(size=m)
        if heavy:
            share = np.where(generator.random(m) < 0.25, 1.0, generator.random(m))
            a = np.sign(a) * share * np.linalg.norm(w, axis=1)
        p, net = Problem(correlated(x, correlation), generator.normal(size=n) * 2, 1.0), Network(w, a)
        largest = float(np.linalg.norm(error_vectors(net, p), axis=1).max())
        yield net, Problem(p.x, p.y, float(generator.uniform(1e-3, q_max)) / (largest or 1.0))


class Steps(NamedTuple):
    r"""One step of many neurons, arrays (N,): :math:`\|w\|^2`, :math:`a^2`, q, p before it, and what it led to."""

    w2: Array
    a2: Array
    q: Array
    p: Array
    balance: Array  # ‖w'‖² − a'²
    total: Array  # ‖w'‖² + a'², the scale of rounding errors

    @property
    def cosine(self) -> Array:
        """Of the angle between w and d; 0 where d is 0."""
        size = self.q * np.sqrt(self.w2)
        return np.divide(self.p, size, out=np.zeros_like(size), where=size > 0)


@lru_cache(maxsize=8)
def neuron_steps(trials: int, q_max: float = 2.0, heavy: bool = False) -> Steps:
    """The neurons of random networks, each with the step that gradient descent takes."""
    rows = []
    for net, p in draws(trials, q_max, heavy):
        d, new = error_vectors(net, p), step(net, p)
        w2, after = (net.w**2).sum(axis=1), (new.w**2).sum(axis=1)
        q, slope = p.eta * np.linalg.norm(d, axis=1), p.eta * (d * net.w).sum(axis=1)
        rows.append(np.stack([w2, net.a**2, q, slope, after - new.a**2, after + new.a**2]))
    return Steps(*np.concatenate(rows, axis=1))


# ---- Lemma 2.1 -----------------------------------------------------------------------------------


def predicted(steps: Steps, equation: str) -> Array:
    """The balance after the step by equation '2', '3' (as printed: a² in the last term) or '3 corrected' (‖w‖²)."""
    w2, a2, q2 = steps.w2, steps.a2, steps.q**2
    if equation == "2":
        return w2 - a2 + q2 * a2 - steps.p**2
    return (1 - q2) * (w2 - a2) + q2 * {"3": a2, "3 corrected": w2}[equation] - steps.p**2


def deviation(steps: Steps, equation: str, against: str = "step") -> Array:
    """How far an equation is from the balance after the step, or from another equation, over ‖w'‖² + a'², (N,)."""
    other = steps.balance if against == "step" else predicted(steps, against)
    return np.abs(predicted(steps, equation) - other) / steps.total


def foretold(steps: Steps) -> NDArray[np.bool_]:
    r"""The exact condition :math:`\|w\|^2(1-q^2c^2)\ge a^2(1-q^2)` for a neuron to be heavy after the step, (N,)."""
    q2 = steps.q**2
    return steps.w2 * (1 - q2 * steps.cosine**2) >= steps.a2 * (1 - q2)


def wrongly_foretold(steps: Steps) -> int:
    """Neurons for which the exact condition is wrong, those within rounding of equality left out."""
    clear = np.abs(steps.balance) > ROUNDING * steps.total
    return int((foretold(steps) != (steps.balance >= 0))[clear].sum())


def lost(steps: Steps) -> NDArray[np.bool_]:
    """Neurons that are not heavy after the step, (N,)."""
    return steps.balance < -ROUNDING * steps.total


class Course(NamedTuple):
    """What became of the balance along one run."""

    lost: bool  # some neuron ceased to be heavy
    lost_below: bool  # ... while η‖d_j‖ of this neuron had been at most 1 all along
    first: float  # step at which one first did, nan for never
    worst: float  # lowest balance of a neuron over ‖w‖² + a²


@lru_cache(maxsize=64)
def courses(size: float, seeds: int, steps: int, m: int = 40, scale: float = 1e-3) -> list[Course]:
    r"""Runs from FG's exactly balanced initialisation with :math:`\eta\|d_+\|` = ``size``, one for each seed."""
    runs = []
    eta = size / problem(UNEQUAL, 1.0).size(1)
    for seed in range(FIRST, FIRST + seeds):
        p = problem(UNEQUAL, eta, seed=seed if seed % 2 else None)
        path = descend(initial(m, p.n, scale, seed), p, steps)
        w2, a2 = np.array([(net.w**2).sum(axis=1) for net in path]), np.array([net.a**2 for net in path])
        q = eta * np.array([np.linalg.norm(error_vectors(net, p), axis=1) for net in path[:-1]])
        if not np.isfinite(w2[-1]).all():
            raise FloatingPointError(f"η‖d₊‖ = {size}, seed {seed}: diverged; nothing can be said of its balance")
        relative = ((w2 - a2) / (w2 + a2))[1:]
        out = relative < -ROUNDING
        below = np.logical_and.accumulate(q <= 1, axis=0)
        first = float(np.argmax(out.any(axis=1))) + 1 if out.any() else np.nan
        runs.append(Course(bool(out.any()), bool((out & below).any()), first, float(relative.min())))
    return runs


def _unbalanced(seed: int, m: int = 10) -> Network:
    """Weights of order 1 whose output weights are too small for balance."""
    net = initial(m, len(LABELS), 0.5, seed)
    return Network(net.w, net.a * np.random.default_rng(seed).uniform(0.3, 0.9, size=m))


@lru_cache(maxsize=64)
def drift(eta: float, seeds: int, time: float) -> float:
    r"""Largest change of a neuron's balance up to a time :math:`t\eta`, over :math:`\|w\|^2 + a^2` at the start.

    ``eta`` = 0 is gradient flow, :math:`\dot w_j = a_j d_j,\ \dot a_j = \langle w_j, d_j\rangle`, solved to a relative
    1e-10 by an explicit Runge–Kutta method of order 8.
    """
    worst = 0.0
    for seed in range(FIRST, FIRST + seeds):
        start, p = _unbalanced(seed), problem(LABELS, eta or 1.0, seed=seed)
        shape = (*start.a.shape, p.n + 1)

        def velocity(_: float, flat: Array, p: Problem = p, shape: tuple[int, int] = shape) -> Array:
            net = Network(flat.reshape(shape)[:, :-1], flat.reshape(shape)[:, -1])
            d = error_vectors(net, p)
            return np.column_stack([net.a[:, None] * d, (net.w * d).sum(axis=1)]).ravel()

        if eta:
            end = descend(start, p, round(time / eta))[-1]
        else:
            flat = np.column_stack(start).ravel()
            flow = solve_ivp(velocity, (0, time), flat, method="DOP853", rtol=1e-10, atol=1e-12)
            rows = flow.y[:, -1].reshape(shape)
            end = Network(rows[:, :-1], rows[:, -1])
        change = ((end.w**2).sum(axis=1) - end.a**2) - ((start.w**2).sum(axis=1) - start.a**2)
        worst = max(worst, float((np.abs(change) / ((start.w**2).sum(axis=1) + start.a**2)).max()))
    return worst


# ---- what claims rest on -------------------------------------------------------------------------


def balanced_start(trials: int = 200) -> Tested:
    """Largest deviation of ‖w_j‖/|a_j| from 1 over the neurons of FG's initialisation."""
    worst = 0.0
    for seed in range(FIRST, FIRST + trials):
        net = initial(40, 1 + seed % 10, 10.0 ** -(seed % 7), seed)
        worst = max(worst, float(np.abs(np.linalg.norm(net.w, axis=1) / np.abs(net.a) - 1).max()))
    return Tested(worst, 40 * trials, f"{trials} initialisations of 40 neurons in 1 to 10 dimensions, λ from 1 to 1e-6")


def update(part: str, trials: int = 500) -> Tested:
    """Largest difference between −η∂L/∂w_j (or ∂a_j) by automatic differentiation and equation (1), relative to the
    largest component of the step.
    """
    worst, cases = 0.0, 0
    for net, p in draws(trials):
        x, y, w, a = (torch.tensor(v, dtype=torch.float64) for v in (p.x, p.y, net.w, net.a))
        w.requires_grad_(), a.requires_grad_()
        value = ((torch.relu(x @ w.T) @ a - y) ** 2).sum() / (2 * p.n)
        gradient = [-p.eta * g.numpy() for g in torch.autograd.grad(value, (w, a))]
        d = error_vectors(net, p)
        formula = (p.eta * net.a[:, None] * d, p.eta * (net.w * d).sum(axis=1))
        which = {"w": 0, "a": 1}[part]
        largest = max(float(np.abs(g).max()) for g in gradient) or 1.0
        worst, cases = max(worst, float(np.abs(gradient[which] - formula[which]).max()) / largest), cases + len(net.a)
    return Tested(worst, cases, f"neurons of {RANDOM} 2")


def balance_equation(equation: str, against: str = "step", trials: int = 2000) -> Tested:
    """Largest difference between what the equation gives for the balance after a step and what gradient descent gives
    (or another equation, with the old balance added to the right-hand side of (2)), relative to ‖w_j‖² + a_j² after it.
    """
    steps = neuron_steps(trials)
    return Tested(float(deviation(steps, equation, against).max()), len(steps.q), f"neurons of {RANDOM} 2")


def one_step_lost(q_max: float, trials: int = 4000) -> Tested:
    """Share of the neurons with ‖w_j‖ ≥ |a_j| before a step of gradient descent that have ‖w_j‖ < |a_j| after it."""
    steps = neuron_steps(trials, q_max, True)
    return Tested(float(lost(steps).mean()), len(steps.q), f"neurons of {RANDOM} {q_max:g}, with ‖w‖ ≥ |a|")


def all_times_lost(sizes: Sequence[float], hypothesis: bool = False, seeds: int = 30, steps: int = 200) -> Tested:
    """Share of runs from FG's balanced initialisation in which some neuron comes to have ‖w_j‖ < |a_j|; with the
    hypothesis of the corrected statement, only while this neuron's η‖d_j‖ has been at most 1 all along.
    """
    runs = [run for size in sizes for run in courses(size, seeds, steps)]
    out = [run.lost_below if hypothesis else run.lost for run in runs]
    shown = ", ".join(f"{size:g}" for size in sizes)
    return Tested(
        float(np.mean(out)),
        len(runs),
        f"runs of {steps} steps, {seeds} seeds at each η‖d₊‖ = {shown}; m = 40, labels 1.5, 1, −0.8, −0.5, λ = 1e-3",
    )


def balance_order(quantity: str = "balance", trials: int = 2000) -> Tested:
    """Largest distance from 2 of the order in η of the change in one step, log₂ of its ratio between η and η/2. The sum
    ‖w_j‖² + a_j², which changes at first order, is the control.
    """
    sign = {"balance": -1.0, "sum": 1.0}[quantity]
    orders: list[float] = []
    for net, p in draws(trials, q_max=0.1):
        size = (net.w**2).sum(axis=1) + net.a**2
        full, half = (
            (new.w**2 - net.w**2).sum(axis=1) + sign * (new.a**2 - net.a**2)
            for new in (step(net, p), step(net, Problem(p.x, p.y, p.eta / 2)))
        )
        clear = np.abs(half) > 1e-6 * size  # or rounding would be measured
        orders.extend(np.log2(np.abs(full[clear] / half[clear])))
    return Tested(float(np.abs(np.array(orders) - 2).max()), len(orders), f"neurons of {RANDOM} 0.1")


def flow_drift(eta: float = 0.0, seeds: int = 5, time: float = 30.0) -> Tested:
    """Largest change of a neuron's balance along gradient flow (along gradient descent for η > 0), relative to
    ‖w_j‖² + a_j² at the start.
    """
    on = f"neurons of {seeds} networks that start unbalanced, weights of order 0.5, until time {time:g}"
    return Tested(drift(eta, seeds, time), 10 * seeds, on)


CHECKS: dict[str, Callable[..., Tested]] = {
    "balanced_start": balanced_start,
    "gradient_step_update": update,
    "balance_equation": balance_equation,
    "one_step_balance_lost": one_step_lost,
    "all_times_balance_lost": all_times_lost,
    "balance_order": balance_order,
    "flow_drift": flow_drift,
}
