"""The run directory: what a training pass leaves behind, and how it goes on after being killed.

    config.yaml        what was asked, every default written out, places absolute
    environment.json   versions, device, precision, cache fingerprint
    metrics.jsonl      one line a member and epoch
    checkpoint.pt      all members' parameters and moments, at the end of an epoch (until finished)
    summary.csv        one line a member; its presence means that the run is finished
    members/<id>/      side_network.safetensors + side_network.json: a member by itself (`card.py`)

A member carries all that its use needs: settings, classes, feature shape, the frozen final norm,
and the backbone's identity and preprocessing. One process at a time writes a run (`folder.py`). A
folder is a run if its two documents say so, never by its names: nothing else is deleted.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from pipeline import __version__
from pipeline.config import PassConfig, TrainConfig
from pipeline.errors import RunError
from pipeline.runs import card
from pipeline.runs.card import TrainedMember
from pipeline.runs.documents import json_line, json_text, read_document, read_lines, yaml_text
from pipeline.runs.events import FOLDER as EVENTS
from pipeline.runs.folder import (
    append_text,
    delete,
    hold,
    other_names,
    replace_text,
    sweep_litter,
    sync_file,
    whole_file,
)
from pipeline.runs.refusals import refuse_another, refuse_other_files
from pipeline.runs.summary import position_of, rank_of, read_summary, summary_text
from pipeline.side.contract import SideNetwork

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
CHECKPOINT, SUMMARY, MEMBERS, COST = "checkpoint.pt", "summary.csv", "members", "cost.json"
EVALUATIONS, PAGE = "evaluations.jsonl", "report.html"
REFIT = "refit"  # a run of its own inside the run
SWEEP, STUDY, ROUND = "sweep.yaml", "study.db", "round"  # what a sweep has beside the rest
_OF_A_MEMBER = (  # folder, and the files in each member's own below it
    *((MEMBERS, name) for name in card.FILES),
    (MEMBERS, ".*.partial"),
    (EVENTS, "events.out.tfevents.*"),
)
_PAGE_SAYS = "sidecache report"
_DELETE_IT = "Delete that file, and the same command trains from the first epoch."


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
        config = read_document(self.path / CONFIG)
        return _says_environment(self.path) and {"cache", "out", "members"} <= config.keys()

    @property
    def finished(self) -> bool:
        """Whether all of its members are trained."""
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
            refuse_other_files(self.path, self._other_files(), "run", "train")
        elif config.overwrite:
            self.clear()
        else:
            refuse_another(self.path, "run", *self._deciding(config, environment))
            return self._checkpoint()
        swept = bool(self.sweep())
        self._write(ENVIRONMENT, json_text(environment))
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
            return TrainConfig.from_dict(read_document(self.path / CONFIG))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self.path}: its {CONFIG} was written by another version of this program "
                f"({error}): train again"
            ) from error

    def write_config(self, config: TrainConfig) -> None:
        """Replace config.yaml. Its places are absolute: they mean the same from any folder."""
        cache, out = (str(Path(place).absolute()) for place in (config.cache, config.out))
        values = replace(config, cache=cache, out=out).to_dict()
        self._write(CONFIG, yaml_text(values))

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
        values = read_document(self.path / SWEEP)
        return values if {"fingerprint", "space"} <= values.keys() else {}

    def write_sweep(self, values: Mapping[str, Any]) -> None:
        """Replace sweep.yaml."""
        self._write(SWEEP, yaml_text(values))

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
        """Replace checkpoint.pt: tensors and plain values alone, as nothing else is read back."""
        with whole_file(self.path / CHECKPOINT) as partial:
            torch.save(state, partial)

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl: on resume, lines after the checkpoint must go."""
        self._write(METRICS, "".join(map(json_line, lines)))

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add the lines of an epoch to metrics.jsonl."""
        append_text(self.path / METRICS, "".join(map(json_line, lines)))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a line for each member and epoch."""
        return read_lines(self.path / METRICS)

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
        self._write(COST, json_text(cost))
        self._write(SUMMARY, summary_text(rows))
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
        return read_summary(self.path / SUMMARY)

    def save_member(
        self, member_id: str, network: SideNetwork, position: int, facts: Mapping[str, Any]
    ) -> None:
        """Write member `position` of a network of K as a network of one; see `write_member`."""
        card.write_member(self.path / MEMBERS / member_id, network, position, facts)

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
        best = min(settings.values(), key=rank_of)
        return [row["id"] for row in sorted(best, key=lambda row: rank_of([row]))]

    def card(self, member_id: str) -> dict[str, Any]:
        """What a member's side_network.json says. RunError if unknown, or of another version."""
        found = card.read_card(self.path / MEMBERS / member_id)
        if found is not None:
            return found
        known = [row["id"] for row in self.summary()]
        if member_id in known:
            raise RunError(
                f"{self.path / MEMBERS / member_id}: not there, but {SUMMARY} lists it; the run is "
                f"damaged"
            )
        raise RunError(f"{self.path}: no member {member_id!r}; it has {', '.join(known) or 'none'}")

    def load_member(self, member_id: str, device: torch.device) -> TrainedMember:
        """A member of a finished run. Raises as `card` does."""
        found = self.card(member_id)
        network = card.read_network(self.path / MEMBERS / member_id, found, device)
        return TrainedMember(id=member_id, network=network, card=found, precision=self.precision)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append to evaluations.jsonl what `evaluate` measured."""
        append_text(self.path / EVALUATIONS, json_line(record))
        sync_file(self.path / EVALUATIONS)

    def evaluations(self) -> list[dict[str, Any]]:
        """What `evaluate` measured so far."""
        return read_lines(self.path / EVALUATIONS)

    def _deciding(
        self, config: TrainConfig, environment: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What decides the result of the run that is here, and of one that is asked for."""
        before = self.environment()
        facts = [name for name in ("fingerprint", "labelling", "precision") if name in before]
        there = self.config().progress_key() | {name: before[name] for name in facts}
        asked = config.progress_key() | {name: environment[name] for name in facts}
        if there["fingerprint"] == environment.get("formerly"):  # an earlier name of the same
            there["fingerprint"] = asked["fingerprint"]
        return there, asked

    def _write(self, name: str, text: str) -> None:
        replace_text(self.path / name, text)


def _says_environment(path: Path) -> bool:
    return {"fingerprint", "precision"} <= read_document(path / ENVIRONMENT).keys()


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
