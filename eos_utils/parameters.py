"""Typed parameters of notebooks: declared in one cell, compared with what papermill injected, refused if unknown.

A parameters cell declares each name with a type and a help text::

    eta: "rational" = "2/30"  # step size, a number or an exact fraction such as 2/150
    width: int = 128  # units in each hidden layer

where the types are int, float, bool, str and "rational" (in quotes, since it is no type of Python).
papermill only warns of a name that does not exist; :func:`parameters`, called in the next cell, refuses it.
"""

from __future__ import annotations

import difflib
import math
import pathlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

from eos_utils.experiment import rational
from eos_utils.run import SOURCES


class ParameterError(ValueError):
    """A parameter that is unknown or of the wrong type; the message names it and the remedy."""


LARGEST = 10**9  # of any count: what is larger was mistyped, or is meant to fill the memory
TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "rational": Fraction}


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a notebook."""

    name: str
    type: str
    default: str
    help: str


def convert(name: str, kind: str, value: Any) -> Any:
    """``value`` as the declared type, or :class:`ParameterError`.

    The command line gives text: 'true' for a bool is understood, as is a whole float for an int.

    >>> convert("width", "int", "256"), convert("fast", "bool", "true"), convert("eta", "rational", "2/50")
    (256, True, '2/50')
    """
    try:
        if kind == "bool":
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if kind == "rational":
            rational(value, name)
            return str(value)
        if isinstance(value, bool) or value is None:
            raise ValueError
        if kind == "int":
            if float(value) != int(float(value)):
                raise ValueError
            whole = int(value) if isinstance(value, int) else int(float(value))
            if not 0 <= whole <= LARGEST:
                raise ParameterError(f"{name}={value!r} is out of range: a whole number from 0 to {LARGEST:,}")
            return whole
        if kind == "float" and not math.isfinite(float(value)):
            raise ParameterError(f"{name}={value!r} is out of range: a finite number")
        if name == "source" and value not in SOURCES:
            raise ParameterError(f"source={value!r} is unknown; choose one of {', '.join(SOURCES)}")
        return TYPES[kind](value)
    except ParameterError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        detail = f": {error}" if kind == "rational" else ""
        raise ParameterError(f"{name}={value!r} is not of the declared type {kind}{detail}") from None


def refuse_unknown(given: list[str], declared: list[str]) -> None:
    """Raises :class:`ParameterError` for the first given name that is not declared, with near names."""
    for name in given:
        if name not in declared:
            near = difflib.get_close_matches(name, declared, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ParameterError(
                f"there is no parameter {name!r}{hint} Declared are: {', '.join(declared)}. Nothing was run."
            )


def parameters(namespace: dict[str, Any]) -> SimpleNamespace:
    """The checked parameters of the calling notebook; call it as ``p = parameters(globals())`` in the second cell.

    Declared are the names with a type in the parameters cell. Every other public name in the notebook at that point,
    except imports, was injected, and is unknown.
    """
    declared: dict[str, Any] = {
        name: getattr(kind, "__name__", str(kind)) for name, kind in namespace.get("__annotations__", {}).items()
    }
    for name, kind in declared.items():
        if kind not in TYPES:
            raise ParameterError(f"{name} is declared as {kind}; parameters are {', '.join(TYPES)}")
    of_jupyter = {"In", "Out", "exit", "quit", "open", "get_ipython"}
    given = [
        name
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in of_jupyter
        and not isinstance(value, ModuleType | type)
        and not callable(value)
    ]
    refuse_unknown(given, list(declared))
    return SimpleNamespace(**{name: convert(name, kind, namespace[name]) for name, kind in declared.items()})


def declared(notebook: pathlib.Path) -> list[Parameter]:
    """The parameters of a notebook file, as papermill reads them: name, type, default, help."""
    return list(_declared(notebook, notebook.stat().st_mtime_ns, notebook.stat().st_size))


@lru_cache(maxsize=64)
def _declared(notebook: pathlib.Path, *changed: int) -> tuple[Parameter, ...]:
    """The same of a file as it was then."""
    import logging

    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    found = papermill.inspect_notebook(str(notebook))
    return tuple(
        Parameter(p["name"], p["inferred_type_name"], p["default"].strip("\"'"), (p["help"] or "").strip())
        for p in found.values()
    )


def check_given(notebook: pathlib.Path, given: dict[str, Any]) -> dict[str, Any]:
    """Given values converted to their declared types, before anything is run."""
    known = {p.name: p for p in declared(notebook)}
    refuse_unknown(list(given), list(known))
    return {name: convert(name, known[name].type, value) for name, value in given.items()}
