"""Records from elsewhere (a cluster, a colleague): looked at in a process of their own before they are taken.

A checksum says that a file came as it was sent, not that it is harmless: HDF5 is a large library in C, and a file made
to crash it brings a manifest with the right checksum along. So another process opens it, with bounds on memory and
time, and compares the experiment inside with the key. What is taken is *as good as local*: its status follows from
the fingerprints in its manifest, and `eos verify` replays it.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

from eos_utils.experiment import Experiment
from eos_utils.store import Store, StoreError

if TYPE_CHECKING:
    import xarray as xr

MEMORY = 16 << 30  # bytes of address space; torch alone maps several
SECONDS = 300
READER = (sys.executable, "-m", "eos_utils.foreign")


def examine(folder: pathlib.Path, key: str) -> None:
    """Opens a record in another process; raises :class:`StoreError` if it can not be read there, or is not that run."""
    try:
        done = subprocess.run(
            [*READER, str(folder), key], capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise StoreError(f"{key} in {folder} was not taken: reading it takes more than {SECONDS} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or "nothing was said").splitlines()
        said = f"it crashed its reader (signal {-done.returncode})" if done.returncode < 0 else lines[-1]
        raise StoreError(f"{key} in {folder} was not taken: {said}")


def adopt(folder: pathlib.Path, key: str, into: Store | None = None) -> bool:
    """Takes one record from another folder; False if a usable one is here already. Raises :class:`StoreError`."""
    here, there = into or Store(), Store(folder)
    if here.status(key).state in ("fresh", "unverified"):
        return False
    manifest = there.manifest(key)
    examine(there.folder, key)
    here.check_writable(key)
    return here.take(manifest, (there.folder / manifest["file"]).read_bytes())


def check(run: xr.Dataset, key: str) -> None:
    """Raises if a trajectory lacks what every one has, or its experiment has not the key under which it came."""
    fields = {k: v for k, v in json.loads(run.attrs["experiment"]).items() if k != "schema"}
    if (found := Experiment.from_dict(fields).key) != key:
        raise StoreError(f"its experiment has the key {found}")
    for name in ("loss", "eta", "accuracy"):
        if run[name].dims != ("step",) or run[name].dtype.kind != "f":
            raise StoreError(f"its {name} is no series of numbers over the steps")
    if not run.sizes["step"]:
        raise StoreError("it has no steps")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        check(Store(sys.argv[1]).load(sys.argv[2]), sys.argv[2])
    except Exception as error:  # whatever it is, it is the reason
        print(" ".join(f"{type(error).__name__}: {error}".split()), file=sys.stderr)
        sys.exit(1)
