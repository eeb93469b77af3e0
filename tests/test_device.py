"""Ready for a GPU: what would make the host wait for the device, or move data, is not done inside of products."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eos_utils.basis import Basis
from eos_utils.curvature import GaussNewton, Hessian
from eos_utils.gram import GramOperator
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

# Operations whose result the host must read before it can go on.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        indices = args[1] if name == "index" else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        self.count += name in WAITS or masked
        return func(*args, **(kwargs or {}))


def problem(device="cpu", activation="tanh", n=300, inputs=600, width=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, generator=generator) * 5 / (1 + torch.arange(inputs))
    y = torch.eye(3)[torch.randint(3, (n,), generator=generator)]
    network = fully_connected(inputs, width, outputs=3, activation=activation)
    return Objective(network, "half_mse", x.to(device), y.to(device))


def waits(function):
    with Waits() as mode:
        function()
    return mode.count


def test_the_counter_sees_waits():
    assert waits(lambda: float(torch.ones(3).sum())) == 1
    assert waits(lambda: torch.ones(3)[torch.ones(3) > 0]) >= 1
    assert waits(lambda: torch.ones(3) @ torch.ones(3)) == 0


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "linear"])
def test_products_never_wait(activation):
    objective = problem(activation=activation)
    hessian = Hessian(objective, objective.initial())
    coarse = hessian.coarse()
    rows = torch.randn(3, objective.P)
    assert waits(lambda: hessian.apply(rows)) == 0
    assert waits(lambda: coarse.apply(coarse.restrict(rows))) == 0
    assert waits(lambda: coarse.images(coarse.restrict(rows))) == 0
    assert waits(lambda: GaussNewton(objective, objective.initial()).apply(rows)) == 0
    assert waits(lambda: Hessian(objective, objective.initial())) == 0


def test_module_and_gram_products_never_wait():
    objective = problem()
    objective.layers = None
    rows = torch.randn(2, objective.P)
    assert waits(lambda: Hessian(objective, objective.initial()).apply(rows)) == 0
    objective = problem()
    operator = GramOperator(Objective(objective.model, "mse", objective.x, objective.y), objective.initial())
    assert waits(lambda: operator.apply(torch.randn(2, 900))) == 0


def test_lanczos_steps_wait_once_a_burst_not_once_a_step():
    objective = problem()

    def burst(steps):
        basis = Basis(Hessian(objective, objective.initial()))
        basis.extend(torch.randn(1, objective.P))
        return waits(lambda: basis.lanczos(steps))

    assert burst(4) == burst(24) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_nothing_waits_and_the_eigenvalues_are_those_of_the_cpu():
    here, there = problem(), problem("cuda")
    theta = here.initial()
    hessian = Hessian(there, theta.cuda())
    rows = torch.randn(6, there.P, device="cuda")
    hessian.apply(rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        hessian.apply(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = top_eigenpairs(Hessian(here, theta), 4, tol=1e-5)
    found = top_eigenpairs(hessian, 4, tol=1e-5)
    assert found.vectors.is_cuda and torch.allclose(found.values, wanted.values, rtol=1e-4)
    tracker = EigenTracker(4)
    for _ in range(3):
        assert tracker.update(Hessian(there, theta.cuda())).converged
