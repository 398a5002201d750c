"""Sweeps: spaces as they are read, every proposal trained once, killed anywhere and gone on."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from cache import NameMissing
from pipeline.config import SweepConfig
from pipeline.errors import DeviceError, RunError, SettingError
from pipeline.records import EpochDone, RoundStarted, TrialDone
from pipeline.runs.merging import add_costs
from pipeline.runs.run import Run
from pipeline.search import rounds
from pipeline.search.proposals import REDUCTION
from pipeline.search.space import Chosen, Range, Space, read_space
from pipeline.sweep import sweep
from sidecache import evaluate

ROOT = Path(__file__).parent.parent.parent
QUICK = {"epochs": 2, "warmup_epochs": 0}
SMALL = {"method": "last", "rank": [2, 4], "seed": [0, 1], **QUICK}


def space_file(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def sweep_config(cache: Path, out: Path, space: dict[str, Any], **changes: Any) -> SweepConfig:
    """A sweep of a space, two members at a time, in float32 on the CPU."""
    defaults = {"device": "cpu", "amp": False, "batch_size": 5, "at_once": 2}
    file = space_file(out.parent / f"{out.name}-space", **space)
    values = {**defaults, **changes}
    return SweepConfig(cache=str(cache), space=str(file), out=str(out), **values)


# --- spaces -----------------------------------------------------------------------------------


def test_a_space_is_read_with_the_types_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "method: [mist, linear]\nlr: {low: 1e-4, high: 1e-2, log: true}\nweight-decay: 0\n"
        "modules: {low: 1, high: 6, step: 2}\ntap: [null, 3]\nsched: constant\n"
    )
    space = read_space(file)
    assert space.methods == ("miet", "linear")
    assert space.axes == {
        "lr": Range(low=1e-4, high=1e-2, log=True),
        "weight_decay": (0.0,),
        "modules": Range(low=1, high=5, step=2),
        "tap": (None, 3),
        "sched": ("constant",),
    }
    assert list(space.axes_of("linear")) == ["lr", "weight_decay", "tap", "sched"]
    assert read_space(space_file(tmp_path / "again", **space.to_dict())).axes == space.axes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines `setting: value`.*came None"),
        ("lr: 1e-3", "method: expected one or a list of last, lst, .*came nothing"),
        ("method: lasso", "method: expected one or a list of last, lst, .*came 'lasso'"),
        ("method: [last, last]", "method: expected every value once"),
        ("method: []", "method: expected one value or more; came an empty list"),
        ("method: last\nlearning: 1", "learning: expected a setting of last; .*they have lr"),
        ("method: [last, linear]\nreduction: 4", "reduction: expected a setting of last, linear"),
        ("method: last\nlr: []", "lr: expected one value or more"),
        ("method: last\nlr: big", "lr: expected a number; came 'big'"),
        ("method: last\nlr: .nan", "lr: expected a number; came nan"),
        ("method: last\nlr: true", "lr: expected a number; came True"),
        ("method: last\nrank: 1.5", "rank: expected a whole number; came 1.5"),
        ("method: last\nrank: null", "rank: expected a whole number; came None"),
        ("method: attentive\nheads: x", "heads: expected a whole number or null; came 'x'"),
        ("method: lst\nkeep_layers: 3", "keep_layers: expected text; came 3"),
        ("method: last\nlr: [[1, 2]]", r"lr: expected a number; came \[1, 2\]"),
        ("method: last\nrank: [4, 4]", r"rank: expected every value once; came \[4, 4\]"),
        ("method: last\nlr: {low: 1}", "lr: expected {low: …, high: …}"),
        ("method: last\nlr: {low: 1, high: 2, logg: 1}", "lr: expected {low: …, high: …}"),
        ("method: last\nlr: {low: 2, high: 1}", "lr: expected low not above high"),
        ("method: last\nlr: {low: 0, high: 1, log: true}", "lr.low: expected above 0"),
        ("method: last\nlr: {low: 1, high: 2, log: 1}", "lr.log: expected true or false; came 1"),
        ("method: last\nlr: {low: 1, high: 2, step: 1}", "lr: expected no step between numbers"),
        ("method: last\nrank: {low: 1, high: 2.5}", "rank.high: expected a whole number; came 2.5"),
        ("method: last\nrank: {low: 1, high: 8, step: 0}", "rank.step: expected 1 or more; came 0"),
        ("method: last\nrank: {low: 1, high: 8, log: true, step: 2}", "rank.step: expected 1; "),
        ("method: last\npool: {low: 1, high: 2}", "pool: expected text, or a list of texts"),
        ("method: [", "space.yaml: while parsing"),
    ],
)
def test_a_bad_space_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(SettingError, match=message) as caught:
        read_space(file)
    assert str(caught.value).startswith(str(file))


def test_a_grid_has_every_combination_of_each_method_once(tmp_path: Path) -> None:
    file = space_file(tmp_path / "a", method=["last", "linear"], rank=[2, 4], lr=[0.1, 0.2],
                      epochs=3, seed={"low": 0, "high": 1})  # fmt: skip
    grid = read_space(file).grid()
    assert len(grid) == 12 == len({tuple(sorted(c.items())) for c in grid})
    assert sum(c["method"] == "linear" for c in grid) == 4
    assert all(("rank" in c) == (c["method"] == "last") for c in grid)
    assert "method" not in read_space(space_file(tmp_path / "b", **SMALL)).grid()[0]
    endless = read_space(space_file(tmp_path / "c", method="last", lr={"low": 0.1, "high": 1}))
    with pytest.raises(SettingError, match=r"lr: expected a list of values, as a grid .*a range"):
        endless.grid()


def test_the_example_can_be_proposed_from() -> None:
    space = read_space(ROOT / "examples" / "space.yaml")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    members = [space.propose(study.ask()) for _ in range(20)]
    assert {member.method for member in members} == {"last", "miet"}
    assert all(("depth" in m.settings) == (m.method == "last") for m in members)
    assert space.most_epochs() == 30
    assert Space("", ("last", "linear"), {}).most_epochs() == 100, "of the recipes"


# --- sweeps -----------------------------------------------------------------------------------


def test_a_grid_makes_no_member_twice(tmp_path: Path) -> None:
    """Drop-path is no setting of linear; what to merge of one tap decides nothing."""
    space = {"method": ["linear", "last"], "drop_path": [0.0, 0.1], "last_n": [1, 2],
             "merge": ["concat", "mean"], "rank": {"low": 16, "high": 16}}  # fmt: skip
    grid = read_space(space_file(tmp_path, **space)).grid()
    assert [tuple(combination.values()) for combination in grid] == [
        ("linear", 1, "concat"), ("linear", 2, "concat"), ("linear", 2, "mean"),
        ("last", 0.0), ("last", 0.1),
    ]  # fmt: skip
    with pytest.raises(SettingError, match="drop_path: expected a setting of linear"):
        read_space(space_file(tmp_path / "b", method="linear", drop_path=[0.0, 0.1]))
    epochs = {"method": "linear", "epochs": [1, 30]}
    space = read_space(space_file(tmp_path / "c", **epochs))
    proposed = [space.propose(Chosen(combination)) for combination in space.grid()]
    assert [member.warmup_epochs for member in proposed] == [0, 5]


def test_a_grid_leaves_one_run_directory_of_all_members(zarr_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = sweep_config(zarr_cache, out, {**SMALL, "seed": [0, 1, 2]}, sampler="grid", at_once=4)
    records: list[Any] = []
    result = sweep(config, records.append)
    assert (result.trained, result.done, result.pruned, result.failed) == (6, 6, 0, 0)
    rounds = [dataclasses.astuple(r) for r in records if isinstance(r, RoundStarted)]
    assert rounds == [(1, 2, 4, 0, 6), (2, 2, 2, 4, 6)]
    assert sum(isinstance(record, EpochDone) for record in records) == 4
    told = [r for r in records if isinstance(r, TrialDone)]
    assert [r.member for r in told] == [f"m{i}" for i in range(6)]
    assert [r.settings for r in told] == read_space(config.space).grid()

    run = Run(out)
    members = run.config().members
    assert [(m.settings["rank"], m.seed) for m in members] == [
        (rank, seed) for rank in (2, 4) for seed in (0, 1, 2)
    ]
    assert run.config().out == str(out)
    assert [row["id"] for row in run.summary()] == [f"m{i}" for i in range(6)]
    assert {line["member"] for line in run.metrics()} == {f"m{i}" for i in range(6)}
    assert len(run.metrics()) == 12
    assert not (out / "round").exists() and not list(out.glob("*.partial"))
    assert result.best == run.best_member() == result.trials[0].member
    assert result.settings["rank"] == members[int(result.best[1:])].settings["rank"]
    assert result.score == result.trials[0].score is not None
    assert [e.member for e in evaluate(out, device="cpu")] == [result.best]
    assert [e.n for e in evaluate(out, members=["m5"], device="cpu")] == [6]
    cost = json.loads((out / "cost.json").read_text())
    assert cost["members"] == 6 and cost["rows"] == 12 and cost["bytes_read"] > 0

    again = sweep(config, records.append)
    assert again.trained == 0 and again.trials == result.trials


def test_a_member_of_a_sweep_is_the_member_alone(zarr_cache: Path, tmp_path: Path) -> None:
    config = sweep_config(zarr_cache, tmp_path / "run", SMALL, sampler="grid")
    sweep(config)
    sweep(dataclasses.replace(config, out=str(tmp_path / "other"), at_once=1))
    one, other = (Run(tmp_path / name).summary() for name in ("run", "other"))
    for mine, theirs in zip(one, other, strict=True):
        assert float(mine["val_loss"]) == pytest.approx(float(theirs["val_loss"]), rel=1e-4)


def stop_when(condition: Callable[[Any], bool]) -> Callable[[Any], None]:
    def report(record: Any) -> None:
        if condition(record):
            raise KeyboardInterrupt

    return report


def summary(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


KILLS: dict[str, Callable[[Any], bool]] = {
    "first proposal": lambda r: isinstance(r, TrialDone) and r.number == 0,
    "first round": lambda r: isinstance(r, RoundStarted),
    "in the first round": lambda r: isinstance(r, EpochDone) and r.epoch == 1,
    "second round": lambda r: isinstance(r, RoundStarted) and r.round == 2,
    "half of a round told": lambda r: isinstance(r, TrialDone) and r.member == "m2",
    "all of it told": lambda r: isinstance(r, TrialDone) and r.member == "m3",
}


@pytest.fixture(scope="module")
def random_space() -> dict[str, Any]:
    """Every third rank or so is no multiple of the heads."""
    return {
        "method": ["last", "linear"],
        "lr": {"low": 1e-3, "high": 1e-1, "log": True},
        "rank": {"low": 2, "high": 5},
        "heads": 2,
        **QUICK,
    }


@pytest.fixture(scope="module")
def whole(
    zarr_cache: Path, tmp_path_factory: pytest.TempPathFactory, random_space: dict[str, Any]
) -> Path:
    """A sweep that nobody interrupted; its first proposal cannot be trained."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = sweep_config(
        zarr_cache, out, random_space, sampler="random", trials=6, sampler_seed=10
    )
    result = sweep(config)
    assert result.trials[-1].state == "failed" and result.done == 5
    assert min(r.number for r in result.trials if r.state == "failed") == 0
    return out


def assert_same_sweep(one: Path, other: Path) -> None:
    assert summary(one) == summary(other)
    for name in ("metrics.jsonl", "environment.json"):
        assert (one / name).read_text() == (other / name).read_text()
    assert Run(one).config().members == Run(other).config().members
    trials = [
        [(t.state, t.params, t.value, t.user_attrs) for t in study.get_trials()]
        for study in map(open_study, (one, other))
    ]
    assert trials[0] == trials[1]
    assert not (other / "round").exists()


def open_study(run: Path) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{run / 'study.db'}")


@pytest.mark.parametrize("place", KILLS)
def test_a_stopped_sweep_goes_on_to_the_same_result(
    zarr_cache: Path, tmp_path: Path, whole: Path, random_space: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, place: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.training.saver.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("pipeline.training.saver.CHECKPOINT_SHARE", math.inf)
    config = sweep_config(zarr_cache, tmp_path / "run", random_space,
                          sampler="random", trials=6, sampler_seed=10)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        sweep(config, stop_when(KILLS[place]))
    sweep(config)
    assert_same_sweep(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "step",
    ["merge", "Run.write_metrics", "Run.finish", "Run.remove"],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_sweep_stopped_while_it_merges_goes_on(
    zarr_cache: Path, tmp_path: Path, whole: Path, random_space: dict[str, Any], step: str,
    after: bool,
) -> None:  # fmt: skip
    """Stopped before or after a step of the second round's merging; then all of it again."""
    config = sweep_config(zarr_cache, tmp_path / "run", random_space,
                          sampler="random", trials=6, sampler_seed=10)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        owner: Any = rounds
        *path, name = step.split(".")
        for part in path:
            owner = getattr(owner, part)
        real, calls = getattr(owner, name), []

        def broken(*arguments: Any, **named: Any) -> Any:
            target = arguments[1] if step == "merge" else arguments[0]
            place = Path(getattr(target, "path", target))
            calls.extend([place] if place.name in ("run", "round") else [])
            counted = [p for p in calls if p.name == ("round" if name == "remove" else "run")]
            stops = len(counted) == 2 and place == counted[-1]
            if stops and not after:
                raise KeyboardInterrupt
            result = real(*arguments, **named)
            if stops:
                raise KeyboardInterrupt
            return result

        patch.setattr(owner, name, broken)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    sweep(config)
    assert_same_sweep(whole, tmp_path / "run")


@pytest.mark.parametrize("place", [1, 3])
def test_a_sweep_stopped_within_a_proposal_goes_on(
    zarr_cache: Path, tmp_path: Path, whole: Path, random_space: dict[str, Any], place: int
) -> None:
    """The method is suggested, the learning rate is not: the same is suggested afterwards."""
    config = sweep_config(zarr_cache, tmp_path / "run", random_space,
                          sampler="random", trials=6, sampler_seed=10)  # fmt: skip
    real, calls = optuna.trial.Trial.suggest_float, []

    def broken(*arguments: Any, **named: Any) -> float:
        calls.append(arguments)
        if len(calls) == place:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.trial.Trial, "suggest_float", broken)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    sweep(config)
    assert_same_sweep(whole, tmp_path / "run")


def test_a_grid_goes_on_too_with_other_numbers_at_once(zarr_cache: Path, tmp_path: Path) -> None:
    """The round of four had not saved anything: it is cut in two."""
    config = sweep_config(zarr_cache, tmp_path / "run", SMALL, sampler="grid", at_once=4)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, stop_when(lambda r: isinstance(r, RoundStarted)))
    sizes: list[int] = []
    sweep(
        dataclasses.replace(config, at_once=2),
        lambda r: sizes.append(r.members) if isinstance(r, RoundStarted) else None,
    )
    assert sizes == [2, 2]
    assert [row["id"] for row in summary(tmp_path / "run")] == ["m0", "m1", "m2", "m3"]


def test_more_trials_go_on_and_another_sweep_is_refused(zarr_cache: Path, tmp_path: Path) -> None:
    space = {"method": "linear", "lr": {"low": 1e-3, "high": 1e-1, "log": True}, **QUICK}
    out = tmp_path / "run"
    config = sweep_config(zarr_cache, out, space, trials=2)
    sweep(config)
    more = sweep(dataclasses.replace(config, trials=5, at_once=8))
    assert (more.trained, more.done) == (3, 5)
    assert sweep(config).trained == 0, "fewer than there are"
    with pytest.raises(RunError, match=r"holds another sweep:\n  sampler_seed: 0 there, 1 asked"):
        sweep(dataclasses.replace(config, sampler_seed=1))
    changed = sweep_config(zarr_cache, out, {**space, "lr": 0.1}, trials=5)
    with pytest.raises(RunError, match=r"space.lr: .*'high': 0.1.* there, \[0.1\] asked for"):
        sweep(changed)
    assert sweep(dataclasses.replace(changed, trials=1, overwrite=True)).done == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(RunError, match="holds other files"):
        sweep(dataclasses.replace(config, out=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_tpe_proposes_the_same_again_and_learns(zarr_cache: Path, tmp_path: Path) -> None:
    space = {"method": "linear", "lr": {"low": 1e-7, "high": 1e-1, "log": True}, **QUICK}
    results = [
        sweep(sweep_config(zarr_cache, tmp_path / name, space, trials=18, at_once=6))
        for name in ("one", "other")
    ]
    assert results[0].trials == results[1].trials
    rates = [r.settings["lr"] for r in sorted(results[0].trials, key=lambda r: r.number)]
    assert len(set(rates)) == 18
    assert sum(rate > 1e-3 for rate in rates[12:]) > sum(rate > 1e-3 for rate in rates[:6])


def test_impossible_proposals_fail_and_all_of_them_are_an_error(
    zarr_cache: Path, tmp_path: Path
) -> None:
    space = {"method": "last", "rank": [2, 3, 4], "heads": 2, "gap": [1, 4], **QUICK}
    result = sweep(sweep_config(zarr_cache, tmp_path / "run", space, sampler="grid"))
    assert (result.done, result.failed) == (2, 4)
    reasons = {r.reason for r in result.trials if r.state == "failed"}
    assert "last: heads = 2: expected a divisor of 3" in reasons
    assert any("gap = 4" in str(reason) for reason in reasons), "the backbone has six blocks"
    assert [row["id"] for row in summary(tmp_path / "run")] == ["m0", "m1"]
    hopeless = sweep_config(zarr_cache, tmp_path / "no", {**SMALL, "warmup_epochs": 9},
                            sampler="grid")  # fmt: skip
    for _ in range(2):
        with pytest.raises(SettingError, match=r"none of 4 proposals can be trained:\n  warmup_ep"):
            sweep(hopeless)


def test_a_member_with_nan_is_a_failed_trial(zarr_cache: Path, tmp_path: Path) -> None:
    space = {"method": "last", "lr": [1e30, 1e-2], "rank": 4, **QUICK}
    result = sweep(sweep_config(zarr_cache, tmp_path / "run", space, sampler="grid"))
    assert (result.done, result.failed) == (1, 1)
    failed = result.trials[-1]
    assert failed.member == "m0" and "not finite" in str(failed.reason)
    assert result.best == "m1"


def test_halving_stops_those_that_lag_behind(zarr_cache: Path, tmp_path: Path) -> None:
    """Six members, rungs after epochs 1 and 3: two pass the first, one the second."""
    rates = [1e-7, 3e-2, 1e-6, 1e-2, 1e-5, 1e-4]
    space = {"method": "linear", "lr": rates, "epochs": 6, "warmup_epochs": 0}
    config = sweep_config(zarr_cache, tmp_path / "run", space, sampler="grid", at_once=6,
                          halving=True)  # fmt: skip
    result = sweep(config)
    assert REDUCTION == 3
    assert result.pruned >= 3 and result.done >= 1 and result.failed == 0
    lines = [line["member"] for line in Run(tmp_path / "run").metrics()]
    for record in result.trials:
        row = next(r for r in summary(tmp_path / "run") if r["id"] == record.member)
        if record.state == "pruned":
            assert record.reason == row["stopped"] and row["stopped"].startswith("pruned after")
            assert lines.count(str(record.member)) == int(row["stopped"].split()[-1]) < 6
        else:
            assert row["stopped"] == "" and lines.count(str(record.member)) == 6
    kept = {r.settings["lr"] for r in result.trials if r.state == "done"}
    assert kept <= {3e-2, 1e-2, 1e-4}


@pytest.mark.parametrize("seconds", [0.0, math.inf], ids=["checkpoint", "none"])
def test_halving_goes_on_after_a_kill_to_the_same_result(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Killed after a rung was judged; the next process starts again before or after it."""
    monkeypatch.setattr("pipeline.training.saver.CHECKPOINT_SECONDS", seconds)
    monkeypatch.setattr("pipeline.training.saver.CHECKPOINT_SHARE", math.inf)
    space = {"method": "linear", "lr": [1e-7, 3e-2, 1e-6, 1e-2], "epochs": 6, "warmup_epochs": 0}
    config = sweep_config(zarr_cache, tmp_path / "one", space, sampler="grid", at_once=4,
                          halving=True)  # fmt: skip
    sweep(config)
    broken = dataclasses.replace(config, out=str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        sweep(broken, stop_when(lambda r: isinstance(r, EpochDone) and r.epoch == 2))
    sweep(broken)
    assert_same_sweep(tmp_path / "one", tmp_path / "other")


def test_requests_that_make_no_sense_leave_nothing_behind(zarr_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def config(**changes: Any) -> SweepConfig:
        return sweep_config(zarr_cache, out, SMALL, **{"trials": 2, **changes})

    with pytest.raises(SettingError, match=r"val_split = .*: a sweep ranks by validation"):
        config(val_split=())
    with pytest.raises(SettingError, match="trials = None: expected a number with any sampler but"):
        config(trials=None)
    with pytest.raises(SettingError, match="sampler = 'magic': expected tpe, random, grid"):
        config(sampler="magic")
    with pytest.raises(NameMissing, match="holdout"):
        sweep(config(val_split=("holdout",)))
    with pytest.raises(DeviceError, match="this machine has cpu"):
        sweep(config(device="cuda:9"))
    with pytest.raises(SettingError, match="resident = 'attic'"):
        sweep(config(resident="attic"))
    with pytest.raises(SettingError, match=r"nothing\.yaml"):
        sweep(dataclasses.replace(config(), space=str(tmp_path / "nothing.yaml")))
    assert not out.exists()


def test_two_tasks_cannot_be_ranked(zarr_cache: Path, tmp_path: Path) -> None:
    space = {**SMALL, "task": ["label", "colour"]}
    with pytest.raises(SettingError, match=r"task: expected one.*came label, colour"):
        sweep(sweep_config(zarr_cache, tmp_path / "run", space, sampler="grid"))


def test_costs_add_up() -> None:
    one = {"seconds": 10.0, "rows": 100, "images_per_second": 50.0, "bytes_read": 7, "members": 4,
           "seconds_per_member": 2.5, "cache_bytes": 9, "extraction_seconds": None}  # fmt: skip
    other = {**one, "seconds": 30.0, "images_per_second": 10.0, "members": 1}
    total = json.loads(json.dumps(add_costs(one, other)))
    assert total == {
        **one, "seconds": 40.0, "images_per_second": 20.0, "bytes_read": 14, "members": 5,
        "seconds_per_member": 8.0,
    }  # fmt: skip
