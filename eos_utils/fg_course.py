r"""Trajectories of FG's model from a small initialisation, and what Theorem 3.1 speaks of along them.

The theorem leaves r, ε, :math:`a_\pm`, τ and the ends of its phases undefined. **Readings** (ours):
:math:`r = \|d_+\|/\|d_-\|`; ε a number with :math:`r\varepsilon < 1`; phase 1 ends at
:math:`t_1 = \varepsilon\ln(1/\lambda)/(\eta\|d_-\|)`, when the neurons have grown from λ to about
:math:`\lambda^{1-r\varepsilon}`; phase 2 ends at :math:`t_2`, when the share :math:`\sigma_+` of the positive labels
is 0.95; phase 3 is the rest. :math:`a_\pm = 2\eta\|d_\pm\|`, and each sign has a midpoint :math:`\tau_\pm` of its own.

**Why a logistic function bounds the Gauss–Newton part from below.** One step of the map
:math:`\sigma' = \sigma(1+qu)^2,\ u = 1-\sigma`, moves :math:`\ln\frac\sigma{1-\sigma}` by
:math:`2\ln(1+qu) - \ln(1-2q\sigma-q^2\sigma u) = 2q + q^2(3\sigma-1) + O(q^3)`: by less than 2q below σ = 1/3 and by
more above it. So the logistic function of rate 2q through σ = 1/3 lies below the map on both sides, up to
:math:`O(q^3)` a step; one through σ = 1/2 does not. The closed form for τ supposes the early rate
:math:`2\ln(1+q) \approx 2q - q^2` up to σ = 1/2 and so comes :math:`\frac34\ln2 = 0.52` steps late, whatever q is: the
logistic function around it lies below the map as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from eos_utils import fg_theory as fg
from eos_utils.experiment import rational
from eos_utils.fg_theory import Array, Indices, Network, Problem

RISEN = 0.95  # the share at which a block counts as fitted, and at which phase 2 ends
LONGEST = 60_000  # steps of a trajectory, a guard against step sizes for which it would take for ever
SIGNS = (1, -1)


def fractions(text: str) -> list[Fraction]:
    """The numbers of a text such as '1, -2/3', exactly."""
    parts = [part.strip() for part in text.split(",")]
    return [
        -rational(part[1:].strip(), "labels") if part.startswith("-") else rational(part, "labels") for part in parts
    ]


def parse_labels(text: str) -> tuple[float, ...]:
    """Labels such as '1, 1, -2/3, -2/3', parsed and never evaluated, and checked against Assumption 2.1.

    Raises ValueError for what is no number, for a zero, and unless the positive labels outweigh the negative ones.

    >>> parse_labels("1, 3/4, -0.5")
    (1.0, 0.75, -0.5)
    """
    labels = tuple(float(label) for label in fractions(text))
    positive, negative = (sum(v * v for v in labels if sign * v > 0) for sign in SIGNS)
    if not positive > negative > 0:
        raise ValueError(
            f"labels={text!r}: labels of both signs are needed, the positive ones with the larger sum of squares "
            "(Assumption 2.1); change all signs if it is the other way round"
        )
    return labels


def labels_of_ratio(ratio: float) -> str:
    r"""Two positive labels 1 and two negative ones :math:`-1/r`, so that :math:`\|d_+\|/\|d_-\| = r`."""
    return f"1, 1, -{1 / ratio!r}, -{1 / ratio!r}"


def inputs(n: int, seed: int, correlation: float = 0.0) -> Array:
    """Unit vectors for even seeds, rotated in n + 2 dimensions for odd ones; or with equal inner products, (n, d)."""
    if not correlation:
        return fg.orthonormal(n) if seed % 2 == 0 else fg.orthonormal(n, n + 2, seed)
    gram = (1 - correlation) * np.eye(n) + correlation * np.ones((n, n))
    return np.asarray(np.linalg.cholesky(gram), dtype=float)


@dataclass(frozen=True)
class Course:
    """A trajectory: ``w`` (T + 1, m, d), ``a`` (T + 1, m), the sets of Assumption 2.2, and where it started."""

    p: Problem
    w: Array
    a: Array
    plus: Indices
    minus: Indices
    scale: float

    @property
    def last(self) -> int:
        """T, the number of steps."""
        return len(self.a) - 1

    @property
    def ratio(self) -> float:
        r""":math:`r = \|d_+\|/\|d_-\|`."""
        return self.p.size(1) / self.p.size(-1)

    def net(self, t: int) -> Network:
        """The network at step t."""
        return Network(self.w[t], self.a[t])

    def members(self, sign: int) -> Indices:
        r""":math:`S_{1,\pm}`."""
        return self.plus if sign > 0 else self.minus

    @property
    def start(self) -> int:
        """The step from which the closed forms are applied: that of the decoupling, or 0."""
        return self.decoupled or 0

    def rho(self, sign: int) -> float:
        """ρ at the decoupling; it hardly moves afterwards."""
        return fg.evenness(self.net(self.start), self.members(sign))

    def midpoint(self, sign: int) -> float:
        r""":math:`\tau_\pm`, predicted from the weights at the decoupling, which are still of the order of λ."""
        return self.start + fg.midpoint(self.net(self.start), self.p, self.members(sign), sign)

    def share(self, sign: int) -> Array:
        r""":math:`\sigma_\pm`, (T + 1,)."""
        return (self.a[:, self.members(sign)] ** 2).sum(axis=1) / (self.p.n * self.p.size(sign))

    def time(self, sign: int, level: float) -> float:
        """The step, interpolated on the logarithm, at which the share first reaches ``level``; nan if it never does."""
        share = self.share(sign)
        t = int(np.argmax(share >= level))
        if share[t] < level or t == 0:
            return float("nan")
        return t - 1 + float(np.log(level / share[t - 1]) / np.log(share[t] / share[t - 1]))

    def on(self) -> NDArrayBool:
        """Which neuron is active on which input, (T + 1, m, n)."""
        return self.w @ self.p.x.T > 0

    def quotients(self, sign: int) -> tuple[Array, Array]:
        r""":math:`\lambda_\pm` at every step, and its Gauss–Newton part: (T + 1,) each, without forming a Hessian."""
        p, d, members = self.p, self.p.d(sign), self.members(sign)
        size, pre = np.linalg.norm(d), self.w @ p.x.T
        values = np.maximum(pre, 0)
        residual = p.y - np.einsum("tmn,tm->tn", values, self.a)
        towards, on = p.x @ d, pre[:, members] > 0
        jv = np.einsum("tmn,tm->tn", on * towards, self.a[:, members]) + size * values[:, members].sum(axis=1)
        norm = 2 * len(members) * size**2
        gauss_newton = (jv**2).sum(axis=1) / (p.n * norm)
        rest = 2 * size * np.einsum("tmn,tn->t", on, residual * towards) / (p.n * norm)
        return gauss_newton - rest, gauss_newton

    def phases(self, epsilon: float) -> tuple[int, int]:
        """The last step of phase 1 and of phase 2, in our reading."""
        if not 0 < self.ratio * epsilon < 1:
            raise ValueError(f"epsilon={epsilon}: the exponent 1 - r ε must be positive, and r is {self.ratio:.3g}")
        return int(epsilon * np.log(1 / self.scale) / self.p.q(-1)), self.fitted

    @property
    def fitted(self) -> int:
        """The first step at which 95 % of the positive labels are fitted by S₊, the end of phase 2 in our reading."""
        end = self.time(1, RISEN)
        if np.isnan(end):
            raise ValueError(
                f"S₊ does not fit {RISEN:.0%} of the positive labels within {self.last} steps: take more steps, or a "
                "smaller initialisation"
            )
        return int(np.ceil(end))

    @cached_property
    def decoupled(self) -> int | None:
        """The step from which no neuron with a > 0 is active on a negative label or the reverse; None if never."""
        wrong = (self.on() & (self.a[:, :, None] * self.p.y < 0)).any(axis=(1, 2))
        steps = np.flatnonzero(wrong)
        start = int(steps[-1]) + 1 if len(steps) else 0
        return start if start <= self.last else None


NDArrayBool = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def run(net: Network, p: Problem, scale: float, steps: int, plus: Indices, minus: Indices) -> Course:
    """Gradient descent from ``net``."""
    path = fg.descend(net, p, steps)
    return Course(p, np.stack([n.w for n in path]), np.stack([n.a for n in path]), plus, minus, scale)


@lru_cache(maxsize=64)
def course(
    labels: str, m: int, scale: float, eta: str, seed: int, steps: int = 0, correlation: float = 0.0
) -> Course | None:
    """The trajectory of one seed; None if S₊ or S₋ is empty.

    ``steps``: so many, or 0 until both blocks have settled, or -1 until the positive one has (phases 1 and 2).
    """
    y = parse_labels(labels)
    p = Problem(inputs(len(y), seed, correlation), np.array(y), float(rational(eta)))
    net = fg.initial(m, p.x.shape[1], scale, seed)
    plus, minus = (fg.aligned_set(net, p, sign) for sign in SIGNS)
    if not len(plus) or not len(minus):
        return None
    blocks = ((plus, 1), (minus, -1)) if steps >= 0 else ((plus, 1),)
    settled = max(fg.midpoint(net, p, members, sign) + 5 / p.q(sign) for members, sign in blocks)
    return run(net, p, scale, steps if steps > 0 else int(min(settled, LONGEST)), plus, minus)


def courses(seeds: int, seed: int, m: int, **setting: Any) -> list[Course]:
    """The first ``seeds`` trajectories, from ``seed`` on, that meet Assumption 2.2; the rest as in :func:`course`."""
    found: list[Course] = []
    for tried in range(seed, seed + 50 * seeds):
        one = course(m=m, seed=tried, **setting)
        found += [one] if one else []
        if len(found) == seeds:
            return found
    raise ValueError(f"m={m}: Assumption 2.2 is met by {len(found)} of {50 * seeds} seeds only; take more neurons")


def lower_bound(c: Course, sign: int, prefactor: str = "plateau", rate: float = 1.0) -> Array:
    """A prefactor times the logistic function of rate ``rate`` · 2q around the predicted τ±, at every step."""
    t = np.arange(c.last + 1)
    return height(c, sign, prefactor) / (1 + np.exp(-2 * rate * c.p.q(sign) * (t - c.midpoint(sign))))


def predicted_share(c: Course, sign: int) -> Array:
    """σ± from the decoupling on, by the map from the growing part of the weights there."""
    start = fg.seed_mass(c.net(c.start), c.p, c.members(sign), sign) / (c.p.n * c.p.size(sign))
    return fg.share_path(start, c.p.q(sign), c.last - c.start)


def closed_form(c: Course, sign: int) -> Array:
    """λ± from the decoupling on, as predicted from the weights there."""
    return np.asarray(fg.quotient(c.p, sign, predicted_share(c, sign), c.rho(sign)))


def height(c: Course, sign: int, prefactor: str) -> float:
    r"""Prefactor of a lower bound: 'printed', :math:`n\|d_\pm\|^2/(4|S|)`, or 'plateau', :math:`2\|d_\pm\|\rho_\pm`."""
    size = c.p.size(sign)
    printed = c.p.n * size**2 / (4 * len(c.members(sign)))
    return {"printed": printed, "plateau": 2 * size * c.rho(sign)}[prefactor]


def part_of(c: Course, sign: int, part: str) -> Array:
    """λ± at every step, 'full' or its 'gauss_newton' part."""
    full, gauss_newton = c.quotients(sign)
    return {"full": full, "gauss_newton": gauss_newton}[part]


class Spectrum(NamedTuple):
    """Steps, the eigenvalues there in falling order, and squared overlaps with eigenspaces."""

    steps: Array
    values: Array
    plus_top: Array  # of v₊ with the space of the eigenvalues within 1 % of the largest
    plus_bottom: Array  # ... of the smallest
    minus_nearest: Array  # rank (1 = largest) of the eigenvector that v₋ overlaps with most


def spectrum(c: Course, every: int) -> Spectrum:
    """Eigenvalues of the exact Hessian and where v± lie, at every ``every``-th step."""
    rows = []
    for t in range(0, c.last + 1, every):
        values, vectors = np.linalg.eigh(fg.hessian(c.net(t), c.p)[0])
        values, vectors = values[::-1], vectors[:, ::-1]
        shares = []
        for sign in SIGNS:
            v = fg.direction(c.p, c.members(sign), c.a.shape[1], sign)
            shares.append((v @ vectors) ** 2 / (v @ v))
        plus, minus = shares
        top, bottom = values >= 0.99 * values[0], values <= 0.99 * values[-1]
        rows.append((t, values, plus[top].sum(), plus[bottom].sum(), 1 + np.argmax(minus)))
    return Spectrum(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


def without(c: Course, sign: int, start: int) -> Course:
    """The same course from step ``start`` on with every neuron of this sign set to 0."""
    keep = sign * c.a[start] < 0
    net = Network(c.w[start] * keep[:, None], c.a[start] * keep)
    return run(net, c.p, c.scale, c.last - start, c.plus, c.minus)


def rise_rate(c: Course, sign: int) -> float:
    """The rate of the rise, ln 81 over the steps from σ = 0.1 to 0.9: what a logistic function has as its rate."""
    return float(np.log(81) / (c.time(sign, 0.9) - c.time(sign, 0.1)))


def rescaled(labels: str, eta: str, factor: int) -> dict[str, str]:
    """Labels in other units, and the step size that makes gradient descent the same up to these units."""
    return {
        "labels": ", ".join(str(factor * label) for label in fractions(labels)),
        "eta": str(rational(eta) / Fraction(factor)),
    }


def scan(scales: list[float], runs: int, **setting: Any) -> tuple[Array, Array]:
    """Observed rates of the rise over 2η‖d±‖, and observed midpoints: (2 signs, scales, runs) each."""
    found = [courses(runs, scale=scale, **setting) for scale in scales]
    rates = [[[rise_rate(c, sign) / (2 * c.p.q(sign)) for c in row] for row in found] for sign in SIGNS]
    return np.array(rates), np.array([[[c.time(sign, 0.5) for c in row] for row in found] for sign in SIGNS])


def phase2_ends(ratio: float, scales: list[float], runs: int, **setting: Any) -> Array:
    """The Gauss–Newton part of λ₋ at the end of phase 2, (scales, runs)."""
    rows = []
    for scale in scales:
        found = courses(runs, labels=labels_of_ratio(ratio), scale=scale, steps=-1, **setting)
        rows.append([c.quotients(-1)[1][c.fitted] for c in found])
    return np.array(rows)


def predictions(c: Course) -> list[list[str]]:
    """Rows of the table of predicted and observed numbers: what, predicted, observed (positive / negative block)."""
    h = np.linalg.eigvalsh(fg.hessian(c.net(c.last), c.p)[0])
    quotients, shares = [c.quotients(sign) for sign in SIGNS], [c.share(sign) for sign in SIGNS]
    crossings = [float(np.argmax(full > 0)) for full, _ in quotients]
    sizes, q, rho, tau = ([f(sign) for sign in SIGNS] for f in (c.p.size, c.p.q, c.rho, c.midpoint))

    def row(what: str, predicted: list[float], observed: list[float], digits: int = 5) -> list[str]:
        return [what, *(" / ".join(f"{v:.{digits}g}" for v in values) for values in (predicted, observed))]

    zero = [t + np.log(1 / (2 * r)) / (2 * k) for t, r, k in zip(tau, rho, q, strict=True)]
    map_error = [
        float(np.abs(predicted_share(c, s) - share[c.start :]).max()) for s, share in zip(SIGNS, shares, strict=True)
    ]
    return [
        row("early growth of Σa² per step, 2 ln(1+q)", [2 * np.log1p(k) for k in q], [_early(c, s) for s in SIGNS], 4),
        row("rate of the rise a±, 2η‖d±‖", [2 * k for k in q], [rise_rate(c, s) for s in SIGNS], 4),
        row("midpoint τ±, σ = 1/2", tau, [c.time(s, 0.5) for s in SIGNS]),
        row("step at which λ± turns positive", zero, crossings),
        row("smallest λ±, −‖d±‖", [-s for s in sizes], [full.min() for full, _ in quotients], 4),
        row(
            "final λ±, 2‖d±‖ρ±", [2 * s * r for s, r in zip(sizes, rho, strict=True)], [f[-1] for f, _ in quotients], 4
        ),
        row("largest eigenvalues at the end, 2‖d±‖", [2 * s for s in sizes], [h[-1], h[-2]], 4),
        row("largest error of the map σ′ = σ(1+q(1−σ))²", [0, 0], map_error, 2),
    ]


def _early(c: Course, sign: int) -> float:
    """Growth of the share per step while it is small, from the decoupling to 1 %."""
    share, end = c.share(sign), int(c.time(sign, 0.01))
    return float(np.log(share[end] / share[c.start]) / (end - c.start))
