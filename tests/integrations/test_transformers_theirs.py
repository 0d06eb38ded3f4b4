# SPDX-License-Identifier: Apache-2.0
"""What the Reformer of transformers 5.24.0 itself gets wrong on a CPU, each beside this driver, which does not.

Should one of these pass in a later release, docs/frameworks/pytorch.md has a line too many.
"""

import pytest
from behaviour.common import assert_all_close, assert_raises, loss_of, relative_error, step, torch

from integrations.common import package
from revkernels.integrations import transformers

pytestmark = pytest.mark.slow
package("transformers")
from integrations.reformers import Reformer, plainly, x_of  # noqa: E402

LSH, LOCAL = ("lsh",) * 3, ("local",) * 3


def worst(got, expected):
    """The largest relative error of a parameter's gradient; 1 for one that is missing."""
    return max(
        1.0 if got[name] is None else relative_error(got[name], value)
        for name, value in expected.items()
        if value is not None and value.norm() > 0
    )


def as_their_seeds_had_it(network):
    """The plain network with the random numbers that the layers' own seeds, drawn in their last forward, lead to."""
    return plainly(
        network,
        lambda layer: torch.manual_seed(layer.attention_seed),
        lambda layer: torch.manual_seed(layer.feed_forward_seed),
    )


def test_dropout_behind_a_hash_has_other_masks_in_their_backward():
    """Buckets are handed to the second run, which then does not draw the rotations: the masks are drawn too early."""
    for layers, right in ((LOCAL, True), (LSH, False)):
        net, x = Reformer(layers, dropout=0.2, hidden_dropout_prob=0.0), x_of()
        theirs = step(net, x)
        expected = step(as_their_seeds_had_it(net), x)
        assert_all_close(theirs.outputs, expected.outputs, 1e-12)  # it is the same forward
        error = worst(theirs.parameters, expected.parameters)
        assert error < 1e-10 if right else error > 0.05, layers
        plain = step(plainly(net), x)
        transformers.replace(net)
        assert worst(step(net, x).parameters, plain.parameters) < 1e-10


def test_a_second_forward_loses_the_masks_of_the_first():
    net, x = Reformer(LOCAL, dropout=0.2, hidden_dropout_prob=0.0), x_of()
    y = net(x)
    expected = step(as_their_seeds_had_it(net), x)
    assert_all_close([y[0]], expected.outputs, 1e-12)
    net(x)
    loss_of(y).backward()
    assert worst({n: p.grad for n, p in net.named_parameters()}, expected.parameters) > 0.05


def test_another_number_of_hashes_has_no_backward():
    net, x = Reformer(LSH), x_of()
    assert_raises(RuntimeError, ["shape '[2, 2, 64]' is invalid"], lambda: step(net, x, num_hashes=1))
    plain = step(plainly(net), x, num_hashes=1)
    transformers.replace(net)
    assert worst(step(net, x, num_hashes=1).parameters, plain.parameters) < 1e-10


def test_eval_mode_has_no_backward():
    net, x = Reformer(LOCAL).eval(), x_of()
    assert_raises(AssertionError, ["If you want to train"], lambda: step(net, x))
    transformers.replace(net)
    step(net, x)


def test_autocast_is_lost_in_their_backward():
    """The second run is in float32: what it takes off is not what was added, and the gradients are another's."""
    net, x = Reformer(LOCAL).float(), x_of(dtype=torch.float32)
    found = {}
    for name in ("stored", "theirs", "ours"):
        network = plainly(net) if name == "stored" else net
        if name == "ours":
            transformers.replace(net)
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)
        loss_of(y).backward()
        found[name] = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    theirs, ours = (worst(found[name], found["stored"]) for name in ("theirs", "ours"))
    assert ours < theirs / 4, (ours, theirs)


def test_where_the_input_needs_no_gradient_the_layers_get_none():
    """With frozen embeddings the layers do not train, and nothing says so."""
    net, x = Reformer(LOCAL), x_of(requires_grad=False)
    net.model.reformer.embeddings.requires_grad_(False)
    theirs = step(net, x).parameters
    of_layers = [name for name in theirs if "encoder.layers" in name]
    assert all(theirs[name] is None for name in of_layers) and theirs["model.lm_head.decoder.weight"] is not None
    transformers.replace(net)
    ours = step(net, x).parameters
    assert all(ours[name] is not None for name in of_layers)


def test_autograd_grad_is_refused_and_grad_written_to():
    net, x = Reformer(LOCAL), x_of()
    parameters = list(net.model.reformer.encoder.layers.parameters())
    assert_raises(
        RuntimeError, ["not have been used in the graph"], lambda: torch.autograd.grad(loss_of(net(x)), parameters)
    )
    net.zero_grad()
    torch.autograd.grad(loss_of(net(x)), x)
    assert any(parameter.grad is not None for parameter in parameters)  # nobody asked for it
    net.zero_grad()
    transformers.replace(net)
    torch.autograd.grad(loss_of(net(x)), [x, *parameters])
    assert all(parameter.grad is None for parameter in parameters)


def test_a_seed_does_not_make_a_run_repeatable():
    net, x = Reformer(LOCAL, dropout=0.2), x_of()

    def run():
        torch.manual_seed(1)
        return net(x)[0].detach()

    assert not torch.equal(run(), run())
    transformers.replace(net)
    assert torch.equal(run(), run())


def test_hidden_states_have_no_gradient():
    net, x = Reformer(LOCAL), x_of()
    states = net(x, output_hidden_states=True)[1]
    assert not states[1].requires_grad
    transformers.replace(net)
    assert net(x, output_hidden_states=True)[1][1].requires_grad
