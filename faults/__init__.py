"""Fault injection: what a run, a record, a checkpoint or a notebook meets outside of a quiet afternoon.

A scenario does harm so many times and counts what happened. An outcome that begins with `FAULT` is one that must not
be: a figure that is wrong, a store that is not valid, a message that does not say what to do. ``python -m faults``
runs all scenarios (`eos faults`, `make faults`), `tests/test_faults.py` a small share of each.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FAULT = "FAULT"


@dataclass(frozen=True)
class Scenario:
    """What is done, how often in the full count, and the function that does it so often in a folder of its own.

    ``finite``: there are only so many different ones, and the function ends when it has tried them all.
    """

    done: str
    full: int
    function: Callable[[int, Path, random.Random], Counter[str]]
    finite: bool = False


def faulty(happened: Counter[str] | dict[str, int]) -> int:
    """How many outcomes must not be."""
    return sum(count for outcome, count in happened.items() if outcome.startswith(FAULT))
