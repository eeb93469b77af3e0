"""The panels and tables of SG's Figure 2: anomaly points, and the interventions that explain them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils import anomalies as an
from eos_utils import phase_stats as stats
from eos_utils import phases
from eos_utils.antiphase import Course, foretold, opposite
from eos_utils.figures import Curve, Panel, experiment_of
from eos_utils.phases import NAMES, Array, Mask
from eos_utils.sg_panels import Groups, Table, row, until, written

if TYPE_CHECKING:
    import xarray as xr


def anomaly_points(run: xr.Dataset) -> Mask:
    """At which observed steps (T,) the increment from there is an anomaly; the last step is none."""
    found = an.signs(run["sharpness"].values, run["norm_A2"].values, run["sharpness_error"].values)
    return np.append(found.determined & (found.sharpness != found.norm), False)


def marked_panel(run: xr.Dataset, title: str, begin: int = 0, end: int | None = None) -> Panel:
    r"""Λη/2 and :math:`\|A\|^2`, over its value at the first crossing, over the step; dots where they part ways."""
    steps, s = run["observed"].values, phases.scaled(run)
    norm = run["norm_A2"].values.astype(float)
    norm = norm / norm[phases.first_crossing(run) or 0]
    inside = (steps >= begin) & (steps <= (steps[-1] if end is None else end))
    at = inside & anomaly_points(run)
    return Panel(
        [
            Curve(steps[inside], norm[inside], "‖A‖²", "line", None),
            Curve(steps[inside], s[inside], "Λ · η/2", "line", 0.0),
            Curve(steps[at], s[at], "anomaly", "points", 1.0),
        ],
        "",
        "step",
        title,
        level=1.0,
        level_label="",
        legend="best",
    )


def close_panels(run: xr.Dataset, begin: int) -> list[Panel]:
    """The same from a step on, in two panels, for the size of the steps of either."""
    shown = marked_panel(run, "", begin)
    norm, sharpness, points = shown.curves
    return [
        Panel([sharpness, replace(points, kind="dots")], sharpness.label, "", level=1.0, level_label="", legend="none"),
        Panel([Curve(norm.x, norm.y, "", "marked", None)], norm.label, "step"),
    ]


def shares(groups: Groups) -> Table:
    """A row for each network: shares of anomalies, what independent signs would give, and Cohen's κ."""
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (an.anomaly_share, {}, True),
        (an.anomaly_share, {"part": "before"}, True),
        (an.anomaly_share, {"part": "after"}, True),
        (an.anomaly_share, {"smoothing": 1}, True),
        (an.expected_share, {"part": "after"}, True),
        (an.agreement, {"part": "after"}, False),
    ]
    header = [
        "Network",
        "Runs",
        "Whole run",
        "Before",
        "After",
        "Smoothed",
        "Independent, after",
        "κ, after",
    ]
    return header, [row(name, runs, columns) for name, runs in groups.items()]


def by_phase(groups: Groups) -> Table:
    """A row for each network: shares of anomalies in each phase."""
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (an.anomaly_share, {"phase": name}, True) for name in NAMES.values()
    ]
    return ["Network", "Runs", *NAMES.values()], [row(name, runs, columns) for name, runs in groups.items()]


# What is changed between two networks: the first, the second. Depths have step sizes of their own.
CHANGES = {
    "linear, 1 → 4 hidden layers": ("linear, 1 hidden", "linear, 4 hidden"),
    "tanh, 1 → 3 hidden layers": ("tanh, 1 hidden", "tanh, 3 hidden"),
    "tanh, 3 hidden layers, η → η / 2": ("tanh, 3 hidden", "tanh, 3 hidden, η / 2"),
    "tanh, 3 hidden layers, 100 → 200 units": ("tanh, 3 hidden", "tanh, 3 hidden, 200 wide"),
    "linear, 2 hidden layers, second data": ("linear, 2 hidden", "linear, 2 hidden, second data"),
}


def dependence(groups: Groups) -> Table:
    """A row for each change: by how much the shares differ in runs with the same seed, in percentage points.

    Of two runs of different length the longer one is cut: the shares depend on how much of a run is at the edge.
    """
    columns: list[tuple[Any, dict[str, Any]]] = [
        (an.anomaly_share, {"part": "before"}),
        (an.anomaly_share, {"part": "after"}),
        (an.anomaly_share, {"phase": "hovering"}),
        (stats.phase_share, {"where": "hovering"}),
    ]
    rows = []
    for name, (one, other) in CHANGES.items():
        first, second = ({experiment_of(run).seed: run for run in groups.get(group, ())} for group in (one, other))
        pairs = [_as_long(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
        if pairs:
            moves = [[100 * (f(b, **given) - f(a, **given)) for a, b in pairs] for f, given in columns]
            rows.append([name, str(len(pairs)), *map(_moved, moves)])
    header = ["Change", "Pairs", "Before", "After", "While hovering", "Steps that hover"]
    return header, rows


def _as_long(one: xr.Dataset, other: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    last = min(int(run["observed"].values[-1]) for run in (one, other))
    return until(one, last), until(other, last)


def _moved(points: Sequence[float]) -> str:
    """Mean, least and most, and how many have the sign of the mean; a dash where none is defined."""
    known = np.array([x for x in points if np.isfinite(x)])
    if not len(known):
        return "–"
    mean = known.mean()
    agree = int((np.sign(known) == np.sign(mean)).sum())
    low, high = round(known.min()), round(known.max())
    text = f"{mean:+.0f}" if low == high else f"{mean:+.0f} ({low:+d} to {high:+d})"
    if low or high:
        text += f", {agree} of {len(known)}"
    return re.sub(r"[+-]0\b", "0", text).replace("-", "−")


def relations(groups: Groups) -> Table:
    """A row for each network: correlations of the levels, anomalies near turns, and the shares after shifts."""
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (an.level_correlation, {"part": "before"}, False),
        (an.level_correlation, {"part": "after"}, False),
        (an.turn_share, {}, True),
        (an.turn_share, {"baseline": True}, True),
        (an.shift_share, {"parity": "even"}, True),
        (an.shift_share, {"parity": "odd"}, True),
    ]
    header = [
        "Network",
        "Runs",
        "Correlation before",
        "after",
        "Anomalies near turns",
        "all steps near turns",
        "Even shifts",
        "Odd shifts",
    ]
    return header, [row(name, runs, columns) for name, runs in groups.items()]


def follows(run: xr.Dataset, name: str, where: str = "hovering") -> float:
    r"""Share of the steps at which a series falls when :math:`\delta\varphi > 0` and rises when it is < 0.

    ``name``: sharpness or norm_A2; δ = Dᵀv₁, φ = Fᵀv₁ at the step before. Of the steps with that label, or 'after' the
    first crossing; those with \|δ\| above its median there.
    """
    delta = run["Dv"].values.astype(float)
    sign = delta * (delta + run["Yv"].values)
    at = phases.first_crossing(run)
    here: Mask = np.arange(len(delta)) >= (len(delta) if at is None else at)
    if where != "after":
        here = phases.labels_of(run) == {label: code for code, label in NAMES.items()}[where]
    kept: Mask = here[:-1] & here[1:]
    if kept.sum() < an.LEAST:
        return float("nan")
    size = np.abs(delta[:-1])
    kept &= size >= np.median(size[kept])
    change: Array = np.diff(run[name].values.astype(float))
    return float((change * sign[:-1] < 0)[kept].mean())


def oscillation(groups: Groups) -> Table:
    """A row for each network: whether Λ and ‖A‖² follow the oscillation, and with which sign."""
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (stats.phase_share, {"where": "hovering"}, True),
        *(
            (follows, {"name": name, "where": where}, True)
            for where in ("after", "hovering")
            for name in ("norm_A2", "sharpness")
        ),
    ]
    header = ["Network", "Runs", "Hovering", "‖A‖², after", "Λ, after", "‖A‖², hovering", "Λ, hovering"]
    return header, [row(name, runs, columns) for name, runs in groups.items()]


# ---- the intervention ----------------------------------------------------------------------------

INTERVENED = {
    "all": "as it is",
    "first": "only the oscillation, δv₁",
    "rest": "only the drift, R",
    "flipped": "the oscillation reversed",
}


def interventions(courses: Mapping[str, tuple[Course, Array | slice]]) -> Table:
    """A row for each part of D that a step keeps: how often Λ and ‖A‖² then move in opposite directions."""
    rows = [
        [text, *(written([opposite(run, kept, where)], percent=True) for run, where in courses.values())]
        for kept, text in INTERVENED.items()
    ]
    rows.append(
        ["χ < 0", *(written([float((run.chi[:-1][at] < 0).mean())], percent=True) for run, at in courses.values())]
    )
    rows.append(
        ["sign of χ says so rightly", *(written([foretold(run, at)], percent=True) for run, at in courses.values())]
    )
    return ["A step takes", *courses], rows


def chi_panels(run: Course, title: str, window: int = 11) -> list[Panel]:
    """Over the steps of a course: the sharpness, χ with its part from products, and how often the two part ways."""
    t, opposed = np.arange(len(run.chi)), run.changes["all"][:, 0] * run.changes["all"][:, 1] < 0
    share = np.convolve(opposed, np.ones(window) / window, mode="valid")
    return [
        Panel([Curve(t, run.sharpness)], "Λ · η/2", "", title, level=1.0, level_label=""),
        Panel([Curve(t, run.product, "from products", "dotted", None), Curve(t, run.chi, "χ")], "χ", "", level=0.0,
              level_label="", legend="upper right"),
        Panel([Curve(t[window // 2 : window // 2 + len(share)], share)], "anomalies", "step", ylim=(-0.05, 1.05)),
    ]  # fmt: skip


def fork_panels(base: Course, fork: Course, begin: int) -> list[Panel]:
    r"""Λη/2 and :math:`\|A\|^2` of a course from a step on, as it is and without the oscillation."""
    rest = []
    for name, label in (("sharpness", "Λ · η/2"), ("norm", "‖A‖²")):
        curves = [
            Curve(np.arange(begin, len(series := getattr(run, name))), series[begin:], text, kind, tone)
            for run, text, kind, tone in ((base, "as it is", "line", 0.0), (fork, "without δv₁", "dashed", 0.8))
        ]
        rest.append(Panel(curves, label, "step", legend="best"))
    return rest
