"""SG, section 4: the tables of its pages, as rows of text."""

from __future__ import annotations

import numpy as np

from eos_utils import sg_theorems as theorems
from eos_utils.sg_courses import SCALINGS, at_edge, lazy_gain, real_sharpening, slope
from eos_utils.sg_section4 import Spectrum, pair, synthetic
from eos_utils.sg_theorems import growth, level, widths

RHO = {"2.2": [0.02, 0.0], "3": [0.02, 0.0], "near": [0.0, 50.0], "entry": [0.0, 100.0]}


def significant(value: float) -> str:
    """Three digits, with a power of ten for what is very small or large.

    >>> significant(0.0591), significant(9976576914.0), significant(0.0), significant(17544)
    ('0.0591', '9.98·10⁹', '0', '17,544')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, power = f"{value:.2e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{float(mantissa):g}·10{raised}"


def premises() -> list[list[str]]:
    """What section 4 asks of the data, on the images and on the synthetic data."""

    def of(s: Spectrum) -> list[str]:
        r, scaled = len(s.lam), s.z / np.sqrt(s.n)
        ratio = s.lam[:-1] / s.lam[1:]
        numbers = [s.lam[0] / s.n, r / s.n, s.outside, ratio.max(), ratio[0], r * scaled.min()]
        widths = [s.lam[0] * s.n / s.lam[-1] ** 2, s.d**2 * s.n**2 / s.lam[-1] ** 2, sum(lazy_gain(s))]
        return [significant(float(v)) for v in [*numbers, *widths]]

    asked = [
        ("λ₁/n, of order 1", "Section 4.1"),
        ("r/n, far below 1", "Section 4.1"),
        ("share of ‖Y‖² that cannot be fitted, 0", "Section 4.1"),
        ("χ, a constant", "Assumption 4.1"),
        ("λ₁/λ₂, at least 2", "Assumption 4.1"),
        ("r·min zᵢ/√n, of order 1", "Assumption 4.2"),
        ("width c₁n²/λᵣ²", "Theorem 1"),
        ("width d²n²/λᵣ²", "Theorem 2"),
        ("width at which Λ would double", "ours"),
    ]
    columns = zip(asked, of(pair().balanced), of(synthetic()), strict=True)
    return [[what, place, real, made] for (what, place), real, made in columns]


def scalings(smallest: int, largest: int, seeds: int) -> list[list[str]]:
    """The four ways of setting η: exponents of m, and what the statements of Theorem 2 do."""
    rows = []
    for scaling, name in SCALINGS.items():
        at = widths(smallest, largest)
        runs = [at_edge(scaling, m, seeds) for m in at]
        until, whole = ([theorems.gamma_edge(run, early) for run in runs] for early in (True, False))
        apart = [m**0.5 * float(np.median(run.tracked.max(axis=0))) for m, run in zip(at, runs, strict=True)]
        grown = np.concatenate([growth(run, level(RHO[scaling], m)) for m, run in zip(at, runs, strict=True)])
        back = f"{sum(int((run.back() >= 0).sum()) for run in runs)} of {seeds * len(at)}"
        exponents = [f"{slope(at, values):.2f}".replace("-", "−") for values in (until, whole, apart)]
        rows.append([name, *exponents, back, f"{100 * float((grown <= 0).mean()):.2g} %"])
    return rows


def diverged(seeds: int, narrow: tuple[int, ...] = (30, 100, 300, 1000)) -> list[list[str]]:
    """How many runs of narrow networks diverge."""
    return [
        [SCALINGS[s], *(f"{seeds - int(at_edge(s, m, seeds).alive.sum())} of {seeds}" for m in narrow)]
        for s in ("2.2", "3")
    ]


def real_runs(given: tuple[int, ...], steps: int) -> list[list[str]]:
    """Phase I on the images: steps, decreases of Λ, growth of Λ and of ‖A‖² until λmax(M) is above 1/η."""
    rows = []
    for m in given:
        sharpness, norms, eta = real_sharpening(pair().balanced, m, 0.3, steps)
        inside = int(np.argmax(sharpness > 1 / eta)) or steps
        falls = int((np.diff(sharpness[1 : inside + 1]) <= 0).sum())
        growths = [f"{series[inside] / series[0]:.3g}" for series in (sharpness, norms)]
        rows.append([f"{m:,}", str(inside), str(falls), *growths])
    return rows
