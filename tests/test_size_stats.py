"""Orders of sharpening with the width and the depth, on series whose order is known."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import size_stats as stats

STRIDE = 15


def ramp(rate, start=0.2, count=200, leaves=None, status="accuracy", **size):
    """λ1·η/2 grows by ``rate`` a measurement from ``start`` to 1, stays there, and falls to 0.5 at ``leaves``."""
    level = np.minimum(start + rate * np.arange(count), 1.0)
    if leaves is not None:
        level[leaves:] = 0.5
    measured = STRIDE * np.arange(count)
    return xr.Dataset(
        {"eigenvalue": (("measured", "eig"), 20 * level[:, None]), "eta": ("step", np.full(measured[-1] + 1, 0.1))},
        {"step": np.arange(measured[-1] + 1), "measured": measured, "eig": [1]},
        {"experiment": json.dumps({"eta": "1/10", **size}), "status": status, "stride": STRIDE},
    )


def test_sizes_are_those_of_the_experiment_or_its_defaults():
    assert stats.size(ramp(0.01, width=8), "width") == 8 and stats.size(ramp(0.01), "width") == 128
    assert stats.size(ramp(0.01), "depth") == 1 and stats.size(ramp(0.01, depth=3), "depth") == 3
    with pytest.raises(ValueError, match="axis='colour'"):
        stats.size(ramp(0.01), "colour")


def test_rates_and_times_of_a_ramp():
    run = ramp(0.01)  # reaches 0.98 after 78 measurements
    assert stats.entry_or_never(run) == 78 * STRIDE
    assert stats.mean_rate(run) == pytest.approx(0.01 / STRIDE) == stats.steepest_rate(run)
    assert stats.steps_at_edge(run) == (199 - 78) * STRIDE
    slow = ramp(0.001)
    assert stats.entry_or_never(slow) == np.inf and stats.steps_at_edge(slow) == 0
    assert stats.mean_rate(slow) == pytest.approx(0.001 / STRIDE)


def test_the_steepest_part_is_found_where_the_mean_is_the_same():
    even, late = ramp(0.008), ramp(0.008)
    values = np.where(np.arange(200) < 60, 0.2 + 0.002 * np.arange(200), 0.32 + 0.0165 * (np.arange(200) - 60))
    late["eigenvalue"][:, 0] = 20 * np.minimum(values, 1.0)
    assert stats.mean_rate(late) == pytest.approx(stats.mean_rate(even), rel=0.03)
    assert stats.steepest_rate(late) == pytest.approx(0.0165 / STRIDE)


def test_a_run_that_leaves_the_edge_stays_until_then_and_one_cut_off_there_says_nothing():
    left = ramp(0.01, leaves=150, status="steps")
    # The last window whose median is 1 has its middle at the last measurement before the fall.
    assert stats.steps_at_edge(left) == (149 - 78) * STRIDE
    assert np.isnan(stats.steps_at_edge(ramp(0.01, status="steps")))


def test_orders_with_the_size():
    wide = [ramp(0.01 * f, width=w) for w, f in ((8, 4), (16, 3), (32, 2), (64, 1))]
    assert stats.entry_order(wide, [], "width") == 1 and stats.rate_order(wide, [], "width") == -1
    assert stats.steepness_order(wide, [], "width") == -1 and stats.stay_order(wide, [], "width") == -1
    assert stats.entry_order(wide[::-1], [], "width") == 1  # whatever the order of the list
    never = [*wide[:3], ramp(0.0, width=64)]
    assert stats.entry_order(never, [], "width") == 1
    swapped = [ramp(0.01 * f, width=w) for w, f in ((8, 4), (16, 2), (32, 3), (64, 1))]
    assert stats.entry_order(swapped, [], "width") == pytest.approx(0.8)
    assert stats.entry_order([ramp(0.01, width=w) for w in (8, 16, 32, 64)], [], "width") == 0


def test_too_few_sizes_have_no_order_and_high_starts_are_left_out():
    runs = [ramp(0.01 * f, width=w) for w, f in ((8, 4), (16, 3), (32, 2), (64, 1))]
    assert np.isnan(stats.entry_order(runs[:3], [], "width"))
    high = ramp(0.01, start=0.95, width=4)
    assert stats.entry_order([high, *runs], [], "width") == 1
    assert np.isnan(stats.entry_order([high, *runs[:3]], [], "width"))
    cut = [*runs[:3], ramp(0.01, width=64, status="steps")]
    assert np.isnan(stats.stay_order(cut, [], "width"))


def test_width_and_depth_are_compared_by_their_orders():
    base = ramp(0.015)
    wide = [ramp(0.01 * f, width=w) for w, f in ((16, 4), (32, 3), (64, 2))]
    same = [ramp(0.01 * f, depth=d) for d, f in ((2, 1.4), (3, 1.2), (4, 1))]
    assert stats.entry_orders_apart([base, *wide, *same], []) == 0 == stats.stay_orders_apart([base, *wide, *same], [])
    opposite = [ramp(0.01 * f, depth=d) for d, f in ((2, 2), (3, 3), (4, 4))]
    assert stats.entry_orders_apart([base, *wide, *opposite], []) == 2
