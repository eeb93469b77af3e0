"""FG, lemmas 2.1, 2.2 and A.2."""

from __future__ import annotations

from collections.abc import Callable

from eos_utils.fg_theory import Tested

CHECKS: dict[str, Callable[..., Tested]] = {}
