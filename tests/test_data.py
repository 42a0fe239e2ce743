"""Data: every file proves itself, every fault is refused with its name; batches are exact and resumable."""

import gzip
import http.server
import inspect
import io
import lzma
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from normflow_vi.data import (
    BINARIZE,
    SOURCES,
    Batches,
    DataError,
    DataNotFound,
    Split,
    _load_parts,
    content_sha256,
    find,
    finding,
    load_data,
    resolve,
)
from normflow_vi.data import (
    NAMES as DATA_SETS,
)
from normflow_vi.data import pixels as pixels_module
from normflow_vi.data.content import _canonical, content_hash
from normflow_vi.data.decoders import File, read_batch, read_idx, read_packed
from normflow_vi.data.pixels import bernoulli
from normflow_vi.data.sources import Layout, Source, _cifar_layouts
from normflow_vi.numerics.compiling import has_numba
from normflow_vi.utils.files import sha256

CONNECT_SECONDS = finding.CONNECT_SECONDS  # as shipped; some tests shorten it
MNIST = [file.name for file in SOURCES["mnist"].layouts[0].files]
SIBLING = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = Path(os.environ["NORMFLOW_VI_DATA"]) if os.environ.get("NORMFLOW_VI_DATA") else SIBLING


def real(folder):
    return pytest.mark.skipif(
        not (REAL / folder).is_dir(), reason=f"no {folder}/ in $NORMFLOW_VI_DATA or beside the checkout"
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A project of its own without data, and no network: a test never finds, and never downloads,
    real data by accident.
    """
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "settings.ini").write_text("")
    monkeypatch.setenv("NORMFLOW_VI_ROOT", str(tmp_path / "project"))
    monkeypatch.delenv("NORMFLOW_VI_DATA", raising=False)
    monkeypatch.setenv("NORMFLOW_VI_OFFLINE", "1")
    return tmp_path / "project"


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def tiny_arrays(seed=0):
    draw = np.random.RandomState(seed)
    return {
        "train-images.gz": draw.randint(0, 256, (60, 28, 28), np.uint8),
        "train-labels.gz": draw.randint(0, 10, 60, np.uint8),
        "test-images.gz": draw.randint(0, 256, (20, 28, 28), np.uint8),
        "test-labels.gz": draw.randint(0, 10, 20, np.uint8),
    }


def tiny(folder, mirror=None):
    "An MNIST-like set of 80 images, written to `folder`, and its entry."
    arrays, files = tiny_arrays(), []
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        raw = gzip.compress(idx(array), mtime=0)
        (folder / "tiny" / name).write_bytes(raw)
        files.append(File(name, {name.split("-")[0]: array.shape}, len(raw), sha256(raw)))
    content = {
        part: content_hash(arrays[f"{part}-images.gz"], arrays[f"{part}-labels.gz"])
        for part in ("train", "test")
    }
    return Source(
        "tiny images", "tiny", (28, 28), content, (Layout(read_idx, tuple(files), mirror),), held_out=10
    )


def unhashed(source):
    "The same entry without file hashes: only decoders and the content's hash are left to notice."
    files = tuple(replace(file, size=None, sha256=None) for file in source.layouts[0].files)
    return replace(source, layouts=(replace(source.layouts[0], files=files),))


@pytest.fixture
def small(tmp_path, monkeypatch):
    source = tiny(tmp_path / "here")
    monkeypatch.setitem(SOURCES, "tiny", source)
    return source, tmp_path / "here"


def refuse(source, folder, *words):
    "The set is refused with a message that has all the words; returns it."
    with pytest.raises(DataError) as caught:
        _load_parts(source, folder, download=False)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    return str(caught.value)


# ---- a whole set ----


def test_a_whole_set_loads_and_is_split(small):
    source, folder = small
    parts, arrays = _load_parts(source, folder, download=False), tiny_arrays()
    assert [len(parts[part][0]) for part in ("train", "valid", "test")] == [50, 10, 20]
    assert (parts["train"][0] == arrays["train-images.gz"][:50]).all()
    order = np.random.RandomState(0).permutation(20)
    assert (parts["test"][0] == arrays["test-images.gz"][order]).all() and (
        parts["test"][1] == arrays["test-labels.gz"][order]
    ).all()
    held = sorted(zip(map(bytes, parts["valid"][0]), parts["valid"][1], strict=True))
    images, labels = (arrays[f"train-{field}.gz"][50:] for field in ("images", "labels"))
    assert held == sorted(zip(map(bytes, images), labels, strict=True))


def test_files_may_lie_flat(small, tmp_path):
    source, folder = small
    (folder / "tiny").rename(tmp_path / "flat")
    assert len(_load_parts(source, tmp_path / "flat", download=False)["train"][0]) == 50


def test_a_flat_file_of_another_set_does_not_count(small, tmp_path, monkeypatch):
    "MNIST and Fashion-MNIST have the same names: the other's files are not damaged ones."
    source, folder = small
    other = replace(
        source,
        folder="other",
        title="other",
        layouts=(
            replace(
                source.layouts[0],
                files=tuple(replace(file, sha256="0" * 64) for file in source.layouts[0].files),
            ),
        ),
    )
    (folder / "tiny").rename(tmp_path / "flat")
    with pytest.raises(DataNotFound):
        find(other, tmp_path / "flat", download=False)


# ---- faults ----

NAMES = list(tiny_arrays())


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_faults_are_refused(small, name):
    source, folder = small
    path = folder / "tiny" / name
    good, start = path.read_bytes(), time.perf_counter()
    faults = {
        "empty": b"",
        "HTML": b"\n<!DOCTYPE html><html>Sign in</html>",
        "too many": good + b"more",
        "truncated": good[:-1],
    }
    array = tiny_arrays()[name]
    faults["bytes"] = gzip.compress(b"\0\0\x08\1" + idx(array)[4:])  # wrong magic number
    faults["SHA-256"] = gzip.compress(idx(array[1:]))  # wrong count
    for word, fault in faults.items():
        path.write_bytes(fault)
        refuse(source, folder, name, word, sha256(good), sha256(fault))
    assert time.perf_counter() - start < 5


def damage(source, folder, positions, flips, seed):
    "Truncate and flip each file in many places; with and without file hashes nothing passes."
    draw, plain = np.random.RandomState(seed), unhashed(source)
    for name, array in tiny_arrays().items():
        path = folder / "tiny" / name
        good = path.read_bytes()
        for cut in draw.choice(len(good), min(positions, len(good)), replace=False):
            path.write_bytes(good[:cut])
            refuse(source, folder, name, sha256(good))
            refuse(plain, folder, name)
        for bit in draw.choice(8 * len(good), min(flips, 8 * len(good)), replace=False):
            changed = bytearray(good)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            refuse(source, folder, name, "changed", sha256(good), sha256(changed))
            try:
                _load_parts(
                    plain, folder, download=False
                )  # a bit of the gzip header may not matter to the content
            except DataError as error:
                assert name in str(error)
            else:
                assert gzip.decompress(bytes(changed)) == idx(array)
        path.write_bytes(good)
    assert len(_load_parts(source, folder, download=False)["train"][0]) == 50


def test_truncated_and_flipped(small):
    damage(*small, positions=20, flips=20, seed=0)


@pytest.mark.full
def test_truncated_and_flipped_in_many_places(small):
    damage(*small, positions=50, flips=400, seed=1)


def test_swapped_files_are_recognised(small):
    source, folder = small
    images, labels = folder / "tiny" / "train-images.gz", folder / "tiny" / "train-labels.gz"
    images.rename(folder / "x")
    labels.rename(images)
    (folder / "x").rename(labels)
    refuse(source, folder, "train-images.gz", "the content of tiny/train-labels.gz", "swapped")
    refuse(unhashed(source), folder, "train-images.gz")


def test_swapped_labels_are_noticed_by_the_content(small):
    """Train and test labels of equal shape, files without known hashes: only the content's hash
    is left to notice.
    """
    source, folder = small
    path = folder / "tiny" / "test-labels.gz"
    path.write_bytes(gzip.compress(idx(np.roll(tiny_arrays()["test-labels.gz"], 1))))
    refuse(unhashed(source), folder, "test-labels.gz", source.content["test"])


def test_a_damaged_file_found_first_is_not_passed_over(small, alone):
    source, folder = small
    tiny(alone / "data")  # a good copy in the next place
    (folder / "tiny" / "test-labels.gz").write_bytes(b"")
    refuse(source, folder, str(folder), "empty")
    (folder / "tiny" / "test-labels.gz").unlink()  # an incomplete set is passed over: nothing in it is wrong
    assert find(source, folder, download=False)[1]["test-labels.gz"].is_relative_to(alone)


def test_an_unreadable_file_is_refused(small, monkeypatch):
    source, folder = small

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(finding, "sha256", fail)
    refuse(source, folder, "train-images.gz", "Input/output error")


BOMB = """
import re, sys, time
from pathlib import Path
from normflow_vi.data import decoders
from normflow_vi.data.decoders import DataError, File, read_idx, read_packed
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
path, name, before, start = Path(sys.argv[1]), sys.argv[2], peak(), time.perf_counter()
if "careless" in sys.argv: decoders._read_bounded = lambda stream, most, least=None: stream.read()
try: {"gz": read_idx, "npz": read_packed}[name](path, File(path.name, {"train": (60000, 28, 28)}))
except DataError as error: print(error)
print(time.perf_counter() - start, peak() - before)
"""


def read_bomb(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", BOMB, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    *message, numbers = done.stdout.strip().splitlines()
    return message, *map(float, numbers.split())


def bomb(tmp_path, kind):
    path = tmp_path / f"bomb.{kind}"
    if kind == "gz":  # a gzip file may be a chain of gzip files
        path.write_bytes(
            gzip.compress(idx(np.zeros((60000, 28, 28), np.uint8))) + 60 * gzip.compress(bytes(1 << 24))
        )
    else:
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("train.npy", "w") as file,
        ):
            for _ in range(20):
                file.write(bytes(1 << 24))
    return path


@pytest.mark.parametrize("kind", ["gz", "npz"])
def test_a_bomb_is_refused_quickly_and_in_little_memory(tmp_path, kind):
    """A megabyte that expands to a gigabyte (the zip: a third of one), given to the decoder
    itself: file hashes would stop it earlier.
    """
    path = bomb(tmp_path, kind)
    assert path.stat().st_size < 2e6
    (message,), seconds, megabytes = read_bomb(path, kind)
    assert path.name in message and "more than" in message and seconds < 5 and megabytes < 100


def test_the_bomb_test_notices_careless_reading(tmp_path):
    "The control: without the bound the same file takes a third of a gigabyte."
    assert read_bomb(bomb(tmp_path, "npz"), "npz", "careless")[2] > 200


def test_a_bomb_in_place_of_mnist(tmp_path):
    (tmp_path / "mnist").mkdir()
    for name in MNIST:
        (tmp_path / "mnist" / name).write_bytes(b"x")
    bomb(tmp_path, "gz").rename(tmp_path / "mnist" / MNIST[0])
    start = time.perf_counter()
    with pytest.raises(DataError, match=MNIST[0]):
        load_data("auto", folder=tmp_path)  # auto does not hide damage either
    assert time.perf_counter() - start < 5


def test_an_npz_with_objects_is_not_unpickled(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.savez(tmp_path / "objects.npz", train=np.array([Payload(), 1], object))
    with pytest.raises(DataError, match="objects.npz"):
        read_packed(tmp_path / "objects.npz", File("objects.npz", {"train": (2, 4, 4)}))
    assert not (tmp_path / "executed").exists()


# ---- CIFAR-10 in all its layouts ----


def python2_pickle(rows, labels):
    """The instruction stream of an official batch: protocol 2, a dict of strings, a list of small
    integers and an array.
    """

    def short(text):
        return b"U" + bytes([len(text)]) + text

    body = (
        b"\x80\x02}q\x01("
        + short(b"batch_label")
        + short(b"training batch 1 of 5")
        + short(b"labels")
        + b"]q\x02("
    )
    body += b"".join(b"K" + bytes([label]) for label in labels) + b"e" + short(b"data")
    body += (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05"
        + short(b"b")
        + b"\x87Rq\x06(K\x01"
    )
    body += (
        b"K"
        + bytes([len(rows)])
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\x07"
        + short(b"u1")
        + b"K\x00K\x01\x87Rq\x08(K\x03"
        + short(b"|")
    )
    body += (
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", rows.size)
        + rows.tobytes()
        + b"tb"
    )
    return (
        body
        + short(b"filenames")
        + b"]("
        + b"".join(short(b"labels_%d.png" % i) for i in range(len(rows)))
        + b"eu."
    )


def cifar_tree(folder, kind):
    "60 images in one of the layouts; the IDX one in another order and cut, as copies in circulation are."
    draw = np.random.RandomState(5)
    rows, labels = draw.randint(0, 256, (60, 3072), np.uint8), draw.randint(0, 10, 60, np.uint8)
    images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    blocks = [slice(10 * i, 10 * i + 10) for i in range(6)]
    pickled = {
        f"cifar-10-batches-py/{name}": python2_pickle(rows[b], labels[b])
        for name, b in zip(names, blocks, strict=True)
    }
    binary = {
        f"cifar-10-batches-bin/{name}.bin": np.c_[labels[b], rows[b]].tobytes()
        for name, b in zip(names, blocks, strict=True)
    }
    if kind == "idx":
        order = np.r_[draw.permutation(50), 50 + draw.permutation(10)]
        for name, b in zip([*(f"train-part{i}" for i in range(5)), "test"], blocks, strict=True):
            (folder / "cifar10" / f"{name}-images-idx4-ubyte.xz").write_bytes(
                lzma.compress(idx(np.ascontiguousarray(images[order[b]])))
            )
            (folder / "cifar10" / f"{name}-labels-idx1-ubyte.gz").write_bytes(
                gzip.compress(idx(labels[order[b]]))
            )
    for name, raw in ({"py": pickled, "bin": binary}.get(kind) or {}).items():
        (folder / "cifar10" / name).parent.mkdir(exist_ok=True)
        (folder / "cifar10" / name).write_bytes(raw)
    if kind.endswith("tar"):
        with tarfile.open(
            folder / "cifar10" / f"cifar-10-{'python' if kind == 'py-tar' else 'binary'}.tar.gz", "w:gz"
        ) as archive:
            for name, raw in (pickled if kind == "py-tar" else binary).items():
                entry = tarfile.TarInfo(name)
                entry.size = len(raw)
                archive.addfile(entry, io.BytesIO(raw))
    return {
        part: _canonical(images[b], labels[b], ordered=False)[0]
        for part, b in (("train", slice(50)), ("test", slice(50, 60)))
    }


def tiny_cifar(content):
    layouts = tuple(
        replace(layout, files=tuple(replace(file, size=None, sha256=None) for file in layout.files))
        for layout in _cifar_layouts(10)
    )
    layouts = tuple(
        replace(
            layout,
            files=tuple(
                replace(file, parts={"train": (50, 32, 32, 3), "test": (10, 32, 32, 3)})
                if file.name.endswith(".tar.gz")
                else file
                for file in layout.files
            ),
        )
        for layout in layouts
    )
    return replace(SOURCES["cifar10"], content=content, layouts=layouts, held_out=5)


KINDS = ["idx", "py", "bin", "py-tar", "bin-tar"]


def test_all_layouts_of_cifar_give_the_same_tensors(tmp_path):
    loaded = []
    for kind in KINDS:
        source = tiny_cifar(cifar_tree(tmp_path / kind, kind))
        loaded.append(_load_parts(source, tmp_path / kind, download=False))
        assert [len(loaded[-1][part][0]) for part in ("train", "valid", "test")] == [45, 5, 10]
    for other in loaded[1:]:
        assert all(
            (a == b).all() for part in other for a, b in zip(loaded[0][part], other[part], strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_cifar_is_refused(tmp_path, kind):
    source = tiny_cifar(cifar_tree(tmp_path, kind))
    for path in [path for path in (tmp_path / "cifar10").rglob("*") if path.is_file()]:
        good = path.read_bytes()
        for fault in (
            good[: len(good) // 2],
            b"",
            b"<html>",
            good[: (at := 2 * len(good) // 3)] + bytes([good[at] ^ 1]) + good[at + 1 :],
        ):
            path.write_bytes(fault)
            refuse(source, tmp_path, path.name)
        path.write_bytes(good)


def test_a_changed_pixel_or_label_in_a_pickle_is_noticed(tmp_path):
    source = tiny_cifar(cifar_tree(tmp_path, "py"))
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3"
    good = path.read_bytes()
    for place in (good.index(b"T" + struct.pack("<I", 30720)) + 1000, good.index(b"]q\x02(") + 5):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        refuse(source, tmp_path, "data_batch_3")


def test_a_payload_in_a_pickled_batch_never_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for protocol in range(6):
        (tmp_path / "data_batch_1").write_bytes(
            pickle.dumps({"labels": Payload(), "data": Payload()}, protocol)
        )
        with pytest.raises(DataError, match="data_batch_1"):
            read_batch(tmp_path / "data_batch_1", File("data_batch_1", {"train": (10, 32, 32, 3)}))
    assert not (tmp_path / "executed").exists()


# ---- downloads ----


class Mirror(http.server.BaseHTTPRequestHandler):
    "A mirror whose behaviour the test sets."

    def log_message(self, *args):
        pass

    def do_GET(self):
        mode, raw = self.server.mode, (self.server.folder / Path(self.path).name).read_bytes()
        if mode == "404":
            return self.send_error(404)
        if mode == "silent":
            time.sleep(3)
            return
        if mode == "html":
            raw = b"<html>Accept the terms of use</html>"
        if mode == "wrong":
            raw = raw[:-9] + b"different"
        if mode == "endless":
            raw = raw * 50
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if mode == "cut":
            raw = raw[: self.server.cut % len(raw)]
        if mode in ("hang", "drip"):
            try:
                for i in range(40):
                    self.wfile.write(raw[i : i + 1])
                    self.wfile.flush()
                    time.sleep(0.1 if mode == "drip" else 3)
            except OSError:
                pass
            return
        try:
            self.wfile.write(raw)
        except OSError:
            pass


@pytest.fixture
def mirror(tmp_path, monkeypatch, alone):
    monkeypatch.delenv("NORMFLOW_VI_OFFLINE")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.mode, server.folder, server.cut, server.daemon_threads = (
        "good",
        tmp_path / "mirror" / "tiny",
        0,
        True,
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.source = tiny(tmp_path / "mirror", f"http://127.0.0.1:{server.server_port}/")
    server.target = alone / "data" / "tiny"
    yield server
    server.shutdown()
    server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def test_a_good_download(mirror):
    assert len(_load_parts(mirror.source, None, download=True)["train"][0]) == 50
    assert names(mirror.target) == sorted(NAMES)
    mirror.shutdown()  # the second time nothing is asked for
    assert len(_load_parts(mirror.source, None, download=True)["train"][0]) == 50


@pytest.mark.parametrize(
    "mode, words",
    [
        ("404", "404"),
        ("html", "HTML"),
        ("wrong", "changed"),
        ("endless", "too many"),
        ("silent", "no answer"),
        ("hang", "timed out"),
        ("drip", "slower"),
    ],
)
def test_a_bad_download_leaves_nothing_and_says_why(mirror, monkeypatch, mode, words):
    monkeypatch.setattr(finding, "CONNECT_SECONDS", 0.4)
    monkeypatch.setattr(finding, "STALL_SECONDS", 0.8)
    if mode == "drip":
        monkeypatch.setattr(finding, "SLOWEST", 1e9)
    mirror.mode, start = mode, time.perf_counter()
    with pytest.raises(DataNotFound, match=words) as caught:
        find(mirror.source)
    assert (
        f"127.0.0.1:{mirror.server_port}/{NAMES[0]}" in str(caught.value) and time.perf_counter() - start < 3
    )
    assert names(mirror.target) == []
    mirror.mode = "good"  # the next run succeeds
    assert len(_load_parts(mirror.source, None, download=True)["train"][0]) == 50


def cut_downloads(mirror, count, seed):
    mirror.mode = "cut"
    size = mirror.source.layouts[0].files[0].size
    for position in np.random.RandomState(seed).randint(0, size, count).tolist():
        mirror.cut = position
        with pytest.raises(DataNotFound, match="truncated|empty"):
            find(mirror.source)
        assert names(mirror.target) == []
    mirror.mode = "good"
    assert len(find(mirror.source)[1]) == 4


def test_downloads_cut_anywhere(mirror):
    cut_downloads(mirror, 12, 0)


@pytest.mark.full
def test_downloads_cut_in_many_places(mirror):
    cut_downloads(mirror, 50, 1)


KILLED = """
import sys, pickle
import logging
from normflow_vi import data
logging.getLogger("normflow_vi").disabled = True
source = pickle.load(open(sys.argv[1], "rb"))
print("ready", flush=True)
data.find(source)
"""


def kill_downloads(mirror, tmp_path, count):
    "kill -9 in mid-download: never a file under its final name, and the next run cleans up and succeeds."
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(mirror.source))
    draw, mirror.mode = np.random.RandomState(0), "drip"
    for _ in range(count):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "source.pickle")],
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.15 + 0.4 * draw.rand())
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert all(name.endswith(".part") for name in names(mirror.target)) and len(names(mirror.target)) == 1
    mirror.mode = "good"
    assert len(_load_parts(mirror.source, None, download=True)["train"][0]) == 50 and names(
        mirror.target
    ) == sorted(NAMES)


def test_a_killed_download(mirror, tmp_path):
    kill_downloads(mirror, tmp_path, 2)


@pytest.mark.full
def test_many_killed_downloads(mirror, tmp_path):
    kill_downloads(mirror, tmp_path, 20)


def test_an_interrupted_set_is_completed(mirror):
    find(mirror.source)
    (mirror.target / NAMES[0]).unlink()
    before = (mirror.target / NAMES[1]).stat().st_mtime_ns
    assert len(find(mirror.source)[1]) == 4 and (mirror.target / NAMES[1]).stat().st_mtime_ns == before


def test_several_workers_download_once(mirror):
    results, asked = [], []

    def counted(self):
        asked.append(self.path)
        Mirror.do_GET(self)

    mirror.RequestHandlerClass = type("Counted", (Mirror,), {"do_GET": counted})
    workers = [threading.Thread(target=lambda: results.append(len(find(mirror.source)[1]))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [4] * 4 and sorted(asked) == sorted(f"/{name}" for name in NAMES)


def test_no_network_fails_in_time(small, monkeypatch, tmp_path):
    "A look-up that hangs: the time limit does not depend on it."
    monkeypatch.delenv("NORMFLOW_VI_OFFLINE")
    monkeypatch.setattr(finding, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: time.sleep(5))
    load_data("digits")  # imports scikit-learn, which may take seconds
    start = time.perf_counter()
    with pytest.raises(DataNotFound, match="no answer within 0.5 s"):
        load_data("mnist")
    assert load_data("auto", "static").title == "statically binarised 8x8 digits (MNIST not available)"
    assert time.perf_counter() - start < 4 and CONNECT_SECONDS <= 10


# ---- names, titles, hashes ----


def test_nothing_found_says_where_it_looked(tmp_path, alone):
    (tmp_path / "given").mkdir()
    with pytest.raises(DataNotFound) as caught:
        load_data("mnist", folder=tmp_path / "given")
    for word in (str(tmp_path / "given"), str(alone / "data"), "NORMFLOW_VI_OFFLINE", "MNIST"):
        assert word in str(caught.value)
    with pytest.raises(DataNotFound, match="not asked for"):
        load_data("cifar10", download=False)
    (tmp_path / "given" / MNIST[0]).write_bytes(b"x")
    with pytest.raises(DataNotFound, match=f"incomplete: without {MNIST[1]}"):
        load_data("mnist", folder=tmp_path / "given")
    with pytest.raises(NotADirectoryError, match="no such folder"):
        load_data("mnist", folder=tmp_path / "gone")


@pytest.mark.parametrize("binarize", BINARIZE)
def test_auto_falls_back_to_digits_and_says_so(binarize):
    data = load_data("auto", binarize)
    assert resolve("auto", binarize) == data.name == "digits" and data.title.endswith(
        "8x8 digits (MNIST not available)"
    )
    assert load_data("digits", binarize).title.endswith("8x8 digits")
    assert data.shape == (28, 28) and [len(part) for part in (data.train, data.valid, data.test)] == [
        1297,
        250,
        250,
    ]
    assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert data.sha256 == content_sha256("digits", binarize)
    values = set(data.valid.pixels(torch.Generator().manual_seed(0)).unique().tolist())
    assert values == {0.0, 1.0} if binarize != "none" else len(values) == 17 and max(values) == 1


def test_the_digits_fixed_draw_is_a_fair_one():
    grey, fixed = (
        load_data("digits", "none").train.pixels().double(),
        load_data("digits", "static").train.pixels().double(),
    )
    z = (fixed - grey).sum() / (grey * (1 - grey)).sum().sqrt()
    assert abs(z) < 4 and torch.equal(fixed, load_data("digits", "static").train.pixels().double())


def test_wrong_choices_are_refused():
    for name, binarize, word in (
        ("imagenet", "none", "imagenet"),
        ("mnist", "soft", "soft"),
        ("cifar10", "static", "only mnist"),
        ("fashion-mnist", "static", "only mnist"),
        (None, "none", "None"),
    ):
        with pytest.raises(ValueError, match=word):
            load_data(name, binarize)
    with pytest.raises(ValueError, match="resolve"):
        content_sha256("auto")


def test_hashes_tell_data_sets_apart():
    hashes = {
        content_sha256(name, kind)
        for name in DATA_SETS
        for kind in BINARIZE
        if kind != "static" or name in ("mnist", "digits")
    }
    assert len(hashes) == 14
    assert (
        content_sha256("mnist", "static")
        == "d64772fb99eeb03b680de2f5ea44a1ff4b96e79b3cbc34685652bef16c35466c"
    )  # runs are keyed by it: a change makes every record stale


# ---- binarisation and batches ----


def test_threshold_arithmetic_is_exact():
    grey = torch.arange(256, dtype=torch.uint8)
    assert [t + 2**31 for t in pixels_module._thresholds(grey).tolist()] == [
        16843009 * p for p in range(256)
    ] and 16843009 * 255 == 2**32 - 1


def bernoulli_z(n, seed):
    grey = torch.arange(256, dtype=torch.uint8)
    means = bernoulli(grey.expand(n, 256).contiguous(), torch.Generator().manual_seed(seed)).double().mean(0)
    p = grey.double() / 255
    assert means[0] == 0 and means[-1] == 1
    return (means - p)[1:-1] / (p * (1 - p) / n).sqrt()[1:-1]


def test_binarisation_statistics():
    z = bernoulli_z(20_000, 0)
    assert z.abs().max() < 5 and abs(z.mean()) * 254**0.5 < 4 and abs(z.var() - 1) / (2 / 253) ** 0.5 < 4


@pytest.mark.full
def test_binarisation_statistics_over_many_seeds():
    z = torch.cat([bernoulli_z(20_000, seed) for seed in range(100)])
    assert (
        z.abs().max() < 6 and abs(z.mean()) * len(z) ** 0.5 < 4 and abs(z.var() - 1) / (2 / len(z)) ** 0.5 < 4
    )


def test_pixels_are_independent():
    "Neighbours share a 64-bit word of the generator: their correlation, in standard errors."
    x = bernoulli(
        torch.full((40_000, 7), 100, dtype=torch.uint8), torch.Generator().manual_seed(0)
    ).double()  # an odd row length
    c = torch.corrcoef(x.T) * len(x) ** 0.5
    assert c.fill_diagonal_(0).abs().max() < 5


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(pixels_module, "fits", lambda *tensors, **how: False)


def check_same_pixels():
    """The kernel and the torch form draw the same pixels, for odd sizes and any layout too, and
    leave the generator in the same state.
    """
    for shape in ((0,), (1,), (9,), (100, 784), (7, 3, 5)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        for seed in range(3):
            g, again = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
            drawn, key = (
                bernoulli(pixels, g),
                torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=again),
            )
            assert (
                torch.equal(drawn, pixels_module._bernoulli_torch(pixels, key))
                and drawn.dtype == torch.float32
                and torch.equal(g.get_state(), again.get_state())
            )
            assert torch.equal(
                bernoulli(pixels.flip(0).mT if pixels.dim() > 1 else pixels.flip(0), again),
                bernoulli(pixels.flip(0).mT.contiguous() if pixels.dim() > 1 else pixels.flip(0), g),
            )


def test_same_pixels_with_and_without_the_kernel():
    check_same_pixels()


def test_a_stream_does_not_depend_on_numba(no_kernel, monkeypatch):
    "Nor does a stream that is resumed by the other form."
    split = Split(torch.randint(0, 256, (100, 10), dtype=torch.uint8), None, "dynamic")
    slow = Batches(split, 30, seed=3)
    first, state, rest = slow.next(), slow.state_dict(), [slow.next() for _ in range(5)]
    monkeypatch.undo()
    quick = Batches(split, 30, seed=3)
    assert torch.equal(quick.next(), first)
    quick.load_state_dict(state)
    assert all(torch.equal(quick.next(), batch) for batch in rest)


def correlations(split, batches=400):
    """Of centred pixels in one stream, in standard errors: with the next pixel, two on, and a row
    on; with the same pixel of the next image, the next batch and the next epoch.
    """
    stream = Batches(split, len(split) // 2, seed=0)
    p = (split.images[0].double() / 255)[None]
    x = (
        torch.stack([stream.next() for _ in range(batches)]).double().sub(p).div((p * (1 - p)).sqrt())
    )  # (batch, image, pixel)
    pairs = (
        [(x[..., k:], x[..., :-k]) for k in (1, 2, 28)]
        + [(x[:, k:], x[:, :-k]) for k in (1, 2)]
        + [(x[k:], x[:-k]) for k in (1, 2)]
    )
    return torch.stack(
        [
            torch.stack(
                [
                    (a * b).mean() * a.numel() ** 0.5,
                    (a.square() * b).mean() * a.numel() ** 0.5 / a.pow(4).mean().sqrt(),
                ]
            )
            for a, b in pairs
        ]
    )


def check_pixels_of_a_stream_are_independent():
    z = correlations(
        Split(torch.randint(1, 255, (1, 784), dtype=torch.uint8).expand(20, -1).contiguous(), None, "dynamic")
    )
    assert z.abs().max() < 5 and 0.2 < z.square().mean() < 3


def test_pixels_of_a_stream_are_independent():
    check_pixels_of_a_stream_are_independent()


def test_words_are_uniform_and_nearby_keys_are_unrelated():
    """Each of 32 bits is 1 half of the time.

    One bit more or less in the key, or keys one step apart, change each bit of each word half of
    the time.
    """

    def bits(key, n=20_000):
        return (pixels_module._random_words(n, torch.tensor(key))[:, None] >> torch.arange(32) & 1).double()

    one = bits(12345)
    cases = [one, *((one - bits(12345 ^ 1 << k)).abs() for k in (0, 1, 31, 62)), (one - bits(12346)).abs()]
    z = torch.stack([(2 * case.mean(0) - 1) * 20_000**0.5 for case in cases])
    assert z.abs().max() < 5 and abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5


PLANTED = {
    "one key for all batches": (
        "bernoulli",
        "key = _draw_integers((), pixels, generator)",
        "key = torch.tensor(7)",
        check_pixels_of_a_stream_are_independent,
    ),
    "a word for each row of pixels": (
        "_random_words",
        "torch.arange(1, 1 + -(-count // 2), device=key.device)",
        "torch.arange(1, 1 + -(-count // 2), device=key.device) // 28",
        check_pixels_of_a_stream_are_independent,
    ),
    "the sign shifted in": ("_fold", "& (1 << 64 - shift) - 1", "& -1", check_same_pixels),
    "another constant": ("_random_words", "_signed(_MIX_1)", "_signed(_MIX_2)", check_same_pixels),
    "words start at zero": ("_random_words", "torch.arange(1, 1 + -", "torch.arange(0, -", check_same_pixels),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_in_the_draws_are_caught(bug, monkeypatch):
    name, found, wrong, check = PLANTED[bug]
    if check is check_pixels_of_a_stream_are_independent:
        monkeypatch.setattr(pixels_module, "fits", lambda *tensors, **how: False)
    elif not has_numba():
        pytest.skip("two forms to compare need numba")
    check()
    source, scope = inspect.getsource(getattr(pixels_module, name)), {}
    assert source.count(found) == 1
    exec(source.replace(found, wrong), dict(vars(pixels_module)), scope)
    monkeypatch.setattr(pixels_module, name, scope[name])
    with pytest.raises(AssertionError):
        check()


def test_the_statistics_notice_a_bias():
    "The control: an 8-bit draw, whose probability is p/256, is caught by the same test."
    n, grey = 20_000, torch.arange(256)
    draws = torch.randint(0, 256, (n, 256), generator=torch.Generator().manual_seed(0)) < grey
    p = grey.double() / 255
    z = (draws.double().mean(0) - p)[1:-1] / (p * (1 - p) / n).sqrt()[1:-1]
    assert abs(z.mean()) * 254**0.5 > 4


def numbered(n, binarize="none"):
    return Split(torch.arange(n, dtype=torch.uint8)[:, None].repeat(1, 3), torch.arange(n), binarize)


@pytest.mark.parametrize("n, size", [(120, 30), (120, 32), (120, 120), (120, 1)])
def test_an_epoch_has_every_image_at_most_once(n, size):
    stream, per = Batches(numbered(n), size, seed=0), n // size
    epochs = [torch.cat([stream.next() for _ in range(per)])[:, 0].mul(255).round().long() for _ in range(3)]
    for epoch in epochs:
        assert len(epoch.unique()) == len(epoch) == per * size  # all of them when size divides n
    assert stream.epoch == 2 and not torch.equal(epochs[0], epochs[1])
    if n % size:
        assert len(torch.cat(epochs).unique()) > per * size  # the ones left out differ from epoch to epoch


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_batches_resume_bitwise(binarize):
    split, wanted = numbered(100, binarize), {}
    stream = Batches(split, 30, seed=3)
    states = []
    for step in range(12):
        states.append(pickle.dumps(stream.state_dict()))
        wanted[step] = stream.next()
    for step, state in enumerate(states):
        again = Batches(split, 30, seed=99)
        again.load_state_dict(pickle.loads(state))
        assert all(torch.equal(again.next(), wanted[later]) for later in range(step, 12))


def test_every_item_of_the_state_matters():
    split = numbered(100, "dynamic")
    stream = Batches(split, 30, seed=3)
    for _ in range(5):
        stream.next()
    state, other = stream.state_dict(), Batches(split, 30, seed=99).state_dict()
    wanted = torch.cat([stream.next() for _ in range(6)])
    for item in ("generator", "order", "position"):
        again = Batches(split, 30, seed=0)
        again.load_state_dict(state | {item: other[item]})
        assert not torch.equal(torch.cat([again.next() for _ in range(6)]), wanted), item
    for item in state:
        with pytest.raises(KeyError, match=item):
            Batches(split, 30, seed=0).load_state_dict({k: v for k, v in state.items() if k != item})


def test_streams_keep_to_themselves():
    split = numbered(100, "dynamic")
    first = Batches(split, 20, seed=0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = torch.cat([first.next() for _ in range(7)])
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not touched
    assert torch.equal(
        a, torch.cat([(s := Batches(split, 20, seed=0)).next(), *[s.next() for _ in range(6)]])
    )
    assert not torch.equal(
        a, torch.cat([(s := Batches(split, 20, seed=1)).next(), *[s.next() for _ in range(6)]])
    )
    b = Batches(split, 20, seed=0).next()
    assert b.shape == (20, 3) and b.dtype == torch.float32


def test_bad_batches_are_refused():
    for size in (0, -1, 101, 2.5, "10"):
        with pytest.raises(ValueError, match="batch_size"):
            Batches(numbered(100), size, seed=0)
    state = Batches(numbered(100), 10, seed=0).state_dict()
    with pytest.raises(ValueError, match="batch_size=10"):
        Batches(numbered(100), 20, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="images=100"):
        Batches(numbered(50), 10, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="generator"):
        numbered(10, "dynamic").pixels()


def test_pixels_take_rows_in_every_form():
    split = numbered(50)
    for rows in (slice(2, 5), [2, 3, 4], range(2, 5), torch.tensor([2, 3, 4])):
        assert torch.equal(split.pixels(indices=rows), split.pixels()[2:5])


# ---- the real sets ----


@real("mnist")
def test_real_mnist():
    data = load_data("mnist", folder=REAL, download=False)
    assert data.title == "MNIST" and [len(part) for part in (data.train, data.valid, data.test)] == [
        50000,
        10000,
        10000,
    ]
    both = torch.cat([data.train.images, data.valid.images])
    assert both.shape == (60000, 784) and abs(both.double().mean() / 255 - 0.1307) < 5e-5
    assert torch.cat([data.train.labels, data.valid.labels]).bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert data.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.equal(
        load_data("auto", "threshold", folder=REAL, download=False).test.pixels(),
        (data.test.images > 127).float(),
    )


@real("fashion-mnist")
def test_real_fashion_mnist():
    data = load_data("fashion-mnist", "dynamic", folder=REAL, download=False)
    both = torch.cat([data.train.images, data.valid.images])
    assert (
        both.shape == (60000, 784)
        and abs(both.double().mean() / 255 - 0.2860) < 5e-5
        and data.test.labels.bincount().tolist() == [1000] * 10
    )


@real("binarized-mnist")
def test_real_static_mnist_is_shuffled_and_the_same_in_both_layouts(tmp_path):
    data = load_data("mnist", "static", folder=REAL, download=False)
    assert data.title == "statically binarised MNIST" and data.train.labels is None
    assert [len(part) for part in (data.train, data.valid, data.test)] == [50000, 10000, 10000]
    assert data.train.images.max() == 1 and data.train.images.is_contiguous()
    pixels = data.test.pixels()  # sorted by class, the mean of the first tenth (zeros) would be far off
    ink, part = pixels.mean(1), pixels[:1000].mean(1)
    assert abs(part.mean() - ink.mean()) / (ink.std() / 1000**0.5) < 4
    raw = np.unpackbits(np.load(REAL / "binarized-mnist" / "binarized_mnist_packed.npz")["test"], axis=1)
    sorted_ink = raw[:1000].mean(1)
    assert abs(sorted_ink.mean() - ink.mean().item()) / (ink.std().item() / 1000**0.5) > 10  # the control
    for part in ("train", "valid", "test"):
        bits = np.unpackbits(np.load(REAL / "binarized-mnist" / "binarized_mnist_packed.npz")[part], axis=1)
        text = np.full((*bits.shape, 2), ord(" "), np.uint8)
        text[..., 0] = bits + ord("0")
        text[:, -1, 1] = ord("\n")
        (tmp_path / f"binarized_mnist_{part}.amat").write_bytes(text.tobytes())
    official = load_data("mnist", "static", folder=tmp_path, download=False)
    assert all(
        torch.equal(getattr(data, part).images, getattr(official, part).images)
        for part in ("train", "valid", "test")
    )


@real("mnist")
@pytest.mark.parametrize("name", MNIST)
def test_real_files_swapped_cut_or_flipped(tmp_path, name):
    (tmp_path / "mnist").mkdir()
    for each in MNIST:
        (tmp_path / "mnist" / each).symlink_to(REAL / "mnist" / each)
    path, good = tmp_path / "mnist" / name, (REAL / "mnist" / name).read_bytes()
    draw = np.random.RandomState(0)
    other = MNIST[(MNIST.index(name) + 1) % 4]
    faults = [
        (REAL / "mnist" / other).read_bytes(),
        b"<html></html>",
        b"",
        *(good[:cut] for cut in draw.randint(1, len(good), 3)),
    ]
    if (REAL / "fashion-mnist").is_dir():
        faults.append((REAL / "fashion-mnist" / name).read_bytes())
    for bit in draw.randint(0, 8 * len(good), 3):
        faults.append(bytearray(good))
        faults[-1][bit // 8] ^= 1 << bit % 8
    for fault in faults:
        path.unlink()
        path.write_bytes(fault)
        start = time.perf_counter()
        with pytest.raises(DataError) as caught:
            load_data("mnist", folder=tmp_path, download=False)
        assert (
            name in str(caught.value)
            and sha256(good) in str(caught.value)
            and sha256(bytes(fault)) in str(caught.value)
        )
        assert time.perf_counter() - start < 5


@pytest.mark.full
@real("cifar10")
def test_real_cifar10():
    data = load_data("cifar10", folder=REAL, download=False)
    assert data.shape == (32, 32, 3) and [len(part) for part in (data.train, data.valid, data.test)] == [
        45000,
        5000,
        10000,
    ]
    both = torch.cat([data.train.images, data.valid.images]).view(-1, 3).double() / 255
    assert (both.mean(0) - torch.tensor([0.49140, 0.48216, 0.44653])).abs().max() < 1e-5
    assert (
        torch.cat([data.train.labels, data.valid.labels]).bincount().tolist() == [5000] * 10
        and data.test.labels.bincount().tolist() == [1000] * 10
    )


def test_the_import_is_light():
    code = (
        "import sys, normflow_vi.data; heavy = 'sklearn', 'scipy', 'pandas', 'matplotlib'; "
        "print([m for m in heavy if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
