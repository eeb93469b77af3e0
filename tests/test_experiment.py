"""Experiments: what makes a run another run, and what is refused before anything runs."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eos_utils.experiment import Experiment, Measure, as_two_over, rational

# ---- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, wanted", [
    ("2/50", Fraction(1, 25)),
    ("1/25", Fraction(1, 25)),
    ("0.04", Fraction(1, 25)),
    ("4e-2", Fraction(1, 25)),
    (" 2/50 ", Fraction(1, 25)),
    (0.04, Fraction(1, 25)),
    (np.float64(0.04), Fraction(1, 25)),
    (Fraction(2, 50), Fraction(1, 25)),
    (2, Fraction(2)),
    (np.int64(2), Fraction(2)),
    (1e-6, Fraction(1, 10**6)),
    ("1e-6", Fraction(1, 10**6)),
])  # fmt: skip
def test_numbers_and_fractions_are_parsed(value, wanted):
    assert rational(value) == wanted


@pytest.mark.parametrize("value", [
    "", "2/0", "nan", "inf", "-inf", "0", 0, "0.0", "-2/50", -0.1, "2/-50", "2/50/3", "1+1", "2*3", "eta",
    "__import__('os').getpid()", "2/(50)", True, False, None, [], (2, 50), {}, 1j, float("nan"), float("inf"),
    "1e400", "1e-400", "1e99999999999", "1" * 400, 10**400, object(),
])  # fmt: skip
def test_all_else_is_refused_by_name(value):
    with pytest.raises(ValueError, match="^eta="):
        rational(value)


@given(st.text(alphabet="0123456789./eE+-_ ()x", max_size=12))
def test_text_is_a_positive_number_or_refused(text):
    try:
        number = rational(text)
    except ValueError:
        return
    assert isinstance(number, Fraction) and number > 0 and np.isfinite(float(number))
    assert rational(str(number)) == number


def test_as_two_over():
    assert as_two_over(Fraction(2, 30)) == "2/30" and as_two_over(Fraction(1)) == "2/2"
    assert as_two_over(Fraction(3, 7)) == "3/7"
    for over in (30, 50, 150, 200):
        assert rational(as_two_over(Fraction(2, over))) == Fraction(2, over)


# ---- keys ----------------------------------------------------------------------------------------------


def key_of(canonical_json):
    return hashlib.sha256(canonical_json.encode()).hexdigest()[:16]


def test_key_is_the_hash_of_what_differs_from_the_defaults():
    assert Experiment().key == key_of('{"schema":1}')
    assert Experiment(seed=3, eta="2/50").key == key_of('{"eta":"1/25","schema":1,"seed":3}')
    assert Experiment(labels="pair", classes=[0, 1]).key == key_of('{"classes":[0,1],"labels":"pair","schema":1}')


def test_key_does_not_depend_on_how_an_experiment_is_written():
    key = Experiment(eta="2/50", seed=3).key
    fields = {"seed": 3, "eta": 0.04}
    assert Experiment.from_dict(fields).key == Experiment.from_dict(dict(reversed(fields.items()))).key == key
    for eta in ("1/25", "0.04", 0.04, "4e-2", Fraction(4, 100)):
        assert Experiment(eta=eta, seed=3).key == key
    assert Experiment(eta="2/50", seed=3, dataset="cifar10", n=5000, depth=1).key == key  # defaults written out
    assert Experiment(eta="2/30").key == Experiment(eta="1/15").key == Experiment().key
    assert Experiment(classes=[0, 1], n=9).key == Experiment(classes=(0, 1), n=9).key
    again = {k: v for k, v in Experiment(eta="2/50", seed=3).canonical().items() if k != "schema"}
    assert Experiment.from_dict(again).key == key


@pytest.mark.parametrize("name, a, b", [
    ("decay", {"factor": "1/4", "at_step": 3}, {"at_step": 3, "factor": 0.25}),
    ("fork", {"of": "k", "at": "end", "size": "1e-6", "seed": 1}, {"of": "k", "at": "end", "seed": 1, "size": 1e-6}),
])  # fmt: skip
def test_nested_numbers_are_written_in_one_way(name, a, b):
    assert Experiment(**{name: a}).key == Experiment(**{name: b}).key != Experiment().key


def test_every_field_that_changes_the_dynamics_changes_the_key():
    others = {
        "dataset": "digits", "n": 100, "labels": "vehicles", "classes": (1, 2), "preprocessing": "standardize",
        "network": "resnet18", "width": 64, "depth": 2, "activation": "tanh", "bias": False, "init": "fan_in",
        "loss": "mse", "eta": "2/50", "decay": {"factor": "1/2", "at_step": 5}, "steps": 5, "stop_accuracy": 0.9,
        "stop_loss": 0.1, "seed": 1, "dtype": "float64", "fork": {"of": "k", "at": "end", "size": "1/2", "seed": 0},
        "project": {"eig": 2}, "gain": "7/5",
    }  # fmt: skip
    assert set(others) == set(Experiment.__dataclass_fields__)
    keys = [Experiment(**{name: value}).key for name, value in others.items()]
    assert len({*keys, Experiment().key}) == len(others) + 1


def test_what_is_measured_is_no_part_of_the_experiment():
    assert not set(Measure.__dataclass_fields__) & set(Experiment.__dataclass_fields__)
    with pytest.raises(ValueError, match="'stride' is no field"):
        Experiment.from_dict({"stride": 5})


def test_step_size_and_threshold():
    experiment = Experiment(eta="2/30")
    assert experiment.step_size == 2 / 30 and experiment.threshold == 30.0 and experiment.eta == "1/15"
    assert experiment.schedule() is None
    decay = Experiment(decay={"factor": "1/4", "entered": 2}).schedule()
    assert (decay.factor, decay.at_step, decay.entered) == (0.25, None, 2)


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, named", [
    ({"etta": 0.1}, "'etta' is no field of an experiment; there are dataset, n"),
    ({"eta": 0}, "eta=0: must be positive"),
    ({"eta": "-2/50"}, "eta=-2/50: must be positive"),
    ({"dataset": "mnist"}, "dataset='mnist' is unknown; choose one of cifar10, digits"),
    ({"activation": "gelu"}, "activation='gelu' is unknown"),
    ({"loss": "hinge"}, "loss='hinge' is unknown"),
    ({"labels": "hot"}, "labels='hot' is unknown"),
    ({"preprocessing": "pca"}, "preprocessing='pca' is unknown"),
    ({"network": "vgg"}, "network='vgg' is unknown; choose one of fc, resnet18"),
    ({"init": "xavier"}, "init='xavier' is unknown"),
    ({"dtype": "float16"}, "dtype='float16' is unknown"),
    ({"n": 0}, "n=0"),
    ({"n": 2.0}, "n=2.0: must be an integer"),
    ({"width": True}, "width=True: must be an integer"),
    ({"depth": 0}, "depth=0: must be at least 1"),
    ({"steps": -1}, "steps=-1"),
    ({"steps": 2.5}, "steps=2.5"),
    ({"steps": "10"}, "steps='10'"),
    ({"seed": "x"}, "seed='x'"),
    ({"seed": -1}, "seed=-1"),
    ({"bias": "no"}, "bias='no'"),
    ({"stop_accuracy": 99}, "stop_accuracy=99"),
    ({"stop_accuracy": "0.9"}, "stop_accuracy='0.9'"),
    ({"stop_accuracy": float("nan")}, "stop_accuracy=nan"),
    ({"stop_loss": -1.0}, "stop_loss=-1.0"),
    ({"classes": (3, 99)}, "classes"),
    ({"classes": ("cat",)}, "classes"),
    ({"labels": "pair"}, "pair"),
    ({"decay": {"factor": "1/4"}}, "at_step"),
    ({"decay": {"factor": "1/4", "at_step": 3, "entered": 1}}, "at_step"),
    ({"decay": {"factor": "-1/4", "at_step": 3}}, "decay factor=-1/4: must be positive"),
    ({"decay": {"at_step": 3}}, "factor"),
    ({"decay": {"factor": "1/4", "at_stepp": 3}}, "at_stepp"),
    ({"decay": {"factor": "1/4", "at_step": "soon"}}, "at_step"),
    ({"fork": {"of": "k", "at": "end", "size": "1/2"}}, "seed"),
    ({"fork": {"of": "k", "at": "end", "size": -1, "seed": 1}}, "size"),
])  # fmt: skip
def test_bad_fields_are_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        Experiment.from_dict(fields)


# ---- what it builds --------------------------------------------------------------------------------------


def test_objective_has_the_networks_layout_and_precision(tiny):
    objective = tiny.objective(torch.device("cpu"))
    assert objective.P == 64 * 8 + 8 + 8 * 10 + 10 == len(objective.initial()) and objective.n == 200
    assert objective.dtype == torch.float32 and objective.loss.name == "half_mse"
    other = Experiment(dataset="digits", n=50, width=3, depth=2, bias=False, labels="vehicles", dtype="float64")
    objective = other.objective(torch.device("cpu"))
    assert objective.P == 64 * 3 + 3 * 3 + 3 and objective.dtype == torch.float64 and objective.y.shape == (50, 1)


def test_the_seed_chooses_the_initialisation(tiny):
    def start(seed):
        return Experiment(dataset="digits", n=20, width=4, seed=seed).objective(torch.device("cpu")).initial()

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_measure_makes_its_observers():
    eigenvalues, snapshots = Measure(k=3, stride=7, pairs=True, tol=1e-2, snapshots=("entry", 5)).observers()
    assert (eigenvalues.tracker.k, eigenvalues.stride, eigenvalues.pairs, eigenvalues.tracker.tol) == (3, 7, True, 1e-2)
    assert snapshots.at == ("entry", 5) and snapshots.eigenvalues is eigenvalues
    for bad in (Measure(k=0), Measure(stride=0), Measure(snapshots=("start",))):
        with pytest.raises(ValueError):
            bad.observers()
