"""Shared fixtures: nothing of the user's is read or written, nothing is downloaded, and problems are tiny."""

import os
import pathlib

import hypothesis
import pytest
import torch

from eos_utils import data
from eos_utils.experiment import Experiment, Measure

hypothesis.settings.register_profile("eos", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("eos")

WITHOUT = pytest.StashKey[dict[str, int]]()


def _cifar_place() -> str | None:
    """Where this machine keeps CIFAR-10, looked up before the fixtures hide it."""
    if not data.cifar10_available():
        return None
    return os.environ.get("EOS_DATA_DIR") or str(data.cache_folder() / "cifar10")


def pytest_configure(config):
    config.stash[WITHOUT] = {}


@pytest.fixture(scope="session")
def cifar_place():
    return _cifar_place()


def pytest_collection_modifyitems(config, items):
    missing = {
        "cifar": "CIFAR-10 is not on this machine (set EOS_DATA_DIR)" if _cifar_place() is None else None,
        "gpu": None if torch.cuda.is_available() else "this machine has no CUDA device",
    }
    for item in items:
        for mark, reason in missing.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
                text = f"{reason}; tests marked {mark!r} did not run"
                config.stash[WITHOUT][text] = config.stash[WITHOUT].get(text, 0) + 1


def pytest_terminal_summary(terminalreporter, config):
    for text, count in config.stash[WITHOUT].items():
        terminalreporter.write_line(f"NOT CHECKED: {text} ({count})", yellow=True, bold=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """A cache folder of the test's own, and no network; the data folder only for tests that ask for CIFAR-10."""
    monkeypatch.setenv("EOS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EOS_OFFLINE", "1")
    if request.node.get_closest_marker("cifar"):
        monkeypatch.setenv("EOS_DATA_DIR", request.getfixturevalue("cifar_place"))
    return tmp_path / "cache"


@pytest.fixture
def own_root(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty repository root: experiments/ and results/ of the test's own."""
    root = tmp_path / "root"
    (root / "experiments").mkdir(parents=True)
    monkeypatch.setenv("EOS_ROOT", str(root))
    return root


@pytest.fixture
def tiny() -> Experiment:
    """Digits, 610 parameters, 40 steps at a step size with which λ1 enters EoS on the way."""
    return Experiment(dataset="digits", n=200, width=8, eta="2/2", steps=40)


@pytest.fixture
def measure() -> Measure:
    return Measure(k=2, stride=1, snapshots=("entry", "end"))


@pytest.fixture
def short() -> Experiment:
    """Six steps of the same, where only the machinery round the run matters."""
    return Experiment(dataset="digits", n=200, width=8, eta="2/2", steps=6)


@pytest.fixture
def sparse() -> Measure:
    return Measure(k=2, stride=3, snapshots=("end",))
