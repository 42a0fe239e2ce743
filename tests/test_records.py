"""Records: what is written is what is read; what is damaged is refused; the best wins; verdicts
follow their definition.
"""

import io
import json
import os
import pickle
import random
import signal
import sys
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from normflow_vi.results.record import ARRAYS_LIMIT, DamagedRecord, Record, halved
from normflow_vi.results.run import Run
from normflow_vi.results.store import Store, note_failure, records_root
from normflow_vi.results.verdicts import VERDICTS, lower_is_better, measured, verdict
from normflow_vi.utils.files import sha256


def run(seed=0, profile="quick", **more):
    fields = dict(
        experiment="trial",
        recipe=1,
        model="DLGM",
        data="mnist-static",
        data_sha256="ab" * 32,
        flow="planar",
        length=10,
        seed=seed,
        profile=profile,
        budget={"updates": 100, "widths": [400, 400], "rate": 1e-3},
    )
    return Run(**(fields | more))


def record(F=90.0, **more):
    return Record(
        run(**more),
        {"F": {"value": F, "std_error": 0.2}},
        {"loss": np.arange(50.0), "image": np.zeros((4, 4), np.uint8)},
        {"device": "cpu"},
    )


def sign(folder, content):
    "Write `record.json` with a hash that is right."
    content.pop("sha256", None)
    stated = sha256(json.dumps(content, sort_keys=True).encode())
    (folder / "record.json").write_text(json.dumps(content | {"sha256": stated}))


def test_round_trip(tmp_path):
    before = record()
    after = Record.load(before.save(tmp_path))
    assert (after.run, after.values, after.info) == (before.run, before.values, before.info)
    for k, v in before.arrays.items():
        assert (after.arrays[k] == v).all()
        assert after.arrays[k].dtype == v.dtype
    assert Run.from_json(run().to_json()) == run()
    assert Run.from_json(run().to_json()).key == run().key


@pytest.mark.parametrize(
    "change",
    [
        dict(recipe=2),
        dict(model="x"),
        dict(data="digits"),
        dict(data_sha256="cd" * 32),
        dict(flow="nice"),
        dict(length=11),
        dict(seed=1),
        dict(profile="paper"),
        dict(experiment="other"),
        dict(budget={"updates": 101}),
    ],
)
def test_every_field_makes_another_run(change):
    assert run(**change).key != run().key
    assert (run(**change).shape == run().shape) == (list(change) == ["seed"])


WRONG = (
    [dict(seed=v) for v in (-1, 1.0, True, "0", None)]
    + [dict(length=v) for v in (-1, 2.5, "8")]
    + [dict(recipe=v) for v in (0, -1, "1")]
    + [dict(flow=v) for v in ("", "../x", "a b", "a/b", "-a", "x" * 65, 3)]
    + [dict(experiment=v) for v in ("", "..", "a/b")]
    + [dict(profile=v) for v in ("huge", "", None, 3)]
    + [dict(data_sha256=v) for v in ("xyz", "AB" * 32, None)]
    + [dict(budget={"rate": v}) for v in (float("nan"), float("inf"), b"x", [1, float("nan")], {"a": 1})]
    + [dict(model=v) for v in ("", "a\nb", "x" * 201, 3)]
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_bad_run_is_refused_by_name(wrong):
    with pytest.raises((ValueError, TypeError), match=list(wrong)[0]):
        run(**wrong)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"experiment": "a"}', '{"a": 1' + "0" * 10 + "}"])
def test_a_run_with_other_fields_is_refused(text):
    with pytest.raises(ValueError):
        Run.from_json(text)


@pytest.mark.parametrize(
    "values, arrays",
    [
        ({"F": float("nan")}, {}),
        ({"F": float("inf")}, {}),
        ({"F": {"value": 1.0, "std_error": -1.0}}, {}),
        ({"F": {"value": 1.0, "sd": 1.0}}, {}),
        ({}, {"a": np.array([{}])}),
        ({}, {"a": np.random.rand(300, 300)}),
    ],
)
def test_bad_content_is_refused(tmp_path, values, arrays):
    with pytest.raises(ValueError):
        Record(run(), values, arrays).save(tmp_path)
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.parametrize("name", ["record.json", "arrays.npz"])
def test_damage_is_refused_naming_the_file(tmp_path, name):
    """Flipped bits, truncations and zeroed blocks at 120 random places: never another content,
    always the file's name.
    """
    folder = record().save(tmp_path)
    good = (folder / name).read_bytes()
    chance = random.Random(0)
    silent = 0
    for trial in range(120):
        at = chance.randrange(len(good))
        bad = bytearray(good)
        if trial % 3 == 0:
            bad[at] ^= 1 << chance.randrange(8)
        elif trial % 3 == 1:
            bad = bad[:at]
        else:
            bad[at : at + 64] = bytes(len(bad[at : at + 64]))
        (folder / name).write_bytes(bad)
        try:
            again = Record.load(folder)  # only damage without meaning (a space in the JSON) may pass
            assert again.values == record().values
            assert again.run == run()
            assert (again.arrays["loss"] == np.arange(50.0)).all()
            silent += 1
        except DamagedRecord as error:
            assert name in str(error)
    assert silent <= 12


def weighted(**more):
    import torch

    weights = {
        "w": torch.arange(6.0).view(2, 3).half(),
        "b": torch.tensor([1, 2]),
        "shared": torch.zeros(4, 4).t(),
    }
    return Record(run(**more), {"F": 1.0}, {"loss": np.arange(5.0)}, weights=weights)


def test_weights_round_trip(tmp_path):
    """As they were given, in their own precision, through saving, loading and saving elsewhere;
    records without them have none on the disk.
    """
    import torch

    folder = weighted().save(tmp_path / "a")
    given = weighted().load_weights()
    again = Record.load(folder).save(tmp_path / "b")
    for found in (Record.load(folder), Record.load(again)):
        assert found.has_weights
        weights = found.load_weights()
        assert weights.keys() == given.keys()
        for name, value in weights.items():
            assert value.dtype == given[name].dtype
            assert torch.equal(value, given[name])
    plain = record(seed=1).save(tmp_path / "a")
    assert sorted(p.name for p in plain.iterdir()) == ["arrays.npz", "record.json"]
    assert "weights" not in (plain / "record.json").read_text()
    assert not Record.load(plain).has_weights
    with pytest.raises(ValueError, match="no weights"):
        Record.load(plain).load_weights()
    replaced = replace(Record.load(folder), info={"a": 1})
    assert replaced.load_weights().keys() == given.keys()
    pickled = pickle.loads(pickle.dumps(weighted()))
    assert pickled.load_weights().keys() == given.keys()


def test_record_on_disk_is_what_it_was(tmp_path):
    """The hash of a record without weights, as it was written before records could keep any."""
    text = json.loads((record().save(tmp_path) / "record.json").read_text())
    stated = text.pop("sha256")
    d = {
        "run": run().to_dict(),
        "values": record().values,
        "info": {"device": "cpu"},
        "arrays_sha256": text["arrays_sha256"],
    }
    assert stated == sha256(json.dumps(d, sort_keys=True).encode())


def test_damaged_weights_are_refused_when_asked_for(tmp_path):
    folder = weighted().save(tmp_path)
    path = folder / "weights.safetensors"
    good = path.read_bytes()
    for bad in (
        b"",
        good[:-1],
        good + b"x",
        good[:40] + b"\x00" + good[41:],
        good[:-3] + b"\x01" + good[-2:],
    ):
        path.write_bytes(bad)
        kept = Record.load(folder)  # lazily: values can be read without
        assert kept.value("F") == 1
        assert Store([tmp_path]).best("trial")[0].has_weights
        with pytest.raises(DamagedRecord, match=r"weights\.safetensors.*delete .*--retrain$"):
            kept.load_weights()
    path.unlink()
    with pytest.raises(DamagedRecord, match=r"weights\.safetensors is missing"):
        kept.load_weights()
    path.write_bytes(b"not a tensor")
    content = json.loads((folder / "record.json").read_text())
    sign(folder, content | {"weights_sha256": sha256(b"not a tensor")})
    with pytest.raises(DamagedRecord, match=r"weights\.safetensors"):
        Record.load(folder).load_weights()


@pytest.mark.parametrize("wrong", [float("nan"), "text", "large"])
def test_weights_that_cannot_be_kept(tmp_path, monkeypatch, wrong):
    import torch

    if wrong == "large":
        monkeypatch.setattr("normflow_vi.results.record.WEIGHTS_LIMIT", 1000)
    given = {"text": "text", "large": torch.zeros(300)}.get(wrong)
    if given is None:
        given = torch.tensor([wrong])
    with pytest.raises(ValueError, match="weights"):
        Record(run(), {}, weights={"w": given}).save(tmp_path)
    assert not list(tmp_path.rglob("record.json"))
    with pytest.raises(ValueError, match="half precision"):
        halved({"w": torch.tensor([1e5])})


def forged(folder, data, **more):
    """A record whose hashes are right and whose arrays are `data`."""
    content = json.loads((folder / "record.json").read_text())
    (folder / "arrays.npz").write_bytes(data)
    sign(folder, content | {"arrays_sha256": sha256(data)} | more)


def test_hostile_arrays_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    folder = record().save(tmp_path)
    pickled = io.BytesIO()
    bomb = io.BytesIO()
    np.savez(pickled, a=np.array([Payload()], dtype=object))
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.npy", bytes(200_000_000))
    assert len(bomb.getvalue()) < ARRAYS_LIMIT
    for data in (pickled.getvalue(), bomb.getvalue(), b"<html>not found</html>"):
        forged(folder, data)
        start = time.monotonic()
        with pytest.raises(DamagedRecord, match="arrays.npz"):
            Record.load(folder)
        assert time.monotonic() - start < 2
    assert not (tmp_path / "executed").exists()


def test_a_record_under_another_runs_name_is_refused(tmp_path):
    folder = record().save(tmp_path)
    folder.rename(folder.with_name(run(seed=1).slug))
    with pytest.raises(DamagedRecord, match="record.json"):
        Store([tmp_path]).find(run(seed=1))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a folder is replaced by two renames")
def test_killed_while_saving(tmp_path):
    """30 processes are killed while they replace a record: it is there, whole, every time."""
    start = time.monotonic()
    record(0.0).save(tmp_path)
    took = max(0.025, time.monotonic() - start)  # longer where the machine is busy
    chance = random.Random(1)
    values = set()
    rename = os.rename

    def rename_slowly(old, new):
        time.sleep(0.02)
        rename(old, new)

    for trial in range(30):
        child = os.fork()
        if child == 0:
            os.rename = rename_slowly  # a gap between two renames would be hit
            try:
                while True:
                    record(float(trial)).save(tmp_path)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.5, 5) * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values.add(Store([tmp_path]).find(run()).value("F"))
        assert len(Store([tmp_path]).best("trial")) == 1
    assert len(values) > 5  # records were really being replaced


def test_best_record_wins(tmp_path):
    store = Store([tmp_path / "a", tmp_path / "b"])
    assert store.best("trial") == []
    assert store.find(run()) is None

    def best(**match):
        return [(r.run.profile, r.run.seed) for r in store.best("trial", **match)]

    for seed in (0, 1, 2):
        record(seed=seed, profile="smoke").save(tmp_path / "b")
    assert best() == [("smoke", 0), ("smoke", 1), ("smoke", 2)]
    for seed in (1, 0):
        record(seed=seed, profile="quick").save(tmp_path / "a")
    assert best() == [("quick", 0), ("quick", 1)]
    record(seed=7, profile="paper").save(tmp_path / "a")
    assert best() == [("paper", 7)]
    assert best(profile="quick") == [("quick", 0), ("quick", 1)]
    record(seed=8, profile="paper", budget={"updates": 50}).save(tmp_path / "a")
    assert best() == [("paper", 7)]  # budgets are not mixed; more updates win
    for seed in (0, 1):
        record(seed=seed, profile="paper", data="digits-static").save(tmp_path / "a")
    assert best() == [("paper", 7)]
    assert best(data="digits-static") == [("paper", 0), ("paper", 1)]
    record(seed=3, profile="smoke", recipe=2).save(tmp_path / "b")
    assert best() == [("smoke", 3)]  # an older recipe describes another experiment
    assert best(length=80) == []
    assert best(updates=50) == [("paper", 8)]


def test_smoke_records_are_seen_only_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMFLOW_VI_ROOT", str(tmp_path))
    (tmp_path / "settings.ini").write_text("")
    assert Store().roots == [tmp_path / "results"]
    record(profile="smoke").save(records_root("smoke"))
    assert Store().best("trial") == []
    assert Store().find(run(profile="smoke")) is None
    assert len(Store([records_root("smoke")]).best("trial")) == 1


@pytest.mark.parametrize("newer", [0, 1])
def test_the_newest_of_equal_groups_wins(tmp_path, newer):
    """Two budgets that differ in the learning rate: when they were finished decides, whatever their
    hashes are.
    """
    for i, rate in enumerate((1e-3, 2e-3)):
        made = record(float(i), budget={"updates": 100, "rate": rate})
        for seed, day in ((0, 1), (1, 3 if i == newer else 2)):
            Record(
                Run(**(made.run.to_dict() | {"seed": seed})),
                made.values,
                {},
                {"finished": f"2026-01-0{day}T00:00:00+00:00"},
            ).save(tmp_path)
    assert [r.value("F") for r in Store([tmp_path]).best("trial")] == [newer, newer]


def test_best_over_needs_every_value(tmp_path):
    store = Store([tmp_path])

    def best(values, **match):
        return [
            (r.run.profile, r.run.length, r.run.seed)
            for r in store.best_over("trial", "length", values, **match)
        ]

    assert best((0, 10)) == []
    for length in (0, 10, 20):
        record(length=length).save(tmp_path)
    record(length=0, profile="paper").save(tmp_path)
    quick = [("quick", 0, 0), ("quick", 10, 0), ("quick", 20, 0)]
    assert best((0, 10)) == quick
    assert best(()) == best([0]) == [("paper", 0, 0)]
    assert best((0, 80)) == best((0,), profile="smoke") == []
    record(length=10, profile="paper", budget={"updates": 99}).save(tmp_path)
    assert best((0, 10)) == quick  # two paper groups do not make a complete one
    record(length=10, profile="paper").save(tmp_path)
    assert best((0, 10)) == [("paper", 0, 0), ("paper", 10, 0)]
    assert best((0, 10), profile="quick") == quick
    with pytest.raises(ValueError, match="lenght.*length"):
        store.best_over("trial", "lenght", (0,))


def test_damaged_record_is_not_passed_over(tmp_path):
    folder = record().save(tmp_path)
    (folder / "record.json").write_text("{")
    with pytest.raises(DamagedRecord, match="delete .*merge .*--retrain$"):
        Store([tmp_path]).best("trial")
    with pytest.raises(DamagedRecord):
        Store([tmp_path]).find(run())


@pytest.mark.parametrize("name", ["record.json", "arrays.npz"])
def test_a_store_can_list_what_is_damaged(tmp_path, name):
    """Asked to, a store leaves out a damaged record only, and says once which one it is."""
    for seed in (0, 1):
        record(seed=seed).save(tmp_path)
    folder = record(seed=2, profile="paper").save(tmp_path)
    damaged = []
    (folder / name).write_bytes(b"")
    store = Store([tmp_path], damaged)
    assert (
        [r.run.seed for r in store.best("trial")]
        == [r.run.seed for r in store.all("trial")]
        == [
            0,
            1,
        ]
    )
    assert store.find(run(seed=2, profile="paper")) is None
    assert len(damaged) == 1
    assert name in damaged[0]


def test_measured(tmp_path):
    store = Store([tmp_path])
    row = dict(source="a paper", item="Table 1", row="a model")
    assert measured(store, [], "F", **row) is None
    for seed, F in enumerate((90.0, 92.0, 94.0)):
        record(F, seed=seed).save(tmp_path)
    note_failure(tmp_path, run(seed=3), "not finite")
    note_failure(tmp_path, run(seed=3, length=20), "not finite")
    m = measured(store, store.best("trial"), "F", shortened=False, **row)
    assert (m.value, m.seeds, m.failed, m.updates, m.profile, m.device, m.state) == (
        92,
        (0, 1, 2),
        1,
        100,
        "quick",
        "cpu",
        "measured",
    )
    assert len(m.records) == 3
    assert m.records[0][0] == run(seed=0)
    assert m.se == pytest.approx(2 / 3**0.5)
    assert (
        measured(store, store.best("trial", seed=0), "F", **row).se == 0.2
    )  # one seed: the evaluation's own error
    with pytest.raises(ValueError, match="shapes"):
        measured(store, [record(), record(length=20)], "F", **row)


NLL, LOGP, BITS = "-ln p(x) (nats)", "log p(x) (nats)", "bits/dim"
TABLE = [
    # metric, published, its error, ours, our error, more, verdict
    (NLL, 87.5, 0.3, 88.2, 0.2, {}, "reproduced"),
    (NLL, 87.5, 0.3, 88.3, 0.2, {}, "worse"),
    (NLL, 87.5, 0.3, 86.7, 0.2, {}, "better"),
    (NLL, 87.5, None, 88.0, 0.01, {}, "reproduced"),
    (NLL, 87.5, None, 88.01, 9.0, {}, "worse"),
    (NLL, 87.5, None, 86.99, 9.0, {}, "better"),
    (LOGP, -81.1, 0.1, -80.0, 0.1, {}, "better"),
    (LOGP, -81.1, 0.1, -82.0, 0.1, {}, "worse"),
    (LOGP, -81.1, 0.1, -81.2, None, {}, "reproduced"),
    ("VLB (nats)", -84.1, 0.1, -83, 0.1, {}, "better"),
    ("ELBO (nats)", -85.6, 0.5, -87, 0.1, {}, "worse"),
    ("negative ELBO (nats)", 86.5, 0.1, 85, 0.1, {}, "better"),
    ("KL(q||p(z|x)) (nats)", 6.84, 0.33, 5.0, 0.1, {}, "better"),
    ("F(x) = -ELBO (nats)", 96.8, None, 97.5, 0.1, {}, "worse"),
    (BITS, 3.11, None, 3.114, 0.001, {}, "reproduced"),
    (BITS, 3.11, None, 3.12, 0.001, {}, "worse"),
    (BITS, 3.11, None, 3.10, 0.006, {}, "reproduced"),
    (NLL, 87.5, 0.3, 80.0, 0.2, dict(shortened=True), "shortened"),
    (NLL, 87.5, 0.3, 87.5, 0.2, dict(shortened=True, confirmed=False), "shortened"),
    (NLL, 87.5, 0.3, 80.0, 0.2, dict(confirmed=False), "unconfirmed source"),
    (NLL, None, None, 80.0, 0.2, {}, "no published number"),
    (NLL, 87.5, 0.3, 87.5, 0.2, dict(comparable=False), "not comparable"),
    (NLL, 87.5, 0.3, 87.5, 0.2, dict(comparable=False, shortened=True), "not comparable"),
    (NLL, 87.5, 0.3, None, None, {}, "published only"),
    (NLL, 87.5, 0.3, None, None, dict(affordable=False), "out of budget"),
]


@pytest.mark.parametrize("metric, published, published_se, ours, se, more, expected", TABLE)
def test_verdict(metric, published, published_se, ours, se, more, expected):
    assert verdict(metric, published, published_se, ours, se, **more) == expected


def test_verdicts_are_complete():
    assert {row[-1] for row in TABLE} == set(VERDICTS)


def test_every_published_metric_has_a_direction():
    from normflow_vi.reproduce.status import published

    metrics = {n["metric"] for n in published() if n["value"] is not None}
    assert len(metrics) > 20
    assert all(lower_is_better(m) in (True, False) for m in metrics)
    higher = {m for m in metrics if not lower_is_better(m)}
    assert higher == {m for m in metrics if m.startswith(("log p", "VLB", "ELBO", "marginal"))}
    with pytest.raises(ValueError, match="happiness"):
        lower_is_better("happiness")
