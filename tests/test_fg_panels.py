"""Panels and tables of FG's figure pages: what is drawn is what was put in, and rows fit their heads."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import fg_panels
from eos_utils.catalogue import catalogue


def run_of(levels, stride=15, decayed_at=-1, project=None, seed=100):
    """A run whose λ1, λ2, ... times η/2 (η = 1/10) are the columns of ``levels``."""
    measured = stride * np.arange(len(levels))
    steps = np.arange(measured[-1] + 1)
    fields = {"eta": "1/10", "seed": seed} | ({"project": project} if project else {})
    return xr.Dataset(
        {
            "eigenvalue": (("measured", "eig"), levels * 20),
            "upper": (("measured", "eig"), levels * 20 + 1e-6),
            "loss": ("step", np.exp(-steps / 500)),
            "eta": ("step", np.full(len(steps), 0.1)),
        },
        {"step": steps, "measured": measured, "eig": np.arange(1, levels.shape[1] + 1)},
        {"experiment": json.dumps(fields), "decayed_at": decayed_at, "stride": stride, "status": "steps"},
    )


@pytest.fixture
def rising():
    t = np.arange(100)
    return np.minimum(0.5 + 0.01 * t, 1.0)[:, None] - 0.05 * np.arange(3)


def test_scaled_eigenvalues_are_drawn_over_their_steps(rising):
    panel = fg_panels.scaled_panel(run_of(rising), "title", k=3, begin=300, end=600)
    first = next(c for c in panel.curves if c.label == "λ₁")
    assert first.x.tolist() == list(range(300, 601, 15)) and np.allclose(first.y, rising[20:41, 0])
    assert panel.level == 1.0 and panel.marks == []  # it enters at step 720
    assert fg_panels.scaled_panel(run_of(rising), "title").marks == [720.0]
    held = run_of(rising, project={"eig": 1, "at_step": 0})
    assert fg_panels.scaled_panel(held, "title").marks == []


def test_decays_are_drawn_in_units_of_the_edge_before_them(rising):
    run, base = run_of(rising, decayed_at=600), run_of(rising)
    above, below = fg_panels.decays(base, {"one": run, "two": run})
    assert [c.label for c in above.curves] == ["no decay", "one", "two"] and above.marks == [600, 600]
    assert np.allclose(above.curves[1].y, rising[:, 0]) and np.allclose(below.curves[1].y, run["loss"])
    assert fg_panels.decays(None, {"never": run_of(rising)})[0].marks == []


def test_misfits_vanish_for_the_shape_that_was_put_in():
    t = np.arange(100)
    levels = np.where(t < 40, 1.0, 1 + 0.2 * np.log1p((t - 40).clip(0) * 15 / 60))[:, None]
    panel = fg_panels.misfits(run_of(levels, decayed_at=600), "title")
    size = {c.label: np.abs(c.y).max() for c in panel.curves}
    assert size["logarithm"] < 0.5 < size["approach"] < size["line"]


def test_roughness_is_that_of_each_eigenvalue(rising):
    t = np.arange(100)
    rough = rising + np.where(t > 60, 0.01 * (-1.0) ** t, 0)[:, None] * np.array([1, 0.1, 0.0])
    panel = fg_panels.roughness_panel(run_of(rough), "title", 3)
    last = {c.label: c.y[-1] for c in panel.curves if c.label}
    assert last["λ₁"] == pytest.approx(0.04, rel=0.01) and last["λ₃"] < 1e-9 and panel.log == "y"


def test_tables_have_as_many_cells_in_a_row_as_in_the_head(rising):
    levels = np.where(np.arange(100) < 40, 1.0, 1 + 0.001 * (np.arange(100) - 40))[:, None] * np.ones(2)
    runs = [run_of(levels * s, decayed_at=600, seed=100 + i) for i, s in enumerate((1.0, 1.01))]
    for head, rows in (
        fg_panels.growth_rates({"after 1": runs, "after 2": runs}),
        fg_panels.shapes({"one": runs[0]}),
        fg_panels.entries_held(range(100, 105)),
    ):
        assert all(len(row) == len(head) for row in rows), head
    head, rows = fg_panels.growth_rates({"after 1": runs})
    assert head[1:3] == ["seed 100", "seed 101"] and float(rows[0][1]) == pytest.approx(0.1 / 15, rel=0.01)


def test_entries_of_a_seed_that_is_not_on_record_are_left_out(monkeypatch):
    names = [n for n in catalogue() if n.startswith("fg_fig2_held_seed")]
    assert len(names) == 5
    monkeypatch.setattr(fg_panels, "on_record", lambda name: None)
    assert fg_panels.entries_held(range(100, 105))[1] == []


def test_sizes_are_drawn_and_listed_and_a_run_that_never_enters_says_so(rising):
    runs = [run_of(rising), run_of(rising * 0.5)]
    for run, width in zip(runs, (8, 32), strict=True):
        run.attrs["experiment"] = json.dumps({"eta": "1/10", "width": width})
    panel = fg_panels.against_size(runs, "width", fg_panels.entry_or_never, "step", "entry")
    dots, medians = panel.curves
    assert dots.x == [8] and dots.y == [720.0] == medians.y and panel.log == "x"
    header, rows = fg_panels.sizes({8: runs[:1], 32: runs[1:]}, "width")
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][:5] == ["8", "1", "0.50", "720", "720 to 720"] and rows[1][3:5] == ["never", "–"]


def test_one_curve_for_each_size_and_one_for_the_run_beside_them(rising):
    panel = fg_panels.sharpness_by({"width 8": run_of(rising), "width 16": run_of(rising)}, run_of(rising * 0.5))
    assert [c.label for c in panel.curves] == ["width 8", "width 16", "this run"]
    assert np.allclose(panel.curves[0].y, rising[:, 0]) and panel.curves[2].kind == "dashed" and panel.level == 1.0
