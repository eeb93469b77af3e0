"""What is drawn and tabled of SG's section 5: trends over a long time, the inner layers, and the interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils import anomalies
from eos_utils.eos_stats import bootstrap
from eos_utils.figures import Curve, Panel
from eos_utils.phases import Array, first_crossing, scaled, smooth
from eos_utils.sg_long_run import (
    HELD,
    at_start,
    band_correlation,
    course,
    driven,
    elasticity,
    explained_before,
    inner_correlation,
    layer_change,
    layer_correlation,
    layer_drift,
    level_off,
    long_trend,
    norm_rise_share,
    rise,
    second_order,
    second_order_change,
    series,
)
from eos_utils.sg_panels import Groups, Table, row, written

if TYPE_CHECKING:
    import xarray as xr

Columns = Sequence[tuple[Any, dict[str, Any], bool]]

NETS = {f"{a}, {d} hidden": (a, d) for a in ("linear", "tanh") for d in (2, 3)}
LOSS = 0.2  # at which the interventions are compared; a network that only moves A does not get there


def _slow(values: Array, window: int) -> Array:
    return np.convolve(smooth(values), np.ones(window) / window, mode="valid")


def long_panel(run: xr.Dataset, title: str = "", window: int = 11, legend: str = "none") -> Panel:
    """Running means of Λη/2 and of ‖A‖², both relative to the first crossing, over the step."""
    at, half = first_crossing(run), window // 2
    steps = run["observed"].values[half : run.sizes["observed"] - half]
    norm = series(run, "norm_A2")
    curves = [
        Curve(steps, _slow(scaled(run), window), "Λ · η/2", "line", 0.0),
        Curve(steps, _slow(norm / norm[at or 0], window), "‖A‖²", "line", 0.75),
    ]
    return Panel(curves, "", "step", title, level=1.0, level_label="", marks=[] if at is None else [at], legend=legend)


def window_panel(groups: Groups, part: str = "after", most: int = 201) -> Panel:
    """The correlation of running means of Λ and ‖A‖² against their window, mean over the runs of each network."""
    windows = np.unique(np.round(np.geomspace(1, most, 16)).astype(int) // 2 * 2 + 1)
    curves = []
    for (name, runs), tone in zip(groups.items(), np.linspace(0, 1, max(2, len(groups))), strict=False):
        found = [[anomalies.trend_correlation(run, int(w), part) for run in runs] for w in windows]
        curves.append(Curve(windows, np.mean(found, axis=1), name, "marked", float(tone)))
    return Panel(curves, "correlation", "window, steps", "", "x", 0.0, "", ylim=(-1.05, 1.05), legend="lower left")


def layer_panel(run: xr.Dataset, title: str = "", legend: str = "none") -> Panel:
    """The change of every layer's squared norm since the start, and the second-order part that comes from v1."""
    steps, norms = run["observed"].values, run["layer_norm2"].values.astype(float)
    moved, last = norms - norms[0], norms.shape[1] - 1
    tones = np.linspace(0.3, 1, max(last, 2))
    curves = [Curve(steps, second_order(run), "2nd order", "dotted", None)]  # short: left of the crossing
    curves += [Curve(steps, moved[:, i], f"layer {i + 1}", "line", float(tones[i])) for i in range(last)]
    curves.append(Curve(steps, moved[:, last], "A", "dashed", 0.0))
    at = first_crossing(run)
    return Panel(curves, "change of ‖W‖²", "step", title, marks=[] if at is None else [at], legend=legend)


def held_panel(activation: str, depth: int, title: str = "", legend: str = "none", **settings: Any) -> Panel:
    """Λ over its start against the loss, which falls to the right, for every part that is held."""
    looks: dict[str, tuple[str, float | None]] = {"nothing": ("line", 0.0), "A": ("line", 0.6), "inner": ("line", 1.0)}
    looks |= {"norm of A": ("dashed", 0.6), "norms of inner": ("dotted", None)}
    curves = []
    for held, (kind, tone) in looks.items():
        run = course(activation, depth, held, **settings)
        curves.append(Curve(run.loss, np.log(run.sharpness / run.sharpness[0]), held, kind, tone))
    limits = (float(curves[0].x[0]), 0.0)
    return Panel(curves, "log Λ/Λ(0)", "loss", title, legend=legend, xlim=limits, ylim=(-0.25, 2.4))


def _table(header: Sequence[str], groups: Groups, columns: Columns) -> Table:
    return ["Network", "Runs", *header], [row(name, runs, columns) for name, runs in groups.items()]


def trends(groups: Groups) -> Table:
    """A row for each network: the long trends, and how far the sharpness is from 2/η."""
    named: list[tuple[Any, dict[str, Any], bool]] = [
        (long_trend, {"of": of}, False) for of in ("norm_A2", "sharpness", "inner")
    ]
    header = ["‖A‖², last fifth to first", "Λ", "Inner layers", "Mean of Λη/2, farthest from 1 by"]
    return _table(header, groups, [*named, (level_off, {}, False)])


def motion(groups: Groups) -> Table:
    """A row for each network: how often each turns, and how running means go together."""
    corr = anomalies.trend_correlation
    given = [({"window": 11, "part": "late"}), {"window": 11, "part": "after"}, {"window": 51, "part": "after"}]
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (anomalies.turning_ratio, {"part": part}, False) for part in ("late", "after")
    ]
    header = ["Turns of Λ per turn of ‖A‖², late", "after", "Means over 11, late", "11, after", "51, after"]
    header.append("11 less 101, after")
    return _table(
        header, groups, [*columns, *((corr, arguments, False) for arguments in given), (band_correlation, {}, False)]
    )


def relations(groups: Groups) -> Table:
    """A row for each network: correlations of Λ, at the edge, with the norms of the layers."""
    columns: Columns = [
        (inner_correlation, {}, False),
        (layer_correlation, {"layer": 0}, False),
        (layer_correlation, {"layer": -2}, False),
        (anomalies.level_correlation, {"part": "after"}, False),
        (inner_correlation, {"part": "before"}, False),
    ]
    header = ["Inner layers together", "First layer", "Layer below A", "A", "Inner, before"]
    return _table(header, groups, columns)


def changes(groups: Groups) -> Table:
    """A row for each network: how the squared norms change at the edge, and how far the layers part."""
    columns: Columns = [
        *((layer_change, {"layer": i}, False) for i in (0, -2, -1)),
        (second_order_change, {}, False),
        *((layer_drift, {"part": part}, False) for part in ("before", "after")),
    ]
    header = ["First layer", "Layer below A", "A", "Second order, v₁", "Layers part, before", "after"]
    return _table(header, groups, columns)


def drive(groups: Groups) -> Table:
    """A row for each network: how log Λ goes with log ‖A‖² until the first crossing."""
    columns: Columns = [(f, {}, False) for f in (explained_before, elasticity, norm_rise_share)]
    return _table(["Variance explained", "Elasticity", "Rise of log ‖A‖² for one of log Λ"], groups, columns)


def shares(activation: str, depth: int, seeds: int, loss: float = LOSS, **settings: Any) -> Array:
    """For each seed, the shares of the layers in the rise of log Λ to first order, when the loss is ``loss``."""
    found = [driven(course(activation, depth, seed=100 + i, **settings), loss) for i in range(seeds)]
    return np.array([one / one.sum() for one in found])


def kept(activation: str, depth: int, held: str, seeds: int, loss: float | None = LOSS, **settings: Any) -> Array:
    """For each seed, the rise of log Λ with a part held, over that with nothing held, at one loss or at the end."""
    found = []
    for seed in range(100, 100 + seeds):
        with_it, free = (course(activation, depth, part, seed, **settings) for part in (held, "nothing"))
        found.append(rise(with_it, loss) / rise(free, loss))
    return np.array(found)


def interval(values: Array) -> str:
    """Mean over seeds as a percentage, with its bootstrap interval where there are several."""
    if np.isnan(values).any():
        return "–"
    mean, low, high = (f"{round(100 * x) + 0:d}".replace("-", "−") for x in (float(values.mean()), *bootstrap(values)))
    return f"{mean} %" + (f" [{low}, {high}]" if len(values) > 1 else "")


def interventions(seeds: int, loss: float | None = LOSS, **settings: Any) -> Table:
    """A row for each part that is held: what is left of the rise of log Λ, for each small network."""
    rows = [
        [text, *(interval(kept(*net, held, seeds, loss, **settings)) for net in NETS.values())]
        for held, text in HELD.items()
        if held != "nothing"
    ]
    return ["Held", *NETS], rows


def attribution(seeds: int, **settings: Any) -> Table:
    """A row for each small network: every layer's share in the rise of log Λ; 2/L is A's at a wide random start."""
    rows = []
    for name, (activation, depth) in NETS.items():
        found = shares(activation, depth, seeds, **settings)
        middle = [interval(found[:, i]) for i in range(1, depth)] + ["–"] * (3 - depth)
        rows.append([name, interval(found[:, 0]), *middle, interval(found[:, -1]), f"{200 / (depth + 1):.0f} %"])
    return ["Network", "Layer 1", "Layer 2", "Layer 3", "A", "2/L"], rows


def starts(seeds: int = 60, depths: Sequence[int] = (1, 2, 3)) -> Table:
    """A row for each number of layers: the layers' terms at a random start, their sum, and A's share of it."""
    rows = []
    for depth in depths:
        terms, layers = at_start(depth, seeds), depth + 1
        foretold = [", ".join(str(k) for k in range(layers)), str(layers * (layers - 1) // 2), f"{200 / layers:.0f} %"]
        found = [", ".join(f"{abs(x) if abs(x) < 0.05 else x:.1f}" for x in terms), f"{terms.sum():.1f}"]
        shown = [*found, f"{100 * terms[-1] / terms.sum():.0f} %"]
        rows.append([str(layers), *(f"{a} ({b})" for a, b in zip(shown, foretold, strict=True))])
    return ["L", "Terms of the layers", "Sum", "A's share"], rows


def spread(values: Sequence[Array]) -> str:
    """The least and the largest mean over seeds among the small networks, as percentages."""
    means = sorted(float(100 * x.mean()) for x in values)
    if np.isnan(means).any():
        return "–"
    low, high = f"{means[0]:.0f}", f"{means[-1]:.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def growth(layers: str, activation: str, depth: int, seeds: int, **settings: Any) -> Array:
    """For each seed, by what share the squared norm of A, or of all 'inner' layers, grows along the free descent."""
    found = []
    for seed in range(100, 100 + seeds):
        norms = course(activation, depth, seed=seed, **settings).norms
        ends = norms[[0, -1], -1] if layers == "A" else norms[[0, -1], :-1].sum(axis=1)
        found.append(ends[1] / ends[0] - 1)
    return np.array(found)


def over(groups: Groups, name: str, statistic: Any, **arguments: Any) -> str:
    """One statistic of the recorded runs of a network: mean, and least to most; a dash without any."""
    return written([statistic(run, **arguments) for run in groups.get(name, [])])
