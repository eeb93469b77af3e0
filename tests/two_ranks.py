"""What two ranks compute; test_ranks.py starts it with torchrun, and computes the same in one process.

    torchrun --nproc-per-node 2 tests/two_ranks.py FOLDER RUN ...     the facts go to FOLDER, the RUNs are recorded
    torchrun --nproc-per-node 2 tests/two_ranks.py killed RUN         the RUN is recorded until rank 1 is killed
    torchrun --nproc-per-node 2 tests/two_ranks.py late RUN           the same, until rank 1 no longer answers

A start for each, since gloo finds the addresses of the group before in torchrun's store.
"""

import functools
import os
import pathlib
import signal
import sys

import torch

from eos_utils import catalogue, cli, data, run
from eos_utils.curvature import GaussNewton, Hessian
from eos_utils.gram import GramOperator
from eos_utils.lanczos import top_eigenpairs
from eos_utils.models import fully_connected
from eos_utils.objective import Objective
from eos_utils.ranks import RankError, joined
from eos_utils.resnet import small_resnet
from eos_utils.sharded import ShardedGram, ShardedObjective


def problems():
    """Whole objectives: shards of different sizes, sweeps in chunks, a principal plane, another module, both dtypes."""
    digits = data.load("digits", n=201, preprocessing="center").to(torch.device("cpu"), torch.float64)
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(301, 520, generator=random, dtype=torch.float64) * 0.9 ** torch.arange(520)
    images = torch.randn(5, 3072, generator=random, dtype=torch.float64)
    signs = torch.randn(301, 1, generator=random, dtype=torch.float64).sign()
    tanh = functools.partial(fully_connected, width=6, activation="tanh")
    return {
        "digits": Objective(tanh(64), "half_mse", digits.x, digits.y),
        "digits, float32": Objective(tanh(64), "half_mse", digits.x.float(), digits.y.float()),
        "digits, chunks": Objective(tanh(64), "half_mse", digits.x, digits.y, chunk=37),
        "plane": Objective(tanh(520, outputs=1), "mse", wide, signs),
        "residual network": Objective(small_resnet(2, 1), "mse", images, signs[:5], chunk=2),
    }


def facts(objective, gram):
    """Everything that is summed over ranks, at a point that is no initialisation."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(objective.dtype)

    theta = objective.initial() + 0.1 * normal(objective.P)
    loss, gradient, outputs = objective.gradient(theta)
    rows, across = normal(3, objective.P), normal(2, objective.y.numel())
    hessian = Hessian(objective, theta)
    pairs = top_eigenpairs(hessian, 3, tol=1e-4 if objective.dtype == torch.float32 else 1e-9)
    parts = ("all", "A", "W")
    return {
        "value": objective.value(theta),
        "loss": loss,
        "gradient": gradient,
        "outputs": outputs,
        "outputs alone": objective.outputs(theta),
        "hessian": hessian.apply(rows),
        "gauss_newton": GaussNewton(objective, theta).apply(rows),
        **{f"gram {part}": gram(objective, theta, part).apply(across) for part in parts},
        "eigenvalues": pairs.values,
        "upper": pairs.upper,
        "projector": pairs.vectors @ pairs.vectors.T,
        "basis": pairs.basis,
    }


def alone():
    """The facts of a single process."""
    return {name: facts(objective, GramOperator) for name, objective in problems().items()}


def numbers(folder, names):
    """The facts, what ranks say to each other, and the records."""
    with joined(torch.device("cpu")) as ranks:
        found = {name: facts(ShardedObjective(whole, ranks), ShardedGram) for name, whole in problems().items()}
        theta = torch.ones(4)
        said = {"interrupted": ranks.settled(theta, interrupted=ranks.rank == 1)}
        said |= {"shared": ranks.share(b"from %d" % ranks.rank), "nothing": ranks.share(None if ranks.first else b"x")}
        try:
            ranks.settled(theta + 1e-7 * ranks.rank, interrupted=False)
        except RankError as error:
            said["apart"] = str(error)
        for name in names:
            catalogue.record(catalogue.find(name), progress=False, ranks=ranks)
    torch.save((found, said), pathlib.Path(folder) / f"{ranks.rank}.pt")


def lost(name, how):
    """Records a run by the command, with a checkpoint at every step, until rank 1 is gone, or stops in its tracks."""

    def call(self, descent):
        if os.environ["RANK"] == "1" and descent.step == 20:
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    run._Progress.__call__ = call
    catalogue.compute = functools.partial(run.compute, checkpoint_every=0)
    return cli.main(["record", name, "--device", "cpu"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    sys.exit(lost(names[0], folder) if folder in ("killed", "late") else numbers(folder, names))
