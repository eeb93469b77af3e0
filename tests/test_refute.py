"""A rerun with other settings as a report against a claim: its numbers, its words, and what is refused."""

import pathlib
import re
import shlex
import types

import pytest
import yaml

from eos_utils import claims, cli, refute
from eos_utils.catalogue import find
from eos_utils.fg_lemmas import CHECKS
from eos_utils.page import experiment, number
from eos_utils.parameters import convert, declared
from eos_utils.run import compute
from eos_utils.store import Store

CATALOGUE = """
toy{seed}:
  for: {seed: [100, 101]}
  experiment: {dataset: digits, n: 100, width: 4, eta: 2/50, steps: 6}
  measure: {k: 1, stride: 3, snapshots: [end]}
slow:
  experiment: {dataset: digits, n: 100, width: 4, eta: 2/60, steps: 6, seed: 100}
  measure: {k: 1, stride: 3}
fork:
  experiment: {steps: 3, fork: {of: toy100, at: end, size: 0}}
  measure: {k: 1, stride: 3}
"""
CLAIM = {
    "id": "low", "item": "a", "paper": "FG", "place": "Section 4", "kind": "empirical", "notebook": "none",
    "statement": "It starts | well below the edge.",
}  # fmt: skip


@pytest.fixture
def toy(own_root):
    """Two recorded runs, and a claim on them whose bound lies at 1.5 times what they show."""
    (own_root / "experiments" / "a.yaml").write_text(CATALOGUE)
    starts = {}
    for name in ("toy100", "toy101"):
        entry = find(name)
        result, provenance = compute(entry.experiment, entry.measure, progress=False)
        Store().save(entry.experiment.key, result, {"name": name, **provenance})
        starts[name] = float(result["eigenvalue"][0, 0]) / 50
    bound = 1.5 * max(starts.values())
    rule = {"statistic": "initial_sharpness", "unit": "of 2/η", "accept_if": f"< {bound:.6f}",
            "reject_if": f">= {bound:.6f}", "experiments": ["toy100", "toy101"], "min_runs": 2}  # fmt: skip
    listed = [
        CLAIM | {"rule": rule},
        CLAIM | {"id": "open", "rule": None},
        CLAIM | {"id": "read", "kind": "mathematical", "rule": {"reading": "vacuous", "why": "it says nothing"}},
        CLAIM | {"id": "fork", "rule": rule | {"experiments": ["fork"], "min_runs": 1}},
    ]
    (own_root / "book" / "claims").mkdir(parents=True)
    (own_root / "book" / "claims" / "a.yml").write_text(yaml.safe_dump(listed))
    claims.update(own_root)
    return starts


def run(name, **given):
    return refute.rerun(refute.claim_of(name), given, progress=False, device="cpu")


def test_twice_the_step_size_doubles_the_statistic_and_turns_the_rule(toy):
    found = run("low", eta="2/25")
    assert found.changed == [("eta", "2/50", "2/25")] and found.gives == "not reproduced"
    assert found.values == {name: pytest.approx(2 * start, rel=1e-3) for name, start in toy.items()}
    assert found.statistic["value"] == pytest.approx(sum(toy.values()), rel=1e-3)
    assert [fact.split(":")[0] for fact in found.facts] == list(toy)
    same = run("low")
    assert not same.changed and same.gives == "reproduced" and all("recorded" in fact for fact in same.facts)
    assert same.values == {name: pytest.approx(start, rel=1e-6) for name, start in toy.items()}


def test_the_report_states_the_claim_its_record_the_change_and_no_verdict(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = claims.verdicts_path(tmp_path / "root").read_bytes()
    assert cli.main(["refute", "low", "-p", "eta=2/25", "--device", "cpu"]) == 0
    text = (tmp_path / "refute-low.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    mean = sum(toy.values()) / 2
    for part in (
        "# Report against the claim `low`", "> It starts | well below the edge.",
        "**reproduced**", f"mean {mean:.4g} [",
        "| eta | 2/50 | 2/25 |", "Under these settings the rule gives **not reproduced**", f"mean {2 * mean:.4g} [",
        "This is no verdict", "eos refute low -p eta=2/25", "torch ", "digits, SHA-256", "Section 4 asks for",
        claims.rule_hash(refute.claim_of("low")["rule"]), f"| toy100 | {toy['toy100']:.3g} | {2 * toy['toy100']:.3g} |",
    ):  # fmt: skip
        assert part in text, part
    assert claims.verdicts_path(tmp_path / "root").read_bytes() == before  # the ledger is as it was


def test_a_run_counts_once_and_too_few_runs_decide_nothing(toy):
    claim = refute.claim_of("low")
    found = refute.rerun(claim, {"width": 3}, first=1, progress=False, device="cpu")
    assert list(found.values) == ["toy100"] and found.gives == "nothing yet: it needs 2 runs, here 1"
    # A number for `seed` is the first of as many as there were.
    found = run("low", seed=200)
    assert found.changed == [("seed", "100, 101", "200, 201")] and len(set(found.values.values())) == 2
    # Two step sizes become one, and two runs one and the same.
    claim["rule"]["experiments"] = ["toy100", "slow"]
    found = refute.rerun(claim, {"eta": "2/55"}, progress=False, device="cpu")
    assert list(found.values) == ["toy100"] and found.changed == [("eta", "2/50, 2/60", "2/55")]


@pytest.mark.parametrize(("name", "given", "message"), [
    ("lwo", {}, "did you mean low"),
    ("open", {}, "it has no rule"),
    ("read", {}, "decided by the text"),
    ("low", {"etta": "1"}, "'etta' is no setting of a run"),
    ("low", {"width": "many"}, "must be an integer"),
    ("fork", {"eta": "2/25"}, "continues a recorded run"),
])  # fmt: skip
def test_what_cannot_be_rerun_is_refused(toy, name, given, message):
    with pytest.raises((KeyError, ValueError), match=message):
        refute.refute(name, given, progress=False)


def test_what_follows_a_fork_can_be_changed(toy):
    assert run("fork", steps=4).changed == [("steps", "3", "4")]


def test_the_check_of_a_lemma_with_other_arguments():
    of_page = [c for c in claims.claims() if c["notebook"] == "fg_lemma_a_2_recursion"]
    claim = next(c for c in of_page if "trials" in c["rule"].get("arguments", {}))
    text = refute.refute(claim["id"], {"trials": "50"})
    tested = CHECKS[claim["rule"]["statistic"]](**{**claim["rule"].get("arguments", {}), "trials": 50})
    recorded = claims.on_record(pathlib.Path(__file__).resolve().parents[1])[claim["id"]]["statistic"]["value"]
    assert f"{tested.trials:,} cases" in text and "| trials | " in text
    assert f"| the check | {number(recorded)} | {number(tested.value)} |" in text
    expected = claims.judge((tested.value,), claim["rule"], 1.0, claims.outcomes_of(claim))
    assert f"Under these settings the rule gives **{expected}**" in text
    with pytest.raises(ValueError, match="no argument of the check"):
        refute.refute(claim["id"], {"width": "3"})


# ---- the page that says how ----------------------------------------------------------------------

PAGE = pathlib.Path(__file__).resolve().parents[1] / "book" / "rerun.md"


def blocks():
    """The captioned listings of the page, by caption."""
    found = re.findall(r"^```\{code-block\} \w+\n:caption: ([^\n]+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    return {caption.split(",")[0]: body for caption, body in found}


def test_the_example_of_the_page_is_a_run_a_claim_and_a_notebook(own_root, monkeypatch):
    listings = blocks()
    assert list(listings) == ["experiments/mine.yaml", "book/claims/mine.yml", "make_mine.py"]
    for name in list(listings)[:2]:
        (own_root / name).parent.mkdir(parents=True, exist_ok=True)
        (own_root / name).write_text(listings[name])
    (own_root / "notebooks").mkdir()
    monkeypatch.chdir(own_root)
    exec(listings["make_mine.py"], {})
    (claim,) = claims.claims(own_root)
    assert claim["notebook"] == "fg_mine" and claim["item"] in {i["id"] for i in claims.inventory(PAGE.parents[1])}
    given = {p.name: convert(p.name, p.type, p.default) for p in declared(own_root / "notebooks/fg_mine.ipynb")}
    first = find(claim["rule"]["experiments"][0])
    assert experiment(types.SimpleNamespace(**given)).key == first.experiment.key
    assert (given["k"], given["stride"]) == (first.measure.k, first.measure.stride)


def test_the_commands_of_the_page_are_understood():
    text = PAGE.read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"^eos (refute .+)$", text, flags=re.M)
    assert len(commands) == 3
    for command in commands:
        chosen = cli.parser().parse_args(shlex.split(command))
        assert refute.claim_of(chosen.claim)["rule"], command
