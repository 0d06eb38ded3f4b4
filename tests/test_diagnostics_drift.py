# SPDX-License-Identifier: Apache-2.0
"""`drift`: errors and angles by depth, as one would find them by hand, and a network that is as it was."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from diagnostics_cases import images  # noqa: E402
from one_thread import one_thread_here  # noqa: E402, F401
from torch import nn  # noqa: E402

from revkernels.diagnostics import PRECISIONS, DriftMonitor, drift, relative_errors  # noqa: E402
from revkernels.measure import angle  # noqa: E402
from revkernels.models import revnet38  # noqa: E402
from revkernels.nn import PerBlock, ReversibleBlock, ReversibleSequential  # noqa: E402
from revkernels.nn.streams import check_options  # noqa: E402

MIXED = "float32, bfloat16 branches"


def mlp(size=8, dropout=0.0):
    return nn.Sequential(
        nn.LayerNorm(size), nn.Linear(size, size), nn.Tanh(), nn.Dropout(dropout), nn.Linear(size, size)
    )


def chain(blocks, dropout=0.0, **options):
    return ReversibleSequential(*(ReversibleBlock(mlp(8, dropout), mlp(8, dropout)) for _ in range(blocks)), **options)


def column(found, name, **which):
    return [getattr(row, name) for row in found.rows if all(getattr(row, k) == v for k, v in which.items())]


def has_exact():
    try:
        check_options(1, "reconstruct", "exact", None)
    except ValueError:
        return False
    return True


# ---- values


def test_errors_by_their_definition():
    true = [torch.tensor([3.0, -4.0]), torch.tensor([0.0, 12.0])]
    rebuilt = [torch.tensor([3.0, -4.5]), torch.tensor([0.0, 12.0])]
    assert relative_errors(rebuilt, true) == pytest.approx((0.5 / 12, 0.5 / 13), rel=1e-15)
    assert relative_errors(true, true) == (0.0, 0.0)
    zero = [torch.zeros(2)]
    assert relative_errors(zero, zero) == (0.0, 0.0)
    assert relative_errors([torch.ones(2)], zero) == (float("inf"), float("inf"))
    for order in (1, -1):
        pair = [torch.tensor([float("nan")]), torch.ones(1)][::order]
        assert all(error != error for error in relative_errors(pair, [torch.ones(1), torch.ones(1)]))


def test_float32_drifts_more_with_depth_and_float64_hardly():
    found = drift(chain(64), torch.randn(16, 16), precisions=("float64", "float32"), couplings=("float",))
    assert column(found, "depth", precision="float32") == [1, 2, 4, 8, 16, 32, 64]
    for name in ("rms_error", "max_error"):
        errors = column(found, name, precision="float32")
        assert errors[::3] == sorted(errors[::3])  # of 1, 8 and 64 branches: nearer ones differ less than seeds do
        assert 1e-9 < errors[0] < 1e-6
        assert errors[-1] > 4 * errors[0]
        assert max(column(found, name, precision="float64")) < 1e-12
    angles = column(found, "angle_degrees", precision="float32")
    assert angles[-1] > angles[0] > 0
    assert max(column(found, "angle_degrees", precision="float64")) < 1e-10


def test_the_dtypes_in_their_order():
    found = drift(images(8), torch.randn(4, 16, 8, 8), depths=[8], couplings=("float",), precisions=PRECISIONS)
    errors = {row.precision: row.rms_error for row in found.rows}
    assert list(errors) == list(PRECISIONS)
    assert errors["float64"] < errors["float32"] < errors["bfloat16"]
    assert errors[MIXED] < errors["bfloat16"]
    assert errors["bfloat16"] > 1e-4
    default = drift(images(1), torch.randn(4, 16, 8, 8), couplings=("float",))
    assert column(default, "precision") == ["float32", "bfloat16", MIXED]


@pytest.mark.parametrize("cut", ["last", "first"])
def test_the_error_is_the_one_found_by_hand(cut):
    """By plain torch calls: forward through the blocks, and back by eq. 7."""
    net, x, depth = chain(5, backend="eager"), torch.randn(4, 16), 3
    (row,) = drift(net, x, depths=[depth], couplings=("float",), precisions=("float32",), cut=cut).rows
    x1, x2 = x.chunk(2, 1)
    with torch.no_grad():
        blocks = list(net)
        if cut == "last":
            for block in blocks[:2]:
                x1 = x1 + block.F(x2)
                x2 = x2 + block.G(x1)
        inside = blocks[2:] if cut == "last" else blocks[:3]
        y1, y2 = x1, x2
        for block in inside:
            y1 = y1 + block.F(y2)
            y2 = y2 + block.G(y1)
        for block in reversed(inside):
            y2 = y2 - block.G(y1)
            y1 = y1 - block.F(y2)
    size = torch.cat([x1, x2]).double()
    error = torch.cat([y1, y2]).double() - size
    assert row.rms_error == pytest.approx((error.norm() / size.norm()).item(), rel=1e-9)
    assert row.max_error == pytest.approx((error.abs().max() / size.abs().max()).item(), rel=1e-9)


def test_the_angle_is_the_one_found_by_hand():
    net, x = images(6), torch.randn(4, 16, 8, 8)
    (row,) = drift(net, x, depths=[6], couplings=("float",), precisions=("float32",)).rows
    gradients = []
    for activations in ("reconstruct", "store"):
        net.activations = activations
        net.zero_grad()
        net(x.clone().requires_grad_()).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert row.angle_degrees == angle(*gradients)
    assert row.angle_degrees > 0


def test_both_cuts_agree_at_full_depth_and_a_loss_changes_the_angle_alone():
    net, x = images(4), torch.randn(4, 16, 8, 8)
    options = {"couplings": ("float",), "precisions": ("float32",), "depths": (4, 400)}
    (last,), (first,) = (drift(net, x, cut=cut, **options).rows for cut in ("last", "first"))
    assert last == first
    (other,) = drift(net, x, loss=lambda y: y.pow(4).sum(), **options).rows
    assert other.rms_error == last.rms_error
    assert other.angle_degrees != last.angle_degrees


def test_dropout_draws_the_same_stored_and_reconstructed():
    (row,) = drift(
        chain(4, dropout=0.5), torch.randn(8, 16), depths=[4], precisions=("float64",), couplings=("float",)
    ).rows
    assert row.rms_error < 1e-14
    assert row.angle_degrees < 1e-12


@pytest.mark.skipif(not has_exact(), reason="there is no exact coupling yet")
def test_the_exact_coupling_does_not_drift():
    found = drift(images(16), torch.randn(4, 16, 8, 8), couplings=("exact",), precisions=PRECISIONS)
    assert set(column(found, "precision")) == {"float32", "bfloat16", MIXED}
    assert {row.rms_error for row in found.rows} == {0.0}
    assert {row.angle_degrees for row in found.rows} == {0.0}
    assert {row.problem for row in found.rows} == {None}


# ---- what is measured


def test_every_chain_of_a_model_with_the_input_that_it_gets():
    model, x = revnet38(), torch.randn(2, 3, 16, 16)
    found = drift(model, x, precisions=("float32",), couplings=("float",))
    assert column(found, "chain", depth=2) == ["stages.0.1", "stages.1.1", "stages.2.1"]
    inputs = []
    hook = model.stages[1][1].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(x)
    hook.remove()
    own = drift(model.stages[1][1], inputs[0], precisions=("float32",), couplings=("float",))
    for row, expected in zip((r for r in found.rows if r.chain == "stages.1.1"), own.rows, strict=True):
        assert row.rms_error == pytest.approx(expected.rms_error, rel=0.2)
    text = str(found)
    assert "stages.2.1" in text
    assert "gradient angle, degrees" in text
    assert "chain" not in str(own).splitlines()[1]


def test_a_block_alone_and_a_pair():
    (row,) = drift(ReversibleBlock(mlp(), mlp()), (torch.randn(3, 8), torch.randn(3, 8)), precisions=("float64",)).rows[
        :1
    ]
    assert (row.chain, row.depth) == ("", 1)
    assert row.rms_error < 1e-15


def test_arguments_of_each_block_and_auxiliary_outputs():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, scale):
            return scale * self.linear(x).tanh(), {"note": 1}

    net = ReversibleSequential(*(ReversibleBlock(Scaled(), Scaled()) for _ in range(3)))
    scales = PerBlock([torch.full((), 1.0), torch.full((), 2.0), torch.full((), 3.0)])
    found = drift(net, torch.randn(4, 16), args=(scales,), precisions=("float32",), couplings=("float",), depths=[2, 3])
    assert [row.depth for row in found.rows] == [2, 3]
    assert all(0 < row.rms_error < 1e-5 for row in found.rows)


def test_a_frozen_chain_has_an_error_and_no_angle():
    net = chain(2).requires_grad_(False)
    (row,) = drift(net, torch.randn(3, 16), depths=[2], precisions=("float32",), couplings=("float",)).rows
    assert row.rms_error > 0
    assert row.angle_degrees is None
    assert str(row.depth) in str(drift(net, torch.randn(3, 16)))


def test_a_coupling_that_does_not_exist_is_left_out():
    found = drift(chain(1), torch.randn(3, 16), couplings=("float", "no such"), precisions=("float32",))
    assert [row.coupling for row in found.rows] == ["float"]


def test_what_a_chain_refuses_is_said_in_its_row():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(8, 8), [0]

        def forward(self, x):
            self.calls[0] += 1
            return self.linear(x).tanh() if self.calls[0] % 2 else self.linear(x).sin().cos()

    found = drift(ReversibleSequential(ReversibleBlock(Counts(), mlp())), torch.randn(3, 16), precisions=("float32",))
    row = found.rows[0]
    assert "did not do the same twice" in row.problem
    assert (row.rms_error, row.angle_degrees) == (None, None)
    assert "did not do the same twice" in str(found)


# ---- leaves no trace


def test_the_network_is_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), images(3), nn.Dropout(0.5))
    net[2][1].eval()
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    grads = [p.grad for p in net.parameters()]

    def state():
        return (
            [t.clone() for t in (*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters()), x)],
            [(p._version, p.requires_grad) for p in (*net.parameters(), *net.buffers())],
            torch.get_rng_state(),
            [(m.training, len(m._forward_pre_hooks), len(vars(m))) for m in net.modules()],
        )

    before = state()
    drift(net, x)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert x.grad is None
    assert (net[2].activations, net[2].coupling, net[2].backend) == ("reconstruct", "float", None)


def test_a_monitor_sees_nothing_of_it():
    net = chain(2)
    with DriftMonitor(net) as monitor:
        witness = net.witness
        drift(net, torch.randn(3, 16), precisions=("float32",))
        assert net.witness is witness
    assert monitor.history == []


# ---- bad input, pictures


def test_bad_arguments():
    x = torch.randn(3, 16)
    with pytest.raises(TypeError, match="net is a str"):
        drift("net", x)
    with pytest.raises(ValueError, match="net has no reversible chain"):
        drift(nn.Linear(16, 16), x)
    with pytest.raises(ValueError, match="precisions has 'half'; it must be some of 'float64', 'float32'"):
        drift(chain(1), x, precisions=("half",))
    with pytest.raises(ValueError, match="cut is 'middle'"):
        drift(chain(1), x, cut="middle")
    for depths in ([0], [True], [1.5], [100]):  # the last is deeper than the chain
        with pytest.raises(ValueError, match="depths is"):
            drift(chain(1), x, depths=depths)


def test_it_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = drift(revnet38(), torch.randn(1, 3, 16, 16), couplings=("float",))
    found.plot(tmp_path / "all.png")
    found.plot(tmp_path / "one.svg", chain="stages.1.1")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert "stages.1.1" in (tmp_path / "one.svg").read_text() or (tmp_path / "one.svg").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"nothing to draw for chain 'nowhere'; the chains are 'stages\.0\.1'"):
        found.plot(tmp_path / "none.png", chain="nowhere")


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch; from torch import nn\n"
        "from revkernels.diagnostics import drift\n"
        "from revkernels.nn import ReversibleBlock\n"
        "found = drift(ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(3, 4), precisions=('float32',))\n"
        "import revkernels.diagnostics as d\n"
        "for act in (lambda: found.plot('x.png'), lambda: d.plot_training):\n"
        "    try: act()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("pip install 'revkernels[demo]'") == 2, done.stdout + done.stderr


def test_the_package_itself_does_not_import_it():
    code = "import sys, revkernels; sys.exit('torch' in sys.modules or 'revkernels.diagnostics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
