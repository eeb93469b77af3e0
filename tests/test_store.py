"""Records: damage is noticed, writing is atomic, freshness says what changed."""

import errno
import json
import os
import pathlib
import threading

import numpy as np
import pytest
import xarray as xr

from eos_utils import data, store
from eos_utils.store import FORMAT, NUMERIC_MODULES, Store, StoreError, fingerprints

KEY = "0123456789abcdef"


def dataset(value=1.0, steps=200):
    loss = value * np.exp(-np.arange(steps) / 50)
    return xr.Dataset(
        {"loss": ("step", loss, {"units": "1"}), "flag": ("step", np.ones(steps, dtype=np.int8))},
        {"step": np.arange(steps, dtype=np.int32), "snapshot": ("snapshot", np.array(["entry", "end"]))},
        {"status": "steps"},
    )


@pytest.fixture
def records(tmp_path):
    return Store(tmp_path / "results")


@pytest.fixture
def saved(records):
    assert records.save(KEY, dataset(), {"seconds": 3})
    return records


def names(records):
    return sorted(p.name for p in records.folder.iterdir())


def edit(records, **fields):
    manifest = json.loads(records.manifest_path(KEY).read_text())
    manifest.update(fields)
    records.manifest_path(KEY).write_text(json.dumps(manifest))


def litter_free(records):
    """Only one manifest and the file that it names."""
    return names(records) == sorted([f"{KEY}.json", records.manifest(KEY)["file"]])


# ---- reading -------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(saved):
    found = saved.load(KEY)
    wanted = dataset()
    xr.testing.assert_equal(found, wanted)
    assert found.attrs["status"] == "steps" and found.attrs["key"] == KEY and found["loss"].attrs == {"units": "1"}
    assert found["loss"].dtype == np.float64 and found["flag"].dtype == np.int8  # nothing is rounded
    assert json.loads(found.attrs["provenance"]) == {"seconds": 3}
    assert saved.keys() == [KEY] and litter_free(saved)
    assert saved.status(KEY).state == "fresh"
    assert saved.manifest(KEY)["sha256"] == data.file_sha256(saved.folder / saved.manifest(KEY)["file"])
    assert (saved.folder / saved.manifest(KEY)["file"]).stat().st_mode & 0o777 == 0o644


def test_missing_records_name_the_remedy(records):
    assert records.status(KEY) == store.Status("missing", "not recorded") and records.keys() == []
    with pytest.raises(StoreError, match=f"no record of {KEY}.*eos record"):
        records.load(KEY)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_files_are_noticed_before_hdf5_opens_them(saved, damage, monkeypatch):
    path = saved.folder / saved.manifest(KEY)["file"]
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    monkeypatch.setattr(xr, "open_dataset", None)
    with pytest.raises(StoreError, match=f"{path.name} is .*(truncated|missing).*restore it with git"):
        saved.load(KEY)
    status = saved.status(KEY)
    assert status.state == "stale" and path.name in status.why


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "7", '"text"', '{"format": 1}', '{"format": "1"}', '{"format": null, "key": "x"}',
    json.dumps({"format": 1, "key": KEY}), "\x00\xff",
])  # fmt: skip
def test_damaged_manifests_are_noticed(saved, content):
    saved.manifest_path(KEY).write_text(content, encoding="latin-1")
    with pytest.raises(StoreError, match="damaged"):
        saved.load(KEY)
    assert saved.status(KEY).state == "stale" and "damaged" in saved.status(KEY).why


def test_a_newer_format_asks_for_an_update_and_is_never_overwritten(saved):
    edit(saved, format=FORMAT + 1)
    before = {name: (saved.folder / name).read_bytes() for name in names(saved)}
    with pytest.raises(StoreError, match=f"format {FORMAT + 1}.*up to {FORMAT}: update eos_utils"):
        saved.load(KEY)
    assert "update eos_utils" in saved.status(KEY).why
    with pytest.raises(StoreError, match="update eos_utils"):
        saved.check_writable(KEY)
    with pytest.raises(StoreError, match="update eos_utils"):
        saved.save(KEY, dataset(2.0), {}, replace=True)
    assert {name: (saved.folder / name).read_bytes() for name in names(saved)} == before


def test_records_of_another_key_are_refused(saved):
    other = "f" * 16
    saved.manifest_path(other).write_text(saved.manifest_path(KEY).read_text())
    with pytest.raises(StoreError, match=f"another experiment \\({KEY}\\)"):
        saved.load(other)
    manifest = json.loads(saved.manifest_path(KEY).read_text())
    copied = f"{other}-{manifest['sha256'][:8]}.nc"
    (saved.folder / copied).write_bytes((saved.folder / manifest["file"]).read_bytes())
    saved.manifest_path(other).write_text(json.dumps(manifest | {"key": other, "file": copied}))  # it lies of its file
    with pytest.raises(StoreError, match=f"holds the run {KEY}, not {other}"):
        saved.load(other)


def test_unfinished_writing_is_no_record(saved):
    (saved.folder / ".writing-abc.json").write_text("{}")
    (saved.folder / ".writing-abc.nc").write_text("")
    assert saved.keys() == [KEY]


# ---- writing -------------------------------------------------------------------------------------------


def test_replacing_leaves_one_record(saved):
    old = saved.manifest(KEY)["file"]
    assert saved.save(KEY, dataset(2.0), {}, replace=True)
    assert float(saved.load(KEY)["loss"][0]) == 2.0 and saved.manifest(KEY)["file"] != old and litter_free(saved)
    assert saved.save(KEY, dataset(2.0), {}, replace=True) and litter_free(saved)  # the same bytes again


def test_a_damaged_manifest_can_be_replaced(saved):
    saved.manifest_path(KEY).write_text("{")
    assert saved.save(KEY, dataset(2.0), {}, replace=True)
    assert float(saved.load(KEY)["loss"][0]) == 2.0


def test_the_second_writer_verifies_and_discards(saved):
    assert not saved.save(KEY, dataset(2.0), {})
    assert float(saved.load(KEY)["loss"][0]) == 1.0 and litter_free(saved)
    assert not saved.save(KEY, dataset(1.0), {}) and litter_free(saved)
    (saved.folder / saved.manifest(KEY)["file"]).write_bytes(b"no HDF5")
    with pytest.raises(StoreError, match="truncated or altered"):  # the first one's record is not whole
        saved.save(KEY, dataset(2.0), {})


@pytest.mark.parametrize("values", [(1.0, 2.0), (1.0, 1.0)])
def test_of_two_racing_writers_the_first_wins(records, monkeypatch, values):
    barrier, link, results = threading.Barrier(2, timeout=60), os.link, {}

    def together(*arguments):
        barrier.wait()  # both have written their files, neither has its manifest
        return link(*arguments)

    monkeypatch.setattr(os, "link", together)

    def write(i):
        try:
            results[i] = Store(records.folder).save(KEY, dataset(values[i]), {"writer": i})
        except BaseException as error:
            barrier.abort()
            results[i] = error

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert set(results.values()) == {True, False}, results
    winner = next(i for i, won in results.items() if won)
    found = records.load(KEY)
    assert float(found["loss"][0]) == values[winner] and json.loads(found.attrs["provenance"]) == {"writer": winner}
    assert litter_free(records)


def test_everything_is_on_disk_before_it_gets_its_name(records, monkeypatch):
    events = []

    def noting(name, real):
        def noted(*arguments, **keywords):
            events.append(name)
            return real(*arguments, **keywords)

        return noted

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    records.save(KEY, dataset(), {})
    assert events[:4] == ["fsync", "fsync", "replace", "link"] and set(events[4:]) <= {"fsync"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("HDF5 said no")])
@pytest.mark.parametrize("replace", [True, False])
def test_a_failure_while_writing_leaves_the_old_record_whole(saved, monkeypatch, error, replace):
    before = {name: (saved.folder / name).read_bytes() for name in names(saved)}

    def half(self, path, **arguments):
        pathlib.Path(path).write_bytes(b"\x89HDF half of it")
        raise error

    monkeypatch.setattr(xr.Dataset, "to_netcdf", half)
    with pytest.raises(StoreError, match="(No space left|HDF5 said no).*free space or change its permissions"):
        saved.save(KEY, dataset(2.0), {}, replace=replace)
    assert {name: (saved.folder / name).read_bytes() for name in names(saved)} == before
    assert float(saved.load(KEY)["loss"][0]) == 1.0


@pytest.mark.parametrize("step", ["replace", "link", "chmod"])
def test_a_failure_while_naming_leaves_no_litter(records, monkeypatch, step):
    def refuse(*arguments, **keywords):
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(StoreError, match="could not write"):
        records.save(KEY, dataset(), {})
    assert names(records) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    blocked = Store(tmp_path / "results")
    with pytest.raises(StoreError, match="results is not writable.*free space or change its permissions"):
        blocked.check_writable()
    with pytest.raises(StoreError, match="not writable"):
        blocked.save(KEY, dataset(), {})
    assert (tmp_path / "results").read_text().startswith("a file")


# ---- freshness -----------------------------------------------------------------------------------------


def changed(monkeypatch, **modules):
    now = fingerprints()
    for name, fields in modules.items():
        now[name] = {**now.get(name, {}), **fields}
    monkeypatch.setattr(store, "fingerprints", lambda extra=(): now)


def test_status_says_what_changed(saved, monkeypatch):
    assert saved.status(KEY).state == "fresh"
    changed(monkeypatch, lanczos={"source": "edited"})
    status = saved.status(KEY)
    assert status.state == "unverified" and "lanczos" in status.why and "eos verify" in status.why
    changed(monkeypatch, lanczos={"source": "edited"}, descent={"numerics": 99, "source": "edited"})
    status = saved.status(KEY)
    assert status.state == "stale" and "NUMERICS of descent 1 -> 99" in status.why and "lanczos" not in status.why
    changed(monkeypatch, descent=fingerprints()["descent"], new_module={"numerics": 1, "source": "x"})
    assert saved.status(KEY).state == "unverified" and "new_module" in saved.status(KEY).why


def test_restamp_makes_a_replayed_record_fresh(saved, monkeypatch):
    before = saved.manifest(KEY)
    changed(monkeypatch, data={"source": "edited"})
    assert saved.status(KEY).state == "unverified"
    saved.restamp(KEY)
    assert saved.status(KEY).state == "fresh" and litter_free(saved)
    after = saved.manifest(KEY)
    assert {k: v for k, v in after.items() if k != "code"} == {k: v for k, v in before.items() if k != "code"}
    assert after["code"]["data"]["source"] == "edited"


def test_prose_and_layout_are_no_code(tmp_path, monkeypatch):
    before = fingerprints()
    assert set(before) == set(NUMERIC_MODULES) and all(f["numerics"] == 1 for f in before.values())
    source = pathlib.Path(data.__file__).read_text()
    copy = tmp_path / "data.py"
    monkeypatch.setattr(data, "__file__", str(copy))
    copy.write_text(source.replace('"""The data sets', '"""About the data sets'))
    assert fingerprints() == before
    copy.write_text("# a comment\n" + source.replace("\n\n\n", "\n\n\n\n# another\n"))
    assert fingerprints() == before
    assert "/ scale" in source
    copy.write_text(source.replace("/ scale", "* scale"))
    assert {name for name, f in fingerprints().items() if f != before[name]} == {"data"}
    monkeypatch.setattr(data, "NUMERICS", 2)
    assert fingerprints()["data"]["numerics"] == 2


def test_the_root_can_be_moved(own_root):
    assert store.results_folder() == own_root / "results" == Store().folder
