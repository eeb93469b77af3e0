"""The book: its configuration, its inventory, the execution of notebooks, and the checker of built pages."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from eos_utils import book

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"figure", "theorem", "lemma", "proposition", "assumption", "definition", "equation", "observation"}


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def claims():
    return [c for p in sorted((ROOT / "book/claims").glob("*.yml")) for c in yaml.safe_load(p.read_text("utf-8"))]


# ---- inventory and claims --------------------------------------------------------------------------


def test_inventory_is_complete_in_itself():
    items = read("book/inventory.yml")
    assert len({i["id"] for i in items}) == len(items)
    for item in items:
        assert set(item) == {"id", "paper", "kind", "place", "title", "page"}, item
        assert item["paper"] in {"FG", "SG"} and item["kind"] in KINDS
        assert item["page"].startswith(item["paper"].lower() + "_") and item["id"].startswith(item["paper"].lower())


@pytest.mark.parametrize("paper, kind, numbers", [
    ("FG", "figure", "1 2 3 4 5 6 7"),
    ("FG", "theorem", "3.1"),
    ("FG", "lemma", "2.1 2.2 A.1 A.2"),
    ("FG", "assumption", "2.1 2.2"),
    ("FG", "equation", "1 2 3 4 5"),
    ("SG", "figure", "1 2 3"),
    ("SG", "theorem", "1 2"),
    ("SG", "lemma", "3.1 3.2 3.3 3.4 3.5"),
    ("SG", "proposition", "3.1 3.2"),
    ("SG", "assumption", "3.1 3.2 3.3 3.4 3.5 3.6 3.7 4.1 4.2 4.3 4.4 4.5"),
    ("SG", "equation", "1 2 3 4"),
])  # fmt: skip
def test_every_numbered_item_of_the_papers_is_listed(paper, kind, numbers):
    places = " ".join(i["place"] for i in read("book/inventory.yml") if (i["paper"], i["kind"]) == (paper, kind))
    for n in numbers.split():
        assert re.search(rf"\(?(?<![\d.]){re.escape(n)}(?!\.?\d)", places), f"{paper} {kind} {n}"


def test_every_item_has_a_claim_and_every_claim_an_item():
    items = {i["id"]: i for i in read("book/inventory.yml")}
    listed = claims()
    assert len({c["id"] for c in listed}) == len(listed)
    assert {c["item"] for c in listed} == set(items)
    for claim in listed:
        assert claim["paper"] == items[claim["item"]]["paper"]
        assert claim["kind"] in {"empirical", "mathematical"}
        assert claim["statement"].strip() and claim["place"] and "rule" in claim


def test_a_claim_with_a_rule_has_its_notebook():
    for claim in claims():
        if claim["rule"] is not None:
            assert (ROOT / "notebooks" / f"{claim['notebook']}.ipynb").is_file(), claim["id"]


def test_toc_names_what_exists_and_all_notebooks():
    listed = set(re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text()))
    for name in listed:
        assert any((ROOT / f"{name}{suffix}").is_file() for suffix in (".md", ".ipynb")), name
    assert {f"notebooks/{p.stem}" for p in (ROOT / "notebooks").glob("*.ipynb")} <= listed


# ---- cross-references ------------------------------------------------------------------------------


def sources():
    """The text of every page, {name: text}, and the names of its figures, {name: names}."""
    pages = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "book").glob("*.md")}
    figures = dict.fromkeys(pages, [])
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        pages[path.stem] = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        shown = [c["metadata"].get("mystnb", {}).get("figure", {}) for c in cells]
        figures[path.stem] = [figure["name"] for figure in shown if "name" in figure]
    return pages, figures


def blocks(text):
    """(kind, title, label) of each statement on a page."""
    return re.findall(r"^```\{prf:(\w+)\} (.+)\n:label: (\S+)$", text, re.MULTILINE)


def equations(text):
    return re.findall(r"^\$\$ \(([^()\s]+)\)$", text, re.MULTILINE)


def targets(text, role):
    """What a role points to, with a text of its own (`{role}` before `text <target>`) or without."""
    return [t.rpartition("<")[2].rstrip(">") for t in re.findall(rf"\{{{role}\}}`([^`]+)`", text)]


def test_every_numbered_statement_has_a_labelled_block_on_its_page():
    pages, _ = sources()
    for item in read("book/inventory.yml"):
        if item["kind"] in {"theorem", "lemma", "proposition", "assumption"}:
            here = [title for kind, title, _ in blocks(pages[item["page"]]) if kind == item["kind"]]
            place = " ".join(item["place"].replace(",", " ").replace(";", " ").split()[:2])
            if not place.startswith("Section"):
                assert f"{item['paper']}, {place}, as printed" in here, item["id"]


def test_labels_are_unique_and_every_reference_has_its_target():
    pages, figures = sources()
    labels = {
        "prf:ref": [label for text in pages.values() for _, _, label in blocks(text)],
        "eq": [label for text in pages.values() for label in equations(text)],
        "numref": [name for names in figures.values() for name in names],
    }
    every = [label for found in labels.values() for label in found]
    assert [label for label in every if every.count(label) > 1] == []
    for name, text in pages.items():
        # A statement without a label can not be referred to; a label in another form would not be found here.
        assert text.count("{prf:") - text.count("{prf:ref}") == len(blocks(text)), name
        assert len(re.findall(r"^\$\$ *\(", text, re.MULTILINE)) == len(equations(text)), name
        for role, known in labels.items():
            assert [t for t in targets(text, role) if t not in known] == [], (name, role)
    used = {t for text in pages.values() for t in targets(text, "eq")}
    assert sorted(set(labels["eq"]) - used) == []  # a number that nothing refers to is in the way


# ---- configuration and staging ---------------------------------------------------------------------


def test_stage_differs_in_execution_only():
    tracked = read("_config.yml")
    staged = yaml.safe_load(book.staged_config((ROOT / "_config.yml").read_text(encoding="utf-8")))
    assert (tracked["execute"].pop("execute_notebooks"), staged["execute"].pop("execute_notebooks")) == (
        "force",
        "off",
    )
    assert tracked == staged


def test_nothing_is_loaded_from_elsewhere():
    config = read("_config.yml")["sphinx"]["config"]
    static = ROOT / "book/_static"
    assert (static / config["mathjax_path"]).is_file()
    assert list((static / "mathjax").rglob("*.woff")) and (static / "mathjax/LICENSE").is_file()
    assert not re.search(r"//", re.sub(r"/\*.*?\*/", "", (static / "eos.css").read_text(), flags=re.DOTALL))
    for page in [*(ROOT / "book").glob("*.md"), *(ROOT / "book/_templates").iterdir()]:
        assert "http" not in page.read_text(encoding="utf-8"), page.name


def notebook(tmp_path, *sources, name="demo"):
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = tmp_path / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path


def test_scrub_leaves_no_path_of_the_machine(tmp_path):
    executed = {
        "metadata": {
            "papermill": {"input_path": f"{tmp_path}/x.ipynb", "duration": 2.34}, "kernelspec": {"name": "python3"},
        },
        "cells": [{
            "metadata": {"papermill": {"duration": 1}, "tags": ["a"]},
            "outputs": [{"text": f"{tmp_path}/eos_utils/x.py:1: Warning in {Path.home()}/data"}],
        }],
    }  # fmt: skip
    clean = json.loads(book.scrub(executed, tmp_path))
    assert clean["metadata"] == {"kernelspec": {"name": "python3"}, "eos_seconds": 2.3}
    assert clean["cells"][0]["metadata"] == {"tags": ["a"]}
    assert clean["cells"][0]["outputs"][0]["text"] == "./eos_utils/x.py:1: Warning in ~/data"


def test_freshness_key_follows_everything_that_outputs_depend_on(tmp_path):
    nb = notebook(tmp_path, "1")
    keys = {book.freshness_key(tmp_path, nb)}
    for name in (
        "eos_utils/a.py",
        "experiments/a.yaml",
        "results/a.nc",
        "book/claims/a.yml",
        "requirements.lock",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        for content in ("one", "two"):
            (tmp_path / name).write_text(content)
            keys.add(book.freshness_key(tmp_path, nb))
    notebook(tmp_path, "2")
    keys.add(book.freshness_key(tmp_path, nb))
    assert len(keys) == 12
    (tmp_path / "eos_utils/__pycache__").mkdir()
    (tmp_path / "eos_utils/__pycache__/a.pyc").write_text("by-product")
    (tmp_path / "book/index.md").write_text("prose")
    assert book.freshness_key(tmp_path, nb) in keys


# ---- execution -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_execute_writes_all_or_nothing(tmp_path):
    out = tmp_path / "out" / "demo.ipynb"
    book.execute(notebook(tmp_path, "x = 1", "print(x)"), out, {"x": 3}, progress=False)
    good = out.read_bytes()
    assert "3\\n" in good.decode()

    with pytest.raises(book.BookError) as caught:
        failing = notebook(tmp_path, "x = 1", "print(x); raise ValueError('the reason')")
        book.execute(failing, out, {"x": 0, "y": "two"}, progress=False)
    message = str(caught.value)
    assert "with x=0, y='two'" in message  # which are a cell of their own, the first
    for part in ("demo.ipynb", "cell 3", "ValueError: the reason", "demo.failed.ipynb", "eos run demo"):
        assert part in message
    assert out.read_bytes() == good
    assert {p.name for p in out.parent.iterdir()} == {"demo.ipynb", "demo.failed.ipynb"}

    left = out.with_name(".demo.1.part.ipynb")  # of a process that was killed, two hours ago
    left.write_text("{")
    os.utime(left, (time.time() - 7200,) * 2)
    book.execute(notebook(tmp_path, "x = 2"), out, progress=False)
    assert {p.name for p in out.parent.iterdir()} == {"demo.ipynb"}


@pytest.mark.slow
def test_execute_trusts_the_timeout_not_the_notebook(tmp_path):
    with pytest.raises(book.BookError, match="imeout"):
        slow = notebook(tmp_path, "import time; time.sleep(60)")
        book.execute(slow, tmp_path / "out.ipynb", progress=False, timeout=1)
    assert not (tmp_path / "out.ipynb").exists()


def test_build_executes_only_what_is_out_of_date(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    notebook(tmp_path / "notebooks", "1", name="a")
    notebook(tmp_path / "notebooks", "1", name="b")
    for name in ("_config.yml", "_toc.yml", "book/index.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("title: t\n")
    ran = []

    def run(root, *arguments):
        if arguments[:2] == ("-m", "eos_utils.book"):
            ran.append(Path(arguments[2]).stem)
            Path(arguments[3]).write_bytes(Path(arguments[2]).read_bytes())
        return book.subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(book, "_run", run)
    for change, expected in (("", ["a", "b"]), ("", []), ("notebook", ["b"]), ("claim", ["a", "b"])):
        if change == "notebook":
            notebook(tmp_path / "notebooks", "2", name="b")
        if change == "claim":
            (tmp_path / "book/claims").mkdir()
            (tmp_path / "book/claims/x.yml").write_text("[]")
        ran.clear()
        book.build(tmp_path)
        assert sorted(ran) == expected, change or "first and second"
    assert (tmp_path / "_build/stage/notebooks/a.ipynb").exists()


def test_notebooks_are_executed_on_a_cluster_too(tmp_path):
    """One that works and one that fails, by Dask: the first has its mark, the second is named."""
    pytest.importorskip("distributed")
    good, bad = notebook(tmp_path, "1 + 1", name="good"), notebook(tmp_path, "1 / 0", name="bad")
    jobs = [(path, tmp_path / "out" / path.name, "key") for path in (good, bad)]
    failures = [f for f in book._executed(tmp_path, jobs, 1, "local") if f]
    assert len(failures) == 1 and "bad.ipynb" in failures[0] and "ZeroDivisionError" in failures[0]
    assert (tmp_path / "out" / "good.key").read_text() == "key\n" and not (tmp_path / "out" / "bad.key").exists()


# ---- check -----------------------------------------------------------------------------------------

GOOD = '<html><head><title>t</title></head><body><p id="here"></p>{}</body></html>'


@pytest.mark.parametrize("body, fault", [
    ('<a href="gone.html">x</a>', "gone.html does not exist"),
    ('<a href="other.html#nowhere">x</a>', "other.html#nowhere does not exist"),
    ('<a href="#nowhere">x</a>', "#nowhere does not exist"),
    ('<a href="../outside.html">x</a>', "does not exist"),
    ('<img src="gone.png" alt="A curve">', "gone.png does not exist"),
    ('<img src="a.png">', "no alt text"),
    ('<img src="a.png" alt=" ">', "no alt text"),
    ('<img src="a.png" alt="Image">', "placeholder"),
    ('<img src="a.png" alt="_images/a.png">', "placeholder"),
    ('<script src="https://cdn.example/x.js"></script>', "another host"),
    ('<script src="//cdn.example/x.js"></script>', "another host"),
    ('<link rel="stylesheet" href="http://cdn.example/x.css">', "another host"),
    ('<link rel="preload" href="https://cdn.example/x.woff2">', "another host"),
    ('<iframe src="https://example.org"></iframe>', "another host"),
    ('<img srcset="https://example.org/a.png 2x" alt="A curve">', "another host"),
    ('<style>@import url("https://example.org/a.css");</style>', "another host"),
    ('<i id="twice"></i><b id="twice"></b>', "occurs 2 times"),
])  # fmt: skip
def test_check_finds(tmp_path, body, fault):
    (tmp_path / "page.html").write_text(GOOD.format(body))
    (tmp_path / "other.html").write_text(GOOD.format(""))
    (tmp_path / "a.png").touch()
    problems = book.check(tmp_path)
    assert len(problems) == 1 and problems[0].startswith("page.html: ") and fault in problems[0], problems


def test_check_finds_missing_titles_fonts_from_elsewhere_and_missing_pages(tmp_path):
    assert book.check(tmp_path) == ["no pages; `make book` makes them"]
    (tmp_path / "page.html").write_text("<html><body></body></html>")
    (tmp_path / "x.css").write_text("@font-face { src: url(https://example.org/f.woff) }")
    assert book.check(tmp_path) == ["page.html: page: no title", "x.css: loads from another host"]


def test_check_weighs_what_a_page_loads_in_one_scheme(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "WEIGHT", 1000)
    (tmp_path / "mathjax").mkdir()
    for name, size in (("a.png", 700), ("dark.png", 900), ("mathjax/m.js", 5000), ("more.js", 300)):
        (tmp_path / name).write_bytes(b" " * size)
    body = (
        '<img class="only-light" src="a.png" alt="A curve"><img src="a.png" alt="Again">'
        '<img class="only-dark" src="dark.png" alt="A curve"><script src="mathjax/m.js"></script>'
    )
    (tmp_path / "page.html").write_text(GOOD.format(body))
    assert book.check(tmp_path) == []
    (tmp_path / "page.html").write_text(GOOD.format(body + '<script src="more.js"></script>'))
    assert [p.partition(" MB")[0] for p in book.check(tmp_path)] == ["page.html: page: loads 0.00"]


def test_check_accepts_what_is_right(tmp_path):
    body = (
        '<a href="sub/other.html#here">x</a><a href="#here">x</a><a href="https://example.org">x</a>'
        '<a href="mailto:a@b.c">x</a><a href="sub/">x</a><img src="a.png" alt="A curve that rises">'
        '<img src="data:image/png;base64,AA" alt="A curve"><link rel="canonical" href="https://example.org">'
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "page.html").write_text(GOOD.format(body))
    (tmp_path / "404.html").write_text(GOOD.format('<a href="/prefix/page.html">x</a><a href="/page.html">x</a>'))
    (tmp_path / "index.html").write_text('<meta http-equiv="Refresh" content="0; url=page.html" />')
    for name in ("sub/other.html", "sub/index.html"):
        (tmp_path / name).write_text(GOOD.format(""))
    (tmp_path / "a.png").touch()
    assert book.check(tmp_path) == []


def test_what_executes_a_notebook_does_not_wait_for_torch():
    code = "import sys, papermill, eos_utils.book; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
