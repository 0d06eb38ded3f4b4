# SPDX-License-Identifier: Apache-2.0
"""The comparison of a recompute's outputs: no false alarms, whatever branches return, and what it can be asked of."""

import functools
import itertools
import warnings

import pytest
from torch import nn
from torch.overrides import TorchFunctionMode

from behaviour.common import WIDE, torch
from behaviour.test_output_check import Counts, chain, step
from revkernels import ReconstructionError
from revkernels.autograd import output_check
from revkernels.nn import ReversibleBlock, ReversibleSequential, checkpoint, is_recomputing


class Returns(Counts):
    """What a function makes of a layer's output."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["input", "branch"])
def test_one_sample_is_not_finite(bad, where):
    """Where one branch, or the input, has overflowed in a sample, streams come back without values there: the gradient
    has none either, as with stored activations, and a gradient scaler skips the step."""

    def spoiled(f):
        return torch.cat((torch.full_like(f[:1], bad), f[1:]))

    def plain(f):
        return torch.sin(f)

    grads = []
    for activations in ("reconstruct", "store"):
        torch.manual_seed(0)
        kinds = [plain, plain, plain, spoiled if where == "branch" else plain, plain, plain]
        branches = [Returns(function) for function in kinds]
        net = ReversibleSequential(*map(ReversibleBlock, branches[::2], branches[1::2]), activations=activations)
        x = torch.randn(3, 8, dtype=WIDE)
        if where == "input":
            x[0, 2] = bad
        net(x.requires_grad_())[1:].square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert not any(all(grad.isfinite().all() for grad in of) for of in grads)


def test_a_target_without_values():
    """Missing data in the stream that is added to, which no branch reads as they are."""

    class Fills(Counts):
        def forward(self, x):
            return self.layer(x.nan_to_num())

    net = ReversibleSequential(ReversibleBlock(Fills(), Fills()))
    x = torch.randn(3, 8, dtype=WIDE)
    x[0, 1] = float("nan")
    net(x.requires_grad_())[1:].square().sum().backward()


@pytest.mark.parametrize("large", [float("inf"), 1e300])
def test_no_warnings_of_its_own(large):
    """Of NumPy's, which training scripts may take for errors."""
    net = ReversibleSequential(ReversibleBlock(Returns(lambda f: (f * large, f.sum() - large)), torch.tanh))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(2, 8, dtype=WIDE, requires_grad=True))[0].sum().backward()


@pytest.mark.parametrize("inner", ["checkpoint", "chain"])
def test_inside_a_branch(inner):
    """There streams are rebuilt, by a chain around whose streams may have drifted far: its own check is what tells."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.chain = ReversibleSequential(ReversibleBlock(nn.Linear(2, 2), Half()), split_dim=-1)

        def forward(self, x):
            wide = x.float()
            if inner == "chain":
                return (4 * self.chain(wide)).to(x.dtype)
            centred, f = checkpoint(lambda t: (t - t.mean(-1, keepdim=True), self.layer(t)), wide)
            return (f + centred).to(x.dtype)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return x * self.weight * self.weight

    torch.manual_seed(0)
    if inner == "checkpoint":  # whose centred output is rounding alone
        net = ReversibleSequential(*(ReversibleBlock(Centred(), Centred()) for _ in range(4)))
        x = torch.full((3, 8), 100 / 7)
    else:
        net = ReversibleSequential(*(ReversibleBlock(Centred(), Centred()) for _ in range(30)))
        x = torch.randn(3, 8).bfloat16()
    net(x.requires_grad_()).float().square().mean().backward()


@pytest.mark.parametrize("inner", ["checkpoint", "chain"])
def test_what_is_inside_a_branch_is_found(inner):
    """Row 34: by what the branch around it returns."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.counts = Counts()
            self.chain = ReversibleSequential(ReversibleBlock(self.counts, torch.tanh))

        def forward(self, x):
            return checkpoint(self.counts, x) if inner == "checkpoint" else self.chain(torch.cat((x, x), 1))[:, :4]

    with pytest.raises(ReconstructionError, match=r"branch G \(Around\): the recompute returned other values"):
        step(chain(Around))


def test_what_no_gradient_goes_through():
    """Beside f: a number for the log may be another one in the recompute, which nobody gets."""

    class Logs(Counts):
        def forward(self, x):
            self.calls += 1
            f = torch.tanh(self.layer(x))
            return f, {"calls": torch.tensor(float(self.calls)), "size": f.detach().norm() * self.calls}

    step(chain(Logs))

    class Tells(Counts):
        def forward(self, x):
            self.calls += 1
            return torch.tanh(self.layer(x)), self.layer(x).square().mean() * self.calls

    with pytest.raises(ReconstructionError, match="returned other values"):
        step(chain(Tells))


def test_what_cannot_be_read():
    """Tensors of torch's stranger kinds, beside f."""

    def beside(f):
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], requires_grad=True)
        jagged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged, requires_grad=True)
        small = torch.empty(4, dtype=getattr(torch, "float4_e2m1fn_x2", torch.float16))
        others = [f.to_sparse(), torch.complex(f, f).conj(), f.to(torch.float8_e4m3fn), f[:0], f.argmax(), f > 0]
        return f * 1, (nested, jagged, small, *others, {"none": None, "a": "b", "meta": f.to("meta")})

    net = ReversibleSequential(*(ReversibleBlock(Returns(beside), Returns(beside)) for _ in range(2)))
    step(net)


@pytest.mark.parametrize(
    "view", [lambda f: f.t().contiguous().t(), lambda f: f[:, :1].expand(-1, 4), lambda f: f.flip(1)]
)
def test_views(view):
    """In layouts that nothing copies: what is another one is found there too."""
    step(chain(lambda: Returns(view)))
    with pytest.raises(ReconstructionError, match="returned other values"):
        step(chain(lambda: Returns(lambda f: view(torch.sin(f) * (2 if is_recomputing() else 1)))))


def test_callables_that_answer_to_any_name():
    """A count is kept for each, whatever its attributes say."""

    class Answers:
        def __getattr__(self, name):
            return []

        def __call__(self, x):
            return torch.tanh(x)

    step(ReversibleSequential(ReversibleBlock(Answers(), Answers())))


def _decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


@pytest.mark.parametrize("wrap", [lambda function: functools.partial(function, by=2), _decorated])
def test_functions_inside_others_are_counted_by_themselves(wrap):
    """Row 34: not all partials, or all that has one decorator, together."""

    def scaled(x, by=1):
        return torch.sin(x * by)

    calls = itertools.count(1)

    def counted(x, by=1):
        return torch.sin(x * next(calls) * by)

    step(ReversibleSequential(*(ReversibleBlock(wrap(scaled), wrap(scaled)) for _ in range(3))))
    with pytest.raises(ReconstructionError, match="returned other values"):
        step(ReversibleSequential(ReversibleBlock(wrap(counted), wrap(counted))))


def test_a_mode_for_all_functions_does_not_see_it():
    """What counts or replaces functions of torch is given those of the branch."""

    class Sees(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert function is not torch.Tensor.tolist
            return function(*args, **(kwargs or {}))

    with Sees():
        step(chain(lambda: Returns(torch.tanh)))


def test_where_nothing_is_returned_it_is_compared_for_longer():
    """Row 34: a last layer that begins at zero, and a learning rate that is warmed up. Not for ever."""

    class FromZero(Counts):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros((), dtype=WIDE))

        def forward(self, x):
            self.calls += 1
            return torch.sin(self.layer(x) * self.calls) * self.scale

    net = chain(FromZero)
    for _ in range(5):
        step(net)
    with torch.no_grad():
        for block in net:
            block.F.scale += 1
    with pytest.raises(ReconstructionError, match="returned other values"):
        step(net)

    net = chain(FromZero)
    for _ in range(40):
        step(net)
    assert all(output_check.sample_of(block.F, torch.ones(2, 4)) is None for block in net)


@pytest.mark.parametrize("by", [1.2, 1.5])
def test_autocast(by):
    """What it leaves in float32 has come through half precision, in which rounding goes further."""

    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return torch.sin(self.layer(x)).float() * (by if is_recomputing() else 1)

    torch.manual_seed(0)
    net = ReversibleSequential(ReversibleBlock(Norms(), torch.tanh))
    with pytest.raises(ReconstructionError, match="returned other values"):
        step(net, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(3, 8, requires_grad=True)).square().sum()
    if by == 1.2:
        y.backward()
    else:
        with pytest.raises(ReconstructionError, match="returned other values"):
            y.backward()
