"""The identities behind Figure 3: each check accepts what is true, and rejects its control."""

import numpy as np
import pytest
import torch

from eos_utils import sg_identities as sg
from eos_utils.gram import output_layer

FEW = 24


def test_the_jacobian_is_that_of_finite_differences():
    for objective, theta in sg.problems(6, (*sg.FULLY_CONNECTED[:3], *sg.OTHERS)):
        direction = torch.from_numpy(np.random.default_rng(100).normal(size=len(theta)))
        ahead, behind = (objective.outputs(theta + s * 1e-6 * direction)[:, 0] for s in (1, -1))
        assert torch.allclose(sg.jacobian(objective, theta) @ direction, (ahead - behind) / 2e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", [*sg.FULLY_CONNECTED, *sg.OTHERS])
def test_the_features_times_the_last_layer_are_the_outputs(kind):
    for objective, theta in sg.problems(4, (kind,)):
        a = output_layer(objective)
        back = torch.einsum("m,imp->ip", theta[a], sg.feature_jacobian(objective, theta))
        assert torch.allclose(back, sg.jacobian(objective, theta)[:, : a.start], atol=1e-12)


def test_networks_are_what_they_are_called():
    assert (
        sg.network("convolutional", 100)[-1].bias is None
        and sg.network("batch norm", 100, bias=True)[-1].bias is not None
    )
    assert len({len(list(sg.network("tanh", seed))) for seed in range(100, 120)}) == 3  # one to three hidden layers
    with pytest.raises(ValueError, match="kind='transformer'"):
        sg.network("transformer", 100)


def test_the_gram_matrix_is_the_sum_of_its_parts(monkeypatch):
    assert sg.gram_sum(FEW).value < 1e-12
    at = sg.Gram.at

    def without_the_factor(self, theta):
        parts = at(self, theta)
        return parts._replace(M_A=parts.M_A * self.objective.n / 2)

    monkeypatch.setattr(sg.Gram, "at", without_the_factor)
    assert sg.gram_sum(FEW).value > 0.01


def test_entries_need_a_linear_last_layer():
    assert sg.gram_entries(trials=FEW).value < 1e-12
    assert sg.gram_entries(squashed=True, trials=FEW).value > 0.01


def test_the_flow_of_the_norm_needs_a_last_layer_without_bias():
    assert sg.norm_flow(trials=FEW).value < 1e-12
    assert sg.norm_flow(bias=True, trials=FEW).value > 0.1
    assert sg.norm_flow(bias=True, version="corrected", trials=FEW).value < 1e-12
    with pytest.raises(ValueError, match="version='other'"):
        sg.norm_flow(version="other")


@pytest.mark.parametrize("kind", [*sg.FULLY_CONNECTED, *sg.OTHERS])
def test_the_norm_moves_as_equation_two_says_in_a_small_step(kind):
    for objective, theta in sg.problems(3, (kind,)):
        a, eta = output_layer(objective), 1e-7
        _, gradient, f = objective.gradient(theta)
        moved = theta - eta * gradient
        rate = float((moved[a] @ moved[a] - theta[a] @ theta[a]) / eta)
        printed = float(-4 / objective.n * ((f - objective.y) * f).sum())
        assert rate == pytest.approx(printed, rel=1e-4, abs=1e-5)


def test_equation_four_needs_a_unit_vector():
    assert sg.residual_split(trials=FEW).value < 1e-12
    assert sg.residual_split(length=1.05, trials=FEW).value > 0.01


def test_bases_are_orthonormal_and_turn_by_their_angle():
    generator = np.random.default_rng(100)
    for turning in (0.0, 0.02):
        found = list(sg.bases(generator, 6, 10, turning))
        assert all(np.allclose(v.T @ v, np.eye(6)) for v in found)
        angles = [np.arccos(min(1.0, abs(a[:, 0] @ b[:, 0]))) for a, b in zip(found[:-1], found[1:], strict=True)]
        assert np.mean(angles) == pytest.approx(turning, abs=0.02) and (np.mean(angles) > 0.005) == (turning > 0)


def test_the_two_recursions_agree_for_fixed_eigenvectors_only():
    fixed, slow, fast = (sg.recursions_apart(turning=x, trials=40).value for x in (0.0, 1e-4, 1e-2))
    assert fixed < 1e-10 and 1e-3 < slow < fast
    assert sg.recursions_apart(turning=1e-5, trials=40).value == pytest.approx(slow / 10, rel=0.2)  # first order


def test_the_product_with_r_prime_is_zero_at_the_start_and_negative_later():
    assert sg.r_prime_product(since=0, trials=60).value == pytest.approx(0, abs=1e-12)
    assert sg.r_prime_product(since=1, trials=60).value < -1e-3


def test_the_product_can_be_positive_without_its_hypotheses():
    assert sg.r_prime_product(since=1, fitted=0.5, trials=60).value > 0.01  # F(0) is not 0
    assert sg.r_prime_product(since=1, largest=1.9, trials=60).value > 0.01  # eigenvalues above 1/η


def test_the_closed_form_of_the_product():
    generator = np.random.default_rng(100)
    y, r, p = generator.normal(size=5), None, np.ones(5)
    r = -y
    for _ in range(10):
        factor = 1 - generator.uniform(0.1, 0.9, size=5)
        r, p = r * factor, p * factor
        assert r @ (r + y) == pytest.approx(-(p * (1 - p) * y**2).sum()) and r @ (r + y) < 0


def test_checks_say_how_much_and_on_what():
    for name, check in sg.CHECKS.items():
        found = check(trials=6)
        assert found.trials == 6 and found.on and np.isfinite(found.value), name
        assert check.__doc__ and not check.__doc__.startswith("\n")
