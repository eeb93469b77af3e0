"""What an evaluation along a trajectory costs, in products, and how right it is: real images, at the edge."""

import functools

import pytest

from eos_utils import data
from eos_utils.curvature import Hessian
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

pytestmark = [pytest.mark.cifar, pytest.mark.skipif(not data.cifar10_available(5000), reason="CIFAR-10 is not here")]

ETA, START = 2 / 50, 600


def objective():
    d = data.load("cifar10", n=5000, preprocessing="standardize")
    return Objective(fully_connected(3072, 32, activation="tanh", seed=0), "half_mse", d.x, d.y)


@functools.cache
def at_the_edge():
    problem = objective()
    theta = problem.initial()
    for _ in range(START):
        theta = theta - ETA * problem.gradient(theta)[1]
    return problem, theta


def followed(k, evaluations):
    """Mean products and coarse products of consecutive evaluations, and a bound on the worst error relative to λ1."""
    problem, theta = at_the_edge()
    tracker, products, coarse, worst = EigenTracker(k), 0, 0, 0.0
    for i in range(evaluations):
        pairs = tracker.update(Hessian(problem, theta))
        assert pairs.converged
        products, coarse = products + pairs.products, coarse + pairs.coarse_products
        if i % 20 in (8, 19):  # between checks, and as far from the last as it gets
            fresh = top_eigenpairs(Hessian(problem, theta), k, tol=1e-4, seed=i)
            assert fresh.converged and fresh.checked
            for certain in (fresh.values, fresh.upper):  # the truth lies between these two
                worst = max(worst, float((pairs.values - certain).abs().max() / fresh.values[0]))
            assert (fresh.values <= pairs.upper + 1e-5 * fresh.values[0]).all()
        theta = theta - ETA * problem.gradient(theta)[1]
    return products / evaluations, coarse / evaluations, worst


def test_it_is_at_the_edge():
    problem, theta = at_the_edge()
    assert float(top_eigenpairs(Hessian(problem, theta), 1).values[0]) * ETA / 2 > 0.9


@pytest.mark.slow
def test_a_hundred_evaluations_in_a_row_take_few_products_and_are_right():
    products, coarse, worst = followed(6, 100)
    assert products <= 4 and coarse <= 45 and worst <= 1e-3
