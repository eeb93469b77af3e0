"""Files made to harm: with code in them, or malformed although their checksum is right."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml

from eos_utils import data, foreign
from eos_utils.catalogue import catalogue
from eos_utils.checkpoint import read_checkpoint
from eos_utils.store import Store, StoreError
from faults import FAULT, tiny


class Planted:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def with_code(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """A pickle in a checkpoint and in an npz with the right checksum, Python in YAML: nothing of it is run."""
    happened: Counter[str] = Counter()
    ran, known = folder / "ran", data.MIRROR_SHA256
    for number in range(count):
        kind = ("checkpoint", "npz", "yaml")[number % 3]
        try:
            if kind == "checkpoint":
                torch.save({"descent": [Planted(ran)] * rng.randint(1, 3)}, folder / "x.pt")
                refused = read_checkpoint(folder / "x.pt") is None
            elif kind == "npz":
                evil = np.array([Planted(ran)] * rng.randint(1, 3), dtype=object)
                np.savez(folder / data.MIRROR, train_images=evil, train_labels=evil, train_index=evil)
                data.MIRROR_SHA256 = data.file_sha256(folder / data.MIRROR)
                data.cifar10(10, path=folder / data.MIRROR)
                refused = False
            else:
                (folder / "x").mkdir(exist_ok=True)
                (folder / "x" / "x.yaml").write_text(f"a{number}: !!python/object/apply:os.mkdir ['{ran}']\n")
                catalogue(folder / "x")
                refused = False
        except (ValueError, yaml.YAMLError):
            refused = True
        finally:
            data.MIRROR_SHA256 = known
        happened["refused, nothing was run" if refused and not ran.exists() else f"{FAULT}: {kind} was read"] += 1
    return happened


def malformed(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """A record from elsewhere with damaged HDF5 and a checksum that is right: opened in a process that may crash."""
    place = tiny.make(folder / "malformed")
    tiny.Process(place).result()
    there = tiny.store_of(place)
    manifest = there.manifest(tiny.KEY)
    path = there.folder / manifest["file"]
    whole, wanted = path.read_bytes(), tiny.digest(there.load(tiny.KEY))
    happened: Counter[str] = Counter()
    for number in range(count):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 8, 64))):
            content[rng.randrange(len(content) if number % 2 else 2048)] = rng.randrange(256)
        if number % 5 == 4:
            del content[rng.randrange(len(content)) :]
        path.unlink()
        sha256 = hashlib.sha256(content).hexdigest()
        path = there.folder / f"{tiny.KEY}-{sha256[:8]}.nc"
        path.write_bytes(content)
        told = manifest | {"file": path.name, "sha256": sha256}
        there.manifest_path(tiny.KEY).write_text(json.dumps(told))
        here = Store(folder / f"here-{number}")
        try:
            foreign.adopt(there.folder, tiny.KEY, here)
            same = tiny.digest(here.load(tiny.KEY)) == wanted
            happened[
                "taken: the same numbers" if same else "taken: readable, with other numbers, for `eos verify`"
            ] += 1
        except StoreError as error:
            how = "the reader crashed, and was survived" if "crashed" in str(error) else "refused"
            happened[how if not here.keys() else f"{FAULT}: refused and taken"] += 1
    return happened
