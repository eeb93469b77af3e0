"""Many runs: a grid of experiments and seeds, on local processes or, with the same call, on a Dask cluster.

Nothing is remembered but the records themselves: a run whose key is on record is skipped, whoever recorded it and
wherever, so that a sweep that was stopped goes on where it was, and files copied in from a cluster count. Each worker
has its own process with a fixed number of threads; each run is resumed from its checkpoint where a worker was lost.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import current_process
from typing import Any

import yaml

from eos_utils import pools
from eos_utils.catalogue import Entry, catalogue, expand, record
from eos_utils.data import DataError
from eos_utils.store import Store, StoreError, root

LOCAL = ("", "local")
# Errors of one run, which do not stop the others.
EXPECTED = (ValueError, KeyError, DataError, StoreError, OSError, RuntimeError)


@dataclass(frozen=True)
class Outcome:
    """What became of one run: 'recorded', 'skipped', 'failed' or 'not run', in how many seconds, and why."""

    name: str
    state: str
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a run. ``send``: also return the files, since the disk may not be shared."""

    entry: Entry
    folder: str
    device: str
    threads: int
    send: bool


@dataclass(frozen=True)
class Done:
    """What a worker says of a run that is on record now."""

    name: str
    seconds: float
    ended: str
    files: dict[str, bytes]


def run_many(
    entries: Sequence[Entry],
    *,
    store: Store | None = None,
    workers: int = 2,
    threads: int = 1,
    device: str = "auto",
    cluster: str = "",
    options: dict[str, Any] | None = None,
    retries: int = 2,
    tell: Callable[[str], None] = print,
) -> list[Outcome]:
    """Computes what is not on record and returns what became of each, in the order given.

    Args:
        entries: the runs; one that forks from another of them waits for it.
        store: where the records go; the repository's ``results`` unless it is given.
        workers: runs at a time.
        threads: torch's threads in each worker; an undisturbed run is the same to the bit only with the same number.
        device: as in ``eos record``; with several GPUs local workers take them in turn.
        cluster: '' (local processes), 'local' (Dask on this machine), 'slurm', 'pbs', or the address of a scheduler.
        options: of the queue's jobs, as keywords of dask-jobqueue's ``SLURMCluster`` or ``PBSCluster``.
        retries: how often a run is tried again whose worker was lost.
        tell: takes a line for each run that ends.

    Raises:
        ValueError: fewer than one worker or thread, or a cluster of an unknown kind.
        RuntimeError: Dask is asked for and is not installed.
    """
    if min(workers, threads) < 1 or retries < 0:
        raise ValueError(f"workers={workers}, threads={threads}, retries={retries}: at least 1, 1 and 0")
    store = store or Store()
    store.check_writable()
    outcomes: dict[str, Outcome] = {}
    waiting: list[Entry] = []
    for entry in entries:
        if store.status(entry.experiment.key).state in ("fresh", "unverified"):
            outcomes[entry.name] = Outcome(entry.name, "skipped", why="on record")
        else:
            waiting.append(entry)
    total, ended = len(waiting), 0
    tell(f"{len(outcomes)} on record, {total} to compute: {_cost(waiting, workers)}")
    gpu = device.startswith("cuda")
    with pools.pool(workers, threads, cluster, options or {}, retries, gpu) as each:
        while waiting:
            keys = {entry.experiment.key for entry in waiting}
            ready = [e for e in waiting if not e.experiment.fork or e.experiment.fork["of"] not in keys]
            waiting = [e for e in waiting if e not in ready]
            jobs = [Job(e, str(store.folder), device, threads, cluster not in LOCAL) for e in ready]
            for i, result in each(_computed, jobs):
                ended += 1
                outcomes[ready[i].name] = found = _outcome(ready[i].name, result, store)
                why = f": {found.why}" if found.why else ""
                tell(f"[{ended}/{total}] {found.name} {found.state} in {found.seconds:.0f} s{why}")
    return [outcomes.get(e.name, Outcome(e.name, "not run")) for e in entries]


def _cost(entries: Sequence[Entry], workers: int) -> str:
    minutes = sum(e.minutes for e in entries)
    unknown = sum(e.minutes == 0 for e in entries)
    more = f", {unknown} of unknown length" if unknown else ""
    return f"about {minutes / workers:.0f} minutes with {workers} at a time{more}"


def _computed(job: Job) -> Done:
    """In a worker: the run, on record when this returns."""
    import torch

    torch.set_num_threads(job.threads)
    store, key, begun = Store(job.folder), job.entry.experiment.key, time.monotonic()
    record(job.entry, device=_device(job.device), progress=False, store=store)
    ended = str(store.load(key).attrs["status"])
    names = (store.manifest(key)["file"], store.manifest_path(key).name) if job.send else ()
    files = {name: (store.folder / name).read_bytes() for name in names}  # the manifest last: it vouches for the file
    return Done(job.entry.name, time.monotonic() - begun, ended, files)


def _device(asked: str) -> str:
    """The device of this worker: with several GPUs and none named, the one of the worker's number."""
    import torch

    count = torch.cuda.device_count() if asked in ("auto", "cuda") and torch.cuda.is_available() else 0
    if count < 2:
        return asked
    return f"cuda:{_number() % count}"


def _number() -> int:
    """The number of this worker, from Dask or from multiprocessing; 0 in no worker."""
    if "distributed" in sys.modules:
        with contextlib.suppress(ValueError, TypeError):
            return int(sys.modules["distributed"].get_worker().name)
    identity = getattr(current_process(), "_identity", ())
    return identity[0] - 1 if identity else 0


def _outcome(name: str, result: Done | Exception, store: Store) -> Outcome:
    if isinstance(result, Exception):
        said = result.args[0] if isinstance(result, KeyError) and result.args else result
        return Outcome(name, "failed", why=f"{said}" if isinstance(result, EXPECTED) else repr(result))
    for file, content in result.files.items():
        path = store.folder / file
        if not path.exists():  # a disk of the worker's own
            part = path.with_name(f".{file}.part")
            part.write_bytes(content)
            os.replace(part, path)
    return Outcome(
        name, "recorded", result.seconds, "" if result.ended != "diverged" else "diverged, which is a result"
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """The closing table: a line for each run, then how many of each kind.

    >>> said = [Outcome("a", "recorded", 12.3), Outcome("b", "failed", why="no data")]
    >>> print(table(said))
    a  recorded       12 s
    b  failed          0 s  no data
    1 recorded, 1 failed
    """
    width = max((len(o.name) for o in outcomes), default=0)
    lines = [f"{o.name:<{width}}  {o.state:<9} {o.seconds:7.0f} s  {o.why}".rstrip() for o in outcomes]
    counts = {state: sum(o.state == state for o in outcomes) for state in ("recorded", "skipped", "failed", "not run")}
    return "\n".join([*lines, ", ".join(f"{n} {state}" for state, n in counts.items() if n)])


# ---- files -------------------------------------------------------------------------------------------------------


def read(path: pathlib.Path) -> tuple[list[Entry], Store]:
    """The runs of a sweep's file, and where their records go.

    The file has ``about``, and either ``catalogue``: names of the catalogue, with ``*`` for any letters, recorded in
    ``results/``; or ``runs``: runs of its own, written as those of ``experiments/``, recorded in ``runs/NAME/``.

    Raises:
        ValueError: what is not so; the message names it.

    >>> entries, records = read(root() / "sweeps" / "example.yaml")
    >>> len(entries), entries[0].name, records.folder.name    # three widths, two seeds
    (6, 'example_width8_seed0', 'example')
    >>> sorted({(entry.experiment.width, entry.experiment.seed) for entry in entries})
    [(8, 0), (8, 1), (16, 0), (16, 1), (32, 0), (32, 1)]
    """
    path = pathlib.Path(path)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(f"sweeps/{p.name}" for p in (root() / "sweeps").glob("*.yaml")))
        raise ValueError(f"no file {path}; there are {known}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(fields, dict) or not set(fields) <= {"about", "catalogue", "runs"}:
        unknown = (
            ", ".join(sorted(set(fields) - {"about", "catalogue", "runs"})) if isinstance(fields, dict) else fields
        )
        raise ValueError(f"{path.name}: {unknown!r} is unknown; there are about, catalogue, runs")
    if ("catalogue" in fields) == ("runs" in fields):
        raise ValueError(f"{path.name}: give catalogue (names of recorded runs) or runs (new ones), one of the two")
    if "catalogue" in fields:
        named, found = catalogue(), dict[str, Entry]()
        for pattern in fields["catalogue"]:
            some = fnmatch.filter(named, str(pattern))
            if not some:
                raise ValueError(f"{path.name}: no run of the catalogue is called {pattern!r} (`eos list`)")
            found |= {name: named[name] for name in some}
        return list(found.values()), Store()
    own: dict[str, Entry] = {}
    for name, run in fields["runs"].items():
        for entry in expand(name, run, path.name, own):
            if entry.name in own:
                raise ValueError(f"{path.name}: the name {entry.name!r} is taken twice; put each axis into the name")
            own[entry.name] = entry
    return list(own.values()), Store(root() / "runs" / path.stem)
