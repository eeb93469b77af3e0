"""What to do (:class:`Experiment`) and what to measure along the way (:class:`Measure`).

An experiment's key is the hash of its canonical JSON, in
which fields at their default are left out: a field added later changes no key. What is measured, the device and
the number of threads are not part of the key, since they do not change the dynamics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from eos_utils import data, models
from eos_utils.descent import Decay, Projection
from eos_utils.losses import LOSSES
from eos_utils.objective import Objective
from eos_utils.observers import Eigenvalues, Snapshots
from eos_utils.residual import Residual
from eos_utils.resnet import small_resnet
from eos_utils.terms import Terms

SCHEMA = 1
NETWORKS = ("fc", "resnet18", "small_resnet")


def rational(value: Any, name: str = "eta") -> Fraction:
    """A positive number given as int, float or text such as '2/150' or '0.04'; parsed, never evaluated.

    >>> rational("2/50"), rational(0.04)
    (Fraction(1, 25), Fraction(1, 25))
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and any(abs(int(e)) > 300 for e in re.findall(r"[eE]([+-]?\d{1,9})", value)):
            raise ValueError
        if isinstance(value, float):
            value = repr(float(value))
        elif isinstance(value, numbers.Integral):
            value = int(value)
        number = Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(f"{name}={value!r} is not a number or a fraction such as 2/150") from None
    if number <= 0:
        raise ValueError(f"{name}={value}: must be positive")
    if not 1e-300 < number < 1e300:
        raise ValueError(f"{name}={value}: is out of the range of floating-point numbers")
    return number


def as_two_over(eta: Fraction) -> str:
    """A step size the way the papers write it.

    >>> as_two_over(Fraction(1, 75))
    '2/150'
    """
    over = 2 / eta
    return f"2/{over}" if over.denominator == 1 else str(eta)


def subscript(i: int) -> str:
    """The number as an index.

    >>> subscript(12)
    '₁₂'
    """
    return str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


@dataclass(frozen=True)
class Experiment:
    """Everything that can change the dynamics of a run.

    ``eta`` is kept as an exact fraction in text ('1/15' for 2/30). ``outputs`` follows from ``labels`` (10 for
    'onehot', else 1). ``decay``: {'factor': '1/4', 'at_step': t} or {'factor': '1/4', 'entered': j, 'then': steps}.
    ``fork``: {'of': key, 'at': snapshot label, 'size': relative size, 'seed': s} starts from a recorded snapshot,
    perturbed; a whole number for 'at' is a step of that run, to which it is replayed from the nearest snapshot before.
    ``gain``: the initial parameters are multiplied by it.
    ``project``: {'eig': i, 'at_step': t, 'every': e} is a :class:`eos_utils.descent.Projection`.
    """

    dataset: str = "cifar10"
    n: int = 5000
    labels: str = "onehot"
    classes: tuple[int, ...] | None = None
    preprocessing: str = "center"
    network: str = "fc"
    width: int = 128
    depth: int = 1
    activation: str = "relu"
    bias: bool = True
    init: str = "pytorch"
    loss: str = "half_mse"
    eta: str = "2/30"
    decay: dict[str, Any] | None = None
    steps: int = 10_000
    stop_accuracy: float | None = None
    stop_loss: float | None = None
    seed: int = 0
    dtype: str = "float32"
    fork: dict[str, Any] | None = None
    project: dict[str, Any] | None = None
    gain: str = "1"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", str(rational(self.eta)))
        object.__setattr__(self, "gain", str(rational(self.gain, "gain")))
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
        choices = {
            "dataset": data.DATASETS,
            "labels": data.LABELS,
            "preprocessing": data.PREPROCESSING,
            "network": NETWORKS,
            "activation": models.ACTIVATIONS,
            "init": models.INITIALISATIONS,
            "loss": LOSSES,
            "dtype": ("float32", "float64"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        for name, least in {"n": 1, "width": 1, "depth": 1, "steps": 0, "seed": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r}: must be an integer")
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if self.network == "small_resnet" and (self.activation, self.bias) != ("relu", False):
            given = f"activation={self.activation!r}, bias={self.bias}"
            raise ValueError(f"{given}: network='small_resnet' has activation='relu', bias=False")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias={self.bias!r}: must be true or false")
        for name, most in {"stop_accuracy": 1.0, "stop_loss": float("inf")}.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool | str) or not 0 < value <= most):
                raise ValueError(f"{name}={value!r}: must be a number above 0" + (" and at most 1" * (most == 1)))
        self._normalise("decay", ("factor",), ("at_step", "entered", "then"), "factor")
        self._normalise("fork", ("of", "at", "size", "seed"), (), "size")
        data.check(self.n, self.labels, self.preprocessing, self.classes)
        if self.decay is not None:
            self.schedule()
        if self.project is not None:
            for field in self.project:
                if field not in ("eig", "at_step", "every"):
                    raise ValueError(f"project: {field!r} is unknown; it has eig, at_step, every")
            self.projection()

    def _normalise(self, name: str, needed: tuple[str, ...], optional: tuple[str, ...], exact: str) -> None:
        """Checks the fields of ``decay`` or ``fork``, and writes its number in one way, so that keys agree."""
        given = getattr(self, name)
        if given is None:
            return
        for field in [*given, *needed]:
            if field not in (*needed, *optional) or field not in given:
                raise ValueError(f"{name}: {field!r} is unknown or missing; it has {', '.join((*needed, *optional))}")
        if name == "fork" and (isinstance(given["at"], bool) or not isinstance(given["at"], int | str)):
            raise ValueError(f"fork at={given['at']!r}: must be the label of a snapshot or a step, a whole number")
        exactly_none = name == "fork" and given[exact] in (0, "0")  # an unperturbed copy
        value = "0" if exactly_none else str(rational(given[exact], f"{name} {exact}"))
        object.__setattr__(self, name, {**given, exact: value})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Experiment:
        """From plain values; a field that does not exist is refused by name."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"{name!r} is no field of an experiment; there are {', '.join(known)}")
        return cls(**fields)

    def canonical(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and the schema number."""
        plain = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != (str(Fraction(str(f.default))) if f.name == "eta" else f.default)
        }
        return {"schema": SCHEMA, **plain}

    @property
    def key(self) -> str:
        """16 hexadecimal digits that identify the run."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def step_size(self) -> float:
        """η as the nearest float."""
        return float(Fraction(self.eta))

    @property
    def threshold(self) -> float:
        """2/η, the edge."""
        return float(2 / Fraction(self.eta))

    def schedule(self) -> Decay | None:
        """The decay of the step size, if there is one."""
        if self.decay is None:
            return None
        fields = dict(self.decay)
        return Decay(float(rational(fields.pop("factor"), "decay factor")), **fields)

    def projection(self) -> Projection | None:
        """The intervention, if there is one; fresh."""
        return None if self.project is None else Projection(**{"eig": 1, "at_step": 0, **self.project})

    def dataset_loaded(self) -> data.Dataset:
        """Loads the data."""
        return data.load(
            self.dataset,
            n=self.n,
            labels=self.labels,
            classes=self.classes,
            preprocessing=self.preprocessing,
        )

    def objective(self, device: torch.device, loaded: data.Dataset | None = None) -> Objective:
        """The loss as a function of θ, on a device."""
        loaded = (loaded or self.dataset_loaded()).to(device, getattr(torch, self.dtype))
        outputs = loaded.y.shape[1]
        if self.network == "resnet18":
            model: torch.nn.Module = models.resnet18(outputs, seed=self.seed)
        elif self.network == "small_resnet":
            model = small_resnet(self.width, self.depth, outputs, self.seed)
        else:
            model = models.fully_connected(
                loaded.x.shape[1],
                self.width,
                self.depth,
                outputs,
                self.activation,
                self.bias,
                self.init,
                self.seed,
            )
        if self.gain != "1":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(float(Fraction(self.gain)))
        return Objective(model, self.loss, loaded.x, loaded.y)


@dataclass(frozen=True)
class Measure:
    """What is measured along a run: top-k eigenvalues every ``stride`` steps, and snapshots of θ.

    ``since`` and ``overlaps``: see :class:`eos_utils.observers.Eigenvalues`. ``gram``: the Gram matrix and the residual
    at every step, with the whole spectrum at every ``gram``-th (:class:`eos_utils.residual.Residual`); 0 for neither.
    ``terms``: both terms of the Hessian at every ``terms``-th step (:class:`eos_utils.terms.Terms`); 0 for never.
    """

    k: int = 6
    stride: int = 15
    pairs: bool = False
    tol: float = 1e-3
    snapshots: tuple[str | int, ...] = ()
    since: int = 0
    overlaps: bool = False
    gram: int = 0
    terms: int = 0

    def observers(self) -> tuple[Eigenvalues, Snapshots]:
        """Fresh observers."""
        eigenvalues = Eigenvalues(self.k, self.stride, self.pairs, self.tol, since=self.since, overlaps=self.overlaps)
        return eigenvalues, Snapshots(tuple(self.snapshots), eigenvalues)

    def others(self) -> dict[str, Residual | Terms]:
        """Fresh observers of what is measured on request, by the coordinate that they give a record."""
        found: dict[str, Residual | Terms] = {}
        if self.gram:
            found["observed"] = Residual(self.gram)
        if self.terms:
            found["weighed"] = Terms(self.terms)
        return found
