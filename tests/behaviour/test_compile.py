# SPDX-License-Identifier: Apache-2.0
"""torch.compile on branches, on chains and on whole networks: right gradients, no warning, as few graphs as can be.

A chain that rebuilds its activations breaks the graph, and its branches are compiled one by one; a chain that stores
them, or runs without gradients, is part of the graph. Most of this runs on the backend "aot_eager", which is all of
torch.compile but its code generator.
"""

import copy
import importlib

import pytest
from torch import nn

from behaviour.common import (
    KINDS,
    WIDE,
    assert_all_close,
    assert_close,
    assert_same,
    check_step,
    dropout_mlp,
    mlp,
    norm_mlp,
    old_torch,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)
from behaviour.compiling import Masked, Within, compiled, counters, fresh_compiler, graphs, reasons  # noqa: F401
from behaviour.test_costs import BLOCK, WIDTH, activation_bytes, slim_branch
from revkernels import MemoryBudget, eager, native
from revkernels.autograd import driver_backward, driver_forward, step_record
from revkernels.autograd.planning import planner
from revkernels.autograd.state import snapshot
from revkernels.errors import ReconstructionError
from revkernels.models import revnet38
from revkernels.models.plan import Plan
from revkernels.models.revnet import RevNet
from revkernels.nn import FusedSequential, checkpoint, selective_checkpoint

# ---- branches compiled by hand


@pytest.mark.parametrize("name", ["mlp", "basic"])
def test_compiled_branches(name, options):
    """Row 25: torch.compile on F and G each."""
    kind = KINDS[name].within(Within)
    net, plain = kind.twins(2, **options)
    for block in net:
        block.F.compile(backend="aot_eager", fullgraph=True)
        block.G.compile(backend="aot_eager", fullgraph=True)
    check_step(net, plain, kind.x(), steps=2)
    assert graphs() == 1


def test_wrapped_branches(activations):
    """The module that `torch.compile` returns is a branch like another; keywords are those of what it wraps."""
    net, plain = twins([(Masked(), Masked()) for _ in range(2)], activations=activations)
    mask, x = rows(5, 4), rows(5, 8)
    expected = step(plain, x, mask=mask, sides=[mask])
    for block in net:
        block.F, block.G = (torch.compile(branch, backend="aot_eager") for branch in (block.F, block.G))
    got = step(net, x, mask=mask, sides=[mask])
    for outcome in (got, expected):
        for what in ("parameters", "buffers"):
            renamed = {name.replace("_orig_mod.", ""): value for name, value in getattr(outcome, what).items()}
            setattr(outcome, what, renamed)
    assert_same(got, expected)


def test_memory_is_flat_with_compiled_branches(compiled):
    """Rows 2 and 25: peak bytes of a step at depth 4 and 16 are equal within one block."""

    def peak(depth):
        net, _ = twins(pairs_of(lambda: Within(slim_branch()), depth), backend=compiled)
        for block in net:
            block.F.compile(backend="aot_eager", fullgraph=True)
            block.G.compile(backend="aot_eager", fullgraph=True)
        return activation_bytes(net, rows(64, 2 * WIDTH, requires_grad=False))

    assert abs(peak(16) - peak(4)) <= BLOCK


# ---- whole chains and networks


@pytest.mark.parametrize("name", ["mlp", "basic"])
def test_compiled_chain(name, options):
    """Row 25: gradients, running statistics, generator. One graph if stored; else one for all branches, and no more."""
    kind = KINDS[name]
    net, plain = kind.twins(3, **options)
    check_step(compiled(net, options["activations"]), plain, kind.x(), steps=3)
    assert graphs() == 1
    assert len(reasons()) == (options["activations"] == "reconstruct")


SMALL = Plan("basic", (2, 2), (4, 8), stem_width=4)


@pytest.mark.parametrize(("backend", "activations"), [("eager", "store"), ("cpu", "store"), ("cpu", "reconstruct")])
def test_compiled_network(backend, activations, available):
    """A RevNet is one graph if it stores activations."""
    network = RevNet(SMALL, activations=activations, backend=available(backend)).to(WIDE)
    plain = RevNet(SMALL, activations="store", backend="eager").to(WIDE)
    plain.load_state_dict(network.state_dict())
    check_step(compiled(network, activations), plain, rows(2, 3, 4, 4))
    if activations == "store":
        assert (graphs(), reasons()) == (1, [])


def test_couplings_are_the_kernels_own(compiled, monkeypatch):
    """The graph of a stored chain calls this package's kernels, one for each branch."""
    calls = []
    for module in (native, eager):
        plain = module.couple
        monkeypatch.setattr(module, "couple", lambda *a, plain=plain, m=module: (calls.append(m), plain(*a))[1])
    net, plain = twins(pairs_of(mlp, 3), activations="store")
    net.compile(backend="aot_eager", fullgraph=True)
    check_step(net, plain, rows(5, 8))
    assert calls == [native] * 6


def test_graphs_do_not_grow_with_depth_or_steps():
    for depth in (2, 8):
        torch._dynamo.reset()
        counters.clear()
        net, plain = twins(pairs_of(norm_mlp, depth))
        check_step(compiled(net, "reconstruct"), plain, rows(5, 8), steps=4)
        assert graphs() == 1


def test_memory_is_flat_in_a_compiled_chain():
    def peak(depth):
        net, _ = twins(pairs_of(slim_branch, depth))
        return activation_bytes(compiled(net, "reconstruct"), rows(64, 2 * WIDTH, requires_grad=False))

    assert abs(peak(16) - peak(4)) <= BLOCK


def test_branches_of_every_kind_in_one_chain():
    """Structures do not share a function to be compiled: dynamo would give up after eight, with a warning."""
    widths = range(5, 17)
    net, plain = twins([(wide_mlp(width), wide_mlp(width)) for width in widths])
    check_step(compiled(net, "reconstruct"), plain, rows(5, 8), steps=2)
    assert graphs() == len(widths)


def wide_mlp(hidden):
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 4)).to(WIDE)


def test_the_driver_is_not_traced():
    """Whatever dynamo compiles of a chain that rebuilds is a branch."""
    compiled_code = []

    def backend(graph, inputs):
        compiled_code.extend(str(node.stack_trace) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    net, plain = twins(pairs_of(norm_mlp, 2))
    check_step(compiled(net, "reconstruct", backend), plain, rows(5, 8), steps=2)
    assert compiled_code
    assert not any("driver_forward.py" in trace or "chain.py" in trace for trace in compiled_code)


@pytest.mark.parametrize("whole", [False, True], ids=["branches", "chain"])
def test_changing_batch_sizes(whole, activations):
    net, plain = twins(pairs_of(lambda: Within(norm_mlp()), 2), activations=activations)
    if whole:
        compiled(net, activations, dynamic=True)
    for block in () if whole else net:
        block.F.compile(backend="aot_eager", dynamic=True)
        block.G.compile(backend="aot_eager", dynamic=True)
    for size in (5, 7, 9):
        check_step(net, plain, rows(size, 8))
    assert graphs() == 1


def test_marked_dynamic():
    net, plain = twins(pairs_of(mlp, 2), activations="store")
    network = torch.compile(net, backend="aot_eager", fullgraph=True)
    for size in (5, 7):
        x = rows(size, 8)
        torch._dynamo.mark_dynamic(x, 0)
        assert_close(network(x), plain(x))
    assert graphs() == 1


def test_without_gradients(options):
    """Nothing will be rebuilt, so that everything is in one graph."""
    net, plain = twins(pairs_of(norm_mlp, 2), **options)
    net.compile(backend="aot_eager", fullgraph=True)
    x = rows(5, 8)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close(net(x), plain(x))


def test_one_graph_is_refused_where_it_breaks():
    net, _ = twins(pairs_of(mlp, 2))
    net.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="untraced"):
        net(rows(5, 8))


# ---- with code generation


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_inductor(backend, activations, available):
    """Row 25 with torch's own compiler, which needs a C++ compiler and minutes."""
    net, plain = twins(pairs_of(norm_mlp, 2), activations=activations, backend=available(backend))
    check_step(compiled(net, activations, "inductor"), plain, rows(5, 8), steps=2)


@pytest.mark.slow
def test_compiled_revnet38(activations):
    network = revnet38(activations=activations).to(WIDE)
    plain = revnet38(activations="store", backend="eager").to(WIDE)
    plain.load_state_dict(network.state_dict())
    check_step(compiled(network, activations), plain, rows(2, 3, 8, 8), steps=2)


@pytest.mark.slow
def test_inductor_dropout(activations):
    """The compiler's random numbers are its own: the gradient is held against differences of the same network."""
    net, _ = twins(pairs_of(lambda: dropout_mlp(p=0.3), 2), activations=activations)
    compiled(net, activations, "inductor")
    x, direction, h = rows(5, 8), rows(5, 8, requires_grad=False), 1e-6

    def loss(x):
        torch.manual_seed(0)
        return net(x).square().sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    ahead, behind = (loss((x + side * direction).detach().requires_grad_()).item() for side in (h, -h))
    assert (ahead - behind) / (2 * h) == pytest.approx((gradient * direction).sum().item(), rel=1e-7)


class Calls(nn.Module):
    """Of two, the second with a GRU, torch compiles the first as one graph, and no more once the second broke it."""

    def __init__(self, part):
        super().__init__()
        self.part, self.call = part, self.first_of

    @staticmethod
    def first_of(x, part):
        f = part(x[None])
        return (f[0] if isinstance(f, tuple) else f).reshape(x.shape)

    def forward(self, x):
        return self.call(x, self.part)


@pytest.mark.parametrize("how", ["chain", "branches", "checkpoint", "behind a fused norm"])
def test_parts_that_are_compiled_otherwise_when_they_come_again(how):
    """Row 25: refused, or right; and right behind a call whose result is dropped. As many rows as columns: the tensors
    that are saved are of the same shapes then."""
    parts = [nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)]
    net, plain = twins(pairs_of(lambda: Within(nn.Sequential(*map(Calls, copy.deepcopy(parts)))).to(WIDE), 1))
    if how == "checkpoint":
        F, as_it_is = net[0].F, next(plain.children()).F
        F.compile(backend="aot_eager")
        net.forward, plain.forward = lambda x: checkpoint(F, x), lambda x: as_it_is(x)
    if how == "behind a fused norm":
        layers = [nn.LayerNorm(4), *map(Calls, parts)]
        net, plain = twins(pairs_of(lambda: nn.Sequential(*copy.deepcopy(layers)).to(WIDE), 1))
    layers = [layer for F in (net[0].F, net[0].G) for layer in list(F.children())[1:]]
    compiled = {"chain": [net], "branches": [net[0].F, net[0].G], "checkpoint": [], "behind a fused norm": layers}
    for module in compiled[how]:
        module.compile(backend="aot_eager")
    x = rows(4, 4 if how == "checkpoint" else 8)
    try:
        got = step(net, x)
    except ReconstructionError as error:
        assert "before its first step" in str(error)
    else:
        assert_same(got, step(plain, x))
    torch._dynamo.reset()
    net(x)
    check_step(net, plain, x)


REFUSED_ONCE = old_torch("the measured step is compiled otherwise than its recompute, and refused")


@pytest.mark.parametrize("how", [pytest.param("budget", marks=REFUSED_ONCE), "selective checkpoint"])
def test_activations_in_compiled_code_are_not_noted(how):
    """Row 25: a measured budget and `selective_checkpoint` look at activations, but not where the compiler decides what
    is kept. The recompute runs the code of the forward, and there is one graph."""
    budget = MemoryBudget("0%") if how == "budget" else "store"
    net, plain = twins(pairs_of(lambda: FusedSequential(*gelu_mlp()), 2), activations=budget)
    if how == "budget":
        compiled(net, budget)
    else:
        whole = torch.compile(net.forward, backend="aot_eager", fullgraph=True)
        net.forward = lambda x: selective_checkpoint(whole, x)
    check_step(net, plain, rows(5, 8), steps=3)
    assert graphs() == 1


def gelu_mlp(width=4):
    return nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)).to(WIDE)


class Leaks(nn.Module):
    """A state with a gradient that goes through it from call to call, and a part that is compiled."""

    def __init__(self):
        super().__init__()
        self.linear, self.v = nn.Linear(4, 4), None
        self.part = torch.compile(torch.sin, backend="aot_eager", dynamic=False)

    def forward(self, h):
        self.v = self.linear(h) if self.v is None else 0.5 * self.v + self.linear(h)
        return self.part(self.v)

    def __deepcopy__(self, memo):
        new = type(self)().to(WIDE)
        new.load_state_dict(self.state_dict())
        return new


def test_a_state_through_time_beside_a_part_that_is_compiled():
    """Row 34: its graph is not there in the recompute, and is not missed where torch.compile was at work."""
    nets, results = twins(pairs_of(lambda: Leaks().to(WIDE), 2)), []
    x = rows()
    for net in nets:
        for branch in (branch for block in net.children() for branch in (block.F, block.G)):
            branch.v = None
        torch._dynamo.reset()
        y = [net(x)]
        torch._dynamo.reset()  # it is compiled again, in a call with a state
        y += [net(x), net(x)]
        sum(one.sin().sum() for one in y).backward()
        results.append([p.grad for p in net.parameters()])
    assert_all_close(*results)


def test_the_driver_is_outside_of_graphs():
    """torch ignores names of modules that do not exist."""
    from revkernels.autograd.compiling import _OUTSIDE

    modules = [importlib.import_module(name) for name in _OUTSIDE]
    modules += [driver_forward, driver_backward, step_record, snapshot, planner]
    assert all(torch._dynamo.trace_rules.check_file(module.__file__).skipped for module in modules)
