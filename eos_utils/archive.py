"""A release as one file that a repository with DOIs takes: sources, results, the built book, checksums, metadata.

The same tree gives the same bytes: names are sorted, dates and modes fixed. ``SHA256SUMS`` inside covers every other
file and is in the form that ``sha256sum -c`` reads; ``.zenodo.json`` is made from ``CITATION.cff``.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import zipfile
from typing import Any

import yaml

from eos_utils.store import Store, StoreError

DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold


def sources(root: pathlib.Path) -> list[str]:
    """The tracked files by name, sorted. Raises :class:`StoreError` where there is no git, or a file is changed."""
    git = ["git", "-C", str(root)]
    try:
        listed = subprocess.run([*git, "ls-files", "-z"], capture_output=True, text=True, check=True, timeout=60).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise StoreError(f"{root} is no git repository ({error}): an archive is made of tracked files") from error
    if changed:
        raise StoreError(f"commit or remove first, so that the archive is a commit:\n{changed.rstrip()}")
    return sorted(name for name in listed.split("\0") if name)


def metadata(citation: dict[str, Any]) -> dict[str, Any]:
    """Zenodo's deposit metadata from the fields of ``CITATION.cff``."""

    def name(author: dict[str, str]) -> str:
        return author.get("name") or f"{author['family-names']}, {author['given-names']}"

    def reference(work: dict[str, Any]) -> str:
        year = f" ({work['year']})" if "year" in work else ""
        return f"{'; '.join(map(name, work['authors']))}{year}: {work['title']}"

    return {
        "upload_type": "software",
        "title": citation["title"],
        "version": str(citation["version"]),
        "creators": [{"name": name(author)} for author in citation["authors"]],
        "description": " ".join(citation["abstract"].split()),
        "license": citation["license"],
        "access_right": "open",
        "keywords": list(citation.get("keywords", [])),
        "references": [reference(work) for work in citation.get("references", [])],
    }


def archive(root: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the archive and returns its path; the book is in it, below ``html/``, if it is built.

    Raises :class:`StoreError` if a record is damaged or the working tree differs from its commit.
    """
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    files = {name: (root / name).read_bytes() for name in sources(root)}
    store = Store(root / "results")
    for key in store.keys():
        store.load(key)
    html = root / "_build" / "html"
    if (html / ".complete").is_file():
        pages = (path for path in html.rglob("*") if path.is_file() and path.name != ".complete")
        files |= {f"html/{path.relative_to(html).as_posix()}": path.read_bytes() for path in pages}
    described = json.dumps(metadata(citation), indent=1, ensure_ascii=False) + "\n"
    files[".zenodo.json"] = described.encode()
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))
    files["SHA256SUMS"] = sums.encode()
    top = f"eos-companion-{citation['version']}"
    out = out or root / "_build" / f"{top}.zip"
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{top}/{name}", DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            made.writestr(entry, content, compresslevel=9)
    part.replace(out)
    return out
