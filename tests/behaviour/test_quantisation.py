# SPDX-License-Identifier: Apache-2.0
"""Row 34 for quantisation-aware training."""

import pytest
from torch import nn
from torch.nn import functional

from behaviour.common import WIDE, assert_all_close, check_step, images, pairs_of, step, torch, twins


class FakeQuantised(nn.Module):
    """A layer as torch's quantisation-aware training makes it: the range of its weights is a moving average, which an
    operator writes, and gives its shape in the first call, so that no version tells."""

    def __init__(self, quantise):
        super().__init__()
        self.linear, self.quantise = nn.Linear(4, 4), quantise()

    def forward(self, h):
        return functional.linear(h, self.quantise(self.linear.weight), self.linear.bias).tanh()


class Quantises(nn.Module):
    """The same in code that is not torch's."""

    def __init__(self):
        super().__init__()
        for name in ("observer_enabled", "fake_quant_enabled"):
            self.register_buffer(name, torch.ones(1, dtype=torch.long))
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("zero_point", torch.zeros(4, dtype=torch.int))
        self.register_buffer("low", torch.zeros(0))
        self.register_buffer("high", torch.zeros(0))

    def forward(self, weight):
        flags = self.observer_enabled, self.fake_quant_enabled
        written = self.low, self.high, self.scale, self.zero_point
        return torch.fused_moving_avg_obs_fake_quant(weight, *flags, *written, 0.5, -128, 127, 0, True, True)


def torch_quantiser():
    quantisation = pytest.importorskip("torch.ao.quantization")
    scheme = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "averaging_constant": 0.5}
    observer = quantisation.MovingAveragePerChannelMinMaxObserver
    return quantisation.FusedMovingAvgObsFakeQuantize(observer, -128, 127, **scheme)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("quantise", [torch_quantiser, Quantises])
def test_fake_quantisation(quantise, late, options):
    """From the second step on the range depends on what it was, and with it what the layer returns. Also where the
    observers are switched on after a first step."""
    net, plain = twins([(FakeQuantised(quantise), FakeQuantised(quantise)) for _ in range(2)], **options)
    x = torch.linspace(-1, 1, 40).reshape(5, 8).requires_grad_()
    for number in range(4):
        for name, buffer in (*net.named_buffers(), *plain.named_buffers()):
            if name.endswith("observer_enabled"):
                buffer.fill_(number > 0 or not late)
        with torch.no_grad():  # else the range would stay what it is
            for parameter in (*net.parameters(), *plain.parameters()):
                parameter.mul_(0.5)
        ours, theirs = step(net, x), step(plain, x)
        torch.testing.assert_close(ours.buffers, theirs.buffers)
        assert_all_close(list(ours.parameters.values()), list(theirs.parameters.values()), 1e-5)


class Rounds(nn.Module):
    """Fake quantisation in double precision."""

    def forward(self, weight):
        return weight + ((weight * 16).round() / 16 - weight).detach()


@pytest.mark.parametrize("slow", [False, True], ids=["one pass", "two passes"])
def test_convolution_with_batch_norm(slow, options):
    """torch's layer scales its weights by the running variance before its norm writes that."""
    layers = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    config = pytest.importorskip("torch.ao.quantization").QConfig(activation=nn.Identity, weight=Rounds)

    def branch():
        layer = layers.ConvBn2d(4, 4, 3, padding=1, momentum=0.5, qconfig=config).to(WIDE)
        layer._enable_slow_path_for_better_numerical_stability = slow
        return layer

    net, plain = twins(pairs_of(branch, 2), **options)
    check_step(net, plain, images(), steps=3)
