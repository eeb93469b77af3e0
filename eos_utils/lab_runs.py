"""The laboratory of recorded runs: what ``book/_static/eos-runs.js`` shows, and the same in a picture.

Every recorded value is in the page at its own step, none is thinned out: a series is its first step, its stride, and
its values as 32-bit floats (relative rounding at most 2⁻²⁴), little-endian, in base64. Phases and anomaly points are
decided here, from the full precision of the record.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from eos_utils import catalogue, page, phases
from eos_utils.experiment import subscript
from eos_utils.figures import Curve, Panel, experiment_of
from eos_utils.run import run as compute
from eos_utils.sg_anomaly_panels import anomaly_points
from eos_utils.sg_panels import spans
from eos_utils.store import Store

# Those of the page, by paper: what there is to see.
RUNS = {
    "fg_fig1_seed100": "Progressive sharpening, then hovering: one eigenvalue after the other arrives at 2/η.",
    "fg_fig2_top20": "The same run with twenty eigenvalues, at every 45th step.",
    "fg_fig3_after1_seed100": "The step size is divided by four when one eigenvalue has entered: 2/η goes to 120.",
    "fg_fig3_after3_seed100": "The step size is divided by four when three have entered, amid the oscillation.",
    "fg_fig4_seed100": "With tanh and fifteen eigenvalues; the loss does not rise before step 2,700.",
    "fg_fig5_tanh_mse_seed100": "tanh, with the step size divided by four amid the oscillation: the loss turns smooth.",
    "fg_fig5_relu_ce_seed100": "Cross-entropy: near 2/η the loss oscillates; λ₁ turns back before the decay.",
    "fg_fig6_width256_seed100": "Twice as wide, to 500 steps after the first entry.",
    "fg_fig7_depth2_seed100": "One hidden layer more, to 500 steps after the first entry.",
    "fg_fig7_depth4_seed100": "Three hidden layers more, to 500 steps after the first entry.",
    "sg_lin3_seed100": "The four phases. In III and IV the loss has a spike, a few steps wide: zoom in.",
    "sg_lin2_seed100": "One cycle of the four phases in a network with two weight matrices.",
    "sg_tanh2_seed100": "Few anomaly points, near the turns of ‖A‖².",
    "sg_tanh4_seed100": "Anomaly points at most steps once it hovers: Λ and ‖A‖² move in antiphase.",
    "sg_elu4_seed100": "Cycles and hovering by turns.",
    "sg_relu4_seed100": "Cycles and hovering by turns, without a smooth activation.",
    "sg_resnet_seed100": "A small residual network: many short phases.",
}
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh", "elu": "ELU", "linear": "linear"}


def load(names: str, source: str = "recorded", device: str = "auto", **instead: Any) -> dict[str, xr.Dataset]:
    """The runs with these catalogue names, separated by commas; none for those of the page.

    'recorded': those that are on record. Otherwise, or with fields of an experiment ``instead`` of the registered ones
    (of which '' and 0 mean none), :func:`eos_utils.run.run` with this source. Raises ``ValueError`` if no run is left,
    ``KeyError`` for a name that is not registered.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()] or list(RUNS)
    changed = {k: v for k, v in instead.items() if v}
    if source == "recorded" and not changed:
        found = page.recorded(chosen)
    else:
        entries = {name: catalogue.find(name) for name in chosen}
        found = {
            name: compute(dataclasses.replace(e.experiment, **changed), e.measure, source=source, device=device)
            for name, e in entries.items()
        }
    if not found:
        raise ValueError(f"runs={names!r}: none of them is on record; compute them with source='live'")
    return {name: whole(run) for name, run in found.items()}


def whole(run: xr.Dataset) -> xr.Dataset:
    """A run, with the steps of its base run before it where it is an unperturbed fork of a recorded one."""
    fork, store = experiment_of(run).fork, Store()
    if not fork or fork["size"] != "0" or store.status(fork["of"]).state == "missing":
        return run
    base, at = store.load(fork["of"]), int(run["step"][0])
    k = min(base.sizes["eig"], run.sizes["eig"])
    before = base.sel(step=base["step"] < at, measured=base["measured"] < at).isel(eig=slice(k))
    after = run.isel(eig=slice(k))
    drawn = {"loss": "step", "eta": "step", "eigenvalue": "measured"}
    return xr.Dataset({v: xr.concat([before[v], after[v]], dim) for v, dim in drawn.items()}, attrs=run.attrs)


def edges(run: xr.Dataset) -> list[tuple[int, float]]:
    """2/η as it is from each step on: one pair, and one more where the step size has changed."""
    eta, steps = run["eta"].values.astype(float), run["step"].values
    changes = [0, *(np.flatnonzero(np.diff(eta)) + 1).tolist()]
    return [(int(steps[i]), float(2 / eta[i])) for i in changes]


def title(run: xr.Dataset) -> str:
    """The network and its step size in a line."""
    given, two_over = experiment_of(run), edges(run)
    layers = f"{given.depth} hidden layer{'s' if given.depth > 1 else ''} of {given.width}"
    network = "residual network, ReLU" if given.network != "fc" else f"{ACTIVATIONS[given.activation]}, {layers}"
    loss = ", cross-entropy" if given.loss == "cross_entropy" else ""
    changed = f", {page.number(two_over[-1][1])} from step {two_over[-1][0]:,}" if len(two_over) > 1 else ""
    return f"{network}{loss}, 2/η = {page.number(given.threshold)}{changed}"


def curves(run: xr.Dataset) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """All that the page draws of a run: panel ('eig', 'norm', 'loss'), name, steps, values.

    With the Gram matrix M observed its eigenvalues, the first two at every step; otherwise those of the Hessian.
    """
    found = []
    if "observed" in run.dims:
        tops = [("observed", run["sharpness"].values), ("observed", run["second"].values)]
        tops += [("spectral", column) for column in run["gram_eigenvalue"].values.T[2:]]
    else:
        tops = [("measured", column) for column in run["eigenvalue"].values.T]
    for i, (steps, values) in enumerate(tops):
        found.append(("eig", f"λ{subscript(i + 1)}", run[steps].values, values))
    if "observed" in run.dims:
        found.append(("norm", "‖A‖²", run["observed"].values, run["norm_A2"].values))
    return [*found, ("loss", "loss", run["step"].values, run["loss"].values)]


def encode(steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """A series for the page. Raises ``ValueError`` for steps that are not evenly spaced."""
    gaps = set(np.diff(steps).tolist())
    if len(gaps) > 1:
        raise ValueError(f"steps {sorted(gaps)} apart: the page holds series with one stride")
    data = base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
    return {"begin": int(steps[0]), "stride": int(max(gaps, default=1)), "values": data}


def labelled(run: xr.Dataset) -> list[list[Any]]:
    """The phases: first step, last step and name of each stretch; none where M was not observed at every step."""
    if "observed" not in run.dims:
        return []
    steps = run["observed"].values
    found = phases.segments(phases.labels_of(run))
    return [[int(steps[x.begin]), int(steps[x.end - 1]), phases.NAMES[x.label]] for x in found]


def anomaly_steps(run: xr.Dataset) -> list[int]:
    """The steps from which Λ and ‖A‖² move in opposite directions, the undetermined left out."""
    if "observed" not in run.dims:
        return []
    return [int(step) for step in run["observed"].values[anomaly_points(run)]]


def setting(runs: Mapping[str, xr.Dataset]) -> list[dict[str, Any]]:
    """The runs for the page, in plain values."""
    return [
        {
            "name": name,
            "paper": name.split("_")[0].upper(),
            "title": title(run),
            "about": RUNS.get(name) or catalogue.find(name).about,
            "matrix": "Gram matrix M" if "observed" in run.dims else "Hessian",
            "edges": edges(run),
            "series": [{"panel": panel, "name": label, **encode(*rest)} for panel, label, *rest in curves(run)],
            "phases": labelled(run),
            "anomalies": anomaly_steps(run),
        }
        for name, run in runs.items()
    ]


def sources(runs: Mapping[str, xr.Dataset]) -> str:
    """Where the runs come from, and their keys, in a line."""
    listed = (f"{name} ({run.attrs['source']}, experiment {run.attrs['key']})" for name, run in runs.items())
    return f"{len(runs)} runs: " + ", ".join(listed)


def panels(runs: Mapping[str, xr.Dataset], k: int = 6) -> list[Panel]:
    """The picture in place of the page's: a column for the first run without phases and for the first with them."""
    columns = []
    for gram in (False, True):
        name, run = next(((n, r) for n, r in runs.items() if ("observed" in r.dims) is gram), ("", None))
        if run is None:
            continue
        drawn = curves(run)
        tops = [c for c in drawn if c[0] == "eig"][:k]
        lines = [
            Curve(x, y, label if i in (0, len(tops) - 1) else "", tone=i / max(1, len(tops) - 1))
            for i, (_, label, x, y) in enumerate(tops)
        ]
        head, level = f"{name.split('_')[0].upper()}: {title(run).split(',')[0]}", edges(run)[-1][1]
        above = Panel(lines, "eigenvalue", "", head, level=level, legend="none" if gram else "lower right")
        shaded = spans(run) if gram else []
        loss = Curve(*drawn[-1][2:])
        room = (None, 1.4 * float(np.nanmax(loss.y))) if gram else None  # for the legend, above the spikes
        where = "upper left" if gram else "best"
        below = Panel([loss], "loss", "step", ylim=room, legend=where, legend_columns=2, spans=shaded)
        columns.append((above, below))
    return [panel for row in zip(*columns, strict=True) for panel in row]


def embed(given: Sequence[Mapping[str, Any]], picture: Any) -> Any:
    """The picture (of :func:`eos_utils.figures.show`) with the data before it, from which the script builds the charts.

    Without the script, and in print, there is the picture.
    """
    held = json.dumps(given, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    picture.data = (
        f'<div class="eos-lab" data-eos-runs><script type="application/json">{held}</script></div>'
        f'<div class="eos-lab-picture">{picture.data}</div>'
    )
    return picture
