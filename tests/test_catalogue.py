"""The catalogue: names for runs, forks by name, and recording into results/."""

import pathlib

import pytest
import xarray as xr

from eos_utils import catalogue as module
from eos_utils import forks
from eos_utils.catalogue import catalogue, find, record
from eos_utils.experiment import Experiment, Measure
from eos_utils.store import Store, StoreError

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

BASE = """
base:
  about: The base
    run.
  experiment: {dataset: digits, n: 200, width: 8, eta: 2/2, steps: 5}
  measure: {k: 2, stride: 3, snapshots: [end]}
  minutes: 0.5
"""
FORKS = """
fork{fork_seed}:
  for: {fork_seed: [1, 2]}
  experiment: {steps: 3, fork: {of: base, at: end, size: 1e-3}}
  measure: {k: 1, stride: 1}
"""


def write(root, text, name="runs.yaml"):
    (root / "experiments" / name).write_text(text)


def test_an_entry_holds_what_is_written(own_root):
    write(own_root, BASE)
    (entry,) = catalogue().values()
    assert entry.name == "base" and entry.about == "The base run." and entry.minutes == 0.5
    assert entry.experiment == Experiment(dataset="digits", n=200, width=8, eta="2/2", steps=5)
    assert entry.measure == Measure(k=2, stride=3, snapshots=("end",))
    assert find("base") == entry
    assert (entry.status().state, entry.status().why) == ("pending", "registered, not yet run")


def test_expansion_makes_one_run_for_each_combination(own_root):
    write(
        own_root,
        """
        run_w{width}_s{seed}:
          for: {width: [4, 8], seed: [1, 2, 3]}
          experiment: {dataset: digits, n: 50}
        """,
    )
    entries = catalogue()
    assert list(entries) == [f"run_w{w}_s{s}" for w in (4, 8) for s in (1, 2, 3)]
    assert entries["run_w8_s2"].experiment == Experiment(dataset="digits", n=50, width=8, seed=2)
    assert len({e.experiment.key for e in entries.values()}) == 6


def test_a_fork_shares_its_base_and_names_it_by_key(own_root):
    write(own_root, BASE.replace("steps: 5", "steps: 5, stop_accuracy: 0.99") + FORKS)
    entries = catalogue()
    base = entries["base"].experiment
    for seed in (1, 2):
        fork = entries[f"fork{seed}"].experiment
        assert fork.fork["of"] == base.key and fork.fork["at"] == "end" and fork.fork["seed"] == seed
        assert (fork.width, fork.eta, fork.n, fork.steps, fork.stop_accuracy) == (8, "1", 200, 3, None)
    assert entries["fork1"].experiment.key != entries["fork2"].experiment.key


def test_files_are_read_in_order_and_may_be_empty(own_root):
    write(own_root, BASE, "b.yaml")
    write(own_root, "", "a.yaml")
    write(own_root, FORKS, "c.yaml")
    assert list(catalogue()) == ["base", "fork1", "fork2"]


@pytest.mark.parametrize("text, named", [
    ("a: {experimnt: {}}", "runs.yaml: a: 'experimnt' is unknown; there are about, experiment"),
    ("a: {experiment: {etta: 1}}", "'etta' is no field of an experiment"),
    ("a: {measure: {strides: 3}}", "strides"),
    ("a: {experiment: {eta: 2/0}}", "eta='2/0'"),
    ("a{seed}: {for: {sed: [1]}}", "sed"),
    ("a: {for: {seed: [1, 2]}}", "'a' is taken already"),
    (BASE + "b: {experiment: {fork: {of: bas, at: end, size: 1e-6}}}", "b forks from 'bas', which is not listed"),
    ("b: {experiment: {fork: {of: base, at: end, size: 1e-6}}}" + BASE, "not listed before it"),
    (BASE + "b: {experiment: {fork: {at: end, size: 1e-6}}}", "b"),
    ("a:", "a"),
])  # fmt: skip
def test_mistakes_are_named(own_root, text, named):
    write(own_root, text)
    with pytest.raises((ValueError, KeyError, TypeError), match=named) as caught:
        catalogue()
    assert isinstance(caught.value, ValueError), f"{caught.value!r} is no message for a reader"


def test_names_are_unique_across_files(own_root):
    write(own_root, BASE, "a.yaml")
    write(own_root, BASE, "b.yaml")
    with pytest.raises(ValueError, match="b.yaml: the name 'base' is taken already"):
        catalogue()


def test_an_unknown_name_suggests_near_ones(own_root):
    write(own_root, BASE + FORKS)
    with pytest.raises(KeyError, match="no run 'frok1' in experiments/; did you mean fork1"):
        find("frok1")
    with pytest.raises(KeyError) as far:
        find("something_else")
    assert "did you mean" not in str(far.value)


def test_the_repositorys_own_catalogue_is_sound():
    entries = catalogue(REPOSITORY / "experiments")
    assert len(entries) >= 10 and len({e.experiment.key for e in entries.values()}) == len(entries)
    for entry in entries.values():
        assert entry.about and entry.minutes > 0
        assert entry.measure.stride % 2 == 1 or entry.measure.pairs, f"{entry.name}: an even stride aliases"
        entry.measure.observers()


# ---- recording -------------------------------------------------------------------------------------------


def recording(name, **keywords):
    return record(find(name), device="cpu", progress=False, **keywords)


def test_recording_writes_once_and_forks_build_on_it(own_root, own_cache):
    write(own_root, BASE + FORKS)
    with pytest.raises(StoreError, match="no record of"):
        recording("fork1")
    assert recording("base") and recording("fork1")
    found = Store().load(find("base").experiment.key)
    assert found.sizes["step"] == 6 and '"name": "base"' in found.attrs["provenance"]
    fork = Store().load(find("fork1").experiment.key)
    assert fork["step"].values.tolist() == [5, 6, 7, 8]
    assert find("base").status().state == "fresh" and not list((own_cache / "partial").glob("*.pt"))
    assert len(list((own_root / "results").iterdir())) == 4


def test_recording_a_base_keeps_the_points_at_which_others_fork(own_root, own_cache, monkeypatch):
    fork = "late:\n  experiment: {steps: 2, fork: {of: base, at: 3, size: 0}}\n  measure: {k: 1, stride: 1}\n"
    write(own_root, BASE + fork)
    assert recording("base")
    key = find("base").experiment.key
    version = Store().manifest(key)["sha256"][:8]
    assert [path.name for path in (own_cache / "points").iterdir()] == [f"{key}-{version}-3.pt"]
    seen = []
    monkeypatch.setattr(forks.Objective, "initial", lambda self: seen.append(1))  # no replay from the beginning
    assert recording("late") and not seen
    run, base = Store().load(find("late").experiment.key), Store().load(key)
    assert run["loss"].values[:3].tolist() == base["loss"].values[3:].tolist()


def test_a_usable_record_is_kept_unless_asked_for_and_a_damaged_one_replaced(own_root, monkeypatch):
    write(own_root, BASE)
    assert recording("base")
    entry, compute, calls = find("base"), module.compute, []
    monkeypatch.setattr(module, "compute", lambda *a, **k: calls.append(1) or compute(*a, **k))
    assert not recording("base") and not calls
    assert recording("base", replace=True) and len(calls) == 1
    path = Store().folder / Store().manifest(entry.experiment.key)["file"]
    path.write_bytes(path.read_bytes()[:-1])
    assert entry.status().state == "stale"
    assert recording("base") and len(calls) == 2 and entry.status().state == "fresh"


def test_results_that_cannot_be_written_are_noticed_before_the_run(own_root, monkeypatch):
    write(own_root, BASE)
    (own_root / "results").write_text("a file where the folder should be")
    monkeypatch.setattr(module, "compute", None)
    with pytest.raises(StoreError, match="results is not writable"):
        recording("base")


def test_a_recording_that_cannot_be_stored_is_not_lost(own_root, monkeypatch):
    write(own_root, BASE)
    with monkeypatch.context() as patch:

        def full(self, path, **arguments):
            raise OSError(28, "No space left on device")

        patch.setattr(xr.Dataset, "to_netcdf", full)
        with pytest.raises(StoreError, match="No space left"):
            recording("base")
    stepped = []
    monkeypatch.setattr("eos_utils.run._Progress.__call__", lambda self, descent: stepped.append(descent.step))
    assert recording("base") and len(stepped) <= 1  # taken up at its end, not done again


OF_SEEDS = """
base{seed}:
  for: {seed: [100, 101]}
  experiment: {dataset: digits, n: 200, steps: 40}
fork{seed}:
  for: {seed: [100, 101]}
  experiment: {steps: 5, fork: {of: "base{seed}", at: {100: 20, 101: 25}, size: 0}, decay: {factor: 1/4, at_step: 0}}
"""


def test_a_fork_takes_its_base_and_its_step_from_the_seed(own_root):
    (own_root / "experiments" / "a.yaml").write_text(OF_SEEDS)
    runs = catalogue()
    for seed, at in ((100, 20), (101, 25)):
        fork = runs[f"fork{seed}"].experiment
        assert fork.fork == {"of": runs[f"base{seed}"].experiment.key, "at": at, "size": "0", "seed": 0}
        assert fork.seed == seed and fork.steps == 5 and fork.decay["factor"] == "1/4"


def test_decays_and_held_directions_begin_where_an_entry_has_been_established():
    """The steps in the catalogue are those that the recorded base runs give, not ones that were once typed."""
    from eos_utils import page
    from eos_utils.eos_stats import HALF, entry_step

    runs = catalogue()
    for name, eig in (("fg_fig3_after1", 1), ("fg_fig3_after2", 2), ("fg_fig3_after3", 3), ("fg_fig2_held", 1)):
        for seed in range(100, 105):
            base = page.on_record(f"fg_fig1_seed{seed}")
            established = entry_step(base, eig) + HALF * int(base.attrs["stride"])
            assert runs[f"{name}_seed{seed}"].experiment.fork["at"] == established, (name, seed)


def test_a_seed_without_a_step_is_refused(own_root):
    (own_root / "experiments" / "a.yaml").write_text(OF_SEEDS.replace(", 101: 25", ""))
    with pytest.raises(ValueError, match="at has no step for seed 101"):
        catalogue()


@pytest.mark.parametrize("at", [1300.0, None, True])
def test_a_fork_begins_at_a_label_or_a_step(at):
    with pytest.raises(ValueError, match="label of a snapshot or a step"):
        Experiment(fork={"of": "k", "at": at, "size": 0, "seed": 0})
