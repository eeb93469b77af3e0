"""Words of the book's Sphinx extension."""

import importlib.util
import pathlib
import re
import sys

from eos_utils import claims, wording

PATH = pathlib.Path(__file__).resolve().parents[1] / "book" / "_ext" / "eos_book.py"
sys.path.append(str(PATH.parent))  # where Jupyter Book puts it: one extension imports another


def extension():
    spec = importlib.util.spec_from_file_location("eos_book", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_of_the_themes_icons_those_in_use_are_kept():
    """By their names and by others; the rest of the script is the same to the byte."""
    import eos_icons
    import pydata_sphinx_theme

    theme = pathlib.Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static"
    script = (theme / "scripts" / "fontawesome.js").read_text(encoding="utf-8")
    less = eos_icons.reduced(script, {"sun", "home", "github"})
    assert len(script) > 1_000_000 and len(less) < 100_000
    assert {icon["name"] for icon in eos_icons.ICON.finditer(less)} == {"sun", "house", "github"}
    assert eos_icons.ICON.sub("", less) == eos_icons.ICON.sub("", script)


def test_runs_that_differ_in_the_seed_are_one_entry():
    listed = extension().runs_listed
    names = [f"fg_a_seed{s}" for s in (100, 101, 102)] + ["fg_b_seed100", "fg_fork1", "fg_c_seed104", "fg_c_seed100"]
    assert listed(names) == "fg_a (seeds 100 to 102), fg_b (seed 100), fg_fork1, fg_c (seeds 100, 104)"
    assert listed([]) == ""


def test_a_measurement_comes_with_its_interval_and_the_spread_of_forks():
    measured = extension().measured
    found = {"value": 0.5, "interval": [0.25, 0.75], "unit": "of the steps", "runs": {"a": 0.25, "b": 0.75}}
    assert measured(found) == "0.5 [0.25, 0.75] of the steps, 2 runs"
    forks = {"f1": 0.4, "f2": None, "f3": 0.6}
    assert measured(found | {"forks": forks}).endswith("2 runs; forks of one run: 0.4 to 0.6")
    assert measured(None) == "" == measured({"value": None})


def marked(nodes):
    marks = {"subscript": "<sub>{}</sub>", "superscript": "<sup>{}</sup>"}
    return "".join(marks.get(type(n).__name__, "{}").format(n.astext()) for n in nodes)


def test_statements_are_set_as_mathematics():
    said = "‖w_j‖² − a_j² at λ_min(M), ⟨d_j,₊, ŵ_j⟩, ‖M‖_F, A^t and λ^(1−rε); eos_utils/fg_lemma_a_1.py, a^20"
    assert marked(extension().mathematical(said)) == (
        "‖w<sub>j</sub>‖² − a<sub>j</sub>² at λ<sub>min</sub>(M), ⟨d<sub>j,+</sub>, ŵ<sub>j</sub>⟩, ‖M‖<sub>F</sub>, "
        "A<sup>t</sup> and λ<sup>1−rε</sup>; eos_utils/fg_lemma_a_1.py, a^20"
    )


def test_no_statement_of_the_ledger_shows_a_bare_index():
    module = extension()
    for claim in claims.claims():
        for node in module.mathematical(claim["statement"]):
            assert "_" not in node.astext() and "^" not in node.astext(), claim["statement"]


def test_rules_are_in_words_without_markup_and_every_argument_has_a_value():
    for claim in claims.claims():
        for rule in (claim.get("rule"), (claim.get("rule") or {}).get("corrected")):
            said = wording.rule_in_words(rule)
            assert not re.search(r":\w+:|`|\\|: [;,)]", said), said
    assert wording.listed({"eta": 0.0, "strict": False, "part": None, "at": [1, 2]}) == (
        "eta: 0.0; strict: no; part: ; at: 1, 2"
    )
