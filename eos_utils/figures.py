"""The one visual style: colour-blind safe, readable in light and dark and on a phone; 2/η is always the same line.

:func:`show` draws a figure twice, for the light and the dark page, and displays both; the book's theme shows the one
that fits, plain Jupyter the light one.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn
from cycler import cycler
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image

from eos_utils import downloads
from eos_utils.eos_stats import HALF, entry_step
from eos_utils.experiment import Experiment, as_two_over, rational, subscript

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eos_utils.behind import Behind
    from eos_utils.bench_results import AgainstDense, Outside

THEMES = {
    "light": {"ink": "#24292f", "grid": "#d8dee4", "muted": "#6e7781"},
    "dark": {"ink": "#d7dde3", "grid": "#3a424b", "muted": "#9aa4ae"},
}


def style(theme: str) -> Any:
    """Matplotlib settings for 'light' or 'dark'; the background is transparent."""
    tone = THEMES[theme]
    palette = seaborn.color_palette("colorblind") if theme == "light" else seaborn.color_palette("pastel")
    return {
        "figure.figsize": (5.6, 5.4),
        "figure.dpi": 160,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.prop_cycle": cycler(color=palette),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": tone["grid"],
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "lines.linewidth": 1.3,
        "mathtext.default": "regular",
        **{
            name: tone["ink"]
            for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        },
    }


def show(draw: Callable[..., Figure], *arguments: Any, alt: str, **options: Any) -> Any:
    """Draws the figure in both themes and returns what Jupyter displays; ``alt`` describes it to who cannot see it."""
    if len(alt.split()) < 8:
        raise ValueError(f"alt={alt!r}: describe what the figure shows in a sentence")
    tags, taken = [], {}
    for theme in THEMES:
        with plt.rc_context(style(theme)):
            figure = draw(*arguments, **options)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            size = figure.get_size_inches() * 100
            if theme == "light":
                taken = {"svg": _svg(figure), "csv": downloads.as_csv(figure)}
            plt.close(figure)
        data = base64.b64encode(_lighter(buffer)).decode()
        hidden = "" if theme == "light" else "display:none;"
        tags.append(
            f'<img class="eos-figure only-{theme}" alt="{html.escape(alt)}" width="{size[0]:.0f}" '
            f'height="{size[1]:.0f}" style="{hidden}max-width:100%;height:auto" src="data:image/png;base64,{data}">'
        )
    return Shown("\n".join(tags), taken)


class Shown:
    """A figure in both themes, as Jupyter displays it; its SVG and CSV go along for the book."""

    def __init__(self, text: str, taken: dict[str, str]) -> None:
        self.data, self.taken = text, taken

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/html": self.data, downloads.MIME: self.taken}


def _lighter(png: io.BytesIO) -> bytes:
    """The picture with 256 colours, which the eye does not tell from the original: a third of the bytes."""
    out = io.BytesIO()
    picture = Image.open(png).quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(out, "png", optimize=True)
    return out.getvalue()


def _svg(figure: Figure) -> str:
    """The figure as SVG, the same for the same figure: no date, and ids without chance."""
    out = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "eos", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def muted() -> str:
    """The colour of what is context, not data, in the current theme: lighter than the strongest curve."""
    return THEMES["dark" if matplotlib.rcParams["text.color"] == THEMES["dark"]["ink"] else "light"]["muted"]


def edge(axis: Axes, level: float, label: str = "2/η") -> None:
    """The dashed line at 2/η."""
    axis.axhline(level, color=muted(), linestyle=(0, (5, 3)), linewidth=1.2, label=label, zorder=5)


def shades(count: int) -> list[Any]:
    """Colours for λ1, λ2, ..., from strong to faint, in the current theme."""
    dark = matplotlib.rcParams["text.color"] == THEMES["dark"]["ink"]
    return list(matplotlib.colormaps["viridis"](np.linspace(*((0.98, 0.45) if dark else (0.0, 0.72)), count)))


@dataclass(frozen=True)
class Curve:
    """Of a panel. ``kind``: 'line', 'dashed', 'dotted', 'points', 'dots' (larger), 'marked' (line and dots), 'band' (y
    has two rows).

    ``tone``: 0 strong to 1 faint among the shades of the page, None for the colour of what is context.
    """

    x: Any
    y: Any
    label: str = ""
    kind: str = "line"
    tone: float | None = 0.0


@dataclass(frozen=True)
class Panel:
    """Axes with curves. ``log``: 'x', 'y', 'xy' or ''; ``level``: the dashed line of 2/η; ``marks``: vertical lines.

    ``spans``: stretches (begin, end, name) of the x axis that are shaded; SG's phases have their own colours.
    ``xticks``: the only places of the x axis that carry a number, for axes with few values.
    """

    curves: Sequence[Curve]
    ylabel: str
    xlabel: str = ""
    title: str = ""
    log: str = ""
    level: float | None = None
    level_label: str = "2/η"
    marks: Sequence[float] = ()
    ylim: tuple[float | None, float | None] | None = None
    xlim: tuple[float | None, float | None] | None = None
    legend: str = "best"
    legend_columns: int = 1
    spans: Sequence[tuple[float, float, str]] = ()
    xticks: Sequence[float] = ()


# Of Okabe and Ito's colours, in such strength that the colour-blind can tell phases that meet apart, on light and dark
# pages alike (tests/test_figures.py): colour, opacity.
SPANS = {
    "I": ("#56B4E9", 0.3),
    "II": ("#E69F00", 0.3),
    "III": ("#D55E00", 0.6),
    "IV": ("#009E73", 0.3),
    "hovering": ("#F0E442", 0.5),
}


def _shade(axis: Axes, spans: Sequence[tuple[float, float, str]]) -> None:
    """Shades the stretches behind the curves; each name is in the legend once, in the order of ``SPANS``."""
    names = [*SPANS, *dict.fromkeys(name for *_, name in spans if name not in SPANS)]
    for name in names:
        colour, opacity = SPANS.get(name, (muted(), 0.3))
        found = [(begin, end) for begin, end, other in spans if other == name]
        for i, (begin, end) in enumerate(found):
            axis.axvspan(
                begin,
                end,
                facecolor=colour,
                alpha=opacity,
                linewidth=0,
                zorder=0,
                label=name if i == 0 else None,
            )


KINDS: dict[str, dict[str, Any]] = {
    "line": {"linestyle": "-"},
    "dashed": {"linestyle": (0, (4, 2)), "linewidth": 1.1},
    "dotted": {"linestyle": (0, (1, 1.6)), "linewidth": 1.4},
    "points": {"linestyle": "none", "marker": ".", "markersize": 3},
    "dots": {"linestyle": "none", "marker": "o", "markersize": 3.5},
    "marked": {"linestyle": "-", "marker": "o", "markersize": 3.5},
}


def typeset(label: str) -> str:
    """Letters below the line that no font has as characters: an underscore before a single letter, as mathematics.

    >>> typeset("λmax(M_A) / λmax(M)"), typeset("B_Λ"), typeset("λ₁(M)"), typeset("sg_tanh4")
    ('λmax($M_A$) / λmax(M)', '$B_Λ$', 'λ₁(M)', 'sg_tanh4')
    """
    return re.sub(r"\b(\w)_([A-Za-zΛ])\b", r"$\1_\2$", label)


def _draw(axis: Axes, curve: Curve) -> None:
    colour = muted() if curve.tone is None else shades(101)[round(100 * curve.tone)]
    label = typeset(curve.label) or None
    if curve.kind == "band":
        axis.fill_between(curve.x, *curve.y, color=colour, alpha=0.2, linewidth=0, label=label)
    else:
        axis.plot(curve.x, curve.y, color=colour, label=label, **KINDS[curve.kind])


def panels(*shown: Panel, columns: int = 1, height: float = 2.5, sharex: bool = False) -> Figure:
    """Panels in rows of ``columns``, each ``height`` inches tall: the figure of every page without one of its own."""
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.6, height * rows + 0.2), sharex=sharex or False, squeeze=False
    )
    for axis, panel in zip(axes.flat, shown, strict=False):
        _shade(axis, panel.spans)
        for curve in panel.curves:
            _draw(axis, curve)
        if panel.level is not None:
            edge(axis, panel.level, panel.level_label)
        for step in panel.marks:
            axis.axvline(step, color=muted(), linewidth=0.8, linestyle=":")
        axis.set(ylabel=typeset(panel.ylabel), xlabel=typeset(panel.xlabel))
        if panel.title:
            axis.set_title(panel.title, fontsize=10)
        for which in panel.log:
            (axis.set_xscale if which == "x" else axis.set_yscale)("log")
        if panel.xticks:
            axis.set_xticks(panel.xticks, [f"{x:g}" for x in panel.xticks])
            axis.xaxis.set_minor_locator(NullLocator())
        for limit, set_limit in ((panel.ylim, axis.set_ylim), (panel.xlim, axis.set_xlim)):
            if limit is not None:
                set_limit(*limit)
        if "y" in panel.log:
            _plain_decades(axis)
        if columns > 1:
            axis.tick_params(labelsize=9)
            if "x" not in panel.log:
                axis.locator_params(axis="x", nbins=4)
        if axis.get_legend_handles_labels()[0] and panel.legend != "none":
            axis.legend(
                loc=panel.legend, ncols=panel.legend_columns, handlelength=1.6, fontsize=9 if columns > 1 else 10
            )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    if columns > 1:
        _share_legend(figure)
    return figure


def _plain_decades(axis: Axes) -> None:
    """Labels 0.2, 0.5, 1, 2 on a short logarithmic y axis, in place of 2 × 10⁻¹ and so on."""
    low, high = axis.get_ylim()
    if high < 50 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 2, 3, 4, 6, 8)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def _share_legend(figure: Figure) -> None:
    """One legend above the panels, where all that have one have the same."""
    own = {axis: legend for axis in figure.axes if (legend := axis.get_legend())}
    named = {tuple(axis.get_legend_handles_labels()[1]) for axis in own}
    if len(own) < 2 or len(named) > 1:
        return
    handles, labels = next(iter(own)).get_legend_handles_labels()
    for legend in own.values():
        legend.remove()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), handlelength=1.6, fontsize=9)


def _mark_entry(axis: Axes, run: xr.Dataset) -> None:
    step = entry_step(run)
    if not np.isnan(step):
        axis.axvline(step, color=muted(), linewidth=0.8, linestyle=":")
        beside: dict[str, Any] = {"xytext": (-4, -3), "textcoords": "offset points", "ha": "right", "va": "top"}
        axis.annotate("λ₁ enters", (step, 1), xycoords=("data", "axes fraction"), fontsize=9, **beside)


def sharpness_and_loss(run: xr.Dataset, k: int = 5, behind: Behind | None = None) -> Figure:
    """Two panels over the step: the top k eigenvalues with 2/η and their bounds, and the loss.

    ``behind``: the run on record, for comparison.
    """
    k = min(k, run.sizes["eig"])
    figure, (above, below) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    threshold = 2 / run["eta"].values[0]
    step = run["measured"].values
    if behind is not None:
        for curve in behind.curves(lambda r: (r["measured"].values, r["eigenvalue"].values[:, 0]), "λ₁"):
            _draw(above, curve)
        for curve in behind.curves(lambda r: (r["step"].values, r["loss"].values)):
            _draw(below, curve)
    for i, colour in reversed(list(enumerate(shades(k)))):
        low, high = run["eigenvalue"].values[:, i], run["upper"].values[:, i]
        finite = np.isfinite(high)
        above.fill_between(step[finite], low[finite], high[finite], color=colour, alpha=0.25, linewidth=0)
        named = k <= 6 or i == 0 or (i + 1) % 5 == 0
        above.plot(
            step,
            low,
            color=colour,
            linewidth=1.5 if i == 0 else 1.0,
            label=f"λ{subscript(i + 1)}" if named else None,
            gid=f"λ{subscript(i + 1)}",
        )
    edge(above, threshold)
    _mark_entry(above, run)
    above.set(ylabel="eigenvalue of the Hessian", ylim=(0, None))
    handles, labels = above.get_legend_handles_labels()
    above.legend(handles[::-1], labels[::-1], ncols=2, loc="lower right", handlelength=1.4, columnspacing=1.0)
    below.semilogy(run["step"], run["loss"], color=shades(k)[0])
    below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    below.yaxis.set_minor_formatter(NullFormatter())
    _mark_entry(below, run)
    below.set(xlabel="gradient descent step", ylabel="training loss")
    return figure


def edge_closeup(run: xr.Dataset, k: int = 5, measurements: int = 120) -> Figure:
    """λ_i·η/2 around λ1's entry, and the loss step by step: what hovering and oscillating look like."""
    k = min(k, run.sizes["eig"])
    figure, (above, below) = plt.subplots(2, 1, sharex=True)
    enters = entry_step(run)
    measured = run["measured"].values
    stride = int(run.attrs["stride"])
    middle = enters if not np.isnan(enters) else measured[-1]
    window = (measured >= middle - measurements // 3 * stride) & (measured <= middle + measurements * stride)
    for i, colour in reversed(list(enumerate(shades(k)))):
        values = run["eigenvalue"].values[window, i] * run["eta"].values[0] / 2
        name = f"λ{subscript(i + 1)}"
        above.plot(measured[window], values, ".-", color=colour, markersize=2.5, linewidth=0.8, label=name)
    edge(above, 1.0)
    _mark_entry(above, run)
    above.set(ylabel="λᵢ · η/2")
    handles, labels = above.get_legend_handles_labels()
    above.legend(handles[::-1], labels[::-1], ncols=2, loc="lower right", handlelength=1.4, columnspacing=1.0)
    steps = run["step"].values
    inside = (steps >= measured[window][0]) & (steps <= measured[window][-1])
    below.plot(steps[inside], run["loss"].values[inside], color=shades(k)[0], linewidth=0.8)
    _mark_entry(below, run)
    below.set(xlabel="gradient descent step", ylabel="training loss")
    return figure


def seeds(runs: Sequence[xr.Dataset], forks: Sequence[xr.Dataset] = ()) -> Figure:
    """λ1·η/2 of several runs from their own entry on (left of 0: before); below, the first one with its forks."""
    rows = 2 if forks else 1
    figure, axes = plt.subplots(rows, 1, figsize=(5.6, 2.2 * rows + 1.0), squeeze=False)
    axis, last = axes[0, 0], axes[-1, 0]
    for i, fork in enumerate(forks):
        at = float(fork["measured"][0]) - HALF * fork.attrs["stride"]  # it starts where the window of entry ends
        level = fork["eigenvalue"][:, 0] * fork["eta"][0] / 2
        last.plot(fork["measured"] - at, level, color=muted(), linewidth=0.8, label="its forks" if i == 0 else None)
    for i, (run, colour) in enumerate(zip(runs, shades(max(2, len(runs))), strict=False)):
        enters = entry_step(run)
        if np.isnan(enters):
            continue
        seed = Experiment.from_dict(_fields(run)).seed
        values = run["eigenvalue"][:, 0] * run["eta"].values[0] / 2
        for shown in (axis, last) if i == 0 and forks else (axis,):
            shown.plot(run["measured"] - enters, values, color=colour, linewidth=1.0, label=f"seed {seed}")
    for shown in axes.flat:
        edge(shown, 1.0)
        shown.set(ylabel="λ₁ · η/2")
        if shown.get_legend_handles_labels()[0]:
            shown.legend(loc="lower right", ncols=2 if shown is axis else 3)
    axis.set(xlim=(-2000, 1000))
    last.set(xlabel="steps since λ₁ entered")
    if forks:
        last.set(xlim=(-100, 1000), ylim=(0.9, None))
    return figure


def small_multiples(runs: dict[str, xr.Dataset]) -> Figure:
    """λ1·η/2 (and λ5) of runs in other readings or with other step sizes, one small panel each."""
    rows = (len(runs) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(5.6, 1.9 * rows + 0.3), sharey=True, squeeze=False)
    colours = shades(5)
    for axis, (title, run) in zip(axes.flat, runs.items(), strict=False):
        scale, last = run["eta"].values[0] / 2, min(5, run.sizes["eig"]) - 1
        axis.plot(run["measured"], run["eigenvalue"][:, last] * scale, color=colours[4], linewidth=1.0, label="λ₅")
        axis.plot(run["measured"], run["eigenvalue"][:, 0] * scale, color=colours[0], linewidth=1.2, label="λ₁")
        edge(axis, 1.0)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=9)
        axis.locator_params(axis="x", nbins=4)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("λᵢ · η/2")
    for axis in axes.flat[max(0, len(runs) - 2) : len(runs)]:
        axis.set_xlabel("step")
    axes.flat[0].legend(loc="lower right", fontsize=9)
    return figure


def _fields(run: xr.Dataset) -> dict[str, Any]:
    import json

    return {k: v for k, v in json.loads(run.attrs["experiment"]).items() if k != "schema"}


def experiment_of(run: xr.Dataset) -> Experiment:
    """The experiment a trajectory is of."""
    return Experiment.from_dict(_fields(run))


def title_of(run: xr.Dataset) -> str:
    """A short name: the step size as the papers write it."""
    return f"η = {as_two_over(rational(experiment_of(run).eta))}"


def outside_of_axes(plane: Outside) -> Figure:
    """Norm of each eigenvector outside of the leading input directions, against their number."""
    figure, axis = plt.subplots(figsize=(5.6, 3.2))
    for i, (part, colour) in enumerate(zip(plane.part, shades(max(2, len(plane.part))), strict=False)):
        axis.loglog(plane.axes, part, ".-", color=colour, label=f"v{subscript(i + 1)}")
    if 128 in plane.axes:
        axis.axvline(128, color=muted(), linewidth=0.8, linestyle=":")
    axis.set(xlabel="principal directions of the inputs, r", ylabel="part outside of their span")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.legend(ncols=2)
    return figure


def bounds_against_dense(exact: AgainstDense) -> Figure:
    """Distance of the lower and the upper bound from each true eigenvalue, relative to λ1."""
    figure, axis = plt.subplots(figsize=(5.6, 3.0))
    number = np.arange(1, len(exact.true) + 1)
    floor = 1e-9
    low = np.maximum((exact.true - exact.pairs.values).numpy() / float(exact.true[0]), floor)
    high = np.maximum((exact.pairs.upper - exact.true).numpy() / float(exact.true[0]), floor)
    first, second = shades(2)
    axis.semilogy(number - 0.06, low, "v", color=first, label="λᵢ − θᵢ, lower bound")
    axis.semilogy(number + 0.06, high, "^", color=second, label="upper bound − λᵢ")
    axis.axhline(exact.tol, color=muted(), linestyle=(0, (5, 3)), linewidth=1.0)
    axis.set(xlabel="i", ylabel="distance / λ₁", xticks=number, ylim=(floor / 3, 1e-2))
    axis.legend(loc="center right")
    return figure


def growth(sweeps: dict[str, Any]) -> Figure:
    """Seconds against each size, doubled while the others stay, with the fitted exponents."""
    figure, axes = plt.subplots((len(sweeps) + 1) // 2, 2, figsize=(5.6, 7.2))
    colours = dict(zip(("product", "bare", "evaluation"), (*shades(2), muted()), strict=True))
    for axis, (name, sweep) in zip(axes.flat, sweeps.items(), strict=False):
        sizes = [row[name] for row in sweep["rows"]]
        for what, colour in colours.items():
            if what in {"k": ("product", "bare"), "directions": ("evaluation",)}.get(name, ()):
                continue  # it does not depend on that
            slope = sweep["exponents"][f"{what} in {name}"]
            style = {"product": "o-", "bare": "--", "evaluation": "s-"}[what]
            seconds = [row[what] for row in sweep["rows"]]
            label = f"{what} {slope:.2f}".replace("-", "−")
            axis.loglog(sizes, seconds, style, color=colour, markersize=3.5, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=8)
        axis.set_ylim(top=axis.get_ylim()[1] * 8)
        axis.legend(loc="upper left", fontsize=8)
    for axis in axes.flat[len(sweeps) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds")
    return figure
