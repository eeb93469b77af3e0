"""The tables in ``bench/results/``, which programs left there, and the live checks of the page on the eigenvalues."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eos_utils import data
from eos_utils.curvature import Hessian, dense
from eos_utils.experiment import rational
from eos_utils.lanczos import Eigenpairs, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.store import StoreError, root

NAMES = {
    "ours": "this package",
    "eigenthings": "hessian-eigenthings, 45 steps",
    "curvlinops": "curvlinops and eigsh, 1e-3",
    "pyhessian": "PyHessian",
    "locuslab": "scheme of Cohen et al. (2021)",
    "central_flows": "scheme of Cohen et al. (2024)",
}


@dataclass(frozen=True)
class Outside:
    """``part[i][j]``: norm of eigenvector i outside of the span of the leading ``axes[j]`` input directions."""

    axes: list[int]
    part: list[list[float]]

    def worst(self, axes: int) -> float:
        """The largest at the given number of directions, or at the nearest below."""
        column = max(j for j, r in enumerate(self.axes) if r <= axes)
        return max(row[column] for row in self.part)


def outside_of_axes(objective: Objective, theta: Tensor, k: int) -> Outside:
    """How much of the k leading eigenvectors the inputs' leading principal directions leave out."""
    assert objective.layers is not None
    first = objective.layers[0]
    hessian = Hessian(objective, theta)
    whole = SimpleNamespace(shape=hessian.shape, device=hessian.device, dtype=hessian.dtype, apply=hessian.apply)
    vectors = top_eigenpairs(whole, k, tol=1e-5).vectors.T  # in the whole space: the plane would answer for itself
    return _outside(objective.x.flatten(1), vectors[:, first.weight].reshape(k, first.fan_out, first.fan_in))


def _outside(x: Tensor, rows: Tensor) -> Outside:
    """For the first layers ``rows`` (k, fan_out, d) of eigenvectors of norm 1."""
    directions = torch.linalg.svd(x.double(), full_matrices=False)[2]
    along = ((rows.double() @ directions.T) ** 2).sum(dim=1)
    beyond = ((rows.double() ** 2).sum(dim=(1, 2)) - along.sum(dim=1)).clamp(min=0)  # outside of all inputs
    left = along.flip(1).cumsum(dim=1).flip(1) + beyond[:, None]  # from direction r on
    axes = [2**i for i in range(12) if 2**i < len(directions)]
    part = [[float(one[r] ** 0.5) for r in axes] for one in left]
    return Outside(axes, part)


@dataclass(frozen=True)
class AgainstDense:
    """Bounds beside the eigenvalues of the whole matrix."""

    pairs: Eigenpairs
    true: Tensor
    P: int
    tol: float

    @property
    def worst_error(self) -> float:
        """Of a Ritz value, relative to λ1."""
        return float((self.true - self.pairs.values).abs().max() / self.true[0])


def against_dense(p: SimpleNamespace, tol: float = 1e-3) -> AgainstDense:
    """A certified evaluation on a small network on digits at the edge, and its dense Hessian, in float64."""
    d = data.load("digits", n=p.n, preprocessing="standardize").to(torch.device("cpu"), torch.float64)
    network = fully_connected(d.x.shape[1], p.width, outputs=d.y.shape[1], activation="tanh", seed=p.seed)
    objective = Objective(network, "half_mse", d.x, d.y)
    theta = objective.initial()
    for _ in range(p.steps):
        theta = theta - float(rational(p.eta)) * objective.gradient(theta)[1]
    true = torch.linalg.eigvalsh(dense(Hessian(objective, theta))).flip(0)[: p.k]
    return AgainstDense(top_eigenpairs(Hessian(objective, theta), p.k, tol=tol), true, objective.P, tol)


def plane() -> Outside:
    """The measurement of :func:`outside_of_axes` on record."""
    return Outside(**read("engine")["plane"])


def read(name: str) -> dict[str, Any]:
    """A file of ``bench/results/``; ``StoreError`` says how to make it if it is missing or damaged."""
    path = root() / "bench" / "results" / f"{name}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StoreError(f"bench/results/{path.name} can not be read ({error}); see bench/README.md") from None


Table = tuple[list[str], list[list[str]]]


def peers() -> Table:
    """Every peer, cold and tracked."""
    header = ["k", "Method", "Start", "Evaluations", "Seconds", "Products", "Coarse products", "Worst error / λ₁"]
    rows = [
        [
            str(r["k"]),
            NAMES.get(r["peer"], r["peer"]),
            r["setting"],
            str(r["evaluations"]),
            f"{r['seconds']:.2f}",
            f"{r['products_mean']:.1f}",
            f"{r['coarse_mean']:.0f}" if r.get("coarse_mean") else "–",
            f"{r['worst_error']:.0e}",
        ]
        for r in sorted(read("engine")["rows"], key=lambda r: (r["k"], r["setting"] != "cold"))
    ]
    return header, rows


def ratios() -> Table:
    """How many times faster than whom."""
    found, rows = read("engine"), []
    for k, chosen in found["ratios"].items():
        for what, ratio in chosen.items():
            against, _, setting = what.partition(" / ours, ")
            if against != "fastest of any accuracy":  # it is the best accurate one, or is not accurate
                peer = ratio["peer"].removesuffix(" (cold)")
                rows.append([f"k = {k}, {setting}", NAMES.get(peer, peer), f"{ratio['ratio']:.1f}"])
    whole = found.get("end_to_end")
    if whole:
        what = f"{whole['steps']:,} steps, k = {whole['k']} every {whole['every']}, extrapolated from "
        what += f"{whole['locuslab_samples']} evaluations of the peer"
        rows.append([what, NAMES["locuslab"], f"{whole['ratio']:.1f}"])
    return ["Evaluation", "Against", "Times faster"], rows


def memory() -> Table:
    """Peaks of the large problems."""
    header = ["Problem", "P", "Chunk", "Peak, MiB", "Krylov basis, MiB", "Kept passes, MiB", "One gradient, MiB"]
    rows = [
        [name, *(f"{r[x]:,.0f}" for x in ("P", "chunk", "peak", "basis", "activations", "gradient"))]
        for name, r in read("growth")["memory"].items()
    ]
    return header, rows


def gram() -> Table:
    """Layer factors against the Jacobian."""
    header = ["Network", "P", "Jacobian, s", "Factors, first, s", "Factors, next, s", "Times faster: first", "next"]
    rows = [
        [
            r["net"],
            f"{r['P']:,}",
            f"{r['jacobian_s']:.1f}",
            *(f"{r[x]:.3f}" for x in ("first_s", "next_s")),
            *(f"{r[x]:.0f}" for x in ("first_ratio", "next_ratio")),
        ]
        for r in read("gram")["nets"]
    ]
    return header, rows


def faults() -> Table:
    """What was broken on purpose, how often (of how often in the full count), what happened."""
    rows = []
    for row in read("faults")["rows"].values():
        happened = "; ".join(f"{times:,} {outcome}" for outcome, times in row["happened"].items())
        of = f" of {row['asked']:,}" if row["times"] < row["asked"] else ""
        rows.append([row["done"], f"{row['times']:,}{of}", happened])
    return ["What was done", "How often", "What happened"], rows


def machine() -> str:
    """What the ratios were measured on."""
    found = read("engine")["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cpu']}, {found['threads']} threads, {versions}"


def gpu() -> str:
    """A sentence on what was measured on a GPU."""
    try:
        found = read("gpu")
    except StoreError:
        return (
            "Nothing on this page was measured on a GPU yet. The code runs on one, and tests see to it that no product "
            "makes the host wait for the device; python bench/gpu.py measures everything there with one command."
        )
    best = max(r["share_of_matrix_rate"] for r in found["products"]["products"])
    return (
        f"On a GPU ({found['device']}, torch {found['torch']}), products reach {best:.0%} of the fp32 matrix rate; "
        f"TF32, which is off, would move eigenvalues by {found['tf32']['worst_relative_change']:.0e} of λ1."
    )
