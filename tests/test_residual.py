"""The Gram matrix and the residual along a run, against explicit Jacobians and eigh at every step."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from eos_utils import catalogue, residual, store, verify
from eos_utils.experiment import Experiment, Measure
from eos_utils.objective import Objective
from eos_utils.residual import FIELDS
from eos_utils.run import compute, forget

TINY = Experiment(
    dataset="digits", n=30, labels="vehicles", width=6, depth=2, activation="tanh", bias=False, init="fan_in",
    loss="mse", eta="1/20", steps=12, seed=100, dtype="float64",
)  # fmt: skip
SNAPSHOTS = tuple(range(13))


@pytest.fixture(scope="module")
def observed():
    run, _ = compute(TINY, Measure(k=1, stride=5, gram=4, snapshots=SNAPSHOTS), progress=False)
    objective = TINY.objective(torch.device("cpu"))
    return run, objective, [torch.from_numpy(t) for t in run["theta"].values[: len(SNAPSHOTS)]]


def dense(objective, theta, part=slice(None)):
    """M or a diagonal block's share of it, from the Jacobian by autograd."""
    jacobian = torch.autograd.functional.jacobian(lambda t: objective._call(t, objective.x)[:, 0], theta)[:, part]
    return 2 / objective.n * jacobian @ jacobian.T


def test_every_step_is_that_of_explicit_matrices(observed):
    run, objective, thetas = observed
    y, eta = objective.y[:, 0], float(TINY.step_size)
    assert run["observed"].values.tolist() == list(SNAPSHOTS)
    before, v_before, r_prime = None, None, None
    for t, theta in enumerate(thetas):
        m = dense(objective, theta)
        values, vectors = torch.linalg.eigh(m)
        f = objective.outputs(theta)[:, 0]
        d, v = f - y, vectors[:, -1]
        v = v if v_before is None or v @ v_before > 0 else -v
        r = d - (v @ d) * v
        r_prime = r if r_prime is None else r_prime
        at = {name: float(run[name].values[t]) for name in FIELDS}
        width = TINY.width
        expected = {
            "sharpness": values[-1], "second": values[-2], "norm_D2": d @ d, "norm_R2": r @ r, "DF": d @ f,
            "sharpness_A": torch.linalg.eigvalsh(dense(objective, theta, slice(-width, None)))[-1],
            "norm_A2": theta[-width:].square().sum(), "norm_Rp2": r_prime @ r_prime,
            "apart2": (r - r_prime).square().sum(), "RRY": r @ (r + y), "RpRpY": r_prime @ (r_prime + y),
        }  # fmt: skip
        if before is not None:
            d0, m0, r0, a0, f0 = before
            expected["turn"] = v @ v_before
            expected["D_error"] = (d - d0 + eta * m0 @ d0).norm() / (d - d0).norm()
            change = expected["norm_A2"] - a0
            expected["A_error"] = (change + 4 * eta / objective.n * d0 @ f0).abs() / change.abs()
            expected["e1"] = (r - r0 + eta * m0 @ r0).norm()
        for name, value in expected.items():
            assert at[name] == pytest.approx(float(value), rel=2e-6, abs=2e-7), (t, name)
        sign = 1 if at["Dv"] * float(v @ d) > 0 else -1
        assert at["Dv"] == pytest.approx(sign * float(v @ d), rel=1e-6)
        assert at["Yv"] == pytest.approx(sign * float(v @ y), rel=1e-6)
        r_prime = r_prime - eta * m @ (r_prime - (v @ r_prime) * v)
        before, v_before = (d, m, r, expected["norm_A2"], f), v
    assert run["norm_A2"].dtype == np.float64 and (run["sharpness_error"] < 1e-7 * run["sharpness"]).all()


def test_equations_2_and_4_hold_along_the_run(observed):
    run, *_ = observed
    along = run["Dv"] * (run["Dv"] + run["Yv"])
    assert np.allclose(along + run["RRY"], run["DF"], rtol=1e-5)
    small, _ = compute(dataclasses.replace(TINY, eta="1/200000", steps=3), Measure(k=1, gram=50), progress=False)
    assert float(small["A_error"].max()) < 1e-4 < float(run["A_error"].max())


def test_layers_and_spectra(observed):
    run, objective, thetas = observed
    assert run["spectral"].values.tolist() == [0, 4, 8, 12] and run["kept_eig"].values.tolist() == [1, 2, 3]
    for j, t in enumerate(run["spectral"].values):
        values, vectors = torch.linalg.eigh(dense(objective, thetas[t]))
        assert np.allclose(run["gram_eigenvalue"].values[j], values.flip(0)[:10], rtol=1e-5)
        assert float(run["smallest"].values[j]) == pytest.approx(float(values[0]), rel=1e-3, abs=1e-9)
        first = torch.linalg.eigh(dense(objective, thetas[0]))[1].flip(1)[:, :3]
        turned = (vectors.flip(1)[:, :3] * first).sum(dim=0).abs()
        assert np.allclose(run["kept"].values[j], turned, atol=1e-5)
    norms = [p.square().sum() for p in thetas[3].split([64 * 6, 36, 6])]
    assert np.allclose(run["layer_norm2"].values[3], norms, rtol=1e-6)


def test_assumption_3_5_ii_is_decided_as_by_finite_differences_along_the_flow(observed):
    run, objective, thetas = observed
    theta = thetas[4]
    gradient = objective.gradient(theta)[1]
    values, vectors = torch.linalg.eigh(dense(objective, theta))
    h = 1e-5
    later = torch.linalg.eigh(dense(objective, theta - h * gradient))[1]
    earlier = torch.linalg.eigh(dense(objective, theta + h * gradient))[1]
    later, earlier = (w * (w * vectors).sum(dim=0).sign() for w in (later, earlier))
    f = objective.outputs(theta)[:, 0]
    d = f - objective.y[:, 0]
    along = vectors.T @ d
    turning = (f @ (later - earlier)) / (2 * h)
    holds = turning * along.sign() < values * along.abs()
    assert 0 < float(holds.double().mean()) < 1
    assert float(run["aligned_share"].values[1]) == pytest.approx(float(holds.double().mean()), abs=1e-6)
    weighted = (along.square() * holds).sum() / along.square().sum()
    assert float(run["aligned_energy"].values[1]) == pytest.approx(float(weighted), abs=1e-5)


def test_r_prime_is_r_where_the_gram_matrix_stands_still():
    """For a network that is linear in its parameters M is constant, and so is v1."""
    model = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(5, 1, bias=False))
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    objective = Objective(model, "mse", x, torch.sign(x[:, :1]))
    theta, observer, eta = objective.initial(), residual.Residual(every=100), 0.1
    for t in range(20):
        observer.measure(t, eta, objective, theta)
        theta = theta - eta * objective.gradient(theta)[1]
    assert max(observer.rows["apart2"]) < 1e-15 and max(observer.rows["e1"][1:]) < 1e-7
    assert max(observer.rows["D_error"][1:]) < 1e-12 and min(observer.rows["norm_R2"]) > 1e-3


def test_a_resumed_run_has_the_same_numbers(own_root, own_cache, monkeypatch):
    measure = Measure(k=1, stride=5, gram=4)
    whole, _ = compute(TINY, measure, progress=False)
    forget(TINY, measure)
    norms, calls = residual._layer_norms, []

    def cut_off(objective, theta):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("cut off")
        return norms(objective, theta)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="cut off"):
        patched.setattr(residual, "_layer_norms", cut_off)
        compute(TINY, measure, progress=False, checkpoint_every=0.0)
    monkeypatch.setattr(residual, "_layer_norms", lambda *a: calls.append(1) or norms(*a))
    resumed, _ = compute(TINY, measure, progress=False)
    assert len(calls) == 8 + 6  # steps 7 to 12 alone
    for name in ("sharpness", "apart2", "e1", "kept", "turn", "layer_norm2"):
        assert np.array_equal(whole[name], resumed[name], equal_nan=True), name


def test_several_outputs_and_bad_settings_are_refused():
    with pytest.raises(ValueError, match="observed for one output"):
        compute(dataclasses.replace(TINY, labels="onehot"), Measure(k=1, gram=4), progress=False)
    with pytest.raises(ValueError, match="spectrum=-1"):
        compute(TINY, Measure(k=1, gram=-1), progress=False)


def test_a_gain_multiplies_the_start_and_is_part_of_the_key():
    device = torch.device("cpu")
    plain, larger = TINY, dataclasses.replace(TINY, gain="7/5")
    assert plain.key == Experiment.from_dict({k: v for k, v in plain.canonical().items() if k != "schema"}).key
    assert larger.key != plain.key and dataclasses.replace(TINY, gain=1.4).key == larger.key
    assert torch.allclose(larger.objective(device).initial(), 1.4 * plain.objective(device).initial())
    with pytest.raises(ValueError, match="gain=0"):
        dataclasses.replace(TINY, gain=0)


def test_records_know_the_code_that_observed_them(own_root, observed):
    run, *_ = observed
    records = store.Store()
    records.save(TINY.key, run.copy(), {"name": "tiny"})
    assert {"gram", "residual"} <= set(records.manifest(TINY.key)["code"]) and records.status(TINY.key).state == "fresh"
    plain, provenance = compute(dataclasses.replace(TINY, seed=101), Measure(k=1), progress=False)
    records.save("0" * 16, plain, provenance)
    assert "residual" not in records.manifest("0" * 16)["code"]


def test_a_replay_compares_the_observed_sharpness(own_root, observed):
    run, *_ = observed
    records, entry = store.Store(), catalogue.Entry("tiny", TINY, Measure(k=1, stride=5, gram=4), 0, "")
    provenance = {"name": "tiny", **json.loads(run.attrs["provenance"])}
    records.save(TINY.key, run.copy(), provenance)
    assert all(found.agrees for found in verify.replay(entry))
    moved = run.copy(deep=True)
    moved["sharpness"][3] *= 1.01
    records.save(TINY.key, moved, provenance, replace=True)
    assert not verify.replay(entry)[0].agrees
