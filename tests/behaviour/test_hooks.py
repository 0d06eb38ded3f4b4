# SPDX-License-Identifier: Apache-2.0
"""Module hooks, parameter hooks and saved-tensor hooks around a reversible chain."""

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    assert_same,
    check_step,
    dropout_mlp,
    fresh,
    gathered,
    loss_of,
    mlp,
    pairs_of,
    rows,
    tensors_in,
    torch,
    twins,
)
from revkernels.nn import ReversibleSequential, is_recomputing


def blocks_of(network):
    return list(network.children())


def branches_of(network):
    return [branch for block in blocks_of(network) for branch in (block.F, block.G)]


def check_forward_hooks(kind, backend, activations):
    """Row 22, as a function: on every F and G, and on every module inside them."""
    net, _ = kind.twins(3, backend=backend, activations=activations)
    logs = {"branches": [], "inside": []}
    for number, branch in enumerate(branches_of(net)):
        for module in branch.modules():
            log = logs["branches" if module is branch else "inside"]
            module.register_forward_pre_hook(lambda m, i, n=number, log=log: log.append(("pre", n, is_recomputing())))
            module.register_forward_hook(lambda m, i, o, n=number, log=log: log.append(("post", n, is_recomputing())))
    y = net(kind.x())
    calls = {"branches": [1] * 6, "inside": [len(list(branch.modules())) - 1 for branch in branches_of(net)]}
    expected = {}
    for which, count in calls.items():
        forward = [(when, n, False) for n in range(6) for when in ("pre", "post") * count[n]]
        assert logs[which] == forward
        again = [(when, n, True) for n in reversed(range(6)) for when in ("pre", "post") * count[n]]
        expected[which] = forward + (again if activations == "reconstruct" else [])
    loss_of(y).backward()
    assert logs == expected
    assert not is_recomputing()


def test_forward_hooks_on_branches(kind, options):
    """Row 22: forward and pre-forward hooks fire in the forward and again in the recompute, told apart."""
    check_forward_hooks(kind, **options)


def test_hooks_see_the_values_of_the_forward_again(kind, backend):
    """Row 22: what a branch reads and returns in the recompute is what it read and returned."""
    net, _ = kind.twins(3, backend=backend)
    seen = {}
    for number, branch in enumerate(branches_of(net)):

        def look(module, inputs, output, number=number):
            seen[number, is_recomputing()] = inputs[0].detach().clone(), output.detach().clone()

        branch.register_forward_hook(look)
    loss_of(net(kind.x())).backward()
    assert len(seen) == 12
    for number in range(6):
        assert_all_close(seen[number, True], seen[number, False])


def test_a_hook_that_changes_what_a_branch_reads_and_returns(kind, options):
    """Row 22: a hook's own arithmetic is part of the branch, with gradients, forward and recompute alike."""
    net, plain = kind.twins(3, **options)
    for network in (net, plain):
        for branch in branches_of(network):
            branch.register_forward_pre_hook(lambda m, i: (torch.sin(i[0]),))
            branch.register_forward_hook(lambda m, i, o: o * torch.sigmoid(o))
    check_step(net, plain, kind.x(), steps=2)


def test_hooks_on_blocks(kind, options):
    """Row 22: a block is called once, with its two streams, and returns two."""
    net, plain = kind.twins(3, **options)
    log = []
    for number, block in enumerate(net):
        block.register_forward_pre_hook(lambda m, i, n=number: log.append(("pre", n, len(i))))
        block.register_forward_hook(lambda m, i, o, n=number: log.append(("post", n, len(o))))
    check_step(net, plain, kind.x())
    assert log == [(when, n, 2) for n in range(3) for when in ("pre", "post")]


def test_a_block_hook_that_computes_and_draws(options):
    """Rows 6 and 22: a regulariser on a block's streams, and random numbers in a hook, belong to nobody else."""
    results = []
    for network in twins(pairs_of(lambda: dropout_mlp(p=0.5), 3), **options):
        torch.manual_seed(0)
        penalties = []

        def before_block(module, inputs):
            torch.rand(2)  # moves the generator, and changes nothing

        def on_block(module, inputs, output, penalties=penalties):
            penalties.append((torch.rand(4, dtype=WIDE) * output[0].square()).sum())

        x = rows()
        if isinstance(network, ReversibleSequential):
            network[0].register_forward_pre_hook(before_block)
            network[1].register_forward_hook(on_block)
            y = network(x)
        else:
            x1, x2 = x.chunk(2, 1)
            before_block(None, None)
            for index, block in enumerate(network.children()):
                x1 = x1 + block.F(x2)
                x2 = x2 + block.G(x1)
                if index == 1:
                    on_block(None, None, (x1, x2))
            y = torch.cat((x1, x2), 1)
        (loss_of(y) + penalties[0]).backward()
        results.append([y.detach(), x.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_full_backward_hooks(kind, options):
    """Row 22: on F and G: each once, with plain PyTorch's gradients."""
    logs = []
    given = kind.x()
    for network in kind.twins(3, **options):
        torch.manual_seed(0)
        log = {}
        for number, branch in enumerate(branches_of(network)):
            branch.register_full_backward_hook(
                lambda m, gi, go, n=number, log=log: log.setdefault(n, []).append((gi, go))
            )
        loss_of(network(given)).backward()
        assert sorted(log) == list(range(6))
        assert all(len(calls) == 1 for calls in log.values())
        logs.append([g for n in range(6) for half in log[n][0] for g in half])
    assert_all_close(*logs)


class TwoStreams(nn.Module):
    """A block as a plain module of two inputs and two outputs."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x1, x2):
        y1 = x1 + self.block.F(x2)
        return y1, x2 + self.block.G(y1)


def test_full_backward_hooks_on_blocks(kind, options):
    """Row 22: a block's hooks get the gradients of its streams, in and out, once."""
    net, plain = kind.twins(3, **options)
    plain_blocks = [TwoStreams(block) for block in blocks_of(plain)]
    x = kind.x()
    logs = []
    for blocks in (list(net), plain_blocks):
        log = []
        for n, block in enumerate(blocks):
            block.register_full_backward_pre_hook(lambda m, go, n=n, log=log: log.append(("pre", n, go)))
            block.register_full_backward_hook(lambda m, gi, go, n=n, log=log: log.append(("post", n, gi, go)))
        logs.append(log)
        if blocks is plain_blocks:
            streams = x.chunk(2, 1)
            for block in blocks:
                streams = block(*streams)
            loss_of(torch.cat(streams, 1)).backward()
        else:
            loss_of(net(x)).backward()
    assert sorted(entry[:2] for entry in logs[0]) == [(when, n) for when in ("post", "pre") for n in range(3)]
    for got, expected in zip(*(sorted(log, key=lambda entry: entry[:2]) for log in logs), strict=True):
        assert_all_close(tensors_in(got[2:]), tensors_in(expected[2:]), what=str(got[:2]))


def test_a_backward_hook_that_changes_the_gradient(kind, options):
    """Row 22: what a full-backward hook returns is what goes on."""
    net, plain = kind.twins(3, **options)
    for network in (net, plain):
        branches_of(network)[3].register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        branches_of(network)[2].register_full_backward_pre_hook(lambda m, go: (go[0] * 3,))
    check_step(net, plain, kind.x())


def test_global_module_hooks(options):
    """Row 22: hooks for all modules count as hooks on blocks."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        check_step(net, plain, rows())
    finally:
        handle.remove()
    assert all(seen.count(block) == 1 for block in net)
    assert seen.count(net) == 1


@pytest.mark.parametrize("when", ["before", "between"])
def test_global_hooks_that_come_and_go(kind, options, when):
    """Row 22: hooks for all modules are in the recompute those of the forward, and afterwards those of the caller."""
    everywhere = nn.modules.module
    tables = everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks
    given, outcomes = kind.x(), []
    for network in kind.twins(3, **options):
        changed = {module for branch in branches_of(network) for module in branch.modules()}

        def register(changed=changed):
            yield everywhere.register_module_forward_pre_hook(lambda m, i: (i[0] * 1.5,) if m in changed else None)
            yield everywhere.register_module_forward_hook(lambda m, _, f: f + 0.25 if m in changed else None)

        leaves, x = fresh(given)
        handles = list(register()) if when == "before" else []
        try:
            y = network(x)
            for handle in handles:
                handle.remove()
            handles = [] if handles else list(register())
            then = list(map(dict, tables))
            loss_of(y).backward()
            assert list(map(dict, tables)) == then
        finally:
            for handle in handles:
                handle.remove()
        outcomes.append(gathered(network, y, leaves))
    assert_same(*outcomes)


def test_hooks_on_parameters(kind, options):
    """Row 22: post-accumulate-grad hooks and tensor hooks fire once, with the right gradient."""
    logs = []
    given = kind.x()
    for network in kind.twins(3, **options):
        torch.manual_seed(0)
        log = []
        for name, p in network.named_parameters():
            p.register_hook(lambda g, name=name, log=log: log.append((name, "hook", g.clone())))
            p.register_post_accumulate_grad_hook(
                lambda p, name=name, log=log: log.append((name, "post", p.grad.clone()))
            )
        loss_of(network(given)).backward()
        log.sort(key=lambda entry: entry[:2])
        logs.append(log)
    assert [entry[:2] for entry in logs[0]] == [entry[:2] for entry in logs[1]]
    assert len(logs[0]) == 2 * len(list(network.parameters()))
    assert_all_close(*([entry[2] for entry in log] for log in logs))


def test_optimizer_steps_inside_the_backward(kind, options):
    """Row 22: a post-accumulate-grad hook that steps each parameter as soon as its gradient is there, then frees it."""
    nets = kind.twins(3, **options)
    for network in nets:
        for p in network.parameters():

            def step_now(p):
                with torch.no_grad():
                    p.sub_(p.grad, alpha=0.01)
                p.grad = None

            p.register_post_accumulate_grad_hook(step_now)
        torch.manual_seed(0)
        for _ in range(3):
            loss_of(network(kind.x())).backward()
    assert_all_close(*(list(network.parameters()) for network in nets))


def check_stashed_streams(net, x):
    """A stream that a hook kept, in the forward or the recompute, never changes afterwards. A step, as a function."""
    kept = []

    def stash(module, inputs, output):
        for tensor in (inputs[0], output):
            for t in tensor if isinstance(tensor, tuple) else (tensor,):
                kept.append((t.detach(), t.detach().clone()))

    for branch in branches_of(net):
        branch.register_forward_hook(stash)
    net[1].register_forward_hook(stash)
    y = net(x)
    kept.extend((t, t.detach().clone()) for t in y)
    loss_of(y).backward()
    for number, (tensor, copy) in enumerate(kept):
        assert torch.equal(tensor, copy), f"the stream kept as number {number} was written over"


def test_streams_that_a_hook_keeps_do_not_change(kind, options):
    """Row 22: in-place writes happen only in memory that nobody else can see."""
    check_stashed_streams(kind.twins(4, **options)[0], kind.pair())


def check_stashed_gradients(net, x, of=lambda branch: branch):
    """A gradient that a hook kept never changes afterwards. A step, as a function; ``of``: what has hooks."""
    kept = []

    def stash(module, grad_input, grad_output):
        kept.extend((g, g.clone()) for g in (*grad_input, *grad_output) if g is not None)

    for hooked in map(of, branches_of(net)):
        hooked.register_full_backward_hook(stash)
        hooked.register_forward_hook(
            lambda m, i, o: o.requires_grad and o.register_hook(lambda g: kept.append((g, g.clone()))) and None
        )
    loss_of(net(x)).backward()
    assert len(kept) > 12
    for number, (gradient, copy) in enumerate(kept):
        assert torch.equal(gradient, copy), f"the gradient kept as number {number} was written over"


def test_gradients_that_a_hook_keeps_do_not_change(kind, options):
    """Row 22: the gradient is accumulated in place only where nobody holds it."""
    check_stashed_gradients(kind.twins(4, **options)[0], kind.x())


@pytest.mark.parametrize("kind", ["basic", "bottleneck"], indirect=True)
def test_gradients_that_a_hook_of_the_last_layer_keeps_do_not_change(kind, options):
    """Row 22: nor where the branch itself has no hooks, so that its norm accumulates into the stream's gradient."""
    check_stashed_gradients(kind.twins(4, **options)[0], kind.x(), of=lambda branch: branch[-1])


def test_a_hook_that_replaces_a_block_s_streams(backend):
    """Row 22: it cannot be undone, and the error says so and what to do."""
    net, _ = twins(pairs_of(mlp, 3), backend=backend)
    net[1].register_forward_hook(lambda m, i, o: tuple(t * 2 for t in o))
    assert_raises(rk.ReconstructionError, ["hook", "block 1", "activations='store'"], lambda: net(rows()))


@pytest.mark.parametrize("backward_inside", [False, True])
def test_outer_saved_tensor_hooks(backward_inside, kind, options):
    """Row 35: save_on_cpu and packing hooks around the chain; the network around it is packed by them."""
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.numpy() if not tensor.requires_grad else tensor.detach().numpy().copy()

    contexts = [
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy),
    ]
    x = kind.x()
    head = nn.Linear(x.shape[-1], x.shape[-1]).to(WIDE)
    net, plain = kind.with_dropout(0.1).twins(3, **options)
    for context in contexts:
        results = []
        for network in (net, plain):
            torch.manual_seed(0)
            leaves, copied = fresh(x)
            head.zero_grad()
            network.zero_grad()
            with context:
                y = torch.tanh(head(network(copied.sin())))
                if backward_inside:
                    loss_of(y).backward()
            if not backward_inside:
                loss_of(y).backward()
            results.append([leaves[0].grad, *(p.grad for p in network.parameters()), head.weight.grad.clone()])
        assert_all_close(*results)
    assert packed


def test_retained_gradient_of_a_stream(options):
    """Row 22: retain_grad() on what a hook sees."""
    results = []
    for network in twins(pairs_of(mlp, 3), **options):
        torch.manual_seed(0)
        kept = []

        def keep(module, inputs, output, kept=kept):
            if not is_recomputing():
                output.retain_grad()
                kept.append(output)

        branches_of(network)[2].register_forward_hook(keep)
        loss_of(network(rows())).backward()
        results.append(kept[0].grad)
    assert_close(*results)


@pytest.mark.parametrize("anomaly", [True, False])
def test_anomaly_detection(anomaly, options):
    """Row 22: under torch.autograd.detect_anomaly nothing changes."""
    net, plain = twins(pairs_of(mlp, 2), **options)
    with torch.autograd.set_detect_anomaly(anomaly):
        check_step(net, plain, rows())
