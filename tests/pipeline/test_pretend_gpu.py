"""The code for GPUs, without one (`pretend_gpu.py`): it gives what the CPU gives, never waits for
the GPU within an epoch, never uses memory again too early, and fills no more than there is."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import extract_config, train_config
from pretend_gpu import OnGPU, PretendGPU

from cache import Reader, decode, verify
from pipeline import train as stage
from pipeline.config import Member
from pipeline.device import pick_device, pick_precision
from pipeline.errors import DeviceError, SettingError
from pipeline.extract import extract
from pipeline.features import operands, reading, writing
from pipeline.features.residence import choose_resident
from pipeline.records import EpochDone, PassStarted
from pipeline.runs.run import Run
from pipeline.side.layers import fused_attention
from pipeline.train import train
from pipeline.training import learners
from pipeline.training.cohort import Cohort
from pipeline.training.passes import Pass
from sidecache import evaluate, predict

CASES: list[tuple[str, dict[str, Any]]] = [
    ("last", {"rank": 4}),
    ("last", {"rank": 4, "gap": 2, "depth": 3, "heads": 2, "pool": "cls"}),
    ("lst", {"reduction": 4}),
    ("miet", {"rank": 4}),
    ("miet", {"rank": 4, "head": "last"}),
    ("miet", {"rank": 4, "modules": 5, "groups": 2, "gather": "normsum"}),
    ("attentive", {}),
    ("linear", {}),
    ("linear", {"pool": "clsmean", "last_n": 3}),
]
TASKS = ("colour", "marks", "warmth")  # a class, a multilabel and a regression target
LAST = Member(method="last", epochs=3, warmup_epochs=1, drop_path=0.2, settings={"rank": 4})
LINEAR = Member(method="linear", epochs=3, warmup_epochs=1, lr=1e-2)


def losses(run: Path) -> list[float]:
    return [line["train_loss"] for line in Run(run).metrics()]


def scores(run: Path) -> list[float]:
    return [line["val_loss"] for line in Run(run).metrics()]


def several(member: Member, count: int) -> list[Member]:
    return [dataclasses.replace(member, seed=seed) for seed in range(count)]


# --- as on the CPU ----------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "settings"), CASES)
def test_every_method_learns_every_kind_of_target_as_on_the_cpu(
    tasks_cache: Path, tmp_path: Path, method: str, settings: dict[str, Any], amp: bool
) -> None:
    drop_path = 0.0 if method in ("linear", "attentive") else 0.2
    member = Member(
        method=method, epochs=2, warmup_epochs=1, drop_path=drop_path, settings=settings
    )
    members = [
        dataclasses.replace(member, task=task, seed=seed) for task in TASKS for seed in (0, 1)
    ]
    config = train_config(tasks_cache, tmp_path / "cpu", *members, amp=amp, batch_size=12)
    train(config)
    with PretendGPU() as gpu:
        train(dataclasses.replace(config, device="cuda", out=str(tmp_path / "gpu")))
    tolerance = 5e-2 if amp else 1e-4
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
    assert scores(tmp_path / "gpu") == pytest.approx(scores(tmp_path / "cpu"), rel=tolerance)
    assert gpu.peak > 0


@pytest.mark.parametrize("resident", ["device", "ram", "disk"])
def test_every_residence_gives_the_same(zarr_cache: Path, tmp_path: Path, resident: str) -> None:
    """On the second of two GPUs."""
    config = train_config(zarr_cache, tmp_path / "cpu", *several(LAST, 2), LINEAR, batch_size=2)
    train(config)
    records: list[object] = []
    with PretendGPU(number=1):
        changes = {"device": "cuda:1", "resident": resident, "out": str(tmp_path / "gpu")}
        train(dataclasses.replace(config, **changes), records.append)
        (start,) = [record for record in records if isinstance(record, PassStarted)]
        assert (start.resident, start.device) == (resident, "pretended")
        (ours,) = evaluate(tmp_path / "gpu", device="cuda:1", amp=False)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    (theirs,) = evaluate(tmp_path / "cpu", device="cpu", amp=False)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"dtype": "int8", "gather": "normsum", "gather_pooled": True},
        {"model": "test_convnext", "img_size": (64, 64)},
    ],
    ids=["float32", "float16", "int8 sums", "stages"],
)
def test_extraction_gives_the_same(images: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """On the second of two GPUs, which no default stream is of."""
    for device in ("cpu", "cuda:1"):
        with PretendGPU(number=1):
            extract(extract_config(images, tmp_path / f"{device}.zarr", device=device, **changes))
        assert verify(tmp_path / f"{device}.zarr").ok
    with Reader(tmp_path / "cuda:1.zarr") as ours, Reader(tmp_path / "cpu.zarr") as theirs:
        assert ours.fingerprint == theirs.fingerprint
        for stack in ours.manifest.stacks:
            rows, storage = range(ours.rows), ours.manifest.storage
            one, other = (
                decode(r.read(rows, stack=stack.name), storage).astype(np.float64)
                for r in (ours, theirs)
            )
            rounding = {"float32": 1e-5, "float16": 1e-3, "int8": 2e-2}[storage]
            assert np.abs(one - other).max() <= rounding * np.abs(other).max()


def test_live_images_give_the_same(
    images: Path, zarr_cache: Path, tmp_path: Path, no_hub: None
) -> None:
    train(train_config(zarr_cache, tmp_path / "run", LAST))
    photos = [images / "test" / "red"]
    (theirs,) = evaluate(tmp_path / "run", images=str(images), device="cpu", amp=False)
    predicted = predict(tmp_path / "run", photos, device="cpu", amp=False)
    with PretendGPU():
        (ours,) = evaluate(tmp_path / "run", images=str(images), device="cuda", amp=False)
        found = predict(tmp_path / "run", photos, device="cuda", amp=False)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    for one, other in zip(found, predicted, strict=True):
        assert one.classes == other.classes
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-3)


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_upon_another_device(
    zarr_cache: Path, tmp_path: Path, first: str, then: str
) -> None:
    """Interrupted after its first epoch; a GPU stacks all members, a CPU two at a time."""
    members = [*several(LAST, 5), LINEAR]
    train(train_config(zarr_cache, tmp_path / "whole", *members))

    def stop(record: object) -> None:
        if isinstance(record, EpochDone):
            raise KeyboardInterrupt

    config = train_config(zarr_cache, tmp_path / "moved", *members)
    with PretendGPU():
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(config, device=first), stop)
        assert train(dataclasses.replace(config, device=then)).epochs_trained == 2
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


# --- no wait, no memory used too early --------------------------------------------------------


def without_checkpoints(patch: pytest.MonkeyPatch) -> None:
    """They wait for the GPU, too: every half minute, which a busy machine may take."""
    patch.setattr("pipeline.training.saver.CHECKPOINT_SECONDS", math.inf)


@pytest.mark.parametrize("resident", ["device", "ram", "disk"])
def test_nothing_waits_for_the_gpu_within_an_epoch(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: str
) -> None:
    """As often with six steps an epoch as with two: at its ends."""
    without_checkpoints(monkeypatch)
    waits = []
    for batch_size in (2, 6):
        config = train_config(
            zarr_cache, tmp_path / str(batch_size), *several(LAST, 3), LINEAR,
            batch_size=batch_size, resident=resident, device="cuda",
        )  # fmt: skip
        with PretendGPU() as gpu:
            train(config)
        waits.append(gpu.blocking)
    assert waits[0] == waits[1]


def test_validation_waits_at_its_end_alone(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_checkpoints(monkeypatch)
    waits = []
    for size in (1, 6):
        monkeypatch.setattr("pipeline.training.scoring.EVAL_BATCH", size)
        with PretendGPU() as gpu:
            train(train_config(zarr_cache, tmp_path / str(size), LAST, LINEAR, device="cuda"))
        waits.append(gpu.blocking)
    assert waits[0] == waits[1]


def without_number(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stage, "pick_device", lambda _: torch.device("cuda"))  # not "cuda:1"


def without_events(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reading, "record_event", lambda _: None)
    patch.setattr(operands, "_CHUNK_BYTES", 1)  # loading, too, then uses its buffers again


def with_events_of_another_gpu(patch: pytest.MonkeyPatch) -> None:
    def record(_: object) -> Any:
        event = torch.cuda.Event()
        event.record()
        return event

    patch.setattr(reading, "record_event", record)


def with_an_index_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    real = operands.Batches._select
    patch.setattr(
        operands.Batches, "_select", lambda self, room, place, _: real(self, room, place, place)
    )


@pytest.mark.parametrize(
    ("fault", "resident", "message"),
    [
        (without_number, "device", "pin"),
        (without_events, "device", "used again before its copy ended"),
        (without_events, "disk", "used again before its copy ended"),
        (with_events_of_another_gpu, "disk", "used again before its copy ended"),
        (with_an_index_on_the_cpu, "device", "same device"),
    ],
)
def test_the_pretended_gpu_finds_faults(
    zarr_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    resident: str,
    message: str,
) -> None:
    """What it was built for: these were, or would be, faults of this code on a real one."""
    fault(monkeypatch)
    config = train_config(
        zarr_cache, tmp_path / "run", LINEAR, batch_size=1, device="cuda:1", resident=resident
    )
    with PretendGPU(number=1), pytest.raises((RuntimeError, AssertionError), match=message):
        train(config)


def test_the_pretended_gpu_counts_a_wait_at_every_step(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Cohort.step

    def step(self: Any, *arguments: Any) -> None:
        torch.tensor([1.0], device="cuda")
        real(self, *arguments)

    without_checkpoints(monkeypatch)
    monkeypatch.setattr(Cohort, "step", step)
    waits = []
    for size in (4, 6):  # three steps an epoch, and two
        with PretendGPU() as gpu:
            config = train_config(
                zarr_cache, tmp_path / str(size), LINEAR, batch_size=size, device="cuda"
            )
            train(config)
        waits.append(len(gpu.blocking))
    assert waits[0] - waits[1] == LINEAR.epochs


def test_a_writer_that_does_not_wait_is_found(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "record_event", lambda _: None)
    with PretendGPU(), pytest.raises(Exception, match="NaN or infinity"):
        extract(extract_config(images, tmp_path / "c.zarr", device="cuda"))


def test_extraction_waits_for_its_own_batch_alone(images: Path, tmp_path: Path) -> None:
    """As often for many batches as for few; reading images from pinned memory is DataLoader's."""
    waits = []
    for size in (2, 8):
        with PretendGPU() as gpu:
            config = extract_config(
                images, tmp_path / f"{size}.zarr", device="cuda", batch_size=size, dtype="int8"
            )
            extract(config)
        waits.append(gpu.blocking)
    assert waits[0] == waits[1]


# --- memory -----------------------------------------------------------------------------------


def run_in(memory: int, config: Any) -> tuple[PretendGPU, PassStarted]:
    records: list[object] = []
    with PretendGPU(memory) as gpu:
        train(dataclasses.replace(config, device="cuda"), records.append)
    (start,) = [record for record in records if isinstance(record, PassStarted)]
    return gpu, start


def test_features_leave_room_for_a_step_of_all_members(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(zarr_cache, tmp_path / "large", *several(LAST, 6))
    large, start = run_in(2**30, config)
    assert start.resident == "device"
    streamed = dataclasses.replace(config, out=str(tmp_path / "ram"), resident="ram")
    needed = run_in(2**30, streamed)[0].peak
    assert large.peak > needed + start.bytes / 2

    tight = int(needed + start.bytes * 0.9)  # both fit only if the step were forgotten
    monkeypatch.setattr(learners, "STEP_SHARE", 1.0)
    gpu, start = run_in(tight, dataclasses.replace(config, out=str(tmp_path / "tight")))
    assert start.resident == "ram" and gpu.peak <= tight
    monkeypatch.setattr(learners, "step_bytes", lambda *_: 0)
    with pytest.raises(DeviceError, match=r"memory is full.*--resident ram or disk"):
        run_in(tight, dataclasses.replace(config, out=str(tmp_path / "forgotten"),
                                          resident="device"))  # fmt: skip


def test_members_beyond_the_memory_take_turns(
    zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(zarr_cache, tmp_path / "cpu", *several(LAST, 4), resident="ram")
    train(config)
    sizes: list[list[int]] = []
    real = learners.make_cohorts

    def spy(*arguments: Any, **named: Any) -> Any:
        cohorts = real(*arguments, **named)
        sizes.append([len(cohort.members) for cohort in cohorts])
        return cohorts

    monkeypatch.setattr(learners, "make_cohorts", spy)
    whole, _ = run_in(2**30, dataclasses.replace(config, out=str(tmp_path / "whole")))
    assert sizes == [[4]]
    sizes.clear()
    run_in(int(whole.peak * 0.8), dataclasses.replace(config, out=str(tmp_path / "turns")))
    assert sizes[0] == [4] and len(sizes[-1]) > 1
    assert losses(tmp_path / "turns") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


def test_too_little_memory_is_an_error_that_helps(zarr_cache: Path, tmp_path: Path) -> None:
    config = train_config(zarr_cache, tmp_path / "run", LAST)
    with pytest.raises(DeviceError, match=r"GPU's memory is full.*smaller --batch-size"):
        run_in(100_000, config)
    assert not (tmp_path / "run").exists()
    with PretendGPU(100_000), pytest.raises(SettingError, match=r"beside 0\.09 GB for a step"):
        choose_resident("device", 10**9, pick_device("cuda"), 90_000_000)


def test_extraction_says_which_flag_frees_memory(images: Path, tmp_path: Path) -> None:
    with PretendGPU() as gpu:
        extract(extract_config(images, tmp_path / "a.zarr", device="cuda", batch_size=2))
    with (
        PretendGPU(gpu.peak + 50_000),
        pytest.raises(DeviceError, match=r"GPU's memory is full.*a smaller --batch-size"),
    ):
        extract(extract_config(images, tmp_path / "b.zarr", device="cuda", batch_size=24))


def test_what_has_ended_leaves_the_gpu(zarr_cache: Path, tmp_path: Path) -> None:
    """LAST for one epoch, linear for three: after the first, LAST's operands and weights go."""
    used: list[int] = []
    networks: list[weakref.ref[Any]] = []
    real = Pass._train_epoch

    def spy(self: Any, epoch: int) -> None:
        gc.collect()
        used.append(torch.cuda.memory_allocated())
        if not networks:
            networks.extend(weakref.ref(c.network) for c in self.learners.cohorts.values())
        real(self, epoch)
        gc.collect()
        alive = [ref() is not None for ref in networks]
        assert alive == ([True, True] if epoch == 0 else [False, True])

    short = dataclasses.replace(LAST, epochs=1, warmup_epochs=0)
    config = train_config(zarr_cache, tmp_path / "run", short, LINEAR, device="cuda")
    with pytest.MonkeyPatch.context() as patch, PretendGPU():
        patch.setattr(Pass, "_train_epoch", spy)
        train(config)
    alone = train_config(zarr_cache, tmp_path / "alone", LINEAR, device="cuda")
    before = list(used)
    used.clear()
    with pytest.MonkeyPatch.context() as patch, PretendGPU():
        patch.setattr(Pass, "_train_epoch", lambda s, e: (used.append(
            torch.cuda.memory_allocated()), real(s, e))[1])  # fmt: skip
        train(alone)
    assert before[1] < before[0] / 2
    assert before[1] == pytest.approx(used[1], rel=0.1)


def test_attention_of_more_than_a_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.side.layers.MOST_BLOCKS", 3)
    q, k, v = torch.randn(3, 8, 2, 5, 4, dtype=torch.float64)
    expected = torch.softmax(q @ k.mT, dim=-1) @ v
    with pytest.MonkeyPatch.context() as patch:
        real, sizes = torch.nn.functional.scaled_dot_product_attention, []
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *a, **n: (sizes.append(len(a[0])), real(*a, **n))[1],
        )
        torch.testing.assert_close(fused_attention(q, k, v), expected)
    assert sizes == [3, 3, 2]


# --- which device, which precision ------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_comes_with_its_number(name: str) -> None:
    with PretendGPU():
        assert pick_device(name) == torch.device("cuda:0")
        with pytest.raises(DeviceError, match="this machine has cpu, cuda:0"):
            pick_device("cuda:1")


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)]
)
def test_emulated_bfloat16_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    """A T4 (7.5) says that it supports bfloat16; it emulates it."""
    with PretendGPU():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert pick_precision(pick_device("cuda"), None) == expected
        assert pick_precision(pick_device("cuda"), True) == torch.bfloat16


@pytest.mark.parametrize("command", ["extract", "train", "evaluate"])
def test_float32_is_not_tf32(
    images: Path, zarr_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    seen: list[tuple[bool, bool]] = []

    def look(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            backends = torch.backends
            seen.append((backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32))
            return real(*arguments, **named)

        return call

    if command == "evaluate":
        train(train_config(zarr_cache, tmp_path / "run", LINEAR))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", look(torch.nn.functional.layer_norm))
    match command:
        case "extract":
            extract(extract_config(images, tmp_path / "c.zarr"))
        case "train":
            train(train_config(zarr_cache, tmp_path / "run", LINEAR))
        case _:
            evaluate(tmp_path / "run", device="cpu", amp=False)
    assert seen and set(seen) == {(False, False)}
    assert torch.backends.cudnn.allow_tf32


def test_the_pretended_gpu_keeps_a_gpus_rules() -> None:
    with PretendGPU() as gpu:
        x = torch.ones(3, 4, device="cuda").requires_grad_()
        assert isinstance(x, OnGPU) and x.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3, 4)
        with pytest.raises(RuntimeError, match="pin"):
            x.detach().new_empty(2, pin_memory=True)
        (x * 2).square().sum().backward()
        assert x.grad is not None and x.grad.tolist() == [[8.0] * 4] * 3
        assert gpu.blocking == ["tolist ?"]
        host = torch.empty(3, 4, pin_memory=True)
        host.copy_(x.detach(), non_blocking=True)
        assert host.isnan().all()
        torch.cuda.synchronize()
        assert host.tolist() == [[1.0] * 4] * 3
    with PretendGPU(2**20), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**20, device="cuda")
