"""A notebook outside of a clone: its first cell, its buttons; and the box on its page that says how to rerun it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from eos_utils import launch
from eos_utils.experiment import Experiment, Measure
from eos_utils.parameters import parameters
from eos_utils.run import compute
from eos_utils.store import Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def repository(tmp_path):
    """A git repository with a package `eos_utils` and a result."""
    made = tmp_path / "repository"
    (made / "eos_utils").mkdir(parents=True)
    (made / "results").mkdir()
    (made / "eos_utils" / "__init__.py").write_text("import pathlib\nroot = pathlib.Path(__file__).parent.parent\n")
    (made / "results" / "a.nc").write_text("recorded")
    run = lambda *words: subprocess.run(["git", "-C", made, *words], check=True, capture_output=True)  # noqa: E731
    run("init", "--initial-branch=trunk")
    run("add", ".")
    run("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--message=all")
    return made


def ran(source, folder, **variables):
    """The source in a Python without any installed package, and with a `pip` that notes what it is asked."""
    (folder / "bin" / "pip").mkdir(parents=True)
    (folder / "bin" / "pip" / "__init__.py").touch()
    (folder / "bin" / "pip" / "__main__.py").write_text("import sys; open('asked', 'w').write(' '.join(sys.argv[1:]))")
    environment = os.environ | {"PYTHONPATH": str(folder / "bin")} | variables
    command = [sys.executable, "-S", "-c", source]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_the_first_cell_installs_and_fetches_where_the_package_is_missing(repository, tmp_path):
    cell = launch.first_cell(f"file://{repository}", "trunk")
    assert "remove-cell" in cell["metadata"]["tags"]
    source = "".join(cell["source"]) + (
        "\nimport json as _json, eos_utils as _eos\n"
        "print(_json.dumps([(_eos.root / 'results/a.nc').read_text(), [n for n in globals() if n[0] != '_']]))"
    )
    (tmp_path / "colab").mkdir()
    assert ran(source, tmp_path / "colab") == ["recorded", []]  # no name that could pass for a parameter
    assert (tmp_path / "colab" / "asked").read_text() == "install --quiet --editable ./eos"
    assert (tmp_path / "colab" / "eos" / ".git" / "shallow").is_file()


def test_the_first_cell_does_nothing_where_the_package_is_there(repository, tmp_path):
    source = "".join(launch.first_cell("file:///nowhere", "main")["source"]) + "\nprint(1)"
    (tmp_path / "clone").mkdir()
    assert ran(source.replace("import", f"__import__('sys').path.insert(0, {str(repository)!r})\nimport", 1),
               tmp_path / "clone") == 1  # fmt: skip
    assert {p.name for p in (tmp_path / "clone").iterdir()} == {"bin"}
    namespace = {"__annotations__": {"n": int}, "n": 3}
    exec("".join(launch.first_cell("file:///nowhere", "main")["source"]), namespace)
    assert vars(parameters(namespace)) == {"n": 3}


def test_notebooks_get_the_cell_with_the_address_and_lose_it_without(tmp_path):
    (tmp_path / "notebooks").mkdir()
    path, config = tmp_path / "notebooks" / "a.ipynb", tmp_path / "_config.yml"
    cells = [nbformat.v4.new_markdown_cell("# A"), nbformat.v4.new_code_cell("n: int = 3", metadata={"tags": ["x"]})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    plain = json.loads(path.read_text())
    config.write_text("repository: {url: ''}")
    assert launch.settle(tmp_path) == []
    for url in ("https://github.com/a/b", "https://github.com/c/d"):
        config.write_text(f"repository: {{url: '{url}/', branch: trunk}}")
        assert launch.settle(tmp_path) == ["a"] and launch.settle(tmp_path) == []
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert [c.source for c in notebook.cells[1:]] == ["# A", "n: int = 3"]
        assert json.dumps(url) in notebook.cells[0].source and '"trunk"' in notebook.cells[0].source
    config.write_text("repository: {url: ''}")
    assert launch.settle(tmp_path) == ["a"] and json.loads(path.read_text()) == plain


def test_buttons_need_an_address():
    assert launch.buttons("", "main", "notebooks/x.ipynb") == {}
    shown = "?urlpath=lab%2Ftree%2Fnotebooks%2Fx.ipynb"
    assert launch.buttons("https://github.com/a/b.git", "main", "notebooks/x.ipynb") == {
        "Binder": f"https://mybinder.org/v2/gh/a/b/main{shown}",
        "Colab": "https://colab.research.google.com/github/a/b/blob/main/notebooks/x.ipynb",
    }
    assert launch.buttons("https://example.org/a/b", "x/y", "notebooks/x.ipynb") == {
        "Binder": f"https://mybinder.org/v2/git/https%3A%2F%2Fexample.org%2Fa%2Fb/x%2Fy{shown}"
    }


# ---- the box -------------------------------------------------------------------------------------


def page(root, url, outputs):
    """The box of the page of a notebook with one parameter, built by Sphinx."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    (root / "pyproject.toml").touch()
    (root / "_config.yml").write_text(f"repository: {{url: '{url}'}}")
    for name in ("notebooks", "stage/notebooks", "results"):
        (root / name).mkdir(parents=True, exist_ok=True)
    parameter = nbformat.v4.new_code_cell('labels: str = "1, -1"  # of the examples', metadata={"tags": ["parameters"]})
    shown = nbformat.v4.new_code_cell("0", outputs=outputs)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_markdown_cell("# A page\n\n## Its end"), parameter, shown]
    nbformat.write(nbformat.v4.new_notebook(cells=cells[:2], metadata=kernel), root / "notebooks/a.ipynb")
    staged = nbformat.v4.new_notebook(cells=cells, metadata=kernel | {"eos_seconds": 12.4})
    nbformat.write(staged, root / "stage/notebooks/a.ipynb")
    (root / "stage/index.md").write_text("# Book\n\n```{toctree}\nnotebooks/a\n```\n")
    settings = {"extensions": ["myst_nb", "eos_rerun"], "nb_execution_mode": "off", "html_theme": "basic"}
    warnings = io.StringIO()
    with docutils_namespace():
        folders = (root / "stage", None, root / "html", root / "trees")
        Sphinx(*folders, "html", settings, status=None, warning=warnings).build()
    assert not warnings.getvalue()
    return BeautifulSoup((root / "html/notebooks/a.html").read_text("utf-8"), "html.parser").select_one(".eos-rerun")


def test_the_box_does_not_end_up_inside_a_theorem(monkeypatch):
    from docutils import nodes
    from docutils.utils import new_document

    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    from eos_rerun import last_section

    inside, after, title = nodes.section(), nodes.section(), nodes.section()
    after += nodes.container("", inside)  # as sphinx-proof builds a theorem
    title += [nodes.section(), after]
    document = new_document("page")
    assert last_section(document) is document
    document += title
    assert last_section(document) is after
    after += nodes.section()
    assert last_section(document) is after


def facts(box):
    return {t.get_text().rstrip(":"): d for t, d in zip(box.select("dt"), box.select("dd"), strict=True)}


def test_a_page_says_how_to_rerun_it(own_root, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    experiment = Experiment(dataset="digits", n=50, width=4, steps=3)
    result, provenance = compute(experiment, Measure(k=1, stride=3), progress=False)
    Store().save(experiment.key, result, {**provenance, "seconds": 90.0, "device": "cuda (a card)"})
    shown = f'<details class="eos-provenance" data-eos-run="{experiment.key}"></details>'
    output = nbformat.v4.new_output("display_data", data={"text/html": shown})

    box = page(own_root, "", [output])
    assert box.select_one("pre").get_text().splitlines() == [
        "eos run a -p labels='1, -1'",
        "papermill notebooks/a.ipynb out.ipynb -p labels '1, -1'",
    ]
    told = facts(box)
    assert "Open in" not in told and told["Time on a CPU"].p.get_text() == "12 s as it is"
    assert told["Time on a GPU"].p.get_text() == "1.5 min where its run of 3 steps was recorded, cuda (a card)"
    links = [(own_root / "html/notebooks" / a["href"]).resolve() for a in told["Download"].select("a")]
    wanted = [own_root / "notebooks/a.ipynb", own_root / "results" / Store().manifest(experiment.key)["file"]]
    assert [p.read_bytes() for p in links] == [p.read_bytes() for p in wanted]
    assert [p.name for p in links] == [p.name for p in wanted]
    assert [c.get_text() for c in box.select("tbody td")] == ["labels", "str", "1, -1", "of the examples"]
    heading = box.find_parent("section").find(["h1", "h2"]).get_text()
    assert heading.startswith("Its end") and box.find_previous(class_="eos-provenance")


def test_with_an_address_it_opens_elsewhere_and_a_theory_page_has_no_run(own_root, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    told = facts(page(own_root, "https://github.com/a/b", []))
    assert {a.get_text(): a["href"] for a in told["Open in"].select("a")} == launch.buttons(
        "https://github.com/a/b", "main", "notebooks/a.ipynb"
    )
    assert len(told["Download"].select("a")) == 1 and told["Time on a GPU"].p.get_text() == "not measured"
