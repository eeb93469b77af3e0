"""FG, assumptions 2.1 and 2.2 and lemma A.1."""

from __future__ import annotations

from collections.abc import Callable

from eos_utils.fg_theory import Tested

CHECKS: dict[str, Callable[..., Tested]] = {}
