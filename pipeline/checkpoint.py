"""The run directory: what a training pass leaves behind, and how it goes on after being killed.

    config.yaml        what was asked, every default written out
    environment.json   versions, device, cache fingerprint
    metrics.jsonl      one line a member and epoch
    checkpoint.pt      all members' parameters and moments, at the end of an epoch (until finished)
    summary.csv        one line a member; its presence means that the run is finished
    members/<id>/      adapter_model.safetensors + adapter_config.json: a member by itself

A member carries all that its use needs: settings, classes, feature shape, the frozen final norm,
and the backbone's identity and preprocessing. Every file is written beside itself and renamed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import __version__
from pipeline.config import TrainConfig
from pipeline.errors import RunError
from pipeline.metrics import SCORES, Task, finite, rank
from pipeline.side import METHODS, FeatureSpec, SideNetwork, TokenShape

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
CHECKPOINT, SUMMARY, MEMBERS, COST = "checkpoint.pt", "summary.csv", "members", "cost.json"
EVALUATIONS = "evaluations.jsonl"
CARD_VERSION = 3  # of adapter_config.json; 1 knew plain ViTs only, 2 one class target
_NORM_WEIGHT, _NORM_BIAS = "final_norm.weight", "final_norm.bias"


@dataclass(frozen=True, kw_only=True)
class TrainedMember:
    """One member read back: `network` has K = 1; `card` is its adapter_config.json."""

    id: str
    network: SideNetwork
    card: dict[str, Any]

    @property
    def task(self) -> Task:
        """What it learned to predict."""
        return Task.from_dict(self.card["target"])


class Run:
    """One run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def finished(self) -> bool:
        return (self.path / SUMMARY).exists()

    def begin(self, config: TrainConfig, environment: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make the directory, or find the same run in it; its checkpoint if there is one.

        Raises RunError if the directory holds another run, naming what differs, or anything else.
        """
        if config.overwrite and (self.path / CONFIG).exists():
            shutil.rmtree(self.path)
        if (self.path / CONFIG).exists():
            self._refuse_another(config, environment["fingerprint"])
            checkpoint = self.path / CHECKPOINT
            if not checkpoint.exists():
                return None
            return torch.load(checkpoint, map_location="cpu", weights_only=True)
        if self.path.exists() and any(self.path.iterdir()):
            raise RunError(
                f"{self.path}: expected a new or empty folder for the run, or one that `train` "
                f"made; it holds other files. Choose another --out."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(ENVIRONMENT, json.dumps(environment, indent=1, allow_nan=False) + "\n")
        self._write(CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))
        return None

    def config(self) -> TrainConfig:
        """The configuration that the run was made with. RunError if this is no run."""
        if not (self.path / CONFIG).exists():
            raise RunError(f"{self.path}: expected a run directory made by `train` (no {CONFIG})")
        return TrainConfig.from_dict(yaml.safe_load((self.path / CONFIG).read_text()))

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        partial = self.path / f"{CHECKPOINT}.partial"
        torch.save(state, partial)
        partial.replace(self.path / CHECKPOINT)

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl: on resume, lines after the checkpoint must go."""
        self._write(METRICS, "".join(map(_line, lines)))

    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with (self.path / METRICS).open("a") as file:
            file.writelines(map(_line, lines))

    def metrics(self) -> list[dict[str, Any]]:
        return _read_lines(self.path / METRICS)

    def environment(self) -> dict[str, Any]:
        """Versions, machine and the cache's fingerprint, as `begin` noted them."""
        return json.loads((self.path / ENVIRONMENT).read_text())

    def cost(self) -> dict[str, Any]:
        """What cost.json says; {} before the run is finished."""
        path = self.path / COST
        return json.loads(path.read_text()) if path.exists() else {}

    def finish(self, rows: Sequence[Mapping[str, Any]], cost: Mapping[str, Any]) -> None:
        """Write cost.json, then summary.csv, which makes the run finished; drop the checkpoint."""
        self._write(COST, json.dumps(cost, indent=1, allow_nan=False) + "\n")
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(SUMMARY, text.getvalue())
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def summary(self) -> list[dict[str, str]]:
        """The lines of summary.csv. RunError if the run is not finished."""
        if not self.finished:
            raise RunError(
                f"{self.path}: this run is not finished; the same `train` command continues it"
                if (self.path / CONFIG).exists()
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
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "adapter_model.partial"
        save_file(tensors, partial, metadata={"format": "pt", "method": network.method})
        partial.replace(folder / "adapter_model.safetensors")
        text = json.dumps({**card, "features": spec}, indent=1, allow_nan=False) + "\n"
        self._write(f"{MEMBERS}/{member_id}/adapter_config.json", text)

    def tasks(self) -> list[str]:
        """The tasks that the members learned, in order of appearance."""
        return list(dict.fromkeys(row["task"] for row in self.summary()))

    def best_member(self, task: str | None = None) -> str:
        """The member with the best validation score, lower loss first among equals; the first one
        if nothing was validated. One that was stopped early is best only if all were. Test numbers
        cannot enter: they are not in the summary.

        Raises RunError if the members learned several tasks and none of them is named.
        """
        rows, known = self.summary(), self.tasks()
        if task not in known and (task is not None or len(known) > 1):
            raise RunError(
                f"{self.path}: expected one of its tasks, {', '.join(known)}; came "
                f"{task or 'none'}. Scores of different tasks are not compared: name a task, or a "
                "member."
            )

        def key(row: Mapping[str, str]) -> tuple[bool, float, float]:
            return rank(score_of(row), loss_of(row), stopped=bool(row["stopped"]))

        return min((row for row in rows if task in (None, row["task"])), key=key)["id"]

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
        return TrainedMember(id=member_id, network=network.to(device).eval(), card=card)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append to evaluations.jsonl what `evaluate` measured."""
        with (self.path / EVALUATIONS).open("a") as file:
            file.write(_line(record))

    def evaluations(self) -> list[dict[str, Any]]:
        """What `evaluate` measured so far."""
        return _read_lines(self.path / EVALUATIONS)

    def _refuse_another(self, config: TrainConfig, fingerprint: str) -> None:
        mine, theirs = config.progress_key(), self.config().progress_key()
        differing = [
            f"{name}: {theirs.get(name)!r} there, {mine[name]!r} asked for"
            for name in mine
            if mine[name] != theirs.get(name)
        ]
        before = self.environment()["fingerprint"]
        if before != fingerprint:
            differing.append(f"cache fingerprint: {before[:12]} there, {fingerprint[:12]} given")
        if differing:
            raise RunError(
                f"{self.path} holds another run:\n  "
                + "\n  ".join(differing)
                + "\nChoose another --out, or --overwrite."
            )

    def _write(self, name: str, text: str) -> None:
        replace_text(self.path / name, text)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of lines. Earlier versions wrote NaN, which is no JSON: None."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=lambda _: None) for line in lines]


def member_id(position: int) -> str:
    """Short and stable: m0, m1, …; the settings stand in the files beside it."""
    return f"m{position}"


def position_of(member: str) -> int:
    """The inverse of `member_id`."""
    return int(member.removeprefix("m"))


def score_of(row: Mapping[str, str]) -> float | None:
    """The validation score that ranks, in a line of summary.csv."""
    values = [row.get(f"val_{ranking}") for ranking, *_ in SCORES.values()]
    return number_of(next((value for value in values if value), ""))


def loss_of(row: Mapping[str, str]) -> float | None:
    """The validation loss in a line of summary.csv."""
    return number_of(row["val_loss"])


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
