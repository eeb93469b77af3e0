"""Sphinx extension of this book: the box "Rerun this page" at the end of each notebook page.

Made from what is known anyway: the declared parameters, the seconds that the page took to execute, the cost of the
recorded run that the provenance above the box names, and the repository's address. Notebook and run are copied beside
the pages, so that the links work from the disk, too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

from docutils import nodes
from eos_book import block, root_of, text
from sphinx import addnodes
from sphinx.application import Sphinx

from eos_utils import launch
from eos_utils.parameters import Parameter, declared
from eos_utils.store import Store

SHOWN = re.compile(r'data-eos-run="([0-9a-f]{16})"')


def add_box(app: Sphinx, doctree: nodes.document) -> None:
    """The box, at the end of the page's last section."""
    folder, _, name = app.env.docname.rpartition("/")
    root = root_of(Path(app.srcdir))
    path = root / "notebooks" / f"{name}.ipynb"
    if folder != "notebooks" or not path.is_file():
        return
    pieces = {key for raw in doctree.findall(nodes.raw) for key in SHOWN.findall(raw.astext())}
    keys = [key for key in sorted(pieces) if Store(root / "results").manifest_path(key).is_file()]
    end = last_section(doctree)
    end += box(app, root, path, keys, seconds_of(Path(app.env.doc2path(app.env.docname))))


def last_section(doctree: nodes.document) -> nodes.Element:
    """The last section of the second level, where the provenance lies; the document where there is none."""
    # sphinx-proof puts what a theorem says into a section of its own, which is not one of the page
    sections = [s for s in doctree.findall(nodes.section) if isinstance(s.parent, (nodes.section, nodes.document))]
    end = sections[-1] if sections else doctree
    while isinstance(end.parent, nodes.section) and isinstance(end.parent.parent, nodes.section):
        end = end.parent
    return end


def seconds_of(staged: Path) -> float | None:
    """What the executed copy says of its execution; a notebook that Jupyter Book executes itself says nothing."""
    return json.loads(staged.read_text(encoding="utf-8"))["metadata"].get("eos_seconds")


def box(app: Sphinx, root: Path, path: Path, keys: list[str], seconds: float | None) -> nodes.container:
    """Command, times, downloads and buttons, parameters."""
    given = declared(path)
    manifests = [Store(root / "results").manifest(key) for key in keys]
    first = next((p for p in given if p.name not in ("source", "device")), None)
    changed = f" -p {first.name}={shlex.quote(first.default)}" if first else ""
    lines = [
        f"eos run {path.stem}{changed}",
        f"papermill notebooks/{path.name} out.ipynb{changed.replace('=', ' ', 1)}",
    ]
    command = nodes.literal_block("\n".join(lines), "\n".join(lines), language="bash")
    about = "Either command, in a clone; parameters that are not given keep the value that they have on this page."
    cpu, gpu = costs(manifests)
    if seconds:
        cpu = f"{seconds:.0f} s as it is" + ("; " + cpu if cpu else "")
    facts: list[tuple[str, list[nodes.Node]]] = [
        ("Time on a CPU", [nodes.Text(cpu or "not measured in this build")]),
        ("Time on a GPU", [nodes.Text(gpu or "not measured")]),
        ("Download", downloads(app, root, path, [m["file"] for m in manifests])),
        ("Open in", opened(*launch.repository(root), f"notebooks/{path.name}")),
    ]
    fields = nodes.field_list(classes=["eos-facts"])
    for name, body in facts:
        if body:
            fields += nodes.field("", nodes.field_name("", name), nodes.field_body("", nodes.paragraph("", "", *body)))
    made = block("eos-rerun")
    made += [nodes.paragraph("", "", nodes.strong("", "Rerun this page")), command, nodes.paragraph("", about), fields]
    opening = (
        f"<details><summary>Its {len(given)} parameters</summary>"
        '<div class="eos-scroll" tabindex="0" role="region" aria-label="Parameters of this page">'
    )
    made += [raw(opening), table(given), raw("</div></details>")]
    return made


def raw(html: str) -> nodes.raw:
    """HTML that docutils has no node for."""
    return nodes.raw("", html, format="html")


def costs(manifests: list[dict]) -> tuple[str, str]:
    """Of computing the page's run anew, on a CPU and on a GPU, where it has been recorded there."""
    told = {"cpu": "", "gpu": ""}
    for manifest in manifests:
        made = manifest["provenance"]
        where = "cpu" if made["device"].startswith("cpu") else "gpu"
        took = f"{made['seconds'] / 60:.1f} min" if made["seconds"] >= 60 else f"{made['seconds']:.0f} s"
        told[where] = f"{took} where its run of {made['steps']:,} steps was recorded, {made['device']}"
    return told["cpu"], told["gpu"]


def downloads(app: Sphinx, root: Path, path: Path, files: list[str]) -> list[nodes.Node]:
    """Links to the notebook without its outputs, and to the recorded trajectory."""
    up = os.path.relpath(root, app.srcdir)
    wanted = [("the notebook", path.relative_to(root)), *(("its recorded run", Path("results", f)) for f in files)]
    found: list[nodes.Node] = []
    for label, file in wanted:
        link = addnodes.download_reference("", "", reftarget=f"/{up}/{file.as_posix()}", refdoc=app.env.docname)
        size = f" ({file.suffix[1:]}, {(root / file).stat().st_size / 1000:,.0f} kB)"
        link += text(label)
        found += [*([nodes.Text(", ")] if found else []), link, nodes.Text(size)]
    return found


def opened(url: str, branch: str, path: str) -> list[nodes.Node]:
    """Buttons; none while the repository has no address."""
    found: list[nodes.Node] = []
    for name, target in launch.buttons(url, branch, path).items():
        found += [nodes.reference("", name, refuri=target, classes=["eos-button"]), nodes.Text(" ")]
    return found


def table(given: list[Parameter]) -> nodes.table:
    """Name, type, default and help of each parameter."""
    columns = ("Parameter", "Type", "Default", "What it is")
    group = nodes.tgroup("", *(nodes.colspec(colwidth=w) for w in (20, 12, 18, 50)), cols=4)
    group += nodes.thead("", row(*[nodes.Text(c) for c in columns]))
    body = [
        row(nodes.literal("", p.name), nodes.Text(p.type), nodes.literal("", p.default), nodes.Text(p.help))
        for p in given
    ]
    group += nodes.tbody("", *body)
    return nodes.table("", group, classes=["eos-parameters"])


def row(*cells: nodes.Node) -> nodes.row:
    """A row, a paragraph a cell."""
    return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells])


def setup(app: Sphinx) -> dict:
    """Before Sphinx collects the downloads of a page (at the usual priority, 500)."""
    app.connect("doctree-read", add_box, priority=100)
    return {"version": "0.1.0", "parallel_read_safe": True, "parallel_write_safe": True}
