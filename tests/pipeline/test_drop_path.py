"""Drop-path's draws: from seed, step and place alone; uniform; the same on every device."""

from __future__ import annotations

import pytest
import torch
from pretend_gpu import PretendGPU

from pipeline.training.drop_path import DropPath

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")


def dropped(drop_path: DropPath, steps: int, sites: int = 12, rows: int = 64) -> torch.Tensor:
    """(steps, K, sites, rows): 1 where a branch is dropped."""
    kept = [drop_path.keep(step, sites, rows) for step in range(steps)]
    return torch.stack([(keep == 0).double() for keep in kept if keep is not None])


def test_the_reference_of_the_hash() -> None:
    """SplitMix64's first outputs from seed 1234567, as its authors' C code gives them."""
    from pipeline.training.drop_path import _GAMMA, _mixed, _signed

    states = torch.tensor([_signed(1234567 + i * _GAMMA) for i in range(1, 6)])
    unsigned = [value % 2**64 for value in _mixed(states).tolist()]
    assert unsigned == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_member_draws_alone_what_it_draws_among_others() -> None:
    both = DropPath([3, 8], [0.3, 0.1], CPU)
    for step in (0, 1, 10**6):
        keep, alone = both.keep(step, 4, 7), DropPath([8], [0.1], CPU).keep(step, 4, 7)
        assert keep is not None and alone is not None
        assert torch.equal(keep[1:], alone)
        fewer = both.keep(step, 4, 7)
        assert fewer is not None and torch.equal(fewer, keep)


def test_rates_means_and_independence() -> None:
    rates = [0.1, 0.2, 0.5, 0.0]
    drops = dropped(DropPath([0, 1, 2, 3], rates, CPU), 400)  # 307,200 draws a member
    share = drops.mean(dim=(0, 2, 3))
    assert torch.allclose(share, torch.tensor(rates).double(), atol=5e-3) and share[3] == 0
    keep = DropPath([5], [0.25], CPU).keep(7, 2, 50_000)
    assert keep is not None and keep.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float(keep.mean()) - 1) < 0.01
    series = drops[:, :3].transpose(0, 1).flatten(1)
    between = torch.corrcoef(series).fill_diagonal_(0).abs().max()
    assert between < 0.01
    for lag in (1, 12, 64, 768):  # along rows, sites and steps
        one, other = series[:, :-lag], series[:, lag:]
        for a, b in zip(one, other, strict=True):
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.01


def test_nobody_drops() -> None:
    assert DropPath([0, 1], [0.0, 0.0], CPU).keep(0, 4, 4) is None
    assert DropPath([0], [0.5], CPU).keep(0, 0, 4) is None


def test_a_gpu_draws_the_same_and_is_sent_nothing() -> None:
    expected = DropPath([3, 8], [0.3, 0.1], CPU).keep(5, 4, 7)
    with PretendGPU() as gpu:
        drop_path = DropPath([3, 8], [0.3, 0.1], torch.device("cuda:0"))
        sent = list(gpu.blocking)
        keep = drop_path.keep(5, 4, 7)
        assert gpu.blocking == sent
        assert keep is not None and expected is not None and keep.tolist() == expected.tolist()
