# SPDX-License-Identifier: Apache-2.0
"""How many threads a call on NumPy arrays takes, without torch in the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import revkernels as rk
from revkernels import native

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)

COUNT = """
import os, sys
import numpy as np
import revkernels as rk
x, f = np.ones(2_000_000, "f4"), np.ones(2_000_000, "f4")
rk.set_num_threads(eval(sys.argv[1]))
before = len(os.listdir("/proc/self/task"))
rk.ops.couple_(x, f)
assert "torch" not in sys.modules and (x == 2).all()
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize(("variable", "number", "started"), [(1, None, 0), (3, None, 2), (1, 3, 2), (3, 1, 0)])
def test_threads_that_a_call_starts(variable, number, started):
    """OpenMP's team beside the calling thread: as large as the variable says, or set_num_threads if it was called."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(variable)}
    command = [sys.executable, "-c", COUNT, repr(number)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == started


FORK = """
import os, signal, sys
import numpy as np
import revkernels as rk
if sys.argv[1] == "torch":
    import torch
    torch.ones(2_000_000).add_(1)
x, f = np.ones((1000, 2000), "f4"), np.ones((1000, 2000), "f4")
h, statistics = rk.ops.norm_act(x, rk.Norm("layer"))
if sys.argv[1] == "kernels":
    rk.ops.couple_(x, f)
child = os.fork()
if child == 0:
    signal.alarm(20)
    rk.ops.couple_(x, f)
    again, _ = rk.ops.norm_act(x, rk.Norm("layer"))
    rk.set_num_threads(4)
    rk.ops.uncouple_(x, f)
    os._exit(not (x == (2 if sys.argv[1] == "kernels" else 1)).all())
status = os.waitpid(child, 0)[1]
rk.ops.couple_(x, f)  # the parent has its threads as before
assert len(os.listdir("/proc/self/task")) > 1
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("first", ["kernels", "torch"])
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have(first):
    """Whoever made them, torch or this library; the child works alone."""
    if first == "torch":
        pytest.importorskip("torch")
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", FORK, first], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_the_setting_is_kept_and_checked():
    assert rk.get_num_threads() is None
    try:
        rk.set_num_threads(3)
        assert rk.get_num_threads() == 3
        for bad, error in ((0, ValueError), (-1, ValueError), (5000, ValueError), (1.5, TypeError), (True, TypeError)):
            with pytest.raises(error, match="number is"):
                rk.set_num_threads(bad)
        assert rk.get_num_threads() == 3
    finally:
        rk.set_num_threads(None)
    assert rk.get_num_threads() is None
