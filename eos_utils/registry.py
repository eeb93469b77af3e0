"""What a rule may name: the statistics of recorded runs, and the checks of mathematical claims, of all rooms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from eos_utils import (
    anomalies,
    assumption_stats,
    decay_stats,
    directions,
    eos_stats,
    fg_edge,
    fg_lemmas,
    fg_phase1,
    fg_theorem,
    phase_stats,
    residual_stats,
    sg_assumptions,
    sg_growth,
    sg_hessian,
    sg_identities,
    sg_long_run,
    sg_residual,
    sg_section3,
    sg_theorems,
    size_stats,
)
from eos_utils.fg_theory import Tested

T = TypeVar("T")


def registry(*parts: Mapping[str, Callable[..., T]]) -> dict[str, Callable[..., T]]:
    """The functions of several rooms by name. ``ValueError`` if two have the same: a rule would get the wrong one."""
    found: dict[str, Callable[..., T]] = {}
    for part in parts:
        if taken := sorted(found.keys() & part.keys()):
            raise ValueError(f"the name {', '.join(taken)} is taken by a function of another room")
        found |= part
    return found


# Statistics of one run, and of the runs of one seed beside those of all other seeds. With ``by: seed`` in a rule the
# seed is the unit: a statistic of one run is then the largest over the seed's runs.
STATISTICS: dict[str, Callable[..., float]] = registry(
    eos_stats.STATISTICS,
    decay_stats.STATISTICS,
    directions.STATISTICS,
    phase_stats.STATISTICS,
    anomalies.STATISTICS,
    residual_stats.STATISTICS,
    sg_residual.STATISTICS,
    assumption_stats.STATISTICS,
    sg_hessian.STATISTICS,
    sg_long_run.STATISTICS,
)
GROUPED: dict[str, Callable[..., float]] = registry(
    decay_stats.GROUPED, directions.GROUPED, size_stats.GROUPED, assumption_stats.GROUPED
)
# The checks of mathematical claims, by name.
CHECKS: dict[str, Callable[..., Tested]] = registry(
    fg_lemmas.CHECKS,
    fg_phase1.CHECKS,
    fg_theorem.CHECKS,
    fg_edge.CHECKS,
    sg_identities.CHECKS,
    sg_section3.CHECKS,
    sg_growth.CHECKS,
    sg_residual.CHECKS,
    sg_theorems.CHECKS,
    sg_assumptions.CHECKS,
    sg_hessian.CHECKS,
    sg_long_run.CHECKS,
)
