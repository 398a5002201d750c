"""A run's folder: what is deleted, who may write, what a crash leaves, where its cache is found."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import train_config

import cli
from pipeline.config import LabelConfig, Member, SweepConfig, TrainConfig
from pipeline.errors import RunError
from pipeline.label import label
from pipeline.records import EpochDone, RoundStarted
from pipeline.runs import folder
from pipeline.runs import run as run_module
from pipeline.runs.folder import append_text, hold, other_names, replace_text, sweep_litter
from pipeline.runs.run import Run
from pipeline.sweep import sweep
from pipeline.train import refit, train
from pipeline.training import saver
from sidecache import evaluate, predict, report

LINEAR = Member(method="linear", epochs=3, warmup_epochs=0)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sweep_config(cache: Path, out: Path, **changes: Any) -> SweepConfig:
    file = out.parent / f"{out.name}-space.yaml"
    file.write_text(yaml.safe_dump({"method": "linear", "epochs": 2, "warmup_epochs": 0,
                                    "seed": [0, 1]}))  # fmt: skip
    values = {"device": "cpu", "amp": False, "sampler": "grid", "at_once": 1, **changes}
    return SweepConfig(cache=str(cache), space=str(file), out=str(out), **values)


def stop_after(epoch: int) -> Callable[[object], None]:
    def report(record: object) -> None:
        if isinstance(record, EpochDone) and record.epoch == epoch:
            raise KeyboardInterrupt

    return report


def interrupted(config: TrainConfig, epoch: int = 1) -> Run:
    """A run stopped after an epoch, with a checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        train(config, stop_after(epoch))
    run = Run(config.out)
    assert (run.path / "checkpoint.pt").exists()
    return run


# --- what is deleted --------------------------------------------------------------------------

PROJECTS = {
    "config": {"config.yaml": "defaults: [model, data]\n"},
    "a list": {"config.yaml": "- 1\n"},
    "no YAML": {"config.yaml": "a: [\n"},
    "bytes": {"config.yaml": b"\xff\xfe\x00"},
    "both names": {"config.yaml": "members: 3\n", "environment.json": '{"conda": "base"}'},
    "environment alone": {"environment.json": '{"fingerprint": "of mine"}'},
    "a sweep of another tool": {"sweep.yaml": "program: train.py\nmethod: bayes\n"},
    "finished": {"config.yaml": "lr: 1\n", "summary.csv": "id\n", "members/notes.txt": "precious"},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("project", PROJECTS)
def test_a_folder_of_another_program_is_never_touched(
    zarr_cache: Path, tmp_path: Path, project: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any name that we use too, from within it and from outside, by `train` and by `sweep`."""
    mine = tmp_path / "project"
    for name, text in {**PROJECTS[project], "src/model.py": "years of work"}.items():
        path = mine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files(mine)
    monkeypatch.chdir(mine)
    for out in (Path(), mine):
        with pytest.raises(RunError, match="holds other files"):
            train(train_config(zarr_cache, out, LINEAR, overwrite=overwrite))
        config = sweep_config(zarr_cache, tmp_path / "run", overwrite=overwrite)
        with pytest.raises(RunError, match="holds other files"):
            sweep(dataclasses.replace(config, out=str(out)))
    assert files(mine) == before
    with pytest.raises(RunError, match="expected a run directory made by `train`"):
        evaluate(mine, device="cpu")


OTHERS = {
    "notes.txt": "mine", "src/model.py": "mine", "members/notes.txt": "mine",
    "members/m0/notes.txt": "mine", "members/m0-kept/side_network.json": "mine",
    "members/mine/adapter_model.safetensors": "of peft",
    "members/mine/side_network.safetensors": "mine",
    "refit-of-mine/config.yaml": "mine", "tensorboard/other/events.out.tfevents.1": "mine",
    "sweep.yaml": "program: train.py\n", "study.db": "mine",
}  # fmt: skip


def test_overwrite_deletes_all_of_a_run_and_nothing_else(zarr_cache: Path, tmp_path: Path) -> None:
    """Beside refit, evaluations, page and events, which are a run's; twice the members before."""
    out = tmp_path / "run"
    seeds = [dataclasses.replace(LINEAR, seed=seed) for seed in (0, 1)]
    train(train_config(zarr_cache, out, *seeds))
    refit(out, [3])
    evaluate(out, device="cpu")
    report([out], device="cpu")
    assert {"report.html", "evaluations.jsonl", "refit"} <= {path.name for path in out.iterdir()}
    fresh = train_config(zarr_cache, tmp_path / "fresh", LINEAR)
    train(fresh)
    for name, text in OTHERS.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    train(train_config(zarr_cache, out, LINEAR, overwrite=True))
    left = files(out)
    assert {name: left.pop(name).decode() for name in OTHERS} == OTHERS
    events = {name for name in left if "tfevents" in name}
    assert len(events) <= 1
    expected = {name for name in files(tmp_path / "fresh") if "tfevents" not in name}
    assert left.keys() - events == expected


def test_a_page_that_is_not_ours_stays(zarr_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(train_config(zarr_cache, out, LINEAR))
    (out / "report.html").write_text("<title>pytest</title>")
    train(train_config(zarr_cache, out, LINEAR, overwrite=True))
    assert (out / "report.html").read_text() == "<title>pytest</title>"


def test_train_and_sweep_overwrite_each_other(zarr_cache: Path, tmp_path: Path) -> None:
    """Also a sweep that was stopped in its first round, which has no members yet."""
    out = tmp_path / "run"
    config = sweep_config(zarr_cache, out)
    sweep(config)
    train(train_config(zarr_cache, out, LINEAR, overwrite=True))
    assert not {"sweep.yaml", "study.db"} & {path.name for path in out.iterdir()}
    again = sweep(dataclasses.replace(config, overwrite=True))
    assert (again.trained, len(Run(out).summary())) == (2, 2)
    assert not Run(out).path.joinpath("checkpoint.pt").exists()

    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        sweep(stopped, stop_after(1))
    assert (tmp_path / "stopped" / "round" / "checkpoint.pt").exists()
    (tmp_path / "stopped" / "round" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"round: .* holds other files \(notes.txt\)"):
        sweep(dataclasses.replace(stopped, overwrite=True))
    assert (tmp_path / "stopped" / "round" / "notes.txt").exists()
    (tmp_path / "stopped" / "round" / "notes.txt").unlink()
    assert sweep(stopped).trained == 2


def test_a_killed_beginning_is_begun_again(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, between and after the two documents; of a fresh folder or an overwritten."""
    real = run_module.replace_text
    for overwritten in (False, True):
        for killed_at in range(5):
            out = tmp_path / f"run{killed_at}{overwritten}"
            config = train_config(zarr_cache, out, LINEAR, overwrite=overwritten)
            if overwritten:
                train(dataclasses.replace(config, batch_size=4))
                (out / "notes.txt").write_text("mine")
            steps = 0

            def killed(path: Path, text: str, at: int = killed_at) -> None:
                nonlocal steps
                if steps == at:
                    litter = path.with_name(f".{path.name}.{'0' * 32}.partial")
                    litter.write_text(text[:10])
                    raise KeyboardInterrupt
                steps += 1
                real(path, text)

            with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr(run_module, "replace_text", killed)
                train(config)
            assert train(config).members
            assert Run(out).config().batch_size == config.batch_size
            assert (out / "notes.txt").exists() == overwritten


def test_a_place_where_no_folder_can_be_is_named(zarr_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="Choose another --out"):
            train(train_config(zarr_cache, out, LINEAR, overwrite=True))
    assert (tmp_path / "file").read_text() == "mine"


# --- who may write ----------------------------------------------------------------------------


def test_a_run_is_written_by_one_process(zarr_cache: Path, tmp_path: Path) -> None:
    """By `train`, `refit` and `sweep`, whole; others may read it. The lock ends with its holder."""
    out = tmp_path / "run"
    config = train_config(zarr_cache, out, LINEAR)
    refused: list[str] = []

    def meanwhile(what: Callable[[], object]) -> Callable[[object], None]:
        def report(record: object) -> None:
            with pytest.raises(RunError, match="is being written by another process: wait") as e:
                what()
            refused.append(str(e.value).split(" is being")[0])

        return report

    train(config, meanwhile(lambda: train(config)))
    train(dataclasses.replace(config, overwrite=True), meanwhile(lambda: train(config)))
    again = dataclasses.replace(config, overwrite=True)
    refit(out, [3], meanwhile(lambda: train(again)))
    refit(out, [4], meanwhile(lambda: refit(out, [4])), overwrite=True)
    assert set(refused) == {str(out)}
    refused.clear()
    swept = sweep_config(zarr_cache, tmp_path / "swept")
    sweep(swept, meanwhile(lambda: sweep(swept)))
    assert set(refused) == {swept.out}
    assert evaluate(out, device="cpu") and train(config).epochs_trained == 0


def test_trainings_at_once_leave_one_run(zarr_cache: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys, time, pipeline.train as t\n"
        "from pipeline.training import saver\n"
        "from pipeline.config import TrainConfig\n"
        "from pipeline.records import EpochDone\n"
        "saver.CHECKPOINT_SECONDS, saver.CHECKPOINT_SHARE = 0.0, 1e9\n"
        "config = TrainConfig.from_dict(json.loads(sys.argv[1]))\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "t.train(config, lambda r: time.sleep(0.1) if isinstance(r, EpochDone) else None)\n"
    )
    config = train_config(zarr_cache, tmp_path / "run", dataclasses.replace(LINEAR, epochs=20))
    begin = str(time.time() + 8)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(config.to_dict()), begin],
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1]
    assert sum("RunError" in text and "is being written" in text for text in said) == 2
    epochs = [line["epoch"] for line in Run(config.out).metrics()]
    assert epochs == list(range(1, 21))


def test_a_file_system_without_locks_trains(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    config = train_config(zarr_cache, tmp_path / "run", LINEAR)
    interrupted(config)
    assert train(config).epochs_trained == 2
    assert sweep(sweep_config(zarr_cache, tmp_path / "swept")).done == 2


# --- what a crash leaves ----------------------------------------------------------------------


def test_files_reach_the_disk_before_what_vouches_for_them(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file before its name, the name before what follows; members before a checkpoint without
    them and before the summary. The run's folder has two new ones above it."""
    out = tmp_path / "new" / "above" / "run"
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def note(what: str, path: str | Path) -> None:
        name = Path(path).relative_to(tmp_path).as_posix()
        if name.endswith(".partial"):  # .NAME.<random>.partial
            above, _, name = name.rpartition("/")
            name = f"{above}/{name[1:].rsplit('.', 2)[0]}"
        calls.append((what, name))

    def noting_fsync(fd: int) -> None:
        note("sync", Path(f"/proc/self/fd/{fd}").readlink())
        fsync(fd)

    def noting_replace(self: Path, target: Path) -> Path:
        note("name", target)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    monkeypatch.setattr(saver, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(saver, "CHECKPOINT_SHARE", 1e9)
    short = dataclasses.replace(LINEAR, epochs=1)
    train(train_config(zarr_cache, out, LINEAR, short))
    run = "new/above/run"
    assert calls[:3] == [("sync", "new/above"), ("sync", "new"), ("sync", ".")]
    named = [i for i, (what, _) in enumerate(calls) if what == "name"]
    for i in named:
        name = calls[i][1]
        assert calls[i - 1] == ("sync", name)
        assert calls[i + 1] == ("sync", str(Path(name).parent))
    names = [calls[i][1].removeprefix(f"{run}/") for i in named]
    assert names[:3] == ["environment.json", "config.yaml", "metrics.jsonl"]
    assert names[-2:] == ["cost.json", "summary.csv"]
    left = names.index("members/m1/side_network.json")
    assert "checkpoint.pt" in names[left:] and "members/m0/side_network.json" in names
    summary = calls.index(("name", f"{run}/summary.csv"))
    for name in ("members", "members/m0", "members/m1", "metrics.jsonl"):
        assert ("sync", f"{run}/{name}") in calls[:summary]


def test_what_a_sweep_merges_is_on_the_disk(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def noting(fd: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    out = tmp_path / "run"
    sweep(sweep_config(zarr_cache, out))
    for member in ("m0", "m1"):
        for name in ("", "/side_network.safetensors", "/side_network.json"):
            assert f"{out}/members/{member}{name}" in synced


@pytest.mark.parametrize("damage", ["empty", "cut", "no torch", "no dict", "unsafe"])
def test_a_damaged_checkpoint_is_named(zarr_cache: Path, tmp_path: Path, damage: str) -> None:
    config = train_config(zarr_cache, tmp_path / "run", LINEAR)
    file = interrupted(config).path / "checkpoint.pt"
    whole = file.read_bytes()
    if damage == "no dict":
        torch.save([1, 2], file)
    else:
        file.write_bytes(
            {
                "empty": b"", "cut": whole[:-500], "no torch": b"not a checkpoint",
                "unsafe": pickle.dumps(Path("/")),
            }[damage]
        )  # fmt: skip
    with pytest.raises(RunError, match=r"checkpoint\.pt (is damaged|holds no).*Delete that file"):
        train(config)
    file.unlink()
    assert train(config).epochs_trained == 3


def test_a_line_that_a_crash_cut_breaks_nothing(zarr_cache: Path, tmp_path: Path) -> None:
    """Of metrics.jsonl in a run that is looked at meanwhile; of evaluations.jsonl for good."""
    config = train_config(zarr_cache, tmp_path / "run", LINEAR)
    run = interrupted(config, epoch=2)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "mem')
    assert [line["epoch"] for line in run.metrics()] == [1, 2]
    train(config)
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]
    evaluate(run.path, device="cpu")
    with (run.path / "evaluations.jsonl").open("a") as file:
        file.write('{"top1": 0.')
    evaluate(run.path, device="cpu", split=("val",))
    assert [line["split"] for line in run.evaluations()] == [["test"], ["val"]]
    assert report([run.path], device="cpu").members == 1


def test_appending_ends_a_cut_line(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append_text(file, "one\n")
    append_text(file, "two\n")
    assert file.read_text() == "one\ntwo\n"
    file.write_text("one\ntw")
    append_text(file, "three\n")
    assert file.read_text() == "one\ntw\nthree\n"


def test_partial_files_have_names_of_their_own_and_do_not_stay(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partials: list[str] = []
    replace = Path.replace

    def noting(self: Path, target: Path) -> Path:
        partials.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    for _ in range(2):
        replace_text(tmp_path / "file", "text")
    assert len(set(partials)) == 2
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        replace_text(tmp_path / "file", "other")
    assert files(tmp_path) == {"file": b"text"}
    monkeypatch.undo()

    for name, age in (("old", folder.LITTER_SECONDS + 9), ("new", 0)):
        litter = tmp_path / f".{name}.{'a' * 32}.partial"
        litter.write_text("half")
        os.utime(litter, (time.time() - age,) * 2)
    (tmp_path / "mine.partial").write_text("mine")
    assert other_names(tmp_path, ["file"]) == ["mine.partial"]
    sweep_litter(tmp_path)
    assert sorted(files(tmp_path)) == [f".new.{'a' * 32}.partial", "file", "mine.partial"]
    os.close(hold(tmp_path))


# --- what earlier versions left ---------------------------------------------------------------


def as_of_version_3(run: Path) -> None:
    """Members as they were left until version 3 of the card: under peft's names."""
    for member in (run / "members").iterdir():
        card = json.loads((member / "side_network.json").read_text())
        assert card.pop("library_name") == "sidecache"
        (member / "side_network.json").unlink()
        (member / "adapter_config.json").write_text(json.dumps({**card, "format_version": 3}))
        (member / "side_network.safetensors").rename(member / "adapter_model.safetensors")


@pytest.mark.usefixtures("no_hub")
def test_members_under_earlier_names_are_read(
    zarr_cache: Path, images: Path, tmp_path: Path
) -> None:
    """By `evaluate`, `predict`, `report` and `refit`; `train` finds the run done, and replaces it
    if it is asked to."""
    out, photo = tmp_path / "run", images / "test" / "red" / "0.png"
    config = train_config(zarr_cache, out, LINEAR, dataclasses.replace(LINEAR, seed=1))
    before = train(config)
    scores = evaluate(out, members=["all"], device="cpu")
    predicted = predict(out, [photo], device="cpu")
    as_of_version_3(out)
    assert not list(out.rglob("side_network*"))
    assert evaluate(out, members=["all"], device="cpu") == scores
    assert predict(out, [photo], device="cpu") == predicted
    assert report([out], device="cpu").left_out == []
    assert refit(out, [3]).epochs_trained == 3
    assert train(config).members == before.members
    train(dataclasses.replace(config, overwrite=True))
    assert not list(out.rglob("adapter_*")) and evaluate(out, device="cpu")


def test_a_run_goes_on_beside_members_under_earlier_names(zarr_cache: Path, tmp_path: Path) -> None:
    """One had ended before the run was killed, and the program replaced."""
    short = dataclasses.replace(LINEAR, epochs=1)
    config = train_config(zarr_cache, tmp_path / "run", short, LINEAR)
    run = interrupted(config, epoch=2)
    as_of_version_3(run.path)
    train(config)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)
    found = evaluate(run.path, members=["all"], device="cpu")
    assert [one.loss for one in found] == [
        one.loss for one in evaluate(whole.out, members=["all"], device="cpu")
    ]


def test_a_card_of_another_version_is_named(zarr_cache: Path, tmp_path: Path) -> None:
    train(train_config(zarr_cache, tmp_path / "run", LINEAR))
    file = tmp_path / "run" / "members" / "m0" / "side_network.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 2}))
    with pytest.raises(
        RunError, match=r"side_network\.json has version 2, this program reads 3 and"
    ):
        evaluate(tmp_path / "run", device="cpu")


# --- in which precision -----------------------------------------------------------------------


def on_a_machine(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    monkeypatch.setattr("pipeline.device._cpu_has_bfloat16", lambda: bfloat16)


@pytest.mark.parametrize("begun", ["bfloat16", "float32"])
def test_a_run_goes_on_in_its_own_precision(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    """Begun where that is fast, continued where it is not; a flag that agrees is no contradiction,
    one that does not is named."""
    fast = begun == "bfloat16"
    config = train_config(zarr_cache, tmp_path / "run", LINEAR, amp=None)
    other = dataclasses.replace(config, amp=not fast)
    on_a_machine(monkeypatch, bfloat16=fast)
    run = interrupted(config)
    on_a_machine(monkeypatch, bfloat16=not fast)
    flag = "--no-amp" if fast else "--amp"
    with pytest.raises(RunError, match=rf"precision: {begun} there, \w+ asked for by {flag}; "):
        train(other)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(config, amp=fast), stop_after(2))
    records: list[Any] = []
    assert train(config, records.append).epochs_trained == 1
    assert next(r.precision for r in records if hasattr(r, "precision")) == begun
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), amp=fast)
    train(whole)
    assert run.summary() == Run(whole.out).summary()
    with pytest.raises(RunError, match="precision"):
        train(other)
    train(dataclasses.replace(other, overwrite=True))
    assert run.precision == (torch.float32 if fast else torch.bfloat16)


def test_a_sweep_has_one_precision(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sweep_config(zarr_cache, tmp_path / "run", amp=None)
    on_a_machine(monkeypatch, bfloat16=True)

    def stop(record: object) -> None:
        if isinstance(record, RoundStarted) and record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(config, stop)
    on_a_machine(monkeypatch, bfloat16=False)
    with pytest.raises(RunError, match="bfloat16 there, float32 asked for by --no-amp"):
        sweep(dataclasses.replace(config, amp=False))
    assert sweep(config).done == 2
    run = Run(config.out)
    assert run.precision == torch.bfloat16, "the second round's, which was merged last"
    refit(run.path, [7])
    assert Run(run.path / "refit").precision == torch.bfloat16


@pytest.mark.usefixtures("no_hub")
def test_members_are_evaluated_in_the_precision_they_learned_in(
    zarr_cache: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, live, and in the report, unless asked otherwise."""
    out = tmp_path / "run"
    train(train_config(zarr_cache, out, LINEAR, amp=True))
    on_a_machine(monkeypatch, bfloat16=False)
    used: list[torch.dtype] = []
    for name in ("evaluate", "pages.mistakes"):
        module = sys.modules[f"pipeline.{name}"]
        real = module.Batches  # type: ignore[attr-defined]

        def noting(*arguments: Any, _real: Any = real, **named: Any) -> Any:
            used.append(named["dtype"])
            return _real(*arguments, **named)

        monkeypatch.setattr(module, "Batches", noting)
    for amp, expected in ((None, torch.bfloat16), (False, torch.float32), (True, torch.bfloat16)):
        evaluate(out, device="cpu", amp=amp)
        report([out], device="cpu", amp=amp)
        assert used == [expected] * 2
        used.clear()

    from pipeline.backbones import behind

    for amp, precisions in (
        (None, (torch.float32, torch.bfloat16)),  # the cache's, the member's
        (True, (torch.bfloat16, torch.bfloat16)),
        (False, (torch.float32, torch.float32)),
    ):
        member = Run(out).load_member("m0", torch.device("cpu"))
        one = behind.go_live(member, weights=None, device=torch.device("cpu"), amp=amp)
        assert (one.backbone_precision, one.member_precision) == precisions
    operands = type(member.network).operands

    def noting_operands(self: Any, features: Any, precision: torch.dtype) -> Any:
        used.append(precision)
        return operands(self, features, precision)

    monkeypatch.setattr(type(member.network), "operands", noting_operands)
    evaluate(out, images=str(images), workers=0, device="cpu")
    assert set(used) == {torch.bfloat16}


# --- where its cache is -----------------------------------------------------------------------


def test_a_run_finds_its_cache_from_anywhere(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named relatively, looked for from another folder; then both are moved; then it is gone."""
    work, away = tmp_path / "work", tmp_path / "away"
    shutil.copytree(zarr_cache, work / "caches" / "c.zarr")
    monkeypatch.chdir(work)
    train(train_config(Path("caches/c.zarr"), Path("runs/one"), LINEAR))
    monkeypatch.chdir(tmp_path)
    run = work / "runs" / "one"
    assert Run(run).config().cache == str(work / "caches" / "c.zarr")
    assert evaluate(run, device="cpu")[0].n == 6
    assert report([run], device="cpu").left_out == []
    work.rename(away)
    run = away / "runs" / "one"
    assert evaluate(run, device="cpu")[0].n == 6
    assert report([run], device="cpu").left_out == []
    assert refit(run, [3]).epochs_trained == 3
    monkeypatch.chdir(run)
    assert evaluate(Path(), device="cpu")[0].n == 6
    (away / "caches").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="--cache") as caught:
        evaluate(run, device="cpu")
    for place in (work, away):
        assert str(place / "caches" / "c.zarr") in str(caught.value)
    (said,) = report([run], device="cpu").left_out
    assert str(away / "caches" / "c.zarr") in said
    assert evaluate(run, cache=tmp_path / "elsewhere" / "c.zarr", device="cpu")[0].n == 6
    result = CliRunner().invoke(cli.main, ["evaluate", str(run), "--device", "cpu"])
    assert result.exit_code == 1 and "--cache" in result.stderr


def test_other_labels_are_another_run(zarr_cache: Path, tmp_path: Path) -> None:
    """A run, and a sweep, that began with the labels as they were; one of an earlier version did
    not note them."""
    cache = Path(shutil.copytree(zarr_cache, tmp_path / "c.zarr"))
    config, swept = (
        train_config(cache, tmp_path / "run", LINEAR),
        sweep_config(cache, tmp_path / "s"),
    )
    train(config)
    sweep(swept)
    label(LabelConfig(cache=str(cache), folds=2))
    for what, again in (("run", lambda: train(config)), ("sweep", lambda: sweep(swept))):
        with pytest.raises(
            RunError, match=rf"another {what}:\n  labelling: labels, splits or rows"
        ):
            again()
    for file in (tmp_path / "run" / "environment.json", tmp_path / "s" / "sweep.yaml"):
        values = yaml.safe_load(file.read_text())
        del values["labelling"]
        file.write_text(json.dumps(values))
    assert (train(config).epochs_trained, sweep(swept).trained) == (0, 0)
