"""Directions followed through crossings, on matrices whose eigenvectors are known, and the statistics on them."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import directions
from eos_utils.eos_stats import HALF

STRIDE, ETA, P = 15, 0.1, 12


def run_of(curvatures, rotate=0.0, k=6, first=0):
    """A run whose Hessian has orthogonal directions with given curvatures, which turn out of their span all the time.

    What a Lanczos method sees: the k largest, sorted, with eigenvectors of random signs.
    """
    generator = np.random.default_rng(0)
    values, vectors = [], []
    turn = np.eye(P)
    for i in range(P // 2):
        c, s, plane = np.cos(rotate), np.sin(rotate), [i, i + P // 2]
        turn[np.ix_(plane, plane)] = [[c, -s], [s, c]]
    basis = np.eye(P)
    for row in curvatures:
        order = np.argsort(row)[::-1][:k]
        values.append(row[order])
        vectors.append(basis[:, order] * generator.choice([-1.0, 1.0], size=k))
        basis = turn @ basis
    overlap = [vectors[t].T @ vectors[max(0, t - 1)] for t in range(len(vectors))]
    measured = first + STRIDE * np.arange(len(values))
    return xr.Dataset(
        {
            "eigenvalue": (("measured", "eig"), np.array(values) * 2 / ETA),
            "overlap": (("measured", "eig", "eig_before"), np.array(overlap)),
            "eta": ("step", np.full(measured[-1] + 1 - first, ETA)),
            "loss": ("step", np.ones(measured[-1] + 1 - first)),
        },
        {"step": np.arange(first, measured[-1] + 1), "measured": measured, "eig": np.arange(1, k + 1)},
        {"experiment": json.dumps({"fork": None}), "stride": STRIDE},
    )


def crossing(count=120):
    t = np.arange(count)
    rows = np.tile(0.05 * np.arange(P)[::-1] / P, (count, 1))
    rows[:, 0] = 0.9 + 0 * t
    rows[:, 1] = 0.3 + 1.2 * t / count  # crosses the first half way
    rows[:, 2] = 0.5 + 0.2 * np.sin(t / 7)
    return rows


@pytest.mark.parametrize("rotate", [0.0, 0.02])
def test_a_followed_direction_keeps_its_curvature_through_a_crossing(rotate):
    rows = crossing()
    found = directions.follow(run_of(rows, rotate), count=3)
    # At the first measurement the directions are the eigenvectors, sorted: 0.9, 0.5, 0.3.
    assert np.allclose(found.curvature, rows[:, [0, 2, 1]], atol=1e-9)
    assert found.kept.min() > 0.99


def test_it_begins_where_it_is_told_and_says_what_it_lost():
    rows = crossing()
    late = directions.follow(run_of(rows), count=2, begin=STRIDE * 100)
    assert late.step[0] == 1500 and np.allclose(late.curvature[0], np.sort(rows[100])[::-1][:2])
    # The third direction falls out of the three eigenvectors known when a fourth overtakes it.
    rows[60:, 3] = 0.95
    lost = directions.follow(run_of(rows, k=3), count=3)
    assert lost.kept.min() < 0.5


def test_what_cannot_be_followed_is_refused():
    run = run_of(crossing())
    with pytest.raises(ValueError, match="without overlaps"):
        directions.follow(run.drop_vars("overlap"))
    with pytest.raises(ValueError, match="between 1 and 6"):
        directions.follow(run, count=7)
    with pytest.raises(ValueError, match="last measurement is at step 1785"):
        directions.follow(run, begin=5000)


def ramp(rates, count=150, enters=70):
    """Curvatures that grow at given rates and reach 0.98 (the first) at measurement ``enters``, then stay."""
    t = np.arange(count)
    rows = np.tile(0.01 * np.arange(P)[::-1] / P, (count, 1))
    for i, rate in enumerate(rates):
        rows[:, i] = np.minimum(0.98 + 1e-9 + rate * (t - enters), 1.0) - 0.02 * i
    return rows


def test_rates_before_entry_are_those_that_were_put_in():
    rates = [0.004, 0.003, 0.002]
    run = run_of(ramp(rates))
    # The slowest is the largest where the window begins.
    assert np.allclose(directions.growth_rates_before(run, 3, 30), rates[::-1], rtol=1e-6)
    assert directions.rate_spread(run, 3, 30) == pytest.approx((0.004 - 0.002) / 0.003, rel=1e-6)
    assert directions.rate_spread(run_of(ramp([0.003] * 3)), 3, 30) == pytest.approx(0, abs=1e-6)
    assert np.isnan(directions.rate_spread(run_of(0.5 * ramp(rates)), 3, 30))  # never enters
    early = run_of(ramp(rates, enters=34))
    assert np.isfinite(directions.rate_spread(early, 3, 24)) and np.isnan(directions.rate_spread(early, 3, 25))


def moving(seed, shared, alternating):
    """Five directions at the edge: a noise, or an alternation with a noisy amplitude, each own or in common."""
    generator = np.random.default_rng(seed)
    rows = ramp([0.004] * 5, count=200)
    noise = shared * generator.normal(size=(200, 1)) + (1 - shared) * generator.normal(size=(200, 5))
    if alternating:
        # An amplitude that wanders slowly on an alternation that all runs have in step.
        wander = np.cumsum(noise, axis=0) / 30
        noise = 4 * (-1.0) ** np.arange(200)[:, None] * (1 + 0.3 * wander)
    rows[:, :5] += 1e-3 * noise
    return run_of(rows, k=8)


@pytest.mark.parametrize("alternating", [False, True])
def test_dependence_is_seen_where_it_is_and_not_where_it_is_not(alternating):
    for shared, low, high in ((0.0, -0.15, 0.15), (0.9, 0.3, 1.0)):
        runs = [moving(seed, shared, alternating) for seed in range(5)]
        found = [directions.dependence_excess([r], [o for o in runs if o is not r]) for r in runs]
        assert low < np.mean(found) < high, (shared, found)


def test_a_direction_that_is_lost_gives_no_number():
    run = moving(0, 0.0, False)
    run["overlap"].values[90] *= 0.1
    assert np.isnan(directions.dependence_excess([run], [moving(1, 0.0, False)]))
    early = run_of(ramp([0.004, 0.003, 0.002]))
    early["overlap"].values[45] *= 0.1
    assert np.isnan(directions.rate_spread(early, 3, 24))


def held_pair(shift, late=0, first=30):
    """A base run and one, from measurement ``first`` on, in which the others rise ``shift`` measurements later."""
    t = np.arange(150)

    def rows(later, own):
        out = np.tile(0.01 * np.arange(P)[::-1] / P, (150, 1))
        out[:, 0] = own
        for i in (1, 2):
            out[:, i] = np.minimum(0.5 + 0.01 * (t - late - later) - 0.02 * i, 1.0)
        out[:, 3] = 0.965 + 0.02 * (t > 15)  # has entered before anything is held
        return out

    base, held = run_of(rows(0, 0.99)), run_of(rows(np.where(t >= first, shift, 0), 0.99 + 0.005 * t))
    cut = {"measured": slice(first, None), "step": slice(first * STRIDE, None)}
    return base, held.isel(cut)


@pytest.mark.parametrize("shift", [0, 20, -8])
def test_entry_shift_counts_steps_between_the_entries_of_the_others(shift):
    base, held = held_pair(shift)
    found = directions.entry_shift([base, held], [], 2, yardstick=300)
    assert found == pytest.approx(abs(shift) * STRIDE / 300, abs=1e-9)
    entries = directions.entries_beside_first(base, held)
    assert np.nanmin(entries[0]) < 30 * STRIDE  # the one that had entered is seen, and does not count


def test_an_entry_right_after_the_beginning_is_seen():
    # The others reach 0.98 in the base at measurements 50 and 52, in the held run 12 earlier: 8 and 10 after it begins.
    base, held = held_pair(-12, first=30)
    entries = directions.entries_beside_first(base, held)
    assert np.nanmin(np.where(entries > 30 * STRIDE, entries, np.nan)) == 38 * STRIDE


def test_an_eigenvalue_that_never_enters_counts_as_entering_at_the_end():
    base, held = held_pair(1000)
    entries = directions.entries_beside_first(base, held)
    waiting = entries[:, [not np.isnan(e).all() and np.nanmin(e) > 20 * STRIDE for e in entries.T]]
    assert np.isnan(waiting[1]).all() and not np.isnan(waiting[0]).any()
    expected = (149 * STRIDE - waiting[0]).mean() / 300
    assert directions.entry_shift([base, held], [], 2, yardstick=300) == pytest.approx(expected)
    never = held_pair(0, late=1000)
    assert np.isnan(directions.entry_shift(list(never), [], 2))


def test_runs_of_different_lengths_are_compared_over_the_time_they_share():
    base, held = held_pair(0)
    shorter = base.isel({"measured": slice(0, 45), "step": slice(0, 44 * STRIDE + 1)})
    assert np.isnan(directions.entry_shift([shorter, held], [], 2))  # nothing enters by then
    assert directions.entries_beside_first(base, held).shape == (2, 5)


def test_runs_that_do_not_begin_alike_are_not_compared():
    base, held = held_pair(0)
    held = held.assign(loss=held["loss"] * 1.01)
    assert np.isnan(directions.entry_shift([base, held], [])) and np.isnan(
        directions.roughness_without([base, held], [])
    )


def test_roughness_without_compares_the_others_only():
    t = np.arange(150)
    rows = ramp([0.004] * 5)
    wobble = np.where(t >= 50, 0.01 * (-1.0) ** t, 0.0)
    base, held = rows.copy(), rows.copy()
    base[:, :5] += wobble[:, None] * np.array([3, 1, 1, 1, 1])
    held[:, 1:5] += 0.1 * wobble[:, None]
    found = directions.roughness_without([run_of(base), run_of(held)], [])
    sunk = run_of(base)
    sunk["overlap"].values[60] *= 0.1
    assert np.isnan(directions.roughness_without([run_of(base), sunk], []))
    assert found == pytest.approx(0.1, rel=0.05)
    assert directions.roughness_without([run_of(base), run_of(base)], []) == pytest.approx(1.0)
    assert HALF == 10  # the window above is the 21 measurements from the entry on
