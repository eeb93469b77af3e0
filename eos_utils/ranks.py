r"""One run on several processes, the *ranks*, which ``torchrun`` starts: the group, and what they say to each other.

Rank r computes :math:`s_r`; an all-reduce gives :math:`s = \sum_r s_r` to all. Each entry is summed once, in a fixed
order, and then passed on, so that every rank holds the same bits, and so does the next run with as many ranks. All else
is computed by every rank for itself from equal numbers. Rank 0 alone writes. On the CPU the ranks speak gloo, which is
tested with two of them; on GPUs, one a rank, nccl, which is **untested** with more than one.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 300.0  # seconds that a rank waits for the others; EOS_RANK_TIMEOUT sets another


class RankError(RuntimeError):
    """A rank was lost, or the ranks no longer hold the same θ."""


def launched() -> bool:
    """Whether this process is one of several that ``torchrun`` started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class Ranks:
    """This process, ``rank`` of ``size``, on its ``device``; all methods are called by all ranks together.

    >>> import torch
    >>> two = [Ranks(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    >>> [ranks.first for ranks in two]    # rank 0 alone writes
    [True, False]
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts; ``part`` may be overwritten. Raises :class:`RankError` for a lost rank."""
        return self._reduced(part.contiguous(), dist.ReduceOp.SUM)

    def _reduced(self, part: Tensor, how: Any) -> Tensor:
        try:
            dist.all_reduce(part, how)
        except RuntimeError as error:
            _deaf()
            said = str(error).strip().splitlines()[0][:200]
            who = f"rank {self.rank} of {self.size}"
            raise RankError(f"{who} lost the others: one has ended, or did not answer in time ({said})") from error
        return part

    def settled(self, theta: Tensor, interrupted: bool) -> bool:
        """Whether any rank was interrupted; raises :class:`RankError` unless θ has the same bits on all."""
        bits = theta.view(torch.int32 if theta.dtype == torch.float32 else torch.int64).sum(dtype=torch.int64)
        marks = torch.stack([bits.new_tensor(int(interrupted)), bits, ~bits])
        stopped, most, least = self._reduced(marks, dist.ReduceOp.MAX).tolist()
        if most != ~least:
            raise RankError("the ranks no longer hold the same parameters; are their machines and libraries alike?")
        return bool(stopped)

    def share(self, content: bytes | None) -> bytes | None:
        """What rank 0 was given, whatever the others were."""
        own = content if self.first else None
        size = int(self.sum(torch.tensor([-1 if own is None else len(own)], device=self.device) * int(self.first)))
        if size < 0:
            return None
        held = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else torch.zeros(size, dtype=torch.uint8)
        return bytes(self.sum(held.to(self.device)).cpu().numpy())


def _deaf() -> None:
    """One :class:`RankError` is enough: torchrun's SIGTERM must not tear apart what reports it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _ended(number: int, frame: Any) -> None:
    _deaf()
    raise RankError("ended by SIGTERM: another rank was lost, or the job was stopped")


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks | None]:
    """The group of processes that ``torchrun`` started, while the block lasts; None for a process by itself.

    Raises ``ValueError`` for a numbered GPU, since each rank takes its own, and where a machine has too few of them.

    >>> with joined(torch.device("cpu")) as ranks:    # without torchrun
    ...     print(ranks)
    None
    """
    if not launched():
        yield None
        return
    local, cuda = int(os.environ.get("LOCAL_RANK", "0")), device.type == "cuda"
    if cuda:
        if str(device) != "cuda":
            raise ValueError(f"device={device}: each rank takes a GPU of its own; write cuda, without a number")
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"{local + 1} ranks or more and {torch.cuda.device_count()} GPUs on this machine: start fewer with "
                "--nproc-per-node, or take --device cpu"
            )
        torch.cuda.set_device(local)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # an error, where nccl would end the process
    timeout = datetime.timedelta(seconds=float(os.environ.get("EOS_RANK_TIMEOUT", TIMEOUT)))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
