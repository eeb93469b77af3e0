"""What every notebook page shows beside its figures: the run, the verdicts, where the numbers come from.

Verdicts come from the claims' registered runs alone. A notebook that computed its run, or has other settings, shows
what it measured beside what is on record, and no verdict.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import shlex
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from eos_utils import catalogue, claims, registry, store
from eos_utils.behind import Behind
from eos_utils.eos_stats import entry_step, scaled
from eos_utils.experiment import Experiment, Measure, as_two_over, rational, subscript
from eos_utils.provenance import git_state, versions
from eos_utils.run import run
from eos_utils.wording import indexed

if TYPE_CHECKING:
    import xarray as xr

RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

TONES = {
    "reproduced": "good",
    "holds on everything tested": "good",
    "not reproduced": "bad",
    "counterexample": "bad",
    "fails": "bad",
    "pending": "pending",
}


def experiment(p: SimpleNamespace) -> Experiment:
    """The experiment that a notebook's parameters describe (those that are fields of one; '' and 0.0 mean none).

    ``classes`` is text there, such as '1, 0'. Raises ``ValueError`` where that holds anything but whole numbers.
    """
    fields = {f.name for f in dataclasses.fields(Experiment)}
    given = {k: v or None if k.startswith("stop_") else v for k, v in vars(p).items() if k in fields}
    if isinstance(given.get("classes"), str):
        try:
            given["classes"] = tuple(int(part) for part in p.classes.split(",")) if p.classes.strip() else None
        except ValueError:
            raise ValueError(f"classes={p.classes!r}: must be class numbers such as '1, 0', or empty") from None
    return Experiment.from_dict(given)


def trajectory(p: SimpleNamespace) -> xr.Dataset:
    """The trajectory of a notebook's parameters, from the record or computed, as ``p.source`` says."""
    measure = Measure(k=p.k, stride=p.stride, gram=getattr(p, "gram", 0))
    return run(experiment(p), measure, source=p.source, device=p.device)


def findings(paper: str, kind: str, verdicts_shown: tuple[str, ...]) -> Any:
    """The claims of a paper that carry one of these verdicts on record, each with a link to the page that shows it."""
    from IPython.display import HTML

    rows = [_cells("th", "Place", "Claim, and where it is shown", "As printed", "Corrected")]
    for claim in claims.ledger():
        if (claim["paper"], claim["kind"]) != (paper, kind) or claim["as_printed"] not in verdicts_shown:
            continue
        repaired = "–" if claim["corrected"] == "none" else _badge(claim["corrected"])
        link = f'<a href="{claim["notebook"]}.html">{_worded(claim["statement"])}</a>'
        rows.append(_cells("td", html.escape(claim["place"]), link, _badge(claim["as_printed"]), repaired))
    return HTML(_scrollable(f"Findings: {paper}, {kind}, {' or '.join(verdicts_shown)}", rows))


def decayed(p: SimpleNamespace, name: str) -> xr.Dataset:
    """A run with a decay of the step size: the catalogue's ``name`` if it is what ``p`` describes, else computed.

    ``p``: the fields of the run without a decay, ``factor``, ``after`` (eigenvalues that have entered by then) and
    ``then`` (steps after the decay).
    """
    plain = dataclasses.replace(experiment(p), steps=0)
    decay = {"factor": p.factor, "entered": p.after, "then": p.then}
    if name in catalogue.catalogue() and p.source != "live":
        there = catalogue.find(name)
        other = dataclasses.replace(there.experiment, steps=0, fork=None, decay=None)
        its = there.experiment.decay or {}
        same = rational(its.get("factor", 1)) == rational(p.factor) and its.get("entered", p.after) == p.after
        if other == plain and same and its.get("then", there.experiment.steps) == p.then:
            return run(there.experiment, source="recorded")
    whole = dataclasses.replace(plain, steps=p.steps, decay=decay)
    return run(whole, Measure(k=p.k, stride=p.stride), source=p.source, device=p.device)


def to_entry(p: SimpleNamespace, name: str) -> xr.Dataset:
    """A run that ends ``p.then`` steps after λ1 has entered, or after ``p.steps``: recorded if it is ``name``'s."""
    return decayed(SimpleNamespace(**vars(p), factor=1, after=1), name)  # a decay by the factor 1


def step_set(activation: str) -> Any:
    """The paper's set of step sizes in each reading: where λ1 starts, and what the first hundred steps do.

    λ1 at the start does not depend on the step size: a member without a run of its own takes it from another's.
    """
    rows = []
    for labels, preprocessing in itertools.product(("onehot", "vehicles"), ("center", "standardize")):
        names = {k: f"fg_set_{activation}_{labels}_{preprocessing}_eta{k}" for k in (30, 50, 150, 200)}
        runs = {k: found for k, name in names.items() if (found := on_record(name)) is not None}
        if not runs:
            continue
        two_over, some = next(iter(runs.items()))
        sharpness = two_over * float(scaled(some)[0, 0])
        for k in names:
            what = [
                {"onehot": "ten", "vehicles": "one"}[labels],
                {"center": "centred"}.get(preprocessing, "standardised"),
            ]
            rows.append([*what, f"2/{k}", number(sharpness / k, 3), _fate(runs.get(k), sharpness / k)])
    header = ["Outputs", "Inputs", "η", "λ₁η/2 at the start", "The first 100 steps"]
    return table("The paper's step sizes", header, rows)


def _fate(found: xr.Dataset | None, start: float) -> str:
    side = "above" if start >= 1 else "below"
    if found is None:
        return f"starts {side} the edge"
    if found.attrs["status"] == "diverged":
        return f"starts {side} the edge and diverges at step {found.attrs['last_step']}"
    level, rise = float(scaled(found)[-1, 0]), float(found["loss"].max() / found["loss"][0])
    if start >= 1 and rise <= 1.01:
        return f"starts above the edge; λ₁η/2 goes to {number(level, 2)}, without a rise of the loss above its start"
    if start >= 1:
        return f"catapult: the loss rises {number(rise, 2)}-fold, λ₁η/2 goes to {number(level, 2)}"
    return f"λ₁η/2 goes to {number(level, 2)}" + (f", the loss rises {number(rise, 2)}-fold" if rise > 1.01 else "")


def on_record(name: str, entry: catalogue.Entry | None = None) -> xr.Dataset | None:
    """The recorded run of a catalogue name (whose ``entry`` may be at hand), or None while it is pending."""
    entry = entry or catalogue.find(name)
    if entry.status().state in ("pending", "missing"):
        return None
    found = store.Store().load(entry.experiment.key)
    found.attrs["source"] = "recorded"
    return found


def recorded(names: list[str]) -> dict[str, xr.Dataset]:
    """Those of the named runs that are on record."""
    known = catalogue.catalogue()  # read once, not for each name
    found = {name: on_record(name, known.get(name)) for name in names}
    return {name: run for name, run in found.items() if run is not None}


def is_canonical(trajectory: xr.Dataset, name: str) -> bool:
    """Whether a trajectory is the recorded run of this catalogue name."""
    return trajectory.attrs["key"] == catalogue.find(name).experiment.key and trajectory.attrs["source"] == "recorded"


def behind(trajectory: xr.Dataset, name: str) -> Behind | None:
    """What is drawn behind a run with other settings: that on record, with its perturbed forks; else None."""
    found = None if is_canonical(trajectory, name) else on_record(name)
    if found is None:
        return None
    base, forks = catalogue.find(name).experiment.key, []
    for entry in catalogue.catalogue().values():
        e = entry.experiment
        if e.fork and e.fork["of"] == base and e.fork["size"] != "0" and not (e.decay or e.project):
            forks.append(on_record(entry.name, entry))
    return Behind(found, tuple(fork for fork in forks if fork is not None))


def number(value: float | None, digits: int = 3) -> str:
    """A number to a few significant digits, with its power of ten written out; a dash for none.

    >>> number(0.123456), number(1234567.0), number(None), number(3.0)
    ('0.123', '1,234,567', '–', '3')
    >>> number(163.0, 2), number(-6.07e-07)  # no hyphen, at which a line could break
    ('160', '−6.07·10⁻⁷')
    """
    if value is None or math.isnan(value):
        return "–"
    mantissa, _, power = f"{value:.{digits}g}".partition("e")
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif not power:
        text = mantissa
    elif int(power) > 0:  # fewer digits than the number has before its point
        text = f"{float(mantissa) * 10 ** int(power):,.0f}"
    else:
        text = f"{mantissa}·10{str(int(power)).translate(RAISED)}"
    return text.replace("-", "−")


def span(values: Iterable[float], digits: int = 3) -> str:
    """Least to most of some numbers, to a few significant digits.

    >>> span([0.31, 0.2]), span([4.0, 4.0])
    ('0.2 to 0.31', '4')
    """
    known = list(values)
    low, high = number(min(known), digits), number(max(known), digits)
    return low if low == high else f"{low} to {high}"


def _badge(verdict: str, note: str = "") -> str:
    tone = TONES.get(verdict, "mixed")
    return f'<span class="eos-badge eos-{tone}">{html.escape(verdict)}{note}</span>'


def _worded(text: str) -> str:
    """HTML of a sentence of the ledger, whose plain text writes indices and powers as ``d_j`` and ``λ^(1−rε)``.

    >>> _worded("‖w_j‖ < λ^(1−rε), half_mse")
    '‖w<sub>j</sub>‖ &lt; λ<sup>1−rε</sup>, half_mse'
    """
    pieces = ((mark, html.escape(piece)) for mark, piece in indexed(text.strip()))
    return "".join(f"<{mark}>{piece}</{mark}>" if mark else piece for mark, piece in pieces)


def _cells(tag: str, *cells: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _cases(count: int) -> str:
    return f"{count:,} case{'' if count == 1 else 's'}"


FORKS = (
    "Forks: least and most over continuations of a run that were perturbed by a relative 10⁻⁶ at the edge. "
    'Fragile: a threshold moved by 20 % would change the verdict (<a href="../book/conventions.html">conventions</a>).'
)


def verdicts(notebook: str, trajectory: xr.Dataset, canonical: str) -> Any:
    """The claims of this page: verdicts if the trajectory is the canonical one, else only what was measured here."""
    from IPython.display import HTML

    mine = [c for c in claims.claims() if c["notebook"] == notebook]
    if not is_canonical(trajectory, canonical):
        same = trajectory.attrs["key"] == catalogue.find(canonical).experiment.key
        return HTML(_measured_here(mine, trajectory, "Computed here" if same else "Other settings than on record"))
    rows = [_cells("th", "Claim", "Verdict", "Measured, mean over runs [bootstrap interval]", "Forks")]
    for claim in mine:
        verdict = claims.evaluate(claim)
        found = verdict["statistic"]
        measured, forks, badge = "–", "–", _badge(verdict["as_printed"], ", fragile" if verdict["fragile"] else "")
        if found and "interval" in found:
            low, high = found["interval"]
            measured = f"{number(found['value'])} [{number(low)}, {number(high)}] {_worded(found['unit'])}"
            if found["value"] is None:  # one run without a value leaves no mean
                measured = f"no mean, since not every run has a value: {_worded(found['unit'])}"
            spread = [v for v in found.get("forks", {}).values() if v is not None]
            forks = f"{number(min(spread))} to {number(max(spread))}" if spread else "–"
        elif found:  # a check, live
            measured = f"{number(found['value'])} {_worded(found['unit'])}; {_cases(found['trials'])}, live"
        if repaired := verdict.get("corrected_statistic"):
            measured += f"<br>corrected: {number(repaired['value'])} {_worded(repaired['unit'])}"
            badge += f"<br>corrected: {_badge(verdict['corrected'])}"
        link = f'<a href="../book/claims.html#claim-{claim["id"].replace(".", "-")}">{_worded(claim["statement"])}</a>'
        rows.append(_cells("td", link, badge, measured, forks))
    return HTML(_scrollable("Verdicts of this page", rows, FORKS))


def checks(notebook: str, p: SimpleNamespace) -> Any:
    """The claims of a theory page: verdicts, or what the checks find with other parameters, beside what is on record.

    A parameter of the notebook that has the name of an argument of a rule stands for it.
    """
    from IPython.display import HTML

    mine = [c for c in claims.claims() if c["notebook"] == notebook and c.get("rule")]
    others = [
        {k: v for k, v in vars(p).items() if k in arguments and arguments[k] != v}
        for arguments in (c["rule"].get("arguments", {}) for c in mine)
    ]
    if any(others):
        rows, known = [_cells("th", "Claim", "Measured here", "On record")], claims.on_record(store.root())
        for claim, changed in zip(mine, others, strict=True):
            if "reading" in claim["rule"] or "experiments" in claim["rule"]:  # nothing that these parameters change
                continue
            here, there = claims.check(claim["rule"], **changed), known.get(claim["id"], {}).get("statistic") or {}
            what = _worded(f"{claim['statement'].strip()} ({claim['rule'].get('unit', '1')})")
            rows.append(_cells("td", what, number(here.value), number(there.get("value"))))
        return HTML("<p>Other settings than on record: no verdict.</p>" + _scrollable("Measured here", rows))
    rows = [_cells("th", "Claim", "As printed", "Tested", "Found", "Corrected")]
    for claim in mine:
        verdict = claims.evaluate(claim)
        found, repaired = verdict["statistic"], verdict.get("corrected_statistic")
        tested = f"{_cases(found['trials'])}: {verdict['scope']}" if found and "trials" in found else verdict["scope"]
        read = claim["rule"].get("why", "–") if "reading" in claim["rule"] else "–"
        shown = f"{number(found['value'])} {found['unit']}" if found else read
        corrected = "–"
        if repaired:
            corrected = f"{_badge(verdict['corrected'])} {number(repaired['value'])} {_worded(repaired['unit'])}"
        link = f'<a href="../book/claims.html#claim-{claim["id"].replace(".", "-")}">{_worded(claim["statement"])}</a>'
        badge = _badge(verdict["as_printed"], ", fragile" if verdict["fragile"] else "")
        rows.append(_cells("td", link, badge, _worded(tested), _worded(shown), corrected))
    return HTML(_scrollable("Verdicts of this page", rows))


def computed(
    notebook: str, p: SimpleNamespace, result: str = "computed on this page, in float64; nothing is recorded"
) -> Any:
    """A block that says how a page without a run of its own was made, and the one command that makes it again."""
    given = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in vars(p).items() if name != "source")
    facts = {
        "Result": result,
        "Effective parameters": ", ".join(f"{k} = {v}" for k, v in vars(p).items()),
        "This page": _executed(),
    }
    return _origin(facts, f"papermill notebooks/{notebook}.ipynb out.ipynb {given}")


def _executed() -> str:
    here = git_state()
    dirty = ", with uncommitted changes" if here["dirty"] else ""
    return f"executed at commit {here['commit']}{dirty}, with " + ", ".join(f"{k} {v}" for k, v in versions().items())


def _origin(facts: dict[str, str], command: str, key: str = "") -> Any:
    """``key``: of the record shown, which the box below the provenance offers for download."""
    from IPython.display import HTML

    shown = f' data-eos-run="{key}"' if key else ""
    listed = "".join(f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return HTML(
        f'<details class="eos-provenance"{shown}><summary>Where these numbers come from</summary><dl>{listed}'
        f"<dt>Compute it again</dt><dd><code>{html.escape(command)}</code></dd></dl></details>"
    )


def entries(trajectory: xr.Dataset, k: int = 5) -> Any:
    """The steps at which the eigenvalues enter EoS, at the level of the definition and at two beside it."""
    from IPython.display import HTML

    levels, k = (0.95, 0.98, 1.0), min(k, trajectory.sizes["eig"])
    rows = [_cells("th", "Level", *(f"λ{subscript(i + 1)}" for i in range(k)))]
    for level in levels:
        steps = (entry_step(trajectory, i + 1, level) for i in range(k))
        rows.append(_cells("td", f"{level:.2f} · 2/η", *("never" if math.isnan(s) else f"{s:,.0f}" for s in steps)))
    return HTML(_scrollable("Steps of entry", rows))


def _measured_here(mine: list[dict[str, Any]], trajectory: xr.Dataset, what: str) -> str:
    rows = [_cells("th", "Statistic", "Measured here", "On record, mean over its runs")]
    for claim in mine:
        rule = claim.get("rule")
        if not rule or "experiments" not in rule or rule.get("by"):  # nothing that this one run could show
            continue
        here = registry.STATISTICS[rule["statistic"]](trajectory, **rule.get("arguments", {}))
        found = claims.evaluate(claim)["statistic"]
        rows.append(
            _cells("td", _worded(claim["statement"]), number(here), number(found["value"]) if found else "pending")
        )
    return f"<p>{what}: no verdict.</p>" + _scrollable("Measured here", rows)


def _scrollable(label: str, rows: list[str], caption: str = "") -> str:
    if caption:  # in a <span>, which can be narrower than the table and stay where it is while that is scrolled
        caption = f"<caption><span>{caption}</span></caption>"
    return (
        f'<div class="eos-scroll" tabindex="0" role="region" aria-label="{label}"><table class="eos-table">'
        f"{caption}<thead>{rows[0]}</thead><tbody>{''.join(rows[1:])}</tbody></table></div>"
    )


def provenance(notebook: str, p: SimpleNamespace, trajectory: xr.Dataset) -> Any:
    """A block that says where the page's numbers come from, and the one command that makes them again."""
    origin = json.loads(trajectory.attrs["provenance"])
    entry = Experiment.from_dict({k: v for k, v in json.loads(trajectory.attrs["experiment"]).items() if k != "schema"})
    given = " ".join(
        f"-p {name} {shlex.quote(str(value))}" for name, value in vars(p).items() if name != "source" and value != ""
    )
    origin_state = ", with uncommitted changes" if origin["dirty"] else ""
    facts = {
        "Result": f"{trajectory.attrs['source']} (experiment {trajectory.attrs['key']}), ended by: "
        f"{trajectory.attrs['status']} at step {trajectory.attrs['last_step']}",
        "Effective parameters": ", ".join(f"{k} = {v}" for k, v in vars(p).items()),
        "Step size": f"η = {as_two_over(rational(entry.eta))}",
        "Computed by": f"eos_utils at commit {origin['commit']}{origin_state}"
        f", on {origin['device']}, {origin['recorded_at']}",
        "Versions there": ", ".join(f"{k} {v}" for k, v in origin["versions"].items()),
        "Data": f"{origin['data']['name']}, SHA-256 {origin['data']['sha256'][:16]}…",
        "Seed": str(entry.seed),
        "Cost": f"{origin['seconds'] / 60:.1f} min for {origin['steps']:,} steps, "
        f"{origin['evaluations']:,} evaluations, {origin['products']:,} Hessian-vector products",
        "This page": _executed(),
    }
    key = trajectory.attrs["key"] if trajectory.attrs["source"] == "recorded" else ""
    return _origin(facts, f"papermill notebooks/{notebook}.ipynb out.ipynb -p source live {given}", key)


def table(label: str, header: list[str], rows: list[list[str]]) -> Any:
    """A table of plain text under its label that scrolls on a narrow screen."""
    from IPython.display import HTML

    cells = [_cells("th", *map(html.escape, header)), *(_cells("td", *map(html.escape, row)) for row in rows)]
    return HTML(_scrollable(html.escape(label), cells, html.escape(label)))


def glue(numbers: dict[str, str]) -> None:
    """Makes numbers available to the prose, which never types one."""
    try:
        from myst_nb import glue as put
    except ImportError:  # outside the book's environment the prose is not rendered
        return
    for name, value in numbers.items():
        put(name, value, display=False)
