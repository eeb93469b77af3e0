"""The whole book as one PDF: Sphinx's single page, printed by chromium.

    _build/stage/ ──jupyter-book (singlehtml)──► _build/singlehtml/ ──chromium──► _build/eos-companion.pdf

The way by LaTeX is closed: the cards of the claims and many tables are HTML.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from eos_utils.book import BookError, jupyter_book

FOOTER = (
    '<div style="width:100%;font-size:8px;text-align:center;color:#666"><span class="pageNumber"></span>'
    ' / <span class="totalPages"></span></div>'
)
PATIENCE = 600_000  # milliseconds for the typesetting of some thousands of formulas


def chromium() -> str | None:
    """The system's chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def one_page(root: Path) -> Path:
    """The staged book as one HTML page, `_build/singlehtml/index.html`; it needs what `make book` has left.

    Raises:
        BookError: there is no staged book, or Sphinx failed.
    """
    if not (root / "_build" / "stage").is_dir():
        raise BookError("the book is not built: make book")
    folder = root / "_build" / "singlehtml"
    shutil.rmtree(folder, ignore_errors=True)
    jupyter_book(root, "--builder", "singlehtml")
    # The first page is book/index, so Sphinx writes the file there, with addresses as if it lay above.
    text = (folder / "book" / "index.html").read_text(encoding="utf-8")
    page = folder / "index.html"
    page.write_text(for_paper(text), encoding="utf-8")
    return page


def for_paper(text: str) -> str:
    """Addresses from the top folder, pictures at once, and the light ones, whatever the reader prefers."""
    text = re.sub(r'((?:src|href)=")(?:\.\./)+(_static|_images)/', r"\1\2/", text)
    text = text.replace(' loading="lazy"', "")
    return re.sub(r'(<html\b[^>]*?)(?: data-theme="\w*")?>', r'\1 data-theme="light">', text, count=1)


def pdf(root: Path) -> Path:
    """The PDF, with an outline and the tags that screen readers need.

    Raises:
        BookError: no chromium, no playwright, no staged book, or a page that could not be printed.
    """
    path = chromium()
    if path is None:
        raise BookError("no chromium on this machine to print with (Debian, Ubuntu: apt install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise BookError("playwright is not installed: pip install playwright") from None
    page, out = one_page(Path(root).resolve()), Path(root).resolve() / "_build" / "eos-companion.pdf"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--allow-file-access-from-files"])
        tab = browser.new_page(color_scheme="light")
        tab.set_default_timeout(PATIENCE)
        tab.goto(page.as_uri(), wait_until="load")
        tab.evaluate("() => window.MathJax?.startup?.promise")
        missing = tab.evaluate("() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
        if missing:
            raise BookError(f"{len(missing)} pictures are missing, such as {missing[0]}")
        tab.pdf(
            path=str(out),
            format="A4",
            margin={"top": "18mm", "bottom": "18mm", "left": "16mm", "right": "16mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            outline=True,
            tagged=True,
            scale=0.8,
        )
        browser.close()
    return out
