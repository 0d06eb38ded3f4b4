# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Reformer on this driver: the results of its own layers called plainly, with stored activations."""

import inspect

import pytest
from behaviour.common import (
    WIDE,
    assert_all_close,
    assert_raises,
    assert_same,
    check_step,
    loss_of,
    relative_error,
    step,
    torch,
)
from torch import nn

from integrations.common import (
    check_compiled,
    check_copies,
    check_untouched,
    generator_state,
    original,
    package,
    peaks_by_depth,
)
from revkernels.errors import ReconstructionError
from revkernels.integrations import restore, transformers
from revkernels.measure import branch_calls
from revkernels.nn import is_recomputing

pytestmark = pytest.mark.slow
package("transformers")
from integrations.reformers import LENGTH, VOCABULARY, WIDTH, Reformer, config, hf, plainly, reformer, x_of  # noqa: E402

LSH, LOCAL = ("lsh",) * 3, ("local",) * 3


def twins(*args, backend=None, activations="reconstruct", **options):
    net = Reformer(*args, **options)
    plain = plainly(net)
    transformers.replace(net, activations=activations, backend=backend)
    return net, plain


@pytest.mark.parametrize("layers", [LSH, LOCAL, ("local", "lsh", "lsh", "local")])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_steps_as_with_stored_activations(layers, dropout, backend, available):
    """Masks of dropout and rotations of the hash are the forward's; so is the generator afterwards."""
    net, plain = twins(layers, dropout, backend=available(backend))
    check_step(net, plain, x_of(), steps=2)


def test_stored_activations_too():
    net, plain = twins(dropout=0.2, activations="store")
    check_step(net, plain, x_of())
    halves = [layer.attention for layer in net.model.reformer.encoder.layers]
    assert branch_calls(halves, lambda: loss_of(net(x_of())).backward()) == len(halves)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size_feed_forward": 8},
        {"hash_seed": 3},
        {"num_buckets": [2, 4]},
        {"num_hashes": 3, "is_decoder": False},
        {"lsh_attn_chunk_length": 16, "local_num_chunks_after": 1, "is_decoder": False},
        {"lsh_attn_chunk_length": LENGTH, "local_attn_chunk_length": LENGTH},  # whole, not in chunks
    ],
    ids=str,
)
def test_configurations(options):
    check_step(*twins(dropout=0.1, **options), x_of(), steps=2)


def test_arguments():
    """Masks of padded tokens, another number of hashes, and what is returned besides, with its gradients."""
    net, plain = twins(dropout=0.1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 20:] = 0
    check_step(net, plain, x_of(), attention_mask=mask)
    check_step(net, plain, x_of(), num_hashes=1)
    check_step(net, plain, x_of(), output_hidden_states=True, output_attentions=True, attention_mask=mask)


def test_head_masks_get_their_gradients():
    """In releases that have them (4)."""
    if "head_mask" not in inspect.signature(reformer.ReformerEncoder.forward).parameters:
        pytest.skip(f"transformers {hf.__version__} has no head masks")
    net, plain = twins(dropout=0.1)
    mask = torch.rand(4, 2, dtype=WIDE, requires_grad=True)
    check_step(net, plain, x_of(), head_mask=mask, sides=[mask])


def test_outputs_and_gradients_are_the_packages_own_where_those_are_right():
    """Bit for bit: without dropout, and with a seed for its hashes, nothing is drawn. In training mode."""
    net = Reformer(hash_seed=5)
    x = x_of()
    expected = step(net, x, output_hidden_states=False)
    transformers.replace(net)
    got = step(net, x)
    assert all(torch.equal(a, b) for a, b in zip(got.outputs, expected.outputs, strict=True))
    assert_all_close(got.inputs, expected.inputs, 1e-12)
    assert_all_close(list(got.parameters.values()), list(expected.parameters.values()), 1e-12)


def test_eval_mode_frozen_layers_and_embeddings():
    """A backward in eval mode; layers train where what they are given needs no gradient, and the other way round."""
    net, plain = twins(dropout=0.3)
    for network in (net, plain):
        network.eval()
    check_step(net, plain, x_of())
    for network in (net, plain):
        network.train()
    check_step(net, plain, x_of(requires_grad=False))
    for network in (net, plain):
        for parameter in network.model.reformer.encoder.layers[1:3].parameters():
            parameter.requires_grad_(False)
    check_step(net, plain, x_of())


def test_buckets_are_those_of_the_forward(monkeypatch):
    """Though a rebuilt stream, which is off by rounding, may fall into others: here all of them do."""
    theirs = reformer.LSHSelfAttention._hash_vectors

    def astray(self, *args, **kwargs):
        buckets = theirs(self, *args, **kwargs)
        return buckets.flip(-1) if is_recomputing() else buckets

    net, plain = Reformer(LSH, 0.1), plainly(Reformer(LSH, 0.1))
    plain.load_state_dict(net.state_dict())
    monkeypatch.setattr(reformer.LSHSelfAttention, "_hash_vectors", astray)
    transformers.replace(net)
    check_step(net, plain, x_of())


def test_two_forwards_before_the_backward_and_a_second_backward():
    net, plain = twins(dropout=0.3)
    gradients = []
    for network in (net, plain):
        torch.manual_seed(1)
        x = x_of()
        first, second = loss_of(network(x)), loss_of(network(2 * x))
        wanted = [x, *network.model.reformer.encoder.parameters()]
        once = torch.autograd.grad(first + second, wanted, retain_graph=True)
        gradients.append(once)
        assert_all_close(torch.autograd.grad(first + second, wanted), once, 1e-13)
        assert all(parameter.grad is None for parameter in network.parameters())
    assert_all_close(*gradients)


def test_autocast():
    """In bfloat16 in the forward and in the recompute: as near to float64 as with stored activations, but for drift."""
    net, plain = twins(LOCAL)
    x = x_of()
    exact = {name: g.clone() for name, g in step(plain, x).parameters.items() if g is not None}
    errors = []
    for network in (net, plain):
        network.float().zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = network(x.detach().float())
        loss_of(outputs).backward()
        errors.append(
            {n: relative_error(p.grad, exact[n]) for n, p in network.named_parameters() if p.grad is not None}
        )
    ours, stored = errors
    assert ours.keys() == stored.keys()
    assert max(stored.values()) > 2**-9  # it is in bfloat16
    # Streams are float32: rebuilt they are off by a few units of 2^-24 of them, and what bfloat16 makes of that is at
    # most a unit of its own, 2^-8, here and there.
    assert all(ours[name] < 1.1 * stored[name] + 2**-8 for name in ours)


def test_what_the_layers_return_is_seen_by_hooks():
    net, plain = twins()
    seen = [], []
    for network, noted in zip((net, plain), seen, strict=True):
        for layer in network.model.reformer.encoder.layers:
            for half in (layer.attention.output, layer.feed_forward):
                half.register_full_backward_hook(lambda m, dx, dy, noted=noted: noted.append(dy[0].clone()))
    check_step(net, plain, x_of())
    assert len(seen[0]) == 8
    assert_all_close(*seen)
    calls = []
    net.model.reformer.encoder.layers[2].register_forward_hook(lambda m, args, output: calls.append(output))
    expected = [layer.original for layer in net.model.reformer.encoder.layers]
    assert expected == [reformer.ReformerLayer] * 4
    check_step(net, plain, x_of())
    assert type(calls[0]) is reformer.ReformerOutput and calls[0].buckets is None


def test_each_half_runs_once_more():
    net, _ = twins()
    layers = net.model.reformer.encoder.layers
    halves = [half for layer in layers for half in (layer.attention, layer.feed_forward)]
    assert branch_calls(halves, lambda: loss_of(net(x_of())).backward()) == 2 * len(halves)


@pytest.mark.parametrize("kind", ["local", "lsh"])
def test_memory_is_flat_in_depth(kind):
    """But for the buckets of LSH layers, int32, and the generator's state before each half that draws from it."""
    n, few, many = 16, 2, 10
    x = x_of(n)
    peaks = peaks_by_depth(lambda depth: Reformer((kind,) * depth), transformers.replace, x, (few, many))
    stream = n * LENGTH * WIDTH * 8
    hashes, heads = 2, 2
    a_layer = 0 if kind == "local" else n * heads * hashes * LENGTH * 4 + 2 * generator_state()
    growth = [peaks[many][which] - peaks[few][which] for which in (0, 1)]
    assert growth[1] < (many - few) * a_layer + 0.25 * stream
    stored = peaks_by_depth(lambda depth: plainly(Reformer((kind,) * depth)), lambda net: None, x, (few, many))
    assert stored[many][1] - stored[few][1] > 5 * stream * (many - few)
    assert peaks[many][1] < 1.1 * peaks[many][0]  # no more than in the package


def test_compiled():
    check_compiled(*twins(("local", "lsh"), hash_seed=3), x_of())


def test_a_cache_that_is_filled_in_training():
    """Its entries are those of a plain run, each once; and they carry no second run's."""
    net, _ = twins(dropout=0.1)
    caches = []
    for network in (net, original(net)):
        torch.manual_seed(0)
        network.eval()
        output = network.model(inputs_embeds=x_of(requires_grad=False), use_cache=True)
        if network is net:
            output.logits.sum().backward()
        caches.append(output.past_buckets_states)
    ours, theirs = caches
    assert len(ours) == len(theirs) == 4 and ours._seen_tokens == theirs._seen_tokens == LENGTH
    assert_all_close(ours.states_cache, theirs.states_cache, 1e-13)
    assert_all_close(ours.buckets_cache, theirs.buckets_cache)


def test_generation():
    """Token by token with the cache, the same tokens; and with gradients where a cache is gone on with."""
    net = Reformer(hash_seed=1).eval()
    ids = torch.randint(3, VOCABULARY, (2, 10))
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(ids)}
    expected = net.model.generate(ids, **options)
    transformers.replace(net)
    assert torch.equal(net.model.generate(ids, **options), expected)
    sides = []
    for network in (net, original(net)):
        with torch.no_grad():
            cache = network.model(ids, use_cache=True).past_buckets_states
        x = torch.ones(2, 1, WIDTH, dtype=WIDE, requires_grad=True)
        y = network.model(inputs_embeds=x, past_buckets_states=cache, use_cache=True).logits
        sides.append(y.detach())
        if network is net:
            (dx,) = torch.autograd.grad(loss_of(y), x)
            assert dx.abs().sum() > 0
    assert_all_close(sides[:1], sides[1:], 1e-12)


@pytest.mark.parametrize("head", ["ReformerForMaskedLM", "ReformerForSequenceClassification", "ReformerModel"])
def test_other_models_of_the_family(head):
    model = getattr(hf, head)(config(is_decoder=False, dropout=0.1)).to(WIDE)
    plain = plainly(model)
    transformers.replace(model)
    check_step(model, plain, torch.randint(3, VOCABULARY, (2, LENGTH)))


def test_parameters_names_and_copies(tmp_path):
    net = Reformer(dropout=0.1)
    replaced = check_untouched(transformers.replace, net)
    assert len(replaced.modules) == 1 + 4 + 2 and not replaced.left and not replaced.notes
    transformers.replace(net)
    check_copies(net, x_of())
    net.model.save_pretrained(tmp_path)
    again = hf.ReformerModelWithLMHead.from_pretrained(tmp_path).to(WIDE)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in net.model.state_dict().items())
    assert len(restore(net)) == 7
    assert type(net.model.reformer.encoder) is reformer.ReformerEncoder


def test_the_account_says_what_a_cache_costs():
    model = hf.ReformerModel(config(use_cache=True))
    assert "use_cache is True" in str(transformers.replace(model))


def test_errors(monkeypatch):
    wanted = ["a ReformerEncoder with its ReformerLayers is looked for"]
    assert_raises(ValueError, wanted, lambda: transformers.replace(nn.Linear(2, 2)))
    net = Reformer()
    layer = net.model.reformer.encoder.layers[1]
    layer.forward = layer.forward  # as accelerate does
    kinds = [type(module) for module in net.modules()]
    assert_raises(ValueError, ["this ReformerLayer was given a forward of its own"], lambda: transformers.replace(net))
    assert [type(module) for module in net.modules()] == kinds
    del layer.forward
    transformers.replace(net)
    outputs = net(x_of())
    with torch.no_grad():
        layer.feed_forward.dense.dense.weight.mul_(2)
    assert_raises(
        ReconstructionError, ["feed_forward: parameter dense.dense.weight"], lambda: loss_of(outputs).backward()
    )
    restore(net)
    monkeypatch.delattr(reformer, "ReformerDynamicCache")
    assert_raises(ValueError, ["too old: 4.57"], lambda: transformers.replace(net))
    monkeypatch.undo()
    monkeypatch.setattr(reformer.ReformerEncoder, "forward", lambda self, x: x)
    assert_raises(
        ValueError, ["ReformerEncoder that does not use _ReversibleFunction"], lambda: transformers.replace(net)
    )


def test_restored_it_is_the_packages_own():
    net = Reformer(hash_seed=2)
    x = x_of()
    expected = step(net, x)
    transformers.replace(net).restore()
    got = step(net, x)
    got.generator = expected.generator  # which it reseeds, not from a seed of ours
    assert_same(got, expected, 1e-14)
