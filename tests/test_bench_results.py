"""The page on the eigenvalues: its tables come from files, and its live check can fail."""

import json
from types import SimpleNamespace

import pytest
import torch

from eos_utils import bench_results as bench
from eos_utils import data
from eos_utils.curvature import Hessian, dense
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.store import StoreError


@pytest.mark.parametrize("table", [bench.peers, bench.ratios, bench.memory, bench.gram])
def test_tables_are_whole(table):
    header, rows = table()
    assert rows and all(len(row) == len(header) and all(row) for row in rows)


def test_numbers_on_the_page_are_those_of_the_full_problem():
    engine = bench.read("engine")
    assert (engine["problem"]["n"], engine["problem"]["P"], engine["problem"]["ks"]) == (5000, 394634, [6, 20])
    assert engine["left_out"] == [] and engine["end_to_end"]["steps"] == 2000
    ours = [r for r in engine["rows"] if r["peer"] == "ours"]
    assert ours and all(r["worst_error"] <= 1e-3 for r in ours)
    most = {6: 20, 20: 38}
    assert all(r["products_mean"] <= most[r["k"]] for r in ours if r["setting"] != "cold")


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EOS_ROOT", str(tmp_path))
    with pytest.raises(StoreError, match=r"bench/results/engine.json can not be read.*bench/README.md"):
        bench.peers()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "engine.json").write_text("{")
    with pytest.raises(StoreError, match="can not be read"):
        bench.peers()
    assert "Nothing on this page was measured on a GPU" in bench.gpu()
    found = {"device": "X", "torch": "2", "tf32": {"worst_relative_change": 1e-4}}
    found["products"] = {"products": [{"share_of_matrix_rate": 0.5}, {"share_of_matrix_rate": 0.7}]}
    (tmp_path / "bench" / "results" / "gpu.json").write_text(json.dumps(found))
    assert "70% of the fp32 matrix rate" in bench.gpu()


def test_bounds_hold_against_the_dense_hessian():
    exact = bench.against_dense(SimpleNamespace(n=120, width=5, steps=50, eta="3/10", k=4, seed=0))
    assert exact.P == 64 * 5 + 5 + 60 and exact.worst_error <= 1e-3
    assert (exact.pairs.values <= exact.true + 1e-9).all() and (exact.true <= exact.pairs.upper + 1e-9).all()


def test_outside_of_axes_is_the_norm_that_a_projection_loses():
    d = data.load("digits", n=200, preprocessing="center").to("cpu", torch.float64)
    objective = Objective(fully_connected(64, 4, seed=1), "half_mse", d.x, d.y)
    theta = objective.initial()
    outside = bench.outside_of_axes(objective, theta, 2)
    matrix = dense(Hessian(objective, theta))
    vector = torch.linalg.eigh(matrix)[1][:, -1][: 4 * 64].view(4, 64)
    axes = torch.linalg.svd(d.x, full_matrices=False)[2][:8]
    lost = float((vector - vector @ axes.T @ axes).norm())
    assert outside.axes[3] == 8 and outside.part[0][3] == pytest.approx(lost, rel=1e-3)
    assert outside.worst(10) == max(part[3] for part in outside.part)
