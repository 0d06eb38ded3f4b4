# SPDX-License-Identifier: Apache-2.0
"""Row 34 for what a branch does without leaving a trace: generators put back, writes that no version tells, statistics
that are read, buffers that were not there, memory that two names share."""

import functools

import pytest
from torch import nn
from torch.nn import functional

from behaviour.common import WIDE, assert_all_close, check_step, rows, step, torch, twins
from revkernels.autograd.state import bytecode
from revkernels.autograd.state.bytecode import may_read, reads_running, writes_silently
from revkernels.errors import ReconstructionError
from revkernels.nn import NormAct, checkpoint


def noise_of(h):
    with torch.random.fork_rng(devices=[]):
        return torch.rand_like(h)


def seeded(h):
    torch.manual_seed(7)
    return torch.rand_like(h)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h):
        return self.linear(self.before(h)).tanh()


class Forks(Linear):
    def before(self, h):
        return h * noise_of(h)


class Seeds(Linear):
    def before(self, h):
        return h * seeded(h)


class Reads(Linear):
    """A batch norm's running statistics, before and after it."""

    def __init__(self, norm=None):
        super().__init__()
        self.norm = norm or nn.BatchNorm1d(4)

    def before(self, h):
        norm = self.norm[0] if isinstance(self.norm, nn.Sequential) else self.norm
        shift = norm.running_mean + 1
        return self.norm(h) * shift * norm.running_var.sqrt() + float(norm.num_batches_tracked)


class ReadsTwice(Reads):
    def before(self, h):
        return super().before(super().before(h))


class NoneAtFirst(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def before(self, h):
        mean = h.detach().mean(0)
        self.mean = mean if self.mean is None else 0.5 * self.mean + mean
        return h - self.mean


class AttributeAtFirst(NoneAtFirst):
    def __init__(self):
        Linear.__init__(self)
        self.mean = None


class NothingAtFirst(NoneAtFirst):
    def __init__(self):
        Linear.__init__(self)

    def before(self, h):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", None)
        return super().before(h)


class WritesAnAttribute(Linear):
    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(4, dtype=WIDE)

    def before(self, h):
        self.mean.mul_(0.9).add_(h.detach().mean(0))
        return h - self.mean


class Shares(Linear):
    """A buffer is a part of another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("all", torch.zeros(2, 4))
        self.register_buffer("mean", self.all[0])

    def _apply(self, function, recurse=True):  # as it is, both would be copied
        super()._apply(function, recurse)
        self.mean = self.all[0]
        return self

    def before(self, h):
        self.all[0].lerp_(h.detach().mean(0), 0.5)
        return h - self.mean


class Held(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, h):
        return h - self.mean


class SharesWithAnother(Linear):
    """The same buffer in two modules."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=WIDE))
        self.inner = Held(self.mean)

    def before(self, h):
        self.mean.lerp_(h.detach().mean(0), 0.5)
        return self.inner(h)


class OnALayer(Linear):
    """What torch's own layer, which reads nothing of it, has on it from this one's last call."""

    def __init__(self, hang=lambda layer: None, of=lambda layer: layer.__dict__, name="mean", each=lambda mean: mean):
        super().__init__()
        hang(self.linear)
        self.of, self.name, self.each = of, name, each

    def before(self, h):
        table = self.of(self.linear)
        try:
            mean = table[self.name]
        except KeyError:
            mean = None
        mean = 0 if mean is None else mean[0] if isinstance(mean, tuple) else mean
        table[self.name] = self.each(h.detach().mean(0) + 0.5 * mean)
        return h - mean


def zero():
    return torch.zeros(4, dtype=WIDE)


CASES = {
    "a layer's attribute is None at first": lambda: OnALayer(lambda layer: setattr(layer, "mean", None)),
    "a layer has no attribute at first": OnALayer,
    "a layer has a tensor": lambda: OnALayer(lambda layer: setattr(layer, "mean", zero())),
    "a layer has a tuple": lambda: OnALayer(lambda layer: setattr(layer, "mean", (zero(),)), each=lambda mean: (mean,)),
    "a layer's list": lambda: OnALayer(
        lambda layer: setattr(layer, "means", [zero()]), lambda layer: layer.means, name=0
    ),
    "a layer's dictionary": lambda: OnALayer(
        lambda layer: setattr(layer, "means", {0: None}), lambda layer: layer.means, name=0
    ),
    "a layer's buffer is None at first": lambda: OnALayer(
        lambda layer: layer.register_buffer("mean", None), lambda layer: layer._buffers
    ),
    "a layer has no buffer at first": lambda: OnALayer(of=lambda layer: layer._buffers),
    "a helper forks": Forks,
    "a helper seeds": Seeds,
    "reads running statistics": Reads,
    "reads them beside a fused norm": lambda: Reads(NormAct(nn.BatchNorm1d(4))),
    "and twice": lambda: ReadsTwice(NormAct(nn.BatchNorm1d(4))),
    "a buffer is None at first": NoneAtFirst,
    "an attribute is None at first": AttributeAtFirst,
    "there is no buffer at first": NothingAtFirst,
    "an attribute is written in place": WritesAnAttribute,
    "two buffers share memory": Shares,
    "two modules share a buffer": SharesWithAnother,
}


def attributes(network):
    return [m.mean for m in network.modules() if isinstance(getattr(m, "mean", None), torch.Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_as_in_plain_torch(case, options):
    """Gradients, buffers, attributes and the generator, from the first step on."""
    net, plain = twins([(CASES[case]().to(WIDE), CASES[case]().to(WIDE)) for _ in range(2)], **options)
    check_step(net, plain, rows(), steps=3)
    assert_all_close(attributes(net), attributes(plain), what="attributes")


@pytest.mark.parametrize("case", CASES)
def test_two_forwards_before_the_backwards(case, backend):
    """And somebody draws between forward and backward."""
    net, plain = twins([(CASES[case]().to(WIDE), CASES[case]().to(WIDE)) for _ in range(2)], backend=backend)
    found = []
    for network in (net, plain):
        torch.manual_seed(0)
        first, second = rows(), rows()
        outputs = network(first), network(second)
        torch.rand(1)
        for y in outputs:
            y.sin().sum().backward()
        found.append([first.grad, second.grad, *(p.grad for p in network.parameters()), *attributes(network)])
        found[-1].append(torch.rand(3))
    assert_all_close(*found)


@pytest.mark.parametrize("case", [Forks, Seeds])
def test_checkpoint(case):
    branch, x = case().to(WIDE), rows(5, 4)
    found = []
    for function in (branch, functools.partial(checkpoint, branch)):
        torch.manual_seed(1)
        x.grad = None
        y = function(x)
        torch.rand(1)
        y.sin().sum().backward()
        found.append([x.grad, torch.rand(3)])
    assert_all_close(*found)


# ---- writes that no version tells


class NormsByHand(nn.BatchNorm1d):
    """torch.batch_norm writes running statistics, and counts it as no write."""

    def forward(self, h):
        return functional.batch_norm(
            h, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )


class OwnBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("m", torch.zeros(4))
        self.register_buffer("v", torch.ones(4))
        self.momentum = 0.1

    def forward(self, h):
        return functional.batch_norm(h, self.m, self.v, None, None, True, self.momentum)


class Freezes(nn.BatchNorm1d):
    frozen = True

    def forward(self, h):
        if self.frozen:
            return functional.batch_norm(h, self.running_mean, self.running_var, self.weight, self.bias, False)
        return super().forward(h)


class ThroughData(Linear):
    factor = 0.0

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def before(self, h):
        self.mean.data.add_(h.detach().mean(0), alpha=self.factor)
        return h - self.mean


def set_all(networks, **values):
    """Set these attributes of the modules that have them."""
    for module in (module for network in networks for module in network.modules()):
        for name in values.keys() & set(dir(module)):
            setattr(module, name, values[name])


@pytest.mark.parametrize("kind", [NormsByHand, OwnBuffers, Freezes, ThroughData])
def test_what_is_first_written_in_a_later_step(kind, options):
    """Nothing shows in the first: a momentum of 0, a frozen norm, a factor of 0."""

    def branch():
        made = kind(4) if issubclass(kind, nn.BatchNorm1d) else kind()
        return nn.Sequential(nn.Linear(4, 4, bias=False), made, nn.Linear(4, 4)).to(WIDE)

    net, plain = twins([(branch(), branch()) for _ in range(2)], **options)
    set_all((net, plain), momentum=0.0)
    check_step(net, plain, rows())
    set_all((net, plain), momentum=0.1, frozen=False, factor=0.5)
    check_step(net, plain, rows(), steps=3)


def test_an_attribute_first_written_in_a_later_step():
    """What it held is lost for that step, which fails by name; from the next one on it is rewound."""
    net, plain = twins([(WritesAnAttribute().to(WIDE), WritesAnAttribute().to(WIDE))])
    for module in net.modules():
        if isinstance(module, WritesAnAttribute):
            module.before = lambda h, module=module: h - module.mean
    step(net, rows())
    for module in net.modules():
        module.__dict__.pop("before", None)
    with pytest.raises(ReconstructionError, match="mean was written by the branch's own forward, which it had not"):
        step(net, rows())
    for ours, theirs in zip(attributes(net), attributes(plain), strict=True):
        theirs.copy_(ours)
    check_step(net, plain, rows(), steps=2)
    assert_all_close(attributes(net), attributes(plain))


def helper(norm):
    return norm.running_var


class ByAHelper(nn.Module):
    def forward(self, h):
        return h * helper(self.norm).sqrt()


class Watcher:
    def watch(self, h):
        return self.look(h)

    def look(self, h):
        return h.buffers()


class Writes(nn.Module):
    def forward(self, h):
        functional.instance_norm(h, self.mean, self.var)


def test_names():
    """Code is followed into helpers, closures, partials and hooks, and no further than torch's own."""
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, args, out: out * module.running_mean)
    var = functools.partial(helper, nn.BatchNorm1d(2))
    for branch in (ByAHelper(), hooked, helper, var, lambda h: h * var(), Watcher().watch):
        assert reads_running(branch, [branch] if isinstance(branch, nn.Module) else []), branch
    for branch in (Linear(), nn.BatchNorm1d(2), NormAct(nn.BatchNorm1d(2)), lambda h: h.relu()):
        assert not reads_running(branch, [branch] if isinstance(branch, nn.Module) else []), branch
    assert writes_silently(Writes()) and writes_silently(ThroughData()) and not writes_silently(Linear())


# ---- and modes


def test_a_backward_in_inference_mode(options):
    """Torch allows it; running a branch again there would record nothing."""
    net, plain = twins([(Forks().to(WIDE), Reads().to(WIDE)) for _ in range(2)], **options)
    found = []
    for network in (net, plain):
        torch.manual_seed(2)
        x = rows()
        loss = network(x).sin().sum()
        with torch.inference_mode():
            loss.backward()
        found.append([x.grad, *(p.grad for p in network.parameters())])
    assert_all_close(*found)


class Keeps(nn.Module):
    def forward(self, x):
        self.features = x.tanh()
        return self.features


def test_of_another_python_nothing_is_known(monkeypatch):
    """Instructions of later versions may have other names: then every attribute counts as read."""
    assert not may_read(Keeps(), "features")
    monkeypatch.setattr(bytecode, "_KNOWN", False)
    assert may_read(Keeps(), "features")
