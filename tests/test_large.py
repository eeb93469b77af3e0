"""The costs on paper: limits, and that the page says what the functions give."""

import json
import pathlib
import re

import pytest

from eos_utils import large

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "book" / "large.md").read_text(encoding="utf-8")
GPU = large.Machine(flops=2e13, link=1e11, memory=80e9)


def cells(title):
    """The numbers of a row of the page."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {title} |"))
    return [float(re.sub(r"[^0-9.]", "", cell)) for cell in row.split("|")[2:-1]]


@pytest.mark.parametrize("column, problem, time", [(0, large.RESNET18, 1.0), (1, large.SHALLOW, 1e3)])
def test_the_page_says_what_the_functions_give(column, problem, time):
    arithmetic, communication = large.seconds(problem, 8, GPU)
    expected = {
        "parameters": problem.P / 1e6,
        "FLOPs a product, each of 8 ranks": large.flops(problem, 8) / 1e12,
        "arithmetic": arithmetic * time,
        "bytes sent by a rank": large.sent(problem, 8) / 1e6,
        "communication": communication * 1e3,
        "both are equal at": large.balance(problem, GPU),
        "bytes held, 40 vectors": large.held(problem, 8, 40) / 1e9,
    }
    found = {row: cells(row)[column] for row in expected}
    assert found == pytest.approx(expected, rel=0.02)


def test_the_page_says_what_was_measured():
    rows = json.loads((ROOT / "bench" / "results" / "ranks.json").read_text(encoding="utf-8"))["rows"]
    for name, title in zip(rows, ("gradient", "Hessian product, five vectors", "five eigenvalues, cold"), strict=True):
        assert cells(title) == pytest.approx(list(rows[name].values()), rel=0.01)


def test_times_meet_where_the_balance_says():
    problem = large.Problem(n=1000, inputs=10, P=500, forward=2e4)
    at = large.balance(problem, GPU)
    arithmetic = large.flops(problem, 1) / at / GPU.flops
    assert arithmetic == pytest.approx(2 * (at - 1) / at * problem.width * problem.P / GPU.link)
    assert large.sent(problem, 1) == 0 and large.flops(problem, 4) == large.flops(problem, 1) / 4


def test_parameters_of_resnet18_are_torchvision_s():
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    stem = 64 * 3 * 3 * 3 - model.conv1.weight.numel()  # 3x3 for images of 32x32
    assert large.RESNET18.P == sum(p.numel() for p in model.parameters()) + stem
