r"""Full-batch gradient descent, :math:`\theta_{t+1} = \theta_t - \eta_t \nabla L(\theta_t)`.

At every step the loss and the accuracy at :math:`\theta_t` are recorded, observers measure what is due, then the
schedule may change the step size, and the stopping rules decide. The whole state can be saved and continued
with the same bits (same machine, same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eos_utils.curvature import Hessian
from eos_utils.lanczos import EigenTracker
from eos_utils.losses import accuracy
from eos_utils.objective import Objective
from eos_utils.observers import Observer

NUMERICS = 1


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer finite."""


@dataclass(frozen=True)
class Decay:
    """η → factor·η once, at step ``at_step``, or when the ``entered``-th eigenvalue has entered EoS.

    ``then``: the run ends so many steps after that.

    >>> x, y = torch.ones(1, 1), torch.zeros(1, 1)
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> objective = Objective(model, "half_mse", x, y)    # L = θ²/2; θ → (1 - η)θ
    >>> decay = Decay(0.5, at_step=2, then=2)    # η from 2, the edge, to 1
    >>> start = Descent(torch.ones(1), eta=2.0)
    >>> run = gradient_descent(objective, start, Stop(steps=100), decay=decay)
    >>> run.series["eta"], run.series["loss"], run.status
    ([2.0, 2.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.0, 0.0], 'steps')
    """

    factor: float
    at_step: int | None = None
    entered: int | None = None
    then: int | None = None

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"decay factor={self.factor}: must be positive")
        for name in ("at_step", "entered", "then"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"decay {name}={value!r}: must be a whole number")
        if (self.at_step is None) == (self.entered is None):
            raise ValueError("a decay needs exactly one of at_step and entered")


class Projection:
    r"""From ``at_step`` on, gradient descent moves no more along one eigenvector of the Hessian.

    :math:`\theta_{t+1} = \theta_t - \eta\,(I - vv^\top)\nabla L(\theta_t)`, where v is the ``eig``-th eigenvector at
    ``at_step`` and, at every ``every``-th step from there on, the leading eigenvector that overlaps most with the v
    before. An intervention: what the motion along v does shows in what happens without it.
    """

    def __init__(self, eig: int, at_step: int, every: int = 5) -> None:
        for name, value, least in (("eig", eig, 1), ("at_step", at_step, 0), ("every", every, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"project {name}={value!r}: must be a whole number, at least {least}")
        self.eig, self.at_step, self.every = eig, at_step, every
        self.tracker: EigenTracker | None = None
        self.v: Tensor | None = None

    def __call__(self, step: int, objective: Objective, theta: Tensor, gradient: Tensor) -> Tensor:
        """The gradient without its component along v."""
        if step < self.at_step:
            return gradient
        if self.v is None or (step - self.at_step) % self.every == 0:
            self.tracker = self.tracker or EigenTracker(min(self.eig + 2, objective.P))
            vectors = self.tracker.update(Hessian(objective, theta)).vectors
            at = self.eig - 1 if self.v is None else int((vectors.T @ self.v).abs().argmax())
            self.v = vectors[:, at].clone()
        return gradient - (self.v @ gradient) * self.v

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        tracker = self.tracker and {"k": self.tracker.k, "state": self.tracker.state()}
        return {"tracker": tracker, "v": self.v}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        if state["tracker"]:
            self.tracker = EigenTracker(state["tracker"]["k"])
            self.tracker.load_state(state["tracker"]["state"])
        self.v = state["v"]


@dataclass(frozen=True)
class Stop:
    """After ``steps`` steps, or as soon as the accuracy or the loss is good enough."""

    steps: int
    accuracy: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: must not be negative")


@dataclass
class Descent:
    """A run in progress: where it is, what it has recorded, and how it ended.

    ``series``: 'loss', 'accuracy', 'eta', one value a step from ``first`` on. ``status``: 'running', 'accuracy',
    'loss', 'steps' or 'diverged'. ``finite_loss``: the last finite loss.
    """

    theta: Tensor
    eta: float
    step: int = 0
    first: int = 0
    status: str = "running"
    decayed_at: int | None = None
    finite_loss: float = math.nan
    seconds: float = 0.0
    series: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "accuracy": [], "eta": []})

    def state(self) -> dict[str, Any]:
        """Everything, as plain values and tensors."""
        return dict(self.__dict__)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Descent:
        """Continues from :meth:`state`."""
        return cls(**state)


def _over(decay: Decay | None, descent: Descent) -> bool:
    """Whether a run has gone on for as long after its decay as it should."""
    if decay is None or decay.then is None or descent.decayed_at is None:
        return False
    return descent.step >= descent.decayed_at + decay.then


def gradient_descent(
    objective: Objective,
    descent: Descent,
    stop: Stop,
    *,
    decay: Decay | None = None,
    projection: Projection | None = None,
    observers: Sequence[Observer] = (),
    after_step: Callable[[Descent], None] | None = None,
) -> Descent:
    """Runs ``descent`` until a stopping rule holds or the loss is not finite, and returns it.

    A run that diverges ends with ``status='diverged'``; what was recorded up to there stays. ``after_step`` is
    called once a step, after the update (for progress and checkpoints). Raises ``ValueError`` for η ≤ 0.

    >>> x, y = torch.ones(1, 1), torch.zeros(1, 1)
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> objective = Objective(model, "half_mse", x, y)    # L = θ²/2, so λ = 1
    >>> for eta in (0.5, 2.0, 3.0):    # θ → (1 - η)θ: stable for η < 2/λ only
    ...     start = Descent(torch.ones(1), eta)
    ...     print(eta, gradient_descent(objective, start, Stop(steps=3)).series["loss"])
    0.5 [0.5, 0.125, 0.03125, 0.0078125]
    2.0 [0.5, 0.5, 0.5, 0.5]
    3.0 [0.5, 2.0, 8.0, 32.0]
    """
    if not (descent.eta > 0 and math.isfinite(descent.eta)):
        raise ValueError(f"eta={descent.eta}: the step size must be positive and finite")
    while descent.status == "running":
        begun = time.perf_counter()
        value, gradient, outputs = objective.gradient(descent.theta)
        loss = float(value)
        if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
            descent.status = "diverged"
            break
        descent.finite_loss = loss
        right = accuracy(outputs, objective.y)
        try:
            for observer in observers:
                if observer.due(descent.step):
                    observer.measure(descent.step, descent.eta, objective, descent.theta)
        except FloatingPointError:  # the curvature overflows before the loss does
            descent.status = "diverged"
            break
        if decay is not None and descent.decayed_at is None:
            reached = (
                descent.step >= decay.at_step
                if decay.at_step is not None
                else any(o.entered() >= (decay.entered or 1) for o in observers)
            )
            if reached:
                descent.decayed_at, descent.eta = descent.step, descent.eta * decay.factor
        for name, number in {"loss": loss, "accuracy": right, "eta": descent.eta}.items():
            descent.series[name].append(number)
        if stop.accuracy is not None and right >= stop.accuracy:
            descent.status = "accuracy"
        elif stop.loss is not None and loss <= stop.loss:
            descent.status = "loss"
        elif descent.step >= stop.steps or _over(decay, descent):
            descent.status = "steps"
        else:
            if projection is not None:
                gradient = projection(descent.step, objective, descent.theta, gradient)
            descent.theta = descent.theta - descent.eta * gradient
            descent.step += 1
        descent.seconds += time.perf_counter() - begun
        if after_step is not None:
            after_step(descent)
    return descent
