"""A rerun with other settings as a report against a claim: what its rule gives there, beside what is on record.

A rule is applied to the registered runs (or to its live check) with some settings changed. The result is never a
verdict: that rests on the registered runs alone. The report (Markdown) says what was changed, what the rule gives, and
what would have to happen for the verdict to change.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from eos_utils import claims, store
from eos_utils.catalogue import Entry, find
from eos_utils.experiment import Experiment, Measure, as_two_over, rational
from eos_utils.page import number
from eos_utils.provenance import git_state, versions
from eos_utils.registry import CHECKS
from eos_utils.run import run
from eos_utils.wording import listed, rule_in_words

if TYPE_CHECKING:
    import xarray as xr

CHECK = "the check"  # what stands for the runs of a rule that has none
# Of a run that continues another one, only what comes after its start can be changed.
OF_A_FORK = ("steps", "stop_accuracy", "stop_loss", "decay", "project")


@dataclass(frozen=True)
class Rerun:
    """What a rule gives with other settings.

    ``changed``: setting, registered value, value here. ``values``: the statistic by run (or by seed, or of the check).
    ``gives``: what the rule makes of them, or why it makes nothing. ``facts``: of what the values were made.
    """

    changed: list[tuple[str, str, str]]
    values: dict[str, float]
    gives: str
    statistic: dict[str, Any]
    facts: list[str]


def claim_of(name: str) -> dict[str, Any]:
    """The registered claim with this id. ``KeyError`` if there is none, ``ClaimError`` if no rule can be applied."""
    known = {claim["id"]: claim for claim in claims.claims()}
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        raise KeyError(f"no claim {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "; see `claims.json`"))
    claim = known[name]
    if not claim.get("rule"):
        raise claims.ClaimError(f"{name} is pending: it has no rule that could be applied")
    if "reading" in claim["rule"]:
        raise claims.ClaimError(f"{name} is decided by the text ({claim['rule']['why']}): dispute the reading itself")
    return claim


def rerun(claim: dict[str, Any], given: dict[str, Any], *, source: str = "auto", device: str = "auto",
          first: int | None = None, progress: bool = True) -> Rerun:  # fmt: skip
    """Applies the rule of a claim with ``given`` settings.

    Those of a rule about runs are fields of :class:`Experiment` and :class:`Measure`; ``seed`` is the first of as
    many seeds as the rule has. Those of a check are its arguments. ``first``: only so many of the rule's runs.
    ``ValueError`` names a setting that does not exist or cannot be changed.
    """
    rule = claim["rule"]
    if "experiments" not in rule:
        return _checked(claim, given)
    entries = [find(name) for name in rule["experiments"]]
    renumbered = {}
    if "seed" in given:
        old = list(dict.fromkeys(e.experiment.seed for e in entries))
        renumbered = {seed: given["seed"] + i for i, seed in enumerate(old)}
    others = [_changed(entry, given | ({"seed": renumbered[entry.experiment.seed]} if renumbered else {}))
              for entry in entries]  # fmt: skip
    pairs = list(zip(entries, others, strict=True))
    loaded: dict[str, xr.Dataset] = {}
    for entry, (experiment, measure) in pairs[:first]:
        if all(experiment.key != run.attrs["key"] for run in loaded.values()):  # one run does not count twice
            found = run(experiment, measure, source=source, device=device, progress=progress)
            loaded[entry.name] = found.assign_attrs(key=experiment.key)
    seeds = {entry.name: experiment.seed for entry, (experiment, _) in pairs}
    values = claims.applied(rule, loaded, seeds)
    least = rule.get("min_runs", 5)
    statistic = claims.judged(values, rule, claims.outcomes_of(claim)) if values else {}
    gives = (
        statistic["as_printed"] if len(values) >= least else f"nothing yet: it needs {least} runs, here {len(values)}"
    )
    return Rerun(_differences(pairs), values, gives, statistic.get("statistic") or {}, _facts(loaded))


def _changed(entry: Entry, given: dict[str, Any]) -> tuple[Experiment, Measure]:
    """What an entry of the catalogue becomes with these settings."""
    parts: list[dict[str, Any]] = []
    for kind in (Experiment, Measure):
        names = [f.name for f in dataclasses.fields(kind)]
        parts.append({k: v for k, v in given.items() if k in names})
    known = [f.name for kind in (Experiment, Measure) for f in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise ValueError(f"{name!r} is no setting of a run; there are {', '.join(known)}")
        if entry.experiment.fork and name in parts[0] and name not in OF_A_FORK:
            raise ValueError(
                f"{name}: {entry.name} continues a recorded run, whose settings it shares; what can be changed is "
                f"{', '.join(OF_A_FORK)}. Otherwise register a base run with {name} changed, and this one as its fork"
            )
    return dataclasses.replace(entry.experiment, **parts[0]), dataclasses.replace(entry.measure, **parts[1])


def _differences(pairs: Iterable[tuple[Entry, tuple[Experiment, Measure]]]) -> list[tuple[str, str, str]]:
    """Setting, registered values, values here: of each setting that differs in any run."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for entry, (experiment, measure) in pairs:
        for then, now in ((entry.experiment, experiment), (entry.measure, measure)):
            for field in dataclasses.fields(then):
                old, new = (_written(field.name, getattr(part, field.name)) for part in (then, now))
                if old != new:
                    for values, value in zip(found.setdefault(field.name, ([], [])), (old, new), strict=True):
                        values.append(value)
    return [(name, ", ".join(dict.fromkeys(old)), ", ".join(dict.fromkeys(new))) for name, (old, new) in found.items()]


def _written(name: str, value: Any) -> str:
    """A setting as the papers write it."""
    return as_two_over(rational(value)) if name == "eta" else str(value)


def _facts(loaded: dict[str, xr.Dataset]) -> list[str]:
    """Key, end, device, versions and data of each run."""
    lines = []
    for name, found in loaded.items():
        made = json.loads(found.attrs["provenance"])
        with_what = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
        lines.append(
            f"{name}: run {found.attrs['key']}, {found.attrs['source']}, ended by {found.attrs['status']} at step "
            f"{found.attrs['last_step']}; commit {made['commit']}, {made['device']}, {with_what}; "
            f"data {made['data']['name']}, SHA-256 {made['data']['sha256'][:16]}"
        )
    return lines


def _checked(claim: dict[str, Any], given: dict[str, Any]) -> Rerun:
    """The live check of a mathematical claim with other arguments."""
    rule = claim["rule"]
    taken = inspect.signature(CHECKS[rule["statistic"]]).parameters
    for name in given:
        if name not in taken:
            raise ValueError(f"{name!r} is no argument of the check {rule['statistic']}; it has {', '.join(taken)}")
    used = {name: parameter.default for name, parameter in taken.items()} | rule.get("arguments", {})
    tested = claims.check(rule, **given)
    gives = claims.judge((tested.value,), rule, 1.0, claims.outcomes_of(claim))
    changed = [(name, str(used[name]), str(value)) for name, value in given.items() if value != used[name]]
    statistic = {"value": tested.value, "unit": rule.get("unit", "1"), "trials": tested.trials}
    return Rerun(changed, {CHECK: tested.value}, gives, statistic, [f"{tested.trials:,} cases: {tested.on}"])


# ---- the report ----------------------------------------------------------------------------------


def parsed(given: dict[str, str]) -> dict[str, Any]:
    """Settings as text, in YAML as in the catalogue.

    >>> parsed({"eta": "2/50", "width": "64", "bias": "false"})
    {'eta': '2/50', 'width': 64, 'bias': False}
    """
    return {name: yaml.safe_load(value) for name, value in given.items()}


def report(claim: dict[str, Any], found: Rerun, command: str) -> str:
    """The Markdown of a report against a claim."""
    rule, on_record = claim["rule"], claims.on_record(store.root()).get(claim["id"], {})
    if on_record.get("rule_hash") != claims.rule_hash(rule):
        on_record = {}
    verdict, here = on_record.get("as_printed", "pending"), git_state()
    dirty = ", with uncommitted changes" if here["dirty"] else ""
    what = "these settings" if found.changed else "the registered settings"
    before = on_record.get("statistic") or {}
    then = before.get("runs", {CHECK: before.get("value")})
    lines = [
        f"# Report against the claim `{claim['id']}`", "",
        f"> {' '.join(claim['statement'].split())}", "",
        f"Paper {claim['paper']}, {claim['place']}; page `notebooks/{claim['notebook']}.ipynb`.", "",
        "## The rule", "",
        rule_in_words(rule), "",
        *_table(["", ""], [
            ("Statistic", f"`{rule['statistic']}` ({rule.get('unit', '1')})"),
            ("Accepted if", f"`{rule['accept_if']}`"),
            ("Rejected if", f"`{rule['reject_if']}`"),
            ("Rule", f"`{claims.rule_hash(rule)}`"),
        ]), "",
        "## On record", "",
        f"**{verdict}**{', fragile' if on_record.get('fragile') else ''}: {_measured(on_record.get('statistic'))}.", "",
        "## What was changed", "",
        *(_table(["Setting", "Registered", "Here"], found.changed) if found.changed else
          ["Nothing: the registered settings."]), "",
        "## What the rule gives", "",
        f"Under {what} the rule gives **{found.gives}**: {_measured(found.statistic)}.", "",
        *_table(["Run (registered name)", "On record", "Here"], [
            (name, number(then.get(name)), number(value)) for name, value in found.values.items()
        ]), "",
        "This is no verdict. A verdict rests on the registered runs alone.", "",
        "## What a change of the verdict takes", "",
        *(f"- {line}" for line in needed(claim, verdict, found)), "",
        "## How this was made", "",
        "```sh", command, "```", "",
        f"- eos_utils at commit {here['commit']}{dirty}; {', '.join(f'{k} {v}' for k, v in versions().items())}",
        *(f"- {fact}" for fact in found.facts),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table in Markdown."""
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]


def _measured(statistic: dict[str, Any] | None) -> str:
    """Mean, interval and unit in words."""
    if not statistic or statistic.get("value") is None:
        return "undefined" if statistic else "nothing is measured"
    unit = "" if statistic["unit"] == "1" else f" ({statistic['unit']})"
    if "interval" not in statistic:
        return f"{number(statistic['value'], 4)}{unit}, {statistic['trials']:,} cases"
    low, high = statistic["interval"]
    many = len(statistic["runs"])
    return f"mean {number(statistic['value'], 4)} [{number(low, 4)}, {number(high, 4)}]{unit} over {many} " + (
        "run" if many == 1 else "runs"
    )


def needed(claim: dict[str, Any], verdict: str, found: Rerun) -> list[str]:
    """What would have to be shown or done before the verdict on record changes."""
    rule, (yes, no) = claim["rule"], claims.outcomes_of(claim)
    whole = (
        "the interval over the registered runs, the whole of it," if "experiments" in rule else "what the check finds"
    )
    lines = [
        f"By its rule the verdict is *{yes}* if {whole} is `{rule['accept_if']}`, *{no}* if `{rule['reject_if']}`."
    ]
    if found.changed:
        names = listed([name for name, *_ in found.changed])
        lines.append(
            f"To count, the changed settings ({names}) must be what {claim['place']} asks for, or the registered ones "
            "must be shown to be wrong: quote the sentence."
        )
        lines.append(
            f"Then the rule is amended: the old one (`{claims.rule_hash(rule)}`) stays on record with the reason, the "
            "new one is committed before its runs are, these are recorded, and `eos claims --update` gives the verdict."
        )
    else:
        lines.append("Values that differ from the record at the registered settings are a fault: see `eos verify`.")
    if found.gives == verdict:
        lines.append("Under these settings the rule gives what is on record: nothing here speaks against it.")
    return lines


def refute(name: str, given: dict[str, str], **how: Any) -> str:
    """The report against a claim by a rerun with settings given as text; ``how``: see :func:`rerun`."""
    claim = claim_of(name)
    found = rerun(claim, parsed(given), **how)
    words = ["eos", "refute", name, *(word for pair in given.items() for word in ("-p", "=".join(pair)))]
    words += ["--fresh"] * (how.get("source") == "live")
    words += ["--first", str(how["first"])] if how.get("first") else []
    return report(claim, found, shlex.join(words))
