"""``python -m faults [NAME ...]``: does the harm, and records what happened in bench/results/faults.json."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from eos_utils.cli import notebooks
from eos_utils.run import versions
from eos_utils.store import root
from faults import Scenario, bad_parameters, faulty, flips, hostile, kills, places

SCENARIOS = {
    "kill-runs": Scenario("A recorded run, killed (SIGKILL) at a random moment", 50, kills.of_runs),
    "kill-operations": Scenario(
        "A run, killed before each file operation that stores it, new or in place of a record",
        80,
        kills.before_operations,
        finite=True,
    ),
    "kill-notebooks": Scenario(
        "A notebook under papermill, killed at a random moment, or its kernel", 50, kills.of_notebooks
    ),
    "kill-sweeps": Scenario(
        "A sweep with two workers: one of them killed at a random moment, or the sweep, or all of it",
        50,
        kills.of_sweeps,
    ),
    "full-disk": Scenario("The disk full from a random step on, or files no longer than so much", 40, places.full_disk),
    "permission": Scenario(
        "Results, checkpoints or a record that may not be read or written", 12, places.permission_denied
    ),
    "two-writers": Scenario("Two processes that record the same run at once", 20, places.two_writers),
    "clock": Scenario("A clock that goes backwards, and files dated in the future", 10, places.clock_backwards),
    "flip-records": Scenario("One bit flipped in the file of a record", 200, flips.of_records),
    "flip-manifests": Scenario("One bit flipped in the manifest of a record", 500, flips.of_manifests),
    "flip-checkpoints": Scenario("One bit flipped in a checkpoint", 200, flips.of_checkpoints),
    "flip-mirror": Scenario("One bit flipped in the CIFAR-10 mirror", 200, flips.of_mirror),
    "parameters": Scenario("Bad parameters, against the validator, for each notebook", 200, bad_parameters.validator),
    "parameters-papermill": Scenario("Bad parameters, through papermill", 66, bad_parameters.executed),
    "code": Scenario("Code in a checkpoint, an npz or a YAML file", 30, hostile.with_code),
    "malformed": Scenario("Records from elsewhere with damaged HDF5 and the right checksum", 50, hostile.malformed),
}


def write(path: Path, rows: dict[str, dict]) -> None:
    """The table, in the order of the scenarios."""
    ordered = {name: rows[name] for name in SCENARIOS if name in rows}
    text = json.dumps({"conditions": {"versions": versions()}, "rows": ordered}, indent=1, ensure_ascii=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    """Each scenario as often as asked for; what was recorded of others stays. 1 if an outcome must not be."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("name", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts, from 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=root() / "bench" / "results" / "faults.json")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.name if name not in SCENARIOS]:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    rows = json.loads(chosen.json.read_text(encoding="utf-8"))["rows"] if chosen.json.is_file() else {}
    failed = 0
    for name in chosen.name or SCENARIOS:
        scenario, begun = SCENARIOS[name], time.monotonic()
        count = max(1, round(scenario.full * chosen.share))
        with tempfile.TemporaryDirectory(prefix="eos-faults-") as folder:
            happened: Counter[str] = scenario.function(count, Path(folder), random.Random(f"{name} {chosen.seed}"))
        failed += faulty(happened)
        print(f"{name}: {happened.total()} in {time.monotonic() - begun:.0f} s", flush=True)
        for outcome, times in happened.most_common():
            print(f"    {times:>6} {outcome}", flush=True)
        if happened:
            asked = scenario.full * (len(notebooks()) if name == "parameters" else 1)  # for each notebook
            if scenario.finite and happened.total() < count:
                asked = happened.total()
            row = {"done": scenario.done, "asked": asked, "times": happened.total()}
            rows[name] = row | {"happened": dict(happened.most_common()), "faults": faulty(happened)}
            write(chosen.json, rows)
    print(f"{failed} outcomes that must not be")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
