"""How time grows with n, width, depth, number of directions, k and P, each doubled; and the memory of large problems.

    python bench/growth.py [--threads 2] [--json FILE] [--quick] [--only memory|time]

A network 3072-width-...-10 (tanh) on random inputs whose principal directions decay as those of images do, float32. The
exponent is the slope of a least-squares line through log time against log size. *Product*: one direction of a block of
six. *Evaluation*: a cold, certified `top_eigenpairs`. Its peer are the matrix products that nothing can avoid; where
both have the same exponent, nothing grows faster than the work that must be done. Memory is the peak of resident
memory above data and network, each case in a process of its own (Linux only).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch
from hvp import seconds

from eos_utils.curvature import Hessian
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

BASE = {"n": 2500, "width": 128, "depth": 1, "directions": 6, "k": 4}
SWEEPS = {
    "n": (1250, 2500, 5000, 10000),
    "width": (64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8, 16),
    "directions": (1, 2, 4, 8, 16, 32),
    "k": (2, 4, 8, 16, 32),
}
MEMORY = {
    "n = 50,000, width 128": {"n": 50_000, "width": 128},
    "n = 5,000, width 4,096": {"n": 5000, "width": 4096},
    "n = 5,000, width 1,024, depth 3": {"n": 5000, "width": 1024, "depth": 3},
    "n = 5,000, width 1,024, depth 3, chunk 500": {"n": 5000, "width": 1024, "depth": 3, "chunk": 500},
    "n = 50,000, width 4,096, six products": {"n": 50_000, "width": 4096, "evaluate": False},
}


def problem(n, width, depth=1, chunk=None, inputs=3072):
    """A random problem, and a point that a few steps have moved from the initialisation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, generator=generator)
    x *= 8 / (1 + torch.arange(inputs)) ** 0.75
    y = torch.eye(10)[torch.randint(10, (n,), generator=generator)]
    network = fully_connected(inputs, width, depth, activation="tanh", seed=0)
    return Objective(network, "half_mse", x, y, chunk=chunk)


def measure(size, repeats):
    """Seconds of a product, of the matrix products it can not avoid, and of an evaluation."""
    objective = problem(size["n"], size["width"], size["depth"])
    theta, k = objective.initial(), size["directions"]
    hessian = Hessian(objective, theta)
    rows = torch.randn(k, objective.P, generator=torch.Generator().manual_seed(1))
    weights = [rows[:, c.weight].reshape(k * c.fan_out, c.fan_in) for c in objective.layers]
    a = [objective.x, *(torch.randn(objective.n, c.fan_out) for c in objective.layers)]
    wide = [torch.randn(objective.n, k * c.fan_out) for c in objective.layers]

    def bare():
        for c, w, into, back in zip(objective.layers, weights, a, wide, strict=False):
            into @ w.T, back.T @ into
            if c is not objective.layers[0]:  # and along the network: Ra Wᵀ and Rg W, and with g: Ra and V
                square, along = w[: c.fan_out], back.view(-1, c.fan_out)
                for _ in range(4):
                    along @ square

    objective.plane()  # once for a problem; not part of an evaluation
    product, least = seconds(lambda: hessian.apply(rows), repeats) / k, seconds(bare, repeats) / k
    begun = time.perf_counter()
    found = top_eigenpairs(Hessian(objective, theta), size["k"])
    evaluation = time.perf_counter() - begun
    return {
        "P": objective.P,
        "bare": least,
        "product": product,
        "evaluation": evaluation,
        "products": found.products,
        "coarse": found.coarse_products,
        "converged": found.converged,
    }


def exponent(sizes, seconds):
    """Slope of log time against log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def times(quick, repeats):
    """All sweeps, printed as they come."""
    result = {}
    for name, values in SWEEPS.items():
        rows = []
        if quick:
            values = values[:2]
        for value in values:
            size = {**BASE, name: value} | ({"n": 400} if quick and name != "n" else {})
            rows.append({name: value, **measure(size, repeats)})
            r = rows[-1]
            print(
                f"{name:>10} {value:6d}   P {r['P']:>9,d}   product {1e3 * r['product']:8.1f} ms"
                f" ({r['product'] / r['bare']:.2f} bare)   evaluation {r['evaluation']:7.2f} s"
                f" ({r['products']} + {r['coarse']} coarse products)",
                flush=True,
            )
        fits = {
            f"{what} in {along}": round(exponent([r[along] for r in rows], [r[what] for r in rows]), 2)
            for along in (name, *(["P"] if name in ("width", "depth") else []))
            for what in ("bare", "product", "evaluation")
        }
        print("           exponents: " + ", ".join(f"{what} {slope}" for what, slope in fits.items()), flush=True)
        result[name] = {"rows": rows, "exponents": fits}
    return result


def resident(field):
    """VmRSS or VmHWM of this process in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory_case(size):
    """Peak of resident memory above data and network: a gradient, then a cold evaluation and a tracked one."""
    evaluate = size.pop("evaluate", True)
    objective = problem(**size)
    theta = objective.initial()
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    objective.gradient(theta)
    gradient = resident("VmHWM") - before
    begun = time.perf_counter()
    probes, converged = 0, True
    if evaluate:
        tracker = EigenTracker(6)
        for _ in range(2):
            pairs = tracker.update(Hessian(objective, theta))
            probes, converged = max(probes, pairs.probe_products), converged and pairs.converged
        basis = (2 * 6 + 12 + probes) * 2  # rows and their images
    else:
        Hessian(objective, theta).apply(torch.randn(6, objective.P))
        basis = 6 * 2
    kept = objective.chunk * 4 * sum(c.fan_out for c in objective.layers)
    return {
        "P": objective.P,
        "chunk": objective.chunk,
        "gradient": gradient,
        "peak": resident("VmHWM") - before,
        "basis": basis * objective.P * 4 / 2**20,
        "activations": kept * 4 / 2**20,
        "seconds": time.perf_counter() - begun,
        "converged": converged,
    }


def memory(quick, threads):
    """Each case in a fresh process."""
    result = {}
    for name, size in MEMORY.items():
        if quick:
            size = {**size, "n": 600, "width": 32, "chunk": 300 if "chunk" in size else None}
        command = [sys.executable, __file__, "--case", json.dumps(size), "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: ended with {done.returncode}\n{done.stderr[-500:]}", flush=True)
            result[name] = {"returncode": done.returncode}
            continue
        r = result[name] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:<46} P {r['P']:>11,d}  chunk {r['chunk']:>6,d}: above the data {r['peak']:7,.0f} MiB,"
            f" of which Krylov basis {r['basis']:6,.0f}, kept passes {r['activations']:6,.0f};"
            f" a gradient {r['gradient']:6,.0f} MiB; {r['seconds']:.0f} s",
            flush=True,
        )
    return result


def main():
    """Prints the tables."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--json", type=pathlib.Path)
    arguments.add_argument("--only", choices=["memory", "time"])
    arguments.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    arguments.add_argument("--case", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.case:
        print(json.dumps(memory_case(json.loads(chosen.case))))
        return
    result = {"torch": torch.__version__, "threads": chosen.threads}
    if chosen.only != "memory":
        result["time"] = times(chosen.quick, 1 if chosen.quick else chosen.repeats)
    if chosen.only != "time":
        result["memory"] = memory(chosen.quick, chosen.threads)
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
