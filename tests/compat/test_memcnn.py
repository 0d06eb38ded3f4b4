# SPDX-License-Identifier: Apache-2.0
"""MemCNN's classes here: as plain torch in each option. `test_memcnn_peer` sets them beside MemCNN itself."""

import importlib
import subprocess
import sys

import pytest
from behaviour.common import (
    WIDE,
    assert_close,
    assert_raises,
    check_step,
    dropout_mlp,
    mlp,
    norm_mlp,
    rows,
    torch,
    unwritten,
)
from torch import nn

import revkernels.compat as compat_package
from compat.common import InAutocast, check_copies, check_gradients, check_signatures, plain
from compat.memcnn_networks import (
    Inverted,
    Scaling,
    couplings,
    couplings_in,
    in_plain_torch,
    inverse_in_plain_torch,
    nested,
    one,
    stack,
)
from revkernels.compat import memcnn
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes
from revkernels.nn import is_recomputing

SIGNATURES = {
    "AdditiveBlock": "(Fm, Gm=None, implementation_fwd=1, implementation_bwd=1)",
    "AdditiveCoupling": "(Fm, Gm=None, implementation_fwd=-1, implementation_bwd=-1, split_dim=1)",
    "InvertibleModuleWrapper": "(fn, keep_input=False, keep_input_inverse=False, num_bwd_passes=1, disable=False, "
    "preserve_rng_state=False)",
    "ReversibleBlock": "(Fm, Gm=None, coupling='additive', keep_input=False, keep_input_inverse=False, "
    "implementation_fwd=-1, implementation_bwd=-1, adapter=None)",
    "create_coupling": "(Fm, Gm=None, coupling='additive', implementation_fwd=-1, implementation_bwd=-1, adapter=None)",
    "is_invertible_module": "(module_in, test_input_shape, test_input_dtype=torch.float32, atol=1e-06, random_seed=42)",
}
MAKES = pytest.mark.parametrize("make", [mlp, norm_mlp, dropout_mlp], ids=["mlp", "norm", "dropout"])


def test_the_package_imports_no_torch():
    code = "import revkernels.compat, sys; assert not {'torch', *revkernels.compat.__all__} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in set(compat_package.__all__) - {"UnsupportedError"}:
        importlib.import_module(f"revkernels.compat.{name}")
    assert issubclass(compat_package.UnsupportedError, ValueError)  # as every refusal of this package


def test_signatures():
    check_signatures(memcnn, SIGNATURES)


# ---- as plain torch


@MAKES
@pytest.mark.parametrize("build", [stack, one, nested])
def test_steps_as_plain_torch(make, build, backend):
    """Gradients, statistics counted once, the same masks, and the generator afterwards."""
    net = build(make, 3)
    check_step(net, plain(net, in_plain_torch), rows(5, 8), steps=2)


@MAKES
@pytest.mark.parametrize("build", [one, nested])
def test_inverse_steps_as_plain_torch(make, build, backend):
    """A training step through the inverse, statistics included."""
    net = Inverted(build(make, 3))
    check_step(net, plain(net, inverse_in_plain_torch), rows(5, 8), steps=2)


@pytest.mark.parametrize("implementation", [-1, 0, 1])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.filterwarnings("ignore:implementation:DeprecationWarning")
def test_coupling_alone(implementation, inverse, backend):
    net = memcnn.AdditiveCoupling(norm_mlp(), dropout_mlp(), implementation, implementation)
    if inverse:
        net = Inverted(net)
    check_step(net, plain(net, inverse_in_plain_torch if inverse else in_plain_torch), rows(5, 8))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"keep_input": True},
        {"keep_input_inverse": True},
        {"num_bwd_passes": 3},
        {"preserve_rng_state": True},
        {"disable": True},
    ],
    ids=str,
)
def test_options_change_nothing(options, inverse):
    net = memcnn.InvertibleModuleWrapper(*couplings(dropout_mlp, 1), **options)
    for name, value in options.items():
        assert getattr(net, name) == value
    net = Inverted(net) if inverse else net
    check_step(net, plain(net, inverse_in_plain_torch if inverse else in_plain_torch), rows(5, 8))


def test_disable_stores_and_the_wrapper_recomputes():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(is_recomputing())
            return super().forward(x)

    for disable, expected in ((False, [False] * 2 + [True] * 2), (True, [False] * 2)):
        net = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(Counted(4, 4).to(WIDE)), disable=disable)
        for run in (net, net.inverse):
            calls.clear()
            run(rows(5, 8)).sum().backward()
            assert calls == expected


def test_a_missing_branch_is_a_copy():
    coupling = memcnn.AdditiveCoupling(mlp())
    for f, g in zip(coupling.Fm.parameters(), coupling.Gm.parameters(), strict=True):
        assert torch.equal(f, g)
        assert f is not g


@pytest.mark.parametrize("split_dim", [0, 2, -1])
def test_split_dim(split_dim, backend):
    x = rows(4, 3, 8)
    make = mlp if split_dim else lambda: mlp(8)
    net = memcnn.InvertibleModuleWrapper(nn.Sequential(*couplings(make, 2, split_dim=split_dim)))
    check_step(net, plain(net, in_plain_torch), x)


@pytest.mark.parametrize("inverse", [False, True])
def test_couplings_that_split_along_different_dimensions(inverse, backend):
    parts = couplings(mlp, 2) + couplings(lambda: mlp(8), 1, split_dim=0) + couplings(mlp, 1)
    net = memcnn.InvertibleModuleWrapper(nn.Sequential(*parts))
    net = Inverted(net) if inverse else net
    check_step(net, plain(net, inverse_in_plain_torch if inverse else in_plain_torch), rows(6, 8))


def test_inverse_undoes_the_forward(backend):
    net, x = one(norm_mlp, 3).eval(), rows(5, 8)
    assert_close(net.inverse(net(x)), x)
    assert_close(net(net.inverse(x)), x)


def test_input_is_never_emptied():
    """MemCNN frees its input, under no_grad too, and a slice takes the whole tensor along."""
    net, whole = one(mlp, 2), rows(10, 8)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, unwritten(net, whole):
            for run in (net, net.inverse):
                run(whole)
                run(whole[2:7])


def test_input_without_gradient_still_gives_parameters_theirs():
    net = stack(norm_mlp, 2)
    check_step(net, plain(net, in_plain_torch), rows(5, 8, requires_grad=False))


def test_derivatives():
    net, x = one(lambda: mlp(2), 2), rows(2, 4)
    check_gradients(net, x)
    check_gradients(net.inverse, x)


def test_autocast(backend):
    """Branches run in bfloat16 in the backward too; a bfloat16 input is widened, as MemCNN's documentation says."""
    net = one(lambda: mlp().float(), 2)
    x = rows(5, 8, dtype=torch.float32)
    check_step(InAutocast(net), InAutocast(plain(net, in_plain_torch)), x, tolerance=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x.bfloat16()).dtype == net.inverse(x.bfloat16()).dtype == torch.float32


def test_branch_hooks_fire(backend):
    """MemCNN calls ``Fm.forward``, which no hook sees."""
    net = one(mlp, 2)
    seen = []
    for coupling in couplings_in(net):
        coupling.Fm.register_forward_hook(lambda *given: seen.append(is_recomputing()))
        coupling.Gm.register_full_backward_hook(lambda *given: seen.append("backward"))
    check_step(net, plain(net, in_plain_torch), rows(5, 8))
    assert seen[:4] == [False, False, "backward", True]


def test_memory_is_flat_within_one_wrapper():
    """One round all couplings: the same at any depth. One each: it grows, though less than with stored activations."""

    def branch():
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()).to(WIDE)

    x = rows(64, 128, requires_grad=False)

    def grown(build, **options):
        peaks = []
        for depth in (4, 16):
            net = build(branch, depth, **options)
            net(x).sum().backward()
            net.zero_grad(set_to_none=False)
            peaks.append(peak_bytes(lambda net=net: net(x).sum().backward()))
        return (peaks[1] - peaks[0]) / x.nbytes

    assert abs(grown(one)) <= 1
    assert 12 <= grown(stack) < grown(stack, disable=True)


def test_changes_after_the_forward_are_refused():
    """Both are silent in MemCNN, and the gradient is wrong."""
    net = one(mlp, 2)
    y = net(rows(5, 8))
    with torch.no_grad():
        net._fn[1].Gm[0].weight.add_(1)
    assert_raises(ReconstructionError, ["coupling 1, Gm", "0.weight"], y.sum().backward)
    y = net.inverse(rows(5, 8))
    with torch.no_grad():
        net._fn[1].Gm[0].weight.add_(1)
    assert_raises(ReconstructionError, ["coupling 0 from the end, Gm", "0.weight"], y.sum().backward)
    y = net(rows(5, 8)).mul_(2)
    assert_raises(ReconstructionError, ["output", "in place"], y.sum().backward)


def test_names_copies_and_casts():
    net = memcnn.InvertibleModuleWrapper(*couplings(norm_mlp, 1))
    names = [name for name, _ in net.named_parameters()]
    assert names[0] == "_fn.Gm.0.weight"
    assert names[len(names) // 2] == "_fn.Fm.0.weight"
    check_copies(net, rows(5, 8))


# ---- what is refused


@pytest.mark.parametrize("fn", [Scaling(), nn.Sequential(memcnn.AdditiveCoupling(mlp()), Scaling()), mlp()], ids=str)
def test_other_modules_are_refused(fn):
    net = memcnn.InvertibleModuleWrapper(fn)
    for run in (net, net.inverse):
        assert_raises(
            TypeError, [f"fn is a {type(fn).__name__}", "AdditiveCoupling", "disable"], lambda run=run: run(1)
        )


def test_other_modules_run_where_disabled():
    net, x = memcnn.InvertibleModuleWrapper(Scaling(), disable=True), rows(5, 8)
    assert_close(net(x), 2 * x)
    assert_close(net.inverse(net(x)), x)


def test_a_coupling_with_a_forward_of_its_own_is_refused():
    class Doubled(memcnn.AdditiveCoupling):
        def forward(self, x):
            return 2 * super().forward(x)

    assert_raises(TypeError, ["Doubled"], lambda: memcnn.InvertibleModuleWrapper(Doubled(mlp()))(rows(5, 8)))


def test_bad_arguments():
    net = memcnn.InvertibleModuleWrapper(*couplings(mlp, 1))
    assert_raises(ValueError, ["(5, 7)", "even"], lambda: net(rows(5, 7)))
    assert_raises(TypeError, ["one tensor", "2"], lambda: net(rows(5, 8), rows(5, 8)))
    theirs = type("AdditiveCoupling", (nn.Module,), {"__module__": "memcnn.models.additive"})
    assert_raises(
        TypeError,
        ["fn is a memcnn.models.additive.AdditiveCoupling; it must be an AdditiveCoupling of revkernels.compat.memcnn"],
        lambda: memcnn.InvertibleModuleWrapper(theirs())(rows(5, 8)),
    )
    assert_raises(
        NotImplementedError, ["coupling", "'affine'"], lambda: memcnn.create_coupling(mlp(), coupling="affine")
    )
    for name in ("implementation_fwd", "implementation_bwd"):
        assert_raises(NotImplementedError, [name, "-2"], lambda name=name: memcnn.AdditiveCoupling(mlp(), **{name: -2}))


def test_deprecated_names_warn_and_work():
    with pytest.warns(DeprecationWarning, match="ReversibleBlock"):
        block = memcnn.ReversibleBlock(norm_mlp(), mlp(), keep_input=True)
    assert block.keep_input
    assert [name for name, _ in block.named_children()] == ["_fn"]
    check_step(block, plain(block, in_plain_torch), rows(5, 8))
    with pytest.warns(DeprecationWarning) as warned:
        coupling = memcnn.AdditiveBlock(mlp())
    assert [str(w.message)[:18] for w in warned] == ["implementation_fwd", "implementation_bwd"]
    check_step(coupling, plain(coupling, in_plain_torch), rows(5, 8))
    with pytest.warns(DeprecationWarning):
        assert memcnn.create_coupling(mlp(), None, "additive", 0, 1).implementation_bwd == 1
