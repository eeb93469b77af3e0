"""FG's model at the edge of stability: blocks against dense Hessians, closed forms against training."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eos_utils import fg_blocks as blocks
from eos_utils import fg_edge as edge
from eos_utils import fg_theory as fg
from eos_utils.fg_course import parse_labels

MODEL = {"labels": blocks.LABELS, "m": 40, "scale": 1e-3}
SMALL = {**MODEL, "steps": 1200, "seed": 200, "seeds": 4}


def random_path(seed, m=12, scale=1.0):
    """One step of two random networks, half of whose neurons share an active set."""
    rng = np.random.default_rng(seed)
    w, a = scale * rng.normal(size=(2, m, 4)), scale * rng.normal(size=(2, m))
    w[:, : m // 2, 0] = np.abs(w[:, : m // 2, 0])
    w[:, : m // 2, 1:] = -np.abs(w[:, : m // 2, 1:])
    return blocks.descend(np.array([1.0, 0.7, -0.8, -0.5]), np.array([0.1, 0.1]), w, a, 1)


def dense_top(net, p, sign):
    """The largest eigenvalue of the block, from the dense Hessian."""
    m, size = len(net.a), net.w.shape[1] + 1
    h = fg.hessian(net, p)[0].reshape(m, size, m, size)
    chosen = np.flatnonzero(sign * net.a > 0) if sign else np.arange(m)
    return np.linalg.eigvalsh(h[chosen][:, :, chosen].reshape(len(chosen) * size, -1))[-1]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([-1, 0, 1]), st.sampled_from([1e-3, 1.0]))
def test_tops_are_those_of_the_dense_hessian_on_random_networks(seed, sign, scale):
    path = random_path(seed, scale=scale)
    problem = fg.problem(list(path.y), 0.1)
    found = blocks.tops(path, sign)
    for t in range(2):
        for run in range(2):
            dense = dense_top(fg.Network(path.w[t, run], path.a[t, run]), problem, sign)
            # Inactive rows are zeros: the dense matrix has them, the reduced one does not.
            assert found[t, run] == pytest.approx(dense, abs=1e-10)


def test_tops_are_those_of_autograd():
    path = random_path(3)
    w, a = torch.tensor(path.w[0, 0]), torch.tensor(path.a[0, 0])

    def loss(theta):
        hidden = torch.relu(theta[: w.numel()].reshape(w.shape))
        return ((theta[w.numel() :] @ hidden - torch.tensor(path.y)) ** 2).sum() / (2 * len(path.y))

    hessian = torch.autograd.functional.hessian(loss, torch.cat([w.reshape(-1), a]))
    assert blocks.tops(path, 0)[0, 0] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), abs=1e-12)


def test_a_group_is_reduced_only_as_far_as_it_may_be():
    # Nine copies of one active set: the reduction is at work, and dropping a row of R would be seen.
    path = random_path(5, m=18)
    net, problem = fg.Network(path.w[0, 0], path.a[0, 0]), fg.problem(list(path.y), 0.1)
    assert blocks.tops(path, 0)[0, 0] == pytest.approx(dense_top(net, problem, 0), abs=1e-12)
    fewer = path._replace(w=path.w[:, :, 1:], a=path.a[:, :, 1:])
    assert abs(blocks.tops(fewer, 0)[0, 0] - blocks.tops(path, 0)[0, 0]) > 1e-6


def test_a_network_without_active_neurons_has_no_curvature_and_an_overflow_is_nan():
    path = random_path(1)
    assert (blocks.tops(path._replace(w=-np.abs(path.w)), 0) == 0).all()
    broken = path._replace(a=np.where(np.arange(2)[:, None, None] == 1, np.nan, path.a))
    assert np.isnan(blocks.tops(broken, 0)[1]).all() and np.isfinite(blocks.tops(broken, 0)[0]).all()


@pytest.mark.parametrize("q", [0.9, 1.33])
def test_training_is_that_of_the_shared_model_also_on_rotated_inputs(q):
    path = blocks.train(blocks.LABELS, q, 40, 1e-3, 40, 200)
    for rotation in (None, 7):
        p = fg.problem(list(path.y), float(path.eta[0]), rotation)
        slow = fg.descend(fg.Network(path.w[0, 0] @ p.x, path.a[0, 0]), p, 40)
        outputs = np.array([fg.outputs(net, p.x) for net in slow])
        np.testing.assert_allclose(path.y - path.error[:, 0] * p.n, outputs, atol=1e-9)
        total = blocks.losses(path, 1) + blocks.losses(path, -1)
        assert total[40, 0] == pytest.approx(fg.loss(slow[40], p), rel=1e-6)
    assert p.q(1) == pytest.approx(q)
    assert blocks.sizes(path.y) == pytest.approx((p.size(1), p.size(-1)))


@pytest.mark.parametrize("sign", [1, -1])
def test_quotients_are_those_of_the_theorem(sign):
    path = blocks.train(blocks.LABELS, 1.1, 40, 1e-3, 40, 200)
    p = fg.problem(list(path.y), float(path.eta[0]))
    v = fg.direction(p, fg.aligned_set(fg.Network(path.w[0, 0], path.a[0, 0]), p, sign), 40, sign)
    for t in (0, 7, 12, 40):
        h = fg.hessian(fg.Network(path.w[t, 0], path.a[t, 0]), p)[0]
        assert blocks.quotients(path, sign)[t, 0] == pytest.approx(fg.rayleigh(h, v), abs=1e-12)


def test_only_the_last_steps_are_kept_and_cut_agrees_with_them():
    y, eta = np.array(parse_labels(blocks.LABELS)), np.array([3.0])
    w, a = blocks.starts(y, 40, 1e-3, 200, 1)
    whole, tail = blocks.descend(y, eta, w, a, 50), blocks.descend(y, eta, w, a, 50, 9)
    assert len(tail.w) == 10 and len(tail.error) == 51
    np.testing.assert_array_equal(tail.w, whole.w[41:])
    np.testing.assert_array_equal(blocks.tops(tail, 1), blocks.tops(whole, 1)[41:])
    np.testing.assert_array_equal(blocks.tops(blocks.cut(whole, 20, 30), 1), blocks.tops(whole, 1)[20:30])


def test_blocks_decouple_and_the_hessian_between_them_is_zero():
    path = blocks.train(blocks.LABELS, 1.33, 40, 1e-3, 100, 200)
    p = fg.problem(list(path.y), float(path.eta[0]))
    coupled = blocks.coupled(path)[:, 0]
    assert coupled[0] and not coupled[30:].any()
    for t, between in ((0, True), (100, False)):
        h = fg.hessian(fg.Network(path.w[t, 0], path.a[t, 0]), p)[0].reshape(40, 5, 40, 5)
        plus = path.a[t, 0] > 0
        assert (np.abs(h[plus][:, :, ~plus]).max() > 0) == between


@pytest.mark.parametrize("text", ["1, 1", "1, 0, -0.5", "0.5, -1", "1, x", "__import__('os')", "1, -1", "nan, -1", ""])
def test_labels_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="labels="):
        blocks.train(text, 1.1, 8, 1e-3, 2, 100)


def test_starts_meet_the_assumption_or_say_that_they_can_not():
    y = np.array(parse_labels(blocks.LABELS))
    w, a = blocks.starts(y, 12, 1e-3, 200, 20)
    p = fg.problem(list(y), 1.0)
    assert all(fg.aligned_set(fg.Network(*net), p, s).size for net in zip(w, a, strict=True) for s in (1, -1))
    drawn = [fg.initial(12, 4, 1e-3, seed) for seed in range(200, 400)]
    meets = [net for net in drawn if fg.aligned_set(net, p, 1).size and fg.aligned_set(net, p, -1).size]
    assert len(meets) < len(drawn)
    np.testing.assert_array_equal(w, [net.w for net in meets[:20]])
    with pytest.raises(ValueError, match="m=1"):
        blocks.starts(y, 1, 1e-3, 200, 1)


@pytest.mark.parametrize("q", [1.02, 1.1, 1.2])
def test_the_map_ends_in_the_closed_form_cycle(q):
    found = np.unique(np.round(edge.orbits(np.array([q]), keep=10), 9))
    np.testing.assert_allclose(found, fg.two_cycle(q), atol=1e-8)


def test_the_map_converges_below_one_doubles_its_period_and_dies():
    found = edge.orbits(np.array([0.7, 0.99, edge.DOUBLING + 0.005, edge.DEATH - 1e-3, edge.DEATH + 0.01, 1.7]), 20000)
    np.testing.assert_allclose(found[:, :2], 1, atol=1e-8)
    assert len(np.unique(np.round(found[:, 2], 6))) == 4
    assert np.isfinite(found[:, 3]).all() and np.isnan(found[:, 4:]).all()


def test_aligned_neurons_follow_the_map_and_die_where_it_says():
    y, n = np.array([1.0, 1.0, -0.8, -0.8]), 4
    size, direction = blocks.sizes(y)[0], np.array([1.0, 1, 0, 0]) / np.sqrt(2)
    for q, start in ((1.3, 0.1), (1.9, 0.25)):
        a = np.sqrt(start * n * size * np.array([[0.3, 0.7]]))
        path = blocks.descend(y, np.array([q / size]), a[..., None] * direction, a, 60)
        share = (path.a[:, 0] ** 2 * (path.w[:, 0] > 0).any(axis=2)).sum(axis=1) / (n * size)
        if q < edge.DEATH:
            np.testing.assert_allclose(share[:12], fg.share_path(start, q, 11), rtol=1e-9)
            assert (share > 0).all()
        else:
            assert share[-1] == 0 and np.isfinite(path.a).all()  # dead, not blown up
            assert blocks.losses(path, 1)[-1, 0] == pytest.approx((y[:2] ** 2).sum() / (2 * n))


@given(st.floats(1.01, 1.23), st.floats(0.05, 1.0))
def test_the_growth_of_a_partial_neuron_is_the_product_of_its_two_factors(q, beta):
    low, high = fg.two_cycle(q)
    product = (1 + q * beta * (1 - low)) * (1 + q * beta * (1 - high))
    assert edge.partial_factor(q, beta) == pytest.approx(product, rel=1e-10)


@pytest.mark.parametrize(
    ("labels", "m", "betas"), [(blocks.LABELS, 40, {0.5}), ("1, 1, 1, -1, -1", 60, {1 / 3, 2 / 3})]
)
def test_partial_neurons_grow_as_the_formula_says_in_training(labels, m, betas):
    b, factor = edge.partial_growth(labels, 1.1, m, 1e-16, 400, 200, 4)
    assert {round(float(v) ** 2, 9) for v in b} == {round(v, 9) for v in betas}
    np.testing.assert_allclose(factor, edge.partial_factor(1.1, b), rtol=1e-4)
    assert np.abs(factor - edge.partial_factor(1.15, b)).min() > 5e-3
    assert edge.partial_growth(labels, 1.1, m, 1e-16, 20, 200, 1)[0].size == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_an_interpolating_network_has_curvature_of_at_least_twice_the_largest_label_over_n(seed):
    rng = np.random.default_rng(seed)
    y, w = np.array([1.0, 0.4, -0.7]), rng.normal(size=(12, 3))
    a = np.linalg.lstsq(np.maximum(w, 0).T, y, rcond=None)[0]
    p, net = fg.problem(list(y), 1.0), fg.Network(w, a)
    if np.abs(fg.outputs(net, p.x) - y).max() < 1e-9:
        assert dense_top(net, p, 0) >= 2 * np.abs(y).max() / 3 - 1e-9


def test_the_scan_follows_its_closed_forms():
    found = edge.scan(blocks.LABELS, 40, 1e-3, 1200, 200, 3, 0.9, 1.7, 5)  # q₊ = 0.9, 1.1, 1.3, 1.5, 1.7
    y = np.array([1.0, 1.0])
    np.testing.assert_allclose(np.median(found.top[0], axis=1), edge.predicted_top(found.q, 0.5**0.5), atol=0.02)
    floor = edge.predicted_floor(found.q, y)
    assert (floor[:3] == 0).all() and (found.loss[0, :3] < 1e-7).all()
    np.testing.assert_allclose(found.loss[0, 3:], (0.25 * floor[3:])[:, None] * np.ones(3), rtol=1e-6)
    assert not found.lost.any()
    assert np.isnan(edge.predicted_top(np.array([1.9]), 0.5**0.5)).all()
    late = edge.scan(blocks.LABELS, 40, 1e-3, 300, 200, 8, 2.0, 2.0, 1)
    assert late.lost[0].any() and not late.lost[1].any()


def test_one_label_of_each_sign_leaves_no_room_to_stabilise():
    path = blocks.train("1, -0.8", 1.1, 40, 1e-3, 1200, 200, 3)
    low, high = fg.two_cycle(1.1)
    expected = ((1 - low) ** 2 + (1 - high) ** 2) / 2 * 0.25
    np.testing.assert_allclose(blocks.losses(path, 1)[-2:].mean(axis=0), expected, rtol=1e-6)


def test_the_decay_ends_the_oscillation_and_a_tenth_of_it_would_not():
    decay = edge.divide(blocks.LABELS, 1.33, 40, 1e-3, 100, 400, 200, 3)
    swing, growth = edge.calmed(decay)
    assert (swing < 1e-3).all() and (np.abs(growth - 1) < 0.1).all()
    path = blocks.train(blocks.LABELS, 1.33, 40, 1e-3, 500, 200, 3)
    same = [blocks.tops(path, s) * path.eta / 2 for s in (1, -1)]
    swing, _ = edge.calmed(edge.Decay([t[:101] for t in same], [t[100:] for t in same], decay.loss))
    assert (swing > 0.1).all()
    rising = [np.linspace(1, 1.5, 401)[:, None]] * 2
    assert edge.calmed(edge.Decay([np.ones((50, 1))] * 2, rising, []))[1][0] > 1.4
    np.testing.assert_allclose(edge.two_step(np.array([1.0, 3.0, 1.0])), 2)


# ---- the checks, where what they test is true and where it is not --------------------------------


def test_the_descent_lemma_holds_below_the_edge_and_its_check_sees_when_it_does_not():
    assert edge.descent(trials=100, level=0.99, seed=300).value == 0
    assert edge.descent(trials=100, level=1.3, seed=300).value > 20


def test_quadratics_diverge_above_the_edge_and_not_below():
    assert edge.quadratic_divergence(trials=100, low=1.02, high=3.0, seed=300).value == 0
    assert edge.quadratic_divergence(trials=100, low=0.5, high=0.98, seed=300).value == 100


def test_runs_above_the_edge_converge_unless_they_can_not():
    assert edge.bounded_above_edge(q_plus=1.33, **SMALL).value == 4
    assert edge.bounded_above_edge(q_plus=0.9, **SMALL).value == 0  # never above
    assert edge.bounded_above_edge(q_plus=1.6, **SMALL).value == 0  # above, and does not converge


def test_the_lemma_admits_no_edge_and_steps_beyond_it_do():
    assert edge.admitted_edge(fractions=[0.7, 0.95], **SMALL).value == 0
    assert edge.admitted_edge(fractions=[1.15], **SMALL) == (4, 4, edge.admitted_edge(fractions=[1.15], **SMALL).on)


@pytest.mark.parametrize(("q", "alone", "both"), [(0.9, 0, 0), (1.1, 1, 0), (1.33, 0, 1)])
def test_none_one_and_both_blocks_are_told_apart(q, alone, both):
    assert edge.plus_alone(q_alone=q, **SMALL).value == alone
    assert edge.both_settle(q_plus=q, **SMALL).value == both


def test_blocks_that_do_not_settle_or_are_coupled_are_seen():
    assert edge.both_settle(q_plus=1.7, **SMALL).value == 0  # the positive block stays above 2/η
    coupled = {**SMALL, "scale": 1.0}  # neurons of order 1: errors of one sign move neurons that fit the other
    assert edge.both_settle(q_plus=1.33, **coupled).value < 1


def test_the_decay_calms_an_oscillation_but_only_if_there_is_one():
    setting = {**MODEL, "decay_at": 100, "seed": 200, "seeds": 4}
    assert edge.decay_calms(q_plus=1.33, **setting).value == 1
    assert edge.decay_calms(q_plus=0.5, **setting).value == 0
    assert edge.decay_regrowth(q_plus=1.33, **setting).value == 0
    # Divided before the sharpness has risen, it does grow afterwards: the check can say so.
    assert edge.decay_regrowth(q_plus=1.33, **{**setting, "decay_at": 10}).value == 1


@pytest.mark.parametrize(
    ("step", "size", "check", "q"), [(600, 1e-300, edge.both_settle, "q_plus"), (-1, 1e-3, edge.plus_alone, "q_alone")]
)
def test_the_checks_see_that_a_block_felt_the_other_or_was_not_fitted(monkeypatch, step, size, check, q):
    real, value = edge.train, {"q_plus": 1.33, "q_alone": 1.1}[q]
    assert check(**{q: value}, **SMALL).value == 1

    def tampered(*setting):
        error = real(*setting).error.copy()
        error[step, :, 2] = np.nextafter(error[step, :, 2], 1) + size
        return real(*setting)._replace(error=error)

    monkeypatch.setattr(edge, "train", tampered)
    assert check(**{q: value}, **SMALL).value == 0
