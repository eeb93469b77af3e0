"""One bit flipped in a record, a manifest, a checkpoint, the CIFAR-10 mirror: noticed, or of no consequence."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from eos_utils import data
from eos_utils.checkpoint import read_checkpoint
from eos_utils.data import DataError
from eos_utils.store import StoreError
from faults import FAULT, tiny


def _flipped(path: Path, count: int, rng: random.Random, look: Callable[[], str]) -> Counter[str]:
    """What ``look`` says after each of ``count`` flips, one in each of as many equal parts of the file."""
    happened: Counter[str] = Counter()
    size = path.stat().st_size
    with open(path, "r+b", buffering=0) as stream:
        for part in range(count):
            at = min(size - 1, int((part + rng.random()) * size / count))
            before = os.pread(stream.fileno(), 1, at)
            os.pwrite(stream.fileno(), bytes([before[0] ^ 1 << rng.randrange(8)]), at)
            happened[look()] += 1
            os.pwrite(stream.fileno(), before, at)
    return happened


def of_records(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """In the file of a recorded run."""
    return _of_record(count, folder, rng, "*.nc")


def of_manifests(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """In the manifest of a recorded run."""
    return _of_record(count, folder, rng, "*.json")


def _of_record(count: int, folder: Path, rng: random.Random, pattern: str) -> Counter[str]:
    place = tiny.make(folder / "record")
    tiny.Process(place).result()
    store = tiny.store_of(place)
    wanted = tiny.digest(store.load(tiny.KEY))
    told = json.loads(store.load(tiny.KEY).attrs["provenance"])

    def look() -> str:
        state = store.status(tiny.KEY).state
        try:
            found = store.load(tiny.KEY)
        except StoreError:
            return "refused"
        if tiny.digest(found) != wanted:
            return f"{FAULT}: other numbers were loaded"
        now = json.loads(found.attrs["provenance"])
        if {k: v for k, v in now.items() if k != "name"} != {k: v for k, v in told.items() if k != "name"}:
            return f"{FAULT}: another provenance was loaded"
        if state == "fresh":
            return "loaded unharmed: in the run's name"
        return f"loaded unharmed, and called {state}"

    return _flipped(next(store.folder.glob(pattern)), count, rng, look)


def of_checkpoints(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """In the checkpoint of a run that was killed."""
    place = tiny.make(folder / "checkpoint")
    for _ in range(20):
        run = tiny.Process(place)
        while not (found := sorted((place / "cache" / "partial").glob("*.pt"))) and run.process.is_alive():
            time.sleep(0.002)
        run.kill_after(0)
        if found and found[0].exists():  # the run was not through
            break
        shutil.rmtree(place / "root" / "results", ignore_errors=True)
    else:
        raise RuntimeError("twenty runs, and none was killed with a checkpoint")
    path = found[0]
    state = read_checkpoint(path)

    def look() -> str:
        found = read_checkpoint(path)
        if found is None:
            return "refused, the run begins anew"
        return "read unharmed: in padding" if same(found, state) else f"{FAULT}: other numbers were read"

    return _flipped(path, count, rng, look)


def same(a: object, b: object) -> bool:
    """Whether two states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        equal = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return equal and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def of_mirror(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """In the mirror of CIFAR-10."""
    place = os.environ.get("EOS_DATA_DIR", "")
    if not (Path(place) / data.MIRROR).is_file():
        return Counter()
    folder = tiny.make(folder / "mirror")
    path = shutil.copyfile(Path(place) / data.MIRROR, folder / data.MIRROR)

    def look() -> str:
        try:
            data.cifar10(10, path=folder)
        except DataError as error:
            return "refused" if "damaged or altered" in str(error) else f"{FAULT}: {error}"
        return f"{FAULT}: images were loaded"

    return _flipped(path, count, rng, look)
