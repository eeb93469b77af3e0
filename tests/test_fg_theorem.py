"""FG, Theorem 3.1: trajectories, closed forms and checks, each shown to be able to fail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eos_utils import claims, fg_course
from eos_utils import fg_theory as fg
from eos_utils.fg_theorem import CHECKS

LABELS = "1, 1, -2/3, -2/3"
FEW = {"labels": LABELS, "m": 40, "scale": 1e-6, "eta": "1/20", "seed": 200, "seeds": 2}


def runs(**changed):
    return fg_course.courses(**{**FEW, **changed})


def torch_loss(flat, p, m):
    theta = flat.reshape(m, -1)
    x, y = torch.tensor(p.x), torch.tensor(p.y)
    return ((torch.relu(x @ theta[:, :-1].T) @ theta[:, -1] - y) ** 2).sum() / (2 * p.n)


def test_quotients_are_those_of_the_hessian_by_autograd():
    c = runs()[1]  # seed 201: rotated inputs
    for t in (0, 60, 760, c.last):
        flat = torch.tensor(np.column_stack([c.w[t], c.a[t]]).reshape(-1))
        exact = torch.autograd.functional.hessian(lambda v: torch_loss(v, c.p, 40), flat).numpy()
        for sign in (1, -1):
            v = fg.direction(c.p, c.members(sign), len(c.a[t]), sign)
            full, gauss_newton = c.quotients(sign)
            assert full[t] == pytest.approx(v @ exact @ v / (v @ v), abs=1e-12)
            assert gauss_newton[t] == pytest.approx(fg.rayleigh(fg.hessian(c.net(t), c.p)[1], v), abs=1e-12)


def test_labels_are_parsed_and_never_evaluated():
    assert fg_course.parse_labels("1, 3/4 , - 0.5") == (1.0, 0.75, -0.5)
    for bad in ("1, -1", "-1, 1/2", "1, 2", "1, 0, -1/2", "1, __import__('os'), -1", "1,, -1/2", "1, -2*1/4", "1, --1"):
        with pytest.raises(ValueError, match="labels"):
            fg_course.parse_labels(bad)


def test_other_units_of_the_labels_leave_the_dynamics_alone():
    """Gradient descent on (cy, η/c) from √c times the weights is the same up to √c."""
    c = runs()[0]
    new = fg_course.rescaled(LABELS, "1/20", 9)
    assert new == {"labels": "9, 9, -6, -6", "eta": "1/180"}
    p = fg.Problem(c.p.x, np.array(fg_course.parse_labels(new["labels"])), 1 / 180)
    end = fg.descend(fg.Network(3 * c.w[0], 3 * c.a[0]), p, 1200)[-1]
    assert np.allclose(end.w, 3 * c.w[1200], rtol=1e-6, atol=1e-12)


def test_a_setting_in_which_the_assumption_is_rarely_met_is_refused():
    with pytest.raises(ValueError, match="more neurons"):
        runs(m=1)
    with pytest.raises(ValueError, match="epsilon"):
        runs()[0].phases(0.7)  # r ε > 1


@settings(max_examples=60, deadline=None)
@given(q=st.floats(0.001, 0.1), start=st.floats(1e-9, 1e-3))
def test_the_logistic_function_through_a_third_bounds_the_map(q, start):
    """... up to O(q³) a step, while the one through a half does not, by about 0.02 q."""
    path = fg.share_path(start, q, int(40 / q))
    logit = np.log(path / (1 - np.minimum(path, 1 - 1e-12)))
    t = np.arange(len(path))

    def slack(level):
        anchor = np.interp(np.log(level / (1 - level)), logit[path < 0.99], t[path < 0.99])
        return (path - 1 / (1 + (1 - level) / level * np.exp(-2 * q * (t - anchor)))).min()

    assert slack(1 / 3) > -(q**2)  # q²: the anchor lies between two steps
    if 0.02 < q:
        assert slack(1 / 2) < -0.01 * q


@settings(max_examples=30, deadline=None)
@given(q=st.floats(0.002, 0.05), start=st.floats(1e-12, 1e-6))
def test_the_predicted_midpoint_is_three_quarters_ln_2_late(q, start):
    path = fg.share_path(start, q, int(40 / q))
    t = int(np.argmax(path >= 0.5))
    observed = t - 1 + np.log(0.5 / path[t - 1]) / np.log(path[t] / path[t - 1])
    assert -np.log(start) / (2 * np.log1p(q)) - observed == pytest.approx(0.75 * np.log(2), abs=2 * q + 1e-3)


def test_one_step_of_the_logit():
    for q, s in ((0.01, 0.1), (0.01, 0.5), (0.02, 0.9)):
        new = s * (1 + q * (1 - s)) ** 2
        moved = np.log(new / (1 - new)) - np.log(s / (1 - s))
        assert moved == pytest.approx(2 * q + q**2 * (3 * s - 1), abs=5 * q**3)


def test_closed_forms_follow_the_trajectory():
    for c in runs():
        for sign in (1, -1):
            full, gauss_newton = c.quotients(sign)
            assert np.abs(fg_course.closed_form(c, sign) - full[c.start :]).max() < 0.02 * c.p.size(sign)
            assert np.allclose(gauss_newton - full, c.p.size(sign) * (1 - c.share(sign)), atol=0.02)
            assert full.min() == pytest.approx(-c.p.size(sign), rel=1e-3)


def test_spectrum_at_the_end():
    c = runs()[0]
    found = fg_course.spectrum(c, c.last)
    plus, minus = c.p.size(1), c.p.size(-1)
    assert found.values[-1][:4] == pytest.approx([2 * plus, 2 * minus, plus, minus], rel=0.01)
    assert found.plus_top[-1] == pytest.approx(c.rho(1), abs=0.01) and found.minus_nearest[-1] == 2
    middle = fg_course.spectrum(c, 300)
    assert middle.plus_bottom[1] > 0.99 and middle.plus_top[1] < 0.01


def test_the_decoupling_is_final_and_independence_starts_there():
    c = runs()[0]
    wrong = (c.on() & (c.a[:, :, None] * c.p.y < 0)).any(axis=(1, 2))
    assert wrong[c.start - 1] and not wrong[c.start :].any()
    assert CHECKS["theorem_independence"](**FEW).value == 0.0
    assert CHECKS["theorem_independence"](**FEW, correlation=0.3).value > 0.05  # the control


def test_deleting_removes_one_kind_of_neurons():
    c = runs()[0]
    alone = fg_course.without(c, 1, c.start)
    assert not alone.a[0][c.a[c.start] > 0].any() and (alone.a[0] == c.a[c.start])[c.a[c.start] < 0].all()
    assert np.abs(alone.quotients(1)[0][-1]) != pytest.approx(c.quotients(1)[0][-1], abs=0.1)


EPSILON = {"epsilon": 0.3}
GAUSS_NEWTON = {**EPSILON, "part": "gauss_newton"}
PLATEAU = {**GAUSS_NEWTON, "prefactor": "plateau"}


@pytest.mark.parametrize("sign", [1, -1])
def test_phase_1_bounds_hold_in_phase_1_only(sign):
    check = CHECKS["theorem_phase1"]
    assert check(sign=sign, **EPSILON, **FEW).value < 0
    assert 0 < check(sign=sign, **GAUSS_NEWTON, **FEW).value < 1e-2
    assert check(sign=sign, **GAUSS_NEWTON, lasts=3.5, **FEW).value > 1.2


@pytest.mark.parametrize("sign", [1, -1])
def test_the_lower_bound_fails_as_printed_or_with_a_wrong_rate(sign):
    check = CHECKS["theorem_growth"]
    assert check(sign=sign, **EPSILON, **FEW).value == pytest.approx(-0.5, abs=0.01)
    assert check(sign=sign, **PLATEAU, **FEW).value > -0.015
    assert check(sign=sign, **PLATEAU, rate=1.2, **FEW).value < -0.03
    assert check(sign=sign, **{**PLATEAU, "part": "full"}, **FEW).value < -0.4


def test_the_prefactor_depends_on_the_units():
    check = CHECKS["theorem_prefactor"]
    small, large = (check(factor=f, **FEW).value for f in (1, 100))
    assert small < 0.2 and large == pytest.approx(100 * small, rel=0.02)
    assert check(factor=100, prefactor="plateau", **FEW).value == pytest.approx(1, abs=0.02)
    c = runs()[0]
    ratio = fg_course.height(c, 1, "printed") / fg_course.height(c, 1, "plateau")
    assert ratio == pytest.approx(np.sqrt(2) / (8 * c.rho(1) * len(c.plus)))  # ‖y₊‖/(8ρ|S|)


def test_phase_2_needs_labels_that_are_not_nearly_balanced():
    setting = {k: v for k, v in FEW.items() if k != "labels"}
    check = CHECKS["theorem_phase2_minus"]
    assert check(ratios=[1.5], **GAUSS_NEWTON, **setting).value < 0.1
    assert check(ratios=[1.02], **EPSILON, **setting).value > 1.5
    few = {"m": 40, "eta": "1/20", "seed": 200, "runs": 1, "ratios": [1.5]}
    assert CHECKS["theorem_phase2_exponent"](scales=[1e-8, 1e-10], **few).value < 0.05
    # Where λ is not small enough for r, the negative labels are fitted too, and there is no power.
    assert CHECKS["theorem_phase2_exponent"](scales=[1e-5, 1e-6], **{**few, "ratios": [1.05]}).value > 0.15
    with pytest.raises(ValueError, match="smaller initialisation"):
        fg_course.phase2_ends(1.5, [0.1], 1, m=40, eta="1/20", seed=200)


def test_rates_and_midpoints():
    few = {"labels": LABELS, "m": 40, "eta": "1/20", "seed": 200, "runs": 2}
    assert CHECKS["theorem_rate_depends"](scales=[1e-6, 1e-9], **few).value < 0.05
    assert CHECKS["theorem_rate"](scales=[1e-8], **few).value < 0.03
    assert CHECKS["theorem_rate"](scales=[3e-3], **few).value > 0.03  # not small: partly active neurons
    assert CHECKS["theorem_rates_differ"](**FEW).value == pytest.approx(0.5, abs=0.02)
    assert CHECKS["theorem_rates_differ"](**{**FEW, "labels": "1, 1, -0.999, -0.999"}).value < 0.01
    assert CHECKS["theorem_midpoint"](**FEW).value < 1
    assert CHECKS["theorem_midpoint"](**{**FEW, "scale": 0.03}).value > 2


def test_top_eigenvalues():
    assert CHECKS["theorem_rayleigh"](**EPSILON, **FEW).value < 0
    assert CHECKS["theorem_top_plus"](**EPSILON, **FEW).value == pytest.approx(2, abs=0.1)
    assert CHECKS["theorem_top_plus"](**EPSILON, only="risen", **FEW).value < 0.1
    few = {"m": 40, "scale": 1e-6, "eta": "1/20", "seed": 200, "runs": 1}
    assert CHECKS["theorem_top_minus"](ratios=[1.5], **few).value < 0.1
    assert CHECKS["theorem_top_minus"](ratios=[4.0], **few).value == pytest.approx(0.5, abs=0.06)


def test_the_definition_is_a_second_derivative(monkeypatch):
    assert CHECKS["theorem_definition"](trials=20, seed=1).value < 1e-6
    monkeypatch.setattr(fg, "rayleigh", lambda h, v: v @ h @ v / np.sqrt(v @ v))  # the norm not squared
    assert CHECKS["theorem_definition"](trials=20, seed=1).value > 1e-2


def test_every_claim_of_the_page_has_a_rule_and_every_check_a_sentence():
    mine = [c for c in claims.claims() if c["notebook"] == "fg_theorem_3_1"]
    assert len(mine) == 14 and all(c["rule"] for c in mine)
    assert all((check.__doc__ or "").strip() for check in CHECKS.values())


def test_the_table_of_predictions():
    rows = fg_course.predictions(runs()[0])
    assert [len(row) for row in rows] == [3] * 8
    assert rows[4][1] == "-0.3536 / -0.2357" == rows[4][2]
