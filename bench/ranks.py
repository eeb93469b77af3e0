"""One rank against two on this machine, one thread each: gradient, Hessian product, an evaluation of eigenvalues.

    python bench/ranks.py          prints the ratios, and writes bench/results/ranks.json

FG's network at its full size (n = 5,000, 128 units) on random inputs; of two ranks the mean time counts, since each
sum makes them wait for each other. Half the time is the best that can be; any other load shows, and is noted.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch

from eos_utils.curvature import Hessian
from eos_utils.lanczos import top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.ranks import joined
from eos_utils.run import versions
from eos_utils.sharded import ShardedObjective

RESULT = pathlib.Path(__file__).parent / "results" / "ranks.json"
REPEATS = 7


def problem():
    """FG's network on random inputs with a spectrum like that of images."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3072, generator=random) * torch.arange(1, 3073) ** -0.5
    y = torch.eye(10)[torch.randint(10, (5000,), generator=random)]
    return Objective(fully_connected(3072, 128), "half_mse", x, y)


def measure(objective):
    """Median seconds of each."""
    theta = objective.initial()
    block = torch.randn(5, objective.P, generator=torch.Generator().manual_seed(1))
    tasks = {
        "gradient": lambda: objective.gradient(theta),
        "Hessian product, five vectors": lambda: Hessian(objective, theta).apply(block),
        "five eigenvalues": lambda: top_eigenpairs(Hessian(objective, theta), 5, tol=1e-3),
    }
    found = {}
    for name, task in tasks.items():
        times = []
        for _ in range(REPEATS if name != "five eigenvalues" else 3):
            begun = time.perf_counter()
            task()
            times.append(time.perf_counter() - begun)
        found[name] = statistics.median(times[1:])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        with joined(torch.device("cpu")) as ranks:
            found = measure(ShardedObjective(problem(), ranks))
            mean = ranks.sum(torch.tensor(list(found.values()), dtype=torch.float64)) / ranks.size
            if ranks.first:
                print(json.dumps(dict(zip(found, mean.tolist(), strict=True))))
        sys.exit()
    load = os.getloadavg()[0]
    one = measure(problem())
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = subprocess.run(start, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    two = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    rows = {name: {"one": one[name], "two": two[name], "ratio": one[name] / two[name]} for name in one}
    for name, row in rows.items():
        print(f"{name:<32} one {row['one']:.4f} s, two {row['two']:.4f} s: {row['ratio']:.2f} times as fast")
    facts = {"versions": versions(), "load": load, "cores": os.cpu_count(), "rows": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
