"""SG's lemmas of section 3: closed forms, dense references, hand examples, and each check against a case that fails."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from eos_utils import sg_growth as growth
from eos_utils import sg_live, sg_residual
from eos_utils import sg_section3 as sg
from eos_utils.data import digits

VECTORS = arrays(np.float64, 5, elements=st.floats(-3, 3))


@pytest.fixture(scope="module")
def run():
    return sg_live.live("tanh", 0.8, steps=60, n=16)


# ---- live runs -----------------------------------------------------------------------------------


def test_a_live_run_is_gradient_descent_on_the_mean_squared_error(run):
    data, torch_run = digits(16, "pair", classes=(0, 4)), sg_live.live("tanh", 0.8, steps=2, n=16)
    x, y = data.x.double(), data.y.double()[:, 0]
    model = sg_live.fully_connected(64, 30, 2, 1, "tanh", False, "fan_in", 100).double()
    weights = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
    for t in range(3):
        f = torch.tanh(torch.tanh(x @ weights[0].T) @ weights[1].T) @ weights[2][0]
        np.testing.assert_allclose((f - y).detach().numpy(), torch_run.d[t], atol=1e-12)
        rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, weights, retain_graph=True)]) for v in f]
        jacobian = torch.stack(rows).numpy()
        v = torch_run.vectors[t]
        np.testing.assert_allclose((v * torch_run.values[t]) @ v.T, 2 / 16 * jacobian @ jacobian.T, atol=1e-10)
        assert torch_run.a2[t] == pytest.approx(weights[2].square().sum().item())
        gradients = torch.autograd.grad(((f - y) ** 2).mean(), weights)
        weights = [
            (w - torch_run.eta * g).detach().requires_grad_(True) for w, g in zip(weights, gradients, strict=True)
        ]
    assert torch_run.scaled[0] == pytest.approx(0.8)
    assert (np.einsum("ti,ti->t", run.vectors[1:, :, 0], run.vectors[:-1, :, 0]) >= 0).all()
    assert (np.diff(run.values, axis=1) <= 1e-9).all()


def test_zero_outputs_and_the_end_of_a_diverging_run():
    silent = sg_live.live("linear", 0.1, steps=3, n=16, output=0.0)
    np.testing.assert_array_equal(silent.d[0], -silent.y)
    assert silent.eta == sg_live.live("linear", 0.1, steps=3, n=16).eta
    lost = sg_live.live("linear", 30.0, steps=200, n=16)
    assert len(lost.d) < 201 and np.isfinite(lost.d).all()


def test_the_change_of_the_output_layer_is_the_exact_formula():
    for start in (0.8, 1.3):
        assert sg.drops("tanh", start, output=1.5, steps=12).identity < 1e-12
    halved = sg_live.live("tanh", 0.8, steps=12)
    first = -4 * halved.eta / 60 * halved.df[:-1]
    assert np.abs(np.diff(halved.a2) - first).max() > 1e-6  # the second-order term is there


# ---- Lemma 3.1 -----------------------------------------------------------------------------------


@given(VECTORS, VECTORS)
def test_the_sign_of_df_is_a_sphere(d, y):
    f = d + y
    assert d @ f == pytest.approx(((f - y / 2) ** 2).sum() - (y @ y) / 4, abs=1e-9)


def test_flows_are_the_closed_form():
    shown = sg.flows(50)
    assert shown.shape == (50, sg.PIECES + 1)
    assert (shown[:, 0] == 0).all() and (shown[:, 1:] < 0).all() and (shown >= -0.25 - 1e-12).all()
    # One direction at a time: D_i F_i = −e^{−s}(1 − e^{−s}) z².
    still = sg.turning(np.array([[0.5, 1.0, 2.0]]), np.zeros((1, 3, 3)), np.array([[1.0, 2.0, -3.0]]), 2.0, 10)
    s = np.linspace(0, 2, 11)[:, None] * np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(still.d[0] * still.f[0], -np.exp(-s) * (1 - np.exp(-s)) * [1, 4, 9], atol=1e-12)


def test_the_sign_needs_fixed_eigenvectors_a_zero_start_and_a_positive_time():
    assert sg.flow_sign(at_zero=True, trials=300).value == 1
    assert sg.flow_sign(at_zero=False, trials=300).value == 0
    assert sg.flow_sign(at_zero=False, fixed=False, trials=2000).value > 0.005
    assert sg.flow_sign(at_zero=False, zero=False, trials=300).value > 0.5


def test_the_flow_by_hand_in_the_fixed_frame():
    """The components of :func:`by_hand` are those of a flow D' = −M(t)D in R³, integrated by a Runge–Kutta method."""
    found, omega, values = sg.by_hand(400), np.array([[0.0, 1, 0], [-1, 0, 1], [0, -1, 0]]), np.array([0.1, 0.01, 10])
    y = -np.array([5.0, 1, 1]) / np.sqrt(27)

    def frame(t):
        return expm(omega * t)  # rows are the eigenvectors

    def flow(t, d):
        v = frame(t)
        return -v.T @ (values * (v @ d))

    solved = solve_ivp(flow, (0, 2), -y, rtol=1e-9, atol=1e-11, t_eval=[0.5, 1.0, 1.5, 2.0], method="BDF")
    for t, d in zip(solved.t, solved.y.T, strict=True):
        at = round(t * 100)
        np.testing.assert_allclose(frame(t) @ d, found.d[0, at], atol=1e-6)
        np.testing.assert_allclose(frame(t) @ (d + y), found.f[0, at], atol=1e-6)
        # Assumption 3.5(ii), from difference quotients of the eigenvectors.
        speed = (frame(t + 1e-6) - frame(t - 1e-6)) / 2e-6
        assert bool((speed @ (d + y) < values * (frame(t) @ d)).all())
        assert found.condition[0, at]
    assert solved.y[:, -1] @ (solved.y[:, -1] + y) > 0.3  # and yet DᵀF is positive


def test_the_relaxed_assumption_needs_the_sign_rule():
    assert sg.turning_sign(sign_rule=False, trials=400).value > 0.05
    assert sg.turning_sign(sign_rule=True, trials=400).value == 0
    found = sg.turnings(400)
    falls = np.diff(found.f, axis=1) <= 1e-12  # (ii) says that all F_i fall
    assert falls[found.condition[:, 1:]].mean() > 0.99


def test_a_real_network_near_the_flow_can_have_a_positive_product():
    run = sg_live.live("tanh", 0.1, steps=60, seed=101, output=0.0)
    assert run.eta * run.values[:, 0].max() < 0.5
    assert (run.df[1:27] < 0).all() and (run.df[30:60] > 0).all()


# ---- Propositions 3.1 and 3.2, Lemma 3.3 ---------------------------------------------------------


@given(VECTORS, VECTORS)
def test_proposition_3_1_with_its_margin(d, y):
    d_norm, y_norm = np.linalg.norm(d), np.linalg.norm(y)
    assert d @ (d + y) >= d_norm * (d_norm - y_norm) - 1e-9


def test_checks_of_the_propositions_can_fail():
    assert sg.sign_above(1.0, trials=500).value == 0
    assert sg.sign_above(0.9, trials=500).value > 0.1
    assert sg.drop_violated("first order", trials=500).value == 0
    assert sg.drop_violated("small M_A", trials=500).value == 0
    assert sg.drop_violated("gradient descent", trials=500).value > 0.05


def test_output_steps_have_the_exact_second_order_term():
    steps = sg.output_steps(300)
    assert len(steps.exact) > 200
    assert (steps.exact >= steps.first_order).all()  # DᵀM_A D ≥ 0
    assert (steps.first_order < steps.bound).all()


@given(st.floats(0.001, 0.4))
def test_one_neuron_crosses_the_bound_where_the_algebra_says(eta):
    exact, first, bound = sg.one_neuron(eta)
    assert exact == pytest.approx(first + (2 * eta * 3 * 2) ** 2)
    assume(abs(eta - 5 / 36) > 1e-9)
    assert (exact >= bound) == (eta > 5 / 36)


def test_networks_violate_the_bound_and_survive():
    found = sg.drops("linear", 0.9, output=1.0, steps=30, seed=101)
    assert found.survives and found.violations >= 1 and found.violations <= found.steps
    assert sg.drops("linear", 0.5, steps=20).violations == 0


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.01, 1.99))
def test_lemma_3_3_on_dense_matrices(seed, top):
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(4, 4))
    m = root @ root.T
    m *= top / np.linalg.eigvalsh(m)[-1]
    u = generator.normal(size=4)
    alpha = min(2 - top, float(np.linalg.eigvalsh(m)[0]))
    assert np.linalg.norm(u @ (np.eye(4) - m)) <= (1 - alpha) * np.linalg.norm(u) + 1e-10


def test_lemma_3_3_checks():
    assert sg.contraction_violated(1, trials=500).value == 0
    assert sg.contraction_violated(2, trials=500).value > 0.3


# ---- Lemma 3.2 -----------------------------------------------------------------------------------


def test_counterexample_by_hand():
    """ηλ = (2.5, 0) and a turn that leaves nothing of D along v₁, although c = 9.46 and the claimed factor is 1.33."""
    eps, tau = 0.01, 0.5
    angle = math.acos(1 - eps)
    d = np.array([math.tan(angle) / 1.5, 1.0])
    c = d[0] / (eps * np.linalg.norm(d))
    assert c == pytest.approx(9.46, abs=0.01) and tau > 1 / (1 - eps - 1 / c) - 1
    new = np.diag([1 - 2.5, 1.0]) @ d
    assert abs(new @ [math.cos(angle), math.sin(angle)]) < 1e-12
    assert growth.factor(tau, eps, c) == pytest.approx(1.33, abs=0.01)
    assert growth.worst_growth(tau, eps, np.array(d[0] / np.linalg.norm(d))) == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 10**6), st.floats(1e-5, 0.1), st.floats(0.0, 2.0))
def test_the_corrected_step_on_dense_matrices(seed, eps, tau):
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    values = np.append(2 + tau, (2 + tau) * generator.random(3))
    d, v = generator.normal(size=4), basis[:, 0]
    w = generator.normal(size=4)
    w -= (w @ v) * v
    turned = (1 - eps) * v + math.sqrt(2 * eps - eps**2) * w / np.linalg.norm(w)
    c = abs(d @ v) / (math.sqrt(2 * eps) * np.linalg.norm(d))
    assume(c > 1 / (1 - eps))
    new = d - basis @ (values * (basis.T @ d))
    assert abs(new @ turned) >= growth.factor(tau, eps, c) * abs(d @ v) * (1 - 1e-9)


def test_growth_checks_can_fail():
    assert growth.growth_missed("printed", trials=500).value > 0.1
    assert growth.growth_missed("root", trials=500).value == 0
    assert growth.growth_persists("start", trials=500).value > 0.02
    assert growth.growth_persists("every step", trials=500).value == 0
    room = growth.growth_persists("start with room", trials=500)
    assert room.value == 0 and room.trials > 100
    assert growth.growth_exceeds("falling", trials=100).value == 1
    steady = growth.growth_exceeds("steady", trials=500)
    assert steady.value == 0 and steady.trials > 300


def test_draws_meet_the_hypotheses():
    for version in ("printed", "root"):
        found = growth.growths(version, 500)
        assert (found.claimed > 1).all() and (found.c > 1).all()
    draw = growth.courses(500)
    assert (growth.factor(draw.tau, draw.eps, draw.c) > 1).all() and (draw.share <= 1).all()


def test_a_walk_is_a_sequence_of_steps_and_turns():
    found = growth.walk(np.array([0.6]), np.array([[0.5], [0.5]]), np.array([[0.1], [-0.2]]), np.array([0.7]))
    d, v = np.array([0.6, 0.8]), np.array([1.0, 0.0])
    for t, angle in enumerate((0.1, -0.2)):
        across = d - (d @ v) * v
        side = across / np.linalg.norm(across)
        d = -1.5 * (d @ v) * v + 0.7 * across
        v = math.cos(angle) * v - np.sign(d @ v) * math.sin(angle) * side  # a positive turn loses some of D
        assert found.along[t + 1, 0] == pytest.approx(abs(d @ v))
        assert found.norm[t + 1, 0] == pytest.approx(np.linalg.norm(d))
    falling = growth.worst_walk(0.01, 7, 0.2, 40).along[:, 0]
    assert falling[-1] < falling[0] and growth.factor(0.2, 0.01, 7) > 1


def test_along_a_network_only_assumption_3_2_is_in_the_way():
    counts = growth.growth_counts(sg_live.live("tanh", 0.8, 250))
    assert counts["root"] > 20 and counts["root beyond"] == 0
    assert counts["printed"] >= counts["root"] and counts["printed beyond"] > 0


# ---- Lemmas 3.4 and 3.5 --------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(1e-6, 0.3), st.floats(0.1, 4))
def test_the_sharp_form_of_lemma_3_4_on_dense_matrices(seed, eps, top):
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    step = np.eye(4) - basis @ np.diag(np.append(top, top * generator.random(3))) @ basis.T
    d, v = generator.normal(size=4), basis[:, 0]
    w = generator.normal(size=4)
    w -= (w @ v) * v
    turned = (1 - eps) * v + math.sqrt(2 * eps - eps**2) * w / np.linalg.norm(w)
    new = step @ d
    e = new - (new @ turned) * turned - step @ (d - (d @ v) * v)
    np.testing.assert_allclose(e, (np.outer(v, v) - np.outer(turned, turned)) @ new, atol=1e-10)
    assert np.linalg.norm(e) <= math.sqrt(2 * eps) * max(1, top - 1) * np.linalg.norm(d) * (1 + 1e-9)


def test_the_constant_of_lemma_3_4():
    assert sg_residual.residual_violated("printed", trials=4000).value > 0.005
    assert sg_residual.residual_violated("printed", low=1 + math.sqrt(2) / 6, trials=4000).value == 0
    assert sg_residual.residual_violated("sharp", trials=4000).value == 0
    assert sg_residual.residuals(4000).sharp.max() > 0.99  # no smaller constant would do


def test_tracking_stays_within_the_constant_and_needs_one_above_1():
    found = sg_residual.tracking(300, 150)
    assert np.isfinite(found.ratio).all() and 1 < found.ratio.max() < sg_residual.C_R
    assert sg_residual.tracking_ratio(300, 150).value < 1 < sg_residual.tracking_ratio(300, 150, scale=0.2).value


def test_parts_of_a_live_run(run):
    found = sg_live.parts(run)
    v = run.vectors[:, :, 0]
    follower = run.d[0] - (run.d[0] @ v[0]) * v[0]
    for t in range(5):
        m = (run.vectors[t] * run.values[t]) @ run.vectors[t].T
        projection, after = (np.eye(16) - np.outer(v[s], v[s]) for s in (t, t + 1))
        r, new = projection @ run.d[t], after @ run.d[t + 1]
        assert found.r[t] == pytest.approx(np.linalg.norm(r))
        assert found.e1[t] == pytest.approx(np.linalg.norm(new - r + run.eta * m @ r), abs=1e-12)
        error = np.linalg.norm(run.d[t + 1] - run.d[t] + run.eta * m @ run.d[t])
        assert found.error[t] == pytest.approx(error, abs=1e-12)
        follower = follower - run.eta * m @ projection @ follower
        assert found.follower[t + 1] == pytest.approx(np.linalg.norm(follower))
        assert found.apart[t + 1] == pytest.approx(np.linalg.norm(new - follower), abs=1e-12)
        assert found.leaked[t + 1] == pytest.approx(abs(follower @ v[t + 1]), abs=1e-12)
    assert (found.e1 <= found.sharp + found.error + 1e-12).all()
    assert (found.grown >= found.bound - found.slack - 1e-9).all()


def test_constants_of_linear_and_tanh_networks():
    linear = sg_residual.constants(sg_live.live("linear", 0.8, 30))
    assert abs(linear.least) < 1e-14 and linear.bound == math.inf  # centred data: M annihilates the vector of ones
    tanh = sg_residual.constants(sg_live.live("tanh", 0.8, 30))
    assert 1e-6 < tanh.least < 1e-3 and math.isfinite(tanh.bound) and tanh.bound > tanh.b_d


# ---- recorded runs -------------------------------------------------------------------------------


def record(sharpness, df, d2, smallest=(0.01,), turn=None, r2=None, eta=0.01):
    steps = np.arange(len(sharpness))
    turn = np.ones(len(steps)) if turn is None else np.asarray(turn)
    return xr.Dataset(
        {
            "eta": ("step", np.full(len(steps), eta)),
            "sharpness": ("observed", np.asarray(sharpness, float)),
            "DF": ("observed", np.asarray(df, float)),
            "norm_D2": ("observed", np.asarray(d2, float)),
            "norm_R2": ("observed", np.asarray(d2 if r2 is None else r2, float)),
            "turn": ("observed", np.where(steps == 0, np.nan, turn)),
            "smallest": ("spectral", np.asarray(smallest, float)),
            "gram_eigenvalue": (("spectral", "gram_eig"), np.tile([100.0, 1.0], (len(smallest), 1))),
        },
        coords={"step": steps, "observed": steps},
    )


def test_decades_of_the_smallest_eigenvalue():
    assert sg_residual.smallest_decades(record([100], [0], [1], smallest=(1.0, 0.01))) == pytest.approx(4)
    assert sg_residual.smallest_decades(record([100], [0], [1], smallest=(1.0, -1e-15))) == 16


def test_decades_of_the_bound():
    found = record([150, 300], [0, 0], [9, 25], smallest=(0.5,), turn=[1, 0.98], r2=[4, 1])
    expected = 2 * math.sqrt(6) * 2 * 5 * math.sqrt(0.02) / (0.01 * 0.5) / 2
    assert sg_residual.bound_decades(found) == pytest.approx(math.log10(expected))
    still = record([150, 300], [0, 0], [9, 25], smallest=(50.0,), r2=[4, 1], turn=[1, 1 - 1e-9])
    assert sg_residual.bound_decades(still) < 0  # can be informative
    assert sg_residual.bound_decades(record([150], [0], [9], smallest=(0.0,))) == sg_residual.NO_BOUND
