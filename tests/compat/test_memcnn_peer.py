# SPDX-License-Identifier: Apache-2.0
"""MemCNN 1.5.2 beside the shim, where it is installed: the same results, its own tests, and what is wrong in it."""

import re

import pytest
from behaviour.common import check_step, dropout_mlp, mlp, norm_mlp, relative_error, rows, step, torch
from torch import nn

from compat.common import InAutocast, check_against_peer, installed, own_tests, plain, spelled
from compat.memcnn_networks import couplings_in, in_plain_torch
from compat.test_memcnn import SIGNATURES
from revkernels.compat import memcnn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:TypedStorage", "ignore::DeprecationWarning"),
]


def stack(package, make, depth=2, split_dim=1, **options):
    wrap, couple = package.InvertibleModuleWrapper, package.AdditiveCoupling
    return nn.Sequential(*[wrap(couple(make(), make(), split_dim=split_dim), **options) for _ in range(depth)])


def test_signatures_are_the_peers():
    peer = installed("memcnn")
    from memcnn.models import additive

    for name, expected in SIGNATURES.items():
        assert spelled(getattr(additive if name == "AdditiveBlock" else peer, name)) == expected


@pytest.mark.parametrize("make", [mlp, norm_mlp], ids=["mlp", "norm"])
@pytest.mark.parametrize("split_dim", [1, 0])
def test_steps_as_the_peer(make, split_dim, backend):
    """Dropout apart, which MemCNN draws anew in the backward. Weights are read from MemCNN's state_dict."""
    peer, width = installed("memcnn"), 4 if split_dim == 1 else 8
    theirs, ours = (stack(package, lambda: make(width), split_dim=split_dim) for package in (peer, memcnn))
    check_against_peer(ours, theirs, rows(6, 8))


@pytest.mark.parametrize("make", [mlp, norm_mlp], ids=["mlp", "norm"])
def test_inverse_steps_as_the_peer(make, backend):
    peer = installed("memcnn")
    theirs, ours = (stack(package, make, 1)[0] for package in (peer, memcnn))
    ours.load_state_dict(theirs.state_dict())
    for network in (theirs, ours):
        network.forward = network.inverse
    check_against_peer(ours, theirs, rows(6, 8))


# ---- its own tests

TESTS = ["couplings", "is_invertible_module", "multi", "resnet", "revop", "split_dim"]

#: Which of them cannot pass, by what they ask for.
CANNOT = {
    "an affine coupling": [
        r"test_coupling_implementations_against_reference\[.*affine",
        r"test_invertible_module_wrapper_fwd_bwd\[.*fn[12]\]",
        r"test_chained_invertible_module_wrapper\[affine",
        r"test_invertible_module_wrapper_simple_inverse\[affine",
        r"test_normal_vs_invertible_module_wrapper\[affine",
    ],
    "a wrapped module that is no coupling": [
        r"test_is_invertible_module_shared_tensors",
        r"test_multi\[False",
        r"test_invertible_module_wrapper_fwd_bwd\[.*fn3\]",
    ],
    ".grad on tensors that are no leaves": [r"test_chained_invertible_module_wrapper_shared_fwd_and_bwd_train_passes"],
}
EMPTIED = [
    r"test_invertible_module_wrapper_disabled_versus_enabled",
    r"test_invertible_module_wrapper_fwd_bwd\[(?!.*True-True-(True|False)-fn0).*fn0\]",
]


@pytest.mark.parametrize("emptied", [True, False])
def test_the_peers_own_tests(emptied, tmp_path):
    """All of them pass but these, first as they are, then without the question whether the input was emptied."""
    files = [f"models/tests/test_{name}.py" for name in TESTS]
    neutral = {} if emptied else {"is_memory_cleared": True}
    outcomes = own_tests("memcnn", ["memcnn.models.resnet"], files, tmp_path, neutral)
    cannot = [pattern for patterns in CANNOT.values() for pattern in patterns] + EMPTIED * emptied
    assert len(outcomes) > 100
    wrong = [
        f"{test}: {outcome}"
        for test, outcome in outcomes.items()
        if outcome != ("failed" if any(re.search(pattern, test) for pattern in cannot) else "passed")
        and not (outcome == "skipped" and "cuda" in test)
    ]
    assert not wrong


# ---- what docs/migration.md says of MemCNN: the day that one of these fails, its row goes


def peers(make, depth=2, **options):
    net = stack(installed("memcnn"), make, depth, **options)
    return net, plain(net, _in_plain_torch)


def _in_plain_torch(network, x):
    from memcnn import AdditiveCoupling

    return in_plain_torch(network, x, AdditiveCoupling)


def test_the_peer_empties_its_input():
    net, _ = peers(mlp, 1)
    whole = rows(6, 8, requires_grad=False)
    with torch.no_grad():
        net(whole[:2])
    assert whole.untyped_storage().nbytes() == 0


def test_the_peer_doubles_the_gradient_of_a_leaf():
    net, twin = peers(mlp, 1)
    x = rows(5, 8)
    assert relative_error(step(net, x).inputs[0], 2 * step(twin, x).inputs[0]) < 1e-12


@pytest.mark.parametrize("preserve_rng_state", [False, True])
def test_the_peer_loses_dropout_masks(preserve_rng_state):
    net, twin = peers(dropout_mlp, preserve_rng_state=preserve_rng_state)
    x = rows(5, 8)
    torch.manual_seed(1)
    (net(x * 1)).sum().backward()
    got, x.grad = x.grad, None
    torch.manual_seed(1)
    twin(x * 1).sum().backward()
    assert relative_error(got, x.grad) > 0.1


def test_the_peer_counts_statistics_three_times():
    net, _ = peers(norm_mlp, 1)
    net(rows(5, 8) * 1).sum().backward()
    assert couplings_in(net, installed("memcnn").AdditiveCoupling)[0].Fm[0].num_batches_tracked == 3


def test_the_peer_refuses_autograd_grad_and_a_second_backward():
    net, _ = peers(mlp, 1)
    x = rows(5, 8)
    with pytest.raises(RuntimeError, match=r"not compatible with .grad\(\)"):
        torch.autograd.grad(net(x * 1).sum(), x)
    y = net(x * 1).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="num_bwd_passes"):
        y.backward()


def test_the_peer_is_silent_about_changes_after_the_forward():
    net, twin = peers(mlp, 1)
    x = rows(5, 8)
    net(x * 1).mul_(2).square().sum().backward()
    got, x.grad = x.grad, None
    twin(x * 1).mul_(2).square().sum().backward()
    assert relative_error(got, x.grad) > 0.01
    y = net(x * 1)
    with torch.no_grad():
        net[0]._fn.Fm[0].weight.add_(1)
    y.sum().backward()


def test_the_peer_passes_hooks_by():
    net, _ = peers(mlp, 1)
    fired = []
    net[0]._fn.Fm.register_forward_hook(lambda *given: fired.append(1))
    net(rows(5, 8) * 1).sum().backward()
    assert not fired


def test_the_peer_leaves_autocast_in_the_backward():
    net, twin = peers(lambda: mlp().float(), 1)
    x = rows(5, 8, dtype=torch.float32)
    behind = nn.Sequential(nn.Identity(), net), nn.Sequential(nn.Identity(), twin)
    with pytest.raises(AssertionError, match="relative error"):
        check_step(*map(InAutocast, behind), x, tolerance=1e-4)


@pytest.mark.parametrize("wrapped", ["wrapper", "Sequential"])
def test_the_peer_cannot_wrap_several(wrapped):
    peer = installed("memcnn")
    inner = peer.InvertibleModuleWrapper(peer.AdditiveCoupling(mlp()))
    net = peer.InvertibleModuleWrapper(inner if wrapped == "wrapper" else nn.Sequential(inner))
    with pytest.raises((RuntimeError, AttributeError)):
        net(rows(5, 8) * 1).sum().backward()
