"Checkpoints under damage, malice and full disks."

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import damage
from normflow_vi.engine.checkpoint import MAGIC, Damaged, latest, pack, path_of, save, unpack
from normflow_vi.utils.files import sha256


def state(step):
    return {
        "weights": torch.randn(100, 150, generator=torch.Generator().manual_seed(step)),
        "rows": [(step, {"loss": [1.5]})],
    }


@pytest.fixture
def folder(tmp_path):
    for step in (100, 200):
        save(tmp_path, step, state(step))
    return tmp_path


def framed(payload, version=b"1"):
    return b"%s %s %s\n" % (MAGIC, version, sha256(version + payload).encode()) + payload


def refused(folder, data):
    "Put `data` in the newest file's place: is it named in a warning, and the one before it used?"
    path = path_of(folder, 200)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=path.name):
        step, found = latest(folder)
    return step == 100 and torch.equal(found["weights"], state(100)["weights"])


def test_what_is_saved_is_loaded(folder):
    step, found = latest(folder)
    assert step == 200
    assert torch.equal(found["weights"], state(200)["weights"])
    assert found["rows"] == state(200)["rows"]


def test_the_last_two_are_kept_and_rests_are_swept(folder):
    (folder / ".step-000000150.ckpt.abcd.part").write_text("half")
    save(folder, 300, state(300))
    save(folder, 400, state(400))
    assert sorted(file.name for file in folder.iterdir()) == ["step-000000300.ckpt", "step-000000400.ckpt"]


@pytest.mark.parametrize(
    "kind, times",
    [
        ("bit", 40),
        ("truncated", 20),
        ("zeroed", 20),
        *[
            pytest.param(kind, times, marks=pytest.mark.full)
            for kind, times in [("bit", 400), ("truncated", 200), ("zeroed", 200)]
        ],
    ],
)
def test_damage_is_noticed_every_time(folder, kind, times):
    rng = np.random.default_rng(times)
    data = path_of(folder, 200).read_bytes()
    for _ in range(times):
        assert refused(folder, damage(kind, data, rng))


def test_every_byte_of_the_header_counts(folder):
    data = path_of(folder, 200).read_bytes()
    for place in range(data.index(b"\n") + 1):
        for bit in range(8):
            assert refused(folder, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"hello",
        b"PK\x03\x04" * 100,
        MAGIC,
        MAGIC + b" 1 \n",
        framed(b"not torch"),
        framed(b"x", b"one"),
        framed(pickle.dumps({"step": 1, "state": {}}, 2)),
        bytes(10_000),
    ],
)
def test_foreign_files_are_refused(folder, data):
    assert refused(folder, data)


def test_all_refused_means_none(folder):
    for step in (100, 200):
        path_of(folder, step).write_bytes(b"rubbish")
    with pytest.warns(UserWarning):
        assert latest(folder) is None


def test_newer_formats_are_an_error_that_says_so(folder):
    path_of(folder, 200).write_bytes(framed(b"the future", b"7"))
    with pytest.raises(ValueError, match="step-000000200.*format 7.*up to 1"):
        latest(folder)


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(target):
    "Pickles that would make the file `target`, in the shapes they come in."
    touch = f"touch {target}"
    objects = np.empty(1, dtype=object)
    objects[0] = Payload(os.system, touch)
    yield from (
        {"step": 1, "state": item}
        for item in [
            Payload(os.system, touch),
            [{"deep": Payload(os.system, touch)}],
            Payload(exec, f"open({str(target)!r}, 'w')"),
            Payload(eval, f"open({str(target)!r}, 'w')"),
            Payload(subprocess.call, ["touch", str(target)]),
            objects,
        ]
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_never_executed(folder, tmp_path, zipped):
    target = tmp_path / "executed"
    for content in hostile(target):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        for data in (
            framed(buffer.getvalue()),
            buffer.getvalue(),
            framed(pickle.dumps(content, 2)),
            pickle.dumps(content, 2),
        ):
            assert refused(folder, data)
            assert not target.exists()
    buffer.seek(0)
    torch.load(buffer, weights_only=False)  # the control: it does bite
    assert target.exists()


def test_only_plain_values_can_be_saved():
    for bad in (np.float64(1.0), np.zeros(2), {1, 2}, torch.nn.Linear(1, 1), lambda: 0):
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
            pack(0, {"a": [0, bad]})


def test_unpack_names_damage():
    with pytest.raises(Damaged, match="SHA-256"):
        unpack(pack(0, {})[:-1])


FULL_DISK = """
import os, resource, sys, torch, signal
from normflow_vi.engine.checkpoint import save
folder, limits = sys.argv[1], [int(x) for x in sys.argv[2:]]
for limit in limits:
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: save(folder, 200, {"weights": torch.ones(20_000)})
        except OSError as error: print(error, flush=True); os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3, limit
resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0], limits[0]))
save(folder, 200, {"weights": torch.ones(20_000)})    # not caught: what does the process say?
"""


@pytest.mark.parametrize("trials", [6, pytest.param(50, marks=pytest.mark.full)])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, trials):
    save(tmp_path, 100, state(100))
    limits = np.linspace(0, 80_000, trials).astype(int)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path, *map(str, limits)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": "/nonexistent"},
    )
    assert done.returncode == 1
    assert "step-000000200.ckpt" in done.stderr.splitlines()[-1]
    assert done.stdout.count("step-000000200.ckpt") == trials
    assert "bytes cannot be written" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["step-000000100.ckpt"]
    assert latest(tmp_path)[0] == 100
