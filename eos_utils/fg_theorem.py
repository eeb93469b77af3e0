r"""FG, Theorem 3.1: a check of each printed bound, and of the statements around it, on whole trajectories.

The checks take the setting (labels, m, scale = λ, eta, seed, seeds) as keywords, as `courses` does in
:mod:`eos_utils.fg_course`, which also states how the undefined constants are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eos_utils import fg_theory as fg
from eos_utils.fg_course import (
    SIGNS,
    Course,
    courses,
    height,
    inputs,
    labels_of_ratio,
    lower_bound,
    part_of,
    phase2_ends,
    rescaled,
    rise_rate,
    scan,
    without,
)
from eos_utils.fg_theory import Array, Network, Problem, Tested


def _on(labels: str, m: int, eta: str, seed: int, seeds: int, scale: float | str) -> str:
    return (
        f"labels {labels}; m = {m}, λ = {scale}, η = {eta}; the first {seeds} seeds from {seed} that meet "
        "Assumption 2.2; unit vectors as inputs (even seeds) or rotated ones (odd)"
    )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def theorem_definition(*, trials: int, seed: int) -> Tested:
    """Worst relative difference between λ± and the second derivative of the loss along v±, by differences of gradients.

    Read with 0 of length d + 1, the squared norm of v±, the d± of appendix A, and S₊, S₋ not empty.
    """
    generator, worst = np.random.default_rng(seed), 0.0
    for trial in range(trials):
        p = Problem(inputs(4, trial), np.array([1, 1, -1, -1]) * generator.uniform(0.5, 2, 4), 0.1)
        net = Network(generator.normal(size=(12, p.x.shape[1])), generator.normal(size=12))
        for sign in SIGNS:
            net.w[0], net.a[0] = 0.1 * net.w[0] + 3 * sign * p.d(sign), sign  # a member of S
            v = fg.direction(p, fg.aligned_set(net, p, sign), 12, sign)
            exact, move = fg.rayleigh(fg.hessian(net, p)[0], v), v.reshape(12, -1)
            h = min(1e-4, 0.5 * np.abs(net.w @ p.x.T).min() / np.abs(move[:, :-1] @ p.x.T).max())
            ends = [Network(net.w + s * h * move[:, :-1], net.a + s * h * move[:, -1]) for s in SIGNS]
            ahead, behind = (minus_gradient(end, p) for end in ends)
            slope = -((ahead - behind) * move).sum() / (2 * h * (v @ v))
            worst = max(worst, abs(slope - exact) / max(abs(exact), p.size(sign)))
    return Tested(worst, 2 * trials, f"random networks of 12 neurons on 4 orthonormal inputs, seed {seed}")


def minus_gradient(net: Network, p: Problem) -> Array:
    """-∇L by neurons, (m, d + 1)."""
    d = fg.error_vectors(net, p)
    return np.column_stack([net.a[:, None] * d, (net.w * d).sum(axis=1)])


def _steps(c: Course, epsilon: float, only: str) -> list[int]:
    """Six steps spread over the three phases, or ('risen') three after the positive labels are fitted."""
    first, second = c.phases(epsilon)
    risen = [second, (second + c.last) // 2, c.last]
    return risen if only == "risen" else [0, first // 2, first, (first + second) // 2, *risen[::2]]


def theorem_rayleigh(*, epsilon: float, **setting: Any) -> Tested:
    """Largest excess of λ₊ or λ₋ over the largest eigenvalue of the exact Hessian, relative to it."""
    excess = []
    for c in courses(**setting):
        for t in _steps(c, epsilon, "any"):
            h, net = fg.hessian(c.net(t), c.p)[0], c.net(t)
            top = np.linalg.eigvalsh(h)[-1]
            vs = [fg.direction(c.p, c.members(sign), len(net.a), sign) for sign in SIGNS]
            excess += [(fg.rayleigh(h, v) - top) / top for v in vs]
    return Tested(max(excess), len(excess), _on(**setting))


def theorem_phase1(*, sign: int, epsilon: float, part: str = "full", lasts: float = 1.0, **setting: Any) -> Tested:
    """Largest value of λ± during phase 1, as a multiple of the printed bound 2|S|λ^(1−rε); negative if λ± is.

    Phase 1 ends at ε ln(1/λ)/(η‖d₋‖), our reading. ``lasts``: or at so many times that.
    """
    ratios = []
    for c in courses(**setting):
        bound = 2 * len(c.members(sign)) * c.scale ** (1 - c.ratio * epsilon)
        ratios.append(part_of(c, sign, part)[: int(lasts * c.phases(epsilon)[0]) + 1].max() / bound)
    return Tested(max(ratios), len(ratios), _on(**setting))


def theorem_growth(
    *, sign: int, epsilon: float, part: str = "full", prefactor: str = "printed", rate: float = 1.0, **setting: Any
) -> Tested:
    """Smallest distance of λ± above its lower bound, from the start of its phase on, in units of 2‖d±‖.

    λ₊ from the end of phase 1 on, λ₋ from the end of phase 2 on. The bound is a prefactor (printed: n‖d±‖²/(4|S|);
    plateau: 2‖d±‖ρ±) times a logistic function of rate 2η‖d±‖ around the predicted τ±.
    """
    slack = []
    for c in courses(**setting):
        start = c.phases(epsilon)[0 if sign > 0 else 1]
        above = part_of(c, sign, part) - lower_bound(c, sign, prefactor, rate)
        slack.append(above[start:].min() / (2 * c.p.size(sign)))
    return Tested(min(slack), len(slack), _on(**setting))


def theorem_prefactor(*, factor: int, labels: str, eta: str, prefactor: str = "printed", **setting: Any) -> Tested:
    """Largest value of a prefactor over the λ± that training ends with; the bound fails if it exceeds 1.

    The labels are multiplied by ``factor``, and the step size divided by it, which leaves the dynamics as they are.
    """
    setting |= rescaled(labels, eta, factor)
    ratios = [height(c, sign, prefactor) / c.quotients(sign)[0][-1] for c in courses(**setting) for sign in SIGNS]
    return Tested(max(ratios), len(ratios), _on(**setting))


def theorem_phase2_minus(*, ratios: list[float], epsilon: float, part: str = "full", **setting: Any) -> Tested:
    """Largest value of λ₋ during phase 2, as a multiple of the printed bound 2|S₋|λ^ε, for labels of several r.

    Phase 2 ends when 95 % of the positive labels are fitted, our reading.
    """
    found = []
    for ratio in ratios:
        for c in courses(labels=labels_of_ratio(ratio), steps=-1, **setting):
            first, second = c.phases(min(epsilon, 0.9 / ratio))
            bound = 2 * len(c.minus) * c.scale**epsilon
            found.append(part_of(c, -1, part)[first : second + 1].max() / bound)
    return Tested(max(found), len(found), _on(f"1, 1, −1/r, −1/r with r = {_listed(ratios)}", **setting))


def theorem_phase2_exponent(*, ratios: list[float], scales: list[float], runs: int, **setting: Any) -> Tested:
    """Worst relative difference between the exponent of λ in λ₋'s Gauss–Newton part at the end of phase 2 and 2(1−1/r).

    The bound 2|S₋|λ^ε then holds for small λ if ε is below this exponent, and fails if it is above.
    """
    found = []
    for ratio in ratios:
        ends = phase2_ends(ratio, scales, runs, **setting)
        slopes = np.polyfit(np.log(scales), np.log(ends), 1)[0]
        found += list(np.abs(slopes / (2 * (1 - 1 / ratio)) - 1))
    on = _on(f"1, 1, −1/r, −1/r with r = {_listed(ratios)}", scale=_listed(scales), seeds=runs, **setting)
    return Tested(max(found), len(found), on)


def theorem_independence(*, correlation: float = 0.0, **setting: Any) -> Tested:
    """Largest change of λ₋ when all neurons with a > 0 are deleted at the decoupling, in units of ‖d₋‖.

    The decoupling is the step from which no neuron is active on labels of the other sign (0 if there is none). The
    Hessian's entries between the two kinds of neurons, at five later steps, count too.
    """
    found = []
    for c in courses(correlation=correlation, **setting):
        alone = without(c, 1, c.start).quotients(-1)[0]
        change = np.abs(alone - c.quotients(-1)[0][c.start :]).max()
        for t in np.linspace(c.start, c.last, 5).astype(int):
            m = len(c.a[t])
            blocks = fg.hessian(c.net(t), c.p)[0].reshape(m, -1, m, c.w.shape[2] + 1)
            change = max(change, np.abs(blocks[c.a[t] > 0][:, :, c.a[t] < 0]).max())
        found.append(float(change) / c.p.size(-1))
    return Tested(max(found), len(found), _on(**setting))


def theorem_rates_differ(**setting: Any) -> Tested:
    """Smallest a₊/a₋ − 1 over the seeds, a± being the observed rate of the rise (σ± from 0.1 to 0.9)."""
    found = [rise_rate(c, 1) / rise_rate(c, -1) - 1 for c in courses(**setting)]
    return Tested(min(found), len(found), _on(**setting))


def theorem_rate_depends(*, scales: list[float], runs: int, **setting: Any) -> Tested:
    """Largest relative change of the rate of the rise (median over the seeds) between two values of λ."""
    rates = np.median(scan(scales, runs, **setting)[0], axis=2)
    spread = (rates.max(axis=1) / rates.min(axis=1) - 1).max()
    return Tested(spread, 2 * len(scales) * runs, _on(scale=_listed(scales), seeds=runs, **setting))


def theorem_rate(*, scales: list[float], runs: int, **setting: Any) -> Tested:
    """Largest relative difference between the observed rate of the rise and 2η‖d±‖, over λ, seeds and signs."""
    rates = scan(scales, runs, **setting)[0]
    return Tested(np.abs(rates - 1).max(), rates.size, _on(scale=_listed(scales), seeds=runs, **setting))


def theorem_midpoint(**setting: Any) -> Tested:
    """Largest difference in steps between the observed time of σ± = 1/2 and the predicted τ±."""
    found = [abs(c.time(sign, 0.5) - c.midpoint(sign)) for c in courses(**setting) for sign in SIGNS]
    return Tested(max(found), len(found), _on(**setting))


def theorem_top_plus(*, epsilon: float, only: str = "any", **setting: Any) -> Tested:
    """Largest |λ₊ − λ₁| over λ₁, the largest Hessian eigenvalue: at six steps in the three phases, or once risen."""
    found = []
    for c in courses(**setting):
        quotient = c.quotients(1)[0]
        for t in _steps(c, epsilon, only):
            top = np.linalg.eigvalsh(fg.hessian(c.net(t), c.p)[0])[-1]
            found.append(abs(quotient[t] / top - 1))
    return Tested(max(found), len(found), _on(**setting))


def theorem_top_minus(*, ratios: list[float], runs: int, **setting: Any) -> Tested:
    """Largest |λ₋ − λ₂| over λ₂, the second largest eigenvalue, at the end of training, for labels of several r."""
    found = []
    for ratio in ratios:
        for c in courses(runs, labels=labels_of_ratio(ratio), **setting):
            second = np.linalg.eigvalsh(fg.hessian(c.net(c.last), c.p)[0])[-2]
            found.append(abs(c.quotients(-1)[0][-1] / second - 1))
    on = _on(f"1, 1, −1/r, −1/r with r = {_listed(ratios)}", seeds=runs, **setting)
    return Tested(max(found), len(found), on)


CHECKS: dict[str, Callable[..., Tested]] = {
    f.__name__: f
    for f in (
        theorem_definition, theorem_rayleigh, theorem_phase1, theorem_growth, theorem_prefactor, theorem_phase2_minus,
        theorem_phase2_exponent, theorem_independence, theorem_rates_differ, theorem_rate_depends, theorem_rate,
        theorem_midpoint, theorem_top_plus, theorem_top_minus,
    )
}  # fmt: skip
