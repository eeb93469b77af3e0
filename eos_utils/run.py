"""Doing an experiment: :func:`compute` runs or resumes it, :func:`run` prefers what is on record."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eos_utils import data, store
from eos_utils.checkpoint import forget, interrupts_held, partial_path, read_checkpoint, save_checkpoint
from eos_utils.descent import Descent, DivergedError, Stop, gradient_descent
from eos_utils.experiment import Experiment, Measure
from eos_utils.forks import point_path, points_folder, start_of
from eos_utils.objective import Objective
from eos_utils.observers import Eigenvalues, Observer, Snapshots, start_facts
from eos_utils.provenance import device_name, git_state, versions
from eos_utils.ranks import RankError, Ranks
from eos_utils.residual import Residual
from eos_utils.sharded import ShardedObjective
from eos_utils.terms import Terms

if TYPE_CHECKING:
    import xarray as xr

SOURCES = ("auto", "recorded", "live")


def pick_device(device: str = "auto") -> torch.device:
    """'auto' (the GPU if there is one), 'cpu', 'cuda' or 'cuda:1'; float32 stays float32 (no TF32)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is unknown; choose auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    elif chosen.type != "cpu":
        raise ValueError(f"device={device!r} is unknown; choose auto, cpu, cuda or cuda:N")
    return chosen


def trajectory(
    experiment: Experiment,
    descent: Descent,
    eigenvalues: Eigenvalues,
    snapshots: Snapshots,
    others: Sequence[Residual | Terms] = (),
) -> xr.Dataset:
    """The recorded run as a dataset: 'step' (every step), 'measured' (steps with eigenvalues), 'eig', 'snapshot'.

    With ``others`` also what :class:`eos_utils.residual.Residual` ('observed', 'spectral') and
    :class:`eos_utils.terms.Terms` ('weighed') give.
    """
    import xarray as xr

    rows, first = eigenvalues.rows, descent.first
    steps = np.arange(first, first + len(descent.series["loss"]), dtype=np.int32)
    k = eigenvalues.tracker.k
    bounds = {
        name: np.array(rows[name], dtype=np.float32).reshape(-1, k) for name in ("eigenvalue", "upper", "residual")
    }
    long_names = {
        "eigenvalue": "Ritz value, a lower bound of the eigenvalue",
        "upper": "upper bound of the eigenvalue",
        "residual": "norm of the residual",
    }
    per_measured = ("measured",)
    variables: dict[str, Any] = {
        "loss": ("step", np.array(descent.series["loss"]), {"long_name": "training loss", "units": "1"}),
        "accuracy": (
            "step",
            np.array(descent.series["accuracy"], dtype=np.float32),
            {"long_name": "training accuracy", "units": "1"},
        ),
        "eta": ("step", np.array(descent.series["eta"]), {"long_name": "step size", "units": "1"}),
        "checked": (
            per_measured,
            np.array(rows["checked"], dtype=np.int8),
            {"long_name": "completeness certified by a random probe"},
        ),
        "products": (
            per_measured,
            np.array(rows["products"], dtype=np.int32),
            {"long_name": "Hessian-vector products used"},
        ),
        **{
            name: (("measured", "eig"), block, {"long_name": long_names[name], "units": "1"})
            for name, block in bounds.items()
        },
    }
    if eigenvalues.overlaps is not None:
        variables["overlap"] = (
            ("measured", "eig", "eig_before"),
            np.array(eigenvalues.overlaps, dtype=np.float32).reshape(-1, k, k),
            {"long_name": "inner products of the eigenvectors with those of the measurement before"},
        )
    if snapshots.rows["step"]:
        variables["theta"] = (
            ("snapshot", "parameter"),
            torch.stack(snapshots.rows["theta"]).numpy(),
            {"long_name": "parameters"},
        )
        variables["snapshot_step"] = ("snapshot", np.array(snapshots.rows["step"], dtype=np.int32))
    coords: dict[str, Any] = {
        "step": ("step", steps, {"long_name": "gradient descent step"}),
        "measured": ("measured", np.array(rows["step"], dtype=np.int32), {"long_name": "step measured at"}),
        "eig": ("eig", np.arange(1, k + 1, dtype=np.int32)),
    }
    if snapshots.rows["step"]:
        coords["snapshot"] = ("snapshot", np.array(snapshots.rows["label"], dtype=str))
    for observer in others:
        if observer.rows["step"]:
            more, at = observer.variables()
            variables, coords = variables | more, coords | at
    attrs = {
        "experiment": json.dumps(experiment.canonical(), sort_keys=True),
        "status": descent.status,
        "last_step": descent.step,
        "finite_loss": descent.finite_loss,
        "decayed_at": -1 if descent.decayed_at is None else descent.decayed_at,
        "stride": eigenvalues.stride,
    }
    return xr.Dataset(variables, coords, attrs)


class _Progress:
    """A progress line (step, loss, accuracy, λ1·η/2, time left); a bar on a terminal, sparse lines elsewhere."""

    def __init__(self, total: int, shown: bool, eigenvalues: Eigenvalues) -> None:
        self.eigenvalues = eigenvalues
        self.bar: Any = None
        if shown:
            from tqdm import tqdm

            terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=total,
                unit="step",
                mininterval=0.5 if terminal else 10,
                ascii=not terminal,
                file=sys.stderr,
            )

    def __call__(self, descent: Descent) -> None:
        if self.bar is None:
            return
        series = descent.series
        self.bar.set_postfix_str(
            f"loss {series['loss'][-1]:.4g}, accuracy {series['accuracy'][-1]:.3f}, "
            f"λ1·η/2 {self.eigenvalues.latest():.3f}",
            refresh=False,
        )
        self.bar.update(max(0, descent.step - self.bar.n))

    def close(self) -> None:
        """Ends the line."""
        if self.bar is not None:
            self.bar.close()


def estimate(objective: Objective, theta: torch.Tensor, steps: int, measure: Measure) -> float:
    """Seconds that so many steps will take, from the time of one gradient and one Hessian product."""
    from eos_utils.curvature import Hessian

    objective.gradient(theta)
    begun = time.perf_counter()
    objective.gradient(theta)
    if theta.is_cuda:
        torch.cuda.synchronize()
    per_step = time.perf_counter() - begun
    hessian = Hessian(objective, theta)
    coarse = hessian.coarse()  # most evaluations stay in there
    begun = time.perf_counter()
    hessian.apply(theta[None]) if coarse is None else coarse.apply(coarse.restrict(theta[None]))
    if theta.is_cuda:
        torch.cuda.synchronize()
    per_product = time.perf_counter() - begun
    share = (2 if measure.pairs else 1) / measure.stride
    return steps * (per_step + share * (per_step + 5 * measure.k * per_product))


def compute(
    experiment: Experiment,
    measure: Measure | None = None,
    *,
    device: str = "auto",
    progress: bool = True,
    checkpoint_every: float = 60.0,
    on_divergence: str = "store",
    records: store.Store | None = None,
    points: Collection[int] = (),
    ranks: Ranks | None = None,
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Runs the experiment (or resumes it where it was cut off); returns the trajectory and its provenance.

    θ at the steps ``points`` is kept in the cache, for runs that fork there. With ``ranks`` each holds a part of the
    examples, and rank 0 alone writes; a lost rank ends the run with :class:`eos_utils.ranks.RankError`.

    A checkpoint is written every ``checkpoint_every`` seconds and on Ctrl-C. Divergence ends a run with
    ``status='diverged'``; only ``on_divergence='raise'`` raises :class:`DivergedError`.
    """
    measure = measure or Measure()
    if on_divergence not in ("store", "raise"):
        raise ValueError(f"on_divergence={on_divergence!r} is unknown; choose store or raise")
    where = pick_device(device)
    loaded = experiment.dataset_loaded()
    whole = objective = experiment.objective(where, loaded)
    if measure.k > objective.P:
        raise ValueError(f"k={measure.k}: this network has only P={objective.P} parameters")
    eigenvalues, snapshots = measure.observers()
    observers: dict[str, Observer] = {"eigenvalues": eigenvalues, "snapshots": snapshots}
    others = measure.others()
    observers |= others
    first_rank = ranks is None or ranks.first
    if ranks is not None:
        if others:
            raise ValueError("gram and terms need all examples in one place: run this in a single process")
        objective = ShardedObjective(whole, ranks)
    path = partial_path(experiment, measure)
    projection = experiment.projection()
    theta, first = start_of(experiment, objective, records or store.Store(), points_folder() if ranks is None else None)
    begins_with = start_facts(whole, theta)
    del whole  # with ranks, what is not this rank's is free from here on
    descent = Descent(theta, experiment.step_size, first, first)
    extra = store.optional([*others, experiment.network])
    stamp = {"code": store.fingerprints(extra), "data": loaded.sha256}
    saved = read_checkpoint(path, where, ranks)
    kept_at: int | None = None
    if isinstance(saved, dict) and saved.get("stamp") == stamp and observers.keys() <= saved.keys():
        descent = Descent.from_state(saved["descent"])
        for name, observer in observers.items():
            observer.load_state(saved[name])
        if projection is not None:
            projection.load_state(saved["projection"])
        kept_at = descent.step
        if progress and first_rank:
            print(f"resuming at step {descent.step}", file=sys.stderr)
    if progress:
        seconds = estimate(objective, descent.theta, first + experiment.steps - descent.step, measure)
        if first_rank:
            print(
                f"up to {first + experiment.steps - descent.step} steps on {device_name(where)}, "
                f"about {seconds / 60:.1f} min",
                file=sys.stderr,
            )
    bar = _Progress(first + experiment.steps, progress and first_rank, eigenvalues)
    last = time.monotonic()

    def keep() -> bool:
        nonlocal kept_at
        if not first_rank:
            return True
        states = {name: observer.state() for name, observer in observers.items()}
        if projection is not None:
            states["projection"] = projection.state()
        kept = save_checkpoint(path, {"descent": descent.state(), "stamp": stamp, **states})
        kept_at = descent.step if kept else kept_at
        return kept

    def after_step(now: Descent) -> None:
        nonlocal last
        bar(now)
        if now.step in points and first_rank:
            save_checkpoint(point_path(experiment.key, "new", now.step), now.theta)
        if ranks.settled(now.theta, bool(interrupted)) if ranks is not None else interrupted:
            where_next = "there" if keep() else "at its last checkpoint, if there is one"
            if first_rank:
                print(f"stopped before step {now.step}; the same command resumes {where_next}", file=sys.stderr)
            raise KeyboardInterrupt
        if time.monotonic() - last > checkpoint_every:
            keep()
            last = time.monotonic()

    stop = Stop(first + experiment.steps, experiment.stop_accuracy, experiment.stop_loss)
    try:
        with interrupts_held() as interrupted:
            gradient_descent(
                objective,
                descent,
                stop,
                decay=experiment.schedule(),
                projection=projection,
                observers=tuple(observers.values()),
                after_step=after_step,
            )
    except RankError as lost:
        if not first_rank:
            raise
        at = "no checkpoint yet" if kept_at is None else f"the checkpoint of step {kept_at} is whole"
        raise RankError(f"{lost}; {at}: the same command resumes there, with any number of ranks or none") from lost
    finally:
        bar.close()
    if descent.status == "diverged" and on_divergence == "raise":
        raise DivergedError(
            f"the loss was not finite at step {descent.step} (last finite loss {descent.finite_loss:.4g}, "
            f"eta={experiment.eta}); choose a smaller step size"
        )
    if "end" in measure.snapshots and descent.status != "diverged" and "end" not in snapshots.rows["label"]:
        snapshots.add("end", descent.step, descent.theta)
    provenance = {
        **git_state(),
        "versions": versions(),
        "device": device_name(where),
        **({} if ranks is None else {"ranks": ranks.size}),
        "data": {"name": loaded.name, "sha256": loaded.sha256},
        "seconds": round(descent.seconds, 1),
        "steps": descent.step - first,
        "evaluations": len(eigenvalues.rows["step"]),
        "products": int(sum(eigenvalues.rows["products"])),
        "measure": dataclasses.asdict(measure),
        "recorded_at": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    result = trajectory(experiment, descent, eigenvalues, snapshots, list(others.values()))
    result.attrs["provenance"] = json.dumps(provenance)
    result.attrs["start"] = json.dumps(begins_with)
    if descent.status != "running":  # a finished run is kept until its result is stored: see forget
        keep()
    return result, provenance


def run(
    experiment: Experiment,
    measure: Measure | None = None,
    *,
    source: str = "auto",
    device: str = "auto",
    progress: bool = True,
    on_divergence: str = "store",
) -> xr.Dataset:
    """The trajectory of an experiment: the record if there is a usable one, otherwise computed.

    ``source``: 'recorded' (a record or an error), 'auto' (a record that is not stale, from the repository or from
    this user's cache, otherwise computed and kept in the cache) or 'live' (computed, whatever is on record). The
    attribute ``source`` of the result says which it was ('recorded', 'cached' or 'live').

    >>> import os, tempfile
    >>> from unittest.mock import patch
    >>> mine = Experiment(dataset="digits", n=100, width=8, eta="2/10", steps=16)
    >>> with tempfile.TemporaryDirectory() as folder:    # without it, the user's cache
    ...     with patch.dict(os.environ, EOS_CACHE_DIR=folder):
    ...         first = run(mine, Measure(k=1), device="cpu", progress=False)
    ...         again = run(mine, Measure(k=1), device="cpu", progress=False)
    >>> first.attrs["source"], again.attrs["source"], again["measured"].values.tolist()
    ('live', 'cached', [0, 15])
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; choose one of {', '.join(SOURCES)}")
    pick_device(device), (measure or Measure()).observers()  # refused before anything is loaded, too
    results, cache = store.Store(), store.Store(data.cache_folder() / "runs")
    if source != "live":
        for place in (results, cache):
            state = place.status(experiment.key)
            if state.state != "missing":
                found = place.load(experiment.key)  # a damaged record is an error, not a reason to compute for hours
                if state.state != "stale" and (measure is None or _covers(found, measure)):
                    found.attrs["source"] = "recorded" if place is results else "cached"
                    return found
                if progress:
                    why = state.why if state.state == "stale" else "it holds other measurements"
                    print(f"the record of {experiment.key} is not used: {why}", file=sys.stderr)
        if source == "recorded":
            raise store.StoreError(f"no usable record of {experiment.key}; record it, or use source='auto'")
    cache.check_writable(experiment.key)
    result, provenance = compute(
        experiment, measure, device=device, progress=progress, on_divergence=on_divergence, records=results
    )
    cache.save(experiment.key, result, provenance, replace=True)
    forget(experiment, measure or Measure())
    result.attrs["source"] = "live"
    return result


def _covers(found: xr.Dataset, measure: Measure) -> bool:
    """Whether a cached trajectory holds what is to be measured."""
    there = json.loads(found.attrs["provenance"])["measure"]
    return (
        there["k"] >= measure.k
        and (there["stride"], there["pairs"], there["tol"]) == (measure.stride, measure.pairs, measure.tol)
        and set(measure.snapshots) <= set(there["snapshots"])
        and there.get("since", 0) <= measure.since
        and (there.get("overlaps", False) or not measure.overlaps)
        and measure.gram in (0, there.get("gram", 0))
        and measure.terms in (0, there.get("terms", 0))
    )
