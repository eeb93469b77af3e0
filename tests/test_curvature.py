"""Losses, gradients and curvature products against dense float64 autograd and closed forms."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional

from eos_utils import objective as objective_module
from eos_utils.curvature import GaussNewton, Hessian, dense
from eos_utils.losses import LOSSES, accuracy, get_loss
from eos_utils.models import ACTIVATIONS, fully_connected, layers_of, resnet18
from eos_utils.objective import Objective

ACTIVATION_NAMES = ("relu", "tanh", "elu", "linear")
LOSS_NAMES = ("half_mse", "mse", "cross_entropy")


def reference_loss(name, f, y):
    """Mean over examples, written with torch's own losses."""
    if name == "half_mse":
        return 0.5 * functional.mse_loss(f, y, reduction="sum") / len(f)
    if name == "mse":
        return functional.mse_loss(f, y, reduction="sum") / len(f)
    if f.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(f, (y + 1) / 2)
    return functional.cross_entropy(f, y)


def reference_outputs(model, x):
    """θ ↦ f(θ), through the module itself."""
    shapes = [(name, p.shape) for name, p in model.named_parameters()]

    def outputs(theta):
        pieces = theta.split([shape.numel() for _, shape in shapes])
        return functional_call(model, {n: p.view(s) for (n, s), p in zip(shapes, pieces, strict=True)}, (x,))

    return outputs


def problem(activation="relu", loss="half_mse", outputs=3, depth=1, bias=True, n=11, inputs=4, width=3, chunk=None):
    """An objective in float64, a point that is no initialisation, and θ ↦ outputs."""
    random = torch.Generator().manual_seed(depth + 10 * outputs)
    x = torch.randn(n, inputs, generator=random, dtype=torch.float64)
    classes = torch.randint(max(outputs, 2), (n,), generator=random)
    y = functional.one_hot(classes, outputs).double() if outputs > 1 else 2.0 * classes[:, None].double() - 1
    model = fully_connected(inputs, width, depth, outputs, activation, bias, "fan_in", seed=1).double()
    objective = Objective(model, loss, x, y, chunk=chunk)
    theta = 0.6 * torch.randn(objective.P, generator=random, dtype=torch.float64)
    return objective, theta, reference_outputs(model, x)


def close(a, b, scale=1e-11):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=scale * max(1.0, float(b.abs().max())))


NETS = list(itertools.product(ACTIVATION_NAMES, LOSS_NAMES, (1, 3), ((1, True), (2, False), (3, True))))


@pytest.mark.parametrize("activation, loss, outputs, shape", NETS)
def test_value_gradient_hessian_and_gauss_newton_against_autograd(activation, loss, outputs, shape):
    depth, bias = shape
    objective, theta, f = problem(activation, loss, outputs, depth, bias)

    def whole(t):
        return reference_loss(loss, f(t), objective.y)

    value, gradient, out = objective.gradient(theta)
    close(value, whole(theta))
    close(objective.value(theta), whole(theta))
    close(out, f(theta))
    close(objective.outputs(theta), f(theta))
    close(gradient, jacrev(whole)(theta))
    close(dense(Hessian(objective, theta)), hessian(whole)(theta))

    jacobian = jacrev(f)(theta)  # (n, c, P)
    curve = torch.stack(
        [
            hessian(lambda u, k=k: reference_loss(loss, u[None], objective.y[k : k + 1]))(out[k])
            for k in range(objective.n)
        ]
    )
    close(
        dense(GaussNewton(objective, theta)), torch.einsum("kap,kab,kbq->pq", jacobian, curve, jacobian) / objective.n
    )


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
@pytest.mark.parametrize("activation, loss", [("relu", "half_mse"), ("tanh", "cross_entropy"), ("elu", "mse")])
def test_structured_chunked_and_double_backpropagation_agree(operator, activation, loss):
    objective, theta, _ = problem(activation, loss, depth=2)
    assert objective.layers is not None
    structured = dense(operator(objective, theta))
    for chunk in (1, 4, 10):  # 11 examples: the last chunk is shorter
        chunked, _, _ = problem(activation, loss, depth=2, chunk=chunk)
        close(dense(operator(chunked, theta)), structured)
        for a, b in zip(chunked.gradient(theta), objective.gradient(theta), strict=True):
            close(a, b)
        close(chunked.value(theta), objective.value(theta))
        if chunk == 4:
            chunked.layers = None
            close(dense(operator(chunked, theta)), structured)
    objective.layers = None
    close(dense(operator(objective, theta)), structured)


def test_chunks_bound_the_memory_and_do_not_change_float32_beyond_rounding(monkeypatch):
    whole, theta, _ = problem(width=16, n=64)
    monkeypatch.setattr(objective_module, "FLOATS_PER_CHUNK", 1000)
    small = Objective(whole.model.float(), "half_mse", whole.x.float(), whole.y.float())
    assert 1 <= small.chunk <= 1000 // (16 + 3) < whole.n == whole.chunk
    seen = []
    whole.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    _, gradient, _ = small.gradient(theta.float())
    assert max(seen) == small.chunk and sum(seen) == 64
    _, exact, _ = Objective(whole.model.double(), "half_mse", whole.x, whole.y).gradient(theta)
    assert float((gradient - exact).norm() / exact.norm()) < 1e-6


def linear_regression(bias, c=2, n=9, d=4, loss="half_mse"):
    random = torch.Generator().manual_seed(3)
    x = torch.randn(n, d, generator=random, dtype=torch.float64)
    y = torch.randn(n, c, generator=random, dtype=torch.float64)
    objective = Objective(nn.Sequential(nn.Flatten(1), nn.Linear(d, c, bias=bias)), loss, x, y)
    return objective, torch.randn(objective.P, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("loss, factor", [("half_mse", 1), ("mse", 2)])
def test_hessian_of_linear_regression_is_the_kronecker_product_of_the_gram_matrix(loss, factor):
    objective, theta = linear_regression(bias=False, loss=loss)
    gram = factor * objective.x.T @ objective.x / objective.n
    wanted = torch.kron(torch.eye(2, dtype=torch.float64), gram)
    close(dense(Hessian(objective, theta)), wanted)
    close(dense(GaussNewton(objective, theta)), wanted)  # a linear model has no curvature of its own


def test_hessian_of_linear_regression_with_bias():
    objective, theta = linear_regression(bias=True)
    wide = torch.cat([objective.x, torch.ones(objective.n, 1, dtype=torch.float64)], dim=1)
    gram = wide.T @ wide / objective.n
    found = dense(Hessian(objective, theta))  # parameters: weights (2 x 4), then biases (2)
    for output in range(2):
        index = torch.tensor([*range(4 * output, 4 * output + 4), 8 + output])
        close(found[index][:, index], gram)
    assert float(found[:4, 4:8].abs().max()) == 0 == float(found[8, 9])


def test_products_are_linear_counted_and_shaped():
    objective, theta, _ = problem("tanh")
    operator = Hessian(objective, theta)
    v = torch.randn(objective.P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = operator @ v
    assert block.shape == v.shape and operator.products == 3
    close(operator @ v[:, 1], block[:, 1])
    assert operator.products == 4
    close(operator @ (2 * v[:, 0] - v[:, 2]), 2 * block[:, 0] - block[:, 2])
    with pytest.raises((ValueError, RuntimeError)):
        operator @ torch.ones(objective.P - 1, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError)):
        operator @ torch.ones(objective.P + 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"theta has shape .* P={objective.P}"):
        Hessian(objective, theta[:-1])


def test_measuring_does_not_move_theta():
    for layers in (True, False):
        objective, theta, _ = problem("relu", depth=2)
        if not layers:
            objective.layers = None
        before = theta.clone()
        objective.gradient(theta)
        dense(Hessian(objective, theta))
        dense(GaussNewton(objective, theta))
        assert torch.equal(theta, before) and not theta.requires_grad


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("outputs", [1, 4])
def test_losses_and_their_derivatives(loss, outputs):
    random = torch.Generator().manual_seed(1)
    f = 3 * torch.randn(5, outputs, generator=random, dtype=torch.float64)
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    if outputs > 1:  # soft targets, no one-hot rows
        y = torch.rand(5, outputs, generator=random, dtype=torch.float64)
        y /= y.sum(dim=1, keepdim=True)
    found = get_loss(loss)
    close(found.value(f, y), 5 * reference_loss(loss, f, y))
    close(found.gradient(f, y), jacrev(lambda g: 5 * reference_loss(loss, g, y))(f))
    u = torch.randn(5, 2, outputs, generator=random, dtype=torch.float64)
    full = hessian(lambda g: 5 * reference_loss(loss, g, y))(f)  # (5, c, 5, c)
    close(found.hessian_product(f, y, u), torch.einsum("iajb,jkb->ika", full, u))


def test_accuracy_is_argmax_or_sign():
    y = torch.eye(3)[[0, 1, 2, 2]]
    f = torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 0, 0.1], [-3, -2, -1]])
    assert accuracy(f, y) == 0.75
    assert accuracy(torch.tensor([[0.2], [-3.0], [0.0], [1.0]]), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])) == 0.5


# ---- models ------------------------------------------------------------------------------------------


def test_fully_connected_layout_and_initialisations():
    model = fully_connected(50, 400, 2, 3, "tanh", seed=5)
    assert [type(m) for m in model] == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    bound = 50**-0.5
    first = model[1].weight.detach()
    assert float(first.abs().max()) <= bound and abs(float(first.std()) - bound / 3**0.5) < 0.02 * bound
    normal = fully_connected(50, 400, 1, 3, "relu", bias=True, init="fan_in", seed=5)
    assert abs(float(normal[1].weight.detach().std()) - bound) < 0.02 * bound
    assert float(normal[1].bias.detach().abs().max()) == 0 and float(first.abs().max()) < float(
        normal[1].weight.detach().abs().max()
    )
    assert fully_connected(3, 2, 1, 1, bias=False)[1].bias is None


def test_the_seed_alone_fixes_the_parameters():
    def theta(seed):
        return torch.cat([p.detach().flatten() for p in fully_connected(4, 3, seed=seed).parameters()])

    torch.manual_seed(1)
    one, state = theta(7), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(theta(7), one) and not torch.equal(theta(8), one)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_layers_are_known_only_where_the_structure_is_exactly_that():
    model = fully_connected(4, 3, 2, 2, "elu", bias=False)
    layers = layers_of(model)
    assert layers is not None and [c.activation for c in layers] == ["elu", "elu", "linear"]
    assert [(c.fan_in, c.fan_out, c.bias) for c in layers] == [(4, 3, None), (3, 3, None), (3, 2, None)]
    others = (
        nn.Linear(3, 2),
        nn.Sequential(nn.Linear(3, 2), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 3), nn.ELU(alpha=2.0), nn.Linear(3, 1)),
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.ReLU(), nn.Linear(3, 1)),
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1)),
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),
    )
    assert [layers_of(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("arguments, named", [
    ({"activation": "gelu"}, "activation='gelu' is unknown; choose one of relu, tanh, elu, linear"),
    ({"init": "xavier"}, "init='xavier' is unknown; choose one of pytorch, fan_in"),
    ({"width": 0}, "width=0"),
    ({"depth": 0}, "depth=0"),
    ({"outputs": -1}, "outputs=-1"),
])  # fmt: skip
def test_bad_models_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        fully_connected(4, **arguments)


def test_unknown_loss_is_refused():
    assert set(LOSSES) == set(LOSS_NAMES) and set(ACTIVATIONS) == set(ACTIVATION_NAMES)
    with pytest.raises(ValueError, match="loss='hinge' is unknown; choose one of half_mse, mse, cross_entropy"):
        get_loss("hinge")


# ---- objectives that cannot be -------------------------------------------------------------------------


def test_bad_data_are_refused():
    model = fully_connected(4, 3, outputs=2)
    x, y = torch.ones(5, 4), torch.ones(5, 2)
    with pytest.raises(ValueError, match="x has 5 examples and y has 4"):
        Objective(model, "mse", x, y[:4])
    with pytest.raises(ValueError, match="at least 1"):
        Objective(model, "mse", x[:0], y[:0])
    for a, b in ((x * torch.nan, y), (x, y / 0)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            Objective(model, "mse", a, b)
    for chunk in (0, -2):
        with pytest.raises(ValueError, match=f"chunk={chunk}: must be at least 1"):
            Objective(model, "mse", x, y, chunk=chunk)
    with pytest.raises(ValueError, match="loss='hinge'"):
        Objective(model, "hinge", x, y)


@pytest.mark.parametrize("outputs, shape", [(2, (5, 1)), (1, (5, 2)), (1, (5,))])
def test_targets_of_another_shape_do_not_broadcast(outputs, shape):
    with pytest.raises((ValueError, RuntimeError)):
        objective = Objective(fully_connected(4, 3, outputs=outputs), "mse", torch.ones(5, 4), torch.ones(shape))
        objective.gradient(objective.initial())


def test_batchnorm_refuses_chunks():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1))
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6, 1)
    with pytest.raises(ValueError, match="chunk=3: BatchNorm couples the examples, so the chunk must be n=6"):
        Objective(model, "mse", x, y, chunk=3)
    assert Objective(model, "mse", x, y, chunk=6).chunk == Objective(model, "mse", x, y).chunk == 6


def test_resnet18_is_a_pure_function_with_a_symmetric_hessian():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3072, generator=random, dtype=torch.float64)
    y = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
    objective = Objective(resnet18(outputs=1, seed=0), "mse", x, y)
    assert objective.model[1].fc.bias is None and objective.layers is None
    theta = objective.initial()
    gradient = objective.gradient(theta)[1]
    operator = Hessian(objective, theta)
    u, v = (torch.randn(objective.P, generator=random, dtype=torch.float64) for _ in range(2))
    hu, hv = operator.apply(torch.stack([u, v]))
    assert abs(float(hu @ v - u @ hv)) < 1e-10 * float(hu.norm() * v.norm())
    h = 1e-10
    difference = (objective.gradient(theta + h * v)[1] - objective.gradient(theta - h * v)[1]) / (2 * h)
    assert float((difference - hv).norm()) < 1e-3 * float(hv.norm()) != 0
    assert torch.equal(objective.gradient(theta)[1], gradient)  # no running statistics have moved
