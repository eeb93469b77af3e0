"""A figure to take away: as SVG, and what it draws as CSV.

:func:`eos_utils.figures.show` leaves both with its output. When the book is staged, :func:`place` writes them into
files, and the pictures too: a page then loads the pictures of the colour scheme in which it is read, and no others.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import PolyCollection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIME = "application/vnd.eos.figure+json"
COLUMNS = ("panel", "x axis", "y axis", "series", "x", "y", "y to")
PICTURE = re.compile(r'class="eos-figure only-(\w+)"(.*?)src="data:image/png;base64,([^"]+)"', re.DOTALL)


def as_csv(figure: Figure) -> str:
    """What the figure draws, a line for each point, without those that are not finite.

    Columns: the panel's number and title, the names of its axes, the series, x, y, and for a band its upper border. A
    horizontal line has no x, a vertical one no y; a shaded stretch is two lines, its begin and its end.

    Raises:
        TypeError: a panel holds what is neither a line, a band nor a stretch, and would be left out.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, axis in enumerate((a for a in figure.axes if a.get_visible()), start=1):
        panel = " ".join(filter(None, [str(number), axis.get_title("left") or axis.get_title()]))
        for series, points in _series(axis):
            for point in points:
                if all(value is None or np.isfinite(value) for value in point):
                    values = ["" if value is None else f"{value:.7g}" for value in point]
                    names = [panel, axis.get_xlabel(), axis.get_ylabel(), series]
                    writer.writerow([*(name.replace("$", "") for name in names), *values])  # $M_A$ is M_A
    return out.getvalue()


def _series(axis: Axes) -> Iterator[tuple[str, list[tuple[float | None, ...]]]]:
    """Each series of a panel: its name, and (x, y, y to) of its points."""
    points: list[tuple[float | None, ...]]
    for i, line in enumerate(axis.lines, start=1):
        x, y = (np.asarray(v, dtype=float) for v in line.get_data(orig=False))
        of_data = line.get_transform().contains_branch_seperately(axis.transData)
        if of_data == (True, True):
            points = [(a, b, None) for a, b in zip(x, y, strict=True)]
        else:  # a line across the panel
            points = [(x[0], None, None) if of_data[0] else (None, y[0], None)]
        yield _name(line, i), points
    for i, band in enumerate(axis.collections, start=1):
        if not isinstance(band, PolyCollection):
            raise TypeError(f"{type(band).__name__}: a figure's CSV would lack it; teach it to eos_utils.downloads")
        points = []
        for path in band.get_paths():  # there and back: one corner, the lower border, one corner, the upper border
            corners = np.asarray(path.vertices)
            count = (len(corners) - 3) // 2
            low, high = corners[1 : count + 1], corners[count + 2 : 2 * count + 2][::-1]
            points += [(a, b, c) for (a, b), c in zip(low, high[:, 1], strict=True)]
        yield f"{_name(band, i)} (band)", points
    for i, span in enumerate(axis.patches, start=1):
        x = span.get_extents().transformed(axis.transData.inverted()).intervalx
        yield f"{_name(span, i)} (stretch)", [(value, None, None) for value in sorted(x)]


def _name(artist: Any, number: int) -> str:
    """The label in the legend; an artist without one has its gid, or its number."""
    label = str(artist.get_label())
    return artist.get_gid() or (label if label and not label.startswith("_") else f"unnamed {number}")


def place(notebook: dict[str, Any], stem: str, static: Path) -> None:
    """Write the figures of an executed notebook into ``static``/figures/``stem`` and let its outputs name the files.

    The files have the name of the figure (``mystnb: figure: name`` in the cell's metadata), else the cell's number.
    """
    folder = static / "figures" / stem
    for number, cell in enumerate(notebook["cells"], start=1):
        for output in cell.get("outputs", []):
            taken = output.get("data", {}).pop(MIME, None)
            if taken is None:
                continue
            figure = cell["metadata"].get("mystnb", {}).get("figure", {})
            name = figure.get("name", f"cell-{number}")
            folder.mkdir(parents=True, exist_ok=True)
            for kind in ("svg", "csv"):
                (folder / f"{name}.{kind}").write_text(taken[kind], encoding="utf-8", newline="\n")
            address = f"../_static/figures/{stem}/{name}"

            def as_file(match: re.Match[str], folder: Path = folder, name: str = name, url: str = address) -> str:
                theme, between, data = match.groups()
                (folder / f"{name}-{theme}.png").write_bytes(base64.b64decode(data))
                return f'class="eos-figure only-{theme}"{between}loading="lazy" src="{url}-{theme}.png"'

            text = PICTURE.sub(as_file, "".join(output["data"]["text/html"]))
            output["data"]["text/html"] = text + _links(address, name)


def _links(address: str, name: str) -> str:
    """The line under a figure."""
    said = html.escape(name.replace("-", " "), quote=True)
    link = '<a href="{0}.{1}" download aria-label="{2} as {3}">{3}</a>'
    kinds = " · ".join(link.format(address, kind, said, kind.upper()) for kind in ("svg", "csv"))
    return f'\n<p class="eos-downloads">{kinds}</p>'
