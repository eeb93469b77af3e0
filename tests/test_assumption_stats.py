"""What is measured of Assumptions 3.1 to 3.7, on series made to order."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import assumption_stats as stats

T = 400
OBSERVED = ("sharpness", "norm_A2", "norm_D2", "DF", "Dv", "Yv", "turn", "A_error")


def plain(total, **series):
    """A run with η = 0.1 and a hundred examples in which nothing happens, but for the series given."""
    rows = {name: np.ones(total) for name in OBSERVED}
    rows = {**rows, "norm_D2": np.full(total, 50.0), "sharpness": np.full(total, 10.0), **series}
    return xr.Dataset(
        {
            "loss": ("step", rows["norm_D2"] / 100),
            "eta": ("step", np.full(total, 0.1)),
            **{name: ("observed", np.asarray(values, dtype=float)) for name, values in rows.items()},
        },
        {"step": np.arange(total), "observed": np.arange(total)},
        {"experiment": json.dumps({"eta": "0.1"})},
    )


def rise(total=T, top=1.3):
    """Λ (η = 0.1, so that 2/η = 20) from half of the edge to above it, and below again at the end."""
    s = np.linspace(0.5, top, total)
    s[int(0.9 * total) :] = 0.6
    return 20 * s


def crosses(level):
    return int(np.argmax(level > 20 * 1.01)) - 1


def flow_of(descent, ratio=10, **changes):
    """A run with a smaller step size that takes the same values at equal times."""
    total = descent.sizes["observed"]
    fine = np.arange((total - 1) * ratio + 1) / ratio
    names = ("sharpness", "norm_D2", "DF", "Dv", "Yv")
    rows = {k: np.interp(fine, np.arange(total), descent[k].values) for k in names}
    flow = plain(len(fine), **{**rows, **{k: v * rows[k] for k, v in changes.items()}})
    return flow.assign(eta=("step", np.full(len(fine), 0.1 / ratio)))


def descent(**series):
    t = np.arange(T)
    d2 = 100 * np.exp(-t / 300)
    rows = {"sharpness": rise(), "norm_D2": d2, "DF": d2 - 9 * np.sqrt(d2), "Dv": -0.5 * np.sqrt(d2), "Yv": np.ones(T)}
    return plain(T, **{**rows, **series})


def test_a_flow_at_equal_times_is_no_distance_away():
    run = descent()
    for of in stats.OF_FLOW:
        assert stats.flow_gap([run, flow_of(run)], [], of) == pytest.approx(0, abs=1e-12)
    here, there = stats.pair_up(run, flow_of(run))
    assert here[-1] in range(crosses(rise()) - 1, crosses(rise()) + 3) and (there == 10 * here).all()


@pytest.mark.parametrize(("of", "name", "factor", "gap"), [
    ("sharpness", "sharpness", 1 / 1.1, 0.1), ("loss", "norm_D2", 1 / 1.2, 0.2), ("residual", "Dv", 0.8, 0.1),
    ("residual", "norm_D2", 1 / 1.21, 0.1),
])  # fmt: skip
def test_a_flow_that_differs_is_as_far_away_as_it_is(of, name, factor, gap):
    run = descent(Dv=np.zeros(T)) if name == "norm_D2" and of == "residual" else descent()
    flow = flow_of(run, **{name: factor})
    if name == "norm_D2":
        flow = flow.assign(loss=("step", flow["norm_D2"].values / 100), DF=flow["norm_D2"] - 9 * np.sqrt(100))
        run = run.assign(DF=run["norm_D2"] - 9 * np.sqrt(100))
    assert stats.flow_gap([run, flow], [], of) == pytest.approx(gap, rel=1e-6)
    # The worse of two pairs, the quantile over the steps.
    assert stats.flow_gap([run, flow_of(run), run, flow], [], of) == pytest.approx(gap, rel=1e-6)


def test_the_sign_of_v1_in_the_two_runs_does_not_count():
    run = descent()
    flow = flow_of(run, Dv=-1, Yv=-1)
    assert stats.flow_gap([run, flow], [], "residual") == pytest.approx(0, abs=1e-12)
    assert stats.flow_gap([run, flow_of(run, Dv=-1)], [], "residual") == pytest.approx(1.0)  # |2 · 0.5 ‖D‖|


def test_a_flow_that_ends_before_the_crossing_says_nothing_and_a_wrong_one_is_refused():
    run = descent()
    short = flow_of(run).isel(observed=slice(1000), step=slice(1000))
    assert np.isnan(stats.flow_gap([run, short], []))
    assert np.isnan(stats.flow_gap([plain(T), flow_of(plain(T))], []))
    with pytest.raises(ValueError, match="ratio"):
        stats.pair_up(run, run)
    with pytest.raises(ValueError, match="unknown"):
        stats.gaps(run, run, "outputs")


def test_the_departure_from_the_flow_is_that_of_the_two_recursions():
    generator = np.random.default_rng(0)
    x, flow, along = generator.uniform(0.5, 1.9, size=30), [2.0], [2.0]
    for level in x[:-1]:
        flow.append(flow[-1] * np.exp(-level))
        along.append(along[-1] * (1 - level))
    run = plain(30, sharpness=10 * x, Dv=np.array(along), norm_D2=np.full(30, 25.0))
    assert np.allclose(stats.departures(run, 0, 30), np.abs(np.array(along) - flow) / 5)


def test_only_returns_to_the_first_phase_count_for_the_departure():
    level = np.concatenate([np.linspace(0.5, 1.1, 80), np.linspace(1.1, 0.5, 20), np.linspace(0.5, 0.9, 100)]) * 20
    loss = np.concatenate([np.ones(80), np.full(20, 1.5), np.full(100, 0.5)])
    still = plain(200, sharpness=level, norm_D2=100 * loss, Dv=np.zeros(200))
    assert stats.return_departure(still) == 0
    early = np.where(np.arange(200) < 80, 5.0, 0.0)
    assert stats.return_departure(plain(200, sharpness=level, norm_D2=100 * loss, Dv=early)) == 0
    late = np.where(np.arange(200) > 110, 5.0, 0.0)
    assert stats.return_departure(plain(200, sharpness=level, norm_D2=100 * loss, Dv=late)) > 0.1
    assert np.isnan(stats.return_departure(plain(200)))


def spectra(run, **variables):
    steps = np.arange(0, run.sizes["observed"], 25)
    dims = {"kept": ("spectral", "kept_eig")}
    given = {k: (dims.get(k, ("spectral",)), v) for k, v in variables.items()}
    return run.assign(given).assign_coords(spectral=steps, kept_eig=[1, 2, 3, 101])


def test_eigenvectors_are_compared_with_the_first_at_the_last_spectrum_before_the_crossing():
    level = rise()
    steps = np.arange(0, T, 25)
    kept = np.tile([1.0, 0.9, 0.8, 0.3], (len(steps), 1))
    kept[steps >= crosses(level) - 2] = 0.0
    run = spectra(plain(T, sharpness=level), kept=kept)
    assert stats.turned(run) == pytest.approx(0.7) and stats.turned(run, 2) == pytest.approx(0.1)
    assert stats.turned(run, 101) == pytest.approx(0.7) and np.isnan(stats.turned(run, 7))
    assert np.isnan(stats.turned(spectra(plain(T), kept=kept)))


def test_what_is_not_slow_is_what_is_not_aligned():
    run = spectra(plain(100), aligned_share=[0.5, 0.7, 0.9, 0.7], aligned_energy=[1.0, 1, 1, 0.6])
    assert stats.not_slow(run) == pytest.approx(0.3) and stats.not_slow(run, weighted=True) == pytest.approx(0.1)


def test_a_phase_has_turned_if_its_bounds_say_so():
    level = np.concatenate([np.linspace(0.5, 1.2, 200), np.linspace(1.2, 0.5, 200)]) * 20
    kept = np.tile([1.0, 1, 1, 1], (16, 1))
    one = np.concatenate([[np.nan], np.ones(399)])
    assert stats.phases_turned(spectra(plain(400, sharpness=level, turn=one), kept=kept)) == 0
    # By two degrees a step the phases, of some sixty steps, may turn or not: nothing but the first angles decides.
    some = np.concatenate([[np.nan], np.full(399, np.cos(np.radians(2)))])
    assert np.isnan(stats.phases_turned(spectra(plain(400, sharpness=level, turn=some), kept=kept)))
    angles = np.radians(np.arange(16) % 2 * 45.0)
    moving = np.column_stack([np.cos(angles), *np.ones((3, 16))])
    assert stats.phases_turned(spectra(plain(400, sharpness=level, turn=some), kept=moving)) == 1
    assert np.isnan(stats.phases_turned(spectra(plain(400, turn=one), kept=kept)))


def test_errors_of_the_norm_are_summed_before_they_are_compared():
    norm = np.array([1.0, 2.0, 2.1, 2.0])
    run = plain(4, norm_A2=norm, A_error=np.array([np.nan, 0.1, 2.0, 0.0]))
    assert stats.norm_error(run) == pytest.approx((0.1 + 0.2) / 1.2)


def test_the_bound_has_its_own_measure_for_linear_networks_and_none_for_runs_that_diverge():
    run = plain(50, sharpness=np.full(50, 36.0))
    assert stats.level_bound(run) == pytest.approx(3.6)
    assert stats.level_bound(run, linear=4, other=6) == pytest.approx(0.6)
    run.attrs["experiment"] = json.dumps({"activation": "linear"})
    assert stats.level_bound(run, linear=4, other=6) == pytest.approx(0.9)
    run.attrs["status"] = "diverged"
    assert stats.level_bound(run) == 0.0


def test_a_phase_two_misses_the_start_if_c_is_small_there():
    level = np.concatenate([np.linspace(0.5, 1.2, 200), np.linspace(1.2, 0.5, 200)]) * 20
    turn = np.concatenate([[np.nan], np.full(399, 0.99)])
    small = plain(400, sharpness=level, turn=turn, norm_D2=np.full(400, 100.0), Dv=np.full(400, 0.05))
    assert stats.missed_at_start(small) == 1.0  # c = 0.05 / (0.01 · 10)
    assert stats.missed_at_start(small.assign(Dv=10 * small["Dv"])) == 0.0
    assert np.isnan(stats.missed_at_start(plain(400)))
