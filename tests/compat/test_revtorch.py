# SPDX-License-Identifier: Apache-2.0
"""RevTorch's classes here: as plain torch in each option, and as RevTorch itself where that is right."""

import random

import pytest
from behaviour.common import (
    WIDE,
    assert_raises,
    check_step,
    dropout_mlp,
    mlp,
    norm_mlp,
    relative_error,
    rows,
    step,
    torch,
    unwritten,
)
from torch import nn

from compat.common import (
    InAutocast,
    check_against_peer,
    check_copies,
    check_gradients,
    check_signatures,
    couple,
    installed,
    plain,
    spelled,
)
from revkernels.compat import revtorch
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes

SIGNATURES = {
    "ReversibleBlock": "(f_block, g_block, split_along_dim=1, fix_random_seed=False)",
    "ReversibleSequence": "(reversible_blocks, eagerly_discard_variables=True)",
}


def blocks_of(make, depth, package=revtorch, **options):
    return nn.ModuleList([package.ReversibleBlock(make(), make(), **options) for _ in range(depth)])


def in_plain_torch(sequence, x):
    for block in sequence.reversible_blocks:
        x = couple((block.f_block, block.g_block), x, block.split_along_dim)
    return x


def sequence(make, depth, eagerly_discard_variables=True, **options):
    net = revtorch.ReversibleSequence(blocks_of(make, depth, **options), eagerly_discard_variables)
    return net, plain(net, in_plain_torch)


def test_signatures():
    check_signatures(revtorch, SIGNATURES)


@pytest.mark.parametrize("make", [mlp, norm_mlp, dropout_mlp], ids=["mlp", "norm", "dropout"])
@pytest.mark.parametrize("depth", [1, 3])
def test_steps_as_plain_torch(make, depth, backend):
    """Gradients, statistics counted once, the same masks, and the generator afterwards."""
    check_step(*sequence(make, depth), rows(5, 8), steps=2)


@pytest.mark.parametrize("fix_random_seed", [False, True])
@pytest.mark.parametrize("eagerly_discard_variables", [False, True])
def test_options_change_nothing(fix_random_seed, eagerly_discard_variables):
    """In particular nothing is reseeded: Python's generator and torch's are where plain torch leaves them."""
    pair = sequence(dropout_mlp, 2, eagerly_discard_variables, fix_random_seed=fix_random_seed)
    before = random.getstate()
    check_step(*pair, rows(5, 8))
    assert random.getstate() == before


def test_block_alone_has_gradients(backend):
    block = revtorch.ReversibleBlock(norm_mlp(), dropout_mlp())
    check_step(block, plain(block, lambda twin, x: couple((twin.f_block, twin.g_block), x)), rows(5, 8))


@pytest.mark.parametrize("split_along_dim", [0, 2, -1])
def test_split_along_dim(split_along_dim, backend):
    x = rows(4, 3, 8)
    check_step(*sequence(lambda: mlp(x.chunk(2, split_along_dim)[0].shape[-1]), 2, split_along_dim=split_along_dim), x)


def test_blocks_that_split_along_different_dimensions(backend):
    blocks = [*blocks_of(mlp, 2, split_along_dim=-1), *blocks_of(lambda: mlp(8), 1, split_along_dim=0)]
    net = revtorch.ReversibleSequence(nn.ModuleList([*blocks, *blocks_of(mlp, 1, split_along_dim=-1)]))
    check_step(net, plain(net, in_plain_torch), rows(6, 8))


def test_input_without_gradient_still_gives_parameters_theirs():
    net, twin = sequence(norm_mlp, 2)
    check_step(net, twin, rows(5, 8, requires_grad=False))
    assert all(p.grad is not None for p in net.parameters())


def test_derivatives():
    net, _ = sequence(lambda: mlp(2), 2)
    check_gradients(net, rows(2, 4))


def test_two_forwards_before_one_backward():
    """RevTorch keeps the seeds on the block, where the second forward overwrites the first's."""
    net, _ = sequence(dropout_mlp, 2, fix_random_seed=True)
    x = rows(5, 8)

    def gradient(again):
        torch.manual_seed(1)
        y = net(x)
        if again:
            net(x)
        return torch.autograd.grad(y.sum(), x)[0]

    assert torch.equal(gradient(False), gradient(True))


def test_autocast_in_the_backward(backend):
    """Branches run in bfloat16 both times: in RevTorch's backward they do not."""
    net, twin = sequence(lambda: mlp().float(), 2)
    check_step(InAutocast(net), InAutocast(twin), rows(5, 8, dtype=torch.float32), tolerance=1e-6)


def test_evaluation_and_no_grad():
    net, twin = sequence(norm_mlp, 2)
    x = rows(5, 8)
    net.eval(), twin.eval()
    check_step(net, twin, x)
    with torch.no_grad(), unwritten(net, x):
        assert not net(x).requires_grad


def test_hooks_of_a_block_fire(backend):
    """As in RevTorch, which calls its blocks; the results stay."""
    net, twin = sequence(norm_mlp, 3)
    seen = []
    net.reversible_blocks[1].register_forward_hook(lambda block, given, made: seen.append(made.shape))
    net.reversible_blocks[1].register_full_backward_hook(lambda block, dx, dy: seen.append(dy[0].shape))
    check_step(net, twin, rows(5, 8))
    assert seen == [(5, 8), (5, 8)]


def test_a_block_with_a_forward_of_its_own_is_called(backend):
    class Scaled(revtorch.ReversibleBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    def scaled_in_plain_torch(twin, x):
        return in_plain_torch(revtorch.ReversibleSequence(twin.reversible_blocks[:1]), x) * 2

    net = revtorch.ReversibleSequence(nn.ModuleList([Scaled(mlp(), mlp())]))
    check_step(net, plain(net, scaled_in_plain_torch), rows(5, 8))


def test_memory_is_that_of_one_block_at_any_depth():
    def branch():
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh()).to(WIDE)

    x = rows(64, 128, requires_grad=False)

    def peak(depth):
        net, _ = sequence(branch, depth)
        net(x).sum().backward()
        net.zero_grad(set_to_none=False)
        return peak_bytes(lambda: net(x).sum().backward())

    assert abs(peak(16) - peak(4)) <= x.nbytes


def test_changes_after_the_forward_are_refused():
    """Both are silent in RevTorch, and the gradient is wrong."""
    net, _ = sequence(mlp, 2)
    y = net(rows(5, 8))
    with torch.no_grad():
        net.reversible_blocks[1].g_block[0].weight.add_(1)
    assert_raises(ReconstructionError, ["reversible_blocks[1].g_block", "0.weight"], y.sum().backward)
    y = net(rows(5, 8)).mul_(2)
    assert_raises(ReconstructionError, ["output", "in place"], y.sum().backward)


def test_names_copies_and_casts():
    net, _ = sequence(norm_mlp, 2)
    assert list(net.state_dict())[:2] == [f"reversible_blocks.0.f_block.0.{name}" for name in ("weight", "bias")]
    assert [name for name, _ in net.reversible_blocks[0].named_children()] == ["f_block", "g_block"]
    check_copies(net, rows(5, 8))


def test_bad_arguments():
    block = revtorch.ReversibleBlock(mlp(), mlp())
    assert_raises(TypeError, ["reversible_blocks", "list", "ModuleList"], lambda: revtorch.ReversibleSequence([block]))
    assert_raises(
        TypeError,
        ["reversible_blocks[1]", "Linear", "ReversibleBlock"],
        lambda: revtorch.ReversibleSequence(nn.ModuleList([block, nn.Linear(2, 2)])),
    )
    theirs = type("ReversibleBlock", (nn.Module,), {"__module__": "revtorch.revtorch"})
    assert_raises(
        TypeError,
        ["[0] is a revtorch.revtorch.ReversibleBlock; it must be a revkernels.compat.revtorch.ReversibleBlock"],
        lambda: revtorch.ReversibleSequence(nn.ModuleList([theirs()])),
    )
    assert_raises(ValueError, ["(5, 7)", "even"], lambda: block(rows(5, 7)))


# ---- RevTorch itself


@pytest.mark.slow
def test_signatures_are_the_peers():
    peer = installed("revtorch")
    for name, expected in SIGNATURES.items():
        assert spelled(getattr(peer, name)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, norm_mlp], ids=["mlp", "norm"])
@pytest.mark.parametrize("split_along_dim", [1, 0])
def test_steps_as_the_peer(make, split_along_dim, backend):
    """Dropout apart, which RevTorch draws anew in the backward."""
    peer = installed("revtorch")
    x, width = rows(6, 8), 4 if split_along_dim == 1 else 8
    theirs = peer.ReversibleSequence(blocks_of(lambda: make(width), 3, peer, split_along_dim=split_along_dim))
    ours, _ = sequence(lambda: make(width), 3, split_along_dim=split_along_dim)
    check_against_peer(ours, theirs, x)


# What docs/migration.md says of RevTorch: the day that one of these fails, its row goes.


def peers(make, depth, peer, **options):
    net = peer.ReversibleSequence(blocks_of(make, depth, peer, **options))
    return net, plain(net, in_plain_torch)


@pytest.mark.slow
def test_the_peer_needs_an_input_that_requires_grad():
    net, _ = peers(mlp, 1, installed("revtorch"))
    with pytest.raises(RuntimeError, match="does not require grad"):
        net(rows(5, 8, requires_grad=False)).sum().backward()


@pytest.mark.slow
def test_the_peer_counts_statistics_twice():
    net, _ = peers(norm_mlp, 1, installed("revtorch"))
    net(rows(5, 8)).sum().backward()
    assert net.reversible_blocks[0].f_block[0].num_batches_tracked == 2


@pytest.mark.slow
@pytest.mark.parametrize("fix_random_seed", [False, True])
def test_the_peer_loses_dropout_masks_or_the_generator(fix_random_seed):
    net, twin = peers(dropout_mlp, 2, installed("revtorch"), fix_random_seed=fix_random_seed)
    got, expected = step(net, rows(5, 8)), step(twin, rows(5, 8))
    if fix_random_seed:
        assert not torch.equal(got.generator, expected.generator)
    else:
        assert relative_error(got.inputs[0], expected.inputs[0]) > 0.1


@pytest.mark.slow
def test_the_peer_loses_the_masks_of_the_first_of_two_forwards():
    net, _ = peers(dropout_mlp, 1, installed("revtorch"), fix_random_seed=True)
    x = rows(5, 8)

    def gradient(again):
        random.seed(1)
        y = net(x)
        if again:
            net(x)
        return torch.autograd.grad(y.sum(), x)[0]

    assert relative_error(gradient(True), gradient(False)) > 0.1


@pytest.mark.slow
def test_the_peers_autograd_grad_writes_to_grad():
    net, _ = peers(mlp, 1, installed("revtorch"))
    x = rows(5, 8)
    torch.autograd.grad(net(x).sum(), x)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.slow
def test_the_peer_is_silent_about_changes_after_the_forward():
    net, twin = peers(mlp, 1, installed("revtorch"))
    x = rows(5, 8)
    (right,) = torch.autograd.grad(twin(x).mul_(2).square().sum(), x)
    (got,) = torch.autograd.grad(net(x).mul_(2).square().sum(), x)
    assert relative_error(got, right) > 0.01
    y = net(x)
    with torch.no_grad():
        net.reversible_blocks[0].f_block[0].weight.add_(1)
    y.sum().backward()


@pytest.mark.slow
def test_the_peer_leaves_autocast_in_the_backward():
    net, twin = peers(lambda: mlp().float(), 1, installed("revtorch"))
    with pytest.raises(AssertionError):
        check_step(InAutocast(net), InAutocast(twin), rows(5, 8, dtype=torch.float32), tolerance=1e-6)
