# SPDX-License-Identifier: Apache-2.0
"""MemCNN's `is_invertible_module` here: what it says of a module, warns of and refuses, and that it leaves no trace."""

import pytest
from behaviour.common import WIDE, assert_raises, mlp, norm_mlp, torch, unwritten
from torch import nn

from compat.memcnn_networks import Scaling, couplings, one, stack
from revkernels.compat import memcnn


def test_is_invertible_module_says_what_is():
    class Wrong(Scaling):
        def inverse(self, y):
            return (y * self.factor,)

    class Folded(nn.Module):  # forward(inverse(y)) is y, inverse(forward(x)) is not x
        def forward(self, x):
            return (x - 0.5).abs()

        def inverse(self, y):
            return y + 0.5

    class Jagged(nn.Module):  # inverse(forward(x)) is x within atol, forward(inverse(y)) is not y
        def forward(self, x):
            return torch.cat((x, x * 1.1e7 % 1), 1)

        def inverse(self, y):
            return y.chunk(2, 1)[0] + 5e-7

    check = memcnn.is_invertible_module
    assert check(couplings(mlp, 1)[0], (5, 8), test_input_dtype=WIDE, atol=1e-12)
    assert check(stack(mlp, 2)[0], (5, 8), test_input_dtype=WIDE)
    assert check(one(mlp, 3), ((5, 8),), test_input_dtype=WIDE)
    assert check(one(norm_mlp, 1)._fn, (5, 8), test_input_dtype=WIDE)
    assert check(Scaling(), (5, 8), test_input_dtype=WIDE)
    assert not check(Wrong(), (5, 8), test_input_dtype=WIDE)
    assert not check(mlp(), (5, 4), test_input_dtype=WIDE)
    assert not check(memcnn.InvertibleModuleWrapper(mlp()), (5, 4), test_input_dtype=WIDE)
    assert not check(Folded(), (5, 8), test_input_dtype=WIDE)
    assert not check(Jagged(), (5, 8), test_input_dtype=WIDE)


def test_is_invertible_module_leaves_everything_as_it_was():
    """MemCNN reseeds the generator and counts the batches."""
    net = one(norm_mlp, 2)
    with unwritten(net):
        assert memcnn.is_invertible_module(net, (5, 8), test_input_dtype=WIDE)


def test_is_invertible_module_warns_of_shared_tensors():
    class Same(nn.Module):
        def forward(self, x):
            return x

        inverse = forward

    with pytest.warns(UserWarning, match="forward share"), pytest.warns(UserWarning, match="inverse share"):
        assert memcnn.is_invertible_module(Same(), (5, 8))


@pytest.mark.parametrize("shape", ["string", (2.3, 1.4), None, True, ((1, 3), 12.4), ((1, 3), False)])
def test_is_invertible_module_refuses_what_is_no_shape(shape):
    assert_raises(ValueError, ["test_input_shape"], lambda: memcnn.is_invertible_module(Scaling(), shape))
