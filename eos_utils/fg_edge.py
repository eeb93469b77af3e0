"""FG's model at the edge of stability."""

from __future__ import annotations

from collections.abc import Callable

from eos_utils.fg_theory import Tested

CHECKS: dict[str, Callable[..., Tested]] = {}
