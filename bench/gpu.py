"""Everything that is to be measured on a GPU, with one command, without papermill, Jupyter or netCDF.

    python bench/gpu.py [--device cuda] [--json bench/results/gpu.json] [--quick]

1. The fp32 matrix rate of the device, and of products with the Hessian in blocks, as a share of it.
2. What TF32 does to that rate and to the eigenvalues (it is off everywhere else).
3. The Figure 1 run: seconds to 99 % accuracy with six eigenvalues every 15 steps, checks included.
4. ResNet-18 (batch statistics, 1,000 images): a gradient, a product, the two largest eigenvalues.
5. bench/engine.py: the ratios against the peers that are installed.

CIFAR-10 comes from EOS_DATA_DIR; without it the inputs are random and step 3 and 5 are left out. `--quick` is for a
trial on a CPU. Ten minutes on an H200 are plenty.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch

from eos_utils import catalogue, data
from eos_utils.curvature import Hessian
from eos_utils.descent import Descent, Stop, gradient_descent
from eos_utils.experiment import rational
from eos_utils.lanczos import EigenTracker, top_eigenpairs
from eos_utils.models import fully_connected, resnet18
from eos_utils.objective import Objective
from eos_utils.observers import Eigenvalues


def wait(device):
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device, repeats=10):
    """Median seconds of a call, after two to warm up."""
    function(), function()
    times = []
    for _ in range(repeats):
        wait(device)
        begun = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def images(n, device):
    """CIFAR-10, centred, or random images where there is none; one-hot targets."""
    if data.cifar10_available(n):
        d = data.load("cifar10", n=n)
        return d.x.to(device), d.y.to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3072, generator=generator) * 8 / (1 + torch.arange(3072)) ** 0.75
    return x.to(device), torch.eye(10)[torch.randint(10, (n,), generator=generator)].to(device)


def products(device, n, size, widths, blocks):
    """Matrix rate and Hessian products."""
    square = torch.randn(size, size, device=device)
    peak = 2 * size**3 / seconds(lambda: square @ square, device)
    result = {"matrix_tflops": peak / 1e12, "products": []}
    print(f"fp32 matrix rate: {peak / 1e12:.2f} TFLOP/s", flush=True)
    x, y = images(n, device)
    for width in widths:
        objective = Objective(fully_connected(3072, width, activation="tanh", seed=0), "half_mse", x, y)
        hessian = Hessian(objective, objective.initial())
        for block in blocks:
            rows = torch.randn(block, objective.P, device=device)
            each = seconds(lambda h=hessian, r=rows: h.apply(r), device) / block
            w, back = torch.randn(block * width, 3072, device=device), torch.randn(n, block * width, device=device)
            bare = seconds(lambda w=w, b=back: (x @ w.T, b.T @ x), device) / block
            share = 4 * n * 3072 * width / each / peak
            result["products"].append(
                {"width": width, "block": block, "seconds": each, "bare": bare, "share_of_matrix_rate": share}
            )
            print(
                f"width {width:5d}, block {block:3d}: {1e3 * each:8.3f} ms a product, {each / bare:.2f} bare, "
                f"{share:.0%} of the matrix rate",
                flush=True,
            )
    return result


def tf32(device, n, steps):
    """Rate and eigenvalues with TF32 allowed, against fp32 at the same point."""
    x, y = images(n, device)
    objective = Objective(fully_connected(3072, 128, activation="tanh", seed=0), "half_mse", x, y)
    theta = objective.initial()
    for _ in range(steps):
        theta = theta - 0.02 * objective.gradient(theta)[1]
    values, rates = {}, {}
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        hessian = Hessian(objective, theta)
        rows = torch.randn(24, objective.P, device=device, generator=torch.Generator(device).manual_seed(0))
        rates[allowed] = seconds(lambda h=hessian, r=rows: h.apply(r), device)
        values[allowed] = top_eigenpairs(hessian, 6, tol=1e-5).values
    torch.backends.cuda.matmul.allow_tf32 = False
    worst = float(((values[True] - values[False]).abs() / values[False][0]).max())
    print(f"TF32: products {rates[False] / rates[True]:.2f} times as fast, eigenvalues moved by {worst:.1e} of λ1")
    return {"speedup": rates[False] / rates[True], "worst_relative_change": worst}


def figure_1(device, steps):
    """Seconds of the run behind Figure 1 of FG."""
    run = catalogue.find("fg_fig1_seed100")
    objective = run.experiment.objective(device)
    observer = Eigenvalues(6, 15)
    wait(device)
    begun = time.perf_counter()
    descent = Descent(objective.initial(), float(rational(run.experiment.eta)))
    descent = gradient_descent(objective, descent, Stop(steps, accuracy=0.99), observers=[observer])
    took = time.perf_counter() - begun
    print(f"Figure 1: {took:.1f} s for {descent.step} steps, {len(observer.rows['step'])} evaluations")
    return {"seconds": took, "steps": descent.step, "status": descent.status, "last": observer.latest()}


def resnet(device, n, tracked):
    """ResNet-18: the generic path."""
    x, y = images(n, device)
    objective = Objective(resnet18(outputs=10), "mse", x, y)
    theta = objective.initial()
    hessian = Hessian(objective, theta)
    row = torch.randn(1, objective.P, device=device)
    result = {
        "P": objective.P,
        "gradient": seconds(lambda: objective.gradient(theta), device, 3),
        "product": seconds(lambda: hessian.apply(row), device, 3),
    }
    tracker = EigenTracker(2, tol=1e-2)
    for name in ("cold", "tracked") if tracked else ():
        begun = time.perf_counter()
        pairs = tracker.update(hessian)
        result[name] = {"seconds": time.perf_counter() - begun, "products": pairs.products}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    print(f"ResNet-18: {result}", flush=True)
    return result


def main():
    """Runs all of it and writes the file after each part, so that nothing is lost to a limit of time."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--json", type=pathlib.Path, default=pathlib.Path("bench/results/gpu.json"))
    arguments.add_argument("--quick", action="store_true")
    chosen = arguments.parse_args()
    device, quick = torch.device(chosen.device), chosen.quick
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device; --device cpu --quick is a trial run")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = {"device": name, "torch": torch.__version__, "quick": quick}
    n = 600 if quick else 5000
    parts = {
        "products": lambda: products(
            device, n, *((512, [32], [1, 6]) if quick else (8192, [128, 1024], [1, 6, 24, 64]))
        ),
        "tf32": lambda: tf32(device, n, 3 if quick else 600),
        "resnet18": lambda: resnet(device, 4 if quick else 1000, not quick),
    }
    if data.cifar10_available():
        parts["figure_1"] = lambda: figure_1(device, 20 if quick else 20_000)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    for part, function in parts.items():
        result[part] = function()
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    if data.cifar10_available() and not quick:
        engine = pathlib.Path(__file__).with_name("engine.py")
        file = chosen.json.with_name(chosen.json.stem + "-engine.json")
        subprocess.run([sys.executable, str(engine), "--device", str(device), "--json", str(file)], check=True)


if __name__ == "__main__":
    main()
