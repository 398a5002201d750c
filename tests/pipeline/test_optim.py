"""MemberAdamW equals torch's AdamW member by member; schedules have the stated shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import Member
from pipeline.training.optim import MemberAdamW, learning_rate

pytestmark = pytest.mark.numerics


class Toy(nn.Module):
    def __init__(self, members: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(members, 3, 4))
        self.bias = nn.Parameter(torch.randn(members, 3))


def test_equals_torch_adamw_with_settings_of_its_own_for_each_member() -> None:
    lr, decay = [1e-2, 3e-2, 1e-3], [0.0, 0.5, 0.05]
    toy = Toy(3)
    twins = [
        {name: nn.Parameter(p[k].detach().clone()) for name, p in toy.named_parameters()}
        for k in range(3)
    ]
    theirs = [
        torch.optim.AdamW(
            [
                {"params": [twin["weight"]], "weight_decay": decay[k]},
                {"params": [twin["bias"]], "weight_decay": 0.0},
            ],
            lr=lr[k],
        )
        for k, twin in enumerate(twins)
    ]
    ours = MemberAdamW(toy, decay, lambda name: name == "weight")
    x = torch.randn(3, 5, 4)
    for _ in range(20):
        ours.zero_gradient()
        ((x @ toy.weight.mT + toy.bias[:, None]) ** 3).sum().backward()
        ours.step(torch.tensor(lr), torch.ones(3, dtype=torch.bool))
        for k, (twin, optimiser) in enumerate(zip(twins, theirs, strict=True)):
            optimiser.zero_grad()
            ((x[k] @ twin["weight"].T + twin["bias"]) ** 3).sum().backward()
            optimiser.step()
    for k, twin in enumerate(twins):
        torch.testing.assert_close(toy.weight[k], twin["weight"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(toy.bias[k], twin["bias"], rtol=1e-5, atol=1e-6)


def test_a_stopped_member_keeps_its_parameters_whatever_its_gradient() -> None:
    toy = Toy(2)
    ours = MemberAdamW(toy, [0.1, 0.1], lambda name: True)
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    for parameter in toy.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(1.0)
        parameter.grad[0] = float("nan")
    ours.step(torch.tensor([1.0, 1.0]), torch.tensor([False, True]))
    for name, parameter in toy.named_parameters():
        assert torch.equal(parameter[0], before[name][0])
        assert not torch.equal(parameter[1], before[name][1])
        assert parameter[1].isfinite().all()


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 1e-7), (5, 0.5), (10, 1.0), (60, 0.5), (110, 0.0), (200, 0.0)],
)
def test_cosine_with_warm_up(epoch: float, expected: float) -> None:
    member = Member(method="last", lr=1.0, epochs=110, warmup_epochs=10)
    assert learning_rate(member, epoch) == pytest.approx(expected, abs=1e-6)


def test_constant_schedule_ends_at_its_epochs() -> None:
    member = Member(method="last", lr=0.3, epochs=4, warmup_epochs=0, sched="constant")
    assert [learning_rate(member, e) for e in (0, 3.9, 4)] == [0.3, 0.3, 0.0]
