"""Versions, lock, environment, workflow, documents and notebooks agree with each other."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from eos_utils import claims, launch

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PAIR = {Requirement(r).name: Requirement(r).specifier for r in PYPROJECT["tool"]["eos"]["torch"]}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SUPPORTED = ["3.11.0", "3.11.14", "3.12.0", "3.13.0"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(*extras: str) -> dict[str, SpecifierSet]:
    """Names and specifiers that pyproject.toml asks for."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


def lock_entries() -> list[tuple[Requirement, list[str]]]:
    """The pins of requirements.lock, each with its hashes."""
    entries = []
    for line in read("requirements.lock").replace("\\\n", " ").splitlines():
        pin, *hashes = line.split(" --hash=")
        entries.append((Requirement(pin.strip()), [h.strip() for h in hashes]))
    return entries


def project_files() -> list[Path]:
    """Files that are tracked or about to be; in an unpacked archive, all but what is built."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        built = {".git", ".venv", "_build", "runs"}
        paths = [p for p in ROOT.rglob("*") if not built & set(p.relative_to(ROOT).parts)]
    return [p for p in paths if p.is_file()]


def project_texts() -> dict[str, str]:
    texts = {}
    for path in project_files():
        data = path.read_bytes()
        if b"\0" not in data[:8192] and len(data) < 2_000_000:
            texts[path.relative_to(ROOT).as_posix()] = data.decode("utf-8")
    return texts


def fenced(document: str, heading: str) -> list[list[str]]:
    """The commands in each fenced block below a heading, without comments."""
    section = read(document).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.S | re.M)
    return [[line.split("#")[0].strip() for line in b.splitlines() if line.strip()] for b in blocks]


def make_rule(target: str) -> list[str]:
    """The prerequisites of a Makefile target."""
    line = re.search(rf"^{target}:([^#\n]*)", read("Makefile"), flags=re.M)
    assert line, f"the Makefile has no target {target}"
    return line[1].split()


# --- versions -------------------------------------------------------------------------------------


def test_lock_names_no_place():
    place = re.compile(r"https?:|file:|/|\bindex\b|--find-links|[\w-]+\.(?:org|com|io)\b")
    assert place.findall(read("requirements.lock")) == []


def test_lock_every_pin_is_exact_and_hashed():
    entries = lock_entries()
    assert len(entries) > 50
    for requirement, hashes in entries:
        assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement


def test_lock_leaves_out_torch_and_what_it_drags_in():
    names = {canonicalize_name(r.name) for r, _ in lock_entries()}
    assert not names & {"torch", "torchvision", "triton", "sympy", "cuda-toolkit"}
    assert not {n for n in names if n.startswith("nvidia-")}


@pytest.mark.parametrize("python", SUPPORTED)
def test_lock_satisfies_pyproject(python):
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])
    here = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    pins: dict[str, Version] = {}
    for requirement, _ in lock_entries():
        if requirement.marker is None or requirement.marker.evaluate(here):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice for Python {python}"
            pins[name] = Version(str(requirement.specifier).removeprefix("=="))
    for name, specifier in requirements("book", "test", "cluster").items():
        if name not in PAIR:
            assert pins[name] in specifier, f"{name} {pins[name]} is not {specifier}"


def test_torch_pair_is_pinned_and_admitted():
    assert set(PAIR) == {"torch", "torchvision"}
    for name, pin in PAIR.items():
        version = Version(str(pin).removeprefix("=="))
        assert version in requirements()[name]


@pytest.mark.parametrize("name", PAIR)
def test_readme_states_the_torch_pair(name):
    stated = re.findall(rf"(?<![\w-]){name}(?: |==)(\d+\.\d+\.\d+)", read("README.md"))
    assert stated, f"README.md does not say which {name} is installed"
    assert {f"=={v}" for v in stated} == {str(PAIR[name])}


def test_environment_agrees_with_pyproject():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-e .[book,test,cluster]"]
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert "pip" in conda and "python=3.11" in conda
    renamed = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
    asked = requirements("book", "test", "cluster")
    seen = set()
    for requirement in (Requirement(d) for d in conda if d != "pip" and not d.startswith("python=")):
        name = renamed.get(requirement.name, requirement.name)
        assert requirement.specifier == asked[name], name
        seen.add(name)
    card = {"torch", "torchvision", "numpy", "scipy", "xarray", "h5netcdf", "scikit-learn", "matplotlib"}
    assert seen >= card | {"seaborn", "tqdm", "papermill", "jupyter-book"}


def test_one_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"
    holder = citation["authors"][0]["name"]
    assert holder == PROJECT["authors"][0]["name"]
    assert holder in read("LICENSE")
    assert "## [Unreleased]" in read("CHANGELOG.md") or f"## [{PROJECT['version']}]" in read("CHANGELOG.md")


def test_binder_takes_the_pinned_pair_and_this_package():
    script = read(".binder/postBuild")
    assert (ROOT / ".binder/postBuild").stat().st_mode & 0o111 and script.startswith("#!/bin/bash\n")
    (pair,) = re.findall(r"^pair=\$\((.+)\)$", script, flags=re.M)
    command = shlex.split(pair)
    told = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.split() == PYPROJECT["tool"]["eos"]["torch"]
    assert "--editable '.[book]'" in script
    python = read(".binder/runtime.txt").strip().removeprefix("python-")
    assert Version(f"{python}.0") in SpecifierSet(PROJECT["requires-python"])
    subprocess.run(["bash", "-n", ROOT / ".binder/postBuild"], check=True)


# --- commands -------------------------------------------------------------------------------------


def test_contributing_lists_what_ci_runs():
    steps = re.findall(r"^\s*step (.+)$", read(".ci/run"), flags=re.M)
    assert steps[:2] == ["make book", "make test"]
    ci, parts = fenced("CONTRIBUTING.md", "What CI runs")
    assert ci == steps
    assert parts == ["make " + p.replace("$(BOOK)", "book") for p in make_rule("test")]


def test_workflow_runs_the_same_two_commands():
    workflow = yaml.safe_load(read(".github/workflows/book.yml"))
    runs = [s["run"] for job in workflow["jobs"].values() for s in job["steps"] if "run" in s]
    assert runs == ["make book", "make test"]


def test_workflow_has_minimal_permissions():
    workflow = yaml.safe_load(read(".github/workflows/book.yml"))
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert granted == {"deploy": {"pages": "write", "id-token": "write"}}
    assert "refs/heads/main" in workflow["jobs"]["deploy"]["if"]
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        for used in (s["uses"] for s in job["steps"] if "uses" in s):
            assert re.fullmatch(r"actions/[\w-]+@v\d+", used), used


def test_dependabot_leaves_python_alone():
    updates = yaml.safe_load(read(".github/dependabot.yml"))["updates"]
    assert [u["package-ecosystem"] for u in updates] == ["github-actions"]


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.M))
    assert targets >= {"help", "book", "test"}
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".pre-commit-config.yaml"):
        named = set(re.findall(r"(?:`|^|&& )make ([a-z]+)", read(document), flags=re.M))
        assert named <= targets, f"{document}: {sorted(named - targets)}"


def test_make_installs_no_system_packages():
    recipes = re.findall(r"^\t.*", read("Makefile").replace("\\\n", " "), flags=re.M)
    said = re.compile(r'"[^"]*"')  # what it tells the user to do is not what it does
    words = {w for line in recipes for w in re.split(r"[\s;&|@]+", said.sub("", line))}
    assert "ruff" in " ".join(words)
    assert not words & {"sudo", "apt", "apt-get", "dnf", "yum", "brew", "conda"}


def test_every_target_explains_itself():
    phony = re.search(r"^\.PHONY: (.+)$", read("Makefile"), flags=re.M)[1].split()
    explained = set(re.findall(r"^([a-z]+):.*## \S", read("Makefile"), flags=re.M))
    assert set(phony) == explained


def test_pre_commit_runs_locked_tools_only():
    repos = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert [r["repo"] for r in repos] == ["local"]
    tools = {shlex.split(h["entry"])[0] for h in repos[0]["hooks"]}
    assert all(t.startswith(".venv/bin/") for t in tools)
    locked = {canonicalize_name(r.name) for r, _ in lock_entries()} | {"python"}
    assert {t.rpartition("/")[2] for t in tools} <= locked


# --- files ----------------------------------------------------------------------------------------


def test_no_file_names_a_machine():
    path = re.compile(r"(?<![\w.$}*-])/(?:work|root|home/\w+|Users/\w+|opt)/[\w.-]+")
    texts = project_texts()
    assert "pyproject.toml" in texts and "Makefile" in texts
    own = {name: text for name, text in texts.items() if "/_static/" not in name}
    assert {name: m[0] for name, text in own.items() if (m := path.search(text))} == {}


def test_only_ci_knows_where_the_data_lie():
    place = "/".join(["..", "shared"])
    assert [name for name, text in project_texts().items() if place in text] == [".ci/run"]


def test_recorded_results_stay_small():
    sizes = {p: p.stat().st_size for p in project_files()}
    results = sum(n for p, n in sizes.items() if "results" in p.relative_to(ROOT).parts[:1])
    assert results < 35_000_000
    assert max(sizes.values()) < 10_000_000


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stripped_and_parameterised(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    kernel = notebook["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")
    assert launch.settled(notebook, *launch.repository(ROOT)) == notebook, "make format"
    of_its_own = launch.settled(notebook, "", "")["cells"]
    code = [c for c in of_its_own if c["cell_type"] == "code"]
    assert [c for c in code if c["outputs"] or c["execution_count"] is not None] == []
    tagged = [i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == [0], "the first code cell, and only that, is tagged parameters"
    for cell in code[1:]:
        source = "".join(cell["source"])
        assert len([line for line in source.splitlines() if line.strip()]) < 20, source
        assert not re.search(r"^(?:def|class) ", source, flags=re.M), source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_live_smoke_parameters(path):
    smoke = yaml.safe_load(read(f"notebooks/params/{path.stem}.smoke.yaml"))
    assert smoke["source"] == "live"


def test_a_dispute_asks_for_what_its_answer_needs():
    template = yaml.safe_load(read(".github/ISSUE_TEMPLATE/dispute.yml"))
    assert {"name", "description", "body"} <= template.keys()
    fields = {part["id"]: part for part in template["body"] if part["type"] != "markdown"}
    kinds = {"input", "textarea", "dropdown", "checkboxes"}
    assert all(part["type"] in kinds and part["attributes"]["label"] for part in fields.values())
    required = {name for name, part in fields.items() if part.get("validations", {}).get("required")}
    assert required == {"claim", "what", "evidence"}
    known = [c["id"] for c in claims.claims(ROOT)]
    assert fields["claim"]["attributes"]["placeholder"] in known
    page = read("book/rerun.md")
    assert "Rerun, change, refute" in template["body"][0]["attributes"]["value"] and "# Rerun, change, refute" in page
    for option in fields["what"]["attributes"]["options"]:
        assert f"| {option} |" in page, option
