"""Tasks for the tests of pools, in a module that imports next to nothing: each process of a pool imports it."""

import os
import signal
import time


def die_once(job):
    """A task that kills its own process where it has not been before; another that waits beside it."""
    mark, value = job
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * value


def die(job):
    """Kills its process for 1, and takes its time for anything else."""
    if job == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return 10 * job
