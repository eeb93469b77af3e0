"""The engine against other ways to compute the k largest Hessian eigenvalues, in one process, on one problem.

    python bench/engine.py [--threads 2] [--json FILE] [--theta FILE] [--end-to-end] [--quick]

The problem: 5,000 CIFAR-10 images (standardised), 3072-128-10 tanh, half the squared error, float32, gradient descent
with eta = 2/50, whose iterates are at the Edge of Stability from step 600 on, where the measurements begin.

Cold: every peer at the same few steps, with no knowledge of an earlier one. Tracked: the peers that start from their
last answer, at consecutive steps, at every tenth step and the one after it, and at every ninth, where each evaluation
falls on the other side of the period-two oscillation; their very first evaluation, which is cold, does not count. All
peers measure on one pass along the trajectory, in turn.

The reference is ARPACK in float64 at a tolerance of 1e-8 on our products, so that our solver has no part in it, and
not timed: at every cold evaluation, and at every ninth tracked one of ours, since it costs more than what it checks.
A mistake in our products would show as an error of the peers, which have their own.

What depends on the data alone (the principal plane of the inputs, ours) is computed before and its time stated; the
run from end to end includes it. Importing is not timed. Peers that need a package: pip install -e .[bench]
"""

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import peers
import scipy
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from threadpoolctl import threadpool_limits

from eos_utils import data
from eos_utils.bench_results import outside_of_axes
from eos_utils.curvature import Hessian
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

ACCURATE = 1e-3  # worst error of an eigenvalue, relative to the largest
SPARSE = 9  # every how many tracked evaluations of ours there is a reference: no divisor of 20, so all phases are met
COLD, OURS = "cold", "ours"


@dataclass(frozen=True)
class Problem:
    """What is measured, and where on its trajectory."""

    dataset: str = "cifar10"
    n: int = 5000
    width: int = 128
    eta: float = 2 / 50
    first: int = 600
    ks: tuple[int, ...] = (6, 20)

    def objective(self, device):
        """The loss, in float32, at the initialisation of seed 0."""
        d = data.load(self.dataset, n=self.n, preprocessing="standardize").to(device, torch.float32)
        network = fully_connected(d.x.shape[1], self.width, outputs=d.y.shape[1], activation="tanh", seed=0)
        return Objective(network, "half_mse", d.x, d.y)


QUICK = Problem("digits", n=100, width=64, eta=2 / 5, first=60, ks=(2, 4))


# --- along the trajectory -----------------------------------------------------------------------------------


def descend(objective, theta, eta, steps):
    """theta after so many steps of gradient descent."""
    for _ in range(steps):
        theta = theta - eta * objective.gradient(theta)[1]
    return theta


def starting_point(problem, objective, file):
    """theta at the first measured step, read from ``file`` where it is there, else computed and written to it."""
    if file is not None and file.exists():
        saved = torch.load(file, weights_only=True)
        if saved["problem"] != repr(problem):
            raise SystemExit(f"{file} holds a point of another problem: {saved['problem']}")
        return saved["theta"]
    theta = descend(objective, objective.initial(), problem.eta, problem.first)
    if file is not None:
        torch.save({"problem": repr(problem), "theta": theta}, file)
    return theta


class Reference:
    """The k largest eigenvalues in float64, at one point after the other."""

    def __init__(self, objective, k):
        network = copy.deepcopy(objective.model).double()
        self.objective = Objective(network, objective.loss, objective.x.double(), objective.y.double())
        self.k, self.start = k, peers.start_vector(objective.P, "float64")

    def values(self, theta):
        """At theta, falling."""
        hessian = Hessian(self.objective, theta.double())

        def product(v):
            return (hessian @ torch.from_numpy(v.reshape(-1)).to(hessian.device)).cpu().numpy()

        operator = LinearOperator(hessian.shape, matvec=product, dtype="float64")
        found = eigsh(operator, self.k, which="LA", tol=1e-8, v0=self.start, return_eigenvectors=False)
        return torch.from_numpy(found).sort(descending=True).values


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass
class Series:
    """One peer's evaluations in one setting: where they are due, and what came out."""

    peer: str
    setting: str
    k: int
    steps: list[int]
    checked: set[int]
    memory: dict | None = None
    seconds: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    coarse: list[int] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)

    @property
    def function(self):
        """The peer, as a function."""
        return (peers.COLD if self.setting == COLD else peers.TRACKED)[self.peer]

    def evaluate(self, objective, theta):
        """One timed evaluation; returns its eigenvalues."""
        begun = time.perf_counter()
        answer = self.function(objective, theta, self.k, self.memory)
        self.seconds.append(time.perf_counter() - begun)
        self.products.append(answer.products)
        self.coarse.append(answer.coarse)
        return answer.values

    def compare(self, values, reference):
        """Worst error relative to the largest eigenvalue, and relative to each one's own size."""
        difference = (values - reference[: self.k]).abs()
        own = difference / reference[: self.k].abs()
        self.errors.append((float(difference.max() / reference[0].abs()), float(own.max())))

    def summary(self):
        """The row of the table."""
        typical = statistics.median if self.setting == COLD else statistics.mean
        return {
            "peer": self.peer,
            "setting": self.setting,
            "k": self.k,
            "evaluations": len(self.seconds),
            "seconds": typical(self.seconds),
            "seconds_least": min(self.seconds),
            "seconds_most": max(self.seconds),
            "products_mean": statistics.mean(self.products),
            "products_most": max(self.products),
            "coarse_mean": statistics.mean(self.coarse),
            "coarse_most": max(self.coarse),
            "references": len(self.errors),
            "worst_error": max(error for error, _ in self.errors),
            "worst_own_error": max(own for _, own in self.errors),
        }


def patterns(first, count):
    """Steps of ``count`` tracked evaluations after one at the first step, in three patterns."""
    return {
        "stride 1": [first + i for i in range(1, count + 1)],
        "stride 10, pairs": [first + 10 * (i // 2) + i % 2 for i in range(1, count + 1)],
        "stride 9": [first + 9 * i for i in range(1, count + 1)],
    }


def plan(problem, evaluations, tracked, absent):
    """All series; only ours is tracked for long, since ``evaluations`` say enough of a peer that takes minutes."""
    cold = [problem.first + 10 * i for i in range(evaluations)]
    series = []
    for k in problem.ks:
        series += [Series(peer, COLD, k, cold, set(cold)) for peer in peers.COLD if peer not in absent]
        for setting, steps in patterns(problem.first, tracked).items():
            for peer in peers.TRACKED:
                due = steps if peer == OURS else steps[:evaluations]
                series.append(Series(peer, setting, k, due, set(due[:: SPARSE if peer == OURS else 1])))
    return series


def warm_up(objective, theta, series):
    """Gives every tracked series what an evaluation at the first step leaves behind; that one does not count."""
    left = {}
    for s in series:
        if s.setting != COLD:
            if (s.peer, s.k) not in left:
                left[s.peer, s.k] = memory = {}
                s.function(objective, theta, s.k, memory)
            s.memory = copy.deepcopy(left[s.peer, s.k])


def measure(problem, objective, theta, series):
    """Walks along the trajectory, step by step, and lets every series that is due evaluate."""
    warm_up(objective, theta, series)
    reference = Reference(objective, max(problem.ks))
    last = max(step for s in series for step in s.steps)
    for step in range(problem.first, last + 1):
        due = [s for s in series if step in s.steps]
        exact = reference.values(theta) if any(step in s.checked for s in due) else None
        for s in due:
            values = s.evaluate(objective, theta)
            if step in s.checked:
                s.compare(values, exact)
            if s.peer != OURS or step % 10 == 0:
                done = f"{s.seconds[-1]:.2f} s, {s.products[-1]} products"
                print(f"step {step} of {last}: {s.peer}, {s.setting}, k = {s.k}: {done}", flush=True)
        theta = descend(objective, theta, problem.eta, 1)


# --- a whole run ------------------------------------------------------------------------------------------------


def plain_step(objective, theta, eta):
    """A step in the older code's style: the loss in one pass over the chunks, then the gradient in another."""
    chunks = list(zip(objective.x.split(peers.CHUNK), objective.y.split(peers.CHUNK), strict=True))
    with torch.no_grad():
        float(sum(objective._share(theta, x, y)[0] for x, y in chunks))
    leaf = theta.detach().clone().requires_grad_(True)
    for x, y in chunks:
        objective._share(leaf, x, y)[0].backward()
    return theta - eta * leaf.grad


def end_to_end(problem, device, steps, every, samples):
    """Seconds of a whole run: ours in full, locuslab's from samples on the same trajectory, and how many there were."""
    objective = problem.objective(device)  # afresh: what ours computes once for the data counts here
    theta, memory, k = objective.initial(), {}, problem.ks[0]
    ours, losses, step_seconds, evaluation_seconds = 0.0, [], [], []
    for step in range(steps):
        if step % (steps // samples) == 0:
            begun = time.perf_counter()
            plain_step(objective, theta, problem.eta)
            between = time.perf_counter()
            peers.locuslab(objective, theta, k)
            step_seconds.append(between - begun)
            evaluation_seconds.append(time.perf_counter() - between)
            print(f"end to end: step {step} of {steps}", flush=True)
        begun = time.perf_counter()
        value, gradient, _ = objective.gradient(theta)
        losses.append(float(value))
        if step % every == 0:
            peers.ours_tracked(objective, theta, k, memory)
        theta = theta - problem.eta * gradient
        ours += time.perf_counter() - begun
    evaluations = len(range(0, steps, every))
    theirs = steps * statistics.median(step_seconds) + evaluations * statistics.mean(evaluation_seconds)
    return {
        "steps": steps,
        "k": k,
        "every": every,
        "evaluations": evaluations,
        "ours_seconds": ours,
        "locuslab_seconds_extrapolated": theirs,
        "locuslab_samples": len(evaluation_seconds),
        "locuslab_seconds_per_step": statistics.median(step_seconds),
        "locuslab_seconds_per_evaluation": statistics.mean(evaluation_seconds),
        "ratio": theirs / ours,
        "last_loss": losses[-1],
    }


# --- the report ---------------------------------------------------------------------------------------------------


def ratios(rows, k):
    """How many times longer than ours: locuslab, the fastest accurate peer and the fastest of any accuracy.

    A cold evaluation of ours is compared with cold ones, a tracked one with cold and tracked ones.
    """
    result = {}
    for ours in (r for r in rows if r["peer"] == OURS and r["k"] == k):
        others = [r for r in rows if r["peer"] != OURS and r["k"] == k and r["setting"] in (COLD, ours["setting"])]
        choices = {
            "locuslab": [r for r in others if r["peer"] == "locuslab"],
            "best accurate peer": [r for r in others if r["worst_error"] <= ACCURATE],
            "fastest of any accuracy": others,
        }
        for what, candidates in choices.items():
            if candidates:
                best = min(candidates, key=lambda r: r["seconds"])
                ratio = {"peer": f"{best['peer']} ({best['setting']})", "ratio": best["seconds"] / ours["seconds"]}
                result[f"{what} / ours, {ours['setting']}"] = ratio
    return result


def conditions(objective, threads):
    """Versions and machine, as far as they bear on the numbers."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "scipy": scipy.__version__}
    for package in ("numpy", *peers.PACKAGES.values()):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "threads": threads, "device": str(objective.device), "cpu": processor()}


def processor():
    """The processor's model, without anything that names the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def show(rows, chosen_ratios, whole):
    """The tables, for people."""
    head = f"{'setting':<17} {'peer':<14} {'number':>6} {'seconds':>9} {'least':>8} {'most':>8}"
    head += f" {'products':>9} {'most':>5} {'coarse':>7} {'most':>5} {'err/λ1':>8} {'err/λi':>8}"
    for k in sorted({r["k"] for r in rows}):
        print(f"\nk = {k}\n{head}")
        for r in (r for r in rows if r["k"] == k):
            line = f"{r['setting']:<17} {r['peer']:<14} {r['evaluations']:6d} {r['seconds']:9.3f}"
            line += f" {r['seconds_least']:8.3f} {r['seconds_most']:8.3f} {r['products_mean']:9.1f}"
            line += f" {r['products_most']:5d} {r['coarse_mean']:7.1f} {r['coarse_most']:5d}"
            print(f"{line} {r['worst_error']:8.1e} {r['worst_own_error']:8.1e}")
        for what, ratio in chosen_ratios[k].items():
            print(f"{what:<50} {ratio['ratio']:7.2f}   {ratio['peer']}")
    print("\nseconds: median over cold evaluations, mean over tracked ones; products: Hessian-vector products,")
    print("mean and most; coarse: products with its compression to the principal plane of the inputs, mean and most")
    print(f"accurate: no eigenvalue off by more than {ACCURATE:g} of the largest")
    if whole:
        print(
            f"\n{whole['steps']} steps, k = {whole['k']} every {whole['every']}: ours {whole['ours_seconds']:.1f} s; "
            f"locuslab {whole['locuslab_seconds_extrapolated']:.1f} s, extrapolated from {whole['locuslab_samples']} "
            f"evaluations of {whole['locuslab_seconds_per_evaluation']:.2f} s and steps of "
            f"{whole['locuslab_seconds_per_step']:.3f} s; ratio {whole['ratio']:.1f}"
        )


def arguments(words=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--evaluations", type=int, default=3, help="cold evaluations of each peer")
    parser.add_argument("--tracked", type=int, default=100, help="tracked evaluations of ours in each setting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--theta", type=Path, metavar="FILE", help="keep the point where measuring begins there")
    parser.add_argument("--end-to-end", action="store_true", help="also a whole run of 2000 steps")
    parser.add_argument("--quick", action="store_true", help="a tiny problem, one evaluation each: does it all work?")
    return parser.parse_args(words)


def main(words=None):
    """Measures, prints, writes."""
    chosen = arguments(words)
    problem, evaluations, tracked = Problem(), chosen.evaluations, chosen.tracked
    if chosen.quick:
        problem, evaluations, tracked = QUICK, 1, 2
    torch.set_num_threads(chosen.threads)
    absent = peers.missing()
    for name in absent:
        print(f"left out: {name} ({peers.PACKAGES[name]} is not installed; pip install -e .[bench])")
    with threadpool_limits(limits=chosen.threads, user_api="blas"):
        device = torch.device(chosen.device)
        objective = problem.objective(device)
        theta = starting_point(problem, objective, chosen.theta)
        begun = time.perf_counter()
        objective.plane()
        once = time.perf_counter() - begun
        outside = vars(outside_of_axes(objective, theta, problem.ks[0]))
        series = plan(problem, evaluations, tracked, absent)
        measure(problem, objective, theta, series)
        whole = None
        if chosen.end_to_end:
            steps, every, samples = (20, 10, 2) if chosen.quick else (2000, 10, 20)
            whole = end_to_end(problem, device, steps, every, samples)
    rows = [s.summary() for s in series]
    found = {k: ratios(rows, k) for k in problem.ks}
    about = conditions(objective, chosen.threads)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"\n{problem}, P = {objective.P}\n{versions}\n{about['cpu']}, {about['device']}, {chosen.threads} threads")
    print(f"once for the data, ours: {once:.2f} s")
    show(rows, found, whole)
    if chosen.json is not None:
        result = {"problem": vars(problem) | {"P": objective.P}, "conditions": about, "left_out": absent}
        result |= {
            "once_for_the_data_seconds": once,
            "plane": outside,
            "rows": rows,
            "ratios": found,
            "end_to_end": whole,
        }
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
