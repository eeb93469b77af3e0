"""The live checks of SG's assumptions: each holds where it should and fails with its control."""

import numpy as np
import pytest
import torch

from eos_utils import sg_assumptions as live
from eos_utils.gram import Gram
from eos_utils.sg_identities import problems


def test_the_residual_flows_with_the_gram_matrix_and_not_with_half_of_it():
    assert live.flow_of_residual(trials=12).value < 1e-12
    assert live.flow_of_residual(0.5, trials=6).value == pytest.approx(0.5)


@pytest.mark.parametrize("of", ["D", "A"])
def test_an_euler_step_errs_to_second_order_and_a_wrong_one_to_first(of):
    assert live.step_order(of, trials=9).value == pytest.approx(2, abs=0.05)
    assert live.step_order(of, 2.0, trials=9).value == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="unknown"):
        live.step_order("F")


def test_the_two_sides_are_those_of_a_small_step_of_the_flow():
    objective, theta = next(problems(1, ("tanh",)))
    turning, side = live._turning_of(objective, theta)
    gram, h = Gram(objective), 1e-6
    _, gradient, f = objective.gradient(theta)
    ends = [torch.linalg.eigh(gram.at(theta - s * h * gradient).M)[1] for s in (-1, 1)]
    middle = torch.linalg.eigh(gram.at(theta).M)[1]
    ends = [v * torch.sign((v * middle).sum(dim=0)) for v in ends]
    moved = ((ends[1] - ends[0]) / (2 * h)).T @ f[:, 0]
    assert np.allclose(turning, moved.numpy(), rtol=1e-3, atol=1e-5 * np.abs(turning).max())
    assert np.allclose(side, (torch.linalg.eigvalsh(gram.at(theta).M) * (middle.T @ (f - objective.y)[:, 0])).numpy())


def test_the_assumption_is_of_a_sign_and_not_of_an_eigenspace():
    assert live.slowness_flips(trials=9).value == 1.0
    assert live.slowness_flips(True, trials=9).value == 0.0


def test_fixed_directions_are_slow_with_the_sign_rule_alone():
    assert live.fixed_not_slow(True, 200).value == 0.0
    assert 0.85 < live.fixed_not_slow(False, 200).value < 1  # 15 of the 16 signs of four vectors


def test_slow_directions_may_turn_the_first_one_far():
    found, angle = live.turning_flows(1.5, 400)
    met = found.condition[:, -1]
    y = found.f - found.d
    assert np.allclose((y**2).sum(axis=2), 3) and np.allclose(found.f[:, 0], 0)
    # What is asked of a flow that counts, once more from its components.
    k = int(np.argmax(np.where(met, angle, 0)))
    assert angle[k] > 0.5 and (found.d[k] > 0).all()
    assert live.slow_yet_turned(1.5, 400).value == pytest.approx(1 - np.cos(angle[met].max()))
    assert live.slow_yet_turned(0.0, 100).value == 0.0


def test_gradient_descent_beside_its_flow():
    found = live.beside_flow("linear", 0.1, steps=20, n=30)
    assert len(found.d) > 6
    assert found.apart[0] == 0 and found.solver[0] == 0
    later = slice(5, None)
    assert (found.solver[later] < found.apart[later]).all()  # a twentieth of η is closer to the flow
    # Under the flow the loss falls, and D obeys dD/dt = -MD: its norm never grows.
    assert (np.diff(np.linalg.norm(found.flow_d, axis=1)) < 0).all()
    assert found.sharpness[0] == pytest.approx(0.1) == found.flow_sharpness[0]
    assert len(found.d) == len(found.flow_d) == len(found.small_d) == len(found.sharpness)
