r"""What is measured along a trajectory. An observer keeps its rows and its state; nothing it does moves θ."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from eos_utils.curvature import Hessian
from eos_utils.lanczos import EigenTracker
from eos_utils.objective import Objective

NUMERICS = 1

ENTRY_WINDOW = 21
ENTRY_LEVEL = 0.98


def entry_index(scaled: np.ndarray, level: float = ENTRY_LEVEL, window: int = ENTRY_WINDOW) -> int | None:
    r"""Index of the measurement at which an eigenvalue enters EoS, or None for never.

    ``scaled``: :math:`\lambda\eta/2` at consecutive measurements. Entry is the middle of the first window of 21
    measurements whose median is at least 0.98.

    >>> scaled = np.minimum(np.arange(80) / 40, 1)    # grows until 40, then is 1
    >>> entry_index(scaled)
    40
    >>> entry_index(scaled[:50]) is None    # 21 measurements around it are needed
    True
    """
    if len(scaled) < window:
        return None
    medians = np.median(np.lib.stride_tricks.sliding_window_view(scaled, window), axis=1)
    above = np.flatnonzero(medians >= level)
    return int(above[0]) + window // 2 if len(above) else None


class Observer(Protocol):
    """Measures at some steps."""

    def due(self, step: int) -> bool:
        """Whether to measure at this step."""

    def measure(self, step: int, eta: float, objective: Objective, theta: Tensor) -> None:
        """Takes the measurement at θ."""

    def entered(self) -> int:
        """How many eigenvalues this observer has seen enter EoS (0 for observers of other things)."""

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs, as plain values and tensors."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""


class Eigenvalues:
    r"""The top-k Hessian eigenvalues every ``stride`` steps, with bounds; ``pairs`` measures at t and t + 1.

    ``since``: nothing is measured before that step. ``overlaps``: also the inner products of the eigenvectors with
    those of the measurement before, :math:`O_{ij} = \langle v_i(t), v_j(t')\rangle`, by which
    :mod:`eos_utils.directions` follows them. At the edge of stability the motion has period 2: an even stride sees
    every other state only and warns.

    >>> import torch
    >>> from eos_utils.descent import Descent, Stop, gradient_descent
    >>> from eos_utils.models import fully_connected
    >>> model = fully_connected(1, width=1, outputs=1, activation="linear", bias=False)
    >>> x = y = torch.ones(1, 1)    # L = (aw - 1)²/2; λ₁ = w² + a² where aw = 1
    >>> objective = Objective(model, "half_mse", x, y)
    >>> start, watch = Descent(torch.tensor([2.0, 0.1]), 0.1), Eigenvalues(1, stride=5)
    >>> run = gradient_descent(objective, start, Stop(steps=100), observers=[watch])
    >>> round(watch.rows["eigenvalue"][-1][0], 2), round(sum(run.theta**2).item(), 2)
    (4.43, 4.43)
    """

    FIELDS = ("step", "eigenvalue", "upper", "residual", "checked", "products", "eta")

    def __init__(
        self,
        k: int,
        stride: int,
        pairs: bool = False,
        tol: float = 1e-3,
        seed: int = 0,
        since: int = 0,
        overlaps: bool = False,
    ) -> None:
        if stride < 1:
            raise ValueError(f"stride={stride}: must be at least 1")
        if k < 1:
            raise ValueError(f"k={k}: the number of eigenvalues must be at least 1")
        self.stride, self.pairs, self.since = stride, pairs, since
        self.vectors: Tensor | None = None  # of the measurement before
        self.overlaps: list[list[list[float]]] | None = [] if overlaps else None
        self.tracker = EigenTracker(k, tol=tol, seed=seed)
        self.rows: dict[str, list[Any]] = {name: [] for name in self.FIELDS}
        self._warned = False

    def due(self, step: int) -> bool:
        """At multiples of the stride, and one step later too when measuring in pairs."""
        if step < self.since:
            return False
        return step % self.stride == 0 or (self.pairs and step % self.stride == 1)

    def measure(self, step: int, eta: float, objective: Objective, theta: Tensor) -> None:
        """Tracks the eigenvalues at θ."""
        found = self.tracker.update(Hessian(objective, theta))
        values = (
            step,
            found.values.tolist(),
            found.upper.tolist(),
            found.residuals.tolist(),
            found.checked,
            found.products,
            eta,
        )
        for name, value in zip(self.FIELDS, values, strict=True):
            self.rows[name].append(value)
        if self.overlaps is not None:
            before = found.vectors if self.vectors is None else self.vectors
            self.overlaps.append((found.vectors.T @ before).tolist())
            self.vectors = found.vectors
        if self.stride % 2 == 0 and not self.pairs and not self._warned and self.entered():
            self._warned = True
            warnings.warn(
                f"stride={self.stride} is even: past EoS entry the motion has period 2 and is aliased. "
                "Measure at an odd stride or in pairs.",
                stacklevel=2,
            )

    def entered(self) -> int:
        """How many eigenvalues have entered EoS so far."""
        scaled = np.array(self.rows["eigenvalue"]) * np.array(self.rows["eta"])[:, None] / 2
        return sum(entry_index(column) is not None for column in scaled.T)

    def latest(self) -> float:
        r"""The last :math:`\lambda_1\eta/2`, nan before the first measurement."""
        if not self.rows["step"]:
            return float("nan")
        return float(self.rows["eigenvalue"][-1][0] * self.rows["eta"][-1] / 2)

    def state(self) -> dict[str, Any]:
        """Rows, the tracker's state, and what following directions needs."""
        return {
            "rows": self.rows,
            "tracker": self.tracker.state(),
            "overlaps": self.overlaps,
            "vectors": self.vectors,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        self.rows = state["rows"]
        self.tracker.load_state(state["tracker"])
        self.overlaps, self.vectors = state["overlaps"], state["vectors"]


class Snapshots:
    """Copies of θ at EoS entry of λ1 ('entry'), at given steps, so that the interesting part can be replayed."""

    def __init__(self, at: tuple[str | int, ...], eigenvalues: Eigenvalues | None) -> None:
        for item in at:
            if not (isinstance(item, int) or item in ("entry", "end")):
                raise ValueError(f"snapshot={item!r} is unknown; choose 'entry', 'end' or a step")
        if "entry" in at and eigenvalues is None:
            raise ValueError("a snapshot at entry needs eigenvalues to be measured")
        self.at, self.eigenvalues = at, eigenvalues
        self.rows: dict[str, list[Any]] = {"label": [], "step": [], "theta": []}

    def due(self, step: int) -> bool:
        """At a listed step, and whenever entry may have happened."""
        waiting = "entry" in self.at and "entry" not in self.rows["label"]
        return step in self.at or (
            waiting and self.eigenvalues is not None and step in self.eigenvalues.rows["step"][-1:]
        )

    def measure(self, step: int, eta: float, objective: Objective, theta: Tensor) -> None:
        """Copies θ if this step is listed or entry has just been established."""
        if step in self.at:
            self.add(str(step), step, theta)
        waiting = "entry" in self.at and "entry" not in self.rows["label"]
        if waiting and self.eigenvalues is not None and self.eigenvalues.entered() >= 1:
            self.add("entry", step, theta)

    def add(self, label: str, step: int, theta: Tensor) -> None:
        """Keeps a copy under a label."""
        for name, value in {"label": label, "step": step, "theta": theta.detach().cpu().clone()}.items():
            self.rows[name].append(value)

    def entered(self) -> int:
        """0: snapshots watch no eigenvalues of their own."""
        return 0

    def state(self) -> dict[str, Any]:
        """The copies."""
        return {"rows": self.rows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        self.rows = state["rows"]


def start_facts(objective: Objective, theta: Tensor) -> dict[str, float]:
    r"""How far data and initialisation are from the assumptions of FG, section 2.

    Of the inputs (the first 5,000): the largest and the median :math:`|\cos(x_k, x_l)|` over pairs, the norms. Of
    the labels: the share of zeros, :math:`|\sum_+ y^2 - \sum_- y^2|/\sum y^2`, how many are positive and negative. Of
    the first layer: the largest share, over hidden units, of the positive (negative) examples on which a unit is
    active. What needs one label of :math:`\pm1` an example is 0, or nan, with several outputs.

    >>> import torch
    >>> from eos_utils.models import fully_connected
    >>> x, y = torch.eye(4), torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    >>> objective = Objective(fully_connected(4, outputs=1), "half_mse", x, y)
    >>> facts = start_facts(objective, objective.initial())
    >>> facts["cosine_largest"], facts["labels_imbalance"]    # orthogonal; (3 - 1)/4
    (0.0, 0.5)
    """
    x, y = objective.x.flatten(1), objective.y
    norms = x.norm(dim=1)
    unit = (x / norms.clamp(min=1e-30)[:, None])[:5000]
    cosines = (unit @ unit.T).abs().fill_diagonal_(-1)
    of_pairs = cosines[cosines >= 0] if len(unit) > 1 else cosines.new_zeros(1)
    positive, negative = (y**2)[y > 0].sum(), (y**2)[y < 0].sum()
    facts = {
        "cosine_largest": float(of_pairs.max()),
        "cosine_median": float(of_pairs.median()),
        "norm_smallest": float(norms.min()),
        "norm_largest": float(norms.max()),
        "labels_zero": float((y == 0).float().mean()),
        "labels_imbalance": float((positive - negative).abs() / (y**2).sum()),
        "positives": 0.0,
        "negatives": 0.0,
        "active_positive_largest": float("nan"),
        "active_negative_largest": float("nan"),
    }
    if y.shape[1] == 1 and objective.layers is not None:
        first = objective.layers[0]
        pre = x @ theta[first.weight].view(first.fan_out, first.fan_in).T
        on = (pre + (0 if first.bias is None else theta[first.bias]) > 0).float()
        for name, mask in (("positive", y[:, 0] > 0), ("negative", y[:, 0] < 0)):
            facts[f"{name}s"] = float(mask.sum())
            facts[f"active_{name}_largest"] = float(on[mask].mean(dim=0).max()) if mask.any() else float("nan")
    return facts
