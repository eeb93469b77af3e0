"""Assumptions 2.1 and 2.2 and Lemma A.1 of FG: closed forms against draws, and many networks against one at a time."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from eos_utils import fg_exit, fg_phase1
from eos_utils.fg_theory import Network, Problem, aligned_set, orthonormal, outputs, step

TRIALS, SEED = 100, 11


def by_counting(positives: int, negatives: int, width: int) -> Fraction:
    """The probability by going through all patterns of signs of all neurons."""
    coins = list(itertools.product([0, 1], repeat=positives + negatives + 1))
    hits = 0
    for neurons in itertools.product(coins, repeat=width):
        plus = any(c[0] and all(c[1 : 1 + positives]) for c in neurons)
        minus = any(not c[0] and all(c[1 + positives :]) for c in neurons)
        hits += plus and minus
    return Fraction(hits, len(coins) ** width)


@pytest.mark.parametrize("case", [(1, 1, 2), (1, 1, 3), (2, 1, 2), (1, 2, 3), (2, 2, 2)])
def test_the_probability_of_both_sets_is_what_counting_gives(case):
    assert 10 ** fg_phase1.log10_both(*case) == pytest.approx(float(by_counting(*case)), rel=1e-12)


def test_the_probability_far_below_any_float():
    # To leading order one neuron for each set: m (m - 1) p₊ p₋.
    expected = math.log10(128 * 127) - 5002 * math.log10(2)
    assert fg_phase1.log10_both(2000, 3000, 128) == pytest.approx(expected, abs=1e-6)
    assert fg_phase1.log10_both(3, 3, 1) == -math.inf
    with pytest.raises(ValueError, match="must be positive"):
        fg_phase1.log10_both(0, 3, 10)


def test_widths_for_99_percent():
    for n, m in enumerate((fg_phase1.narrowest(n, n) for n in range(1, 7)), 1):
        p = 2.0 ** -(n + 1)
        chance = [1 - 2 * (1 - p) ** k + (1 - 2 * p) ** k for k in (m - 1, m)]
        assert chance[0] < 0.99 <= chance[1]
    # Where one sign has more labels, it alone decides.
    assert math.log10(fg_phase1.narrowest(2, 10)) == pytest.approx(fg_phase1.log10_width(10), abs=1e-3)


def test_drawn_frequencies_agree_with_the_formula():
    for case in ((2, 2, 20), (3, 1, 25)):
        share, low, high = fg_phase1.frequency(*case, draws=4000, seed=SEED)
        expected = 10 ** fg_phase1.log10_both(*case)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
        assert low < share < high < low + 0.05
    assert fg_phase1.wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def test_facts_of_a_run_and_of_none():
    run = xr.Dataset(attrs={"start": json.dumps({"cosine_median": 0.25, "labels_zero": 0.0})})
    found = {what: value for what, _, value in fg_phase1.facts(run)}
    assert found["median |cosine| of two inputs"] == 0.25 and found["share of labels that are 0"] == 0.0
    assert all(math.isnan(value) for _, _, value in fg_phase1.facts(None))


@pytest.mark.parametrize("shape", fg_exit.SHAPES)
def test_many_networks_move_as_each_does_alone_on_rotated_inputs(shape):
    batch = fg_exit.draw(shape, 3, SEED)
    # Large enough for the output to matter, and no preactivation exactly 0, which a rotation would turn into ±1e-17.
    w = 20 * batch.scale.max() * (batch.w / batch.scale[:, None, None] + 1e-3)
    batch = batch._replace(w=w, a=20 * batch.scale.max() * batch.a / batch.scale[:, None])
    n, d = batch.y.shape[1], batch.w.shape[2]
    x = orthonormal(n, d, 5)
    rest = np.linalg.svd(x)[2][n:]
    rotation = np.vstack([x, rest])  # takes the unit vectors to the inputs
    for r in range(3):
        net, p = Network(batch.w[r] @ rotation, batch.a[r]), Problem(x, batch.y[r], float(batch.eta[r]))
        w, a = batch.w[r : r + 1], batch.a[r : r + 1]
        for _ in range(20):
            net = step(net, p)
            w, a, _ = fg_exit.advance(w, a, batch.y[r : r + 1], batch.eta[r : r + 1])
        np.testing.assert_allclose(net.w, w[0] @ rotation, rtol=0, atol=1e-10 * np.abs(w).max())
        np.testing.assert_allclose(net.a, a[0], rtol=0, atol=1e-10 * np.abs(w).max())


def test_a_step_is_minus_eta_times_the_gradient():
    batch = fg_exit.draw((2, 1, 20, 3), 2, SEED)
    w, a = (torch.tensor(v, requires_grad=True) for v in (batch.w * 50, batch.a * 50))
    h = (torch.relu(w[:, :, :3]) * a[:, :, None]).sum(dim=1)
    loss = ((h - torch.tensor(batch.y)) ** 2).sum(dim=1) / 6
    gw, ga = torch.autograd.grad(loss.sum(), (w, a))
    moved, changed, _ = fg_exit.advance(batch.w * 50, batch.a * 50, batch.y, batch.eta)
    np.testing.assert_allclose(moved, batch.w * 50 - batch.eta[:, None, None] * gw.numpy(), atol=1e-12)
    np.testing.assert_allclose(changed, batch.a * 50 - batch.eta[:, None] * ga.numpy(), atol=1e-12)


@pytest.mark.parametrize("shape", fg_exit.SHAPES)
def test_drawn_networks_meet_every_hypothesis(shape):
    batch = fg_exit.draw(shape, 50, SEED)
    assert len(batch.y) == 50
    plus, minus = batch.sizes
    assert (plus > minus).all() and (batch.A > batch.B + 1).all() and (batch.scale < 1).all()
    np.testing.assert_allclose(batch.eta * (plus + batch.room), batch.x)
    assert (batch.x < 1).all() and (batch.room <= np.abs(batch.y).min(axis=1) * (1 + 1e-12)).all()
    np.testing.assert_allclose(np.linalg.norm(batch.w, axis=2), np.abs(batch.a))
    for r in range(5):
        p = Problem(np.eye(*reversed(batch.w.shape[2:] + batch.y.shape[1:])), batch.y[r], 0.1)
        for sign, which in zip((1, -1), batch.starts, strict=True):
            assert set(aligned_set(Network(batch.w[r], batch.a[r]), p, sign)) == set(np.flatnonzero(which[r])) != set()
    assert (fg_exit.draw(shape, 50, SEED, assumed=False).room > np.abs(batch.y).min()).any()


def test_the_exit_of_the_example_is_its_closed_form():
    for eta in (0.01, 0.1, 0.5):
        tau, terms = fg_exit.aligned_example(eta)
        assert tau == math.floor(math.log(2) / math.log1p(eta / 2)) + 1
        assert terms.min() <= tau < terms.max() or eta == 0.5
    tau, terms = fg_exit.aligned_example(0.1)
    assert tau == 15
    np.testing.assert_allclose(terms, [5.7535, 21.9719, 25.8146], rtol=1e-4)


def one_at_a_time(batch: fg_exit.Batch, r: int, longest: int) -> tuple[float, float, float]:
    """Exit, largest |h| over its bound and largest growth of |a| over its bound, by plain loops."""
    n, d = batch.y.shape[1], batch.w.shape[2]
    net, p = Network(batch.w[r], batch.a[r]), Problem(np.eye(n, d), batch.y[r], float(batch.eta[r]))
    scale, A, B, x = (float(v[r]) for v in (batch.scale, batch.A, batch.B, batch.x))
    output = growth = 0.0
    for t in range(longest):
        for w, a, before in zip(net.w, net.a, batch.a[r], strict=True):
            size = np.linalg.norm(w)
            if size > A * scale or abs(a) > A * scale or size - abs(a) > B * scale or a * before <= 0:
                return t, output, growth
            growth = max(growth, abs(a) / ((1 + x) ** t * (scale + B * scale) - B * scale))
        output = max(output, np.abs(outputs(net, p.x)).max() / (len(net.a) * A * A * scale * scale))
        net = step(net, p)
    return math.inf, output, growth


@pytest.mark.parametrize("shape", fg_exit.SHAPES[:4])
def test_exits_and_ratios_agree_with_plain_loops(shape):
    batch = fg_exit.draw(shape, 4, SEED)
    found = fg_exit._until_exit(batch, 500)
    for r in range(4):
        tau, output, growth = one_at_a_time(batch, r, 500)
        assert found.tau[r] == tau
        assert found.ratios["output"][r] == pytest.approx(output, rel=1e-9)
        assert found.ratios["growth_a"][r] == pytest.approx(growth, rel=1e-9)


def test_printed_maximum_fails_and_minimum_holds():
    assert fg_exit.exit_bound("max", TRIALS, SEED).value > 0.3
    assert fg_exit.exit_bound("min", TRIALS, SEED).value == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1000, 10**6), st.sampled_from(fg_exit.SHAPES))
def test_no_exit_before_the_smallest_term(seed, shape):
    found = fg_exit._until_exit(fg_exit.draw(shape, 10, seed), 2000)
    assert (found.tau >= found.terms.min(axis=0)).all()


def test_bounds_of_the_proof_hold_and_can_fail():
    for bound in fg_exit.BOUNDS:
        assert fg_exit.excess(bound, TRIALS, SEED).value <= 1e-9, bound
    # Without mA²λ² ≤ min|y| the error changes its sign.
    assert fg_exit.excess("error", 20, SEED, assumed=False).value > 0.1
    # With a bound for half the step size, growth and the single step exceed it.
    batch = fg_exit.draw((2, 2, 40, 4), 20, SEED)
    halved = fg_exit._until_exit(batch._replace(x=batch.x / 2), 2000).ratios
    assert halved["one_step"].max() > 1.01 and halved["growth_w"].max() > 1.01
    # With labels twice as large as the bound knows of, so does d.
    w, a, d = fg_exit.advance(batch.w, batch.a, 2 * batch.y, batch.eta)
    assert fg_exit._against_bounds(batch, batch.w, batch.a, d, a, 0)["d"].max() > 1.5


def test_strict_signs_fail_and_weak_ones_hold():
    assert fg_exit.wrong_products(True, TRIALS, SEED).value > 0.1
    assert fg_exit.wrong_products(False, TRIALS, SEED).value == 0
    batch = fg_exit.draw((2, 2, 40, 4), 5, SEED)
    _, _, d = fg_exit.advance(batch.w, batch.a, batch.y, batch.eta)
    assert fg_exit._signs(batch, batch.w, -d)[1] > 0


def test_no_network_has_left_at_its_start_unless_it_starts_unbalanced():
    assert fg_exit.exits_at_start(TRIALS, SEED).value == 0
    assert fg_exit.exits_at_start(TRIALS, SEED, stretch=1.5).value > TRIALS / 2


def test_the_mirror_image_is_exact_and_half_of_it_is_not():
    assert fg_phase1.mirror_difference(TRIALS, 50, SEED).value == 0
    assert fg_phase1.mirror_difference(TRIALS, 50, SEED, labels_only=True).value > 0.1


def test_the_boundary_network_is_admitted_as_printed_and_never_learns():
    net, p = fg_phase1.boundary_network(0.01)
    assert fg_phase1.members(net, p, strict=False) == (1, 1)
    assert fg_phase1.members(net, p, strict=True) == (0, 1)
    assert fg_phase1.unfitted(False, 3, SEED).value == 1
    assert fg_phase1.unfitted(True, 3, SEED).value < 1e-6


def test_phase_1_does_not_depend_on_the_scale_while_it_is_small():
    assert fg_phase1.size_depends_on_scale(TRIALS, SEED, 0.01, 1e-9).value < 1e-3
    assert fg_phase1.size_depends_on_scale(TRIALS, SEED, 0.01, 1e-2).value > 0.1  # where the output matters
    found = fg_phase1.phase(TRIALS, SEED, 0.01, 1e-9)
    assert np.isfinite(found.steps).all() and (found.size >= 0.5 / math.sqrt(0.02)).mean() > 0.9


def test_balance_needs_the_step_size_of_the_lemma():
    assert fg_phase1.needing_large_B(TRIALS, SEED, 0.01, 1e-9).value == 0
    batch = fg_exit.draw((2, 2, 40, 4), 30, SEED, True, 2.0).at(1e-9)
    wild = fg_phase1._until_aligned(batch._replace(eta=batch.eta * 3 / batch.x), 0.01, 50)
    assert (wild.unbalance >= 1).any()


def test_an_output_weight_changes_its_sign_at_any_step_size():
    for eta in (0.5, 0.1, 0.02):
        path, u = fg_phase1.sign_example(eta, round(24 / eta)), eta / 3
        assert path[0] == -1 and path[-1] > 0
        assert int((path > 0).argmax()) == pytest.approx(3 / eta * math.log(2 / u), rel=0.1)
    found = fg_phase1.phase(5 * TRIALS, SEED, 0.01, 1e-9)
    assert found.flips.any() and not found.flips_inside.any()


def test_alignment_has_the_sign_that_we_say():
    assert fg_phase1.alignment(1, 1, 1000, TRIALS, SEED).value < 0.01
    assert fg_phase1.alignment(-1, 1, 1000, TRIALS, SEED).value > 1.9
    assert fg_phase1.alignment(-1, -1, 1000, TRIALS, SEED).value < 0.01
    assert fg_phase1.alignment(1, 1, 1.5, TRIALS, SEED).value > 0.05  # too early
    plus, minus = fg_phase1.alignment_path(0.05, 100, 300)
    assert plus[-1].min() > 0.99 and minus[-1].max() < -0.99 and plus[0].min() < 0.5
