"""Gradient descent against closed forms; schedules, stopping, divergence; what observers see."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from eos_utils import data
from eos_utils.descent import Decay, Descent, Stop, gradient_descent
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.observers import ENTRY_WINDOW, Eigenvalues, Snapshots, entry_index


class Quadratic:
    """Linear regression with one output: L = ½ (θ - θ*)ᵀ H (θ - θ*) + least, H = XᵀX / n, in closed form."""

    def __init__(self, eigenvalues=(2.0, 0.5, 0.1), dtype=torch.float64):
        d = len(eigenvalues)
        q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        x = math.sqrt(d) * torch.tensor(eigenvalues, dtype=torch.float64).sqrt()[:, None] * q  # n = d rows
        self.best = torch.arange(1.0, d + 1, dtype=torch.float64)
        self.h = x.T @ x / d
        x, y = x.to(dtype), (x @ self.best)[:, None].to(dtype)
        model = nn.Sequential(nn.Flatten(1), nn.Linear(d, 1, bias=False))
        self.objective = Objective(model, "half_mse", x, y)
        self.start = torch.zeros(d, dtype=dtype)

    def after(self, etas):
        """θ after steps of these sizes: products of (1 - ηH)."""
        error = -self.best
        for eta in etas:
            error = error - eta * self.h @ error
        return self.best + error

    def loss(self, theta):
        error = theta - self.best
        return float(0.5 * error @ self.h @ error)


class Counting:
    """An observer that notes when it was called, and declares entry from a given step on."""

    def __init__(self, entry=None, stride=1):
        self.calls, self.entry, self.stride = [], entry, stride

    def due(self, step):
        return step % self.stride == 0

    def measure(self, step, eta, objective, theta):
        self.calls.append((step, eta, theta.clone()))

    def entered(self):
        return int(self.entry is not None and bool(self.calls) and self.calls[-1][0] >= self.entry)

    def state(self):
        return {}

    def load_state(self, state):
        pass


# ---- the closed form -----------------------------------------------------------------------------------


def test_iterates_and_series_follow_the_closed_form():
    quadratic, seen = Quadratic(), Counting()
    descent = gradient_descent(quadratic.objective, Descent(quadratic.start, 0.3), Stop(25), observers=[seen])
    assert (descent.status, descent.step) == ("steps", 25)
    torch.testing.assert_close(descent.theta, quadratic.after([0.3] * 25))
    assert {name: len(series) for name, series in descent.series.items()} == {"loss": 26, "accuracy": 26, "eta": 26}
    assert descent.series["eta"] == [0.3] * 26
    wanted = [quadratic.loss(quadratic.after([0.3] * t)) for t in range(26)]
    np.testing.assert_allclose(descent.series["loss"], wanted, rtol=1e-10)
    assert [step for step, _, _ in seen.calls] == list(range(26))
    for t, (_, eta, theta) in enumerate(seen.calls):
        assert eta == 0.3
        torch.testing.assert_close(theta, quadratic.after([0.3] * t))


def test_zero_steps_measure_the_start_and_move_nothing():
    quadratic, seen = Quadratic(), Counting()
    descent = gradient_descent(quadratic.objective, Descent(quadratic.start, 0.3), Stop(0), observers=[seen])
    assert torch.equal(descent.theta, quadratic.start) and len(seen.calls) == 1 and descent.status == "steps"


def test_after_step_sees_every_step_and_a_run_can_be_cut_in_two():
    quadratic, steps = Quadratic(), []
    whole = gradient_descent(
        quadratic.objective, Descent(quadratic.start, 0.3), Stop(20), after_step=lambda d: steps.append(d.step)
    )
    assert steps == [*range(1, 21), 20]
    part = gradient_descent(quadratic.objective, Descent(quadratic.start, 0.3), Stop(8))
    part.status = "running"
    for series in part.series.values():
        series.pop()  # the step at which it was cut is done again
    again = gradient_descent(quadratic.objective, Descent.from_state(part.state()), Stop(20))
    assert torch.equal(again.theta, whole.theta) and again.series == whole.series


@pytest.mark.parametrize("eta", [0.0, -0.1, math.nan, math.inf])
def test_step_sizes_that_are_not_positive_are_refused(eta):
    quadratic = Quadratic()
    with pytest.raises(ValueError, match="step size must be positive"):
        gradient_descent(quadratic.objective, Descent(quadratic.start, eta), Stop(3))


# ---- schedules -----------------------------------------------------------------------------------------


def test_decay_at_a_step():
    quadratic = Quadratic()
    descent = gradient_descent(
        quadratic.objective, Descent(quadratic.start, 0.4), Stop(12), decay=Decay(0.25, at_step=5)
    )
    etas = [0.4] * 5 + [0.1] * 8
    assert descent.decayed_at == 5 and descent.series["eta"] == pytest.approx(etas)
    torch.testing.assert_close(descent.theta, quadratic.after(etas[:12]))  # once, and not again


def test_a_run_ends_so_many_steps_after_its_decay():
    quadratic = Quadratic()
    done = gradient_descent(
        quadratic.objective, Descent(quadratic.start, 0.4), Stop(50), decay=Decay(0.25, at_step=5, then=7)
    )
    assert (done.step, done.status, done.decayed_at) == (12, "steps", 5)
    assert torch.allclose(done.theta, quadratic.after([0.4] * 5 + [0.1] * 7), atol=1e-12)


def test_decay_on_entry_waits_for_an_observer():
    quadratic = Quadratic()
    for entry, wanted in ((6, 6), (None, None)):
        descent = gradient_descent(
            quadratic.objective,
            Descent(quadratic.start, 0.4),
            Stop(12),
            decay=Decay(0.5, entered=1),
            observers=[Counting(), Counting(entry)],
        )
        assert descent.decayed_at == wanted
        etas = [0.4 if wanted is None or t < wanted else 0.2 for t in range(13)]
        assert descent.series["eta"] == pytest.approx(etas)


@pytest.mark.parametrize("entered, decayed", [(1, ENTRY_WINDOW - 1), (2, None)])
def test_decay_when_an_eigenvalue_has_entered(entered, decayed):
    """λ1·η/2 is 0.99 throughout, so that entry is established by the first full window; λ2 stays below."""
    quadratic = Quadratic((2.0, 1.0, 0.1))
    descent = gradient_descent(
        quadratic.objective,
        Descent(quadratic.start, 0.99),
        Stop(30),
        decay=Decay(0.5, entered=entered),
        observers=[Eigenvalues(2, stride=1)],
    )
    assert descent.decayed_at == decayed
    etas = [0.99 if decayed is None or t < decayed else 0.495 for t in range(30)]
    torch.testing.assert_close(descent.theta, quadratic.after(etas))


@pytest.mark.parametrize("arguments, named", [
    ({"factor": 0.0, "at_step": 3}, "factor=0.0: must be positive"),
    ({"factor": -1.0, "at_step": 3}, "must be positive"),
    ({"factor": math.nan, "at_step": 3}, "must be positive"),
    ({"factor": 0.5}, "exactly one of at_step and entered"),
    ({"factor": 0.5, "at_step": 3, "entered": 1}, "exactly one of at_step and entered"),
])  # fmt: skip
def test_bad_decays_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        Decay(**arguments)


# ---- stopping ------------------------------------------------------------------------------------------


def test_stops_at_the_first_step_with_the_wanted_accuracy():
    loaded = data.digits(100)
    objective = Objective(fully_connected(64, 16), "half_mse", loaded.x, loaded.y)
    descent = gradient_descent(objective, Descent(objective.initial(), 0.3), Stop(2000, accuracy=0.9))
    assert descent.status == "accuracy" and 0 < descent.step < 2000
    right = (objective.outputs(descent.theta).argmax(dim=1) == loaded.classes).double().mean()
    assert descent.series["accuracy"][-1] == pytest.approx(float(right)) and float(right) >= 0.9
    assert max(descent.series["accuracy"][:-1]) < 0.9


def test_stops_at_the_first_step_with_the_wanted_loss():
    quadratic = Quadratic()
    descent = gradient_descent(quadratic.objective, Descent(quadratic.start, 0.3), Stop(2000, loss=0.01))
    first = next(t for t in range(2000) if quadratic.loss(quadratic.after([0.3] * t)) <= 0.01)
    assert (descent.status, descent.step) == ("loss", first) and len(descent.series["loss"]) == first + 1
    with pytest.raises(ValueError, match="steps=-1"):
        Stop(-1)


# ---- divergence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_keeps_what_was_recorded(dtype):
    quadratic, seen = Quadratic(dtype=dtype), Counting()
    descent = gradient_descent(
        quadratic.objective, Descent(quadratic.start, 1000.0), Stop(10_000), observers=[seen, Eigenvalues(1, 3)]
    )
    assert descent.status == "diverged" and 2 < descent.step < 200
    losses = descent.series["loss"]
    assert len(losses) == descent.step == len(seen.calls) and np.isfinite(losses).all()  # none for the last step
    assert descent.finite_loss == losses[-1] > 1e20
    assert losses[3] == pytest.approx(quadratic.loss(quadratic.after([1000.0] * 3)), rel=1e-4)


def test_a_hessian_that_overflows_before_the_loss_is_a_divergence_too():
    loaded = data.digits(100)
    ended = []
    for eta in (10.0, 30.0, 100.0):
        objective = Objective(fully_connected(64, 6, depth=3), "half_mse", loaded.x, loaded.y)
        descent = gradient_descent(
            objective, Descent(objective.initial(), eta), Stop(12), observers=[Eigenvalues(2, stride=1)]
        )
        ended.append(descent.status)
    assert set(ended) <= {"diverged", "steps"} and "diverged" in ended


# ---- entry into EoS ------------------------------------------------------------------------------------


def test_entry_index():
    assert entry_index(np.zeros(100)) is None
    assert entry_index(np.array([])) is None
    assert entry_index(np.ones(20)) is None  # no full window yet
    assert entry_index(np.ones(21)) == entry_index(np.ones(100)) == 10
    assert entry_index(np.full(50, 0.98)) == 10 and entry_index(np.full(50, np.nextafter(0.98, 0))) is None
    for m in (15, 40, 60):
        assert entry_index(np.where(np.arange(100) < m, 0.9, 1.0)) == m  # the median steps with the signal
    spikes = np.where(np.arange(100) % 3 == 0, 5.0, 0.9)
    assert entry_index(spikes) is None  # a spike now and then is no entry
    oscillating = np.where(np.arange(100) < 30, 0.5, 1.0 + 0.3 * (-1.0) ** np.arange(100))
    assert entry_index(oscillating) == 40  # the first window with 11 of 21 above: steps 30 to 50


def test_entered_counts_eigenvalues_at_the_step_size_of_their_time():
    eigenvalues = Eigenvalues(3, stride=1)
    assert eigenvalues.entered() == 0 and math.isnan(eigenvalues.latest())
    eigenvalues.rows["eigenvalue"] = [[20.0, 19.9, 5.0]] * 30
    eigenvalues.rows["eta"] = [0.1] * 30
    eigenvalues.rows["step"] = list(range(30))
    assert eigenvalues.entered() == 2 and eigenvalues.latest() == pytest.approx(1.0)
    eigenvalues.rows["eta"] = [0.05] * 30
    assert eigenvalues.entered() == 0


def with_history(stride, pairs=False, level=1.0):
    """An observer that has seen λ1·η/2 = level 21 times, and a point to measure at."""
    quadratic = Quadratic((2.0, 0.5, 0.1))
    eigenvalues = Eigenvalues(1, stride, pairs)
    for name in eigenvalues.FIELDS:
        eigenvalues.rows[name] = [0] * ENTRY_WINDOW
    eigenvalues.rows["eigenvalue"] = [[2.0 * level]] * ENTRY_WINDOW
    eigenvalues.rows["eta"] = [1.0] * ENTRY_WINDOW
    return eigenvalues, quadratic


def test_an_even_stride_warns_past_entry_and_only_once():
    eigenvalues, quadratic = with_history(stride=4)
    with pytest.warns(UserWarning, match="stride=4 is even.*odd stride or in pairs"):
        eigenvalues.measure(84, 1.0, quadratic.objective, quadratic.start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eigenvalues.measure(88, 1.0, quadratic.objective, quadratic.start)


@pytest.mark.parametrize("stride, pairs, level", [(3, False, 1.0), (4, True, 1.0), (4, False, 0.5), (1, False, 1.0)])
def test_no_warning_for_odd_strides_for_pairs_and_before_entry(stride, pairs, level):
    eigenvalues, quadratic = with_history(stride, pairs, level)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eigenvalues.measure(84, level, quadratic.objective, quadratic.start)


def test_eigenvalues_are_due_at_the_stride_and_in_pairs():
    assert [t for t in range(11) if Eigenvalues(1, 5).due(t)] == [0, 5, 10]
    assert [t for t in range(12) if Eigenvalues(1, 5, pairs=True).due(t)] == [0, 1, 5, 6, 10, 11]
    assert all(Eigenvalues(1, 1, pairs=pairs).due(t) for t in range(5) for pairs in (True, False))


def test_measured_rows_hold_the_closed_form():
    quadratic, eigenvalues = Quadratic(), Eigenvalues(2, stride=3)
    gradient_descent(quadratic.objective, Descent(quadratic.start, 0.3), Stop(7), observers=[eigenvalues])
    rows = eigenvalues.rows
    assert rows["step"] == [0, 3, 6] and rows["eta"] == [0.3] * 3
    np.testing.assert_allclose(rows["eigenvalue"], [[2.0, 0.5]] * 3, rtol=1e-3)
    assert (np.array(rows["upper"]) >= np.array([2.0, 0.5]) - 1e-12).all()
    assert eigenvalues.latest() == pytest.approx(2.0 * 0.3 / 2, rel=1e-3)


def test_snapshots_at_steps_at_entry_and_at_the_end():
    quadratic, eigenvalues = Quadratic(), Eigenvalues(1, stride=1)
    snapshots = Snapshots((0, 5, "entry", "end"), eigenvalues)
    gradient_descent(quadratic.objective, Descent(quadratic.start, 0.99), Stop(30), observers=[eigenvalues, snapshots])
    assert snapshots.rows["label"] == ["0", "5", "entry"] and snapshots.rows["step"] == [0, 5, ENTRY_WINDOW - 1]
    for step, theta in zip(snapshots.rows["step"], snapshots.rows["theta"], strict=True):
        torch.testing.assert_close(theta, quadratic.after([0.99] * step))


@pytest.mark.parametrize("make, named", [
    (lambda: Eigenvalues(0, 1), "k=0"),
    (lambda: Eigenvalues(2, 0), "stride=0"),
    (lambda: Eigenvalues(2, -5), "stride=-5"),
    (lambda: Snapshots(("start",), None), "snapshot='start' is unknown"),
    (lambda: Snapshots(("entry",), None), "entry needs eigenvalues"),
])  # fmt: skip
def test_bad_observers_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
