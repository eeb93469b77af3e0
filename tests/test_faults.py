"""What has gone wrong before, or could: interrupted, damaged, hostile, crowded; a small share of `make faults`."""

import contextlib
import errno
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
import xarray as xr

from eos_utils import bench_results, forks, run
from eos_utils.checkpoint import read_checkpoint, save_checkpoint
from eos_utils.experiment import Experiment, Measure
from eos_utils.store import Store, StoreError

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the folder faults/ is no part of the installed package
from faults import faulty, flips  # noqa: E402
from faults.suite import SCENARIOS  # noqa: E402

KEY = "0123456789abcdef"


def dataset(value=1.0):
    made = xr.Dataset({"loss": ("step", value * np.arange(100.0))}, attrs={"status": "steps"})
    made.attrs["provenance"] = json.dumps({"seconds": 3.5, "data": {"name": "digits"}})
    return made


@pytest.fixture
def saved(tmp_path):
    records = Store(tmp_path / "results")
    assert records.save(KEY, dataset(), {"name": "a run", "seconds": 3.5, "data": {"name": "digits"}})
    return records


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- the store ---------------------------------------------------------------------------------------


def test_what_a_killed_writer_left_is_removed_an_hour_later(saved):
    other = "f" * 16
    left = [f"{KEY}-00000000.nc", ".writing-a.nc", ".writing-a.json"]
    young = [f"{KEY}-11111111.nc", ".writing-b.nc"]  # another process may be about to give these their names
    for name in [*left, *young, f"{other}-00000000.nc"]:
        (saved.folder / name).write_bytes(b"half")
    for name in left:
        os.utime(saved.folder / name, (time.time() - 3700,) * 2)
    os.utime(saved.folder / young[0], (time.time() + 86400,) * 2)  # a clock that was set back since
    assert saved.save(KEY, dataset(2.0), {"seconds": 3.5, "data": {"name": "digits"}}, replace=True)
    kept = [f"{KEY}.json", saved.manifest(KEY)["file"], *young, f"{other}-00000000.nc"]
    assert names(saved.folder) == sorted(kept)


@pytest.mark.parametrize("file", ["../precious.nc", "0123456789abcdef-00000000.nc", "/precious.nc", "", 7])
def test_a_manifest_can_name_no_file_but_its_own(saved, tmp_path, file):
    (tmp_path / "precious.nc").write_bytes(b"of somebody else")
    manifest = json.loads(saved.manifest_path(KEY).read_text()) | {"file": file}
    saved.manifest_path(KEY).write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="damaged.*names the file"):
        saved.load(KEY)
    provenance = {"seconds": 3.5, "data": {"name": "digits"}}
    assert saved.save(KEY, dataset(2.0), provenance, replace=True)  # which deletes the file that it replaces
    assert (tmp_path / "precious.nc").read_bytes() == b"of somebody else"


@pytest.mark.parametrize("change", [{"seconds": 3.6}, {"seconds": None}, {"data": {"name": "cifar10"}}, {"nbme": 1}])
def test_provenance_that_was_altered_is_noticed(saved, change):
    manifest = json.loads(saved.manifest_path(KEY).read_text())
    manifest["provenance"].update(change)
    if change == {"seconds": None}:
        del manifest["provenance"]["seconds"]
    saved.manifest_path(KEY).write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=f"altered: {next(iter(change))} is"):
        saved.load(KEY)


@pytest.mark.parametrize("code", [{"data": {"numerics": 1}}, {"data": 1}, [], {"data": {"sauce": "x", "numerics": 1}}])
def test_a_manifest_with_damaged_fingerprints_is_noticed(saved, code):
    manifest = json.loads(saved.manifest_path(KEY).read_text()) | {"code": code}
    saved.manifest_path(KEY).write_text(json.dumps(manifest))
    assert saved.status(KEY).state == "stale" and "damaged" in saved.status(KEY).why


@pytest.mark.parametrize("method", ["read_text", "read_bytes"])
def test_a_record_that_may_not_be_read_is_named(saved, monkeypatch, method):
    def refuse(self, *arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, method, refuse)
    with pytest.raises(StoreError, match="can not be read.*change its permissions"):
        saved.load(KEY)


def test_a_reader_gets_the_record_that_replaced_the_one_it_was_about_to_open(saved, monkeypatch):
    real = pathlib.Path.read_bytes

    def late(path):
        if path.suffix == ".nc":
            monkeypatch.undo()
            saved.save(KEY, dataset(2.0), {"seconds": 3.5, "data": {"name": "digits"}}, replace=True)
        return real(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", late)
    assert float(saved.load(KEY)["loss"][1]) == 2.0


# ---- checkpoints -------------------------------------------------------------------------------------


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def test_a_checkpoint_with_a_flipped_bit_is_unread_or_unharmed(tmp_path):
    state = {"theta": torch.arange(300.0), "step": 7, "loss": 0.25}
    path = tmp_path / "x.pt"
    assert save_checkpoint(path, state)
    whole, rng, unread = path.read_bytes(), np.random.default_rng(0), 0
    for position in rng.choice(len(whole), 300, replace=False):
        content = bytearray(whole)
        content[position] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        found = read_checkpoint(path)
        unread += found is None
        assert found is None or same(found, state), position
    assert unread > 150  # the rest is padding
    assert read_checkpoint(tmp_path / "none.pt") is None


def test_a_fork_point_with_a_flipped_bit_is_replayed(own_root, monkeypatch):
    base = Experiment(dataset="digits", n=100, width=4, eta="2/5", steps=12)
    result, provenance = run.compute(base, Measure(k=1, stride=5), progress=False)
    Store().save(base.key, result, provenance)
    branch = Experiment(**{**base.__dict__, "steps": 2, "fork": {"of": base.key, "at": 9, "size": "0", "seed": 0}})
    objective = branch.objective(torch.device("cpu"))
    whole, _ = forks.start_of(branch, objective, Store(), forks.points_folder())
    version = Store().manifest(base.key)["sha256"][:8]
    point = forks.point_path(base.key, version, 9)
    content = bytearray(point.read_bytes())
    where = content.index(whole.numpy().tobytes())
    content[where + 6] ^= 0x10
    point.write_bytes(content)
    again, step = forks.start_of(branch, objective, Store(), forks.points_folder())
    assert step == 9 and torch.equal(again, whole)
    assert torch.equal(read_checkpoint(point), whole)  # made good
    save_checkpoint(forks.point_path(base.key, version, 0), torch.zeros(3))  # another length, and at the first step
    point.unlink()
    assert torch.equal(forks.start_of(branch, objective, Store(), forks.points_folder())[0], whole)


def test_ctrl_c_on_a_full_disk_promises_nothing(short, sparse, own_root, monkeypatch, capsys):
    def full(state, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(run._Progress, "__call__", lambda *a: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.compute(short, sparse, progress=False)
    said = capsys.readouterr().err
    assert "no checkpoint could be written" in said and "resumes at its last checkpoint, if there is one" in said


def test_half_written_checkpoints_are_removed_an_hour_later(tmp_path):
    for name, age in {"old.1.tmp": 3700, "new.2.tmp": 0}.items():
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert save_checkpoint(tmp_path / "x.pt", {"step": 1})
    assert names(tmp_path) == ["new.2.tmp", "x.pt"]


# ---- a share of the full counts ----------------------------------------------------------------------

SHARE = {
    "kill-runs": 2,
    "kill-operations": 4,
    "kill-notebooks": 1,
    "kill-sweeps": 1,
    "full-disk": 2,
    "permission": 4,
    "two-writers": 1,
    "clock": 1,
    "flip-records": 100,
    "flip-manifests": 60,
    "flip-checkpoints": 100,
    "parameters": 4,
    "code": 3,
}


def share_of(name, folder, count):
    return SCENARIOS[name].function(count, folder, random.Random(f"{name} of the tests"))


@pytest.mark.parametrize("name", SHARE)
def test_nothing_happens_that_must_not(name, tmp_path):
    happened = share_of(name, tmp_path, SHARE[name])
    assert happened.total() >= SHARE[name] and not faulty(happened), happened


@pytest.mark.cifar
def test_flipped_bits_of_the_mirror_are_noticed(tmp_path):
    assert share_of("flip-mirror", tmp_path, 4) == {"refused": 4}


def test_the_suite_would_notice_a_reader_that_compares_no_checksums(tmp_path, monkeypatch):
    def careless(path):
        with contextlib.suppress(Exception):
            return torch.load(path, weights_only=True)

    monkeypatch.setattr(flips, "read_checkpoint", careless)
    assert faulty(share_of("flip-checkpoints", tmp_path, 60)) > 10


def test_the_recorded_table_has_no_outcome_that_must_not_be():
    rows = json.loads((ROOT / "bench" / "results" / "faults.json").read_text(encoding="utf-8"))["rows"]
    assert set(rows) == set(SCENARIOS)
    for name, row in rows.items():
        assert row["faults"] == faulty(row["happened"]) == 0, name
        assert row["done"] == SCENARIOS[name].done and row["times"] == sum(row["happened"].values()) > 0
    header, table = bench_results.faults()
    assert len(table) == len(rows) and all(len(row) == len(header) and all(row) for row in table)


def test_scenarios_go_on_side_by_side_and_leave_what_is_recorded_of_others(tmp_path):
    def faults(*names):
        command = [sys.executable, "-m", "faults", *names, "--share", "0.01", "--jobs", "2", "--json", str(table)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    table = tmp_path / "faults.json"
    table.write_text(json.dumps({"rows": {"clock": {"done": "kept"}}}), encoding="utf-8")
    done = faults("code", "flip-manifests")
    assert done.returncode == 0 and "0 outcomes that must not be" in done.stdout, done.stdout + done.stderr
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["clock", "flip-manifests", "code"] and rows["clock"] == {"done": "kept"}
    assert (rows["flip-manifests"]["times"], rows["flip-manifests"]["asked"], rows["code"]["times"]) == (5, 500, 1)
    done = faults("nothing")
    assert done.returncode == 2 and "no scenario nothing" in done.stderr


def test_a_place_that_may_not_be_looked_into_is_named(tmp_path, monkeypatch, short, sparse):
    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "is_file", refuse)
    assert Store(tmp_path).status(KEY).state == "stale" and "Permission denied" in Store(tmp_path).status(KEY).why
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    run.forget(short, sparse)  # the result is stored: a checkpoint that stays is no reason to fail


def test_room_is_looked_for_before_a_long_run(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(StoreError, match="not writable.*No space left.*free space"):
        Store(tmp_path).check_writable()
