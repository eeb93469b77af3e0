"""Panels and tables of Figure 3 and of the assumptions: what is drawn is what was put in."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import sg_residual_panels as panels
from eos_utils.figures import panels as draw
from eos_utils.sg_assumptions import Beside


def made(rows, eta, n, **fields):
    """A recorded run with these observed series."""
    steps = np.arange(len(rows["norm_D2"]))
    return xr.Dataset(
        {
            "loss": ("step", rows["norm_D2"] / n),
            "eta": ("step", np.full(len(steps), eta)),
            **{name: ("observed", values) for name, values in rows.items()},
        },
        {"step": steps, "observed": steps},
        {"experiment": json.dumps({"eta": str(eta), **fields})},
    )


@pytest.fixture
def run():
    """A random R and D at a sharpness that crosses the edge twice, eight examples, with the spectra of a record."""
    generator, total, n = np.random.default_rng(0), 150, 8
    r, rp = generator.normal(size=(2, total, n - 1))
    along, y = generator.normal(size=(2, total))
    d2, rest = (r**2).sum(axis=1) + along**2, generator.normal(size=(total, n - 1))
    t, level = np.arange(total), 2 / 0.09
    rows = {
        "sharpness": level * (1 + 0.3 * np.sin(t / 12 - 1)), "second": level * (0.3 + t / 1000), "norm_D2": d2,
        "sharpness_A": level * 0.01 * (1 + t / 50), "norm_R2": (r**2).sum(axis=1), "norm_Rp2": (rp**2).sum(axis=1),
        "apart2": ((r - rp) ** 2).sum(axis=1), "Dv": along, "Yv": y, "RRY": (r * (r + rest)).sum(axis=1),
        "RpRpY": (rp * (rp + rest)).sum(axis=1), "DF": along * (along + y) + (r * (r + rest)).sum(axis=1),
        "turn": np.append(np.nan, 1 - 10 ** generator.uniform(-9, -2, size=total - 1)),
        "D_error": np.append(np.nan, generator.random(total - 1)), "norm_A2": 1 + t / 100,
        "A_error": np.append(np.nan, generator.random(total - 1)),
    }  # fmt: skip
    kept = np.linspace(1, 0.4, 12).reshape(6, 2)
    return (
        made(rows, 0.09, n, seed=103)
        .assign(kept=(("spectral", "kept_eig"), kept), aligned_share=("spectral", kept[:, 0]))
        .assign(aligned_energy=("spectral", kept[:, 1]))
        .assign_coords(spectral=np.arange(0, total, 25), kept_eig=[1, 2])
    )


def plain(total, **series):
    """A run in which nothing happens, but for the series given; η = 0.1, a hundred examples."""
    names = ("DF", "Dv", "Yv", "RRY", "norm_R2")
    still = {"sharpness": np.full(total, 10.0), "norm_D2": np.full(total, 50.0)}
    return made({**{name: np.ones(total) for name in names}, **still, **series}, 0.1, 100)


def curve(panel, label):
    return next(c for c in panel.curves if c.label == label)


def test_the_spectrum_is_in_units_of_one_over_eta(run):
    panel = panels.spectrum(run)
    assert np.allclose(curve(panel, "λ₁(M)").y, 0.09 * run["sharpness"]) and panel.level == 2.0
    assert np.allclose(curve(panel, "λ₂(M)").y, 0.09 * run["second"]) and set(curve(panel, "1/η").y) == {1.0}
    share = panels.shares({"one": run}).curves[0]
    assert np.allclose(share.y, run["sharpness_A"] / run["sharpness"]) and share.label == "one"


def test_the_residual_and_its_follower_are_per_example(run):
    panel = panels.residual_panel(run)
    assert np.allclose(curve(panel, "loss ‖D‖²/n").y, run["loss"])
    assert np.allclose(curve(panel, "‖R‖²/n").y, run["norm_R2"] / 8)
    assert np.allclose(curve(panel, "‖R′‖²/n").y, run["norm_Rp2"] / 8)
    far = panels.distances([run, run]).curves
    assert [c.label for c in far] == ["seed 103", "seed 103"]
    assert np.allclose(far[0].y, np.sqrt(run["apart2"] / run["norm_R2"])[1:])


def test_the_terms_of_equation_four_add_up(run):
    panel = panels.terms(run, slice(10, 40))
    first, second, whole = (curve(panel, name).y for name in ("along v₁", "Rᵀ(R + Y)", "DᵀF"))
    assert np.allclose(first + second, whole) and len(first) == 30
    sizes = panels.first_terms(run, slice(10, 40))
    assert np.allclose(curve(sizes, "|first term|").y, np.abs(first))
    assert np.allclose(curve(panels.products(run), "R′ᵀ(R′ + Y)/n").y, run["RpRpY"] / 8)


def test_the_window_is_around_the_first_phase_four():
    level = np.concatenate([np.linspace(0.5, 1.1, 80), np.linspace(1.1, 0.5, 20), np.linspace(0.5, 0.9, 100)]) * 20
    loss = np.concatenate([np.ones(80), np.full(20, 1.5), np.full(100, 0.5)])
    spike = plain(200, sharpness=level, norm_D2=100 * loss)
    where = panels.window(spike)
    assert where.stop - where.start == 40 and 80 < where.start + 20 < 90  # where it falls below the edge
    assert panels.window(plain(50)) == slice(None)
    assert [78 < t < 83 for t in panels.spikes(spike)] == [True] and panels.terms(spike, where).marks


def test_rows_have_as_many_cells_as_their_heads(run):
    columns = {"loss": lambda r: float(r["loss"][0]), "none": lambda r: float("nan")}
    for head, rows in (panels.by_network({"a": [run, run]}, columns), panels.by_seed({"a": [run]}, columns)):
        assert len(rows) == 1 and len(rows[0]) == len(head) and rows[0][-1] == "–"
    head, rows = panels.by_network({"a": [run, plain(20)]}, {"steps": lambda r: float(r.sizes["step"])})
    assert rows[0][1:] == ["2", "20 to 150"]
    head, rows = panels.errors_by_phase({"a": run}, "D")
    assert len(rows[0]) == len(head) == 7
    assert panels.by_network({}, columns)[1] == []
    turned = panels.by_column((["Network", "x", "y"], [["a", "1", "2"]]), "What")
    assert turned == (["What", "a"], [["x", "1"], ["y", "2"]])
    assert all(np.ndim(f(run)) == 0 for k, f in panels.assumption_columns().items() if not k.startswith("3.1"))


def test_spectra_and_turns_are_drawn_at_their_steps(run):
    assert np.allclose(curve(panels.kept_panel(run), "i = 2").y, run["kept"][:, 1])
    assert np.allclose(curve(panels.aligned_panel(run), "of the eigenvectors").y, run["aligned_share"])
    turns = panels.turn_panel(run).curves[0].y
    assert np.nanmin(turns) >= 6e-8 and np.nanmax(turns) == pytest.approx(np.nanmax(1 - run["turn"]))
    assert np.allclose(curve(panels.step_errors(run), "of D").y[1:], run["D_error"][1:])
    assert panels.phase_bounds(run).shape[1] == 2


def test_everything_draws(run):
    d = np.ones((5, 3))
    shown = [
        panels.spectrum(run), panels.shares({"one": run}), panels.residual_panel(run), panels.distances([run]),
        panels.terms(run, panels.window(run)), panels.first_terms(run, panels.window(run)), panels.products(run),
        panels.step_errors(run), panels.kept_panel(run), panels.aligned_panel(run), panels.turn_panel(run),
        *panels.beside_panels(Beside(d, 2 * d, d, np.ones(5), np.ones(5)), "title"),
    ]  # fmt: skip
    assert len(draw(*shown, columns=2).axes) == 14


def test_networks_without_a_record_are_left_out(own_root):
    (own_root / "experiments" / "a.yaml").write_text(
        "sg_lin3_seed{seed}: {for: {seed: [100, 101]}, experiment: {dataset: digits, n: 50, steps: 2}}"
    )
    assert panels.runs_of("lin3", seeds=[100, 101]) == {}
