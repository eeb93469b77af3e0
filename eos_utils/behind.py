"""The run on record behind one with other settings, with the band of its forks: how far chance alone carries it.

After the entry the dynamics are chaotic. Forks, started from the recorded run with a perturbation of one part in a
million, span what a curve means there: a rerun that leaves the band differs by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eos_utils.figures import Curve

if TYPE_CHECKING:
    import xarray as xr

Series = Callable[["xr.Dataset"], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Behind:
    """A recorded run and its recorded forks."""

    run: xr.Dataset
    forks: tuple[xr.Dataset, ...] = ()

    def band(self, series: Series) -> tuple[np.ndarray, np.ndarray]:
        """Steps (T,), and least and largest (2, T) of a series over the run and its forks, at steps that all have."""
        found = [series(run) for run in (self.run, *self.forks)]
        steps = found[0][0]
        for x, _ in found[1:]:
            steps = np.intersect1d(steps, x)
        values = np.array([y[np.searchsorted(x, steps)] for x, y in found])
        return steps, np.array([values.min(axis=0), values.max(axis=0)])

    def curves(self, series: Series, name: str = "") -> list[Curve]:
        """The band, if there are forks, and the recorded curve; ``series`` gives steps and values of a run."""
        label = f"{name} on record" if name else ""
        drawn = [Curve(*series(self.run), label, "line", None)]
        if self.forks:
            drawn.insert(0, Curve(*self.band(series), f"its {len(self.forks)} forks" if name else "", "band", None))
        return drawn
