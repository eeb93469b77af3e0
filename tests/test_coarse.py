"""Eigenvalues by way of the inputs' principal plane: the compression, the plane itself, and what it must not hide."""

import io
import math
import types

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eos_utils import linearize
from eos_utils import objective as objective_module
from eos_utils.curvature import Compression, GaussNewton, Hessian, dense
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import PLANE, Objective, Plane

INPUTS, RANK = 4 * PLANE, PLANE + 32


def orthonormal(rows, columns, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=random, dtype=torch.float64))[0]


def decaying(n, inputs=INPUTS, rank=RANK, power=1.0, seed=0):
    """Coordinates (n, rank) of standard deviations 4/(1+i)^power, and the orthonormal axes (inputs, rank) of them."""
    scales = 4 / (1 + torch.arange(rank, dtype=torch.float64)) ** power
    z = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scales
    return z, orthonormal(inputs, rank, seed + 1)


def targets(z, outputs=2):
    """One-hot, by a linear rule."""
    rule = torch.randn(z.shape[1], outputs, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return nn.functional.one_hot((z @ rule).argmax(dim=1), outputs).double()


def network(z, axes, activation="tanh", loss="half_mse", depth=1, bias=True, width=3, chunk=None, dtype=torch.float64):
    if depth == 0:
        model = nn.Sequential(nn.Linear(len(axes), 2, bias=bias))
    else:
        model = fully_connected(len(axes), width, depth, 2, activation, bias, "fan_in", seed=1)
    return Objective(model, loss, (z @ axes.T).to(dtype), targets(z).to(dtype), chunk=chunk)


def eigenvalues(matrix):
    """All of them, falling, by LAPACK through SciPy."""
    return torch.from_numpy(scipy.linalg.eigvalsh(matrix.numpy())[::-1].copy())


class Twin:
    """The same network on the coordinates z: its Hessian has the same eigenvalues but for zeros, and is small.

    Weights of the first layer that are orthogonal to all inputs change nothing; the rest of them is W V.
    """

    def __init__(self, objective, z, axes):
        kind = objective.layers[0]
        model = fully_connected(z.shape[1], kind.fan_out, len(objective.layers) - 1, 2, kind.activation, kind.bias)
        self.objective = Objective(model, objective.loss, z, objective.y.double())
        self.split, self.axes, self.fan_out = kind.weight.stop, axes, kind.fan_out

    def eigenvalues(self, theta, operator=Hessian):
        theta = theta.double()
        first = theta[: self.split].view(self.fan_out, -1) @ self.axes
        matrix = dense(operator(self.objective, torch.cat([first.flatten(), theta[self.split :]])), block=700)
        return eigenvalues((matrix + matrix.T) / 2)


def descended(objective, steps, eta=0.1):
    theta = objective.initial()
    for _ in range(steps):
        theta = theta - eta * objective.gradient(theta)[1]
    return theta


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * max(1.0, float(b.abs().max())))


def assert_bounds(pairs, true, tol=1e-3, rounding=1e-12):
    """θ ≤ λ ≤ the bound, and what convergence promises; ``true``: all eigenvalues, falling."""
    k, scale = len(pairs.values), float(true.abs().max())
    assert pairs.converged and pairs.upper.shape == pairs.residuals.shape == (k,)
    assert (pairs.values <= true[:k] + rounding * scale).all()
    assert (true[:k] <= pairs.upper + rounding * scale).all()
    assert (pairs.upper - pairs.values <= (tol + rounding) * scale).all()


def assert_honest(pairs, operator, rounding=1e-10):
    """Vectors in R^P, orthonormal, and residuals that are no smaller than the true ones."""
    v, k = pairs.vectors, len(pairs.values)
    assert v.shape == (operator.shape[0], k) and v.dtype == operator.dtype
    torch.testing.assert_close((v.T @ v).double(), torch.eye(k, dtype=torch.float64), rtol=0, atol=rounding)
    errors = (operator.apply(v.T.contiguous()).T - v * pairs.values.to(v)).norm(dim=0)
    assert (errors <= pairs.residuals + rounding * float(pairs.values[0].abs())).all()
    return errors


# ---- the compression ---------------------------------------------------------------------------------------


@pytest.fixture
def plane_of_16(monkeypatch):
    """A smaller plane, so that dense matrices are small."""
    monkeypatch.setattr(objective_module, "PLANE", 16)


def embedding(objective):
    """E as a matrix (P, size), written out: the first layer is W̃ Uᵀ, row by row, and all else stays."""
    axes, c = objective.plane().axes, objective.layers[0]
    rest = objective.P - c.fan_out * c.fan_in
    blocks = [axes.numpy()] * c.fan_out + [np.eye(rest)]
    return torch.from_numpy(scipy.linalg.block_diag(*blocks))


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize(
    "activation, loss, depth, bias",
    [("relu", "half_mse", 1, True), ("tanh", "cross_entropy", 1, False), ("relu", "cross_entropy", 2, False),
     ("tanh", "half_mse", 2, True), ("elu", "mse", 1, True), ("linear", "half_mse", 0, True)],
)  # fmt: skip
def test_compression_is_the_matrix_between_lift_and_restriction(
    plane_of_16, operator, chunk, activation, loss, depth, bias
):
    z, axes = decaying(120, inputs=64, rank=40)
    objective = network(z, axes, activation, loss, depth, bias, chunk=chunk)
    theta = (
        descended(objective, 3) + 0.1 * torch.randn(objective.P, generator=torch.Generator().manual_seed(2)).double()
    )
    h = dense(operator(network(z, axes, activation, loss, depth, bias), theta))  # see test_curvature.py
    point = operator(objective, theta)
    coarse, e = point.coarse(), embedding(objective)
    assert isinstance(coarse, Compression) and coarse.shape == (e.shape[1],) * 2
    assert (coarse.device, coarse.dtype) == (point.device, point.dtype)
    close(dense(coarse), e.T @ h @ e)
    rows = orthonormal(coarse.shape[0], 5, seed=3).T
    close(coarse.images(rows), rows @ e.T @ h)
    assert (coarse.products, point.products) == (coarse.shape[0], 5)
    close(coarse.lift(torch.eye(coarse.shape[0], dtype=torch.float64)), e.T)
    close(coarse.restrict(torch.eye(objective.P, dtype=torch.float64)), e)
    close(coarse.lift(rows).norm(dim=1), torch.ones(5, dtype=torch.float64))
    close(coarse.restrict(coarse.lift(rows)), rows)
    outside = h @ e @ rows.T - e @ (e.T @ h @ e @ rows.T)
    wanted = float(torch.linalg.matrix_norm(outside, 2))
    assert wanted > 1e-4 and coarse.leakage(rows @ e.T @ h) == pytest.approx(wanted, rel=1e-6)
    assert coarse.leakage(coarse.lift(rows)) < 1e-7


@pytest.mark.parametrize("operator, depth, chunk", [(Hessian, 1, None), (Hessian, 2, 550), (GaussNewton, 1, 550)])
def test_pieces_of_the_block_and_of_the_examples_add_up(plane_of_16, monkeypatch, operator, depth, chunk):
    z, axes = decaying(600, inputs=64, rank=40)
    objective = network(z, axes, depth=depth, chunk=chunk)
    theta = descended(objective, 3)
    h = dense(operator(objective, theta))
    pieces, real = [], linearize.FullyConnectedPoint._share

    def share(self, v, gauss_newton, part, *inputs):
        pieces.append((len(v), len(self.f[part])))
        return real(self, v, gauss_newton, part, *inputs)

    monkeypatch.setattr(linearize.FullyConnectedPoint, "_share", share)
    monkeypatch.setattr(linearize, "LEAST_PIECE", 512)
    point = operator(objective, theta)
    coarse, e = point.coarse(), embedding(objective)
    count = 2800  # directions; so many that neither they nor the examples go through in one sweep
    rows = torch.randn(count, objective.P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    short = rows[:, : coarse.shape[0]].contiguous()
    for product, block, wanted in (
        (point.apply, rows, rows @ h),
        (coarse.apply, short, short @ e.T @ h @ e),
        (coarse.images, short, short @ e.T @ h),
    ):
        close(product(block), wanted)
        assert sum(directions * examples for directions, examples in pieces) == count * objective.n
        assert max(pieces)[0] < count and max(examples for _, examples in pieces) < (chunk or objective.n)
        pieces.clear()


# ---- the plane ---------------------------------------------------------------------------------------------


def plain(x, model=None):
    model = fully_connected(x.shape[1], 3, 1, 1) if model is None else model
    return Objective(model, "half_mse", x, torch.ones(len(x), 1, dtype=x.dtype))


def full_rank(n=300, inputs=INPUTS, power=0.7):
    z, axes = decaying(n, inputs, inputs, power)
    return z @ axes.T


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("n", [2 * PLANE, 600])
def test_plane_holds_nearly_all_variance_that_any_plane_can(power, n):
    x = full_rank(n, power=power)
    plane = plain(x).plane()
    assert plane is not None and plane.axes.shape == (INPUTS, PLANE) and plane.x.shape == (n, PLANE)
    close(plane.axes.T @ plane.axes, torch.eye(PLANE, dtype=torch.float64))
    close(plane.x, x @ plane.axes)
    squares = torch.linalg.svdvals(x) ** 2
    lost = x - plane.x @ plane.axes.T
    assert float((lost**2).sum()) <= 1.1 * float(squares[PLANE:].sum())
    assert float(torch.linalg.matrix_norm(lost, 2)) ** 2 <= 1.5 * float(squares[PLANE])


def test_plane_of_few_directions_is_exact():
    z, axes = decaying(400, rank=PLANE // 2)
    plane = plain(z @ axes.T).plane()
    close(plane.x @ plane.axes.T, z @ axes.T)


@pytest.mark.parametrize("x, why", [
    (torch.randn(600, INPUTS, generator=torch.Generator().manual_seed(0)), "a flat spectrum"),
    (orthonormal(INPUTS, INPUTS, 3), "a flat spectrum, exactly"),
    (full_rank(300, INPUTS - 1), "few inputs"),
    (full_rank(2 * PLANE - 1), "few examples"),
    (torch.zeros(300, INPUTS), "nothing at all"),
])  # fmt: skip
def test_no_plane_where_it_would_not_help(x, why):
    objective = plain(x)
    assert objective.plane() is None, why
    assert Hessian(objective, objective.initial()).coarse() is None


def test_no_plane_for_other_modules():
    x = full_rank()
    first = nn.Linear(INPUTS, 3)
    for model in (
        nn.Sequential(first, nn.LayerNorm(3), nn.Linear(3, 1)),
        nn.Sequential(first, nn.GELU(), nn.Linear(3, 1)),
    ):
        objective = plain(x, model)
        assert objective.plane() is None and Hessian(objective, objective.initial()).coarse() is None
    assert plain(x, nn.Sequential(first, nn.Tanh(), nn.Linear(3, 1))).plane() is not None


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_plane_is_computed_once(monkeypatch, power):
    calls, real = [], Objective._find_plane
    monkeypatch.setattr(Objective, "_find_plane", lambda self: calls.append(1) or real(self))
    objective = plain(full_rank(power=power))
    assert calls == []  # and not before it is asked for
    planes = [Hessian(objective, objective.initial() + shift).point.objective.plane() for shift in range(3)]
    assert len(calls) == 1 and planes[0] is planes[1] is planes[2] and (planes[0] is None) == (power == 0)


def test_plane_is_deterministic_and_independent_of_the_chunk():
    x = full_rank()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = plain(x).plane()
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    torch.manual_seed(2)
    two = plain(x).plane()
    assert torch.equal(one.axes, two.axes) and torch.equal(one.x, two.x)
    chunked = Objective(fully_connected(INPUTS, 3, 1, 1), "mse", x, torch.ones(300, 1).double(), chunk=77).plane()
    assert float(torch.linalg.matrix_norm(chunked.axes @ chunked.axes.T - one.axes @ one.axes.T, 2)) < 1e-6


def test_plane_of_images_is_that_of_their_pixels():
    x = full_rank()
    model = fully_connected(INPUTS, 3, 1, 1)
    assert torch.equal(plain(x.view(300, 2, 16, 16), model).plane().axes, plain(x).plane().axes)


# ---- eigenvalues by way of the plane -----------------------------------------------------------------------


class Sweeps:
    """What products were made of: with H on whole rows, with H on lifted rows, with the compression."""

    def __init__(self, monkeypatch):
        self.whole, self.images, self.coarse = [], [], []
        real = linearize.FullyConnectedPoint.products

        def products(point, v, gauss_newton=False, read=None, write=None):
            (self.whole if read is None else self.images if write is None else self.coarse).append(len(v))
            return real(point, v, gauss_newton, read, write)

        monkeypatch.setattr(linearize.FullyConnectedPoint, "products", products)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
@pytest.mark.parametrize("activation, loss, steps", [("tanh", "half_mse", 40), ("relu", "cross_entropy", 0)])
def test_top_eigenvalues_by_way_of_the_plane(monkeypatch, operator, activation, loss, steps):
    z, axes = decaying(300, rank=INPUTS)  # of full rank: the reference is the dense matrix itself
    objective = network(z, axes, activation, loss)
    theta = descended(objective, steps)
    matrix = dense(operator(objective, theta), block=700)
    true = eigenvalues((matrix + matrix.T) / 2)
    sweeps = Sweeps(monkeypatch)
    for k in (1, 6):
        point = operator(objective, theta)
        pairs = top_eigenpairs(point, k, seed=k)
        assert pairs.checked and 0 < pairs.leakage < 0.05 * float(true[0]) and pairs.failure_probability == 1e-3
        assert pairs.products == point.products == pairs.probe_products + sum(sweeps.images)
        # H itself is applied once to the result, all at one time, and to the probe.
        assert len(sweeps.images) == 1 and sweeps.whole == [1] * pairs.probe_products
        assert pairs.coarse_products == sum(sweeps.coarse) > 0
        assert pairs.products < 45 and pairs.probe_products <= 15
        assert_bounds(pairs, true)
        torch.testing.assert_close(pairs.residuals, assert_honest(pairs, point), rtol=1e-6, atol=1e-10)
        assert float(true[len(pairs.basis) :].max()) <= pairs.ceiling
        for calls in (sweeps.whole, sweeps.images, sweeps.coarse):
            calls.clear()


def test_float32_by_way_of_the_plane():
    z, axes = decaying(300)
    objective = network(z, axes, dtype=torch.float32)
    theta = descended(objective, 40)
    true = Twin(objective, z, axes).eigenvalues(theta)
    operator = Hessian(objective, theta)
    pairs = top_eigenpairs(operator, 4)
    assert math.isfinite(pairs.leakage) and pairs.products == operator.products
    assert pairs.values.dtype == pairs.upper.dtype == torch.float64 and pairs.vectors.dtype == torch.float32
    assert_bounds(pairs, true, rounding=1e-5)
    assert_honest(pairs, operator, rounding=1e-5)


def test_small_tolerances_go_beyond_the_plane():
    z, axes = decaying(300)
    objective = network(z, axes, "relu")
    theta = descended(objective, 20)
    pairs = top_eigenpairs(Hessian(objective, theta), 3, tol=1e-7)
    assert pairs.leakage == math.inf and pairs.coarse_products > 0
    assert_bounds(pairs, Twin(objective, z, axes).eigenvalues(theta), tol=1e-7)


def test_chunks_do_not_change_the_result():
    z, axes = decaying(300)
    found = []
    for chunk in (None, 110):
        objective = network(z, axes, chunk=chunk)
        theta = descended(objective, 10)
        operator = Hessian(objective, theta)
        found.append(top_eigenpairs(operator, 3))
        assert math.isfinite(found[-1].leakage) and found[-1].products == operator.products
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-8, atol=0)
    assert_bounds(found[1], Twin(objective, z, axes).eigenvalues(theta))


def test_a_point_that_is_not_finite_is_an_error():
    z, axes = decaying(300)
    objective = network(z, axes)
    tracker = EigenTracker(2, check_every=10)
    tracker.update(Hessian(objective, objective.initial()))
    assert tracker.allowance is not None
    for entry in (0, -1):  # in the first layer, and in the last
        theta = objective.initial()
        theta[entry] = math.nan
        with pytest.raises(FloatingPointError):
            top_eigenpairs(Hessian(objective, theta), 2)
        with pytest.raises(FloatingPointError):
            tracker.update(Hessian(objective, theta))


# ---- a plane that leaves out what matters ------------------------------------------------------------------


def bad_plane(kind):
    def find(objective):
        u = torch.linalg.svd(objective.x)[2].T  # columns: principal directions, the strongest first
        axes = {"weakest": u[:, RANK - PLANE : RANK], "empty": u[:, RANK : RANK + PLANE]}.get(kind)
        axes = orthonormal(INPUTS, PLANE, 9) if axes is None else axes.contiguous()
        return Plane(axes, objective.x @ axes)

    return find


@pytest.mark.parametrize("kind", ["weakest", "empty", "random"])
def test_a_bad_plane_costs_products_and_no_more(monkeypatch, kind):
    z, axes = decaying(300)
    monkeypatch.setattr(Objective, "_find_plane", bad_plane(kind))
    objective = network(z, axes)
    twin, tracker, theta = Twin(objective, z, axes), EigenTracker(3, check_every=4), descended(objective, 20)
    for t in range(10):
        operator = Hessian(objective, theta)
        true = twin.eigenvalues(theta)
        pairs = tracker.update(operator)
        assert pairs.checked == (t % 4 == 0) and pairs.leakage == math.inf and tracker.allowance is None
        assert (pairs.coarse_products > 0) == pairs.checked
        assert pairs.products == operator.products > 0
        assert_bounds(pairs, true)
        assert_honest(pairs, operator)
        theta = theta - 0.02 * objective.gradient(theta)[1]
    cold = top_eigenpairs(Hessian(objective, theta), 3)
    assert cold.leakage == math.inf and cold.checked
    assert_bounds(cold, twin.eigenvalues(theta))


# ---- the tracker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation, loss", [("tanh", "half_mse"), ("relu", "cross_entropy")])
def test_tracker_along_gradient_descent(activation, loss):
    z, axes = decaying(300)
    objective = network(z, axes, activation, loss)
    twin, tracker, theta = Twin(objective, z, axes), EigenTracker(4, check_every=20), objective.initial()
    first, moved, between = None, 0.0, 0
    for t in range(45):
        operator = Hessian(objective, theta)
        true = twin.eigenvalues(theta)
        pairs = tracker.update(operator)
        assert pairs.products == operator.products
        assert pairs.checked or t % 20
        between += pairs.checked and t % 20 > 0
        if pairs.checked:
            assert pairs.probe_products > 0 and pairs.leakage < math.inf
            assert tracker.allowance == 1.5 * pairs.leakage
        else:
            assert pairs.products == pairs.probe_products == 0 < pairs.coarse_products
            assert pairs.leakage == tracker.allowance and pairs.failure_probability == 1.0
        assert_bounds(pairs, true)
        assert_honest(pairs, operator)
        first = true[:4] if first is None else first
        moved = max(moved, float((true[:4] - first).abs().max() / first[0]))
        theta = theta - 0.1 * objective.gradient(theta)[1]
    assert moved > 0.1  # else there was nothing to follow
    assert between <= 1  # where bounds do not close without it, a check is made


def record(pairs):
    named = ("values", "upper", "residuals", "vectors")
    return [getattr(pairs, name).tolist() for name in named], pairs.checked, pairs.products, pairs.coarse_products


@pytest.mark.parametrize("stop", [3, 6])
def test_state_round_trip_in_the_plane_is_bit_identical(stop):
    z, axes = decaying(300)
    points = []
    theta = network(z, axes).initial()
    for _ in range(9):
        points.append(theta)
        theta = theta - 0.1 * network(z, axes).gradient(theta)[1]

    def evaluate(tracker, part):
        objective = network(z, axes)  # a new process has no plane yet
        return [record(tracker.update(Hessian(objective, theta))) for theta in points[part]]

    wanted = evaluate(EigenTracker(3, check_every=5, seed=9), slice(None))
    first = EigenTracker(3, check_every=5, seed=9)
    found = evaluate(first, slice(stop))
    assert first.allowance is not None
    stream = io.BytesIO()
    torch.save(first.state(), stream)
    stream.seek(0)
    second = EigenTracker(3, check_every=5, seed=9)
    second.load_state(torch.load(stream, weights_only=True))
    assert found + evaluate(second, slice(stop, None)) == wanted
    assert [checked for _, checked, *_ in wanted] == [t % 5 == 0 for t in range(9)]


# ---- operators made by hand, whose coarse space is the span of the first coordinates ------------------------


class Planed:
    """A dense symmetric matrix that counts its products and knows a coarse space."""

    def __init__(self, matrix, inner):
        self.matrix, self.inner = torch.as_tensor(matrix, dtype=torch.float64), inner
        self.shape, self.device, self.dtype = tuple(self.matrix.shape), self.matrix.device, self.matrix.dtype
        self.count = self.coarse_count = 0

    def apply(self, rows):
        self.count += len(rows)
        return rows @ self.matrix

    def coarse(self):
        outer = self.shape[0] - self.inner

        def apply(rows):
            self.coarse_count += len(rows)
            return rows @ self.matrix[: self.inner, : self.inner]

        def lift(rows):
            return torch.cat([rows, rows.new_zeros(len(rows), outer)], dim=1)

        return types.SimpleNamespace(
            shape=(self.inner, self.inner),
            device=self.device,
            dtype=self.dtype,
            apply=apply,
            lift=lift,
            restrict=lambda rows: rows[:, : self.inner],
            images=lambda rows: self.apply(lift(rows)),
            leakage=lambda images: float(torch.linalg.matrix_norm(images[:, self.inner :], 2)),
        )


def blocks(inside, outside, coupling=0.0):
    """Diagonal blocks; ``coupling``: between the first coordinates of the two."""
    matrix = torch.diag(torch.tensor([*inside, *outside], dtype=torch.float64))
    matrix[0, len(inside)] = matrix[len(inside), 0] = coupling
    return Planed(matrix, len(inside))


def followed(tracker, operator):
    """An evaluation that must be right."""
    pairs = tracker.update(operator)
    assert (pairs.products, pairs.coarse_products) == (operator.count, operator.coarse_count)
    assert_bounds(pairs, eigenvalues(operator.matrix))
    return pairs


BULK = np.linspace(0, 0.1, 58)


def test_eigenvalue_that_rises_outside_of_the_plane_is_found_at_the_next_check_and_kept():
    tracker = EigenTracker(2, check_every=5)

    def at(rising):
        return blocks([1.0, 0.8, *BULK], [rising, *np.linspace(-0.1, 0.1, 100)])

    for t in range(12):
        operator = at(0.0 if t < 2 else 2.0)
        if t in (2, 3, 4):  # nothing in the plane hints at it
            assert float(tracker.update(operator).values[0]) == pytest.approx(1.0)
            assert operator.count == 0
        else:
            pairs = followed(tracker, operator)
            assert pairs.checked == (t % 5 == 0)
        assert (tracker.allowance is None) == (t >= 5)


def test_eigenvalue_outside_of_the_plane_that_the_first_probe_finds_is_not_lost_afterwards():
    """The probe meets it exactly, so that no residual says that the plane does not suffice."""
    for seed in range(5):
        tracker = EigenTracker(2, check_every=10, seed=seed)
        for _ in range(4):
            pairs = followed(tracker, blocks([1.0, 0.8, *BULK], [2.0, *np.zeros(100)]))
            assert pairs.leakage == math.inf and tracker.allowance is None


@pytest.mark.parametrize("outside", [0.0, 0.9])
def test_plane_is_given_up_after_three_evaluations_that_failed_in_it(outside):
    """The leakage is small enough for a check, and too large for what an allowance must be between checks."""
    tracker = EigenTracker(1, check_every=20)
    coupling = 0.026 if outside == 0 else 0.016
    for t in range(24):
        operator = blocks([1.0, *BULK], [outside, *np.zeros(100)], coupling)
        pairs = followed(tracker, operator)
        assert pairs.checked == (t < 4 or t == 20)
        assert (operator.coarse_count > 0) == (t < 4)
        assert (tracker.allowance is None) == (t >= 3)


def test_failures_in_the_plane_are_forgotten_once_it_serves_again():
    tracker, failures = EigenTracker(1, check_every=3), []
    for t in range(15):
        pairs = followed(tracker, blocks([1.0, *BULK], np.zeros(100), coupling=0.0 if t % 3 else 0.026))
        failures.append(tracker.failures)
        assert math.isfinite(pairs.leakage) and pairs.checked == (t % 3 != 2)
    assert failures == [0, 1, 0] * 5


SPECIAL = st.sampled_from([0.2, 0.5, 0.8, 0.9, 0.95, 0.999, 1.0, 1.001, 1.1])


@given(
    inside=st.lists(SPECIAL, min_size=2, max_size=6),
    outside=st.lists(SPECIAL, min_size=0, max_size=2),
    coupling=st.floats(-4, -0.5),
    k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_bounds_hold_between_checks_for_any_coupling(inside, outside, coupling, k, seed):
    """The operator stands still, so that nothing rises; only what the plane leaves out could make a bound wrong."""
    random = np.random.default_rng(seed)
    inside = np.concatenate([inside, random.uniform(-0.3, 0.3, 60 - len(inside))])
    outside = np.concatenate([outside, random.uniform(-0.2, 0.25, 80 - len(outside))])
    u, w = (np.linalg.qr(random.standard_normal((size, size)))[0] for size in (60, 80))
    mixed = 10**coupling * random.standard_normal((60, 80)) / 12
    matrix = np.block([[(u * inside) @ u.T, mixed], [mixed.T, (w * outside) @ w.T]])
    matrix = (matrix + matrix.T) / 2
    true = eigenvalues(torch.from_numpy(matrix))
    tracker = EigenTracker(k, check_every=4, seed=seed)
    for _ in range(6):
        operator = Planed(matrix, 60)
        pairs = tracker.update(operator)
        assert pairs.products == operator.count and pairs.coarse_products == operator.coarse_count
        assert (pairs.values <= true[:k] + 1e-12).all() and (true[:k] <= pairs.upper + 1e-12).all()
        assert_honest(pairs, operator)
        if pairs.converged:
            assert_bounds(pairs, true)
