"""What the address of the published book decides: sitemap, social metadata, the 404 page's links."""

import os
import pathlib
import shutil
import xml.etree.ElementTree as ET

import pytest
from bs4 import BeautifulSoup

from eos_utils import book

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASE = "https://example.org/companion/"
SITEMAP = "{http://www.sitemaps.org/schemas/sitemap/0.9}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A book of two pages with this book's configuration and extension, built for an address."""
    root = tmp_path_factory.mktemp("published")
    (root / "pyproject.toml").touch()  # marks the top, for the ledger
    stage = root / "_build" / "stage"
    for folder in ("book/claims", "_build/stage/book"):
        (root / folder).mkdir(parents=True)
    (root / "book" / "inventory.yml").write_text("[]")
    for name in ("_ext", "_templates", "_static"):
        shutil.copytree(ROOT / "book" / name, stage / "book" / name, ignore=shutil.ignore_patterns("mathjax"))
    (stage / "book" / "references.bib").touch()
    (stage / "_config.yml").write_text(book.staged_config((ROOT / "_config.yml").read_text("utf-8")))
    (stage / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n- file: book/other\n")
    (stage / "book" / "index.md").write_text("# The first page\n\nIt says what the book is about, in a sentence.\n")
    (stage / "book" / "other.md").write_text("# Another page\n\nThis one follows.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EOS_BASE_URL", BASE.rstrip("/"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        book.jupyter_book(root, "-W", "-n", "--keep-going")
    return root / "_build" / "html"


def test_the_sitemap_lists_the_pages_that_are_there(built):
    listed = {loc.text for loc in ET.parse(built / "sitemap.xml").getroot().iter(f"{SITEMAP}loc")}
    assert {BASE + "book/index.html", BASE + "book/other.html"} <= listed
    assert all((built / address.removeprefix(BASE)).is_file() for address in listed)


def test_a_shared_page_has_its_title_address_and_picture(built):
    soup = BeautifulSoup((built / "book" / "other.html").read_text("utf-8"), "html.parser")
    meta = {tag.get("property") or tag.get("name"): tag["content"] for tag in soup.find_all("meta", content=True)}
    assert meta["og:title"] == "Another page" and meta["og:url"] == BASE + "book/other.html"
    assert meta["og:description"].startswith("This one follows") and meta["description"].startswith("This one follows")
    assert meta["twitter:card"] == "summary_large_image" and len(meta["og:image:alt"].split()) > 8
    assert (built / meta["og:image"].removeprefix(BASE)).is_file() and meta["og:image"].startswith(BASE)
    assert soup.find("link", rel="canonical")["href"] == BASE + "book/other.html"


def test_the_404_page_links_from_the_published_prefix(built):
    assert "/companion/_static/eos.css" in (built / "404.html").read_text("utf-8")
    assert [p for p in book.check(built) if p.startswith("404")] == []
