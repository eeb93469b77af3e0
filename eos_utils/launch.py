"""Notebooks outside of a clone: links that open one on Binder or Colab, and the first cell that it needs there.

Colab opens a notebook by itself, without the package and the recorded runs. While ``_config.yml`` names no
repository, notebooks have no such cell and pages no such buttons; once it does, :func:`settle` writes the cell.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

TAG = "launch"
# No public name may remain: :func:`eos_utils.parameters.parameters` takes each for an injected parameter.
CELL = """\
# @title Outside of a clone: install eos_utils, and fetch the recorded runs
import importlib.util as _util

if _util.find_spec("eos_utils") is None:
    import subprocess as _subprocess
    import sys as _sys

    _subprocess.run(["git", "clone", "--quiet", "--depth", "1", "--branch", {branch}, {url}, "eos"], check=True)
    _subprocess.run([_sys.executable, "-m", "pip", "install", "--quiet", "--editable", "./eos"], check=True)
    _sys.path.insert(0, "eos")"""


def repository(root: pathlib.Path) -> tuple[str, str]:
    """Address ('' for none yet) and branch of the repository, from the one place that names them."""
    known = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")).get("repository", {})
    return (known.get("url") or "").rstrip("/"), known.get("branch") or "main"


def first_cell(url: str, branch: str) -> dict[str, Any]:
    """The cell that installs the package and fetches the runs where ``eos_utils`` cannot be imported; hidden."""
    source = CELL.format(url=json.dumps(url), branch=json.dumps(branch))
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": TAG,
        "metadata": {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": [TAG, "remove-cell"]},
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }


def settled(notebook: dict[str, Any], url: str, branch: str) -> dict[str, Any]:
    """The notebook with the first cell that this address asks for: none if it is empty."""
    cells = [cell for cell in notebook["cells"] if TAG not in cell["metadata"].get("tags", [])]
    return {**notebook, "cells": ([first_cell(url, branch)] if url else []) + cells}


def settle(root: pathlib.Path) -> list[str]:
    """Writes the first cell into every tracked notebook, or takes it out; the names of those that changed."""
    changed = []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        before = json.loads(path.read_text(encoding="utf-8"))
        after = settled(before, *repository(root))
        if after != before:
            path.write_text(json.dumps(after, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            changed.append(path.stem)
    return changed


def buttons(url: str, branch: str, path: str) -> dict[str, str]:
    """Where a notebook of the repository opens, by what the button says; Colab reads from GitHub alone.

    >>> buttons("https://github.com/a/b", "main", "notebooks/x.ipynb")["Colab"]
    'https://colab.research.google.com/github/a/b/blob/main/notebooks/x.ipynb'
    """
    if not url:
        return {}
    at, shown = urlsplit(url), f"?urlpath={quote(f'lab/tree/{path}', safe='')}"
    if at.netloc != "github.com":
        return {"Binder": f"https://mybinder.org/v2/git/{quote(url, safe='')}/{quote(branch, safe='')}{shown}"}
    name = at.path.strip("/").removesuffix(".git")
    return {
        "Binder": f"https://mybinder.org/v2/gh/{name}/{quote(branch, safe='')}{shown}",
        "Colab": f"https://colab.research.google.com/github/{name}/blob/{branch}/{path}",
    }


if __name__ == "__main__":
    from eos_utils.store import root

    for name in settle(root()):
        print(f"{name}: first cell settled")
