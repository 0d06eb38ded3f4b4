# SPDX-License-Identifier: Apache-2.0
"""`DriftMonitor`: what it finds is what one finds by hand, and training goes on as if it were not there."""

import copy
import gc
import io
import sys
import types
import warnings
import weakref

import pytest

torch = pytest.importorskip("torch")
from diagnostics_cases import images  # noqa: E402
from one_thread import one_thread_here  # noqa: E402, F401
from torch import nn  # noqa: E402

import revkernels as rk  # noqa: E402
from revkernels.autograd.driver_forward import Reversal  # noqa: E402
from revkernels.diagnostics import AngleRecord, DriftMonitor, DriftRecord, plot_training, relative_errors  # noqa: E402
from revkernels.measure import angle  # noqa: E402
from revkernels.models import revnet38  # noqa: E402
from revkernels.nn import ReversibleBlock, ReversibleSequential  # noqa: E402


def branch(dropout=0.0):
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(dropout), nn.Tanh())


def chain(blocks=4, dropout=0.0, **options):
    return ReversibleSequential(*(ReversibleBlock(branch(dropout), branch(dropout)) for _ in range(blocks)), **options)


def step(net, x):
    loss = net(x).float().square().mean()
    loss.backward()
    return loss


# ---- what it finds


def test_the_error_is_the_one_found_by_hand():
    net, x = chain(backend="eager"), torch.randn(5, 16)
    with DriftMonitor(net) as monitor:
        step(net, x)
    x1, x2 = x.chunk(2, 1)
    y1, y2 = x1, x2
    with torch.no_grad():
        for block in net:
            y1 = y1 + block.F(y2)
            y2 = y2 + block.G(y1)
        for block in reversed(list(net)):
            y2 = y2 - block.G(y1)
            y1 = y1 - block.F(y2)
    error, true = torch.cat([y1 - x1, y2 - x2]).double(), torch.cat([x1, x2]).double()
    (record,) = monitor.history
    assert (record.step, record.chain) == (0, "")
    assert record.rms_error == pytest.approx((error.norm() / true.norm()).item(), rel=1e-6)
    assert record.max_error == pytest.approx((error.abs().max() / true.abs().max()).item(), rel=1e-6)
    assert record.rms_error > 0
    assert monitor.last is record


def test_a_planted_difference_is_found(monkeypatch):
    """The rebuilt input of the chain, moved by 1 % of it."""
    rebuild = Reversal._rebuild

    def moved(self, k):
        if k == 0:
            witness = self.witness
            self.witness = lambda streams: witness([1.01 * s for s in streams])
        rebuild(self, k)

    monkeypatch.setattr(Reversal, "_rebuild", moved)
    net = chain().double()
    with DriftMonitor(net) as monitor:
        step(net, torch.randn(5, 16, dtype=torch.float64))
    assert monitor.last.rms_error == pytest.approx(0.01, rel=1e-9)
    assert monitor.last.max_error == pytest.approx(0.01, rel=1e-9)


def test_every_nth_step_of_every_chain():
    model, x = revnet38(), torch.randn(2, 3, 8, 8)
    with DriftMonitor(model, every=2) as monitor:
        for _ in range(4):
            step(model, x)
            with torch.no_grad():
                model(x)  # no step: nothing is rebuilt
    found = [(record.step, record.chain) for record in monitor.history]
    backwards = ["stages.2.1", "stages.1.1", "stages.0.1"]
    assert found == [(number, name) for number in (0, 2) for name in backwards]
    assert all(0 < record.rms_error < 1e-5 for record in monitor.history)
    assert monitor.as_dicts()[0]["chain"] == "stages.2.1"


def test_a_stored_chain_has_no_drift():
    net = chain(activations="store")
    with DriftMonitor(net) as monitor:
        step(net, torch.randn(5, 16))
    assert monitor.history == []
    assert monitor.last is None


# ---- too much of it


def test_a_large_drift_raises():
    net, x = images(24).bfloat16(), torch.randn(4, 16, 8, 8).bfloat16()
    with DriftMonitor(net, threshold=1e-3, on_drift="raise") as monitor:
        with pytest.raises(rk.errors.ReconstructionError, match=r"reconstructed with a relative error of .* at step 0"):
            step(net, x)
        assert monitor.last.rms_error > 1e-3
    step(net, x)


def test_or_warns_once_or_calls():
    net, x, seen = chain(), torch.randn(5, 16), []
    with DriftMonitor(net, threshold=0.0), pytest.warns(RuntimeWarning, match="the threshold is 0") as caught:
        step(net, x)
        step(net, x)
    assert len(caught) == 1
    with DriftMonitor(net, threshold=0.0, on_drift=seen.append) as monitor:
        step(net, x)
    assert seen == monitor.history
    with DriftMonitor(net, threshold=1.0, on_drift="raise"):
        step(net, x)


def test_nan_is_too_much():
    monitor = DriftMonitor(chain(), threshold=1.0, on_drift="raise")
    with pytest.raises(rk.errors.ReconstructionError):
        monitor._record(DriftRecord(0, "", float("nan"), float("nan")))


# ---- the angle


def test_compare_gives_the_angle_of_the_two_gradients_and_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 16, 1), images(6), nn.Dropout(0.3))
    x = torch.randn(4, 3, 8, 8)
    step(net, x)
    monitor = DriftMonitor(net, angle_every=1).attach()

    def state():
        return (
            [t.clone() for t in (*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters()))],
            [t._version for t in (*net.parameters(), *net.buffers())],
            torch.get_rng_state(),
            [(m.training, getattr(m, "activations", "") == "reconstruct") for m in net.modules()],
        )

    before, calls = state(), []
    degrees = monitor.compare(lambda: calls.append(step(net, x)))
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert len(calls) == 2
    assert calls[0].item() == calls[1].item()
    assert monitor.history == []
    assert monitor.angles == [AngleRecord(0, degrees)]
    monitor.detach()

    drawn, found = torch.get_rng_state(), []
    for activations in ("reconstruct", "store"):
        torch.set_rng_state(drawn)
        net[1].activations = activations
        net.zero_grad()
        step(net, x)
        found.append([p.grad.clone() for p in net.parameters()])
    assert degrees == angle(*found)
    assert 0 < degrees < 0.1


def test_the_same_masks_are_drawn_for_both():
    net = chain(dropout=0.5).double()
    x = torch.randn(8, 16, dtype=torch.float64)
    assert DriftMonitor(net, angle_every=1).compare(lambda: step(net, x)) < 1e-5  # the loss is in float32


def test_every_mth_comparison():
    net, x = chain(), torch.randn(5, 16)
    monitor = DriftMonitor(net, angle_every=3)
    found = [monitor.compare(lambda: step(net, x)) for _ in range(5)]
    assert [degrees is not None for degrees in found] == [True, False, False, True, False]
    assert [record.step for record in monitor.angles] == [0, 3]
    assert DriftMonitor(net).compare(lambda: 1 / 0) is None
    flat = DriftMonitor(net, angle_every=1)
    assert flat.compare(lambda: (0 * net(x)).sum().backward()) is None
    assert flat.angles == []


def test_a_closure_that_fails_leaves_the_options():
    net = chain()
    with pytest.raises(ZeroDivisionError):
        DriftMonitor(net, angle_every=1).compare(lambda: 1 / 0)
    assert net.activations == "reconstruct"


# ---- as if it were not there


def test_gradients_have_the_same_bits():
    net, x = images(4), torch.randn(4, 16, 8, 8)
    step(net, x)
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with DriftMonitor(net):
        step(net, x)
    for p, wanted in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad, wanted)


def test_attached_and_detached():
    net = chain()
    monitor = DriftMonitor(net)
    attributes = set(vars(net))
    monitor.attach()
    with pytest.raises(RuntimeError, match="is watched already"):
        DriftMonitor(net).attach()
    DriftMonitor(net).detach()  # not its own
    step(net, torch.randn(5, 16))
    monitor.detach()
    monitor.detach()
    step(net, torch.randn(5, 16))
    assert len(monitor.history) == 1
    assert set(vars(net)) == attributes
    with monitor:
        step(net, torch.randn(5, 16))
    assert [record.step for record in monitor.history] == [0, 1]


def test_copies_and_files_know_nothing_of_it():
    net = chain()
    keys = list(net.state_dict())
    with DriftMonitor(net) as monitor:
        assert list(net.state_dict()) == keys
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        for other in (copy.deepcopy(net), torch.load(file, weights_only=False), net[:2]):
            step(other, torch.randn(5, 16))
        assert monitor.history == []


def test_the_input_is_held_until_the_backward_and_no_longer():
    net = chain()
    with DriftMonitor(net) as monitor:
        x = torch.randn(5, 16)
        storage = weakref.ref(x)
        loss = net(x).square().mean()
        loss.backward()
        del x, loss
        gc.collect()
        assert storage() is None
    assert len(monitor.history) == 1


def test_an_input_that_changed_is_left_out_with_a_warning():
    net, x = chain(), (torch.randn(5, 8), torch.randn(5, 8))
    with DriftMonitor(net) as monitor:
        y1, y2 = net(x)
        x[0].add_(1)
        with pytest.warns(RuntimeWarning, match="changed in place after it had run"):
            (y1 + y2).square().mean().backward()
    assert monitor.history == []


def test_gradients_that_accumulate_and_backwards_that_repeat():
    net, x = chain(), torch.randn(5, 16)
    with DriftMonitor(net) as monitor:
        loss = net(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        step(net, x)
    assert [record.step for record in monitor.history] == [0, 0, 1]
    assert len({record.rms_error for record in monitor.history}) == 1


def test_bad_arguments():
    with pytest.raises(TypeError, match="net is a list"):
        DriftMonitor([])
    with pytest.raises(ValueError, match="net has no reversible chain"):
        DriftMonitor(nn.Linear(2, 2))
    for every in (0, True, 1.5):
        with pytest.raises(ValueError, match="every is"):
            DriftMonitor(chain(), every=every)
    with pytest.raises(ValueError, match="angle_every is -1"):
        DriftMonitor(chain(), angle_every=-1)
    with pytest.raises(ValueError, match=r"threshold is -0\.1"):
        DriftMonitor(chain(), threshold=-0.1)
    with pytest.raises(ValueError, match="on_drift is 'ignore'"):
        DriftMonitor(chain(), on_drift="ignore")


# ---- Lightning, pictures


@pytest.fixture
def no_lightning(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)


def test_lightning_is_missing(no_lightning):
    with pytest.raises(ImportError, match=r"pip install 'revkernels\[lightning\]'"):
        DriftMonitor(chain()).lightning_callback()


def test_a_callback_for_lightning(no_lightning, monkeypatch):
    class Callback:
        pass

    module = types.ModuleType("pytorch_lightning")
    module.Callback = Callback
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)

    class Module:
        def __init__(self):
            self.logged = []

        def log(self, name, value):
            self.logged.append((name, value))

    net, x, own = chain(), torch.randn(5, 16), Module()
    monitor = DriftMonitor(net, every=2)
    callback = monitor.lightning_callback()
    assert isinstance(callback, Callback)
    callback.on_fit_start(None, own)
    for batch in range(3):
        step(net, x)
        callback.on_train_batch_end(None, own, None, None, batch)
    callback.on_fit_end(None, own)
    step(net, x)
    assert own.logged == [("drift", record.rms_error) for record in monitor.history]
    assert len(own.logged) == 2
    callback.on_fit_start(None, own)
    callback.on_exception(None, own, ArithmeticError())
    assert "witness" not in vars(net)


def test_with_lightning_itself():
    lightning = pytest.importorskip("lightning.pytorch")
    assert isinstance(DriftMonitor(chain()).lightning_callback(), lightning.Callback)


def test_it_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model, x = revnet38(), torch.randn(2, 3, 8, 8)
    monitor = DriftMonitor(model, angle_every=1)
    with pytest.raises(ValueError, match="nothing to draw"):
        monitor.plot(tmp_path / "none.png")
    with monitor:
        for _ in range(2):
            step(model, x)
            monitor.compare(lambda: step(model, x))
    monitor.plot(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_the_paper(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {"training loss": [(0, 2.0), (1, 1.0)], "test error, %": [(0, 90.0), (1, 50.0)]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_training(tmp_path / "a.png", stored=curves, reconstructed=curves, angles=[AngleRecord(0, 0.1), (1, 0.2)])
        plot_training(
            tmp_path / "b.png", stored={}, reconstructed={}, angles=[(0, 0.0), (1, 1e-3)], title="angle alone"
        )
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"reconstructed has the curves \['loss'\]"):
        plot_training(tmp_path / "c.png", stored=curves, reconstructed={"loss": []})
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_training(tmp_path / "c.png", stored={}, reconstructed={})


def test_errors_of_nothing():
    assert relative_errors([torch.empty(0)], [torch.empty(0)]) == (0.0, 0.0)
