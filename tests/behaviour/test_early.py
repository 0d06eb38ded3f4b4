# SPDX-License-Identifier: Apache-2.0
"""Row 22 for optimizers that step inside the backward, where a branch's last parameter asks for nothing saved."""

import pytest
from torch import nn

from behaviour.common import WIDE, assert_all_close, loss_of, mlp, pairs_of, rows, torch, twins
from revkernels import MemoryBudget
from revkernels.autograd.early_recompute import leaf_comes_first
from revkernels.nn import ReversibleBlock, checkpoint


class Ends(nn.Module):
    """An MLP, and something with a parameter behind it."""

    def __init__(self, end):
        super().__init__()
        self.inner, self.end, self.calls = mlp(), end, 0
        self.bias = nn.Parameter(torch.randn(4, dtype=WIDE))

    def forward(self, h):
        self.calls += 1
        return self.end(self.inner(h), self.bias)


def with_aux(f, bias):
    return f + bias, f.mean()


ENDS = {
    "bias": lambda f, bias: f + bias,
    "view": lambda f, bias: (f.t() - bias[:, None]).t(),
    "alone": lambda f, bias: bias.expand_as(f),
    "in place": lambda f, bias: f.add_(bias),
    "aux": with_aux,
    "in aux": lambda f, bias: (f.tanh(), {"loss": (f + bias).mean(), "none": None}),
}


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "data"])
@pytest.mark.parametrize("end", ENDS)
def test_optimizer_steps_inside_the_backward(end, through_data, options):
    """Row 22: a bias that is stepped as soon as its gradient is there is, in the recompute, what it was."""
    nets = twins(pairs_of(lambda: Ends(ENDS[end]), 3), **options)
    check_steps_inside_the_backward(nets, through_data)
    if options["activations"] == "reconstruct":
        assert all(branch.calls <= 6 for block in nets[0] for branch in block.branches)


@pytest.mark.parametrize("budget", ["0%", "50%", "100%"])
def test_under_a_memory_budget(budget):
    """The same, with some half-steps kept."""
    nets = twins(pairs_of(lambda: Ends(ENDS["bias"]), 3), activations=MemoryBudget(budget))
    check_steps_inside_the_backward(nets, True)


class Places(nn.Module):
    """A stem's end, which has its gradient first."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(5, 8, dtype=WIDE))

    def forward(self, x):
        return x + self.places


class Model(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.stem, self.head = call, nn.Sequential(mlp(8, 8), Places()), mlp(8, 8)

    def forward(self, x):
        return self.head(self.call(self.stem, x).tanh())


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "data"])
def test_in_a_checkpoint(through_data):
    """Row 29: what `nn.checkpoint` called is run again as it was too."""
    plain, net = Model(lambda stem, x: stem(x)), Model(checkpoint)
    net.load_state_dict(plain.state_dict())
    check_steps_inside_the_backward((net, plain), through_data)


def check_steps_inside_the_backward(nets, through_data):
    x, results = [rows() for _ in range(3)], []
    for network in nets:

        def step_now(p):
            with torch.no_grad():
                (p.data if through_data else p).sub_(p.grad, alpha=0.1)
            p.grad = None

        for p in network.parameters():
            p.register_post_accumulate_grad_hook(step_now)
        leaves = [each.detach().clone().requires_grad_() for each in x]
        for leaf in leaves:
            loss_of(network(leaf)).backward()
        results.append([*(leaf.grad for leaf in leaves), *network.parameters()])
    assert_all_close(*results)


@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(mlp(), nn.Dropout(0.1)), nn.Identity, lambda: torch.sin])
def test_most_branches_need_no_look(make):
    """What asks for something saved first is left to ask, and what only passes its input on."""
    read = rows(3, 4) * 2
    assert not leaf_comes_first(make()(read), read)


def test_nothing_is_run_for_a_bias_alone():
    """Row 3: where nothing was saved, nothing is rebuilt."""
    branch = Ends(ENDS["alone"])
    net = ReversibleBlock(branch, nn.Identity())
    net(rows(requires_grad=False)).sum().backward()
    assert branch.calls == 1 and branch.bias.grad is not None
