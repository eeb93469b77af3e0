"""The four phases on series that were labelled by hand, and what is said of each phase on runs made to order."""

import json

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from eos_utils import phase_stats as stats
from eos_utils import phases
from eos_utils.phases import HOVERING, II, III, IV, I, Labeller, label

N = 100

# One excursion, by hand: the sharpness in units of 2/η, the loss, and the phase of each step.
BY_HAND = [
    (0.80, 0.50, I),
    (0.90, 0.48, I),
    (1.10, 0.46, II),
    (1.20, 0.45, II),
    (1.30, 0.50, II),  # the peak; the loss right before III is 0.5
    (1.20, 0.90, III),
    (1.05, 2.00, III),
    (0.90, 1.50, IV),
    (0.70, 0.80, IV),
    (0.60, 0.60, IV),  # the sharpness turns
    (0.62, 0.56, IV),  # rises, but the loss is more than a tenth above 0.5
    (0.66, 0.54, I),
    (0.72, 0.52, I),
]


def columns(rows):
    s, loss, labels = zip(*rows, strict=True)
    return np.array(s), np.array(loss), np.array(labels)


def saw(cycles=3, up=80, down=6, low=0.7, high=1.3, start=0.5):
    """A sharpness that rises slowly and falls fast, with a loss that spikes in the fall; the series and the peaks."""
    s, peaks = [np.linspace(start, high, up)], []
    for c in range(cycles):
        peaks.append(sum(map(len, s)) - 1)
        fall = np.linspace(high, low, down + 1)[1:]
        s.append(
            np.concatenate([fall, np.linspace(low, high, up)[1:] if c < cycles - 1 else low + 0.01 * np.arange(1, 9)])
        )
    s = np.concatenate(s)
    loss = 0.5 * 0.999 ** np.arange(len(s))
    for peak in peaks:
        spike = np.array([0.02, 0.2, 0.8, 2.0, 3.0, 1.5, 0.6, 0.1])
        loss[peak : peak + len(spike)] += spike
    return s, loss, peaks


def run_of(s, loss, eta=0.01, **series):
    """A recorded run with this scaled sharpness and loss; n = 100 and what is not given is plain."""
    steps = np.arange(len(s))
    given = {"Dv": np.full(len(s), 1e-3), "DF": np.zeros(len(s)), "norm_D2": N * np.asarray(loss), **series}
    return xr.Dataset(
        {
            "loss": ("step", np.asarray(loss, dtype=float)),
            "eta": ("step", np.full(len(s), eta)),
            "sharpness": ("observed", np.asarray(s) * 2 / eta),
            **{name: ("observed", np.asarray(values, dtype=float)) for name, values in given.items()},
        },
        {"step": steps, "observed": steps},
        {"experiment": json.dumps({"eta": str(eta)}), "status": "steps"},
    )


# ---- the labeller --------------------------------------------------------------------------------


def test_an_excursion_labelled_by_hand():
    s, loss, wanted = columns(BY_HAND)
    assert label(s, loss, Labeller(smoothing=0)).tolist() == wanted.tolist()


def test_each_parameter_moves_the_boundary_that_it_is_about():
    s, loss, wanted = columns(BY_HAND)
    looser = label(s, loss, Labeller(smoothing=0, loss=0.2))  # IV ends as soon as the sharpness rises
    assert looser[10] == I and (np.delete(looser, 10) == np.delete(wanted, 10)).all()
    later = label(s, loss, Labeller(smoothing=0, level=0.12))  # 1.10 is not above yet, 0.90 still is
    assert later[2] == I and later[7] == III and (np.delete(later, [2, 7]) == np.delete(wanted, [2, 7])).all()
    deaf = label(s, loss, Labeller(smoothing=0, turn=0.2))  # the turn at 0.6 is not seen
    assert (deaf[:11] == wanted[:11]).all() and (deaf[11:] == IV).all()


def test_smooth_cycles_are_counted_and_their_boundaries_found():
    s, loss, peaks = saw(cycles=4)
    labels = label(s, loss)
    assert len(phases.strict_cycles(labels)) == 4 == len(phases.upcrossings(s))
    assert [x.label for x in phases.segments(labels)] == [I, *[II, III, IV, I] * 4]
    thirds = [x for x in phases.segments(labels) if x.label == III]
    assert all(abs(x.begin - 1 - peak) <= 1 for x, peak in zip(thirds, peaks, strict=True))


@pytest.mark.parametrize("noise", [0.002, 0.004])
def test_noise_below_the_hysteresis_adds_no_cycle(noise):
    s, loss, _ = saw(cycles=4)
    noisy = s + noise * np.random.default_rng(100).normal(size=len(s))
    labels = label(noisy, loss, Labeller(turn=0.03, level=0.03))
    assert len(phases.strict_cycles(labels)) == 4
    assert (labels == label(s, loss, Labeller(turn=0.03, level=0.03))).mean() > 0.95


def test_noise_without_hysteresis_breaks_the_cycles():
    s, loss, _ = saw(cycles=4)
    noisy = s + 0.01 * np.random.default_rng(100).normal(size=len(s))
    assert len(phases.segments(label(noisy, loss, Labeller(smoothing=0, turn=0, level=0)))) > 40


def test_period_two_around_the_edge_is_hovering_and_nothing_else_is():
    t, loss = np.arange(200), np.full(200, 0.3)
    wave = 0.05 * (-1.0) ** t
    assert (label(1 + wave, loss) == HOVERING).all()
    assert HOVERING not in label(1 + wave, loss, Labeller(hovering=False))
    assert HOVERING not in label(0.5 + wave, loss)  # far from the edge
    assert HOVERING not in label(1 + 0.05 * np.sin(2 * np.pi * t / 7), loss)  # another period
    assert HOVERING not in label(1 + 0.05 * np.random.default_rng(100).normal(size=200), loss)  # noise turns at 2/3
    begins = np.where(t < 100, 1 + 0.0005 * t, 1.05 + wave)
    found = label(begins, loss)
    assert (found[110:] == HOVERING).all() and (found[:90] != HOVERING).all()


def test_a_few_alternating_steps_are_no_hovering():
    s, loss, peaks = saw(cycles=2)
    s = s.copy()
    s[peaks[0] - 8 : peaks[0] + 8] += 0.05 * (-1.0) ** np.arange(16)
    labels = label(s, loss)
    assert HOVERING not in label(s, loss, Labeller(near=0.5)) and len(phases.strict_cycles(labels)) == 2
    assert HOVERING in label(s, loss, Labeller(least=5, near=0.5))


def test_hovering_breaks_the_cycle():
    s, loss, _ = saw(cycles=2)
    tail = 1 + 0.05 * (-1.0) ** np.arange(100)
    s, loss = np.concatenate([s, np.linspace(0.8, 1, 20), tail]), np.concatenate([loss, np.full(120, 0.3)])
    assert len(phases.strict_cycles(label(s, loss))) == 2
    assert phases.segments(label(s, loss))[-1].label == HOVERING


def test_a_series_that_never_crosses_is_phase_one():
    s, loss = np.linspace(0.3, 0.95, 100), np.linspace(1, 0.4, 100)
    labels = label(s, loss)
    assert (labels == I).all() and phases.upcrossings(s) == [] and phases.strict_cycles(labels) == []


def test_a_start_above_the_edge_is_two_or_three_but_no_upcrossing():
    loss = np.full(40, 0.5)
    assert set(label(np.linspace(1.3, 1.6, 40), loss)) == {II}
    assert label(np.linspace(1.3, 1.05, 40), loss)[0] == III
    assert phases.upcrossings(np.linspace(1.3, 1.05, 40)) == []


def test_smoothing_takes_period_two_out_and_leaves_lines_alone():
    t = np.arange(30)
    assert np.allclose(phases.smooth(2 + 0.3 * (-1.0) ** t), 2)
    assert np.allclose(phases.smooth(0.1 * t)[1:-1], 0.1 * t[1:-1])
    s, loss, _ = saw(cycles=2)
    wave = 0.08 * (-1.0) ** np.arange(len(s))
    rules = Labeller(hovering=False)
    assert (label(s + wave, loss, rules) == label(s, loss, rules)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=40, unique=True))
def test_without_slack_rising_is_the_sign_of_the_increments(values):
    s = np.array(values, dtype=float)
    assert (phases.rising(s)[1:] == (np.diff(s) > 0)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=60), st.floats(0, 1))
def test_turns_are_more_than_the_slack_apart_and_extremes_of_what_they_end(values, turn):
    s = np.array(values)
    found = phases.segments(phases.rising(s, turn).astype(int))
    for before, after in zip(found[:-1], found[1:], strict=True):
        at, stretch = before.end - 1, s[max(before.begin - 1, 0) : after.end]
        assert s[at] == (stretch.max() if before.label else stretch.min())
    for inner in found[1:-1]:
        assert abs(s[inner.end - 1] - s[inner.begin - 1]) > turn


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 2), min_size=1, max_size=60), st.floats(0, 0.3))
def test_labels_say_on_which_side_of_the_edge_a_step_is(values, level):
    s = np.array(values)
    labels = label(s, np.ones(len(s)), Labeller(smoothing=0, level=level, hovering=False))
    over = np.isin(labels, (II, III))
    assert over[s > 1 + level].all() and not over[s < 1 - level].any()


def test_refuses_what_it_cannot_label():
    with pytest.raises(ValueError, match="two series of one length"):
        label(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="not finite"):
        label(np.array([1.0, np.nan]), np.ones(2))
    with pytest.raises(ValueError, match="window=10"):
        Labeller(window=10)
    with pytest.raises(ValueError, match="turn=-1"):
        Labeller(turn=-1)


# ---- statistics of a run -------------------------------------------------------------------------


def test_what_the_paper_says_holds_on_a_run_made_to_say_it():
    s, loss, _ = saw(cycles=3)
    run = run_of(s, loss)
    assert stats.start_level(run) == pytest.approx(0.5) and stats.peak_level(run) == pytest.approx(1.3, abs=0.04)
    assert stats.share_against(run, "before", "sharpness", "rises") == 0
    assert stats.share_against(run, "before", "sharpness", "falls") == 1
    assert stats.share_against(run, "I", "loss", "falls") == 0
    assert stats.segments_against(run, "III", "loss", "rises") == 0
    assert stats.crossing_count(run) == stats.cycle_count(run) == stats.returns(run) == 3
    assert stats.out_of_order(run) == 0 and stats.third_not_final(run) == 0
    assert stats.above_in_phase_one(run) == 0 and stats.drop_time(run) <= 5
    assert 0.4 < stats.time_above(run) < 0.6
    shares = [stats.phase_share(run, name) for name in stats.PHASES]
    assert sum(shares) == pytest.approx(1) and shares[-1] == 0


def test_a_run_that_does_the_opposite_is_told_apart():
    s, loss, _ = saw(cycles=3)
    run = run_of(s, 1 / loss)
    assert stats.share_against(run, "I", "loss", "falls") == 1
    assert stats.segments_against(run, "III", "loss", "rises") == 1
    hovering = run_of(np.concatenate([np.linspace(0.5, 1, 60), 1 + 0.05 * (-1.0) ** np.arange(200)]), np.full(260, 0.3))
    assert stats.out_of_order(hovering) == 1 and stats.phase_share(hovering, "hovering") > 0.7
    assert stats.edge_share(hovering) == 1 and stats.edge_share(run) < 0.7


def test_runs_that_start_high_or_never_cross_have_no_before_and_after():
    flat = run_of(np.linspace(0.3, 0.9, 100), np.linspace(1, 0.5, 100))
    high = run_of(*saw(cycles=2, start=0.95)[:2])
    for run in (flat, high):
        assert np.isnan(stats.edge_share(run)) and np.isnan(stats.out_of_order(run))
        assert np.isnan(stats.share_against(run, "before", "loss", "falls"))
    assert stats.crossing_count(flat) == 0 and np.isnan(stats.crossing_count(high))
    assert stats.peak_level(flat) < 1
    for name in ("growth_ratio", "not_within", "not_exceeded_at_turn", "fourth_factor", "loss_at_fourth_end"):
        assert np.isnan(stats.STATISTICS[name](flat))


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_growth_is_compared_with_its_exponential_law(power):
    s, loss, _ = saw(cycles=2, start=0.6)
    dv = np.ones(len(s))
    for t in range(len(s) - 1):
        dv[t + 1] = dv[t] * abs(1 - 2 * s[t]) ** power  # ηΛ = 2s
    run = run_of(s, loss, Dv=dv)
    assert stats.growth_ratio(run, floor=0) == pytest.approx(power)
    assert stats.share_against(run, "III", "Dv", "rises") == 0
    small = run_of(s, loss, Dv=dv * 1e-9 / dv.max())
    assert np.isnan(stats.growth_ratio(small))  # nothing but what is below the floor


def test_when_the_residual_exceeds_the_labels():
    s, loss, peaks = saw(cycles=3)
    run = run_of(s, loss)  # the loss passes 1 in the fall only
    assert stats.steps_to_exceed(run) > 20 and stats.not_within(run) == 1
    assert stats.not_exceeded_at_turn(run, slack=0) == 1 and stats.loss_at_turn(run) < 1
    early = loss.copy()
    for begin in phases.upcrossings(s):
        early[begin + 5 :] = 1.5
    assert stats.steps_to_exceed(run_of(s, early)) <= 5
    assert stats.not_within(run_of(s, early)) == 0 == stats.not_exceeded_at_turn(run_of(s, early))
    assert stats.not_within(run_of(s, early), few=2) > 0


def test_how_much_of_the_fall_precedes_what_is_said_to_cause_it():
    s = np.concatenate([np.linspace(0.5, 1.4, 91), np.linspace(1.4, 0.6, 17)[1:], np.linspace(0.61, 0.8, 20)])
    loss, at = np.full(len(s), 0.4), np.arange(len(s))  # the peak is at 90, and 1 is reached 8 steps later
    for late, wanted in ((95, 5 / 8), (98, 1.0), (85, 0.0), (90, 0.0)):
        exceeded = np.where(at >= late, 2.0, loss)
        assert stats.fallen_before(run_of(s, exceeded), smoothing=0) == pytest.approx(wanted, abs=1e-9)
        pushed = run_of(s, loss, DF=np.where(at >= late, 2.0, -3.0))
        assert stats.fallen_before(pushed, "push", smoothing=0) == pytest.approx(wanted, abs=1e-9)
    assert stats.fallen_before(run_of(s, loss)) == 1
    alternating = run_of(s, loss, DF=np.where(at < 94, -1.0, 0.2) + 2 * (-1.0) ** at)
    assert stats.fallen_before(alternating, "push", smoothing=0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="of='x'"):
        stats.fallen_before(alternating, "x")


def test_phase_four_on_the_excursion_by_hand():
    s, loss, _ = columns([*BY_HAND, *[(0.75 + 0.02 * i, 0.5, I) for i in range(5)]])
    run = run_of(s, loss, Dv=np.sqrt(loss))
    assert stats.falls_on(run, smoothing=0) == 2  # 0.9, then 0.7 and 0.6
    assert stats.loss_at_fourth_end(run, smoothing=0) == pytest.approx(0.6 / 0.5)
    assert stats.fourth_factor(run, smoothing=0) == pytest.approx((0.56 / 2.0) ** (1 / 8))  # Dv falls more slowly
    assert stats.drop_time(run, smoothing=0) == 3


def test_the_loss_rises_and_falls():
    s, loss, _ = saw(cycles=3)
    falls = stats.rises_while_falling(run_of(s, loss), span=8)
    assert 0.01 < falls < 0.3
    assert stats.rises_while_falling(run_of(s, loss[::-1].copy()), span=8) == 0
    diverged = run_of(s, loss).assign_attrs(status="diverged")
    assert stats.rises_while_falling(diverged) == 0


def test_sensitivity_changes_one_parameter_at_a_time():
    s, loss, _ = saw(cycles=3)
    run = run_of(s + 0.05 * (-1.0) ** np.arange(len(s)) * (s > 0.8), loss)
    found = phases.sensitivity(
        stats.phase_share, run, {"hovering": [True, False], "near": [0.2, 0.4]}, where="hovering"
    )
    assert list(found) == [("hovering", True), ("hovering", False), ("near", 0.2), ("near", 0.4)]
    assert found["hovering", False] == 0 < found["near", 0.2] < found["near", 0.4]


def test_unknown_names_are_refused():
    run = run_of(*saw()[:2])
    with pytest.raises(ValueError, match="series='colour'"):
        stats.share_against(run, "I", "colour", "rises")
    with pytest.raises(ValueError, match="where='V'"):
        stats.share_against(run, "V", "loss", "rises")
    with pytest.raises(ValueError, match="expected='sinks'"):
        stats.share_against(run, "I", "loss", "sinks")
    with pytest.raises(TypeError):
        stats.cycle_count(run, colour=1)
