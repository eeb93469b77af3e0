"""Anomaly points on series whose agreement is known."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import anomalies as an

T = 600


def run_of(s, norm, error=0.0, eta=0.01, loss=None):
    """A recorded run with this scaled sharpness and this ‖A‖²."""
    steps = np.arange(len(s))
    return xr.Dataset(
        {
            "loss": ("step", np.linspace(1, 0.5, len(s)) if loss is None else loss),
            "eta": ("step", np.full(len(s), eta)),
            "sharpness": ("observed", np.asarray(s) * 2 / eta),
            "sharpness_error": ("observed", np.full(len(s), error)),
            "norm_A2": ("observed", np.asarray(norm)),
        },
        {"step": steps, "observed": steps},
        {"experiment": json.dumps({"eta": str(eta)})},
    )


def wave(period, amplitude=0.2, total=T):
    """A smooth oscillation around the edge, after a rise to it."""
    t = np.arange(total)
    return np.where(t < 100, 0.5 + 0.005 * t, 1 + amplitude * np.sin(2 * np.pi * (t - 100) / period))


def walk(seed, total=T):
    """A random walk that begins at 0.5 and is scaled to reach 1.2."""
    x = np.cumsum(np.random.default_rng(seed).normal(size=total))
    x -= x[0]
    return 0.5 + 0.7 * x / np.abs(x).max()


def test_perfect_agreement():
    s = wave(50)
    run = run_of(s, 2 * s + 3)
    for part in an.PARTS:
        assert an.anomaly_share(run, part) == 0
        assert an.level_correlation(run, part) == pytest.approx(1)
    assert an.agreement(run) == 1 and an.trend_correlation(run) == pytest.approx(1)
    assert an.shift_rank(run, "even") < 0.1 and an.shift_rank(run, "odd") < 0.1
    assert an.turning_ratio(run) == 1 and np.isnan(an.turn_excess(run))  # no anomalies to place


def test_antiphase_with_period_two_and_the_null_that_is_not_used_then():
    t = np.arange(T)
    flips = np.where(t < 100, 0.5 + 0.005 * t, 1 + 0.05 * (-1.0) ** t)
    norm = np.where(t < 100, t, 100 - 5 * (-1.0) ** t)
    run = run_of(flips, norm)
    assert an.anomaly_share(run, "before") < 0.02 and an.anomaly_share(run, "after") > 0.98
    assert an.agreement(run, "after") == pytest.approx(-1, abs=0.03)
    assert an.expected_share(run, "after") == pytest.approx(0.5, abs=0.01)
    assert an.level_correlation(run, "after") == pytest.approx(-1, abs=0.05)
    for parity in ("even", "odd"):
        assert np.isnan(an.shift_rank(run, parity, "after")) and np.isnan(an.shift_share(run, parity, "after"))
        assert not np.isnan(an.shift_rank(run, parity, "after", hovering=False))
    # What the null would have said: every odd shift turns antiphase into agreement, no even one changes anything.
    assert (
        an.shift_share(run, "odd", "after", hovering=False)
        < 0.02
        < 0.98
        < an.shift_share(run, "even", "after", hovering=False)
    )
    assert an.anomaly_share(run, phase="hovering") > 0.98 and an.anomaly_share(run, phase="I") < 0.05


def test_smoothing_brings_out_an_agreement_that_period_two_hides():
    t, slow = np.arange(T), wave(80, amplitude=0.1)
    flip = 0.05 * (-1.0) ** t * (t >= 100)
    run = run_of(slow + flip, 10 * slow - 10 * flip)
    assert an.anomaly_share(run, "after") > 0.9 and an.anomaly_share(run, "after", smoothing=1) < 0.03
    assert an.level_correlation(run, "late") < 0.8 < 0.98 < an.trend_correlation(run)


def test_independent_noise_gives_what_independent_signs_give():
    shares, kappas, ranks = [], [], []
    for seed in range(100, 130):
        run = run_of(walk(seed), walk(seed + 1000))
        shares.append(an.anomaly_share(run) - an.expected_share(run))
        kappas.append(an.agreement(run))
        ranks.append(an.shift_rank(run, "even"))
    error = 0.5 / np.sqrt(T * 30)
    assert abs(np.mean(shares)) < 4 * error and abs(np.mean(kappas)) < 8 * error
    assert np.std(shares) == pytest.approx(0.5 / np.sqrt(T), rel=0.5)
    assert 0.3 < np.mean(ranks) < 0.7 and min(ranks) < 0.2 and max(ranks) > 0.8


def test_expected_share_is_that_of_the_frequencies():
    generator = np.random.default_rng(100)
    ds, da = (generator.random(20000) < p for p in (0.9, 0.7))
    s, norm = (np.concatenate([[0], np.cumsum(np.where(x, 1.0, -1.0))]) for x in (ds, da))
    found = an.signs(s, norm)
    assert an.expected(found) == pytest.approx(0.9 * 0.3 + 0.1 * 0.7, abs=0.01)
    assert an.share(found) == pytest.approx(an.expected(found), abs=0.01)
    assert an.kappa(found) == pytest.approx(0, abs=0.03)


def test_steps_within_the_error_are_undetermined():
    s = np.concatenate([[0.0], np.cumsum(np.tile([0.5, -0.5, 0.0005, 0.0005], 25))])
    norm = np.concatenate([[0.0], np.cumsum(np.tile([0.5, -0.5, -0.5, 0.5], 25))])
    assert an.share(an.signs(s, norm)) == pytest.approx(0.25)
    within = an.signs(s, norm, error=0.001)
    assert within.determined.mean() == pytest.approx(0.5) and an.share(within) == 0
    assert np.isnan(an.share(an.signs(s, norm, error=1.0)))
    assert an.undetermined_share(run_of(s, norm, error=0.2)) == pytest.approx(
        0.5
    )  # 2/η = 200, so three errors are 0.003
    assert not an.signs(np.zeros(5), np.arange(5.0)).determined.any()


def test_errors_belong_to_both_ends_of_a_step():
    found = an.signs(np.array([0.0, 1.0, 2.0, 3.0]), np.arange(4.0), error=np.array([0.0, 0.5, 0.0, 0.0]))
    assert found.determined.tolist() == [False, False, True]


def test_anomalies_at_turns_and_elsewhere():
    t = np.arange(T)
    norm = wave(60)
    # The sharpness turns two steps after the norm does, so that every anomaly is at a turn.
    late = wave(60)
    late[102:] = norm[100:-2]
    late[100:102] = 1.0
    run = run_of(late, norm)
    assert 0 < an.anomaly_share(run, "late") < 0.15
    assert an.turn_share(run, 2, "late") == 1 and an.turn_share(run, 2, "late", baseline=True) < 0.25
    assert an.turn_excess(run, 2, "late") > 0.75
    apart = norm + 0.3 * np.exp(-(((t % 60) - 15.0) ** 2) / 2) * (t >= 100)  # bumps half way between turns
    assert an.turn_excess(run_of(apart, norm), 2, "late") < 0.1


def test_a_norm_that_turns_at_every_other_step_makes_its_turns_say_nothing():
    t = np.arange(T)
    run = run_of(wave(60), 10 + (-1.0) ** t)
    assert an.turn_share(run, baseline=True) > 0.9 and np.isnan(an.turn_excess(run))


def test_near_turns_counts_two_increments_on_either_side():
    assert an.near_turns(np.array([0, 1, 2, 3, 4, 3, 2, 1, 0.0]), 2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert an.near_turns(np.array([0, 1, 2, 3, 4, 3, 2, 1, 0.0]), 1).tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_turning_ratio_counts_turns():
    fast = wave(20)
    assert an.turning_ratio(run_of(fast, wave(60)), "after") == pytest.approx(3, rel=0.1)
    assert np.isnan(an.turning_ratio(run_of(fast, np.arange(T))))


def test_parts_of_runs_that_do_not_have_them():
    low, high = run_of(0.9 * wave(50, 0.05), np.arange(T)), run_of(wave(50) + 0.5, np.arange(T))
    for run in (low, high):
        assert np.isnan(an.anomaly_share(run, "before")) and np.isnan(an.level_correlation(run, "late"))
        assert not np.isnan(an.anomaly_share(run))
    with pytest.raises(ValueError, match="part='middle'"):
        an.anomaly_share(low, "middle")
    with pytest.raises(ValueError, match="parity='both'"):
        an.shift_rank(low, "both")
    with pytest.raises(ValueError, match="two series of one length"):
        an.signs(np.ones(3), np.ones(4))
    with pytest.raises(TypeError):
        an.anomaly_share(low, colour=1)
