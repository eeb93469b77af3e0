r"""SG, section 5: trends over a long time, the inner layers, and what drives the sharpness.

**The norm of every layer.** With pre-activations :math:`z_l = W_l\alpha_l` (no biases),
:math:`\partial L/\partial W_l = \frac2n\sum_iD_i\,\frac{\partial f_i}{\partial z_l}\alpha_{l,i}^\top`, so that gradient
flow moves

.. math:: \frac{d\|W_l\|^2}{dt} = -2\Bigl\langle\frac{\partial L}{\partial W_l}, W_l\Bigr\rangle
   = -\frac4n\sum_iD_i\Bigl\langle\frac{\partial f_i}{\partial z_l}, z_{l,i}\Bigr\rangle,

equation (2) for the last layer, whose z is f. For activations with :math:`\phi(z) = \phi'(z)z` the inner product is
:math:`f_i` in every layer: all squared norms move as :math:`\|A\|^2` does. Otherwise two layers differ by
:math:`\langle W_{l+1}^\top\partial f/\partial z_{l+1}, \phi(z_l) - \phi'(z_l)z_l\rangle`. A step of gradient descent
adds exactly :math:`\eta^2\|\partial L/\partial W_l\|^2`.

**The oscillation and the first layer.** With :math:`\delta = D^\top v_1` and :math:`s_l = v_1^\top M_lv_1/\Lambda` that
is :math:`\eta^2\frac2n\delta^2\Lambda s_l`, up to terms of R. In a motion of period two the first-order term is, in the
mean of two steps, :math:`-\frac{4\eta}n\delta^2` in every layer of a homogeneous network. At :math:`\Lambda = 2/\eta`
they add up to :math:`-\frac{4\eta}n\delta^2(1 - s_l)`: the layers shrink, except one that makes all of M.

**What drives Λ.** To first order :math:`d\log\Lambda = \sum_l\langle\partial_{W_l}\log\Lambda, dW_l\rangle`, a sum over
the layers that move; with v1 held, :math:`\nabla\Lambda = \frac4n\nabla^2\varphi\,g`, :math:`\varphi = v_1^\top F`,
:math:`g = \nabla\varphi`. At a wide random start of a linear network of L layers, for a residual across v1, the layers'
terms are as 0 : 1 : ... : L - 1, so that A makes 2/L of the sum (:func:`at_start`); with all layers equal, 1/L.
Interventions hold a part of the network and ask how much of the rise of log Λ is left.

*Inner* are all layers but the last, A. *Before* and *after*: the first crossing of 2/η (:mod:`eos_utils.anomalies`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eos_utils.anomalies import LEAST, part_of
from eos_utils.antiphase import pull
from eos_utils.data import digits
from eos_utils.fg_theory import Tested
from eos_utils.gram import Gram
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.phases import Array, examples, scaled, smooth
from eos_utils.sg_identities import FULLY_CONNECTED, ON_NETWORKS, problems

if TYPE_CHECKING:
    import xarray as xr

NAN = float("nan")
FIFTHS = 5


# ---- trends of a recorded run --------------------------------------------------------------------


def series(run: xr.Dataset, of: str) -> Array:
    """A series at every observed step: 'sharpness', 'norm_A2', or 'inner', the inner layers' squared norm."""
    if of == "inner":
        return np.asarray(run["layer_norm2"].values[:, :-1].astype(float).sum(axis=1))
    if of not in ("sharpness", "norm_A2"):
        raise ValueError(f"of={of!r} is unknown; choose sharpness, norm_A2 or inner")
    return np.asarray(run[of].values.astype(float))


def _values(run: xr.Dataset, values: Array, part: str, **rules: Any) -> Array | None:
    """Of a part of the run, both ends of its increments; None where it has fewer than twenty."""
    where = part_of(run, part, **rules)
    if where is None or where.stop - where.start < LEAST:
        return None
    return values[where.start : where.stop + 1]


def long_trend(run: xr.Dataset, of: str = "norm_A2", part: str = "after", **rules: Any) -> float:
    """The log of the mean over the last fifth of a part over the mean over its first fifth, of one series."""
    values = _values(run, series(run, of), part, **rules)
    if values is None:
        return NAN
    fifths = np.array_split(values, FIFTHS)
    return float(np.log(fifths[-1].mean() / fifths[0].mean()))


def long_trend_gap(run: xr.Dataset, part: str = "after", **rules: Any) -> float:
    """By how much the long trend of ‖A‖² exceeds that of the sharpness, both as log-ratios."""
    return long_trend(run, "norm_A2", part, **rules) - long_trend(run, "sharpness", part, **rules)


def level_off(run: xr.Dataset, part: str = "after", **rules: Any) -> float:
    """How far the mean of Λη/2 over a fifth of the part is from 1, for the fifth where that is farthest."""
    values = _values(run, scaled(run), part, **rules)
    return NAN if values is None else float(max(abs(x.mean() - 1) for x in np.array_split(values, FIFTHS)))


def inner_correlation(run: xr.Dataset, part: str = "after", absolute: bool = False, **rules: Any) -> float:
    """Correlation of the sharpness with the inner layers' total squared norm, values; ``absolute``: its size."""
    pair = [_values(run, series(run, of), part, **rules) for of in ("sharpness", "inner")]
    if pair[0] is None or pair[1] is None or not (pair[0].std() > 0 and pair[1].std() > 0):
        return NAN
    found = float(np.corrcoef(pair[0], pair[1])[0, 1])
    return abs(found) if absolute else found


def band_correlation(run: xr.Dataset, short: int = 11, long: int = 101, part: str = "after", **rules: Any) -> float:
    """Correlation of Λ and ‖A‖² in a band of frequencies: means over ``short`` steps less means over ``long`` steps.

    Both windows are odd; (1, 2, 1)/4 is applied first, as in :func:`eos_utils.anomalies.trend_correlation`.
    """
    pair = [_values(run, smooth(series(run, of)), part, **rules) for of in ("sharpness", "norm_A2")]
    if pair[0] is None or pair[1] is None or len(pair[0]) < long + LEAST:
        return NAN
    cut = (long - short) // 2
    x, y = (
        np.convolve(values, np.ones(short) / short, mode="valid")[cut : cut + len(values) - long + 1]
        - np.convolve(values, np.ones(long) / long, mode="valid")
        for values in (pair[0], pair[1])
    )
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else NAN


def layer_drift(run: xr.Dataset, part: str = "all", **rules: Any) -> float:
    """How far the layers' squared norms part, since the start of a part, over the largest change of one of them."""
    where = part_of(run, part, **rules)
    if where is None:
        return NAN
    norms = run["layer_norm2"].values[where.start : where.stop + 1].astype(float)
    moved = norms - norms[0]
    return float((moved.max(axis=1) - moved.min(axis=1)).max() / np.abs(moved).max())


def layer_change(run: xr.Dataset, layer: int = 0, part: str = "after", **rules: Any) -> float:
    """The change of a layer's squared norm over a part; ``layer``: 0 for the first, -1 for A."""
    where = part_of(run, part, **rules)
    if where is None:
        return NAN
    ends = run["layer_norm2"].values[[where.start, where.stop], layer].astype(float)
    return float(ends[1] - ends[0])


def second_order(run: xr.Dataset) -> Array:
    r""":math:`\sum\eta^2\frac2n(D^\top v_1)^2\Lambda` over the steps until each observed one, (T,).

    What the component along v1 adds, in second order, to the squared norms of all layers together.
    """
    eta = run["eta"].sel(step=run["observed"]).values.astype(float)
    each = 2 * eta**2 / examples(run) * run["Dv"].values.astype(float) ** 2 * run["sharpness"].values
    return np.concatenate([[0.0], np.cumsum(each)[:-1]])


def second_order_change(run: xr.Dataset, part: str = "after", **rules: Any) -> float:
    """What the component of D along v1 adds in second order to the squared norms over a part of the run."""
    where = part_of(run, part, **rules)
    return NAN if where is None else float(second_order(run)[where.stop] - second_order(run)[where.start])


def layer_correlation(run: xr.Dataset, layer: int = 0, part: str = "after", **rules: Any) -> float:
    """Correlation of the sharpness with one layer's squared norm, values."""
    pair = [
        _values(run, x.astype(float), part, **rules)
        for x in (run["sharpness"].values, run["layer_norm2"].values[:, layer])
    ]
    if pair[0] is None or pair[1] is None or not (pair[0].std() > 0 and pair[1].std() > 0):
        return NAN
    return float(np.corrcoef(pair[0], pair[1])[0, 1])


def _logs(run: xr.Dataset, **rules: Any) -> tuple[Array, Array] | None:
    """log Λ and log ‖A‖² until the first crossing."""
    pair = [_values(run, series(run, of), "before", **rules) for of in ("sharpness", "norm_A2")]
    return None if pair[0] is None or pair[1] is None else (np.log(pair[0]), np.log(pair[1]))


def explained_before(run: xr.Dataset, **rules: Any) -> float:
    """Share of the variance of log Λ until the first crossing that a line in log ‖A‖² explains."""
    logs = _logs(run, **rules)
    return NAN if logs is None else float(np.corrcoef(*logs)[0, 1] ** 2)


def elasticity(run: xr.Dataset, **rules: Any) -> float:
    r"""The slope of log Λ against log ‖A‖² until the first crossing, by least squares."""
    logs = _logs(run, **rules)
    return NAN if logs is None else float(np.polyfit(logs[1], logs[0], 1)[0])


def norm_rise_share(run: xr.Dataset, **rules: Any) -> float:
    """The rise of log ‖A‖² over that of log Λ, from the start to the first crossing.

    The share of the rise that ‖A‖² makes if it multiplies Λ and all else is as it was.
    """
    logs = _logs(run, **rules)
    return NAN if logs is None else float((logs[1][-1] - logs[1][0]) / (logs[0][-1] - logs[0][0]))


STATISTICS: dict[str, Callable[..., float]] = {
    f.__name__: f
    for f in (
        long_trend,
        long_trend_gap,
        level_off,
        band_correlation,
        inner_correlation,
        layer_drift,
        layer_change,
        layer_correlation,
        second_order_change,
        explained_before,
        elasticity,
        norm_rise_share,
    )
}


# ---- the identities, live ------------------------------------------------------------------------


def layer_rates(objective: Objective, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each layer d‖W_l‖²/dt under gradient flow by autograd, the formula for it, and the scale (4/n)‖D‖‖P_l‖.

    P_l are the inner products of an example's pre-activations with the gradient of its output in them.
    """
    _, gradient, f = objective.gradient(theta)
    d, rates, formulas, sizes = (f - objective.y)[:, 0], [], [], []
    for layer, (alpha, beta) in zip(objective.layers or [], Gram(objective).factors(theta), strict=True):
        w = theta[layer.weight].view(layer.fan_out, layer.fan_in)
        z = torch.nn.functional.linear(alpha, w, None if layer.bias is None else theta[layer.bias])
        p = (beta[:, 0] * z).sum(dim=1)
        rates.append(-2 * gradient[layer.weight] @ theta[layer.weight])
        formulas.append(-4 / objective.n * d @ p)
        sizes.append(4 / objective.n * d.norm() * p.norm())
    return torch.stack(rates), torch.stack(formulas), torch.stack(sizes)


def layer_flow(bias: bool = False, trials: int = 240) -> Tested:
    """Largest difference between d‖W_l‖²/dt by autograd and its formula, over layers and networks, relative to
    (4/n)‖D‖‖P_l‖. Networks with biases are the control.
    """
    worst = 0.0
    for objective, theta in problems(trials, FULLY_CONNECTED, bias):
        rates, formulas, sizes = layer_rates(objective, theta)
        worst = max(worst, float(((rates - formulas).abs() / sizes).max()))
    return Tested(worst, trials, f"{ON_NETWORKS}, {', '.join(FULLY_CONNECTED)}, {'with' if bias else 'without'} biases")


def layers_balanced(kinds: Sequence[str] = ("linear", "relu"), trials: int = 240) -> Tested:
    """Largest difference of d‖W_l‖²/dt between a layer and the last, over networks, relative to the scale of the last.

    Activations that are not homogeneous are the control.
    """
    worst = 0.0
    for objective, theta in problems(trials, tuple(kinds)):
        rates, _, sizes = layer_rates(objective, theta)
        worst = max(worst, float((rates - rates[-1]).abs().max() / sizes[-1]))
    return Tested(worst, trials, f"{ON_NETWORKS}, {', '.join(kinds)}, without biases")


CHECKS: dict[str, Callable[..., Tested]] = {"layer_flow": layer_flow, "layers_balanced": layers_balanced}


# ---- the intervention, live ----------------------------------------------------------------------

HELD = {
    "nothing": "nothing: gradient descent as it is",
    "A": "the output layer A",
    "norm of A": "the norm of A, not its direction",
    "inner": "all inner layers",
    "norms of inner": "the norms of the inner layers",
}


class Course(NamedTuple):
    """Gradient descent with a part of the network held, measured at K steps."""

    step: Array  # (K,)
    loss: Array  # (K,)
    sharpness: Array  # (K,) Λη/2
    norms: Array  # (K, layers) squared norms
    rates: Array  # (K, layers) what the motion of each layer adds to log Λ in a step, to first order; nan if held


def log_slopes(gram: Gram, theta: Tensor, v: Tensor) -> Tensor:
    r""":math:`\nabla\log\Lambda = \nabla\log\|g\|^2`, (P,), for an eigenvector v, which is held fixed."""
    leaf = theta.detach().requires_grad_(True)
    with torch.enable_grad():
        outputs = gram.objective._call(leaf, gram.objective.x)[:, 0]
        (g,) = torch.autograd.grad(v @ outputs, leaf, create_graph=True)
        (slope,) = torch.autograd.grad(g.square().sum().log(), leaf)
    return slope


def _moved(theta: Tensor, step: Tensor, layers: Sequence[slice], held: str) -> Tensor:
    """θ after a step, with the part that is held put back."""
    after = theta + step
    kept = {"nothing": [], "A": layers[-1:], "norm of A": layers[-1:]}.get(held, layers[:-1])
    for layer in kept:
        # A norm that is held leaves the direction free.
        free = held.startswith("norm")
        after[layer] = after[layer] * (theta[layer].norm() / after[layer].norm()) if free else theta[layer]
    return after


@lru_cache(maxsize=256)
def course(
    activation: str,
    depth: int = 2,
    held: str = "nothing",
    seed: int = 100,
    steps: int = 320,
    stride: int = 10,
    start: float = 0.06,
    n: int = 80,
    width: int = 40,
) -> Course:
    """A network without biases on n digits, 5 to 9 against 0 to 4, centred, labels ±1, in float64.

    ``start``: Λ(0)η/2, which sets η: small, so that Λ stays below 2/η and the motion is close to gradient flow.
    ``ValueError`` for another ``held``.
    """
    if held not in HELD:
        raise ValueError(f"held={held!r} is unknown; choose one of {', '.join(HELD)}")
    data = digits(n, "vehicles")
    x, y = data.x.double(), data.y.double()
    objective = Objective(fully_connected(x.shape[1], width, depth, 1, activation, False, "fan_in", seed), "mse", x, y)
    gram, theta, eta = Gram(objective), objective.initial(), 0.0
    layers, rows = [layer.weight for layer in gram.layers], []
    for t in range(steps + 1):
        d = gram.outputs(theta, gram.factors(theta))[:, 0] - y[:, 0]
        gradient = pull(gram, theta, 2 / n * d)
        if t == 0:
            eta = 2 * start / float(torch.linalg.eigvalsh(gram.at(theta).M)[-1])
        after = _moved(theta, -eta * gradient, layers, held)
        if t % stride == 0:
            values, vectors = torch.linalg.eigh(gram.at(theta).M)
            # Only asked for where nothing is held.
            slopes = log_slopes(gram, theta, vectors[:, -1]) if held == "nothing" else torch.full_like(theta, NAN)
            each = slopes * (after - theta)
            norms = [float(theta[part].square().sum()) for part in layers]
            rates = [float(each[part].sum()) for part in layers]
            rows.append((t, float(d @ d) / n, float(values[-1]) * eta / 2, norms, rates))
        theta = after
    return Course(*(np.array(column, dtype=float) for column in zip(*rows, strict=True)))


def at_loss(run: Course, values: Array, loss: float) -> float:
    """A series of a course at the first time its loss is at most ``loss``, interpolated; nan if it never is."""
    found = np.flatnonzero(run.loss <= loss)
    if not len(found):
        return NAN
    k = int(found[0])
    if k == 0:
        return float(values[0])
    part = (run.loss[k - 1] - loss) / (run.loss[k - 1] - run.loss[k])
    return float(values[k - 1] + part * (values[k] - values[k - 1]))


def rise(run: Course, loss: float | None = None, step: float | None = None) -> float:
    """The rise of log Λ since the start, when the loss is first at most ``loss``, or at a ``step``; else at the end."""
    logs = np.log(run.sharpness / run.sharpness[0])
    if loss is not None:
        return at_loss(run, logs, loss)
    return float(logs[-1] if step is None else np.interp(step, run.step, logs))


def driven(run: Course, loss: float) -> Array:
    """What the motion of each layer has added to log Λ, to first order, when the loss is first at most ``loss``."""
    gaps = np.diff(run.step)[:, None]
    sums = np.concatenate(
        [np.zeros((1, run.rates.shape[1])), np.cumsum(gaps * (run.rates[1:] + run.rates[:-1]) / 2, axis=0)]
    )
    return np.array([at_loss(run, column, loss) for column in sums.T])


@lru_cache(maxsize=16)
def at_start(depth: int, seeds: int = 60, inputs: int = 2000, width: int = 60, n: int = 8) -> Array:
    """For random linear networks, what the motion of each layer adds to log Λ for one of log ‖A‖², (layers,).

    For the flow of R, the residual across v1; least squares over random starts, data and labels: 0, 1, 2, ... where
    the layers are wide and the inputs have many more dimensions yet.
    """
    rows = []
    for seed in range(100, 100 + seeds):
        generator = np.random.default_rng(seed)
        x, y = (
            torch.from_numpy(generator.normal(size=(n, inputs))),
            torch.from_numpy(generator.choice([-1.0, 1.0], (n, 1))),
        )
        objective = Objective(fully_connected(inputs, width, depth, 1, "linear", False, "fan_in", seed), "mse", x, y)
        gram, theta = Gram(objective), objective.initial()
        v, d = torch.linalg.eigh(gram.at(theta).M)[1][:, -1], (objective.outputs(theta) - y)[:, 0]
        moved, slopes = pull(gram, theta, v * (v @ d) - d), log_slopes(gram, theta, v)
        layers = [layer.weight for layer in gram.layers]
        a = layers[-1]
        rows.append(
            [float(slopes[w] @ moved[w]) for w in layers] + [float(2 * moved[a] @ theta[a] / theta[a].square().sum())]
        )
    found = np.array(rows)
    return np.asarray(found[:, -1] @ found[:, :-1] / (found[:, -1] @ found[:, -1]))
