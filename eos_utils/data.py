r"""The data sets: real CIFAR-10 subsets and digits, brought to one form.

A :class:`Dataset` holds inputs :math:`X \in \mathbb{R}^{n \times d}` and targets :math:`Y`, both on the CPU.
CIFAR-10 images enter in one fixed order (:func:`cifar10_order`), whichever copy of the data is at hand, so
that the same request gives the same bytes and the same SHA-256 everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

NUMERICS = 1

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VEHICLES = (0, 1, 8, 9)
PREPROCESSING = ("center", "standardize", "scale")
LABELS = ("onehot", "vehicles", "pair")

MIRROR = "cifar10-subset.npz"
# Content hashes, so that no copy of the data, however it came here, can differ unnoticed.
MIRROR_SHA256 = "b6dce2cb63fbd43e8fb6d287d4e1a011625c9420e616bbc08770b44833e3b7a7"
FIRST_5000_SHA256 = "3660ed9cecca126062f6710cbb323e5a1215dc16061429a5550fc578b4466ee8"


class DataError(RuntimeError):
    """The data are missing, damaged or not what was asked for; the message names the remedy."""


@dataclass(frozen=True)
class Dataset:
    """Inputs, targets and class labels of ``n`` examples.

    ``x``: (n, d) float32; ``y``: (n, outputs) float32; ``classes``: (n,) int64, the official class numbers;
    ``sha256``: hash of the selected raw pixels and labels, before any preprocessing.
    """

    x: torch.Tensor
    y: torch.Tensor
    classes: torch.Tensor
    name: str
    sha256: str
    source: str = field(default="", compare=False)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Dataset:
        """The same data on another device and in another precision."""
        return Dataset(
            self.x.to(device, dtype),
            self.y.to(device, dtype),
            self.classes.to(device),
            self.name,
            self.sha256,
            self.source,
        )


def cache_folder() -> pathlib.Path:
    """Where downloads and unfinished runs are kept: ``EOS_CACHE_DIR``, or the user's cache folder."""
    import platformdirs

    return pathlib.Path(os.environ.get("EOS_CACHE_DIR") or platformdirs.user_cache_dir("eos_utils"))


def cifar10_order(total: int = 50_000) -> np.ndarray:
    """Indices into the official training set, in the order in which subsets are drawn.

    First the first 1,000 images of each of the five training batches (what the small mirror holds), then all
    others in their official order; a subset of ``n`` images is the first ``n`` of these.

    >>> order = cifar10_order()
    >>> order[[0, 999, 1000, 4999]].tolist()    # batches 1, 1, 2 and 5
    [0, 999, 10000, 40999]
    >>> int(order[5000])    # then on with the second thousand of batch 1
    1000
    """
    head = np.concatenate([np.arange(1000) + 10_000 * batch for batch in range(5)])
    return np.concatenate([head, np.setdiff1d(np.arange(total), head)])


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_mirror(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    found = file_sha256(path)
    if found != MIRROR_SHA256:
        raise DataError(
            f"{path} is damaged or altered: its SHA-256 is {found}, expected {MIRROR_SHA256}. "
            "Replace it by an intact copy."
        )
    with np.load(path, allow_pickle=False) as archive:
        images, labels, index = (archive[k] for k in ("train_images", "train_labels", "train_index"))
    if not np.array_equal(index, cifar10_order()[: len(index)]):
        raise DataError(f"{path} holds other images than the first 1,000 of each training batch.")
    return images, labels


def _read_torchvision(root: pathlib.Path, download: bool) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import CIFAR10  # compares checksums before it unpickles anything

    if root.name == CIFAR10.base_folder:
        root = root.parent
    try:
        data = CIFAR10(str(root), train=True, download=download)
    except RuntimeError as error:
        raise DataError(
            f"the CIFAR-10 folder in {root} is incomplete or its checksums do not match; delete it and get it again"
            if not download
            else str(error)
        ) from error
    order = cifar10_order()
    images, labels = data.data[order], np.asarray(data.targets, dtype=np.uint8)[order]
    if _sha256(images[:5000], labels[:5000]) != FIRST_5000_SHA256:
        raise DataError(f"the CIFAR-10 folder in {root} does not hold the official images. Download it again.")
    return images, labels


def _read_folder(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What a folder holds: the mirror, torchvision's layout, or None."""
    if folder.is_file():
        return _read_mirror(folder)
    if (folder / "cifar-10-batches-py").is_dir() or folder.name == "cifar-10-batches-py":
        return _read_torchvision(folder, download=False)
    if (folder / MIRROR).is_file():
        return _read_mirror(folder / MIRROR)
    return None


def _cifar10_arrays(
    path: str | os.PathLike | None, least: int, classes: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray, str]:
    cache = cache_folder() / "cifar10"
    places: list[tuple[str, str | os.PathLike | None]] = [
        ("the path given", path),
        ("EOS_DATA_DIR", os.environ.get("EOS_DATA_DIR") or None),
        ("the cache folder", cache),
    ]
    tried = []
    for what, place in places:
        if place is None:
            tried.append(f"{what} (not set)")
            continue
        try:
            arrays = _read_folder(pathlib.Path(place).expanduser())
        except DataError as error:
            if place is not cache:
                raise
            tried.append(f"{what} ({error})")  # a download cut short is made good by the next one
            continue
        usable = 0 if arrays is None else len(arrays[1]) if classes is None else int(np.isin(arrays[1], classes).sum())
        if arrays is not None and usable >= least:
            return *arrays, what
        held = "no CIFAR-10 there" if arrays is None else f"holds only {usable} such images, {least} wanted"
        tried.append(f"{what} {place} ({held})")
    if os.environ.get("EOS_OFFLINE"):
        tried.append("torchvision's download (switched off by EOS_OFFLINE)")
    else:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stdout(None):
                return *_read_torchvision(cache, download=True), "torchvision's download"
        except (DataError, OSError) as error:
            tried.append(f"torchvision's download ({error})")
    raise DataError(
        "CIFAR-10 was not found. Tried, in this order: "
        + "; ".join(tried)
        + f". Remedy: set EOS_DATA_DIR to a folder with {MIRROR} or with torchvision's cifar-10-batches-py, "
        "or run once with a network connection, or choose dataset='digits' with n up to 1797, which is always at hand."
    )


def cifar10_available(n: int = 5000) -> bool:
    """Whether ``n`` CIFAR-10 images are on this machine (no download is tried)."""
    for place in (os.environ.get("EOS_DATA_DIR"), cache_folder() / "cifar10"):
        with contextlib.suppress(DataError):
            arrays = _read_folder(pathlib.Path(place)) if place else None
            if arrays is not None and len(arrays[0]) >= n:
                return True
    return False


def _targets(classes: np.ndarray, labels: str, positive: Sequence[int], count: int) -> np.ndarray:
    if labels == "onehot":
        return np.eye(count, dtype=np.float32)[classes]
    return np.where(np.isin(classes, positive), 1.0, -1.0).astype(np.float32)[:, None]


def _preprocess(pixels: np.ndarray, preprocessing: str) -> np.ndarray:
    x = pixels.astype(np.float64)
    if preprocessing in ("center", "standardize"):
        x = x - x.mean(axis=0)
    if preprocessing == "standardize":
        deviation = x.std(axis=0)
        x = x / np.where(deviation > 0, deviation, 1.0)  # constant features stay 0
    return x.astype(np.float32)


def check(n: int, labels: str, preprocessing: str, classes: Sequence[int] | None) -> None:
    """Raises ``ValueError`` for a request that no data set can meet."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r}: the number of examples must be a positive integer")
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r} is unknown; choose one of {', '.join(LABELS)}")
    if preprocessing not in PREPROCESSING:
        raise ValueError(f"preprocessing={preprocessing!r} is unknown; choose one of {', '.join(PREPROCESSING)}")
    if classes is not None and (not classes or any(c not in range(10) for c in classes)):
        raise ValueError(f"classes={list(classes)!r}: class numbers lie between 0 and 9")
    if labels == "pair" and (classes is None or len(set(classes)) != 2):
        raise ValueError("labels='pair' needs classes=(negative, positive), two different class numbers")


def _assemble(
    images: np.ndarray,
    labels_of: np.ndarray,
    scale: float,
    n: int,
    labels: str,
    classes: Sequence[int] | None,
    preprocessing: str,
    positive: Sequence[int],
    name: str,
    source: str,
) -> Dataset:
    chosen = np.arange(len(labels_of)) if classes is None else np.flatnonzero(np.isin(labels_of, list(classes)))
    if len(chosen) < n:
        raise DataError(f"n={n}: only {len(chosen)} examples of {name} are at hand ({source}); choose a smaller n")
    images, labels_of = images[chosen[:n]], labels_of[chosen[:n]].astype(np.int64)
    if labels == "pair" and classes is not None:
        positive = (classes[1],)
    x = _preprocess(images.reshape(n, -1) / scale, preprocessing)
    y = _targets(labels_of, labels, positive, 10)
    return Dataset(
        torch.from_numpy(x),
        torch.from_numpy(y),
        torch.from_numpy(labels_of),
        name,
        _sha256(images, labels_of.astype(np.uint8)),
        source,
    )


def cifar10(
    n: int = 5000,
    labels: str = "onehot",
    classes: Sequence[int] | None = None,
    preprocessing: str = "center",
    path: str | os.PathLike | None = None,
) -> Dataset:
    r"""The first ``n`` CIFAR-10 training images of the chosen classes, in the order of :func:`cifar10_order`.

    Inputs are pixel/255 (``preprocessing='scale'``), minus the mean of each feature over the subset
    (``'center'``), and divided by its standard deviation (``'standardize'``; constant features stay 0), as
    vectors of length 3072 in (channel, row, column) order. Targets are one-hot rows, :math:`\pm 1` for vehicles
    against animals (``'vehicles'``, vehicles +1), or :math:`\mp 1` for two ``classes`` (``'pair'``).

    Sources, in this order: ``path``, ``EOS_DATA_DIR``, the cache folder, torchvision's download (unless
    ``EOS_OFFLINE`` is set). Raises :class:`DataError` if none serves or one is damaged, ``ValueError`` for
    arguments out of range. Data: Krizhevsky (2009).
    """
    check(n, labels, preprocessing, classes)
    images, labels_of, source = _cifar10_arrays(path, n, classes)
    images = images.transpose(0, 3, 1, 2)
    return _assemble(images, labels_of, 255.0, n, labels, classes, preprocessing, VEHICLES, "cifar10", source)


def digits(
    n: int = 1797,
    labels: str = "onehot",
    classes: Sequence[int] | None = None,
    preprocessing: str = "center",
) -> Dataset:
    r"""scikit-learn's bundled 8×8 handwritten digits: real data that need no network (n at most 1,797).

    Arguments as for :func:`cifar10`; ``labels='vehicles'`` means digits 5 to 9 against 0 to 4 here.
    """
    from sklearn.datasets import load_digits

    check(n, labels, preprocessing, classes)
    bunch: Any = load_digits()
    images = bunch.images.astype(np.uint8)
    return _assemble(
        images, bunch.target, 16.0, n, labels, classes, preprocessing, range(5, 10), "digits", "scikit-learn"
    )


DATASETS = {"cifar10": cifar10, "digits": digits}


def load(name: str, **arguments: Any) -> Dataset:
    """The data set called ``name`` ('cifar10' or 'digits').

    >>> data = load("digits", n=200, labels="pair", classes=(3, 8))
    >>> data.x.shape, data.y.shape    # 8×8 pixels; one output
    (torch.Size([200, 64]), torch.Size([200, 1]))
    >>> data.classes[:6].tolist(), data.y[:6, 0].tolist()    # 3 is -1, and 8 is +1
    ([3, 8, 3, 8, 3, 8], [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    >>> bool(data.x.mean(dim=0).abs().max() < 1e-5)    # each pixel has mean 0
    True
    """
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[name](**arguments)
