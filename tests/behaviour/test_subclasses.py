# SPDX-License-Identifier: Apache-2.0
"""Streams that are tensor subclasses without memory of their own: DTensors, nested tensors, and two tensors under one
name."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_raises,
    mlp,
    norm_mlp,
    pairs_of,
    rows,
    tensors_in,
    torch,
    twins,
)

distributed = pytest.importorskip("torch.distributed.tensor")
TwoTensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor


def layer_norm():
    return nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4)).to(WIDE)


@pytest.fixture(scope="module")
def mesh():
    """Of one process, this one."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def needs_batch_norm_of_dtensors(mesh):
    x = distributed.distribute_tensor(rows(5, 4), mesh, [distributed.Shard(0)])
    try:
        distributed.distribute_module(norm_mlp(), mesh)(x)
    except NotImplementedError as error:  # in torch 2.6
        pytest.skip(f"plain torch: {error}")


def parts(tensor):
    """As plain tensors."""
    if tensor.is_nested:
        return [tensor.values()]
    if isinstance(tensor, TwoTensor):
        return [tensor.a, tensor.b]
    return [tensor.full_tensor() if isinstance(tensor, distributed.DTensor) else tensor]


def run(network, x, wrap, order):
    leaves = [wrap(t.detach().clone()).requires_grad_() for t in tensors_in(x)]
    y = network(tuple(leaves) if isinstance(x, tuple) else leaves[0])
    learnt = [*leaves, *network.parameters()]
    loss = sum(t.square().sum() for t in tensors_in(y))
    gradients = torch.autograd.grad(loss, learnt, create_graph=order == 2)
    if order == 2:
        gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients[: len(leaves)]), learnt)
    return [part.detach() for t in (*tensors_in(y), *gradients) for part in parts(t)]


@pytest.mark.parametrize("make", [mlp, norm_mlp, layer_norm])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("activations", ["reconstruct", "store", rk.MemoryBudget("50%")], ids=str)
@pytest.mark.parametrize("kind", ["two tensors", "DTensor"])
def test_as_plain_pytorch(kind, activations, pair, make, mesh):
    """They are rebuilt by their own operators, into tensors of their own class."""

    def wrap(tensor):
        if kind == "DTensor":
            return distributed.distribute_tensor(tensor, mesh, [distributed.Shard(0)])
        return TwoTensor(tensor, 2 * tensor)

    net, plain = twins(pairs_of(make, 3), activations=activations)
    if kind == "DTensor":
        if make is norm_mlp:
            needs_batch_norm_of_dtensors(mesh)
        for network in (net, plain):
            distributed.distribute_module(network, mesh)
    x = rows(5, 8, requires_grad=False)
    for order in (1, 2):
        x = x.chunk(2, 1) if pair and torch.is_tensor(x) else x
        assert_all_close(run(net, x, wrap, order), run(plain, x, wrap, order))


@pytest.mark.parametrize("make", [mlp, layer_norm])
@pytest.mark.parametrize("activations", ["reconstruct", "store", rk.MemoryBudget("50%")], ids=str)
def test_nested_pairs(activations, make):
    """Sequences of different lengths, which are not cut: a pair of them."""
    net, plain = twins(pairs_of(make, 3), activations=activations)
    outcomes = []
    for network in (net, plain):
        torch.manual_seed(0)
        sequences = [torch.randn(n, 4, dtype=WIDE) for n in (3, 5)]
        x1 = torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
        x2 = (0.5 * x1).detach().requires_grad_()
        y1, y2 = network((x1, x2))
        gradients = torch.autograd.grad((y1 * y2).values().sum(), [x1, x2, *network.parameters()])
        outcomes.append([part for t in (y1, y2, *gradients) for part in parts(t)])
    assert_all_close(*outcomes)
    assert_raises(TypeError, ["x is a nested tensor", "a tuple of 2"], lambda: net(x1))
