"""SG, section 4: the closed recursion against explicit gradient descent and autograd; checks where they must fail."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_utils import sg_courses as courses
from eos_utils import sg_section4 as s4
from eos_utils import sg_tables as tables
from eos_utils import sg_theorems as theorems

SMALL = s4.Spectrum(np.array([20.0, 8.0, 3.0]), np.array([2.0, -3.0, 1.5]), 12, 5)


def one_run(m=7, seed=1, spectrum=SMALL):
    """Data and weights in the open, and the same run as the recursion sees it."""
    generator = np.random.default_rng(seed)
    x, y = s4.inputs(spectrum, seed)
    a, w = generator.normal(size=m) * m**-0.5, generator.normal(size=(m, spectrum.d)) * spectrum.d**-0.5
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    r = len(spectrum.lam)
    sign = np.sign(spectrum.z) * np.sign(vt[:r] @ y)
    u, v = u[:, :r] * sign, vt[:r].T * sign
    state = s4.State(np.array([a @ a]), (u.T @ w.T @ a)[None], (u.T @ w.T @ w @ u)[None])
    return x, y, v, a, w, state


def dense_gram(x, y, a, w):
    """(2/n)JJᵀ from autograd."""
    m = len(a)

    def f(a, w):
        return torch.as_tensor(x).T @ w.T @ a / m**0.5

    jac = torch.autograd.functional.jacobian(f, (torch.as_tensor(a), torch.as_tensor(w)))
    j = torch.cat([part.reshape(len(y), -1) for part in jac], dim=1)
    return (2 / len(y) * j @ j.T).numpy()


@given(st.integers(1, 9), st.integers(0, 10_000), st.floats(0.05, 2.2))
def test_recursion_is_gradient_descent(m, seed, edge):
    x, y, v, a, w, state = one_run(m, seed)
    width = np.array([float(m)])
    eta = edge / s4.extreme(s4.gram(SMALL, width, state))[1]
    for _ in range(4):
        np.testing.assert_allclose(v @ s4.outputs(SMALL, width, state)[0], s4.outputs_of(x, a, w), atol=1e-10)
        full, second = s4.printed_star(x, y, float(eta[0]), a, w)
        np.testing.assert_allclose(v @ s4.gram(SMALL, width, state)[0] @ v.T, full - second, atol=1e-9)
        np.testing.assert_allclose(v @ s4.second_order(SMALL, s4.Width(width, eta), state)[0] @ v.T, second, atol=1e-9)
        a, w = s4.explicit_step(x, y, float(eta[0]), a, w)
        state = s4.step(SMALL, s4.Width(width, eta), state)
        if np.abs(w).max() > 1e3:
            return
        assert state.a[0] == pytest.approx(a @ a, rel=1e-9)


def test_explicit_step_and_gram_are_those_of_autograd():
    x, y, _, a, w, _ = one_run()
    ta, tw = (torch.tensor(v, requires_grad=True) for v in (a, w))
    f = torch.as_tensor(x).T @ tw.T @ ta / len(a) ** 0.5
    ((f - torch.as_tensor(y)) ** 2).mean().backward()
    new_a, new_w = s4.explicit_step(x, y, 0.3, a, w)
    np.testing.assert_allclose(new_a, a - 0.3 * ta.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(new_w, w - 0.3 * tw.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose(s4.printed_star(x, y, 0.3, a, w, 0.0)[0], dense_gram(x, y, a, w), atol=1e-12)


def test_only_the_printed_second_order_term_is_exact():
    assert theorems.update_error().value < 1e-9
    for factor, error in ((-1, 2), (0, 1), (0.5, 0.5), (2, 1)):
        assert theorems.update_error(factor).value == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("m", [2, 40])
def test_start_has_the_law_of_drawn_weights(m):
    _, state = s4.start(SMALL, [m], 4000)
    assert state.a.mean() == pytest.approx(1, rel=0.05)
    np.testing.assert_allclose(state.g.mean(axis=0), m / SMALL.d * np.eye(3), atol=0.06 * m / SMALL.d)
    assert state.b.mean(axis=0) == pytest.approx(np.zeros(3), abs=0.05)
    assert state.b.var() == pytest.approx(1 / SMALL.d, rel=0.1)  # Var(Σ W_qj A_q) = m · (1/d) · (1/m)
    assert state.g[:, 0, 1].var() == pytest.approx(m / SMALL.d**2, rel=0.1)
    assert state.g[:, 0, 0].var() == pytest.approx(2 * m / SMALL.d**2, rel=0.15)
    # The Gram matrix of r + 1 vectors in m dimensions has at most that rank.
    joint = np.block([[state.g[0], state.b[0][:, None]], [state.b[0][None], state.a[0].reshape(1, 1)]])
    assert np.linalg.matrix_rank(joint, tol=1e-8) == min(m, 4)


def test_runs_do_not_depend_on_their_neighbours():
    widths, both = s4.start(SMALL, [5, 50], 3)
    alone = s4.start(SMALL, [50], 3)[1]
    assert list(widths) == [5, 5, 5, 50, 50, 50]
    np.testing.assert_array_equal(both.g[3:], alone.g)


def test_synthetic_data_meet_the_premises():
    s = s4.synthetic()
    assert s.lam[0] == s.n and s.lam[0] >= 2 * s.lam[1] and (s.lam[:-1] / s.lam[1:]).max() < 2.3
    assert s.z @ s.z == pytest.approx(s.n) and s.z.min() / s.n**0.5 > 1 / len(s.lam)
    x, y = s4.inputs(s, 3)
    found = s4.spectrum_of(x.T, y, centred=False)
    np.testing.assert_allclose(found.lam, s.lam, rtol=1e-9)
    np.testing.assert_allclose(found.z, s.z, rtol=1e-6)
    assert found.outside < 1e-12
    with pytest.raises(ValueError, match="rank"):
        s4.synthetic(5, 5)


def test_unequal_labels_can_not_be_fitted_on_centred_inputs():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(20, 40))
    y = np.where(np.arange(20) < 13, 1.0, -1.0)
    assert s4.spectrum_of(x, y).outside == pytest.approx(y.mean() ** 2, rel=1e-6)
    assert s4.spectrum_of(x, np.where(np.arange(20) < 10, 1.0, -1.0)).outside < 1e-12


def test_course_measures_what_it_says():
    m, spectrum = 60, s4.synthetic(50, 4)
    width, state = s4.start(spectrum, [m], 2)
    w = s4.Width(width, 0.4 / s4.extreme(s4.gram(spectrum, width, state))[1])
    course = courses.follow(spectrum, w, state, 5)
    d, shadow, v1 = s4.outputs(spectrum, width, state) - spectrum.z, None, np.diag([1.0, 0, 0, 0])
    g0 = state.g
    for t in range(6):
        gram = s4.gram(spectrum, width, state)
        star = gram + s4.second_order(spectrum, w, state)
        d = s4.outputs(spectrum, width, state) - spectrum.z
        rest = d @ (np.eye(4) - v1)
        shadow = rest if shadow is None else shadow
        np.testing.assert_allclose(course.d[t], d)
        np.testing.assert_allclose(course.tracked[t], np.linalg.norm(rest - shadow, axis=1), atol=1e-12)
        root = np.diag(spectrum.lam**0.5)
        for run in range(2):
            assert course.sharpness[t, run] == pytest.approx(np.linalg.norm(gram[run], 2))
            assert course.star[t, run] == pytest.approx(np.linalg.eigvalsh(star[run])[-1])
            near = state.a[run] * np.diag(spectrum.lam)
            of_0 = star[run] - 2 / (50 * m) * (near + root @ g0[run] @ root)
            of_d = star[run] - 2 / (50 * m) * (near + m / 4 * np.diag(spectrum.lam))
            assert course.gamma_0[t, run] == pytest.approx(np.linalg.norm(of_0, 2))
            assert course.gamma_d[t, run] == pytest.approx(np.linalg.norm(of_d, 2))
        cut = np.eye(4) - w.eta[:, None, None] * star @ (np.eye(4) - v1)
        shadow = np.einsum("bij,bj->bi", cut, shadow)
        state = s4.step(spectrum, w, state)


def test_a_diverged_run_ends_as_nan_beside_one_that_does_not():
    spectrum = s4.synthetic(50, 4)
    width, state = s4.start(spectrum, [30, 3000], 1)
    w = s4.Width(width, np.array([4.5, 0.3]) / s4.extreme(s4.gram(spectrum, width, state))[1])
    course = courses.follow(spectrum, w, state, 60)
    assert list(course.alive) == [False, True]
    assert np.isnan(course.tracked[-1, 0]) and course.size[-1, 1] < course.size[0, 1]


def test_crossing_and_back():
    flat = np.zeros((5, 3))
    level = np.array([[0.5, 1.5, 0.5], [1.5, 1.5, 0.5], [1.5, 0.5, 0.5], [0.5, 1.5, 0.5], [1.5, 0.5, 0.5]])
    w = s4.Width(np.ones(3), np.full(3, 2.0))
    course = courses.Course(w, level, flat, flat[..., None], flat, flat, 1, flat, flat, flat, flat, flat)
    assert list(course.crossing()) == [1, 0, -1] and list(course.back()) == [3, 2, -1]


def test_lazy_gain_foretells_the_sharpening():
    a_part, w_part = courses.lazy_gain(s4.synthetic())
    course = courses.sharpening(1_000_000, 4, 0.3)
    gain = 1e6 * (course.sharpness[-1] / course.sharpness[0] - 1)
    assert np.median(gain) == pytest.approx(a_part + w_part, rel=0.05)
    grown = 10 * (course.a[-1] - course.a[0])  # (2λ1/mn)Δa / Λ0 = d Δa / m
    assert np.median(grown) == pytest.approx(a_part, rel=0.05)


def test_law_at_the_edge():
    """What is above comes back below, and the peak of Dᵀv1 is where the conserved quantity puts it."""
    course = courses.at_edge("entry", 100_000, 4)
    high, low = course.excess.max(axis=0), course.excess[-1]
    np.testing.assert_allclose(low, -high, rtol=0.1)
    eta, n = course.w.eta, 500
    peak = np.abs(course.d[..., 0]).max(axis=0)
    np.testing.assert_allclose(peak, 2 * high * n * np.sqrt(1e5 / (8 * n)) / eta, rtol=0.1)
    turning = course.sharpness.argmax(axis=0)
    fall_a = course.a[-1] - course.a[turning, range(4)]
    fall = (course.sharpness[-1] - course.sharpness[turning, range(4)]) * 1e5 / 2  # in units of ‖A‖²
    assert (np.abs(fall_a) < 0.02 * np.abs(fall)).all()


def test_conclusion_of_theorem_1_fails_without_its_premises():
    assert theorems.not_increasing(1000, 3000, 3).value == 0
    s = s4.synthetic()._replace(z=np.full(10, 1e-3))  # labels near zero: the network shrinks
    width, state = s4.start(s, [1000], 3)
    course = courses.follow(s, s4.Width(width, 0.3 / s4.extreme(s4.gram(s, width, state))[1]), state, 10)
    assert (np.diff(course.sharpness, axis=0)[1:] < 0).any()


def test_the_two_readings_of_gamma_differ_by_half_a_power():
    assert abs(theorems.gamma_slope("gamma_0", 10_000, 300_000, 4).value) < 0.1
    assert theorems.gamma_slope("gamma_d", 10_000, 300_000, 4).value == pytest.approx(0.5, abs=0.15)


def test_gamma_at_the_edge_by_scaling():
    slopes = {s: theorems.gamma_edge_slope(s, 10_000, 100_000, 2).value for s in ("2.2", "near", "entry")}
    assert slopes["2.2"] > 0.7 and abs(slopes["entry"]) < 0.1 < slopes["near"] < 0.5
    with pytest.raises(ValueError, match="scaling='4' is unknown"):
        courses.at_edge("4", 1000, 2)


def test_checks_of_theorem_2_can_fail():
    course = courses.at_edge("2.2", 30_000, 2)
    assert (theorems.growth(course, 0.02) > 0).all()
    falling = course._replace(d=course.d[::-1])
    assert (theorems.growth(falling._replace(sharpness=course.sharpness[::-1]), 0.02) < 0).any()
    assert theorems.not_returning({"2.2": [0.02, 0]}, 30_000, 30_000, 2) == theorems.not_returning(
        {"2.2": [0.05, 0]}, 30_000, 30_000, 2
    )
    assert theorems.not_returning({"2.2": [-0.9, 0]}, 30_000, 30_000, 2).value == 1  # a level that is never left
    assert theorems.not_returning({"2.2": [1.0, 0]}, 30_000, 30_000, 2).trials == 0  # ρ = 1: no run is above


def test_paper_data_as_kept():
    kept = s4.pair()
    assert kept.balanced.n == 990 and len(kept.balanced.lam) == 989 and kept.balanced.outside < 1e-12
    assert kept.unbalanced.outside == pytest.approx(1e-4, rel=1e-6)
    assert theorems.smallest_component().value < 0.1 < 0.5 < 1
    # A random direction of the span does not meet Assumption 4.2 either.
    z = np.abs(np.random.default_rng(0).normal(size=(200, 989)))
    typical = np.median(989 * (z / np.linalg.norm(z, axis=1, keepdims=True)).min(axis=1))
    assert 0.1 < theorems.smallest_component().value / typical < 10


@pytest.mark.cifar
def test_kept_data_are_those_of_the_images():
    kept, found = s4.pair(), s4.measure_pair()
    for k, f in zip(kept[:2], found[:2], strict=True):
        np.testing.assert_allclose(k.lam, f.lam, rtol=1e-7)
        np.testing.assert_allclose(k.z, f.z, rtol=1e-4, atol=1e-6)
        assert k.outside == pytest.approx(f.outside, abs=1e-12)
    assert kept.top == pytest.approx(found.top)


def test_the_entry_is_where_assumption_4_5_has_its_scale():
    run = courses.at_edge("entry", 10_000, 4)
    first = np.abs(run.d[0, :, 0]) * np.sqrt(1e4 / 500)
    assert ((first > courses.C3 * 0.7) & (first <= 2 * courses.C3)).all()
    assert (run.excess[0] < 0).all() and (run.crossing() > 0).all()
    assert (theorems.component_at_crossing(courses.at_edge("near", 10_000, 4)) > 20).all()  # D₁ of order √n


def test_needed_share_excludes_exactly_the_steps_without_growth():
    run = courses.at_edge("entry", 10_000, 1)
    rho = theorems.needed_share(run) * float(run.excess.max())
    assert 0 < rho < run.excess.max()
    assert (theorems.growth(run, rho) > 0).all() and (theorems.growth(run, 0.99 * rho) <= 0).any()


def test_a_run_of_high_rank_is_the_same_run():
    spectrum = s4.synthetic(60, 12)
    sharpness, norms, eta = courses.real_sharpening(spectrum, 40, 0.3, 8)
    width, state = s4.start(spectrum, [40], 1)
    course = courses.follow(spectrum, s4.Width(width, np.array([eta])), state, 8)
    np.testing.assert_allclose(sharpness, course.sharpness[:, 0], rtol=1e-9)
    np.testing.assert_allclose(norms, course.a[:, 0], rtol=1e-9)


def test_tables_have_a_row_for_each_premise_and_scaling():
    rows = {row[0]: row for row in tables.premises()}
    assert rows["r/n, far below 1"][2:] == ["0.999", "0.02"] and rows["width d²n²/λᵣ²"][3] == "17,544"
    assert [row[0] for row in tables.scalings(3000, 10_000, 1)] == list(courses.SCALINGS.values())
    assert tables.diverged(2, (30,))[1][1] == "2 of 2"
    m, steps, falls, *_ = tables.real_runs((1000,), 3)[0]
    assert (m, steps, falls) == ("1,000", "3", "0")
