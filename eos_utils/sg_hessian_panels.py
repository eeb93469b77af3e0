"""What is drawn and tabled of SG's section 2: the Hessian beside M, its two terms, the spectrum of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eos_utils.catalogue import catalogue
from eos_utils.figures import Curve, Panel
from eos_utils.page import number, recorded
from eos_utils.phases import Array, scaled
from eos_utils.sg_hessian import PREPROCESSINGS, Inputs, Watched, both, moved, other_share, other_term
from eos_utils.sg_residual_panels import NETWORKS, SEEDS, Table, spikes

if TYPE_CHECKING:
    import xarray as xr

Groups = Mapping[str, Sequence["xr.Dataset"]]


def _tones(count: int) -> list[float]:
    return [float(tone) for tone in np.linspace(0, 1, max(2, count))][:count]


def _dots(x: Array, y: Array, label: str, tone: float | None) -> Curve:
    """Separate dots: what lies between them is not known, so that no line is drawn."""
    gap = np.full(len(x), np.nan)
    return Curve(np.stack([x, x], 1).ravel(), np.stack([y, gap], 1).ravel(), label, "marked", tone)


def ratio_panels(run: xr.Dataset, title: str = "", legend: str = "upper left") -> list[Panel]:
    """λ₁(M) at every step and λ₁(H) where measured, times η/2; below their ratio. Dotted: spikes."""
    found = both(run)
    above = [
        Curve(run["observed"].values, scaled(run), "λ₁(M)", "line", 0.75),
        _dots(found.step, found.hessian * found.eta / 2, "λ₁(H)", 0.0),
    ]
    below = [Curve(found.step[[0, -1]], [1.0, 1.0], "", "dotted", None), _dots(found.step, found.ratio, "", 0.0)]
    marks = spikes(run)
    return [
        Panel(above, "eigenvalue · η/2", "", title, level=1.0, marks=marks, legend=legend),
        Panel(below, "λ₁(H) / λ₁(M)", "step", marks=marks, legend="none"),
    ]


def zoom_panel(run: xr.Dataset, title: str = "", around: int = 32, legend: str = "best") -> Panel:
    """The same around the measured step at which the two are furthest apart."""
    found = both(run)
    at = int(found.step[np.abs(found.ratio - 1).argmax()])
    steps = run["observed"].values
    inside, near = np.abs(steps - at) <= around, np.abs(found.step - at) <= around
    curves = [
        Curve(steps[inside], scaled(run)[inside], "λ₁(M)", "line", 0.75),
        _dots(found.step[near], (found.hessian * found.eta / 2)[near], "λ₁(H)", 0.0),
    ]
    return Panel(curves, "eigenvalue · η/2", "step", title, level=1.0, level_label="", legend=legend)


def against_residual(groups: Groups) -> Panel:
    """λ₁(H)/λ₁(M) against ‖D‖/√n at the measured steps, all seeds, one tone a network."""
    curves, widest = [], [np.inf, 0.0]
    for (name, runs), tone in zip(groups.items(), _tones(len(groups)), strict=True):
        found = [both(run) for run in runs]
        x, y = (np.concatenate([getattr(f, what) for f in found]) for what in ("residual", "ratio"))
        curves.append(Curve(x, y, name, "points", tone))
        widest = [min(widest[0], x.min()), max(widest[1], x.max())]
    curves.append(Curve(widest, [1.0, 1.0], "", "dotted", None))
    return Panel(curves, "λ₁(H) / λ₁(M)", "‖D‖/√n", legend="upper left")


def against_change(groups: Groups, most: float = 30.0) -> Panel:
    """The ratio less one against what the next change of Λ gives to first order, after the crossing; in %."""
    curves, widest = [], 1.0
    for (name, runs), tone in zip(groups.items(), _tones(len(groups)), strict=True):
        found = [both(run, "after") for run in runs]
        x = 100 * np.concatenate([f.foreseen - 1 for f in found])
        y = 100 * np.concatenate([f.ratio - 1 for f in found])
        curves.append(Curve(x, y, name, "points", tone))
        known = x[np.isfinite(x)]
        widest = max(widest, float(np.abs(known).max()) if len(known) else 0.0)
    line = np.array([-1.0, 1.0]) * min(widest, most)
    curves.append(Curve(line, line, "equal", "dotted", None))
    return Panel(curves, "λ₁(H)/Λ − 1, %", "−ΔΛ / (2ηΛ²), %", legend="upper left")


def watched_panels(found: Watched, title: str = "") -> list[Panel]:
    """The live run around its peak: both eigenvalues, their difference and two ways to foresee it, the ends of S."""
    x = found.step.astype(float)
    level = found.scaled[found.step]
    flat = Curve(x[[0, -1]], [0.0, 0.0], "", "dotted", None)
    return [
        Panel(
            [Curve(x, level, "λ₁(M)", "marked", 0.75), Curve(x, level * found.hessian, "λ₁(H)", "marked", 0.0)],
            *("eigenvalue · η/2", "", title),
            level=1.0,
            legend="lower left",
        ),
        Panel(
            [
                flat,
                Curve(x, found.hessian - 1, "λ₁(H)/Λ − 1", "marked", 0.0),
                Curve(x, found.along, "uᵀSu/Λ", "dashed", 0.5),
                Curve(x, found.foreseen, "−ΔΛ/(2ηΛ²)", "dashed", 1.0),
            ],
            *("relative to Λ", ""),
            legend="upper left",
        ),
        Panel(
            [
                flat,
                Curve(x, found.top, "λmax(S)/Λ", "marked", 0.0),
                Curve(x, found.bottom, "λmin(S)/Λ", "marked", 0.8),
            ],
            *("ends of S", "step"),
            legend="upper left",
        ),
    ]


def weighed(*kinds: str) -> dict[str, list[xr.Dataset]]:
    """The recorded runs with both terms of each network that has some, by its name in words."""
    names = {kind: [f"sg_{kind}_terms_seed{seed}" for seed in SEEDS] for kind in kinds}
    there = recorded([name for group in names.values() for name in group if name in catalogue()])
    found = {NETWORKS[kind]: [there[name] for name in group if name in there] for kind, group in names.items()}
    return {name: runs for name, runs in found.items() if runs}


def other_panels(groups: Groups) -> list[Panel]:
    """The largest |λ(S)| over λ₁(G) along the recorded runs, a panel a network, a line a seed."""
    return [
        Panel(
            [
                Curve(run["weighed"].values, other_share(run), "", "marked", tone)
                for run, tone in zip(runs, _tones(len(runs)), strict=True)
            ],
            *("max |λ(S)| / λ₁(G)", "step", name, "y"),
            legend="none",
        )
        for name, runs in groups.items()
    ]


def other_table(groups: Groups) -> Table:
    """A row a network: the largest |λ(S)| over λ₁(G), median, 95th percentile and most, and λ₁(H)/λ₁(G)."""
    header = ["Network", "Seeds", "|λ(S)|/λ₁(G), median", "95th percentile", "most", "λ₁(H)/λ₁(G)"]
    rows = []
    for name, runs in groups.items():
        ratios = np.concatenate([run["hessian"].values / run["gauss_newton"].values for run in runs])
        levels = [number(float(np.mean([other_term(run, q) for run in runs])), 2) for q in (0.5, 0.95)]
        most = number(max(other_term(run, 1.0) for run in runs), 2)
        rows.append([name, str(len(runs)), *levels, most, " to ".join(number(f(ratios), 3) for f in (min, max))])
    return header, rows


def inputs_panels(found: Mapping[str, Mapping[str, Inputs]], count: int = 12) -> list[Panel]:
    """λᵢ/λ₁ of XᵀX for the first i, one tone a preprocessing, a panel a subset."""
    index = np.arange(1, count + 1)
    return [
        Panel(
            [
                Curve(index, row[what].leading[:count] / row[what].leading[0], what, "marked", tone)
                for what, tone in zip(PREPROCESSINGS, _tones(len(PREPROCESSINGS)), strict=True)
            ],
            *("λᵢ / λ₁ of XᵀX", "i", subset[0].upper() + subset[1:], "y"),
            legend="upper right" if j == 0 else "none",
            ylim=(0.002, 60.0 if j == 0 else 2.0),
        )
        for j, (subset, row) in enumerate(found.items())
    ]


def inputs_table(found: Mapping[str, Mapping[str, Inputs]]) -> Table:
    """A row for each preprocessing of each subset: λ₁/λ₂, the largest later ratio, and the rank."""
    rows = []
    for subset, row in found.items():
        for i, what in enumerate(PREPROCESSINGS):
            one = row[what]
            rows.append([subset if i == 0 else "", what, number(one.ratio), number(one.later), str(one.rank)])
    return ["Images", "Inputs", "λ₁/λ₂", "largest λᵢ/λᵢ₊₁ with i ≥ 2", "rank"], rows


def moved_panel(groups: Groups) -> Panel:
    """How far the leading eigenvalues of M have moved, of the first seed of each network."""
    curves = [
        Curve(runs[0]["spectral"].values, moved(runs[0]), name, "line", tone)
        for (name, runs), tone in zip(groups.items(), _tones(len(groups)), strict=True)
    ]
    return Panel(curves, "‖λ(t) − λ(0)‖ / ‖λ(0)‖", "step", legend="none")


def vector_panel(groups: Groups) -> Panel:
    """|⟨v₁(0), v₁(t)⟩|, of the first seed of each network."""
    curves = [
        Curve(runs[0]["spectral"].values, runs[0]["kept"].values[:, 0], name, "line", tone)
        for (name, runs), tone in zip(groups.items(), _tones(len(groups)), strict=True)
    ]
    return Panel(curves, "|⟨v₁(0), v₁(t)⟩|", "step", legend="lower left")
