# SPDX-License-Identifier: Apache-2.0
"""What is done with a random chain, step by step the same for the reversible network and for the plain one."""

import contextlib
import copy
import threading

from torch.utils.checkpoint import checkpoint

from behaviour.common import Outcome, loss_of, relative_error, tensors_in, torch
from behaviour.random_networks import at, branches_of, given, networks_of


class Play:
    """One network, and everything tensor-like that came of a scenario on it."""

    def __init__(self, network, case):
        self.network, self.case = network, case
        self.results = []
        self.sides = []

    def ready(self, salt=0):
        self.given = given(self.case, self.network, salt)
        self.sides.append(self.given)
        return self.given

    def forward(self, salt=0, around=contextlib.nullcontext):
        it = self.ready(salt)
        with around(), torch.autocast("cpu", torch.bfloat16, enabled=self.case.autocast):
            y = self.network(it.x, *it.args, **it.kwargs)
        self.results.extend(t.detach().clone() for t in tensors_in(y))
        return y

    def backward(self, y, **options):
        loss = loss_of(y)
        if torch.is_tensor(loss) and loss.requires_grad:
            loss.backward(**options)

    def note_gradients(self):
        """As they are now; a later backward may add to them in place."""
        parameters = [p.grad for p in self.network.parameters()]
        self.results.extend(None if g is None else g.clone() for g in (*parameters, *self.leaf_gradients()))

    def leaf_gradients(self):
        return [leaf.grad for it in self.sides for leaf in (*it.leaves, *it.sides)]

    def outcome(self):
        generators = [m.generator.get_state() for m in self.network.modules() if hasattr(m, "generator")]
        return Outcome(
            outputs=[*self.results, *generators],
            inputs=self.leaf_gradients(),
            parameters={name: p.grad for name, p in self.network.named_parameters()},
            buffers={name: b.clone() for name, b in self.network.named_buffers()},
            generator=torch.get_rng_state(),
        )


def one_step(play):
    play.backward(play.forward())


def train(play):
    for salt in range(2):
        play.network.zero_grad()
        play.backward(play.forward(salt))
        play.note_gradients()


def accumulate(play):
    for salt in range(3):
        play.backward(play.forward(salt))


def backward_twice(play):
    y = play.forward()
    play.backward(y, retain_graph=True)
    play.note_gradients()
    play.backward(y)


def some_gradients(play):
    y = play.forward()
    wanted = [t for t in (*play.given.leaves, *play.given.sides, *play.network.parameters()) if t.requires_grad]
    wanted = wanted[play.case.choice % 3 :: 1 + play.case.choice % 4]
    loss = loss_of(y)
    if torch.is_tensor(loss) and loss.requires_grad and wanted:
        play.results.extend(torch.autograd.grad(loss, wanted, allow_unused=True))


def two_forwards(play):
    outputs = [play.forward(salt) for salt in range(2)]
    for y in outputs if play.case.choice % 2 else reversed(outputs):
        play.backward(y)


def inference_between(play):
    y = play.forward()
    network = play.network
    modes = [module.training for module in network.modules()]
    if play.case.choice % 2:
        network.eval()
    if not play.case.has("differentiates") and play.case.choice % 3:
        play.forward(5, around=torch.inference_mode)
    else:
        play.forward(5, around=torch.no_grad)
    if play.case.choice % 5:
        for module, mode in zip(network.modules(), modes, strict=True):
            module.training = mode
    play.backward(y)


def checkpointed(play):
    it = play.ready()
    count = len(it.leaves)

    def run(*leaves):
        x = tuple(leaves[:count]) if play.case.pair else leaves[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=play.case.autocast):
            return play.network(x, *it.args, **it.kwargs)

    streams = it.x if play.case.pair else (it.x,)
    play.backward(checkpoint(run, *streams, use_reentrant=False))


def one_output(play):
    """The loss reads one stream, or an auxiliary output alone."""
    outputs = [t for t in tensors_in(play.forward()) if t.requires_grad]
    if outputs:
        y = outputs[play.case.choice % len(outputs)]
        play.backward(y if play.case.pair or play.case.choice % 2 else y.flatten()[: y.numel() // 2])


def penalty(play):
    y = play.forward()
    leaves = [t for t in (*play.given.leaves, *play.given.sides) if t.requires_grad]
    leaves = leaves or [p for p in play.network.parameters() if p.requires_grad]
    loss = loss_of(y)
    if not torch.is_tensor(loss) or not loss.requires_grad or not leaves:
        return
    first = [g for g in torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True) if g is not None]
    play.results.extend(g.detach().clone() for g in first)
    play.backward([y, *first])


def outer_hooks(play):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        y = play.forward()
        loss = loss_of(y)
    if torch.is_tensor(loss) and loss.requires_grad:
        loss.backward()


def no_grad(play):
    play.forward(around=torch.no_grad)
    play.backward(play.forward(1))


def two_losses(play):
    outputs = [t for t in tensors_in(play.forward()) if t.requires_grad]
    for y in outputs:
        play.backward(y * y, retain_graph=y is not outputs[-1])
        play.note_gradients()


def another_thread(play):
    y, problems = play.forward(), []

    def run():
        try:
            play.backward(y)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]


def functional_call(play):
    it = play.ready()
    values = {name: (p * 1.25).detach().requires_grad_(p.requires_grad) for name, p in play.network.named_parameters()}
    y = torch.func.functional_call(play.network, values, (it.x, *it.args), it.kwargs)
    play.results.extend(t.detach() for t in tensors_in(y))
    play.backward(y)
    play.results.extend(value.grad for value in values.values())


def inverse(play):
    """The input comes back; and training goes on as if nothing had been."""
    it = play.ready()
    y = play.network(it.x, *it.args, **it.kwargs)
    streams = y[0] if isinstance(y, tuple) and not torch.is_tensor(y[1]) else y
    if hasattr(play.network, "inverse"):
        x = play.network.inverse(streams, *it.args, **it.kwargs)
        play.results.extend(t.detach().clone() for t in tensors_in(x))
    else:
        play.results.extend(t.detach().clone() for t in tensors_in(it.x))
    play.backward(y)


def copied(play):
    """A copy made between two steps trains like the original."""
    play.backward(play.forward())
    play.network = copy.deepcopy(play.network)
    play.backward(play.forward(1))


def outcome_of(network, case):
    """Play the case's scenario on the network, from the same random state."""
    torch.manual_seed(case.number)
    play = Play(network, case)
    globals()[case.play().replace(" ", "_")](play)
    return play.outcome()


def amplification(case):
    """How much larger than a disturbance of the branches' inputs is what comes of it. Both relative; plain torch."""

    def disturb(module, inputs):
        x = inputs[0]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(case.choice), dtype=x.dtype)
        return x + 1e-8 * x.detach().norm() / max(1, x.numel()) ** 0.5 * noise, *inputs[1:]

    still, moved = networks_of(case)[1], networks_of(case)[1]
    for block in moved.children():
        for branch in set(branches_of(block)):
            branch.register_forward_pre_hook(disturb)
    a, b = (outcome_of(network, case) for network in (still, moved))
    pairs = zip(_tensors_of(a), _tensors_of(b), strict=True)
    return max(relative_error(y, x) for x, y in pairs if x is not None and x.is_floating_point()) / 1e-8


def _tensors_of(outcome):
    return [*outcome.outputs, *outcome.inputs, *outcome.parameters.values(), *outcome.buffers.values()]


def algorithm_1(plain, case):
    """A training step by Algorithm 1 of Gomez et al. 2017, branch by branch with torch calls alone.

    Its roundings are those of any reconstruction in the streams' own precision: where `Plain` can only be compared
    within the drift, this is equal to the bit.
    """
    torch.manual_seed(case.number)
    play = Play(plain, case)
    it = play.ready()
    x = it.x if case.pair else it.x.chunk(case.groups(), case.split_dim)
    s = [stream.detach().clone() for stream in x]
    steps, aux = [], []
    for index, block in enumerate(plain.children()):
        for target, branch in enumerate(branches_of(block)):
            call = _call_of(it, index, branch)
            before = torch.get_rng_state(), _own_states(branch), [b.clone() for b in branch.buffers()]
            f = _run(branch, _read(s, target), call, case, torch.no_grad)
            f, extra = f if isinstance(f, tuple) else (f, None)
            extra = [t.detach().requires_grad_() for t in tensors_in(extra)]
            aux.extend(extra)
            steps.append((target, branch, call, before, extra))
            s[target] = (s[target] + f.detach()).to(s[target].dtype)
    y = [stream.clone().requires_grad_() for stream in s]
    joined = tuple(y) if case.pair else torch.cat(y, case.split_dim)
    play.results.extend(t.detach().clone() for t in (*tensors_in(joined), *aux))
    loss_of([joined, aux]).backward()
    ds = [stream.grad for stream in y]
    now = torch.get_rng_state(), [b.clone() for b in plain.buffers()], _own_states(plain)
    for target, branch, call, (state, own, buffers), extra in reversed(steps):
        torch.set_rng_state(state)
        _restore(branch, own, buffers)
        h = _read(s, target).detach().requires_grad_()
        f = _run(branch, h, call, case, torch.enable_grad)
        f, again = f if isinstance(f, tuple) else (f, None)
        roots = [(f, ds[target].to(f.dtype)), *((t, a.grad) for t, a in zip(tensors_in(again), extra, strict=True))]
        roots = [(t, g) for t, g in roots if t.requires_grad]
        if roots:
            torch.autograd.backward(*map(list, zip(*roots, strict=True)))
        s[target] = (s[target] - f.detach()).to(s[target].dtype)
        for source in [target - 1] if target else range(1, len(s)):
            ds[source] = ds[source] if h.grad is None else ds[source] + h.grad
    torch.set_rng_state(now[0])
    _restore(plain, now[2], now[1])
    for stream, gradient in zip(x, ds, strict=True):
        if stream.requires_grad:
            stream.backward(gradient, retain_graph=True)
    return play.outcome()


def _run(branch, h, call, case, grad_mode):
    with grad_mode(), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
        return branch(h, *call[0], **call[1])


def _read(s, target):
    return s[target - 1] if target else sum(s[2:], s[1])


def _call_of(it, index, branch):
    kwargs = {name: at(value, index) for name, value in it.kwargs.items() if name in branch.keywords}
    return [at(value, index) for value in it.args], kwargs


def _own_states(module):
    return [(m.generator, m.generator.get_state()) for m in module.modules() if hasattr(m, "generator")]


def _restore(module, own, buffers):
    for generator, state in own:
        generator.set_state(state)
    for buffer, value in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(value)
