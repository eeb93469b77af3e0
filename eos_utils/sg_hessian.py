r"""SG, section 2: the Hessian beside the Gram matrix M, of recorded runs, on random networks, and live on a small one.

With :math:`L = \frac1n\sum(f - y)^2` it is :math:`H = G + S`, :math:`G = \frac2nJ^\top J`,
:math:`S = \frac2n\sum_i D_i\nabla^2f_i`:

- :math:`M = \frac2nJJ^\top` has the non-zero spectrum of G: :math:`u\mapsto Ju` takes the eigenspace of G for λ ≠ 0
  into that of M, :math:`v\mapsto J^\top v` back; neither vanishes, for :math:`\|Ju\|^2 = \frac{n\lambda}2\|u\|^2`.
- The Fisher information matrix :math:`\frac1n\sum_i E_y[s_is_i^\top]`, :math:`s_i = \partial_\theta\log p(y|f_i)`, is G
  if p is Gaussian with mean f and variance ½, for then :math:`-\log p` is :math:`(f - y)^2` and a constant.
- With u, v₁ the first eigenvectors of G and M, :math:`\lambda_1(H) - \Lambda\approx u^\top Su`. At the edge
  :math:`D \approx (D^\top v_1)v_1`; then, to first order in η, :math:`u^\top Su = -\Delta\Lambda/(2\eta\Lambda)` with
  :math:`\Delta\Lambda = \Lambda(t+1) - \Lambda(t)`: the Hessian is the sharper where the next step lowers Λ.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jacrev

from eos_utils.curvature import Compression, GaussNewton, Hessian, dense
from eos_utils.experiment import Experiment
from eos_utils.fg_theory import Array, Tested
from eos_utils.gram import Gram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.phases import Mask, first_crossing
from eos_utils.sg_identities import FIRST, FULLY_CONNECTED
from eos_utils.store import root
from eos_utils.terms import span, terms

if TYPE_CHECKING:
    import xarray as xr

NAN = float("nan")
IntArray = np.ndarray[Any, np.dtype[np.int64]]
PARTS = ("all", "before", "after")
RECORD = "bench/results/sg_input_spectra.json"

# ---- recorded runs -------------------------------------------------------------------------------


class Both(NamedTuple):
    """At the steps with both eigenvalues, (k,): the step, λ₁(H), λ₁(M), ‖D‖/√n, and ΔΛ of the step after (or nan)."""

    step: Array
    hessian: Array
    gram: Array
    residual: Array
    change: Array
    eta: Array

    @property
    def ratio(self) -> Array:
        """λ₁(H)/λ₁(M)."""
        return self.hessian / self.gram

    @property
    def foreseen(self) -> Array:
        """The ratio to first order, 1 - ΔΛ/(2ηΛ²)."""
        return 1 - self.change / (2 * self.eta * self.gram**2)


def both(run: xr.Dataset, part: str = "all", **rules: Any) -> Both:
    """The two largest eigenvalues side by side; ``part``: 'before' the first crossing of 2/η, 'after' it, or 'all'.

    A run that does not cross, or begins above 0.9 of the edge, has no 'after', and all of it is 'before'.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r} is unknown; choose one of {', '.join(PARTS)}")
    observed = run["observed"].values
    steps = np.intersect1d(run["measured"].values, observed)
    crossing = first_crossing(run, **rules) if part != "all" else None
    at = np.inf if crossing is None else observed[crossing]
    steps = steps[steps < at] if part == "before" else steps[steps >= at] if part == "after" else steps
    here = run.sel(observed=steps)
    after = run["sharpness"].reindex(observed=steps + 1).values
    loss, gram = run["loss"].sel(step=steps).values, here["sharpness"].values
    hessian = run["eigenvalue"].sel(measured=steps).values[:, 0].astype(float)
    return Both(steps, hessian, gram, np.sqrt(loss), after - gram, run["eta"].sel(step=steps).values)


def hessian_apart(run: xr.Dataset, part: str = "all", quantile: float = 0.95, **rules: Any) -> float:
    """|λ₁(H)/λ₁(M) - 1|, a quantile over the measured steps; nan where the part has none."""
    apart = np.abs(both(run, part, **rules).ratio - 1)
    return float(np.quantile(apart, quantile)) if len(apart) else NAN


def hessian_ratio(run: xr.Dataset, part: str = "all", quantile: float = 0.5, **rules: Any) -> float:
    """λ₁(H)/λ₁(M), a quantile over the measured steps."""
    ratio = both(run, part, **rules).ratio
    return float(np.quantile(ratio, quantile)) if len(ratio) else NAN


def _clear(found: Both, least: float) -> Mask:
    return np.asarray((np.abs(found.ratio - 1) >= least) & np.isfinite(found.change))


def foreseen_signs(runs: Iterable[xr.Dataset], least: float = 0.01, **rules: Any) -> tuple[int, int]:
    """Of the measured steps after the crossing with |λ₁(H)/λ₁(M) - 1| >= ``least``: at how many its sign is that of
    -ΔΛ, and how many there are.
    """
    right = total = 0
    for found in (both(run, "after", **rules) for run in runs):
        clear = _clear(found, least)
        right += int((np.sign(found.ratio - 1) == -np.sign(found.change))[clear].sum())
        total += int(clear.sum())
    return right, total


def foreseen_error(run: xr.Dataset, least: float = 0.01, **rules: Any) -> float:
    """Median of |ratio - foreseen|/|ratio - 1| over the same steps of one run."""
    found = both(run, "after", **rules)
    clear = _clear(found, least)
    off = np.abs(found.ratio - found.foreseen)[clear] / np.abs(found.ratio - 1)[clear]
    return float(np.median(off)) if len(off) else NAN


def moved(run: xr.Dataset) -> Array:
    """‖λ(t) - λ(0)‖/‖λ(0)‖ of the leading eigenvalues of M, at the recorded spectra."""
    values = run["gram_eigenvalue"].values.astype(float)
    return np.asarray(np.linalg.norm(values - values[0], axis=1) / np.linalg.norm(values[0]))


def gram_moved(run: xr.Dataset) -> float:
    """The largest ‖λ(t) - λ(0)‖/‖λ(0)‖ of the leading eigenvalues of M; at most ‖M(t) - M(0)‖_F/‖λ(0)‖."""
    return float(moved(run).max())


def sharpness_moved(run: xr.Dataset) -> float:
    """The largest |Λ(t)/Λ(0) - 1| of the run."""
    values = run["sharpness"].values
    return float(np.abs(values / values[0] - 1).max())


def first_vector(run: xr.Dataset) -> float:
    """The least |⟨v₁(0), v₁(t)⟩| of the run."""
    return float(run["kept"].values[:, 0].min())


def other_share(run: xr.Dataset) -> Array:
    """The largest |λ(S)| over λ₁(G), at the steps with both terms."""
    size = np.maximum(run["rest_top"].values, -run["rest_bottom"].values)
    return np.asarray(size / run["gauss_newton"].values)


def other_term(run: xr.Dataset, quantile: float = 0.95) -> float:
    """The largest |λ(S)| over λ₁(G), a quantile over the steps with both terms; nan for a run without them."""
    return float(np.quantile(other_share(run), quantile)) if "rest_top" in run else NAN


STATISTICS: dict[str, Callable[..., float]] = {
    f.__name__: f for f in (hessian_apart, gram_moved, sharpness_moved, other_term)
}

# ---- random networks: one spectrum, three names --------------------------------------------------


def problems(trials: int) -> Iterator[tuple[Objective, Tensor]]:
    """Random objectives with one to three outputs, fully connected and convolutional in turn, in float64."""
    generator = np.random.default_rng(FIRST)
    kinds = (*FULLY_CONNECTED, "convolutional")
    for i in range(trials):
        n, outputs, width = int(generator.integers(2, 9)), 1 + i % 3, int(generator.integers(2, 6))
        kind = kinds[i % len(kinds)]
        if kind == "convolutional":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(FIRST + i)
                body = [nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, width, 3), nn.ELU(), nn.Flatten(1)]
                model = nn.Sequential(*body, nn.Linear(4 * width, outputs))
        else:
            depth = int(generator.integers(1, 4))
            model = fully_connected(16, width, depth, outputs, kind, bool(i % 2), "pytorch", FIRST + i)
        x, y = (torch.from_numpy(generator.normal(size=(n, size))) for size in (16, outputs))
        objective = Objective(model, "mse", x, y)
        yield objective, objective.initial() * float(generator.uniform(0.5, 2))


ON = "random networks with one to three outputs, fully connected and convolutional"


class Case(NamedTuple):
    """One of them: at θ the Jacobian (nc, P), by autograd, and G (P, P), from products."""

    objective: Objective
    theta: Tensor
    j: Tensor
    g: Tensor

    @property
    def m(self) -> Tensor:
        """M, (nc, nc)."""
        return 2 / self.objective.n * self.j @ self.j.T


@lru_cache(maxsize=4)
def cases(trials: int) -> tuple[Case, ...]:
    """So many of :func:`problems` with their matrices."""
    found = []
    with warnings.catch_warnings():  # torch's forward mode, which products with a convolution use, warns of itself
        warnings.simplefilter("ignore", FutureWarning)
        for o, theta in problems(trials):
            j = jacrev(lambda t, o=o: o._call(t, o.x).reshape(-1))(theta)
            found.append(Case(o, theta, j, dense(GaussNewton(o, theta))))
    return tuple(found)


def shared_spectrum(scale: float = 2.0, trials: int = 60) -> Tested:
    """Largest difference between the sorted eigenvalues of G and those of (κ/n)JJᵀ, zeros filled up, relative to the
    largest; κ = ``scale`` is 2 for this loss, and another one is the control.
    """
    worst = 0.0
    for case in cases(trials):
        gram = torch.linalg.eigvalsh(scale / 2 * case.m).flip(0)
        fisher = torch.linalg.eigvalsh(case.g).flip(0)
        longer, shorter = sorted((gram, fisher), key=len, reverse=True)
        filled = torch.cat([shorter, shorter.new_zeros(len(longer) - len(shorter))])
        worst = max(worst, float((longer - filled).abs().max() / gram[0]))
    return Tested(worst, trials, ON)


def carried_eigenvectors(floor: float = 1e-4, trials: int = 60) -> Tested:
    """Largest ‖MJu - λJu‖/(λ‖Ju‖) over the eigenpairs of G with λ above ``floor`` times the largest."""
    worst, count = 0.0, 0
    for case in cases(trials):
        values, vectors = torch.linalg.eigh(case.g)
        chosen = values > floor * values[-1]
        images = case.j @ vectors[:, chosen]
        off = case.m @ images - values[chosen] * images
        worst = max(worst, float((off.norm(dim=0) / (values[chosen] * images.norm(dim=0))).max()))
        count += int(chosen.sum())
    return Tested(worst, count, f"eigenpairs of {ON}")


def fisher_apart(variance: float = 0.5, trials: int = 60) -> Tested:
    """Largest ‖FIM - G‖/‖G‖, FIM for independent Gaussian outputs of this ``variance``, from its definition.

    The expectation over the model's labels is a sum over Gauss–Hermite nodes, exact for the squares that occur.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()
    worst = 0.0
    for o, theta, _, g in cases(trials):
        c, f = o.y.shape[1], o.outputs(theta)
        grid = torch.tensor(list(itertools.product(nodes.tolist(), repeat=c)), dtype=f.dtype)
        weight = torch.tensor([float(np.prod(w)) for w in itertools.product(weights.tolist(), repeat=c)], dtype=f.dtype)
        labels = f + variance**0.5 * grid[:, None]

        def log_density(t: Tensor, o: Objective = o, y: Tensor = labels) -> Tensor:
            return -(y - o._call(t, o.x)).square().sum(dim=-1) / (2 * variance)

        score = jacrev(log_density)(theta)  # (nodes, n, P)
        fisher = torch.einsum("q,qip,qir->pr", weight, score, score) / o.n
        worst = max(worst, float(torch.linalg.norm(fisher - g) / torch.linalg.norm(g)))
    return Tested(worst, trials, f"{ON}, Gaussian labels of variance {variance:g}")


# ---- the inputs ----------------------------------------------------------------------------------

SUBSETS: dict[str, dict[str, Any]] = {
    "first 1,000 images": {"labels": "vehicles"},
    "1,000 airplanes and automobiles": {"labels": "pair", "classes": (1, 0)},
}
CENTRED = "minus each feature's mean"
PREPROCESSINGS: dict[str, Callable[[Array], Array]] = {  # of (n, 3, 1024) pixels in [0, 1]
    "pixels as they are": lambda x: x,
    CENTRED: lambda x: x - x.mean(axis=0),
    "... and over its standard deviation": lambda x: (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-12),
    "minus each channel's mean, over its deviation": lambda x: (
        (x - x.mean(axis=(0, 2), keepdims=True)) / x.std(axis=(0, 2), keepdims=True)
    ),
    "minus each image's mean": lambda x: x - x.mean(axis=(1, 2), keepdims=True),
}
KEPT = 30


class Inputs(NamedTuple):
    """The spectrum of XᵀX: leading eigenvalues, the rank, and the largest λᵢ/λᵢ₊₁ among the non-zero with i ≥ 2."""

    leading: Array
    rank: int
    later: float

    @property
    def ratio(self) -> float:
        """λ₁/λ₂."""
        return float(self.leading[0] / self.leading[1])


def spectrum_of(x: Array) -> Inputs:
    """Of inputs (n, ...)."""
    flat = x.reshape(len(x), -1)
    values = np.linalg.eigvalsh(flat @ flat.T)[::-1]
    values = values[values > 1e-10 * values[0]]
    return Inputs(values[:KEPT], len(values), float((values[1:-1] / values[2:]).max()))


def measure_inputs() -> dict[str, dict[str, Inputs]]:
    """Subset and preprocessing to spectrum, from the images."""
    from eos_utils.data import cifar10

    found = {}
    for name, chosen in SUBSETS.items():
        pixels = cifar10(1000, preprocessing="scale", **chosen).x.double().numpy().reshape(1000, 3, -1)
        found[name] = {what: spectrum_of(f(pixels)) for what, f in PREPROCESSINGS.items()}
    return found


def keep_inputs() -> None:
    """Measures the images and writes the file that :func:`inputs` reads."""
    kept = {
        subset: {
            what: [[float(f"{v:.12g}") for v in s.leading], s.rank, float(f"{s.later:.12g}")] for what, s in row.items()
        }
        for subset, row in measure_inputs().items()
    }
    text = json.dumps(kept, ensure_ascii=False, separators=(",", ":"))
    (root() / RECORD).write_text(text + "\n", encoding="utf-8")


def inputs() -> dict[str, dict[str, Inputs]]:
    """:func:`measure_inputs` as it is kept in the repository, so that nobody needs the images."""
    kept = json.loads((root() / RECORD).read_text(encoding="utf-8"))
    return {
        subset: {what: Inputs(np.array(leading), rank, later) for what, (leading, rank, later) in row.items()}
        for subset, row in kept.items()
    }


ON_INPUTS = "the first 1,000 CIFAR-10 images, and the first 1,000 airplanes and automobiles, minus each feature's mean"


def ratio_from_three() -> Tested:
    """The larger |λ₁/λ₂ - 3|/3 of both subsets, centred by feature."""
    found = [row[CENTRED] for row in inputs().values()]
    return Tested(max(abs(s.ratio - 3) / 3 for s in found), len(found), ON_INPUTS)


def later_gap() -> Tested:
    """The largest λᵢ/λᵢ₊₁ with i ≥ 2 over λ₁/λ₂, the larger of both subsets, centred by feature."""
    found = [row[CENTRED] for row in inputs().values()]
    return Tested(max(s.later / s.ratio for s in found), len(found), ON_INPUTS)


CHECKS: dict[str, Callable[..., Tested]] = {
    f.__name__: f for f in (shared_spectrum, carried_eigenvectors, fisher_apart, ratio_from_three, later_gap)
}

# ---- a small network, step by step ---------------------------------------------------------------


class Watched(NamedTuple):
    """A small live run: Λη/2 at all steps (T,), and at some, (k,), both terms.

    ``hessian``, ``along`` (:math:`u^\\top Su`), ``foreseen``, ``top`` and ``bottom`` (the ends of S) are over Λ.
    """

    scaled: Array
    step: IntArray
    loss: Array
    hessian: Array
    along: Array
    foreseen: Array
    top: Array
    bottom: Array


@lru_cache(maxsize=4)
def watch(experiment: Experiment, start: float = 0.75, steps: int = 300, before: int = 12, after: int = 16) -> Watched:
    """The experiment's network on 100 digits at most, 1 against 8, from Λη/2 = ``start``; in float64.

    Both terms are taken around the peak of the first excursion, where the run ends (or after ``steps``). The inputs are
    reduced to their span, which changes nothing.
    """
    small = dataclasses.replace(
        experiment, dataset="digits", labels="pair", classes=(1, 8), n=min(experiment.n, 100), dtype="float64"
    )
    objective = small.objective(torch.device("cpu"), small.dataset_loaded())
    theta, plane = objective.initial(), span(objective)
    if plane is not None:
        theta = Compression(Hessian(objective, theta), plane).restrict(theta[None])[0]
        model = fully_connected(plane.x.shape[1], small.width, small.depth, 1, small.activation, small.bias)
        objective = Objective(model, "mse", plane.x, objective.y)
    gram, course, losses, values = Gram(objective), [theta], [], []
    eta = 2 * start / float(torch.linalg.eigvalsh(gram.at(theta).M)[-1])
    for _ in range(steps + 1):
        loss, gradient, _ = objective.gradient(course[-1])
        values.append(float(torch.linalg.eigvalsh(gram.at(course[-1]).M)[-1]))
        losses.append(float(loss))
        course.append(course[-1] - eta * gradient)
        peak = int(np.argmax(values))
        if values[peak] * eta > 2 and len(values) > peak + after + 1 and values[-1] < 0.8 * values[peak]:
            break  # the first excursion is over
    level = np.array(values)
    peak = min(int(level.argmax()), len(level) - 2)  # the change after the last step is not known
    chosen = np.arange(max(peak - before, 0), min(peak + after, len(level) - 1))
    found = [terms(objective, course[t], int(t)) for t in chosen]
    hessian, _, top, bottom = np.array([f.values for f in found]).T
    here = level[chosen]
    change = (level[chosen + 1] - here) / (2 * eta * here**2)
    along = np.array([f.along for f in found]) / here
    parts = (hessian / here, along, -change, top / here, bottom / here)
    return Watched(level * eta / 2, chosen, np.array(losses)[chosen], *parts)
