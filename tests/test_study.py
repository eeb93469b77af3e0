"""Sweeps: what is on record is skipped, a lost worker costs a try and no number, a failure stops nothing else."""

import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest

from eos_utils import catalogue, cli, pools, study
from eos_utils.store import Store
from tests import pool_tasks

OWN = """
about: Small runs.
runs:
  small_width{width}_seed{seed}:
    for: {width: [4, 6], seed: [0, 1]}
    experiment: {dataset: digits, n: 40, eta: "1/10", steps: 25}
    measure: {k: 1, stride: 5}
    minutes: 0.1
"""


@pytest.fixture
def file(own_root):
    """A sweep of four runs in a repository of the test's own."""
    path = own_root / "sweeps" / "small.yaml"
    path.parent.mkdir()
    path.write_text(OWN)
    return path


def numbers(store):
    """Everything that the records of a store say, by key."""
    return {
        key: {name: variable.values for name, variable in store.load(key).variables.items()} for key in store.keys()
    }


def undisturbed(entries, folder):
    """The same runs, one after the other in this process, with one thread."""
    store = Store(folder)
    for entry in entries:
        assert catalogue.record(entry, device="cpu", progress=False, store=store)
    return numbers(store)


def same(one, other):
    assert one.keys() == other.keys() and one
    for key in one:
        assert one[key].keys() == other[key].keys()
        assert all(np.array_equal(one[key][name], other[key][name]) for name in one[key]), key


def test_a_sweep_expands_its_grid_and_has_a_place_of_its_own(file, own_root):
    entries, store = study.read(file)
    assert [e.name for e in entries] == [f"small_width{w}_seed{s}" for w in (4, 6) for s in (0, 1)]
    assert len({e.experiment.key for e in entries}) == 4 and store.folder == own_root / "runs" / "small"


@pytest.mark.parametrize("text, says", [
    ("about: x\nrun: {}\n", "small.yaml: 'run' is unknown; there are about, catalogue, runs"),
    ("about: x\n", "one of the two"),
    ("catalogue: [x]\nruns: {}\n", "one of the two"),
    ("catalogue: [fg_nothing*]\n", "no run of the catalogue is called 'fg_nothing*'"),
    ("- a\n", "is unknown"),
    ("a: [\n", "is no YAML"),
    ("runs: {a: {for: {seed: [0, 1]}, experiment: {}}}\n", "the name 'a' is taken twice"),
    ("runs: {a: {experiment: {widht: 3}}}\n", "widht"),
    ("runs: {a: {expriment: {}}}\n", "'expriment' is unknown"),
])  # fmt: skip
def test_a_file_with_faults_is_refused_by_name(file, text, says):
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        study.read(file)
    assert says in str(error.value)


def test_a_file_that_is_not_there_names_those_that_are(file):
    with pytest.raises(ValueError, match=r"there are sweeps/small.yaml"):
        study.read(pathlib.Path("sweeps/smal.yaml"))


def test_the_sweeps_of_the_repository_can_be_read():
    folder = pathlib.Path(__file__).resolve().parents[1] / "sweeps"
    assert all(study.read(path)[0] for path in folder.glob("*.yaml")) and len(list(folder.glob("*.yaml"))) >= 4


def test_processes_compute_what_one_process_does_and_the_rest_is_skipped(file, tmp_path, capsys, monkeypatch):
    entries, store = study.read(file)
    first = catalogue.record(entries[0], device="cpu", progress=False, store=store)  # by whomever
    assert first and cli.main(["sweep", str(file)]) == 0
    out = capsys.readouterr().out
    assert "1 on record, 3 to compute" in out and "3 recorded, 1 skipped" in out
    same(numbers(store), undisturbed(entries, tmp_path / "other"))
    monkeypatch.setattr(pools, "processes", None)  # nothing is left to compute
    assert cli.main(["sweep", str(file)]) == 0 and "4 skipped" in capsys.readouterr().out


def test_a_run_that_fails_is_in_the_table_and_stops_no_other(file, capsys):
    file.write_text(OWN.replace("stride: 5}", "stride: 5, k: 1}").replace("measure: {k: 1,", "measure: {k: 100000,"))
    file.write_text(file.read_text() + OWN.partition("runs:\n")[2].replace("small_", "fine_").replace("[4, 6]", "[5]"))
    text = file.read_text().replace("k: 100000, stride: 5, k: 1}", "k: 100000, stride: 5}")
    file.write_text(text)
    assert cli.main(["sweep", str(file), "--workers", "1"]) == 1
    table = capsys.readouterr().out.split("records:")[0].splitlines()[-7:]
    assert [line.split()[1] for line in table if line.startswith("small_")] == ["failed"] * 4
    assert all("k=100000: this network has only P=" in line for line in table if line.startswith("small_"))
    assert table[-1] == "2 recorded, 4 failed"


def test_a_job_whose_process_dies_is_tried_again(tmp_path):
    jobs = [(tmp_path / f"{i}", i) for i in range(3)]
    assert dict(pools.processes(pool_tasks.die_once, jobs, 2, retries=2)) == {0: 0, 1: 10, 2: 20}


def test_a_job_that_kills_every_process_fails_alone():
    found = dict(pools.processes(pool_tasks.die, [0, 1, 2, 3], 2, retries=1))
    assert {i: found[i] for i in (0, 2, 3)} == {0: 0, 2: 20, 3: 30}
    assert isinstance(found[1], pools.LostError) and "2 times" in str(found[1])


def test_numbers_below_one_and_unknown_clusters_are_refused(file):
    entries, store = study.read(file)
    with pytest.raises(ValueError, match="workers=0"):
        study.run_many(entries, store=store, workers=0)
    with pytest.raises(ValueError, match="cluster='sloorm': choose local, slurm, pbs"):
        study.run_many(entries, store=store, cluster="sloorm", tell=str)


def test_a_fork_waits_for_its_base(file):
    file.write_text("""
runs:
  base: {experiment: {dataset: digits, n: 40, width: 4, eta: "1/10", steps: 20}, measure: {k: 1, stride: 5}}
  fork: {experiment: {steps: 10, fork: {of: base, at: 0, size: 1e-6}}, measure: {k: 1, stride: 5}}
""")
    entries, store = study.read(file)
    told = []
    outcomes = study.run_many(entries[::-1], store=store, workers=1, tell=told.append)
    assert [(o.name, o.state) for o in outcomes] == [("fork", "recorded"), ("base", "recorded")]
    assert told[1].startswith("[1/2] base") and told[2].startswith("[2/2] fork")


def test_dask_loses_a_worker_and_no_number(file, tmp_path):
    """Two workers, the one that has begun a run is killed in the midst of it; another finishes from its checkpoint."""
    pytest.importorskip("distributed")
    file.write_text(OWN.replace("steps: 25", "steps: 500"))
    entries, store = study.read(file)
    entries = entries[:3]
    with pools.environment(1), pools.client("local", 2, 1, {}, 2) as connected:
        jobs = [study.Job(e, str(store.folder), "cpu", 1, False) for e in entries]
        results = pools.on_dask(connected, study._computed, jobs)
        pool = connected.cluster.workers
        victim = None
        deadline = time.monotonic() + 60

        def kill():
            nonlocal victim
            while victim is None and time.monotonic() < deadline:
                busy = {a for a, keys in connected.processing().items() if keys}
                for worker in pool.values():
                    if worker.worker_address in busy:
                        victim = worker.pid
                        time.sleep(0.3)
                        os.kill(victim, signal.SIGKILL)
                        return
                time.sleep(0.05)

        thread = threading.Thread(target=kill)
        thread.start()
        found = dict(results)
        thread.join()
    assert victim is not None
    assert sorted(found) == [0, 1, 2] and all(isinstance(r, study.Done) for r in found.values()), found
    same(numbers(store), undisturbed(entries, tmp_path / "other"))


def test_a_worker_with_a_disk_of_its_own_sends_its_files(file, tmp_path):
    entries, _ = study.read(file)
    there, here = Store(tmp_path / "there"), Store(tmp_path / "here")
    here.check_writable()
    done = study._computed(study.Job(entries[0], str(there.folder), "cpu", 1, True))
    assert study._outcome(entries[0].name, done, here).state == "recorded"
    assert here.status(entries[0].experiment.key).state == "fresh"
    same(numbers(here), numbers(there))


def test_the_table_counts():
    rows = [
        study.Outcome("a", "recorded", 61.2),
        study.Outcome("bb", "failed", 0, "no memory"),
        study.Outcome("c", "skipped"),
    ]
    assert study.table(rows).splitlines() == [
        "a   recorded       61 s",
        "bb  failed          0 s  no memory",
        "c   skipped         0 s",
        "1 recorded, 1 skipped, 1 failed",
    ]


def test_a_diverged_run_is_a_result(file):
    file.write_text(OWN.replace('"1/10"', '"2000"').replace("[4, 6]", "[4]").replace("[0, 1]", "[0]"))
    entries, store = study.read(file)
    (found,) = study.run_many(entries, store=store, workers=1, tell=str)
    assert found.state == "recorded" and found.why == "diverged, which is a result"


def test_a_batch_job_carries_what_a_worker_needs(file, tmp_path, monkeypatch):
    """PBS by a stand-in for qsub that runs the job file: threads, paths and options are in it, and its run is whole."""
    pytest.importorskip("dask_jobqueue")
    here = tmp_path / "bin"
    here.mkdir()
    qsub = f'#!/bin/sh\ncp "$1" {tmp_path}/job\nsh {tmp_path}/job >{tmp_path}/out 2>&1 &\necho 1.here\n'
    for name, text in (("qsub", qsub), ("qdel", "#!/bin/sh\n")):
        (here / name).write_text(text)
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).resolve().parents[1]))
    entries, store = study.read(file)
    options = {"queue": "short", "walltime": "00:10:00"}
    outcomes = study.run_many(entries[:1], store=store, workers=1, cluster="pbs", options=options, tell=str)
    assert [o.state for o in outcomes] == ["recorded"], (tmp_path / "out").read_text()
    job = (tmp_path / "job").read_text()
    for line in ("#PBS -q short", "#PBS -l walltime=00:10:00", "export OMP_NUM_THREADS='1'", "export PYTHONPATH='"):
        assert line in job, job
    assert f"export EOS_ROOT='{os.environ['EOS_ROOT']}'" in job
    same(numbers(store), undisturbed(entries[:1], tmp_path / "other"))


def test_without_dask_a_cluster_names_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    entries, store = study.read(file)
    with pytest.raises(RuntimeError, match=r"pip install 'eos-utils\[cluster\]'"):
        study.run_many(entries, store=store, cluster="local", tell=str)
