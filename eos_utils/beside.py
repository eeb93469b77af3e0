r"""The two papers' explanations on one trajectory: FG's directions, each with its own sharpness, and SG's ‖A‖² and R.

**Where both are exact.** In FG's model, orthonormal inputs and :math:`L = \frac1{2n}\sum_k(h(x_k) - y_k)^2`, SG's Gram
matrix is

.. math:: M_{kl} = \frac1n\Bigl(\sum_j \sigma(w_{jk})\,\sigma(w_{jl}) + \delta_{kl}\sum_j a_j^2\,1[w_{jk} > 0]\Bigr) ,

of two blocks once no neuron is active on labels of both signs. A block of neurons that is balanced and aligned,
:math:`w_j = |a_j|\,\hat d_\pm`, has :math:`\lambda_\pm = \frac2n\sum_{j\in\pm} a_j^2`. So

.. math:: \|A\|^2 = \tfrac n2(\lambda_+ + \lambda_-), \qquad \Lambda = \max(\lambda_+, \lambda_-):

the output norm adds up what the sharpness takes the largest of.

**In recorded runs** of paper SG: how ‖A‖² goes with :math:`\lambda_1(M)`, and how with
:math:`\lambda_2 + \dots + \lambda_{10}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eos_utils.fg_blocks import Path
from eos_utils.fg_theory import Array
from eos_utils.figures import Curve, Panel
from eos_utils.phases import first_crossing, scaled
from eos_utils.sg_panels import Groups, Table, row

if TYPE_CHECKING:
    import xarray as xr

NAN = float("nan")
LEAST = 8  # spectra below which no correlation is taken


class View(NamedTuple):
    """SG's quantities along one run of FG's model: T + 1 steps, n labels."""

    eta: float
    blocks: Array  # (T + 1, 2) largest eigenvalue of M on the positive, and on the negative labels
    values: Array  # (T + 1, n) eigenvalues of M, the largest first
    a2: Array  # (T + 1, 2) ‖A‖² of the neurons with a > 0 and with a < 0
    along: Array  # (T + 1,) |Dᵀv₁|
    rest: Array  # (T + 1,) ‖R‖
    follower: Array  # (T + 1,) ‖R′‖, nan before its first step

    @property
    def ratio(self) -> Array:
        """2‖A‖²/n over λ₊ + λ₋, (T + 1,): 1 for two balanced and aligned blocks."""
        return np.asarray(self.a2.sum(axis=1) * 2 / self.values.shape[1] / self.blocks.sum(axis=1))


def gram(w: Array, a: Array) -> Array:
    """M of FG's model, (..., n, n), for weights (..., m, n) and output weights (..., m)."""
    n = w.shape[-1]
    active = np.maximum(w, 0)
    own = np.einsum("...j,...jk->...k", a**2, (w > 0).astype(float))
    return np.asarray((np.swapaxes(active, -1, -2) @ active + own[..., None] * np.eye(n)) / n)


def view(path: Path, begin: int = 0, run: int = 0) -> View:
    r"""A run of FG's model as SG looks at it; every step must have been kept.

    ``begin``: the step at which :math:`R' = R`. Before v₁ has found its direction, the projection across it keeps in
    R′, for ever, what later is the component along v₁.
    """
    if len(path.w) != len(path.error):
        raise ValueError(f"{len(path.w)} of {len(path.error)} steps were kept; SG's R′ needs them all")
    if not 0 <= begin < len(path.w):
        raise ValueError(f"begin={begin}: must be a step of the run, 0 to {len(path.w) - 1}")
    w, a, d = path.w[:, run], path.a[:, run], -len(path.y) * path.error[:, run]
    eta, m = float(path.eta[run]), gram(w, a)
    values, vectors = np.linalg.eigh(m)
    v = vectors[:, :, -1]
    along = np.einsum("tk,tk->t", d, v)
    r = d - along[:, None] * v
    follower = np.full_like(r, np.nan)
    follower[begin] = r[begin]
    for t in range(begin, len(d) - 1):
        last = follower[t]
        follower[t + 1] = last - eta * m[t] @ (last - (last @ v[t]) * v[t])
    sides = [np.linalg.eigvalsh(m[:, side][:, :, side])[:, -1] for side in (path.y > 0, path.y < 0)]
    norms = [np.where(sign * a > 0, a**2, 0).sum(axis=1) for sign in (1, -1)]
    of_rest = [np.linalg.norm(u, axis=1) for u in (r, follower)]
    return View(eta, np.stack(sides, 1), values[:, ::-1], np.stack(norms, 1), np.abs(along), *of_rest)


# ---- recorded runs of SG -------------------------------------------------------------------------


def _series(run: xr.Dataset, of: str) -> Array:
    """At the steps with a spectrum: ‖A‖² or λ₁, mean over that step and the next, or the sum of λ₂ to λ₁₀."""
    at = run["spectral"].values.astype(int)
    if of == "rest":
        return np.asarray(run["gram_eigenvalue"].values[:, 1:].sum(axis=1), dtype=float)
    if of not in ("norm", "top"):
        raise ValueError(f"of={of!r} is unknown; choose one of norm, top, rest")
    values = run["norm_A2" if of == "norm" else "sharpness"].values
    return np.asarray((values[at] + values[np.minimum(at + 1, len(values) - 1)]) / 2)


def _part(run: xr.Dataset, part: str) -> np.ndarray:
    """Which of the steps with a spectrum are 'before' or 'after' the first crossing of 2/η."""
    if part not in ("before", "after"):
        raise ValueError(f"part={part!r} is unknown; choose before or after")
    at = first_crossing(run)
    inside = run["spectral"].values < (np.inf if at is None else at)
    return np.asarray(inside if part == "before" else ~inside)


def goes_with(run: xr.Dataset, of: str = "rest", part: str = "after") -> float:
    """Correlation of log ‖A‖² with log λ₁ (``of`` 'top') or log(λ₂ + … + λ₁₀) ('rest'), over the spectra of a part.

    nan with fewer than eight spectra in it.
    """
    inside = _part(run, part)
    if inside.sum() < LEAST:
        return NAN
    x, y = (np.log(_series(run, name)[inside]) for name in ("norm", of))
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else NAN


def growth(run: xr.Dataset, of: str = "rest", part: str = "after") -> float:
    """By what factor ‖A‖² ('norm'), λ₁ ('top') or λ₂ + … + λ₁₀ ('rest') grows from the first to the last spectrum."""
    values = _series(run, of)[_part(run, part)]
    return float(values[-1] / values[0]) if len(values) >= 2 else NAN


# ---- panels --------------------------------------------------------------------------------------


def model_panels(seen: View, title: str, last: int, legend: bool = True) -> list[Panel]:
    """FG's model: each block's sharpness; what SG looks at, Λ and ‖A‖²; the residual along v₁, and R beside R′."""
    t, unit, shown = np.arange(last + 1), seen.eta / 2, slice(last + 1)
    norm, size = seen.a2.sum(axis=1) * 2 / seen.values.shape[1], float(np.hypot(seen.along[0], seen.rest[0]))

    def curves(*given: tuple[Array, str, str, float | None]) -> list[Curve]:
        return [Curve(t, values[shown], name, kind, tone) for values, name, kind, tone in given]

    blocks = curves(
        (seen.blocks[:, 0] * unit, "λ₊", "line", 0.0),
        (seen.blocks[:, 1] * unit, "λ₋", "line", 0.85),
    )
    output = curves((seen.values[:, 0] * unit, "Λ", "line", 0.0), (norm * unit, "2‖A‖²/n", "line", 0.6))
    residual = curves(
        *(
            (np.maximum(values / size, 1e-12), name, kind, tone)
            for values, name, kind, tone in (
                (seen.along, "|Dᵀv₁|", "line", 0.0),
                (seen.rest, "‖R‖", "line", 0.85),
                (seen.follower, "‖R′‖", "dashed", None),
            )
        )
    )
    return [
        Panel(blocks, "λ± · η/2", "", title, level=1.0, ylim=(-0.05, 2.2), legend="upper right" if legend else "none"),
        Panel(output, "times η/2", "", level=1.0, level_label="", legend="lower right" if legend else "none"),
        Panel(residual, "over ‖D(0)‖", "step", log="y", ylim=(1e-6, 1e4), legend="upper right" if legend else "none"),
    ]


def run_panels(run: xr.Dataset, title: str) -> list[Panel]:
    """A recorded run: ten eigenvalues of M as FG would look at them; Λ, ‖A‖² and the others as one; R beside R′."""
    steps, at = run["observed"].values, run["spectral"].values
    values = run["gram_eigenvalue"].values * float(run["eta"].values[0]) / 2
    crossing = first_crossing(run) or 0
    ten = [Curve(steps, scaled(run), "λ₁", tone=0.0)]
    ten += [
        Curve(at, values[:, i], {1: "λ₂", values.shape[1] - 1: f"to λ{values.shape[1]}"}.get(i, ""), tone=i / 10)
        for i in range(1, values.shape[1])
    ]
    norm, rest = run["norm_A2"].values, _series(run, "rest")
    base = rest[np.searchsorted(at, crossing, side="left").clip(max=len(at) - 1)]
    relative = [
        Curve(steps, run["sharpness"].values / run["sharpness"].values[crossing], "Λ", tone=0.0),
        Curve(steps, norm / norm[crossing], "‖A‖²", tone=0.6),
        Curve(at, rest / base, "λ₂ + … + λ₁₀", "dashed", None),
    ]
    n = np.sqrt(run["norm_D2"].values[0])
    residual = [
        Curve(steps, np.maximum(np.abs(run["Dv"].values) / n, 1e-9), "|Dᵀv₁|", tone=0.0),
        Curve(steps, np.sqrt(run["norm_R2"].values) / n, "‖R‖", tone=0.85),
        Curve(steps, np.sqrt(run["norm_Rp2"].values) / n, "‖R′‖", "dashed", None),
    ]
    return [
        Panel(ten, "λ · η/2", "", title, log="y", level=1.0, ylim=(0.01, None), legend="lower right", legend_columns=4),
        Panel(relative, "over the value\nat the crossing", "", marks=[crossing], legend="best"),
        Panel(residual, "over ‖D(0)‖", "step", log="y", ylim=(1e-4, 3), legend="best"),
    ]


def indicator(groups: Groups) -> Table:
    """For each network, over its runs: growth at the edge of λ₁, ‖A‖² and the others, and what ‖A‖² goes with."""
    columns: list[tuple[Any, dict[str, Any], bool]] = [
        (growth, {"of": "top"}, False),
        (growth, {"of": "norm"}, False),
        (growth, {"of": "rest"}, False),
        (goes_with, {"of": "top", "part": "before"}, False),
        (goes_with, {"of": "top"}, False),
        (goes_with, {"of": "rest"}, False),
    ]
    header = ["Network", "Runs", "λ₁ grows by", "‖A‖²", "λ₂ + … + λ₁₀", "‖A‖² with λ₁, before", "at the edge"]
    return [*header, "with λ₂ + … + λ₁₀"], [row(name, runs, columns) for name, runs in groups.items()]
