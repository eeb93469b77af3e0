r"""FG's model at the edge of stability: what large steps do on orthonormal inputs, and the checks of claims on it.

Aligned balanced neurons of one block follow :math:`\sigma' = \sigma(1+q(1-\sigma))^2` with :math:`q = \eta\|d_\pm\|`:

- stable for q < 1; a 2-cycle for :math:`1 < q < \sqrt5-1`, then its period doublings, then chaos;
- for :math:`q > \tfrac32\sqrt3 - 1` an orbit leaves :math:`[0, 1+1/q]`: the neurons change sign and are dead;
- in the 2-cycle a neuron that is active on some of the labels only, :math:`\beta = \|d_{part}\|/\|d\|`, grows by
  :math:`1 + (q-1)\beta(1-\beta)` in two steps. Such neurons lower the curvature of the block;
- at an interpolating network the largest eigenvalue is at least :math:`2\max|y_k|/n`, so that none is stable where
  :math:`q_k = \eta|y_k|/n > 1` for some label. A label fitted by neurons of its own follows the map with this q.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from eos_utils.fg_blocks import Mask, Path, coupled, cut, descend, losses, sizes, starts, tops, train
from eos_utils.fg_course import parse_labels
from eos_utils.fg_theory import Array, Tested

DEATH = 1.5 * np.sqrt(3) - 1  # q above which the map throws neurons out
DOUBLING = np.sqrt(5) - 1  # q above which the 2-cycle is unstable


def orbits(q: Array, skip: int = 2000, keep: int = 200, start: float = 1e-3) -> Array:
    r"""The map :math:`\sigma' = \sigma(1+q(1-\sigma))^2` in the long run, (keep, len(q)).

    nan once it has left [0, 1+1/q].
    """
    share, found = np.full(len(q), start), []
    for t in range(skip + keep):
        growth = 1 + q * (1 - share)
        share = np.where(growth > 0, share * growth**2, np.nan)
        if t >= skip:
            found.append(share)
    return np.array(found)


def predicted_top(q: Array, peak: float) -> Array:
    r"""Where a block's largest eigenvalue ends, in units of 2/η; ``peak`` is its largest :math:`|y_k|/\|y_\pm\|`.

    q below 1; then the edge, while :math:`q_k = q\,peak < 1`; then the mean in the 2-cycle of a label that has neurons
    of its own, :math:`(3\bar\sigma-1)q_k/2 = (3+q_k)/4` since :math:`\bar\sigma = (1+q_k)/(2q_k)`; nan beyond.
    """
    own = q * peak
    return np.where(q < 1, q, np.where(own < 1, 1, np.where(own < DOUBLING, (3 + own) / 4, np.nan)))


def predicted_floor(q: Array, y: Array) -> Array:
    r"""The share of the loss on labels of one sign that stays: a label with :math:`q_k>1` keeps :math:`(1-q_k^{-2})/2`.

    That is the mean of :math:`(1-\sigma)^2` over the 2-cycle of the label.
    """
    own = np.maximum(q[:, None] * np.abs(y) / np.linalg.norm(y), 1)
    floor = (y**2 * (1 - own**-2.0) / 2).sum(axis=1) / (y**2).sum()
    return np.where(own.max(axis=1) < DOUBLING, floor, np.nan)


def partial_factor(q: float, beta: Array | float) -> Array | float:
    r"""Growth of a neuron active on a part of the labels in two steps of the 2-cycle, :math:`1+(q-1)\beta(1-\beta)`."""
    return 1 + (q - 1) * beta * (1 - beta)


def two_step(values: Array) -> Array:
    """Means over steps t and t + 1, which the oscillation of period 2 drops out of."""
    return np.asarray((values[1:] + values[:-1]) / 2)


def partial_neurons(path: Path) -> tuple[Mask, Mask]:
    """The a > 0 neurons that are active on all positive labels at the last step, and those on some: (B, m) each."""
    side = path.y > 0
    on = (path.w[-1] > 0) & (path.a[-1] > 0)[..., None]
    alone = ~on[..., ~side].any(axis=2)
    full = alone & on[..., side].all(axis=2)
    return full, alone & on[..., side].any(axis=2) & ~full


def partial_growth(
    labels: str, q: float, m: int, scale: float, steps: int, seed: int, seeds: int
) -> tuple[Array, Array]:
    r"""β and the measured growth over two steps of every partially active neuron with a > 0, while they are few.

    From 40 steps after half of the labels are fitted until the partial neurons hold a thousandth of what the full ones
    do; a run in which that leaves fewer than ten steps has none to give.
    """
    path = train(labels, q, m, scale, steps, seed, seeds)
    full, part = partial_neurons(path)
    betas, factors = [], []
    for run in range(seeds):
        squares, d = path.a[:, run] ** 2, np.where(path.y > 0, path.y / len(path.y), 0)
        share = squares[:, full[run]].sum(axis=1) / (len(path.y) * np.linalg.norm(d))
        few = squares[:, part[run]].sum(axis=1) < 1e-3 * squares[:, full[run]].sum(axis=1)
        if not (share > 0.5).any():
            continue
        first = int(np.argmax(share > 0.5)) + 40
        last = first + (int(np.argmin(few[first:])) if not few[first:].all() else len(few) - 1 - first) // 2 * 2
        if last - first < 10:
            continue
        members = np.flatnonzero(part[run])
        on = path.w[-1, run, members] > 0
        betas.append(np.linalg.norm(on * d, axis=1) / np.linalg.norm(d))
        factors.append((path.a[last, run, members] / path.a[first, run, members]) ** (2 / (last - first)))
    return np.concatenate(betas or [np.empty(0)]), np.concatenate(factors or [np.empty(0)])


class Scan(NamedTuple):
    """By sign, q and seed: block tops in units of 2/η and losses over the last steps, labels lost; (2, Q, B)."""

    q: Array
    top: Array
    loss: Array
    lost: Mask


@lru_cache(maxsize=2)
def scan(
    labels: str, m: int, scale: float, steps: int, seed: int, seeds: int, low: float, high: float, count: int
) -> Scan:
    """Training at ``count`` values of q; means over the last twelfth of the steps."""
    y, q = np.array(parse_labels(labels)), np.linspace(low, high, count)
    w, a = starts(y, m, scale, seed, seeds)
    eta, keep, shape = np.repeat(q / sizes(y)[0], seeds), max(2, steps // 12), (count, seeds)
    path = descend(y, eta, np.tile(w, (count, 1, 1)), np.tile(a, (count, 1)), steps, keep)
    fitted = [((path.w[-1] > 0) & (s * path.a[-1] > 0)[..., None]).any(axis=1)[:, s * y > 0] for s in (1, -1)]
    return Scan(
        q,
        np.stack([(tops(path, s) * eta / 2).mean(axis=0).reshape(shape) for s in (1, -1)]),
        np.stack([losses(path, s)[-keep:].mean(axis=0).reshape(shape) for s in (1, -1)]),
        np.stack([~f.all(axis=1).reshape(shape) for f in fitted]),
    )


class Decay(NamedTuple):
    """Block tops in units of the old 2/η and losses, before and after the step size is divided by four; (T, B) each."""

    before: list[Array]
    after: list[Array]
    loss: list[Array]


@lru_cache(maxsize=4)
def divide(labels: str, q: float, m: int, scale: float, at: int, then: int, seed: int, seeds: int) -> Decay:
    """Training at q for ``at`` steps and at q/4 for ``then``; each list has the positive block first."""
    path = train(labels, q, m, scale, at, seed, seeds)
    later = descend(path.y, path.eta / 4, path.w[-1], path.a[-1], then)
    before, after = ([tops(part, s) * path.eta / 2 for s in (1, -1)] for part in (path, later))
    return Decay(before, after, [np.concatenate([losses(path, s), losses(later, s)[1:]]) for s in (1, -1)])


def calmed(decay: Decay) -> tuple[Array, Array]:
    """Largest change in a step of a block top later than 20 steps after the decay, and its growth by the decay; (B,).

    Growth: mean over the last 20 steps over the mean of the last 20 steps before the decay, the larger of the blocks'.
    """
    swing = np.max([np.abs(np.diff(top[20:], axis=0)).max(axis=0) for top in decay.after], axis=0)
    pairs = zip(decay.before, decay.after, strict=True)
    with np.errstate(invalid="ignore"):  # a dead block has no curvature: nan
        return swing, np.max([after[-20:].mean(axis=0) / before[-20:].mean(axis=0) for before, after in pairs], axis=0)


# ---- checks of claims ----------------------------------------------------------------------------


def _on(labels: str, m: int, scale: float, seed: int, seeds: int, q: str) -> str:
    return f"labels {labels}, m = {m}, λ = {scale:g}, {q}, {seeds} initialisations from seed {seed} on"


def _above(path: Path, sign: int) -> Array:
    """Share of the steps between the 40th part and the quarter of the run at which a top is above 2/η, (B,)."""
    window = cut(path, len(path.w) // 40, max(len(path.w) // 4, 2))
    return np.asarray((tops(window, sign) * path.eta / 2 > 1).mean(axis=0))


def plus_alone(*, labels: str, m: int, scale: float, q_alone: float, steps: int, seed: int, seeds: int) -> Tested:
    """Share of the initialisations in which the positive block alone is unstable.

    Unstable: between the 40th part and a quarter of the run its top eigenvalue is above 2/η at a tenth of the steps or
    more. Alone: in that time the top of the negative block never is, and its labels are fitted to a loss below 1e-12.
    """
    path = train(labels, q_alone, m, scale, steps, seed, seeds)
    plus, minus = (_above(path, sign) for sign in (1, -1))
    fitted = losses(path, -1)[-1] < 1e-12
    share = ((plus >= 0.1) & (minus == 0) & fitted).mean()
    return Tested(float(share), seeds, _on(labels, m, scale, seed, seeds, f"q₊ = {q_alone:g}"))


def both_settle(*, labels: str, m: int, scale: float, q_plus: float, steps: int, seed: int, seeds: int) -> Tested:
    """Share of the initialisations in which both blocks are unstable and settle at 2/η, each unmoved by the other.

    Unstable as in the claim above. Settled: the mean of the top eigenvalue over the last twelfth of the run is within
    2 % of 2/η. Unmoved: from the 40th part of the run on no neuron is active on labels of the other sign, and the
    errors on the labels of one sign remain the same to the last bit if all neurons of the other sign are deleted.
    """
    path, first = train(labels, q_plus, m, scale, steps, seed, seeds), steps // 40
    end = cut(path, steps + 1 - max(2, steps // 12), steps + 1)
    good = ~coupled(path)[first:].any(axis=0)
    for sign in (1, -1):
        level, kept = (tops(end, sign) * path.eta / 2).mean(axis=0), sign * path.a[first] > 0
        good &= (_above(path, sign) >= 0.1) & (np.abs(level - 1) <= 0.02)
        w, a = path.w[first] * kept[..., None], path.a[first] * kept
        rest = descend(path.y, path.eta, w, a, steps - first, 0)
        good &= (rest.error == path.error[first:])[..., sign * path.y > 0].all(axis=(0, 2))
    return Tested(float(good.mean()), seeds, _on(labels, m, scale, seed, seeds, f"q₊ = {q_plus:g}"))


def admitted_edge(
    *, labels: str, m: int, scale: float, fractions: list[float], steps: int, seed: int, seeds: int
) -> Tested:
    """Number of runs at step sizes η = c/L, L of Lemma A.1 with A = 2, that are unstable.

    Unstable: between the 40th part and a quarter of the run, the largest eigenvalue of the Hessian is above 2/η at a
    tenth of the steps or more. The lemma admits c < 1.
    """
    size = sizes(np.array(parse_labels(labels)))[0]
    q = [c * size / (size + 4 * m * scale**2) for c in fractions]
    count = sum(int((_above(train(labels, v, m, scale, steps, seed, seeds), 0) >= 0.1).sum()) for v in q)
    step_sizes = "η = c/L with c = " + ", ".join(f"{c:g}" for c in fractions)
    return Tested(float(count), len(q) * seeds, _on(labels, m, scale, seed, seeds, step_sizes))


def bounded_above_edge(
    *, labels: str, m: int, scale: float, q_plus: float, steps: int, seed: int, seeds: int
) -> Tested:
    """Number of runs of FG's model that exceed 2/η for long and converge all the same.

    For long: at a tenth of the steps between the 40th part and a quarter of the run. Converge: the loss is at no step
    more than 1.5 times the first, and in the end less than a hundredth of it.
    """
    path = train(labels, q_plus, m, scale, steps, seed, seeds)
    loss = losses(path, 1) + losses(path, -1)
    converges = (loss.max(axis=0) <= 1.5 * loss[0]) & (loss[-1] < 0.01 * loss[0])
    count = int(((_above(path, 0) >= 0.1) & converges).sum())
    return Tested(float(count), seeds, _on(labels, m, scale, seed, seeds, f"q₊ = {q_plus:g}"))


def decay_regrowth(*, labels: str, m: int, scale: float, q_plus: float, decay_at: int, seed: int, seeds: int) -> Tested:
    """Share of the initialisations in which dividing the step size by four ends the oscillation and sharpness grows.

    Ends: later than 20 steps after the decay no block top changes by more than 1 % of the old 2/η in a step. Grows: 400
    steps after the decay one of the block tops is at least 10 % above its mean over the last 20 steps before.
    """
    swing, growth = calmed(divide(labels, q_plus, m, scale, decay_at, 400, seed, seeds))
    share = ((swing <= 0.01) & (growth >= 1.1)).mean()
    where = f"q₊ = {q_plus:g}, a quarter of it from step {decay_at} on"
    return Tested(float(share), seeds, _on(labels, m, scale, seed, seeds, where))


def decay_calms(*, labels: str, m: int, scale: float, q_plus: float, decay_at: int, seed: int, seeds: int) -> Tested:
    """Share of the initialisations in which dividing the step size by four ends an oscillation that was there before.

    Ends: later than 20 steps after the decay no block top changes by more than 1 % of the old 2/η in a step. Was there:
    in the last 20 steps before, each changed by more than that.
    """
    decay = divide(labels, q_plus, m, scale, decay_at, 400, seed, seeds)
    was = np.min([np.abs(np.diff(top[-20:], axis=0)).max(axis=0) for top in decay.before], axis=0)
    share = ((calmed(decay)[0] <= 0.01) & (was > 0.01)).mean()
    where = f"q₊ = {q_plus:g}, a quarter of it from step {decay_at} on"
    return Tested(float(share), seeds, _on(labels, m, scale, seed, seeds, where))


def descent(*, trials: int, level: float, seed: int) -> Tested:
    r"""Number of steps that raised the value, on random functions whose curvature never exceeds ``level``·2/η.

    :math:`\frac12\theta^\top A\theta + \sum_i c_i\cos(\langle b_i,\theta\rangle+\varphi_i)` in six dimensions, half of
    them quadratic (c = 0), with :math:`\lambda_{max}(A)+\sum|c_i|\|b_i\|^2` as the bound; 60 steps, up to rounding.
    """
    rng, size, waves = np.random.default_rng(seed), 6, 4
    basis = np.linalg.qr(rng.normal(size=(trials, size, size)))[0]
    matrix = (basis * rng.uniform(-0.2, 1, (trials, 1, size))) @ basis.transpose(0, 2, 1)
    b, phase = rng.normal(size=(trials, waves, size)), rng.uniform(0, 2 * np.pi, (trials, waves))
    c = rng.normal(size=(trials, waves)) * (np.arange(trials) % 2)[:, None]
    bound = np.linalg.eigvalsh(matrix)[:, -1] + (np.abs(c) * (b**2).sum(axis=2)).sum(axis=1)
    theta, before, rises = rng.normal(size=(trials, size)), np.full(trials, np.inf), 0
    for _ in range(61):
        angle = (b @ theta[..., None])[..., 0] + phase
        pull = (matrix @ theta[..., None])[..., 0]
        value = (theta * pull).sum(axis=1) / 2 + (c * np.cos(angle)).sum(axis=1)
        rises += int((value > before + 1e-12 * (1 + np.abs(value))).sum())
        before = value
        gradient = pull - ((c * np.sin(angle))[..., None] * b).sum(axis=1)
        theta = theta - (2 * level / bound)[:, None] * gradient
    return Tested(float(rises), 60 * trials, f"random quadratics and sums of waves, curvature at most {level:g} · 2/η")


def quadratic_divergence(*, trials: int, low: float, high: float, seed: int) -> Tested:
    r"""Number of random starts that did not diverge, on quadratics whose largest eigenvalue is between the two · 2/η.

    Six dimensions, the other eigenvalues uniform between 0 and 2/η. Diverged: after at most 2,000 steps the distance to
    the minimum is a million times what it was.
    """
    rng, size = np.random.default_rng(seed), 6
    basis = np.linalg.qr(rng.normal(size=(trials, size, size)))[0]
    spectrum = rng.uniform(0, min(1, low), (trials, 1, size))
    spectrum[..., 0] = rng.uniform(low, high, (trials, 1))
    update = np.eye(size) - 2 * (basis * spectrum) @ basis.transpose(0, 2, 1)
    theta = rng.normal(size=(trials, size, 1))
    first, far = np.linalg.norm(theta, axis=1), np.zeros((trials, 1), dtype=bool)
    for _ in range(2000):
        theta = np.where(far[..., None], theta, update @ theta)
        far |= np.linalg.norm(theta, axis=1) > 1e6 * first
    return Tested(float((~far).sum()), trials, f"random quadratics, largest eigenvalue {low:g} to {high:g} · 2/η")


CHECKS: dict[str, Callable[..., Tested]] = {
    "descent": descent,
    "quadratic_divergence": quadratic_divergence,
    "bounded_above_edge": bounded_above_edge,
    "admitted_edge": admitted_edge,
    "plus_alone": plus_alone,
    "both_settle": both_settle,
    "decay_regrowth": decay_regrowth,
    "decay_calms": decay_calms,
}
