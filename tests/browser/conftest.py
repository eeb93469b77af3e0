"""One chromium for all files of this folder: playwright can be started once in a process."""

import os
import pathlib
import shutil

import pytest

HTML = pathlib.Path(__file__).resolve().parents[2] / "_build" / "html"


def chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser():
    path = chromium()
    if path is None:
        what = "no chromium on this machine: the pages have not been looked at in a browser (apt install chromium)"
        if os.environ.get("EOS_REQUIRE_BROWSER") == "1":
            pytest.fail(what)
        pytest.skip(what)
    if not (HTML / "index.html").is_file():
        pytest.fail("the book is not built: make book")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--allow-file-access-from-files"])
        yield found
        found.close()
