"""Projection of a direction, forks at a step, eigenvector overlaps, and the facts of a start."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch

from eos_utils import catalogue, forks
from eos_utils.checkpoint import partial_path
from eos_utils.descent import Descent, Projection, Stop, gradient_descent
from eos_utils.experiment import Experiment, Measure
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.observers import start_facts
from eos_utils.run import compute
from eos_utils.store import Store, StoreError
from eos_utils.verify import replay


@pytest.fixture
def quadratic():
    """L = ½ Σ h_i (w_i - 1)² with h = 4, 2, 1, ½: a linear model on inputs along the axes, from w = 0."""
    h = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    x = torch.diag((4 * h).sqrt())
    y = x.sum(dim=1, keepdim=True)  # the minimum lies at w = 1
    model = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()
    return Objective(model, "half_mse", x, y), h


def test_a_projected_direction_stands_still_and_the_others_do_not_notice(quadratic):
    objective, h = quadratic
    eta, steps = 0.3, 12
    ends = {}
    for eig in (None, 1, 3):
        projection = None if eig is None else Projection(eig, at_step=2, every=1)
        descent = Descent(objective.initial(), eta)
        ends[eig] = gradient_descent(objective, descent, Stop(steps), projection=projection).theta
    free = 1 - (1 - eta * h) ** steps
    assert torch.allclose(ends[None], free, atol=1e-9)
    for eig in (1, 3):
        expected = free.clone()
        expected[eig - 1] = 1 - (1 - eta * h[eig - 1]) ** 2  # where it was when the projection began
        assert torch.allclose(ends[eig], expected, atol=1e-4), eig


def test_the_projected_direction_is_followed_through_a_crossing():
    """Two eigenvalues that swap order: the direction held is the one that it was, not the one that is largest."""

    class Crossing:
        def __init__(self):
            self.values = [3.0, 2.0, 1.0]

        def update(self, operator):
            order = np.argsort(self.values)[::-1]
            pairs = type("Pairs", (), {})()
            pairs.vectors = torch.eye(3, dtype=torch.float64)[:, order.copy()]
            return pairs

    model = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(3, 1, bias=False)).double()
    objective = Objective(model, "half_mse", torch.eye(3).double(), torch.ones(3, 1).double())
    projection = Projection(1, at_step=0, every=1)
    projection.tracker = Crossing()
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert projection(0, objective, objective.initial(), g).tolist() == [0.0, 2.0, 3.0]
    projection.tracker.values = [2.0, 3.0, 1.0]
    assert projection(1, objective, objective.initial(), g).tolist() == [0.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [{"eig": 0}, {"eig": True}, {"every": 0}, {"at_step": -1}, {"direction": 1}])
def test_bad_projections_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="project"):
        Experiment(project=bad)


def test_a_projected_run_resumes_bit_for_bit(tiny, monkeypatch):
    from eos_utils import run

    experiment = dataclasses.replace(tiny, project={"eig": 1, "at_step": 20, "every": 3})
    measure = Measure(k=2, stride=3, overlaps=True)
    whole, _ = compute(experiment, measure, progress=False)
    run.forget(experiment, measure)
    free, _ = compute(tiny, measure, progress=False)
    assert np.array_equal(whole["loss"][:21], free["loss"][:21]) and not np.array_equal(whole["loss"], free["loss"])

    def interrupted(*arguments, after_step, **options):
        def once(descent):
            if descent.step == 27:
                signal.raise_signal(signal.SIGINT)
            after_step(descent)

        return gradient_descent(*arguments, after_step=once, **options)

    with monkeypatch.context() as patched:
        patched.setattr(run, "gradient_descent", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compute(experiment, measure, progress=False)
    assert torch.load(partial_path(experiment, measure), weights_only=True)["projection"]["v"] is not None
    resumed, _ = compute(experiment, measure, progress=False)
    for name in ("loss", "eigenvalue", "overlap"):
        assert np.array_equal(whole[name], resumed[name]), name


def test_overlaps_are_those_of_dense_eigenvectors(tiny):
    experiment = dataclasses.replace(tiny, dtype="float64", steps=6)
    result, _ = compute(
        experiment, Measure(k=3, stride=3, tol=1e-8, overlaps=True, snapshots=(0, 3, 6)), progress=False
    )
    assert np.allclose(np.abs(result["overlap"].values[0]), np.eye(3), atol=1e-6)
    objective = experiment.objective(torch.device("cpu"))
    tops = []
    for theta in result["theta"].values[:3]:
        t = torch.from_numpy(theta)
        dense = torch.autograd.functional.hessian(lambda z: objective._share(z, objective.x, objective.y)[0], t)
        tops.append(torch.linalg.eigh(dense)[1].flip(1)[:, :3])
    for i in (1, 2):
        expected = (tops[i].T @ tops[i - 1]).abs().numpy()
        assert np.allclose(np.abs(result["overlap"].values[i]), expected, atol=1e-4)


def test_measurements_can_begin_late(tiny):
    result, _ = compute(tiny, Measure(k=2, stride=5, since=17), progress=False)
    assert result["measured"].values.tolist() == [20, 25, 30, 35, 40] and result.sizes["step"] == 41


def test_a_fork_at_a_step_continues_its_base_and_keeps_the_point(tiny, own_root):
    store = Store()
    base, provenance = compute(tiny, Measure(k=2, stride=5), progress=False)
    store.save(tiny.key, base, provenance)
    fork = dataclasses.replace(tiny, steps=10, fork={"of": tiny.key, "at": 25, "size": 0, "seed": 0})
    result, _ = compute(fork, Measure(k=2, stride=5), progress=False)
    assert np.array_equal(result["step"], np.arange(25, 36))
    assert np.array_equal(result["loss"], base["loss"].sel(step=slice(25, 35)))
    points = forks.data.cache_folder() / "points"
    known = store.manifest(tiny.key)["sha256"][:8]
    assert [p.name for p in points.iterdir()] == [f"{tiny.key}-{known}-25.pt"]
    # A later point starts from the one kept, and a decay at the fork acts at once.
    decayed = dataclasses.replace(fork, fork={**fork.fork, "at": 30}, decay={"factor": "1/4", "at_step": 30})
    result, _ = compute(decayed, Measure(k=2, stride=5), progress=False)
    assert float(result["loss"][0]) == float(base["loss"].sel(step=30))
    assert np.allclose(result["eta"], float(tiny.step_size) / 4) and result.attrs["decayed_at"] == 30
    entry = catalogue.Entry("fork", fork, Measure(k=2, stride=5), 0, "")
    saved, provenance = compute(fork, Measure(k=2, stride=5), progress=False)
    store.save(fork.key, saved, provenance)
    torch.save(torch.zeros(3), next(points.glob("*-25.pt")))  # kept points are for recording, not for verifying
    (found,) = replay(entry)
    assert found.agrees and found.slack == 1 and found.loss < 1e-6
    right = saved["eigenvalue"].copy()
    for factor, agrees in {1.01: False, 1.05: False}.items():
        saved["eigenvalue"] = right * factor
        store.save(fork.key, saved, provenance, replace=True)
        assert replay(entry)[0].agrees is agrees
    # Where rounding has grown since the base was recorded, a point is known roughly; five per cent are still seen.
    base["loss"] = base["loss"] * (1 + 3e-4)
    store.save(tiny.key, base, json.loads(base.attrs["provenance"]), replace=True)
    for factor, agrees in {1.01: True, 1.05: False}.items():
        saved["eigenvalue"] = right * factor
        store.save(fork.key, saved, provenance, replace=True)
        (found,) = replay(entry)
        assert found.slack == 5 and found.agrees is agrees


def test_a_fork_at_a_step_that_is_not_there_or_does_not_fit_is_refused(tiny, own_root):
    store = Store()
    base, provenance = compute(tiny, Measure(k=2, stride=5), progress=False)
    store.save(tiny.key, base, provenance)
    fork = {"of": tiny.key, "at": 41, "size": 0, "seed": 0}
    with pytest.raises(ValueError, match="steps 0 to 40"):
        compute(dataclasses.replace(tiny, fork=fork), Measure(k=2), progress=False)
    base["loss"][3] *= 1.01
    store.save(tiny.key, base, provenance, replace=True)
    with pytest.raises(StoreError, match="the loss at step 3 is off by"):
        compute(dataclasses.replace(tiny, fork={**fork, "at": 9}), Measure(k=2), progress=False)


def test_a_long_replay_may_be_off_by_more_and_a_chaotic_one_by_much():
    """What two machines differ by below the edge passes, a loss that is another run's does not."""
    assert forks.tolerance(100, calm=2000) < 2e-3 and 1.1e-3 < forks.tolerance(1455, calm=2000) < 2e-2
    assert forks.tolerance(1455, calm=1400) == 0.5 == forks.tolerance(50, calm=50)


def test_facts_of_a_start_on_data_that_is_known():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    y = torch.tensor([[1.0], [-1.0], [-1.0]])
    model = fully_connected(2, width=2, outputs=1, seed=0)
    objective = Objective(model, "half_mse", x, y)
    theta = objective.initial()
    theta[:6] = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 0.0])  # units x1 - x2 and x2 - x1, biases 0
    facts = start_facts(objective, theta)
    assert facts["cosine_largest"] == pytest.approx(0.5**0.5) and facts["cosine_median"] == pytest.approx(0.5**0.5)
    assert (facts["norm_smallest"], facts["norm_largest"]) == pytest.approx((1.0, 18**0.5))
    assert facts["labels_imbalance"] == pytest.approx(1 / 3) and facts["labels_zero"] == 0
    assert (facts["positives"], facts["negatives"]) == (1, 2)
    assert facts["active_positive_largest"] == 1.0  # the first unit
    assert facts["active_negative_largest"] == 0.5  # the second: on (0, 2), not on (3, 3)


def test_every_new_record_carries_the_facts(short, sparse):
    result, _ = compute(short, sparse, progress=False)
    facts = json.loads(result.attrs["start"])
    assert facts["labels_zero"] == pytest.approx(0.9) and 0 < facts["cosine_median"] < facts["cosine_largest"] <= 1.001
