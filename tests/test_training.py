"""The training engine: stopped anywhere it resumes to the same bits, says what went wrong, and trains as
torch does.
"""

import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from normflow_vi import Flow
from normflow_vi.engine import checkpoint
from normflow_vi.engine.checkpoint import Missing
from normflow_vi.engine.choosing import choose_engine
from normflow_vi.engine.errors import Interrupted, NonFinite
from normflow_vi.engine.optimizer import Optimizer, Updater, clip_gradients
from normflow_vi.engine.trainer import Trainer, fingerprint
from normflow_vi.transforms import Planar
from normflow_vi.utils import files

# A training in which every item of a checkpoint matters: a buffer that moves and enters the loss, noise,
# data without replacement, dropout from torch's global stream, an annealed loss, momentum, decay, a clip
# that bites, a schedule, and a best step before the end.


class Model(torch.nn.Module):
    def __init__(self, seed, dtype=torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=draw).to(dtype))
        self.bias = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        self.register_buffer("mean", torch.zeros(3, dtype=dtype))
        self.register_buffer("seed", torch.tensor(seed))


class Stream:
    "Endless epochs over 64 rows of 4, without replacement."

    def __init__(self, seed, size=16, dtype=torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.position = 0
        self.data = torch.randn(64, 4, generator=torch.Generator().manual_seed(7), dtype=dtype)
        self.shuffle()

    def shuffle(self):
        self.order = torch.randperm(64, generator=self.generator)

    def next(self):
        if self.position == 64:
            self.position = 0
            self.shuffle()
        self.position += self.size
        return self.data[self.order[self.position - self.size : self.position]]

    def state_dict(self):
        return {
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": self.position,
        }

    def load_state_dict(self, saved):
        self.generator.set_state(saved["generator"])
        self.order = saved["order"]
        self.position = saved["position"]


def quiet_loss(model, batch, step, generator):
    "Without noise: what is compared with plain loops."
    out = batch @ model.weight.T + model.bias
    fit = ((out - batch[:, :3].cos()) ** 2).mean()
    return SimpleNamespace(value=fit, terms={"size": (model.weight**2).mean()})


def loss(model, batch, step, generator):
    out = F.dropout(batch, 0.1) @ model.weight.T + model.bias
    with torch.no_grad():
        model.mean.mul_(0.9).add_(0.1 * out.mean(0))
    noise = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    fit = ((out - batch[:, :3].cos() + 0.3 * noise) ** 2).mean()
    pull = (model.mean * model.bias).sum() + (model.weight**2).mean()
    return SimpleNamespace(value=fit + min(1, step / 100) * pull, terms={"fit": fit, "pull": pull})


def validate(model, step):
    assert not torch.is_grad_enabled()
    assert not model.training
    return {
        "distance": (step - 80) ** 2 + float(model.weight.abs().mean()),
        "noise": float(torch.rand(())),
    }


ADAM = Optimizer("adam", 0.02, weight_decay=0.1, clip=1.0, warmup=20)
AVERAGED = Optimizer("adamax", 0.01, clip=1.0, average=0.95)
RMSPROP = Optimizer("rmsprop", 0.002, momentum=0.9, clip=1.0)


def make(runs=1, *, seeds=None, loss=loss, optimizer=ADAM, dtype=torch.float32, **options):
    seeds = seeds or list(range(runs))
    settings = {
        "steps": 200,
        "log_every": 20,
        "save_every": 50,
        "validate": validate,
        "validate_every": 40,
        "keep_best": "distance",
    } | options
    return Trainer(
        [Model(s, dtype) for s in seeds],
        loss,
        seeds=seeds,
        optimizer=optimizer,
        batches=[Stream(s + 100, dtype=dtype) for s in seeds],
        **settings,
    )


def finished(**options):
    trainer = make(**options)
    trainer.run()
    return trainer


# --------------------------------------------------------------------------------------------- kills
# Importing torch, and its first step, take longer than these trainings. So one process, the nursery, does
# that once and forks a child for each.


def cut_writes(n):
    "Let the n-th write of this process get half way, then kill it."

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    count = iter(range(1, 10**9))
    files.open = lambda path, mode="r": (
        Half(open(path, mode)) if mode == "wb" and next(count) == n else open(path, mode)
    )


def child(job):
    "One training; its fingerprint goes to `print`."
    torch.set_num_threads(1)
    if "write" in job:
        cut_writes(job["write"])
    trainer = make(
        job["runs"],
        folder=job["folder"],
        save_every=10,
        optimizer=Optimizer(**job["optimizer"]),
    )
    try:
        trainer.run()
    except Interrupted as stopped:
        assert str(stopped.path) in str(stopped)
        assert stopped.step == checkpoint.latest(job["folder"])[0]
        os._exit(128 + stopped.signum)
    Path(job["print"]).write_text(fingerprint(trainer))
    os._exit(0)


def nursery(jobs):
    """Run jobs one after the other, sending each its signal after so many seconds.

    The exit status and seconds of each.
    """
    for job in jobs:
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            try:
                child(job)
            finally:
                os._exit(1)
        if "after" in job:
            time.sleep(job["after"])
            os.kill(pid, job["signal"])
        yield {
            "status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]),
            "seconds": time.perf_counter() - start,
        }


class Nursery:
    def __enter__(self):
        code = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); "
            "import test_training as t; t.make(steps=2).run()\n"
            "for line in sys.stdin:\n"
            "    for done in t.nursery([json.loads(line)]): print(json.dumps(done), flush=True)"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __call__(self, folder, runs=1, optimizer=ADAM, **job):
        job = {
            "folder": str(folder),
            "print": f"{folder}.print",
            "runs": runs,
            "optimizer": vars(optimizer),
            **job,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()


def interrupted(train, folder, seconds, rng, number, status):
    """The folder of a training that a signal stopped, with this exit status.

    Where it came before the training or after, it is tried again.
    """
    for attempt in range(20):
        place = Path(f"{folder}.{attempt}")
        if train(place, signal=number, after=float(rng.uniform(0.1, 0.9)) * seconds).status == status:
            return place
    raise AssertionError("never stopped in time")


@pytest.mark.parametrize("kills, in_writes", [(3, 1), pytest.param(15, 5, marks=pytest.mark.full)])
def test_killed_trainings_end_with_the_same_bits(tmp_path, kills, in_writes):
    rng = np.random.default_rng(kills)
    with Nursery() as train:
        for runs, optimizer in [(1, ADAM), (2, RMSPROP)] if kills > 3 else [(1, ADAM)]:
            name = tmp_path / f"{runs}"
            seconds = train(f"{name}-whole", runs, optimizer).seconds
            whole = Path(f"{name}-whole.print").read_text()

            def start(folder, runs=runs, optimizer=optimizer, **job):
                return train(folder, runs, optimizer, **job)

            for k in range(kills):
                folder = interrupted(start, f"{name}-{k}", seconds, rng, signal.SIGKILL, -signal.SIGKILL)
                assert not Path(f"{folder}.print").exists()
                assert start(folder).status == 0
                assert Path(f"{folder}.print").read_text() == whole
            for k in range(in_writes):
                folder = Path(f"{name}-write-{k}")
                assert start(folder, write=int(rng.integers(2, 20))).status == -signal.SIGKILL
                assert list(folder.glob(".*.part"))  # the kill did leave half a file
                assert start(folder).status == 0
                assert Path(f"{folder}.print").read_text() == whole
                assert not list(folder.glob(".*.part"))


def test_signals_save_and_stop(tmp_path):
    rng = np.random.default_rng(0)
    with Nursery() as train:
        seconds = train(tmp_path / "whole").seconds
        for number in (signal.SIGINT, signal.SIGTERM):
            folder = interrupted(train, tmp_path / f"{number}", seconds, rng, number, 128 + number)
            assert train(folder).status == 0
            assert Path(f"{folder}.print").read_text() == (tmp_path / "whole.print").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_uncaught_signal_ends_the_process_with_an_error(tmp_path, number):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import test_training as t\n"
        "def loss(*a):\n    if a[2] == 33: os.kill(os.getpid(), int(sys.argv[3]))\n    return t.loss(*a)\n"
        "t.make(loss=loss, folder=sys.argv[2]).run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, Path(__file__).parent, tmp_path, str(int(number))],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"stopped by {number.name} after step 34" in done.stderr
    assert checkpoint.latest(tmp_path)[0] == 34
    assert fingerprint(finished(folder=tmp_path)) == fingerprint(finished())


def test_a_second_signal_stops_at_once(tmp_path):
    def impatient(*arguments):
        if arguments[2] == 33:
            [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
        return loss(*arguments)

    trainer = make(loss=impatient, folder=tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.run()
    assert not isinstance(stopped.value, Interrupted)
    assert trainer.step == 20
    assert signal.getsignal(signal.SIGINT) is before


def test_runs_outside_the_main_thread():
    trainer = make(steps=20)
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert trainer.step == 20


# ------------------------------------------------------------------------------------------ resuming


@pytest.fixture(
    scope="module",
    params=[(1, ADAM), (3, ADAM), (1, RMSPROP), (3, AVERAGED)],
    ids=["adam", "adam x 3", "rmsprop", "adamax, averaged, x 3"],
)
def half_way(request, tmp_path_factory):
    """Options of a training, the state at step 150, ten steps after a log point, and the fingerprint at the
    end.
    """
    options = {"runs": request.param[0], "optimizer": request.param[1]}
    folder = tmp_path_factory.mktemp("half")
    whole = finished(folder=folder, **options)
    return (
        options,
        checkpoint.unpack(checkpoint.path_of(folder, 150).read_bytes())[1],
        fingerprint(whole),
    )


def resumed(options, saved):
    trainer = make(**options)
    trainer.load_state(saved)
    trainer.run()
    return fingerprint(trainer)


# Files of commit 0629f25, whose trainer was one ladder of classes: the state at step 150 of trainings of
# `make`, and the fingerprint that each had at step 200, on a processor with AVX-512 and torch 2.13.0.
EARLIER = {
    "adam": (
        {"runs": 1},
        "7797bd0d433bfec4c231c9c88e32a7eb51242005a6bbb2d20d8e843d640398a2",
    ),
    "stacked": (
        {"runs": 2},
        "07c0bedbfd5007295cde556508cb83b932eb653b4f71fd72f8d4c550cf60713c",
    ),
    "rmsprop": (
        {"runs": 1, "optimizer": RMSPROP},
        "9b6af9fbba7f8992b2ae15eec8bb597dab2e4afee41142329f7d5b17763fce19",
    ),
}


@pytest.mark.parametrize("name", EARLIER)
def test_a_checkpoint_of_earlier_code_ends_with_the_same_bits(tmp_path, name):
    "Bits depend on the processor: where an uninterrupted training has others, the numbers are compared."
    options, fingerprint_then = EARLIER[name]
    file = Path(__file__).parent / "data/checkpoints" / f"{name}.ckpt"
    shutil.copy(file, checkpoint.path_of(tmp_path, 150))
    resumed = finished(folder=tmp_path, **options)
    whole = finished(**options)
    assert resumed.rows[0][0] == 20
    assert resumed.step == 200
    if fingerprint(whole) == fingerprint_then:
        assert fingerprint(resumed) == fingerprint_then
    for a, b in zip(leaves(resumed.state()), leaves(whole.state()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_restored_state_is_exactly_the_saved_one(half_way):
    options, saved, _ = half_way
    trainer = make(**options)
    trainer.load_state(saved)
    assert same(trainer.state(), saved)
    assert saved["window"]["loss"].shape[0] == 10


def same(a, b):
    "Whether two trees are equal to the bit, including types."
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return (
        len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, (list, tuple))
        else type(a) is type(b) and a == b
    )


def test_resuming_without_a_loss_of_bits(half_way):
    options, saved, whole = half_way
    assert resumed(options, saved) == whole


def items(tree, place=()):
    "The place of each item of a saved state, whole groups and single leaves."
    for key, item in tree.items():
        yield *place, key
        if isinstance(item, dict) and key not in ("config", "window"):
            yield from items(item, (*place, key))
        if key == "batches":
            yield from items(item[0], (*place, key, 0))


def without(tree, place, **instead):
    "A copy of a state in which one item is left out, or is another."
    tree = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(place) > 1:
        tree[place[0]] = without(tree[place[0]], place[1:], **instead)
    elif instead:
        tree[place[0]] = instead["value"]
    else:
        del tree[place[0]]
    return tree


def test_every_item_is_asked_for(half_way):
    options, saved, _ = half_way
    trainer = make(**options)
    before = fingerprint(trainer)
    for place in items(saved):
        with pytest.raises(Missing, match=str(place[-1]).replace("(", ".")):
            trainer.load_state(without(saved, place))
    assert fingerprint(trainer) == before
    assert trainer.step == 0  # and nothing was half loaded


def test_every_item_matters(half_way):
    "The control of the tests above: an item left as in a fresh training changes the result."
    options, saved, whole = half_way
    fresh = make(**options).state()
    idle = {"config", "threads", "seconds", "seed"}  # no number depends on these here
    if options["optimizer"].name == "rmsprop":
        idle |= {"weight: step", "bias: step"}  # RMSprop corrects no bias
    changed = {place for place in items(saved) if place[-1] not in idle}
    assert len(changed) >= 20
    for place in changed:
        value = fresh
        for key in place:
            value = value[key]
        assert resumed(options, without(saved, place, value=value)) != whole, place


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"steps": 300}, "steps=200.*schedule"),
        ({"seeds": [5]}, "seeds"),
        ({"optimizer": Optimizer("adam", 0.01)}, "optimizer"),
        ({"optimizer": RMSPROP}, "optimizer"),
        ({"log_every": 10}, "log_every"),
        ({"keep_best": None}, "keep_best"),
        ({"dtype": torch.float64}, "weight.*float64"),
    ],
)
def test_another_training_is_refused(tmp_path, options, complaint):
    finished(folder=tmp_path)
    trainer = make(folder=tmp_path, **options)
    before = fingerprint(trainer)
    with pytest.raises(ValueError, match=complaint):
        trainer.run()
    assert fingerprint(trainer) == before


def test_a_damaged_checkpoint_costs_one_interval(tmp_path):
    whole = fingerprint(finished(folder=tmp_path))
    newest = checkpoint.path_of(tmp_path, 200)
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=newest.name):
        trainer = finished(folder=tmp_path)
    assert fingerprint(trainer) == whole


def test_the_checkpoints_thread_count_is_taken_over(tmp_path):
    finished(folder=tmp_path, threads=2)
    trainer = make(folder=tmp_path, threads=1)
    with pytest.warns(UserWarning, match="2 thread"):
        trainer.run()
    assert trainer.threads == 2


def test_a_folder_belongs_to_one_training(tmp_path):
    refused = []

    def second(*_):
        try:
            make(folder=tmp_path).run()
        except files.Busy as error:
            refused.append(str(error))

    finished(folder=tmp_path, progress=second, steps=20)
    assert len(refused) == 1
    assert str(tmp_path) in refused[0]


# ----------------------------------------------------------------------------------- what goes wrong


def poisoned(kind, name, when, sick):
    "The loss, with a NaN of a kind at one step of one run."

    def poisoned_loss(model, batch, step, generator):
        found = quiet_loss(model, batch, step, generator)
        if step != when:
            return found
        ill = (model.seed == sick).to(batch.dtype)
        if kind == "loss":
            found.value = found.value + torch.where(ill > 0, math.inf, 0.0)
        if kind == "term":
            found.terms[name] = found.terms[name] + torch.where(ill > 0, math.nan, 0.0)
        p = dict(model.named_parameters()).get(name)
        if kind == "gradient":
            found.value = found.value + ((p * 0).sum() + 1 - ill).sqrt() - 1
        if kind == "overflow":
            found.value = (
                found.value + ill * 1e25 * (p - p.detach()).sum()
            )  # a finite slope, an infinite square
        return found

    return poisoned_loss


PLACES = [
    ("loss", "loss", "loss"),
    ("term", "size", "size"),
    ("gradient", "weight", "gradient of weight"),
    ("gradient", "bias", "gradient of bias"),
    ("overflow", "weight", "weight: exp_avg_sq"),
    ("overflow", "bias", "bias: exp_avg_sq"),
    ("batch", "batch", "batch"),
]


@pytest.mark.parametrize("trials", [21, pytest.param(105, marks=pytest.mark.full)])
def test_the_first_nonfinite_number_is_named(tmp_path, trials):
    rng = np.random.default_rng(trials)
    for k in range(trials):
        kind, name, place = PLACES[k % len(PLACES)]
        runs = [1, 3][k % 2]
        step = int(rng.integers(200))
        sick = int(rng.integers(runs))
        folder = tmp_path / f"{k}"
        trainer = make(
            seeds=[11, 12, 13][:runs],
            loss=poisoned(kind, name, step, 11 + sick),
            folder=folder,
            save_every=20,
            validate=None,
            keep_best=None,
            optimizer=Optimizer("adam", 0.01),
        )
        if kind == "batch":
            stream = trainer.batches[sick]
            stream.next = spoiled(stream, trainer, step)
        with pytest.raises(NonFinite) as error:
            trainer.run()
        assert (error.value.step, error.value.tensor, error.value.seed) == (
            step,
            place,
            11 + sick,
        ), (k, kind)
        assert error.value.remedy in str(error.value)
        saved = checkpoint.latest(folder)
        assert trainer.step == step // 20 * 20
        assert (saved[0] if saved else 0) == trainer.step
        assert all(
            torch.isfinite(t).all()
            for t in [*trainer.watched().values(), *(leaves(saved[1]) if saved else [])]
        )


def spoiled(stream, trainer, step):
    fresh = type(stream).next
    return lambda: fresh(stream) * (math.nan if trainer.step == step else 1.0)


def leaves(tree):
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)):
            yield from leaves(item)


def test_nonfinite_validation_is_named_too():
    with pytest.raises(NonFinite, match="step 40: validation F"):
        finished(runs=2, validate=lambda model, step: {"F": math.nan}, keep_best=None)


def test_constant_infinities_in_buffers_are_no_accident():
    trainer = make()
    trainer.models[0].register_buffer("mask", torch.tensor([0.0, -math.inf]))
    Trainer(trainer.models, loss, steps=20, optimizer=ADAM, seeds=[0], batches=[Stream(0)]).run()


@pytest.mark.parametrize("where", ["forward", "backward", "step"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_leaves_no_half_update(tmp_path, where, error):
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise error

    def tight(model, batch, step, generator):
        found = loss(model, batch, step, generator)
        if step == 70 and where == "forward":
            raise error
        if step == 70 and where == "backward":
            found.value = Full.apply(found.value)
        return found

    trainer = make(loss=tight, folder=tmp_path)
    if where == "step":
        step = trainer.update.torch_optimizer.step

        def half():
            if trainer.step == 70:
                trainer.models[0].weight.data.add_(1.0)
                raise error
            step()

        trainer.update.torch_optimizer.step = half
    with pytest.raises(MemoryError, match=r"batch \(16, 4\)"):
        trainer.run()
    assert trainer.step == 60
    again = make()
    again.load_state(trainer.state())
    again.run()
    assert fingerprint(again) == fingerprint(finished()) == fingerprint(finished(folder=tmp_path))


def test_other_errors_pass_and_roll_back():
    def broken(model, batch, step, generator):
        return loss(model, batch, step, generator) if step != 70 else 1 / 0

    trainer = make(loss=broken)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert trainer.step == 60


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.0},
        {"log_every": -1},
        {"threads": 0},
        {"validate_every": 0},
        {"save_every": True},
        {"seeds": [1, 2]},
        {"device": "cuda:17"},
        {"device": "tpu"},
        {"keep_best": "x", "validate": None},
        {"patience": 0},
        {"patience": 5, "keep_best": None},
    ],
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(
        (ValueError, RuntimeError),
        match=list(wrong)[0] if "device" not in wrong else "device",
    ):
        Trainer([Model(0)], loss, **{"seeds": [0], "steps": 10, "optimizer": ADAM} | wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "sgd"},
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"betas": (0.9, 1.0)},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"clip": 0.0},
        {"warmup": 1.5},
        {"schedule": "linear"},
    ],
)
def test_wrong_optimisers_are_named(wrong):
    with pytest.raises(ValueError, match=list(wrong)[0]):
        Optimizer(**{"learning_rate": 1e-3} | wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_an_error_and_auto_is_not():
    with pytest.raises(ValueError, match="cuda"):
        make(device="cuda")
    assert make(device="auto").device.type == "cpu"


def test_a_loss_of_the_wrong_shape_is_named():
    def many(model, batch, step, generator):
        return SimpleNamespace(value=(batch @ model.weight.T).mean(0), terms={})

    with pytest.raises(ValueError, match=r"\(3,\)"):
        make(loss=many).run()


# ----------------------------------------------------------------------------------------- isolation


def streams():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("runs", [1, 3])
def test_global_streams_neither_matter_nor_move(runs):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = streams()
        found.append(fingerprint(finished(runs=runs)))
        assert streams() == before
    assert found[0] == found[1]


def test_validation_does_not_disturb():
    def intruder(model, step):
        torch.rand(1000)
        torch.manual_seed(3)
        model.mean += 1
        model.train()
        return {"distance": 1.0}

    fields = [finished(runs=2, validate=v, keep_best=None).state() for v in (None, intruder)]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            *map(
                leaves,
                ({k: f[k] for k in ("parameters", "buffers", "optimizer")} for f in fields),
            ),
            strict=True,
        )
    )


# --------------------------------------------------------------------------------- what it trains to


def plain_loop(seed, make_torch, steps, schedule=lambda step: None, dtype=torch.float32, clip=None):
    model = Model(seed, dtype)
    stream = Stream(seed + 100, dtype=dtype)
    engine = make_torch([model.weight, model.bias])
    for step in range(steps):
        engine.zero_grad()
        quiet_loss(model, stream.next(), step, None).value.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([model.weight, model.bias], clip)
        for group in engine.param_groups:
            group["lr"] = schedule(step) or group["lr"]
        engine.step()
    return model


@pytest.mark.parametrize(
    "optimizer, make_torch",
    [
        (
            Optimizer("adam", 0.01, (0.8, 0.99), schedule="constant"),
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), fused=True),
        ),
        (
            Optimizer("rmsprop", 0.01, momentum=0.5, schedule="constant"),
            lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, foreach=True),
        ),
    ],
)
def test_one_run_is_torchs_own_loop_to_the_bit(optimizer, make_torch):
    trainer = finished(loss=quiet_loss, optimizer=optimizer)
    model = plain_loop(0, make_torch, 200)
    assert torch.equal(trainer.models[0].weight, model.weight)
    assert torch.equal(trainer.models[0].bias, model.bias)


def test_decay_schedule_and_clip_are_torchs():
    settings = Optimizer("adam", 0.01, weight_decay=0.3, clip=0.5, warmup=30)
    trainer = finished(loss=quiet_loss, optimizer=settings, dtype=torch.float64)

    def reference(parameters):  # decay on the matrix, none on the bias
        return torch.optim.AdamW(
            [
                {"params": parameters[:1], "weight_decay": 0.3},
                {"params": parameters[1:], "weight_decay": 0.0},
            ],
            foreach=False,
        )

    model = plain_loop(
        0,
        reference,
        200,
        lambda step: settings.rate_at(step, 200),
        torch.float64,
        clip=0.5,
    )
    torch.testing.assert_close(trainer.models[0].weight, model.weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(trainer.models[0].bias, model.bias, atol=1e-12, rtol=0)


@pytest.mark.parametrize("runs", [1, 3])
def test_parameters_that_are_not_the_models_get_no_gradients(runs):
    "And what is trained goes where it goes without them."
    outer = torch.nn.Parameter(torch.ones(3))
    kept = torch.tensor([1.0, 2.0, 3.0])
    outer.grad = kept.clone()

    def with_outer(model, batch, step, generator):
        estimate = quiet_loss(model, batch, step, generator)
        return SimpleNamespace(value=estimate.value + (outer * model.bias).sum(), terms={})

    def with_numbers(model, batch, step, generator):
        estimate = quiet_loss(model, batch, step, generator)
        return SimpleNamespace(value=estimate.value + (outer.detach() * model.bias).sum(), terms={})

    found, expected = (finished(runs=runs, loss=loss) for loss in (with_outer, with_numbers))
    assert torch.equal(outer.grad, kept)
    for one, other in zip(found.models, expected.models, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)


def test_no_decay_marks_are_obeyed():
    models = [Model(0), Model(0)]
    models[1].weight_decayed = ()
    models[1] = copy.deepcopy(models[1])  # the mark belongs to the module and survives copying
    sizes = []
    for model in models:
        Trainer(
            [model],
            quiet_loss,
            steps=100,
            seeds=[0],
            batches=[Stream(0)],
            optimizer=Optimizer("adam", 0.01, weight_decay=5.0),
        ).run()
        sizes.append(float(model.weight.detach().square().sum()))
    assert sizes[0] < 0.8 * sizes[1]


def test_the_gradients_of_stacked_runs_are_each_runs_own():
    trainer = make(3, loss=quiet_loss, dtype=torch.float64)
    batch = trainer.draw()
    value, _ = trainer.runs(batch, 0, None)
    value.sum().backward()
    for s in range(3):
        single = Model(s, torch.float64)
        quiet_loss(single, batch[s], 0, None).value.backward()
        for name, p in single.named_parameters():
            torch.testing.assert_close(trainer.runs.parameters()[name].grad[s], p.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("optimizer", [ADAM, RMSPROP, AVERAGED], ids=["adam", "rmsprop", "adamax"])
def test_stacked_runs_go_where_single_runs_go(optimizer):
    together = make(3, loss=quiet_loss, dtype=torch.float64, optimizer=optimizer)
    history = together.run()
    for s in range(3):
        single = make(seeds=[s], loss=quiet_loss, dtype=torch.float64, optimizer=optimizer)
        alone = single.run()
        torch.testing.assert_close(
            together.models[s].state_dict(),
            single.models[0].state_dict(),
            atol=1e-10,
            rtol=0,
        )
        np.testing.assert_allclose(history.values["loss"][:, s], alone.values["loss"][:, 0], atol=1e-10)
        assert history.best_step[s] == alone.best_step[0]


def test_adamax_is_that_of_its_paper():
    """Kingma and Ba 2015, algorithm 2, by hand: ten updates of one number."""
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    update = Updater(Optimizer("adamax", 0.1, schedule="constant"), {"p": p}, [], runs=1, steps=10)
    theta, m, u = 1.0, 0.0, 0.0
    for t in range(1, 11):
        g = 2 * theta * math.sin(t)
        m = 0.9 * m + 0.1 * g
        u = max(0.999 * u, abs(g) + 1e-8)
        theta -= 0.1 / (1 - 0.9**t) * m / u
        (p.square().sum() * math.sin(t)).backward()
        update(t - 1)
    assert p.item() == pytest.approx(theta, abs=1e-12)


def test_validation_and_the_best_are_of_the_average_and_training_goes_on_without_it():
    plain = make(optimizer=Optimizer("adamax", 0.01))
    averaged = make(optimizer=Optimizer("adamax", 0.01, average=0.9))
    curves = [trainer.run() for trainer in (plain, averaged)]
    np.testing.assert_array_equal(curves[0].values["loss"], curves[1].values["loss"])
    judged = [curve.valid["distance"] for curve in curves]
    assert (judged[0] != judged[1]).any()
    last = {name: t.clone() for name, t in averaged.models[0].named_parameters()}
    averaged.load_average()
    means = dict(averaged.models[0].named_parameters())
    assert all((last[name] != means[name]).any() for name in last)
    torch.testing.assert_close(last, dict(plain.models[0].named_parameters()), atol=0, rtol=0)
    with pytest.raises(ValueError, match="average=0.0"):
        plain.load_average()


@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_of_stacked_runs_move_as_those_of_single_runs(in_place):
    def moving(model, batch, step, generator):
        mean = 0.9 * model.mean + 0.1 * batch[:, :3].mean(0)
        if in_place:
            model.mean.copy_(mean)
        else:
            model.mean = mean
        return SimpleNamespace(value=((model.bias - model.mean) ** 2).sum(), terms={})

    together = finished(runs=3, loss=moving, dtype=torch.float64)
    for s in range(3):
        single = finished(seeds=[s], loss=moving, dtype=torch.float64)
        torch.testing.assert_close(
            together.models[s].state_dict(),
            single.models[0].state_dict(),
            atol=1e-10,
            rtol=0,
        )
        assert single.models[0].mean.abs().max() > 0


def test_stacked_runs_draw_their_own_noise():
    def noise(model, batch, step, generator):
        return SimpleNamespace(
            value=(model.bias**2).sum() + torch.randn((), generator=generator),
            terms={"dropout": F.dropout(torch.ones(50)).mean()},
        )

    values = finished(runs=3, loss=noise, log_every=1, steps=50).history().values
    assert all(len(set(row)) == 3 for row in values["loss"].tolist())
    assert abs(np.corrcoef(values["loss"].T)[0, 1]) < 0.6
    assert np.ptp(values["dropout"], axis=1).max() > 0


def test_clipping_is_per_run():
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4, 2), torch.randn(3, 5)]
    for g in gradients:
        g.mul_(torch.tensor([0.01, 1.0, 100.0]).view(3, *[1] * (g.ndim - 1)))
    expected = []
    for s in range(3):
        parameters = [torch.nn.Parameter(g[s].clone()) for g in gradients]
        for p in parameters:
            p.grad = p.detach().clone()
        torch.nn.utils.clip_grad_norm_(parameters, 0.7)
        expected.append([p.grad for p in parameters])
    clip_gradients(gradients, 0.7, 3)
    for s in range(3):
        torch.testing.assert_close([g[s] for g in gradients], expected[s])


def test_schedule_values():
    cosine = Optimizer(learning_rate=2.0, warmup=10)
    constant = Optimizer(learning_rate=2.0, warmup=10, schedule="constant")
    assert [cosine.rate_at(t, 110) for t in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert cosine.rate_at(60, 110) == pytest.approx(1.0)
    assert 0 < cosine.rate_at(109, 110) < 1e-3
    assert [constant.rate_at(t, 110) for t in (0, 9, 60, 109)] == [0.2, 2.0, 2.0, 2.0]
    assert Optimizer(learning_rate=2.0).rate_at(0, 10) == 2.0


def test_curves_are_means_between_log_points():
    def count(model, batch, step, generator):
        return SimpleNamespace(
            value=(model.bias * 0).sum() + step,
            terms={"twice": torch.tensor(2.0 * step)},
        )

    said = []
    history = finished(runs=2, loss=count, steps=50, progress=lambda *a: said.append(a)).history()
    assert history.steps.tolist() == [20, 40, 50]
    assert history.steps_valid.tolist() == [40, 50]
    assert history.values["loss"].tolist() == [[9.5] * 2, [29.5] * 2, [44.5] * 2]
    assert history.values["twice"][2].tolist() == [89.0] * 2
    assert [(step, steps, values["loss"]) for step, steps, _, values in said] == [
        (20, 50, 9.5),
        (40, 50, 29.5),
        (50, 50, 44.5),
    ]
    assert history.valid["distance"].shape == (2, 2)
    assert history.seconds > 0


def test_the_best_parameters_come_back(tmp_path):
    seen = {}

    def seeing(model, step):
        goal = 80 if model.seed == 0 else 160
        seen[int(model.seed), step] = model.weight.clone()
        return {"F": abs(step - goal)}

    trainer = make(2, validate=seeing, keep_best="F", folder=tmp_path)
    history = trainer.run()
    assert history.best_step.tolist() == [80, 160]
    assert history.best_value.tolist() == [0.0, 0.0]
    final = trainer.models[0].weight.clone()
    trainer.load_best()
    for s, best in enumerate((80, 160)):
        assert torch.equal(trainer.models[s].weight, seen[s, best])
    assert not torch.equal(final, trainer.models[0].weight)
    later = make(2, validate=seeing, keep_best="F", folder=tmp_path)
    later.run()
    later.load_best()
    assert torch.equal(later.models[0].weight, seen[0, 80])  # also from the checkpoint


def test_a_training_ends_when_nothing_better_has_been_found_for_long(tmp_path):
    """The best point is at step 80; what is kept, and a training that goes on later, are those of the end."""
    whole = finished(patience=40, folder=tmp_path)
    assert whole.step == 120 and whole.history().best_step.tolist() == [80]
    assert finished(patience=120).step == 200 and finished().step == 200
    again = make(patience=40, folder=tmp_path)  # the last checkpoint is that of step 100
    again.run()
    assert fingerprint(again) == fingerprint(whole)
    longer = finished()
    whole.load_best()
    longer.load_best()
    assert torch.equal(whole.models[0].weight, longer.models[0].weight)


def test_runs_of_one_program_wait_for_the_last_of_them():
    def validate(model, step):
        return {"distance": (step - 40 - 80 * int(model.seed)) ** 2}

    assert finished(runs=1, patience=40, validate=validate).step == 80
    assert finished(runs=2, patience=40, validate=validate).step == 160


def test_the_choice_of_engine_leaves_no_trace(tmp_path):
    before = streams()
    engine = choose_engine(lambda seeds: make(seeds=list(seeds), folder=tmp_path / "runs"), [1, 2, 3, 4], 2)
    assert engine.name == ("batched" if engine.batched > engine.processes else "processes")
    assert min(engine[1:]) > 0
    assert streams() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "others",
    [lambda: Planar(2, constraint="paper"), lambda: Planar(2, length=2)],
    ids=["option", "shape"],
)
def test_runs_that_train_together_differ_in_tensors_only(others):
    """An option that is no tensor (a constraint, a base) would silently be taken from the first model."""
    with pytest.raises(ValueError, match="differ"):
        Trainer(
            [Flow(Planar(2)), Flow(others())],
            lambda q, batch, step, generator: None,
            steps=1,
            seeds=[0, 1],
            optimizer=Optimizer(),
        )


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    def make(recipe):
        return Trainer(
            [Model(0)],
            quiet_loss,
            steps=4,
            seeds=[0],
            batches=[Stream(0)],
            optimizer=Optimizer("adam", 0.01),
            folder=tmp_path,
            recipe=recipe,
        )

    make("anneal over 10 steps").run()
    with pytest.raises(ValueError, match="recipe"):
        make("anneal over 1000 steps").run()
