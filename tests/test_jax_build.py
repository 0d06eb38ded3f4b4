# SPDX-License-Identifier: Apache-2.0
"""The handlers' library: compiled once, found again, and refused with a reason where that cannot be."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax_cases  # noqa: F401  skips where jax is missing
import pytest

import revkernels as rk
from revkernels.adapters.jax import build

RUN = """
import jax.numpy as jnp
from revkernels.adapters import jax as rj
assert rj.couple(jnp.ones(3), jnp.ones(3)).tolist() == [2, 2, 2]
"""


def python(code, cache, **environment):
    """Run code in a process of its own, with an empty cache of its own unless one is shared."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded nothing and cached nothing; CXX is what the test writes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", None)
    compiler = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(compiler))

    def script(text):
        compiler.write_text(f"#!/bin/sh\n{text}\n")
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)

    return script


@pytest.mark.slow
def test_two_processes_at_once_and_a_third_that_finds_it(tmp_path):
    """One library in the end, nothing beside it; and who comes later needs no compiler to be run."""
    outcomes = [outcome(process) for process in [python(RUN, tmp_path) for _ in range(2)]]
    assert outcomes == ["", ""]
    folder = tmp_path / "revkernels" / "jax"
    (library,) = folder.iterdir()
    assert library.name.startswith(f"handlers-jaxlib{build.jaxlib.__version__}-")
    before = library.stat().st_mtime_ns
    outcome(python("import subprocess\nsubprocess.run = None\n" + RUN, tmp_path))
    assert library.stat().st_mtime_ns == before


def test_the_name_tells_what_it_is_made_of(monkeypatch):
    command = ["c++", "-O2"]
    keys = {build._key(command), build._key([*command, "-g"])}
    monkeypatch.setattr(build.jaxlib, "__version__", "0.0.1")
    keys.add(build._key(command))
    monkeypatch.setattr(build.native, "version", lambda: "99")
    keys.add(build._key(command))
    monkeypatch.setattr(build, "_SOURCES", build._SOURCES[:2])
    keys.add(build._key(command))
    assert len(keys) == 5


def test_no_compiler(fresh, monkeypatch):
    with pytest.raises(rk.BackendError, match=r"no C\+\+ compiler .*compiler not found.*apt-get install g\+\+"):
        build.load()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(rk.BackendError, match=r"c\+\+, g\+\+, clang\+\+ not found"):
        build.load()


def test_a_broken_compiler(fresh):
    """Its own words, whatever it is that it says, and nothing is left behind."""
    fresh("echo 'warning: never mind' >&2; echo 'ffi.h:1: fatal error: no such thing' >&2; exit 1")
    with pytest.raises(rk.BackendError, match=r"do not compile with jaxlib.*: ffi.h:1: fatal error: no such thing$"):
        build.load()
    fresh("echo nothing more; exit 3")
    with pytest.raises(rk.BackendError, match=r"nothing more$"):
        build.load()
    fresh("exit 4")
    with pytest.raises(rk.BackendError, match="ended with status 4 and said nothing"):
        build.load()
    assert not list(build.cache_folder().iterdir())


def test_a_library_that_does_not_load(fresh):
    """It may come from another machine by way of a home that is shared."""
    fresh('for last; do :; done; echo rubbish > "$last"')
    for _ in range(2):  # the second time from the cache
        with pytest.raises(rk.BackendError, match=r"do not load: .*If .*handlers-jaxlib.* delete it"):
            build.load()


def test_a_compiler_that_makes_nothing(fresh):
    fresh("exit 0")
    with pytest.raises(rk.BackendError, match=r"cannot be kept in .*No such file"):
        build.load()


def test_a_cache_that_cannot_be_written(fresh, tmp_path):
    (tmp_path / "cache").write_text("a file")
    fresh("exit 0")
    with pytest.raises(rk.BackendError, match=r"cannot be kept in .*Set XDG_CACHE_HOME"):
        build.load()


def test_without_the_c_library(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(build.native, "missing", lambda name: "it was not built")
    with pytest.raises(rk.BackendError, match="cannot run under JAX: it was not built"):
        build.load()
    monkeypatch.setattr(build.native, "missing", lambda name: None)
    monkeypatch.setattr(build.native, "__file__", str(tmp_path / "native.py"))
    with pytest.raises(rk.BackendError, match="there is no librevkernels in"):
        build.load()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/revkernels/jax")
    for unusable in ("", "relative"):  # which the XDG specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert build.cache_folder() == Path.home() / ".cache" / "revkernels" / "jax"


def test_imports(tmp_path):
    """revkernels never imports JAX; without one, or with one that is too old, the adapter says what it needs."""
    code = """
import sys, types
import revkernels
assert "jax" not in sys.modules
sys.modules["jax"] = JAX
try:
    import revkernels.adapters.jax
except ImportError as error:
    print(error)
"""
    missing = outcome(python(code.replace("JAX", "None"), tmp_path))
    assert missing == "revkernels.adapters.jax needs JAX 0.6 or later: pip install 'revkernels[jax]'\n"
    old = "types.SimpleNamespace(__version_info__=(0, 5, 3), __version__='0.5.3')"
    assert "this is JAX 0.5.3" in outcome(python(code.replace("JAX", old), tmp_path))


@pytest.mark.parametrize("first", ["jax", "torch"])
def test_jax_and_torch_in_one_process(first):
    """In either order of import, both with threads at work."""
    pytest.importorskip("torch", reason="torch is not installed")
    second = {"jax": "torch", "torch": "jax"}[first]
    code = f"""
import {first}, {second}
import numpy as np, revkernels as rk
from revkernels.adapters import jax as rj
x = np.random.default_rng(0).standard_normal((512, 300)).astype("float32")
norm = rk.Norm("batch", channel_dim=1, activation="gelu")
for _ in range(3):
    there = jax.jit(lambda x: (rj.couple(x, x), rj.norm_act(x, norm)[0], x @ x.T))(x)
    here = torch.from_numpy(x)
    y, h, z = rk.ops.couple(here, here), rk.ops.norm_act(here, norm)[0], here @ here.T
    assert np.array_equal(there[0], y) and np.array_equal(there[1], h) and np.allclose(there[2], z, atol=1e-3)
print("done")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "done\n"
