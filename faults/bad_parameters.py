"""Parameters that a notebook does not have, of wrong types, out of range: refused by name, or valid."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eos_utils import book
from eos_utils.cli import notebooks
from eos_utils.parameters import Parameter, ParameterError, check_given, declared
from faults import FAULT

CODE = [
    "__import__('os').system('touch ran')",
    "1 if True else 2",
    "!!python/object/apply:os.getcwd []",
    "${PATH}",
    "1_0",
]
WORDS = ["", "nonsense", "ReLU", "-1", "0", "1/0", "2/-50", "nan", "inf", "1e400", "٣", "\x00", "true", *CODE]
VALUES = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=8),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.integers(), max_size=2),
)
# For what is executed: short, whatever is accepted.
SMALL = [*WORDS, -1, 0, 1, 1.5, -2.0, math.nan, math.inf, True, None]


def sets(known: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """One to three parameters, most of them with names that are declared."""
    names = st.one_of(st.sampled_from(known), st.sampled_from(known), st.text(min_size=1, max_size=8))
    return st.dictionaries(names, VALUES, min_size=1, max_size=3)


def judged(path: Path, known: dict[str, Parameter], values: dict[str, Any]) -> str:
    """Whether the validator refuses a set by name, or gives values of the declared types."""
    try:
        found = check_given(path, values)
    except ParameterError as error:
        named = any(f"{name}=" in str(error) or repr(name) in str(error) for name in values)
        return "refused, and named" if named else f"{FAULT}: {error}"
    except Exception as error:
        return f"{FAULT}: {type(error).__name__}: {error}"
    types = {"int": int, "float": float, "bool": bool, "str": str, "rational": str}
    for name, value in found.items():
        kind = known[name].type
        if type(value) is not types[kind] or (kind == "float" and not math.isfinite(value)):
            return f"{FAULT}: {name}={values[name]!r} became {value!r}"
        if kind == "rational" and Fraction(value) <= 0:
            return f"{FAULT}: {name}={values[name]!r} became {value!r}"
    return "valid, in the declared types"


def validator(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """``count`` sets for every notebook, against the validator."""
    happened: Counter[str] = Counter()
    quiet = settings(
        max_examples=count, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def try_all(path: Path) -> None:
        known = {p.name: p for p in declared(path)}

        @quiet
        @given(sets(list(known)))
        def once(values: dict[str, Any]) -> None:
            happened[judged(path, known, values)] += 1

        once()

    for path in notebooks().values():
        try_all(path)
    return happened


def executed(count: int, folder: Path, rng: random.Random) -> Counter[str]:
    """``count`` sets through papermill, over the notebooks in turn, the others as in its smoke run."""
    happened: Counter[str] = Counter()
    all_of = sorted(notebooks().items())
    out = folder / "out.ipynb"
    for number in range(count):
        name, path = all_of[(number * 7) % len(all_of)]
        smoke = yaml.safe_load((path.parent / "params" / f"{name}.smoke.yaml").read_text(encoding="utf-8"))
        known = [p.name for p in declared(path)]
        if "dataset" in known:
            smoke["dataset"] = "digits"
        wrong, value = rng.choice([*known, *known, "etta"]), rng.choice(SMALL)
        out.unlink(missing_ok=True)
        said = book.execute_apart(path.parents[1], path, out, {**smoke, wrong: value}, timeout=120)
        left = {p.name for p in folder.iterdir()} - {"out.ipynb", "out.failed.ipynb"}
        if left or (said and out.exists()):
            happened[f"{FAULT}: half a page: {name}, {wrong}={value!r}: {left}"] += 1
        elif not said:
            happened["valid: a page"] += 1
        elif "imeout" in said:
            happened["valid, and more than two minutes in a cell: stopped"] += 1
        elif any(wrong in line for line in said.splitlines()[:2]):
            happened["refused, and named in the error"] += 1
        elif f"{wrong}={value!r}" in said:
            happened["an error of a cell, and the parameters that were given"] += 1
        else:
            happened[f"{FAULT}: {name}, {wrong}={value!r}: {said[:300]}"] += 1
    return happened
