# SPDX-License-Identifier: Apache-2.0
"""What hangs elsewhere in the backward, or was taken out by the forward: put back for the recompute, and no longer."""

import pytest
from torch import nn

from behaviour.common import WIDE, torch
from revkernels.autograd import output_check
from revkernels.nn import ReversibleBlock, ReversibleSequential

TENSOR = torch.ones(6, dtype=WIDE)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()
        self.mask, self.masks, self.all = TENSOR, {"a": TENSOR, "deeper": [TENSOR], "pair": (TENSOR,)}, [TENSOR]
        self.masks["learnt"] = nn.Parameter(TENSOR)

    def forward(self, x):
        held = self.masks["a"] * self.masks["deeper"][0] * self.masks["pair"][0] * self.masks["learnt"]
        return self.layer(x) * self.mask * held * self.all[0]


def _replaced(module, other):
    module.mask = module.masks["a"] = module.masks["deeper"][0] = module.all[0] = other
    module.masks["pair"] = (other,)
    module.masks["learnt"] = nn.Parameter(other)


def _replaced_lists(module, other):
    module.masks["deeper"], module.all[:] = [other], [other]


def _removed(module, other):
    del module.masks["a"]
    module.all.append(other)


def _cleared(module, other):
    module.masks.clear()
    module.all.clear()


@pytest.mark.parametrize("change", [_replaced, _replaced_lists, _removed, _cleared])
def test_what_hangs_elsewhere_now_is_put_back(change, monkeypatch):
    """Row 33: attributes and items of containers that are others in the backward; and afterwards they are again."""
    monkeypatch.setattr(output_check, "TIMES", 0)  # which would tell if it were not so
    torch.manual_seed(0)
    net = ReversibleSequential(*(ReversibleBlock(Holds(), Holds()) for _ in range(2)))
    x = torch.randn(3, 12, dtype=WIDE)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    y = net(x)
    other = torch.full((6,), 3.0, dtype=WIDE)
    for module in net.modules():
        if isinstance(module, Holds):
            change(module, other)
    y.square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10)
    for module in net.modules():
        if isinstance(module, Holds):
            if change is _replaced:
                assert module.mask is module.masks["a"] is module.masks["deeper"][0] is module.all[0] is other
                assert module.masks["pair"][0] is other and module.masks["learnt"].data_ptr() == other.data_ptr()
            elif change is _replaced_lists:
                assert module.masks["deeper"][0] is module.all[0] is other and len(module.all) == 1
            elif change is _cleared:
                assert module.masks == {} and module.all == []
            else:
                assert "a" not in module.masks and module.all[1] is other


class Takes(nn.Module):
    """Takes its numbers out of a list and a dictionary, one after another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()
        self.list = [torch.full((6,), 1.0 + i, dtype=WIDE) for i in range(4)]
        self.table = {i: torch.full((6,), 2.0 + i, dtype=WIDE) for i in range(4)}

    def forward(self, x):
        return torch.sin(self.layer(x) * self.list.pop()) * self.table.pop(len(self.table) - 1)


@pytest.mark.parametrize("forwards", [1, 2])
def test_what_a_forward_takes_out_is_there_again(forwards, monkeypatch):
    """Row 34: for the recompute, also of an earlier forward; and afterwards it is gone again."""
    monkeypatch.setattr(output_check, "TIMES", 0)  # which would tell if it were not so
    x = torch.randn(3, 12, dtype=WIDE)
    grads = []
    for activations in ("reconstruct", "store"):
        torch.manual_seed(0)
        branches = [Takes() for _ in range(4)]
        net = ReversibleSequential(*map(ReversibleBlock, branches[::2], branches[1::2]), activations=activations)
        for loss in [net(x).square().sum() for _ in range(forwards)]:
            loss.backward()
        grads.append([p.grad for p in net.parameters()])
        for branch in branches:
            assert len(branch.list) == 4 - forwards and list(branch.table) == list(range(4 - forwards))
    for got, expected in zip(*grads, strict=True):
        assert torch.allclose(got, expected, rtol=1e-10)
