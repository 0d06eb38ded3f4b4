# SPDX-License-Identifier: Apache-2.0
"""The C interface under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind: nothing to report.

Each is shown a mistake too, for a tool that sees nothing reports nothing either. GCC's OpenMP runtime is not
instrumented. Under ThreadSanitizer a small one takes its place (`csrc/tsan_openmp.cpp`), made of threads that it sees,
so that what happens inside a parallel region is checked as well, and nothing is suppressed.
"""

import os
import random
import subprocess

import pytest
from abi import structs
from abi.fuzzer import Fuzzer
from abi.samples import case, found, sample
from abi.worker import CrashError, Worker
from native_oracle import ISAS
from programs import HEADER, ROOT, need, need_extension, run
from sanitizers import ADDRESS, THREAD, Sanitized

from revkernels import native

EXAMPLE = ROOT / "examples" / "c_host" / "main.c"
CSRC = ROOT / "tests" / "csrc"
ENTRIES = [name for name, (_, arguments) in structs.FUNCTIONS.items() if arguments]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    need_extension()
    return Sanitized(tmp_path_factory.mktemp("address"), ADDRESS)


@pytest.fixture(scope="module")
def every_isa(tmp_path_factory):
    need_extension()
    return Sanitized(tmp_path_factory.mktemp("every-isa"), ADDRESS, every_isa=True)


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    need_extension()
    made = Sanitized(tmp_path_factory.mktemp("thread"), THREAD)
    return made.cpp_program(CSRC / "threads_test.cpp", CSRC / "tsan_openmp.cpp", openmp=False)


def test_the_example(address):
    """With a search for leaks at its end."""
    said = run(address.c_program(EXAMPLE))
    assert said.endswith("all as it should be\n") and "loops for baseline" in said


def test_every_entry_and_what_was_wrong_once(address):
    """Right calls touch no byte beyond their arrays, and refused ones none at all: the rest of memory is poisoned."""
    fuzzer = Fuzzer(address.library, address.env)
    for entry in ENTRIES:
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            fuzzer.judge(case(sample(entry, dtype)))
        assert fuzzer.seen[entry, "right"] == 4
    for what, call in found():
        try:
            fuzzer.judge(case(call))
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
    fuzzer.close()


def test_the_sanitizer_sees_a_call_that_lies(address):
    """One row more than there is: a caller's mistake, which the library cannot see."""
    worker, call = Worker(address.library, address.env), sample("revk_couple")
    reach = [(0, 96), (256, 352), (512, 608), (768, 776), (1024, 1028)]
    content = case(call).content()
    assert worker.call(content, call, reach)[0] == structs.OK
    for name in ("y", "x", "f"):
        call[name]["outer"] = 3
    with pytest.raises(CrashError, match="AddressSanitizer: use-after-poison"):
        worker.call(content, call, reach)
    worker.close()


def test_threads(threads):
    """Every entry from four threads at once, with one thread and with three in a call."""
    assert run(threads) == "all passed\n"


def test_the_sanitizer_sees_a_race(threads):
    """The same with one memory for all."""
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([threads, "race"], capture_output=True, text=True, env=env)
    assert done.returncode != 0 and "ThreadSanitizer: data race" in done.stderr


VALGRIND = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"]


def installed_program(folder, compiler, source, *flags):
    need_extension()
    need(compiler, "valgrind")
    library = native.library()
    flags = [f"-I{HEADER}", f"-I{ROOT / 'csrc'}", *flags, library, f"-Wl,-rpath,{library.rpartition('/')[0]}", "-lm"]
    run(compiler, "-g", "-O1", source, *flags, "-o", folder / "program")
    return folder / "program"


def test_the_example_in_valgrind(tmp_path):
    program = installed_program(tmp_path, "gcc", EXAMPLE, "-std=c99")
    assert run(*VALGRIND, program).endswith("all as it should be\n")


LIE = """
#include <revkernels/revkernels.h>
#include <stdlib.h>
int main(void) {
  revk_view view = {sizeof view, REVK_FLOAT32, 0, 1, 1, 17, 17, 17, 1}, f = view;
  const revk_where where = {sizeof where, -1, 0, 1};
  view.data = calloc(16, 4), f.data = calloc(16, 4);
  return (int)revk_couple(&view, &view, &f, 0, &where);
}
"""


def test_valgrind_sees_a_call_that_lies(tmp_path):
    """One number more than there is."""
    (tmp_path / "lie.c").write_text(LIE)
    program = installed_program(tmp_path, "gcc", tmp_path / "lie.c", "-std=c99")
    done = subprocess.run([*VALGRIND, program], capture_output=True, text=True)
    assert done.returncode == 9 and "Invalid read of size" in done.stderr and "Invalid write of size" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_core", "test_norm_act"])
def test_the_cpp_tests_in_valgrind(name, tmp_path):
    program = installed_program(tmp_path, "g++", CSRC / f"{name}.cpp", "-std=c++17")
    assert run(*VALGRIND, program) == "all passed\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_core", "test_norm_act", "threads_test"])
def test_the_cpp_tests(name, every_isa):
    assert run(every_isa.cpp_program(CSRC / f"{name}.cpp")) == "all passed\n"


@pytest.mark.slow
def test_random_calls(every_isa):
    """As `test_abi_fuzz.py` makes them, with the loops of every instruction set that this machine has."""
    fuzzer = Fuzzer(every_isa.library, every_isa.env, ISAS)
    fuzzer.run(100, first=random.SystemRandom().randrange(10**6, 10**9))
    for entry in ENTRIES:
        assert min(fuzzer.seen[entry, "right"], fuzzer.seen[entry, "refused"]) >= 50, fuzzer.seen
    fuzzer.close()
