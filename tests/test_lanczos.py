"""Eigenvalues and their bounds against dense matrices and SciPy; what the completeness check is for."""

import io
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from eos_utils import data, lanczos
from eos_utils.basis import Basis
from eos_utils.certificate import Probe
from eos_utils.curvature import Hessian
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective


class Matrix:
    """A dense symmetric matrix as an operator that counts its products."""

    def __init__(self, matrix):
        self.matrix = torch.as_tensor(matrix, dtype=torch.float64)
        self.shape, self.device, self.dtype = tuple(self.matrix.shape), self.matrix.device, self.matrix.dtype
        self.count = 0

    def apply(self, rows):
        self.count += len(rows)
        return rows @ self.matrix

    def eigenvalues(self):
        """All of them, falling, by LAPACK through SciPy."""
        return torch.from_numpy(scipy.linalg.eigvalsh(self.matrix.numpy())[::-1].copy())


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def planted(values, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    q = rotation(len(values), seed)
    matrix = (q * np.asarray(values)) @ q.T
    return Matrix((matrix + matrix.T) / 2)


def assert_right(pairs, operator, k, tol=1e-3):
    """Everything that a converged result promises, against LAPACK."""
    true = operator.eigenvalues()
    scale = float(true.abs().max())
    rounding = 1e-12 * max(scale, 1e-3)
    assert pairs.converged and pairs.values.shape == pairs.upper.shape == pairs.residuals.shape == (k,)
    assert (pairs.values <= true[:k] + rounding).all()
    assert (true[:k] <= pairs.upper + rounding).all()
    assert (pairs.upper - pairs.values <= tol * scale + rounding).all()
    assert (pairs.values.diff() <= rounding).all()
    v = pairs.vectors
    torch.testing.assert_close(v.T @ v, torch.eye(k, dtype=v.dtype), rtol=0, atol=1e-10)
    errors = operator.matrix @ v - v * pairs.values
    torch.testing.assert_close(pairs.residuals, errors.norm(dim=0), rtol=1e-6, atol=1e-10 * max(scale, 1))


# ---- networks ----------------------------------------------------------------------------------------

NETWORKS = [
    (activation, loss, outputs)
    for activation in ("relu", "tanh", "linear")
    for loss in ("half_mse", "cross_entropy")
    for outputs in (1, 10)
]


def digits_objective(activation, loss, outputs, n=60, width=4, dtype=torch.float64):
    loaded = data.digits(n, labels="onehot" if outputs == 10 else "vehicles").to("cpu", dtype)
    model = fully_connected(64, width, 1, outputs, activation, seed=3)
    return Objective(model, loss, loaded.x, loaded.y)


def descended(objective, steps, eta=0.2):
    theta = objective.initial()
    for _ in range(steps):
        theta = theta - eta * objective.gradient(theta)[1]
    return theta


@pytest.mark.parametrize("activation, loss, outputs", NETWORKS)
@pytest.mark.parametrize("steps", [0, 80])
def test_top_eigenvalues_of_small_networks(activation, loss, outputs, steps):
    objective = digits_objective(activation, loss, outputs)
    theta = descended(objective, steps)
    sizes = [4 * 64, 4, 4 * outputs, outputs]
    assert sum(sizes) == objective.P

    def value(t):  # the network once more, written out
        w, b, a, c = t.split(sizes)
        z = objective.x @ w.view(4, 64).T + b
        hidden = {"relu": torch.relu, "tanh": torch.tanh, "linear": lambda u: u}[activation](z)
        f = hidden @ a.view(outputs, 4).T + c
        if loss == "half_mse":
            return 0.5 * ((f - objective.y) ** 2).sum() / 60
        if outputs == 1:
            return torch.log1p(torch.exp(-objective.y * f)).mean()
        return (torch.logsumexp(f, dim=1) - (objective.y * f).sum(dim=1)).mean()

    matrix = torch.func.hessian(value)(theta)
    reference = Matrix((matrix + matrix.T) / 2)
    for k in (1, 3):
        assert_right(top_eigenpairs(Hessian(objective, theta), k, seed=k), reference, k)


def against_scipy(operator, k, tol):
    """Top k by ARPACK, from products in float64."""

    def product(v):
        return operator.apply(torch.from_numpy(v.ravel().copy()).to(operator.dtype)[None])[0].numpy().astype(np.float64)

    linear = LinearOperator(operator.shape, matvec=product, dtype=np.float64)
    start = np.random.default_rng(1).standard_normal(operator.shape[0])
    exact = np.sort(eigsh(linear, k, which="LA", tol=tol, v0=start, return_eigenvectors=False))[::-1]
    return torch.from_numpy(exact.copy())


def test_scipy_agrees_on_digits():
    objective = digits_objective("relu", "half_mse", 10, n=200, width=24)
    operator = Hessian(objective, descended(objective, 50))
    exact = against_scipy(operator, 6, 1e-10)
    pairs = top_eigenpairs(operator, 6, tol=1e-6)
    assert pairs.converged and (pairs.values <= exact + 1e-9).all() and (exact <= pairs.upper + 1e-9).all()
    torch.testing.assert_close(pairs.values, exact, rtol=0, atol=1e-6 * float(exact[0]))


@pytest.mark.cifar
def test_scipy_agrees_on_the_network_of_figure_1():
    loaded = data.cifar10(300)
    objective = Objective(fully_connected(3072, 128), "half_mse", loaded.x, loaded.y)
    operator = Hessian(objective, descended(objective, 20, eta=2 / 30))
    assert operator.shape[0] == 3072 * 128 + 128 + 128 * 10 + 10 and operator.dtype == torch.float32
    exact = against_scipy(operator, 5, 1e-5)
    pairs = top_eigenpairs(operator, 5)
    scale = float(exact[0])
    assert pairs.converged and (pairs.upper - pairs.values <= 1e-3 * scale).all()
    assert (pairs.values <= exact + 1e-5 * scale).all() and (exact <= pairs.upper + 1e-5 * scale).all()


# ---- clusters: what the completeness check is for ------------------------------------------------------

BULK = np.concatenate([[27.0], np.linspace(-1, 8, 293)])
CLUSTERS = {
    "edge": np.array([31.3, 31.2999, 30.6, 29.9, 29.2, 28.5]),
    "repeated": np.array([31.0, 31.0, 30.0, 30.0, 30.0, 28.0]),
    "one_value": np.full(6, 31.0),
}
SEEDS = range(6)


def worst_error(values, true):
    return float((true - values).abs().max())


@pytest.mark.parametrize("name", CLUSTERS)
def test_clustered_and_repeated_eigenvalues_are_all_found_and_need_the_check(name):
    operator = planted(np.concatenate([CLUSTERS[name], BULK]))
    true = operator.eigenvalues()[:6]
    unsafe = []
    for seed in SEEDS:
        pairs = top_eigenpairs(operator, 6, seed=seed)
        assert pairs.checked
        assert_right(pairs, operator, 6)
        blind = top_eigenpairs(operator, 6, seed=seed, check=False)
        assert blind.converged and (blind.residuals <= 1e-3 * 31.0).all()  # it believes that it is done
        assert not blind.checked and blind.failure_probability == 1.0 and blind.upper.isinf().all()
        unsafe.append(worst_error(blind.values, true))
    # Without the safeguard a single-vector Krylov space misses one, although every residual is small.
    assert max(unsafe) > 0.02 * 31.0


def test_check_repairs_a_start_that_has_lost_an_eigenvector():
    operator = planted(np.concatenate([CLUSTERS["edge"], BULK]))
    vectors = torch.linalg.eigh(operator.matrix)[1].T.flip(0)
    start = torch.cat([vectors[:2], vectors[3:9]])  # exact, but the third is missing
    assert worst_error(top_eigenpairs(operator, 6, start=start, check=False).values, operator.eigenvalues()[:6]) > 0.5
    assert_right(top_eigenpairs(operator, 6, start=start), operator, 6)


# ---- bounds --------------------------------------------------------------------------------------------

SPECTRA = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5001, 1.0, 2.0, 2.0001, 5.0]), min_size=1, max_size=60)


@given(spectrum=SPECTRA, extra=st.integers(0, 80), k=st.integers(1, 8), seed=st.integers(0, 9), tight=st.booleans())
def test_bounds_hold_for_any_spectrum(spectrum, extra, k, seed, tight):
    values = np.concatenate([spectrum, np.random.default_rng(seed).normal(size=extra)])
    k = min(k, len(values))
    operator = planted(values, seed)
    true = operator.eigenvalues()
    rounding = 1e-12 * max(1.0, float(true.abs().max()))
    pairs = top_eigenpairs(operator, k, tol=1e-8 if tight else 1e-2, seed=seed)
    assert pairs.checked and (pairs.values <= true[:k] + rounding).all() and (true[:k] <= pairs.upper + rounding).all()
    assert pairs.products == operator.count >= pairs.probe_products
    if pairs.converged:
        assert_right(pairs, operator, k, tol=1e-8 if tight else 1e-2)


@pytest.mark.parametrize("spectrum", [
    np.concatenate([[5.0, 4.0, 3.0], np.linspace(0, 1, 200)]),
    np.concatenate([[5.0, 4.9, 4.8], np.linspace(-6, 2, 200)]),
    -np.arange(1.0, 41.0) ** 2,
    np.full(30, -2.0),
    np.zeros(30),
    np.ones(30),
    1e-20 * np.arange(30.0),
    1e20 * np.arange(30.0),
], ids=["gap", "larger_below", "negative", "negative_constant", "zero", "identity", "small", "large"])  # fmt: skip
@pytest.mark.parametrize("k", [1, 3])
def test_special_spectra(spectrum, k):
    operator = planted(spectrum)
    pairs = top_eigenpairs(operator, k)
    true, scale = operator.eigenvalues()[:k], float(np.abs(spectrum).max())
    assert pairs.converged and pairs.checked
    assert (pairs.values <= true + 1e-12 * scale).all() and (true <= pairs.upper + 1e-12 * scale).all()
    assert (pairs.upper - pairs.values <= 1e-3 * max(scale, 1e-30) * (1 + 1e-9)).all()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_all_or_nearly_all_eigenvalues(size):
    operator = planted(np.arange(size) - 2.0)
    for k in {size, max(1, size - 1)}:
        pairs = top_eigenpairs(operator, k)
        assert_right(pairs, operator, k)
        torch.testing.assert_close(pairs.values, operator.eigenvalues()[:k])
        assert pairs.checked and pairs.products <= size
    assert top_eigenpairs(operator, size).failure_probability == 0.0  # nothing is left to chance


def test_float32_is_accurate_to_its_rounding():
    operator = planted(np.concatenate([CLUSTERS["edge"], BULK]))
    true = operator.eigenvalues()[:6]
    operator.matrix, operator.dtype = operator.matrix.float(), torch.float32
    pairs = top_eigenpairs(operator, 6)
    assert pairs.converged and pairs.vectors.dtype == torch.float32
    assert pairs.values.dtype == pairs.upper.dtype == torch.float64
    assert (pairs.values <= true + 1e-5 * 31).all() and (true <= pairs.upper + 1e-5 * 31).all()


@pytest.mark.parametrize("tol", [1e-13, 1e-15, 1e-18])
def test_tolerances_at_and_below_rounding_end(tol):
    operator = planted(np.concatenate([[5.0, 4.99, 4.98], np.linspace(0, 1, 300)]), seed=1)
    original, calls = torch.linalg.eigvalsh, []

    def limited(matrix):
        calls.append(1)
        assert len(calls) < 5000, "the bounds are bisected for ever"
        return original(matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigvalsh", limited)
        pairs = top_eigenpairs(operator, 3, tol=tol)
    torch.testing.assert_close(pairs.values, operator.eigenvalues()[:3], rtol=1e-10, atol=0)


# ---- bad input, limits, repeatability --------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 11, 2.0, True, None])
def test_impossible_numbers_of_eigenvalues_are_refused(k):
    operator = planted(np.arange(10.0))
    with pytest.raises(ValueError, match=f"k={k!r}: .* between 1 and P=10"):
        top_eigenpairs(operator, k)
    assert operator.count == 0


@pytest.mark.parametrize("tol", [0, -1e-3, math.nan])
def test_impossible_tolerances_are_refused(tol):
    with pytest.raises(ValueError, match="tol="):
        top_eigenpairs(planted(np.arange(10.0)), 2, tol=tol)
    with pytest.raises(ValueError, match="check_every=0"):
        EigenTracker(2, check_every=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_operator_that_is_not_finite_is_an_error(bad):
    operator = planted(np.arange(40.0))
    operator.matrix[3, 5] = operator.matrix[5, 3] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        top_eigenpairs(operator, 2)


@pytest.mark.parametrize("scale", [1e12, 1e18, 1e24, 1e30, 1e36, 1e38])
@pytest.mark.parametrize("start", [None, 4])
def test_an_operator_near_overflow_gives_its_eigenvalues_or_a_plain_error(scale, start):
    operator = planted(np.arange(-19.0, 21.0) / 20)
    true = scale * operator.eigenvalues()[:2]
    operator.matrix, operator.dtype = (scale * operator.matrix).float(), torch.float32
    rows = None if start is None else torch.eye(40)[:start]
    try:
        pairs = top_eigenpairs(operator, 2, start=rows)
    except FloatingPointError:
        return
    assert (pairs.values <= true * (1 + 1e-5)).all() and (true <= pairs.upper * (1 + 1e-5)).all()


@pytest.mark.parametrize("most", [1, 3, 6, 10, 14])
@pytest.mark.parametrize("check", [True, False])
def test_running_out_of_products_keeps_valid_bounds(most, check):
    operator = planted(np.concatenate([CLUSTERS["edge"], BULK]))
    pairs = top_eigenpairs(operator, 3, tol=1e-10, max_products=most, check=check)
    true = operator.eigenvalues()[: len(pairs.values)]
    assert not pairs.converged and operator.count == pairs.products <= most + 3
    assert (pairs.values <= true + 1e-9).all() and (true <= pairs.upper + 1e-9).all()
    if most < 3:
        identity = top_eigenpairs(planted(np.ones(30)), 3, max_products=1, check=check)
        assert not identity.converged  # one value of three is no result


def test_same_seed_same_result_same_count():
    results = []
    for _ in range(2):
        operator = planted(np.concatenate([CLUSTERS["edge"], BULK]))
        torch.manual_seed(len(results))  # the global generator must not matter
        pairs = top_eigenpairs(operator, 6, seed=4)
        assert pairs.products == operator.count
        results.append(pairs)
    a, b = results
    assert torch.equal(a.values, b.values) and torch.equal(a.upper, b.upper) and torch.equal(a.basis, b.basis)
    assert (a.products, a.probe_products, a.ceiling) == (b.products, b.probe_products, b.ceiling)
    other = top_eigenpairs(planted(np.concatenate([CLUSTERS["edge"], BULK])), 6, seed=5)
    assert not torch.equal(a.basis, other.basis)


# ---- the probe's probability ---------------------------------------------------------------------------


def test_ceiling_fails_as_often_as_it_says_and_no_more():
    r"""For H = w wᵀ one step gives the ceiling in closed form: it fails if and only if ⟨u, w⟩² < πδ²/(2N)."""
    size, delta, seeds = 400, 0.1, 1500
    row = torch.zeros(1, size, dtype=torch.float64)
    row[0, 7] = 1.0
    operator = Matrix(row.T @ row)
    failed = 0
    for seed in range(seeds):
        probe = Probe.start(Basis(operator), delta, torch.Generator().manual_seed(seed))
        overlap = float(probe.rows[0][0, 7])
        probe.step()
        below = probe.ceiling() < 1.0
        assert below == (overlap**2 < math.pi * delta**2 / (2 * size))
        failed += below
    assert abs(failed / seeds - delta) < 4 * math.sqrt(delta * (1 - delta) / seeds)


@pytest.mark.parametrize("steps", [4, 12])
def test_ceiling_bounds_the_top_of_any_spectrum_with_the_stated_probability(steps):
    delta, seeds = 0.1, 300
    operator = planted(np.concatenate([[1.3], np.linspace(-1, 1, 99)]))
    failed = 0
    for seed in range(seeds):
        probe = Probe.start(Basis(operator), delta, torch.Generator().manual_seed(seed))
        for _ in range(steps):
            probe.step()
        assert probe.ritz_top() <= probe.ceiling()
        failed += probe.ceiling() < 1.3 - 1e-12
    assert failed / seeds < delta + 3 * math.sqrt(delta * (1 - delta) / seeds)
    assert math.isfinite(probe.ceiling())


def test_ceiling_belongs_to_what_the_basis_leaves_out():
    for values in (np.linspace(0, 1, 200) ** 0.5, np.concatenate([[5, 4, 3], np.linspace(0, 2, 200)]), np.arange(9.0)):
        operator = planted(values, seed=1)
        for seed in range(3):
            pairs = top_eigenpairs(operator, 3, seed=seed)
            rest = torch.linalg.qr(pairs.basis.T, mode="complete")[0][:, len(pairs.basis) :]
            assert float(torch.linalg.eigvalsh(rest.T @ operator.matrix @ rest)[-1]) <= pairs.ceiling + 1e-9


# ---- tracking ------------------------------------------------------------------------------------------


class Drift:
    """A smoothly moving symmetric matrix: eigenvectors turn, eigenvalues wander, and one rises from the bulk."""

    def __init__(self, size=150, seed=0):
        random = np.random.default_rng(seed)
        a = random.standard_normal((size, size))
        self.turn, self.q = 0.02 * (a - a.T) / math.sqrt(size), rotation(size, seed)
        self.bulk = np.sort(random.uniform(-1, 6, size - 5))

    def at(self, t, rising):
        tops = np.array([20.0, 18.0, 16.0, 15.0]) * (1 + 0.1 * np.sin(0.1 * t + np.arange(4)))
        values = np.concatenate([tops, [rising], self.bulk])
        q = self.q @ scipy.linalg.expm(t * self.turn)
        matrix = (q * values) @ q.T
        return Matrix((matrix + matrix.T) / 2)


def test_tracker_follows_a_drifting_operator():
    drift, tracker = Drift(), EigenTracker(3, check_every=10)
    counts = []
    for t in range(31):
        operator = drift.at(t, rising=0.0)
        pairs = tracker.update(operator)
        assert pairs.checked == (t % 10 == 0)
        assert_right(pairs, operator, 3)
        counts.append(pairs.products)
    cold = top_eigenpairs(drift.at(30, 0.0), 3).products
    assert np.mean([c for t, c in enumerate(counts) if t % 10]) < 0.6 * cold  # recycling pays


def test_tracker_meets_an_eigenvalue_that_rose_from_the_bulk_at_the_next_check():
    drift, tracker, seen = Drift(), EigenTracker(3, check_every=8), []
    for t in range(17):
        operator = drift.at(0, rising=0.0 if t < 2 else 25.0)  # all else stands still, so that nothing hints at it
        pairs = tracker.update(operator)
        seen.append(abs(float(pairs.values[0]) - float(operator.eigenvalues()[0])) < 1e-3 * 25)
    assert all(seen[8:])
    assert_right(pairs, operator, 3)


def test_tracker_bounds_hold_between_checks_on_a_problem_that_its_basis_once_filled():
    """The second point couples the first eigenvector with one that was not kept, whose own curvature stays."""
    before = torch.diag(torch.tensor([1.2, 1.1, 1.05, 1.02, 1.0], dtype=torch.float64))
    after = before.clone()
    after[0, 4] = after[4, 0] = 0.03  # a residual below sqrt(tol), an error above tol
    tracker = EigenTracker(2, check_every=50)
    for matrix in (before, after):
        operator = Matrix(matrix)
        assert_right(tracker.update(operator), operator, 2)


def test_every_evaluation_has_a_probe_of_its_own(monkeypatch):
    firsts, real = [], Probe.start

    def start(*arguments):
        probe = real(*arguments)
        firsts.append(tuple(probe.rows[0][0].tolist()))
        return probe

    monkeypatch.setattr(lanczos.Probe, "start", start)
    for seed in (0, 1):
        tracker = EigenTracker(1, seed=seed, check_every=1)
        for _ in range(5):
            tracker.update(planted(np.arange(40.0)))
    assert len(firsts) >= 10 and len(set(firsts)) == len(firsts)


def test_tracker_state_round_trip_is_bit_identical():
    drift = Drift()

    def record(pairs):
        return pairs.values.tolist(), pairs.upper.tolist(), pairs.residuals.tolist(), pairs.checked, pairs.products

    whole = EigenTracker(3, check_every=4, seed=9)
    wanted = [record(whole.update(drift.at(t, 10.0 + t))) for t in range(12)]
    first = EigenTracker(3, check_every=4, seed=9)
    found = [record(first.update(drift.at(t, 10.0 + t))) for t in range(5)]
    stream = io.BytesIO()
    torch.save(first.state(), stream)
    stream.seek(0)
    second = EigenTracker(3, check_every=4, seed=9)
    second.load_state(torch.load(stream, weights_only=True))
    found += [record(second.update(drift.at(t, 10.0 + t))) for t in range(5, 12)]
    assert found == wanted
