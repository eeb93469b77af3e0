"""A repository in miniature whose one run takes a second, and processes that run it under bad conditions."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
from typing import Any

import h5netcdf  # noqa: F401  (with sklearn: so that a forked process need not import it)
import numpy as np
import sklearn.datasets  # noqa: F401
import torch
import xarray as xr
import yaml

from eos_utils import run, study
from eos_utils.catalogue import catalogue, record
from eos_utils.experiment import Experiment
from eos_utils.store import Store, StoreError

EXPERIMENT = {"dataset": "digits", "n": 200, "width": 8, "eta": "2/2", "steps": 60}
MEASURE = {"k": 2, "stride": 3, "snapshots": ["entry", "end"]}
KEY = Experiment(**EXPERIMENT).key
SEEDS = [0, 1, 2]  # of its sweep
WAIT = 300  # seconds after which a process hangs

# Processes are forked from one that has imported torch, and has no thread but one.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["faults.tiny"])
_computed = study._computed


def make(folder: pathlib.Path) -> pathlib.Path:
    """An empty repository and cache in a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "root" / "experiments").mkdir(parents=True)
    text = yaml.safe_dump({"tiny": {"experiment": EXPERIMENT, "measure": MEASURE}})
    (folder / "root" / "experiments" / "tiny.yaml").write_text(text)
    (folder / "root" / "sweeps").mkdir()
    runs = {"tiny_seed{seed}": {"for": {"seed": SEEDS}, "experiment": EXPERIMENT, "measure": MEASURE}}
    (folder / "root" / "sweeps" / "tiny.yaml").write_text(yaml.safe_dump({"runs": runs}))
    return folder


def environment(folder: pathlib.Path) -> dict[str, str]:
    """What makes a process use that repository and nothing else."""
    return {"EOS_ROOT": str(folder / "root"), "EOS_CACHE_DIR": str(folder / "cache"), "EOS_OFFLINE": "1"}


def digest(found: xr.Dataset) -> str:
    """A hash of every bit of a trajectory, loaded or in memory, except its provenance, which has times in it."""
    skip = ("provenance", "key", "source")
    told = {k: np.asarray(v).item() for k, v in sorted(found.attrs.items()) if k not in skip}
    hashed = hashlib.sha256(json.dumps(told).encode())
    for name in sorted(map(str, found.variables)):
        values = found[name].values
        plain = values.dtype.kind in "fiub"
        content = values.tobytes() if plain else repr(values.tolist()).encode()
        hashed.update(
            f"{name} {found[name].dims} {values.dtype if plain else 'text'} {values.shape}".encode() + content
        )
    return hashed.hexdigest()


def store_of(folder: pathlib.Path) -> Store:
    """Its records."""
    return Store(folder / "root" / "results")


def recorded(folder: pathlib.Path) -> str:
    """The digest of its record, or '' where there is none; raises :class:`StoreError` where it is not valid."""
    store = store_of(folder)
    if not store.keys():
        return ""
    found = digest(store.load(KEY))
    status = store.status(KEY)
    if store.keys() != [KEY] or status.state != "fresh":
        raise StoreError(f"the record is {status.state}: {status.why}")
    return found


def swept(folder: pathlib.Path) -> dict[str, str]:
    """The digest of each record of its sweep, by key; raises :class:`StoreError` where one is not valid."""
    store = Store(folder / "root" / "runs" / "tiny")
    return {key: digest(store.load(key)) for key in store.keys()}


def sweep(folder: pathlib.Path) -> Any:
    """A process that computes its sweep, two runs at a time; it ends with the number of runs that failed."""
    process = _FORKS.Process(target=_sweep, args=(folder,))
    process.start()
    return process


def _sweep(folder: pathlib.Path) -> None:
    os.environ.update(environment(folder))
    study._computed = _often_stored  # what a worker does, by name
    entries, store = study.read(folder / "root" / "sweeps" / "tiny.yaml")
    with (folder / "said.txt").open("a") as said:
        outcomes = study.run_many(entries, store=store, device="cpu", tell=lambda line: print(line, file=said))
        print(study.table(outcomes), file=said)
    sys.exit(sum(outcome.state not in ("recorded", "skipped") for outcome in outcomes))


def _often_stored(job: study.Job) -> study.Done:
    run.compute.__kwdefaults__["checkpoint_every"] = 0.02
    return _computed(job)


class Process:
    """A process that records the run of a miniature repository, once for each of ``attempts``; see :func:`_act`."""

    _numbers = itertools.count()

    def __init__(self, folder: pathlib.Path, *attempts: dict[str, Any], together: Any = None, disk: int = 0) -> None:
        self.answer = folder / f"answer-{next(self._numbers)}.json"
        arguments = (folder, self.answer, list(attempts or ({},)), together, disk)
        self.process = _FORKS.Process(target=_act, args=arguments)
        self.process.start()

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL after so many seconds, unless it ended before; whether it was killed."""
        self.process.join(seconds)
        if self.process.pid and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(WAIT)
        return self.process.exitcode == -signal.SIGKILL

    def result(self) -> list[dict[str, Any]]:
        """What came of each attempt: 'done' or 'error' with 'message', 'said', and the record's 'digest'."""
        self.process.join(WAIT)
        if self.process.exitcode != 0:
            raise RuntimeError(f"a process ended with status {self.process.exitcode}")
        return list(json.loads(self.answer.read_text()))


def barrier(parties: int) -> Any:
    """For processes that are to begin together."""
    return _FORKS.Barrier(parties)


def _act(folder: pathlib.Path, answer: pathlib.Path, attempts: list[dict[str, Any]], together: Any, disk: int) -> None:
    """Does the attempts; ``disk``: on a file system of so many bytes; ``together``: not before the other does."""
    if disk:
        folder = folder / "small"
        _small_disk(folder, disk)
        make(folder / "repository")
        folder = folder / "repository"
    os.environ.update(environment(folder))
    torch.set_num_threads(1)
    run.compute.__kwdefaults__["checkpoint_every"] = 0.02  # the run takes a second
    if together is not None:
        together.wait()
    results = [_attempt(folder, **attempt) for attempt in attempts]
    answer.write_text(json.dumps(results))


def _attempt(
    folder: pathlib.Path,
    replace: bool = False,
    die_at: int = 0,
    leave: int = -1,
    limit: int = -1,
    at_step: int = 0,
    denied: str = "",
    mode: int = 0,
    backwards: bool = False,
) -> dict[str, Any]:
    """Records the run; what is given makes it hard.

    ``die_at``: SIGKILL before that file operation. ``leave``: from ``at_step`` on so many bytes are free on the disk;
    ``limit``: from then on no file may be longer. ``denied``: a path in the folder that has ``mode`` meanwhile, for a
    user without privileges. ``backwards``: each look at the clock is an hour before the last one.
    """
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if die_at:
            stack.enter_context(_death(die_at))
        if leave >= 0 or limit >= 0:
            stack.enter_context(_from_step(at_step, lambda: _shrink(folder, leave, limit)))
            stack.callback(_restore, folder)
        if denied:
            _without_privileges()
            before = (folder / denied).stat().st_mode & 0o777
            (folder / denied).chmod(mode)
            stack.callback(_allow, folder / denied, before)
        if backwards:
            stack.enter_context(_patched(time, "time", itertools.count(2e9, -3600).__next__))
        try:
            found: dict[str, Any] = {"done": record(catalogue()["tiny"], device="cpu", replace=replace)}
        except Exception as error:
            found = {"error": type(error).__name__, "message": str(error)}
    found["said"] = said.getvalue()
    try:
        found["digest"] = recorded(folder)
    except StoreError as error:
        found["invalid"] = str(error)
    return found


def _allow(path: pathlib.Path, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # a record that could not be read has been replaced
        path.chmod(mode)


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Any:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _death(at: int) -> Any:
    """SIGKILL before the file operation of that number; checkpoints on the way do not count."""
    calls = itertools.count(1)
    run.compute.__kwdefaults__["checkpoint_every"] = 1e9

    def deadly(real: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("replace", "link", "fsync", "chmod", "unlink", "mkdir"):
            stack.enter_context(_patched(os, name, deadly(getattr(os, name))))
        yield


@contextlib.contextmanager
def _from_step(step: int, action: Any) -> Any:
    real = run._Progress.__call__

    def call(self: Any, descent: Any) -> None:
        real(self, descent)
        if descent.step == step:
            action()

    with _patched(run._Progress, "__call__", call):
        yield


def _shrink(folder: pathlib.Path, leave: int, limit: int) -> None:
    if limit >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return
    room = shutil.disk_usage(folder / "root").free - leave
    with contextlib.suppress(OSError), open(folder / "root" / "ballast", "wb") as stream:
        stream.write(bytes(max(0, room)))


def _restore(folder: pathlib.Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (folder / "root" / "ballast").unlink(missing_ok=True)


def _small_disk(place: pathlib.Path, size: int) -> None:
    """A file system of that size, which only this process sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    place.mkdir(exist_ok=True)
    new_namespace, recursive_private = 0x20000, 0x44000
    failed = libc.unshare(new_namespace) or libc.mount(None, b"/", None, recursive_private, None)
    if failed or libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "no small file system could be mounted")


def can_mount(folder: pathlib.Path) -> bool:
    """Whether a small file system can be had: for root, and not in every container."""
    process = _FORKS.Process(target=_small_disk, args=(folder, 1 << 20))
    process.start()
    process.join(WAIT)
    return process.exitcode == 0


def _without_privileges() -> None:
    """Root may write everywhere, unless it gives up its capabilities."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capabilities could not be given up")
