"""The theme's icons, only those in use: Font Awesome comes with two thousand of them, 1.5 MB for each first visit."""

from __future__ import annotations

import pathlib
import re

from sphinx.application import Sphinx

# As the minified script has it: name:[width,height,[other names and characters],"character",path or [path,path]],
ICON = re.compile(
    r'"?(?P<name>[\w-]+)"?:\[\d+,\d+,\[(?P<others>[^\]]*)\],"[0-9a-f]+",(?:"[^"]*"|\["[^"]*","[^"]*"\])\],?'
)
USED = re.compile(r"\bfa-([a-z0-9-]+)")


def reduced(script: str, used: set[str]) -> str:
    """The script without the icons that go by none of these names."""

    def kept(icon: re.Match[str]) -> str:
        names = {icon["name"], *re.findall(r'"([^"]+)"', icon["others"])}
        return icon[0] if names & used else ""

    return ICON.sub(kept, script)


def reduce(app: Sphinx, exception: Exception | None) -> None:
    """Reduces the script in the built book to the icons that its pages and the theme's scripts name."""
    out = pathlib.Path(app.outdir)
    path = out / "_static" / "scripts" / "fontawesome.js"
    if exception or not path.is_file():
        return
    files = [*out.rglob("*.html"), *(p for p in (out / "_static").rglob("*.js") if p != path)]
    used = {name for file in files for name in USED.findall(file.read_text(encoding="utf-8"))}
    path.write_text(reduced(path.read_text(encoding="utf-8"), used), encoding="utf-8")


def setup(app: Sphinx) -> dict:
    """After everything has been written and copied."""
    app.connect("build-finished", reduce, priority=900)
    return {"version": "0.1.0", "parallel_read_safe": True, "parallel_write_safe": True}
