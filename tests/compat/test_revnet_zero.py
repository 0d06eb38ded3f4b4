# SPDX-License-Identifier: Apache-2.0
"""revnet-zero's blocks and transformer here: as plain torch, and as the original where that is right."""

import math

import pytest
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_close,
    assert_raises,
    assert_same,
    check_step,
    dropout_mlp,
    mlp,
    relative_error,
    rows,
    step,
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
    installed,
    plain,
    spelled,
)
from revkernels.compat import revnet_zero
from revkernels.compat.revnet_zero import RevBlock, RevBlocks, RevTransformer, RevTransformerBlock
from revkernels.errors import ReconstructionError
from revkernels.measure import peak_bytes

SIGNATURES = {
    "RevBlock": "(f_fn, g_fn)",
    "RevTransformerBlock": "(d_model, n_heads, ffn_expansion=4, dropout=0.0)",
    "RevTransformer": "(vocab_size, d_model, n_heads, n_layers, max_seq_len=4096, ffn_expansion=4, dropout=0.1)",
}


class Last(nn.Module):
    """A batch norm of the last dimension, whatever is before it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4).to(WIDE)

    def forward(self, x):
        return self.norm(x.flatten(0, -2)).view_as(x)


def norm_last():
    return nn.Sequential(Last(), mlp())


def block_in_plain_torch(block, x):
    return couple((block.f_fn, block.g_fn), x, -1)


def blocks_in_plain_torch(blocks, x):
    for block in blocks:
        x = block_in_plain_torch(block, x)
    return x


def chain(make=mlp, depth=3):
    net = RevBlocks([RevBlock(make(), make()) for _ in range(depth)])
    return net, plain(net, blocks_in_plain_torch)


def test_signatures():
    check_signatures(revnet_zero, SIGNATURES)


@pytest.mark.parametrize("make", [mlp, norm_last, dropout_mlp], ids=["mlp", "norm", "dropout"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 2, 3, 8)])
def test_steps_as_plain_torch(make, shape, backend):
    """A block, and a chain of three: gradients, statistics counted once, the same masks, the generator afterwards."""
    block = RevBlock(make(), make())
    check_step(block, plain(block, block_in_plain_torch), rows(*shape), steps=2)
    check_step(*chain(make), rows(*shape), steps=2)
    check_step(*chain(make), rows(*shape, requires_grad=False))


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_inverse(depth, backend):
    """Of a block and of a chain, without a gradient, leaving statistics alone."""
    net, _ = chain(mlp, depth)
    x = rows(2, 3, 8)
    y = net(x)
    for network, start in ((net, y), *((block, block(x)) for block in net)):
        with unwritten(network, start):
            again = network.inverse(start)
        assert_close(again, x.detach())
        assert again.requires_grad == (depth == 0)


def test_derivatives():
    net, _ = chain(lambda: mlp(2), 2)
    check_gradients(net, rows(2, 4))


def test_autocast_in_the_backward(backend):
    net, twin = chain(lambda: mlp().float(), 2)
    check_step(InAutocast(net), InAutocast(twin), rows(5, 8, dtype=torch.float32), tolerance=1e-6)


def test_two_forwards_before_one_backward(backend):
    results = []
    for network in chain(lambda: dropout_mlp(p=0.5)):
        torch.manual_seed(1)
        a, b = rows(5, 8), rows(5, 8)
        (network(a) * network(b)).sum().backward()
        results.append([a.grad, b.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*results)


class Twice(RevBlock):
    def forward(self, x):
        return 2 * super().forward(x)

    def inverse(self, y):
        return super().inverse(y / 2)


def test_hooks_and_a_forward_of_its_own(backend):
    """Such a block is called by itself; hooks of branches fire anyway. The list stays a list."""
    net = RevBlocks([RevBlock(mlp(), mlp()) for _ in range(5)])
    twin = plain(net, blocks_in_plain_torch)
    seen = []
    net[2].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    net[0].f_fn.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    check_step(net, twin, rows(5, 8))
    assert seen == [(5, 4), (5, 8), (5, 4)]
    net[3] = Twice(mlp(), mlp())
    x = rows(5, 8)
    expected = block_in_plain_torch(net[4], 2 * blocks_in_plain_torch(net[:4], x))
    assert_close(net(x), expected)
    assert_close(net.inverse(net(x)), x.detach())
    assert type(net[1:3]) is RevBlocks
    assert [len(part) for _, part in net._parts()] == [2, 1, 1, 1]


def test_memory_is_that_of_one_block_at_any_depth():
    """Of a chain; blocks that are called one by one keep one output each."""

    def branch():
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh()).to(WIDE)

    x = rows(64, 128, requires_grad=False)

    def peak(depth, one_by_one=False):
        net, _ = chain(branch, depth)

        def train():
            y = x
            for layer in net if one_by_one else [net]:
                y = layer(y)
            y.sum().backward()

        train()
        net.zero_grad(set_to_none=False)
        return peak_bytes(train)

    assert abs(peak(16) - peak(4)) <= x.nbytes
    assert peak(16, True) - peak(4, True) >= 11 * x.nbytes


def test_changes_after_the_forward_are_refused():
    net, _ = chain()
    loss = net(rows(5, 8)).sum()
    with torch.no_grad():
        net[1].g_fn[0].weight.add_(1)
    assert_raises(ReconstructionError, ["block 1, g_fn (Sequential)", "0.weight"], loss.backward)


def test_names_copies_and_casts():
    net, _ = chain()
    assert list(net.state_dict())[:2] == ["0.f_fn.0.weight", "0.f_fn.0.bias"]
    check_copies(net, rows(5, 8))
    check_copies(RevBlock(mlp(), mlp()), rows(5, 8))


def test_bad_arguments():
    assert_raises(TypeError, ["f_fn is a NoneType", "callable"], lambda: RevBlock(None, mlp()))
    assert_raises(TypeError, ["g_fn is a str", "callable"], lambda: RevBlock(mlp(), "tanh"))
    net, _ = chain(depth=2)
    for network in (net, net[0]):
        assert_raises(ValueError, ["(5, 7)", "even"], lambda network=network: network(rows(5, 7)))
    assert_raises(ValueError, ["d_model is 12", "divisible by 2 n_heads = 8"], lambda: RevTransformerBlock(12, 4))
    assert_raises(ValueError, ["d_model is 7", "divisible by"], lambda: RevTransformerBlock(7, 1))
    model = RevTransformer(0, 8, 2, 1, max_seq_len=4)
    assert_raises(ValueError, ["token_ids is True", "token_ids=False"], lambda: model(torch.zeros(1, 3).long()))
    assert_raises(ValueError, ["(1, 5, 8)", "max_seq_len=4"], lambda: model(torch.zeros(1, 5, 8), token_ids=False))


# ---- the transformer


def attention_in_plain_torch(attention, x):
    """Softmax written out, head by head."""
    h = attention.norm(x)
    q, k, v = (part.chunk(attention.n_heads, -1) for part in attention.qkv(h).chunk(3, -1))
    heads = [torch.softmax(a @ b.mT / math.sqrt(a.shape[-1]), -1) @ c for a, b, c in zip(q, k, v, strict=True)]
    return attention.out(torch.cat(heads, -1))


def transformer_in_plain_torch(model, x, token_ids=True):
    h = model.embed(x) if token_ids else x
    h = h + model.pos_embed(torch.arange(x.shape[1]))
    for block in model.blocks:
        h = couple((lambda a, b=block: attention_in_plain_torch(b.f_fn, a), block.g_fn), h, -1)
    h = model.norm(h)
    return h if model.head is None else model.head(h)


@pytest.mark.parametrize("vocab_size", [11, 0])
@pytest.mark.parametrize("heads", [1, 3])
def test_transformer_as_plain_torch(vocab_size, heads, backend):
    model = RevTransformer(vocab_size, 12, heads, 3, max_seq_len=7, ffn_expansion=2, dropout=0.0).to(WIDE)
    twin = plain(model, transformer_in_plain_torch)
    for network in (model, twin):
        network.x = torch.randint(11, (2, 5), generator=torch.manual_seed(0)) if vocab_size else None
    got, expected = (step(Tokens(network), rows_once()) for network in (model, twin))
    assert_same(got, expected)
    assert got.outputs[0].shape == ((2, 5, 11) if vocab_size else (2, 5, 12))


class Tokens(nn.Module):
    """Feeds the model its tokens, or what it is given if it takes no tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, token_ids=False) if self.model.x is None else self.model(self.model.x) + 0 * x.sum()


def test_transformer_starts_from_uniform_weights():
    """Glorot's bound, reached by embeddings and linear layers alike."""
    for name, weight in RevTransformer(110, 120, 3, 1, max_seq_len=70).named_parameters():
        if weight.dim() > 1:
            assert 0.9 < weight.abs().max() / math.sqrt(6 / sum(weight.shape)) <= 1, name


@pytest.mark.parametrize("n_layers", [0, 2])
def test_transformer_drops_in_training_only(n_layers):
    """Embeddings, weights of the attention, and what is between and after the layers of a feed-forward network."""
    model = RevTransformer(11, 12, 3, n_layers, dropout=0.5).to(WIDE)
    words = torch.randint(11, (2, 5))
    assert not torch.equal(model(words), model(words))
    model.eval()
    assert torch.equal(model(words), model(words))
    attention = RevTransformerBlock(12, 3, dropout=0.9).to(WIDE).f_fn
    x = rows(2, 5, 6)
    assert relative_error(attention(x), attention_in_plain_torch(attention, x)) > 0.1
    attention.drop.eval()
    assert_close(attention(x), attention_in_plain_torch(attention, x))


# ---- revnet-zero itself (https://github.com/danieleschmidt/revnet-zero, which is on no package index)


def original():
    peer = installed("revnet_zero")
    if not hasattr(peer, "RevBlock"):
        pytest.skip("an older revnet_zero, without RevBlock")
    return peer


@pytest.mark.slow
def test_signatures_are_the_peers():
    for name, expected in SIGNATURES.items():
        assert spelled(getattr(original(), name)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, norm_last], ids=["mlp", "norm"])
def test_steps_as_the_peer(make, backend):
    """From its state_dict; dropout and running statistics aside."""
    theirs = nn.ModuleList([original().RevBlock(make(), make()) for _ in range(3)])
    ours, _ = chain(make)
    ours.load_state_dict(theirs.state_dict())
    looped = plain(theirs, one_by_one)
    x = rows(5, 8)
    outcomes = [step(network, x) for network in (ours, looped)]
    for outcome in outcomes:
        outcome.buffers = {}
    assert_same(*outcomes)
    assert_close(ours[0].inverse(x), theirs[0].inverse(x))


def one_by_one(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.slow
def test_transformer_as_the_peers(backend):
    """The same weights from the same seed, under the same names, and the same step."""
    made = []
    for package in (revnet_zero, original()):
        torch.manual_seed(0)
        made.append(package.RevTransformer(11, 12, 3, 3, max_seq_len=7, dropout=0.0).to(WIDE))
    ours, theirs = made
    for (name, mine), (name_there, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == name_there
        assert torch.equal(mine, other)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    words = torch.randint(11, (2, 5))
    for network in made:
        network.x = words
    assert_same(*(step(Tokens(network), rows_once()) for network in made))


def rows_once():
    return torch.linspace(-1, 1, 120, dtype=WIDE).reshape(2, 5, 12).requires_grad_()


# What docs/migration.md says of revnet-zero: the day that one of these fails, its row goes.


@pytest.mark.slow
def test_the_peer_draws_dropout_anew_in_the_backward():
    block = original().RevBlock(dropout_mlp(p=0.5), dropout_mlp(p=0.5))
    got, expected = (step(network, rows_once()) for network in (wide(block), plain(wide(block), through_wide)))
    assert relative_error(got.inputs[0], expected.inputs[0]) > 0.1


def wide(block):
    return nn.Sequential(nn.Linear(12, 8).to(WIDE), block)


def through_wide(net, x):
    return block_in_plain_torch(net[1], net[0](x))


@pytest.mark.slow
def test_the_peer_has_no_gradient_where_the_input_has_none():
    block = original().RevBlock(mlp(), mlp())
    assert not block(rows(5, 8, requires_grad=False)).requires_grad
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(block(rows(5, 8)).sum(), list(block.parameters()))


@pytest.mark.slow
def test_the_peer_counts_statistics_three_times():
    block = original().RevBlock(norm_last(), norm_last())
    block(rows(5, 8)).sum().backward()
    assert block.f_fn[0].norm.num_batches_tracked == 3
