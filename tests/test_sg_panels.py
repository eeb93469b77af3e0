"""Panels and tables of SG's figure pages: what is drawn is what was put in, and rows fit their heads."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from eos_utils import figures
from eos_utils import sg_anomaly_panels as marks
from eos_utils import sg_panels as panels

N = 100


def run_of(s, loss, norm=None, delta=None, label=10.0):
    """A recorded run with this scaled sharpness and loss (η = 1/100)."""
    steps, s, loss = np.arange(len(s)), np.asarray(s, dtype=float), np.asarray(loss, dtype=float)
    delta = np.full(len(s), 1e-3) if delta is None else delta
    series = {
        "sharpness": s * 200,
        "sharpness_error": np.zeros(len(s)),
        "norm_A2": s + 1 if norm is None else norm,
        "norm_D2": N * loss,
        "DF": N * (loss - 0.6),
        "Dv": delta,
        "Yv": np.full(len(s), label),
    }
    return xr.Dataset(
        {"loss": ("step", loss), "eta": ("step", np.full(len(s), 0.01))}
        | {k: ("observed", v) for k, v in series.items()},
        {"step": steps, "observed": steps},
        {"experiment": json.dumps({"eta": "1/100"}), "status": "steps"},
    )


@pytest.fixture
def cyclic():
    """Three cycles: up in 80 steps, down in 6, with a spike of the loss."""
    fall = np.linspace(1.3, 0.7, 7)[1:]
    s = np.concatenate(
        [np.linspace(0.5, 1.3, 80), *[part for _ in range(3) for part in (fall, np.linspace(0.7, 1.3, 60)[1:])]]
    )
    loss = 0.5 * 0.999 ** np.arange(len(s))
    for peak in (79, 144, 209):
        loss[peak : peak + 6] += [0.02, 0.2, 0.8, 2.0, 0.6, 0.1]
    return run_of(s, loss)


@pytest.fixture
def antiphase():
    """A rise, and then period two: Λ up where ‖A‖² goes down, and both with the sign of δ."""
    t = np.arange(400)
    flip = np.where(t < 100, 0.0, (-1.0) ** t)
    return run_of(np.minimum(0.5 + 0.0051 * t, 1.01) + 0.05 * flip, np.full(400, 0.5), 2 - 0.1 * flip + t / 1e5, -flip)


def test_shaded_stretches_cover_the_run_once_and_only_what_is_asked_for(cyclic):
    found = panels.spans(cyclic)
    assert found[0][0] == 0 and found[-1][1] == len(cyclic["observed"]) - 1
    assert all(a[1] == b[0] and a[2] != b[2] for a, b in zip(found[:-1], found[1:], strict=True))
    assert {name for *_, name in found} == {"I", "II", "III", "IV"}
    cut = panels.spans(cyclic, 100, 120)
    assert (cut[0][0], cut[-1][1]) == (100, 120)


def test_phases_are_drawn_with_one_entry_a_name(cyclic):
    shown = panels.phase_panels(cyclic)
    figure = figures.panels(*shown, sharex=True)
    names = figure.axes[1].get_legend_handles_labels()[1]
    plt.close(figure)
    assert names == ["I", "II", "III", "IV"]
    assert np.allclose(shown[0].curves[0].y, cyclic["sharpness"] / 200) and shown[1].log == "y"


def test_one_cycle_is_around_the_first_fall(cyclic):
    begin, end = panels.one_cycle(cyclic)
    assert begin < 79 < end < 150
    assert panels.one_cycle(run_of(np.linspace(0.2, 0.5, 60), np.ones(60))) == (0, 59)


def test_the_plane_draws_each_phase_where_it_is(cyclic):
    curves = {c.label: c for c in panels.plane(cyclic).curves}
    assert set(curves) == {"", "I", "II", "III", "IV"}
    above = ~np.isnan(curves["III"].y)
    assert (curves["III"].x[above] > 0.9).all()


FIGURE_1 = [panels.counts, panels.causes, panels.sayings, panels.sensitivity]
FIGURE_2 = [marks.shares, marks.by_phase, marks.relations, marks.oscillation]


@pytest.mark.parametrize("make", FIGURE_1 + FIGURE_2)
def test_rows_fit_their_heads_also_where_nothing_happens(make, cyclic, antiphase):
    calm = run_of(np.linspace(0.2, 0.5, 60), np.linspace(1, 0.5, 60))
    header, rows = make({"cyclic": [cyclic, cyclic], "antiphase": [antiphase], "calm": [calm]})
    assert rows and all(len(row) == len(header) for row in rows)
    assert not any("nan" in cell for row in rows for cell in row)


def test_counts_and_causes(cyclic, antiphase):
    header, (one, two) = panels.counts({"cyclic": [cyclic], "antiphase": [antiphase]})
    cells = dict(zip(header, one, strict=True))
    assert cells["Cycles"] == "2" == cells["without 5th label"] or cells["Cycles"] == "3"
    assert dict(zip(header, two, strict=True))["Cycles"] == "0"
    header, (one,) = panels.causes({"cyclic": [cyclic]})
    norm, push = one[-2:]
    assert float(push.split()[0]) < float(norm.split()[0])  # DᵀF is positive from a loss of 0.6 on


def test_numbers_are_written_as_mean_and_range():
    assert panels.written([1.0, 1.0]) == "1" and panels.written([float("nan")]) == "–"
    assert panels.written([0.1, 0.3], percent=True) == "20 % (10 to 30)"
    assert panels.written([np.inf]) == "never" and panels.written([1.0], percent=True) == "100 %"


def test_anomalies_are_marked_where_they_are(cyclic, antiphase):
    assert not marks.anomaly_points(cyclic).any()
    points = marks.anomaly_points(antiphase)
    assert points[102:-1].all() and not points[:98].any() and not points[-1]
    drawn = next(c for c in marks.marked_panel(antiphase, "").curves if c.label == "anomaly")
    assert drawn.x.tolist() == np.flatnonzero(points).tolist()


def test_what_a_change_does_is_counted_within_a_seed(cyclic, antiphase):
    """A pair with antiphase on one side differs by its share; a seed that only one network has is left out."""

    def seeded(run, seed):
        return run.assign_attrs(experiment=json.dumps({"eta": "1/100", "seed": seed}))

    groups = {
        "tanh, 1 hidden": [seeded(cyclic, 100), seeded(antiphase, 101), seeded(cyclic, 103)],
        "tanh, 3 hidden": [seeded(antiphase, 101), seeded(antiphase, 100)],
    }
    header, ((name, pairs, before, after, *_),) = marks.dependence(groups)
    assert name == "tanh, 1 → 3 hidden layers" and pairs == "2"
    share = 100 * marks.an.anomaly_share(antiphase, "after") - 100 * marks.an.anomaly_share(cyclic, "after")
    assert after == f"{share / 2:+.0f} (0 to {share:+.0f}), 1 of 2" and share > 90
    assert before == "0"


def test_signs_of_the_oscillation(antiphase):
    # δ = -flip: the norm, which goes with -flip, falls after δ > 0; Λ, which goes with flip, rises then.
    assert marks.follows(antiphase, "norm_A2") == 1 and marks.follows(antiphase, "sharpness") == 0
    assert np.isnan(marks.follows(run_of(np.linspace(0.2, 0.5, 60), np.ones(60)), "sharpness"))


def test_a_change_is_judged_over_the_steps_that_both_runs_have(antiphase):
    """The same run against a shorter part of it: no change, although the share grows with the length."""
    short = panels.until(antiphase, 240)
    assert short.sizes["step"] == short.sizes["observed"] == 241 and int(short["observed"][-1]) == 240
    header, ((name, pairs, *moves),) = marks.dependence(
        {"tanh, 3 hidden": [antiphase], "tanh, 3 hidden, 200 wide": [short]}
    )
    assert (name, pairs) == ("tanh, 3 hidden layers, 100 → 200 units", "1") and len(moves) == len(header) - 2
    assert moves == ["0", "0", "0", "0"]
    assert marks.an.anomaly_share(antiphase) > marks.an.anomaly_share(short) + 0.1
