r"""The two terms of the Hessian along a run: :math:`H = G + S` (SG, section 2).

For :math:`L = \frac1n\sum_i\ell(f_i)` the first is the Gauss–Newton matrix, the second is

.. math:: S = H - G = \frac1n\sum_i \ell'(f_i)\,\nabla^2 f_i , \qquad\text{for \texttt{mse}}\quad
   S = \frac2n\sum_i D_i\nabla^2 f_i, \quad D = F - Y ,

symmetric and as a rule indefinite. By Weyl :math:`\lambda_{\min}(S) \le \lambda_1(H) - \lambda_1(G) \le
\lambda_{\max}(S)`; to first order the difference is :math:`u^\top Su`, with u the first eigenvector of G, and never
less than that. For :math:`f = a^\top Wx` the spectrum of S is :math:`\pm\frac2n\|X^\top D\|`, each as many times as
there are units.

**Both ends of S** come from one Lanczos run of k = 40 steps from a random vector, since its spectrum has no gap. A Ritz
value is inside of the spectrum; it misses the end by more than a share :math:`\varepsilon` of the spread with
probability :math:`1.648\sqrt P e^{-(2k-1)\sqrt\varepsilon}` at most (Kuczyński and Woźniakowski 1992): 3 %, 1 in 1,000.

**Fewer coordinates.** A fully connected network sees its n inputs through their span: with U an orthonormal basis of
it, H, G and S are 0 on first-layer weights across U, so that nothing is lost by working with :math:`W_1U`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from eos_utils.basis import Basis, Operator, random_rows
from eos_utils.curvature import Compression, GaussNewton, Hessian
from eos_utils.lanczos import top_eigenpairs
from eos_utils.objective import Objective, Plane

NUMERICS = 1

TOL = 1e-3  # of H and G, relative, certified
STEPS = 40  # of Lanczos for S
FIELDS = {
    "hessian": "largest eigenvalue of H",
    "gauss_newton": "largest eigenvalue of G",
    "rest_top": "largest eigenvalue of S = H - G",
    "rest_bottom": "smallest eigenvalue of S",
}
ALONG = "u'Su, with u the first eigenvector of G"


class Rest:
    """S = H - G as an operator, from those two."""

    def __init__(self, hessian: Operator, gauss_newton: Operator) -> None:
        self.hessian, self.gauss_newton = hessian, gauss_newton
        self.shape, self.device, self.dtype = hessian.shape, hessian.device, hessian.dtype

    def apply(self, rows: Tensor) -> Tensor:
        """The products for the rows of a (k, P) block."""
        return self.hessian.apply(rows) - self.gauss_newton.apply(rows)


class Split(NamedTuple):
    """The extreme eigenvalues at one θ, in the order of :data:`FIELDS`, their residuals, and :math:`u^\\top Su`."""

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    along: float


def span(objective: Objective) -> Plane | None:
    """The span of the inputs of a fully connected network; None for others, and where it is the whole space."""
    x = objective.x.flatten(1)
    if objective.layers is None or len(x) >= x.shape[1]:
        return None
    axes = torch.linalg.qr(x.T)[0]
    return Plane(axes, x @ axes)


def operators(objective: Objective, theta: Tensor, plane: Plane | None) -> tuple[Operator, Operator, Rest]:
    """H, G and S at θ, on the span of the inputs where there is one."""
    h, g = Hessian(objective, theta), GaussNewton(objective, theta)
    if plane is None:
        return h, g, Rest(h, g)
    small = Compression(h, plane), Compression(g, plane)
    return (*small, Rest(*small))


def ends(operator: Operator, seed: int = 0, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """The largest and the smallest Ritz value after so many Lanczos steps from a random vector, and their residuals."""
    basis = Basis(operator)
    basis.extend(random_rows(1, operator, torch.Generator().manual_seed(seed)))
    basis.lanczos(steps - 1)
    values, coordinates = basis.ritz()
    vectors, images = basis.rotate(coordinates[:, [0, -1]])
    found = values[[0, -1]]
    residuals = (images - found[:, None].to(vectors) * vectors).norm(dim=1)
    return found.tolist(), residuals.tolist()


def terms(objective: Objective, theta: Tensor, seed: int = 0, plane: Plane | None = None) -> Split:
    """The largest eigenvalue of H and of G, certified, and both ends of S (:func:`ends`), at θ.

    ``plane``: :func:`span` of the objective, where it is known. Raises ``FloatingPointError`` where θ is not finite.

    >>> from eos_utils.models import fully_connected
    >>> x, y = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    >>> model = fully_connected(2, depth=1, width=1, outputs=1, activation="linear", bias=False)    # f = a w·x
    >>> objective = Objective(model, "mse", x, y)
    >>> found = terms(objective, torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64))    # w = (3, 1), a = 2
    >>> [round(v, 2) for v in found.values[2:]]    # ±(2/n)‖XᵀD‖, D = (5, 1)
    [5.1, -5.1]
    """
    h, g, s = operators(objective, theta, span(objective) if plane is None else plane)
    outer = [top_eigenpairs(operator, 1, tol=TOL, seed=seed) for operator in (h, g)]
    rest, residuals = ends(s, seed)
    u = outer[1].vectors[:, 0]
    return Split(
        (*(float(pairs.values[0]) for pairs in outer), *rest),
        (*(float(pairs.residuals[0]) for pairs in outer), *residuals),
        float(u @ s.apply(u[None])[0]),
    )


class Terms:
    """Measures :func:`terms` at every ``every``-th step, which must be odd: at the edge the motion has period two."""

    def __init__(self, every: int = 51) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1 or every % 2 == 0:
            raise ValueError(f"terms={every!r}: must be an odd whole number, at least 1")
        self.every = every
        self.rows: dict[str, list[Any]] = {name: [] for name in ("step", "values", "residuals", "along")}
        self.plane: Plane | None = None

    def due(self, step: int) -> bool:
        """At multiples of ``every``."""
        return step % self.every == 0

    def measure(self, step: int, eta: float, objective: Objective, theta: Tensor) -> None:
        """Takes the measurement at θ."""
        self.plane = self.plane or span(objective)
        found = terms(objective, theta, step, self.plane)
        for name, value in {"step": step, **found._asdict()}.items():
            self.rows[name].append(value)

    def variables(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Variables and coordinates for the recorded dataset: dimension 'weighed'."""
        values, residuals = (np.array(self.rows[name]).reshape(-1, len(FIELDS)) for name in ("values", "residuals"))
        variables: dict[str, Any] = {"along": ("weighed", np.array(self.rows["along"]), {"long_name": ALONG})}
        for j, (name, about) in enumerate(FIELDS.items()):
            variables[name] = ("weighed", values[:, j], {"long_name": about})
            error = residuals[:, j].astype(np.float32)
            variables[f"{name}_error"] = ("weighed", error, {"long_name": f"norm of the residual: {about}"})
        steps = np.array(self.rows["step"], dtype=np.int32)
        return variables, {"weighed": ("weighed", steps, {"long_name": "step with both terms"})}

    def entered(self) -> int:
        """0: this observer watches no entry."""
        return 0

    def state(self) -> dict[str, Any]:
        """The rows: every measurement begins anew."""
        return {"rows": self.rows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state`."""
        self.rows = state["rows"]
