"""Rules, verdicts and the ledger: how a statement of a paper comes to be judged.

``book/inventory.yml`` lists the papers' items, ``book/claims/*.yml`` the claims with their rules, set before the
verdict runs. A rule names a statistic of :mod:`eos_utils.eos_stats`, the runs of the catalogue it is evaluated on,
and the bounds: ``accept_if``, ``reject_if``; between them the verdict is *inconclusive*. The verdict uses the
bootstrap interval of the mean over runs, the whole of which must lie on one side. A mathematical claim names a check
(:data:`CHECKS`: a function that tests the statement live, in float64) instead, and may name another for a statement
corrected by us; where only the text decides, the rule is the ``reading`` itself. ``book/verdicts.json`` is the
ledger on record; :func:`drift` says where it no longer follows from the results in the repository.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import pathlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import yaml

from eos_utils.catalogue import catalogue
from eos_utils.eos_stats import bootstrap
from eos_utils.fg_theory import Tested
from eos_utils.registry import CHECKS, GROUPED, STATISTICS
from eos_utils.store import Store, StoreError
from eos_utils.store import root as default_root
from eos_utils.wording import scope

CLAIM_FIELDS = ("id", "item", "paper", "place", "kind", "statement", "notebook", "rule", "amended")
RULE_FIELDS = (
    "statistic", "arguments", "unit", "accept_if", "reject_if", "experiments", "by", "min_runs", "forks", "why",
)  # fmt: skip
# ... of a mathematical claim: what acceptance and rejection mean, drift allowed in the number, a repaired statement.
CHECK_FIELDS = ("statistic", "arguments", "unit", "accept_if", "reject_if", "outcomes", "tolerance", "corrected", "why")
READINGS = ("not decidable as printed", "vacuous", "hypotheses not met", "counterexample")
OUTCOMES = ("holds on everything tested", "counterexample")
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class ClaimError(ValueError):
    """A claim or its rule is malformed; the message names it."""


def _yaml(path: pathlib.Path) -> list[dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or []


def inventory(root: pathlib.Path | None = None) -> list[dict[str, Any]]:
    """The items of both papers, in order."""
    return _yaml((root or default_root()) / "book" / "inventory.yml")


def claims(root: pathlib.Path | None = None) -> list[dict[str, Any]]:
    """All registered claims, checked for unknown fields, statistics and runs."""
    root = root or default_root()
    runs = catalogue(root / "experiments")
    found: list[dict[str, Any]] = []
    for path in sorted((root / "book" / "claims").glob("*.yml")):
        for claim in _yaml(path):
            where = f"{path.name}: {claim.get('id', claim)}"
            unknown = set(claim) - set(CLAIM_FIELDS)
            rule = claim.get("rule") or {}
            live = claim["kind"] == "mathematical" and "experiments" not in rule
            fields = ("reading", "corrected", "why") if "reading" in rule else CHECK_FIELDS if live else RULE_FIELDS
            unknown |= set(rule) - {*fields, *(("outcomes",) if claim["kind"] == "mathematical" else ())}
            if unknown:
                raise ClaimError(f"{where}: unknown field {', '.join(sorted(map(str, unknown)))}")
            if claim["kind"] not in ("empirical", "mathematical"):
                raise ClaimError(f"{where}: kind is {claim['kind']!r}, not empirical or mathematical")
            if any(claim["id"] == other["id"] for other in found):
                raise ClaimError(f"{where}: this id is taken already")
            if rule and live:
                _checked(where, rule)
            elif rule:
                if rule.get("by") not in (None, "seed"):
                    raise ClaimError(f"{where}: by is {rule['by']!r}; runs are grouped by seed or not at all")
                if rule.get("by") and rule.get("forks"):
                    raise ClaimError(f"{where}: a rule by seed takes no forks")
                if rule["statistic"] not in ({**GROUPED, **STATISTICS} if rule.get("by") else STATISTICS):
                    raise ClaimError(f"{where}: no statistic {rule['statistic']!r}")
                missing = [n for n in [*rule["experiments"], *rule.get("forks", [])] if n not in runs]
                if missing:
                    raise ClaimError(f"{where}: no run {', '.join(missing)} in the catalogue")
                for bound in [rule["accept_if"], *str(rule["reject_if"]).split(" or ")]:
                    conditions(bound)
            found.append(claim)
    return found


def _checked(where: str, rule: dict[str, Any]) -> None:
    """Refuses a malformed rule of a mathematical claim."""
    for part in filter(None, (rule, rule.get("corrected"))):
        known = CHECK_FIELDS if part is rule else tuple(set(CHECK_FIELDS) - {"corrected", "outcomes"})
        missing = [] if "reading" in part else [f for f in ("statistic", "accept_if", "reject_if") if f not in part]
        unknown = set(part) - {*known, "reading"}
        if unknown or missing:
            raise ClaimError(f"{where}: unknown or missing field {', '.join(sorted([*unknown, *missing]))}")
        if not 0 <= part.get("tolerance", 0) <= 0.5:
            raise ClaimError(f"{where}: tolerance={part['tolerance']}: a number that may drift by half says nothing")
        if "reading" in part:
            if part["reading"] not in READINGS or not part.get("why"):
                raise ClaimError(f"{where}: a reading is one of {', '.join(READINGS)}, with its reason under why")
            continue
        if part["statistic"] not in CHECKS:
            raise ClaimError(f"{where}: no check {part['statistic']!r}")
        for bound in [part["accept_if"], *str(part["reject_if"]).split(" or ")]:
            conditions(bound)
        allowed = {*OUTCOMES, *READINGS}
        if not set(part.get("outcomes", OUTCOMES)) <= allowed or len(part.get("outcomes", OUTCOMES)) != 2:
            raise ClaimError(f"{where}: outcomes are two of {', '.join(sorted(allowed))}: if accepted, if rejected")


def conditions(text: str) -> list[tuple[str, float]]:
    """A bound such as '> 0 and <= 0.1', parsed.

    >>> conditions("> 0 and <= 0.1")
    [('>', 0.0), ('<=', 0.1)]
    """
    parsed = []
    for part in str(text).split(" and "):
        match = re.fullmatch(r"\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*", part)
        if not match:
            raise ClaimError(f"{text!r} is no bound; write '>= 0.5' or '> 0 and < 0.1'")
        parsed.append((match[1], float(match[2])))
    return parsed


def holds(value: float, text: str, stretch: float = 1.0) -> bool:
    """Whether a value meets a bound, every threshold of which is moved by a factor ``stretch``.

    A threshold of 0 has no size of its own: it moves by the same share of the largest beside it.
    """
    parsed = conditions(text)
    largest = max(abs(bound) for _, bound in parsed)
    return all(COMPARE[sign](value, bound * stretch if bound else (stretch - 1) * largest) for sign, bound in parsed)


def judge(
    ends: tuple[float, ...],
    rule: dict[str, Any],
    stretch: float = 1.0,
    outcomes: Sequence[str] = ("reproduced", "not reproduced"),
) -> str:
    """The verdict on a claim whose interval has these ends: one of the two ``outcomes``, or inconclusive.

    >>> judge((0.4, 0.6), {"accept_if": "> 0.3", "reject_if": "< 0.1"})
    'reproduced'
    >>> judge((0.2, 0.6), {"accept_if": "> 0.3", "reject_if": "< 0.1"})
    'inconclusive'
    """
    if any(math.isnan(end) for end in ends):
        return "inconclusive"
    if all(holds(end, rule["accept_if"], stretch) for end in ends):
        return outcomes[0]
    # What is rejected must be rejected by one and the same bound, or two ends could fail on opposite sides.
    rejections = [r.strip() for r in str(rule["reject_if"]).split(" or ")]
    if any(all(holds(end, bound, stretch) for end in ends) for bound in rejections):
        return outcomes[1]
    return "inconclusive"


def rule_hash(rule: dict[str, Any]) -> str:
    """Identity of a rule; its explanation does not count."""
    plain = {k: v for k, v in rule.items() if k != "why"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _largest(statistic: Callable[..., float]) -> Callable[..., float]:
    """Of a statistic of one run, the largest over the runs of a seed."""
    return lambda mine, others, **arguments: float(np.max([statistic(run, **arguments) for run in mine]))


@lru_cache(maxsize=64)
def _load(folder: str, key: str, manifest: str) -> Any:
    return Store(folder).load(key)


def measure(names: list[str], rule: dict[str, Any], root: pathlib.Path) -> dict[str, float]:
    """The statistic of every run (or of every seed) that has a usable record, by name."""
    store, runs = Store(root / "results"), catalogue(root / "experiments")
    loaded = {}
    for name in names:
        key = runs[name].experiment.key
        status = store.status(key)
        if status.state == "missing":
            continue
        if status.state == "stale":
            raise StoreError(f"{name} is stale ({status.why}); `eos record {name}` computes it again")
        loaded[name] = _load(str(store.folder), key, store.manifest(key)["sha256"])
    return applied(rule, loaded, {name: runs[name].experiment.seed for name in names})


def applied(rule: dict[str, Any], loaded: dict[str, Any], seeds: dict[str, int]) -> dict[str, float]:
    """The statistic of a rule on runs at hand, by name; with ``by: seed`` on the seeds of which every run is there.

    ``seeds``: of every run that the rule names, in its order.
    """
    arguments = rule.get("arguments", {})
    if not rule.get("by"):
        return {name: STATISTICS[rule["statistic"]](run, **arguments) for name, run in loaded.items()}
    # Only seeds of which every run is there; the order of a seed's runs is that of the rule.
    of_seed: dict[int, list[str]] = {}
    for name, seed in seeds.items():
        of_seed.setdefault(seed, []).append(name)
    whole = {seed: group for seed, group in of_seed.items() if all(name in loaded for name in group)}
    function = GROUPED.get(rule["statistic"]) or _largest(STATISTICS[rule["statistic"]])
    return {
        f"seed {seed}": function(
            [loaded[name] for name in group],
            [loaded[name] for other, theirs in whole.items() if other != seed for name in theirs],
            **arguments,
        )
        for seed, group in whole.items()
    }


def outcomes_of(claim: dict[str, Any]) -> Sequence[str]:
    """What acceptance and what rejection by a claim's rule are called."""
    usual = OUTCOMES if claim["kind"] == "mathematical" else ("reproduced", "not reproduced")
    return claim["rule"].get("outcomes", usual)


def evaluate(claim: dict[str, Any], root: pathlib.Path | None = None) -> dict[str, Any]:
    """The verdict on one claim from the results in the repository."""
    root = root or default_root()
    rule = claim.get("rule")
    verdict: dict[str, Any] = {"as_printed": "pending", "corrected": "none", "statistic": None, "fragile": False}
    if not rule:
        return {**verdict, "scope": "", "rule_hash": None}
    if claim["kind"] == "mathematical" and "experiments" not in rule:
        return {**verdict, **_tested(rule), "rule_hash": rule_hash(rule)}
    outcomes = outcomes_of(claim)
    runs = catalogue(root / "experiments")
    verdict.update(scope=scope([runs[name] for name in rule["experiments"]]), rule_hash=rule_hash(rule))
    values = measure(rule["experiments"], rule, root)
    if len(values) < rule.get("min_runs", 5):
        return verdict
    verdict.update(judged(values, rule, outcomes))
    forks = measure(rule.get("forks", []), rule, root)
    if forks:
        verdict["statistic"]["forks"] = {name: _or_none(value) for name, value in forks.items()}
    return verdict


def judged(values: dict[str, float], rule: dict[str, Any], outcomes: Sequence[str]) -> dict[str, Any]:
    """What a rule gives on the values of its runs: verdict as printed, whether it is fragile, statistic."""
    numbers = np.array(list(values.values()))
    # A run in which the statistic is not defined (say, that never enters EoS) supports nothing.
    low, high = bootstrap(numbers) if not np.isnan(numbers).any() else (math.nan, math.nan)
    return {
        "as_printed": judge((low, high), rule, 1.0, outcomes),
        "fragile": _fragile((low, high), rule, outcomes),
        "statistic": {
            "value": _or_none(float(numbers.mean())),
            "unit": rule.get("unit", "1"),
            "interval": [_or_none(low), _or_none(high)],
            "runs": {name: _or_none(value) for name, value in values.items()},
        },
    }


def _fragile(ends: tuple[float, ...], rule: dict[str, Any], outcomes: Sequence[str]) -> bool:
    """Whether the verdict changes when all thresholds move by 20 %."""
    return len({judge(ends, rule, stretch, outcomes) for stretch in (0.8, 1.0, 1.2)}) > 1


@lru_cache(maxsize=256)
def _check(name: str, arguments: str) -> Tested:
    return CHECKS[name](**json.loads(arguments))


def check(rule: dict[str, Any], **others: Any) -> Tested:
    """What the check of a rule finds, with ``others`` in place of some of its arguments; computed once a process."""
    return _check(rule["statistic"], json.dumps({**rule.get("arguments", {}), **others}, sort_keys=True))


def _tested(rule: dict[str, Any]) -> dict[str, Any]:
    """Verdict, statistic and scope of a mathematical claim, as printed and corrected."""
    if "reading" in rule:
        found: dict[str, Any] = {"as_printed": rule["reading"], "scope": "the text of our copy"}
    else:
        tested, outcomes = check(rule), rule.get("outcomes", OUTCOMES)
        found = {
            "as_printed": judge((tested.value,), rule, 1.0, outcomes),
            "fragile": _fragile((tested.value,), rule, outcomes),
            "statistic": {
                "value": _or_none(tested.value),
                "unit": rule.get("unit", "1"),
                "trials": tested.trials,
                "tolerance": rule.get("tolerance", 1e-6),
            },
            "scope": tested.on,
        }
    if rule.get("corrected"):
        part = rule["corrected"]
        repaired = check(part)
        found["corrected"] = judge((repaired.value,), part, 1.0, (OUTCOMES[0], "fails"))
        found["corrected_statistic"] = {
            "value": _or_none(repaired.value),
            "unit": part.get("unit", "1"),
            "trials": repaired.trials,
            "tolerance": part.get("tolerance", 1e-6),
        }
    return found


def _or_none(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def verdicts_path(root: pathlib.Path) -> pathlib.Path:
    """Where the ledger on record lies."""
    return root / "book" / "verdicts.json"


def on_record(root: pathlib.Path) -> dict[str, Any]:
    """The verdicts on record, by claim."""
    path = verdicts_path(root)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def ledger(root: pathlib.Path | None = None) -> list[dict[str, Any]]:
    """Every claim with its verdict on record; claims without one are pending."""
    root = root or default_root()
    recorded = on_record(root)
    blank = {"as_printed": "pending", "corrected": "none", "statistic": None, "fragile": False, "scope": ""}
    rows = []
    for claim in claims(root):
        rule = claim.get("rule")
        verdict = recorded.get(claim["id"], blank)
        if rule and verdict.get("rule_hash") != rule_hash(rule):
            verdict = {**blank, "scope": verdict.get("scope", "")}
        rows.append(
            {
                **{k: v for k, v in verdict.items() if k != "rule_hash"},
                **{k: claim[k] for k in CLAIM_FIELDS if k in claim and k != "amended"},
                "amended": claim.get("amended") or [],
                "experiments": rule.get("experiments", []) if rule else [],
                "page": claim["notebook"],
            }
        )
    return rows


def update(root: pathlib.Path | None = None) -> list[str]:
    """Evaluates all rules and writes the ledger; returns the ids whose verdict or statistic is new.

    A rule that differs from the one its verdict was given under needs an ``amended`` entry with the old hash and
    the reason; without one this raises :class:`ClaimError` and writes nothing. An entry that differs by rounding alone
    stays as it is.
    """
    root = root or default_root()
    old, new = on_record(root), {}
    for claim in claims(root):
        verdict = evaluate(claim, root)
        before = old.get(claim["id"])
        if before and before["rule_hash"] != verdict["rule_hash"]:
            reasons = {a["from"]: a["reason"] for a in claim.get("amended") or []}
            if before["rule_hash"] not in reasons:
                raise ClaimError(
                    f"{claim['id']}: its rule changed after its verdict. Add to the claim: "
                    f"amended: [{{from: {before['rule_hash']}, reason: ...}}], or restore the rule"
                )
        if verdict["as_printed"] == "pending":
            if before and claim["rule"]:
                raise ClaimError(f"{claim['id']}: has a verdict on record, but its runs are gone; record them again")
            continue
        new[claim["id"]] = before if before and _close(verdict, before) else verdict
    text = json.dumps(new, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    verdicts_path(root).write_text(text, encoding="utf-8")
    return [name for name in new if new[name] != old.get(name)]


def _close(a: Any, b: Any, tolerance: float = 1e-6) -> bool:
    """Equal, numbers up to rounding, or up to the ``tolerance`` that a check's rule allows.

    Two numbers at the level of rounding are equal: they differ between processors.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        tolerance = a.get("tolerance", tolerance)
        return a.keys() == b.keys() and all(_close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-8)
    return bool(a == b)


def drift(root: pathlib.Path | None = None) -> list[str]:
    """Where the verdicts on record differ from what the results in the repository give."""
    root = root or default_root()
    recorded, found = on_record(root), []
    known = {claim["id"]: claim for claim in claims(root)}
    found += [f"{name}: has a verdict but is no registered claim" for name in recorded if name not in known]
    for name, claim in known.items():
        now = evaluate(claim, root)
        then = recorded.get(name)
        if then is None:
            if now["as_printed"] != "pending":
                found.append(f"{name}: the results give {now['as_printed']!r}, no verdict is on record")
        elif not _close(now, then):
            what = [k for k in now if not _close(now[k], then.get(k))]
            found.append(f"{name}: {', '.join(f'{k} is {now[k]!r}, on record {then.get(k)!r}' for k in what)}")
    return found
