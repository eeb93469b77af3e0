"""Disks that are full, folders that may not be written, two writers at once, a clock that goes backwards."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults import FAULT, tiny
from faults.kills import how, undisturbed

STEPS = tiny.EXPERIMENT["steps"]
# What may not be read or written meanwhile, and its mode then.
DENIED = (
    ("root/results", 0o500),
    ("root/results", 0o000),
    ("cache/partial", 0o500),
    ("cache", 0o000),
    (f"root/results/{tiny.KEY}.json", 0o000),
    ("record", 0o000),
)


def _told(found: dict[str, Any], words: tuple[str, ...], wanted: str) -> str:
    """An attempt under bad conditions: done after all, or an error that names the place and the remedy."""
    if "invalid" in found:
        return f"{FAULT}: not valid: {found['invalid']}"
    if "error" in found:
        if found["error"] != "StoreError" or not any(word in found["message"] for word in words):
            return f"{FAULT}: {found['error']}: {found['message']}"
        return "refused, with the place and the remedy"
    if found.get("digest") != wanted:
        return f"{FAULT}: other numbers: {found}"
    return "done without a checkpoint" if "no checkpoint could be written" in found["said"] else "done"


def _then(found: dict[str, Any], wanted: str) -> str:
    if found.get("digest") != wanted or "error" in found:
        return f"{FAULT}: not made good: {found}"
    return "then on record already" if not found["done"] else f"then {how(found['said'])}"


def full_disk(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """The disk is full from a random step on, or no file may be longer than so much; then there is room again."""
    wanted, _ = undisturbed(folder)
    happened: Counter[str] = Counter()
    kinds = ("disk", "limit") if tiny.can_mount(folder / "small") else ("limit",)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        room = int(10 ** rng.uniform(2, 5.5))
        attempt = {"at_step": rng.randrange(STEPS), "leave" if kind == "disk" else "limit": room}
        place = tiny.make(folder / "full")
        disk = {"disk": 1 << 23} if kind == "disk" else {}
        bad, good = tiny.Process(place, attempt, {}, **disk).result()
        outcome = _told(bad, ("free space",), wanted)
        happened[outcome if outcome.startswith(FAULT) else f"{outcome}; {_then(good, wanted)}"] += 1
    return happened


def permission_denied(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """Results, checkpoints or a record may not be read or written; then they may."""
    wanted, _ = undisturbed(folder)
    happened: Counter[str] = Counter()
    for number in range(count):
        what, mode = DENIED[number % len(DENIED)]
        place = tiny.make(folder / "denied")
        if "results/" in what or what == "record":
            tiny.Process(place).result()
        for name in ("root/results", "cache/partial"):
            (place / name).mkdir(parents=True, exist_ok=True)
        if what == "record":
            what = next((place / "root" / "results").glob("*.nc")).relative_to(place).as_posix()
        bad, good = tiny.Process(place, {"denied": what, "mode": mode}, {}).result()
        outcome = _told(bad, ("change its permissions",), wanted)
        happened[outcome if outcome.startswith(FAULT) else f"{outcome}; {_then(good, wanted)}"] += 1
    return happened


def two_writers(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """Two processes record the same run at once; every other time in place of a record."""
    wanted, _ = undisturbed(folder)
    happened: Counter[str] = Counter()
    for number in range(count):
        place, replace = tiny.make(folder / "two"), bool(number % 2)
        if replace:
            tiny.Process(place).result()
        together = tiny.barrier(2)
        both = [tiny.Process(place, {"replace": replace}, together=together) for _ in range(2)]
        found = [process.result()[0] for process in both]
        done = sorted(f.get("done", f.get("message")) for f in found)
        names = {p.name for p in (place / "root" / "results").iterdir()}
        if any(f.get("digest") != wanted for f in found) or tiny.recorded(place) != wanted:
            happened[f"{FAULT}: {found}"] += 1
        elif done == [False, True]:
            happened["one wrote, the other saw it and kept it"] += 1
        elif done == [True, True] and replace:
            happened["both wrote, one record is left" + (", and a file without a manifest" * (len(names) > 2))] += 1
        else:
            happened[f"{FAULT}: {done}"] += 1
    return happened


def clock_backwards(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """Each look at the clock is an hour before the last; a killed run left files that are dated in the future."""
    wanted, seconds = undisturbed(folder)
    happened: Counter[str] = Counter()
    while happened.total() < count:
        place = tiny.make(folder / "clock")
        if not tiny.Process(place, {"backwards": True}).kill_after(rng.uniform(0.5, 1) * seconds):
            continue
        for path in (p for p in place.rglob("*") if p.is_file()):
            os.utime(path, (time.time() + 10 * 86400,) * 2)
        (found,) = tiny.Process(place, {"backwards": True}).result()
        happened[_then(found, wanted).removeprefix("then ")] += 1
    return happened
