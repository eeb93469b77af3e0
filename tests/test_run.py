"""Runs: resuming to the last bit, choosing between record and computation, refusing before anything runs."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import xarray as xr

from eos_utils import data, run, store
from eos_utils.checkpoint import partial_path
from eos_utils.descent import DivergedError
from eos_utils.experiment import Experiment, Measure
from eos_utils.run import compute, pick_device
from eos_utils.store import Store, StoreError

DECAYING = {
    "none": {},
    "at_step": {"decay": {"factor": "1/4", "at_step": 20}},
    "entered": {"decay": {"factor": "1/4", "entered": 1}},
    "fork": {},
}


def quietly(experiment, measure, **keywords):
    return compute(experiment, measure, device="cpu", progress=False, **keywords)


def experiment_like(tiny, **fields):
    plain = {k: v for k, v in tiny.canonical().items() if k != "schema"}
    return Experiment.from_dict({**plain, **fields})


def record(experiment, measure, records=None):
    result, provenance = quietly(experiment, measure)
    (records or Store()).save(experiment.key, result, provenance, replace=True)
    run.forget(experiment, measure)
    return result


def recorded_arrays(found):
    """Everything but provenance (which has times in it)."""
    found = found.copy()
    found.attrs = {k: v for k, v in found.attrs.items() if k not in ("provenance", "key", "source")}
    return found


def identical(a, b):
    xr.testing.assert_identical(recorded_arrays(a), recorded_arrays(b))
    for name in a.variables:
        assert a[name].values.tobytes() == b[name].values.tobytes(), name


@pytest.fixture
def undisturbed(monkeypatch, tmp_path):
    """Computes with a cache of its own, so that no checkpoint is at hand."""

    def doing(experiment, measure):
        with monkeypatch.context() as patch:
            patch.setenv("EOS_CACHE_DIR", str(tmp_path / "undisturbed"))
            found, _ = quietly(experiment, measure)
            run.forget(experiment, measure)
        return found

    return doing


class Killed(Exception):
    """Stands for the end of the process."""


def at_step(monkeypatch, step, action):
    """Does something at the end of a step, before any checkpoint of that step."""
    real = run._Progress.__call__

    def call(self, descent):
        real(self, descent)
        if descent.step == step:
            action()

    monkeypatch.setattr(run._Progress, "__call__", call)


def die():
    raise Killed


# ---- what a run holds ----------------------------------------------------------------------------------


def test_trajectory_is_complete_and_in_step(tiny, measure, own_root):
    found, provenance = quietly(tiny, measure)
    assert found.sizes == {"step": 41, "measured": 41, "eig": 2, "snapshot": 2, "parameter": 610}
    assert found["step"].values.tolist() == list(range(41)) == found["measured"].values.tolist()
    assert (found.attrs["status"], found.attrs["last_step"], found.attrs["decayed_at"]) == ("steps", 40, -1)
    assert json.loads(found.attrs["experiment"]) == tiny.canonical()
    objective = tiny.objective(torch.device("cpu"))
    theta = objective.initial()
    for t in range(3):  # once more by hand
        value, gradient, _ = objective.gradient(theta)
        assert float(found["loss"][t]) == float(value) and float(found["eta"][t]) == 1.0
        theta = theta - 1.0 * gradient
    assert found["snapshot"].values.tolist() == ["entry", "end"] and int(found["snapshot_step"][1]) == 40
    end = torch.from_numpy(found["theta"].values[1])
    assert float(objective.value(end)) == pytest.approx(float(found["loss"][40]), rel=1e-6)
    assert (found["upper"].values >= found["eigenvalue"].values).all()
    for name, unit in {"loss": "1", "eigenvalue": "1", "eta": "1"}.items():
        assert found[name].attrs["units"] == unit and found[name].attrs["long_name"]
    assert provenance["data"] == {"name": "digits", "sha256": data.digits(200).sha256}
    assert provenance["steps"] == 40 and provenance["evaluations"] == 41
    assert provenance["products"] == int(found["products"].sum()) > 41
    assert set(provenance) >= {"commit", "dirty", "versions", "device", "seconds", "measure"}
    assert "/" not in provenance["device"]


def test_divergence_is_a_result_like_any_other(tiny, own_root):
    wild = experiment_like(tiny, eta=1000)
    found, _ = quietly(wild, Measure(k=1, stride=7))
    assert found.attrs["status"] == "diverged" and 1 < found.attrs["last_step"] < 40
    assert found["step"].values.tolist() == list(range(found.attrs["last_step"]))  # no row for the step that failed
    assert float(found["loss"][0]) < 10 and found.attrs["finite_loss"] == float(found["loss"][-1]) > 1e6
    assert Store().save(wild.key, found, json.loads(found.attrs["provenance"]))
    assert Store().load(wild.key).attrs["status"] == "diverged"
    with pytest.raises(DivergedError, match=f"not finite at step {found.attrs['last_step']}.*smaller step size"):
        quietly(wild, Measure(k=1, stride=7), on_divergence="raise")


def test_progress_tells_the_cost_and_ends_in_a_readable_line(short, sparse, own_root, capsys):
    quiet, _ = quietly(short, sparse)
    assert capsys.readouterr().err == ""
    run.forget(short, sparse)
    loud, _ = compute(short, sparse, device="cpu", progress=True)
    shown = capsys.readouterr().err
    assert "up to 6 steps on cpu" in shown and "min" in shown and "λ1·η/2" in shown and "6/6" in shown
    identical(quiet, loud)  # the estimate and the bar change nothing


# ---- interruption and resuming ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECAYING)
def test_killed_and_resumed_runs_are_bit_identical(tiny, measure, own_root, undisturbed, monkeypatch, kind):
    experiment = experiment_like(tiny, **DECAYING[kind])
    if kind == "fork":
        record(tiny, measure)
        experiment = experiment_like(tiny, fork={"of": tiny.key, "at": "entry", "size": "1e-3", "seed": 1})
    wanted = undisturbed(experiment, measure)
    first = int(wanted["step"][0])
    assert kind == "none" or kind == "fork" or 0 < wanted.attrs["decayed_at"] < 35
    for step in (3, 23, 36):  # three deaths: before and after EoS entry and decay
        with monkeypatch.context() as patch:
            at_step(patch, first + step, die)
            with pytest.raises(Killed):
                quietly(experiment, measure, checkpoint_every=0)
        assert torch.load(partial_path(experiment, measure))["descent"]["step"] == first + step - 1
    resumed, _ = quietly(experiment, measure)
    identical(resumed, wanted)


def test_a_process_that_is_killed_resumes(tiny, measure, own_root, undisturbed, capsys):
    """With SIGKILL in another process: nothing can be saved at that moment."""
    script = textwrap.dedent(
        f"""
        import os, signal, torch
        torch.set_num_threads(1)
        from eos_utils import run
        from eos_utils.experiment import Experiment, Measure
        real = run._Progress.__call__
        def call(self, descent):
            real(self, descent)
            if descent.step == 31:
                os.kill(os.getpid(), signal.SIGKILL)
        run._Progress.__call__ = call
        run.compute({tiny!r}, {measure!r}, device="cpu", progress=False, checkpoint_every=0)
        """
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == -signal.SIGKILL
    assert torch.load(partial_path(tiny, measure))["descent"]["step"] == 30
    resumed, _ = compute(tiny, measure, device="cpu")
    assert "resuming at step 30" in capsys.readouterr().err
    identical(resumed, undisturbed(tiny, measure))


def test_ctrl_c_ends_the_step_keeps_a_checkpoint_and_resumes(tiny, measure, own_root, undisturbed, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, 23, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            quietly(tiny, measure, checkpoint_every=1e9)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped before step 23; the same command resumes there" in capsys.readouterr().err
    assert torch.load(partial_path(tiny, measure))["descent"]["step"] == 23
    identical(quietly(tiny, measure)[0], undisturbed(tiny, measure))


def test_a_second_ctrl_c_interrupts_at_once(short, sparse, own_root, monkeypatch):
    after = []

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        after.append("still here")

    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        quietly(short, sparse)
    assert not after and not partial_path(short, sparse).exists()


def test_checkpoints_of_other_code_or_data_are_started_over(short, sparse, own_root, undisturbed, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 4, die)
        with pytest.raises(Killed):
            quietly(short, sparse, checkpoint_every=0)
    path = partial_path(short, sparse)
    saved = torch.load(path)
    for name, value in {"code": {}, "data": "0" * 64}.items():
        torch.save({**saved, "stamp": {**saved["stamp"], name: value}}, path)
        found, _ = compute(short, sparse, device="cpu")
        assert "resuming" not in capsys.readouterr().err
        run.forget(short, sparse)
        identical(found, undisturbed(short, sparse))


@pytest.mark.parametrize("content", ["garbage", "truncated", "foreign", "list", "planted"])
def test_checkpoints_that_cannot_be_used_are_started_over(short, sparse, own_root, undisturbed, tmp_path, content):
    path = partial_path(short, sparse)
    path.parent.mkdir(parents=True)
    if content == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif content == "truncated":
        torch.save({"stamp": None, "descent": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:500])
    elif content == "planted":
        torch.save(Planted(tmp_path / "ran"), path)
    else:
        torch.save({"x": 1} if content == "foreign" else [1, 2], path)
    identical(quietly(short, sparse)[0], undisturbed(short, sparse))
    assert not (tmp_path / "ran").exists()


class Planted:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_finished_run_that_was_not_stored_gives_the_same_again(tiny, measure, own_root):
    first, _ = quietly(tiny, measure)
    again, _ = quietly(tiny, measure)  # from the checkpoint that a finished run keeps until it is stored
    assert again["snapshot"].values.tolist() == ["entry", "end"]
    identical(first, again)


def test_checkpoints_differ_by_what_is_measured(tiny, measure):
    assert partial_path(tiny, measure) != partial_path(tiny, Measure(k=3))
    assert partial_path(tiny, measure) == partial_path(tiny, Measure(k=2, stride=1, snapshots=("entry", "end")))


@pytest.mark.parametrize("where", ["save", "folder"])
def test_a_run_goes_on_without_checkpoints_when_the_disk_is_full(
    short, sparse, own_root, own_cache, undisturbed, monkeypatch, capsys, where
):
    if where == "save":

        def full(state, path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
    else:
        own_cache.mkdir()
        (own_cache / "partial").write_text("a file where the folder should be")
    found, _ = quietly(short, sparse, checkpoint_every=0)
    assert "no checkpoint could be written" in capsys.readouterr().err
    if where == "save":
        assert list((own_cache / "partial").iterdir()) == []
        monkeypatch.undo()
    identical(found, undisturbed(short, sparse))


def test_a_result_that_could_not_be_stored_is_not_lost(short, sparse, own_root, undisturbed, monkeypatch):
    wanted = undisturbed(short, sparse)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", lambda *a, **k: (_ for _ in ()).throw(StoreError("disk full")))
        with pytest.raises(StoreError, match="disk full"):
            run.run(short, sparse, device="cpu", progress=False)
    with monkeypatch.context() as patch:
        at_step(patch, 3, die)  # would notice if the run started over
        found = run.run(short, sparse, device="cpu", progress=False)
    identical(found, wanted)
    assert not partial_path(short, sparse).exists()  # stored now, and nothing is left behind


# ---- recorded, auto, live --------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Counts what is computed."""
    calls, real = [], run.compute

    def counting(experiment, *arguments, **keywords):
        calls.append(experiment.key)
        return real(experiment, *arguments, **keywords)

    monkeypatch.setattr(run, "compute", counting)
    return calls


def ask(experiment, measure, **keywords):
    return run.run(experiment, measure, device="cpu", progress=False, **keywords)


def test_recorded_runs_are_loaded_not_computed(short, sparse, own_root, computed):
    with pytest.raises(StoreError, match=f"record of {short.key}.*source='auto'"):
        ask(short, sparse, source="recorded")
    wanted = record(short, sparse)
    for source in ("recorded", "auto"):
        found = ask(short, sparse, source=source)
        assert found.attrs["source"] == "recorded"
        identical(found, wanted)
    assert computed == []
    live = ask(short, sparse, source="live")
    assert live.attrs["source"] == "live" and computed == [short.key]
    identical(live, wanted)


def test_auto_computes_once_and_keeps_it_in_the_cache(short, sparse, own_root, own_cache, computed):
    first = ask(short, sparse)
    assert first.attrs["source"] == "live" and not (own_root / "results").exists()
    again = ask(short, sparse)
    assert again.attrs["source"] == "cached" and computed == [short.key]
    identical(first, again)
    assert Store(own_cache / "runs").keys() == [short.key]


@pytest.mark.parametrize("other", [
    {"k": 3},
    {"stride": 5},
    {"snapshots": ("end", 5)},
    {"pairs": True},
    {"tol": 1e-4},
])  # fmt: skip
def test_a_cached_run_that_lacks_something_is_computed_anew(short, sparse, own_root, computed, other):
    ask(short, sparse)
    assert ask(short, dataclasses.replace(sparse, **other)).attrs["source"] == "live" and len(computed) == 2


def test_a_cached_run_that_holds_more_will_do(short, sparse, own_root, computed):
    ask(short, sparse)
    assert ask(short, Measure(k=1, stride=3)).attrs["source"] == "cached" and len(computed) == 1


def test_stale_records_are_refused_or_computed_anew(short, sparse, own_root, computed, monkeypatch, capsys):
    record(short, sparse)
    now = store.fingerprints()
    now["lanczos"] = {**now["lanczos"], "source": "edited"}
    monkeypatch.setattr(store, "fingerprints", lambda extra=(): now)
    assert ask(short, sparse, source="recorded").attrs["source"] == "recorded"  # unverified will do
    now["lanczos"] = {"numerics": 99, "source": "edited"}
    with pytest.raises(StoreError, match="no usable record"):
        ask(short, sparse, source="recorded")
    assert computed == []
    found = run.run(short, sparse, device="cpu", progress=True)
    assert "NUMERICS of lanczos 1 -> 99" in capsys.readouterr().err  # it says why the record is not used
    assert found.attrs["source"] == "live" and computed == [short.key]


@pytest.mark.parametrize("where", ["results", "cache"])
def test_a_damaged_record_is_an_error_not_a_reason_to_compute_for_hours(
    short, sparse, own_root, own_cache, computed, where
):
    records = Store() if where == "results" else Store(own_cache / "runs")
    record(short, sparse, records)
    path = records.folder / records.manifest(short.key)["file"]
    path.write_bytes(path.read_bytes()[:-1])
    for source in ("auto", "recorded"):
        with pytest.raises(StoreError, match="truncated or altered"):
            ask(short, sparse, source=source)
    assert computed == []
    assert ask(short, sparse, source="live").attrs["source"] == "live"
    if where == "cache":  # now it has been replaced
        assert ask(short, sparse).attrs["source"] == "cached" and len(computed) == 1


# ---- forks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["entry", "end"])
def test_a_fork_starts_from_the_snapshot_perturbed_by_the_stated_size(tiny, measure, own_root, at):
    base = record(tiny, measure)
    snapshot = base.sel(snapshot=at)
    theta, step = snapshot["theta"].values.astype(np.float64), int(snapshot["snapshot_step"])

    def fork(seed, size="1e-2", steps=0):
        fields = {"of": tiny.key, "at": at, "size": size, "seed": seed}
        return quietly(experiment_like(tiny, fork=fields, steps=steps), Measure(k=1, stride=1, snapshots=("end",)))[0]

    starts = []
    for seed in (1, 2):
        found = fork(seed)
        assert found["step"].values.tolist() == [step]
        starts.append(found["theta"].values[0].astype(np.float64))
        assert np.linalg.norm(starts[-1] - theta) == pytest.approx(1e-2 * np.linalg.norm(theta), rel=1e-4)
    cosine = np.dot(starts[0] - theta, starts[1] - theta) / (1e-2 * np.linalg.norm(theta)) ** 2
    assert abs(cosine) < 0.3  # two seeds, two directions
    assert fork(1, size=0)["theta"].values[0].tobytes() == snapshot["theta"].values.tobytes()  # an exact copy
    longer = fork(1, steps=4)
    assert longer["step"].values.tolist() == list(range(step, step + 5)) and longer.attrs["last_step"] == step + 4


def test_forks_need_their_base_and_its_snapshot(tiny, measure, own_root):
    fields = {"of": tiny.key, "at": "entry", "size": "1e-6", "seed": 1}
    with pytest.raises(StoreError, match=f"no record of {tiny.key}"):
        quietly(experiment_like(tiny, fork=fields), measure)
    record(tiny, measure)
    with pytest.raises(StoreError, match="no snapshot 'late' to fork from.*entry.*end"):
        quietly(experiment_like(tiny, fork={**fields, "at": "late"}), measure)


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", "cuda:-1", "", "cpu,cuda", "meta"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match="is unknown; choose auto, cpu, cuda or cuda:N"):
        pick_device(device)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device='cuda': this machine has 0 CUDA devices"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda") and pick_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="device='cuda:1': this machine has 1 CUDA devices"):
        pick_device("cuda:1")


def test_float32_stays_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        pick_device("cuda")
        assert not any(place.allow_tf32 for place in places)
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


@pytest.mark.parametrize("bad, named", [
    (Measure(k=0), "k=0"),
    (Measure(k=611), "k=611: this network has only P=610 parameters"),
    (Measure(stride=0), "stride=0"),
    (Measure(tol=0), "tol=0"),
    (Measure(snapshots=("start",)), "snapshot='start'"),
])  # fmt: skip
def test_measurements_that_cannot_be_are_refused_before_the_first_step(tiny, own_root, monkeypatch, bad, named):
    at_step(monkeypatch, 1, die)
    with pytest.raises(ValueError, match=named):
        quietly(tiny, bad)


def test_unknown_words_are_refused(short, sparse, own_root):
    with pytest.raises(ValueError, match="source='fresh' is unknown; choose one of auto, recorded, live"):
        ask(short, sparse, source="fresh")
    with pytest.raises(ValueError, match="on_divergence='ignore' is unknown"):
        quietly(short, sparse, on_divergence="ignore")


def test_a_cache_that_cannot_be_written_is_noticed_before_the_run(short, sparse, own_root, own_cache, computed):
    own_cache.mkdir()
    (own_cache / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="runs is not writable"):
        ask(short, sparse)
    assert computed == []


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.git_state(tmp_path) == {"commit": "unknown", "dirty": False}


def test_git_state_tells_commit_and_edits(tmp_path):
    def git(*arguments):
        quiet = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=quiet).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    state = run.git_state(tmp_path)
    assert commit.startswith(state["commit"]) and len(state["commit"]) == 12 and not state["dirty"]
    (tmp_path / "other").write_text("untracked files do not count")
    assert not run.git_state(tmp_path)["dirty"]
    (tmp_path / "file").write_text("two")
    assert run.git_state(tmp_path) == {**state, "dirty": True}
