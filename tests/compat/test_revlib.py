# SPDX-License-Identifier: Apache-2.0
"""RevLib's classes here: as plain torch in each option. `test_revlib_peer` sets them beside RevLib itself."""

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

from compat.common import (
    InAutocast,
    check_copies,
    check_gradients,
    check_signatures,
    couple,
    plain,
    spelled,
)
from revkernels.compat import revlib
from revkernels.compat.revlib import MemoryModes, ReversibleModule, ReversibleSequential
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes

SIGNATURES = {
    "ReversibleModule": "(wrapped_module, coupling_forward=None, coupling_inverse=None, memory_savings=True, "
    "cache=None, target_device='', fused_optimizer=None)",
    "ReversibleSequential": "(*modules, split_dim=1, coupling_forward=None, coupling_inverse=None, "
    "memory_mode=<MemoryModes.autograd_function: 3>, target_device='', fused_optimizer=None)",
    "additive_coupling_forward": "(other_stream, fn_out)",
    "additive_coupling_inverse": "(output, fn_out)",
    "momentum_net": "(*modules, split_dim=1, coupling_forward=None, coupling_inverse=None, "
    "memory_mode=<MemoryModes.autograd_function: 3>, target_device='', fused_optimizer=None, beta=0.9)",
}
FORWARD = "(inp, *args, layerwise_args_kwargs=None, **kwargs)"


def branches_of(network):
    return [module.wrapped_module.wrapped_module for module in network]


def in_plain_torch(network, x, *args, layerwise_args_kwargs=None, **kwargs):
    own = layerwise_args_kwargs or [((), {})] * len(network)
    calls = [((*args, *more), {**kwargs, **named}) for more, named in own]
    return couple(branches_of(network), x, network.split_dim, calls)


def chain(make, depth, **options):
    net = ReversibleSequential(*[make() for _ in range(depth)], **options)
    return net, plain(net, in_plain_torch)


class Gated(nn.Module):
    """Reads two side inputs, one of them by its keyword."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, scale, shift=0.0):
        return self.inner(x) * scale + shift


def test_signatures():
    check_signatures(revlib, SIGNATURES)
    assert spelled(ReversibleSequential(mlp()).forward) == FORWARD
    assert {mode.name: int(mode) for mode in MemoryModes} == {
        "no_savings": 0,
        "checkpoint": 1,
        "autograd_graph": 2,
        "autograd_function": 3,
    }


@pytest.mark.parametrize("make", [mlp, norm_mlp, dropout_mlp], ids=["mlp", "norm", "dropout"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_steps_as_plain_torch(make, depth, backend):
    """An odd number of half-steps too: RevLib leaves the streams swapped after those."""
    check_step(*chain(make, depth), rows(5, 8), steps=2)


@pytest.mark.parametrize("memory_mode", MemoryModes)
def test_memory_modes(memory_mode, backend):
    """All of them give the same; the first stores activations, the others run every branch once more."""
    net, twin = chain(norm_mlp, 3, memory_mode=memory_mode)
    calls = []
    branches_of(net)[0].register_forward_hook(lambda *given: calls.append(1))
    check_step(net, twin, rows(5, 8))
    assert len(calls) == (1 if memory_mode == MemoryModes.no_savings else 2)
    assert net.m is memory_mode


@pytest.mark.parametrize("split_dim", [0, 2, -1])
@pytest.mark.parametrize("depth", [2, 3])
def test_split_dim(split_dim, depth, backend):
    x = rows(4, 3, 8)
    check_step(*chain(lambda: mlp(x.chunk(2, split_dim)[0].shape[-1]), depth, split_dim=split_dim), x)


def test_arguments_reach_every_module(backend):
    """With their gradients, which RevLib cannot give to side inputs that are no leaves."""
    net, twin = chain(Gated, 3)
    scale, shift = rows(1, 4), rows(1, 4)
    check_step(net, twin, rows(5, 8), scale, shift=shift, sides=[scale, shift])


def test_layerwise_arguments(backend):
    """Each module gets its own after those of all. RevLib drops them without a word."""
    net, twin = chain(Gated, 2)
    shifts = [rows(1, 4), rows(1, 4)]
    own = [((), {"shift": shifts[0]}), ((shifts[1],), {})]
    check_step(net, twin, rows(5, 8), rows(1, 4), layerwise_args_kwargs=own, sides=shifts)


def test_shared_modules(backend):
    """RevLib's users repeat one module, and pass ready-made half-steps."""
    shared = mlp()
    half_step = ReversibleModule(mlp(), memory_savings=False)
    net = ReversibleSequential(shared, half_step, shared, half_step, mlp())
    assert len(net) == 5
    check_step(net, plain(net, in_plain_torch), rows(5, 8))


def test_a_module_called_alone():
    half_step, (x0, x1) = ReversibleModule(mlp()), rows(5, 8, requires_grad=False).chunk(2, 1)
    y0, y1 = half_step((x0, x1))
    assert_close(y0, x1)
    assert_close(y1, x0 + half_step.wrapped_module.wrapped_module(x1))


def test_hooks_fire_on_branches_and_on_half_steps(backend):
    net, twin = chain(norm_mlp, 4)
    seen = []
    net[1].register_forward_hook(lambda module, given, made: seen.append([tuple(t.shape) for t in made]))
    branches_of(net)[2].register_full_backward_hook(lambda *given: seen.append("backward"))
    check_step(net, twin, rows(5, 8))
    assert seen == [[(5, 4), (5, 4)], "backward"]


def test_output_may_be_changed_in_place(backend):
    """The streams are kept beside the output, as in RevLib: ReLU(inplace=True) often follows."""
    net, twin = chain(norm_mlp, 2)
    tail = nn.ReLU(inplace=True)
    check_step(nn.Sequential(net, tail), nn.Sequential(twin, tail), rows(5, 8))


def test_input_without_gradient_still_gives_parameters_theirs():
    net, twin = chain(norm_mlp, 3)
    check_step(net, twin, rows(5, 8, requires_grad=False))
    assert all(p.grad is not None for p in net.parameters())


def test_derivatives():
    check_gradients(chain(lambda: mlp(2), 3)[0], rows(2, 4))


def test_autocast_in_the_backward(backend):
    net, twin = chain(lambda: mlp().float(), 3)
    check_step(InAutocast(net), InAutocast(twin), rows(5, 8, dtype=torch.float32), tolerance=1e-6)


def test_evaluation_and_no_grad():
    net, twin = chain(norm_mlp, 3)
    net.eval(), twin.eval()
    check_step(net, twin, rows(5, 8))
    x = rows(5, 8)
    with torch.no_grad(), unwritten(net, x):
        assert not net(x).requires_grad


def test_no_modules():
    x = rows(5, 8)
    assert torch.equal(ReversibleSequential()(x), x)


def test_memory_is_that_of_one_half_step_at_any_depth():
    def branch():
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh()).to(WIDE)

    x = rows(64, 128, requires_grad=False)

    def peak(depth, **options):
        net, _ = chain(branch, depth, **options)
        net(x).sum().backward()
        net.zero_grad(set_to_none=False)
        return peak_bytes(lambda: net(x).sum().backward())

    assert abs(peak(21) - peak(5)) <= x.nbytes
    assert peak(21, memory_mode=MemoryModes.no_savings) - peak(5, memory_mode=MemoryModes.no_savings) > 8 * x.nbytes


def test_an_optimizer_inside_the_backward():
    """What stands in for fused_optimizer: torch's own hook steps each parameter, and no gradient is left."""
    net, twin = chain(mlp, 4)

    def update(parameter):
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)
        parameter.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(update)
    x = rows(5, 8)
    net(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert p.grad is None
        assert_close(p, q - 0.1 * q.grad)


def test_changes_after_the_forward_are_refused():
    net, _ = chain(mlp, 3)
    y = net(rows(5, 8))
    with torch.no_grad():
        branches_of(net)[2][0].weight.add_(1)
    assert_raises(ReconstructionError, ["module 1-0", "0.weight"], y.sum().backward)


def test_names_copies_and_casts():
    net, _ = chain(norm_mlp, 3)
    assert [name for name, _ in net.named_children()] == ["0-0", "0-1", "1-0"]
    assert next(iter(net.state_dict())) == "0-0.wrapped_module.wrapped_module.0.weight"
    assert isinstance(net, nn.Sequential)
    check_copies(net, rows(5, 8))


@pytest.mark.parametrize("depth", [1, 3])
def test_momentum_net(depth, backend):
    """v <- v + f(beta^i x); x <- x + (1 - beta) / beta^(i + 1) v, with the names that RevLib gives its parameters."""
    net = revlib.momentum_net(*[mlp() for _ in range(depth)], beta=0.7)
    stems = [stem.wrapped_module for stem in branches_of(net)[::2]]
    assert f"{depth - 1}-0.wrapped_module.wrapped_module.wrapped_module.2.bias" in net.state_dict()

    def velocity_and_residual(v, x):
        for i, stem in enumerate(stems):
            v = v + stem(0.7**i * x)
            x = x + v * (1 - 0.7) / 0.7 ** (i + 1)
        return torch.cat((v, x), 1)

    x = rows(5, 8)
    assert_close(net(x), velocity_and_residual(*x.chunk(2, 1)))
    check_step(net, plain(net, in_plain_torch), x)


# ---- what is refused


def momentum(other_stream, fn_out):
    return 0.9 * other_stream + 0.1 * fn_out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"coupling_forward": [momentum]}, ["coupling_forward", "momentum", "additive_coupling_forward"]),
        ({"coupling_inverse": [None, momentum]}, ["coupling_inverse", "momentum", "additive_coupling_inverse"]),
        ({"target_device": "cuda"}, ["target_device", "'cuda'"]),
        ({"fused_optimizer": torch.optim.SGD}, ["fused_optimizer", "register_post_accumulate_grad_hook"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_would_change_results_are_refused(options, parts):
    assert_raises(NotImplementedError, parts, lambda: ReversibleSequential(mlp(), mlp(), **options))
    alone = {name: value[-1] if isinstance(value, list) else value for name, value in options.items()}
    assert_raises(NotImplementedError, parts, lambda: ReversibleModule(mlp(), **alone))


def test_the_additive_coupling_is_taken():
    couplings = [None, revlib.additive_coupling_forward], [revlib.additive_coupling_inverse]
    check_step(*chain(mlp, 2, coupling_forward=couplings[0], coupling_inverse=couplings[1]), rows(5, 8))
    x, f = rows(2, 2), rows(2, 2)
    assert_close(revlib.additive_coupling_inverse(revlib.additive_coupling_forward(x, f), f), x)


def test_so_are_the_functions_of_revlib_itself():
    """Code of which one import was changed and not the other."""

    def additive_coupling_forward(other_stream, fn_out):
        return other_stream + fn_out

    assert_raises(
        NotImplementedError,
        [f"coupling_forward has {__name__}.additive_coupling_forward; it must be None or revkernels.compat.revlib."],
        lambda: ReversibleSequential(mlp(), mlp(), coupling_forward=[additive_coupling_forward]),
    )
    additive_coupling_forward.__module__ = "revlib.core"
    check_step(*chain(mlp, 2, coupling_forward=[additive_coupling_forward]), rows(5, 8))


def test_bad_arguments():
    net = ReversibleSequential(mlp(), mlp())
    assert_raises(TypeError, ["split_dim", "NoneType"], lambda: ReversibleSequential(mlp(), split_dim=None))
    assert_raises(TypeError, ["wrapped_module", "function"], lambda: ReversibleSequential(lambda x: x))
    assert_raises(ValueError, ["(5, 7)", "even"], lambda: net(rows(5, 7)))
    assert_raises(
        ValueError, ["layerwise_args_kwargs", "1", "2"], lambda: net(rows(5, 8), layerwise_args_kwargs=[((), {})])
    )

    assert_raises(
        TypeError,
        ["module 2 is a Sequential; it must be wrapped in a ReversibleModule"],
        lambda: ReversibleSequential(mlp(), mlp()).append(mlp())(rows(5, 8)),
    )

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    assert_raises(TypeError, ["(tensor, other outputs)"], lambda: ReversibleSequential(Two(), mlp())(rows(5, 8)))
