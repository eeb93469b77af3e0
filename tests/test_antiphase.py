"""The explanation of the antiphase: its formulas against autograd and closed forms, and what the interventions show."""

import numpy as np
import pytest
import torch

from eos_utils import antiphase as anti
from eos_utils.data import digits
from eos_utils.gram import Gram, output_layer
from eos_utils.models import fully_connected
from eos_utils.objective import Objective


def small(activation, depth=2, n=12, width=5, seed=3, bias=False):
    data = digits(n, "vehicles")
    x, y = data.x.double(), data.y.double()
    return Objective(fully_connected(x.shape[1], width, depth, 1, activation, bias, "fan_in", seed), "mse", x, y)


def along(objective, v):
    return lambda t: v @ objective._call(t, objective.x)[:, 0]


@pytest.mark.parametrize("activation", ["linear", "tanh", "elu"])
def test_pulled_back_weights_are_the_gradient_of_the_outputs_along_them(activation):
    o = small(activation)
    v = torch.randn(o.n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = anti.pull(Gram(o), o.initial(), v)
    assert torch.allclose(g, torch.func.grad(along(o, v))(o.initial()), atol=1e-12)


def test_biases_are_refused():
    o = small("tanh", bias=True)
    with pytest.raises(ValueError, match="without biases"):
        anti.pull(Gram(o), o.initial(), torch.ones(o.n, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["linear", "tanh", "elu", "relu"])
def test_second_derivative_along_a_line_and_its_part_from_products(activation):
    o = small(activation)
    theta = o.initial()
    u = torch.randn(o.P, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 10
    whole, straight = anti.second(o, theta, u)
    for i in (0, 7):
        v = torch.eye(o.n, dtype=torch.float64)[i]
        exact = u @ torch.func.jvp(torch.func.grad(along(o, v)), (theta,), (u,))[1]
        assert whole[i] == pytest.approx(float(exact), rel=1e-9)
    same = torch.allclose(whole, straight)
    assert same if activation in ("linear", "relu") else not same


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_slopes_of_sharpness_and_norm_along_g(activation):
    """The formulas of the module's head, against differences of the exact Λ and ‖A‖²."""
    o = small(activation)
    gram, theta, a = Gram(o), 1.5 * o.initial(), output_layer(o)
    r = anti.respond(gram, theta)
    g, h = anti.pull(gram, theta, r.v), 1e-5

    def ends(f):
        return (f(theta + h * g) - f(theta - h * g)) / (2 * h)

    slope = ends(lambda t: float(torch.linalg.eigvalsh(gram.at(t).M)[-1]))
    assert ends(lambda t: float(t[a].square().sum())) == pytest.approx(2 * r.output, rel=1e-6)
    assert slope == pytest.approx(4 / o.n * r.chi * float(g @ g) ** 2 / r.output, rel=1e-5)
    assert float(g @ g) == pytest.approx(o.n * r.sharpness / 2, rel=1e-12)
    rest = anti.pull(gram, theta, r.d - r.residual * r.v)
    assert abs(float(rest @ g)) < 1e-10 * float(rest.norm() * g.norm())  # oscillation and drift are orthogonal
    assert float(r.v @ anti.second(o, theta, g)[1]) == pytest.approx(r.product * float(g @ g) ** 2 / r.output)


@pytest.mark.parametrize(("a", "w"), [(0.5, 0.8), (3.0, 0.8), (1.0, 2.5), (-2.0, 0.3)])
def test_one_unit(a, w):
    x = torch.tensor([[1.3]], dtype=torch.float64)
    model = fully_connected(1, 1, 1, 1, "tanh", False, "fan_in", 0)
    o = Objective(model, "mse", x, torch.ones(1, 1, dtype=torch.float64))
    r = anti.respond(Gram(o), torch.tensor([w, a], dtype=torch.float64))
    assert r.chi == pytest.approx(anti.one_unit(a, w, 1.3), rel=1e-10)
    assert (r.chi < 0) == ((a * 1.3) ** 2 / np.cosh(w * 1.3) ** 2 > 1)


def test_a_product_of_two_equal_weights_has_a_half():
    o = Objective(
        fully_connected(1, 1, 1, 1, "linear", False, "fan_in", 0), "mse", *torch.ones(2, 1, 1, dtype=torch.float64)
    )
    assert anti.respond(Gram(o), torch.full((2,), 0.7, dtype=torch.float64)).chi == pytest.approx(0.5)


@pytest.fixture(scope="module")
def tanh():
    return anti.course("tanh")


@pytest.fixture(scope="module")
def linear():
    return anti.course("linear", steps=80)


def test_the_course_is_gradient_descent(linear):
    assert np.allclose(np.diff(linear.norm), linear.changes["all"][:, 1], atol=1e-12)
    assert np.allclose(np.diff(linear.sharpness), linear.changes["all"][:, 0], atol=1e-12)
    assert linear.sharpness[0] == pytest.approx(0.7)


def test_first_order_formulas_along_a_course(tanh):
    small_steps = np.abs(tanh.residual[:-1] / tanh.output[:-1]) < 0.02
    said, found = anti.first_order(tanh)[small_steps], tanh.changes["first"][small_steps]
    assert small_steps.sum() > 5 and np.allclose(said[:, 1], found[:, 1], rtol=0.05)
    assert np.median(np.abs(said[:, 0] / found[:, 0] - 1)) < 0.1


def test_hovering_is_in_phase_before_chi_changes_its_sign_and_in_antiphase_after(tanh):
    at = anti.turning_point(tanh)
    assert at is not None and (tanh.chi[20 : at - 40] > 0).mean() > 0.9
    before, after = slice(20, at - 40), slice(at + 40, None)
    assert anti.opposite(tanh, "all", before) < 0.1 < 0.9 < anti.opposite(tanh, "all", after)
    assert anti.opposite(tanh, "rest", after) < 0.1  # without the oscillation the two agree
    assert anti.opposite(tanh, "first", after) > 0.9  # and with nothing else they do not
    assert anti.foretold(tanh, after) > 0.9


def test_the_linear_network_oscillates_in_phase(linear):
    assert (linear.chi > 0).all() and anti.opposite(linear, "all") < 0.15 and anti.turning_point(linear) is None
    assert np.allclose(linear.chi, linear.product)


def test_what_is_taken_out_is_gone_from_then_on():
    fork = anti.course("linear", steps=30, without=20)
    assert fork.changes == {} and np.allclose(fork.norm[:21], anti.course("linear", steps=30).norm[:21])
    assert not np.allclose(fork.norm[22:], anti.course("linear", steps=30).norm[22:])
