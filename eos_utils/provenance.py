"""What made a record: the commit, the versions of the packages, the device."""

from __future__ import annotations

import pathlib
import platform
import subprocess
from typing import Any

import numpy as np
import torch

import eos_utils
from eos_utils import store


def git_state(folder: pathlib.Path | None = None) -> dict[str, Any]:
    """The commit and whether tracked files differ from it; empty where there is no git."""
    folder = folder or store.root()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": False}


def versions() -> dict[str, str]:
    """Of Python and of the packages that make the numbers."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "eos_utils": eos_utils.__version__,
    }


def device_name(device: torch.device) -> str:
    """The device, and the number of threads."""
    if device.type == "cuda":
        return f"{device.type} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
