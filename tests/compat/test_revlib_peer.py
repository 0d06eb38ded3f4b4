# SPDX-License-Identifier: Apache-2.0
"""RevLib 1.7.2 beside the shim, where it is installed: the same results, and what is wrong in it."""

import pytest
from behaviour.common import dropout_mlp, mlp, norm_mlp, relative_error, rows, step, torch

from compat.common import InAutocast, check_against_peer, installed, plain, spelled
from compat.test_revlib import FORWARD, SIGNATURES, Gated, branches_of, chain, in_plain_torch
from revkernels.compat import revlib
from revkernels.compat.revlib import MemoryModes

pytestmark = pytest.mark.slow


def test_signatures_are_the_peers():
    peer = installed("revlib")
    from revlib import utils

    for name, expected in SIGNATURES.items():
        assert spelled(getattr(utils if name == "momentum_net" else peer, name)) == expected
    assert spelled(peer.ReversibleSequential(mlp()).forward) == FORWARD
    assert {mode.name: int(mode) for mode in MemoryModes} == {mode.name: int(mode) for mode in peer.MemoryModes}


def test_couplings_of_the_peer_are_taken():
    peer = installed("revlib")
    couplings = {f"coupling_{way}": [getattr(peer, f"additive_coupling_{way}")] for way in ("forward", "inverse")}
    theirs = peer.ReversibleSequential(*[mlp() for _ in range(2)])
    check_against_peer(chain(mlp, 2, **couplings)[0], theirs, rows(6, 8))


@pytest.mark.parametrize("make", [mlp, norm_mlp, dropout_mlp], ids=["mlp", "norm", "dropout"])
@pytest.mark.parametrize("depth", [2, 5])
@pytest.mark.parametrize("memory_mode", ["no_savings", "autograd_function"])
def test_steps_as_the_peer(make, depth, memory_mode, backend):
    """The order of an odd number of half-steps included."""
    peer = installed("revlib")
    theirs = peer.ReversibleSequential(*[make() for _ in range(depth)], memory_mode=peer.MemoryModes[memory_mode])
    check_against_peer(chain(make, depth, memory_mode=MemoryModes[memory_mode])[0], theirs, rows(6, 8))


@pytest.mark.parametrize("split_dim", [0, 2])
def test_split_dim_as_the_peer(split_dim, backend):
    peer, x = installed("revlib"), rows(4, 3, 8)
    make = lambda: mlp(x.chunk(2, split_dim)[0].shape[-1])  # noqa: E731
    theirs = peer.ReversibleSequential(*[make() for _ in range(3)], split_dim=split_dim)
    check_against_peer(chain(make, 3, split_dim=split_dim)[0], theirs, x)


def test_momentum_net_as_the_peer(backend):
    installed("revlib")
    from revlib import utils

    theirs, ours = (package.momentum_net(*[mlp() for _ in range(3)], beta=0.8) for package in (utils, revlib))
    check_against_peer(ours, theirs, rows(6, 8))


# ---- what docs/migration.md says of RevLib: the day that one of these fails, its row goes.


def peers(make, depth, **options):
    net = installed("revlib").ReversibleSequential(*[make() for _ in range(depth)], **options)
    return net, plain(net, in_plain_torch)


@pytest.mark.parametrize("mode", ["checkpoint", "autograd_graph"])
def test_two_of_the_peers_memory_modes_have_no_backward(mode):
    net, _ = peers(mlp, 2, memory_mode=installed("revlib").MemoryModes[mode])
    with pytest.raises((RuntimeError, RecursionError)), pytest.warns():
        net(rows(5, 8)).sum().backward()


def test_the_peer_needs_an_input_that_requires_grad():
    net, _ = peers(mlp, 2)
    with pytest.raises(RuntimeError, match="does not require grad"):
        net(rows(5, 8, requires_grad=False)).sum().backward()


def test_the_peer_counts_statistics_twice():
    net, _ = peers(norm_mlp, 2)
    net(rows(5, 8)).sum().backward()
    assert branches_of(net)[0][0].num_batches_tracked == 2


def test_the_peers_autograd_grad_writes_to_grad():
    net, _ = peers(mlp, 2)
    x = rows(5, 8)
    torch.autograd.grad(net(x).sum(), x)
    assert all(p.grad is not None for p in net.parameters())


def test_the_peer_gives_no_gradient_to_side_inputs_that_are_no_leaves():
    net, _ = peers(Gated, 2)
    with pytest.raises(RuntimeError, match="second time"):
        net(rows(5, 8), rows(1, 4) * 2).sum().backward()


def test_the_peer_drops_layerwise_arguments():
    net, _ = peers(Gated, 2)
    x, scale = rows(5, 8), rows(1, 4)
    with pytest.raises(TypeError, match="scale"):
        net(x, layerwise_args_kwargs=[((scale,), {}), ((scale,), {})])


def test_the_peer_has_no_split_dim_None():  # noqa: N802
    net, _ = peers(lambda: mlp(8), 2, split_dim=None)
    with pytest.raises(TypeError, match="dim"):
        net(rows(5, 8))


def test_the_peer_is_silent_about_parameters_changed_after_the_forward():
    net, _ = peers(mlp, 2)
    y = net(rows(5, 8))
    with torch.no_grad():
        branches_of(net)[0][0].weight.add_(1)
    y.sum().backward()


def test_the_peer_leaves_autocast_in_the_backward():
    net, twin = peers(lambda: mlp().float(), 2)
    x = rows(5, 8, dtype=torch.float32)
    got, expected = step(InAutocast(net), x), step(InAutocast(twin), x)
    assert relative_error(got.inputs[0], expected.inputs[0]) > 1e-4
