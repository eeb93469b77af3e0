"""Records from elsewhere, the release archive, and the verification of all runs."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import xarray as xr
import yaml

from eos_utils import cli, foreign, run, verify
from eos_utils.archive import archive, metadata
from eos_utils.catalogue import catalogue, record
from eos_utils.forks import start_of
from eos_utils.store import Store, StoreError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def elsewhere(tmp_path, short, sparse, own_root):
    """A folder with one record, made there."""
    result, provenance = run.compute(short, sparse, progress=False)
    there = Store(tmp_path / "elsewhere")
    assert there.save(short.key, result, provenance)
    return there


def rewritten(there, key, content):
    """The same record with other bytes and a manifest that agrees with them."""
    manifest = there.manifest(key)
    (there.folder / manifest["file"]).unlink()
    sha256 = hashlib.sha256(content).hexdigest()
    told = manifest | {"sha256": sha256, "file": f"{key}-{sha256[:8]}.nc"}
    (there.folder / told["file"]).write_bytes(content)
    there.manifest_path(key).write_text(json.dumps(told))


def test_a_record_from_elsewhere_is_as_good_as_a_local_one(elsewhere, short, own_root, capsys):
    assert cli.main(["adopt", str(elsewhere.folder)]) == 0
    assert "taken" in capsys.readouterr().out
    here = Store()
    xr.testing.assert_identical(here.load(short.key), elsewhere.load(short.key))
    assert here.status(short.key).state == "fresh" and len(list(here.folder.iterdir())) == 2
    assert foreign.adopt(elsewhere.folder, short.key) is False


def test_a_record_of_another_run_or_in_pieces_is_refused(elsewhere, short, tiny, own_root, capsys):
    with pytest.raises(StoreError, match=f"its experiment has the key {short.key}"):
        foreign.check(elsewhere.load(short.key), tiny.key)
    rewritten(elsewhere, short.key, b"\x89HDF\r\n\x1a\n, and nothing more")
    assert cli.main(["adopt", str(elsewhere.folder)]) == 2
    assert "was not taken: " in capsys.readouterr().err and Store().keys() == []


@pytest.mark.parametrize("reader, said", [
    ("import os; os.kill(os.getpid(), 11)", r"crashed its reader \(signal 11\)"),
    ("import sys; sys.exit('OSError: no HDF5')", "not taken: OSError: no HDF5"),
    ("import time; time.sleep(60)", "takes more than 0.5 s"),
])  # fmt: skip
def test_a_file_that_harms_its_reader_harms_nobody_else(elsewhere, short, monkeypatch, own_root, reader, said):
    monkeypatch.setattr(foreign, "READER", (sys.executable, "-S", "-c", reader))
    monkeypatch.setattr(foreign, "SECONDS", 0.5 if "sleep" in reader else 60)
    with pytest.raises(StoreError, match=said):
        foreign.adopt(elsewhere.folder, short.key)
    assert Store().keys() == []


def test_bytes_that_changed_after_the_look_are_not_taken(elsewhere, short, own_root):
    manifest = elsewhere.manifest(short.key)
    with pytest.raises(StoreError, match="truncated or altered"):
        Store().take(manifest, b"something else")
    assert Store().keys() == []


@pytest.mark.parametrize("change, said", [
    ({"loss": ("step", ["a"])}, "its loss is no series"),
    ({"eta": (("step", "x"), [[1.0]])}, "its eta is no series"),
])  # fmt: skip
def test_what_every_trajectory_has_is_looked_for(short, change, said):
    whole = {name: ("step", [1.0]) for name in ("loss", "eta", "accuracy")}
    foreign.check(made := xr.Dataset(whole, attrs={"experiment": json.dumps(short.canonical())}), short.key)
    with pytest.raises(StoreError, match=said):
        foreign.check(xr.Dataset({**whole, **change}, attrs=made.attrs), short.key)
    with pytest.raises(StoreError, match="no steps"):
        foreign.check(made.isel(step=slice(0)), short.key)


# ---- the archive -------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, elsewhere, own_root):
    (own_root / "CITATION.cff").write_text((ROOT / "CITATION.cff").read_text())
    (own_root / ".gitignore").write_text("_build/\n")
    elsewhere.folder.rename(own_root / "results")
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(own_root), *command], check=True)
    return own_root


def test_an_archive_is_the_commit_its_book_and_their_checksums(repository, tmp_path):
    without = archive(repository, tmp_path / "without.zip")
    html = repository / "_build" / "html"
    (html / "notebooks").mkdir(parents=True)
    (html / "notebooks" / "a.html").write_text("a page")
    assert archive(repository, tmp_path / "unfinished.zip").read_bytes() == without.read_bytes()  # no complete book
    (html / ".complete").touch()
    out = archive(repository)
    assert out == repository / "_build" / "eos-companion-0.1.0.zip"
    with zipfile.ZipFile(out) as made:
        contents = {name.partition("/")[2]: made.read(name) for name in made.namelist()}
    sums = dict(reversed(line.split("  ")) for line in contents.pop("SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    tracked = subprocess.run(["git", "-C", repository, "ls-files"], capture_output=True, text=True).stdout.split()
    assert set(contents) == {*tracked, "html/notebooks/a.html", ".zenodo.json"}
    assert json.loads(contents[".zenodo.json"])["creators"] == [{"name": "Edge of Stability companion contributors"}]
    first = out.read_bytes()
    for path in repository.rglob("*.html"):
        path.touch()
    assert archive(repository).read_bytes() == first


def test_an_archive_is_not_made_of_what_is_changed_or_damaged(repository):
    (path,) = (repository / "results").glob("*.nc")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"commit or remove first[^.]*{path.name}"):
        archive(repository)
    subprocess.run(
        ["git", "-C", repository, "-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qam", "damage"],
        check=True,
    )
    with pytest.raises(StoreError, match="truncated or altered"):
        archive(repository)
    assert not (repository / "_build").exists()


def test_the_metadata_are_those_of_the_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    made = metadata(citation)
    assert (made["title"], made["version"], made["license"]) == (citation["title"], str(citation["version"]), "MIT")
    assert made["description"].startswith("A Jupyter Book that reruns") and "\n" not in made["description"]
    assert made["references"][0].startswith("Wang, Zixuan; Li, Zhouzi; Li, Jian (2022): Analyzing sharpness")
    assert made["references"][1].startswith("Anonymous: Exploring")


# ---- eos verify --all --------------------------------------------------------------------------------


def test_all_runs_are_replayed_and_the_cheapest_with_forks_computed_anew(own_root, monkeypatch, capsys):
    experiment = {"dataset": "digits", "n": 100, "width": 4, "eta": "2/10", "steps": 30}
    entries = {
        f"run{i}": {"experiment": {**experiment, "seed": i}, "measure": {"k": 1, "stride": 9}, "minutes": 9 - i}
        for i in range(3)
    }
    (own_root / "experiments" / "x.yaml").write_text(yaml.safe_dump(entries))
    runs = catalogue()
    for name in ("run0", "run1"):
        record(runs[name], progress=False)
    done = []
    monkeypatch.setattr(verify, "_judged", lambda entry: ["a claim"])
    monkeypatch.setattr(verify, "whole", lambda entry, **_: done.append(entry.name) or [])
    assert cli.main(["verify", "--all"]) == 0
    out = capsys.readouterr().out
    assert done == ["run1", "run0"] and "4 of 4 agree" in out and "run2" not in out
    assert out.count("first steps") == 2 and out.count("let one expect") == 2

    altered = Store().load(runs["run0"].experiment.key)
    altered["loss"] = altered["loss"] * 1.01
    Store().save(runs["run0"].experiment.key, altered, json.loads(altered.attrs["provenance"]), replace=True)
    monkeypatch.setattr(verify, "whole", lambda entry, **_: ["hover_level is 3, on record 1 to 2"])
    assert cli.main(["verify", "--all"]) == 1
    out = capsys.readouterr().out
    assert "1 of 4 agree" in out and "NOT OK" in out and "DIFFERS from initialisation" in out and "hover_level" in out
    Store().manifest_path(runs["run1"].experiment.key).write_text("{")
    assert "is damaged" in next(verify.survey(progress=False)).found


def test_runs_are_looked_at_in_processes_and_a_base_is_replayed_once(own_root, monkeypatch, capsys):
    experiment = {"dataset": "digits", "n": 100, "width": 4, "eta": "2/10", "steps": 30}
    entries = {"base": {"experiment": experiment, "measure": {"k": 1, "stride": 9}}}
    for at in (20, 10, 9):
        fork = {"steps": 5, "fork": {"of": "base", "at": at, "size": 0}}
        entries[f"branch{at}"] = {"experiment": fork, "measure": {"k": 1, "stride": 2}}
    (own_root / "experiments" / "x.yaml").write_text(yaml.safe_dump(entries))
    runs = catalogue()
    for name in ("base", "branch20", "branch10", "branch9"):
        record(runs[name], progress=False)

    begun = []
    monkeypatch.setattr(
        verify, "start_of", lambda e, o, s, p: begun.append(sorted(p.iterdir())) or start_of(e, o, s, p)
    )
    assert [row.name for row in verify.survey(progress=False)] == ["base", "branch9", "branch10", "branch20"]
    assert [len(there) for there in begun] == [0, 0, 1, 2]  # each starts from the point that the one before has left

    assert cli.main(["verify", "--all", "--jobs", "2"]) == 0
    assert "4 of 4 agree" in capsys.readouterr().out
    manifest = Store().manifest_path(runs["branch9"].experiment.key)
    manifest.write_text(manifest.read_text().replace('"sha256"', '"sha265"'))
    assert cli.main(["verify", "--all", "--jobs", "2"]) == 1
    out = capsys.readouterr().out
    assert "3 of 4 agree" in out and "branch9" in out
