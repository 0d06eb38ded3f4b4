# SPDX-License-Identifier: Apache-2.0
"""Row 31: Ctrl-C at any moment of a step, as in a notebook that goes on afterwards."""

import contextlib
import importlib
import itertools
import random
import sys

import pytest
from torch import nn

from behaviour.common import check_step, loss_of, norm_mlp, rows, torch, twins
from revkernels import MemoryBudget
from revkernels.autograd.fused.norm_context import ambient
from revkernels.autograd.recomputing import is_within_a_branch
from revkernels.autograd.state.locks import _locks, turns_taken
from revkernels.autograd.state.thread_state import _top_hooks
from revkernels.nn import ReversibleSequential, checkpoint, is_recomputing, selective_checkpoint


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported():
    """torch does not survive half imported, and every interrupt of an import would begin it again."""
    importlib.import_module("torch._inductor.config")
    importlib.import_module("revkernels.autograd.compiling")


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


def assert_all_is_left(came):
    """Nothing stays set in this thread, and no other thread would wait for a branch."""
    assert not is_recomputing(), came
    assert torch.is_grad_enabled(), came
    assert (ambient.kernels, ambient.tape) == (None, None), came
    assert not is_within_a_branch(), came
    assert _top_hooks(True) is None, came
    assert torch._C._len_torch_dispatch_stack() == 0, came
    assert turns_taken() == 0 and not any(lock._is_owned() for lock in list(_locks.values())), came


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
        assert_all_is_left(came)
        assert not torch.is_autocast_enabled("cpu"), came
        assert random.getstate() == numbers, came
        assert all(now is before for now, before in zip(net.buffers(), buffers, strict=True)), came
        if not came:
            break
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, rows(6, 8))


FORWARDS = {
    "reconstruct": lambda net, x: net(x),
    "store": lambda net, x: ReversibleSequential(*net, activations="store")(x),
    "exact": lambda net, x: ReversibleSequential(*net, coupling="exact")(x.float()),
    "budget": lambda net, x: ReversibleSequential(*net, activations=MemoryBudget("50%"))(x),
    "checkpoint": checkpoint,
    "selective": selective_checkpoint,
    "inverse": lambda net, x: net.inverse(x.detach()),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as generators are thrown away
@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="torch 2.6 does not tell its hooks"
)
@pytest.mark.parametrize("forward", FORWARDS)
def test_an_interrupt_anywhere_in_a_forward(forward, backend):
    """Saved-tensor hooks that stay, say, would take what the next network saves."""
    dtype = torch.float32 if forward == "exact" else torch.float64
    net, plain = twins([(norm_mlp(p=0.1).to(dtype), norm_mlp().to(dtype))], backend=backend)
    for _ in range(2):  # what is found out once is no longer looked for: every run makes the same calls
        FORWARDS[forward](net, rows(6, 8, requires_grad=forward != "inverse"))
    for at in itertools.count(step=7 if forward == "budget" else 1):  # its first step has far more calls
        buffers = list(net.buffers())
        with interrupted(at) as came:
            FORWARDS[forward](net, rows(6, 8))
        assert_all_is_left(came)
        assert all(now is before for now, before in zip(net.buffers(), buffers, strict=True)), came
        if not came:
            break
    plain.load_state_dict(net.state_dict())
    check_step(net, plain, rows(6, 8, dtype=dtype), tolerance=1e-10 if dtype == torch.float64 else 1e-4)
