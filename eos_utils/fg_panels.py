"""The panels of FG's figure pages: what is drawn of recorded runs, for :func:`eos_utils.figures.panels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils.decay_stats import (
    SETTLE,
    after_decay,
    growth_after_decay,
    growth_rate,
    model_fits,
    rate_change,
    residuals,
    undetermined_share,
)
from eos_utils.directions import entries_beside_first, follow, growth_rates_before, rate_spread
from eos_utils.eos_stats import HALF, entry_step, first_rise, initial_sharpness, scaled
from eos_utils.experiment import rational, subscript
from eos_utils.figures import Curve, Panel, experiment_of
from eos_utils.observers import ENTRY_WINDOW
from eos_utils.page import number, on_record
from eos_utils.size_stats import entry_or_never, mean_rate, size, steepest_rate

if TYPE_CHECKING:
    import xarray as xr


def _tones(count: int) -> np.ndarray:
    return np.linspace(0, 1, max(2, count))[:count]


def scaled_panel(
    run: xr.Dataset,
    title: str,
    k: int = 5,
    begin: float = 0,
    end: float = np.inf,
    xlabel: str = "step",
    legend: str = "lower right",
) -> Panel:
    """λ1 to λk times η/2 over the step, with the edge; the entry of λ1 is marked, except where a direction is held."""
    steps, k = run["measured"].values, min(k, run.sizes["eig"])
    inside = (steps >= begin) & (steps <= end)
    values = scaled(run)[inside]
    curves = [
        Curve(steps[inside], values[:, i], f"λ{subscript(i + 1)}" if i in (0, k - 1) else "", "line", tone)
        for i, tone in reversed(list(enumerate(_tones(k))))
    ]
    enters = entry_step(run)
    marks = [enters] if begin <= enters <= end and experiment_of(run).project is None else []
    return Panel(curves, "λᵢ · η/2", xlabel, title, level=1.0, level_label="", marks=marks, legend=legend)


def followed_panel(run: xr.Dataset, title: str, count: int = 5, begin: float | None = None) -> Panel:
    """Curvatures along followed directions, times η/2, over the step."""
    found = follow(run, count, begin)
    curves = [
        Curve(found.step, found.curvature[:, i], f"direction {i + 1}" if i in (0, count - 1) else "", "line", tone)
        for i, tone in reversed(list(enumerate(_tones(count))))
    ]
    return Panel(curves, "uᵀHu · η/2", "step", title, level=1.0, level_label="", legend="lower right")


def decays(base: xr.Dataset | None, runs: Mapping[str, xr.Dataset]) -> list[Panel]:
    """Two panels: λ1 in units of the edge before the decay, and the loss; ``base``, without a decay, faintly behind."""
    above: list[Curve] = []
    below: list[Curve] = []
    marks: list[float] = []
    window = (
        min(int(r.attrs["decayed_at"]) for r in runs.values()) - 700,
        max(int(r["step"][-1]) for r in runs.values()),
    )
    if base is not None:
        level = scaled(base)[:, 0]
        for x, y, where in ((base["measured"].values, level, above), (base["step"].values, base["loss"].values, below)):
            inside = (x >= window[0]) & (x <= window[1])
            where.append(Curve(x[inside], y[inside], "no decay" if where is above else "", "line", None))
    for (label, run), tone in zip(runs.items(), _tones(len(runs)), strict=True):
        at = int(run.attrs["decayed_at"])
        scale = float(rational(experiment_of(run).eta)) / 2
        steps, loss = run["measured"].values, run["step"].values
        inside, late = steps >= window[0], loss >= window[0]
        above.append(Curve(steps[inside], run["eigenvalue"].values[inside, 0] * scale, label, "line", float(tone)))
        below.append(Curve(loss[late], run["loss"].values[late], "", "line", float(tone)))
        marks += [at] if at >= 0 else []
    legend: dict[str, Any] = {"legend": "lower right", "legend_columns": 2 if len(above) > 2 else 1}
    return [
        Panel(above, "λ₁ · η/2", "", level=1.0, level_label="old 2/η", marks=marks, **legend),
        Panel(below, "training loss", "step", marks=marks),
    ]


def growth(groups: Mapping[str, Sequence[xr.Dataset]], ylabel: str = "growth of λ₁ · η/2") -> Panel:
    """λ1·η/2 since the decay, less its value three measurements after it, one tone a group."""
    curves = []
    for (label, runs), tone in zip(groups.items(), _tones(len(groups)), strict=True):
        for i, run in enumerate(runs):
            steps, values = (x[SETTLE:] for x in after_decay(run))
            curves.append(Curve(steps, values - values[0], label if i == 0 else "", "line", float(tone)))
    return Panel(curves, ylabel, "steps since the decay", legend="upper left")


def misfits(run: xr.Dataset, title: str) -> Panel:
    """λ1·η/2 after the decay less the best line, logarithm and exponential approach, in thousandths."""
    steps, values = (x[SETTLE:] for x in after_decay(run))
    curves = []
    looks = {"line": ("dotted", None), "logarithm": ("line", 0.0), "approach": ("dashed", 0.7)}
    for name, fit in model_fits(steps, values).items():
        kind, tone = looks[name]
        curves.append(Curve(steps, 1000 * (values - fit), name, kind, tone))
    return Panel(curves, "measured − fitted, 10⁻³", "steps since the decay", title)


def roughness_panel(run: xr.Dataset, title: str, k: int) -> Panel:
    """The running median over 21 measurements of the absolute second difference of each of λ1 to λk."""
    k = min(k, run.sizes["eig"])
    rough = np.abs(np.diff(scaled(run)[:, :k], n=2, axis=0))
    medians = np.median(np.lib.stride_tricks.sliding_window_view(rough, ENTRY_WINDOW, axis=0), axis=-1)
    steps = run["measured"].values[1 + HALF : 1 + HALF + len(medians)]
    curves = [
        Curve(steps, medians[:, i], f"λ{subscript(i + 1)}" if i in (0, k - 1) else "", "line", tone)
        for i, tone in reversed(list(enumerate(_tones(k))))
    ]
    enters = entry_step(run)
    return Panel(curves, "roughness", "step", title, log="y", marks=[] if np.isnan(enters) else [enters])


def sharpness_by(runs: Mapping[str, xr.Dataset], own: xr.Dataset | None = None) -> Panel:
    """λ1·η/2 of several runs over the step, one tone each; ``own``, a run beside them, dashed."""
    shown = [(label, run, "line", tone) for (label, run), tone in zip(runs.items(), _tones(len(runs)), strict=True)]
    if own is not None:
        shown.append(("this run", own, "dashed", None))
    curves = [Curve(run["measured"].values, scaled(run)[:, 0], label, kind, tone) for label, run, kind, tone in shown]
    ends = [min(entry_or_never(run) + 800, float(run["measured"].values[-1])) for _, run, *_ in shown]
    return Panel(curves, "λ₁ · η/2", "step", level=1.0, level_label="", legend="lower right", xlim=(0, max(ends)))


def against_size(
    runs: Sequence[xr.Dataset],
    axis: str,
    value: Callable[[xr.Dataset], float],
    ylabel: str,
    title: str,
    last: bool = True,
) -> Panel:
    """A number of each run against its width or depth: the runs, and the median at each size. Infinite ones are out.

    ``last``: the panel is the lowest of those that share its axis, names it, and has the legend of all.
    """
    points = sorted((size(run, axis), value(run)) for run in runs)
    points = [point for point in points if np.isfinite(point[1])]
    sizes = sorted({x for x, _ in points})
    medians = [float(np.median([y for x, y in points if x == at])) for at in sizes]
    curves = [
        Curve([x for x, _ in points], [y for _, y in points], "runs", "points", None),
        Curve(sizes, medians, "median", "marked", 0.0),
    ]
    looks: dict[str, Any] = {"log": "x" if axis == "width" else "", "xticks": sizes}
    looks["legend"] = "best" if last else "none"
    return Panel(curves, ylabel, axis if last else "", title, **looks)


Table = tuple[list[str], list[list[str]]]


def rates(followed: Mapping[str, xr.Dataset], count: int = 5, window: int = 24) -> Table:
    """A row for each run: the rates at which its followed curvatures grow before λ1 enters, per 100 steps."""
    rows = []
    for run in followed.values():
        slopes = growth_rates_before(run, count, window) * 100 / int(run.attrs["stride"])
        rows.append(
            [str(experiment_of(run).seed), *(f"{s:.3f}" for s in slopes), f"{rate_spread(run, count, window):.2f}"]
        )
    return ["Seed", *(f"direction {i + 1}" for i in range(count)), "(largest − least) / mean"], rows


def entries_held(seeds: Sequence[int]) -> Table:
    """A row for each eigenvalue that waits when a direction is held: its entry without and with that."""
    rows = []
    for seed in seeds:
        base, held = (on_record(f"fg_fig2_{name}_seed{seed}") for name in ("directions", "held"))
        if base is None or held is None:
            continue
        entries, begin = entries_beside_first(base, held), int(held["step"].values[0])
        established = begin - HALF * int(base.attrs["stride"])
        waiting = [i for i, e in enumerate(entries.T) if not np.isnan(e).all() and np.nanmin(e) > established]
        for i in waiting[:3]:
            shown = ["never" if np.isnan(e) else f"{e:,.0f}" for e in entries[:, i]]
            rows.append([str(seed), f"λ{subscript(i + 2)}", f"{begin:,}", *shown])
    return ["Seed", "Eigenvalue", "Held from", "Enters, nothing held", "Enters, first direction held"], rows


def sizes(groups: Mapping[int, Sequence[xr.Dataset]], axis: str) -> Table:
    """A row for each width or depth: runs, start of λ1·η/2, step of entry, mean and steepest growth (medians)."""
    rows = []
    for at, runs in groups.items():
        entries = [entry_or_never(run) for run in runs]
        middle = float(np.median(entries))
        rows.append(
            [
                str(at),
                str(len(runs)),
                f"{np.median([initial_sharpness(run) for run in runs]):.2f}",
                _step(middle),
                "–" if np.isinf(entries).all() else f"{min(entries):,.0f} to " + _step(max(entries)),
                number(100 * float(np.median([mean_rate(run) for run in runs]))),
                number(100 * float(np.median([steepest_rate(run) for run in runs]))),
            ]
        )
    header = [axis.capitalize(), "Runs", "Start", "Entry, median", "Entry, range", "Mean growth", "Steepest growth"]
    return header, rows


def _step(at: float) -> str:
    return f"{at:,.0f}" if np.isfinite(at) else "never"


def growth_rates(groups: Mapping[str, Sequence[xr.Dataset]]) -> Table:
    """A row for each group: growth rates after the decay in units of the old edge per 100 steps, each seed and mean.

    Last, the largest share of changes over 75 steps that are too small for the error of an eigenvalue.
    """
    rows = []
    for label, runs in groups.items():
        rates = [100 * growth_rate(run) for run in runs]
        change, open_ = np.mean([rate_change(run) for run in runs]), max(undetermined_share(run) for run in runs)
        rows.append([label, *(f"{r:.4f}" for r in rates), f"{np.mean(rates):.4f}", f"{change:.2f}", f"{open_:.0%}"])
    seeds = [f"seed {experiment_of(run).seed}" for run in next(iter(groups.values()))]
    return ["Decay", *seeds, "mean", "second half / first half", "undetermined"], rows


def pace_after_crossing(run: xr.Dataset, horizon: int) -> np.ndarray:
    """What each eigenvalue below λ1 gains in ``horizon`` measurements after λ1 crosses the edge, over that before."""
    levels = scaled(run)
    at = int((levels[:, 0] > 1).argmax())
    before, after = levels[at] - levels[max(0, at - horizon)], levels[at + horizon] - levels[at]
    return (after / before)[1:]


def crossings(runs: Sequence[xr.Dataset], eig: int) -> Table:
    """A row for each run: when λ1 crosses the edge and the loss first rises, and the widest gap at the end."""
    rows = []
    for run in runs:
        levels = scaled(run)
        over = levels[:, 0] > 1
        crossed = f"{run['measured'].values[over.argmax()]:,}" if over.any() else "never"
        entered = sum(not np.isnan(entry_step(run, i + 1)) for i in range(eig))
        end = np.sort(levels[-21:, :eig].mean(axis=0))[::-1]
        gap = int((end[:-1] - end[1:]).argmax())
        row = [str(experiment_of(run).seed), crossed, _step(first_rise(run)), f"{levels[:, 0].max():.2f}", f"{entered}"]
        rows.append([*row, f"{gap + 1}", f"{end[gap]:.2f}", f"{end[gap + 1]:.2f}"])
    header = ["Seed", "λ₁ crosses", "loss rises", "λ₁ at most", "entered", "over the gap", "last over", "first under"]
    return header, rows


def shapes(runs: Mapping[str, xr.Dataset]) -> Table:
    """A row for each run with a decay: growth after it, and residual sums of squares over that of the best shape."""
    rows = []
    for name, run in runs.items():
        rest = residuals(run)
        best = min(rest.values())
        row = [name, f"{int(run.attrs['decayed_at']):,}", f"{100 * growth_after_decay(run):.1f} %"]
        rows.append([*row, *(f"{r / best:.2f}" for r in rest.values())])
    return ["Setting", "Decay at", "Growth", "line", "logarithm", "approach"], rows
