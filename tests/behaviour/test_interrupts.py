# SPDX-License-Identifier: Apache-2.0
"""Row 31: Ctrl-C at any moment of a backward, as in a notebook that goes on afterwards."""

import contextlib
import itertools
import random
import sys

from torch import nn

from behaviour.common import check_step, loss_of, rows, torch, twins
from revkernels.autograd.fused.norm_context import ambient
from revkernels.autograd.recomputing import is_within_a_branch
from revkernels.nn import is_recomputing


@contextlib.contextmanager
def interrupted(at):
    """Ctrl-C as the ``at``-th call of a function of this package or of torch's begins, where Python looks for signals.
    Yields a list that is empty until then."""
    count, came, before = itertools.count(), [], sys.gettrace()

    def look(frame, *_):
        if frame.f_globals.get("__name__", "").startswith(("revkernels", "torch")) and next(count) == at:
            sys.settrace(before)
            came.append(frame.f_code.co_name)
            raise KeyboardInterrupt

    sys.settrace(look)
    try:
        yield came
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


class Draws(nn.Module):
    def forward(self, h):
        return h + 0 * random.random()


def test_an_interrupt_anywhere(backend):
    """Between any two calls of this package, those that tidy up after a recompute included."""

    def branch():
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        return nn.Sequential(nn.BatchNorm1d(4), normed, nn.Dropout(0.1), Draws()).double()

    net, plain = twins([(branch(), branch())], backend=backend)
    for at in itertools.count():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net(rows(6, 8)))
        buffers, numbers = list(net.buffers()), random.getstate()
        with interrupted(at) as came:
            loss.backward()
        assert not is_recomputing(), came
        assert torch.is_grad_enabled(), came
        assert not torch.is_autocast_enabled("cpu"), came
        assert random.getstate() == numbers, came
        assert (ambient.kernels, ambient.tape) == (None, None), came
        assert not is_within_a_branch(), came
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, came
        assert all(now is before for now, before in zip(net.buffers(), buffers, strict=True)), came
        if not came:
            break
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, rows(6, 8))
