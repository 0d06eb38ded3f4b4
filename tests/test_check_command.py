# SPDX-License-Identifier: Apache-2.0
"""`revkernels check`: the calls it makes, what it finds, and what it leaves out."""

import itertools

import numpy as np
import pytest

from revkernels import backends, norm, ops
from revkernels.cli import cases, check, main
from tests.commands import revk, tables


def test_check_agrees_with_the_oracle(tmp_path):
    done = revk("check", "--json", tmp_path / "check.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = tables(tmp_path / "check.json").values()
    rows = {row["backend"]: row for row in table["rows"]}
    assert set(rows) == set(backends.BACKENDS) - {"reference"}
    for name, row in rows.items():
        missing = backends.BACKENDS[name].missing()
        for kernel in cases.KERNELS:
            assert row[kernel] == "left out" if missing else row[kernel].startswith("ok (")
        assert row["reason"] == missing


def test_check_of_one_backend_runs_it_or_says_why_not(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setattr(check, "calls", lambda: itertools.islice(cases.calls(), 0, None, 25))
    assert main(["check", "--backend", "eager", "--json", str(tmp_path / "check.json")]) == 0
    (row,) = tables(tmp_path / "check.json").popitem()[1]["rows"]
    assert row["backend"] == "eager" and all(row[kernel].startswith("ok (") for kernel in cases.KERNELS)
    done = revk("check", "--backend", "eager", without=["torch", "triton"])
    assert done.returncode == 2
    assert "revkernels check: --backend='eager' cannot run here: torch is not installed" in done.stderr
    assert "Available: reference" in done.stderr
    assert "ok (" not in done.stdout


def test_check_without_torch_runs_on_numpy_and_says_what_it_left_out():
    done = revk("check", without=["torch", "triton", "rich"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: torch tensors: torch is not installed" in done.stdout
    if backends.BACKENDS["cpu"].missing() is None:
        (cpu,) = (line for line in done.stdout.splitlines() if line.startswith("cpu "))
        assert cpu.count("ok (") == len(cases.KERNELS)


def test_check_covers_every_kernel():
    """couple and couple_ are one kernel, uncouple and uncouple_ another: either row stands for both."""
    functions = {name.removesuffix("_") for name in ops.__all__ if name.islower()}
    rows = {name.removesuffix("_") for name in cases.KERNELS}
    assert rows == functions, f"KERNELS of revkernels/cli/cases.py, rows too few or too many: {rows ^ functions}"


def test_check_covers_dtypes_layouts_and_libraries():
    made = list(cases.calls())
    for kernel in cases.KERNELS:
        mine = [call for call in made if call.kernel == kernel]
        pairs = {(call.stream, call.branch) for call in mine if call.library == "torch"}
        coupling = kernel in ("couple", "uncouple_", "reverse_step_")
        assert len({pair for pair in pairs if pair[0] != "int16"}) == 16
        assert len(pairs) == (20 if coupling else 16)
        assert {call.layout for call in mine} == {"dense", "NCHW half", "channels-last half"}
        assert {call.library for call in mine} == {"numpy", "torch"}
        assert any(call.options for call in mine) == coupling
        assert {call.norm for call in mine} == (set(norm.KINDS) if "norm" in kernel else {""})


def test_a_call_of_an_int16_stream_has_a_value():
    y, f, value, checksum, amax = cases.Call("uncouple_", "numpy", "int16", "float32", "NCHW half", options=True).run(
        "reference"
    )
    channels = y.shape[1] // 2
    assert (y.dtype, f.dtype, value.dtype) == ("int16", "float32", "float16")
    assert np.array_equal(value[:, :channels], (y[:, :channels] / 2.0**9).astype(np.float16))
    assert checksum.any() and amax > 32767 / 2**9, "nothing has wrapped"


def test_a_call_leaves_the_other_half_alone_and_repeats():
    call = cases.Call("uncouple_", "numpy", "float32", "float32", "NCHW half")
    y, f = call.run("reference")
    again = call.run("reference")
    assert cases.differences(call, [y, f], again) == 0
    untouched = cases.Call("accumulate_", "numpy", "float32", "float32", "NCHW half").run("reference")[0]
    channels = call.shape[1]
    assert np.array_equal(y[:, channels:], untouched[:, channels:], equal_nan=True)
    assert not np.array_equal(y[:, :channels], untouched[:, :channels], equal_nan=True)


NORMS = [kernel for kernel in cases.KERNELS if "norm" in kernel]


def test_norms_are_also_checked_on_what_they_compute():
    """Statistics, and every activation behind them."""
    made = [call for call in cases.calls() if call.computes]
    for kernel in NORMS:
        assert {call.norm for call in made if call.kernel == kernel} == set(norm.KINDS)
    assert set(cases._ACTIVATIONS.values()) == set(norm.ACTIVATIONS) - {"none"}
    call = cases.Call("norm_act", "numpy", "float32", "float32", "dense", norm="batch", computes=True)
    x, h, mean, rstd, running_mean, running_var = call.run("reference")
    assert np.allclose(mean, x.mean((0, 2, 3))) and np.allclose(rstd, (x.var((0, 2, 3)) + 1e-5) ** -0.5)
    assert h.shape == x.shape and running_mean.shape == running_var.shape == mean.shape


@pytest.mark.parametrize("kernel", NORMS)
@pytest.mark.parametrize("stream", ["float64", "float32", "float16"])
def test_a_result_may_be_off_by_rounding_and_no_more(kernel, stream):
    """Each result: by one unit in its last place; not by a thousandth (in float16 one in fifty) of the largest."""
    call = cases.Call(kernel, "numpy", stream, stream, "dense", cases._SMALL_EXACT, norm="batch", computes=True)
    expected = call.run("reference")
    for index, result in enumerate(expected):
        for by, most in ((np.nextafter(result, np.inf) - result, 0), (np.abs(result).max() / 50, result.size)):
            got = [*expected[:index], result + np.asarray(by, result.dtype), *expected[index + 1 :]]
            found = cases.differences(call, got, expected)
            assert found == 0 if most == 0 else found > result.size / 2, index


def wrong(operand):
    """A backend like the oracle but for one bit of one element of one operand."""

    class Wrong:
        CHECKS_OPERANDS = True

        def __getattr__(self, name):
            from revkernels.reference import backend

            def kernel(*arrays):
                getattr(backend, name)(*arrays)
                if name == "reverse_step":
                    array = arrays[operand]
                    array[1, 2, 3, 4] = np.nextafter(array[1, 2, 3, 4], np.inf)

            return kernel

    return Wrong()


@pytest.mark.parametrize("operand", [0, 1, 2, 3])
def test_check_finds_one_wrong_bit_in_any_operand(operand, monkeypatch):
    call = cases.Call("reverse_step_", "numpy", "float32", "float32", "dense")
    expected = call.run("reference")
    monkeypatch.setattr(backends.Backend, "load", lambda self: wrong(operand))
    monkeypatch.setattr(backends.Backend, "missing", lambda self: None)
    monkeypatch.setattr(backends, "_cache", {})
    assert cases.differences(call, call.run("cpu"), expected) == 1


def test_check_exits_1_on_a_mismatch(monkeypatch, capsys, tmp_path):
    real = cases.Call.run

    def run(self, backend, device="cpu"):
        values = real(self, "reference")
        if backend == "cpu" and self.kernel == "uncouple_":
            values[0] = values[0] + 1
        return values

    monkeypatch.setattr(cases.Call, "run", run)
    monkeypatch.setattr(check, "calls", lambda: [call for call in cases.calls() if call.stream == "float32"])
    here = ("cpu", "reference")
    monkeypatch.setattr(backends.Backend, "missing", lambda self: None if self.name in here else "a test")
    from revkernels.cli import main

    assert main(["check", "--json", str(tmp_path / "check.json")]) == 1
    first, second = tables(tmp_path / "check.json").values()
    cpu = next(row for row in first["rows"] if row["backend"] == "cpu")
    assert "FAILED" in cpu["uncouple_"]
    assert cpu["couple"].startswith("ok")
    assert {row["kernel"] for row in second["rows"]} == {"uncouple_"}
    assert "calls that failed" in capsys.readouterr().out


def test_a_backend_that_raises_is_a_finding_not_a_crash(monkeypatch):
    real = cases.Call.run

    def run(self, backend, device="cpu"):
        if backend == "cpu":
            raise RuntimeError("planted")
        return real(self, backend)

    monkeypatch.setattr(cases.Call, "run", run)
    monkeypatch.setattr(backends.Backend, "missing", lambda self: None)
    verdicts, failures = check.examine(["cpu"], [cases.Call("couple", "numpy", "float32", "float32", "dense")])
    assert verdicts["cpu", "couple"].failed == 1
    assert failures[0]["error"] == "RuntimeError: planted"
