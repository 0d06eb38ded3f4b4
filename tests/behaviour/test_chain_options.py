# SPDX-License-Identifier: Apache-2.0
"""Chains as containers, their options where they are set by mistake or later, and errors from inside a branch."""

import sys
import warnings

import pytest
from torch import nn

import revkernels as rk
from behaviour.common import assert_raises, rows, torch
from revkernels.compat import revtorch
from revkernels.diagnostics import memory_report
from revkernels.models import revnet38
from revkernels.models.revvit import RevViT
from revkernels.nn import AttentionBranch, MLPBranch, ReversibleBlock, ReversibleSequential, linked
from revkernels.nn import chain as chains


def block(**options):
    return ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4), **options)


# ---- blocks


@pytest.mark.parametrize(
    ("name", "value"), [("split_dim", -1), ("activations", "store"), ("coupling", "exact"), ("backend", "eager")]
)
def test_an_option_of_a_block_in_a_chain(name, value):
    """It would not be used: the attention would look along the wrong dimension, and into the future."""

    def make():
        return ReversibleBlock(AttentionBranch(4, 2, causal=True), MLPBranch(4, 8), **{name: value})

    words = ["blocks[1]", f"{name}={value!r}", "ReversibleSequential"]
    assert_raises(ValueError, words, lambda: ReversibleSequential(block(), make()))
    chain = ReversibleSequential(make(), make(), **{name: value})
    assert_raises(ValueError, ["blocks[2]", name], lambda: ReversibleSequential(block(), block()).append(make()))
    assert repr(value) in str(chain) and str(ReversibleSequential(block())).count("coupling") == 1


def test_chains_grow_and_blocks_are_replaced():
    chain = ReversibleSequential().append(block())
    assert chain.extend([block(), block()]) is chain and len(chain) == 3 and list(chain._modules) == ["0", "1", "2"]
    other = block()
    chain[1] = other
    assert chain[1] is other and list(chain)[1] is other and "1.F.weight" in chain.state_dict()
    chain(rows(dtype=torch.float32)).sum().backward()
    assert_raises(TypeError, ["blocks[3]", "Linear"], lambda: chain.append(nn.Linear(4, 4)))
    assert_raises(TypeError, ["0", "Linear", "ReversibleBlock"], lambda: setattr(chain, "0", nn.Linear(4, 4)))
    three = ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert_raises(ValueError, ["blocks[0]", "streams"], lambda: chain.__setitem__(0, three))
    assert_raises(TypeError, ["G", "the class ReLU"], lambda: ReversibleBlock(nn.Linear(4, 4), nn.ReLU))
    assert len(chain) == 3


def test_blocks_are_inserted_and_removed():
    """As an `nn.Sequential` does it: names have no gap, in which a later append would replace a block."""
    first, second, third, fourth = (block() for _ in range(4))
    chain = ReversibleSequential(first, third)
    before = chain(rows(dtype=torch.float32))
    assert chain.insert(1, second) is chain and chain.insert(len(chain), fourth) is chain
    assert list(chain) == [first, second, third, fourth] and list(chain._modules) == ["0", "1", "2", "3"]
    before.sum().backward()  # the blocks that the forward had
    assert first.F.weight.grad is not None and second.F.weight.grad is None
    del chain[1]
    assert list(chain) == [first, third, fourth] and "2.G.bias" in chain.state_dict()
    assert list(chain.append(second)) == [first, third, fourth, second]
    del chain[-2:]
    chain.insert(-1, second).insert(0, fourth)
    assert list(chain) == [fourth, first, second, third] and list(chain._modules) == ["0", "1", "2", "3"]
    chain(rows(dtype=torch.float32)).sum().backward()
    assert second.F.weight.grad is not None
    assert_raises(TypeError, ["blocks[1]", "Linear"], lambda: chain.insert(1, nn.Linear(4, 4)))
    assert_raises(ValueError, ["blocks[0]", "streams"], lambda: chain.insert(0, ReversibleBlock(*[nn.ReLU()] * 3)))
    assert_raises(IndexError, [], lambda: chain.__delitem__(4))
    assert list(chain) == [fourth, first, second, third]
    del chain[:]
    assert len(chain.insert(0, first)) == 1 and list(chain._modules) == ["0"]


# ---- models


@pytest.mark.parametrize("make", [revnet38, lambda **o: RevViT(8, 2, 2, 10, image_size=8, patch_size=4, **o)])
def test_options_of_a_model_may_be_set_later(make):
    model, x = make(), torch.randn(2, 3, 8, 8)
    assert (model.activations, model.coupling, model.backend) == ("reconstruct", "float", None)
    held = memory_report(model, x).held_bytes
    model.activations = "store"
    assert all(chain.activations == "store" for chain in model.chains())
    assert memory_report(model, x).held_bytes > held
    model.backend, model.coupling = "eager", rk.Exact(k=12)
    assert all((c.backend, c.coupling) == ("eager", rk.Exact(k=12)) for c in model.chains())
    assert_raises(ValueError, ["activations", "'stored'"], lambda: setattr(model, "activations", "stored"))
    assert_raises(rk.BackendError, ["gpu"], lambda: setattr(model, "backend", "gpu"))
    model(x).sum().backward()


# ---- the exponent of an exact coupling where nobody has written it, or somebody averaged it


def test_the_grid_of_a_block_is_where_its_branches_are():
    branch = nn.Linear(4, 4, device="meta")
    assert ReversibleBlock(branch, nn.Tanh(), coupling="exact").grid.is_meta


def test_on_meta_first():
    with torch.device("meta"):
        model = revnet38(coupling="exact")
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(4, 3, 8, 8)
    assert len(model(x).unique()) > 20
    for garbage in (0, -1, 2**62):
        for chain in model.chains():
            chain.grid.fill_(garbage)
        assert len(model(x).unique()) > 20
        model(x).sum().backward()


def test_within_another_default_device():
    """The exponent is written where the chain is, not where new tensors go."""
    net, x = revnet38(coupling="exact"), torch.randn(4, 3, 8, 8)
    with torch.device("meta"):
        net(x).sum().backward()
        chains = list(net.chains())
        assert all(0 < chain.grid[0] < 30 for chain in chains)
        chains[0].reset_parameters()
    assert chains[0].grid[0] != chains[1].grid[0]
    net(x).sum().backward()


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_moving_average_of_the_state(steps_before):
    """Over all of a state dict, as some do: then the exponent is chosen anew."""
    net = ReversibleSequential([block() for _ in range(2)], coupling="exact")
    for _ in range(steps_before):
        net(rows(dtype=torch.float32)).sum().backward()
    averaged = ReversibleSequential([block() for _ in range(2)], coupling="exact")
    averaged.load_state_dict(net.state_dict())
    x = rows(dtype=torch.float32)
    for _ in range(20):
        net(x).sum().backward()
        with torch.no_grad():
            for mean, value in zip(averaged.state_dict().values(), net.state_dict().values(), strict=True):
                mean.copy_(0.99 * mean + 0.01 * value)
    y = averaged.eval()(x)
    assert len(y.unique()) > 20
    assert torch.equal(averaged.inverse(y), averaged.to_grid(x))


# ---- errors from inside a branch


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
@pytest.mark.parametrize("grad", [True, False])
def test_an_error_in_a_branch_says_where(grad):
    blocks = [ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)]
    blocks[2].G = nn.Linear(9, 8)
    net = ReversibleSequential(blocks, split_dim=-1)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        net(torch.randn(2, 5, 16))
    (note,) = raised.value.__notes__
    assert "block 2, branch G (Linear)" in note and "(2, 5, 8)" in note and "split_dim=-1" in note


def test_keywords_are_listed():
    net = ReversibleSequential(ReversibleBlock(AttentionBranch(4, 2), MLPBranch(4, 8)), split_dim=-1)
    words = ["'key_padding_mask'", "'attn_mask'", "nn.Sequential"]
    assert_raises(TypeError, words, lambda: net(torch.randn(2, 3, 8), key_padding_mask=None))


def test_budgets():
    assert_raises(ValueError, ["'-5%'", "must not be negative"], lambda: rk.MemoryBudget("-5%"))
    assert_raises(ValueError, ["'-1'", "must not be negative"], lambda: rk.MemoryBudget("-1"))


def test_wide_streams_in_half_precision_are_warned_of():
    """Under autocast, where ``x.float()`` is all that it takes; once a chain."""
    net = ReversibleSequential([block() for _ in range(2)])
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"x.float\(\)"):
            net(x.bfloat16())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(x.bfloat16())
            other = ReversibleSequential([block() for _ in range(2)])
            other(x)
            with torch.no_grad():
                other(x.bfloat16())
            other.activations = "store"
            other(x.bfloat16())


def test_whoever_owns_the_chain():
    """Half-steps of one's own, modules called one by one, other libraries' classes."""
    layers = [nn.Linear(4, 4) for _ in range(4)]
    steps = [chains.HalfStep(layer, k % 2, (1 - k % 2,)) for k, layer in enumerate(layers)]

    def linked_calls(x):
        for step in steps:
            x = linked.run([step], x, 2, str)
        return x

    revtorchs = revtorch.ReversibleSequence(nn.ModuleList([revtorch.ReversibleBlock(*layers[:2])]))
    for network in (lambda x: chains.run(steps, x), linked_calls, revtorchs):
        x = torch.randn(5, 8).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            network(x.bfloat16())
            network(x.bfloat16())
            network(x)
        texts = [str(warning.message) for warning in told]
        assert len(texts) == 1 and "x.float()" in texts[0] and "coupling" not in texts[0], texts
        chains._warned.clear()
