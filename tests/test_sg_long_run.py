"""SG's section 5: trends and layers on series made to order, identities, and interventions on small networks."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from eos_utils import sg_long_panels as panels
from eos_utils import sg_long_run as long
from eos_utils.antiphase import pull
from eos_utils.data import digits
from eos_utils.gram import Gram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

T, ETA, N = 600, 0.01, 50


def run_of(s, norm, layers=None, delta=None):
    """A recorded run with this Λη/2, this ‖A‖², and these squared norms of the layers; ‖D‖² = N, so that n is N."""
    steps = np.arange(len(s))
    norm = np.asarray(norm, dtype=float)
    layers = np.column_stack([100 + norm, 50 + norm, norm]) if layers is None else layers
    return xr.Dataset(
        {
            "loss": ("step", np.ones(len(s))),
            "eta": ("step", np.full(len(s), ETA)),
            "sharpness": ("observed", np.asarray(s) * 2 / ETA),
            "sharpness_error": ("observed", np.zeros(len(s))),
            "norm_A2": ("observed", norm),
            "norm_D2": ("observed", np.full(len(s), float(N))),
            "Dv": ("observed", np.zeros(len(s)) if delta is None else delta),
            "layer_norm2": (("observed", "layer"), np.asarray(layers)),
        },
        {"step": steps, "observed": steps},
        {"experiment": json.dumps({"eta": str(ETA), "seed": 100})},
    )


def rise_then(after):
    """Λη/2 that rises from 0.5 past the edge in a hundred steps, and then what is given."""
    return np.concatenate([0.5 * 2.1 ** (np.arange(100) / 99), after])


@pytest.fixture
def wave():
    """Hovers with period 50 about the edge, with a ‖A‖² that waves along and has a trend too."""
    t = np.arange(T)
    wavy = 0.1 * np.sin(2 * np.pi * t / 50)
    return run_of(rise_then(1 + wavy), np.concatenate([np.linspace(0.9, 1, 100), 1 + wavy / 4 + t / T]))


# ---- trends ----------------------------------------------------------------------------------------


def test_trends_are_of_the_last_fifth_over_the_first_after_the_crossing():
    stairs = np.repeat([2.0, 7.0, 7.0, 7.0, 3.0], 120)
    run = run_of(rise_then(np.full(T, 1.05)), np.concatenate([np.full(80, 50.0), np.full(20, 2.0), stairs]))
    at = long.part_of(run, "after").start
    fifths = np.array_split(run["norm_A2"].values[at:], 5)
    assert 90 <= at <= 100
    assert long.long_trend(run) == pytest.approx(np.log(fifths[-1].mean() / fifths[0].mean()))
    assert long.long_trend(run) == pytest.approx(np.log(1.5), abs=0.02)
    assert abs(long.long_trend(run, "sharpness")) < 0.01
    assert long.long_trend_gap(run) == pytest.approx(long.long_trend(run) - long.long_trend(run, "sharpness"))
    with pytest.raises(ValueError, match="of='loss'"):
        long.long_trend(run, "loss")


def test_the_inner_norm_is_that_of_all_layers_but_the_last():
    run = run_of(rise_then(np.ones(T)), np.ones(T + 100))
    assert np.allclose(long.series(run, "inner"), 101 + 51)


def test_without_a_crossing_nothing_is_before_or_after():
    run = run_of(np.full(300, 0.5), np.linspace(1, 2, 300))
    statistics = dict(long.STATISTICS)
    drift = statistics.pop("layer_drift")
    assert all(np.isnan(f(run)) for f in statistics.values())
    assert drift(run) == pytest.approx(0) and np.isnan(drift(run, "after"))


def test_the_level_is_judged_in_its_worst_fifth():
    off = np.concatenate([np.full(480, 1.0), np.full(120, 0.7)])
    assert long.level_off(run_of(rise_then(off), np.ones(T + 100))) == pytest.approx(0.3, abs=0.02)
    swings = 1 + 0.5 * np.sin(2 * np.pi * np.arange(T) / 24)  # goes far, and its mean stays
    assert long.level_off(run_of(rise_then(swings), np.ones(T + 100))) < 0.03


def test_waves_are_separated_from_the_trend(wave):
    assert long.band_correlation(wave) > 0.99
    assert long.long_trend_gap(wave) > 0.5
    against = wave.copy()
    against["sharpness"] = 2 * 2 / ETA - wave["sharpness"]
    against["sharpness"][:100] = wave["sharpness"][:100]
    assert long.band_correlation(against) < -0.99
    assert np.isnan(long.band_correlation(wave, long=1001))


# ---- layers of a recorded run ----------------------------------------------------------------------


def test_correlations_with_the_inner_layers_and_their_size(wave):
    s = wave["sharpness"].values
    layers = np.column_stack([100 - s, 60 - s, s])
    run = run_of(s * ETA / 2, s, layers)
    assert long.inner_correlation(run) == pytest.approx(-1) and long.inner_correlation(run, absolute=True) == 1
    assert long.layer_correlation(run, 0) == pytest.approx(-1) and long.layer_correlation(run, -1) == pytest.approx(1)
    run["layer_norm2"][:, 0] = 300 + 2 * s  # now the first layer outweighs the second
    assert long.inner_correlation(run) == pytest.approx(1)


def test_drift_and_change_of_the_layers():
    a = np.linspace(1, 3, T + 100)
    together, apart = [np.column_stack([100 + a + x, 50 + a, a]) for x in (0, np.linspace(0, 2, T + 100))]
    s = rise_then(np.full(T, 1.05))
    assert long.layer_drift(run_of(s, a, together)) == pytest.approx(0, abs=1e-12)
    assert long.layer_drift(run_of(s, a, apart)) == pytest.approx(0.5)  # 2 beside a change of 4
    run = run_of(s, a, apart)
    at = long.part_of(run, "after").start
    assert long.layer_change(run) == pytest.approx(2 * long.layer_change(run, -1))
    assert long.layer_change(run, -1) == pytest.approx(a[-1] - a[at])


def test_log_against_log_until_the_crossing():
    s = rise_then(np.full(T, 1.05))
    run = run_of(s, 3 * s ** (1 / 2.5))
    assert long.elasticity(run) == pytest.approx(2.5) and long.explained_before(run) == pytest.approx(1)
    assert long.norm_rise_share(run) == pytest.approx(1 / 2.5)
    noise = np.random.default_rng(0).permutation(s)
    assert long.explained_before(run_of(s, 2 + noise)) < 0.2


# ---- the identities --------------------------------------------------------------------------------


def small(activation, depth=2, n=12, width=5, seed=3):
    data = digits(n, "vehicles")
    model = fully_connected(data.x.shape[1], width, depth, 1, activation, False, "fan_in", seed)
    return Objective(model, "mse", data.x.double(), data.y.double())


def test_the_checks_accept_what_is_true_and_reject_their_controls():
    assert long.layer_flow(trials=24).value < 1e-12 < 0.1 < long.layer_flow(bias=True, trials=24).value
    assert long.layers_balanced(trials=24).value < 1e-12
    for kind in ("tanh", "elu"):
        assert long.layers_balanced((kind,), trials=24).value > 0.01


@pytest.mark.parametrize("activation", ["linear", "tanh", "elu", "relu"])
def test_every_layer_moves_at_its_rate_in_small_steps(activation):
    o = small(activation)
    theta, eta = 1.3 * o.initial(), 1e-7
    rates, formulas, _ = long.layer_rates(o, theta)
    moved = theta - eta * o.gradient(theta)[1]
    norms = [torch.stack([t[c.weight].square().sum() for c in o.layers]) for t in (theta, moved)]
    assert torch.allclose((norms[1] - norms[0]) / eta, formulas, rtol=1e-4, atol=1e-5)
    assert torch.allclose(rates, formulas, rtol=1e-10)


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_neighbours_part_by_what_their_activation_is_not_homogeneous(activation):
    o = small(activation)
    theta = 1.5 * o.initial()
    _, formulas, _ = long.layer_rates(o, theta)
    factors, d = Gram(o).factors(theta), (o.outputs(theta) - o.y)[:, 0]
    for lower in (0, 1):
        w = [theta[c.weight].view(c.fan_out, c.fan_in) for c in o.layers]
        z = factors[lower][0] @ w[lower].T
        phi, slope = (torch.tanh(z), 1 - torch.tanh(z) ** 2) if activation == "tanh" else (z, torch.ones_like(z))
        back = factors[lower + 1][1][:, 0] @ w[lower + 1]
        parts = -4 / o.n * d @ ((phi - slope * z) * back).sum(dim=1)
        assert float(formulas[lower + 1] - formulas[lower]) == pytest.approx(float(parts), abs=1e-12)


def test_steps_of_gradient_descent_part_the_layers_by_their_gradients_alone():
    o = small("linear")
    theta, eta, gaps, sums = o.initial(), 0.02, [], 0.0
    layers = [c.weight for c in o.layers]
    for _ in range(40):
        gradient = o.gradient(theta)[1]
        gaps.append([float(theta[w].square().sum()) for w in layers])
        sums = sums + eta**2 * np.array([float(gradient[w].square().sum()) for w in layers])
        theta = theta - eta * gradient
    moved = np.array([float(theta[w].square().sum()) for w in layers]) - gaps[0]
    assert np.allclose(moved - moved[-1], sums - sums[-1], atol=1e-12) and abs(moved[0] - moved[-1]) > 1e-3


def test_the_second_order_part_is_that_of_all_layers_together():
    """η²‖∇L‖² of a step whose residual is along v1, from δ and Λ."""
    o = small("tanh")
    gram, theta = Gram(o), o.initial()
    values, vectors = torch.linalg.eigh(gram.at(theta).M)
    delta, top = 0.7, float(values[-1])
    gradient = pull(gram, theta, 2 / o.n * delta * vectors[:, -1])
    # A record in which this δ and Λ stand at every step but the first.
    run = run_of(rise_then(np.ones(T)), np.ones(T + 100), delta=np.full(T + 100, delta))
    run["sharpness"][:], run["norm_D2"][:] = top, float(o.n)
    each = ETA**2 * float(gradient @ gradient)
    assert np.allclose(long.second_order(run), each * np.arange(T + 100))
    crossing = run_of(rise_then(np.ones(T)), np.ones(T + 100), delta=np.ones(T + 100))
    where = long.part_of(crossing, "after")
    sums = (2 * ETA**2 / N * crossing["sharpness"].values)[where].sum()
    assert long.second_order_change(crossing) == pytest.approx(float(sums))


# ---- the intervention ------------------------------------------------------------------------------

FEW = {"steps": 60, "n": 30, "width": 12, "stride": 5}


@pytest.mark.parametrize("activation", ["linear", "tanh", "elu"])
def test_slopes_of_log_sharpness_are_those_of_differences(activation):
    o = small(activation)
    gram, theta = Gram(o), o.initial()
    v = torch.linalg.eigh(gram.at(theta).M)[1][:, -1]
    u = torch.randn(o.P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = [float(torch.linalg.eigvalsh(gram.at(theta + s * 1e-5 * u).M)[-1].log()) for s in (1, -1)]
    assert float(long.log_slopes(gram, theta, v) @ u) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("held", list(long.HELD))
def test_what_is_held_stays_and_the_rest_moves(held):
    layers = [slice(0, 4), slice(4, 10), slice(10, 12)]
    generator = torch.Generator().manual_seed(0)
    theta, step = torch.randn(2, 12, dtype=torch.float64, generator=generator)
    after = long._moved(theta, step, layers, held)
    inside = {"nothing": [], "A": layers[2:], "norm of A": layers[2:]}.get(held, layers[:2])
    for layer in layers:
        if layer not in inside:
            assert torch.equal(after[layer], (theta + step)[layer])
        elif held.startswith("norm"):
            assert float(after[layer].norm()) == pytest.approx(float(theta[layer].norm()))
            parallel = after[layer] @ (theta + step)[layer] / (after[layer].norm() * (theta + step)[layer].norm())
            assert float(parallel) == pytest.approx(1)
        else:
            assert torch.equal(after[layer], theta[layer])


def test_a_course_is_gradient_descent_and_its_norms_say_what_was_held():
    free, frozen = (long.course("tanh", 2, held, seed=7, **FEW) for held in ("nothing", "A"))
    data = digits(30, "vehicles")
    o = Objective(fully_connected(64, 12, 2, 1, "tanh", False, "fan_in", 7), "mse", data.x.double(), data.y.double())
    theta, gram = o.initial(), Gram(o)
    eta = 2 * 0.06 / float(torch.linalg.eigvalsh(gram.at(theta).M)[-1])
    for _ in range(60):
        theta = theta - eta * o.gradient(theta)[1]
    assert free.loss[-1] == pytest.approx(float(o.value(theta)), rel=1e-9)
    assert free.sharpness[-1] == pytest.approx(float(torch.linalg.eigvalsh(gram.at(theta).M)[-1]) * eta / 2, rel=1e-9)
    assert np.allclose(frozen.norms[:, -1], frozen.norms[0, -1]) and not np.allclose(
        frozen.norms[:, 0], frozen.norms[0, 0]
    )
    inner = long.course("tanh", 2, "inner", seed=7, **FEW)
    assert np.allclose(inner.norms[:, :-1], inner.norms[0, :-1]) and inner.norms[-1, -1] > inner.norms[0, -1]
    with pytest.raises(ValueError, match="held='B'"):
        long.course("tanh", 2, "B")


def test_first_order_terms_add_up_to_the_rise():
    run = long.course("linear", 2, seed=7, steps=200, stride=2, start=0.01, n=30, width=12)
    at = float(run.loss[80])
    assert long.driven(run, at).sum() == pytest.approx(long.rise(run, at), rel=0.03, abs=0.005)
    assert np.isnan(long.course("linear", 2, "A", seed=7, **FEW).rates).all()


def test_rises_are_read_at_a_loss_or_at_the_end():
    one = np.ones((3, 2))
    run = long.Course(np.array([0.0, 1, 2]), np.array([1.0, 0.5, 0.1]), np.array([1.0, 2, 4]), one, one)
    assert long.rise(run, 0.5) == pytest.approx(np.log(2)) and long.rise(run, 2.0) == 0
    assert long.rise(run, 0.3) == pytest.approx(1.5 * np.log(2))
    assert np.isnan(long.rise(run, 0.05)) and long.rise(run) == pytest.approx(np.log(4))
    assert long.driven(run, 0.3) == pytest.approx([1.5, 1.5])


def test_a_wide_random_start_has_the_terms_of_the_derivation():
    for depth in (1, 2, 3):
        terms, layers = long.at_start(depth, seeds=30), depth + 1
        assert abs(terms[0]) < 0.1 and terms[-1] / terms.sum() == pytest.approx(2 / layers, abs=0.06)
        assert np.all(np.diff(terms) > 0.4)


# ---- panels and tables -----------------------------------------------------------------------------


def test_panels_draw_what_was_put_in(wave):
    panel = panels.long_panel(wave, window=1)
    at = panel.marks[0]
    lines = {c.label: c for c in panel.curves}
    assert np.interp(at, lines["‖A‖²"].x, lines["‖A‖²"].y) == pytest.approx(1, abs=0.01)
    layers = {c.label: c for c in panels.layer_panel(wave).curves}
    assert list(layers) == ["2nd order", "layer 1", "layer 2", "A"]
    assert np.allclose(layers["A"].y, wave["norm_A2"] - wave["norm_A2"][0])
    window = panels.window_panel({"one": [wave, wave]}, most=51).curves[0]
    assert window.x[0] == 1 and all(x % 2 == 1 for x in window.x) and window.label == "one"
    held = panels.held_panel("linear", 2, **FEW)
    assert sorted(c.label for c in held.curves) == sorted(long.HELD) and held.curves[0].y[0] == 0


def test_each_seed_has_its_own_number():
    found = panels.kept("linear", 2, "A", 3, None, **FEW)
    alone = [long.rise(long.course("linear", 2, h, seed=101, **FEW)) for h in ("A", "nothing")]
    assert len(set(found)) == 3 and found[1] == pytest.approx(alone[0] / alone[1])
    assert panels.shares("linear", 2, 2, loss=0.8, **FEW).sum(axis=1) == pytest.approx([1, 1])
    assert panels.interval(found).startswith(f"{100 * found.mean():.0f} % [")
    assert panels.interval(np.array([0.5, np.nan])) == "–" == panels.spread([np.array([np.nan])])
    grown = panels.growth("A", "linear", 2, 1, **FEW)
    norms = long.course("linear", 2, seed=100, **FEW).norms[:, -1]
    assert grown == pytest.approx(norms[-1] / norms[0] - 1)


def test_rows_have_as_many_cells_as_their_heads(wave):
    for f in (panels.trends, panels.motion, panels.relations, panels.changes, panels.drive):
        head, rows = f({"one": [wave]})
        assert [len(r) for r in rows] == [len(head)] and rows[0][:2] == ["one", "1"]
    for head, rows in (panels.interventions(1, None, **FEW), panels.attribution(1, **FEW), panels.starts(3, (1,))):
        assert {len(r) for r in rows} == {len(head)}
    assert panels.over({"one": [wave]}, "two", long.level_off) == "–"
