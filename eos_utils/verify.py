"""Does today's code still give what is on record? Short replays from points at which θ is known exactly.

float32 trajectories agree closely between machines before EoS; after it they are chaotic and only statistics agree.
So a record is replayed for 20 steps from where it began and from each stored snapshot: the loss must agree at
each step, and at every step measured in between the recorded eigenvalues must agree with a cold evaluation. A run
computed anew as a whole is compared by its statistics, with the spread of the recorded forks as the measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from eos_utils import claims, registry
from eos_utils.catalogue import Entry, catalogue
from eos_utils.checkpoint import forget
from eos_utils.curvature import Hessian
from eos_utils.data import DataError
from eos_utils.forks import start_of
from eos_utils.lanczos import top_eigenpairs
from eos_utils.residual import gram_of
from eos_utils.run import compute, pick_device
from eos_utils.store import Store, StoreError, root
from eos_utils.terms import FIELDS, terms

REPLAY_STEPS = 20
LOSS_TOLERANCE = 1e-3  # relative, over 20 steps: rounding at the edge grows by a few per cent a step
REPLAYED_SLACK = 50  # at most; what a replay past the edge agrees to after hundreds of steps on another machine
EIGENVALUE_TOLERANCE = 3e-3  # of the largest: three times what a record's own bounds allow


@dataclass(frozen=True)
class Replay:
    """One replay: where it began, the worst relative differences, and whether they are within tolerance."""

    begin: str
    step: int
    loss: float
    eigenvalue: float
    slack: float = 1.0  # a point that had to be replayed past the edge is known roughly

    @property
    def agrees(self) -> bool:
        """Whether both differences are within tolerance."""
        return self.loss <= self.slack * LOSS_TOLERANCE and self.eigenvalue <= self.slack * EIGENVALUE_TOLERANCE

    def __str__(self) -> str:
        outcome = "agrees" if self.agrees else "DIFFERS"
        return (
            f"{outcome} from {self.begin} (step {self.step}): loss within {self.loss:.1e}, "
            f"eigenvalues within {self.eigenvalue:.1e}"
        )


def replay(
    entry: Entry, *, device: str = "auto", quick: bool = False, first: bool = False, store: Store | None = None
) -> list[Replay]:
    """Replays a recorded run; ``quick`` from its last known point alone, ``first`` from where it began alone.

    Raises if there is no record or no data.
    """
    store = store or Store()
    run = store.load(entry.experiment.key)
    loaded = entry.experiment.dataset_loaded()
    objective = entry.experiment.objective(pick_device(device), loaded)
    if loaded.sha256 != (recorded_data := store.manifest(entry.experiment.key)["provenance"]["data"]["sha256"]):
        raise DataError(f"the data have SHA-256 {loaded.sha256[:16]}, the record was made with {recorded_data[:16]}")
    theta, start = start_of(entry.experiment, objective, store, kept=False)
    fork = entry.experiment.fork
    rough = fork is not None and isinstance(fork["at"], int)
    points = [("initialisation" if fork is None else "a replay of its base" if rough else "the fork", start, theta)]
    if (
        "snapshot" in run.coords and entry.experiment.project is None and not first
    ):  # a held direction is not in a snapshot
        for i, label in enumerate(run["snapshot"].values):
            theta = torch.from_numpy(np.array(run["theta"].values[i])).to(objective.device, objective.dtype)
            points.append((str(label), int(run["snapshot_step"].values[i]), theta))
    found, gram = [], gram_of(objective) if "sharpness" in run else None
    steps, loss, eta = run["step"].values, run["loss"].values, run["eta"].values
    measured, eigenvalues = run["measured"].values, run["eigenvalue"].values
    weighed = run["weighed"].values if "weighed" in run.coords else np.array([])
    if quick:  # past the edge where possible, with enough steps on record after it
        points = [point for point in points if point[1] + REPLAY_STEPS <= steps[-1]][-1:]
    for label, begin, theta in points:
        worst, apart, first_apart, projection = 0.0, 0.0, 0.0, entry.experiment.projection()
        for t in range(begin, min(begin + REPLAY_STEPS, int(steps[-1])) + 1):
            value, gradient, _ = objective.gradient(theta)
            at = int(np.flatnonzero(steps == t)[0])
            worst = max(worst, abs(float(value) - loss[at]) / abs(loss[at]))
            first_apart = worst if t == begin else first_apart
            for j in np.flatnonzero(measured == t):
                cold = top_eigenpairs(Hessian(objective, theta), run.sizes["eig"], tol=1e-3, seed=t)
                apart = max(apart, float(np.abs(cold.values.numpy() - eigenvalues[j]).max() / eigenvalues[j, 0]))
            for j in np.flatnonzero(weighed == t):
                off = np.array(terms(objective, theta, t).values) - [run[name].values[j] for name in FIELDS]
                apart = max(apart, float(np.abs(off).max() / run["gauss_newton"].values[j]))
            if gram is not None:
                sharpness = float(torch.linalg.eigvalsh(gram.at(theta).M)[-1])
                apart = max(apart, abs(sharpness / float(run["sharpness"].sel(observed=t)) - 1))
            if projection is not None:
                gradient = projection(t, objective, theta, gradient)
            theta = theta - eta[at] * gradient
        slack = 1.0
        if label == "a replay of its base":  # as well as the loss there is known
            slack = min(REPLAYED_SLACK, max(1.0, first_apart / 1e-4))
        found.append(Replay(label, begin, worst, apart, slack))
    return found


def whole(entry: Entry, *, device: str = "auto", progress: bool = True) -> list[str]:
    """Computes a run anew and returns where its statistics leave the range of the recorded forks.

    For every claim with forks whose statistic is judged on this run: the new value must lie within the values of the
    record and of its forks, widened by their range on both sides. An empty list is agreement; a run with no such
    claim cannot be judged and raises ``ValueError``.
    """
    place = root()
    judged = _judged(entry)
    if not judged:
        raise ValueError(f"no claim with forks of {entry.name}: there is no spread to compare a whole rerun with")
    run, _ = compute(entry.experiment, entry.measure, device=device, progress=progress)
    forget(entry.experiment, entry.measure)
    outside = []
    for claim in judged:
        rule = claim["rule"]
        known = claims.measure([entry.name, *_forks_of(entry, rule)], rule, place).values()
        low, high = min(known), max(known)
        value = registry.STATISTICS[rule["statistic"]](run, **rule.get("arguments", {}))
        if not low - (high - low) <= value <= high + (high - low):
            outside.append(f"{rule['statistic']} is {value:.4g}, on record and in its forks {low:.4g} to {high:.4g}")
    return outside


def _judged(entry: Entry) -> list[dict]:
    """The claims with forks of this run whose statistic is judged on it."""
    mine = [c for c in claims.claims(root()) if c.get("rule") and entry.name in c["rule"].get("experiments", [])]
    return [c for c in mine if _forks_of(entry, c["rule"])]


@dataclass(frozen=True)
class Row:
    """One line of :func:`survey`: the run, what was done with it, what came of it, whether that is as it should be."""

    name: str
    done: str
    found: str
    agrees: bool


def survey(*, device: str = "auto", progress: bool = True, wholes: int = 3) -> Iterator[Row]:
    """The first steps of every recorded run, then ``wholes`` of the runs with forks as a whole, the cheapest first."""
    entries = list(catalogue(root() / "experiments").values())
    states = {entry.name: entry.status() for entry in entries}
    there = [entry for entry in entries if states[entry.name].state in ("fresh", "unverified")]
    for entry in entries:
        if states[entry.name].state == "stale":
            yield Row(entry.name, "nothing to replay", states[entry.name].why, False)
    for entry in there:
        try:
            (found,) = replay(entry, device=device, first=True)
        except (StoreError, DataError) as error:
            yield Row(entry.name, "first steps", str(error), False)
        else:
            yield Row(entry.name, "first steps", str(found), found.agrees)
    for entry in sorted((e for e in there if _judged(e)), key=lambda e: e.minutes)[:wholes]:
        outside = whole(entry, device=device, progress=progress)
        found_whole = "; ".join(outside) or "its statistics lie within the spread of the recorded forks"
        yield Row(entry.name, "whole", found_whole, not outside)


def _forks_of(entry: Entry, rule: dict) -> list[str]:
    """The rule's forks whose base is this run."""
    runs = catalogue(root() / "experiments")
    key = entry.experiment.key
    return [n for n in rule.get("forks", []) if (runs[n].experiment.fork or {}).get("of") == key]
