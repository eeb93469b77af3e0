"""Both terms of the Hessian against dense matrices and closed forms; statistics of SG's section 2 on made runs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import xarray as xr

from eos_utils import sg_hessian, store
from eos_utils import sg_hessian_panels as panels
from eos_utils import terms as rooms
from eos_utils.curvature import GaussNewton, Hessian, dense
from eos_utils.experiment import Experiment, Measure
from eos_utils.gram import Gram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.run import compute


def problem(activation="tanh", depth=2, n=6, d=10, width=4, seed=100):
    generator = np.random.default_rng(seed)
    x, y = (torch.from_numpy(generator.normal(size=(n, size))) for size in (d, 1))
    model = fully_connected(d, width, depth, 1, activation, False, "pytorch", seed)
    objective = Objective(model, "mse", x, y)
    return objective, 1.5 * objective.initial()


def dense_terms(objective, theta):
    h, g = (dense(kind(objective, theta)) for kind in (Hessian, GaussNewton))
    s, u = torch.linalg.eigvalsh(h - g), torch.linalg.eigh(g)[1][:, -1]
    values = [torch.linalg.eigvalsh(h)[-1], torch.linalg.eigvalsh(g)[-1], s[-1], s[0]]
    return [float(v) for v in values], float(u @ (h - g) @ u)


# ---- H = G + S -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "n", "d"), [("linear", 6, 10), ("tanh", 6, 10), ("elu", 12, 5)])
def test_the_terms_are_those_of_the_dense_matrices(activation, n, d):
    objective, theta = problem(activation, n=n, d=d)
    values, along = dense_terms(objective, theta)
    found = rooms.terms(objective, theta)
    assert found.values == pytest.approx(values, rel=1e-3)
    assert found.along == pytest.approx(along, rel=1e-2, abs=1e-2 * abs(values[2]))
    assert values[3] <= values[0] - values[1] <= values[2] and values[0] - values[1] >= along - 1e-12


@pytest.mark.parametrize("width", [1, 3])
def test_one_hidden_linear_layer_has_plus_and_minus_the_gradient_in_the_product(width):
    objective, theta = problem("linear", depth=1, width=width)
    d = objective.outputs(theta) - objective.y
    level = float((2 / objective.n * objective.x.T @ d).norm())
    s = dense(Hessian(objective, theta)) - dense(GaussNewton(objective, theta))
    spectrum = torch.linalg.eigvalsh(s)
    expected = [-level] * width + [0.0] * (objective.P - 2 * width) + [level] * width
    assert spectrum.numpy() == pytest.approx(np.array(expected), abs=1e-12)
    assert rooms.terms(objective, theta).values[2:] == pytest.approx((level, -level), rel=1e-6)


def test_the_span_of_the_inputs_is_enough_and_less_is_not():
    objective, theta = problem(n=4, d=12)
    plane = rooms.span(objective)
    assert plane is not None and plane.x.shape == (4, 4)
    assert torch.allclose(plane.x @ plane.axes.T, objective.x)
    for whole, small in zip(
        (dense(Hessian(objective, theta)), dense(GaussNewton(objective, theta))),
        rooms.operators(objective, theta, plane)[:2],
        strict=True,
    ):
        reduced = small.apply(torch.eye(small.shape[0], dtype=theta.dtype))
        # The same eigenvalues, and zeros for what was left out.
        both = torch.linalg.eigvalsh(whole), torch.linalg.eigvalsh((reduced + reduced.T) / 2)
        padded = torch.cat([both[1], both[1].new_zeros(len(both[0]) - len(both[1]))]).sort().values
        assert torch.allclose(both[0], padded, atol=1e-12)
    less = type(plane)(plane.axes[:, :2], plane.x[:, :2])
    assert abs(rooms.terms(objective, theta, plane=less).values[0] / rooms.terms(objective, theta).values[0] - 1) > 1e-3
    assert rooms.span(problem(n=12, d=5)[0]) is None


def test_the_ends_of_a_spectrum_without_gaps():
    class Diagonal:
        shape, device, dtype = (3000, 3000), torch.device("cpu"), torch.float64
        levels = torch.linspace(-2, 1, 3000, dtype=torch.float64)

        def apply(self, rows):
            return rows * self.levels

    values, residuals = rooms.ends(Diagonal())
    assert 0.97 < values[0] <= 1 and -2 <= values[1] < -1.97 and max(residuals) < 0.2
    assert rooms.ends(Diagonal(), steps=4)[0][0] < values[0]


def test_the_difference_is_what_the_next_step_takes_off_the_sharpness():
    """With D along v₁, to first order in η: u'Su = -ΔΛ/(2ηΛ), of either sign of D'v₁."""
    for sign in (1.0, -1.0):
        objective, theta = problem("tanh", n=5, d=8)
        v = torch.linalg.eigh(Gram(objective).at(theta).M)[1][:, -1:]
        objective = Objective(objective.model, "mse", objective.x, objective.outputs(theta) - sign * 0.7 * v)
        level, eta = float(torch.linalg.eigvalsh(Gram(objective).at(theta).M)[-1]), 1e-6
        moved = theta - eta * objective.gradient(theta)[1]
        change = float(torch.linalg.eigvalsh(Gram(objective).at(moved).M)[-1]) - level
        along = dense_terms(objective, theta)[1]
        assert abs(along) > 1e-3 * level
        assert along == pytest.approx(-change / (2 * eta * level), rel=1e-3)


def test_the_observer_measures_at_odd_strides_and_continues():
    objective, theta = problem()
    observer = rooms.Terms(3)
    assert [t for t in range(8) if observer.due(t)] == [0, 3, 6]
    for step in (0, 3):
        observer.measure(step, 0.1, objective, theta * (1 + step / 10))
    variables, coords = observer.variables()
    assert coords["weighed"][1].tolist() == [0, 3]
    assert variables["hessian"][1][1] == pytest.approx(dense_terms(objective, theta * 1.3)[0][0], rel=1e-3)
    assert set(variables) == {"along", *rooms.FIELDS, *(f"{name}_error" for name in rooms.FIELDS)}
    again = rooms.Terms(3)
    again.load_state(observer.state())
    again.measure(6, 0.1, objective, theta)
    assert again.rows["step"] == [0, 3, 6] and observer.entered() == 0
    for wrong in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match="terms="):
            rooms.Terms(wrong)


def test_a_run_with_both_terms():
    experiment = Experiment(
        **{"dataset": "digits", "n": 40, "width": 6, "depth": 1, "activation": "tanh", "bias": False, "init": "fan_in"},
        **{"labels": "pair", "classes": (0, 4), "loss": "mse", "eta": "0.02", "steps": 6, "dtype": "float64"},
    )
    run, _ = compute(experiment, Measure(k=1, stride=3, gram=3, terms=3), progress=False)
    assert run["weighed"].values.tolist() == [0, 3, 6]
    # G has the spectrum of M, and H is the Hessian that is measured beside it.
    assert run["gauss_newton"].values == pytest.approx(run["sharpness"].sel(observed=[0, 3, 6]).values, rel=2e-3)
    assert run["hessian"].values == pytest.approx(run["eigenvalue"].values[:, 0], rel=2e-3)
    assert 0 < sg_hessian.other_term(run) and np.isnan(sg_hessian.other_term(run.drop_vars("rest_top")))
    plain, _ = compute(experiment, Measure(k=1, stride=3), progress=False)
    assert "weighed" not in plain.coords and np.array_equal(plain["loss"], run["loss"])
    assert "terms" in store.optional(["weighed"]) and "terms" not in store.optional(["observed", "fc"])
    assert dataclasses.asdict(Measure())["terms"] == 0


# ---- statistics ----------------------------------------------------------------------------------


def made(level, hessian, loss=1.0, eta=0.1, stride=21, **more):
    """A run with Λη/2 = ``level``, and λ₁(H) = ``hessian`` Λ at every ``stride``-th step."""
    steps = np.arange(len(level))
    measured = steps[::stride]
    return xr.Dataset(
        {
            "loss": ("step", np.full(len(steps), loss)),
            "eta": ("step", np.full(len(steps), eta)),
            "sharpness": ("observed", 2 * np.asarray(level) / eta),
            "norm_D2": ("observed", np.full(len(steps), 50.0)),
            "eigenvalue": (("measured", "eig"), (np.asarray(hessian) * 2 * level[::stride] / eta)[:, None]),
            **more,
        },
        {"step": steps, "observed": steps, "measured": measured},
        {"experiment": json.dumps({"eta": str(eta)})},
    )


def test_the_ratio_and_its_parts():
    level = np.linspace(0.5, 1.5, 211)
    ratio = np.where(np.arange(11) < 5, 1.01, 0.9)
    run = made(level, ratio)
    assert sg_hessian.both(run).ratio == pytest.approx(ratio)
    assert sg_hessian.hessian_apart(run, "before", 1.0) == pytest.approx(0.1)  # at 105, shortly before it crosses
    assert sg_hessian.hessian_apart(run, "before", 0.5) == pytest.approx(0.01)
    assert sg_hessian.hessian_apart(run, "after") == pytest.approx(0.1)
    assert sg_hessian.hessian_ratio(run) == pytest.approx(0.9)
    assert sg_hessian.hessian_ratio(run, quantile=1.0) == pytest.approx(1.01)
    parts = [len(sg_hessian.both(run, part).step) for part in ("before", "after")]
    assert parts == [6, 5]
    with pytest.raises(ValueError, match="part='late'"):
        sg_hessian.both(run, "late")


def test_a_run_that_does_not_cross_has_no_part_after():
    run = made(np.full(100, 0.5), np.ones(5))
    assert np.isnan(sg_hessian.hessian_apart(run, "after")) and np.isnan(sg_hessian.hessian_ratio(run, "after"))
    assert len(sg_hessian.both(run, "before").step) == 5
    assert sg_hessian.foreseen_signs([run]) == (0, 0) and np.isnan(sg_hessian.foreseen_error(run))


def test_what_the_next_change_foresees():
    t = np.arange(211)
    level = np.where(t < 50, 0.5 + t / 100, 1.1 + 0.1 * (-1.0) ** t)
    found = sg_hessian.both(made(level, np.ones(11)), "after")
    # Λ goes down by 0.4/η after an even step and up after an odd one; ΔΛ/(2ηΛ²) with Λ = 2·level/η
    expected = 1 + 0.1 * (-1.0) ** found.step / (2 * level[found.step] ** 2)
    assert found.foreseen[:-1] == pytest.approx(expected[:-1]) and np.isnan(found.foreseen[-1])
    as_foreseen = made(level, np.concatenate([np.ones(11 - len(expected)), expected]))
    assert sg_hessian.foreseen_signs([as_foreseen, as_foreseen]) == (2 * (len(expected) - 1),) * 2
    assert sg_hessian.foreseen_error(as_foreseen) == pytest.approx(0, abs=1e-12)
    against = made(level, np.concatenate([np.ones(11 - len(expected)), 2 - expected]))
    assert sg_hessian.foreseen_signs([against])[0] == 0 and sg_hessian.foreseen_error(against) == pytest.approx(2)


def test_how_far_the_matrix_has_moved_is_bounded_by_the_eigenvalues():
    generator = np.random.default_rng(100)
    a, b = (m @ m.T for m in generator.normal(size=(2, 10, 10)))
    values = np.array([np.linalg.eigvalsh(m)[::-1] for m in (a, b, a)])
    more = {
        "gram_eigenvalue": (("spectral", "gram_eig"), values),
        "kept": (("spectral", "kept_eig"), np.array([[1.0], [0.4], [0.9]])),
    }
    run = made(np.array([0.5, 0.4, 0.8]), [1.0], **more)
    shift = np.linalg.norm(values[1] - values[0])
    assert sg_hessian.gram_moved(run) == pytest.approx(shift / np.linalg.norm(values[0]))
    assert shift <= np.linalg.norm(a - b)
    assert sg_hessian.sharpness_moved(run) == pytest.approx(0.6) and sg_hessian.first_vector(run) == 0.4


def test_the_other_term_counts_both_signs():
    run = xr.Dataset({
        "rest_top": ("weighed", [1.0, 1.0, 2.0]),
        "rest_bottom": ("weighed", [-3.0, -1.0, -1.0]),
        "gauss_newton": ("weighed", [4.0, 4.0, 4.0]),
    })  # fmt: skip
    assert sg_hessian.other_share(run).tolist() == [0.75, 0.25, 0.5]
    assert sg_hessian.other_term(run, 1.0) == 0.75 and sg_hessian.other_term(run, 0.5) == 0.5


# ---- checks --------------------------------------------------------------------------------------


def test_one_spectrum_under_three_names_and_the_controls():
    assert sg_hessian.shared_spectrum(trials=15).value < 1e-12
    assert sg_hessian.shared_spectrum(scale=1.0, trials=15).value == pytest.approx(1.0)
    found = sg_hessian.carried_eigenvectors(trials=15)
    assert found.value < 1e-9 and found.trials > 15
    assert sg_hessian.fisher_apart(trials=15).value < 1e-12
    assert sg_hessian.fisher_apart(variance=1.0, trials=15).value == pytest.approx(0.5)


def test_the_zeros_are_not_shared():
    case = next(c for c in sg_hessian.cases(15) if c.g.shape[0] > c.m.shape[0])
    values, vectors = torch.linalg.eigh(case.g)
    assert float((case.j @ vectors[:, 0]).norm()) < 1e-12  # Ju = 0 for λ = 0
    assert float(torch.linalg.eigvalsh(case.m)[0]) > 1e-6 * float(values[-1])


def test_the_spectrum_of_inputs():
    x = np.random.default_rng(100).normal(size=(20, 3, 10))
    centred = x - x.mean(axis=0)
    found = sg_hessian.spectrum_of(centred)
    squares = np.linalg.svd(centred.reshape(20, -1), compute_uv=False) ** 2
    assert found.rank == 19 and found.ratio == pytest.approx(squares[0] / squares[1])
    assert found.later == pytest.approx((squares[1:18] / squares[2:19]).max())
    for f in sg_hessian.PREPROCESSINGS.values():
        assert f(x).shape == x.shape
    assert np.abs(sg_hessian.PREPROCESSINGS[sg_hessian.CENTRED](x).mean(axis=0)).max() < 1e-12


@pytest.mark.cifar
def test_the_stored_spectra_are_those_of_the_images():
    for subset, row in sg_hessian.measure_inputs().items():
        for what, found in row.items():
            kept = sg_hessian.inputs()[subset][what]
            assert kept.leading == pytest.approx(found.leading, rel=1e-8) and kept.rank == found.rank
            assert kept.later == pytest.approx(found.later, rel=1e-6)


def test_about_three_takes_the_worse_subset():
    ratios = [row[sg_hessian.CENTRED].ratio for row in sg_hessian.inputs().values()]
    assert sg_hessian.ratio_from_three().value == pytest.approx(max(abs(r - 3) / 3 for r in ratios))
    assert sg_hessian.later_gap().trials == 2


# ---- the small run, and what is drawn ------------------------------------------------------------


def test_a_small_run_is_watched_around_its_peak():
    experiment = Experiment(
        **{"dataset": "digits", "n": 40, "width": 6, "depth": 1, "activation": "linear", "bias": False},
        **{"labels": "pair", "classes": (0, 4), "loss": "mse", "eta": "0.02", "steps": 6, "init": "fan_in"},
    )
    found = sg_hessian.watch(experiment, start=0.9, steps=60, before=3, after=3)
    assert found.scaled[0] == pytest.approx(0.9) and int(found.scaled.argmax()) in found.step
    assert (found.bottom - 2e-3 <= found.hessian - 1).all() and (found.hessian - 1 <= found.top + 2e-3).all()
    assert found.top == pytest.approx(-found.bottom, rel=1e-3)  # one hidden linear layer
    assert (found.hessian - 1 >= found.along - 2e-3).all()
    assert len(panels.watched_panels(found)) == 3


def test_panels_and_tables_of_made_runs():
    run = made(np.concatenate([np.linspace(0.5, 1.2, 150), np.linspace(1.2, 0.6, 61)]), np.linspace(1, 1.1, 11))
    assert [len(panel.curves) for panel in panels.ratio_panels(run)] == [2, 2]
    zoom = panels.zoom_panel(run, around=30)
    assert set(zoom.curves[1].x) == {189, 210}
    groups = {"one": [run], "two": [run, run]}
    assert panels.against_residual(groups).curves[1].x.shape == (22,)
    assert panels.against_change(groups).curves[-1].label == "equal"
    other = xr.Dataset(
        {name: ("weighed", [1.0, 2.0]) for name in ("rest_top", "gauss_newton", "hessian")}
        | {"rest_bottom": ("weighed", [-3.0, -2.0])},
        {"weighed": [0, 51]},
    )
    header, rows = panels.other_table({"one": [other]})
    assert len(header) == len(rows[0]) and rows[0][4] == "3"
    assert len(panels.other_panels({"one": [other, other]})[0].curves) == 2
    header, rows = panels.inputs_table(sg_hessian.inputs())
    assert len(rows) == 2 * len(sg_hessian.PREPROCESSINGS) and len(rows[0]) == len(header) == 5
    assert len(panels.inputs_panels(sg_hessian.inputs())) == 2
