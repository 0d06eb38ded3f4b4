# SPDX-License-Identifier: Apache-2.0
"""Branches that are random trees of modules, and what is done with them between steps or between forward and backward,
against plain PyTorch. (`test_random_chains` draws chains of branches that are all made alike.)

A case is a number, which a failure tells: ``outcome_of(number, rebuilding, backend)`` is the same every time.
"""

import random
import warnings

import pytest
from torch import nn

from behaviour.common import WIDE, Plain, loss_of, torch
from behaviour.random_branches import SHAPES, tree
from revkernels.nn import ReversibleBlock, ReversibleSequential

CASES, CHUNKS = 120, 8


# ---- what is done with them


def _sine(module, inputs):
    return (torch.sin(inputs[0]),)


def _scaled(module, inputs, output):
    return output * 1.5 if torch.is_tensor(output) else None


def _halved(module, grad_input, grad_output):
    return tuple(None if g is None else g * 0.5 for g in grad_input)


def hook(rng, modules, handles):
    module, kind = rng.choice(modules), rng.choice(["forward_pre", "forward", "full_backward"])
    function = {"forward_pre": _sine, "forward": _scaled, "full_backward": _halved}[kind]
    handles.append(getattr(module, f"register_{kind}_hook")(function))


def unhook(rng, modules, handles):
    for handle in handles:
        handle.remove()


def parameter_hook(rng, modules, handles):
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if parameters:
        rng.choice(parameters).register_hook(lambda gradient: gradient * 0.6)


def freeze(rng, modules, handles):
    rng.choice(modules).requires_grad_(False)


def a_layer_more(rng, modules, handles):
    found = [module for module in modules if type(module) is nn.Sequential]
    if found:
        rng.choice(found).append(rng.choice([nn.Tanh(), nn.Dropout(0.2)]))


def a_layer_less(rng, modules, handles):
    found = [module for module in modules if type(module) is nn.Sequential and len(module) > 1]
    if found:
        del rng.choice(found)[0]


def other_options(rng, modules, handles):
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.6
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.eps = 0.2


def other_modes(rng, modules, handles):
    for module in modules:
        module.eval()


def draw(rng, modules, handles):
    torch.rand(3)


BEFORE = [hook, hook, parameter_hook, freeze, other_modes]
BETWEEN = [hook, unhook, a_layer_more, a_layer_less, other_options, other_modes, draw]


class Play:
    """A network with trees of modules as branches, and what comes of a few steps with it."""

    def __init__(self, number, rebuilding, backend):
        torch.manual_seed(number)
        self.rng, self.results, self.handles = random.Random(number), [], []
        self.shape = self.rng.choice(sorted(SHAPES))
        known, depth, count = [], self.rng.randint(1, 3), self.rng.randint(1, 3)
        pairs = [[tree(self.rng, depth, self.shape, known) for _ in range(2)] for _ in range(count)]
        blocks = [ReversibleBlock(*pair) for pair in pairs] if rebuilding else []
        self.network = ReversibleSequential(blocks, backend=backend) if rebuilding else Plain(pairs)
        self.network.to(WIDE)
        #: The modules of the branches, in the same order for both networks.
        self.modules = list(dict.fromkeys(module for pair in pairs for branch in pair for module in branch.modules()))

    def change(self, ways):
        self.rng.choice(ways)(self.rng, self.modules, self.handles)

    def step(self, number, between):
        for module in self.modules:
            module.zero_grad()
        generator = torch.Generator().manual_seed(number)
        x = tuple(torch.randn(SHAPES[self.shape], generator=generator, dtype=WIDE).requires_grad_() for _ in range(2))
        torch.manual_seed(number)
        y = self.network(x)
        one, later = self.rng.random() < 0.2, self.rng.random() < 0.2
        loss = loss_of(y[:1] if one else y)
        if between:
            self.change(BETWEEN)
        if later:  # two forwards, and the backward of both
            loss = loss + loss_of(self.network(x))
        loss.backward()
        parameters = list(dict.fromkeys(p for module in self.modules for p in module.parameters()))
        buffers = [b for module in self.modules for b in module._buffers.values()]
        self.results += [list(y), [t.grad for t in x], [p.grad for p in parameters], buffers, [torch.get_rng_state()]]
        self.results += [[getattr(module, "state", None) for module in self.modules]]
        self.results[-6:] = [[t if t is None else t.detach().clone() for t in group] for group in self.results[-6:]]


def outcome_of(number, rebuilding, backend):
    """Return what came of it, and the error that there was, if any."""
    play = Play(number, rebuilding, backend)
    try:
        for _ in range(play.rng.choice([0, 1, 2])):
            play.change(BEFORE)
        for salt in range(play.rng.randint(1, 3)):
            play.step(number + salt, between=play.rng.random() < 0.4)
    except Exception as error:
        return play.results, error
    return play.results, None


def difference(got, expected):
    """Where they differ, or None."""
    for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        # What is zero, as the gradient of a bias in front of a norm, comes out as roundings of the others.
        size = max([float(t.double().norm()) for t in theirs if t is not None], default=0.0)
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if (a is None) != (b is None):
                return f"result {place}[{index}] is {a}, and should be {b}"
            if a is None:
                continue
            error = float((a.double() - b.double()).norm())
            if not error <= 1e-8 * (float(b.double().norm()) + 1e-2 * size + 1e-2):
                return f"result {place}[{index}] is off by {error:.2g}"
    return None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_branches(chunk, compiled):
    """120 cases, always the same ones."""
    for number in range(chunk, CASES, CHUNKS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, refused = outcome_of(number, False, None)
            # Plain torch may refuse, and where the streams grow it is by its own roundings that it differs.
            if refused is None and max(float(y.abs().max()) for y in expected[0]) < 1e3:
                backend = (None, "cpu", "eager")[number % 3]
                got, error = outcome_of(number, True, backend)
                if "which it had not been before" in str(error):  # a branch that is not taken in every call
                    continue
                assert error is None, f"case {number} on {backend}: {error!r}"
                problem = difference(got, expected)
                assert problem is None, f"case {number} on {backend}: {problem}"
