"""The panels and tables of SG's Figure 1, for :func:`eos_utils.figures.panels` and ``page.table``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils import phase_stats as stats
from eos_utils import phases
from eos_utils.catalogue import catalogue
from eos_utils.figures import Curve, Panel
from eos_utils.phases import NAMES
from eos_utils.store import Store

if TYPE_CHECKING:
    import xarray as xr

    from eos_utils.behind import Behind

Table = tuple[list[str], list[list[str]]]
Groups = Mapping[str, Sequence["xr.Dataset"]]
SEEDS = tuple(range(100, 105))

# Name in the catalogue: what a table calls it.
NETWORKS = {
    "lin2": "linear, 1 hidden",
    "lin3": "linear, 2 hidden",
    "lin3_vehicles": "linear, 2 hidden, second data",
    "lin5": "linear, 4 hidden",
    "tanh2": "tanh, 1 hidden",
    "tanh4": "tanh, 3 hidden",
    "tanh4_half": "tanh, 3 hidden, η / 2",
    "tanh4_wide": "tanh, 3 hidden, 200 wide",
    "elu4": "ELU, 3 hidden",
    "relu4": "ReLU, 3 hidden",
    "resnet": "residual, ReLU",
}


def until(run: xr.Dataset, last: int) -> xr.Dataset:
    """What was seen of a run up to a step, that one included."""
    times = [name for name in ("step", "measured", "observed", "spectral") if name in run.coords]
    return run.sel({name: slice(None, last) for name in times})


def networks(*kinds: str, seeds: Sequence[int] = SEEDS) -> dict[str, list[xr.Dataset]]:
    """The recorded runs of each network, by what a table calls it; networks without any are left out."""
    entries, store, found = catalogue(), Store(), {}
    for kind in kinds:
        named = [entries[name] for seed in seeds if (name := f"sg_{kind}_seed{seed}") in entries]
        usable = [e for e in named if e.status(store).state not in ("pending", "missing")]
        if usable:
            found[NETWORKS[kind]] = [store.load(e.experiment.key) for e in usable]
    return found


def written(values: Sequence[float], digits: int = 2, percent: bool = False) -> str:
    """Mean over runs, and least to most where there are several that differ; a dash where none is defined."""
    known = [v for v in values if not np.isnan(v)]
    if not known:
        return "–"

    def one(value: float) -> str:
        if np.isinf(value):
            return "never"
        text = f"{100 * value:.{digits}g}" if percent else f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"
        return text if "e" not in text else f"{100 * value:.0f}" if percent else f"{value:.0f}"

    low, high = one(min(known)), one(max(known))
    mean = one(float(np.mean(known)))
    unit = " %" if percent else ""
    text = f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"
    return text.replace("-", "−")  # no hyphen, at which a line could break


def row(name: str, runs: Sequence[xr.Dataset], columns: Sequence[tuple[Any, dict[str, Any], bool]]) -> list[str]:
    """Name, number of runs, and a cell for each statistic, its arguments, and whether it is a share."""
    cells = [written([f(run, **given) for run in runs], percent=share) for f, given, share in columns]
    return [name, str(len(runs)), *cells]


# ---- Figure 1 ------------------------------------------------------------------------------------


def spans(run: xr.Dataset, begin: int = 0, end: int | None = None, **rules: Any) -> list[tuple[float, float, str]]:
    """The phases of a run as stretches of the x axis, cut to steps ``begin`` to ``end``."""
    last = int(run["observed"].values[-1]) if end is None else end
    cut = (
        (max(x.begin - 0.5, begin), min(x.end - 0.5, last), x.label)
        for x in phases.segments(phases.labels_of(run, **rules))
    )
    return [(a, b, NAMES[label]) for a, b, label in cut if a < b]


def phase_panels(
    run: xr.Dataset, title: str = "", begin: int = 0, end: int | None = None, behind: Behind | None = None
) -> list[Panel]:
    """The sharpness in units of 2/η, and the loss, over the step, phases shaded; ``behind``: what is on record."""
    steps = run["observed"].values
    inside = (steps >= begin) & (steps <= (steps[-1] if end is None else end))
    shaded, x = spans(run, begin, end), steps[inside]
    above, below = Curve(x, phases.scaled(run)[inside]), Curve(x, phases.losses(run)[inside])
    known: list[list[Curve]] = [[], []]
    if behind is not None:
        known[0] = behind.curves(lambda r: (r["observed"].values, phases.scaled(r)))
        known[1] = behind.curves(lambda r: (r["observed"].values, phases.losses(r)), "loss")
    return [
        Panel([*known[0], above], "Λ · η/2", "", title, level=1.0, level_label="", spans=shaded, legend="none"),
        Panel([*known[1], below], "loss", "step", log="y", spans=shaded, legend="best", legend_columns=2),
    ]


def one_cycle(run: xr.Dataset, before: int = 40, after: int = 60) -> tuple[int, int]:
    """From shortly before the first fall of the first whole cycle to shortly after it; the whole run without one."""
    cycles, total = phases.strict_cycles(phases.labels_of(run)), run.sizes["observed"]
    if not cycles:
        return 0, total - 1
    third = next(
        x.begin for x in phases.segments(phases.labels_of(run)) if x.label == phases.III and x.begin >= cycles[0][0]
    )
    return max(third - before, 0), min(third + after, total - 1)


def plane(run: xr.Dataset, title: str = "", cycle: int = 0) -> Panel:
    """One cycle in the plane of sharpness and loss, phase by phase; the whole run where there is no such cycle."""
    s, loss, labels = phases.scaled(run), phases.losses(run), phases.labels_of(run)
    cycles = phases.strict_cycles(labels)
    begin, end = cycles[cycle] if cycle < len(cycles) else (0, len(s))
    begin = max(begin - 25, 0)
    curves = [Curve(s[begin:end], loss[begin:end], "", "dotted", None)]
    kinds = {
        phases.I: ("line", 0.0),
        phases.II: ("line", 0.35),
        phases.III: ("marked", 0.7),
        phases.IV: ("marked", 1.0),
    }
    for label, (kind, tone) in kinds.items():
        here = np.where(labels[begin:end] == label, loss[begin:end], np.nan)
        if not np.isnan(here).all():
            curves.append(Curve(s[begin:end], here, NAMES[label], kind, tone))
    return Panel(curves, "loss", "Λ · η/2", title, log="y", marks=[1.0], legend="best")


def counts(groups: Groups) -> Table:
    """A row for each network: crossings, cycles with and without the fifth label, what is out of order, hovering."""
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (lambda run: float(phases.first_crossing(run) or np.nan), {}, False),
        (stats.crossing_count, {}, False),
        (stats.cycle_count, {}, False),
        (stats.cycle_count, {"hovering": False}, False),
        (stats.out_of_order, {}, True),
        (stats.phase_share, {"where": "hovering"}, True),
    ]
    header = [
        "Network",
        "Runs",
        "First crossing",
        "Upcrossings",
        "Cycles",
        "without 5th label",
        "Out of order",
        "Hovering",
    ]
    return header, [row(name, runs, columns) for name, runs in groups.items()]


CHOICES: dict[str, Sequence[Any]] = {
    "smoothing": (0, 1, 2),
    "level": (0.0, 0.01, 0.03),
    "turn": (0.002, 0.01, 0.03),
    "loss": (0.0, 0.1, 0.5),
    "hovering": (True, False),
    "window": (7, 11, 21),
    "share": (0.6, 0.8, 0.95),
    "near": (0.1, 0.25, 0.5),
    "least": (11, 22, 44),
}
MEANT = {
    "smoothing": "times smoothed",
    "level": "margin at 2/η",
    "turn": "margin of a turn",
    "loss": "margin of the loss, IV",
    "hovering": "fifth label",
    "window": "hovering, window",
    "share": "hovering, share that alternates",
    "near": "hovering, distance from 2/η",
    "least": "hovering, steps at least",
}


def sensitivity(groups: Groups) -> Table:
    """The labeller as it is, then a row for each other value of a parameter: cycles and what is out of order."""
    default, rows = phases.Labeller(), []
    found = {
        name: [[phases.sensitivity(f, run, CHOICES) for run in runs] for f in (stats.cycle_count, stats.out_of_order)]
        for name, runs in groups.items()
    }
    tried = [(name, value) for name, values in CHOICES.items() for value in values]
    as_is = next(one for one in tried if one[1] == getattr(default, one[0]))
    for name, value in [as_is, *(one for one in tried if one[1] != getattr(default, one[0]))]:
        usual = getattr(default, name)
        row = [f"{MEANT[name]}: {usual:g} → {value:g}" if name != "hovering" else "no fifth label"]
        for cycles, order in found.values():
            row.append(written([one[name, value] for one in cycles]))
            row.append(written([one[name, value] for one in order], percent=True))
        rows.append(row)
    rows[0][0] = "as it is"
    return ["Changed", *(f"{name}: {what}" for name in groups for what in ("cycles", "out of order"))], rows


SAID: list[tuple[str, str, str, Any, dict[str, Any], bool]] = [
    ("I", "the loss keeps decreasing", "steps at which it rises", stats.share_against,
     {"where": "I", "series": "loss", "expected": "falls"}, True),
    ("I", "the sharpness keeps growing", "steps at which it falls", stats.share_against,
     {"where": "I", "series": "sharpness", "expected": "rises"}, True),
    ("I", "all eigenvalues are below 2/η", "steps more than 2 % above", stats.above_in_phase_one, {}, True),
    ("II, III", "|Dᵀv₁| grows exponentially", "growth over that of its recursion", stats.growth_ratio, {}, False),
    ("II", "‖D‖ exceeds ‖Y‖ in a few iterations", "steps until it does, median", stats.steps_to_exceed, {}, False),
    ("II", "which turns the sharpness", "loss at the peak, median", stats.loss_at_turn, {}, False),
    ("III", "|Dᵀv₁| keeps increasing", "steps at which it falls", stats.share_against,
     {"where": "III", "series": "Dv", "expected": "rises"}, True),
    ("III", "the loss may increase", "phases III over which it does not", stats.segments_against,
     {"where": "III", "series": "loss", "expected": "rises"}, True),
    ("III", "the sharpness falls until below 2/η", "phases III that end otherwise", stats.third_not_final, {}, True),
    ("IV", "|Dᵀv₁| and the loss decrease quickly", "factor a step, of the slower", stats.fourth_factor, {}, False),
    ("IV", "the sharpness goes on falling for some steps", "steps for which it does", stats.falls_on, {}, False),
    ("IV", "until the loss is as right before III", "loss then, over that", stats.loss_at_fourth_end, {}, False),
]  # fmt: skip


def sayings(groups: Groups) -> Table:
    """A row for each thing that the text says of a phase: what is measured of it, by network."""
    rows = [
        [phase, text, what, *(written([f(run, **given) for run in runs], percent=share) for runs in groups.values())]
        for phase, text, what, f, given, share in SAID
    ]
    return ["Phase", "The text", "Measured", *groups], rows


def causes(groups: Groups) -> Table:
    """A row for each network: how much of the fall to 2/η is over when ‖D‖ > ‖Y‖, and when DᵀF > 0."""
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (stats.loss_at_turn, {}, False),
        (stats.not_exceeded_at_turn, {}, True),
        (stats.fallen_before, {"of": "norm"}, True),
        (stats.fallen_before, {"of": "push"}, True),
    ]
    header = ["Network", "Runs", "Loss at the peak", "Peaks without ‖D‖ > ‖Y‖"]
    header += ["Fall over when ‖D‖ > ‖Y‖", "Fall over when DᵀF > 0"]
    return header, [row(name, runs, columns) for name, runs in groups.items()]


def turn_panels(run: xr.Dataset, title: str, before: int = 14, after: int = 12) -> list[Panel]:
    """The first peak of the sharpness: its smoothed course, and the two candidate causes beside it."""
    labels = phases.labels_of(run)
    peaks = np.flatnonzero((labels[:-1] == phases.II) & (labels[1:] == phases.III))
    at = int(peaks[0]) if len(peaks) else len(labels) // 2
    here = slice(max(at - before, 0), min(at + after, len(labels)))
    x, n = run["observed"].values[here] - at, phases.examples(run)
    push = run["DF"].values.astype(float)
    mean = ((push + np.append(push[1:], push[-1])) / 2 / n)[here]
    return [
        Panel([Curve(x, phases.smooth(phases.scaled(run))[here], "", "marked")], "Λ · η/2", "", title, level=1.0,
              level_label="", marks=[0]),
        Panel([Curve(x, phases.losses(run)[here], "‖D‖²/‖Y‖²", "marked", 0.0),
               Curve(x, mean, "DᵀF/n, two steps", "marked", 0.8)],
              "", "steps from the peak", marks=[0], level=1.0, level_label="", legend="upper left"),
    ]  # fmt: skip
