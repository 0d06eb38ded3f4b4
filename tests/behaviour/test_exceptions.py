# SPDX-License-Identifier: Apache-2.0
"""An exception at every moment of a step: it propagates as it is, and afterwards all is as plain torch leaves it."""

import contextlib
import gc

import pytest
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from behaviour.common import assert_all_close, assert_raises, check_step, loss_of, norm_mlp, rows, torch, twins
from behaviour.test_leaks import alive  # noqa: F401
from revkernels.autograd import recomputing
from revkernels.nn import is_recomputing

DEPTH = 3
PLACES = [(block, branch) for block in range(DEPTH) for branch in "FG"]


class BrokenError(Exception):
    """Nobody else raises this."""


class Trap:
    """Raises ``error`` when it is reached for the ``left``-th time, once."""

    def __init__(self):
        self.error, self.left = None, 0

    def __call__(self, *_):
        if self.error is not None:
            self.left -= 1
            if self.left == 0:
                error, self.error = self.error, None
                raise error

    def __deepcopy__(self, memo):
        return Trap()


@pytest.fixture(autouse=True)
def none_recomputes():
    """What one test leaves behind is not the next one's."""
    yield
    recomputing.set_recomputing(False)


class Trapped(torch.autograd.Function):
    """The identity, with a trap in its forward and one in its backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.trap = backward
        forward()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.trap()
        return gradient, None, None


class Fragile(nn.Module):
    """A branch with statistics and dropout, and traps where a user's own code may be."""

    def __init__(self):
        super().__init__()
        self.inner = norm_mlp(p=0.3)
        self.function, self.backward, self.end, self.tensor = Trap(), Trap(), Trap(), Trap()

    def forward(self, x):
        f = Trapped.apply(self.inner(x), self.function, self.backward)
        self.end()
        if f.requires_grad:
            f.register_hook(self.tensor)
        return f


def attribute(name):
    def install(branch, block):
        return getattr(branch, name)

    return install


def hook(register, of_block=False):
    def install(branch, block):
        trap = Trap()
        register(block if of_block else branch, trap)
        return trap

    return install


def inner(register):
    return hook(lambda branch, trap: register(branch.inner[2], trap))


def parameter(register):
    return hook(lambda branch, trap: register(branch.inner[2].weight, trap))


#: Where the trap is, and whether a recompute comes by again.
MOMENTS = {
    "a Function's forward": (attribute("function"), True),
    "a Function's backward": (attribute("backward"), False),
    "the branch's end": (attribute("end"), True),
    "a tensor hook": (attribute("tensor"), False),
    "a forward hook": (hook(nn.Module.register_forward_hook), True),
    "a forward pre-hook": (hook(nn.Module.register_forward_pre_hook), True),
    "a layer's forward hook": (inner(nn.Module.register_forward_hook), True),
    "a full backward hook": (hook(nn.Module.register_full_backward_hook), False),
    "a full backward pre-hook": (hook(nn.Module.register_full_backward_pre_hook), False),
    "a layer's full backward hook": (inner(nn.Module.register_full_backward_hook), False),
    "a parameter's hook": (parameter(lambda p, trap: p.register_hook(trap)), False),
    "a post-accumulate hook": (parameter(lambda p, trap: p.register_post_accumulate_grad_hook(trap)), False),
}


def fragile_twins(options):
    net, plain = twins([(Fragile(), Fragile()) for _ in range(DEPTH)], **options)
    return net, plain


def fail(network, trap, error, at=1, x=None):
    """A step in which the trap goes off: the very error comes out of it, and the caller's surroundings are whole."""
    torch.manual_seed(11)
    trap.error, trap.left = error, at
    modes = [module.training for module in network.modules()]
    buffers = list(network.buffers())
    caught = None
    with torch.autocast("cpu", torch.bfloat16), surroundings():
        try:
            loss_of(network(rows(6, 8) if x is None else x)).backward()
        except type(error) as raised:
            caught = raised
    assert caught is error, f"got {caught!r}, expected {error!r}"
    caught.__traceback__ = None
    torch.ones((), requires_grad=True).exp().backward()  # until then torch's engine may hold what it had queued
    assert [module.training for module in network.modules()] == modes
    for now, then in zip(network.buffers(), buffers, strict=True):
        assert now is then, "a buffer of the module was replaced"
    network.zero_grad()
    return torch.get_rng_state(), [b.clone() for b in buffers]


@contextlib.contextmanager
def surroundings():
    """Autocast, grad mode and saved-tensor hooks are the same after as before."""

    def now():
        leaf = torch.ones(1, requires_grad=True)
        packed = leaf.exp().grad_fn._saved_result
        return torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), type(packed), is_recomputing()

    before = now()
    yield
    assert now() == before == (before[0], True, torch.Tensor, False)


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", MOMENTS)
def test_in_a_branch(moment, error, options):
    """Row 31: forward or backward, at each half-step; generator and statistics stop where plain torch's stop."""
    install, _ = MOMENTS[moment]
    for block, branch in PLACES[:: 1 if error is BrokenError else 3]:
        nets = fragile_twins(options)
        states = []
        for network in nets:
            holder = list(network.children())[block]
            trap = install(getattr(holder, branch), holder)
            states.append(fail(network, trap, error("from here")))
        assert torch.equal(states[0][0], states[1][0]), "the generator is elsewhere"
        assert_all_close(states[0][1], states[1][1], what="buffers")
        check_step(*nets, rows(6, 8))


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", [moment for moment, (_, again) in MOMENTS.items() if again])
def test_in_a_recompute(moment, error, backend):
    """Row 31: the second time only; generator and statistics are those of plain torch's whole step."""
    install, _ = MOMENTS[moment]
    for block, branch in PLACES[:: 1 if error is BrokenError else 3]:
        net, plain = fragile_twins({"backend": backend})
        trap = install(getattr(net[block], branch), net[block])
        state, buffers = fail(net, trap, error("from here"), at=2)
        torch.manual_seed(11)
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(plain(rows(6, 8))).backward()
        plain.zero_grad()
        assert torch.equal(state, torch.get_rng_state())
        assert_all_close(buffers, list(plain.buffers()), what="buffers")
        check_step(net, plain, rows(6, 8))


BLOCK_HOOKS = [
    nn.Module.register_forward_hook,
    nn.Module.register_forward_pre_hook,
    nn.Module.register_full_backward_hook,
    nn.Module.register_full_backward_pre_hook,
]


@pytest.mark.parametrize("register", BLOCK_HOOKS, ids=lambda register: register.__name__)
def test_in_a_hook_of_a_block(register, options):
    """Row 31: a block's own hooks; the block is not left holding a call that never came."""
    for block in range(DEPTH):
        net, plain = fragile_twins(options)
        trap = hook(register, of_block=True)(None, net[block])
        fail(net, trap, BrokenError("from here"))
        plain.load_state_dict(net.state_dict())
        check_step(net, plain, rows(6, 8))


@pytest.mark.parametrize("which", ["pack", "unpack"])
def test_in_an_outer_saved_tensor_hook(which, options):
    """Row 31: at each of its calls, until one step goes through."""
    net, plain = fragile_twins(options)
    for at in range(1, 200):
        trap, x = Trap(), rows(6, 8)
        pack, unpack = (trap, None) if which == "pack" else (None, trap)

        def packed(tensor, pack=pack):
            if pack:
                pack()
            return tensor.detach()

        def unpacked(tensor, unpack=unpack):
            if unpack:
                unpack()
            return tensor

        error = BrokenError("from here")
        trap.error, trap.left = error, at
        with surroundings():
            try:
                with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
                    loss = loss_of(torch.tanh(net(torch.sin(x))))
                loss.backward()
            except BrokenError as raised:
                assert raised is error
                raised.__traceback__ = None
                continue
        break
    assert 2 < at < 199
    net.zero_grad()
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, rows(6, 8))


@pytest.mark.parametrize(
    "where", ["before the backward", "in the loss's backward", "at the input", "in the parameters"]
)
def test_round_the_chain(where, options):
    """Row 31: the graph was made and is never, or not wholly, run backwards."""
    net, plain = fragile_twins(options)
    for network in (net, plain):
        torch.manual_seed(3)
        x = rows(6, 8)
        y = network(x)
        trap = Trap()
        trap.error, trap.left = BrokenError("from here"), 1
        if where == "in the loss's backward":
            y.register_hook(trap)
        if where == "at the input":
            x.register_hook(trap)
        if where == "in the parameters":
            handle = next(network.parameters()).register_hook(trap)
        with pytest.raises(BrokenError), surroundings():
            loss = loss_of(y)
            if where == "before the backward":
                trap()
            loss.backward()
        if where == "in the parameters":
            handle.remove()
        network.zero_grad()
    check_step(net, plain, rows(6, 8), steps=2)


class Exhausted(TorchDispatchMode):
    """Memory runs out at the n-th operation of torch, whoever calls it."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError(f"in {function}")
        return function(*args, **(kwargs or {}))


def check_out_of_memory(options, start, stride):
    """Row 31, as a function: from operation ``start`` on at every ``stride``-th, until a step goes through."""
    net, plain = fragile_twins(options)
    for at in range(start, 5000, stride):
        modes, buffers = [m.training for m in net.modules()], list(net.buffers())
        x, state = rows(6, 8), None
        with surroundings():
            try:
                with torch.autocast("cpu", torch.bfloat16), Exhausted(at) as memory:
                    loss = loss_of(net(x))
                    state = torch.get_rng_state()
                    loss.backward()
            except torch.OutOfMemoryError as error:
                error.__traceback__ = None
        assert [m.training for m in net.modules()] == modes, f"at operation {at}: a mode was left behind"
        assert all(a is b for a, b in zip(net.buffers(), buffers, strict=True)), f"at operation {at}: a buffer is lost"
        assert state is None or torch.equal(state, torch.get_rng_state()), f"at operation {at}: the generator moved"
        net.zero_grad()
        if memory.left > 0:
            break
    assert at > 100
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, rows(6, 8))


@pytest.mark.parametrize("start", range(1, 4))
def test_out_of_memory(start, options):
    """Row 31: the usual exception, at every third operation of torch from each of three."""
    check_out_of_memory(options, start, 3)


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_leaks(moment, compiled, alive):  # noqa: F811
    """Row 31: the model lives on; of the step that failed no call, no tensor is left."""
    install, again = MOMENTS[moment]
    net, _ = fragile_twins({"backend": compiled})
    x = rows(6, 8)
    traps = [install(getattr(net[b], branch), net[b]) for b, branch in PLACES]

    def steps():
        for trap in traps:
            for at in (1, 2) if again else (1,):
                fail(net, trap, BrokenError("from here"), at, x)
        net.zero_grad()
        x.grad = None

    steps()
    gc.collect()
    before = live_tensors()
    steps()
    gc.collect()
    assert len(alive) == 0, f"{len(alive)} calls are still in memory"
    assert live_tensors() == before


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_the_graph_is_gone_after_a_failed_backward(options):
    """Row 31: as in plain torch, if it was not retained."""
    net, plain = fragile_twins(options)
    for network in (net, plain):
        torch.manual_seed(3)
        loss = loss_of(network(rows(6, 8)))
        next(network.children()).F.backward.error, next(network.children()).F.backward.left = BrokenError(), 1
        assert_raises(BrokenError, [], loss.backward)
        assert_raises(RuntimeError, ["second time"], loss.backward)
        network.zero_grad()
    check_step(net, plain, rows(6, 8))
