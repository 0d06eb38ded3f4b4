# SPDX-License-Identifier: Apache-2.0
"""The C library compiled with a sanitizer: from its sources, without CUDA, unoptimised, so that nothing is hidden."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from programs import HEADER, ROOT, need, run

from revkernels import native

ADDRESS = "address,undefined"
THREAD = "thread"
_FLAGS = [
    "-O0",
    "-g",
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=all",
    "-fPIC",
    f"-I{ROOT / 'csrc'}",
    f"-I{HEADER}",
]
# As in cmake/CpuKernels.cmake.
_AVX2 = ["-mavx2", "-mf16c", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
_ISA_FLAGS = {"isa_avx2": _AVX2, "isa_avx512": _AVX512}


class Sanitized:
    """The library's objects in a folder, compiled with a sanitizer: the plain loops, or those of every instruction set.

    Attributes:
        library: the shared library, under its own SONAME.
        env: what a program that loads it needs, unless it was linked with the sanitizer itself.
    """

    def __init__(self, folder, sanitizer, every_isa=False):
        need("gcc", "g++")
        self.folder, self._flags = folder, [*_FLAGS, f"-fsanitize={sanitizer}"]
        self._probe()
        sources = [*ROOT.glob("csrc/core/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), ROOT / "csrc/cuda/unavailable.cpp"]
        sources = [source for source in sources if every_isa or source.stem not in _ISA_FLAGS]
        defined = [f'-DREVK_VERSION="{native.version()}"', *(["-DREVK_X86_ISAS"] if every_isa else [])]
        flags = ["-std=c++17", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", *defined]
        with ThreadPoolExecutor(2) as workers:
            compiled = [workers.submit(self._object, s, *flags, *_ISA_FLAGS.get(s.stem, [])) for s in sources]
        self.objects = [job.result() for job in compiled]
        self.library = folder / f"librevkernels.so.{native.ABI_VERSION}"
        if sanitizer == ADDRESS:
            named = f"-Wl,-soname,{self.library.name}"
            run("g++", "-shared", "-fopenmp", *self._flags, named, *self.objects, "-o", self.library)
        runtimes = [run("gcc", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
        self.env = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own are none of ours

    def _object(self, source, *flags):
        made = self.folder / f"{source.stem}.o"
        run("g++", *self._flags, *flags, "-c", source, "-o", made)
        return made

    def _probe(self):
        """Skip where the compiler has no such sanitizer, or the machine does not let it run."""
        (self.folder / "probe.c").write_text("int main(void) { return 0; }\n")
        for command in (["gcc", *self._flags, "probe.c", "-o", "probe"], ["./probe"]):
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"{self._flags[-1]} does not work here: {(done.stdout + done.stderr)[-300:]}")

    def c_program(self, source):
        """A C program on the shared library."""
        program = self.folder / source.parent.name
        linked = [self.library, f"-Wl,-rpath,{self.folder}", "-lm", "-fopenmp"]
        run("gcc", "-std=c99", *self._flags, source, *linked, "-o", program)
        return program

    def cpp_program(self, *sources, openmp=True):
        """A C++ program with the library's objects in it."""
        made = [self._object(source, "-std=c++17", "-fopenmp") for source in sources]
        program = self.folder / sources[0].stem
        run("g++", *self._flags, *(["-fopenmp"] if openmp else ["-pthread"]), *made, *self.objects, "-o", program)
        return program
