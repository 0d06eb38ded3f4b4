# SPDX-License-Identifier: Apache-2.0
"""Whole RevNets, of basic and of bottleneck blocks, against the same modules run by plain PyTorch.

The stem, the transitions and the head are plain modules in both; what differs is each stage's chain.
"""

import contextlib
import copy
import gc
import io
import pickle

import pytest
from torch import nn
from torch.utils.checkpoint import checkpoint

import revkernels as rk
from behaviour.common import (
    WIDE,
    Plain,
    assert_all_close,
    assert_raises,
    check_step,
    fresh,
    images,
    loss_of,
    relative_error,
    torch,
)
from behaviour.test_precision import bf16, train_under
from revkernels.measure import branch_calls, peak_bytes
from revkernels.models import Plan, RevNet

BLOCKS = ["basic", "bottleneck"]


def networks(block, units=(3, 2), **options):
    """Return a RevNet, and a copy whose chains are plain PyTorch with the same parameter names."""
    net = RevNet(Plan(block, units, (16, 24), stem_width=8), 5, **options).to(WIDE)
    for layer in net.modules():
        # Not 1 and 0, which would hide a swap; nor so that a ReLU is open for all its inputs: the norm after it would
        # take the shift out again, and its gradient would be zero but for rounding.
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
    plain = copy.deepcopy(net)
    for stage in plain.stages:
        stage[1] = Plain([(block.F, block.G) for block in stage[1]])
    return net, plain


def chains_of(network):
    return [stage[1] for stage in network.stages]


def branches_of(network):
    return [branch for chain in chains_of(network) for block in chain.children() for branch in (block.F, block.G)]


@pytest.fixture(params=BLOCKS)
def nets(request, options):
    return networks(request.param, **options)


@pytest.mark.parametrize("units", [(1, 1), (2, 1), (3, 4)])
@pytest.mark.parametrize("block", BLOCKS)
def test_training(block, units, options):
    """Rows 1, 4 and 29: three steps, statistics included; stages of no block, of one, of several; an odd size."""
    check_step(*networks(block, units, **options), images(3, 3, 9, 7), steps=3)


@pytest.mark.parametrize("block", BLOCKS)
def test_memory_is_flat_in_the_depth_of_the_stages(block, compiled):
    """Rows 2 and 29: only what lies between the stages is stored."""
    peaks = {}
    x = torch.randn(2, 3, 16, 16, dtype=WIDE)
    for activations, depth in (("reconstruct", 2), ("reconstruct", 5), ("store", 2), ("store", 3)):
        net, _ = networks(block, (depth, depth), backend=compiled, activations=activations)

        def train(net=net):
            net(x).sum().backward()

        train()
        gc.collect()
        peaks[activations, depth] = peak_bytes(train)
    streams = 2 * 16 * 16 * 16 * 8  # bytes of a pair in the first stage
    assert abs(peaks["reconstruct", 5] - peaks["reconstruct", 2]) <= streams
    assert peaks["store", 3] - peaks["store", 2] >= streams


def test_branch_calls(nets, activations):
    """Row 3: one more of each branch of a chain, and none of a transition's."""
    net, _ = nets
    x = images(2, 3, 8, 8)
    transitions = [branch for stage in net.stages for branch in (stage[0].F, stage[0].G)]
    assert branch_calls(transitions, lambda: net(x).sum().backward()) == 4
    calls = branch_calls(branches_of(net), lambda: net(x).sum().backward())
    assert calls == 6 * (2 if activations == "reconstruct" else 1)


def test_autocast(nets, activations):
    """Row 8: every layer sees the same dtypes again; float32 streams: errors no worse than with stored activations."""
    nets = [network.float() for network in nets]
    for network in nets:
        for stage in network.stages:  # what comes out of a convolution is bfloat16, and so the streams would be
            stage[0].register_forward_hook(lambda m, i, streams: tuple(s.float() for s in streams))
    exact = copy.deepcopy(nets[1])
    x = images(4, 3, 8, 8).detach().float()
    logs = []
    for network in nets:
        logs.append([])
        for branch in branches_of(network):
            for layer in branch.modules():
                entry = []
                logs[-1].append(entry)
                layer.register_forward_hook(lambda m, i, o, entry=entry: entry.append((i[0].dtype, o.dtype)))
    got, expected = (train_under(network, x, bf16) for network in nets)
    truth = train_under(exact, x, contextlib.nullcontext)
    assert any(torch.bfloat16 in dtypes for (dtypes,) in logs[1])
    assert logs[0] == [entry * (2 if activations == "reconstruct" else 1) for entry in logs[1]]
    for name, right in truth.parameters.items():
        stored, ours = (relative_error(o.parameters[name], right) for o in (expected, got))
        assert ours <= 1.5 * stored + 1e-3, f"{name}: {ours:.2g} off, stored {stored:.2g}"


# ---- situations: what a user does with a network, and the tensors that come of it


def optimizer_steps(network, x):
    """Row 9."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for micro_batches in (1, 2):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            scaler.scale(loss_of(network(x))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return [*network.parameters(), *network.buffers()]


def gradients_asked_for(network, x):
    """Row 10."""
    parameters = list(network.parameters())
    grads = torch.autograd.grad(loss_of(network(x)), [x, parameters[0], parameters[len(parameters) // 2]])
    assert all(p.grad is None for p in (x, *parameters))
    return grads


def data_only(network, x):
    """Row 11."""
    loss_of(network(x.detach())).backward()
    return [p.grad for p in network.parameters()]


def frozen_backbone(network, x):
    """Row 12: all but the last stage and the head; what is frozen gets no gradient."""
    network.stem.requires_grad_(False)
    network.stages[0].requires_grad_(False)
    for layer in network.stages[0].modules():
        layer.eval()
    loss_of(network(x.detach())).backward()
    return [p.grad for p in network.parameters()] + list(network.buffers())


def twice_with_retain_graph(network, x):
    """Row 14."""
    loss = loss_of(network(x))
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *(p.grad for p in network.parameters()), *network.buffers()]


def gradient_penalty(network, x):
    """Row 15."""
    loss = loss_of(network(x))
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + dx.square().sum()).backward()
    return [x.grad, *(p.grad for p in network.parameters())]


def evaluation(network, x):
    """Row 16."""
    network(x)
    network.eval()
    before = x.detach().clone()
    with torch.inference_mode():
        y = network(x)
    assert torch.equal(x, before)
    loss_of(network(x)).backward()
    return [y.clone(), x.grad, *(p.grad for p in network.parameters()), *network.buffers()]


def channels_last(network, x):
    """Rows 18 and 26."""
    network.to(memory_format=torch.channels_last)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    loss_of(network(x)).backward()
    return [x.grad, *(p.grad for p in network.parameters()), *network.buffers()]


def backward_hooks(network, x):
    """Row 22: on branches, once each."""
    seen = {}
    for number, branch in enumerate(branches_of(network)):

        def note(module, grad_input, grad_output, number=number):
            assert number not in seen
            seen[number] = [*grad_input, *grad_output]

        branch.register_full_backward_hook(note)
    loss_of(network(x)).backward()
    return [gradient for number in sorted(seen) for gradient in seen[number]]


def copies(network, x):
    """Row 26: a copy, a pickled one and one from a file train on as the original does."""
    loss_of(network(x)).backward()
    others = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), network]
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    found = []
    for other in others:
        other.load_state_dict(torch.load(file, weights_only=True))
        file.seek(0)
        other.zero_grad()
        loss_of(other(x.detach())).backward()
        found += [*(p.grad for p in other.parameters()), *other.buffers()]
    return found


def other_parameters(network, x):
    """Row 26: torch.func.functional_call."""
    values = {name: (p.detach() + 0.1).requires_grad_() for name, p in network.named_parameters()}
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    loss_of(torch.func.functional_call(network, {**values, **buffers}, (x,))).backward()
    assert all(p.grad is None for p in network.parameters())
    return [x.grad, *(v.grad for v in values.values()), *buffers.values(), *network.buffers()]


def checkpointed(network, x):
    """Row 27."""
    loss_of(checkpoint(network, x, use_reentrant=False)).backward()
    return [x.grad, *(p.grad for p in network.parameters())]


def saved_on_cpu(network, x):
    """Row 35."""
    with torch.autograd.graph.save_on_cpu():
        y = network(x)
    loss_of(y).backward()
    return [x.grad, *(p.grad for p in network.parameters()), *network.buffers()]


SITUATIONS = [
    *(optimizer_steps, gradients_asked_for, data_only, frozen_backbone, twice_with_retain_graph, gradient_penalty),
    *(evaluation, channels_last, backward_hooks, copies, other_parameters, checkpointed, saved_on_cpu),
]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situation(situation, nets):
    """Rows 9, 10, 11, 12, 14, 15, 16, 18, 22, 26, 27 and 35: each on a whole network."""
    x = images(3, 3, 8, 8)
    assert_all_close(*(situation(network, fresh(x)[1]) for network in nets))


CHANGES = {
    "a convolution's weight": ("2.weight", "parameter"),
    "a norm's scale": ("0.weight", "parameter"),
    "a running mean": ("0.running_mean", "buffer"),
}


@pytest.mark.parametrize("chain", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_in_place_between_forward_and_backward(change, chain, nets, activations):
    """Row 33: named with its place in the stage's chain; a running mean counts where norms are in eval mode."""
    net, _ = nets
    path, kind = CHANGES[change]
    loss = loss_of(net.eval()(images(2, 3, 8, 8)))
    with torch.no_grad():
        chains_of(net)[chain][0].G.get_submodule(path.split(".")[0]).state_dict()[path.split(".")[1]].mul_(2)
    if activations == "store":
        assert_raises(RuntimeError, ["modified by an inplace operation"], loss.backward)
    else:
        parts = ["block 0, branch G", f"{kind} {path}", "changed in place between the forward and the backward"]
        assert_raises(rk.ReconstructionError, parts, loss.backward)


def test_a_failing_layer(nets):
    """Row 31: an exception in the forward or in the recompute goes through, and the next step is right."""
    net, plain = nets
    for fail_at in (1, 2):
        calls = []

        def fail(module, inputs, calls=calls, fail_at=fail_at):
            calls.append(1)
            if len(calls) == fail_at:
                raise KeyError("from a layer")

        hook = chains_of(net)[0][0].F[2].register_forward_pre_hook(fail)
        with contextlib.suppress(KeyError):
            loss_of(net(images(3, 3, 8, 8))).backward()
        hook.remove()
        assert calls
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, images(3, 3, 8, 8), steps=2)
