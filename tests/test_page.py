"""What notebook pages show: runs with a decay, the set of step sizes, checks and findings."""

import json
import re
import types

import pytest
import xarray as xr
import yaml

from eos_utils import claims, figures, page
from eos_utils.catalogue import find
from eos_utils.run import compute
from eos_utils.store import Store, StoreError

CATALOGUE = """
base:
  experiment: {dataset: digits, n: 200, width: 8, eta: 2/2, steps: 40, seed: 100}
  measure: {k: 2, stride: 3}
after1:
  experiment: {steps: 10, fork: {of: base, at: 30, size: 0}, decay: {factor: 1/4, at_step: 0}}
  measure: {k: 2, stride: 3}
whole:
  experiment:
    {dataset: digits, n: 200, width: 8, eta: 2/2, steps: 60, seed: 100, decay: {factor: 1/4, entered: 1, then: 10}}
  measure: {k: 2, stride: 1}
"""


def parameters(**changes):
    fields = {
        "dataset": "digits", "n": 200, "labels": "onehot", "preprocessing": "center", "width": 8, "depth": 1,
        "activation": "relu", "loss": "half_mse", "eta": "2/2", "seed": 100, "steps": 60, "k": 2, "stride": 1,
        "factor": "1/4", "after": 1, "then": 10, "source": "auto", "device": "cpu",
    }  # fmt: skip
    return types.SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def recorded(own_root):
    (own_root / "experiments" / "a.yaml").write_text(CATALOGUE)
    for name in ("base", "after1"):
        entry = find(name)
        result, provenance = compute(entry.experiment, entry.measure, progress=False)
        Store().save(entry.experiment.key, result, {"name": name, **provenance})
    return own_root


def test_a_decay_on_record_is_taken_and_any_other_is_computed(recorded):
    run = page.decayed(parameters(), "after1")
    assert run.attrs["source"] == "recorded" and run.attrs["key"] == find("after1").experiment.key
    for change in ({"source": "live"}, {"seed": 101}, {"factor": "1/2"}, {"then": 9}, {"width": 9}):
        other = page.decayed(parameters(**change), "after1")
        assert other.attrs["source"] == "live", change
        at, fields = other.attrs["decayed_at"], json.loads(other.attrs["experiment"])
        assert at > 0 and other.attrs["last_step"] == at + change.get("then", 10), change
        assert fields["decay"]["entered"] == 1 and "fork" not in fields
    assert not page.is_canonical(page.decayed(parameters(seed=101), "after1"), "after1")
    assert page.is_canonical(run, "after1")


def test_a_decay_after_another_number_of_entries_is_another_run(recorded):
    entry = find("whole")
    result, provenance = compute(entry.experiment, entry.measure, progress=False)
    Store().save(entry.experiment.key, result, {"name": "whole", **provenance})
    assert page.decayed(parameters(), "whole").attrs["source"] == "recorded"
    assert page.decayed(parameters(after=2), "whole").attrs["source"] != "recorded"


def test_a_decay_that_is_registered_but_not_recorded_is_an_error(recorded):
    Store().manifest_path(find("after1").experiment.key).unlink()
    with pytest.raises(StoreError, match="no usable record"):
        page.decayed(parameters(), "after1")


def text(shown):
    from bs4 import BeautifulSoup

    rows = BeautifulSoup(shown.data, "html.parser").find_all("tr")
    return [[cell.get_text() for cell in row.find_all(["td", "th"])] for row in rows]


def test_the_set_of_step_sizes_says_what_each_does(own_root):
    shared = {"dataset": "digits", "n": 200, "width": 8, "seed": 100, "steps": 12}
    lines = {}
    for two_over, eta in ((30, "2/30"), (50, "2/50"), (150, "5")):
        entry = {"experiment": {**shared, "eta": eta}, "measure": {"k": 1, "stride": 3}}
        lines[f"fg_set_relu_onehot_center_eta{two_over}"] = entry
    for labels in ("onehot", "vehicles"):
        for preprocessing in ("center", "standardize"):
            for two_over in (30, 50, 150, 200):
                name = f"fg_set_relu_{labels}_{preprocessing}_eta{two_over}"
                lines.setdefault(name, {"experiment": {**shared, "seed": len(lines)}})
    (own_root / "experiments" / "set.yaml").write_text(yaml.safe_dump(lines))
    for two_over in (30, 50, 150):
        entry = find(f"fg_set_relu_onehot_center_eta{two_over}")
        result, provenance = compute(entry.experiment, entry.measure, progress=False)
        if two_over == 150:
            assert float(result["eigenvalue"][0, 0]) * 5 / 2 > 1
        Store().save(entry.experiment.key, result, {"name": entry.name, **provenance})
    shown = text(page.step_set("relu"))
    assert len(shown) == 5 and shown[1][:3] == ["ten", "centred", "2/30"] and shown[4][2] == "2/200"
    assert "λ₁η/2 goes to" in shown[1][4] and shown[4][4] == "starts below the edge"
    assert "catapult" in shown[3][4] or "diverges at step" in shown[3][4]
    assert float(shown[4][3]) == pytest.approx(float(shown[1][3]) * 30 / 200, rel=0.02)


@pytest.mark.parametrize("start, rise, says", [(3.0, 2.5, "catapult: the loss rises 2.5-fold"), (1.2, 1.0, "without")])
def test_a_catapult_has_a_rise_of_the_loss(start, rise, says):
    seen = {"loss": ("step", [1.0, rise, 0.5]), "eta": ("step", [2.0] * 3)}
    seen["eigenvalue"] = (("measured", "eig"), [[start], [0.8]])
    run = xr.Dataset(seen, {"step": [0, 1, 2], "measured": [0, 2]}, {"status": "steps"})
    told = page._fate(run, start)
    assert says in told and "λ₁η/2 goes to 0.8" in told and ("catapult" in told) == (rise > 1)


def test_checks_give_a_verdict_with_the_rule_s_settings_alone():
    p = types.SimpleNamespace(trials=2000, seeds=30, steps=200, source="live")
    changed = types.SimpleNamespace(**{**vars(p), "trials": 50})
    assert "no verdict" in page.checks("fg_lemma_a_2_recursion", changed).data
    rows = text(page.checks("fg_lemma_a_2_recursion", types.SimpleNamespace(source="live")))
    assert (rows[0][1], rows[0][-1]) == ("As printed", "Corrected")
    assert len(rows) > 1 and all("counterexample" in row[1] for row in rows[1:])


def test_findings_are_the_ledger_s(monkeypatch):
    rows = text(page.findings("FG", "mathematical", ("counterexample",)))[1:]
    expected = [
        c
        for c in claims.ledger()
        if (c["paper"], c["kind"]) == ("FG", "mathematical") and c["as_printed"] == "counterexample"
    ]
    set_as_html = re.compile(r"_|\^\((.*?)\)|\^")  # indices and powers
    plain = [re.sub(r"(?<=_\w,)[₊₋]", lambda m: {"₊": "+", "₋": "−"}[m[0]], c["statement"].strip()) for c in expected]
    written = [set_as_html.sub(r"\1", statement) for statement in plain]
    assert [row[1] for row in rows] == written and len(rows) > 10
    assert text(page.findings("FG", "mathematical", ("no such verdict",)))[1:] == []


def test_a_command_can_be_pasted_into_a_shell():
    shown = page.computed("fg_theorem_3_1", types.SimpleNamespace(labels="1, 1, -2/3", m=4, source="live")).data
    assert "-p labels &#x27;1, 1, -2/3&#x27;" in shown and "-p m 4" in shown


def test_classes_are_text_in_a_notebook_and_numbers_in_an_experiment():
    pair = parameters(labels="pair", classes="1, 0")
    assert page.experiment(pair).classes == (1, 0) and page.experiment(parameters(classes="")).classes is None
    with pytest.raises(ValueError, match="classes='one'"):
        page.experiment(parameters(labels="pair", classes="one"))


def test_a_run_to_entry_is_one_with_a_decay_that_changes_nothing(recorded):
    p = parameters(steps=30)
    del p.factor, p.after
    run = page.to_entry(p, "none")
    assert set(run["eta"].values) == {1.0} and run.attrs["last_step"] == 30


CLAIMS = """
- id: live
  item: a
  paper: SG
  place: Section 3
  kind: mathematical
  statement: Fixed directions are slow.
  notebook: both
  rule:
    statistic: fixed_not_slow
    arguments: {sign_rule: false, trials: 20}
    unit: share of flows
    accept_if: "<= 0.001"
    reject_if: "> 0.01"
    corrected:
      statistic: fixed_not_slow
      arguments: {sign_rule: true, trials: 20}
      unit: the same with signs
      accept_if: "<= 0.001"
      reject_if: "> 0.01"
- id: measured
  item: a
  paper: SG
  place: Section 3
  kind: empirical
  statement: It starts low.
  notebook: both
  rule:
    statistic: initial_sharpness
    unit: of 2/η
    accept_if: "> 0"
    reject_if: "< -1"
    experiments: [base]
    min_runs: 1
"""


def test_claims_about_recorded_runs_and_live_checks_share_a_page(recorded):
    (recorded / "book" / "claims").mkdir(parents=True)
    (recorded / "book" / "claims" / "both.yml").write_text(CLAIMS)
    run = page.trajectory(parameters(steps=40, stride=3))
    assert page.is_canonical(run, "base")
    live, measured = text(page.verdicts("both", run, "base"))[1:]
    assert live[1] == "counterexamplecorrected: holds on everything tested"
    assert "20 cases, live" in live[2] and "the same with signs" in live[2] and live[3] == "–"
    assert measured[1].startswith("reproduced") and "of 2/η" in measured[2] and "[" in measured[2]


FORKS = """
chaos{fork_seed}:
  for: {fork_seed: [1, 2]}
  experiment: {steps: 20, fork: {of: base, at: 20, size: 1e-2}}
  measure: {k: 2, stride: 3}
"""


def test_behind_a_rerun_is_the_record_with_the_band_of_its_forks(recorded):
    (recorded / "experiments" / "b.yaml").write_text(FORKS)
    entries = {name: find(name) for name in ("chaos1", "chaos2")}
    forks = {}
    for name, entry in entries.items():
        forks[name], provenance = compute(entry.experiment, entry.measure, progress=False)
        Store().save(entry.experiment.key, forks[name], {"name": name, **provenance})
    base = page.on_record("base")
    assert page.behind(base, "base") is None  # the record itself needs nothing behind it
    other = page.trajectory(parameters(steps=9, stride=3, width=9))
    behind = page.behind(other, "base")
    assert behind.run.attrs["key"] == base.attrs["key"] and len(behind.forks) == 2  # not the one that decays
    steps, (low, high) = behind.band(lambda r: (r["step"].values, r["loss"].values))
    losses = [r["loss"].sel(step=slice(20, 40)).values for r in (base, *forks.values())]
    assert steps.tolist() == list(range(20, 41)) and (low < high)[0]
    assert low.tolist() == [min(x) for x in zip(*losses, strict=True)]
    assert high.tolist() == [max(x) for x in zip(*losses, strict=True)]
    band, line = behind.curves(lambda r: (r["measured"].values, r["eigenvalue"].values[:, 0]), "λ₁")
    assert (band.kind, line.label) == ("band", "λ₁ on record") and len(line.x) == base.sizes["measured"]
    above, below = figures.sharpness_and_loss(other, k=2, behind=behind).axes
    assert {"λ₁ on record", "its 2 forks"} <= set(above.get_legend_handles_labels()[1])
    assert len(below.collections) == 1 and line.y.tolist() in [list(x.get_ydata()) for x in above.lines]
    for entry in entries.values():
        Store().manifest_path(entry.experiment.key).unlink()
    (alone,) = page.behind(other, "base").curves(lambda r: (r["step"].values, r["loss"].values))
    assert alone.kind == "line"
