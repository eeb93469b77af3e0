"""The catalogue: canonical runs with names, from ``experiments/*.yaml``, and recording them into ``results/``.

An entry gives an experiment (only what differs from the defaults), what is measured, and its cost. ``for`` makes one
run for each listed value, named by a template such as ``fg_fig1_seed{seed}``. A fork names its base run.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from eos_utils.checkpoint import forget
from eos_utils.experiment import Experiment, Measure
from eos_utils.forks import point_path
from eos_utils.ranks import Ranks
from eos_utils.run import compute
from eos_utils.store import Status, Store, root

FIELDS = ("about", "experiment", "measure", "minutes", "for")


@dataclass(frozen=True)
class Entry:
    """A named run: what to do, what to measure, minutes it takes on two cores."""

    name: str
    experiment: Experiment
    measure: Measure
    minutes: float
    about: str

    def status(self, store: Store | None = None) -> Status:
        """Of its record; 'pending' if it has never been recorded."""
        found = (store or Store()).status(self.experiment.key)
        return Status("pending", "registered, not yet run") if found.state == "missing" else found


def expand(name: str, fields: dict[str, Any], where: str, known: dict[str, Entry]) -> list[Entry]:
    """The runs of one entry of the file ``where``, one for each combination of what ``for`` lists.

    ``known``: the runs listed before it, from which it can fork. Raises ``ValueError`` for what is unknown.

    >>> fields = {
    ...     "for": {"seed": [0, 1]}, "measure": {"k": 2},
    ...     "experiment": {"dataset": "digits", "n": 100, "eta": "2/20"},
    ... }
    >>> for entry in expand("mine_seed{seed}", fields, "mine.yaml", known={}):
    ...     run = entry.experiment
    ...     print(entry.name, run.seed, run.n, run.threshold, entry.measure.k)    # 2/η
    mine_seed0 0 100 20.0 2
    mine_seed1 1 100 20.0 2
    """
    known_measures = [f.name for f in dataclasses.fields(Measure)]
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {name}: has no fields; there are {', '.join(FIELDS)}")
    for field, allowed in [*((f, FIELDS) for f in fields), *((f, known_measures) for f in fields.get("measure", {}))]:
        if field not in allowed:
            raise ValueError(f"{where}: {name}: {field!r} is unknown; there are {', '.join(allowed)}")
    axes = fields.get("for", {})
    entries = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        experiment = dict(fields.get("experiment", {}))
        if "fork" in experiment:
            fork = dict(experiment["fork"])
            named = dict(zip(axes, values, strict=True))
            fork["of"] = str(fork.get("of")).format(**named)
            if isinstance(fork.get("at"), dict):  # a step for each seed
                if chosen.get("seed") not in fork["at"]:
                    raise ValueError(f"{where}: {name}: at has no step for seed {chosen.get('seed')}")
                fork["at"] = fork["at"][chosen["seed"]]
            base = known.get(fork["of"])
            if base is None:
                raise ValueError(f"{where}: {name} forks from {fork.get('of')!r}, which is not listed before it")
            fork["seed"] = chosen.pop("fork_seed", fork.get("seed", 0))
            fork["of"] = base.experiment.key
            experiment = {**_plain(base.experiment), **experiment, "fork": fork}
        made = Experiment.from_dict({**experiment, **chosen})
        measure = dict(fields.get("measure", {}))
        measure["snapshots"] = tuple(measure.get("snapshots", ()))
        entries.append(
            Entry(
                name.format(**dict(zip(axes, values, strict=True))),
                made,
                Measure(**measure),
                float(fields.get("minutes", 0)),
                " ".join(str(fields.get("about", "")).split()),
            )
        )
    return entries


def _plain(experiment: Experiment) -> dict[str, Any]:
    """The fields of a base run that its forks share: all but how it stops."""
    skip = ("schema", "stop_accuracy", "stop_loss", "steps", "fork", "project")
    return {k: v for k, v in experiment.canonical().items() if k not in skip}


def catalogue(folder: pathlib.Path | None = None) -> dict[str, Entry]:
    """All named runs, in the order of the files and of the entries in them."""
    paths = sorted((folder or root() / "experiments").glob("*.yaml"))
    return dict(_read(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)))


@lru_cache(maxsize=16)
def _read(files: tuple[tuple[pathlib.Path, int, int], ...]) -> dict[str, Entry]:
    """The entries of files as they are at these times: every claim asks for them."""
    known: dict[str, Entry] = {}
    for path, *_ in files:
        for name, fields in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
            for entry in expand(name, fields, path.name, known):
                if entry.name in known:
                    raise ValueError(f"{path.name}: the name {entry.name!r} is taken already")
                known[entry.name] = entry
    return known


def find(name: str) -> Entry:
    """The entry of a name; ``KeyError`` with near names if there is none.

    >>> entry = find("fg_fig1_seed101")
    >>> entry.experiment.threshold, entry.experiment.seed, entry.measure.k    # 2/η = 30
    (30.0, 101, 6)
    >>> find("fg_fig1_sed101")
    Traceback (most recent call last):
    KeyError: "no run 'fg_fig1_sed101' in experiments/; did you mean fg_fig1_...
    """
    import difflib

    entries = catalogue()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, 3)
        raise KeyError(f"no run {name!r} in experiments/" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return entries[name]


def record(
    entry: Entry,
    *,
    device: str = "auto",
    progress: bool = True,
    replace: bool = False,
    store: Store | None = None,
    ranks: Ranks | None = None,
) -> bool:
    """Computes a run and writes it to the store, ``results/`` by default; False if a usable record was there.

    With ``ranks`` it is rank 0 that writes, and the others return True.
    """
    store = store or Store()
    store.check_writable(entry.experiment.key)
    state = store.status(entry.experiment.key).state
    if ranks is not None:  # they may not see the same folder
        state = (ranks.share(state.encode()) or b"").decode()
    if state in ("fresh", "unverified") and not replace:
        return False
    if progress and (ranks is None or ranks.first):
        print(f"recording {entry.name} ({entry.experiment.key})", file=sys.stderr)
    key = entry.experiment.key
    forks = [e.experiment.fork for e in catalogue().values() if e.experiment.fork]
    points = {fork["at"] for fork in forks if fork["of"] == key and isinstance(fork["at"], int)}
    result, provenance = compute(
        entry.experiment, entry.measure, device=device, progress=progress, records=store, points=points, ranks=ranks
    )
    if ranks is not None and not ranks.first:
        return True
    saved = store.save(key, result, {"name": entry.name, **provenance}, replace=state != "missing" or replace)
    if saved:
        for step in points:  # so that the forks need not replay it
            if point_path(key, "new", step).is_file():
                point_path(key, "new", step).replace(point_path(key, store.manifest(key)["sha256"][:8], step))
    forget(entry.experiment, entry.measure)
    return saved
