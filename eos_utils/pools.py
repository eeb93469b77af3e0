"""Pools: a task and its jobs on local processes, or on Dask; nothing here knows of runs, nor imports torch.

A pool is a function of a task and of its jobs that yields, as they end, the index of a job and its result, or the
exception that it raised, or :class:`LostError`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What goes along to a cluster's jobs: where the code, the data and the repository are.
CARRIED = ("PYTHONPATH", "EOS_DATA_DIR", "EOS_ROOT")
QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster"}


class LostError(RuntimeError):
    """The process that had a job died each time that it was tried."""


Pool = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]


@contextlib.contextmanager
def pool(
    workers: int, threads: int, cluster: str, options: dict[str, Any], retries: int, gpu: bool = False
) -> Iterator[Pool]:
    """So many workers: local processes where ``cluster`` is empty, else Dask (:func:`client`)."""
    if not cluster:
        with environment(threads):
            yield lambda task, jobs: processes(task, jobs, workers, retries)
        return
    with environment(threads), client(cluster, workers, threads, options, retries, gpu) as connected:
        yield lambda task, jobs: on_dask(connected, task, jobs, gpu)


@contextlib.contextmanager
def environment(threads: int) -> Iterator[None]:
    """The number of threads that processes started in here take before they import torch."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def processes(task: Callable[[Any], Any], jobs: Sequence[Any], workers: int, retries: int) -> Iterator[tuple[int, Any]]:
    """Local processes. When one dies all that were at work are suspect: each is tried again, alone."""
    fresh, suspects, tries = deque(range(len(jobs))), deque[int](), [0] * len(jobs)
    context = multiprocessing.get_context("spawn")
    while fresh or suspects:
        running: dict[Future, int] = {}
        with ProcessPoolExecutor(1 if suspects else workers, context, _end_with_parent) as pool:
            alone, queue = bool(suspects), suspects or fresh
            while queue or running:
                while queue and len(running) < (1 if alone else workers):
                    i = queue.popleft()
                    tries[i] += 1
                    running[pool.submit(task, jobs[i])] = i
                broken = []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i = running.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        broken.append(i)
                    else:
                        yield i, error if error is not None else future.result()
                if broken:
                    for i in [*broken, *running.values()]:
                        if tries[i] > retries:
                            yield i, LostError(f"its process died, {tries[i]} times (out of memory?)")
                        else:
                            suspects.append(i)
                    break


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever, with all that it holds in memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def client(
    cluster: str, workers: int, threads: int, options: dict[str, Any], retries: int, gpu: bool = False
) -> Iterator[Any]:
    """A Dask client with so many workers, on a cluster that is ours ('local', 'slurm', 'pbs'), or at an address.

    ``gpu``: each worker offers one, as Dask's resource ``GPU``; workers at an address must offer it themselves.
    """
    try:
        import dask
        import distributed
    except ImportError:
        raise RuntimeError(f"--cluster {cluster} needs Dask: pip install 'eos-utils[cluster]'") from None
    if cluster in QUEUES or cluster == "local":
        dask.config.set({"distributed.scheduler.allowed-failures": retries})
        if cluster == "local":
            has = {"GPU": 1} if gpu else None
            made = distributed.LocalCluster(workers, threads_per_worker=1, dashboard_address=None, resources=has)
        else:
            made = _queue(cluster, threads, options, gpu)
            made.scale(jobs=workers)
        with made, distributed.Client(made) as connected:
            yield connected
    elif "://" in cluster or ":" in cluster:
        with distributed.Client(cluster, timeout=30) as connected:
            yield connected
    else:
        raise ValueError(f"cluster={cluster!r}: choose local, slurm, pbs, or the address of a scheduler (host:port)")


def _queue(kind: str, threads: int, options: dict[str, Any], gpu: bool) -> Any:
    """A cluster of a batch system: each job is one worker, with its threads set before it imports torch."""
    try:
        import dask_jobqueue
    except ImportError:
        raise RuntimeError(f"--cluster {kind} needs dask-jobqueue: pip install 'eos-utils[cluster]'") from None
    carried = {name: os.environ[name] for name in CARRIED if os.environ.get(name)}
    exports = [f"export {name}='{value}'" for name, value in {**dict.fromkeys(THREADS, threads), **carried}.items()]
    given = {"cores": threads, "processes": 1, "memory": "4GB", "walltime": "12:00:00", **options}
    if gpu:
        given["worker_extra_args"] = ["--resources", "GPU=1", *given.get("worker_extra_args", [])]
    given["job_script_prologue"] = [*exports, *given.get("job_script_prologue", [])]
    return getattr(dask_jobqueue, QUEUES[kind])(**given, scheduler_options={"dashboard_address": None})


def on_dask(
    connected: Any, task: Callable[[Any], Any], jobs: Sequence[Any], gpu: bool = False
) -> Iterator[tuple[int, Any]]:
    """The same on Dask: a lost worker's task goes to another; after too many losses it fails."""
    import distributed

    needs = {"GPU": 1} if gpu else None
    futures = {connected.submit(task, job, pure=False, resources=needs): i for i, job in enumerate(jobs)}
    for future in distributed.as_completed(futures):
        error = future.exception()
        if isinstance(error, distributed.KilledWorker):
            error = LostError(f"its worker was lost too often ({error})")
        yield futures[future], error if error is not None else future.result()
