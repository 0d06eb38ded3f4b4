# SPDX-License-Identifier: Apache-2.0
"""Which gradients are asked for, how, and how often."""

import pytest
from torch import nn

from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    check_step,
    fresh,
    loss_of,
    mlp,
    pairs_of,
    rows,
    step,
    torch,
    twins,
)


@pytest.mark.parametrize("wanted", ["parameters", "inputs", "both", "one parameter in the middle", "the last bias"])
@pytest.mark.parametrize("before", [None, 0.5], ids=["no grad yet", "a grad already"])
def test_autograd_grad(wanted, before, kind, options):
    """Row 10: torch.autograd.grad returns the gradients, and .grad stays as it was."""
    results = []
    for network in kind.twins(4, **options):
        torch.manual_seed(1)
        x = kind.x()
        parameters = list(network.parameters())
        for leaf in (x, *parameters):
            leaf.grad = None if before is None else torch.full_like(leaf, before)
        inputs = {
            "parameters": parameters,
            "inputs": [x],
            "both": [x, *parameters],
            "one parameter in the middle": [parameters[len(parameters) // 2]],
            "the last bias": [parameters[-1]],
        }[wanted]
        results.append(torch.autograd.grad(loss_of(network(x)), inputs))
        assert all(p.grad is None if before is None else (p.grad == before).all() for p in (x, *parameters))
    assert_all_close(*results)


def test_backward_with_inputs(kind, options):
    """Row 10: backward(inputs=...) fills those and no others."""
    net, plain = kind.twins(3, **options)
    grads = []
    for network in (net, plain):
        torch.manual_seed(1)
        x, parameters = kind.x(), list(network.parameters())
        loss_of(network(x)).backward(inputs=[parameters[0], parameters[5]])
        assert [i for i, p in enumerate(parameters) if p.grad is not None] == [0, 5]
        assert x.grad is None
        grads.append([parameters[0].grad, parameters[5].grad])
    assert_all_close(*grads)


def test_input_without_requires_grad(kind, options):
    """Row 11: parameters train, single tensor or pair."""
    net, plain = kind.twins(3, **options)
    got = check_step(net, plain, kind.x(requires_grad=False), steps=2)
    assert all(gradient.abs().sum() > 0 for gradient in got.parameters.values())
    check_step(net, plain, kind.pair(requires_grad=False))


@pytest.mark.parametrize("which", [0, 1])
def test_one_half_without_requires_grad(which, kind, options):
    """Rows 11 and 36: one stream of the pair is data, the other is learnt."""
    x = kind.pair()
    x[1 - which].requires_grad_(False)
    check_step(*kind.twins(3, **options), x)


FROZEN = {
    "every F": lambda i, name: name.startswith("F"),
    "every G": lambda i, name: name.startswith("G"),
    "middle blocks": lambda i, name: i in (1, 2),
    "the first block": lambda i, name: i == 0,
    "the last block": lambda i, name: i == 3,
    "everything": lambda i, name: True,
    "weights": lambda i, name: name.endswith("weight"),
}


@pytest.mark.parametrize("requires_grad", [True, False], ids=["input learns", "input is data"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen(frozen, requires_grad, kind, options):
    """Row 12: frozen F or G, frozen blocks, all frozen but the input."""
    net, plain = kind.twins(4, **options)
    for network in (net, plain):
        for index, block in enumerate(network.children()):
            for name, parameter in block.named_parameters():
                parameter.requires_grad_(not FROZEN[frozen](index, name))
    check_step(net, plain, kind.x(requires_grad=requires_grad))


def test_shared_blocks(kind, options):
    """Row 13: one block's weights at every depth."""
    check_step(*twins(kind.pairs(1) * 4, **options), kind.x(), steps=2)


def test_tied_branches(kind, options):
    """Row 13: F and G are one module, some norms inside."""
    check_step(*twins([(b, b) for b in (kind.make(), kind.make(), kind.make())], **options), kind.x(), steps=2)


def test_tied_parameters(kind, options):
    """Row 13: modules of their own that share their last parameter, between F and G and between blocks."""
    pairs = kind.pairs(3)
    layers = [
        [layer for layer in branch.modules() if hasattr(layer, "weight")][-1] for pair in pairs for branch in pair
    ]
    for layer in layers:
        layer.weight = layers[0].weight
    net, plain = twins(pairs, **options)
    assert len(list(net.parameters())) == len(list(plain.parameters())) < sum(1 for _ in kind.twins(3)[0].parameters())
    check_step(net, plain, kind.x(), steps=2)


def test_weight_shared_with_what_surrounds_the_chain(kind, options):
    """Row 13: an embedding's weight used before, inside and after."""
    results = []
    for network in kind.twins(2, **options):
        torch.manual_seed(0)
        x, weight = kind.x(), next(network.parameters())
        y = network(x * weight.sum()) * weight.mean()
        results.append(torch.autograd.grad(loss_of(y), [x, *network.parameters()]))
    assert_all_close(*results)


def test_backward_twice(kind, options):
    """Row 14: retain_graph=True, then once more: twice the gradient."""
    net, plain = kind.with_dropout(0.1).twins(3, **options)
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        x = kind.x()
        loss = loss_of(network(x))
        loss.backward(retain_graph=True)
        once = [x.grad.clone(), *(p.grad.clone() for p in network.parameters())]
        loss.backward()
        twice = [x.grad, *(p.grad for p in network.parameters())]
        assert_all_close(twice, [2 * g for g in once])
        results.append(twice)
    assert_all_close(*results)


def test_backward_a_third_time_is_refused_as_torch_refuses_it(options):
    """Row 14: the graph is gone after a backward that does not retain it."""
    net, _ = twins(pairs_of(mlp, 3), **options)
    loss = loss_of(net(rows()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_losses_on_one_forward(kind, options):
    """Row 14: a backward through one output, then through the other, whose graphs overlap."""
    results = []
    for network in kind.twins(3, **options):
        torch.manual_seed(0)
        leaves, x = fresh(kind.pair())
        y1, y2 = network(x)
        y2.square().sum().backward(retain_graph=True)
        y1.square().sum().backward()
        results.append([*(leaf.grad for leaf in leaves), *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_batched_gradients(options):
    """Row 10: many gradients at once, which have no memory that a kernel could walk."""
    results = []
    for network in twins(pairs_of(mlp, 3), **options):
        torch.manual_seed(1)
        x, seeds = rows(), torch.randn(3, 5, 8, dtype=WIDE)
        wanted = [x, *network.parameters()]
        results.append([*torch.autograd.grad(network(x), wanted, seeds, is_grads_batched=True)])
        results[-1].append(torch.autograd.functional.jacobian(network, x, vectorize=True))
    assert_all_close(*results)


def test_batched_gradients_of_a_fused_norm_are_refused(activations, compiled):
    net, _ = twins(pairs_of(lambda: nn.Sequential(nn.LayerNorm(4), mlp()).to(WIDE), 2), activations=activations)
    y = net(rows())
    assert_raises(
        NotImplementedError,
        ["is_grads_batched", "backend='eager'"],
        lambda: torch.autograd.grad(y, list(net.parameters()), torch.randn(3, 5, 8, dtype=WIDE), is_grads_batched=True),
    )


def test_second_order(kind, options):
    """Row 15: create_graph=True, a gradient penalty, under the same dropout masks."""
    check_second_order(kind, **options)


def check_second_order(kind, **options):
    """Row 15, as a function."""
    results = []
    for network in kind.with_dropout(0.1).twins(3, **options):
        torch.manual_seed(0)
        x = kind.x()
        y = network(x)
        (dx,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
        (loss_of(y) + dx.square().sum()).backward()
        results.append([dx.detach(), x.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


def test_second_order_of_parameters(kind, options):
    """Row 15: a Hessian-vector product."""
    results = []
    for network in kind.twins(2, **options):
        torch.manual_seed(0)
        x, parameters = kind.x(), list(network.parameters())
        first = torch.autograd.grad(loss_of(network(x)), parameters, create_graph=True)
        product = sum((g * torch.ones_like(g)).sum() for g in first)
        results.append(torch.autograd.grad(product, [x, *parameters], allow_unused=True))
    assert_all_close(*results)


def test_gradcheck(backend):
    """Rows 1 and 15: against finite differences, first and second order, with no second network to trust."""
    net, _ = twins(pairs_of(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()).to(WIDE), 2), backend=backend)
    x = rows(2, 4)
    assert torch.autograd.gradcheck(net, (x,))
    assert torch.autograd.gradgradcheck(net, (x,))


def test_a_second_step_after_a_partial_backward(kind, options):
    """Row 10: a backward that stopped half-way leaves nothing behind for the next forward."""
    net, plain = kind.twins(4, **options)
    x = kind.x()
    for network in (net, plain):
        torch.autograd.grad(loss_of(network(x)), next(reversed(list(network.parameters()))))
    check_step(net, plain, kind.x())


class Residual(nn.Module):
    """Returns its input, or views of it: gradients pass through unchanged, and share memory if a library lets them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.offset = nn.Parameter(torch.randn(5, 4, dtype=WIDE))

    def forward(self, x):
        return {
            "plus a parameter": lambda: x + self.offset,
            "itself": lambda: x,
            "only a parameter": lambda: self.offset.expand_as(x),
            "twice itself": lambda: x + x,
            "flipped": lambda: x.flip(0),
            "a view": lambda: x.unsqueeze(0).squeeze(0),
            "constant": lambda: torch.ones_like(x),
            "transposed twice": lambda: x.t().contiguous().t(),
        }[self.kind]()


KINDS = [
    "plus a parameter",
    "itself",
    "only a parameter",
    "twice itself",
    "flipped",
    "a view",
    "constant",
    "transposed twice",
]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_pass_through_unchanged(kind, options):
    """Row 10: nobody's gradient is written over: the stream's, the parameter's, the one in .grad."""
    net, plain = twins([(Residual(kind), mlp()), (mlp(), Residual(kind)), (Residual(kind), Residual(kind))], **options)
    check_step(net, plain, rows())
    results = []
    for network in (net, plain):
        torch.manual_seed(0)
        pair, seeds = (rows(5, 4), rows(5, 4)), [torch.randn(5, 4, dtype=WIDE) for _ in range(2)]
        kept = [seed.clone() for seed in seeds]
        torch.autograd.backward(network(pair), seeds)
        assert all(torch.equal(a, b) for a, b in zip(seeds, kept, strict=True)), "the caller's gradient was written to"
        results.append([leaf.grad for leaf in pair] + [p.grad for p in network.parameters()])
    assert_all_close(*results)


def test_gradient_seed_stays_the_caller_s(options):
    """Row 10: the tensor handed to backward() is not written to, expanded or dense."""
    net, plain = twins(pairs_of(mlp, 3), **options)
    for seed in (torch.randn(5, 8, dtype=WIDE), torch.ones((), dtype=WIDE).expand(5, 8)):
        kept = seed.clone()
        x = rows()
        grads = []
        for network in (net, plain):
            leaves, copy = fresh(x)
            network(copy).backward(seed)
            grads.append(leaves[0].grad)
        assert torch.equal(seed, kept)
        assert_close(*grads)
    assert step(net, rows()).inputs[0] is not None
