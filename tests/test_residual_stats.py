"""Statistics of Figure 3 on small exact trajectories and on series made to order."""

import json

import numpy as np
import pytest
import xarray as xr

from eos_utils import residual_stats as stats

OBSERVED = (
    *("sharpness", "second", "sharpness_A", "norm_A2", "norm_D2", "norm_R2", "norm_Rp2", "apart2"),
    *("DF", "Dv", "Yv", "turn", "RRY", "RpRpY", "D_error", "A_error"),
)


def trajectory(eta, steps=300, n=8, d=5, m=4, seed=100):
    """Gradient descent on a two-layer linear network, every quantity from its definition with a full eigh."""
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, d)), generator.choice([-1.0, 1.0], n)
    w, a = generator.normal(size=(m, d)) / np.sqrt(d), generator.normal(size=m) / np.sqrt(m)
    rows, v_before, before, r_prime = {k: [] for k in OBSERVED}, None, None, None
    for _ in range(steps):
        f = x @ w.T @ a
        residual = f - y
        j = np.concatenate([np.einsum("nd,m->nmd", x, a).reshape(n, -1), x @ w.T], axis=1)
        big, m_a = 2 / n * j @ j.T, 2 / n * (x @ w.T) @ (x @ w.T).T
        values, vectors = np.linalg.eigh(big)
        v = vectors[:, -1] * (1 if v_before is None or vectors[:, -1] @ v_before >= 0 else -1)
        r = residual - v * (v @ residual)
        r_prime = r if before is None else before["next"]
        row = {
            **{"sharpness": values[-1], "second": values[-2], "sharpness_A": np.linalg.eigvalsh(m_a)[-1]},
            **{"norm_A2": a @ a, "norm_D2": residual @ residual, "norm_R2": r @ r, "norm_Rp2": r_prime @ r_prime},
            **{"apart2": (r - r_prime) @ (r - r_prime), "DF": residual @ f, "Dv": residual @ v, "Yv": y @ v},
            **{"RRY": r @ (r + y), "RpRpY": r_prime @ (r_prime + y)},
            "turn": np.nan if v_before is None else v @ v_before,
            "D_error": np.nan
            if before is None
            else np.linalg.norm(residual - before["D"]) / np.linalg.norm(residual - before["d"]),
            "A_error": np.nan
            if before is None
            else abs(a @ a - before["a2"] + 4 * eta / n * before["df"]) / abs(a @ a - before["a2"]),
        }
        for name, value in row.items():
            rows[name].append(value)
        before = {
            **{"D": residual - eta * big @ residual, "d": residual, "a2": a @ a, "df": residual @ f},
            "next": r_prime - eta * big @ (r_prime - v * (v @ r_prime)),
        }
        v_before, gradient = v, 2 / n * residual
        w, a = w - eta * np.outer(a, gradient @ x), a - eta * (x @ w.T).T @ gradient
    return dataset(rows, eta, n)


def dataset(rows, eta=0.1, n=100):
    """A recorded run with these observed series."""
    steps = np.arange(len(next(iter(rows.values()))))
    return xr.Dataset(
        {
            "loss": ("step", np.asarray(rows["norm_D2"], dtype=float) / n),
            "eta": ("step", np.full(len(steps), eta)),
            **{name: ("observed", np.asarray(values, dtype=float)) for name, values in rows.items()},
        },
        {"step": steps, "observed": steps},
        {"experiment": json.dumps({"eta": str(eta)})},
    )


def plain(total=200, **series):
    """A run in which nothing happens, but for the series given."""
    rows = {name: np.ones(total) for name in OBSERVED}
    return dataset({**rows, "norm_D2": np.full(total, 50.0), "sharpness": np.full(total, 10.0), **series})


@pytest.fixture(scope="module")
def exact():
    return trajectory(0.02)


def test_equation_four_holds_to_rounding_and_a_wrong_term_does_not(exact):
    assert stats.split_error(exact) < 1e-13
    wrong = exact.copy()
    wrong["RRY"] = exact["RRY"] + 1e-3 * exact["norm_D2"]
    assert stats.split_error(wrong) > 1e-4


def test_eigenvalues_of_an_exact_run(exact):
    assert 0 < stats.output_share(exact) < stats.output_share(exact, 1.0) < 1
    assert stats.output_share(exact) + stats.rest_share(exact) == pytest.approx(1)
    assert stats.upper_bound(exact) > stats.second_level(exact) > stats.second_level(exact, 0.5)
    assert stats.outlier_ratio(exact, 0.0) <= stats.outlier_ratio(exact) and stats.outlier_ratio(exact, 0.0) >= 1
    assert stats.second_above(exact) == float((0.02 * exact["second"].values >= 1).mean())


def test_first_order_errors_shrink_with_the_step_size(exact):
    fine = trajectory(0.01, steps=600)
    for of in ("D", "A"):
        assert stats.step_error(fine, of) == pytest.approx(stats.step_error(exact, of) / 2, rel=0.35)
    assert stats.step_error(exact, "D", 1.0) >= stats.step_error(exact, "D", 0.5)
    with pytest.raises(ValueError, match="of='R'"):
        stats.step_error(exact, "R")


def test_the_sequence_beside_v1_only_falls_below_one_over_eta(exact):
    assert stats.second_level(exact) < 1
    assert stats.share_of_rises(exact, "Rp") == 0 == stats.sum_of_rises(exact, "Rp")
    assert stats.apart_from_start(exact) < 0.5


def test_levels_are_in_the_units_that_they_claim():
    run = plain(second=np.linspace(1, 12, 200), sharpness_A=np.full(200, 2.0))
    assert stats.second_level(run) == pytest.approx(1.2)  # η = 0.1: 1/η is 10
    assert stats.second_above(run) == pytest.approx((np.linspace(1, 12, 200) >= 10).mean())
    assert stats.upper_bound(run) == pytest.approx(1) and stats.output_share(run) == pytest.approx(0.2)
    assert stats.outlier_ratio(plain(second=np.full(200, 2.5))) == pytest.approx(4)


def test_rises_are_summed_and_counted():
    d = np.tile([100.0, 50.0, 80.0, 60.0], 50)
    run = plain(norm_D2=d, norm_R2=np.linspace(50, 10, 200), norm_Rp2=np.tile([40.0, 43.0], 100))
    assert stats.sum_of_rises(run) == pytest.approx(50 * 0.3 + 49 * 0.4)
    assert stats.share_of_rises(run) == pytest.approx(99 / 199) and stats.share_of_rises(run, "R") == 0
    assert stats.rises_ratio(run, "Rp") == pytest.approx(100 * 3 / (50 * 30 + 49 * 40))
    assert stats.rises_ratio(run) == 0
    assert np.isnan(stats.rises_ratio(plain(norm_D2=np.linspace(50, 10, 200))))
    with pytest.raises(ValueError, match="series='D'"):
        stats.sum_of_rises(run, "D")


def test_where_the_loss_rises():
    t = np.arange(200)
    spike = 30.0 * (t % 20 == 10)
    beside, along = plain(norm_D2=50 + spike, norm_R2=20 + spike), plain(norm_D2=50 + spike, norm_R2=20 - 0.01 * t)
    assert stats.rise_beside(beside) == pytest.approx(1) and -0.01 < stats.rise_beside(along) <= 0
    assert stats.rise_beside(plain(norm_D2=50 + spike, norm_R2=20 + spike / 4)) == pytest.approx(0.25)


def test_distances_of_the_two_sequences():
    run = plain(norm_R2=np.full(200, 4.0), apart2=np.linspace(0, 1, 200), sharpness=np.linspace(10, 30, 200))
    assert stats.apart_largest(run) == stats.apart_at(run) == pytest.approx(0.5)
    crossed = float(np.sqrt(np.linspace(0, 1, 200)[102]) / 2)  # Λη/2 is 1 at step 99.5, 1.01 at 101.5
    assert stats.apart_at(run, "crossing") == pytest.approx(crossed)
    assert stats.apart_from_start(run) == pytest.approx(0.5)
    assert np.isnan(stats.apart_at(plain(), "crossing"))
    with pytest.raises(ValueError, match="when='noon'"):
        stats.apart_at(run, "noon")


def excursion(factor=0.5, after=-1.0):
    """Phases I, II, III, IV, I; along v1 the component falls by ``factor`` a step in IV."""
    s = np.concatenate([np.linspace(0.5, 1.3, 60), np.linspace(1.25, 0.65, 13), np.linspace(0.66, 0.9, 40)])
    loss, dv = np.full(len(s), 0.4), np.full(len(s), 1e-3)
    loss[60:74] = [0.41, 0.45, 0.6, 0.9, 1.5, 2, 2.5, 2, 1.5, 1.2, 1, 0.8, 0.6, 0.45]
    first = int(np.flatnonzero((s < 1) & (np.arange(len(s)) > 60))[0])
    dv[first - 1 : first + 12] = 10 * factor ** np.arange(13)
    df = np.where(np.arange(len(s)) > 73, after, 1.0)
    ones = {name: np.ones(len(s)) for name in OBSERVED}
    series = {"norm_D2": 100 * loss, "sharpness": 20 * s, "Dv": dv, "Yv": np.zeros(len(s)), "DF": df}
    return dataset({**ones, **series, "turn": np.full(len(s), 1 - 1e-4)})


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0])
def test_the_first_term_falls_at_its_rate(factor):
    run = excursion(factor)
    assert stats.first_term_factor(run, smoothing=0) == pytest.approx(factor**2)  # (Dᵀv₁)², as Yᵀv₁ = 0
    assert np.isnan(stats.first_term_factor(plain()))


def test_how_phase_four_ends():
    assert stats.fourth_ends_otherwise(excursion(after=-1.0)) == 0
    assert stats.fourth_ends_otherwise(excursion(after=1.0)) == 1
    assert stats.fourth_ends_otherwise(excursion(after=1.0), small=10.0) == 0
    assert np.isnan(stats.fourth_ends_otherwise(plain()))
    assert stats.positive_share(excursion(after=-1.0), "II") == 1


def test_the_second_term_and_what_is_left_out_of_it():
    run = plain(RRY=np.where(np.arange(200) < 4, 1.0, -1.0), RpRpY=np.full(200, -1.0))
    assert stats.second_term_positive(run) == pytest.approx(3 / 199)
    assert stats.second_term_positive(run, since=4) == 0 == stats.second_term_positive(run, "Rp")


def test_c_of_the_assumption():
    run = excursion()
    c = 1e-3 / (1e-4 * np.sqrt(40))
    assert stats.turn_of_v1(run) == pytest.approx(1e-4)
    assert stats.c_at_second(run) == pytest.approx(c, rel=1e-3)
    assert stats.wait_for_c(run, least=2.0) == 1 and stats.wait_for_c(run, least=1.0) == 0
    grown = run.copy()
    begin = int(np.flatnonzero(run["sharpness"].values > 20.2)[0])
    grown["Dv"] = ("observed", np.where(np.arange(run.sizes["observed"]) >= begin + 10, 1.0, 1e-9))
    assert 0.3 < stats.wait_for_c(grown) < 0.6 and stats.c_at_second(grown) < 0.01
    assert np.isnan(stats.c_at_second(plain()))
