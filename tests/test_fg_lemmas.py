"""FG's Lemmas 2.1, 2.2 and A.2: the checks against hand examples, and each against a case in which it has to fail."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from eos_utils import fg_balance as balance
from eos_utils import fg_lemmas as lemmas
from eos_utils import fg_theory as fg


def one_neuron(w, a, y, eta):
    p = fg.problem([y], eta)
    new = fg.step(fg.Network(np.array([[w]]), np.array([a])), p)
    return new.w.item(), new.a.item()


# ---- Lemma 2.1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 0.9, 1.0, 1.1, 1.5, 2.0])
def test_hand_example_of_the_balance(eta):
    w, a = one_neuron(2.0, 1.0, 3.0, eta)  # h = 2, d = 1
    assert (w, a) == pytest.approx((2 + eta, 1 + 2 * eta))
    assert w**2 - a**2 == pytest.approx(3 * (1 - eta**2), abs=1e-12)


def test_a_step_is_recorded_as_it_is():
    steps = balance.neuron_steps(50)
    assert np.abs(steps.cosine).max() <= 1 + 1e-12
    assert steps.q.max() <= 2 and (steps.q == 0).any() and (steps.q > 1).any()
    assert (np.abs(steps.balance) <= steps.total).all()
    heavy = balance.neuron_steps(50, 1.0, True)
    assert (heavy.a2 <= heavy.w2 * (1 + 1e-12)).all() and heavy.q.max() <= 1
    equal = np.isclose(heavy.a2, heavy.w2, rtol=1e-12).mean()
    assert 0.1 < equal < 0.4


def test_printed_equation_3_is_off_by_exactly_q_squared_times_the_balance():
    steps = balance.neuron_steps(200)
    apart = balance.predicted(steps, "3") - balance.predicted(steps, "2")
    np.testing.assert_allclose(apart, -(steps.q**2) * (steps.w2 - steps.a2), atol=1e-10)
    assert balance.balance_equation("2", trials=200).value < 1e-10
    assert balance.balance_equation("3 corrected", trials=200).value < 1e-10
    assert balance.balance_equation("3", trials=200).value > 0.1
    assert balance.balance_equation("3", "2", trials=200).value > 0.1
    assert balance.balance_equation("3 corrected", "2", trials=200).value < 1e-10


@given(st.floats(0.05, 3), st.floats(0.05, 3), st.floats(-1, 1), st.floats(0, 2.5), st.floats(0.2, 3), st.booleans())
def test_the_condition_foretells_every_step_that_satisfies_equation_1(w, a, c, q, size, negative):
    # Any d of norm `size` at cosine c to w, not only those that a network of this width would have.
    assume(abs(w**2 * (1 - q**2 * c**2) - a**2 * (1 - q**2)) > 1e-9)
    a, eta = (-a if negative else a), q / size
    wv, d = np.array([w, 0.0]), size * np.array([c, np.sqrt(1 - c**2)])
    new_w, new_a = wv + eta * a * d, a + eta * wv @ d
    steps = balance.Steps(*(np.array([v]) for v in (w**2, a**2, q, eta * d @ wv, 0.0, 1.0)))
    assert bool(balance.foretold(steps)[0]) == (new_w @ new_w >= new_a**2)


def test_condition_on_networks_and_control():
    steps = balance.neuron_steps(400, 2.0, True)
    assert balance.lost(steps).sum() > 20
    assert balance.wrongly_foretold(steps) == 0
    assert balance.wrongly_foretold(steps._replace(balance=-steps.balance)) > 100


def test_one_step_needs_the_bound_on_eta():
    assert balance.one_step_lost(1.0, trials=400).value == 0
    assert balance.one_step_lost(1.2, trials=400).value > 0
    assert balance.one_step_lost(2.0, trials=400).value > 0.02


def test_all_times_needs_the_bound_on_eta():
    assert balance.all_times_lost([0.5, 1.0], seeds=5, steps=60).value == 0
    assert balance.all_times_lost([1.3], seeds=5, steps=60).value > 0.5
    assert balance.all_times_lost([1.3], hypothesis=True, seeds=5, steps=60).value == 0
    for run in balance.courses(1.3, 5, 60):
        assert run.lost == (run.worst < -1e-10) and (np.isnan(run.first) or run.first >= 2)  # the first step is safe


def test_violation_under_the_hypothesis_would_be_seen(monkeypatch):
    # An update that loses the balance at any step size has to show.
    def lossy(net, p, steps):
        return [fg.Network(net.w * 0.999**t, net.a) for t in range(steps + 1)]

    monkeypatch.setattr(balance, "descend", lossy)
    runs = balance.courses.__wrapped__(0.5, 2, 10)
    assert all(run.lost and run.lost_below and run.first == 1 for run in runs)


def test_start_is_balanced_and_another_would_not_be(monkeypatch):
    assert balance.balanced_start(20).value < 1e-12

    def gaussian(m, d, scale, seed):
        net = fg.initial(m, d, scale, seed)
        return fg.Network(scale * np.random.default_rng(seed).normal(size=(m, d)), net.a)

    monkeypatch.setattr(balance, "initial", gaussian)
    assert balance.balanced_start(20).value > 0.1


@pytest.mark.parametrize("part", ["w", "a"])
def test_equation_1_agrees_with_autograd_and_a_wrong_one_does_not(part, monkeypatch):
    assert balance.update(part, trials=50).value < 1e-10

    def without_indicator(net, p):
        return np.tile((p.y - fg.outputs(net, p.x)) @ p.x / p.n, (len(net.a), 1))

    monkeypatch.setattr(balance, "error_vectors", without_indicator)
    assert balance.update(part, trials=50).value > 1e-3


def test_order_in_eta_is_two_for_the_balance_and_one_for_the_sum():
    assert balance.balance_order(trials=200).value < 1e-6
    assert balance.balance_order("sum", trials=200).value > 0.9


def test_flow_keeps_the_balance_and_descent_drifts_in_proportion_to_eta():
    assert balance.flow_drift(0.0, seeds=1, time=10.0).value < 1e-8
    drifts = [balance.flow_drift(eta, seeds=1, time=10.0).value for eta in (0.1, 0.05, 0.025)]
    assert drifts[0] > 1e-3
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.1) and drifts[1] / drifts[2] == pytest.approx(2, rel=0.1)
    first = [balance.drift(eta, 1, eta) for eta in (0.1, 0.05)]
    assert first[0] / first[1] == pytest.approx(4, rel=1e-6)


# ---- Lemma 2.2 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5])
def test_correlated_inputs_have_the_inner_products_asked_for(correlation):
    x = lemmas.correlated(fg.orthonormal(4, 6, seed=1), correlation)
    np.testing.assert_allclose(x @ x.T, (1 - correlation) * np.eye(4) + correlation, atol=1e-12)


@pytest.mark.parametrize("part", ["formula", "inactive"])
def test_preactivation_formula_holds_on_orthonormal_inputs_only(part):
    assert lemmas.preactivation_step(part, 0.0, trials=100).value < 1e-12
    assert lemmas.preactivation_step(part, 0.01, trials=100).value > 1e-4


def test_inactive_preactivations_stay_bit_for_bit_on_unit_vectors():
    p = fg.problem(lemmas.LABELS, 1.0)
    path = fg.descend(fg.initial(40, 4, 1e-2, 100), p, 200)
    off = path[0].w @ p.x.T <= 0
    assert off.any()
    np.testing.assert_array_equal((path[-1].w @ p.x.T)[off], (path[0].w @ p.x.T)[off])


def test_reactivations_happen_on_correlated_inputs_only():
    assert lemmas.reactivations(0.0, [0.3, 2.0], seeds=2, steps=200).value == 0
    assert lemmas.reactivations(0.1, [0.3], seeds=2, steps=200).value > 10


def test_activity_counts():
    run = lemmas.activity(0.0, 0.3, 2, 300)
    assert run.pairs == 2 * 40 * 4 and run.reactivated == 0
    total = run.same + run.opposite
    assert total[0] - total[-1] == run.deactivated > 0
    assert run.kept == 1 and run.opposite[-1] == 0 and run.loss < 1e-6 and run.dead == 0
    # The converse of the lemma is false: neurons that should stay active are lost at large steps.
    assert lemmas.activity(0.0, 2.0, 2, 300).kept < 1


# ---- Lemma A.2 -----------------------------------------------------------------------------------


def test_hand_example_of_the_recursion():
    assert list(lemmas.sequence(2, 2 * 3 - 2, 1, 2)) == [1, 6, 16]  # the bound is 5 and 13
    assert list(lemmas.sequence(2, 2 * 3 - 3, 1, 2)) == [1, 5, 13]


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_printed_constant_fails_and_the_corrected_one_holds(side):
    assert lemmas.recursion_violated(side, "printed", trials=2000).value > 0.2
    assert lemmas.recursion_violated(side, "corrected", trials=2000).value == 0


def test_each_side_fails_on_its_own_side_of_the_diagonal():
    for side, sign in (("upper", 1), ("lower", -1)):
        found = lemmas.sequences(side, "printed", 5000, False)
        clear = np.abs(found.c - found.a) > 1e-6
        np.testing.assert_array_equal((found.excess > 1e-10)[clear], (sign * (found.c - found.a) > 0)[clear])


def test_sequences_meet_their_hypothesis_without_slack():
    found = lemmas.sequences("upper", "corrected", 500, False)
    assert np.abs(found.excess).max() < 1e-10  # equality in the hypothesis is equality in the bound
