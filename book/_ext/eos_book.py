"""Sphinx extension of this book: claims, inventory, claims.json, and what the published address decides.

Directives
    `{eos-claims}`     claims as cards; options `paper`, `notebook`, `item`, `kind`, `verdicts` (several, with commas);
                       flags `counts` for numbers only, `list` for a line each
    `{eos-inventory}`  the items of a paper (its argument) with their page and the verdicts of their claims

Verdicts come from `eos_utils.claims` alone. The ledger is evaluated once a build; pages that show it are
rendered again when it has changed. The HTML output gets `claims.json`, the same ledger as a list of objects.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from docutils.parsers.rst import directives
from eos_tables import table
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from eos_utils import claims as ledgers
from eos_utils.wording import indexed, listed, rule_in_words

# Verdict -> colour class and a mark, so that no verdict is told by its colour alone.
VERDICTS = {
    "reproduced": ("good", "✓"),
    "holds on everything tested": ("good", "✓"),
    "not reproduced": ("bad", "✗"),
    "counterexample": ("bad", "✗"),
    "fails": ("bad", "✗"),
    "vacuous": ("mixed", "∅"),
    "hypotheses not met": ("mixed", "≠"),
    "not decidable as printed": ("mixed", "?"),
    "inconclusive": ("mixed", "~"),
    "pending": ("pending", "…"),
}
# What the picture shows that goes with a shared page.
PICTURE = (
    "The five largest Hessian eigenvalues of a network rise until the first reaches two over eta and the others "
    "follow; below, the training loss."
)
# The keys of an object in claims.json, in this order; whatever else the ledger knows follows them.
KEYS = [
    "id", "paper", "place", "statement", "notebook", "rule",
    "statistic", "as_printed", "corrected", "scope", "experiments",
]  # fmt: skip


# ---- the ledger ----------------------------------------------------------------------------------


def root_of(source: Path) -> Path:
    """The repository: the nearest folder upwards with a pyproject.toml (the staged copy lies below it)."""
    return next((p for p in [source, *source.parents] if (p / "pyproject.toml").is_file()), source)


def load(app: Sphinx) -> None:
    """Evaluate inventory and ledger once, before any page is read."""
    root = root_of(Path(app.srcdir))
    app.eos_inventory = items = ledgers.inventory(root)  # type: ignore[attr-defined]
    order = {item["id"]: position for position, item in enumerate(items)}
    rows = sorted(ledgers.ledger(root), key=lambda claim: order[claim["item"]])
    app.eos_ledger = [plain(claim) for claim in rows]  # type: ignore[attr-defined]


def plain(value):
    """What JSON can say: no NaN, no tuples, no fractions."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def outdated(app: Sphinx, env, added, changed, removed) -> list[str]:
    """Pages that show the ledger, if it, or the set of notebooks that they link to, has changed."""
    pages = sorted(d for d in env.found_docs if d.startswith("notebooks/"))
    shown = [app.eos_inventory, app.eos_ledger, pages]
    digest = hashlib.sha256(json.dumps(shown, sort_keys=True, default=str).encode()).hexdigest()
    if getattr(env, "eos_digest", None) == digest:
        return []
    env.eos_digest = digest
    return [name for name, meta in env.metadata.items() if "eos-ledger" in meta]


def write_json(app: Sphinx, exception: Exception | None) -> None:
    """claims.json beside the pages."""
    if exception is None and app.builder.format == "html":
        rows = [{key: c.get(key) for key in KEYS} | c for c in app.eos_ledger]
        text = json.dumps(rows, ensure_ascii=False, indent=1, allow_nan=False)
        Path(app.outdir, "claims.json").write_text(text + "\n", encoding="utf-8")


# ---- pieces of a page ----------------------------------------------------------------------------


def block(*classes: str) -> nodes.container:
    """A <div> (`is_div` keeps the class "container" away, to which the theme gives a width of its own)."""
    return nodes.container(is_div=True, classes=list(classes))


def text(content: str, cls: str = "") -> nodes.inline:
    """A <span>."""
    return nodes.inline(content, content, classes=[cls] if cls else [])


SET = {"": nodes.Text, "sub": lambda t: nodes.subscript("", t), "sup": lambda t: nodes.superscript("", t)}


def mathematical(content: str) -> list[nodes.Node]:
    """Text with its indices set low and its exponents high."""
    return [SET[mark](piece) for mark, piece in indexed(content)]


@functools.cache
def headline(path: Path) -> str:
    """The title of a notebook."""
    first = next(c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    return "".join(first["source"]).splitlines()[0].lstrip("# ")


def badge(verdict: str, label: str = "", count: int | None = None) -> nodes.inline:
    """A verdict as a small label: its mark, the axis or the count, its words."""
    tone, mark = VERDICTS.get(verdict, ("mixed", "?"))
    words = " ".join(filter(None, [mark, label, f"{count}" if count is not None else "", verdict]))
    return nodes.inline(words, words, classes=["eos-badge", f"eos-{tone}"])


def slug(verdict: str) -> str:
    """A verdict as a class name."""
    return verdict.replace(" ", "-")


def counts(claims: list[dict]) -> list[nodes.Node]:
    """How many claims carry which verdict as printed, in the order of `VERDICTS`."""
    tally = Counter(c["as_printed"] or "pending" for c in claims)
    order = [v for v in VERDICTS if v in tally] + [v for v in tally if v not in VERDICTS]
    parts: list[nodes.Node] = []
    for verdict in order:
        parts += [badge(verdict, count=tally[verdict]), nodes.Text(" ")]
    return parts


def number(value) -> str:
    """Four significant digits are more than any verdict here rests on; None is what became of NaN."""
    if value is None:
        return "undefined"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measured(statistic: dict | None) -> str:
    """The statistic with its interval, in words."""
    if not statistic or statistic.get("value") is None:
        return ""
    out = number(statistic["value"])
    if statistic.get("interval"):
        low, high = statistic["interval"]
        out += f" [{number(low)}, {number(high)}]"
    if statistic.get("unit") and statistic["unit"] != "1":
        out += f" {statistic['unit']}"
    if statistic.get("trials"):
        out += f", {statistic['trials']:,} cases"
    runs = statistic.get("runs")
    if runs:
        many = runs if isinstance(runs, int) else len(runs)
        out += f", {many} run" + ("s" if many != 1 else "")
    spread = [v for v in (statistic.get("forks") or {}).values() if v is not None]
    if spread:
        out += f"; forks of one run: {number(min(spread))} to {number(max(spread))}"
    return out


def runs_listed(names: list[str]) -> str:
    """The runs of a claim as one line, those that differ in the seed as one: 'fg_fig1 (seeds 100 to 104)'."""
    seeds: dict[str, list[int]] = {}
    for name in names:
        stem, marked, seed = name.rpartition("_seed")
        seeds.setdefault(stem if marked else name, []).extend([int(seed)] if marked and seed.isdigit() else [])
    return ", ".join(stem + (f" ({spanned(sorted(found))})" if found else "") for stem, found in seeds.items())


def spanned(found: list[int]) -> str:
    """Seeds in words: 'seed 100', 'seeds 100 to 104', 'seeds 100, 102'."""
    if len(found) == 1:
        return f"seed {found[0]}"
    whole = found == list(range(found[0], found[-1] + 1))
    return f"seeds {found[0]} to {found[-1]}" if whole else f"seeds {listed(found)}"


class LedgerDirective(SphinxDirective):
    """What both directives share."""

    @property
    def ledger(self) -> list[dict]:
        self.env.metadata[self.env.docname]["eos-ledger"] = True
        return self.env.app.eos_ledger  # type: ignore[attr-defined]

    def page(self, name: str, short: bool = False) -> nodes.Node:
        """A link to a notebook's page by its title, up to a colon where short; its bare name while there is none."""
        doc = f"notebooks/{name}"
        if doc not in self.env.found_docs:
            return nodes.literal(name, name, classes=["eos-planned"])
        label = headline(Path(self.env.doc2path(doc))).partition(":")[0] if short else ""
        ref = addnodes.pending_xref(
            "", refdomain="std", reftype="doc", reftarget=f"/{doc}", refexplicit=bool(label), refwarn=True
        )
        ref["refdoc"] = self.env.docname
        ref += nodes.inline(label or name, label or name)
        return ref


class Claims(LedgerDirective):
    """The claims as cards, grouped by the item of the paper."""

    option_spec = {
        "paper": directives.unchanged,
        "notebook": directives.unchanged,
        "item": directives.unchanged,
        "kind": directives.unchanged,
        "verdicts": directives.unchanged,
        "counts": directives.flag,
        "list": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        want = {k: v.strip() for k, v in self.options.items() if k not in ("counts", "list", "verdicts")}
        chosen = [c for c in self.ledger if all(c.get(k) == v for k, v in want.items())]
        if "verdicts" in self.options:
            wanted = [v.strip() for v in self.options["verdicts"].split(",")]
            if unknown := [v for v in wanted if v not in VERDICTS]:
                raise self.error(f"no verdict {', '.join(unknown)}; there are {', '.join(VERDICTS)}")
            chosen = [c for c in chosen if (c["as_printed"] or "pending") in wanted]
        if not chosen:
            return [nodes.paragraph("", "No claim is registered here yet.")]
        noun = "claim" if len(chosen) == 1 else "claims"
        total = nodes.paragraph("", "", text(f"{len(chosen)} {noun}: "), *counts(chosen), classes=["eos-counts"])
        if "counts" in self.options:
            return [self.linked(total)]
        if "list" in self.options:
            return [self.lines(chosen)]
        titles = {i["id"]: (i["place"], i["title"]) for i in self.env.app.eos_inventory}  # type: ignore[attr-defined]
        out: list[nodes.Node] = [total]
        last = None
        # Anchors belong to the claims page; on a notebook's page the same cards go without.
        anchored = "notebook" not in want and "item" not in want
        for claim in chosen:
            if anchored and claim["item"] != last:
                last = claim["item"]
                place, title = titles.get(last, ("", last))
                head = block("eos-item")
                head["ids"] = [f"item-{last}".replace(".", "-")]
                head += nodes.paragraph("", "", nodes.strong("", f"{place}: "), *mathematical(title))
                out.append(head)
            out.append(self.card(claim, anchored))
        return out

    def linked(self, total: nodes.paragraph) -> nodes.paragraph:
        """The counts of a paper, each a link to the claims page with that filter."""
        app = self.env.app
        if (
            "paper" not in self.options
            or app.builder.format != "html"
            or app.builder.name == "singlehtml"
            or "book/claims" not in self.env.found_docs
        ):
            return total
        page = app.builder.get_relative_uri(self.env.docname, "book/claims")
        for found in list(total.findall(nodes.inline)):
            if "eos-badge" in found["classes"]:
                verdict = found.astext().split(" ", 2)[2]
                query = f"?paper={self.options['paper'].strip().lower()}&verdict={slug(verdict)}"
                link = nodes.reference("", "", internal=True, refuri=page + query)
                found.parent.replace(found, link)  # replace_self would hand its classes to the link
                link += found
        return total

    def lines(self, chosen: list[dict]) -> nodes.bullet_list:
        """A line for each claim: its place, the statement, and the page that shows it."""
        out = nodes.bullet_list(classes=["eos-lines"])
        for claim in chosen:
            line = nodes.paragraph("", "", nodes.strong("", claim["place"]), nodes.Text(": "))
            line += mathematical(claim["statement"].strip())
            if claim.get("corrected") and claim["corrected"] != "none":
                line += [nodes.Text(" "), badge(claim["corrected"], "corrected:")]
            if claim.get("notebook"):
                line += [nodes.Text(" ("), self.page(claim["notebook"], short=True), nodes.Text(")")]
            out += nodes.list_item("", line)
        return out

    def card(self, claim: dict, anchored: bool) -> nodes.container:
        verdict = claim["as_printed"] or "pending"
        pending = verdict == "pending"
        card = block("eos-claim", f"eos-tone-{VERDICTS.get(verdict, ('mixed',))[0]}", f"eos-is-{slug(verdict)}")
        card["classes"] += [f"eos-of-{claim['paper'].lower()}", f"eos-kind-{claim['kind']}"]
        head = nodes.paragraph("", "", classes=["eos-claim-head"])
        if anchored:
            # A dot is legal in an id, but docutils would not link to it.
            card["ids"] = [f"claim-{claim['id']}".replace(".", "-")]
            head += nodes.reference("", claim["id"], internal=True, refid=card["ids"][0], classes=["eos-id"])
        else:
            head += text(claim["id"], "eos-id")
        verdicts = text("", "eos-verdicts")
        verdicts += badge(verdict, "" if pending else "as printed:")
        if claim.get("corrected") and claim["corrected"] != "none":
            verdicts += [nodes.Text(" "), badge(claim["corrected"], "corrected:")]
        if claim.get("fragile"):
            verdicts += [nodes.Text(" "), nodes.inline("", "fragile", classes=["eos-badge", "eos-mixed"])]
        head += [nodes.Text(" "), verdicts]
        said = mathematical(claim["statement"].strip())
        card += [head, nodes.paragraph("", "", *said, classes=["eos-statement"])]
        if not anchored or not pending or claim.get("rule"):
            card += self.facts(claim, anchored)
        return card

    def facts(self, claim: dict, anchored: bool) -> nodes.field_list:
        """The rest of what is known, as a list of named fields."""
        lines = [
            ("Place", claim["place"]),
            ("Rule", rule_in_words(claim.get("rule")) or "not set yet"),
            ("Measured", measured(claim.get("statistic"))),
            ("Corrected", rule_in_words((claim.get("rule") or {}).get("corrected"))),
            ("Measured, corrected", measured(claim.get("corrected_statistic"))),
            ("Scope", listed(claim.get("scope"))),
            ("Experiments", runs_listed(claim.get("experiments") or [])),
            ("Fragile", "the verdict changes when a threshold moves by 20 %" if claim.get("fragile") else ""),
            ("Why", (claim.get("rule") or {}).get("why", "")),
            *[("Amended", f"rule {a['from']} before: {a['reason']}") for a in claim.get("amended") or []],
        ]
        fields = nodes.field_list(classes=["eos-facts"])
        for name, value in lines:
            if value:
                fields += nodes.field(
                    "", nodes.field_name("", name), nodes.field_body("", nodes.paragraph("", "", *mathematical(value)))
                )
        if anchored and claim.get("notebook"):
            body = nodes.field_body("", nodes.paragraph("", "", self.page(claim["notebook"])))
            fields += nodes.field("", nodes.field_name("", "Page"), body)
        return fields


class Inventory(LedgerDirective):
    """Every item of a paper: place and title, page, verdicts of its claims."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        by_item: dict[str, list[dict]] = {}
        for claim in self.ledger:
            by_item.setdefault(claim["item"], []).append(claim)
        items = [i for i in self.env.app.eos_inventory if i["paper"] == self.arguments[0]]  # type: ignore[attr-defined]
        rows = []
        for item in items:
            claims = by_item.get(item["id"], [])
            what = [nodes.strong("", item["place"]), nodes.Text(": "), *mathematical(item["title"])]
            verdicts = counts(claims) if claims else [text("no claim")]
            rows.append([what, [self.page(item["page"])], verdicts])
        return [table((40, 36, 24), ["Item", "Page", "Claims"], rows)]


# ---- repairs, and what the published address decides ---------------------------------------------


def repair(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Faults of what others generate: repeated ids, withdrawn ARIA roles, toggles without a name, og:url."""
    if context.get("body"):
        body = context["body"].replace(' id="proof-content"', "")  # sphinx-proof: the same id for every theorem
        body = body.replace('<span class="colon">:</span>', ":")  # a tenth of the claims page's bytes
        context["body"] = body.replace('role="doc-biblioentry"', 'role="listitem"')
    toctree = context.get("generate_toctree_html")
    if toctree:
        context["generate_toctree_html"] = lambda *args, **kwargs: str(toctree(*args, **kwargs)).replace(
            "<summary>", '<summary aria-label="Pages of this chapter">'
        )
    if not app.config.html_baseurl:
        context["metatags"] = re.sub(r'<meta property="og:url"[^>]*>\n?', "", context.get("metatags", ""))


def setup(app: Sphinx) -> dict:
    """Sitemap, og:url and the 404 page's links need the published address; without one they are left out."""
    base = os.environ.get("EOS_BASE_URL") or app.config.html_baseurl
    if base:
        base = base.rstrip("/") + "/"
        app.config.html_baseurl = base  # type: ignore[attr-defined]
        app.config.ogp_site_url = base  # type: ignore[attr-defined]
        app.config.ogp_image = base + "_static/front.png"  # type: ignore[attr-defined]
        app.config.ogp_image_alt = PICTURE  # type: ignore[attr-defined]
        card = '<meta name="twitter:card" content="summary_large_image" />'
        app.config.ogp_custom_meta_tags = (card,)  # type: ignore[attr-defined]
        app.config.notfound_urls_prefix = urlsplit(base).path  # type: ignore[attr-defined]
        app.setup_extension("sphinx_sitemap")
    else:
        app.add_config_value("sitemap_url_scheme", "", "")
    app.add_directive("eos-claims", Claims)
    app.add_directive("eos-inventory", Inventory)
    app.connect("builder-inited", load)
    app.connect("env-get-outdated", outdated)
    app.connect("html-page-context", repair, priority=900)
    app.connect("build-finished", write_json)
    return {"version": "0.1.0", "parallel_read_safe": True, "parallel_write_safe": True}
