"""A claim in words: what its rule measures, and on which runs it was tested."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from eos_utils.catalogue import Entry
from eos_utils.experiment import as_two_over, rational
from eos_utils.registry import CHECKS, GROUPED, STATISTICS

LOW = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _listed(values: Iterable[Any]) -> str:
    """The distinct values in words, in their order: 'a, b and c'."""
    words = [str(v) for v in dict.fromkeys(values)]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def scope(entries: list[Entry]) -> str:
    """In words, what a claim was tested on."""
    if not entries:
        return ""
    runs = [e.experiment for e in entries]
    seeds, widths = sorted({e.seed for e in runs}), sorted({e.width for e in runs})
    depths = sorted({e.depth for e in runs})
    names = {"relu": "ReLU", "elu": "ELU"}
    inputs = {"center": "centered", "standardize": "standardized", "scale": "scaled"}
    outputs = {True: "ten outputs", False: "one output"}
    return (
        f"{_listed(e.dataset.upper().replace('CIFAR10', 'CIFAR-10') for e in runs)}, "
        f"n = {_listed(f'{e.n:,}' for e in runs)}, {_listed(inputs[e.preprocessing] for e in runs)} inputs, "
        f"{_listed(names.get(e.activation, e.activation) for e in runs)} network of depth {_listed(depths)} "
        f"and width {_listed(widths)}, "
        f"{_listed(outputs[e.labels == 'onehot'] for e in runs)}, {_listed(e.loss for e in runs)}, "
        f"η = {_listed(as_two_over(rational(e.eta)) for e in runs)}, seed{'s' if len(seeds) > 1 else ''} "
        + (f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 2 else _listed(seeds))
    )


def rule_in_words(rule: dict[str, Any] | None) -> str:
    """What is measured (the first sentence of the statistic's docstring), what accepts, what rejects."""
    if not rule:
        return ""
    if "reading" in rule:
        return "a reading of the text; nothing is computed"
    known = {**STATISTICS, **GROUPED, **CHECKS}
    statistic = known.get(rule["statistic"])
    what = ((statistic and statistic.__doc__) or rule["statistic"]).strip().split("\n\n")[0]
    out = re.sub(r"(?::\w+:)?``?([^`]*)``?", r"\1", " ".join(what.split())).replace("\\|", "|").rstrip(".")
    if rule.get("arguments"):
        out += f" ({listed(rule['arguments'])})"
    yes, no = rule.get("outcomes", ("Accepted", "rejected"))
    out += f". {yes[0].upper()}{yes[1:]} if {rule['accept_if']}, {no} if {rule['reject_if']}, else inconclusive"
    out = _set(out)
    if "experiments" not in rule:
        return f"{out}."
    runs = rule.get("min_runs", 5)
    return f"{out}; at least {runs} run" + ("s." if runs != 1 else ".")


def _set(text: str) -> str:
    """With signs and indices as they are set in print: '≥ −0.8', 'λ₁'."""
    text = re.sub(r"λ(\d)", lambda found: "λ" + found[1].translate(LOW), text)
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return text.replace(">=", "≥").replace("<=", "≤")


def listed(value: Any) -> str:
    """A list, or a dictionary, or a word as one line."""
    if isinstance(value, dict):
        return "; ".join(f"{k}: {listed(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)e-(\d+)(?!\w)")
# A letter or a closing mark with an index or an exponent, as the ledger writes it: w_j, λ_min, d_j,₊, ‖M‖_F, A^t.
INDEXED = re.compile(
    r"(?<=[^\W\d_]|[‖|)⟩\u0302])"
    r"(?:_((?:min|max|init|[^\W\d_])(?![A-Za-z0-9_])(?:,[₊₋])?)|\^(?:\(([^()]+)\)|([A-Za-zε])(?![A-Za-z0-9_])))"
    r"|(?<=10)\^\((−\d+)\)"
)


def indexed(text: str) -> list[tuple[str, str]]:
    """Pieces of a sentence, each with '' or, for what belongs below or above the line, 'sub' or 'sup'.

    Names such as ``half_mse`` stay as they are, and ``1e-6`` becomes a power of ten.

    >>> indexed("‖w_j‖ < λ^(1−rε), half_mse")
    [('', '‖w'), ('sub', 'j'), ('', '‖ < λ'), ('sup', '1−rε'), ('', ', half_mse')]
    >>> indexed("within 1e-6 or 2.5e-10")
    [('', 'within 10'), ('sup', '−6'), ('', ' or 2.5·10'), ('sup', '−10'), ('', '')]
    """
    text = POWER.sub(lambda m: f"{'' if float(m[1]) == 1 else m[1] + '·'}10^(−{int(m[2])})", text)
    out, at = [], 0
    for found in INDEXED.finditer(text):
        index, *exponents = found.groups()
        low = (index or "").translate({ord("₊"): "+", ord("₋"): "−"})
        out += [("", text[at : found.start()]), ("sub", low) if index else ("sup", next(filter(None, exponents)))]
        at = found.end()
    return [*out, ("", text[at:])]
