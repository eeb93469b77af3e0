"""Data are data: nothing here unpickles a file, evaluates text, or loads YAML that can make objects."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("eos_utils", "bench", "faults", "book/_ext") for p in (ROOT / folder).rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# A call, and what it must or must not have for it to be safe.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "xr.load_dataset", "xarray.open_mfdataset", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(source: str) -> list[str]:
    """Lines of a module that could run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            name in FORBIDDEN
            or given.get("shell", "False") != "False"
            or "allow_pickle" in given
            and (given["allow_pickle"] != "False")
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{node.lineno}: {name} without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            found.append(f"{node.lineno}: {name} without allow_pickle=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_runs_what_it_reads(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


def test_no_notebook_runs_what_it_reads():
    import json

    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        assert dangers(code) == [], path.name
        assert not re.search(r"^[!%]", code, flags=re.M), path.name  # no shell


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import load", "import joblib.numpy_pickle", "eval(x)", "exec('1')", "torch.load(p)",
    "torch.load(p, weights_only=False)", "np.load(p)", "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=a)",
    "yaml.load(s, Loader=yaml.Loader)", "subprocess.run(s, shell=True)", "os.system(s)", "numpy.load(p)",
])  # fmt: skip
def test_the_check_sees(line):
    assert dangers(f"def f(p, s, x, a):\n    {line}\n")


@pytest.mark.parametrize("line", [
    "torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "yaml.safe_load(s)", "model.eval()",
    "re.compile(s)", "subprocess.run([s])",
])  # fmt: skip
def test_the_check_lets_pass(line):
    assert not dangers(line)


def test_checkpoints_are_read_in_one_place_which_compares_their_checksums():
    calls = [p.name for p in SOURCES if "torch.load(" in p.read_text(encoding="utf-8") and p.parent.name == "eos_utils"]
    assert calls == ["checkpoint.py"]


# ---- workflows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_may_read_the_repository_and_what_a_job_needs(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job or name == "deploy", name
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False, name
            # What a stranger can write (titles, branch names) is never part of a command.
            assert not re.search(r"\$\{\{[^}]*github\.(event|head_ref)", step.get("run", "")), name


def test_the_locked_dependencies_are_audited():
    workflow = yaml.safe_load((ROOT / ".github/workflows/audit.yml").read_text(encoding="utf-8"))
    commands = "\n".join(s["run"] for job in workflow["jobs"].values() for s in job["steps"] if "run" in s)
    assert re.search(
        r"pip-audit .*--require-hashes .*-r requirements\.lock|pip-audit .*-r requirements\.lock", commands
    )
    triggers = workflow[True]  # YAML 1.1 reads the word `on` so
    assert "schedule" in triggers and "requirements.lock" in triggers["pull_request"]["paths"]
