"""What the page of recorded runs holds: every recorded value, the phases and the anomaly points."""

import base64
import json
import re
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from eos_utils import anomalies, catalogue, lab_runs, phases
from eos_utils.experiment import subscript
from eos_utils.store import Store

ROUNDING = 2.0**-24  # of a 32-bit float, relative
SG = [name for name in lab_runs.RUNS if name.startswith("sg_")]


class Record(dict):
    """The arrays of a recorded run, read without this package's reader."""

    def __init__(self, key):
        with h5py.File(Store().folder / Store().manifest(key)["file"]) as file:
            super().__init__({name: values[()] for name, values in file.items() if name != "theta"})


@pytest.fixture(scope="module")
def runs():
    return lab_runs.load("")


@pytest.fixture(scope="module")
def html(runs):
    return lab_runs.embed(lab_runs.setting(runs), SimpleNamespace(data="<img>")).data


@pytest.fixture(scope="module")
def held(html):
    text = re.search(r'<script type="application/json">(.*)</script>', html, re.S)[1]
    return {run["name"]: run for run in json.loads(text)}


def decoded(series):
    values = np.frombuffer(base64.b64decode(series["values"]), "<f4").astype(float)
    return series["begin"] + series["stride"] * np.arange(len(values)), values


def agree(series, steps, values, first=0):
    """The recorded values at the recorded steps, and nothing between them, among the steps from ``first`` on."""
    x, y = decoded(series)
    assert np.array_equal(x[x >= first], steps)
    assert (np.abs(y[x >= first] - values) <= ROUNDING * np.abs(values)).all()


@pytest.mark.parametrize("name", lab_runs.RUNS)
def test_the_page_holds_every_recorded_value(held, name):
    experiment = catalogue.find(name).experiment
    record, series = Record(experiment.key), {s["name"]: s for s in held[name]["series"]}
    first = record["step"][0]
    agree(series.pop("loss"), record["step"], record["loss"], first)
    if name in SG:
        agree(series.pop("‖A‖²"), record["observed"], record["norm_A2"])
        agree(series.pop("λ₁"), record["observed"], record["sharpness"])
        agree(series.pop("λ₂"), record["observed"], record["second"])
        tops, steps, begin = record["gram_eigenvalue"], record["spectral"], 3
    else:
        tops, steps, begin = record["eigenvalue"], record["measured"], 1
    for i in range(begin, tops.shape[1] + 1):
        agree(series.pop(f"λ{subscript(i)}"), steps, tops[:, i - 1], first)
    assert series == {}
    if experiment.fork:  # before it, its base run
        base = Record(experiment.fork["of"])
        loss, top = (next(s for s in held[name]["series"] if s["name"] == label) for label in ("loss", "λ₁"))
        for each, steps, values in ((loss, "step", base["loss"]), (top, "measured", base["eigenvalue"][:, 0])):
            x, y = decoded(each)
            before = base[steps] < first
            assert np.array_equal(x[x < first], base[steps][before]) and before.sum() > 100
            assert np.allclose(y[x < first], values[before], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", SG)
def test_phases_and_anomaly_points_are_those_of_the_analysis(held, runs, name):
    labels, run = np.zeros(runs[name].sizes["observed"], dtype=int), held[name]
    codes = {word: code for code, word in phases.NAMES.items()}
    for begin, end, word in run["phases"]:
        assert not labels[begin : end + 1].any()
        labels[begin : end + 1] = codes[word]
    assert np.array_equal(labels, phases.labels_of(runs[name]))
    record, points = Record(catalogue.find(name).experiment.key), set(run["anomalies"])
    rise, grow = (np.diff(record[k].astype(float)) for k in ("sharpness", "norm_A2"))
    sure = np.abs(rise) >= 3 * np.maximum(record["sharpness_error"][1:], record["sharpness_error"][:-1])
    assert points == set(np.flatnonzero(rise * grow * sure < 0).tolist())
    counted = len(points) / sure.sum()
    assert anomalies.anomaly_share(runs[name]) == pytest.approx(counted, abs=2e-3)


def test_what_the_edge_and_the_titles_say(held):
    assert held["fg_fig3_after1_seed100"]["edges"] == [[0, 30.0], [2100, 120.0]]
    assert held["fg_fig5_tanh_mse_seed100"]["edges"] == [[0, 50.0], [4500, 200.0]]
    assert held["sg_lin3_seed100"]["edges"] == [[0, pytest.approx(2 / 0.007)]]
    assert held["fg_fig5_relu_ce_seed100"]["title"] == (
        "ReLU, 1 hidden layer of 128, cross-entropy, 2/η = 50, 200 from step 1,600"
    )
    assert len({(run["title"], run["about"]) for run in held.values()}) == len(held) == len(lab_runs.RUNS)


def test_the_data_leave_room_in_the_page(html):
    assert len(html.encode()) < 550_000


def test_the_picture_is_of_both_kinds_of_runs(runs):
    first, second, _, loss = lab_runs.panels(runs)
    assert first.level == 30 and not first.spans and len(first.curves) == 6
    assert second.level == pytest.approx(2 / 0.007) and {name for *_, name in loss.spans} >= {"I", "II", "III", "IV"}
    assert loss.curves[0].y[-1] == runs["sg_lin3_seed100"]["loss"][-1]


def test_another_choice_and_a_live_run():
    tiny = {"dataset": "digits", "n": 30, "width": 4, "steps": 12}
    found = lab_runs.load("sg_lin3_seed100, fg_fig1_seed100", "live", **tiny)
    (gram, hessian) = lab_runs.setting(found)
    assert (gram["matrix"], hessian["matrix"]) == ("Gram matrix M", "Hessian")
    assert decoded(gram["series"][-1])[0].tolist() == list(range(13)) and gram["phases"] and not hessian["phases"]
    with pytest.raises(KeyError, match="no run 'sg_lin'"):
        lab_runs.load("sg_lin")
    with pytest.raises(ValueError, match="none of them is on record"):
        lab_runs.load("fg_fig1_eta50")
    with pytest.raises(ValueError, match="one stride"):
        lab_runs.encode(np.array([0, 1, 3]), np.zeros(3))
