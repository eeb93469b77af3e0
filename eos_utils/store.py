"""The recorded runs: one netCDF file and one manifest (JSON) for each, found by the experiment's key.

Identity and freshness are separate things. The key says *what* was run. The manifest says with which code and
data: a ``NUMERICS`` number of a module raised on purpose makes a record *stale*; a source that merely differs makes
it *unverified*, until a replay (``eos verify``) restamps it. The manifest's SHA-256 is compared before HDF5 opens
a file. Writing is atomic: of two racing writers the first wins, the second checks and discards.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import io
import json
import os
import pathlib
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

FORMAT = 1
LEFT_BEHIND = 3600  # seconds; nothing is written for so long
ROOM = 1 << 20  # bytes that must be free before a long run; hardly a record is larger
NUMERIC_MODULES = (
    "data",
    "models",
    "losses",
    "linearize",
    "objective",
    "curvature",
    "basis",
    "certificate",
    "lanczos",
    "observers",
    "descent",
)
# ... and those that make numbers in some records only, by what was observed, or by the network.
# ... or by how many processes shared the work.
OPTIONAL = {
    "observed": ("gram", "residual"),
    "weighed": ("terms",),
    "small_resnet": ("jacobian", "resnet"),
    "ranks": ("sharded",),
}


_PARSING = threading.Lock()  # ast.parse of Python 3.11 fails now and then when two threads use it at once


def _sha256(path: pathlib.Path) -> str:
    from eos_utils.data import file_sha256  # brings torch along, which whoever executes a notebook need not wait for

    return file_sha256(path)


class StoreError(RuntimeError):
    """A record is missing, damaged, foreign or newer than this code; the message names the remedy."""


class NewerFormatError(StoreError):
    """A record was written by a newer version of this code, which must not be overwritten."""


def root() -> pathlib.Path:
    """The repository (or the folder named by ``EOS_ROOT``) whose results, experiments and claims are used."""
    return pathlib.Path(os.environ.get("EOS_ROOT") or pathlib.Path(__file__).resolve().parent.parent)


def results_folder() -> pathlib.Path:
    """Where the recorded runs lie."""
    return root() / "results"


def _bare(tree: ast.AST) -> ast.AST:
    """The syntax tree without docstrings, so that prose about the code does not count as code."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]
    return tree


@lru_cache(maxsize=64)
def _code_hash(source: str) -> str:
    with _PARSING:
        return hashlib.sha256(ast.dump(_bare(ast.parse(source))).encode()).hexdigest()[:16]


def fingerprints(extra: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """For every module that makes numbers: its ``NUMERICS`` and a hash of its code (comments do not count)."""
    found = {}
    for name in (*NUMERIC_MODULES, *extra):
        module = importlib.import_module(f"eos_utils.{name}")
        source = pathlib.Path(str(module.__file__)).read_text(encoding="utf-8")
        found[name] = {"numerics": module.NUMERICS, "source": _code_hash(source)}
    return found


def optional(marks: Iterable[str]) -> list[str]:
    """The modules that make numbers in a record with these marks and not in all: its coordinates, and its network."""
    return [name for mark in marks for name in OPTIONAL.get(mark, ())]


@dataclass(frozen=True)
class Status:
    """'fresh', 'unverified', 'stale', 'missing' or 'pending', and why."""

    state: str
    why: str


def _fsync_write(path: pathlib.Path, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sweep(folder: pathlib.Path, pattern: str, keep: str = "") -> None:
    """Deletes what a process that was killed while writing left behind: files of this pattern, older than an hour.

    Younger ones may belong to a process that is still writing, as may those of a clock that was set back.
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if path.name != keep and time.time() - path.stat().st_mtime > LEFT_BEHIND:
                path.unlink()


class Store:
    """A folder of recorded runs.

    >>> import tempfile, xarray as xr
    >>> run = xr.Dataset({"loss": ("step", [1.0, 0.5])})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = Store(folder)
    ...     print([store.save("mine", run, {}) for _ in range(2)])    # the first stays
    ...     print(store.keys(), store.status("mine").state, store.status("other").state)
    ...     print(store.load("mine")["loss"].values.tolist())
    [True, False]
    ['mine'] fresh missing
    [1.0, 0.5]
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self.folder = pathlib.Path(folder) if folder is not None else results_folder()

    def manifest_path(self, key: str) -> pathlib.Path:
        """Where the manifest of a key lies."""
        return self.folder / f"{key}.json"

    def keys(self) -> list[str]:
        """Keys of all records."""
        return sorted(p.stem for p in self.folder.glob("[!.]*.json"))

    def manifest(self, key: str) -> dict[str, Any]:
        """The manifest of a record, checked for format and key."""
        path = self.manifest_path(key)
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            written = manifest["format"]
            if (
                not isinstance(written, int)
                or written < 1
                or not {"key", "file", "sha256", "code", "provenance"} <= set(manifest)
            ):
                raise ValueError("fields are missing")
            # The name is derived, so that no manifest can name (and no replacement delete) a file that is not its own.
            if written <= FORMAT and manifest["file"] != f"{manifest['key']}-{manifest['sha256'][:8]}.nc":
                raise ValueError(f"it names the file {manifest['file']!r}")
            code = [{"numerics", "source"} <= set(fields) for fields in manifest["code"].values()]
            if not (all(code) and isinstance(manifest["provenance"], dict)):
                raise ValueError("fields are missing")
        except FileNotFoundError:
            raise StoreError(f"no record of {key} in {self.folder}; make one with `eos record`") from None
        except OSError as error:
            raise StoreError(f"{path} can not be read ({error}); change its permissions") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({error!r}); restore it with git, or delete it") from error
        if written > FORMAT:
            raise NewerFormatError(f"{path} has format {written}, this code reads up to {FORMAT}: update eos_utils")
        if manifest.get("key") != key:
            raise StoreError(f"{path} is the record of another experiment ({manifest.get('key')}); restore it")
        return manifest

    def load(self, key: str) -> xr.Dataset:
        """The trajectory of a key; its bytes are compared with the manifest first."""
        import xarray as xr

        manifest = self.manifest(key)
        path = self.folder / manifest["file"]
        try:
            content = path.read_bytes()  # once: what is hashed is what is opened
        except FileNotFoundError:
            if self.manifest(key) != manifest:  # replaced meanwhile
                return self.load(key)
            raise StoreError(f"{path} is missing although its manifest is there; restore it with git") from None
        except OSError as error:
            raise StoreError(f"{path} can not be read ({error}); change its permissions") from error
        found = hashlib.sha256(content).hexdigest()
        if found != manifest["sha256"]:
            raise StoreError(
                f"{path} is truncated or altered: SHA-256 {found[:16]}..., its manifest says "
                f"{manifest['sha256'][:16]}...; restore it with git, or delete both and record it again"
            )
        with xr.open_dataset(io.BytesIO(content), engine="h5netcdf") as opened:
            dataset = opened.load()
        if dataset.attrs.get("key") != key:
            raise StoreError(f"{path} holds the run {dataset.attrs.get('key')}, not {key}; restore it with git")
        inside, told = json.loads(dataset.attrs.get("provenance", "{}")), manifest["provenance"]
        for name in inside and {**inside, **told, "name": None}:  # the name is in the manifest alone
            if name != "name" and (name not in inside or name not in told or inside[name] != told[name]):
                raise StoreError(
                    f"{self.manifest_path(key)} is altered: {name} is {inside.get(name)!r} in its file; restore it"
                )
        dataset.attrs["provenance"] = json.dumps(manifest["provenance"])
        return dataset

    def check_writable(self, key: str | None = None) -> None:
        """Raises :class:`StoreError` if nothing (or not this key) can be written here; called before a long run."""
        try:
            if key is not None:
                self.manifest(key)
        except NewerFormatError:
            raise
        except StoreError:
            pass  # a missing or damaged record may be replaced
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as stream:
                stream.write(bytes(ROOM))
        except OSError as error:
            raise StoreError(
                f"{self.folder} is not writable ({error}); free space or change its permissions"
            ) from error

    def save(self, key: str, dataset: xr.Dataset, provenance: dict[str, Any], *, replace: bool = False) -> bool:
        """Writes a record atomically; False if another writer was first (its record stays)."""
        self.check_writable(key)
        dataset.attrs["key"] = key
        encoding = {
            str(name): {"zlib": True, "complevel": 9, "shuffle": True}
            for name, variable in dataset.variables.items()
            if variable.ndim and variable.dtype.kind in "fiu"
        }
        temp = self.folder / f".writing-{uuid.uuid4().hex}.nc"
        note = temp.with_suffix(".json")
        try:
            dataset.to_netcdf(temp, engine="h5netcdf", encoding=encoding)
            with open(temp, "rb+") as stream:
                os.fsync(stream.fileno())
            sha256 = _sha256(temp)
            final = self.folder / f"{key}-{sha256[:8]}.nc"
            network = json.loads(dataset.attrs.get("experiment", "{}")).get("network", "")
            manifest = {
                "format": FORMAT,
                "key": key,
                "file": final.name,
                "sha256": sha256,
                "code": fingerprints(optional([*map(str, dataset.coords), network, *provenance])),
                "provenance": provenance,
            }
            _fsync_write(note, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
            old = None
            if replace:
                with contextlib.suppress(StoreError):  # a damaged manifest is replaced with the rest
                    old = self.manifest(key)["file"]
            os.chmod(temp, 0o644)
            os.replace(temp, final)
            if replace:
                os.replace(note, self.manifest_path(key))
            else:
                try:
                    os.link(note, self.manifest_path(key))
                except FileExistsError:
                    if self.manifest(key)["file"] != final.name:
                        final.unlink(missing_ok=True)
                    self.load(key)  # the first writer's record must be whole
                    return False
                except OSError:
                    final.unlink()
                    raise
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)  # the names, too, must survive a power failure
            os.close(folder)
            if old and old != final.name:
                (self.folder / old).unlink(missing_ok=True)
            sweep(self.folder, ".writing-*")
            sweep(self.folder, f"{key}-*.nc", keep=final.name)
            return True
        except StoreError:
            raise
        except (OSError, RuntimeError) as error:  # HDF5 says either
            remedy = "free space or change its permissions"
            raise StoreError(f"could not write to {self.folder}: {error}; {remedy}") from error
        finally:
            with contextlib.suppress(OSError):  # a folder that has become read-only has been reported already
                temp.unlink(missing_ok=True)
                note.unlink(missing_ok=True)

    def take(self, manifest: dict[str, Any], content: bytes) -> bool:
        """Writes a record that another store holds, byte by byte, in place of what is here."""
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise StoreError(f"{manifest['file']} is truncated or altered; copy it again")
        for name, data in ((manifest["file"], content), (f"{manifest['key']}.json", json.dumps(manifest).encode())):
            temp = self.folder / f".writing-{uuid.uuid4().hex}"
            try:
                _fsync_write(temp, data)
                os.replace(temp, self.folder / name)
            except OSError as error:
                raise StoreError(f"could not write to {self.folder}: {error}; free space") from error
            finally:
                temp.unlink(missing_ok=True)
        return True

    def restamp(self, key: str) -> None:
        """Declares a record verified with the present code (after a replay has agreed)."""
        manifest = self.manifest(key)
        manifest["code"] = fingerprints([name for name in optional(OPTIONAL) if name in manifest["code"]])
        temp = self.folder / f".restamp-{key}"
        _fsync_write(temp, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        os.replace(temp, self.manifest_path(key))

    def status(self, key: str) -> Status:
        """How far the record of a key can be relied on."""
        try:
            if not self.manifest_path(key).is_file():
                return Status("missing", "not recorded")
            manifest = self.manifest(key)
            path = self.folder / manifest["file"]
            if not path.is_file():
                return Status("stale", f"its file {path.name} is missing")
            if _sha256(path) != manifest["sha256"]:
                return Status("stale", f"{path.name} is truncated or altered")
        except (StoreError, OSError) as error:
            return Status("stale", str(error))
        then = manifest["code"]
        now = fingerprints([name for name in optional(OPTIONAL) if name in then])
        # A module that the record does not know was split off or added: a replay tells whether numbers moved.
        raised = [
            f"NUMERICS of {name} {then[name]['numerics']} -> {now[name]['numerics']}"
            for name in now
            if name in then and then[name]["numerics"] != now[name]["numerics"]
        ]
        if raised:
            return Status("stale", "; ".join(raised))
        edited = [name for name in now if name not in then or then[name]["source"] != now[name]["source"]]
        if edited:
            return Status("unverified", f"the code of {', '.join(edited)} has changed; `eos verify` replays it")
        return Status("fresh", "recorded or verified with this code")
