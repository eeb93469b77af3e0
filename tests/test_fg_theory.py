"""The shared model of FG: against automatic differentiation, and its closed forms against simulation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_utils import fg_theory as fg

LABELS = (1.0, 1.0, -2 / 3, -2 / 3)


def random_network(seed, m=5, n=4, d=6):
    """Weights of order 1 on rotated orthonormal inputs in more dimensions than there are inputs."""
    generator = np.random.default_rng(seed)
    p = fg.Problem(fg.orthonormal(n, d, seed=seed), generator.normal(size=n), 0.3)
    return fg.Network(generator.normal(size=(m, d)), generator.normal(size=m)), p


def loss_of(flat, p, m):
    """L in torch, of the parameters in the module's order (w_1; a_1; w_2; a_2; ...)."""
    rows = flat.reshape(m, -1)
    h = torch.relu(torch.tensor(p.x) @ rows[:, :-1].T) @ rows[:, -1]
    return ((h - torch.tensor(p.y)) ** 2).sum() / (2 * p.n)


def flat_of(net):
    return np.column_stack(net).ravel()


def aligned(p, share, weights, sign):
    """Balanced aligned neurons w_j = a_j d̂ that fit this share of the labels of one sign.

    To be used on unit vectors, where they are inactive on the other labels exactly.
    """
    a = np.sqrt(share * p.n * p.size(sign) / (weights**2).sum()) * weights
    return fg.Network(sign * np.outer(a, p.d(sign) / p.size(sign)), sign * a)


@given(st.integers(0, 10**6))
def test_step_loss_and_outputs_are_those_of_torch(seed):
    net, p = random_network(seed)
    flat = torch.tensor(flat_of(net), requires_grad=True)
    value = loss_of(flat, p, len(net.a))
    (gradient,) = torch.autograd.grad(value, flat)
    assert fg.loss(net, p) == pytest.approx(value.item(), rel=1e-12)
    np.testing.assert_allclose(flat_of(fg.step(net, p)), (flat - p.eta * gradient).detach().numpy(), atol=1e-12)


@given(st.integers(0, 10**6))
def test_hessian_is_that_of_torch(seed):
    net, p = random_network(seed, m=3)
    flat = torch.tensor(flat_of(net))
    dense = torch.autograd.functional.hessian(lambda t: loss_of(t, p, 3), flat).numpy()
    full, gauss_newton = fg.hessian(net, p)
    np.testing.assert_allclose(full, dense, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(
        lambda t: torch.relu(torch.tensor(p.x) @ t.reshape(3, -1)[:, :-1].T) @ t.reshape(3, -1)[:, -1], flat
    ).numpy()
    np.testing.assert_allclose(gauss_newton, jacobian.T @ jacobian / p.n, atol=1e-12)


def test_a_neuron_at_zero_is_inactive():
    p = fg.problem([1.0], 0.5)
    net = fg.Network(np.array([[0.0]]), np.array([1.0]))
    assert not fg.error_vectors(net, p).any()
    new = fg.step(net, p)
    assert new.w.item() == 0 and new.a.item() == 1


@pytest.mark.parametrize(("n", "d", "seed"), [(3, None, None), (4, 6, None), (4, 6, 7), (5, 5, 8)])
def test_inputs_are_orthonormal(n, d, seed):
    x = fg.orthonormal(n, d, seed)
    assert x.shape == (n, d or n)
    np.testing.assert_allclose(x @ x.T, np.eye(n), atol=1e-14)


def test_impossible_problems_are_refused():
    with pytest.raises(ValueError, match="at least as many"):
        fg.orthonormal(4, 3)
    with pytest.raises(ValueError, match="positive"):
        fg.problem([1.0], 0.0)
    with pytest.raises(ValueError, match="non-zero label"):
        fg.problem([1.0, 0.0], 0.1)


def test_d_plus_and_minus_by_hand():
    p = fg.problem([3.0, 4.0, -1.0], 0.5)
    np.testing.assert_allclose(p.d(1), [1, 4 / 3, 0])
    np.testing.assert_allclose(p.d(-1), [0, 0, -1 / 3])
    assert p.size(1) == pytest.approx(5 / 3) and p.q(-1) == pytest.approx(1 / 6)


def test_initialisation_is_on_spheres_and_reproducible():
    net = fg.initial(40, 3, 1e-3, 100)
    np.testing.assert_allclose(np.linalg.norm(net.w, axis=1), 1e-3, rtol=1e-14)
    assert set(np.abs(net.a)) == {1e-3} and {-1.0, 1.0} == set(np.sign(net.a))
    np.testing.assert_array_equal(net.w, fg.initial(40, 3, 1e-3, 100).w)


def test_aligned_set_and_direction():
    p = fg.problem([1.0, 2.0, -1.0], 0.1)
    w = np.array([[1, 1, -1], [1, -1, 1], [1, 1, 1], [-1, 1, 1], [1, 1, 0]], dtype=float)
    net = fg.Network(w, np.array([1.0, 1.0, -1.0, -1.0, -1.0]))
    assert list(fg.aligned_set(net, p, 1)) == [0]
    assert list(fg.aligned_set(net, p, -1)) == [2, 3]  # the last is at 0 on the negative label
    v = fg.direction(p, np.array([0]), 5, 1)
    np.testing.assert_allclose(v[:4], [*p.d(1), p.size(1)])
    assert not v[4:].any()
    assert fg.rayleigh(np.diag(np.arange(20.0)), np.eye(20)[7]) == 7


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("q", [0.1, 0.6, 1.1, 1.2])
def test_sigma_map_is_gradient_descent_of_aligned_neurons(sign, q):
    unit = fg.problem(LABELS, 1.0).size(sign)
    p = fg.problem(LABELS, q / unit)
    net = aligned(p, 0.01, np.array([1.0, 2.0, 0.5]), sign)
    members = np.arange(3)
    path = [fg.fitted_share(n, p, members, sign) for n in fg.descend(net, p, 40)]
    np.testing.assert_allclose(path, fg.share_path(0.01, p.q(sign), 40), rtol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@given(st.floats(0.01, 1.3), st.lists(st.floats(0.2, 2), min_size=1, max_size=4))
def test_quotients_are_rayleigh_quotients_of_the_hessian(sign, share, weights):
    p = fg.problem(LABELS, 0.1)
    net = aligned(p, share, np.array(weights), sign)
    members = np.arange(len(weights))
    v = fg.direction(p, members, len(weights), sign)
    rho = fg.evenness(net, members)
    full, gauss_newton = fg.hessian(net, p)
    assert fg.fitted_share(net, p, members, sign) == pytest.approx(share)
    assert fg.rayleigh(full, v) == pytest.approx(fg.quotient(p, sign, share, rho), abs=1e-12)
    assert fg.rayleigh(gauss_newton, v) == pytest.approx(fg.quotient_gauss_newton(p, sign, share, rho), abs=1e-12)


def test_sharpness_of_the_aligned_minimum_is_twice_the_norm_of_d():
    p = fg.problem(LABELS, 0.1)
    plus, minus = (aligned(p, 1.0, np.array([1.0, 0.4]), sign) for sign in (1, -1))
    net = fg.Network(np.vstack([plus.w, minus.w]), np.concatenate([plus.a, minus.a]))
    assert fg.loss(net, p) < 1e-28
    eigenvalues = np.sort(np.linalg.eigvalsh(fg.hessian(net, p)[0]))[::-1]
    expected = [2 * p.size(1), 2 * p.size(-1), p.size(1), p.size(-1)]
    np.testing.assert_allclose(eigenvalues[:4], sorted(expected, reverse=True), atol=1e-12)
    np.testing.assert_allclose(eigenvalues[4:], 0, atol=1e-12)


def test_evenness_is_one_for_equal_weights_only():
    net = fg.Network(np.ones((3, 2)), np.array([2.0, -2.0, 1.0]))
    assert fg.evenness(net, np.array([0, 1])) == 1
    assert fg.evenness(net, np.array([0, 2])) == pytest.approx(9 / 10)


def crossing(path, p, members, sign):
    """When half of the labels are fitted, interpolated between steps."""
    shares = np.array([fg.fitted_share(net, p, members, sign) for net in path])
    above = int(np.argmax(shares >= 0.5))
    return above - (shares[above] - 0.5) / (shares[above] - shares[above - 1])


@pytest.mark.parametrize("seed", [100, 101, 102])
def test_midpoint_and_limiting_evenness_are_those_of_a_simulation(seed):
    # Labels of one sign: those of the other would first turn the neurons that are active on them.
    p = fg.problem((1.0, 1.0), 0.05, seed=seed)
    start = fg.initial(80, 2, 1e-8, seed)
    path, members = fg.descend(start, p, 900), fg.aligned_set(start, p, 1)
    assert fg.midpoint(start, p, members, 1) == pytest.approx(crossing(path, p, members, 1), abs=1)
    rho = fg.limiting_evenness(start, p, members, 1)
    assert fg.evenness(start, members) == pytest.approx(1)
    assert fg.evenness(path[-1], members) == pytest.approx(rho, abs=0.1 * (1 - rho))


@pytest.mark.parametrize("seed", [100, 103])
def test_midpoint_is_near_with_labels_of_both_signs(seed):
    p = fg.problem(LABELS, 0.05, seed=seed)
    start = fg.initial(40, 4, 1e-6, seed)
    path = fg.descend(start, p, 1300)
    for sign in (1, -1):
        members = fg.aligned_set(start, p, sign)
        assert fg.midpoint(start, p, members, sign) == pytest.approx(crossing(path, p, members, sign), rel=0.02)


@pytest.mark.parametrize("q", [1.05, 1.1, 1.2, 1.23])
def test_two_cycle_is_where_the_map_ends(q):
    low, high = fg.two_cycle(q)
    assert low < 1 < high
    path = fg.share_path(0.3, q, 4000)
    assert sorted(path[-2:]) == pytest.approx([low, high], abs=1e-5)
    assert low * (1 + q * (1 - low)) ** 2 == pytest.approx(high)


def test_two_cycle_is_stable_up_to_root_five_minus_one():
    edge = np.sqrt(5) - 1
    for q, inside in ((edge - 1e-3, True), (edge + 1e-3, False)):
        slopes = [(1 + q * (1 - s)) * (1 + q - 3 * q * s) for s in fg.two_cycle(q)]
        assert (abs(np.prod(slopes)) < 1) == inside
    with pytest.raises(ValueError, match="only above 1"):
        fg.two_cycle(1.0)
    assert fg.share_path(0.3, 0.99, 4000)[-1] == pytest.approx(1, abs=1e-6)
