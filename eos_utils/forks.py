"""Where a run begins: at its initialisation, at a snapshot of another run, or at a step to which that is replayed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eos_utils import data, store
from eos_utils.checkpoint import save_checkpoint
from eos_utils.experiment import Experiment, rational
from eos_utils.objective import Objective

if TYPE_CHECKING:
    import xarray as xr


def start_of(experiment: Experiment, objective: Objective, records: store.Store) -> tuple[torch.Tensor, int]:
    """θ and the step to begin at."""
    if experiment.fork is None:
        return objective.initial(), 0
    fork = experiment.fork
    base = records.load(fork["of"])
    labels = [str(s) for s in base["snapshot"].values] if "snapshot" in base.coords else []
    noise = torch.randn(objective.P, generator=torch.Generator().manual_seed(int(fork["seed"]))).to(objective.x)
    if isinstance(fork["at"], int):
        theta, step = _replayed(fork["of"], base, fork["at"], objective), fork["at"]
        return (theta if fork["size"] == "0" else _perturbed(theta, noise, fork["size"])), step
    if fork["at"] not in labels:
        raise store.StoreError(f"the run {fork['of']} has no snapshot {fork['at']!r} to fork from; it has {labels}")
    i = labels.index(fork["at"])
    theta = torch.from_numpy(np.array(base["theta"].values[i])).to(objective.device, objective.dtype)
    step = int(base["snapshot_step"].values[i])
    return (theta if fork["size"] == "0" else _perturbed(theta, noise, fork["size"])), step


def _perturbed(theta: torch.Tensor, noise: torch.Tensor, size: str) -> torch.Tensor:
    return theta + float(rational(size, "fork size")) * theta.norm() / noise.norm() * noise


def _replayed(key: str, base: xr.Dataset, at: int, objective: Objective) -> torch.Tensor:
    """θ of a recorded run at a step, by gradient descent from the nearest point known before it; kept for the next.

    The loss is compared with the record on the way: to rounding before the chaos of the edge sets in, roughly after.
    """
    of = Experiment.from_dict({k: v for k, v in json.loads(base.attrs["experiment"]).items() if k != "schema"})
    if of.decay or of.project:
        raise ValueError(f"fork at={at}: the run {key} has a decay or a projection; fork from its base")
    steps, losses = base["step"].values, base["loss"].values
    if not steps[0] <= at <= steps[-1]:
        raise ValueError(f"fork at={at}: the run {key} has steps {steps[0]} to {steps[-1]}")
    folder = data.cache_folder() / "points"
    points: dict[int, Any] = {}
    for path in folder.glob(f"{key}-*.pt"):
        points[int(path.stem.rpartition("-")[2])] = path
    if "snapshot" in base.coords:
        points |= {int(s): base["theta"].values[i] for i, s in enumerate(base["snapshot_step"].values)}
    begin = max((s for s in points if s <= at), default=-1)
    found: Any = points.get(begin)
    if begin < 0:
        begin, theta = int(steps[0]), objective.initial()
        if of.fork is not None:
            raise ValueError(f"fork at={at}: the run {key} is a fork itself; fork from its base")
    elif isinstance(found, np.ndarray):
        theta = torch.from_numpy(np.array(found)).to(objective.x)
    else:
        theta = torch.load(found, map_location=objective.device, weights_only=True)
    for t in range(begin, at):
        value, gradient, _ = objective.gradient(theta)
        apart = abs(float(value) / losses[t - steps[0]] - 1)
        if not apart < 0.5:
            raise store.StoreError(f"replaying {key}, the loss at step {t} is off by {apart:.0%}; record it again")
        theta = theta - of.step_size * gradient
    if at not in points:
        save_checkpoint(folder / f"{key}-{at}.pt", theta)
    return theta
