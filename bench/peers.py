"""Other ways to compute the largest Hessian eigenvalues, and ours, behind one signature.

    peer(objective, theta, k, memory=None) -> Answer

``objective`` says which loss of which network on which data, ``theta`` where. ``memory`` is a dict in which a peer may
keep what its next evaluation starts from; without one every evaluation is cold. All see the same network, data and
dtype, and are told the settings that their authors chose; what we had to decide for them is said at each.
"""

import copy
import importlib
import sys
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.utils import vector_to_parameters

from eos_utils.curvature import Hessian
from eos_utils.lanczos import EigenTracker, top_eigenpairs

CHUNK = 1000  # examples at a time in the code published with Cohen et al. (2021)


@dataclass(frozen=True)
class Answer:
    """Eigenvalues in falling order (k,), float64, and how many Hessian-vector products they took.

    ``coarse``: further products, with the compression of the Hessian that only ours uses (about a tenth of the price).
    """

    values: torch.Tensor
    products: int
    coarse: int = 0


def answer(values, products, coarse=0):
    """An answer from any sequence of k numbers."""
    if not isinstance(values, torch.Tensor):
        values = torch.as_tensor(np.asarray(values))
    return Answer(values.detach().double().cpu().sort(descending=True).values, products, coarse)


class MeanLoss(nn.Module):
    """The objective's loss as a module that takes the mean over the examples."""

    reduction = "mean"  # curvlinops asks

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, outputs, targets):
        return self.loss.value(outputs, targets) / len(targets)


def network_at(objective, theta):
    """A copy of the network with its parameters at theta."""
    network = copy.deepcopy(objective.model)
    vector_to_parameters(theta.detach().clone(), network.parameters())
    return network


def start_vector(size, dtype, seed=0):
    """A random start for ARPACK, which would draw one itself, so that the number of products can be repeated."""
    return np.random.default_rng(seed).uniform(-1, 1, size).astype(dtype)


# --- the two papers' codes, written anew from what they do ------------------------------------------


class ColdProducts:
    """Double backpropagation from scratch for every product: forward, gradient with its graph, backward through it."""

    def __init__(self, objective, theta, chunk):
        self.objective, self.theta, self.chunk = objective, theta.detach().requires_grad_(True), chunk
        self.products = 0

    def apply(self, v):
        """H v for one vector."""
        self.products += 1
        total = torch.zeros_like(v)
        for x, y in zip(self.objective.x.split(self.chunk), self.objective.y.split(self.chunk), strict=True):
            value, _ = self.objective._share(self.theta, x, y)
            (gradient,) = torch.autograd.grad(value, self.theta, create_graph=True)
            (product,) = torch.autograd.grad(gradient @ v, self.theta)
            total += product
        return total

    def numpy(self, v):
        """The same for ARPACK, there and back."""
        v = torch.as_tensor(v, dtype=self.objective.dtype, device=self.objective.device)
        return self.apply(v.reshape(-1)).cpu().numpy()


def locuslab(objective, theta, k, memory=None, chunk=CHUNK):
    """Cohen et al. (2021), locuslab/edge-of-stability: ARPACK to its own precision, always from a random vector.

    As there: the eigenvalues largest in magnitude, tolerance 0, ncv left to SciPy, no warm start.
    """
    hessian = ColdProducts(objective, theta, chunk)
    dtype = hessian.theta.detach().cpu().numpy().dtype
    # SciPy finds out the dtype by a product more where none is given, as there; we spare them that.
    operator = LinearOperator((objective.P, objective.P), matvec=hessian.numpy, dtype=dtype)
    values = eigsh(operator, k, v0=start_vector(objective.P, dtype), return_eigenvectors=True)[0]
    return answer(values, hessian.products)


def descending(matrix):
    """Eigenvalues of a small symmetric matrix, falling, and its eigenvectors."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0), vectors.flip(1)


def orthonormal(block, against=None):
    """Orthonormal columns with the span of ``block`` (off ``against``); directions that are rounding only are left out.

    By eigenvectors of the Gram matrix, twice: for tall blocks much cheaper than QR.
    """
    for _ in range(2):
        if against is not None:
            block = block - against @ (against.T @ block)
        norms = block.norm(dim=0)
        block = block[:, norms > 0] / norms[norms > 0]
        values, vectors = descending(block.T @ block)
        kept = values > 4 * len(values) * torch.finfo(block.dtype).eps * values[:1]
        block = block @ (vectors[:, kept] / values[kept].sqrt())
    return block


def unit(block):
    """Columns scaled to length 1, against the drift of rounding."""
    return block / block.norm(dim=0)


def lobpcg(apply, x, tolerance, iterations=100):
    """Blocks X, P and R as in Knyazev (2001), with Rayleigh-Ritz on an orthonormal basis of them.

    The operator is applied to the whole basis and again to the new X, as in the scheme that is measured here: 4 k
    products an iteration, where images that are carried along would need k. A pair counts as converged when its
    residual is below 10 · P · tolerance · (‖H x‖ + θ), the rule of JAX's ``lobpcg_standard``.
    """
    size, k = x.shape
    x = orthonormal(x)
    p = orthonormal(torch.randn(size, k, generator=torch.Generator().manual_seed(1)).to(x), x)
    image = apply(x)
    theta = (x * image).sum(dim=0)
    for _ in range(iterations):
        kept = torch.cat([x, p], dim=1)
        basis = torch.cat([kept, orthonormal(image - theta * x, kept)], dim=1)
        values, q = descending(basis.T @ apply(basis))
        theta = values[:k]
        # Within the basis: what of the old X is not in the new one.
        direction = q[:, k:] @ torch.linalg.qr(q[:k, k:].T)[0]
        x, p = unit(basis @ q[:, :k]), unit(basis @ direction)
        image = apply(x)
        residuals = (image - theta * x).norm(dim=0)
        if bool((residuals < 10 * size * tolerance * (image.norm(dim=0) + theta)).all()):
            break
    return theta, x


def central_flows(objective, theta, k, memory=None, tolerance=1e-10):
    """Cohen et al. (2024), centralflows/centralflows: LOBPCG on vmapped products, from the last eigenvectors.

    As there: forward over reverse differentiation of the whole batch, all directions at once, tolerance 1e-10 (in the
    sense of :func:`lobpcg`), at most 100 iterations. There k grows with the number of eigenvalues near 2/eta; here it
    is given. torch.lobpcg takes matrices only, which is why they and we bring our own.
    """
    products = 0

    def loss(w):
        return objective._share(w, objective.x, objective.y)[0]

    def apply(block):
        nonlocal products
        products += block.shape[1]
        one = lambda v: torch.func.jvp(torch.func.grad(loss), (theta,), (v,))[1]  # noqa: E731
        return torch.func.vmap(one, in_dims=1, out_dims=1)(block)

    if memory is None or "vectors" not in memory:
        start = torch.randn(objective.P, k, generator=torch.Generator().manual_seed(0)).to(theta)
    else:
        start = memory["vectors"]
    values, vectors = lobpcg(apply, start, tolerance)
    if memory is not None:
        memory["vectors"] = vectors
    return answer(values, products)


# --- packages: pip install -e .[bench] ----------------------------------------------------------------


def curvlinops(objective, theta, k, memory=None):
    """curvlinops' Hessian, exported to SciPy, in ARPACK at tolerance 1e-3."""
    package = importlib.import_module("curvlinops")

    class Counted(package.HessianLinearOperator):
        """Counts products; everything else is the package's."""

        products = 0

        def _matmat(self, vectors):
            self.products += vectors[0].shape[-1]
            return super()._matmat(vectors)

    network = network_at(objective, theta)
    # One batch, which it is fastest with. Its check for determinism would cost two products and two gradients.
    data = [(objective.x, objective.y)]
    parameters = list(network.parameters())
    hessian = Counted(network, MeanLoss(objective.loss), parameters, data, check_deterministic=False)
    start = start_vector(objective.P, np.float64)
    values = eigsh(hessian.to_scipy(), k, which="LA", tol=1e-3, v0=start, return_eigenvectors=True)[0]
    return answer(values, hessian.products)


def eigenthings(objective, theta, k, memory=None, steps=45):
    """hessian-eigenthings' Lanczos: a fixed number of steps with full reorthogonalisation, no stopping rule.

    Its default of 2 k steps would be far off the mark; 45 is the round number below the 50 up to which it
    reorthogonalises by itself. The whole data are one batch, since it averages over batches whatever their sizes.
    """
    package = importlib.import_module("hessian_eigenthings")
    loss = package.supervised_loss(MeanLoss(objective.loss))
    hessian = package.HessianOperator(network_at(objective, theta), [(objective.x, objective.y)], loss)
    found = package.lanczos(hessian, k=k, max_iter=min(max(steps, k), objective.P), which="LA", seed=0)
    return answer(found.eigenvalues, found.iterations)


def pyhessian(objective, theta, k, memory=None):
    """PyHessian's power iteration with deflation, at most 100 iterations an eigenvalue, to a relative change of 1e-3.

    It works with current torch as it is. A fresh copy of the network each time, since it adds to gradients that are
    there already; the gradients are dropped afterwards, since they hold the graph. It draws from torch's global
    generator, and it has no counter: its product function is wrapped to count.
    """
    package = importlib.import_module("pyhessian")
    module = sys.modules["pyhessian.hessian"]  # the package's attribute of that name is the class
    network = network_at(objective, theta)
    product, products = module.hessian_vector_product, 0

    def counted(gradients, parameters, v):
        nonlocal products
        products += 1
        return product(gradients, parameters, v)

    with torch.random.fork_rng(devices=[]), mock.patch.object(module, "hessian_vector_product", counted):
        torch.manual_seed(0)
        data = (objective.x, objective.y)
        cuda = objective.device.type == "cuda"
        values, _ = package.hessian(network, MeanLoss(objective.loss), data=data, cuda=cuda).eigenvalues(top_n=k)
    network.zero_grad(set_to_none=True)
    return answer(values, products)


# --- ours ------------------------------------------------------------------------------------------------


def ours_cold(objective, theta, k, memory=None):
    """One certified evaluation from a random vector."""
    pairs = top_eigenpairs(Hessian(objective, theta), k)
    return answer(pairs.values, pairs.products, pairs.coarse_products)


def ours_tracked(objective, theta, k, memory=None):
    """An evaluation that starts from the last one's Ritz vectors."""
    memory = {} if memory is None else memory
    pairs = memory.setdefault("tracker", EigenTracker(k)).update(Hessian(objective, theta))
    return answer(pairs.values, pairs.products, pairs.coarse_products)


COLD = {
    "locuslab": locuslab,
    "central_flows": central_flows,
    "curvlinops": curvlinops,
    "eigenthings": eigenthings,
    "pyhessian": pyhessian,
    "ours": ours_cold,
}
TRACKED = {"central_flows": central_flows, "ours": ours_tracked}
MODULES = {"curvlinops": "curvlinops", "eigenthings": "hessian_eigenthings", "pyhessian": "pyhessian"}
PACKAGES = {
    "curvlinops": "curvlinops-for-pytorch",
    "eigenthings": "hessian-eigenthings",
    "pyhessian": "PyHessian",
}


def missing():
    """Peers whose package is not installed; the others are imported by this, so that no timing includes it."""
    absent = []
    for name, module in MODULES.items():
        try:
            importlib.import_module(module)
        except ImportError:
            absent.append(name)
    return absent
