"""The primer: a quadratic, self-stabilisation against a loss that has exactly its terms, a small network."""

import numpy as np
import pytest

from eos_utils import primer


@pytest.mark.parametrize("factor, size", [(0.5, 0.0), (1.5, 0.0), (2.0, 1.0), (2.1, np.inf)])
def test_a_quadratic_turns_at_two(factor, size):
    theta = primer.quadratic(factor, 400)
    assert np.allclose(theta[1:], (1 - factor) * theta[:-1])
    assert abs(theta[-1]) == pytest.approx(size, abs=1e-10) if size < 2 else abs(theta[-1]) > 1e10


def test_the_model_is_gradient_descent_on_a_loss_with_these_terms():
    r"""L(x, z) = S(z) x²/2 − a z with S = 2/η + b z: along x the sharpness is S, −∇L·∇S = ab − b²x²/2."""
    eta, a, b = 0.02, 0.7, 1.3
    x, z = 0.05, 0.1
    xs, ys = primer.stabilise(x, b * z, eta, alpha=a * b, beta=b * b, steps=400)
    for t in range(401):
        assert (xs[t], ys[t]) == pytest.approx((x, b * z), rel=1e-9, abs=1e-12)
        x, z = x - eta * (2 / eta + b * z) * x, z - eta * (b * x**2 / 2 - a)


def test_orbits_are_closed_to_leading_order():
    drift = []
    for eta in (0.02, 0.01, 0.005):
        xs, ys = primer.stabilise(0.1, 0.0, eta, 1.0, 2.0, int(30 / eta))
        h = primer.energy(xs, ys, 1.0, 2.0)
        drift.append(np.abs(h / h[0] - 1).max())
        crossings = np.sum((ys[1:] > 0) & (ys[:-1] <= 0))
        assert crossings >= 2  # it goes round
    assert drift[0] > 1.6 * drift[1] > 2.5 * drift[2]
    assert primer.energy(np.array([1.0]), np.array([0.0]), 1.0, 2.0) == pytest.approx(0, abs=1e-15)


def test_a_small_network_goes_to_the_edge_of_its_step_size():
    run = primer.network("2/9", 150.0)
    scaled = run["eigenvalue"].values[:, 0] * float(run["eta"].values[0]) / 2
    assert scaled[0] < 0.9 and np.median(scaled[-40:]) == pytest.approx(1, abs=0.1)
    loss = run["loss"].values
    assert loss[-1] < 0.1 * loss[0] and (np.diff(loss[-100:]) > 0).any()
    panels = primer.network_panels({"2/9": run})
    assert any(curve.kind == "dashed" and curve.y[0] == pytest.approx(9) for curve in panels[0].curves)


def test_the_quadrants_of_the_plane_are_the_phases_in_their_order():
    xs, ys = primer.stabilise(0.05, -1.0, 0.02, 1.0, 2.0, 1500)
    named = {c.label: ~np.isnan(np.asarray(c.x, float)) for c in primer.plane_panel(xs, ys, 0.02, 1.0, 2.0).curves[1:]}
    order = [next(name for name, at in named.items() if at[t]) for t in range(len(xs))]
    changes = [order[0]] + [b for a, b in zip(order, order[1:], strict=False) if a != b]
    cycle = ["I", "II", "III", "IV"]
    assert len(changes) >= 6
    assert all(cycle[(cycle.index(a) + 1) % 4] == b for a, b in zip(changes, changes[1:], strict=False))
