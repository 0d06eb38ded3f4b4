# SPDX-License-Identifier: Apache-2.0
"""What a user does around modules that are called one by one and are one chain all the same."""

import copy
import functools
import gc
import threading
import weakref

import pytest
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from behaviour.common import (
    TOLERANCE,
    assert_all_close,
    assert_close,
    assert_raises,
    check_step,
    loss_of,
    mlp,
    rows,
    torch,
)
from behaviour.linked_cases import Layer, Stack, chains, flow, twins
from revkernels.autograd import linked_calls
from revkernels.autograd.driver_forward import Reversal
from revkernels.autograd.linked_calls import ending_in
from revkernels.errors import ReconstructionError
from revkernels.nn import checkpoint as by_this_package
from revkernels.nn import linked
from revkernels.nn.chain import HalfStep

by_torch = functools.partial(torch_checkpoint, use_reentrant=False)


def test_outputs_are_used_elsewhere_too(backend):
    """An output goes into the next layer and into the loss, and two layers read the same one."""
    net, plain = twins([Layer(backend=backend) for _ in range(4)])

    def jumping(self, x):
        a, b, c, d = self.layers
        y = a(x)
        z = b(y)
        return torch.cat((y, z, c(y), d(c(z))), 1)

    for network in (net, plain):
        network.forward = jumping.__get__(network)
    check_step(net, plain, rows(), steps=2)


def test_the_backward_of_an_early_output(backend):
    """Is rebuilt from the last one, whose gradient nobody asks for; also before the others, and after."""
    net, plain = twins([Layer(backend=backend) for _ in range(3)])
    x = rows()
    gradients = []
    for network in (net, plain):
        outputs = [x]
        for layer in network.layers:
            outputs.append(layer(outputs[-1]))
        gradients.append(
            [
                torch.autograd.grad(loss_of(outputs[k]), [x, *network.layers[0].parameters()], retain_graph=True)
                for k in (1, 3, 2, 1)
            ]
        )
    for ours, theirs in zip(*gradients, strict=True):
        assert_all_close(ours, theirs)


def test_a_call_that_fails_leaves_the_others_as_they_were(backend):
    net, plain = twins([Layer(backend=backend) for _ in range(3)])

    def refuse(module, args):
        raise KeyError("not today")

    for place in (net.layers[2].F, net.layers[2].G):
        x = rows()
        y = net.layers[1](net.layers[0](x))
        hook = place.register_forward_pre_hook(refuse)
        with pytest.raises(KeyError, match="not today"):
            net.layers[2](y)
        hook.remove()
        expected = torch.autograd.grad(loss_of(plain.layers[1](plain.layers[0](x))), x)
        assert_all_close(torch.autograd.grad(loss_of(y), x, retain_graph=True), expected)
        z = net.layers[2](y)  # and goes on from there
        assert_all_close(torch.autograd.grad(loss_of(z), x), torch.autograd.grad(loss_of(plain(x)), x))


def test_side_inputs_of_a_call_that_fails_are_let_go(backend):
    """Whoever changes them afterwards is not in the way of the calls before."""
    net, _ = twins([Layer(backend=backend)])
    x, side = rows(), torch.ones(4, dtype=torch.float64)

    def refuse(h, side):
        raise KeyError("not today")

    y = net.layers[0](x)
    with pytest.raises(KeyError, match="not today"):
        linked.run([linked.HalfStep(refuse, 0, (1,), (side,))], y, 2, str, backend=backend)
    side.add_(1)
    loss_of(y).backward()
    assert x.grad.isfinite().all()


def test_second_order_and_a_second_backward(backend):
    net, plain = twins([Layer(backend=backend) for _ in range(3)])
    x = rows()
    second = []
    for network in (net, plain):
        (first,) = torch.autograd.grad(loss_of(network(x)), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x, *network.parameters()]))
    assert_all_close(*second)
    y = loss_of(net(x))
    once = torch.autograd.grad(y, x, retain_graph=True)
    assert_all_close(once, torch.autograd.grad(y, x), 1e-14)
    assert torch.autograd.gradcheck(net, rows(2, 8))
    flowing, _ = twins(flow(2))
    assert torch.autograd.gradcheck(flowing, rows(2, 8))
    assert torch.autograd.gradgradcheck(flowing, rows(2, 8))


def test_hooks_of_a_layer(backend):
    """They see every layer's output; one that gives another tensor begins another chain."""
    net, plain = twins([Layer(backend=backend) for _ in range(3)])
    seen = []
    for network in (net, plain):
        network.layers[1].register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
        network.layers[0].register_forward_hook(lambda module, args, y: y + 1)
        network.layers[2].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,))
    check_step(net, plain, rows())
    assert_close(seen[0], seen[1], TOLERANCE)


def test_autocast_that_changes_in_between_begins_another_chain():
    net, plain = twins([Layer() for _ in range(2)])
    for network in (net, plain):
        network.float()
    x = rows(dtype=torch.float32)

    def run(network, inner):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inner[0]):
            y = network.layers[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inner[1]):
            return network.layers[1](y)

    for inner in ((True, False), (False, True), (True, True)):
        assert chains(lambda _, inner=inner: run(net, inner), x) == 1 + (inner[0] != inner[1])
        got, expected = (torch.autograd.grad(loss_of(run(network, inner)), x) for network in (net, plain))
        assert_all_close(got, expected, 2**-7)  # of a value in bfloat16, whose last bit is 2^-8 of it


def test_without_gradients_nothing_is_linked():
    net, plain = twins([Layer() for _ in range(2)])
    x = rows()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close(net(x), plain(x), 1e-300)
    for parameter in (*net.parameters(), *plain.parameters()):
        parameter.requires_grad_(False)
    assert not net(rows(requires_grad=False)).requires_grad
    check_step(net, plain, x)


def test_checkpoint_and_a_chain_inside_a_branch(backend):
    """Around some of the layers; and layers inside a branch, which is run again as a whole."""
    net, plain = twins([Layer(backend=backend) for _ in range(4)])

    def forward(self, x):
        a, b, c, d = self.layers
        return d(by_torch(lambda x: c(b(x)), a(x)))

    net.forward = forward.__get__(net)
    check_step(net, plain, rows())

    def nest(plain):
        torch.manual_seed(5)
        inner = lambda: twins([Layer(lambda: mlp(2), backend) for _ in range(2)])[plain]  # noqa: E731
        return twins([Layer(inner, backend) for _ in range(2)])[plain]

    check_step(nest(False), nest(True), rows(5, 8))


@pytest.mark.parametrize("by", [by_torch, by_this_package], ids=["torch", "revkernels"])
def test_a_checkpoint_begins_within_a_chain(by, backend):
    """What it saves is the same in both of its runs, though only the first could go on with the chain before it."""
    for place in range(4):
        net, plain = twins(flow(2, backend))
        for network, checkpoint in ((net, by), (plain, lambda forward, x: forward(x))):
            layer = network.layers[place]
            layer.forward = functools.partial(checkpoint, layer.forward)
        check_step(net, plain, rows())
        check_step(net, plain, rows(requires_grad=False))


def test_where_torch_tells_only_whether_hooks_are_on(backend, monkeypatch):
    """As torch 2.6 does: calls under hooks are not joined, others are."""
    monkeypatch.setattr(linked_calls, "_top_hooks", None)
    net, plain = twins([Layer(backend=backend) for _ in range(4)])
    x = rows()
    assert chains(net, x) == 1
    with torch.autograd.graph.save_on_cpu():
        assert chains(net, x) == 4
        check_step(net, plain, x)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert linked_calls._any_hooks()
        assert torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() == "not here"
    assert not linked_calls._any_hooks()
    for by in (by_torch, by_this_package):
        test_a_checkpoint_begins_within_a_chain(by, backend)


def test_a_branch_goes_on_with_a_chain_from_outside(backend):
    """The output of a linked call is a side input of an outer chain, and goes into the next call in its branches."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.own = Layer(lambda: mlp(2), backend), mlp()

        def forward(self, x, memory):
            return self.own(x) + self.layer(memory)

    class Net(Stack):
        def forward(self, x):
            memory = self.layers[0](x[:, :4])
            half_steps = [HalfStep(self.layers[1], 0, (1,), (memory,)), HalfStep(self.layers[2], 1, (0,), (memory,))]
            if not self.plain:
                return linked.run(half_steps, x, 2, "FG".__getitem__, backend=backend)
            x1, x2 = x.chunk(2, 1)
            x1 = x1 + self.layers[1](x2, memory)
            return torch.cat((x1, x2 + self.layers[2](x1, memory)), 1)

    net = Net([Layer(lambda: mlp(2), backend), Reader(), Reader()])
    plain = copy.deepcopy(net)
    for module in plain.modules():
        module.plain = True
    net.plain = False
    check_step(net, plain, rows(), steps=2)


def test_nothing_is_left_behind(backend):
    """A forward without a backward, and one that failed, let go of everything without the garbage collector's help."""
    net, _ = twins([Layer(backend=backend) for _ in range(3)])
    alive = weakref.WeakSet()
    original = Reversal.__init__

    def noted(self, *args, **kwargs):
        alive.add(self)
        original(self, *args, **kwargs)

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reversal, "__init__", noted)
            y = net(rows())
            assert len(alive) == 1
            del y
            assert not alive
            loss_of(net(rows())).backward()
            assert not alive
            y = net.layers[0](rows())
            with pytest.raises(ValueError, match="must keep the shape"):
                linked.run([HalfStep(lambda h: h[:1], 0, (1,))], y, 2, "F".__getitem__, backend=backend)
            z = net.layers[1](y)  # still goes on with it
            assert len(alive) == 1
            del y, z
            assert not alive
    finally:
        gc.enable()


def test_two_threads_that_go_on_from_the_same_output(backend):
    """One goes on with its chain, the other begins one; both are right."""
    net, plain = twins([Layer(backend=backend) for _ in range(3)])
    y = net.layers[0](rows())
    asked = (y, (True, 2, 1), [half.clone() for half in y.chunk(2, 1)], None)
    assert ending_in(*asked) is not None
    assert ending_in(*asked) is None  # the first to ask has it
    for _ in range(10):
        x = rows()
        y = net.layers[0](x)
        barrier, results = threading.Barrier(2), {}

        def go_on(which, y=y, barrier=barrier, results=results):
            barrier.wait()
            results[which] = net.layers[which](y)

        threads = [threading.Thread(target=go_on, args=(which,)) for which in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        z = plain.layers[0](x)
        expected = torch.autograd.grad(loss_of([plain.layers[1](z), plain.layers[2](z)]), x)
        assert_all_close(torch.autograd.grad(loss_of([results[1], results[2]]), x), expected)


def test_errors_name_the_half_step_of_their_own_call():
    net, _ = twins([Layer() for _ in range(3)])
    y = net(rows())
    with torch.no_grad():
        net.layers[1].G[0].weight.mul_(2)
    assert_raises(ReconstructionError, ["G: parameter 0.weight was changed"], lambda: y.sum().backward())
    assert_raises(ValueError, ["x has shape (5, 7)"], lambda: net(rows(5, 7)))
    assert_raises(ValueError, ["backend is 'none'"], lambda: Layer(backend="none")(rows()))
