"""Taps of any run of blocks: who hears what, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones.hooks import BlockHooks


class Block(nn.Module):
    """x + number; with more than its state if `more`, as blocks that give attention weights do."""

    def __init__(self, number: int, more: bool) -> None:
        super().__init__()
        self.number, self.more = number, more

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        if self.number < 0:
            raise ArithmeticError("broken")
        return (x + self.number, None) if self.more else x + self.number


def run(blocks: list[Block], x: Tensor, *, named: bool = False) -> None:
    for number, block in enumerate(blocks):
        out = block(x=x) if named and number == 0 else block(x)
        x = out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_a_sink_hears_what_enters_and_what_leaves(named: bool, more: bool) -> None:
    blocks = [Block(number, more) for number in (1, 10, 100)]
    hooks = BlockHooks(blocks, series="y")
    assert hooks.names == ("y0", "y1", "y2", "y3")
    heard: list[tuple[str, float]] = []
    run(blocks, torch.zeros(1), named=named)  # nobody listens
    with hooks.listening(lambda tap, x: heard.append((tap, x.item()))):
        run(blocks, torch.ones(1), named=named)
    run(blocks, torch.zeros(1), named=named)
    assert heard == [("y0", 1), ("y1", 2), ("y2", 12), ("y3", 112)]


def test_only_wanted_taps_are_heard_and_two_runs_keep_apart() -> None:
    encoder, decoder = ([Block(number, False) for number in (1, 2)] for _ in range(2))
    one, other = BlockHooks(encoder), BlockHooks(decoder, series="y")
    one.wanted = {"z2"}
    heard: list[str] = []
    with one.listening(lambda tap, _: heard.append(tap)):
        run([*encoder, *decoder], torch.zeros(1))
    with other.listening(lambda tap, _: heard.append(tap)):
        run([*encoder, *decoder], torch.zeros(1))
    assert heard == ["z2", "y0", "y1", "y2"]


def test_a_sink_hears_nothing_after_a_pass_that_failed() -> None:
    blocks = [Block(1, False), Block(-1, False)]
    hooks = BlockHooks(blocks)
    heard: list[str] = []
    with pytest.raises(ArithmeticError), hooks.listening(lambda tap, _: heard.append(tap)):
        run(blocks, torch.zeros(1))
    blocks[1].number = 1
    run(blocks, torch.zeros(1))
    assert heard == ["z0", "z1"]
