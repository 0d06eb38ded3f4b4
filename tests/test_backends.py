# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, who decides, and what is said where one cannot."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import revkernels as rk
from revkernels import backends, ops

torch = pytest.importorskip("torch")
NAMES = ["reference", "eager", "cpu", "cuda", "triton"]


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    """A cache that is the test's own, and no environment variable."""
    monkeypatch.delenv("REVKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_cache", {})


@pytest.fixture
def without(monkeypatch):
    """Make a backend missing, with a reason."""

    def remove(name, reason="it was taken away"):
        missing = backends.Backend.missing

        def pretending(self):
            return reason if self.name == name else missing(self)

        monkeypatch.setattr(backends.Backend, "missing", pretending)

    return remove


def module_of(name):
    return backends.BACKENDS[name].load()


def ones():
    return torch.ones(3)


def test_the_default_on_a_cpu_is_the_compiled_backend():
    """For torch and for NumPy. It has to be there: everything else builds on it."""
    assert backends.BACKENDS["cpu"].missing() is None or not os.environ.get("CI")
    if backends.BACKENDS["cpu"].missing() is not None:
        pytest.skip(backends.BACKENDS["cpu"].missing())
    assert backends.select(ones()) is module_of("cpu")
    assert backends.select(np.ones(3)) is module_of("cpu")


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_the_call_decides_first(name, monkeypatch):
    """backend= before use_backend, before the environment."""
    monkeypatch.setenv("REVKERNELS_BACKEND", "eager")
    with rk.use_backend("reference"):
        assert backends.select(ones(), name) is module_of(name)
        assert backends.select(ones()) is module_of("reference")
    assert backends.select(ones()) is module_of("eager")


def test_use_backend_nests_and_is_undone():
    """The innermost holds; None goes back to the default; an exception undoes it."""
    default = backends.select(ones(), None) if backends.BACKENDS["cpu"].missing() is None else None
    with rk.use_backend("eager"):
        with rk.use_backend("reference"):
            assert backends.select(ones()) is module_of("reference")
            if default is not None:
                with rk.use_backend(None):
                    assert backends.select(ones()) is default
        assert backends.select(ones()) is module_of("eager")
        with pytest.raises(KeyError), rk.use_backend("reference"):
            raise KeyError
        assert backends.select(ones()) is module_of("eager")


def test_use_backend_holds_in_its_own_thread_alone():
    """Another thread keeps its own choice."""
    seen = []
    with rk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends._chosen.get()))
        thread.start()
        thread.join()
        assert backends._chosen.get() == "reference"
    assert seen == [None]


def test_use_backend_changes_what_runs(monkeypatch):
    """The kernels called are the ones named."""
    calls = []
    monkeypatch.setattr(module_of("eager"), "couple", lambda *args: calls.append(len(args)))
    with rk.use_backend("eager"):
        ops.couple_(ones(), ones())
    assert calls == [4]


def test_the_environment_variable_is_obeyed(monkeypatch):
    """Read at the choice; empty is the same as none."""
    monkeypatch.setenv("REVKERNELS_BACKEND", "reference")
    assert backends.select(ones()) is module_of("reference")
    monkeypatch.setattr(backends, "_cache", {})
    monkeypatch.setenv("REVKERNELS_BACKEND", "")
    with rk.use_backend("eager"):
        assert backends.select(ones()) is module_of("eager")


def test_a_wrong_environment_variable_is_named(monkeypatch):
    """Its name is in the message, not that of the argument."""
    monkeypatch.setenv("REVKERNELS_BACKEND", "gpu")
    with pytest.raises(rk.BackendError, match=r"^REVKERNELS_BACKEND is 'gpu'"):
        ops.couple(ones(), ones())


def assert_lists_all(message):
    for name, entry in rk.info()["backends"].items():
        assert name in message
        if not entry["available"]:
            assert f"{name} (missing: {entry['reason']})" in message


@pytest.mark.parametrize("name", ["gpu", "", "CPU", 3, True])
def test_an_unknown_backend(name):
    """The error lists what exists and why the others are missing, from every place that takes a name."""
    for call in (lambda: ops.couple(ones(), ones(), backend=name), lambda: rk.use_backend(name).__enter__()):
        with pytest.raises(rk.BackendError) as raised:
            call()
        assert repr(name) in str(raised.value)
        assert_lists_all(str(raised.value))


def test_modules_refuse_a_backend_when_they_are_made():
    """Not at the first forward."""
    from revkernels.nn import ReversibleBlock, ReversibleSequential

    for make in (
        lambda b: ReversibleSequential(backend=b),
        lambda b: ReversibleBlock(torch.tanh, torch.tanh, backend=b),
    ):
        with pytest.raises(rk.BackendError, match="'gpu'"):
            make("gpu")


def test_a_missing_backend_is_refused_with_its_reason_and_never_replaced(without):
    """Named, it is used or refused."""
    without("eager")
    for call in (lambda: ops.couple(ones(), ones(), backend="eager"), lambda: rk.use_backend("eager").__enter__()):
        with pytest.raises(rk.BackendError, match="backend='eager' cannot run here: it was taken away") as raised:
            call()
        assert_lists_all(str(raised.value))


def test_no_fallback_where_the_default_is_missing(without):
    """The default of a device missing is an error too: no slow path is taken in silence."""
    without("cpu")
    with pytest.raises(
        rk.BackendError, match=r"no backend for torch arrays on cpu \(cpu: it was taken away\)"
    ) as raised:
        ops.couple(ones(), ones())
    assert_lists_all(str(raised.value))
    assert torch.equal(ops.couple(ones(), ones(), backend="eager"), 2 * ones())


def test_a_backend_that_does_not_take_the_array():
    """NumPy for eager, a CPU tensor for cuda: what it takes, what it got."""
    with pytest.raises(rk.BackendError, match="'eager' cannot take this array: it takes torch arrays, not numpy"):
        ops.couple(np.ones(3), np.ones(3), backend="eager")
    if backends.BACKENDS["cuda"].missing() is None:
        with pytest.raises(rk.BackendError, match="it takes arrays on cuda, not on cpu"):
            ops.couple(ones(), ones(), backend="cuda")
    else:
        with pytest.raises(rk.BackendError, match="backend='cuda' cannot run here: ") as raised:
            ops.couple(ones(), ones(), backend="cuda")
        assert rk.info()["backends"]["cuda"]["reason"] in str(raised.value)


def test_what_is_no_array():
    """A TypeError, from selection itself."""
    for bad in (None, 1.0, [1.0], "text", object()):
        with pytest.raises(
            TypeError, match=rf"x is a {type(bad).__name__}; it must be a torch.Tensor or a numpy.ndarray"
        ):
            ops.couple(bad, ones())


def test_info():
    """Version, every backend with a reason if missing, defaults, vector width, architectures."""
    info = rk.info()
    assert info["version"] == rk.__version__
    assert list(info["backends"]) == NAMES
    for name, entry in info["backends"].items():
        assert set(entry) == {"available", "reason", "about"}
        assert entry["available"] is (entry["reason"] is None)
        assert entry["available"] is (backends.BACKENDS[name].missing() is None)
        assert entry["about"]
        assert entry["reason"] is None or len(entry["reason"]) > 10
    assert info["backends"]["reference"]["available"]
    assert info["backends"]["eager"]["available"]
    assert info["defaults"] == {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}
    assert info["libraries"]["numpy"] == np.__version__
    # PyPI's torch 2.6 is 2.6.0 to who installs it, and 2.6.0+cu124 once it is imported.
    assert info["libraries"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    if info["backends"]["cpu"]["available"]:
        assert info["cpu_isa"] in ("avx512", "avx2", "baseline")
    assert all(isinstance(arch, str) for arch in info["cuda_architectures"])


def test_info_can_be_written_as_json():
    """Strings, numbers, lists and dicts only."""
    import json

    assert json.loads(json.dumps(rk.info())) == rk.info()


IMPORTS_NOTHING = """
import sys
import revkernels as rk
rk.info()
import numpy as np
rk.ops.couple(np.ones(3), np.ones(3), backend="reference")
heavy = {"torch", "triton", "jax", "cupy", "scipy", "matplotlib", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_the_package_imports_numpy_alone():
    """import, info() and a call on NumPy arrays: no torch, no triton."""
    subprocess.run([sys.executable, "-c", IMPORTS_NOTHING], check=True, timeout=120)


def test_every_backend_has_every_kernel():
    """By name, missing() and CHECKS_OPERANDS too. A public function has a kernel's name, with an underscore or not."""
    lacking = []
    for name, backend in backends.BACKENDS.items():
        module = backend.load()
        for function in (*backends.KERNELS, "missing"):
            if not callable(getattr(module, function, None)):
                lacking.append(f"backend {name!r} ({backend.module}) has no {function}")
        assert isinstance(getattr(module, "CHECKS_OPERANDS", None), bool), f"{name} has no CHECKS_OPERANDS"
    public = {name.removesuffix("_") for name in ops.__all__ if name.islower()}
    lacking += [f"ops.__all__ has no {name}, nor {name}_" for name in backends.KERNELS if name not in public]
    lacking += [f"backends.KERNELS has no {name}" for name in public if name not in backends.KERNELS]
    assert not lacking, "\n".join(lacking)
