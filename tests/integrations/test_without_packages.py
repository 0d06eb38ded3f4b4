# SPDX-License-Identifier: Apache-2.0
"""What needs none of the packages: imports, errors, and the account of a change."""

import importlib.metadata
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from behaviour.common import assert_raises  # noqa: E402
from torch import nn  # noqa: E402

from revkernels import integrations  # noqa: E402
from revkernels.integrations import MissingPackageError, Replaced, _swap, restore  # noqa: E402

#: Module, its function, the packages that it imports, and the command that installs them.
FUNCTIONS = [
    ("transformers", "replace", "transformers", "pip install transformers"),
    ("pyg", "replace", "torch_geometric", "pip install torch_geometric"),
    ("timm", "make_reversible", "timm", "pip install timm"),
    ("freia", "replace", "FrEIA", "pip install FrEIA"),
    ("nflows", "replace", "nflows", "pip install nflows"),
]


def test_importing_imports_nothing():
    """The package imports no torch, and its modules none of the packages."""
    modules = [name for name, *_ in FUNCTIONS]
    code = f"""
import sys
import revkernels.integrations
assert "torch" not in sys.modules
for name in {modules!r}:
    __import__("revkernels.integrations." + name)
packages = {{"transformers", "torch_geometric", "timm", "FrEIA", "nflows", "torchvision"}}
assert not packages & set(sys.modules), packages & set(sys.modules)
assert revkernels.integrations.Replaced.__name__ == "Replaced"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sorted(integrations.__all__) == sorted([*modules, "MissingPackageError", "Replaced", "restore"])
    assert_raises(AttributeError, ["has no attribute 'pytorch'"], lambda: integrations.pytorch)


@pytest.mark.parametrize(("module", "function", "package", "command"), FUNCTIONS)
def test_a_missing_package_is_named_with_its_command(module, function, package, command, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    call = getattr(importlib.import_module(f"revkernels.integrations.{module}"), function)
    error = assert_raises(MissingPackageError, [package, "not installed", command], lambda: call(nn.Linear(2, 2)))
    assert isinstance(error, ImportError)


def test_what_a_package_lacks_itself_is_not_called_the_package(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_raises(ModuleNotFoundError, ["nowhere_to_be_found"], lambda: _swap.needs("half_there", "half-there"))
    with pytest.raises(ModuleNotFoundError) as raised:
        _swap.needs("half_there", "half-there")
    assert not isinstance(raised.value, MissingPackageError)


class Doubled(_swap.Swapped):
    """Gives twice what the module's own forward gives."""

    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def double(model, **options):
    def look(module):
        if not isinstance(module, nn.Linear):
            return None
        changed = _swap.own(module, nn.Linear, "forward")
        return (None, changed) if changed else (Doubled, "doubled")

    return _swap.replace(model, "torch", look, "an nn.Linear", Doubled, options, ["a note"])


def test_change_and_restore():
    """The class alone is another; what was left, and why, is in the account."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), *(nn.Linear(2, 2) for _ in range(6)), Own(2, 2))
    x = torch.randn(3, 2)
    before = model(x)
    replaced = double(model)
    assert isinstance(replaced, Replaced)
    assert list(replaced.modules) == ["0", "2", "3", "4", "5", "6", "7"]
    assert replaced.left == {"8": "Own has a forward of its own"}
    assert str(replaced).splitlines() == [
        f"torch {importlib.metadata.version('torch')}: 7 modules changed, 1 left",
        "  + 0, 2, ..., 7: doubled",
        "  - 8: Own has a forward of its own",
        "  a note",
    ]
    assert "revkernels_Linear(in_features=2" in repr(model)
    assert isinstance(model[0], nn.Linear) and isinstance(model[0], Doubled)
    assert not torch.equal(model(x), before)
    assert replaced.restore() == list(replaced.modules)
    assert torch.equal(model(x), before)
    assert [type(module) for module in model[::2]] == [nn.Linear] * 4 + [Own]
    assert "revkernels_options" not in model[0].__dict__


def test_nothing_to_change_is_an_error():
    assert_raises(
        ValueError,
        ["nothing to change in this ReLU", "an nn.Linear is looked for", "there is none"],
        lambda: double(nn.ReLU()),
    )
    assert_raises(
        ValueError,
        ["an nn.Linear", "none of those found will do (model: Own has a forward of its own)"],
        lambda: double(Own(2, 2)),
    )
    model = nn.Linear(2, 2)
    model.forward = lambda x: x  # as accelerate does
    assert_raises(ValueError, ["this Linear was given a forward of its own"], lambda: double(model))
    model = nn.Sequential(nn.Linear(2, 2))
    double(model)
    assert_raises(ValueError, ["0: changed before"], lambda: double(model))


def test_bad_arguments():
    assert_raises(TypeError, ["model is a str; it must be an nn.Module"], lambda: double("model"))
    assert_raises(ValueError, ["backend is 'none'"], lambda: double(nn.Linear(2, 2), backend="none"))
    wanted = ["activations is 'keep'", "'reconstruct' or 'store'"]
    assert_raises(ValueError, wanted, lambda: double(nn.Linear(2, 2), activations="keep"))
    assert_raises(TypeError, ["model is a int"], lambda: restore(3))
    assert_raises(ValueError, ["there is nothing to restore"], lambda: restore(nn.Linear(2, 2)))


def test_a_module_that_was_changed_once_more_is_not_restored():
    model = nn.Sequential(nn.Linear(2, 2))
    double(model)
    mine = type(model[0])
    model[0].__class__ = type("Sharded", (mine,), {})
    assert_raises(ValueError, ["0 has become a Sharded"], lambda: restore(model))
    model[0].__class__ = mine
    assert restore(model) == ["0"]
