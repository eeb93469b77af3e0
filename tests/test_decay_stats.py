"""Statistics of runs with a decay and of shapes, on series that are known."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import decay_stats as stats

STRIDE, DECAY, ETA = 15, 300, "1/10"


def decayed(after, noise_loss=0.0, status="steps", before=20, k=2, error=1e-6):
    """λ1·η/2 follows ``after`` (a function of steps since the decay) from step 300 on; before that it stands at 1."""
    measured = STRIDE * np.arange(before + 60)
    since = measured - DECAY
    level = np.where(since >= 0, after(np.maximum(since, 0).astype(float)), 1.0)
    steps = np.arange(measured[-1] + 1)
    loss = np.exp(-steps / 500) * (1 + np.where(steps < DECAY, 0.05, noise_loss) * (-1.0) ** steps)
    return xr.Dataset(
        {
            "eigenvalue": (("measured", "eig"), np.tile(level[:, None] * 20, (1, k))),
            "upper": (("measured", "eig"), np.tile(level[:, None] * 20 + error * 20, (1, k))),
            "loss": ("step", loss),
            "eta": ("step", np.where(steps < DECAY, 0.1, 0.025)),
        },
        {"step": steps, "measured": measured, "eig": np.arange(1, k + 1)},
        {
            "decayed_at": DECAY,
            "experiment": json.dumps({"eta": ETA, "decay": {"factor": "1/4", "at_step": DECAY}}),
            "status": status,
            "stride": STRIDE,
        },
    )


def test_a_steady_rise_after_the_decay():
    run = decayed(lambda s: 1 + 2e-4 * s)
    steps, values = stats.after_decay(run)
    assert steps[0] == 0 and values[0] == pytest.approx(1.0) and values[1] == pytest.approx(1.003)
    assert stats.sharpness_reversals(run) == 0 and stats.falls_after_decay(run) == 0
    assert stats.loss_reversals(run) == 0 and stats.loss_rises_decayed(run) == 0
    assert stats.growth_rate(run) == pytest.approx(2e-4) and stats.rate_change(run) == pytest.approx(1.0)
    assert stats.growth_after_decay(run) == pytest.approx(values[-1] / values[3] - 1)


def test_what_a_run_does_at_the_time_of_its_decay():
    run = decayed(lambda s: 1 + 2e-4 * s)
    at, steps = int(run.attrs["decayed_at"]), run["step"].values
    falling = np.exp(-1e-3 * steps)
    run["loss"] = ("step", falling)
    assert np.isnan(stats.calm_before_decay(run))
    for rise, calm in ((at - 30, 30), (at - 7, 7), (at + 5, 7)):  # a rise after the decay does not count
        falling[steps == rise] = falling[steps == rise - 1] * 1.0001
        run["loss"] = ("step", falling)
        assert stats.calm_before_decay(run) == calm
    last = run["measured"].values < at
    expected = run["eigenvalue"].values[last, 0][-1] * float(run["eta"][0]) / 2
    assert stats.scaled_at_decay(run) == pytest.approx(expected)
    assert np.isnan(stats.scaled_at_decay(run.assign_attrs(decayed_at=-1)))


def test_an_oscillation_that_goes_on_is_seen():
    run = decayed(lambda s: 1 + 0.01 * (-1.0) ** (s / STRIDE), noise_loss=0.05)
    assert stats.sharpness_reversals(run) == 1.0
    assert stats.loss_reversals(run) > 0.99 and stats.loss_rises_decayed(run) == pytest.approx(0.5, abs=0.02)
    assert stats.falls_after_decay(run) == pytest.approx(0.5, abs=0.02)


def test_changes_below_the_error_of_an_eigenvalue_decide_nothing():
    slow = decayed(lambda s: 1 + 1e-6 * s + 1e-4 * (-1.0) ** (s / STRIDE), error=1e-3)
    assert stats.undetermined_share(slow) == 1.0 and np.isnan(stats.falls_after_decay(slow))
    assert stats.sharpness_reversals(slow) == 0.0
    assert stats.sharpness_reversals(decayed(lambda s: 1 + 1e-4 * (-1.0) ** (s / STRIDE))) == 1.0
    falling = decayed(lambda s: 1 - 2e-4 * s)
    assert stats.falls_after_decay(falling) == 1.0


def test_what_did_not_oscillate_cannot_stop_to():
    run = decayed(lambda s: 1 + 2e-4 * s)
    calm = run.assign(loss=("step", np.exp(-run["step"].values / 500)))
    assert np.isnan(stats.sharpness_reversals(calm)) and np.isnan(stats.loss_reversals(calm))
    # A fork that begins with the decay has no time before it; that is for its base to show.
    cut = calm.isel({"step": slice(DECAY, None), "measured": slice(DECAY // STRIDE, None)})
    assert stats.sharpness_reversals(cut) == 0 and stats.loss_reversals(cut) == 0


def test_slack_forgives_what_is_below_it():
    assert stats.reversals(np.array([0.0, 1.0, 0.99, 2.0, 1.995, 3.0])) == 1.0
    assert stats.reversals(np.array([0.0, 1.0, 0.99, 2.0, 1.995, 3.0]), slack=0.05) == 0.0


def test_rates_of_the_runs_of_a_seed_are_compared():
    runs = [decayed(lambda s, r=r: 1 + r * s) for r in (1e-4, 2e-4, 3e-4)]
    assert stats.rate_ratio(runs, []) == pytest.approx(3.0)
    assert stats.rate_ratio([*runs, decayed(lambda s: 1 - 1e-4 * s)], []) == 10.0
    assert stats.rate_change(decayed(lambda s: 1 - 1e-4 * s)) == 10.0
    bend = decayed(lambda s: 1 + np.where(s < 450, 2e-4 * s, 0.09 + 6e-4 * (s - 450)))
    assert stats.rate_change(bend) == pytest.approx(3.0, rel=0.15)
    assert stats.rate_change_of_seed([runs[0], bend], []) == stats.rate_change(bend)


@pytest.mark.parametrize(
    ("shape", "best"),
    [
        (lambda s: 1 + 0.2 * np.log1p(s / 60), "logarithm"),
        (lambda s: 1.5 - 0.5 * np.exp(-s / 200), "approach"),
        (lambda s: 1 + 3e-4 * s, "line"),
    ],
)
def test_the_shape_that_made_the_series_fits_best(shape, best):
    run = decayed(shape)
    advantage = stats.logarithm_advantage(run)
    steps, values = (x[stats.SETTLE :] for x in stats.after_decay(run))
    rest = {name: ((fit - values) ** 2).sum() for name, fit in stats.model_fits(steps, values).items()}
    assert min(rest, key=rest.get) == best
    assert (advantage > 5) if best == "logarithm" else (advantage < 0.2)


@pytest.mark.parametrize(
    "shape", [lambda s: 1 - 0.1 * np.log1p(s / 60), lambda s: np.exp(s / 600), lambda s: 1 + s**1.5 / 1e5]
)
def test_a_fall_or_a_rise_that_quickens_is_no_logarithm(shape):
    assert stats.logarithm_advantage(decayed(shape)) == 0.0


def test_a_run_without_a_decay_has_none_of_this():
    run = decayed(lambda s: 1 + 0 * s).assign_attrs(decayed_at=-1)
    for name in ("sharpness_reversals", "loss_reversals", "loss_rises_decayed", "falls_after_decay", "rate_change"):
        assert np.isnan(stats.STATISTICS[name](run)), name


def many(values, status="steps"):
    measured = 5 * np.arange(len(values))
    return xr.Dataset(
        {"eigenvalue": (("measured", "eig"), values * 20), "eta": ("step", np.full(measured[-1] + 1, 0.1))},
        {"step": np.arange(measured[-1] + 1), "measured": measured, "eig": np.arange(1, values.shape[1] + 1)},
        {"status": status, "experiment": json.dumps({"eta": ETA}), "stride": 5},
    )


def test_one_shape_at_different_scales_has_no_diversity_not_even_with_noise():
    t = np.linspace(0, 1, 240)
    curve = 0.4 + 0.6 * t + 0.05 * np.sin(20 * t)
    one = np.outer(curve, [1.0, 0.8, 0.5, 0.2])
    assert stats.shape_diversity(many(one), eig=4) == pytest.approx(0, abs=1e-4)
    noise = np.random.default_rng(0).normal(size=(240, 4))
    assert stats.shape_diversity(many(one + 0.002 * noise), eig=4) < 0.1
    assert stats.shape_diversity(many(1 + 0.01 * np.cumsum(noise, axis=0)), eig=4) > 0.5


def test_onsets_are_where_the_roughness_begins():
    t = np.arange(200)
    rise = np.minimum(0.5 + 0.005 * t, 1.0)[:, None] - 0.05 * np.arange(5)
    begin = np.array([90, 90, 95, 140, 1000])
    wobble = np.where(t[:, None] > begin, 0.01 * (-1.0) ** t[:, None], 0)
    base = 1e-5 * np.random.default_rng(1).normal(size=(200, 5))
    found = stats.onsets(rise + wobble + base, 70, 3.0)
    # The median over 21 turns when the eleventh of them is rough, or a little before, since noise is uneven.
    assert np.all((found[:4] >= begin[:4] - 9) & (found[:4] <= begin[:4] + 2)) and np.isnan(found[4])
    assert stats.apart_from_first(many(rise + wobble + base), eig=5) == pytest.approx(0.5)
    assert np.isnan(stats.apart_from_first(many(rise + base), eig=5))  # the first does not oscillate
    assert np.isnan(stats.apart_from_first(many(0.5 * rise + base), eig=5))  # and here it does not enter


def test_what_is_asked_at_the_end_needs_a_run_to_the_end():
    t = np.arange(200)
    values = np.minimum(0.5 + 0.005 * t, 1.0)[:, None] * np.array([1.02, 1.0, 0.99, 0.6])
    ended, cut = many(values, "accuracy"), many(values)
    assert stats.not_entered_share(ended, eig=4) == pytest.approx(1 / 3)
    assert np.isnan(stats.not_entered_share(cut, eig=4)) and np.isnan(stats.not_entered_share(ended, eig=5))
    assert stats.distance_at_end(ended, eig=4) == pytest.approx(0.4) and np.isnan(stats.distance_at_end(cut, eig=4))
    assert stats.distance_at_end(ended, eig=3) == pytest.approx(0.02)
    assert stats.before_first(ended, eig=4) == 0.0
    assert np.isnan(stats.before_first(many(values[:, ::-1], "accuracy"), eig=4))  # the first never enters
    assert stats.before_first(many(values[:, [2, 0, 1, 3]], "accuracy"), eig=4) == pytest.approx(2 / 3)
