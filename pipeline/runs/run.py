"""The run directory: what a training pass leaves behind, and how it goes on after being killed.

    config.yaml        what was asked, every default written out, places absolute
    environment.json   versions, device, precision, cache fingerprint
    metrics.jsonl      one line a member and epoch
    checkpoint.pt      all members' parameters and moments, at the end of an epoch (until finished)
    summary.csv        one line a member; its presence means that the run is finished
    members/<id>/      adapter_model.safetensors + adapter_config.json: a member by itself

A member carries all that its use needs: settings, classes, feature shape, the frozen final norm,
and the backbone's identity and preprocessing. One process at a time writes a run (`folder.py`). A
folder is a run if its two documents say so, never by its names: nothing else is deleted.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, Self

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import __version__
from pipeline.config import PassConfig, TrainConfig
from pipeline.errors import RunError
from pipeline.records import finite, rank
from pipeline.runs.events import FOLDER as EVENTS
from pipeline.runs.folder import (
    append_text,
    delete,
    hold,
    make_folder,
    other_names,
    replace_text,
    sweep_litter,
    sync_file,
    whole_file,
)
from pipeline.side import METHODS
from pipeline.side.contract import FeatureSpec, SideNetwork, TokenShape
from pipeline.tasks import KINDS, Task, task_from

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
CHECKPOINT, SUMMARY, MEMBERS, COST = "checkpoint.pt", "summary.csv", "members", "cost.json"
EVALUATIONS, PAGE = "evaluations.jsonl", "report.html"
REFIT = "refit"  # a run of its own inside the run
SWEEP, STUDY, ROUND = "sweep.yaml", "study.db", "round"  # what a sweep has beside the rest
_OF_A_MEMBER = (  # folder, and the files in each member's own below it
    (MEMBERS, "adapter_model.safetensors"),
    (MEMBERS, "adapter_config.json"),
    (MEMBERS, ".*.partial"),
    (EVENTS, "events.out.tfevents.*"),
)
_PAGE_SAYS = "sidecache report"
_DELETE_IT = "Delete that file, and the same command trains from the first epoch."
CARD_VERSION = 3  # of adapter_config.json; 1 knew plain ViTs only, 2 one class target
_NORM_WEIGHT, _NORM_BIAS = "final_norm.weight", "final_norm.bias"


@dataclass(frozen=True, kw_only=True)
class TrainedMember:
    """One member read back: `network` has K = 1; `card` is its adapter_config.json; `precision` is
    the one that it learned in."""

    id: str
    network: SideNetwork
    card: dict[str, Any]
    precision: torch.dtype

    @property
    def task(self) -> Task:
        """What it learned to predict."""
        return task_from(self.card["target"])


class Run:
    """One run directory. As a context manager it ends the lock that `hold` or `begin` took."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def begun(self) -> bool:
        """Whether this is a run: not by its names, which others use too, but by what they say."""
        config = _document(self.path / CONFIG)
        return _says_environment(self.path) and {"cache", "out", "members"} <= config.keys()

    @property
    def finished(self) -> bool:
        return (self.path / SUMMARY).exists()

    @property
    def precision(self) -> torch.dtype:
        """The one that its members learn in."""
        precision: torch.dtype = getattr(torch, self.environment()["precision"])
        return precision

    def hold(self) -> None:
        """Make the directory if need be, and keep other processes from writing it. RunError if one
        does."""
        self._lock = hold(self.path)

    def begin(self, config: TrainConfig, environment: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make the directory, or find the same run in it; its checkpoint if there is one. Keeps
        other processes out until the end of the `with` statement.

        Raises RunError if the directory holds another run, naming what differs, or anything else,
        or if another process writes it.
        """
        self.hold()
        if not self.begun:
            self._refuse_other_files()
        elif config.overwrite:
            self.clear()
        else:
            self._refuse_another(config, environment)
            return self._checkpoint()
        swept = bool(self.sweep())
        self._write(ENVIRONMENT, json.dumps(environment, indent=1, allow_nan=False) + "\n")
        self.write_config(config)
        if swept:
            (self.path / SWEEP).unlink()
        return None

    def amp(self, config: PassConfig) -> bool | None:
        """What `amp` means for a pass that goes on here: left open, the run's own precision,
        whatever this machine is fast in. `begin` refuses another one."""
        if config.amp is not None or config.overwrite or not self.begun:
            return config.amp
        return self.precision == torch.bfloat16

    def config(self) -> TrainConfig:
        """The configuration that the run was made with. RunError if this is no run."""
        if not self.begun:
            raise RunError(f"{self.path}: expected a run directory made by `train` (no {CONFIG})")
        try:
            return TrainConfig.from_dict(_document(self.path / CONFIG))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.path}: its {CONFIG} was written by another version of this program "
                f"({error}): train again"
            ) from error

    def write_config(self, config: TrainConfig) -> None:
        """Replace config.yaml. Its places are absolute: they mean the same from any folder."""
        cache, out = (str(Path(place).absolute()) for place in (config.cache, config.out))
        values = replace(config, cache=cache, out=out).to_dict()
        self._write(CONFIG, yaml.safe_dump(values, sort_keys=False))

    def cache(self) -> str:
        """Where its cache is: where it was, or as far from the run as it was, if both were moved.

        Raises RunError if it is in neither place.
        """
        config = self.config()
        moved = os.path.normpath(self.path / os.path.relpath(config.cache, config.out))
        for place in (config.cache, moved):
            if Path(place).exists():
                return place
        raise RunError(
            f"{self.path}: expected the cache that it was trained from at {config.cache}, or at "
            f"{moved}, as far from the run as it was; there is none. Name its place with "
            f"`evaluate --cache`, or put it there."
        )

    def sweep(self) -> dict[str, Any]:
        """What sweep.yaml says; {} if no sweep is here."""
        values = _document(self.path / SWEEP)
        return values if {"fingerprint", "space"} <= values.keys() else {}

    def clear(self) -> None:
        """Delete what a run, a sweep, their refit, evaluations and page left here, and nothing
        else. The documents that say whose directory this is stay: a kill leaves it a run."""
        delete(self.path, (SUMMARY, CHECKPOINT, METRICS, COST, EVALUATIONS))
        for folder, name in _OF_A_MEMBER:
            members = [path.name for path in (self.path / folder).glob("m*")]
            ours = [member for member in members if member[1:].isdecimal()]
            delete(self.path, [f"{folder}/{member}/{name}" for member in ours])
        for name in (ROUND, REFIT):
            Run(self.path / name).remove()
        if self.sweep():
            delete(self.path, (STUDY, f"{STUDY}-journal"))
        page = self.path / PAGE
        if page.is_file() and _PAGE_SAYS in page.read_text(encoding="utf-8", errors="ignore"):
            page.unlink()

    def remove(self) -> None:
        """Delete a run with its directory. What is not a run's stays, and with it the directory.

        Raises RunError if another process writes it.
        """
        if not self.path.is_dir():
            return
        with self:
            self.hold()
            if self.begun or not self._other_files():
                self.clear()
                self.disown()
                sweep_litter(self.path, older_than=0.0)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def disown(self) -> None:
        """Delete the documents of a run. Of a half-deleted one the environment is left, as of one
        that has only just been begun."""
        delete(self.path, (CONFIG, ENVIRONMENT))

    def _refuse_other_files(self) -> None:
        others = self._other_files()
        if others:
            raise RunError(
                f"{self.path}: expected a new or empty folder for the run, or one that `train` "
                f"made; it holds other files ({listed(others)}). Choose another --out."
            )

    def _other_files(self) -> list[str]:
        """What is here beside that with which `begin` begins."""
        return other_names(self.path, [ENVIRONMENT] if _says_environment(self.path) else [])

    def _checkpoint(self) -> dict[str, Any] | None:
        path = self.path / CHECKPOINT
        if self.finished or not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of whatever part of torch came upon the damage
            reason = str(error).split("\n")[0] or type(error).__name__
            raise RunError(f"{path} is damaged ({reason}). {_DELETE_IT}") from error
        if not isinstance(state, dict):
            raise RunError(f"{path} holds no checkpoint. {_DELETE_IT}")
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        with whole_file(self.path / CHECKPOINT) as partial:
            torch.save(state, partial)

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl: on resume, lines after the checkpoint must go."""
        self._write(METRICS, "".join(map(_line, lines)))

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        append_text(self.path / METRICS, "".join(map(_line, lines)))

    def metrics(self) -> list[dict[str, Any]]:
        return _read_lines(self.path / METRICS)

    def environment(self) -> dict[str, Any]:
        """Versions, machine and the cache's fingerprint, as `begin` noted them. RunError if the
        file was left behind."""
        path = self.path / ENVIRONMENT
        if not path.exists():
            raise RunError(f"{self.path}: expected its {ENVIRONMENT}; copy the run as a whole")
        return json.loads(path.read_text())

    def cost(self) -> dict[str, Any]:
        """What cost.json says; {} before the run is finished."""
        path = self.path / COST
        return json.loads(path.read_text()) if path.exists() else {}

    def finish(self, rows: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> None:
        """Write cost.json, then summary.csv, which makes the run finished; drop the checkpoint."""
        sync_file(self.path / METRICS)
        self._write(COST, json.dumps(cost, indent=1, allow_nan=False) + "\n")
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(SUMMARY, text.getvalue())
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        sweep_litter(self.path)

    def summary(self) -> list[dict[str, str]]:
        """The lines of summary.csv. RunError if the run is not finished."""
        if not self.finished:
            raise RunError(
                f"{self.path}: this run is not finished; the same `train` command continues it"
                if self.begun
                else f"{self.path}: expected a run directory made by `train`"
            )
        with (self.path / SUMMARY).open(newline="") as file:
            return list(csv.DictReader(file))

    def save_member(
        self, member_id: str, network: SideNetwork, position: int, card: Mapping[str, Any]
    ) -> None:
        """Write member `position` of a network of K as a network of one."""
        tensors: dict[str, Tensor] = {
            name: parameter.detach()[position : position + 1].cpu().contiguous().clone()
            for name, parameter in network.named_parameters()
        }
        spec = asdict(network.spec)
        for name, key in ((_NORM_WEIGHT, "norm_weight"), (_NORM_BIAS, "norm_bias")):
            constant = spec.pop(key)
            if constant is not None:
                tensors[name] = constant.cpu().clone()
        folder = self.path / MEMBERS / member_id
        make_folder(folder)
        with whole_file(folder / "adapter_model.safetensors") as partial:
            save_file(tensors, partial, metadata={"format": "pt", "method": network.method})
        text = json.dumps({**card, "features": spec}, indent=1, allow_nan=False) + "\n"
        self._write(f"{MEMBERS}/{member_id}/adapter_config.json", text)

    def tasks(self) -> list[str]:
        """The tasks that the members learned, in order of appearance."""
        return list(dict.fromkeys(row["task"] for row in self.summary()))

    def best_member(self, task: str | None = None) -> str:
        """The member with the best validation score, lower loss first among equals; the first one
        if nothing was validated. One that was stopped early is best only if all were. Test numbers
        cannot enter: they are not in the summary. Of members that held out folds, one of the best
        setting.

        Raises RunError if the members learned several tasks and none of them is named.
        """
        return self.best_members(task)[0]

    def best_members(self, task: str | None = None) -> list[str]:
        """The best member; of those that held out folds, all of the setting that is best over its
        folds, the best first. Raises as `best_member` does."""
        rows, known = self.summary(), self.tasks()
        if task not in known and (task is not None or len(known) > 1):
            raise RunError(
                f"{self.path}: expected one of its tasks, {', '.join(known)}; came "
                f"{task or 'none'}. Scores of different tasks are not compared: name a task, or a "
                "member."
            )
        members = self.config().members
        settings: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if task in (None, row["task"]):
                member = members[position_of(row["id"])]
                alone = "" if member.fold is not None else row["id"]
                key = alone or repr(replace(member, fold=None))
                settings.setdefault(key, []).append(row)
        best = min(settings.values(), key=_rank_of)
        return [row["id"] for row in sorted(best, key=lambda row: _rank_of([row]))]

    def card(self, member_id: str) -> dict[str, Any]:
        """A member's adapter_config.json. RunError if unknown, or of another version."""
        folder = self.path / MEMBERS / member_id
        if not (folder / "adapter_config.json").exists():
            known = [row["id"] for row in self.summary()]
            if member_id in known:
                raise RunError(f"{folder}: not there, but {SUMMARY} lists it; the run is damaged")
            raise RunError(
                f"{self.path}: no member {member_id!r}; it has {', '.join(known) or 'none'}"
            )
        card = json.loads((folder / "adapter_config.json").read_text())
        if card["format_version"] != CARD_VERSION:
            raise RunError(
                f"{folder}: adapter_config.json has version {card['format_version']}, this program "
                f"reads {CARD_VERSION}: train again"
            )
        return card

    def load_member(self, member_id: str, device: torch.device) -> TrainedMember:
        """A member of a finished run. Raises as `card` does."""
        card, folder = self.card(member_id), self.path / MEMBERS / member_id
        tensors = load_file(folder / "adapter_model.safetensors")
        features = card["features"]
        spec = FeatureSpec(
            **features | {"taps": {k: TokenShape(**v) for k, v in features["taps"].items()}},
            norm_weight=tensors.pop(_NORM_WEIGHT, None),
            norm_bias=tensors.pop(_NORM_BIAS, None),
        )
        method = METHODS[card["method"]]
        network = method(spec, method.settings_class(**card["settings"]), [0])
        parameters = dict(network.named_parameters())
        if parameters.keys() != tensors.keys():
            raise RunError(f"{folder}: the weights are not those of a {card['method']} network")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        network = network.to(device).eval()
        return TrainedMember(id=member_id, network=network, card=card, precision=self.precision)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append to evaluations.jsonl what `evaluate` measured."""
        append_text(self.path / EVALUATIONS, _line(record))
        sync_file(self.path / EVALUATIONS)

    def evaluations(self) -> list[dict[str, Any]]:
        """What `evaluate` measured so far."""
        return _read_lines(self.path / EVALUATIONS)

    def _refuse_another(self, config: TrainConfig, environment: Mapping[str, Any]) -> None:
        mine, theirs = config.progress_key(), self.config().progress_key()
        differing = [
            f"{name}: {theirs.get(name)!r} there, {mine[name]!r} asked for"
            for name in mine
            if mine[name] != theirs.get(name)
        ]
        before = self.environment()
        known_as = (environment["fingerprint"], environment.get("formerly"))
        if before["fingerprint"] not in known_as:
            prints = [facts["fingerprint"][:12] for facts in (before, environment)]
            differing.append(f"cache fingerprint: {prints[0]} there, {prints[1]} given")
        if before.get("labelling") not in (None, environment["labelling"]):
            differing.append("labelling: labels, splits or rows of the cache have changed since")
        if before["precision"] != environment["precision"]:
            differing.append(precision_differs(before["precision"], environment["precision"]))
        if differing:
            raise RunError(
                f"{self.path} holds another run:\n  "
                + "\n  ".join(differing)
                + "\nChoose another --out, or --overwrite."
            )

    def _write(self, name: str, text: str) -> None:
        replace_text(self.path / name, text)


def precision_differs(there: str, asked: str) -> str:
    """What to say of a run or sweep that is to go on in another precision."""
    flag = "--amp" if asked == "bfloat16" else "--no-amp"
    return f"precision: {there} there, {asked} asked for by {flag}; without it, {there} goes on"


def _says_environment(path: Path) -> bool:
    return {"fingerprint", "precision"} <= _document(path / ENVIRONMENT).keys()


def _document(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file says; {} if it is not there, or is no document of ours."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f", … {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of lines. What a crash has cut is none; earlier versions wrote NaN,
    which is no JSON: None."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line, parse_constant=lambda _: None))
    return records


def member_id(position: int) -> str:
    """Short and stable: m0, m1, …; the settings stand in the files beside it."""
    return f"m{position}"


def position_of(member: str) -> int:
    """The inverse of `member_id`."""
    return int(member.removeprefix("m"))


def score_of(row: Mapping[str, str]) -> float | None:
    """The validation score that ranks, in a line of summary.csv."""
    values = [row.get(f"val_{next(iter(kind.scores))}") for kind in KINDS.values()]
    return number_of(next((value for value in values if value), ""))


def loss_of(row: Mapping[str, str]) -> float | None:
    """The validation loss in a line of summary.csv."""
    return number_of(row["val_loss"])


def _rank_of(rows: Sequence[Mapping[str, str]]) -> tuple[bool, float, float]:
    """Sorts settings, best first, by the lines of their members: one, or one a fold."""
    scores, losses = [score_of(row) for row in rows], [loss_of(row) for row in rows]
    return rank(_mean(scores), _mean(losses), stopped=any(row["stopped"] for row in rows))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def number_of(text: str) -> float | None:
    """What a cell of summary.csv holds; None if that is nothing, or not finite."""
    return finite(float(text)) if text else None


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json."""
    packages = ("torch", "numpy", "zarr", "h5py")
    return {
        "sidecache": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in packages},
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
    }
