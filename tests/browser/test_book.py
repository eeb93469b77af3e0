"""The built book in chromium, from the disk: every page in light and dark, wide and narrow, and axe-core over each.

Not among the unit tests: `make browser` builds the book first. Without chromium they are skipped, and say so; with
EOS_REQUIRE_BROWSER=1, as in CI, its absence is a failure.
"""

import contextlib
import json
import pathlib
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest

from eos_utils import fg_blocks as blocks
from eos_utils import lab
from eos_utils.parameters import declared

ROOT = pathlib.Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
# What is generated and has no text of its own.
GENERATED = {"genindex.html", "search.html", "404.html"}
# In both colour schemes: a page of each kind.
TEMPLATES = {
    "book/index",
    "book/claims",
    "book/bibliography",
    "notebooks/fg_fig1_top_eigenvalues",
    "notebooks/sg_errata",
}


def pages():
    names = sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html") if "_static" not in p.parts)
    return [n for n in names if n not in GENERATED and n != "index.html"]


class Watch:
    """A tab, and what went wrong in it."""

    def __init__(self, browser, scheme, width):
        self.width = width
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.page, self.problems, self.name = self.context.new_page(), [], ""
        self.page.on("console", lambda m: self.note(f"console: {m.text}") if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.note(f"script: {e}"))
        self.page.on("request", lambda r: self.note(f"asks for {r.url}") if r.url.startswith("http") else None)

    def note(self, what):
        self.problems.append(f"{self.name}: {what}")

    def open(self, name, query=""):
        self.name = name
        from playwright.sync_api import TimeoutError as TooLate

        self.page.goto((HTML / name).as_uri() + query, wait_until="load")
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        with contextlib.suppress(TooLate):  # drawn after load; `look` says which are not
            self.page.wait_for_function("() => !document.querySelector('i[class*=\"fa-\"]')", timeout=10_000)
        return self.page

    def look(self, width=0):
        """Maths, pictures, icons and width of the page that is open, in its window or, for a moment, in one so wide."""
        if width:
            self.page.set_viewport_size({"width": width, "height": 900})
            self.page.wait_for_timeout(50)
        found = self.page.evaluate("""() => ({
            wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
            broken: [...document.images].filter(i => i.checkVisibility() && i.complete && !i.naturalWidth)
                                        .map(i => i.alt),
            raw: [...document.querySelectorAll('.math')].filter(m => !m.querySelector('mjx-container')).length,
            faults: [...document.querySelectorAll('mjx-merror, mjx-container [style*="color: red"]')]
                    .map(m => m.textContent || m.parentElement.outerHTML.slice(0, 120)),
            icons: [...document.querySelectorAll('i[class*="fa-"], svg.svg-inline--fa:has(circle)')]
                    .map(i => i.outerHTML.slice(0, 120)),
            heading: document.querySelector('h1')?.textContent ?? '',
        })""")
        for key, says in (
            ("wide", "is wider than the window by {} px"),
            ("broken", "pictures that do not load: {}"),
            ("raw", "{} formulas are not set"),
            ("faults", "formulas with errors: {}"),
            ("icons", "icons that are not drawn: {}"),
        ):
            if found[key]:
                self.note(f"{says.format(found[key])} ({width or self.width} px)")
        if not found["heading"]:
            self.note("has no heading")
        if width:
            self.page.set_viewport_size({"width": self.width, "height": 900})

    def axe(self):
        """What axe-core finds."""
        from axe_playwright_python.sync_playwright import Axe

        self.page.wait_for_timeout(150)  # the theme makes scrolling areas reachable by keyboard after load
        for fault in Axe().run(self.page, options={"preload": False}).response["violations"]:
            where = "; ".join(node["html"][:120] for node in fault["nodes"][:3])
            self.note(f"axe {fault['id']} ({fault['impact']}), {len(fault['nodes'])} times: {where}")


@pytest.mark.parametrize("half", [0, 1])  # so that two workers have as much to do
@pytest.mark.parametrize("scheme, width, other", [("light", 1280, 390), ("dark", 390, 1280)])
def test_every_page(browser, scheme, width, other, half):
    watch = Watch(browser, scheme, width)
    assert len(pages()) > 20
    for name in pages()[half::2]:
        watch.open(name)
        watch.look()
        theme = watch.page.evaluate("() => document.documentElement.dataset.theme")
        if theme != scheme:
            watch.note(f"is {theme} where the reader prefers {scheme}")
        if scheme == "light" or name.removesuffix(".html") in TEMPLATES:
            watch.axe()
        watch.look(other)
    watch.context.close()
    assert not watch.problems, "\n".join(watch.problems)


def test_figures_follow_the_scheme(browser):
    watch = Watch(browser, "light", 1280)
    page = watch.open("notebooks/fg_fig1_top_eigenvalues.html")
    of_each = "i => [i.classList.contains('only-dark'), i.checkVisibility()]"
    shown = f"() => [...document.querySelectorAll('img.eos-figure')].map({of_each})"
    assert {tuple(x) for x in page.evaluate(shown)} == {(False, True), (True, False)}
    page.evaluate("() => { document.documentElement.dataset.theme = 'dark' }")
    assert {tuple(x) for x in page.evaluate(shown)} == {(False, False), (True, True)}
    assert not watch.problems, watch.problems
    watch.context.close()


def test_the_front_page_is_dark_in_the_dark(browser):
    for scheme, wanted in {"light": False, "dark": True}.items():
        watch = Watch(browser, scheme, 1280)
        page = watch.open("book/index.html")
        shown = page.evaluate("() => getComputedStyle(document.querySelector('img.eos-front')).content")
        assert ("-dark.png" in shown) == wanted
        if wanted:
            assert pathlib.Path(url2pathname(urlsplit(shown.split('"')[1]).path)).is_file()
        watch.context.close()


def test_claims_can_be_filtered(browser):
    watch = Watch(browser, "light", 1280)
    claims = json.loads((HTML / "claims.json").read_text())
    visible = "() => [...document.querySelectorAll('.eos-claim')].filter(c => c.checkVisibility()).map(c => c.id)"

    def ids(**wanted):
        chosen = [c for c in claims if all((c.get(k) or "pending") == v for k, v in wanted.items())]
        return {"claim-" + c["id"].replace(".", "-") for c in chosen}

    page = watch.open("book/claims.html")
    assert set(page.evaluate(visible)) == ids() and len(ids()) == len(claims) > 100
    page.get_by_label("Verdict as printed").select_option("counterexample")
    assert set(page.evaluate(visible)) == ids(as_printed="counterexample") != set()
    page.get_by_label("Paper").select_option("fg")
    chosen = ids(as_printed="counterexample", paper="FG")
    assert set(page.evaluate(visible)) == chosen
    assert page.get_by_role("status").inner_text() == f"{len(chosen)} of {len(claims)} claims shown"
    page.get_by_label("Text").fill("no such words anywhere")
    assert page.evaluate(visible) == []
    assert not page.locator(".eos-item").filter(visible=True).count()
    # A link with a filter, as from the counts on the front page; and one to a claim, which wins over the filter.
    page = watch.open("book/index.html")
    assert not page.locator("a.eos-badge").count()  # a frame around a frame
    page.locator(".eos-counts a", has_text="not reproduced").first.click()
    page.wait_for_url("**/claims.html?*")
    assert set(page.evaluate(visible)) == ids(as_printed="not reproduced", paper="FG")
    page = watch.open("book/claims.html", "?verdict=pending#claim-fg-lemma-2-1-flow")
    assert "claim-fg-lemma-2-1-flow" in page.evaluate(visible)
    assert not watch.problems, watch.problems
    watch.context.close()


def test_the_laboratory_computes_what_python_does(browser):
    watch = Watch(browser, "light", 1280)
    page = watch.open("notebooks/laboratory.html")
    given = json.loads(page.locator("[data-eos-lab] script").text_content())

    def compare(start, steps):
        shown = json.loads(page.locator("[data-eos-lab]").get_attribute("data-series"))
        run = lab.path(given | {"steps": steps}, start)
        assert len(shown["loss"]) == steps + 1
        for name, sign in (("plus", 1), ("minus", -1)):
            wanted = blocks.tops(run, sign)[:, 0] * run.eta[0] / 2
            assert np.allclose(shown[name], wanted, rtol=1e-3, atol=1e-4), name
        loss = (blocks.losses(run, 1) + blocks.losses(run, -1))[:, 0]
        assert np.allclose(shown["loss"], loss, rtol=1e-3, atol=1e-9)

    compare(0, 60)  # what is drawn before anything is touched
    page.get_by_role("slider", name="initialisation").fill("2")
    compare(1, 0)
    page.get_by_role("slider", name="step size").fill("1.1")
    given["q"] = 1.1
    page.get_by_role("slider", name="negative labels").fill("0.5")
    given["labels"] = [1.0, 1.0, -0.5, -0.5]
    page.get_by_role("slider", name="neurons").fill("12")
    given["width"] = 12
    for _ in range(12):
        page.get_by_role("button", name="One step").click()
    compare(1, 12)
    page.get_by_role("button", name="Run").click()
    page.get_by_text(f"Step {given['steps']}:").wait_for(timeout=60_000)
    compare(1, given["steps"])
    assert page.get_by_role("button", name="Run").is_visible()
    page.get_by_role("button", name="Back to the start").click()
    assert page.locator(".lab-told").inner_text().startswith("Step 0:")
    assert not watch.problems, watch.problems
    watch.context.close()


@pytest.mark.parametrize("name, runs", [("fg_fig1_top_eigenvalues", 1), ("fg_theorem_3_1", 0)])
def test_a_page_says_how_to_rerun_it(browser, name, runs):
    watch = Watch(browser, "light", 390)
    box = watch.open(f"notebooks/{name}.html").locator(".eos-rerun")
    given = declared(ROOT / "notebooks" / f"{name}.ipynb")
    assert f"eos run {name} -p {given[0].name}=" in box.locator("pre").inner_text()
    first = box.locator("tbody tr").first
    assert not first.is_visible()
    box.locator("summary").click()
    assert first.is_visible() and box.locator("tbody tr").count() == len(given)
    links = box.locator("a[download]").evaluate_all("all => all.map(a => a.href)")
    files = [pathlib.Path(url2pathname(urlsplit(link).path)) for link in links]
    assert len(files) == 1 + runs and all(link.startswith("file:") for link in links)
    for file, folder in zip(files, ("notebooks", "results"), strict=False):
        assert file.read_bytes() == (ROOT / folder / file.name).read_bytes()
    watch.look()
    assert not watch.problems, watch.problems
    watch.context.close()


def test_search_finds(browser):
    watch = Watch(browser, "light", 1280)
    page = watch.open("search.html", "?q=antiphase")
    page.wait_for_selector("#search-results li", timeout=15_000)
    assert page.locator("#search-results li a[href*='sg_fig2_anomaly_points']").count()
    watch.context.close()


def test_by_keyboard_alone(browser):
    """The skip link comes first, search opens by its key, and what can be operated can be reached and shows it."""
    watch = Watch(browser, "light", 1280)
    page = watch.open("book/claims.html")
    page.keyboard.press("Tab")
    assert "skip" in page.evaluate("() => document.activeElement.textContent.toLowerCase()")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("() => !!document.activeElement.closest('main, #main-content')")
    page.keyboard.press("Control+K")
    page.wait_for_function("() => document.activeElement.matches('input[type=search]')")
    page.keyboard.press("Escape")
    # The theme's own button, then a choice of the filter, without the mouse.
    button = page.locator("button.theme-switch-button").filter(visible=True).first
    button.focus()
    before = page.evaluate("() => document.documentElement.dataset.mode")
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.documentElement.dataset.mode") != before
    choice = page.get_by_label("Paper")
    choice.focus()
    page.keyboard.press("ArrowDown")
    assert choice.input_value() and " of " in page.get_by_role("status").inner_text()
    # Whatever takes the focus is seen to have it: an outline, a shadow, or another look than without.
    look = "e => { const s = getComputedStyle(e); return [s.outlineStyle, s.outlineWidth, s.boxShadow, s.borderColor, "
    look += "s.textDecorationLine, s.color, s.backgroundColor].join() }"
    page.goto((HTML / "notebooks" / "laboratory.html").as_uri())
    reached, unseen = set(), []
    for _ in range(120):
        page.keyboard.press("Tab")
        active = page.evaluate_handle("() => document.activeElement")
        name = active.evaluate("e => e.tagName + '.' + e.className + '#' + e.id + ' ' + (e.ariaLabel ?? '')")
        reached.add(name.split(".")[0])
        focused = active.evaluate(look)
        active.evaluate("e => e.blur()")
        if active.evaluate("e => e !== document.body") and active.evaluate(look) == focused:
            unseen.append(name)
        active.evaluate("e => e.focus()")
    assert {"A", "BUTTON", "INPUT"} <= reached
    assert not unseen, unseen
    assert not watch.problems, watch.problems
    watch.context.close()


def test_figures_can_be_taken_away(browser):
    watch = Watch(browser, "light", 1280)
    page = watch.open("notebooks/fg_fig1_top_eigenvalues.html")
    links = page.locator(".eos-downloads a")
    assert links.count() == 2 * page.locator("img.only-light").count() > 4
    for kind, begins in (("SVG", b"<?xml"), ("CSV", b"panel,x axis,y axis")):
        with page.expect_download() as found:
            links.filter(has_text=kind).first.click()
        assert pathlib.Path(found.value.path()).read_bytes().startswith(begins)
        assert found.value.suggested_filename == f"fg-fig1-figure.{kind.lower()}"
    assert not watch.problems, watch.problems
    watch.context.close()
