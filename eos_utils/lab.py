"""The laboratory in the page: what ``book/_static/eos-lab.js`` needs, and the same in a picture."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from eos_utils import fg_blocks as blocks
from eos_utils.figures import Curve, Panel

NEURONS = 40  # as many as the page holds; its slider takes the first of them


def setting(ratio: float, q: float, width: int, scale: float, seed: int, starts: int, steps: int) -> dict[str, Any]:
    """Settings and initialisations for the page, as plain numbers with six digits.

    Labels are (1, 1, -ratio, -ratio) and inputs orthonormal. Raises ``ValueError`` for a ratio outside of (0, 1], a
    width outside of 1 to 40 and fewer than one start.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio}: must be above 0 and at most 1")
    if not 1 <= width <= NEURONS:
        raise ValueError(f"width={width}: the page holds {NEURONS} neurons")
    if starts < 1:
        raise ValueError(f"starts={starts}: must be at least 1")
    y = np.array([1.0, 1.0, -ratio, -ratio])
    w, a = blocks.starts(y, NEURONS, scale, seed, starts)

    def plain(values: np.ndarray) -> list[Any]:
        return [plain(v) if isinstance(v, np.ndarray) else float(f"{v:.6g}") for v in values]

    found = [{"w": plain(one), "a": plain(out)} for one, out in zip(w, a, strict=True)]
    return {"labels": y.tolist(), "ratio": ratio, "q": q, "width": width, "steps": steps, "starts": found}


def path(given: dict[str, Any], start: int = 0) -> blocks.Path:
    """The run that the page shows, from the same numbers."""
    y, one = np.array(given["labels"]), given["starts"][start]
    w, a = np.array(one["w"])[: given["width"]], np.array(one["a"])[: given["width"]]
    return blocks.descend(y, np.array([given["q"] / blocks.sizes(y)[0]]), w[None], a[None], given["steps"])


def panels(run: blocks.Path, last: int) -> list[Panel]:
    """Both blocks' sharpness, and the loss, over the first steps."""
    shown, t = blocks.cut(run, 0, last + 1), np.arange(last + 1)
    tops = [
        Curve(t, blocks.tops(shown, s)[:, 0] * run.eta[0] / 2, f"λ{n}", tone=c)
        for s, n, c in ((1, "₊", 0.0), (-1, "₋", 0.85))
    ]
    loss = (blocks.losses(run, 1) + blocks.losses(run, -1))[: last + 1, 0]
    return [
        Panel(tops, "sharpness · η/2", "", level=1.0, ylim=(None, 2.7), legend="upper right", legend_columns=3),
        Panel([Curve(t, np.maximum(loss, 1e-16))], "loss", "step", log="y"),
    ]


def page(given: dict[str, Any]) -> Any:
    """The place in the page at which the script builds the laboratory."""
    from IPython.display import HTML

    held = json.dumps(given, separators=(",", ":")).replace("<", "\\u003c")
    without = "<noscript><p>The laboratory needs JavaScript; the picture below shows its first run.</p></noscript>"
    return HTML(
        f'<div class="eos-lab" data-eos-lab="blocks"><script type="application/json">{held}</script>{without}</div>'
    )
