"""`eos verify`: a replay agrees with an honest record, and with no other."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import xarray as xr
import yaml

from eos_utils import cli, forks, store, verify
from eos_utils.catalogue import catalogue, record
from eos_utils.store import Store
from eos_utils.verify import Replay, _foreseeable, _slack, expected, joins, replay, whole


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository in miniature with one recorded run on digits."""
    monkeypatch.setenv("EOS_ROOT", str(tmp_path))
    monkeypatch.setenv("EOS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "experiments").mkdir()
    fields = {
        "experiment": {"dataset": "digits", "n": 150, "width": 8, "eta": "2/12", "steps": 90, "seed": 3},
        "measure": {"k": 3, "stride": 7, "snapshots": [40]},
    }
    (tmp_path / "experiments" / "toy.yaml").write_text(yaml.safe_dump({"toy": fields}))
    entry = catalogue()["toy"]
    assert record(entry, progress=False)
    return entry


def test_a_fresh_record_agrees_from_its_initialisation_and_its_snapshot(toy):
    found = replay(toy)
    assert [(r.begin, r.step) for r in found] == [("initialisation", 0), ("40", 40)]
    assert all(r.agrees for r in found) and max(r.loss for r in found) < 1e-5


@pytest.mark.parametrize("what", ["loss", "eigenvalue", "theta"])
def test_an_altered_record_does_not_agree(toy, what):
    run = Store().load(toy.experiment.key)
    changed = run.copy(deep=True)
    changed[what] = changed[what] * (1.01 if what != "theta" else 1.05)
    Store().save(toy.experiment.key, changed, Store().manifest(toy.experiment.key)["provenance"], replace=True)
    assert not all(r.agrees for r in replay(toy))
    assert cli.main(["verify", "toy"]) == 1


def test_changed_code_makes_a_record_unverified_until_a_replay_restamps_it(toy, monkeypatch, capsys):
    assert toy.status().state == "fresh"
    edited = store.fingerprints()
    edited["lanczos"] = {**edited["lanczos"], "source": "another"}
    monkeypatch.setattr(store, "fingerprints", lambda extra=(): edited)
    assert toy.status().state == "unverified" and "lanczos" in toy.status().why
    assert cli.main(["verify", "--quick"]) == 0
    assert toy.status().state == "unverified"  # a quick look does not stamp
    assert cli.main(["verify", "toy"]) == 0
    assert "stamped" in capsys.readouterr().out and toy.status().state == "fresh"


def test_numerics_raised_on_purpose_make_it_stale_and_no_replay_mends_that(toy, monkeypatch):
    raised = store.fingerprints()
    raised["descent"] = {**raised["descent"], "numerics": raised["descent"]["numerics"] + 1}
    monkeypatch.setattr(store, "fingerprints", lambda extra=(): raised)
    assert toy.status().state == "stale" and "NUMERICS of descent" in toy.status().why
    assert cli.main(["verify", "toy"]) == 1
    assert toy.status().state == "stale"


def test_recording_again_is_not_needed_and_not_done(toy):
    before = Store().manifest(toy.experiment.key)
    assert record(toy, progress=False) is False
    assert Store().manifest(toy.experiment.key) == before


def test_a_whole_rerun_needs_forks_to_be_compared_with(toy, tmp_path):
    (tmp_path / "book" / "claims").mkdir(parents=True)
    with pytest.raises(ValueError, match="no claim with forks"):
        whole(toy)


def test_a_whole_rerun_is_compared_with_the_spread_of_the_forks(toy, tmp_path, monkeypatch):
    (tmp_path / "book" / "claims").mkdir(parents=True)
    claim = {"rule": {"statistic": "initial_sharpness", "experiments": ["toy"], "forks": ["f"]}}
    monkeypatch.setattr(verify.claims, "claims", lambda place: [claim])
    monkeypatch.setattr(verify, "_forks_of", lambda entry, rule: ["f"])
    truth = float(Store().load(toy.experiment.key)["eigenvalue"][0, 0]) / 12
    for off, agrees in {0.0: True, 0.02: True, 0.06: False, -0.06: False}.items():
        spread = truth + off + np.array([-0.01, -0.005, 0.0, 0.005, 0.01])
        monkeypatch.setattr(verify.claims, "measure", lambda *a, s=spread: dict(zip("abcde", s, strict=True)))
        outside = whole(toy, progress=False)
        assert (outside == []) is agrees, (outside, spread)


def test_a_sound_rerun_has_all_of_many_statistics_inside():
    """Twenty independent normal statistics, four forks and a record: one rerun in a hundred may have one outside."""
    draws = np.random.default_rng(0).normal(size=(4000, 20, 6))
    t = scipy.stats.t.ppf(1 - 0.01 / 40, 4)  # what `expected` says, for all draws at once
    wide = t * draws[..., :5].std(axis=-1, ddof=1) * np.sqrt(1.2)
    low, high = expected(draws[0, 0, :5], 20)
    assert (low, high) == pytest.approx(draws[0, 0, :5].mean() + wide[0, 0] * np.array([-1, 1]))
    inside = (abs(draws[..., 5] - draws[..., :5].mean(axis=-1)) <= wide).all(axis=1).mean()
    assert inside == pytest.approx(0.99, abs=0.005)


def test_a_damaged_record_fails_verification(toy, capsys):
    path = Store().folder / Store().manifest(toy.experiment.key)["file"]
    path.write_bytes(path.read_bytes()[:-10])
    assert cli.main(["verify"]) == 1
    assert "truncated or altered" in capsys.readouterr().out


def test_a_fork_is_replayed_from_its_start(toy, tmp_path):
    text = (tmp_path / "experiments" / "toy.yaml").read_text()
    fork = {
        "experiment": {"steps": 30, "fork": {"of": "toy", "at": "40", "size": "1e-6"}},
        "measure": {"k": 3, "stride": 7},
    }
    (tmp_path / "experiments" / "toy.yaml").write_text(text + yaml.safe_dump({"toyfork": fork}))
    entry = catalogue()["toyfork"]
    assert record(entry, progress=False)
    (found,) = replay(entry)
    assert (found.begin, found.step, found.agrees) == ("the fork", 40, True)


def test_quick_takes_the_last_point_with_steps_after_it(toy):
    (found,) = replay(toy, quick=True)
    assert found.step == 40


def test_a_run_that_begins_far_above_the_edge_is_replayed_as_long_as_rounding_allows(toy):
    """ηλ = 5 multiplies a difference by 4 a step: from 1e-7 it takes seven to reach 1e-3, from 2e-16 more than 20."""
    run = Store().load(toy.experiment.key).copy(deep=True)
    assert _foreseeable(run, 0, 1e-7) == _foreseeable(run, 60, 1e-7) - 60 == 20
    run["eigenvalue"][:] = 5 / float(toy.experiment.step_size)
    assert _foreseeable(run, 0, 1e-7) == 6 and 4**6 * 1e-7 < 1e-3 < 4**7 * 1e-7
    assert _foreseeable(run, 0, 2e-16) == 20 and _foreseeable(run, 80, 1e-7) == 86
    run["eigenvalue"][8:] = 1.0  # measured from step 56 on: quiet again
    assert _foreseeable(run, 53, 1e-7) == 73


def test_past_the_edge_of_a_base_that_goes_another_way_nothing_is_judged():
    steps = np.arange(201)
    loss = np.exp(-steps / 100.0)
    loss[151:] *= 1.1  # rises at step 151
    base = xr.Dataset({"loss": ("step", loss)}, {"step": steps})
    assert forks.calm_until(base) == 150 and forks.calm_until(base.isel(step=slice(140))) == 139
    for step, off, slack in [(160, 1e-2, math.inf), (160, 1e-7, 1), (140, 1e-2, 50), (140, 1e-7, 1), (140, 1e-5, 5)]:
        assert _slack(float(loss[step]) * (1 + off), base, step) == slack
    unknown = Replay("a replay of its base", 160, loss=0.2, eigenvalue=0.1, slack=math.inf)
    assert unknown.agrees is None and str(unknown).startswith("cannot be judged from a replay of its base (20 steps")
    at = dataclasses.replace(unknown, joins=True)
    assert at.agrees is None and str(at).startswith("begins at the loss and the eigenvalues on record for its base")
    contradicts = dataclasses.replace(unknown, joins=False)
    assert contradicts.agrees is False and str(contradicts).startswith("DIFFERS from the loss and the eigenvalues on")
    assert dataclasses.replace(at, slack=1).agrees is False  # where a replay is possible, that alone counts


@pytest.mark.parametrize("project", [None, {"eig": 1}])
def test_a_branch_must_begin_at_what_is_on_record_for_its_base(toy, tmp_path, monkeypatch, project):
    text = (tmp_path / "experiments" / "toy.yaml").read_text()
    fork = {"steps": 30, "fork": {"of": "toy", "at": 42, "size": 0}, "decay": {"factor": "1/4", "at_step": 50}}
    more = fork if project is None else {"steps": 30, "fork": fork["fork"], "project": project}
    fields = {"branch": {"experiment": more, "measure": {"k": 2, "stride": 7}}}
    (tmp_path / "experiments" / "toy.yaml").write_text(text + yaml.safe_dump(fields))
    assert record(catalogue()["branch"], progress=False)
    run, base = (Store().load(catalogue()[name].experiment.key) for name in ("branch", "toy"))
    assert run["measured"].values[0] == run["step"].values[0] == 42 and joins(run, base) is True

    def altered(name, index, factor):
        other = run.copy(deep=True)
        other[name][index] *= factor
        return joins(other, base)

    assert altered("loss", 0, 1 + 1e-5) is None and altered("loss", 0, 1.01) is False
    assert altered("eigenvalue", (0, 1), 1.02) is False and altered("eigenvalue", (1, 1), 1.02) is True
    before_the_decay = altered("loss", 5, 1.01)  # of a direction held still, nothing but the beginning is shared
    assert before_the_decay is (False if project is None else True) and altered("loss", 9, 1.01) is True
    elsewhere = base.copy(deep=True)
    elsewhere["loss"][:] *= 1 - 1e-5
    assert joins(run, elsewhere) is None
    monkeypatch.setattr(verify, "_slack", lambda *a: math.inf)  # as if this machine went another way
    (found,) = replay(catalogue()["branch"], first=True)
    assert (found.agrees, found.joins) == (None, True)


def test_what_cannot_be_judged_counts_neither_way(monkeypatch, capsys):
    rows = [verify.Row("a", "first steps", "agrees", True), verify.Row("b", "first steps", "cannot be judged", None)]
    rows.append(verify.Row("b2", "first steps", "begins at", None, joins=True))
    monkeypatch.setattr(verify, "survey", lambda **_: iter(rows))
    assert cli.main(["verify", "--all"]) == 0
    beyond = (
        "2 begin past the edge of a run that goes another way on this machine, 1 of them at what is on record for it"
    )
    assert f"1 of 1 agree; {beyond}" in capsys.readouterr().out
    rows.append(verify.Row("c", "first steps", "DIFFERS", False))
    assert cli.main(["verify", "--all"]) == 1
    assert "1 of 2 agree; 2 begin" in capsys.readouterr().out
