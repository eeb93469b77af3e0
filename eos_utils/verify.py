"""Does today's code still give what is on record? Short replays from points at which θ is known exactly.

float32 trajectories agree closely between machines before EoS; after it they are chaotic and only statistics agree.
So a record is replayed for 20 steps from where it began and from each stored snapshot, or for as many as rounding
allows in a run that begins far above the edge: the loss must agree at each step, and at every step measured in
between the recorded eigenvalues must agree with a cold evaluation. Where a run begins past the edge of another one, to
which no other machine can retrace that, its record is compared with the other one's at the step they share. A run
computed anew as a whole is compared by its statistics, with the spread of the recorded forks as the measure.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from eos_utils import claims, pools, registry
from eos_utils.catalogue import Entry, catalogue, find
from eos_utils.checkpoint import forget
from eos_utils.curvature import Hessian
from eos_utils.data import DataError
from eos_utils.forks import calm_until, start_of, tolerance
from eos_utils.lanczos import top_eigenpairs
from eos_utils.residual import gram_of
from eos_utils.run import compute, pick_device
from eos_utils.store import Store, StoreError, root
from eos_utils.terms import FIELDS, terms

if TYPE_CHECKING:
    import xarray as xr

REPLAY_STEPS = 20
INSIDE = "its statistics are what the record and its forks let one expect"
ROUNDINGS = 10  # of one number: what a step differs by between two machines
LOSS_TOLERANCE = 1e-3  # relative, over 20 steps: rounding at the edge grows by a few per cent a step
# A point that is replayed from a base is known roughly. Rounding grows below the edge too: four computations of the
# first 1,300 steps of Figure 1's fifth seed, on two machines with one thread and two, end 1e-4 apart in the loss and
# 6e-3 in the sharpness. So there the tolerances are wider by these factors.
REPLAYED_SLACK = (5, 50)
EXACT = 1e-6  # a replay whose loss is this close to the base's went the same way
EIGENVALUE_TOLERANCE = 3e-3  # of the largest: three times what a record's own bounds allow
NOT_RETRACED = "this machine does not come to the same point, so that the steps after it are not compared"


@dataclass(frozen=True)
class Replay:
    """One replay: where it began, over how many steps, the worst relative differences; whether they are tolerable."""

    begin: str
    step: int
    loss: float
    eigenvalue: float
    steps: int = REPLAY_STEPS
    slack: float = 1.0  # by which the tolerances are wider: a point that had to be replayed is known roughly
    joins: bool | None = None  # see `joins`, for a run that begins past the edge of a base that goes another way here

    @property
    def agrees(self) -> bool | None:
        """Whether both differences are within tolerance.

        None past the edge of a base that goes another way here, unless the record contradicts that of the base.
        """
        if math.isinf(self.slack):
            return False if self.joins is False else None
        return bool(self.loss <= self.slack * LOSS_TOLERANCE and self.eigenvalue <= self.slack * EIGENVALUE_TOLERANCE)

    def __str__(self) -> str:
        if math.isinf(self.slack) and self.joins is not None:
            outcome = "begins at" if self.joins else "DIFFERS from"
            return f"{outcome} the loss and the eigenvalues on record for its base at step {self.step}; {NOT_RETRACED}"
        outcome = {True: "agrees", False: "DIFFERS", None: "cannot be judged"}[self.agrees]
        return (
            f"{outcome} from {self.begin} ({self.steps} steps from {self.step}): loss within {self.loss:.1e}, "
            f"eigenvalues within {self.eigenvalue:.1e}"
        )


def replay(
    entry: Entry,
    *,
    device: str = "auto",
    quick: bool = False,
    first: bool = False,
    store: Store | None = None,
    points: Path | None = None,
) -> list[Replay]:
    """Replays a recorded run; ``quick`` from its last known point alone, ``first`` from where it began alone.

    ``points``: a folder in which points that are replayed from a base are kept for the next replay; none of those kept
    for recording is used. Raises if there is no record or no data.
    """
    store = store or Store()
    run = store.load(entry.experiment.key)
    loaded = entry.experiment.dataset_loaded()
    objective = entry.experiment.objective(pick_device(device), loaded)
    if loaded.sha256 != (recorded_data := store.manifest(entry.experiment.key)["provenance"]["data"]["sha256"]):
        raise DataError(f"the data have SHA-256 {loaded.sha256[:16]}, the record was made with {recorded_data[:16]}")
    theta, start = start_of(entry.experiment, objective, store, points)
    fork = entry.experiment.fork or {}
    replayed = "a replay of its base" if _begins_at(entry) else ""
    label = replayed or ("the fork" if fork else "initialisation")
    known = [(label, start, theta)]
    if (
        "snapshot" in run.coords and entry.experiment.project is None and not first
    ):  # a held direction is not in a snapshot
        for i, label in enumerate(run["snapshot"].values):
            theta = torch.from_numpy(np.array(run["theta"].values[i])).to(objective.device, objective.dtype)
            known.append((str(label), int(run["snapshot_step"].values[i]), theta))
    found, gram = [], gram_of(objective) if "sharpness" in run else None
    steps, loss, eta = run["step"].values, run["loss"].values, run["eta"].values
    measured, eigenvalues = run["measured"].values, run["eigenvalue"].values
    weighed = run["weighed"].values if "weighed" in run.coords else np.array([])
    if quick:  # past the edge where possible, with enough steps on record after it
        known = [point for point in known if point[1] + REPLAY_STEPS <= steps[-1]][-1:]
    for label, begin, theta in known:
        worst, apart, slack, joined, projection = 0.0, 0.0, 1.0, None, entry.experiment.projection()
        end = _foreseeable(run, begin, ROUNDINGS * torch.finfo(objective.dtype).eps)
        for t in range(begin, end + 1):
            value, gradient, _ = objective.gradient(theta)
            at = int(np.flatnonzero(steps == t)[0])
            worst = max(worst, abs(float(value) - loss[at]) / abs(loss[at]))
            if t == begin and label == replayed:
                base = store.load(fork["of"])
                slack, joined = _slack(float(value), base, begin), joins(run, base)
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
        found.append(Replay(label, begin, worst, apart, end - begin, slack, joined))
    return found


def joins(run: xr.Dataset, base: xr.Dataset) -> bool | None:
    """Whether a run begins at the loss and, if both measured them there, the eigenvalues on record for its base.

    The losses are compared for as long as both take the same steps, up to those of a replay. Both records are of one θ
    if this one was made from a point that the base's own run had left. None if the losses say that it was made from a
    replay that went another way, which past the edge is no fault.
    """
    begin, last = int(run["step"][0]), min(int(each["step"][-1]) for each in (run, base))
    both = slice(begin, min(last, begin + REPLAY_STEPS))
    mine, others = run.sel(step=both), base.sel(step=both)
    apart = abs(mine["loss"].values / others["loss"].values - 1)
    if apart[0] > EXACT:
        return None if apart[0] < tolerance(begin, calm_until(base)) else False
    alike = np.cumprod(mine["eta"].values == others["eta"].values).sum()
    if json.loads(run.attrs["experiment"]).get("project"):
        alike = 0
    if (apart[: alike + 1] > LOSS_TOLERANCE).any():
        return False
    if begin not in run["measured"] or begin not in base["measured"]:
        return True
    here, there = (each["eigenvalue"].sel(measured=begin).values for each in (run, base))
    k = min(len(here), len(there))
    return bool(abs(here[:k] - there[:k]).max() <= EIGENVALUE_TOLERANCE * there[0])


def _foreseeable(run: xr.Dataset, begin: int, rounding: float) -> int:
    r"""The last step at which a replay from there can agree: as long as rounding is no larger than the tolerance.

    Each step multiplies a difference along the first eigenvector by :math:`1 - \eta\lambda_1`, which in a run that
    begins far above the edge is 5 or more.
    """
    measured, largest = run["measured"].values, run["eigenvalue"].values[:, 0]
    last = min(begin + REPLAY_STEPS, int(run["step"].values[-1]))
    for t in range(begin, last):
        known = max(0, int(np.searchsorted(measured, t, side="right")) - 1)
        rounding *= max(1.0, abs(1 - float(run["eta"].sel(step=t)) * float(largest[known])))
        if rounding > LOSS_TOLERANCE:
            return t
    return last


def _slack(loss: float, base: xr.Dataset, step: int) -> float:
    """How well a replayed point is known: as well as its loss is that on record for the base; past the edge not at all.

    There two machines agree in statistics only, unless they have gone the same way up to rounding.
    """
    apart = abs(loss / float(base["loss"].sel(step=step)) - 1)
    if apart < EXACT:
        return 1.0
    return math.inf if step >= calm_until(base) else float(np.clip(apart / 1e-4, *REPLAYED_SLACK))


def whole(entry: Entry, *, device: str = "auto", progress: bool = True) -> list[str]:
    """Computes a run anew and returns where its statistics are not what the recorded forks let one expect.

    For every claim with forks whose statistic is judged on this run, :func:`expected` of the record and its forks. An
    empty list is agreement; a run with no such claim cannot be judged and raises ``ValueError``.

    A single statistic outside is a reason to look closer, no proof: those of forks are not normal. Of the 25 recorded
    runs that are a fork or have some, four have statistics outside the interval of the four others (5 of 46 at most),
    where 1 % of them should; while of another seed of SG's networks 8 to 33 of some 45 are.
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
        known = list(claims.measure([entry.name, *_forks_of(entry, rule)], rule, place).values())
        value = registry.STATISTICS[rule["statistic"]](run, **rule.get("arguments", {}))
        low, high = expected(known, len(judged))
        if not low <= value <= high:
            outside.append(f"{rule['statistic']} is {value:.4g}, expected from the forks {low:.4g} to {high:.4g}")
    return [f"{len(outside)} of {len(judged)} statistics are outside", *outside] if outside else []


def expected(known: Sequence[float], statistics: int, level: float = 0.01) -> tuple[float, float]:
    r"""Student's prediction interval for one more value, at the level :math:`\alpha/K` if K statistics are looked at.

    :math:`\bar x \pm t_{n-1,\,1-\alpha/2K}\, s\sqrt{1 + 1/n}`, so that a sound rerun has all of its statistics inside
    with a probability of :math:`1 - \alpha` at least, where they are normal.

    >>> low, high = expected([1.0, 1.1, 0.9, 1.05, 0.95], statistics=1)
    >>> f"{low:.2f} to {high:.2f}"
    '0.60 to 1.40'
    """
    from scipy.stats import t

    n, mean = len(known), float(np.mean(known))
    wide = float(t.ppf(1 - level / (2 * statistics), n - 1) * np.std(known, ddof=1) * math.sqrt(1 + 1 / n))
    return mean - wide, mean + wide


def _judged(entry: Entry) -> list[dict]:
    """The claims with forks of this run whose statistic is judged on it."""
    mine = [c for c in claims.claims(root()) if c.get("rule") and entry.name in c["rule"].get("experiments", [])]
    return [c for c in mine if _forks_of(entry, c["rule"])]


@dataclass(frozen=True)
class Row:
    """One line of :func:`survey`: the run, what was done with it, what came of it, whether that is as it should be.

    None is neither: the run begins at a point that this machine does not come to; ``joins``: but at what is on record
    for the other run.
    """

    name: str
    done: str
    found: str
    agrees: bool | None
    joins: bool = False


def survey(*, device: str = "auto", progress: bool = True, wholes: int = 3, jobs: int = 1) -> Iterator[Row]:
    """The first steps of every recorded run, then ``wholes`` of the runs with forks as a whole, the cheapest first.

    ``jobs``: so many at a time, each in a process with one thread. Runs that begin at a step of another are taken in
    the order of these steps, so that a base is replayed once, whatever the number of its branches.
    """
    entries = list(catalogue(root() / "experiments").values())
    states = {entry.name: entry.status() for entry in entries}
    there = [entry for entry in entries if states[entry.name].state in ("fresh", "unverified")]
    for entry in entries:
        if states[entry.name].state == "stale":
            yield Row(entry.name, "nothing to replay", states[entry.name].why, False)
    first = [entry.name for entry in sorted(there, key=_begins_at)]
    cheapest = list(islice((e.name for e in sorted(there, key=lambda e: e.minutes) if _judged(e)), wholes))
    with tempfile.TemporaryDirectory(prefix="eos-points-") as points:
        yield from _each(partial(_first_steps, device=device, points=Path(points)), first, "first steps", jobs)
    yield from _each(partial(_whole, device=device, progress=progress and jobs == 1), cheapest, "whole", jobs)


def _begins_at(entry: Entry) -> int:
    """The step of its base to which that is replayed; 0 for a run that begins where θ is known exactly."""
    at = (entry.experiment.fork or {}).get("at")
    return at if isinstance(at, int) else 0


def _each(task: partial[Row], names: Sequence[str], done: str, jobs: int) -> Iterator[Row]:
    """The rows as they come; a run that could not be looked at has one too."""
    if jobs == 1:
        yield from map(task, names)
        return
    with pools.environment(threads=1):
        for i, row in pools.processes(task, names, jobs, retries=1):
            yield row if isinstance(row, Row) else Row(names[i], done, f"{type(row).__name__}: {row}", False)


def _first_steps(name: str, device: str, points: Path) -> Row:
    try:
        (found,) = replay(find(name), device=device, first=True, points=points)
    except (StoreError, DataError) as error:
        return Row(name, "first steps", str(error), False)
    return Row(name, "first steps", str(found), found.agrees, bool(found.joins))


def _whole(name: str, device: str, progress: bool) -> Row:
    outside = whole(find(name), device=device, progress=progress)
    found = "; ".join(outside) or INSIDE
    return Row(name, "whole", found, not outside)


def _forks_of(entry: Entry, rule: dict) -> list[str]:
    """The rule's forks whose base is this run."""
    runs = catalogue(root() / "experiments")
    key = entry.experiment.key
    return [n for n in rule.get("forks", []) if (runs[n].experiment.fork or {}).get("of") == key]
