"""What is drawn and tabled of SG's Figure 3 and of its assumptions, of recorded runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eos_utils import anomalies, assumption_stats, residual_stats
from eos_utils.figures import Curve, Panel, experiment_of
from eos_utils.page import number, recorded
from eos_utils.phases import III, IV, NAMES, Array, first_crossing, labels_of, losses, segments
from eos_utils.sg_assumptions import Beside

if TYPE_CHECKING:
    import xarray as xr

Table = tuple[list[str], list[list[str]]]

NETWORKS = {
    "lin2": "1 hidden layer, linear",
    "lin3": "2 hidden layers, linear",
    "lin5": "4 hidden layers, linear",
    "tanh2": "1 hidden layer, tanh",
    "tanh4": "3 hidden layers, tanh",
    "elu4": "3 hidden layers, ELU",
    "relu4": "3 hidden layers, ReLU",
}
SEEDS = range(100, 105)


def runs_of(*networks: str, seeds: Sequence[int] = SEEDS) -> dict[str, list[xr.Dataset]]:
    """The recorded runs of each network that has some, by its name in words."""
    chosen = networks or tuple(NETWORKS)
    there = recorded([f"sg_{w}_seed{seed}" for w in chosen for seed in seeds])
    found = {w: [run for name, run in there.items() if name.startswith(f"sg_{w}_")] for w in chosen}
    return {NETWORKS[w]: runs for w, runs in found.items() if runs}


def spikes(run: xr.Dataset) -> list[float]:
    """Where the phases III begin: the sharpness has turned, the loss shoots up, the spike is there."""
    return [float(run["observed"].values[x.begin]) for x in segments(labels_of(run)) if x.label == III]


def _span(values: Sequence[float], digits: int = 3) -> str:
    """One number, or the least and the largest of several."""
    finite = [v for v in values if np.isfinite(v)]
    if not finite:
        return "–"
    low, high = (number(f(finite), digits) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def by_network(
    groups: Mapping[str, Sequence[xr.Dataset]], columns: Mapping[str, Callable[[xr.Dataset], float]], digits: int = 3
) -> Table:
    """A row for each network: the range over its recorded seeds of one number a column."""
    rows = [
        [name, str(len(runs)), *(_span([f(run) for run in runs], digits) for f in columns.values())]
        for name, runs in groups.items()
    ]
    return ["Network", "Seeds", *columns], rows


def by_seed(groups: Mapping[str, Sequence[xr.Dataset]], columns: Mapping[str, Callable[[xr.Dataset], float]]) -> Table:
    """A row for each run, one number a column; a network is named in its first row."""
    rows = [
        [name if i == 0 else "", str(experiment_of(run).seed), *(number(f(run)) for f in columns.values())]
        for name, runs in groups.items()
        for i, run in enumerate(runs)
    ]
    return ["Network", "Seed", *columns], rows


# ---- Figure 3 (a) --------------------------------------------------------------------------------


def spectrum(run: xr.Dataset, title: str = "", legend: str = "lower left") -> Panel:
    """λ₁(M), λ₂(M) and λmax(M_A) times η, with 2/η (at 2); 1/η is a dashed curve at 1."""
    steps = run["observed"].values
    eta = run["eta"].sel(step=run["observed"]).values
    series = (("sharpness", "λ₁(M)", 0.0), ("second", "λ₂(M)", 0.5), ("sharpness_A", "λmax(M_A)", 0.95))
    curves = [Curve(steps, eta * run[name].values, label, "line", tone) for name, label, tone in series]
    curves.append(Curve(steps[[0, -1]], [1.0, 1.0], "1/η", "dotted", None))
    limits = None if legend == "none" else (1e-3, None)  # room for the legend below
    return Panel(curves, "eigenvalue · η", "step", title, "y", 2.0, ylim=limits, legend=legend, legend_columns=2)


def shares(groups: Mapping[str, xr.Dataset]) -> Panel:
    """λmax(M_A)/λmax(M) over the step, one tone a network."""
    tones = np.linspace(0, 1, max(2, len(groups)))
    curves = [
        Curve(run["observed"].values, run["sharpness_A"].values / run["sharpness"].values, name, "line", float(tone))
        for (name, run), tone in zip(groups.items(), tones, strict=False)
    ]
    return Panel(curves, "λmax(M_A) / λmax(M)", "step", log="y", ylim=(4e-4, None), legend="lower left")


# ---- Figure 3 (b) and equation (4) ---------------------------------------------------------------


def residual_panel(run: xr.Dataset, title: str = "", legend: str = "lower left") -> Panel:
    """The loss, ‖R‖²/n and ‖R′‖²/n over the step; dotted, the spikes."""
    steps, loss = run["observed"].values, losses(run)
    n = run["norm_D2"].values / loss
    curves = [
        Curve(steps, loss, "loss ‖D‖²/n", "line", None),
        Curve(steps, run["norm_R2"].values / n, "‖R‖²/n", "line", 0.0),
        Curve(steps, run["norm_Rp2"].values / n, "‖R′‖²/n", "dashed", 0.8),
    ]
    return Panel(curves, "squared norm / n", "step", title, "y", marks=spikes(run), legend=legend)


def distances(runs: Sequence[xr.Dataset], title: str = "", legend: str = "lower right") -> Panel:
    """‖R - R′‖/‖R‖ of each run over the step; dotted, the spikes of the first."""
    tones = np.linspace(0, 1, max(2, len(runs)))
    curves = [
        Curve(
            run["observed"].values[1:],
            np.sqrt(run["apart2"].values / run["norm_R2"].values)[1:],
            f"seed {experiment_of(run).seed}" if len(runs) > 1 else "",
            "line",
            float(tone),
        )
        for run, tone in zip(runs, tones, strict=False)
    ]
    marks = spikes(runs[0]) if runs else []
    return Panel(curves, "‖R − R′‖ / ‖R‖", "step", title, "y", marks=marks, ylim=(1e-4, None), legend=legend)


def window(run: xr.Dataset, before: int = 20, after: int = 20) -> slice:
    """Observed steps around the first phase IV; around the first crossing, or all of them, if there is none."""
    found = [x for x in segments(labels_of(run)) if x.label == IV]
    at = found[0].begin if found else first_crossing(run)
    return slice(None) if at is None else slice(max(at - before, 0), at + after)


def terms(run: xr.Dataset, where: slice) -> Panel:
    """The two terms of equation (4) over n, and their sum DᵀF; dotted, the ends of phase IV."""
    steps = run["observed"].values[where]
    n = (run["norm_D2"].values / losses(run))[where]
    curves = [
        Curve(steps, residual_stats.first_term(run)[where] / n, "along v₁", "marked", 0.0),
        Curve(steps, run["RRY"].values[where] / n, "Rᵀ(R + Y)", "dashed", 0.8),
        Curve(steps, run["DF"].values[where] / n, "DᵀF", "dotted", None),
        Curve(steps[[0, -1]], [0.0, 0.0], "", "dotted", None),
    ]
    found = [t for x in segments(labels_of(run)) if x.label == IV for t in (x.begin, x.end)]
    marks = [float(run["observed"].values[t]) for t in found if t < run.sizes["observed"]]
    return Panel(curves, "terms of DᵀF, over n", "", marks=[m for m in marks if steps[0] <= m <= steps[-1]])


def first_terms(run: xr.Dataset, where: slice) -> Panel:
    """The size of the first term of (4) over n, and of the second, on a logarithmic scale."""
    steps = run["observed"].values[where]
    n = (run["norm_D2"].values / losses(run))[where]
    first = np.abs(residual_stats.first_term(run)[where]) / n
    curves = [
        Curve(steps, first, "|first term|", "marked", 0.0),
        Curve(steps, np.abs(run["RRY"].values[where]) / n, "|second term|", "dashed", 0.8),
    ]
    return Panel(curves, "size, over n", "step", log="y", ylim=(max(float(first.max()) * 1e-7, 1e-12), None))


def products(run: xr.Dataset, title: str = "") -> Panel:
    """Rᵀ(R + Y)/n and R′ᵀ(R′ + Y)/n over the step."""
    steps, n = run["observed"].values, run["norm_D2"].values / losses(run)
    curves = [
        Curve(steps, run["RRY"].values / n, "Rᵀ(R + Y)/n", "line", 0.0),
        Curve(steps, run["RpRpY"].values / n, "R′ᵀ(R′ + Y)/n", "dashed", 0.8),
        Curve(steps[[0, -1]], [0.0, 0.0], "", "dotted", None),
    ]
    return Panel(curves, "second term / n", "step", title, marks=spikes(run), legend="upper right")


# ---- the assumptions -----------------------------------------------------------------------------


def step_errors(run: xr.Dataset, title: str = "", legend: str = "none") -> Panel:
    """The relative errors of the two equations (3), step by step; dotted, the spikes."""
    steps = run["observed"].values
    curves = [
        Curve(steps, run["A_error"].values, "of ‖A‖²", "points", 0.75),
        Curve(steps, run["D_error"].values, "of D", "points", 0.0),
    ]
    return Panel(
        curves, "relative error of (3)", "step", title, "y", marks=spikes(run), ylim=(1e-6, 1e2), legend=legend
    )


def errors_by_phase(runs: Mapping[str, xr.Dataset], of: str, quantiles: tuple[float, float] = (0.5, 0.95)) -> Table:
    """A row for each run: quantiles of the relative error of (3) in all of it and in each phase."""

    def shown(run: xr.Dataset, phase: str) -> str:
        return " / ".join(number(residual_stats.step_error(run, of, q, phase), 2) for q in quantiles)

    phases = ["", *NAMES.values()]
    rows = [[name, *(shown(run, phase) for phase in phases)] for name, run in runs.items()]
    return ["Network", "all steps", *(f"phase {p}" if p != "hovering" else p for p in NAMES.values())], rows


def beside_panels(found: Beside, title: str) -> list[Panel]:
    """Gradient descent beside the flow: distance of D at equal times, and the sharpness of both."""
    steps = np.arange(len(found.d))
    apart = [
        Curve(steps[1:], found.apart[1:], "η", "line", 0.0),
        Curve(steps[1:], found.solver[1:], "η/20", "dashed", 0.7),
    ]
    level = [
        Curve(steps, found.sharpness, "descent", "line", 0.0),
        Curve(steps, found.flow_sharpness, "flow", "dashed", 0.8),
    ]
    return [
        Panel(apart, "‖D − D_flow‖ / ‖D_flow‖", "time / η", title, "y", legend="upper right"),
        Panel(level, "Λ · η/2", "time / η", title, level=1.0, level_label="", legend="lower right"),
    ]


def kept_panel(run: xr.Dataset, title: str = "", legend: str = "lower left") -> Panel:
    """|⟨v_i(0), v_i(t)⟩| at the recorded spectra."""
    numbers = [int(i) for i in run["kept_eig"].values]
    tones = np.linspace(0, 1, max(2, len(numbers)))
    curves = [
        Curve(run["spectral"].values, run["kept"].values[:, j], f"i = {i}", "marked", float(tone))
        for j, (i, tone) in enumerate(zip(numbers, tones, strict=False))
    ]
    return Panel(curves, "|⟨vᵢ(0), vᵢ(t)⟩|", "step", title, marks=_crossing(run), ylim=(-0.03, 1.03), legend=legend)


def aligned_panel(run: xr.Dataset, title: str = "", legend: str = "none") -> Panel:
    """For which share of the eigenvectors, or of ‖D‖², Assumption 3.5 (ii) holds with the sign rule."""
    curves = [
        Curve(run["spectral"].values, run["aligned_energy"].values, "of ‖D‖²", "marked", 0.0),
        Curve(run["spectral"].values, run["aligned_share"].values, "of the eigenvectors", "marked", 0.75),
    ]
    return Panel(curves, "share with (ii)", "step", title, marks=_crossing(run), ylim=(-0.03, 1.03), legend=legend)


def turn_panel(run: xr.Dataset, title: str = "") -> Panel:
    """1 - ⟨v₁(t), v₁(t - 1)⟩, step by step; what is below single precision is drawn at its limit, 6·10⁻⁸."""
    turn = np.maximum(1 - run["turn"].values, 6e-8)
    return Panel(
        [Curve(run["observed"].values, turn, "", "points", 0.0)],
        *("1 − ⟨v₁(t−1), v₁(t)⟩", "step", title, "y"),
        marks=spikes(run),
        ylim=(3e-8, 1),
    )


def _crossing(run: xr.Dataset) -> list[float]:
    at = first_crossing(run)
    return [] if at is None else [float(run["observed"].values[at])]


def phase_bounds(run: xr.Dataset) -> Array:
    """Bounds in degrees of the angle of v₁ over the phases II and III of two steps or more, (phases, 2)."""
    found = [s for s in segments(labels_of(run)) if NAMES[s.label] in ("II", "III") and s.end - s.begin > 1 and s.begin]
    return np.degrees(np.array([assumption_stats.phase_angles(run, s) for s in found]).reshape(-1, 2))


def assumption_columns() -> dict[str, Callable[[xr.Dataset], float]]:
    """The measured numbers of the table of all assumptions, by their head."""

    def of(function: Callable[..., float], **arguments: Any) -> Callable[[xr.Dataset], float]:
        return lambda run: function(run, **arguments)

    stats = residual_stats
    return {
        "3.1: steps in opposite directions, before the crossing": of(anomalies.anomaly_share, part="before"),
        "3.1: the same, whole run": of(anomalies.anomaly_share),
        "3.2: error for D, at 95 % of the steps": of(stats.step_error, quantile=0.95),
        "3.2: error for ‖A‖², at 95 % of the steps": of(stats.step_error, of="A", quantile=0.95),
        "3.4: largest ηΛ": of(stats.upper_bound),
        "3.5 (ii): eigenvectors and times at which it fails": of(assumption_stats.not_slow),
        "3.5 (iii): least ε₂": of(stats.turn_of_v1),
        "3.6: c at the first step of II, more than 1 asked": of(stats.c_at_second),
        "3.7: steps with λ₂ ≥ 1/η": of(stats.second_above),
    }


def by_column(table: Table, head: str) -> Table:
    """The table with rows and columns exchanged: fits the page where there are few rows and many columns."""
    header, rows = table
    turned = [list(row) for row in zip(header, *rows, strict=True)]
    return [head, *turned[0][1:]], turned[1:]
