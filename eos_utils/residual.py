r"""The Gram matrix and the residual along a run: what paper SG says gradient descent at the edge is made of.

With :math:`M = \frac2n JJ^\top`, :math:`D = F - Y` and the first eigenvector :math:`v_1` of M (SG, sections 2 and 3):

- the sharpness :math:`\Lambda = \lambda_1(M)`, :math:`\lambda_2(M)`, :math:`\lambda_{\max}(M_A)`, the layers' norms;
- :math:`D^\top v_1`, :math:`R = D - v_1v_1^\top D`, and beside it :math:`R'`, which starts at R and follows
  :math:`R'(t+1) = (I - \eta M(t)(I - v_1(t)v_1(t)^\top))R'(t)` (Lemma 3.5);
- how far one step of gradient descent is from the first-order equations (3), and from Lemma 3.4's recursion for R;
- at some steps the whole spectrum, how far eigenvectors have turned, and for which of them Assumption 3.5 (ii) holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from eos_utils.gram import Gram, Matrix, output_layer
from eos_utils.jacobian import ModuleGram
from eos_utils.lanczos import EigenTracker
from eos_utils.objective import Objective

NUMERICS = 1

TOL = 1e-14  # of an eigenvalue, relative to the largest: an eigenvector is then good to about 1e-8
LEADING = 10  # eigenvalues kept where the whole spectrum is computed
KEPT = (1, 2, 3, 101)  # eigenvectors whose turning is followed

# Each step: name, unit or meaning. The first two are kept in double precision, since their increments are compared.
FIELDS = {
    "sharpness": "largest eigenvalue of the Gram matrix M",
    "norm_A2": "squared norm of the output layer",
    "sharpness_error": "norm of the residual of that eigenpair",
    "second": "second eigenvalue of M",
    "sharpness_A": "largest eigenvalue of M_A",
    "norm_D2": "squared norm of the residual D",
    "norm_R2": "squared norm of R, the part of D orthogonal to v1",
    "norm_Rp2": "squared norm of R'",
    "apart2": "squared norm of R - R'",
    "DF": "inner product of D and the outputs F",
    "Dv": "inner product of D and v1, whose sign is carried along",
    "Yv": "inner product of the labels and v1",
    "turn": "inner product of v1 and the v1 of the step before",
    "RRY": "inner product of R and R + Y",
    "RpRpY": "inner product of R' and R' + Y",
    "D_error": "distance of D from its first-order step, relative to the step",
    "A_error": "distance of the change of |A|^2 from its first-order value, relative to the change",
    "e1": "norm of R less (I - eta M)R of the step before",
}
DOUBLE = ("sharpness", "norm_A2")


class Residual:
    r"""Measures at every step, and the whole spectrum at every ``every``-th. For one output and squared loss.

    :math:`R'` needs every step; the run must begin where this observer does. The first row has no
    step before it: nan there.

    >>> from eos_utils.descent import Descent, Stop, gradient_descent
    >>> from eos_utils.models import fully_connected
    >>> model = fully_connected(2, width=1, outputs=1, activation="linear", bias=False)
    >>> x, y = torch.eye(2).double(), torch.tensor([[6.0], [1.0]]).double()
    >>> objective = Objective(model, "mse", x, y)    # f = a w·x, M = a²I + wwᵀ, v₁ ∝ w
    >>> start = Descent(torch.tensor([3, 1, 2.0]).double(), 0.01)    # w = (3, 1), a = 2
    >>> watch = Residual()    # at first D = (0, 1), so |R|² = 1 - 1/10
    >>> run = gradient_descent(objective, start, Stop(5), observers=[watch])
    >>> [round(watch.rows[name][0], 3) for name in ("sharpness", "second", "norm_R2")]
    [14.0, 4.0, 0.9]
    """

    def __init__(self, every: int = 25) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"spectrum={every!r}: must be a whole number, at least 1")
        self.every = every
        self.rows: dict[str, list[Any]] = {name: [] for name in ("step", *FIELDS, "layer_norm2")}
        self.spectral: dict[str, list[Any]] = {
            name: [] for name in ("step", "gram_eigenvalue", "smallest", "aligned_share", "aligned_energy", "kept")
        }
        self.tracker, self.tracker_a = EigenTracker(2, tol=TOL), EigenTracker(1, tol=1e-6)
        self.before: dict[str, Tensor] = {}  # of the last step: D, MD, R, MR, v1, and what R' is to be now
        self.first: Tensor | None = None  # eigenvectors of the first spectrum
        self.gram: Any = None

    def due(self, step: int) -> bool:
        """At every step."""
        return True

    def measure(self, step: int, eta: float, objective: Objective, theta: Tensor) -> None:
        """Takes the measurement at θ."""
        if objective.y.shape[1] != 1:
            raise ValueError(f"the Gram matrix is observed for one output; these labels have {objective.y.shape[1]}")
        if self.gram is None:
            self.gram = gram_of(objective)
        factors = self.gram.factors(theta)
        parts = self.gram.at(theta, factors)
        y, outputs = objective.y[:, 0], self.gram.outputs(theta, factors)[:, 0]
        d, b = outputs - y, self.before
        found = self.tracker.update(Matrix(parts.M))
        v = found.vectors[:, 0].clone()
        turn = float(v @ b["v"]) if b else float("nan")
        v = -v if turn < 0 else v
        along = v @ d
        r, md = d - along * v, parts.M @ d
        mr = md - found.values[0] * along * v
        rp = b["rp"] if b else r
        a2 = theta[output_layer(objective)].square().sum()
        row: dict[str, Any] = {
            "sharpness": found.values[0],
            "norm_A2": a2,
            "sharpness_error": found.residuals[0],
            "second": found.values[1],
            "sharpness_A": self.tracker_a.update(Matrix(parts.M_A)).values[0],
            "norm_D2": d @ d,
            "norm_R2": r @ r,
            "norm_Rp2": rp @ rp,
            "apart2": (r - rp).square().sum(),
            "DF": d @ outputs,
            "Dv": along,
            "Yv": y @ v,
            "turn": abs(turn),
            "RRY": r @ (r + y),
            "RpRpY": rp @ (rp + y),
            "D_error": float("nan"),
            "A_error": float("nan"),
            "e1": float("nan"),
        }
        if b:
            moved, change = d - b["d"], a2 - b["a2"]
            row["D_error"] = (moved + b["eta"] * b["md"]).norm() / moved.norm()
            row["A_error"] = (change + 4 * b["eta"] / objective.n * b["df"]).abs() / change.abs()
            row["e1"] = (r - b["r"] + b["eta"] * b["mr"]).norm()
        for name, value in row.items():
            self.rows[name].append(float(value))
        self.rows["step"].append(step)
        self.rows["layer_norm2"].append(_layer_norms(objective, theta))
        if step % self.every == 0:
            self._spectrum(step, objective, theta, parts.M, d, outputs)
        self.before = {
            **{"d": d, "md": md, "r": r, "mr": mr, "v": v, "a2": a2, "df": d @ outputs},
            "eta": theta.new_tensor(eta),
            "rp": rp - eta * (parts.M @ (rp - (v @ rp) * v)),
        }

    def _spectrum(self, step: int, objective: Objective, theta: Tensor, m: Tensor, d: Tensor, f: Tensor) -> None:
        r"""The whole spectrum, and Assumption 3.5 (ii) for the gradient flow through θ.

        There :math:`\dot v_i = \sum_{j\ne i} v_j\,\frac{v_j^\top\dot Mv_i}{\lambda_i - \lambda_j}`, and
        :math:`\dot M` is the central difference of M along :math:`-\nabla L`. Eigenvectors are signed so that
        :math:`D^\top v_i \ge 0`: the assumption is not invariant under :math:`v_i \to -v_i`.
        """
        assert self.gram is not None
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(m))
        kept = vectors[:, [i - 1 for i in KEPT if i <= len(m)]]
        self.first = kept if self.first is None else self.first
        _, gradient, _ = objective.gradient(theta)
        h = 1e-4 * theta.norm() / gradient.norm().clamp(min=1e-30)
        rate = (self.gram.at(theta - h * gradient).M - self.gram.at(theta + h * gradient).M) / (2 * h)
        gaps = values[:, None] - values[None, :]
        gaps.fill_diagonal_(float("inf"))
        turning = ((vectors.T @ rate @ vectors) / gaps) @ (vectors.T @ f)  # F·dv_i/dt
        along = vectors.T @ d
        holds = turning * along.sign() < values * along.abs()
        energy = along.square()
        row = {
            "step": step,
            "gram_eigenvalue": values[:LEADING].tolist(),
            "smallest": float(values[-1]),
            "aligned_share": float(holds.double().mean()),
            "aligned_energy": float((energy * holds).sum() / energy.sum()),
            "kept": (kept * self.first).sum(dim=0).abs().tolist(),
        }
        for name, value in row.items():
            self.spectral[name].append(value)

    def variables(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Variables and coordinates for the recorded dataset: dimensions 'observed' and 'spectral'."""
        variables: dict[str, Any] = {
            name: (
                "observed",
                np.array(self.rows[name], dtype=np.float64 if name in DOUBLE else np.float32),
                {"long_name": about},
            )
            for name, about in FIELDS.items()
        }
        single = np.float32
        variables["layer_norm2"] = (
            ("observed", "layer"),
            np.array(self.rows["layer_norm2"], dtype=single),
            {"long_name": "squared norm of each layer"},
        )
        for name, about, dims in (
            ("gram_eigenvalue", "leading eigenvalues of M", ("spectral", "gram_eig")),
            ("smallest", "smallest eigenvalue of M", ("spectral",)),
            ("aligned_share", "share of the eigenvectors for which Assumption 3.5 (ii) holds", ("spectral",)),
            ("aligned_energy", "the same, weighted by the squared component of D", ("spectral",)),
            ("kept", "inner product of an eigenvector with that of the first spectrum", ("spectral", "kept_eig")),
        ):
            variables[name] = (dims, np.array(self.spectral[name], dtype=single), {"long_name": about})
        coords = {
            "observed": ("observed", np.array(self.rows["step"], dtype=np.int32), {"long_name": "step observed at"}),
            "spectral": ("spectral", np.array(self.spectral["step"], dtype=np.int32)),
            "kept_eig": ("kept_eig", np.array(KEPT[: np.shape(self.spectral["kept"])[-1]], dtype=np.int32)),
        }
        return variables, coords

    def entered(self) -> int:
        """0: this observer watches no entry."""
        return 0

    def state(self) -> dict[str, Any]:
        """Rows, both trackers, and what the next step needs of this one."""
        return {
            **{name: getattr(self, name) for name in ("rows", "spectral", "before", "first")},
            "trackers": [self.tracker.state(), self.tracker_a.state()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        for name in ("rows", "spectral", "before", "first"):
            setattr(self, name, state[name])
        for tracker, saved in zip((self.tracker, self.tracker_a), state["trackers"], strict=True):
            tracker.load_state(saved)


def gram_of(objective: Objective) -> Gram | ModuleGram:
    """What gives M of a network: from layer factors where it is fully connected, else from the Jacobian."""
    return Gram(objective) if objective.layers is not None else ModuleGram(objective)


def _layer_norms(objective: Objective, theta: Tensor) -> list[float]:
    """Squared norm of the weights of each layer; biases do not count."""
    sizes = [shape.numel() for shape in objective.shapes.values()]
    named = zip(objective.shapes, theta.split(sizes), strict=True)
    return [float(part.square().sum()) for name, part in named if not name.endswith("bias")]
