"""What an unfinished run keeps, so that it loses nothing: checkpoints, and Ctrl-C held until a step is whole."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from eos_utils import data, store
from eos_utils.experiment import Experiment, Measure
from eos_utils.ranks import Ranks


def partial_path(experiment: Experiment, measure: Measure) -> pathlib.Path:
    """Where an unfinished run keeps its checkpoint."""
    what = hashlib.sha256(repr(measure).encode()).hexdigest()[:8]
    return data.cache_folder() / "partial" / f"{experiment.key}-{what}.pt"


def forget(experiment: Experiment, measure: Measure) -> None:
    """Deletes the checkpoint of a run whose result has been stored; one that may not be deleted does no harm."""
    with contextlib.suppress(OSError):
        partial_path(experiment, measure).unlink()


def save_checkpoint(path: pathlib.Path, state: Any) -> bool:
    """Writes plain values and tensors atomically; where the disk is full, says so, returns False, and goes on."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        os.replace(temporary, path)
        store.sweep(path.parent, "*.tmp")
        return True
    except (OSError, RuntimeError) as error:
        # A full disk must not end a run that can go on without a checkpoint.
        print(f"no checkpoint could be written to {path}: {error}", file=sys.stderr)
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_checkpoint(path: pathlib.Path, device: torch.device | str = "cpu", ranks: Ranks | None = None) -> Any:
    """What :func:`save_checkpoint` wrote, or None where there is nothing, or nothing that can be trusted.

    torch does not compare the checksums that are in its files, so that is done first: a flipped bit in a tensor would
    go unseen. Nothing but plain values and tensors is unpickled. With ``ranks`` all get what rank 0 finds.
    """
    content = None
    with contextlib.suppress(OSError):
        content = pathlib.Path(path).read_bytes()
    if ranks is not None:
        content = ranks.share(content)
    try:
        with zipfile.ZipFile(io.BytesIO(content or b"")) as archive:
            if archive.testzip() is not None:
                return None
        return torch.load(io.BytesIO(content or b""), map_location=device, weights_only=True)
    except Exception:  # of any kind: what is damaged, foreign or hostile is started over
        return None


@contextlib.contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of tearing a step apart; a second Ctrl-C interrupts at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
