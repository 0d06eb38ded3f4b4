# SPDX-License-Identifier: Apache-2.0
"""The C interface as a binary: symbols and their versions, the layout of structs, every function from ctypes."""

import ctypes
import itertools
import re
import subprocess
import threading
from pathlib import Path

import abi
import numpy as np
import pytest
from abi import cases, structs, verdict
from programs import HEADER, ROOT, need, need_extension, run

from revkernels import native, reference

HEADER_TEXT = (HEADER / "revkernels" / "revkernels.h").read_text()
DECLARED = re.findall(r"^REVK_API ([\w ]+\*?) ?\b(revk_\w+)\((.*?)\);", HEADER_TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def library():
    need_extension()
    return structs.load(native.library())


def version_in_header():
    return int(re.search(r"^#define REVK_ABI_VERSION (\d+)$", HEADER_TEXT, re.MULTILINE)[1])


# ---- symbols


def nodes_of_the_map():
    """{version: the functions that begin with it} of cmake/exports.map."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "cmake" / "exports.map").read_text(), flags=re.DOTALL)
    nodes = re.findall(r"([\w.]+)\s*\{([^}]*)\}", text)
    return {node: re.findall(r"\b(revk\w+);", body.partition("local:")[0]) for node, body in nodes}


def test_one_version_everywhere(library):
    """In the header, the library, its name in the dynamic linker's eyes, its file's name, and the package."""
    need("readelf")
    version = version_in_header()
    assert library.revk_abi_version() == native.ABI_VERSION == version
    (soname,) = re.findall(r"\(SONAME\).*\[(.*)\]", run("readelf", "-d", native.library()))
    assert soname == f"librevkernels.so.{version}" == Path(native.library()).name
    assert library.revk_version().decode() == native.version()


def test_only_the_c_interface_is_exported_and_versioned():
    need("nm")
    need_extension()
    symbols = {line.split()[-1] for line in run("nm", "-D", "--defined-only", native.library()).splitlines()}
    nodes = nodes_of_the_map()
    assert symbols == {f"{name}@@{node}" for node, names in nodes.items() for name in names} | set(nodes)
    assert nodes.pop("REVK_PRIVATE") == ["revktest_set_isa"]
    first = f"REVK_{version_in_header()}"
    assert first in nodes and all(node == first or node.startswith(f"{first}_") for node in nodes)
    exported = [name for names in nodes.values() for name in names]
    assert sorted(exported) == sorted(name for _, name, _ in DECLARED)  # each of them in one node


def test_a_program_needs_the_versions_that_it_was_linked_with(tmp_path):
    """It asks for them by name, and does not start on a library that lacks them."""
    need("readelf", "gcc")
    need_extension()
    (tmp_path / "program.c").write_text(
        "#include <revkernels/revkernels.h>\nint main(void) { return revk_abi_version() - REVK_ABI_VERSION; }\n"
    )
    linked = [f"-I{native.include_dir()}", native.library(), f"-Wl,-rpath,{tmp_path}"]
    run("gcc", "-std=c99", tmp_path / "program.c", *linked, "-o", tmp_path / "program")
    asked = run("readelf", "--wide", "--dyn-syms", tmp_path / "program")
    assert f"revk_abi_version@REVK_{version_in_header()}" in asked
    stand_in = tmp_path / Path(native.library()).name
    stand_in.symlink_to(native.library())
    run(tmp_path / "program")
    stand_in.unlink()
    (tmp_path / "other.c").write_text("int revk_abi_version(void) { return 0; }\n")
    (tmp_path / "other.map").write_text("REVK_0 { global: *; };\n")
    soname = f"-Wl,-soname,{stand_in.name}"
    run(
        "gcc",
        "-shared",
        "-fPIC",
        soname,
        f"-Wl,--version-script={tmp_path / 'other.map'}",
        tmp_path / "other.c",
        "-o",
        stand_in,
    )
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert done.returncode != 0 and f"version `REVK_{version_in_header()}' not found" in done.stderr


# ---- what ctypes is told


def test_structs_and_enums_are_the_headers(tmp_path):
    """A C program prints sizes, offsets and values; no byte of a struct is left out but padding."""
    need("gcc")
    lines, expected = [], []
    for name, kind in structs.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(kind)}")
        end = 0
        for field, type_ in kind._fields_:
            place = getattr(kind, field)
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));'
            )
            expected.append(f"{name}.{field} {place.offset} {ctypes.sizeof(type_)}")
            assert place.offset - end < ctypes.alignment(type_)
            end = place.offset + place.size
        assert ctypes.sizeof(kind) - end < ctypes.alignment(kind)
    for names in structs.ENUMS.values():
        for value, name in enumerate(names):
            lines.append(f'printf("{name} %d\\n", REVK_{name});')
            expected.append(f"{name} {value}")
    lines.append('printf("NO_GRID %ld\\n", (long)REVK_NO_GRID);')
    expected.append(f"NO_GRID {structs.NO_GRID}")
    includes = "#include <revkernels/revkernels.h>\n#include <stddef.h>\n#include <stdio.h>\n"
    (tmp_path / "print.c").write_text(includes + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n")
    run("gcc", "-std=c99", f"-I{HEADER}", tmp_path / "print.c", "-o", tmp_path / "print")
    assert run(tmp_path / "print").splitlines() == expected
    values = re.findall(r"^\s+REVK_(\w+) = (\d+)", HEADER_TEXT, re.MULTILINE)
    assert [name for name, _ in values] == list(itertools.chain(*structs.ENUMS.values()))  # none is left out


def test_functions_are_the_headers():
    numbers = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
    c_types = numbers | {"revk_status": ctypes.c_int32, "const char*": ctypes.c_char_p}
    c_types |= {f"const {name}*": ctypes.POINTER(kind) for name, kind in structs.STRUCTS.items()}
    declared = {}
    for result, name, arguments in DECLARED:
        pairs = [a.rsplit(maxsplit=1) for a in arguments.split(",") if a.strip() != "void"]
        declared[name] = (c_types[result.strip()], {argument: c_types[" ".join(t.split())] for t, argument in pairs})
    assert declared == structs.FUNCTIONS


def test_every_entry_is_fuzzed_and_judged():
    """An entry has arguments. Whoever adds one adds its random calls, the model's word on them and the oracle's."""
    entries = {name for name, (_, arguments) in structs.FUNCTIONS.items() if arguments}
    assert set(cases.ENTRIES) == entries, "tests/abi/cases.py"
    assert set(verdict._ENTRIES) == entries, "tests/abi/verdict.py"


def test_every_module_is_listed():
    """In the docstring of the folder."""
    folder = Path(abi.__file__).parent
    listed = re.findall(r"^(\w+) {2,}\w", abi.__doc__, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


# ---- every function, as a host in another language calls it


def array(seed, *shape, dtype="f4"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def view(a):
    """An array of (outer, channels, inner), whatever its strides."""
    outer, channels, inner = (stride // a.itemsize for stride in a.strides)
    return structs.View(
        dtype={"f8": 0, "f4": 1, "f2": 3}[a.dtype.str[1:]],
        data=a.ctypes.data,
        **dict(zip(("outer", "channels", "inner"), a.shape, strict=True)),
        outer_stride=outer,
        channel_stride=channels,
        inner_stride=inner,
    )


def same(found, expected):
    assert np.array_equal(found.astype("f8"), expected)


def test_couplings(library):
    """couple on the half of a wider array, uncouple in place, reverse_step, accumulate of a list."""
    where = structs.host()
    x, f, wide = array(1, 2, 3, 4), array(2, 2, 3, 4, dtype="f8"), array(3, 2, 6, 4)
    y, other = wide[:, 3:], wide[:, :3].copy()
    scale = array(4, 3, dtype="f8")
    checksum, amax = ctypes.c_uint64(5), ctypes.c_float(0.25)
    coupling = structs.Coupling(
        grid_exponent=8,
        channel_scale=scale.ctypes.data,
        checksum=ctypes.addressof(checksum),
        amax=ctypes.addressof(amax),
    )
    options = {"channel_scale": scale, "channel_dim": 1, "grid_exponent": 8}
    sum_ = reference.couple(x.astype("f8"), f, "float32", "float64", **options)
    assert library.revk_couple(view(y), view(x), view(f), coupling, where) == structs.OK
    same(y, sum_)
    assert np.array_equal(wide[:, :3], other)
    assert checksum.value == 5 + reference.checksum_of(sum_, "float32")
    assert amax.value == reference.amax_of(sum_)

    back = reference.uncouple(sum_, f, "float32", "float64", **options)
    assert library.revk_uncouple(view(y), view(y), view(f), coupling, where) == structs.OK
    same(y, back)

    dy, df = array(5, 2, 3, 4, dtype="f2"), array(6, 2, 3, 4)
    both = reference.reverse_step(
        back, f, dy.astype("f8"), df.astype("f8"), ("float32", "float64", "float16", "float32")
    )
    assert library.revk_reverse_step(view(y), view(f), view(dy), view(df), None, where) == structs.OK
    same(y, both[0])
    same(dy, both[1])

    totals, parts = [array(7, 1, 5, 1), array(8, 3, 1, 2)], [array(9, 1, 5, 1), array(10, 3, 1, 2)]
    sums = [
        reference.accumulate(t.astype("f8"), p.astype("f8"), "float32", "float32")
        for t, p in zip(totals, parts, strict=True)
    ]
    lists = [(structs.View * 2)(*map(view, list_)) for list_ in (totals, parts)]
    assert library.revk_accumulate(*lists, 2, where) == structs.OK
    for found, expected in zip(totals, sums, strict=True):
        same(found, expected)


def test_an_int16_stream(library):
    q, f, value = np.array([[[-7], [32767]]], "i2"), np.array([[[0.5], [0.25]]], "f4"), np.zeros((1, 2, 1), "f4")
    stream = view(value)
    stream.dtype, stream.data = structs.DTYPES.index("int16"), q.ctypes.data
    numbers = view(value)
    coupling = structs.Coupling(grid_exponent=2, value=ctypes.pointer(numbers))
    assert library.revk_couple(stream, stream, view(f), coupling, structs.host()) == structs.OK
    same(q, [[[-5], [-32768]]])  # it wraps, and comes back
    same(value, [[[-1.25], [-8192.0]]])
    assert library.revk_uncouple(stream, stream, view(f), coupling, structs.host()) == structs.OK
    same(q, [[[-7], [32767]]])


def test_norms(library):
    """Each entry with a layer norm and ReLU: bits, given the statistics that the first call wrote."""
    where, shape = structs.host(), (2, 8, 3)
    x, f, y, h = (array(seed, *shape) for seed in range(11, 15))
    mean, rstd, dweight, dbias = np.zeros((2, 3), "f4"), np.zeros((2, 3), "f4"), np.zeros(8, "f4"), np.zeros(8, "f4")
    weight, bias = array(15, 8), array(16, 8)
    norm = structs.Norm(
        kind=structs.KINDS.index("layer"),
        activation=structs.ACTIVATIONS.index("relu"),
        eps=1e-5,
        weight=weight.ctypes.data,
        bias=bias.ctypes.data,
        parameter_dtype=1,
        mean=mean.ctypes.data,
        rstd=rstd.ctypes.data,
        statistics_outer_stride=3,
        statistics_inner_stride=1,
    )
    of = reference.owners(shape, "layer", 1)

    def expected(s):
        found = reference.statistics_of(s.astype("f8"), of, 1e-5, np.float32)
        for got, right in zip((mean, rstd), found, strict=False):
            np.testing.assert_allclose(got.ravel(), right, rtol=1e-5, atol=1e-6)
        shared = (mean.ravel(), rstd.ravel(), weight, bias, "relu", np.float32)
        return reference.norm_act(s.astype("f8"), of, *shared, "float32"), shared

    assert library.revk_norm_workspace(view(x), norm, where) == 0
    assert library.revk_norm_act(view(h), view(x), norm, where) == structs.OK
    same(h, expected(x)[0])
    assert library.revk_couple_norm_act(view(h), view(y), view(x), view(f), norm, where) == structs.OK
    same(y, reference.couple(x.astype("f8"), f.astype("f8"), "float32", "float32"))
    same(h, expected(y)[0])
    back = reference.uncouple(y.astype("f8"), f.astype("f8"), "float32", "float32")
    assert library.revk_uncouple_norm_act(view(h), view(y), view(y), view(f), norm, where) == structs.OK
    same(y, back)
    h_again, shared = expected(y)
    same(h, h_again)

    dh, dx = array(17, *shape), array(18, *shape)
    norm.statistics_given = 1
    gradient = structs.NormGradient(dweight=dweight.ctypes.data, dbias=dbias.ctypes.data)
    right = reference.norm_act_backward(
        dx.astype("f8"), dh.astype("f8"), y.astype("f8"), of, *shared, "float32", kind="layer"
    )
    status = library.revk_norm_act_backward(view(dx), view(dx), view(dh), view(y), norm, gradient, where)
    assert status == structs.OK
    for got, wanted in zip((dx, dweight, dbias), right, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_what_the_library_says_of_itself(library):
    assert library.revk_version().decode() == native.version()
    assert library.revk_cpu_isa().decode() == native.cpu_isa()
    assert library.revk_cuda_archs().decode().split(";") == (native.cuda_architectures() or [""])
    missing = library.revk_cuda_missing()
    assert (missing and missing.decode()) == native.missing("cuda")


def test_the_last_error_is_the_threads_own(library):
    """Four threads fail in turn, each in its own way, and then all look."""
    gate, seen = threading.Barrier(4, timeout=60), {}

    def fail(number):
        before = library.revk_last_error()
        where = structs.host(threads=-1 - number)
        gate.wait()
        status = library.revk_accumulate(None, None, 0, where)
        gate.wait()
        assert library.revk_accumulate(None, None, 0, structs.host()) == structs.OK
        seen[number] = before, status, library.revk_last_error().decode()

    threads = [threading.Thread(target=fail, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {
        i: (b"", structs.INVALID_ARGUMENT, f"where: threads is {-1 - i}, 0 or more is needed") for i in range(4)
    }


def test_other_threads_calls_at_once(tmp_path):
    """Every entry from four threads, with real OpenMP; `test_sanitizers.py` runs the same with ThreadSanitizer."""
    need("g++")
    need_extension()
    program = tmp_path / "threads"
    linked = [native.library(), f"-Wl,-rpath,{Path(native.library()).parent}", "-pthread"]
    run("g++", "-std=c++17", "-O1", f"-I{HEADER}", ROOT / "tests/csrc/threads_test.cpp", *linked, "-o", program)
    assert run(program) == "all passed\n"
