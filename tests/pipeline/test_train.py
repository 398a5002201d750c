"""Stage two as a whole: same result from any format, residence and company; resume; results."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import extract_config, train_config
from safetensors.torch import load_file

from cache import NameMissing
from pipeline.config import Member, TrainConfig, cross
from pipeline.errors import BackboneError, DeviceError, MissingTaps, RunError, SettingError
from pipeline.extract import extract
from pipeline.features.operands import Batches
from pipeline.records import EpochDone, MemberStopped, PassStarted
from pipeline.runs.run import Run
from pipeline.side import METHODS
from pipeline.train import train
from pipeline.training.cohort import Cohort
from pipeline.training.history import History
from pipeline.training.learners import Learners
from pipeline.training.members import make_members
from pipeline.training.optim import MemberAdamW
from pipeline.training.passes import Pass
from pipeline.training.workers import Workers
from sidecache import evaluate, predict

LAST = Member(method="last", epochs=4, warmup_epochs=1, drop_path=0.2, settings={"rank": 4})
LINEAR = Member(method="linear", epochs=4, warmup_epochs=1, lr=1e-2)


def weights(run: Path, member: str = "m0") -> dict[str, torch.Tensor]:
    return load_file(run / "members" / member / "side_network.safetensors")


def assert_same(one: Path, other: Path, member: str = "m0") -> None:
    ours, theirs = weights(one, member), weights(other, member)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def losses(run: Path, member: str = "m0") -> list[float]:
    return [line["train_loss"] for line in Run(run).metrics() if line["member"] == member]


def test_it_learns_and_leaves_a_run_directory(cache: Path, tmp_path: Path) -> None:
    member = dataclasses.replace(LAST, epochs=30, lr=1e-2, drop_path=0.0)
    records: list[object] = []
    run = tmp_path / "run"
    result = train(train_config(cache, run, member), records.append)
    assert result.members[0].score == 1.0
    assert losses(run)[-1] < 0.2 * losses(run)[0]
    assert sum(isinstance(record, PassStarted) for record in records) == 1
    assert [r.epoch for r in records if isinstance(r, EpochDone)] == list(range(1, 31))
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    files -= {name for name in files if name.startswith("tensorboard/")}
    assert files == {
        "config.yaml", "environment.json", "metrics.jsonl", "summary.csv", "cost.json",
        "members/m0/side_network.safetensors", "members/m0/side_network.json",
    }  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["members"][0]["smoothing"] == 0.0, "defaults are written out"
    assert config["members"][0]["settings"]["heads"] == 1
    card = json.loads((run / "members/m0/side_network.json").read_text())
    assert (card["library_name"], card["format_version"]) == ("sidecache", 4)
    assert card["target"]["classes"] == ["blue", "green", "red"]
    assert card["settings"] == {"rank": 4, "gap": 1, "depth": 1, "heads": 1, "pool": "mean"}
    again = train(train_config(cache, run, member))
    assert again.epochs_trained == 0
    assert again.members == result.members


def test_zarr_and_hdf5_train_bitwise_alike(images: Path, tmp_path: Path) -> None:
    for amp in (False, True):
        runs = []
        for suffix in ("zarr", "h5"):
            extract(extract_config(images, tmp_path / f"c.{suffix}"))
            runs.append(tmp_path / f"{suffix}{amp}")
            train(train_config(tmp_path / f"c.{suffix}", runs[-1], LAST, amp=amp))
        assert_same(*runs)


def test_resident_and_streamed_features_train_bitwise_alike(
    zarr_cache: Path, tmp_path: Path
) -> None:
    for resident in ("ram", "disk"):
        train(train_config(zarr_cache, tmp_path / resident, LAST, LINEAR, resident=resident))
    assert_same(tmp_path / "ram", tmp_path / "disk")
    assert_same(tmp_path / "ram", tmp_path / "disk", "m1")


def test_a_member_among_others_is_the_member_alone(zarr_cache: Path, tmp_path: Path) -> None:
    """Drop-path on; other seeds, rates, shapes and methods beside it; the order is irrelevant."""
    others = [
        dataclasses.replace(LAST, lr=5e-3, seed=3, drop_path=0.5),
        dataclasses.replace(LAST, epochs=2, weight_decay=0.3),
        dataclasses.replace(LAST, settings={"rank": 2, "gap": 2}),
        LINEAR,
    ]
    train(train_config(zarr_cache, tmp_path / "alone", LAST))
    train(train_config(zarr_cache, tmp_path / "first", LAST, *others))
    train(train_config(zarr_cache, tmp_path / "last", *others, LAST))
    alone = losses(tmp_path / "alone")
    assert losses(tmp_path / "first") == pytest.approx(alone, rel=1e-5)
    assert losses(tmp_path / "last", "m4") == pytest.approx(alone, rel=1e-5)
    for run, member in (("first", "m0"), ("last", "m4")):
        ours = [m for m in Run(tmp_path / run).metrics() if m["member"] == member]
        theirs = Run(tmp_path / "alone").metrics()
        for name in ("val_loss", "val_top1"):
            assert [m[name] for m in ours] == pytest.approx([m[name] for m in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("last", {"rank": 4}),
        ("lst", {"reduction": 4}),
        ("miet", {"rank": 4, "modules": 2}),
        ("attentive", {}),
        ("linear", {}),
    ],
)
def test_together_equals_alone_over_many_steps(
    zarr_cache: Path, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    """54 steps beside 24 others of its own and of another method, drop-path on: the same losses.

    Weights are not compared: a key's bias changes nothing (softmax cancels it), so its gradient is
    rounding noise, which Adam makes as large as any other.
    """

    def member(number: int, chosen: str = method) -> Member:
        own = settings if chosen == method else {}
        return Member(method=chosen, epochs=18, warmup_epochs=2, settings=own, drop_path=0.2,
                      seed=number, lr=1e-3 * (1 + number % 3))  # fmt: skip

    mine = member(100)
    others = [member(i) for i in range(20)] + [member(i, "linear") for i in range(4)]
    train(train_config(zarr_cache, tmp_path / "alone", mine))
    train(train_config(zarr_cache, tmp_path / "among", *others[:9], mine, *others[9:]))
    alone = Run(tmp_path / "alone").metrics()
    among = [line for line in Run(tmp_path / "among").metrics() if line["member"] == "m9"]
    for name in ("train_loss", "val_loss"):
        assert [m[name] for m in among] == pytest.approx([m[name] for m in alone], rel=1e-4)


def test_a_member_with_nan_stops_alone(zarr_cache: Path, tmp_path: Path) -> None:
    wild = dataclasses.replace(LAST, lr=1e30, warmup_epochs=0)
    records: list[object] = []
    result = train(train_config(zarr_cache, tmp_path / "both", wild, LAST), records.append)
    stopped = [record for record in records if isinstance(record, MemberStopped)]
    assert [(record.id, record.pruned) for record in stopped] == [("m0", False)]
    assert result.members[0].stopped and "step" in result.members[0].stopped
    assert result.members[1].stopped is None
    train(train_config(zarr_cache, tmp_path / "alone", LAST))
    assert losses(tmp_path / "both", "m1") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_result(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.saver.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.training.saver.CHECKPOINT_SHARE", 1e9)
    train(train_config(zarr_cache, tmp_path / "whole", LAST, LINEAR))

    def stop(record: object) -> None:
        if isinstance(record, EpochDone) and record.epoch == 3:
            raise KeyboardInterrupt

    config = train_config(zarr_cache, tmp_path / "broken", LAST, LINEAR)
    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    with pytest.raises(RunError, match="not finished; the same `train` command continues it"):
        evaluate(tmp_path / "broken", device="cpu")
    assert train(config).epochs_trained == 1  # the epoch that was told of is not lost
    assert_same(tmp_path / "whole", tmp_path / "broken")
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("step", [1, 4, 6, 8])
def test_an_interrupt_loses_no_step(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Ctrl-C in the middle of an epoch (of three steps): steps done are kept, drop-path too."""
    other = dataclasses.replace(LAST, epochs=2, seed=3)
    train(train_config(zarr_cache, tmp_path / "whole", LAST, LINEAR, other))
    calls = itertools.count(1)

    def interrupting(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            results = real(*arguments)
            if next(calls) == step:
                raise KeyboardInterrupt
            return results

        return call

    config = train_config(zarr_cache, tmp_path / "broken", LAST, LINEAR, other)
    with monkeypatch.context() as patch:
        for name in ("queue", "each"):
            patch.setattr(Workers, name, interrupting(getattr(Workers, name)))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert (tmp_path / "broken" / "checkpoint.pt").exists()
    train(config)
    for member in ("m0", "m1", "m2"):
        assert_same(tmp_path / "whole", tmp_path / "broken", member)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("call", [4, 5, 6])
def test_an_interrupt_between_two_cohorts_loses_no_step(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Three cohorts one after the other, as on one core; in the second step, before one of them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    other = dataclasses.replace(LAST, epochs=2, seed=3, settings={"rank": 2})
    train(train_config(zarr_cache, tmp_path / "whole", LAST, LINEAR, other))
    real, calls = Cohort._backward, itertools.count(1)

    def interrupting(*arguments: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    config = train_config(zarr_cache, tmp_path / "broken", LAST, LINEAR, other)
    with monkeypatch.context() as patch:
        patch.setattr(Cohort, "_backward", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    state = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)
    steps = {member["optimiser"]["steps"] for member in state["members"].values()}
    assert steps == {1 if call == 4 else 2}
    train(config)
    for member in ("m0", "m1", "m2"):
        assert_same(tmp_path / "whole", tmp_path / "broken", member)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_amid_an_update_waits_for_its_end(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A real signal while parameters are neither old nor new; there is no checkpoint yet."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    train(train_config(zarr_cache, tmp_path / "whole", LAST, LINEAR))
    real, calls = MemberAdamW.step, itertools.count(1)

    def step(self: MemberAdamW, *arguments: Any) -> None:
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        real(self, *arguments)

    config = train_config(zarr_cache, tmp_path / "broken", LAST, LINEAR)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(MemberAdamW, "step", step)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    state = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)
    assert {m["optimiser"]["steps"] for m in state["members"].values()} == {2}
    train(config)
    for member in ("m0", "m1"):
        assert_same(tmp_path / "whole", tmp_path / "broken", member)


def test_an_interrupt_amid_submitting_waits_for_what_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A round that was never noted must not go on changing members while they are saved."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of the process: others use it
    go, ended = threading.Event(), []

    def job(item: int) -> None:
        go.wait(10)
        ended.append(item)

    with Workers(2, torch.device("cpu")) as workers:
        second = workers._threads[1]
        real, calls = second.submit, itertools.count()

        def submit(*arguments: Any) -> Any:
            if next(calls) == 0:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(second, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            workers.queue(job, [0, 1])
        threading.Timer(0.2, go.set).start()
        workers.finish()
        assert ended == [0]


def test_a_run_copied_without_its_environment_is_named(zarr_cache: Path, tmp_path: Path) -> None:
    train(train_config(zarr_cache, tmp_path / "run", LINEAR))
    (tmp_path / "run" / "environment.json").unlink()
    with pytest.raises(RunError, match=r"expected its environment\.json; copy the run as a whole"):
        Run(tmp_path / "run").load_member("m0", torch.device("cpu"))


ENDINGS = {  # what is done then, in order, and the call of it that ends the second epoch
    (Pass, "_validate"): 2,
    (History, "lines"): 2,
    (Learners, "diverged"): 2,
    (Pass, "_pruned"): 2,
    (Run, "append_metrics"): 2,
    (History, "end_epoch"): 2,
    (History, "epoch_done"): 2,
    (Run, "save_member"): 1,
    (Learners, "leave"): 3,  # the first is before the first epoch
    (Pass, "_retire"): 3,
}


@pytest.mark.parametrize("moment", ENDINGS, ids=lambda moment: moment[1])
def test_an_interrupt_at_the_end_of_an_epoch_loses_nothing(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple[type, str]
) -> None:
    """Ctrl-C between validation and the next epoch, one member being stopped and one ending."""
    members = (LAST, LINEAR, dataclasses.replace(LAST, epochs=2, seed=3))

    def judge(epoch: int, scores: Any) -> list[str]:
        return ["m1"] if epoch == 2 else []

    train(train_config(zarr_cache, tmp_path / "whole", *members), judge=judge)
    real, calls = getattr(*moment), itertools.count(1)

    def interrupting(*arguments: Any) -> Any:
        result = real(*arguments)
        if next(calls) == ENDINGS[moment]:
            raise KeyboardInterrupt
        return result

    config = train_config(zarr_cache, tmp_path / "broken", *members)
    with monkeypatch.context() as patch:
        patch.setattr(*moment, interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(config, judge=judge)
    result = train(config, judge=judge)
    assert result.epochs_trained <= 3  # of four: the first two epochs' steps are kept
    assert [member.stopped for member in result.members] == [None, "pruned after epoch 2", None]
    for member in ("m0", "m1", "m2"):
        assert_same(tmp_path / "whole", tmp_path / "broken", member)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("resident", ["ram", "disk"])
def test_a_member_that_has_ended_is_not_read_or_computed_for(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: str
) -> None:
    """LAST for two epochs, linear for four: the last two cost what linear alone costs."""
    costs: list[tuple[int, int]] = []
    real_make, real_epoch, made = Batches._make, Pass._train_epoch, [0]

    def make(self: Any, stored: Any) -> Any:
        out = real_make(self, stored)
        made[0] += sum(t.numel() * t.element_size() for o in out.values() for t in o.values())
        return out

    def epoch(self: Any, number: int) -> None:
        batches = self.learners.batches
        before = batches.bytes_read, made[0]
        real_epoch(self, number)
        costs.append((batches.bytes_read - before[0], made[0] - before[1]))

    monkeypatch.setattr(Batches, "_make", make)
    monkeypatch.setattr(Pass, "_train_epoch", epoch)
    short = dataclasses.replace(LAST, epochs=2)
    train(train_config(zarr_cache, tmp_path / "both", short, LINEAR, resident=resident))
    both = list(costs)
    costs.clear()
    train(train_config(zarr_cache, tmp_path / "alone", LINEAR, resident=resident))
    assert both[2:] == costs[2:]
    if resident == "disk":
        assert both[0][0] > costs[0][0] > 0 and both[0][1] > costs[0][1] > 0
    assert losses(tmp_path / "both", "m1") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)


@pytest.mark.parametrize(("before", "then"), [(2, 5), (5, 2)])
def test_a_run_goes_on_in_other_cohorts(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, then: int
) -> None:
    """As on a machine with another device, or another release of this program."""
    members = [dataclasses.replace(LAST, seed=seed) for seed in range(5)]
    train(train_config(zarr_cache, tmp_path / "whole", *members))

    def stop(record: object) -> None:
        if isinstance(record, EpochDone) and record.epoch == 2:
            raise KeyboardInterrupt

    config = train_config(zarr_cache, tmp_path / "moved", *members)
    monkeypatch.setattr(METHODS["last"], "together_on_cpu", before)
    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    monkeypatch.setattr(METHODS["last"], "together_on_cpu", then)
    assert train(config).epochs_trained == 2
    for member in ("m0", "m4"):
        ours, theirs = losses(tmp_path / "moved", member), losses(tmp_path / "whole", member)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_kill_9_then_the_same_training(zarr_cache: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time, pipeline.train as t\n"
        "from pipeline.training import saver\n"
        "from pipeline.config import TrainConfig\n"
        "from pipeline.records import EpochDone\n"
        "import json\n"
        "saver.CHECKPOINT_SECONDS, saver.CHECKPOINT_SHARE = 0.0, 1e9\n"
        "config = TrainConfig.from_dict(json.loads(sys.argv[1]))\n"
        "t.train(config, lambda r: time.sleep(0.1) if isinstance(r, EpochDone) else None)\n"
    )
    member = dataclasses.replace(LAST, epochs=12)
    config = train_config(zarr_cache, tmp_path / "killed", member)
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(config.to_dict())])
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and len(Run(tmp_path / "killed").metrics()) < 4:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < train(config).epochs_trained < 12
    train(train_config(zarr_cache, tmp_path / "whole", member))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_another_run_in_the_directory_is_refused(zarr_cache: Path, tmp_path: Path) -> None:
    config = train_config(zarr_cache, tmp_path / "run", LINEAR)
    train(config)
    with pytest.raises(RunError, match=r"batch_size: 5 there, 7 asked for"):
        train(dataclasses.replace(config, batch_size=7))
    train(dataclasses.replace(config, batch_size=7, overwrite=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(RunError, match="holds other files"):
        train(dataclasses.replace(config, out=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_evaluate_from_cache_equals_live(images: Path, tmp_path: Path) -> None:
    """Within the storage type's error; test is read from the images through the backbone."""
    torch.manual_seed(0)
    file = tmp_path / "weights.pth"
    import timm

    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), file)
    changes = {"pretrained": True, "weights": str(file), "dtype": "float16"}
    extract(extract_config(images, tmp_path / "c.zarr", **changes))
    member = dataclasses.replace(LAST, epochs=20, lr=1e-2)
    train(train_config(tmp_path / "c.zarr", tmp_path / "run", member))
    (cached,) = evaluate(tmp_path / "run", device="cpu", amp=False)
    (live,) = evaluate(
        tmp_path / "run", images=str(images), weights=file, workers=0, device="cpu", amp=False
    )
    assert (cached.n, live.n, cached.live, live.live) == (6, 6, False, True)
    assert live.scores == cached.scores
    assert live.loss == pytest.approx(cached.loss, rel=2e-3)
    record = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["live"] for line in record] == [False, True]

    found = predict(
        tmp_path / "run", [images / "test"], top_k=2, weights=file, device="cpu", amp=False
    )
    assert len(found) == 6 and all(len(p.classes) == 2 for p in found)
    right = sum(Path(p.path).parent.name == p.classes[0] for p in found)
    assert right / 6 == pytest.approx(live.scores["top1"])

    other = tmp_path / "other.pth"
    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), other)
    with pytest.raises(BackboneError, match="Give the same file with --weights"):
        predict(tmp_path / "run", [images / "test"], weights=other, device="cpu")


@pytest.mark.usefixtures("no_hub")
def test_predict_goes_on_after_a_bad_photograph(
    zarr_cache: Path, images: Path, tmp_path: Path
) -> None:
    train(train_config(zarr_cache, tmp_path / "run", LINEAR))
    bad = tmp_path / "photos" / "bad.jpg"
    bad.parent.mkdir()
    bad.write_bytes(b"not an image")
    good = images / "test" / "red" / "0.png"
    found = predict(tmp_path / "run", [bad.parent, good], device="cpu")
    assert [p.error is None for p in found] == [False, True]
    assert "bad.jpg" in str(found[0].error)
    assert sum(found[1].probabilities) == pytest.approx(1.0)


def test_the_best_member_is_chosen_on_validation(zarr_cache: Path, tmp_path: Path) -> None:
    slow = dataclasses.replace(LINEAR, lr=1e-6)
    good = dataclasses.replace(LINEAR, lr=1e-2, epochs=30)
    train(train_config(zarr_cache, tmp_path / "run", slow, good))
    assert Run(tmp_path / "run").best_member() == "m1"
    assert [e.member for e in evaluate(tmp_path / "run", device="cpu")] == ["m1"]
    both = evaluate(tmp_path / "run", members=["all"], device="cpu")
    assert [e.member for e in both] == ["m0", "m1"]
    assert both[0] == evaluate(tmp_path / "run", members=["m0"], device="cpu")[0]
    with pytest.raises(RunError, match="no member 'm7'; it has m0, m1"):
        evaluate(tmp_path / "run", members=["m7"], device="cpu")


def test_messages_of_bad_requests(images: Path, zarr_cache: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.zarr"
    extract(extract_config(images, few, taps="last:2"))
    out = tmp_path / "run"

    def config(cache: Path = zarr_cache, **changes: object) -> TrainConfig:
        return train_config(cache, out, **changes)  # type: ignore[arg-type]

    with pytest.raises(
        MissingTaps, match=r"needs the taps z0 … z6; z0 … z4 are lacking \(there are z5, z6\)"
    ):
        train(config(few))
    with pytest.raises(NameMissing, match="holdout"):
        train(config(val_split=("holdout",)))
    with pytest.raises(DeviceError, match="this machine has cpu"):
        train(config(device="cuda:9"))
    with pytest.raises(SettingError, match="resident = 'attic'"):
        config(resident="attic")
    with pytest.raises(SettingError, match="warmup_epochs = 9: expected"):
        Member(method="last", epochs=5, warmup_epochs=9)
    with pytest.raises(SettingError, match="val_split"):
        config(val_split=("train",))
    assert not out.exists(), "a refused request leaves nothing behind"


def test_lists_multiply_and_apply_where_they_fit() -> None:
    assert cross({"a": [1, 2], "b": [3, 4]})[1] == {"a": 1, "b": 4}
    members = make_members(["last", "linear"], {"rank": [4, 8], "seed": [0, 1], "lr": [0.1]})
    assert [m.method for m in members] == ["last"] * 4 + ["linear"] * 2
    assert [m.settings.get("rank") for m in members] == [4, 4, 8, 8, None, None]
    assert members[4].epochs == 100, "the rest comes from the method's recipe"
    with pytest.raises(SettingError, match="rank: no such setting in linear"):
        make_members(["linear"], {"rank": [4]})
    assert [m.method for m in make_members(["mist"], {})] == ["miet"]
    with pytest.raises(SettingError, match="method 'lasst': expected last, lst, miet"):
        make_members(["lasst"], {})


def test_a_warm_up_that_nobody_asked_for_fits_the_epochs() -> None:
    """As recipes have it in their own epochs; at most a fifth of others."""
    for epochs, last, linear in (
        (1, 0, 0), (2, 0, 0), (4, 0, 0), (5, 1, 1), (9, 1, 1), (10, 2, 2), (15, 3, 3), (25, 3, 5),
        (30, 3, 5), (100, 3, 5), (1000, 3, 5),
    ):  # fmt: skip
        members = make_members(["last", "linear"], {"epochs": [epochs]})
        assert [member.warmup_epochs for member in members] == [last, linear]
        assert Member(method="last", epochs=epochs).warmup_epochs == last
    both = make_members(["linear"], {"epochs": [1, 30]})
    assert [member.warmup_epochs for member in both] == [0, 5]
    assert all(0 <= m.warmup_epochs <= m.epochs / 5 for m in make_members(list(METHODS), {}))
    with pytest.raises(
        SettingError, match=r"warmup_epochs = 3: expected .* fewer than the 2 epochs"
    ):
        make_members(["last"], {"epochs": [2, 30], "warmup_epochs": [3]})
    with pytest.raises(SettingError, match="epochs = 0: expected 1 or more"):
        make_members(["last"], {"epochs": [0]})


def test_a_setting_that_decides_nothing_makes_no_member() -> None:
    members = make_members(["linear", "last"], {"drop_path": [0.1, 0.0]})
    assert [(m.method, m.drop_path) for m in members] == [
        ("linear", 0.0), ("last", 0.1), ("last", 0.0),
    ]  # fmt: skip
    merged = make_members(["linear"], {"last_n": [1, 2], "merge": ["mean", "concat"]})
    assert [(m.settings["last_n"], m.settings.get("merge")) for m in merged] == [
        (1, None), (2, "mean"), (2, "concat"),
    ]  # fmt: skip
    warm = make_members(["last"], {"warmup_epochs": [0, 1], "warmup_lr": [1e-5, 1e-7]})
    assert [(m.warmup_epochs, m.warmup_lr) for m in warm] == [(0, 1e-7), (1, 1e-5), (1, 1e-7)]


@pytest.mark.parametrize(
    ("methods", "axes", "message"),
    [
        (["linear"], {"drop_path": [0, 0.1]}, "drop_path = 0.1: decides nothing, as linear has no"),
        (["attentive", "linear"], {"drop_path": [0.2]}, "drop_path = 0.2: .*leave it out"),
        (["linear"], {"merge": ["mean"]}, "merge = mean: decides nothing, as last_n is 1"),
        (
            ["last"],
            {"epochs": [2], "warmup_lr": [1e-6]},
            "warmup_lr = 1e-06: .*there is no warm-up",
        ),
        (["last"], {"lr": [1e-3, 2e-3, 1e-3]}, "lr: expected every value once, came 0.001, 0.002"),
        (["miet", "mist"], {}, "method: expected every value once, came miet, miet"),
    ],
)
def test_a_setting_that_decides_nothing_at_all_is_refused(
    methods: list[str], axes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        make_members(methods, axes)


def test_a_setting_at_its_default_is_no_fault() -> None:
    """The report's command lines name every setting."""
    (member,) = make_members(["linear"], {})
    written = {name: [value] for name, value in member.all_settings.items() if name != "task"}
    assert make_members(["linear"], {**written, "last_n": [1], "merge": ["concat"]})[0].lr == 1e-2


def test_config_round_trip() -> None:
    config = train_config(Path("a.zarr"), Path("run"), LAST, LINEAR)
    plain = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert TrainConfig.from_dict(plain) == config
