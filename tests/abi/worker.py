# SPDX-License-Identifier: Apache-2.0
"""Calls of the C library in a process of their own. A crash ends that process, and the caller learns which call it was.

``python -m abi.worker LIBRARY`` reads requests, pickled, from its input and writes (result, last error, content of the
arena) to its output.
"""

import ctypes
import os
import pickle
import select
import subprocess
import sys
from pathlib import Path

from abi import structs
from abi.calls import ARENA, Memory

#: Seconds that a call may take. Those of the tests take far less than one.
LIMIT = 60


class CrashError(AssertionError):
    """The library ended the process, or did not come back."""


class Worker:
    """A process that has loaded a library, started again whenever it has crashed."""

    def __init__(self, library, env=None):
        self._command = [sys.executable, "-m", "abi.worker", str(library)]
        paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        self._env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(env or {})}
        self._process = None

    def call(self, content, call, reach=None, isa=None):
        """(result, last error, content of the arena) of a call; the last error is this worker's, from whichever call.

        Args:
            content: of the arena before.
            reach: (begin, end) of the bytes that the call may touch. Where the library is compiled with
                AddressSanitizer, any other is an error. None: all of them.
            isa: the loops to run, by name. None: as they are.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self._env
            )
        process = self._process
        try:
            pickle.dump((content, call, reach, isa), process.stdin)
            process.stdin.flush()
            if not select.select([process.stdout], [], [], LIMIT)[0]:
                process.kill()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            self._process = None
            _, said = process.communicate()
            words = f"exit status {process.returncode}{' after a minute' if process.returncode == -9 else ''}"
            raise CrashError(f"{words} in\n{call}\n{said.decode(errors='replace')[-4000:]}") from None

    def close(self):
        if self._process is not None:
            self._process.communicate()  # the end of its input ends it
            self._process = None


def _sanitizer(name):
    """A function of AddressSanitizer's, which does nothing where it is not there."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except AttributeError:
        return lambda address, size: None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], None
    return function


def main(path):
    library, memory = structs.load(path), Memory()
    library.revktest_set_isa.argtypes, library.revktest_set_isa.restype = [ctypes.c_char_p], ctypes.c_bool
    poison, unpoison = map(_sanitizer, ("__asan_poison_memory_region", "__asan_unpoison_memory_region"))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a sanitizer or the library prints is no answer
    while True:
        try:
            content, call, reach, isa = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if isa is not None and not library.revktest_set_isa(isa.encode()):
            raise ValueError(f"{path} has no loops for {isa} on this machine")
        memory.write(content)
        if reach is not None:
            poison(memory.address, ARENA)
            for begin, end in reach:
                unpoison(memory.address + begin, end - begin)
        result, text = memory.call(library, call)
        unpoison(memory.address, ARENA)
        pickle.dump((result, text, memory.read()), answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
