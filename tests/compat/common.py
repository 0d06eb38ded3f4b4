# SPDX-License-Identifier: Apache-2.0
"""What the tests of the shims share: the same chain in plain torch, and the peer itself where it is installed."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from behaviour.common import WIDE, assert_same, step, torch


def couple(branches, x, split_dim=1, calls=None):
    """(x0, x1) -> (x1, x0 + branch(x1)) for each branch: the usual block is two of them. Plain torch."""
    x0, x1 = x.chunk(2, split_dim)
    for branch, (args, kwargs) in zip(branches, calls or [((), {})] * len(branches), strict=True):
        x0, x1 = x1, x0 + branch(x1, *args, **kwargs)
    return torch.cat((x0, x1), split_dim)


def uncouple(branches, y, split_dim=1):
    """The inverse of `couple`. Plain torch."""
    y0, y1 = y.chunk(2, split_dim)
    for branch in reversed(branches):
        y0, y1 = y1 - branch(y0), y0
    return torch.cat((y0, y1), split_dim)


def plain(network, forward):
    """A copy of the network, with the same names of everything, that runs ``forward(copy, x, ...)`` instead."""
    twin = copy.deepcopy(network)
    twin.forward = lambda *args, **kwargs: forward(twin, *args, **kwargs)
    return twin


def check_copies(network, x):
    """Deep copies, pickles and casts of a module step as it does, and cast back it is what it was."""
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), copy.deepcopy(network).to(WIDE)]
    expected = step(network, x)
    for again in copies:
        assert_same(step(again, x), expected)
    assert network.to(torch.float32)(x.detach().float()).dtype == torch.float32


def check_signatures(shim, expected):
    for name, text in expected.items():
        assert spelled(getattr(shim, name)) == text, name


def spelled(function):
    """The signature without its annotations."""
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare))


def check_gradients(function, x):
    """First and second derivatives against finite differences."""
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def check_against_peer(ours, theirs, x, tolerance=1e-12, **kwargs):
    """The peer's module and the shim's step alike from the same state_dict, running statistics aside.

    Both are called on something that is no leaf, since MemCNN doubles the gradient of a leaf.
    """
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    outcomes = [step(_Behind(network), x, **kwargs) for network in (ours, theirs)]
    for outcome in outcomes:
        outcome.buffers = {}
    assert_same(*outcomes, tolerance)


class _Behind(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, **kwargs):
        return self.network(x * 1, **kwargs)


class InAutocast(_Behind):
    """The network's forward in bfloat16 autocast, and its backward outside of it, as torch recommends."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.network(x)


def installed(name):
    """The peer's package, or the test is skipped."""
    pytest.importorskip(name)
    return sys.modules[name]


_RUN = """
import importlib, json, pytest, sys
peer, shim, paths, neutral = json.loads(sys.argv[1])
importlib.import_module(peer)
for module in paths["modules"]:
    importlib.import_module(module)
shim = importlib.import_module(shim)
for module in [m for name, m in list(sys.modules.items()) if name.split(".")[0] == peer]:
    for name in shim.__all__:
        if hasattr(module, name):
            setattr(module, name, getattr(shim, name))

class Watch:
    outcomes = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for name, value in neutral.items():
                if hasattr(item.module, name):
                    setattr(item.module, name, lambda *args, value=value: value)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.split("/")[-1]] = report.outcome

watch = Watch()
options = ["-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", "-c", paths["config"]]
pytest.main([*options, "--rootdir", paths["root"], *paths["tests"]], plugins=[watch])
print("\\n" + json.dumps(watch.outcomes))
"""


def own_tests(peer, modules, tests, folder, neutral=None):
    """Run the peer's installed tests with the shim in the place of the peer's classes: {test: outcome}.

    Args:
        modules: those of the peer whose names are replaced, beside the package's own.
        tests: files, relative to the package.
        folder: an empty one, to run in.
        neutral: helpers of the tests that are to return a constant, by name.
    """
    root = Path(installed(peer).__file__).parent
    paths = {
        "modules": modules,
        "tests": [str(root / test) for test in tests],
        "root": str(root),
        "config": str(folder / "pytest.ini"),
    }
    (folder / "pytest.ini").write_text("[pytest]\n")
    arguments = json.dumps([peer, f"revkernels.compat.{peer}", paths, neutral or {}])
    done = subprocess.run(
        [sys.executable, "-c", _RUN, arguments],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        pytest.fail(f"the peer's tests did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
