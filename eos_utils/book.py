"""The book: execute notebooks, stage their executed copies, build the pages, check what was built.

    notebooks/x.ipynb ──papermill──► _build/executed/x.ipynb ──┐
    _config.yml, _toc.yml, book/ ──────────────────────────────┴─► _build/stage/ ──► _build/html/

Execution and build are separate because Jupyter Book's own cache looks at the source of a notebook only, and
would show old outputs after a change of the package or of the results. Here a notebook is executed again when
anything that its outputs can depend on has changed (`freshness_key`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from eos_utils import pools, store

CELL_TIMEOUT = 3600  # seconds; a notebook's defaults show recorded runs and take much less
# What the outputs of a notebook can depend on, beside the notebook itself.
SOURCES = (
    "eos_utils", "experiments", "results", "bench/results", "requirements.lock",
    "book/claims", "book/inventory.yml", "book/verdicts.json",
)  # fmt: skip


class BookError(RuntimeError):
    """A notebook or a page that could not be made; the message says which, why, and what to do."""


# ---- execute -------------------------------------------------------------------------------------


def execute(
    notebook: Path,
    out: Path,
    parameters: dict[str, Any] | None = None,
    *,
    progress: bool,
    timeout: int | None = None,
) -> Path:
    """Execute `notebook` with papermill and write the result to `out`, complete or not at all.

    A failure leaves `out` as it was, and the notebook as far as it got in `*.failed.ipynb` beside it.

    Args:
        notebook: the notebook to execute.
        out: where the executed copy goes.
        parameters: overrides of the notebook's parameters.
        progress: show papermill's progress bar and what the cells print.
        timeout: seconds that one cell may take; None for no limit.

    Returns:
        The path of the executed copy.

    Raises:
        BookError: a cell failed or timed out, or the kernel died.
    """
    import papermill

    notebook, out = Path(notebook), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    store.sweep(out.parent, f".{out.stem}.*.part.ipynb")
    part = out.with_name(f".{out.stem}.{os.getpid()}.part.ipynb")
    failed = out.with_name(f"{out.stem}.failed.ipynb")
    try:
        papermill.execute_notebook(
            str(notebook),
            str(part),
            parameters=parameters or {},
            kernel_name="python3",
            progress_bar=progress,
            stdout_file=sys.stdout if progress else None,
            stderr_file=sys.stderr if progress else None,
            execution_timeout=timeout,
        )
        os.replace(part, out)
        failed.unlink(missing_ok=True)
    except Exception as error:
        # After a timeout the written notebook calls every cell "completed": only the exception tells.
        if part.exists():
            os.replace(part, failed)
        raise BookError(_failure(notebook, failed, error, parameters or {})) from error
    finally:
        part.unlink(missing_ok=True)
    return out


def _failure(notebook: Path, failed: Path, error: Any, parameters: dict[str, Any]) -> str:
    """Notebook, cell, error, the parameters that were given, and what to do."""
    where, what = "", f"{type(error).__name__}: {error}"
    if hasattr(error, "cell_index"):  # papermill's own error: a cell raised
        source = str(error.source).strip().splitlines()
        where = f", cell {error.cell_index + 1}" + (f" ({source[0][:70]})" if source else "")
        what = f"{error.ename}: {error.evalue}"
    what = re.sub(r"\x1b\[[0-9;]*m", "", what).strip()
    seen = f"\n  as far as it got: {failed}" if failed.exists() else ""
    given = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    return (
        f"{notebook.name}{where} failed\n  {what}{seen}\n"
        + (f"  with {given}\n" if given else "")
        + f"  to see it happen: eos run {notebook.stem}, or open the notebook in Jupyter"
    )


# ---- freshness -----------------------------------------------------------------------------------


def sources_digest(root: Path) -> str:
    """One hash of package, catalogue, results, claims and lock, and of the Python and torch that run them."""
    digest = hashlib.sha256(sys.version.encode())
    digest.update("".join(d.version for d in metadata.distributions(name="torch")).encode())
    for name in SOURCES:
        path = root / name
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            relative = file.relative_to(root)
            if not any(part.startswith((".", "__pycache__")) for part in relative.parts):
                digest.update(f"{relative.as_posix()}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def freshness_key(root: Path, notebook: Path, digest: str | None = None) -> str:
    """What an executed copy of `notebook` was made of: it is up to date while this has not changed."""
    own = hashlib.sha256(notebook.read_bytes()).hexdigest()
    return hashlib.sha256(f"{digest or sources_digest(root)} {own}".encode()).hexdigest()


# ---- build ---------------------------------------------------------------------------------------


def build(root: Path, *, jobs: int = 2, cluster: str = "") -> Path:
    """Execute what is out of date, stage everything, build the pages.

    Args:
        root: the repository.
        jobs: how many notebooks are executed at a time, each with one torch thread.
        cluster: execute them on Dask, as in `eos sweep`; the workers must share this folder.

    Returns:
        The path of the first page.

    Raises:
        BookError: a notebook failed, or Sphinx had a warning.
    """
    root = Path(root).resolve()
    executed = root / "_build" / "executed"
    executed.mkdir(parents=True, exist_ok=True)
    digest = sources_digest(root)
    stale = []
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        key, copy = freshness_key(root, notebook, digest), executed / notebook.name
        mark = copy.with_suffix(".key")
        if copy.exists() and mark.exists() and mark.read_text().strip() == key:
            print(f"{notebook.stem}: up to date", flush=True)
        else:
            stale.append((notebook, copy, key))
    failures = [f for f in _executed(root, stale, max(1, jobs), cluster) if f]
    if failures:
        raise BookError("\n".join(failures))

    stage(root)
    html = root / "_build" / "html"
    for old in (html, root / "_build" / ".doctrees"):  # no page of an earlier build survives
        shutil.rmtree(old, ignore_errors=True)
    jupyter_book(root, "-W", "-n", "--keep-going")
    return html / "index.html"


def jupyter_book(root: Path, *options: str) -> None:
    """Jupyter Book on the staged book, into `_build/`; its output is in `_build/sphinx.log`.

    Raises:
        BookError: with what it told, if it failed.
    """
    main = "from jupyter_book.cli.main import main; main()"
    done = _run(root, "-c", main, "build", "_build/stage", "--path-output", ".", *options)
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    (root / "_build" / "sphinx.log").write_text(log, encoding="utf-8")
    if done.returncode:
        told = re.findall(r"^.*(?:WARNING|ERROR).*$|^[\w.]*(?:Error|Exception): .+$", log, re.MULTILINE)
        raise BookError(
            "\n".join(["the pages have faults (all of it: _build/sphinx.log)", *(told or log.splitlines()[-30:])])
        )


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with this package, and with one thread: two fit on two cores."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = os.environ | threads | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, encoding="utf-8", capture_output=True
    )


def execute_apart(
    root: Path, notebook: Path, out: Path, parameters: dict[str, Any] | None = None, timeout: int = CELL_TIMEOUT
) -> str:
    """Execute one notebook in a process of its own, with one thread; return what went wrong, or nothing.

    Two fit on two cores, and kernels that were started from one process have raced.
    """
    given = json.dumps(parameters or {})
    done = _run(root, "-m", "eos_utils.book", str(notebook), str(out), given, str(timeout))
    return (done.stdout.strip() or done.stderr.strip()) if done.returncode else ""


def _executed(root: Path, stale: list[tuple[Path, Path, str]], jobs: int, cluster: str) -> list[str]:
    """What went wrong with each notebook."""
    if not cluster:
        with ThreadPoolExecutor(max_workers=jobs) as threads:
            return list(threads.map(lambda job: _renew(root, *job), stale))
    with pools.pool(jobs, 1, cluster, {}, retries=1) as each:
        return [str(found) for _, found in each(_renew_there, [(root, *job) for job in stale])]


def _renew_there(job: tuple[Path, Path, Path, str]) -> str:
    """The same in a worker."""
    return _renew(*job)


def _renew(root: Path, notebook: Path, copy: Path, key: str) -> str:
    """Execute one notebook for the book and note of what it was made; return what went wrong."""
    mark = copy.with_suffix(".key")
    mark.unlink(missing_ok=True)
    print(f"{notebook.stem}: executing", flush=True)
    failure = execute_apart(root, notebook, copy)
    if not failure:
        mark.write_text(key + "\n")
        print(f"{notebook.stem}: done", flush=True)
    return failure


def stage(root: Path) -> Path:
    """A source folder for Jupyter Book: the book as tracked, but with executed notebooks, execution off."""
    from eos_utils import downloads

    out = root / "_build" / "stage"
    shutil.rmtree(out, ignore_errors=True)
    (out / "notebooks").mkdir(parents=True)
    shutil.copytree(root / "book", out / "book", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy2(root / "_toc.yml", out)
    config = staged_config((root / "_config.yml").read_text(encoding="utf-8"))
    (out / "_config.yml").write_text(config, encoding="utf-8")
    for notebook in (root / "notebooks").glob("*.ipynb"):
        text = (root / "_build" / "executed" / notebook.name).read_text(encoding="utf-8")
        executed = json.loads(text)
        downloads.place(executed, notebook.stem, out / "book" / "_static")
        (out / "notebooks" / notebook.name).write_text(scrub(executed, root), encoding="utf-8")
    return out


def staged_config(text: str) -> str:
    """The book's configuration with execution off, and nothing else changed."""
    config = yaml.safe_load(text)
    config.setdefault("execute", {})["execute_notebooks"] = "off"
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def scrub(notebook: dict[str, Any], root: Path) -> str:
    """An executed notebook without papermill's bookkeeping and without paths of this machine.

    Of the former the seconds that it took remain, which its page tells.
    """
    took = notebook["metadata"].get("papermill", {}).get("duration")
    for part in [notebook, *notebook["cells"]]:
        part["metadata"].pop("papermill", None)
        part["metadata"].pop("execution", None)
    if took:
        notebook["metadata"]["eos_seconds"] = round(took, 1)
    out = json.dumps(notebook, ensure_ascii=False, indent=1)
    for path, name in ((root, "."), (Path(sys.prefix), "<python>"), (Path.home(), "~")):
        if len(path.parts) > 1:  # never the root of the file system
            out = re.sub(re.escape(json.dumps(str(path), ensure_ascii=False)[1:-1]) + r"(?![\w.-])", name, out)
    return out + "\n"


# ---- check ---------------------------------------------------------------------------------------

# What is not an alt text: nothing, the word for one, the name of a file.
PLACEHOLDER = re.compile(r"(alt([ -]?text)?|image|figure|plot|\S*\.(png|svg|jpe?g|gif))?", re.IGNORECASE)
# Links that name another page without loading it.
PASSIVE = {"canonical", "next", "prev", "index", "search", "author", "help", "license", "alternate"}
WEIGHT = 1_600_000  # bytes that a page may load, but for fonts and mathematics; the theme's own are a million of them
ELSEWHERE = re.compile(r"(url\(|@import)\s*['\"]?(https?:)?//", re.IGNORECASE)


def check(html: Path) -> list[str]:
    """Faults of the built pages: links, anchors, alt texts, titles, ids, resources from elsewhere.

    Args:
        html: the folder of the built pages.

    Returns:
        One line for each fault: page, element, what is wrong. Empty if there is none.
    """
    from bs4 import BeautifulSoup

    html = Path(html).resolve()
    files = [p for p in sorted(html.rglob("*.html")) if "_static" not in p.parts]
    if not files:
        return ["no pages; `make book` makes them"]
    soups = {p.relative_to(html).as_posix(): BeautifulSoup(p.read_text("utf-8"), "html.parser") for p in files}
    ids = {name: Counter(str(tag["id"]) for tag in soup.find_all(id=True)) for name, soup in soups.items()}
    problems: list[str] = []
    for name, soup in soups.items():
        redirect = soup.find("meta", attrs={"http-equiv": re.compile("refresh", re.IGNORECASE)})
        if not redirect and not (soup.title and soup.title.get_text(strip=True)):
            problems.append(f"{name}: page: no title")
        problems += [f"{name}: #{i}: this id occurs {n} times" for i, n in ids[name].items() if n > 1]
        for tag in soup.find_all(True):
            problems += [f"{name}: {_opening(tag)}: {fault}" for fault in _faults(tag, html, name, ids)]
        if (weight := _weight(html, name, soup)) > WEIGHT:
            problems.append(f"{name}: page: loads {weight / 1e6:.2f} MB; {WEIGHT / 1e6:g} are allowed")
    for sheet in sorted(html.rglob("*.css")):
        if ELSEWHERE.search(sheet.read_text("utf-8", errors="replace")):
            problems.append(f"{sheet.relative_to(html).as_posix()}: loads from another host")
    return problems


def _weight(html: Path, page: str, soup: Any) -> int:
    """Bytes of a page with what it loads in the light scheme: styles, scripts, pictures; without fonts and MathJax."""
    light = [tag for tag in soup.find_all(["img", "script", "link"]) if "only-dark" not in tag.get("class", [])]
    loaded = [tag.get("src") or (tag.get("href") if "stylesheet" in tag.get("rel", []) else None) for tag in light]
    paths = {urlsplit(url).path for url in loaded if url and not url.startswith("data:")}
    files = {html / page} | {(html / page).parent / unquote(path) for path in paths}
    counted = {f.resolve() for f in files if "mathjax" not in f.parts and "fontawesome" not in f.name}
    return sum(f.stat().st_size for f in counted if f.is_file())


def _opening(tag: Any) -> str:
    """The element as one recognises it in the source."""
    named = [f'{k}="{tag[k]}"' for k in ("id", "href", "src", "alt") if tag.has_attr(k)]
    return f"<{' '.join([tag.name, *named])}>"[:160]


def _faults(tag: Any, html: Path, page: str, ids: dict[str, Counter[str]]) -> list[str]:
    """What is wrong with one element."""
    faults, fetched, linked = [], [], []
    if tag.name == "img" and tag.get("role") != "presentation":
        alt = tag.get("alt", "").strip()
        if PLACEHOLDER.fullmatch(alt):
            faults.append(f"placeholder alt text {alt!r}" if alt else "no alt text")
    if tag.name == "style" and ELSEWHERE.search(tag.get_text()):
        faults.append("loads from another host")
    if tag.has_attr("src"):
        fetched.append(tag["src"])
    if tag.name == "object" and tag.has_attr("data"):
        fetched.append(tag["data"])
    if tag.name in ("link", "use", "image") and tag.has_attr("href") and not PASSIVE & {*tag.get("rel", [])}:
        fetched.append(tag["href"])
    if tag.name in ("a", "area") and tag.has_attr("href"):
        linked.append(tag["href"])
    fetched += [part.split()[0] for part in tag.get("srcset", "").split(",") if part.strip()]
    for target in fetched + linked:
        url = urlsplit(target)
        if url.scheme in ("http", "https") or url.netloc:
            faults += ["loads from another host"] if target in fetched else []
        elif not url.scheme and not _exists(html, page, url.path, url.fragment, ids):
            faults.append(f"{target} does not exist")
    return faults


def _exists(html: Path, page: str, path: str, fragment: str, ids: dict[str, Counter[str]]) -> bool:
    """Whether a link leads to a file of the book, and its fragment to an element there."""
    path = unquote(path)
    found = (html / page).parent / path if path else html / page
    if path.startswith("/"):  # the 404 page, shown at any depth, links from the root or the published prefix
        found = html / path.lstrip("/")
        if page == "404.html" and not found.exists():
            found = html / path.lstrip("/").partition("/")[2]
    found = Path(os.path.normpath(found))
    found = found / "index.html" if found.is_dir() else found
    if not found.is_file() or html not in found.parents:
        return False
    name = found.relative_to(html).as_posix()
    return fragment in ("", "top") or name not in ids or unquote(fragment) in ids[name]


if __name__ == "__main__":
    try:
        given, limit = json.loads(sys.argv[3]), int(sys.argv[4])
        execute(Path(sys.argv[1]), Path(sys.argv[2]), given, progress=False, timeout=limit)
    except BookError as error:
        print(error)
        sys.exit(1)
