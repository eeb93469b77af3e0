"""Both ends of the spectrum, and its largest in magnitude, against LAPACK and ARPACK; bursts of Lanczos steps."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh

from eos_utils.basis import Basis, random_rows
from eos_utils.curvature import GaussNewton, Hessian, dense
from eos_utils.lanczos import WHICH, top_eigenpairs
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


def planted(values, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    random = np.random.default_rng(seed)
    q = np.linalg.qr(random.standard_normal((len(values), len(values))))[0]
    matrix = (q * np.asarray(values, dtype=float)) @ q.T
    return Matrix((matrix + matrix.T) / 2)


def wanted(matrix, which):
    """All eigenvalues by LAPACK through SciPy, the outermost first."""
    rising = torch.from_numpy(scipy.linalg.eigvalsh(matrix.numpy()))
    if which == "magnitude":
        return rising[rising.abs().argsort(descending=True, stable=True)]
    return rising.flip(0) if which == "largest" else rising


def outward(which, x):
    """What falls from the outermost inwards."""
    return {"largest": x, "smallest": -x, "magnitude": x.abs()}[which]


def assert_right(pairs, matrix, k, which, tol):
    """Everything that a converged result promises."""
    true, v = wanted(matrix, which), pairs.vectors
    scale = float(true.abs().max())
    rounding = 1e-12 * max(scale, 1e-3)
    assert pairs.converged and pairs.checked
    assert pairs.values.shape == pairs.upper.shape == pairs.residuals.shape == (k,) and v.shape == (len(matrix), k)
    values, upper, true = outward(which, pairs.values), outward(which, pairs.upper), outward(which, true)
    assert (values <= true[:k] + rounding).all() and (true[:k] <= upper + rounding).all()
    assert (upper - values <= tol * scale + rounding).all()
    assert (values.diff() <= rounding).all()
    for i in range(k):  # no more than i eigenvalues lie beyond the i-th bound
        assert int((true > upper[i] + rounding).sum()) <= i
    # Vectors of the two ends belong to different bases, which are exact only to the square root of the tolerance.
    loose = math.sqrt(tol) if which == "magnitude" else 1e-10
    torch.testing.assert_close(v.T @ v, torch.eye(k, dtype=v.dtype), rtol=0, atol=loose)
    errors = (matrix @ v - v * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, errors, rtol=1e-6, atol=1e-10 * max(scale, 1))


# ---- symmetric matrices ------------------------------------------------------------------------------------

VALUE = st.sampled_from([-3.0, -2.0, -1.0, -0.5, 0.0, 0.0, 0.25, 1.0, 2.0, 2.001, 3.0])


@given(
    spectrum=st.lists(VALUE, min_size=1, max_size=40),
    mirrored=st.booleans(),
    k=st.integers(1, 40),
    which=st.sampled_from(WHICH),
    tol=st.sampled_from([1e-2, 1e-6]),
    seed=st.integers(0, 9),
)
def test_any_spectrum_from_any_end(spectrum, mirrored, k, which, tol, seed):
    spectrum = spectrum + [-value for value in spectrum] if mirrored else spectrum  # ±a: which is first is open
    operator, k = planted(spectrum, seed), min(k, len(spectrum))
    pairs = top_eigenpairs(operator, k, which=which, tol=tol, seed=seed)
    assert pairs.products == operator.count >= pairs.probe_products
    assert_right(pairs, operator.matrix, k, which, tol)


SPECTRA = {
    "gap": np.concatenate([[5.0, 4.0, -4.5, -6.0], np.linspace(-1, 1, 120)]),
    "repeated": np.concatenate([[3.0] * 3, [-3.0] * 2, [2.0] * 2, np.linspace(-1, 1, 120)]),
    "pairs": np.concatenate([np.arange(1.0, 9.0), -np.arange(1.0, 9.0)]),
    "negative": -(np.arange(1.0, 31.0) ** 2),
    "positive": np.arange(1.0, 31.0) ** 2,
    "constant": np.full(21, 1.0),
    "negative_constant": np.full(21, -1.0),
    "zero": np.zeros(21),
    "low_rank": np.concatenate([[4.0, -3.0, 2.0], np.zeros(60)]),
    "tiny": 1e-20 * np.arange(-15.0, 16.0),
    "huge": 1e20 * np.arange(-15.0, 16.0),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 5])
def test_special_spectra(name, which, k):
    operator = planted(SPECTRA[name])
    scale = float(np.abs(SPECTRA[name]).max()) or 1.0
    pairs = top_eigenpairs(operator, k, which=which)
    true = wanted(operator.matrix, which)[:k]
    assert pairs.converged and pairs.checked and len(pairs.values) == k
    values, upper, true = (outward(which, x) / scale for x in (pairs.values, pairs.upper, true))
    assert (values <= true + 1e-12).all() and (true <= upper + 1e-12).all() and (upper - values <= 1.001e-3).all()
    close = pairs.vectors.T @ pairs.vectors - torch.eye(k, dtype=torch.float64)
    assert float(close.abs().max()) < (0.03 if which == "magnitude" else 1e-10)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 24])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("spectrum", ["distinct", "repeated", "zeros"])
def test_all_or_nearly_all_eigenvalues_each_once(size, which, spectrum):
    values = {
        "distinct": np.arange(size) - size / 3,
        "repeated": np.array([2.0, -2.0, 1.0])[np.arange(size) % 3],
        "zeros": np.where(np.arange(size) % 3 == 0, np.arange(size) - 2.0, 0.0),
    }[spectrum]
    for seed in range(3):
        operator = planted(values, seed)
        for k in {size, max(1, size - 1), size // 2 + 1}:
            pairs = top_eigenpairs(operator, k, which=which, tol=1e-8, seed=seed)
            assert_right(pairs, operator.matrix, k, which, 1e-8)
            true = outward(which, wanted(operator.matrix, which))[:k]
            torch.testing.assert_close(outward(which, pairs.values), true, rtol=0, atol=1e-7 * size)


@pytest.mark.parametrize("spectrum", [np.ones(30), np.r_[np.ones(9), -np.ones(9), np.zeros(9)], np.zeros(30)])
def test_repeated_eigenvalues_that_both_ends_meet_are_not_counted_twice(spectrum):
    for seed in range(4):
        operator = planted(spectrum, seed)
        for k in (4, 16, 25):
            pairs = top_eigenpairs(operator, k, which="magnitude", tol=1e-6, seed=seed)
            assert_right(pairs, operator.matrix, k, "magnitude", 1e-6)


def test_smallest_is_the_largest_of_minus_the_operator():
    operator, minus = planted(SPECTRA["gap"]), planted(-SPECTRA["gap"])
    a, b = top_eigenpairs(operator, 3, which="smallest", seed=1), top_eigenpairs(minus, 3, seed=1)
    for name in ("values", "upper", "ceiling"):
        torch.testing.assert_close(
            torch.as_tensor(getattr(a, name)), -torch.as_tensor(getattr(b, name)), rtol=1e-9, atol=0
        )
    assert (a.products, a.probe_products) == (b.products, b.probe_products)
    # The ceiling bounds what the basis leaves out from the far side: from below.
    rest = torch.linalg.qr(a.basis.T, mode="complete")[0][:, len(a.basis) :]
    assert float(torch.linalg.eigvalsh(rest.T @ operator.matrix @ rest)[0]) >= a.ceiling - 1e-9


def test_smallest_goes_on_from_an_earlier_result():
    operator = planted(SPECTRA["gap"])
    first = top_eigenpairs(operator, 3, which="smallest", tol=1e-6)
    operator.count = 0
    again = top_eigenpairs(
        operator, 3, which="smallest", tol=1e-6, start=first.basis, ceiling=first.ceiling, check=False
    )
    assert again.converged and not again.checked and again.products == operator.count <= len(first.basis) + 3
    true = wanted(operator.matrix, "smallest")[:3]
    assert (again.values >= true - 1e-11).all() and (true >= again.upper - 1e-11).all()
    assert (again.values - again.upper <= 1e-6 * 6 + 1e-11).all()


def test_magnitude_counts_the_cost_and_the_risk_of_both_ends():
    operator = planted(SPECTRA["gap"])
    ends = [top_eigenpairs(operator, 3, which=which) for which in ("largest", "smallest")]
    operator.count = 0
    pairs = top_eigenpairs(operator, 3, which="magnitude")
    assert pairs.products == operator.count == sum(end.products for end in ends)
    assert pairs.probe_products == sum(end.probe_products for end in ends)
    assert pairs.failure_probability == sum(end.failure_probability for end in ends) == 2e-3
    assert [round(value, 1) for value in pairs.values.tolist()] == [-6.0, 5.0, -4.5]
    assert torch.equal(pairs.upper.sign(), pairs.values.sign())


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("most", [1, 2, 6, 11])
@pytest.mark.parametrize("name", ["gap", "negative", "positive"])
def test_running_out_of_products_keeps_valid_bounds(name, which, most):
    operator = planted(SPECTRA[name])
    pairs = top_eigenpairs(operator, 3, which=which, tol=1e-10, max_products=most)
    assert not pairs.converged and pairs.products == operator.count
    true = outward(which, wanted(operator.matrix, which))[: len(pairs.values)]
    values, upper = outward(which, pairs.values), outward(which, pairs.upper)
    assert (values <= true + 1e-9).all() and (true <= upper + 1e-9).all()
    # What both ends of a short search have found is one direction, and counts once.
    assert float(torch.linalg.svdvals(pairs.vectors)[-1]) > 0.5


def test_impossible_requests_are_refused():
    operator = planted(np.arange(10.0))
    with pytest.raises(ValueError, match="which='LM' is unknown; choose one of largest, smallest, magnitude"):
        top_eigenpairs(operator, 2, which="LM")
    for extra in ({"start": torch.eye(10, dtype=torch.float64)[:2]}, {"ceiling": 3.0}):
        with pytest.raises(ValueError, match="which='magnitude' .* neither start nor ceiling"):
            top_eigenpairs(operator, 2, which="magnitude", **extra)
    for which in WHICH:
        with pytest.raises(ValueError, match="k=11: .* between 1 and P=10"):
            top_eigenpairs(operator, 11, which=which)
    assert operator.count == 0


@pytest.mark.parametrize("which", WHICH)
def test_float32_is_accurate_to_its_rounding(which):
    operator = planted(SPECTRA["repeated"])
    true = outward(which, wanted(operator.matrix, which))[:5]
    operator.matrix, operator.dtype = operator.matrix.float(), torch.float32
    pairs = top_eigenpairs(operator, 5, which=which)
    assert pairs.converged and pairs.vectors.dtype == torch.float32
    assert pairs.values.dtype == pairs.upper.dtype == torch.float64
    assert (outward(which, pairs.values) <= true + 1e-5).all() and (true <= outward(which, pairs.upper) + 1e-5).all()
    assert (outward(which, pairs.upper - pairs.values).abs() <= 3e-3 + 1e-5).all()


# ---- networks ----------------------------------------------------------------------------------------------


def network(activation, loss, inputs=12, n=40):
    random = torch.Generator().manual_seed(4)
    x = torch.randn(n, inputs, generator=random, dtype=torch.float64)
    y = torch.nn.functional.one_hot(torch.randint(3, (n,), generator=random), 3).double()
    objective = Objective(fully_connected(inputs, 6, 1, 3, activation, seed=2), loss, x, y)
    return objective, 0.7 * torch.randn(objective.P, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
@pytest.mark.parametrize("activation, loss", [("tanh", "half_mse"), ("relu", "cross_entropy")])
def test_networks_against_lapack_and_arpack(operator, activation, loss):
    objective, theta = network(activation, loss)
    matrix = dense(operator(objective, theta))
    matrix = (matrix + matrix.T) / 2
    if operator is Hessian:
        assert float(wanted(matrix, "smallest")[0]) < -0.01 * float(wanted(matrix, "largest")[0])  # indefinite
    for which, theirs in (("largest", "LA"), ("smallest", "SA"), ("magnitude", "LM")):
        point = operator(objective, theta)
        pairs = top_eigenpairs(point, 4, which=which, tol=1e-6)
        assert pairs.products == point.products
        assert_right(pairs, matrix, 4, which, 1e-6)
        if operator is GaussNewton and which == "smallest":
            continue  # zero, many times, where ARPACK does not converge
        linear = LinearOperator(tuple(matrix.shape), matvec=lambda v: matrix.numpy() @ v, dtype=np.float64)
        start = np.random.default_rng(1).standard_normal(len(matrix))
        found = eigsh(linear, 4, which=theirs, tol=1e-10, v0=start, return_eigenvectors=False)
        found = torch.from_numpy(found.copy())
        found = found[outward(which, found).argsort(descending=True)]
        torch.testing.assert_close(pairs.values, found, rtol=0, atol=1e-6 * float(matrix.norm()))


# ---- bursts of Lanczos steps -------------------------------------------------------------------------------


def begun(operator, seed=0):
    basis = Basis(operator)
    basis.extend(random_rows(1, operator, torch.Generator().manual_seed(seed)))
    return basis


def assert_consistent(basis):
    """Orthonormal rows and their images, as many as were paid for, or fewer."""
    torch.testing.assert_close(basis.q @ basis.q.T, torch.eye(len(basis), dtype=basis.q.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.hq, basis.q @ basis.operator.matrix, rtol=1e-10, atol=1e-12)
    assert len(basis) <= basis.products == basis.operator.count


@pytest.mark.parametrize("bursts", [(12,), (1,) * 12, (5, 7), (4, 0, 8)])
def test_a_burst_spans_what_single_steps_span(bursts):
    basis = begun(planted(SPECTRA["gap"]))
    for steps in bursts:
        assert basis.lanczos(steps) == steps
    assert_consistent(basis)
    single = begun(planted(SPECTRA["gap"]))
    for _ in range(12):
        assert single.extend(single.hq[-1:]) == 1
    assert len(basis) == len(single) == basis.products == 13
    signs = (basis.q * single.q).sum(dim=1, keepdim=True).sign()  # Lanczos vectors are unique but for their signs
    torch.testing.assert_close(basis.q * signs, single.q, rtol=0, atol=1e-9)
    t = basis.q @ basis.hq.T
    torch.testing.assert_close(t, t.triu(-1).tril(1), rtol=0, atol=1e-11)  # tridiagonal
    torch.testing.assert_close(basis.ritz()[0], single.ritz()[0])


def test_a_burst_stays_orthonormal_where_plain_lanczos_does_not():
    """A large separated eigenvalue converges at once and comes back as a ghost unless it is held off."""
    basis = begun(planted(np.concatenate([[1e6, 1e5], np.linspace(0, 1, 200)])))
    assert basis.lanczos(90) == 90
    torch.testing.assert_close(basis.q @ basis.q.T, torch.eye(91, dtype=torch.float64), rtol=0, atol=1e-12)
    assert int((basis.ritz()[0] > 2).sum()) == 2


@pytest.mark.parametrize("values, rank", [
    (np.zeros(30), 1),
    (np.ones(30), 1),
    (np.repeat([2.0, -1.0], 15), 2),
    (np.repeat([5.0, 4.0, -3.0], 21), 3),
    (np.arange(1.0, 8.0), 7),
], ids=["zero", "identity", "two_values", "three_values", "everything"])  # fmt: skip
def test_a_burst_stops_at_a_breakdown(values, rank):
    for seed in range(5):
        basis = begun(planted(values, seed), seed)
        before = basis.products
        found = basis.lanczos(10)
        assert found == rank - 1 == len(basis) - 1
        assert basis.products - before <= min(10, len(values) - 1)
        assert_consistent(basis)
        assert basis.lanczos(10) == 0 and len(basis) == rank  # there is no way on from here
        assert basis.products - before <= 20
        true = torch.tensor(sorted(set(values.tolist()), reverse=True), dtype=torch.float64)
        torch.testing.assert_close(basis.ritz()[0][: len(true)], true[:rank], rtol=0, atol=1e-10)


def test_a_burst_through_the_null_space_keeps_a_sound_basis():
    """Where an image is nothing but rounding, what follows is a direction like any other."""
    for seed in range(20):
        basis = begun(planted(np.concatenate([[5.0, 4.0, -3.0], np.zeros(60)]), seed), seed)
        assert 3 <= basis.lanczos(10) <= 10
        assert_consistent(basis)
        values = basis.ritz()[0]
        wanted_values = torch.tensor([5.0, 4.0, -3.0], dtype=torch.float64)
        torch.testing.assert_close(values[[0, 1, -1]], wanted_values, rtol=0, atol=1e-10)
        assert float(values[2:-1].abs().max()) < 1e-10


@pytest.mark.parametrize("steps", [0, -3, 1, 4, 50])
def test_a_burst_takes_no_more_products_than_it_is_given(steps):
    operator = planted(np.linspace(-1, 3, 20))
    basis = begun(operator)
    assert basis.lanczos(steps) == max(0, min(steps, 19)) == operator.count - 1 == basis.products - 1
    assert_consistent(basis)
    if steps == 50:  # the basis is full
        assert len(basis) == 20 and basis.lanczos(5) == 0 and operator.count == 20


def test_a_burst_goes_on_from_a_basis_that_is_no_krylov_space():
    operator = planted(SPECTRA["gap"])
    basis = Basis(operator)
    basis.extend(random_rows(6, operator, torch.Generator().manual_seed(3)))
    assert basis.lanczos(5) == 5
    assert_consistent(basis)


class Breaking(Matrix):
    """Returns something that is not finite from its ``good``-th product on."""

    def __init__(self, matrix, good, bad):
        super().__init__(matrix)
        self.good, self.bad = good, bad

    def apply(self, rows):
        images = super().apply(rows)
        if self.count > self.good:
            images[:, 2] = self.bad
        return images


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good", [1, 2, 5, 6])
def test_a_burst_that_meets_nan_or_infinity_is_an_error(bad, good):
    operator = Breaking(planted(SPECTRA["gap"]).matrix, good, bad)
    basis = begun(operator)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        basis.lanczos(6)
    assert len(basis) == 1 and operator.count <= 7  # nothing of it was taken in
    fresh = Breaking(planted(SPECTRA["gap"]).matrix, good, bad)
    with pytest.raises(FloatingPointError):
        top_eigenpairs(fresh, 4)


def test_a_burst_from_an_image_that_is_not_finite_is_an_error():
    basis = begun(planted(SPECTRA["gap"]))
    basis.hq[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        basis.lanczos(3)
