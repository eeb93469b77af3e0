"""M, M_A and M_W against explicit Jacobians, closed forms, the Gauss–Newton matrix and the Hessian."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.flop_counter import FlopCounterMode

from eos_utils.curvature import GaussNewton, Hessian, dense
from eos_utils.gram import Gram, GramOperator, Matrix, output_layer
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

FACTORS = {"half_mse": 1.0, "mse": 2.0}


def problem(activation="tanh", depth=2, bias=True, outputs=1, n=7, loss="mse", chunk=None):
    """A float64 objective of a small fully connected network, and a point that is no initialisation."""
    model = fully_connected(4, 3, depth, outputs, activation, bias, "fan_in", seed=1)
    return around(model, loss, n, outputs, chunk)


def around(model, loss="mse", n=7, outputs=1, chunk=None, inputs=(4,)):
    random = torch.Generator().manual_seed(n + 10 * outputs)
    x = torch.randn(n, *inputs, generator=random, dtype=torch.float64)
    y = torch.randn(n, outputs, generator=random, dtype=torch.float64)
    objective = Objective(model, loss, x, y, chunk=chunk)
    return objective, 0.6 * torch.randn(objective.P, generator=random, dtype=torch.float64)


def jacobian(objective, theta):
    """(n c, P), rows in the order of outputs.reshape(-1), through the module itself."""

    def outputs(t):
        pieces = t.split([shape.numel() for shape in objective.shapes.values()])
        named = {k: p.view(s) for (k, s), p in zip(objective.shapes.items(), pieces, strict=True)}
        return functional_call(objective.model, named, (objective.x,)).reshape(-1)

    return jacrev(outputs)(theta)


def reference(objective, theta, last):
    """M, M_A and M_W from the explicit Jacobian; the last ``last`` parameters are A."""
    j = jacobian(objective, theta)
    scale, split = FACTORS[objective.loss.name] / objective.n, objective.P - last
    return [scale * part @ part.T for part in (j, j[:, split:], j[:, :split])]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * max(1.0, float(b.abs().max())))


def matrix(operator):
    """The operator's matrix, in blocks of three rows."""
    eye = torch.eye(operator.shape[0], dtype=operator.dtype)
    return torch.cat([operator.apply(rows) for rows in eye.split(3)])


NETS = list(itertools.product(("relu", "tanh", "elu", "linear"), (1, 2, 3), (True, False), (1, 3)))


@pytest.mark.parametrize("activation, depth, bias, outputs", NETS)
def test_layer_factors_give_the_gram_matrix_of_the_explicit_jacobian(activation, depth, bias, outputs):
    loss = "mse" if depth != 2 else "half_mse"
    objective, theta = problem(activation, depth, bias, outputs, loss=loss)
    last = outputs * (3 + bias)  # the last layer's weights, and its biases
    gram = Gram(objective)
    gram.at(theta.flip(0))  # what is kept from one point to the next does not depend on the point
    for found, wanted in zip(gram.at(theta), reference(objective, theta, last), strict=True):
        close(found, wanted)
    factors = gram.factors(theta)
    close(gram.outputs(theta, factors), objective.outputs(theta))
    assert all(torch.equal(a, b) for a, b in zip(gram.at(theta, factors), gram.at(theta), strict=True))
    for part, wanted in zip(("all", "A", "W"), reference(objective, theta, last), strict=True):
        close(matrix(GramOperator(objective, theta, part)), wanted)


@pytest.mark.parametrize("loss, factor", FACTORS.items())
def test_two_layer_linear_network_in_closed_form(loss, factor):
    """f = aᵀWx: ∂f/∂a = Wx and ∂f/∂W = axᵀ, so M_A = (κ/n) X WᵀW Xᵀ and M_W = (κ/n) |a|² XXᵀ."""
    objective, theta = problem("linear", depth=1, bias=False, loss=loss)
    x, w, a = objective.x, theta[:12].view(3, 4), theta[12:]
    m, m_a, m_w = Gram(objective).at(theta)
    close(m_a, factor / 7 * x @ w.T @ w @ x.T)
    close(m_w, factor / 7 * a @ a * x @ x.T)
    close(m, m_a + m_w)


def test_linear_regression_has_no_other_layer_and_one_block_for_each_output():
    objective, theta = around(nn.Sequential(nn.Flatten(1), nn.Linear(4, 2)), outputs=2)
    block = 2 / 7 * (objective.x @ objective.x.T + 1)
    parts = Gram(objective).at(theta)
    close(parts.M, torch.kron(block, torch.eye(2, dtype=torch.float64)))  # example by example, not output by output
    assert torch.equal(parts.M, parts.M_A) and not parts.M_W.any()
    close(matrix(GramOperator(objective, theta, "A")), parts.M_A)
    assert not matrix(GramOperator(objective, theta, "W")).any()


def test_layer_factors_are_gradients_of_the_outputs():
    objective, theta = problem("elu", outputs=3)
    rows = jacobian(objective, theta).view(7, 3, -1)
    for layer, (alpha, beta) in zip(objective.layers, Gram(objective).factors(theta), strict=True):
        close(torch.einsum("iab,id->iabd", beta.expand(7, -1, -1), alpha).flatten(2), rows[:, :, layer.weight])
        close(beta.expand(7, -1, -1), rows[:, :, layer.bias])
    linear, theta = problem("linear", outputs=3)
    shapes = [tuple(beta.shape) for _, beta in Gram(linear).factors(theta)]
    assert shapes == [(1, 3, 3)] * 3  # a linear network has the same factors for all examples


@pytest.mark.parametrize("n", [7, 61])  # sizes at which a @ a.T has been seen not to be symmetric
@pytest.mark.parametrize("activation, outputs, dtype", [
    ("relu", 3, torch.float32), ("tanh", 1, torch.float32), ("linear", 1, torch.float64),
])  # fmt: skip
def test_parts_are_exactly_symmetric_add_up_and_are_positive_semidefinite(activation, outputs, dtype, n):
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 129, generator=random, dtype=dtype), torch.ones(n, outputs, dtype=dtype)
    objective = Objective(fully_connected(129, 100, 2, outputs, activation), "mse", x, y)
    m, m_a, m_w = Gram(objective).at(objective.initial())
    assert m.dtype == dtype and torch.equal(m, m_a + m_w)
    for part in (m, m_a, m_w):
        assert part.shape == (n * outputs, n * outputs) and torch.equal(part, part.T)
        values = torch.linalg.eigvalsh(part.double())
        assert values[0] > -4 * torch.finfo(dtype).eps * len(part) * values[-1] and values[-1] > 0


@pytest.mark.parametrize("activation", ["tanh", "linear"])
def test_another_point_costs_neither_the_inputs_gram_matrix_nor_a_jacobian(activation):
    n, d, width = 50, 400, 5
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    objective = Objective(fully_connected(d, width, 2, 1, activation), "mse", x, torch.ones(n, 1))
    gram = Gram(objective)
    with FlopCounterMode(display=False) as counter:
        gram.at(objective.initial())
    forward = 2 * n * d * width
    assert forward < counter.get_total_flops() < forward + 10 * n**2 * width < 2 * n**2 * d


@pytest.mark.parametrize("loss", FACTORS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_nonzero_eigenvalues_are_those_of_the_gauss_newton_matrix(loss, outputs):
    objective, theta = problem("tanh", outputs=outputs, loss=loss)
    of_g = torch.linalg.eigvalsh(dense(GaussNewton(objective, theta))).flip(0)
    of_m = torch.linalg.eigvalsh(Gram(objective).at(theta).M).flip(0)
    size = len(of_m)
    assert of_g[size - 1] > 1e-6 and objective.P > size  # all of M's eigenvalues are non-zero here, and fit
    close(of_m, of_g[:size])
    close(of_g[size:], torch.zeros_like(of_g[size:]))


def test_where_the_data_are_fitted_the_spectrum_is_the_hessians():
    objective, theta = problem("tanh", outputs=2)
    fitted = Objective(objective.model, "mse", objective.x, objective.outputs(theta))
    of_h = torch.linalg.eigvalsh(dense(Hessian(fitted, theta))).flip(0)
    of_m = torch.linalg.eigvalsh(Gram(fitted).at(theta).M).flip(0)
    close(of_h[: len(of_m)], of_m)
    unfitted = torch.linalg.eigvalsh(dense(Hessian(objective, theta)))
    assert float((unfitted.flip(0)[: len(of_m)] - of_m).abs().max()) > 0.01


def test_the_residual_moves_by_minus_m_along_the_gradient_flow():
    """SG, equation 1: dD/dt = -M D, here by a small step of gradient descent."""
    objective, theta = problem("tanh")
    residual = objective.outputs(theta) - objective.y
    h = 1e-6
    forward, back = (objective.outputs(theta - s * objective.gradient(theta)[1]) for s in (h, -h))
    velocity = (forward - back) / (2 * h)
    wanted = -Gram(objective).at(theta).M @ residual
    torch.testing.assert_close(velocity, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("part", ["all", "A", "W"])
def test_chunks_do_not_change_the_operator(part):
    whole, theta = problem("tanh", outputs=3)
    wanted = matrix(GramOperator(whole, theta, part))
    for chunk in (1, 3, 6):  # 7 examples: the last chunk is shorter
        seen = []
        chunked, _ = problem("tanh", outputs=3, chunk=chunk)
        operator = GramOperator(chunked, theta, part)
        chunked.model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(output)))
        close(matrix(operator), wanted)
        assert max(seen) == chunk
        close(Gram(chunked).at(theta)[("all", "A", "W").index(part)], wanted)


def small_convolutional(norm=True, head_bias=False):
    """Convolution, BatchNorm with the batch's statistics, a head of two outputs."""
    middle = nn.BatchNorm2d(2, track_running_stats=False) if norm else nn.GroupNorm(1, 2)
    return nn.Sequential(nn.Conv2d(1, 2, 2), middle, nn.Tanh(), nn.Flatten(1), nn.Linear(8, 2, bias=head_bias))


@pytest.mark.parametrize("norm, chunk, head_bias", [(True, None, False), (True, None, True), (False, 2, False)])
def test_operator_of_a_convolutional_network_against_its_jacobian(norm, chunk, head_bias):
    objective, theta = around(small_convolutional(norm, head_bias), "half_mse", 5, 2, chunk, inputs=(1, 3, 3))
    assert objective.layers is None
    for part, wanted in zip(("all", "A", "W"), reference(objective, theta, 16 + 2 * head_bias), strict=True):
        operator = GramOperator(objective, theta, part)
        found = matrix(operator)
        close(found, wanted)
        close(found, found.T)
        pairs = top_eigenpairs(operator, 3, tol=1e-10)
        assert pairs.converged
        close(pairs.values, torch.linalg.eigvalsh(wanted).flip(0)[:3])
    if norm:  # the examples are coupled: an example's output moves with the others of its batch
        alone = Objective(objective.model, "half_mse", objective.x[:4], objective.y[:4])
        cut = matrix(GramOperator(alone, theta)) * 4 / 5
        assert float((cut - reference(objective, theta, 16)[0][:8, :8]).norm()) > 0.01 * float(cut.norm())


def test_products_leave_theta_and_the_gradient_mode_alone():
    objective, theta = problem("relu")
    before = theta.clone()
    with torch.no_grad():
        once = matrix(GramOperator(objective, theta))
        operator = GramOperator(objective, theta.requires_grad_(True))
        for found in (matrix(operator), matrix(operator), Gram(objective).at(theta).M):
            close(found, once)
            assert not found.requires_grad
    assert not matrix(GramOperator(objective, theta)).requires_grad and not Gram(objective).at(theta).M.requires_grad
    assert torch.equal(theta.detach(), before) and theta.grad is None


def test_tracked_eigenvalues_of_the_dense_matrix_are_those_of_eigvalsh():
    objective, theta = problem("tanh", n=30)
    gram, tracker = Gram(objective), EigenTracker(2, tol=1e-9)
    random = torch.Generator().manual_seed(5)
    for _ in range(4):
        m = gram.at(theta).M
        pairs = tracker.update(Matrix(m))
        values, vectors = torch.linalg.eigh(m)
        assert pairs.converged
        torch.testing.assert_close(pairs.values, values.flip(0)[:2], rtol=1e-8, atol=0)
        assert abs(float(pairs.vectors[:, 0] @ vectors[:, -1])) > 1 - 1e-6
        theta = theta + 0.01 * torch.randn(objective.P, generator=random, dtype=torch.float64)
    rows = torch.randn(3, 30, generator=random, dtype=torch.float64)
    close(Matrix(m).apply(rows), (m @ rows.T).T)


def test_the_last_layer_is_found_in_any_module():
    objective, _ = problem(depth=2, outputs=3)
    assert output_layer(objective) == slice(objective.P - 12, objective.P)
    assert output_layer(objective).start == objective.layers[-1].weight.start
    bare, _ = around(nn.Linear(4, 1, bias=False))
    assert output_layer(bare) == slice(0, 4)
    ends_otherwise, theta = around(nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1), nn.PReLU()))
    for part in ("A", "W"):
        with pytest.raises(ValueError, match="the last parameters belong to PReLU '3', so there is no last layer A"):
            GramOperator(ends_otherwise, theta, part)
    close(matrix(GramOperator(ends_otherwise, theta)), reference(ends_otherwise, theta, 0)[0])


def test_what_has_no_gram_matrix_is_refused():
    entropy, theta = problem(loss="cross_entropy")
    for attempt in (lambda: Gram(entropy), lambda: GramOperator(entropy, theta)):
        with pytest.raises(ValueError, match="'cross_entropy' has no constant curvature .* half_mse or mse"):
            attempt()
    convolutional, _ = around(small_convolutional(), outputs=2, inputs=(1, 3, 3))
    with pytest.raises(ValueError, match="not fully connected: .* GramOperator takes any module"):
        Gram(convolutional)
    objective, theta = problem()
    for attempt in (Gram(objective).at, Gram(objective).factors, lambda t: GramOperator(objective, t)):
        for wrong in (theta[:-1], theta[None], torch.cat([theta, theta])):
            with pytest.raises(ValueError, match=f"theta has shape .* P={objective.P}"):
                attempt(wrong)
    with pytest.raises(ValueError, match="part='B' is unknown; choose one of all, A, W"):
        GramOperator(objective, theta, "B")
    for wrong in (torch.ones(7), torch.ones(2, 6), torch.ones(1, 14)):
        with pytest.raises(ValueError, match="rows have shape .* nc=7"):
            GramOperator(objective, theta).apply(wrong.double())
    for wrong in (torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="must be square"):
            Matrix(wrong)


def test_benchmark_compares_equal_things_and_writes_what_it_measured(tmp_path, capsys):
    path = Path(__file__).resolve().parents[1] / "bench" / "gram.py"
    spec = importlib.util.spec_from_file_location("bench_gram", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    file = tmp_path / "gram.json"
    bench.main(["--n", "20", "--width", "3", "--repeats", "1", "--only", "tanh 3 hidden", "--json", str(file)])
    (row,) = json.loads(file.read_text(encoding="utf-8"))["nets"]
    assert row["net"] == "tanh 3 hidden" and row["P"] == 3 * 3072 + 9 + 9 + 3
    assert row["worst_relative_error"] < 1e-4  # of M, M_A, M_W and both eigenvalues, in float32
    assert row["next_ratio"] == row["jacobian_s"] / row["next_s"] > 0
    assert "tanh 3 hidden" in capsys.readouterr().out
