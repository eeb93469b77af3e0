"""Where a run begins: at its initialisation, at a snapshot of another run, or at a step to which that is replayed."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eos_utils import data, store
from eos_utils.checkpoint import read_checkpoint, save_checkpoint
from eos_utils.experiment import Experiment, rational
from eos_utils.objective import Objective

if TYPE_CHECKING:
    import xarray as xr


def points_folder() -> pathlib.Path:
    """Where this machine keeps θ of recorded runs at the steps at which others begin."""
    return data.cache_folder() / "points"


def start_of(
    experiment: Experiment, objective: Objective, records: store.Store, points: pathlib.Path | None = None
) -> tuple[torch.Tensor, int]:
    """θ and the step to begin at; ``points``: a folder whose points, replayed earlier, are used and added to."""
    if experiment.fork is None:
        return objective.initial(), 0
    fork = experiment.fork
    base = records.load(fork["of"])
    labels = [str(s) for s in base["snapshot"].values] if "snapshot" in base.coords else []
    if isinstance(fork["at"], int):
        known = records.manifest(fork["of"])["sha256"][:8]
        theta, step = _replayed(fork["of"], known, base, fork["at"], objective, points), fork["at"]
    elif fork["at"] in labels:
        i = labels.index(fork["at"])
        theta = torch.from_numpy(np.array(base["theta"].values[i])).to(objective.device, objective.dtype)
        step = int(base["snapshot_step"].values[i])
    else:
        raise store.StoreError(f"the run {fork['of']} has no snapshot {fork['at']!r} to fork from; it has {labels}")
    if fork["size"] == "0":
        return theta, step
    noise = torch.randn(len(theta), generator=torch.Generator().manual_seed(int(fork["seed"]))).to(theta)
    return theta + float(rational(fork["size"], "fork size")) * theta.norm() / noise.norm() * noise, step


def point_path(key: str, version: str, step: int, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Where θ of a recorded run at a step is kept; ``version``: its record's checksum, 'new' while it is under way."""
    return (folder or points_folder()) / f"{key}-{version}-{step}.pt"


def calm_until(run: xr.Dataset) -> int:
    """The step, after the first hundred, at which the loss first rises; the last one of a run whose loss never rises.

    From there on rounding grows until two computations of the same run have nothing but their statistics in common.
    """
    steps, rises = run["step"].values, np.flatnonzero(np.diff(run["loss"].values) > 0)
    return int(steps[rises[rises > 100][0]]) if (rises > 100).any() else int(steps[-1])


def tolerance(step: int, calm: int) -> float:
    """By how much the loss of a replay may be off; ``calm``: the step at which it first rises, where chaos sets in.

    Rounding grows before that too, in Figure 1's runs tenfold in 400 to 500 steps: two machines were 1e-6 apart after
    100 steps and 1e-3 after 1,400.
    """
    return 0.5 if step >= calm else 1e-3 if step < 500 else 1e-2


def _replayed(
    name: str, version: str, base: xr.Dataset, at: int, objective: Objective, folder: pathlib.Path | None
) -> torch.Tensor:
    """θ of a recorded run at a step, by gradient descent from the nearest point known before it; kept for the next.

    The loss is compared with the record at every step (:func:`tolerance`).
    """
    of = Experiment.from_dict({k: v for k, v in json.loads(base.attrs["experiment"]).items() if k != "schema"})
    if of.decay or of.project:
        raise ValueError(f"fork at={at}: the run {name} has a decay or a projection; fork from its base")
    if of.fork is not None:
        raise ValueError(f"fork at={at}: the run {name} is a fork itself; fork from its base")
    steps, losses = base["step"].values, base["loss"].values
    if not steps[0] <= at <= steps[-1]:
        raise ValueError(f"fork at={at}: the run {name} has steps {steps[0]} to {steps[-1]}")
    points: dict[int, Any] = {int(steps[0]): None}
    if "snapshot" in base.coords:
        points |= {int(s): base["theta"].values[i] for i, s in enumerate(base["snapshot_step"].values)}
    if folder is not None:
        near = folder.glob(f"{name}-{version}-*.pt")
        points |= {int(path.stem.rpartition("-")[2]): path for path in near}
    theta: Any = None
    while not isinstance(theta, torch.Tensor) or theta.shape != (objective.P,):  # a damaged point: the one before it
        begin = max(s for s in points if s <= at)
        found = points.pop(begin)
        points.setdefault(int(steps[0]), None)
        if found is None:
            theta = objective.initial()
        elif isinstance(found, np.ndarray):
            theta = torch.from_numpy(np.array(found)).to(objective.device, objective.dtype)
        else:
            theta = read_checkpoint(found, objective.device)
    calm = calm_until(base)
    for t in range(begin, at + 1):
        value, gradient, _ = objective.gradient(theta)
        apart = abs(float(value) / losses[t - steps[0]] - 1)
        if not apart < tolerance(t, calm):
            raise store.StoreError(f"replaying {name}, the loss at step {t} is off by {apart:.2%}; record it again")
        if t < at:
            theta = theta - of.step_size * gradient
    if folder is not None and begin != at:
        save_checkpoint(point_path(name, version, at, folder), theta)
    return theta
