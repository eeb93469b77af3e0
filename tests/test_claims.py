"""Rules and verdicts: on runs made here, whose statistics are known by construction."""

import json
import pathlib

import numpy as np
import pytest
import xarray as xr
import yaml

from eos_utils import claims, eos_stats, wording
from eos_utils.catalogue import catalogue
from eos_utils.registry import registry
from eos_utils.store import Store

ROOT = pathlib.Path(__file__).parent.parent
STRIDE, ETA = 5, 0.1


def synthetic(level=1.04, seed=0, key="", enters=100, count=240, fork=None):
    """λ1·η/2 rises linearly to ``level`` at measurement ``enters`` and alternates around it from there on.

    λ2 to λ6 follow 30 % below and climb to the edge; the loss falls, from the entry on with a sawtooth of period 2.
    """
    generator = np.random.default_rng(seed)
    t = np.arange(count)
    first = np.minimum(0.2 + (level - 0.2) * t / enters, level)
    wobble = np.where(t > enters, 0.02 * (-1.0) ** t, 0.0)
    lower = np.minimum(np.maximum(first - 0.3, first - 0.3 + 0.01 * (t - enters)), 0.99)[:, None] + np.zeros(5)
    scaled = np.column_stack([first + wobble, lower + 0.5 * wobble[:, None] + 1e-5 * generator.normal(size=(count, 5))])
    steps = np.arange((count - 1) * STRIDE + 1)
    loss = np.exp(-steps / 500) * (1 + np.where(steps > enters * STRIDE, 0.02 * (-1.0) ** steps, 0.0))
    return xr.Dataset(
        {
            "loss": ("step", loss),
            "eta": ("step", np.full(len(steps), ETA)),
            "eigenvalue": (("measured", "eig"), scaled * 2 / ETA),
        },
        {"step": steps, "measured": t * STRIDE, "eig": np.arange(1, 7)},
        {"stride": STRIDE, "key": key, "experiment": json.dumps({"fork": fork}), "status": "steps"},
    )


def test_entry_is_where_the_running_median_reaches_the_level():
    run = synthetic(level=1.04)
    # 0.2 + 0.84 t/100 reaches 0.98 at t = 92.9; a median over a rising window is its middle.
    assert eos_stats.entry_step(run) == 93 * STRIDE
    assert np.isnan(eos_stats.entry_step(synthetic(level=0.9)))


def test_statistics_of_a_known_run():
    run = synthetic(level=1.04)
    assert eos_stats.initial_sharpness(run) == pytest.approx(0.2)
    assert eos_stats.sharpening_steadiness(run) == 1.0
    assert eos_stats.rate_to_entry(run) == pytest.approx(0.0084 / STRIDE)  # 0.84 over 100 measurements
    assert eos_stats.sharpening_ratio(run) == pytest.approx(0.98 / 0.2, rel=0.1)
    assert eos_stats.hover_level(run) == pytest.approx(0.04, abs=0.021)
    assert eos_stats.hover_share(run) == 1.0
    assert eos_stats.hover_share(run, width=0.01) == 0.0
    assert eos_stats.loss_rises_before(run) == 0.0
    assert eos_stats.loss_rises_after(run) == pytest.approx(0.5, abs=0.02)
    assert eos_stats.loss_falls_long(run, block=50) == 1.0
    assert eos_stats.first_rise(run) == 502  # the sawtooth begins at step 501, with a step down
    # The wobble of λ₂ to λ₅ is half of λ₁'s: second differences of 4 x 0.01 against the noise before.
    early = np.abs(np.diff(eos_stats.scaled(run)[23:83, 1:5], n=2, axis=0))
    assert eos_stats.roughness_ratio(run) == pytest.approx(0.04 / np.median(early, axis=0).max(), rel=0.05)
    # λ₂ to λ₅ are at 0.98 - 0.3 at entry, and at 0.74 + 0.01 t, at most 0.99, afterwards (t up to 53 past the rise).
    assert eos_stats.gap_closed(run) == pytest.approx((0.99 - 0.68) / 0.32, abs=0.05)
    assert eos_stats.in_eos(run) == 6
    assert eos_stats.in_eos(run, horizon=1) == 1


def test_a_fork_from_entry_is_measured_over_the_stretch_of_its_base():
    base = synthetic(level=1.04)
    begin = 93 + eos_stats.HALF
    cut = {"measured": slice(begin, None), "step": slice(begin * STRIDE, None)}
    fork = base.isel(cut).assign_attrs(experiment=json.dumps({"fork": {"of": "x", "at": "entry"}}))
    for statistic in ("hover_level", "hover_share", "loss_rises_after", "loss_falls_long", "in_eos"):
        f = eos_stats.STATISTICS[statistic]
        assert f(fork, horizon=80) == pytest.approx(f(base, horizon=80)), statistic


def test_a_run_that_begins_near_the_edge_has_no_statistic_after_entry():
    run = synthetic(level=1.04)
    run["eigenvalue"] = run["eigenvalue"] * 4.6  # 0.2 becomes 0.92
    assert np.isnan(eos_stats.hover_level(run)) and np.isnan(eos_stats.loss_rises_after(run))


def test_statistics_see_the_opposite_too():
    below = synthetic(level=0.985)
    assert eos_stats.hover_level(below) < 0
    flat = synthetic(level=0.25)
    assert eos_stats.sharpening_ratio(flat) == pytest.approx(0.27 / 0.2)  # odd windows of an alternation
    assert np.isnan(eos_stats.hover_level(flat)) and np.isnan(eos_stats.gap_closed(flat))
    assert eos_stats.in_eos(flat) == 0


@pytest.mark.parametrize(("runs", "least", "most"), [(5, 0.78, 0.89), (40, 0.90, 0.98)])
def test_bootstrap_interval_covers_a_known_mean_as_often_as_the_book_says(runs, least, most):
    generator = np.random.default_rng(1)
    hits = [
        low <= 3.0 <= high
        for low, high in (eos_stats.bootstrap(generator.normal(3.0, 1.0, size=runs), resamples=400) for _ in range(400))
    ]
    assert least <= np.mean(hits) <= most  # nominally 95 %, about 84 % with five runs


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ((0.02, 0.05), "reproduced"),
        ((-0.03, -0.01), "not reproduced"),
        ((0.2, 0.3), "not reproduced"),
        ((-0.01, 0.05), "inconclusive"),
        ((-0.01, 0.2), "inconclusive"),  # rejected at both ends, but by different bounds
        ((float("nan"), float("nan")), "inconclusive"),
    ],
)
def test_judge_needs_the_whole_interval(ends, verdict):
    assert claims.judge(ends, {"accept_if": "> 0 and < 0.1", "reject_if": "<= 0 or >= 0.1"}) == verdict


@pytest.mark.parametrize("bound", ["about 3", "> x", "> 1 or", "__import__('os')", ">", ""])
def test_malformed_bounds_are_refused(bound):
    with pytest.raises(claims.ClaimError):
        claims.conditions(bound)


@pytest.fixture
def small_root(tmp_path):
    """A repository in miniature: five recorded runs and one claim on them."""
    (tmp_path / "book" / "claims").mkdir(parents=True)
    (tmp_path / "experiments").mkdir()
    entry = {"for": {"seed": [100, 101, 102, 103, 104]}, "experiment": {"dataset": "digits", "n": 200}}
    (tmp_path / "experiments" / "toy.yaml").write_text(yaml.safe_dump({"toy{seed}": entry}))
    (tmp_path / "book" / "inventory.yml").write_text("[]")
    claim = {
        "id": "toy-above",
        "item": "toy",
        "paper": "FG",
        "place": "nowhere",
        "kind": "empirical",
        "statement": "It hovers above.",
        "notebook": "toy",
        "rule": {
            "statistic": "hover_level",
            "accept_if": "> 0 and < 0.1",
            "reject_if": "<= 0 or >= 0.1",
            "experiments": [f"toy{seed}" for seed in range(100, 105)],
            "min_runs": 5,
        },
    }
    write_claim(tmp_path, claim)
    return tmp_path, claim


def write_claim(root, claim):
    (root / "book" / "claims" / "toy.yml").write_text(yaml.safe_dump([claim]))


def record_runs(root, levels):
    store = Store(root / "results")
    for entry, level in zip(catalogue(root / "experiments").values(), levels, strict=False):
        run = synthetic(level, seed=entry.experiment.seed, key=entry.experiment.key)
        store.save(entry.experiment.key, run, {"name": entry.name}, replace=True)


def test_a_claim_is_pending_until_enough_runs_are_recorded(small_root):
    root, claim = small_root
    assert claims.evaluate(claim, root)["as_printed"] == "pending"
    record_runs(root, [1.04] * 4)
    assert claims.evaluate(claim, root)["as_printed"] == "pending"
    record_runs(root, [1.04] * 5)
    assert claims.evaluate(claim, root)["as_printed"] == "reproduced"


def test_the_verdict_follows_the_runs(small_root):
    root, claim = small_root
    for levels, verdict in {
        (1.04, 1.05, 1.06, 1.05, 1.04): "reproduced",
        (0.985, 0.986, 0.984, 0.985, 0.985): "not reproduced",
        (0.5, 1.04, 1.04, 1.04, 1.04): "inconclusive",  # one run never enters
    }.items():
        record_runs(root, levels)
        assert claims.evaluate(claim, root)["as_printed"] == verdict, levels


def test_ledger_drift_and_amended_rules(small_root):
    root, claim = small_root
    record_runs(root, [1.04, 1.05, 1.06, 1.05, 1.04])
    assert claims.drift(root) == ["toy-above: the results give 'reproduced', no verdict is on record"]
    assert claims.update(root) == ["toy-above"]
    assert claims.drift(root) == [] and claims.update(root) == []
    row = claims.ledger(root)[0]
    assert row["as_printed"] == "reproduced" and row["statistic"]["runs"].keys() == {f"toy{s}" for s in range(100, 105)}

    recorded = json.loads(claims.verdicts_path(root).read_text())
    recorded["toy-above"]["statistic"]["value"] *= 1 + 1e-9  # another machine's rounding stays on record
    claims.verdicts_path(root).write_text(json.dumps(recorded))
    assert claims.update(root) == [] and json.loads(claims.verdicts_path(root).read_text()) == recorded
    recorded["toy-above"]["statistic"]["value"] += 1e-4
    claims.verdicts_path(root).write_text(json.dumps(recorded))
    assert "statistic" in claims.drift(root)[0]
    claims.update(root)

    old = claims.rule_hash(claim["rule"])
    claim["rule"]["accept_if"] = "> 0 and < 0.2"
    write_claim(root, claim)
    assert claims.ledger(root)[0]["as_printed"] == "pending"  # a verdict under another rule does not count
    before = claims.verdicts_path(root).read_text()
    with pytest.raises(claims.ClaimError, match="rule changed after its verdict"):
        claims.update(root)
    assert claims.verdicts_path(root).read_text() == before
    claim["amended"] = [{"from": old, "reason": "a wider margin"}]
    write_claim(root, claim)
    assert claims.update(root) == ["toy-above"]


def test_fragile_verdicts_are_marked(small_root):
    root, claim = small_root
    record_runs(root, [1.04] * 5)
    values = claims.measure(claim["rule"]["experiments"], claim["rule"], root)
    level = float(np.mean(list(values.values())))
    claim["rule"].update(accept_if=f"> {0.9 * level}", reject_if="< 0.001")
    assert claims.evaluate(claim, root)["fragile"] is True  # 1.2 x 0.9 > 1
    claim["rule"].update(accept_if=f"> {0.5 * level}")
    assert claims.evaluate(claim, root)["fragile"] is False


def test_a_threshold_of_zero_moves_too():
    assert claims.holds(0.01, "> 0 and < 0.1") and not claims.holds(0.01, "> 0 and < 0.1", 1.2)
    assert not claims.holds(-0.01, "> 0 and < 0.1") and claims.holds(-0.01, "> 0 and < 0.1", 0.8)


def test_an_amendment_cannot_be_avoided_by_a_run_that_is_not_there(small_root):
    root, claim = small_root
    record_runs(root, [1.04] * 5)
    claims.update(root)
    claim["rule"]["accept_if"] = "> 0 and < 0.3"
    claim["rule"]["min_runs"] = 6
    write_claim(root, claim)
    with pytest.raises(claims.ClaimError, match="rule changed after its verdict"):
        claims.update(root)


def test_a_stale_record_gives_no_verdict(small_root, monkeypatch):
    from eos_utils import store

    root, claim = small_root
    record_runs(root, [1.04] * 5)
    raised = store.fingerprints()
    raised["lanczos"] = {**raised["lanczos"], "numerics": 99}
    monkeypatch.setattr(store, "fingerprints", lambda extra=(): raised)
    with pytest.raises(store.StoreError, match="toy100 is stale"):
        claims.evaluate(claim, root)


def test_malformed_claims_are_named(small_root):
    root, claim = small_root
    for change, message in {
        ("statistic", "no_such"): "no statistic 'no_such'",
        ("experiments", ("nowhere",)): "no run nowhere",
        ("acept_if", "> 1"): "unknown field acept_if",
        ("accept_if", "large"): "'large' is no bound",
    }.items():
        broken = json.loads(json.dumps(claim))
        broken["rule"][change[0]] = list(change[1]) if isinstance(change[1], tuple) else change[1]
        write_claim(root, broken)
        with pytest.raises(claims.ClaimError, match=message):
            claims.claims(root)


def test_a_damaged_record_is_an_error_and_not_a_pending_claim(small_root):
    root, claim = small_root
    record_runs(root, [1.04] * 5)
    victim = next((root / "results").glob("*.nc"))
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(Exception, match="truncated or altered"):
        claims.evaluate(claim, root)


# ---- rules on the runs of one seed --------------------------------------------------------------------


@pytest.fixture
def grouped_root(small_root, monkeypatch):
    """Two runs for each of five seeds, and a statistic that says which runs it was given."""
    root, claim = small_root
    entry = {"for": {"seed": [100, 101, 102, 103, 104], "steps": [7, 8]}, "experiment": {"dataset": "digits", "n": 200}}
    (root / "experiments" / "toy.yaml").write_text(yaml.safe_dump({"toy{seed}_{steps}": entry}))
    seen = {}

    def spread(mine, others, scale=1.0):
        """Difference of the levels of the two runs of a seed."""
        key = mine[0].attrs["key"]
        seen[key] = ([run.attrs["key"] for run in mine], [run.attrs["key"] for run in others])
        return scale * float(eos_stats.hover_level(mine[1]) - eos_stats.hover_level(mine[0]))

    monkeypatch.setitem(claims.GROUPED, "spread", spread)
    names = [f"toy{seed}_{steps}" for seed in range(100, 105) for steps in (8, 7)]
    claim["rule"] = {
        "statistic": "spread",
        "arguments": {"scale": -1.0},
        "accept_if": "> 0.02",
        "reject_if": "< 0.01",
        "experiments": names,
        "by": "seed",
        "min_runs": 5,
    }
    write_claim(root, claim)
    return root, claim, names, seen


def test_runs_of_a_seed_are_compared_in_the_order_of_the_rule(grouped_root):
    root, claim, names, seen = grouped_root
    runs = catalogue(root / "experiments")
    store = Store(root / "results")
    for name in names:
        level = 1.08 if name.endswith("_8") else 1.04
        key = runs[name].experiment.key
        store.save(key, synthetic(level, seed=1, key=key), {"name": name})
        if name == "toy104_8":
            # The last seed has one of its two runs: it does not count, and is nobody's comparison.
            assert claims.evaluate(claim, root)["as_printed"] == "pending"
            assert runs["toy104_8"].experiment.key not in {k for _, others in seen.values() for k in others}
    verdict = claims.evaluate(claim, root)
    assert verdict["as_printed"] == "reproduced"
    assert verdict["statistic"]["runs"].keys() == {f"seed {s}" for s in range(100, 105)}
    assert verdict["statistic"]["value"] == pytest.approx(0.04, abs=0.01)
    own, others = seen[runs["toy102_8"].experiment.key]
    assert own == [runs["toy102_8"].experiment.key, runs["toy102_7"].experiment.key]
    assert set(others) == {runs[n].experiment.key for n in names if not n.startswith("toy102")}


@pytest.mark.parametrize(("change", "message"), [
    ({"by": "width"}, "by is 'width'"),
    ({"by": None, "statistic": "spread"}, "no statistic 'spread'"),
    ({"forks": ["toy100_7"]}, "takes no forks"),
])  # fmt: skip
def test_grouped_rules_are_checked(grouped_root, change, message):
    root, claim, _, _ = grouped_root
    claim["rule"].update(change)
    write_claim(root, claim)
    with pytest.raises(claims.ClaimError, match=message):
        claims.claims(root)


def test_of_a_statistic_of_one_run_the_largest_of_a_seed_counts(grouped_root):
    root, claim, names, _ = grouped_root
    claim["rule"].update(statistic="hover_level", arguments={})
    runs, store = catalogue(root / "experiments"), Store(root / "results")
    for name in names:
        key = runs[name].experiment.key
        store.save(key, synthetic(1.08 if name.endswith("_7") else 1.04, seed=1, key=key), {"name": name})
    found = claims.evaluate(claim, root)["statistic"]["runs"]
    assert found.keys() == {f"seed {s}" for s in range(100, 105)}
    high = synthetic(1.08, seed=1)
    assert all(value == pytest.approx(eos_stats.hover_level(high)) for value in found.values())


# ---- mathematical claims -----------------------------------------------------------------------------


@pytest.fixture
def checked_root(small_root, monkeypatch):
    """A mathematical claim whose check returns what a file says."""
    root, claim = small_root
    told = {"printed": 1.0, "corrected": 1e-14}

    def error(form, trials=10):
        """The largest error of a formula."""
        return claims.Tested(told[form], trials, "random numbers")

    monkeypatch.setitem(claims.CHECKS, "error", error)
    claims._check.cache_clear()
    claim["kind"] = "mathematical"
    bounds = {"statistic": "error", "accept_if": "<= 1e-10", "reject_if": "> 1e-6"}
    claim["rule"] = {**bounds, "arguments": {"form": "printed"}}
    claim["rule"]["corrected"] = {**bounds, "arguments": {"form": "corrected", "trials": 20}}
    write_claim(root, claim)
    yield root, claim, told
    claims._check.cache_clear()


def test_a_mathematical_claim_is_tested_as_printed_and_corrected(checked_root):
    root, claim, told = checked_root
    verdict = claims.evaluate(claim, root)
    assert (verdict["as_printed"], verdict["corrected"]) == ("counterexample", "holds on everything tested")
    assert verdict["statistic"]["trials"] == 10 and verdict["corrected_statistic"]["trials"] == 20
    assert verdict["scope"] == "random numbers" and not verdict["fragile"]
    told.update(printed=0.0, corrected=1.0)
    claims._check.cache_clear()
    verdict = claims.evaluate(claim, root)
    assert (verdict["as_printed"], verdict["corrected"]) == ("holds on everything tested", "fails")
    told.update(printed=1e-8)
    claims._check.cache_clear()
    assert claims.evaluate(claim, root)["as_printed"] == "inconclusive"


def test_outcomes_and_other_arguments(checked_root):
    root, claim, _ = checked_root
    claim["rule"]["outcomes"] = ["vacuous", "hypotheses not met"]
    assert claims.evaluate(claim, root)["as_printed"] == "hypotheses not met"
    assert claims.check(claim["rule"], form="corrected").value == 1e-14


def test_the_number_of_a_check_may_drift_by_its_tolerance_and_no_more(checked_root):
    root, claim, told = checked_root
    claim["rule"]["tolerance"] = 0.05
    write_claim(root, claim)
    claims.update(root)
    for value, drifts in ((1.04, 0), (1.06, 1)):
        told["printed"] = value
        claims._check.cache_clear()
        assert len(claims.drift(root)) == drifts
    told.update(printed=1.0, corrected=1e-3)  # the verdict on the corrected statement drifts too
    claims._check.cache_clear()
    assert "corrected" in claims.drift(root)[0]


def test_a_reading_needs_its_reason(checked_root):
    root, claim, _ = checked_root
    claim["rule"] = {"reading": "not decidable as printed", "why": "r is not defined"}
    write_claim(root, claim)
    verdict = claims.evaluate(claims.claims(root)[0], root)
    assert (verdict["as_printed"], verdict["statistic"]) == ("not decidable as printed", None)
    for change, message in (({"why": ""}, "a reading is one of"), ({"reading": "true"}, "a reading is one of")):
        write_claim(root, {**claim, "rule": {**claim["rule"], **change}})
        with pytest.raises(claims.ClaimError, match=message):
            claims.claims(root)


@pytest.mark.parametrize(("change", "message"), [
    ({"statistic": "nothing"}, "no check 'nothing'"),
    ({"outcomes": ["true", "false"]}, "outcomes are two of"),
    ({"accept_if": "small"}, "'small' is no bound"),
    ({"min_runs": 5}, "unknown field min_runs"),
    ({"reject_if": None}, "missing field reject_if"),
    ({"tolerance": 1.0}, "may drift by half"),
    ({"corrected": {"statistic": "error", "acept_if": "< 1", "accept_if": "< 1", "reject_if": "> 1"}}, "acept_if"),
])  # fmt: skip
def test_malformed_checks_are_named(checked_root, change, message):
    root, claim, _ = checked_root
    claim["rule"].update(change)
    claim["rule"] = {k: v for k, v in claim["rule"].items() if v is not None}
    write_claim(root, claim)
    with pytest.raises(claims.ClaimError, match=message):
        claims.claims(root)


def test_every_check_says_what_it_measures():
    for name, check in {**claims.CHECKS, **claims.STATISTICS, **claims.GROUPED}.items():
        assert (check.__doc__ or "").strip(), name


def test_the_repository_s_ledger_does_not_drift():
    assert claims.drift(ROOT) == []


def test_verdict_runs_use_seeds_from_100_on():
    runs = catalogue(ROOT / "experiments")
    for claim in claims.claims(ROOT):
        for name in (claim.get("rule") or {}).get("experiments", []):
            assert runs[name].experiment.seed >= 100, (claim["id"], name)


def test_two_rooms_cannot_register_one_name():
    assert registry({"a": len}, {"b": max}) == {"a": len, "b": max}
    with pytest.raises(ValueError, match="the name a is taken"):
        registry({"a": len}, {"a": max})


def test_a_rule_in_words_is_set_as_in_print():
    rule = {"statistic": "λ1 of x", "accept_if": "<= -0.6", "reject_if": ">= 0.2", "experiments": []}
    assert wording.rule_in_words(rule) == (
        "λ₁ of x. Accepted if ≤ −0.6, rejected if ≥ 0.2, else inconclusive; at least 5 runs."
    )
