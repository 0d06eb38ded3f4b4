# SPDX-License-Identifier: Apache-2.0
"""A compiled chain takes what an uncompiled one takes: pairs, masks, aux outputs, hooks, autocast, transforms."""

import copy

import pytest
from torch import nn

from behaviour.common import (
    KINDS,
    WIDE,
    assert_close,
    assert_same,
    check_step,
    dropout_mlp,
    images,
    loss_of,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from behaviour.compiling import Masked, Within, compiled, counters, fresh_compiler, graphs  # noqa: F401
from revkernels.nn import PerBlock, is_recomputing
from revkernels.nn.chain import HalfStep, run


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        f = self.body(x)
        return f, {"loss": f.square().mean(), "name": "f"}


def check_compiled(pairs, x, activations, *args, steps=2, **kwargs):
    counters.clear()
    net, plain = twins(pairs, activations=activations)
    check_step(compiled(net, activations), plain, x, *args, steps=steps, **kwargs)
    if activations == "store":
        assert graphs() == 1


def test_pair(activations):
    check_compiled(pairs_of(norm_mlp, 2), (rows(5, 4), rows(5, 4)), activations)


def test_arguments(activations):
    mask, masks = rows(5, 4), [rows(5, 4) for _ in range(2)]
    pairs = [(Masked(), Within(mlp())) for _ in range(2)]
    check_compiled(pairs, rows(5, 8), activations, mask=mask, sides=[mask])
    check_compiled(pairs, rows(5, 8), activations, mask=PerBlock(masks), sides=masks)


def test_auxiliary_outputs(activations):
    check_compiled([(Auxiliary(), mlp()) for _ in range(2)], rows(5, 8), activations)


def test_channels_last(activations):
    x = images().detach().to(memory_format=torch.channels_last).requires_grad_()
    check_compiled(KINDS["conv"].pairs(2), x, activations)


def test_dropout(activations):
    """The masks are torch's own where the compiler leaves them to torch, as "aot_eager" does."""
    check_compiled(pairs_of(lambda: dropout_mlp(p=0.3), 2), rows(5, 8), activations)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_autocast(backend, activations):
    """The same bfloat16 products as uncompiled, and the same bits, also where autocast keeps casts from the forward to
    the recompute, as in what is not compiled, or by the backend "eager"."""
    net, _ = twins([(mlp().float(), mlp().float()) for _ in range(2)], activations=activations)
    network = compiled(copy.deepcopy(net), activations, backend)
    x = rows(5, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(network, x), step(net, x), tolerance=1e-6)


def test_hooks_of_blocks(activations):
    """A block with hooks breaks the graph in both modes, and they fire."""
    net, plain = twins(pairs_of(mlp, 2), activations=activations)
    fired = []
    net[1].register_forward_hook(lambda *_: fired.append(1))
    net.compile(backend="aot_eager")
    check_step(net, plain, rows(5, 8), steps=2)
    assert len(fired) == 2


class Watching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.seen = mlp(), []

    def forward(self, x):
        self.seen.append(is_recomputing())
        return self.body(x)


def test_a_branch_that_breaks_the_graph():
    """A branch may ask whether it is recomputed: the answer is not frozen into its graph."""
    branch = Watching()
    net, plain = twins([(branch, mlp())])
    check_step(compiled(net, "reconstruct"), plain, rows(5, 8), steps=2)
    assert branch.seen == [False, True] * 2


def test_compiled_training_step(activations):
    """Backward is called between compiled frames, where dynamo would look into the driver."""
    net, plain = twins(pairs_of(norm_mlp, 2), activations=activations)

    def train(network, x):
        y = network(x)
        loss_of(y).backward()
        return y * 2

    x = rows(5, 8)
    function = torch.compile(train, backend="aot_eager")
    for _ in range(2):
        leaves = [x.detach().clone().requires_grad_() for _ in range(2)]
        net.zero_grad()
        plain.zero_grad()
        assert_close(function(net, leaves[0]), train(plain, leaves[1]))
        assert_close(leaves[0].grad, leaves[1].grad)
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert_close(p.grad, q.grad)


def test_backward_alone_between_compiled_frames():
    """The forward was not compiled, so the recompute is not."""
    net, plain = twins(pairs_of(norm_mlp, 2))
    x = rows(5, 8)
    leaves = [x.detach().clone().requires_grad_() for _ in range(2)]
    torch.compile(lambda loss: (loss * 1).backward(), backend="aot_eager")(loss_of(net(leaves[0])))
    loss_of(plain(leaves[1])).backward()
    assert_close(leaves[0].grad, leaves[1].grad)


def test_inverse():
    net, _ = twins(pairs_of(mlp, 2))
    x = rows(5, 8, requires_grad=False)
    assert_close(torch.compile(net.inverse, backend="aot_eager")(net(x).detach()), x)


def test_half_steps_of_another_order(activations):
    """`run` with three streams: a branch of a sum, an odd number of half-steps."""
    branches = [mlp() for _ in range(5)]
    steps = [HalfStep(branch, k % 3, ((k + 1) % 3, (k + 2) % 3)) for k, branch in enumerate(branches)]

    def loss(x):
        return loss_of(run(steps, x, groups=3, activations=activations))

    x = rows(5, 12)
    expected, got = (torch.autograd.grad(f(x), x)[0] for f in (loss, torch.compile(loss, backend="aot_eager")))
    assert_close(got, expected)


def test_transforms():
    """torch.func inside compiled code: its tensors know no operators, and take plain torch."""
    net, plain = twins(pairs_of(mlp, 2), activations="store")
    x = rows(5, 8, requires_grad=False)
    for transform in (torch.func.grad, torch.func.jacrev):
        got = torch.compile(transform(lambda x: loss_of(net(x))), backend="aot_eager", fullgraph=True)(x)
        assert_close(got, transform(lambda x: loss_of(plain(x)))(x))


def test_errors_of_branches(activations):
    """A branch that changes the shape is named, compiled or not."""
    net, _ = twins([(nn.Linear(4, 5).to(WIDE), mlp())], activations=activations)
    net.compile(backend="aot_eager")
    with pytest.raises(ValueError, match="must keep the shape"):
        net(rows(5, 8))
