"""SG, section 4: what its assumptions and its two theorems say, measured.

On the data of the paper: CIFAR-10's airplanes against automobiles as :func:`eos_utils.sg_section4.pair` keeps them.
On synthetic data that meet the premises (n = 500, d = r = 10): the runs of :mod:`eos_utils.sg_courses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eos_utils.fg_theory import Array, Tested
from eos_utils.sg_courses import SCALINGS, Course, at_edge, sharpening, slope
from eos_utils.sg_section4 import FIRST, SIZES, explicit_step, outputs_of, pair, printed_star, synthetic

N, D = 500, 10  # the synthetic data
# n, d, m and ηΛ(0) of runs that test the update rule; the last two start above the edge.
CASES = [(40, 12, 30, 0.5), (60, 20, 5, 0.1), (30, 50, 200, 0.2), (80, 5, 500, 2.1), (80, 10, 1000, 2.2)]
REAL = "990 images, 495 airplanes and 495 automobiles of CIFAR-10, centred"
MADE = f"synthetic data, n = {N}, d = r = {D}"
EPSILON_SQUARED = 0.01  # phase I is over when ‖D‖² is below; Theorem 1 says O(ε²)


def widths(smallest: int, largest: int) -> list[int]:
    """1, 3, 10, 30, ... times a power of ten, from smallest to largest."""
    return [m for k in range(1, 8) for m in (10**k, 3 * 10**k) if smallest <= m <= largest]


def named(scalings: Sequence[str], smallest: int, largest: int, seeds: int) -> str:
    """In words, what runs at the edge were tested."""
    shown = "; ".join(SCALINGS[s] for s in scalings)
    return f"{MADE}, {shown}, m from {smallest:,} to {largest:,}, {seeds} seeds"


# ---- the data ------------------------------------------------------------------------------------


def top_order() -> Tested:
    """Largest over smallest λ1/n of XᵀX over balanced subsets of different n; a λ1 that did not grow would give 8."""
    top = pair().top
    return Tested(max(top.values()) / min(top.values()), len(SIZES), f"{REAL}, and the first {min(top)} to 496 of them")


def rank_share() -> Tested:
    """The rank of XᵀX, relative to n."""
    s = pair().balanced
    return Tested(len(s.lam) / s.n, 1, REAL)


def unfittable(balanced: bool = True) -> Tested:
    """The share of ‖Y‖² that no linear function of the centred inputs fits. Unequal numbers of labels are the control,
    since centred inputs are orthogonal to constants.
    """
    s = pair().balanced if balanced else pair().unbalanced
    return Tested(s.outside, 1, REAL if balanced else "1,000 images, 495 airplanes and 505 automobiles, centred")


def ratio_of_successive() -> Tested:
    """The largest λi/λi+1 among the non-zero eigenvalues of XᵀX, the χ of Assumption 4.1."""
    lam = pair().balanced.lam
    return Tested(float((lam[:-1] / lam[1:]).max()), len(lam) - 1, REAL)


def first_gap() -> Tested:
    """λ1/λ2 of XᵀX."""
    lam = pair().balanced.lam
    return Tested(float(lam[0] / lam[1]), 1, REAL)


def smallest_component() -> Tested:
    """r times the smallest z_i/√n, the signs of the v_i chosen so that z_i ≥ 0."""
    s = pair().balanced
    return Tested(float(len(s.lam) * s.z.min() / np.sqrt(s.n)), len(s.lam), REAL)


def width_needed() -> Tested:
    """log10 of λ1·n/λ_r² = c1·n²/λ_r², the width that Theorem 1 asks for if the constant in its Ω is 1."""
    s = pair().balanced
    return Tested(float(np.log10(s.lam[0] * s.n / s.lam[-1] ** 2)), 1, REAL)


# ---- the update and M ----------------------------------------------------------------------------


def update_error(factor: float = 1.0, steps: int = 20) -> Tested:
    """Largest ‖D(t+1) − (I − ηM*(t))D(t)‖ along explicit gradient descent, in units of the step's second-order term.
    The term enters M* ``factor`` times: −1 with the other sign, 0 not at all.
    """
    worst, cases = 0.0, 0
    for seed, (n, d, m, edge) in enumerate(CASES, start=FIRST):
        generator = np.random.default_rng(seed)
        x, y = generator.normal(size=(d, n)), generator.choice([-1.0, 1.0], size=n)
        a, w = generator.normal(size=m) * m**-0.5, generator.normal(size=(m, d)) * d**-0.5
        first = printed_star(x, y, 1.0, a, w, 0.0)[0]
        eta, error, term, net = edge / float(np.linalg.eigvalsh(first)[-1]), 0.0, 0.0, (a, w)
        for _ in range(steps):
            star, second = printed_star(x, y, eta, *net, factor)
            residual = outputs_of(x, *net) - y
            net = explicit_step(x, y, eta, *net)
            error = max(error, float(np.linalg.norm(outputs_of(x, *net) - y - residual + eta * star @ residual)))
            term = max(term, float(np.linalg.norm(eta * second @ residual)))
        if not np.isfinite(outputs_of(x, *net)).all():
            raise ValueError(f"the run with m={m} diverged; nothing can be said of its update")
        worst, cases = max(worst, error / term), cases + steps
    return Tested(
        worst, cases, f"steps of gradient descent on random data with labels ±1, {len(CASES)} runs, m = 5 to 1,000"
    )


def phase_one(course: Course) -> Array:
    """The steps t ≥ 1 of Theorem 1, (T, B): before ‖D‖² is small or λmax(M*) is above 1/η for the first time."""
    inside = (course.size > EPSILON_SQUARED) & (course.star <= 1 / course.w.eta)
    inside = np.logical_and.accumulate(inside, axis=0)[:-1]
    inside[0] = False
    return np.asarray(inside)


def _phase_one_runs(smallest: int, largest: int, seeds: int, edge: float = 0.3) -> list[tuple[int, Course]]:
    return [(m, sharpening(m, seeds, edge)) for m in widths(smallest, largest)]


def approximation_slope(smallest: int, largest: int, seeds: int) -> Tested:
    """Exponent of m in the largest ‖M − (2/mn)(‖A‖² + m/d)XᵀX‖/‖M‖ in phase I, median over seeds."""
    found = [(m, float(np.median(c.apart.max(axis=0)))) for m, c in _phase_one_runs(smallest, largest, seeds)]
    return Tested(slope(*zip(*found, strict=True)), len(found) * seeds, _runs_of_phase_one(smallest, largest, seeds))


def eigenvector_mismatch(m: int, seeds: int) -> Tested:
    """One minus the smallest |⟨u_i(t), v_i⟩| over all eigenvectors u_i of M(t) with λi ≠ 0 and over phase I."""
    return Tested(1 - float(sharpening(m, seeds, 0.3).overlap.min()), seeds * D, f"{MADE}, m = {m:,}, {seeds} seeds")


def indicator_disagreement(smallest: int, largest: int, seeds: int) -> Tested:
    """Share of the steps of phase I at which Λ and ‖A‖² change in different directions."""
    different, total = 0, 0
    for _, course in _phase_one_runs(smallest, largest, seeds):
        inside = phase_one(course)
        different += int(((np.diff(course.sharpness, axis=0) > 0) != (np.diff(course.a, axis=0) > 0))[inside].sum())
        total += int(inside.sum())
    return Tested(different / total, total, "steps of " + _runs_of_phase_one(smallest, largest, seeds))


def _runs_of_phase_one(smallest: int, largest: int, seeds: int) -> str:
    return f"{MADE}, ηΛ(0) = 0.3, m from {smallest:,} to {largest:,}, {seeds} seeds"


# ---- Theorem 1 -----------------------------------------------------------------------------------


def not_increasing(smallest: int, largest: int, seeds: int, edges: Sequence[float] = (0.3, 0.9)) -> Tested:
    """Share of runs with a step t ≥ 1 in phase I at which the sharpness does not increase."""
    bad, total = 0, 0
    for edge in edges:
        for _, course in _phase_one_runs(smallest, largest, seeds, edge):
            fails = (np.diff(course.sharpness, axis=0) <= 0) & (phase_one(course) > 0)
            bad += int(fails.any(axis=0).sum())
            total += seeds
    shown = " and ".join(f"{edge:g}" for edge in edges)
    return Tested(bad / total, total, f"{MADE}, ηΛ(0) = {shown}, m from {smallest:,} to {largest:,}, {seeds} seeds")


def gamma_slope(reading: str, smallest: int, largest: int, seeds: int) -> Tested:
    """Exponent of m in m·max ‖Γ(t)‖ of phase I, median over seeds; ``reading`` 'gamma_0' or 'gamma_d'."""
    found = [
        (m, m * float(np.median(getattr(course, reading).max(axis=0))))
        for m, course in _phase_one_runs(smallest, largest, seeds)
    ]
    return Tested(slope(*zip(*found, strict=True)), len(found) * seeds, _runs_of_phase_one(smallest, largest, seeds))


# ---- at the edge ---------------------------------------------------------------------------------


def gamma_edge_slope(scaling: str, smallest: int, largest: int, seeds: int) -> Tested:
    """Exponent of m in m·max ‖Γ₀(t)‖, median over seeds: 0 where Assumption 4.3 holds."""
    found = [(m, gamma_edge(at_edge(scaling, m, seeds))) for m in widths(smallest, largest)]
    return Tested(slope(*zip(*found, strict=True)), len(found) * seeds, named([scaling], smallest, largest, seeds))


def gamma_edge(course: Course, until_back: bool = False) -> float:
    """The median over runs of m·max ‖Γ₀‖, over the whole run or until Λ is below 2/η again."""
    t = np.arange(len(course.gamma_0))[:, None] * course.stride
    counted = np.where(t <= course.back(), course.gamma_0, 0) if until_back else course.gamma_0
    return float(course.w.m[0] * np.median(counted[:, course.alive].max(axis=0)))


def bound_on_sharpness(scalings: Sequence[str], smallest: int, largest: int, seeds: int) -> Tested:
    """The smallest 1 − ηΛ/4 over runs that do not diverge: the β of Assumption 4.4."""
    runs = [at_edge(scaling, m, seeds) for scaling in scalings for m in widths(smallest, largest)]
    worst = max(float((run.excess[:, run.alive] + 1).max()) / 2 for run in runs)
    return Tested(1 - worst, sum(int(run.alive.sum()) for run in runs), named(scalings, smallest, largest, seeds))


def entry_component(smallest: int, largest: int, seeds: int) -> Tested:
    """The smallest |Dᵀv1|·√(m/n) at the first step above 2/η, for runs that come from just below the edge."""
    found = [component_at_crossing(at_edge("near", m, seeds)) for m in widths(smallest, largest)]
    every = np.concatenate(found)
    return Tested(float(every.min()), len(every), named(["near"], smallest, largest, seeds))


def component_at_crossing(run: Course) -> Array:
    """|Dᵀv1|·√(m/n) at the first step above 2/η, of the runs that cross."""
    at = run.crossing()
    crossed = np.flatnonzero(at >= 0)
    return np.asarray(np.abs(run.d[at[crossed], crossed, 0]) * np.sqrt(run.w.m[crossed] / N))


# ---- Theorem 2 -----------------------------------------------------------------------------------


def level(rho: Sequence[float], m: int) -> float:
    """ρ = ρ₀ + ρ₁/m from ``rho`` = [ρ₀, ρ₁]."""
    return rho[0] + rho[1] / m


def not_returning(rho: Mapping[str, Sequence[float]], smallest: int, largest: int, seeds: int) -> Tested:
    """Share of the runs in which Λ exceeds (2/η)(1+ρ) and is never below that again. ``rho`` gives [ρ₀, ρ₁] of
    ρ = ρ₀ + ρ₁/m for each way of setting η.
    """
    stay, exceed = 0, 0
    for scaling, given in rho.items():
        for m in widths(smallest, largest):
            above = at_edge(scaling, m, seeds).excess > level(given, m)
            exceed += int(above.any(axis=0).sum())
            stay += int((above.any(axis=0) & above[-1]).sum())
    return Tested(stay / max(exceed, 1), exceed, "runs above the level; " + named([*rho], smallest, largest, seeds))


def growth(course: Course, rho: float) -> Array:
    """|Dᵀv1(t+1)|/|Dᵀv1(t)| − 1 at the steps at which Λ(t) and Λ(t+1) exceed (2/η)(1+ρ)."""
    one = np.abs(course.d[..., 0])
    both = (course.excess[:-1] > rho) & (course.excess[1:] > rho)
    return np.asarray(one[1:][both] / one[:-1][both] - 1)


def needed_share(course: Course) -> float:
    """The smallest ρ that excludes all steps above 2/η without growth, relative to the largest ηΛ/2 − 1 of the run."""
    one, low = np.abs(course.d[..., 0]), np.minimum(course.excess[:-1], course.excess[1:])
    return float((np.where(one[1:] <= one[:-1], low, 0).max(axis=0) / course.excess.max(axis=0)).max())


def smallest_growth(rho: Mapping[str, Sequence[float]], smallest: int, largest: int, seeds: int) -> Tested:
    """The smallest |Dᵀv1(t+1)|/|Dᵀv1(t)| − 1 over steps with Λ(t) and Λ(t+1) above (2/η)(1+ρ)."""
    found = [
        growth(at_edge(scaling, m, seeds), level(given, m))
        for scaling, given in rho.items()
        for m in widths(smallest, largest)
    ]
    every = np.concatenate(found)
    return Tested(float(every.min()), len(every), "steps of " + named([*rho], smallest, largest, seeds))


def farthest(course: Course) -> float:
    """√(m/n)·max ‖R − R′‖, median over the runs that do not diverge."""
    scale = np.sqrt(course.w.m[0] / N)
    return float(scale * np.median(course.tracked[:, course.alive].max(axis=0)))


def printed_bound() -> float:
    """The theorem's √(n³d)/λ_r in units of √n, with 1 for the constant in its O: the bound on :func:`farthest`."""
    return float(np.sqrt(N**2 * D) / synthetic(N, D).lam[-1])


def residual_slope(scaling: str, smallest: int, largest: int, seeds: int) -> Tested:
    """Exponent of m in √m·max ‖R(t) − R′(t)‖, median over seeds; the theorem's bound says that it is bounded."""
    found = [(m, farthest(at_edge(scaling, m, seeds))) for m in widths(smallest, largest)]
    return Tested(slope(*zip(*found, strict=True)), len(found) * seeds, named([scaling], smallest, largest, seeds))


CHECKS: dict[str, Callable[..., Tested]] = {
    "sg4_top_order": top_order,
    "sg4_rank_share": rank_share,
    "sg4_unfittable": unfittable,
    "sg4_ratio_of_successive": ratio_of_successive,
    "sg4_first_gap": first_gap,
    "sg4_smallest_component": smallest_component,
    "sg4_width_needed": width_needed,
    "sg4_update_error": update_error,
    "sg4_approximation_slope": approximation_slope,
    "sg4_eigenvector_mismatch": eigenvector_mismatch,
    "sg4_indicator_disagreement": indicator_disagreement,
    "sg4_not_increasing": not_increasing,
    "sg4_gamma_slope": gamma_slope,
    "sg4_gamma_edge_slope": gamma_edge_slope,
    "sg4_bound_on_sharpness": bound_on_sharpness,
    "sg4_entry_component": entry_component,
    "sg4_not_returning": not_returning,
    "sg4_smallest_growth": smallest_growth,
    "sg4_residual_slope": residual_slope,
}
