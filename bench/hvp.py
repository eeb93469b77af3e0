"""Seconds per Hessian-vector product against the matrix products that it cannot do without, in one process.

    python bench/hvp.py [--threads 2] [--n 5000] [--width 128]

The network of FG, Figure 1 (3072-width-10, ReLU), float32, random inputs. A product must at least multiply X by the
direction's first layer and the result by X again; these two are the peer. Double backpropagation is shown beside.
"""

import argparse
import statistics
import time

import torch

from eos_utils.curvature import Hessian
from eos_utils.lanczos import EigenTracker
from eos_utils.models import fully_connected
from eos_utils.objective import Objective


def seconds(function, repeats=15):
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main():
    """Prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--n", type=int, default=5000)
    arguments.add_argument("--width", type=int, default=128)
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(chosen.n, 3072, generator=generator)
    y = torch.eye(10)[torch.randint(10, (chosen.n,), generator=generator)]
    objective = Objective(fully_connected(3072, chosen.width, seed=0), "half_mse", x, y)
    theta = objective.initial()
    direction = torch.randn(chosen.width, 3072, generator=generator)
    back = torch.randn(chosen.n, chosen.width, generator=generator)
    bare = seconds(lambda: (x @ direction.T, back.T @ x))
    print(
        f"torch {torch.__version__}, {chosen.threads} threads, n = {chosen.n}, width {chosen.width}, P = {objective.P}"
    )
    print(f"{'the two bare matrix products':<44} {1e3 * bare:8.1f} ms   1.00")
    hessian = Hessian(objective, theta)
    for block in (1, 6, 12):
        rows = torch.randn(block, objective.P, generator=generator)
        each = seconds(lambda rows=rows: hessian.apply(rows), 7) / block
        print(f"{f'structured product, per vector of {block}':<44} {1e3 * each:8.1f} ms   {each / bare:.2f}")
    print(f"{'one gradient':<44} {1e3 * seconds(lambda: objective.gradient(theta)):8.1f} ms")
    objective.layers = None
    retained, row = Hessian(objective, theta), torch.randn(1, objective.P, generator=generator)
    each = seconds(lambda: retained.apply(row), 7)
    print(f"{'retained double backpropagation':<44} {1e3 * each:8.1f} ms   {each / bare:.2f}")
    cold = seconds(lambda: Hessian(objective, theta).apply(row), 7)
    print(f"{'cold double backpropagation':<44} {1e3 * cold:8.1f} ms   {cold / bare:.2f}")
    tracker = EigenTracker(6)
    print(f"{'a cold evaluation, k = 6':<44} {tracker.update(hessian).products:5d} products")


if __name__ == "__main__":
    main()
