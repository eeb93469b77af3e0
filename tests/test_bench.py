"""The other solvers that the engine is timed against are right themselves, and the benchmark runs without extras."""

import copy
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eos_utils import data
from eos_utils.curvature import Hessian, dense
from eos_utils.models import fully_connected
from eos_utils.objective import Objective

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name, monkeypatch):
    """A file in bench/ as a module, which its neighbours can import while the test lasts."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peers(monkeypatch):
    return load("peers", monkeypatch)


@pytest.fixture
def engine(peers, monkeypatch):
    return load("engine", monkeypatch)


@pytest.fixture
def no_extras(monkeypatch):
    for module in ("curvlinops", "hessian_eigenthings", "pyhessian"):
        monkeypatch.setitem(sys.modules, module, None)


def problem(dtype):
    """A small net on random data, at a point that is no initialisation, and its spectrum in float64, falling."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=random, dtype=torch.float64)
    y = torch.eye(3, dtype=torch.float64)[torch.randint(3, (40,), generator=random)]
    network = fully_connected(6, 8, outputs=3, activation="tanh")
    exact = Objective(network, "half_mse", x, y)
    theta = (exact.initial() + 0.3 * torch.randn(exact.P, generator=random)).to(dtype)
    spectrum = torch.linalg.eigvalsh(dense(Hessian(exact, theta.double()))).flip(0)
    return Objective(copy.deepcopy(network), "half_mse", x.to(dtype), y.to(dtype)), theta, spectrum


def worst(found, expected):
    """The largest error, relative to the largest eigenvalue."""
    return float((found - expected).abs().max() / expected[0])


def test_cold_products_are_the_hessians(peers):
    objective, theta, _ = problem(torch.float64)
    products = peers.ColdProducts(objective, theta, chunk=7)  # does not divide n
    v = torch.randn(objective.P, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(products.apply(v), dense(Hessian(objective, theta)) @ v, rtol=1e-10, atol=1e-12)
    assert products.products == 1


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_locuslab_finds_the_largest_in_magnitude(peers, k, chunk):
    objective, theta, spectrum = problem(torch.float64)
    largest = spectrum[spectrum.abs().argsort(descending=True)[:k]].sort(descending=True).values
    found = peers.locuslab(objective, theta, k, chunk=chunk)
    assert worst(found.values, largest) < 1e-10
    assert found.products >= 2 * k + 1


@pytest.mark.parametrize("k", [1, 4])
def test_central_flows_finds_the_largest(peers, k):
    objective, theta, spectrum = problem(torch.float64)
    found = peers.central_flows(objective, theta, k)
    assert worst(found.values, spectrum[:k]) < 1e-9
    assert found.products > 4 * k


def test_central_flows_starts_from_its_last_answer(peers):
    objective, theta, _ = problem(torch.float64)
    memory = {}
    cold = peers.central_flows(objective, theta, 4, memory)
    near = theta + 1e-3 * torch.randn(objective.P, generator=torch.Generator().manual_seed(2))
    spectrum = torch.linalg.eigvalsh(dense(Hessian(objective, near))).flip(0)
    warm = peers.central_flows(objective, near, 4, memory)
    assert worst(warm.values, spectrum[:4]) < 1e-9
    assert warm.products < cold.products


@pytest.mark.parametrize("name", ["ours_cold", "ours_tracked"])
def test_ours_behind_the_same_signature(peers, name):
    objective, theta, spectrum = problem(torch.float64)
    memory = {}
    for _ in range(2):
        found = getattr(peers, name)(objective, theta, 4, memory)
        assert worst(found.values, spectrum[:4]) < 1e-3


@pytest.mark.parametrize("name", ["curvlinops", "eigenthings", "pyhessian"])
def test_packages_where_they_are_installed(peers, name):
    pytest.importorskip(peers.MODULES[name], reason=f"{peers.PACKAGES[name]} is an extra: pip install -e .[bench]")
    objective, theta, spectrum = problem(torch.float32)
    before = [p.clone() for p in objective.model.parameters()]
    found = getattr(peers, name)(objective, theta, 2)
    # Power iteration stops where it stands still, which is not yet where it is right.
    assert worst(found.values, spectrum[:2]) < (0.05 if name == "pyhessian" else 1e-4)
    assert found.products > 2
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(objective.model.parameters(), before, strict=True))


def test_quick_runs_without_extras_and_names_what_it_leaves_out(engine, no_extras, tmp_path, capsys):
    file, point = tmp_path / "engine.json", tmp_path / "theta.pt"
    words = ["--quick", "--threads", "1", "--end-to-end", "--json", str(file), "--theta", str(point)]
    engine.main(words)
    printed = capsys.readouterr().out
    for name in ("curvlinops", "eigenthings", "pyhessian"):
        assert f"left out: {name} (" in printed
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["left_out"] == ["curvlinops", "eigenthings", "pyhessian"]
    rows = {(r["peer"], r["setting"], r["k"]): r for r in result["rows"]}
    settings = ("stride 1", "stride 10, pairs", "stride 9")
    tracked = {(p, s) for p in ("central_flows", "ours") for s in settings}
    cold = {(p, "cold") for p in ("locuslab", "central_flows", "ours")}
    assert set(rows) == {(*row, k) for row in cold | tracked for k in (2, 4)}
    assert all(r["worst_error"] <= 1e-3 and r["seconds"] > 0 and r["references"] > 0 for r in rows.values())
    assert rows["ours", "stride 1", 4]["products_mean"] < rows["ours", "cold", 4]["products_mean"]
    assert result["end_to_end"]["ratio"] > 0
    assert result["conditions"]["versions"]["torch"] == torch.__version__
    assert platform.node() not in file.read_text(encoding="utf-8") or not platform.node()
    assert engine.starting_point(engine.QUICK, None, point).shape == (result["problem"]["P"],)
    with pytest.raises(SystemExit, match="another problem"):
        engine.starting_point(engine.Problem(), None, point)


def test_best_peer_is_the_fastest_accurate_one(engine):
    def row(peer, setting, seconds, error):
        return {"peer": peer, "setting": setting, "k": 6, "seconds": seconds, "worst_error": error}

    rows = [
        row("ours", "cold", 2.0, 1e-5),
        row("ours", "stride 1", 0.5, 1e-4),
        row("locuslab", "cold", 10.0, 1e-7),
        row("curvlinops", "cold", 8.0, 1e-3),
        row("pyhessian", "cold", 1.0, 2e-3),
        row("central_flows", "stride 1", 6.0, 1e-6),
        row("central_flows", "stride 9", 0.1, 1e-6),
    ]
    found = {what: (r["peer"], r["ratio"]) for what, r in engine.ratios(rows, 6).items()}
    assert found == {
        "locuslab / ours, cold": ("locuslab (cold)", 5.0),
        "best accurate peer / ours, cold": ("curvlinops (cold)", 4.0),
        "fastest of any accuracy / ours, cold": ("pyhessian (cold)", 0.5),
        "locuslab / ours, stride 1": ("locuslab (cold)", 20.0),
        "best accurate peer / ours, stride 1": ("central_flows (stride 1)", 12.0),
        "fastest of any accuracy / ours, stride 1": ("pyhessian (cold)", 2.0),
    }


def test_tracked_patterns(engine):
    patterns = engine.patterns(600, 5)
    assert patterns["stride 1"] == [601, 602, 603, 604, 605]
    assert patterns["stride 10, pairs"] == [601, 610, 611, 620, 621]
    assert patterns["stride 9"] == [609, 618, 627, 636, 645]


@pytest.mark.slow
def test_everything_for_a_gpu_runs_with_one_command(tmp_path):
    """A trial on the CPU, so that a lent machine is not spent on mistakes of the script."""
    file = tmp_path / "results" / "gpu.json"
    command = [sys.executable, "-W", "ignore", str(BENCH / "gpu.py"), "--device", "cpu", "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    wanted = {"products", "tf32", "resnet18"} | ({"figure_1"} if data.cifar10_available() else set())
    assert wanted <= set(found) and found["tf32"]["worst_relative_change"] == 0.0
    if "figure_1" in found:
        assert (found["figure_1"]["steps"], found["figure_1"]["status"]) == (20, "steps")
