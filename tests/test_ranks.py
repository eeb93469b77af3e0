"""Two ranks give what one process gives; a rank that is lost is reported, and its run goes on in one process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eos_utils import catalogue, cli, ranks, run, store
from eos_utils.checkpoint import partial_path
from eos_utils.experiment import Experiment, Measure
from eos_utils.gram import Gram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.sharded import ShardedObjective

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("two_ranks", HERE / "two_ranks.py")
two_ranks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(two_ranks)
RUNS = """
double: {{experiment: {plain}, measure: {measure}}}
single: {{experiment: {single}, measure: {measure}}}
killed: {{experiment: {killed}, measure: {measure}}}
late: {{experiment: {late}, measure: {measure}}}
"""
PLAIN = {"dataset": "digits", "n": 201, "width": 8, "eta": "2/2", "steps": 40, "dtype": "float64"}
MEASURE = {"k": 2, "stride": 1, "snapshots": ["end"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root with four runs: float64, float32, one that a rank does not survive, one that it does not answer in."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "experiments").mkdir()
    runs = {
        "plain": PLAIN,
        "single": {**PLAIN, "dtype": "float32"},
        "killed": {**PLAIN, "seed": 1},
        "late": {**PLAIN, "seed": 6},
    }
    text = RUNS.format(measure=json.dumps(MEASURE), **{name: json.dumps(fields) for name, fields in runs.items()})
    (root / "experiments" / "runs.yaml").write_text(text)
    return root


def start(root, *arguments, timeout=60):
    """Two ranks, when they are through; ``timeout``: seconds that one waits for the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    place = {
        "PYTHONPATH": str(HERE.parent),
        "EOS_ROOT": str(root),
        "EOS_CACHE_DIR": str(root / "cache"),
        "EOS_RANK_TIMEOUT": f"{timeout}",
    }
    return subprocess.run(
        [*command, str(HERE / "two_ranks.py"), *arguments],
        env={
            **os.environ,
            **place,
            "EOS_RANK_TIMEOUT": f"{timeout}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def two(root):
    """What both ranks found, and what was said among them."""
    done = start(root, str(root), "double", "single")
    assert (root / "1.pt").is_file(), done.stderr
    return [torch.load(root / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    return two_ranks.alone()


def apart(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", two_ranks.problems())
def test_two_ranks_agree_with_one_process(name, two, one):
    found, expected = two[0][0][name], one[name]
    assert found.keys() == expected.keys()
    rounding = 2e-6 if "float32" in name else 1e-13
    for fact, value in expected.items():
        if fact in ("eigenvalues", "upper"):  # λ1 is the scale
            tol = 2e-4 if "float32" in name else 2e-9
            assert float((found[fact] - value).abs().max() / expected["eigenvalues"][0]) <= tol, fact
        elif fact == "projector":
            assert apart(found[fact], value) < (2e-2 if "float32" in name else 1e-3), fact
        elif fact != "basis":  # its size depends on rounding
            assert found[fact].shape == value.shape and apart(found[fact], value) < rounding, fact


def test_both_ranks_hold_the_same_bits(two):
    for name, facts in two[0][0].items():
        for fact, value in facts.items():
            assert torch.equal(value, two[1][0][name][fact]), (name, fact)


def test_what_ranks_say_to_each_other(two):
    for _, said in two:
        assert said["interrupted"] and said["shared"] == b"from 0" and said["nothing"] is None
        assert "no longer hold the same parameters" in said["apart"]


@pytest.mark.parametrize(("name", "rounding"), [("double", 1e-10), ("single", 2e-4)])
def test_records_agree_before_the_edge(name, rounding, two, root, monkeypatch):
    monkeypatch.setenv("EOS_ROOT", str(root))
    entry = catalogue.find(name)
    shared, records = store.Store().load(entry.experiment.key), store.Store()
    assert json.loads(shared.attrs["provenance"])["ranks"] == 2
    assert "sharded" in records.manifest(entry.experiment.key)["code"] and entry.status().state == "fresh"
    whole, provenance = run.compute(entry.experiment, entry.measure, progress=False)
    assert "ranks" not in provenance
    scaled = whole["eigenvalue"].values[:, 0] * entry.experiment.step_size / 2
    edge = int(np.argmax(scaled > 1))
    assert 10 < edge < 40
    for field, rtol in {"loss": rounding, "eigenvalue": 2e-3, "upper": 2e-3}.items():  # eigenvalues to their tolerance
        np.testing.assert_allclose(shared[field][:edge], whole[field][:edge], rtol=rtol)
    assert json.loads(shared.attrs["start"]) == json.loads(whole.attrs["start"])


@pytest.mark.parametrize(("how", "timeout"), [("killed", 60), ("late", 5)])
def test_a_rank_that_is_lost_leaves_a_checkpoint_for_one_process(how, timeout, root, monkeypatch, capsys):
    monkeypatch.setenv("EOS_ROOT", str(root))
    monkeypatch.setenv("EOS_CACHE_DIR", str(root / "cache"))
    done = start(root, how, how, timeout=timeout)
    assert done.returncode != 0
    silent = "eos record: rank 0 of 2 lost the others: one has ended, or did not answer in time"
    assert silent in done.stderr or (how == "killed" and "eos record: ended by SIGTERM" in done.stderr)
    assert "the checkpoint of step 19 is whole: the same command resumes there" in done.stderr
    entry = catalogue.find(how)
    assert partial_path(entry.experiment, entry.measure).is_file() and entry.status().state == "pending"
    undisturbed, _ = run.compute(entry.experiment, Measure(k=2, stride=1), progress=False)  # its checkpoint is another
    assert catalogue.record(entry)
    assert "resuming at step 19" in capsys.readouterr().err
    resumed = store.Store().load(entry.experiment.key)
    edge = int(np.argmax(undisturbed["eigenvalue"].values[:, 0] * entry.experiment.step_size / 2 > 1))
    assert 20 < edge < 40 and list(resumed["step"].values) == list(range(41))
    for field, rtol in {"loss": 1e-10, "eigenvalue": 2e-3}.items():
        np.testing.assert_allclose(resumed[field][:edge], undisturbed[field][:edge], rtol=rtol)


# --- refused, without other processes ------------------------------------------------------------------


@pytest.fixture
def second():
    return ranks.Ranks(1, 2, torch.device("cpu"))


def test_batchnorm_and_too_few_examples_are_refused(second):
    x, y = torch.randn(6, 4), torch.ones(6, 1)
    coupled = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    with pytest.raises(ValueError, match="BatchNorm couples the examples"):
        ShardedObjective(Objective(coupled, "mse", x, y), second)
    with pytest.raises(ValueError, match="n=1 examples for 2 ranks"):
        ShardedObjective(Objective(fully_connected(4, 2, outputs=1), "mse", x[:1], y[:1]), second)


def test_a_rank_keeps_its_examples_only(second):
    x, y = torch.randn(7, 4), torch.ones(7, 1)
    objective = ShardedObjective(Objective(fully_connected(4, 2, outputs=1), "mse", x, y), second)
    assert torch.equal(objective.local.x, x[3:]) and objective.local.x.untyped_storage().nbytes() == 4 * 4 * 4
    assert objective.weight == 4 / 7
    with pytest.raises(AttributeError, match=r"a part of the inputs only, in .local.x"):
        Gram(objective)


def test_measurements_that_need_all_examples_are_refused(second):
    experiment = Experiment(dataset="digits", n=20, width=2, labels="vehicles", loss="mse", steps=1)
    with pytest.raises(ValueError, match="gram and terms need all examples in one place"):
        run.compute(experiment, Measure(k=1, gram=1), progress=False, ranks=second)


def test_only_record_is_shared(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["status"]) == 2
    assert "only `record` shares its work among ranks" in capsys.readouterr().err


def test_gpus_are_not_numbered_and_must_suffice(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="each rank takes a GPU of its own"), ranks.joined(torch.device("cuda:1")):
        pass
    with pytest.raises(ValueError, match="2 ranks or more and 1 GPUs"), ranks.joined(torch.device("cuda")):
        pass
