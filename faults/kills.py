"""SIGKILL at random moments and before each file operation: the store stays valid, the next run has the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat

from eos_utils.store import StoreError
from faults import FAULT, tiny

NOTEBOOK = (
    'source: str = "auto"  # where the run comes from',
    "from eos_utils import catalogue, run\nfrom eos_utils.parameters import parameters\nfrom faults import tiny\n\n"
    "p = parameters(globals())",
    "run.compute.__kwdefaults__['checkpoint_every'] = 0.02\nentry = catalogue.catalogue()['tiny']\n"
    "found = run.run(entry.experiment, entry.measure, source=p.source, device='cpu')\nprint(tiny.digest(found))",
)


_KNOWN: list[tuple[str, float]] = []


def undisturbed(folder: Path) -> tuple[str, float]:
    """The digest of a run that nothing happens to, and the seconds that it takes; found out once."""
    while len(_KNOWN) < 2:  # the first one waits for imports, too
        begun = time.monotonic()
        (found,) = tiny.Process(tiny.make(folder / "undisturbed")).result()
        _KNOWN.append((str(found["digest"]), time.monotonic() - begun))
    return _KNOWN[-1]


def how(said: str) -> str:
    """How a run began, by what it said."""
    return "resumed from a checkpoint" if "resuming at step" in said else "began anew"


def after(folder: Path, wanted: str) -> str:
    """What the next run makes of what a killed one left."""
    try:
        before = tiny.recorded(folder)
        (found,) = tiny.Process(folder).result()
    except (StoreError, RuntimeError) as error:
        return f"{FAULT}: not valid afterwards: {error}"
    if "digest" not in found or found["digest"] != wanted or before not in ("", wanted):
        return f"{FAULT}: other numbers, or none: {found}"
    return "was on record already" if not found.get("done") else how(found["said"])


def of_runs(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """A recorded run is killed at a moment drawn uniformly from its duration."""
    wanted, seconds = undisturbed(folder)
    happened: Counter[str] = Counter()
    while happened.total() < count:
        place = tiny.make(folder / "killed")
        if tiny.Process(place).kill_after(rng.uniform(0, seconds)):
            happened[after(place, wanted)] += 1
    return happened


def before_operations(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """A run is killed before each file operation with which it is stored, new or in place of a record."""
    wanted, _ = undisturbed(folder)
    happened: Counter[str] = Counter()
    for replace in (False, True):
        at = 0
        while happened.total() < (count if replace else -(-count // 2)):
            at += 1
            place = tiny.make(folder / "killed")
            if replace:
                tiny.Process(place).result()
            if not tiny.Process(place, {"die_at": at, "replace": replace}).kill_after(tiny.WAIT):
                break  # it has no operation of that number: all have been tried
            happened[after(place, wanted)] += 1
    return happened


def of_sweeps(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """At a random moment of a sweep one of its two workers is killed, or the sweep itself, or all of it."""
    place = tiny.make(folder / "sweep")
    begun = time.monotonic()
    process = tiny.sweep(place)
    process.join(tiny.WAIT)
    wanted, seconds = tiny.swept(place), time.monotonic() - begun
    if process.exitcode or len(wanted) != len(tiny.SEEDS):
        return Counter({f"{FAULT}: the undisturbed sweep is not complete": 1})
    happened: Counter[str] = Counter()
    while happened.total() < count:
        tiny.make(place)
        what = ("the sweep", "a worker", "all of it")[happened.total() % 3]
        process = tiny.sweep(place)
        process.join(rng.uniform(0, seconds))
        workers = _workers(process.pid)
        victims = workers[:1] if what == "a worker" else [process.pid, *(workers if what == "all of it" else [])]
        if process.exitcode is None and victims:
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            happened[_resweep(place, process, workers, wanted, what)] += 1
    return happened


def _workers(pid: int) -> list[int]:
    """The processes of a sweep that compute."""
    children = _read(f"/proc/{pid}/task/{pid}/children").split()
    return [int(child) for child in children if _computes(int(child))]


def _computes(pid: int) -> bool:
    return "spawn_main" in _read(f"/proc/{pid}/cmdline")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # the process has ended
        return ""


def _resweep(place: Path, process: Any, workers: list[int], wanted: dict[str, str], what: str) -> str:
    process.join(tiny.WAIT)
    if what == "a worker" and process.exitcode:
        return f"{FAULT}: a worker was lost and the sweep did not go on"
    deadline = time.monotonic() + 10
    while left := [pid for pid in workers if _computes(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return f"{FAULT}: {what} killed, and workers remain"
        time.sleep(0.05)
    try:
        before = tiny.swept(place)
        again = tiny.sweep(place)
        again.join(tiny.WAIT)
        found = tiny.swept(place)
    except StoreError as error:
        return f"{FAULT}: not valid afterwards: {error}"
    if again.exitcode or found != wanted or not before.items() <= wanted.items():
        return f"{FAULT}: other numbers, or a sweep that is not complete"
    return f"{what} killed, " + ("complete without it" if what == "a worker" else "the next sweep completes it")


def notebook(folder: Path) -> Path:
    """A notebook that runs the miniature and prints its digest."""
    cells = [nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / "tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path


def execute(folder: Path, out: Path) -> subprocess.Popen[str]:
    """Executes it as the book does."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "eos_utils.book", str(notebook(folder)), str(out), "{}", str(tiny.WAIT)],
        env=os.environ | tiny.environment(folder) | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def shown(out: Path) -> str:
    """What the last cell of an executed notebook shows; raises ``ValueError`` where the file is not whole."""
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    (output,) = [o for o in cells[-1]["outputs"] if o.get("name") == "stdout"]
    return "".join(output["text"]).strip()


def of_notebooks(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """A notebook under papermill is killed, or its kernel is, at a random moment."""
    wanted, _ = undisturbed(folder)
    place = tiny.make(folder / "notebook")
    out = place / "out.ipynb"
    begun = time.monotonic()
    if execute(place, out).wait(tiny.WAIT) or shown(out) != wanted:
        return Counter({f"{FAULT}: the undisturbed notebook shows other numbers": 1})
    seconds, happened = time.monotonic() - begun, Counter[str]()
    while happened.total() < count:
        tiny.make(place)
        process = execute(place, out)
        of_kernel = bool(rng.getrandbits(1))
        if _killed(process, of_kernel, rng.uniform(0, seconds)):
            happened[_rerun(place, out, wanted, "the kernel" if of_kernel else "papermill")] += 1
    return happened


def _killed(process: subprocess.Popen[str], of_kernel: bool, moment: float) -> bool:
    """Kills the process or its kernel at that moment; False where it had ended, or had no kernel yet."""
    try:
        process.wait(moment)
        return False
    except subprocess.TimeoutExpired:
        pass
    kernels = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if of_kernel else []
    if of_kernel and kernels:
        os.kill(int(kernels[0]), signal.SIGKILL)
    elif not of_kernel:
        os.kill(process.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=tiny.WAIT)
    if of_kernel and kernels and process.returncode and "tiny.ipynb" not in said:
        raise RuntimeError(f"a kernel died and nothing names its notebook: {said}")
    return bool(process.returncode)


def _rerun(place: Path, out: Path, wanted: str, what: str) -> str:
    try:
        if out.exists() and shown(out) != wanted:
            return f"{FAULT}: a page with other numbers"
        again = execute(place, out)
        said, _ = again.communicate(timeout=tiny.WAIT)
        if again.returncode or shown(out) != wanted:
            return f"{FAULT}: the next execution fails: {said[-300:]}"
    except (ValueError, KeyError, subprocess.TimeoutExpired) as error:
        return f"{FAULT}: a page that is not whole: {error}"
    return f"{what} killed, next execution complete"
