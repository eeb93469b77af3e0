"""CPU time to M, M_A, M_W and the two largest eigenvalues of M: layer factors against the explicit Jacobian.

    python bench/gram.py [--threads 1] [--n 1000] [--width 100] [--repeats 3] [--only NAME] [--json FILE]

The networks of SG (3072-width-...-1, no biases, fan-in), float32, one process, whose CPU time (of all its threads)
depends less on what else the machine does than the time that passes. *Jacobian*: J by vmap(grad), products
with its transpose, eigvalsh. *First*: a new ``Gram`` (with X Xᵀ) and a cold solve; *next*: at another θ, nearby, with
both kept, as along a trajectory. The ratios are those of Jacobian to each. Peaks are of resident memory above what was
held before (Linux only). Inputs are random, with two strong directions, so that λ1 : λ2 is about 3, as in CIFAR-10.
"""

import argparse
import ctypes
import itertools
import json
import pathlib
import statistics
import time

import torch
from torch.func import functional_call, grad, vmap

from eos_utils.gram import Gram, GramOperator, Matrix
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

NETS = {"linear 1 hidden": ("linear", 1), "linear 2 hidden": ("linear", 2), "linear 4 hidden": ("linear", 4)}
NETS |= {"tanh 1 hidden": ("tanh", 1), "tanh 3 hidden": ("tanh", 3), "relu 3 hidden": ("relu", 3)}


def resident(peak=False):
    """Resident memory in bytes, now or at its peak since :func:`forget_peak`; 0 where there is no /proc."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM" if peak else "VmRSS"))


def forget_peak():
    """Hands freed memory back, and starts to look for the next peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def measured(function, repeats):
    """Median CPU seconds of a call."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def memory(function):
    """Peak megabytes of a call above what was held before, and its result."""
    forget_peak()
    held = resident()
    result = function()
    return (resident(peak=True) - held) / 1e6, result


def by_jacobian(objective, theta):
    """M, M_A, M_W and the two largest eigenvalues of M; J is formed layer by layer, and not copied."""
    pieces = theta.split([shape.numel() for shape in objective.shapes.values()])
    named = {k: p.view(s) for (k, s), p in zip(objective.shapes.items(), pieces, strict=True)}
    j = vmap(grad(lambda named, x: functional_call(objective.model, named, (x[None],)).squeeze()), in_dims=(None, 0))(
        named, objective.x
    )
    products = [rows @ rows.T * (2 / objective.n) for rows in (j[name].flatten(1) for name in named)]
    m_w, m_a = sum(products[:-1]), products[-1]
    m = m_w + m_a
    return m, m_a, m_w, torch.linalg.eigvalsh(m).flip(0)[:2]


def by_factors(gram, tracker, theta):
    parts = gram.at(theta)
    return *parts, tracker.update(Matrix(parts.M)).values


def compare(name, activation, depth, chosen):
    """One network: the measurements as a dictionary."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(chosen.n, 3072, generator=generator)
    x[:, 0] *= 60
    x[:, 1] *= 35
    y = torch.randn(chosen.n, 1, generator=generator).sign()
    model = fully_connected(3072, chosen.width, depth, 1, activation, bias=False, init="fan_in")
    objective = Objective(model, "mse", x - x.mean(0), y)
    theta = objective.initial()

    def first():
        return by_factors(Gram(objective), EigenTracker(2, tol=1e-6), theta)

    factors_peak, found = memory(first)
    cold = measured(first, 5 * chosen.repeats)
    gram, tracker = Gram(objective), EigenTracker(2, tol=1e-6)
    by_factors(gram, tracker, theta)
    nearby = [theta + 1e-3 * torch.randn(theta.shape, generator=generator) for _ in range(6)]
    turn = itertools.cycle(nearby)
    warm = measured(lambda: by_factors(gram, tracker, next(turn)), 5 * chosen.repeats)
    jacobian_peak, wanted = memory(lambda: by_jacobian(objective, theta))
    jacobian = measured(lambda: by_jacobian(objective, theta), chosen.repeats)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    m = found[0]
    solvers = {
        "eigvalsh": lambda: torch.linalg.eigvalsh(m),
        "eigh": lambda: torch.linalg.eigh(m),
        "eigh, float64": lambda: torch.linalg.eigh(m.double()),
        "top_eigenpairs, k = 2": lambda: top_eigenpairs(Matrix(m), 2, tol=1e-6),
    }
    operator, row = GramOperator(objective, theta), y.T.contiguous()
    return {
        "net": name,
        "P": objective.P,
        "jacobian_s": jacobian,
        "first_s": cold,
        "next_s": warm,
        "first_ratio": jacobian / cold,
        "next_ratio": jacobian / warm,
        "jacobian_peak_mb": jacobian_peak,
        "factors_peak_mb": factors_peak,
        "worst_relative_error": max(errors),
        "solvers_s": {k: measured(solve, 5) for k, solve in solvers.items()},
        "operator_product_s": measured(lambda: operator.apply(row), 5),
    }


def main(words=None):
    """Prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--n", type=int, default=1000)
    arguments.add_argument("--width", type=int, default=100)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--only", choices=NETS, help="one network")
    arguments.add_argument("--json", type=pathlib.Path, metavar="FILE")
    chosen = arguments.parse_args(words)
    torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, {chosen.threads} threads, n = {chosen.n}, d = 3072, width {chosen.width}")
    print(f"{'':<16}{'Jacobian':>10}{'first':>10}{'next':>10}   ratios         peak memory, MB    error")
    rows = []
    for name, (activation, depth) in NETS.items():
        if chosen.only in (None, name):
            r = compare(name, activation, depth, chosen)
            rows.append(r)
            print(
                f"{name:<16}{r['jacobian_s']:8.2f} s{1e3 * r['first_s']:7.1f} ms{1e3 * r['next_s']:7.1f} ms"
                f"{r['first_ratio']:6.0f}, {r['next_ratio']:4.0f}"
                f"{r['jacobian_peak_mb']:12.0f}, {r['factors_peak_mb']:4.0f}{r['worst_relative_error']:13.0e}",
                flush=True,
            )
    print("\nThe last network's M, its largest eigenvalues, and one product without forming it:")
    for name, taken in (rows[-1]["solvers_s"] | {"GramOperator.apply": rows[-1]["operator_product_s"]}).items():
        print(f"{name:<24}{1e3 * taken:8.1f} ms")
    if chosen.json:
        settings = {k: getattr(chosen, k) for k in ("threads", "n", "width", "repeats")}
        chosen.json.write_text(
            json.dumps({"torch": torch.__version__, **settings, "nets": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
