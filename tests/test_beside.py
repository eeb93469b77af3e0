"""Two explanations on one trajectory: SG's quantities in FG's model, against autograd and closed forms; indicators."""

import numpy as np
import pytest
import torch
import xarray as xr

from eos_utils import beside
from eos_utils import fg_blocks as blocks
from eos_utils.fg_theory import two_cycle
from eos_utils.gram import Gram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

LABELS = "1, 1, -0.3, -0.3"


def test_the_gram_matrix_of_the_model_is_that_of_its_network():
    g = np.random.default_rng(0)
    w, a = g.normal(size=(3, 5, 4)), g.normal(size=(3, 5))
    for i in range(3):
        model = fully_connected(4, width=5, outputs=1, activation="relu", bias=False).double()
        objective = Objective(model, "half_mse", torch.eye(4).double(), torch.ones(4, 1).double())
        theta = torch.from_numpy(np.concatenate([w[i].ravel(), a[i]]))
        assert np.allclose(beside.gram(w, a)[i], Gram(objective).at(theta).M.numpy(), rtol=1e-13)


def test_the_output_norm_adds_up_what_the_sharpness_takes_the_largest_of():
    """Two aligned, balanced blocks by hand: λ± = (2/n) Σ a², exactly."""
    y = np.array([2.0, 1.0, -1.0])
    up, down = y * (y > 0) / np.sqrt(5), -y * (y < 0)
    a = np.array([0.6, 0.8, -0.5])
    w = np.abs(a)[:, None] * np.array([up, up, down])
    path = blocks.Path(y, np.array([0.1]), w[None, None], a[None, None], (y / 3)[None, None])
    seen = beside.view(path)
    assert seen.blocks[0] == pytest.approx([2 / 3 * 1.0, 2 / 3 * 0.25])
    assert seen.values[0, 0] == pytest.approx(2 / 3) and seen.a2[0] == pytest.approx([1.0, 0.25])
    assert seen.ratio[0] == pytest.approx(1)


def test_one_block_at_the_edge_is_the_two_cycle_and_the_other_rises_beside_it():
    seen = beside.view(blocks.train(LABELS, 1.1, 40, 1e-3, 80, 200), begin=14)
    swings = seen.blocks[40:60, 0] * seen.eta / 2
    assert sorted([swings[::2].mean(), swings[1::2].mean()]) == pytest.approx(
        sorted(1.1 * s for s in two_cycle(1.1)), rel=0.05
    )
    assert seen.blocks[70, 1] * seen.eta / 2 == pytest.approx(1.1 * 0.3, rel=0.05)  # 2‖d₋‖
    # Λ does not know of the other block; the norm does.
    assert np.allclose(seen.values[20:, 0], seen.blocks[20:, 0], rtol=1e-3)
    assert seen.a2[60:62, 1].mean() > 50 * seen.a2[14, 1]
    # With v₁ at rest R is the other block's residual, and R′ follows it.
    assert np.abs(seen.rest - seen.follower)[14:].max() < 0.06 * seen.rest[14]
    assert seen.rest[40] < 1e-2 * seen.rest[14]
    assert np.isnan(seen.follower[:14]).all()


def test_with_both_blocks_unstable_the_follower_leaves_and_the_residual_does_not():
    seen = beside.view(blocks.train(blocks.LABELS, 1.33, 40, 1e-3, 120, 200), begin=14)
    assert seen.blocks[40:, 1].mean() * seen.eta / 2 > 1
    assert seen.follower[-1] > 100 * seen.rest[14] > seen.rest[-1]


def recorded(steps=240, every=10, crossing=100, top=None, rest=None, norm=None):
    """A made-up run: the sharpness crosses 2/η = 10 at a step; series given as functions of the step."""
    t = np.arange(steps)
    at = t[::every]
    top = top if top is not None else np.where(t < crossing, 5 + 5 * t / crossing, 10.3 + 0.2 * (-1.0) ** t)
    norm = norm if norm is not None else 1 + t / steps
    ten = np.column_stack([top[at], *[(1 + t / steps)[at] * 0.1 if rest is None else rest[at] / 9] * 9])
    return xr.Dataset(
        {"sharpness": ("observed", top), "norm_A2": ("observed", norm), "loss": ("step", 1 / (1.0 + t)),
         "eta": ("step", np.full(steps, 0.2)), "gram_eigenvalue": (("spectral", "gram_eig"), ten),
         "sharpness_error": ("observed", np.zeros(steps)), "norm_D2": ("observed", 1 / (1.0 + t))},
        {"observed": t, "step": t, "spectral": at},
    )  # fmt: skip


def test_what_the_norm_goes_with():
    t = np.arange(240)
    run = recorded(rest=(1 + t / 240) ** 3)
    assert beside.goes_with(run, "rest") == pytest.approx(1) and beside.goes_with(run, "top", "before") > 0.95
    assert abs(beside.goes_with(run, "top")) < 0.3  # clamped: the period of two is averaged out
    falling = recorded(rest=(1 + t / 240) ** -2.0)
    assert beside.goes_with(falling, "rest") == pytest.approx(-1)
    first = int(np.flatnonzero(run["spectral"].values >= 100)[0])
    start, end = run["spectral"].values[[first, -1]]
    assert beside.growth(run, "rest") == pytest.approx(((240 + end) / (240 + start)) ** 3)
    assert beside.growth(run, "norm") == pytest.approx((240 + end + 0.5) / (240 + start + 0.5))
    assert np.isnan(beside.goes_with(recorded(steps=150), "rest"))  # five spectra after the crossing
    with pytest.raises(ValueError, match="of='Λ' is unknown"):
        beside.growth(run, "Λ")
    with pytest.raises(ValueError, match="part='late' is unknown"):
        beside.growth(run, "top", "late")


def test_refusals():
    path = blocks.train(LABELS, 1.1, 40, 1e-3, 20, 200)
    with pytest.raises(ValueError, match="5 of 21 steps were kept"):
        beside.view(path._replace(w=path.w[-5:], a=path.a[-5:]))
    with pytest.raises(ValueError, match="begin=21: must be a step of the run, 0 to 20"):
        beside.view(path, begin=21)
