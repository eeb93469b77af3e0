"""All scenarios, and one of them done as often as asked for: in a module of its own, for processes to import."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults import Scenario, bad_parameters, flips, hostile, kills, places

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
# Most of the time goes into these.
LONGEST = ("kill-notebooks", "kill-sweeps", "parameters-papermill")


def happens(name: str, share: float, seed: int) -> tuple[Counter[str], float]:
    """What came of a scenario, done so often, and the seconds that it took."""
    scenario, begun = SCENARIOS[name], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eos-faults-") as folder:
        happened = scenario.function(asked_for(scenario, share), Path(folder), random.Random(f"{name} {seed}"))
    return happened, time.monotonic() - begun


def asked_for(scenario: Scenario, share: float) -> int:
    """How often that share of the full count is: at least once."""
    return max(1, round(scenario.full * share))
