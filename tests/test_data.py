"""Data: one subset, whichever copy it comes from; damage is noticed before anything is trusted."""

import functools
import hashlib
import http.server
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from eos_utils import data
from eos_utils.data import DataError, cifar10, cifar10_available, cifar10_order, digits

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


class Planted:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_torchvision(root, images, labels):
    """torchvision's layout with the given (5,000) images at the heads of the batches, zeros elsewhere."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate(BATCHES):
        pixels = np.zeros((10_000, 3072), dtype=np.uint8)
        pixels[:1000] = images[1000 * i : 1000 * (i + 1)].transpose(0, 3, 1, 2).reshape(1000, -1)
        numbers = [int(c) for c in labels[1000 * i : 1000 * (i + 1)]] + [0] * 9000
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": numbers}, protocol=4))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(data.CLASSES)}))
    return folder


def trust(monkeypatch, folder):
    """Makes torchvision take the files of this folder for the official ones."""
    for attribute, names in {"train_list": BATCHES, "test_list": ["test_batch"]}.items():
        monkeypatch.setattr(CIFAR10, attribute, [[name, md5(folder / name)] for name in names])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    )


@pytest.fixture(scope="module")
def pictures():
    """Five thousand random images, of all classes, in the order of the mirror."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (5000, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, 5000).astype(np.uint8)


@pytest.fixture(scope="module")
def torchvision_root(pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("torchvision")
    write_torchvision(root, *pictures)
    return root


@pytest.fixture(scope="module")
def mirror_file(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("mirror") / data.MIRROR
    np.savez(path, train_images=pictures[0], train_labels=pictures[1], train_index=cifar10_order()[:5000])
    return path


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serves the test's folder to torchvision's download, with the given archive in place of the real one."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("EOS_OFFLINE")
    monkeypatch.delenv("EOS_DATA_DIR", raising=False)
    yield tmp_path / CIFAR10.filename
    server.shutdown()
    server.server_close()


@pytest.fixture
def copies(pictures, torchvision_root, mirror_file, monkeypatch):
    """A mirror and a torchvision folder with the same images, declared official; no data folder is set."""
    monkeypatch.delenv("EOS_DATA_DIR", raising=False)
    digest = hashlib.sha256(pictures[0].tobytes() + pictures[1].tobytes()).hexdigest()
    monkeypatch.setattr(data, "FIRST_5000_SHA256", digest)
    monkeypatch.setattr(data, "MIRROR_SHA256", hashlib.sha256(mirror_file.read_bytes()).hexdigest())
    trust(monkeypatch, torchvision_root / "cifar-10-batches-py")
    return {"mirror": mirror_file, "torchvision": torchvision_root}


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x", "y", "classes"))


# ---- one subset, from any copy -----------------------------------------------------------------------


def test_order_is_the_heads_of_the_batches_then_the_rest_once_each():
    order = cifar10_order()
    assert order[0] == 0 and order[999] == 999 and order[1000] == 10_000 and order[4999] == 40_999
    assert order[5000] == 1000 and order[-1] == 49_999
    assert np.array_equal(np.sort(order), np.arange(50_000))
    assert (np.diff(order[5000:]) > 0).all()


@pytest.mark.parametrize("n, classes, folder", [(300, None, ""), (200, (0, 1), "cifar-10-batches-py")])
def test_mirror_and_torchvision_give_the_same_bytes(copies, pictures, n, classes, folder):
    places = copies["mirror"], copies["mirror"].parent, copies["torchvision"] / folder
    sets = [cifar10(n, classes=classes, preprocessing="scale", path=path) for path in places]
    assert all(same(sets[0], other) and sets[0].sha256 == other.sha256 for other in sets[1:])
    images, labels = pictures
    chosen = np.flatnonzero(np.isin(labels, classes or range(10)))[:n]
    raw = images[chosen].transpose(0, 3, 1, 2)  # (channel, row, column)
    assert sets[0].sha256 == hashlib.sha256(raw.tobytes() + labels[chosen].tobytes()).hexdigest()
    assert np.array_equal(sets[0].classes, labels[chosen])
    assert np.array_equal(np.rint(sets[0].x.numpy() * 255), raw.reshape(n, 3072))


def test_places_are_tried_in_order(copies, own_cache, tmp_path, monkeypatch):
    downloads = []

    def download(self):
        downloads.append(self.root)
        (own_cache / "cifar10" / "cifar-10-batches-py").symlink_to(copies["torchvision"] / "cifar-10-batches-py")

    monkeypatch.setattr(CIFAR10, "download", download)
    monkeypatch.setenv("EOS_DATA_DIR", str(copies["mirror"].parent))
    monkeypatch.delenv("EOS_OFFLINE")
    assert cifar10(10, path=copies["mirror"]).source == "the path given"
    assert cifar10(10, path=tmp_path / "nothing").source == "EOS_DATA_DIR"
    assert cifar10(10).source == "EOS_DATA_DIR" and not downloads
    monkeypatch.delenv("EOS_DATA_DIR")
    assert cifar10(10).source == "torchvision's download"
    assert downloads == [str(own_cache / "cifar10")]
    assert cifar10(10).source == "the cache folder" and len(downloads) == 1


@pytest.mark.parametrize("n, classes", [(5001, None), (3000, (0,))])
def test_more_images_than_the_mirror_holds_come_from_the_next_place(copies, own_cache, monkeypatch, n, classes):
    monkeypatch.setenv("EOS_DATA_DIR", str(copies["mirror"]))
    (own_cache / "cifar10").mkdir(parents=True)
    (own_cache / "cifar10" / "cifar-10-batches-py").symlink_to(copies["torchvision"] / "cifar-10-batches-py")
    many, few = cifar10(n, classes=classes), cifar10(400, classes=classes)
    assert many.source == "the cache folder" and few.source == "EOS_DATA_DIR"
    assert torch.equal(many.classes[:400], few.classes)


def test_download_is_unpacked_when_its_checksum_matches(copies, served, monkeypatch):
    with tarfile.open(served, "w:gz", compresslevel=1) as tar:
        tar.add(copies["torchvision"] / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(served))
    found = cifar10(50)
    assert found.source == "torchvision's download" and same(found, cifar10(50, path=copies["mirror"]))


# ---- nothing there -----------------------------------------------------------------------------------


def test_no_data_and_no_network_names_every_place_and_the_remedy(tmp_path, own_cache, monkeypatch):
    monkeypatch.setenv("EOS_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(DataError) as offline:
        cifar10(10, path=tmp_path / "explicit")
    for part in (
        f"the path given {tmp_path / 'explicit'}",
        f"EOS_DATA_DIR {tmp_path / 'data'}",
        f"the cache folder {own_cache / 'cifar10'}",
        "switched off by EOS_OFFLINE",
        "Remedy: set EOS_DATA_DIR",
        "dataset='digits'",
    ):
        assert part in str(offline.value)
    monkeypatch.delenv("EOS_OFFLINE")
    monkeypatch.delenv("EOS_DATA_DIR")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match=r"EOS_DATA_DIR \(not set\).*torchvision's download \(.*Remedy"):
        cifar10(10)
    assert not cifar10_available()


def test_too_few_images_are_named(copies, monkeypatch):
    with pytest.raises(DataError, match="holds only 5000 .*5001 wanted"):
        cifar10(5001, path=copies["mirror"])
    monkeypatch.setenv("EOS_DATA_DIR", str(copies["mirror"].parent))
    assert cifar10_available(5000) and not cifar10_available(5001)
    with pytest.raises(DataError, match="4000 wanted"):
        cifar10(4000, classes=(0, 1))


def test_digits_need_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EOS_DATA_DIR", raising=False)
    found = digits()
    assert found.x.shape == (1797, 64) and found.y.shape == (1797, 10) and found.source == "scikit-learn"
    from sklearn.datasets import load_digits

    scaled = digits(preprocessing="scale")
    assert np.array_equal(np.rint(scaled.x.numpy() * 16), load_digits().data)
    assert np.array_equal(scaled.classes, load_digits().target)
    with pytest.raises(DataError, match="only 1797"):
        digits(1798)


# ---- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_damaged_mirror_is_refused(copies, tmp_path, damage):
    content = bytearray(copies["mirror"].read_bytes())
    if damage == "truncated":
        del content[-1000:]
    else:
        content[len(content) // 2] ^= 1
    (tmp_path / data.MIRROR).write_bytes(content)
    with pytest.raises(DataError, match="damaged or altered.*Replace it"):
        cifar10(10, path=tmp_path)


def test_a_pickle_in_the_mirror_is_never_loaded(tmp_path, monkeypatch):
    planted = tmp_path / data.MIRROR
    evil = np.array([Planted(tmp_path / "ran")], dtype=object)
    np.savez(planted, train_images=evil, train_labels=evil, train_index=evil)
    with pytest.raises(DataError, match="damaged or altered"):
        cifar10(10, path=planted)
    monkeypatch.setattr(data, "MIRROR_SHA256", data.file_sha256(planted))  # even if its hash were the right one
    with pytest.raises(ValueError, match="allow_pickle"):
        cifar10(10, path=planted)
    assert not (tmp_path / "ran").exists()


def test_mirror_of_other_images_is_refused(pictures, tmp_path, monkeypatch):
    path = tmp_path / data.MIRROR
    np.savez(path, train_images=pictures[0], train_labels=pictures[1], train_index=np.arange(5000))
    monkeypatch.setattr(data, "MIRROR_SHA256", data.file_sha256(path))
    with pytest.raises(DataError, match="other images"):
        cifar10(10, path=path)


@pytest.mark.parametrize("damage", ["planted", "truncated", "missing"])
def test_damaged_torchvision_folder_is_refused_before_it_is_unpickled(copies, tmp_path, damage):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (copies["torchvision"] / "cifar-10-batches-py").iterdir():
        (folder / path.name).symlink_to(path)
    batch = folder / "data_batch_3"
    content = batch.read_bytes()
    batch.unlink()
    if damage == "planted":
        batch.write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    elif damage == "truncated":
        batch.write_bytes(content[:-1])
    with pytest.raises(DataError, match="checksums do not match; delete it"):
        cifar10(10, path=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_folder_that_passes_torchvision_but_holds_other_images_is_refused(copies, monkeypatch):
    monkeypatch.setattr(data, "FIRST_5000_SHA256", "0" * 64)
    with pytest.raises(DataError, match="does not hold the official images"):
        cifar10(10, path=copies["torchvision"])


def test_an_unfinished_download_is_named_offline_and_made_good_online(copies, own_cache, monkeypatch):
    folder = own_cache / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "data_batch_1").write_bytes(b"the beginning of it")
    with pytest.raises(DataError, match=r"cache folder [^;]*(incomplete|damaged|do not match)"):
        cifar10(10)

    def download(self):
        shutil.rmtree(folder)
        folder.symlink_to(copies["torchvision"] / "cifar-10-batches-py")

    monkeypatch.setattr(CIFAR10, "download", download)
    monkeypatch.delenv("EOS_OFFLINE")
    assert cifar10(10).source == "torchvision's download"


def test_download_with_a_wrong_checksum_is_not_unpacked(tmp_path, served, own_cache):
    (tmp_path / "planted").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with tarfile.open(served, "w:gz") as tar:
        tar.add(tmp_path / "planted", "cifar-10-batches-py/data_batch_1")
    with pytest.raises(DataError, match="torchvision's download"):
        cifar10(10)
    assert not (tmp_path / "ran").exists()
    assert not (own_cache / "cifar10" / "cifar-10-batches-py").exists()


@pytest.mark.cifar
def test_the_real_images_have_the_published_hash_from_either_copy(tmp_path, monkeypatch):
    real = cifar10(5000, preprocessing="scale")
    images = np.rint(real.x.numpy() * 255).astype(np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = real.classes.numpy().astype(np.uint8)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == data.FIRST_5000_SHA256
    assert np.bincount(labels, minlength=10).min() > 400
    folder = write_torchvision(tmp_path / "torchvision", images, labels)
    trust(monkeypatch, folder)
    other = cifar10(5000, preprocessing="scale", path=folder)
    assert other.source == "the path given" and other.sha256 == real.sha256 and same(real, other)


# ---- preprocessing, labels, arguments ------------------------------------------------------------------


def test_preprocessing():
    scale, center, standard = (digits(300, preprocessing=p) for p in ("scale", "center", "standardize"))
    assert scale.x.min() == 0 and scale.x.max() == 1
    raw = scale.x.double()
    torch.testing.assert_close(center.x.double(), raw - raw.mean(dim=0), rtol=0, atol=1e-6)
    constant = raw.std(dim=0) == 0
    assert constant.any() and (standard.x[:, constant] == 0).all()  # digits have corners that are never inked
    moving = standard.x[:, ~constant].double()
    torch.testing.assert_close(moving.mean(dim=0), torch.zeros_like(moving[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(moving.std(dim=0, correction=0), torch.ones_like(moving[0]), rtol=0, atol=1e-6)
    assert scale.sha256 == center.sha256 == standard.sha256  # of the raw pixels


def test_labels(copies):
    onehot = cifar10(500, path=copies["mirror"])
    assert torch.equal(onehot.y, torch.nn.functional.one_hot(onehot.classes, 10).float())
    vehicles = cifar10(500, labels="vehicles", path=copies["mirror"])
    wanted = [1.0 if data.CLASSES[c] in ("airplane", "automobile", "ship", "truck") else -1.0 for c in vehicles.classes]
    assert vehicles.y.squeeze(1).tolist() == wanted
    pair = digits(100, labels="pair", classes=(7, 2))
    assert set(pair.classes.tolist()) == {2, 7}
    assert pair.y.squeeze(1).tolist() == [1.0 if c == 2 else -1.0 for c in pair.classes]
    halves = digits(100, labels="vehicles")
    assert halves.y.squeeze(1).tolist() == [1.0 if c >= 5 else -1.0 for c in halves.classes]


def test_device_and_precision():
    moved = digits(20).to("cpu", torch.float64)
    assert moved.x.dtype == moved.y.dtype == torch.float64 and moved.classes.dtype == torch.int64
    assert moved.sha256 == digits(20).sha256 != digits(21).sha256


@pytest.mark.parametrize("arguments, named", [
    ({"n": 0}, "n=0"),
    ({"n": -3}, "n=-3"),
    ({"n": 2.5}, "n=2.5"),
    ({"n": True}, "n=True"),
    ({"n": 5, "labels": "hot"}, "labels='hot'"),
    ({"n": 5, "preprocessing": "whiten"}, "preprocessing='whiten'"),
    ({"n": 5, "classes": (3, 10)}, "between 0 and 9"),
    ({"n": 5, "classes": ()}, "between 0 and 9"),
    ({"n": 5, "labels": "pair"}, "pair"),
    ({"n": 5, "labels": "pair", "classes": (1, 2, 3)}, "pair"),
    ({"n": 5, "labels": "pair", "classes": (1, 1)}, "pair|two"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_read(arguments, named, monkeypatch):
    monkeypatch.setattr(data, "_read_folder", None)
    for name in ("digits", "cifar10"):
        with pytest.raises(ValueError, match=named):
            data.load(name, **arguments)


def test_unknown_dataset():
    with pytest.raises(ValueError, match="dataset='mnist' is unknown; choose one of cifar10, digits"):
        data.load("mnist", n=5)
