"""``python -m faults [NAME ...]``: does the harm, and records what happened in bench/results/faults.json.

Scenarios have folders and random numbers of their own and so can go on side by side, each in a process: what kills at
a random moment of a run measures first how long a run takes. The longest begin first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from eos_utils import pools
from eos_utils.cli import notebooks
from eos_utils.run import versions
from eos_utils.store import root
from faults import faulty
from faults.suite import LONGEST, SCENARIOS, asked_for, happens


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
    parser.add_argument("--jobs", type=int, default=2, help="scenarios at a time")
    parser.add_argument("--json", type=Path, default=root() / "bench" / "results" / "faults.json")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.name if name not in SCENARIOS]:
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    rows = json.loads(chosen.json.read_text(encoding="utf-8"))["rows"] if chosen.json.is_file() else {}
    failed, begun = 0, time.monotonic()
    names = sorted(chosen.name or SCENARIOS, key=lambda name: name not in LONGEST)
    task = partial(happens, share=chosen.share, seed=chosen.seed)
    for i, result in pools.processes(task, names, chosen.jobs, retries=0):
        if isinstance(result, BaseException):
            raise result
        name, (happened, seconds) = names[i], result
        scenario = SCENARIOS[name]
        failed += faulty(happened)
        print(f"{name}: {happened.total()} in {seconds:.0f} s", flush=True)
        for outcome, times in happened.most_common():
            print(f"    {times:>6} {outcome}", flush=True)
        if happened:
            asked = scenario.full * (len(notebooks()) if name == "parameters" else 1)  # for each notebook
            if scenario.finite and happened.total() < asked_for(scenario, chosen.share):
                asked = happened.total()
            row = {"done": scenario.done, "asked": asked, "times": happened.total()}
            rows[name] = row | {"happened": dict(happened.most_common()), "faults": faulty(happened)}
            write(chosen.json, rows)
    print(f"{failed} outcomes that must not be, in {(time.monotonic() - begun) / 60:.1f} minutes")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
