"""Sphinx extension: tables of the book that are not made from the ledger.

Directives
    `{eos-faults}`     what was broken on purpose and what happened, from bench/results/faults.json
    `{eos-statements}` every numbered statement of the papers, with links to its blocks, as printed and corrected
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from eos_utils import bench_results


def table(widths: tuple[int, ...], header: list[str], rows: list[list[list[nodes.Node]]]) -> nodes.table:
    """A table with a head, columns of these relative widths, and a list of nodes in each cell."""

    def line(cells: list[list[nodes.Node]]) -> nodes.row:
        return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells])

    out = nodes.table(classes=["eos-inventory", "colwidths-given"])
    group = nodes.tgroup(cols=len(widths))
    out += group
    group += [nodes.colspec(colwidth=w) for w in widths]
    head = nodes.thead("", line([[nodes.Text(t)] for t in header]))
    group += [head, nodes.tbody("", *map(line, rows))]
    return out


class Faults(SphinxDirective):
    """What was broken on purpose."""

    def run(self) -> list[nodes.Node]:
        header, rows = bench_results.faults()
        return [table((38, 14, 48), header, [[[nodes.Text(cell)] for cell in row] for row in rows])]


class Statements(SphinxDirective):
    """A place for the table of statements, which is known when all pages have been read (`listed_statements`)."""

    def run(self) -> list[nodes.Node]:
        return [nodes.container(classes=["eos-statements-here"])]


def listed_statements(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """A row for each statement of a paper, in the order of the book, with a link to each of its blocks."""
    for here in list(
        doctree.findall(lambda n: isinstance(n, nodes.container) and "eos-statements-here" in n["classes"])
    ):
        found: dict[str, list[nodes.Node]] = {}
        titles: dict[str, dict[str, str]] = {}
        for label, entry in app.env.proof_list.items():  # type: ignore[attr-defined]
            doc = entry["docname"]
            if doc not in titles:
                blocks = app.env.get_doctree(doc).findall(lambda n: "realtype" in getattr(n, "attributes", {}))
                titles[doc] = {node["label"]: node["title"].strip(" ()") for node in blocks}
            kind, title = entry["countertype"], titles[doc][label]
            number = ".".join(map(str, app.env.toc_fignumbers[doc][kind][label]))
            name, _, version = title.rpartition(", ")
            if not name:  # a definition of ours
                continue
            uri = f"{app.builder.get_relative_uri(docname, doc)}#{label}"
            link = nodes.reference("", f"{version} ({kind.capitalize()} {number})", internal=True, refuri=uri)
            found.setdefault(name, []).extend([nodes.Text(", "), link])
        rows = [[[nodes.Text(name)], links[1:]] for name, links in sorted(found.items(), key=lambda i: by_number(i[0]))]
        here.replace_self(table((40, 60), ["In the paper", "Here"], rows))


def by_number(name: str) -> list:
    """For sorting: 'SG, Lemma 3.2' after 'SG, Lemma 3.1' and before 'SG, Lemma 3.10'."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def setup(app: Sphinx) -> dict:
    """Both directives; statements are listed when all pages have been read."""
    app.add_directive("eos-faults", Faults)
    app.add_directive("eos-statements", Statements)
    app.connect("doctree-resolved", listed_statements)
    return {"version": "0.1.0", "parallel_read_safe": True, "parallel_write_safe": True}
