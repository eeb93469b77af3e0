r"""What a Hessian product costs on several ranks, on paper: memory, arithmetic, and what goes over the wire.

Each of p ranks holds n/p examples, all of θ, and all of a basis of s vectors. With f FLOPs for the forward sweep of an
example, a gradient takes about 3f (the backward sweep costs two forward ones) and a Hessian product twice that, since
all of it is done for a tangent too: :math:`F = 6 f n / p`. Its result, P numbers of w bytes, is summed over the ranks;
a ring all-reduce sends :math:`2 (p - 1) w P / p` bytes from each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One rank's processor and its link: sustained FLOPs a second, bytes a second to the next rank, memory in bytes."""

    flops: float
    link: float
    memory: float


@dataclass(frozen=True)
class Problem:
    """``n`` examples of ``inputs`` numbers, ``P`` parameters, ``forward`` FLOPs of an example, bytes of a number."""

    n: int
    inputs: int
    P: int
    forward: float
    width: int = 4


CIFAR = {"n": 50_000, "inputs": 3072}
# Multiplications and additions count one each; 0.56 G multiply-adds a 32x32 image for the ResNet-18 without its first
# stride and pooling.
RESNET18 = Problem(**CIFAR, P=11_173_962, forward=2 * 0.556e9)
SHALLOW = Problem(**CIFAR, P=3072 * 128 + 128 + 128 * 10 + 10, forward=2 * (3072 * 128 + 128 * 10))


def flops(problem: Problem, ranks: int) -> float:
    """Of one Hessian product, on each rank."""
    return 6 * problem.forward * problem.n / ranks


def sent(problem: Problem, ranks: int) -> float:
    """Bytes that each rank sends for one product, by a ring all-reduce; 0 for a rank by itself."""
    return 2 * (ranks - 1) / ranks * problem.width * problem.P


def held(problem: Problem, ranks: int, vectors: int) -> float:
    """Bytes on each rank that last from product to product: its examples, θ, and a basis of so many vectors."""
    return problem.width * (problem.n / ranks * problem.inputs + (1 + vectors) * problem.P)


def seconds(problem: Problem, ranks: int, machine: Machine) -> tuple[float, float]:
    """Of arithmetic, and of communication, for one product; they do not overlap, since the sum ends it.

    >>> gpu = Machine(flops=2e13, link=1e11, memory=80e9)
    >>> [round(v, 4) for v in seconds(RESNET18, 8, gpu)]    # arithmetic, communication
    [2.085, 0.0008]
    >>> ranks = balance(RESNET18, gpu)    # where both take as long
    >>> arithmetic, communication = seconds(RESNET18, ranks, gpu)
    >>> round(ranks), round(arithmetic / communication, 6)
    (18660, 1.0)
    """
    return flops(problem, ranks) / machine.flops, sent(problem, ranks) / machine.link


def balance(problem: Problem, machine: Machine) -> float:
    r"""The number of ranks at which communication takes as long as arithmetic.

    :math:`6 f n / (p \phi) = 2 (p - 1) w P / (p \beta)`, so :math:`p = 1 + 3 f n \beta / (w P \phi)`.
    """
    return 1 + 3 * problem.forward * problem.n * machine.link / (problem.width * problem.P * machine.flops)
