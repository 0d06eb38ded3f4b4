# SPDX-License-Identifier: Apache-2.0
"""Runs networks built with other packages on the driver of this one: changed in place, and restorable.

    from revkernels.integrations import pyg, restore
    print(pyg.replace(model))           # what was changed, what was left and why
    ...                                 # train as before
    restore(model)

The functions, and what they change:

    transformers.replace(model)         the layers of a Reformer
    pyg.replace(model)                  PyTorch Geometric's GroupAddRev
    freia.replace(model)                FrEIA's NICECouplingBlock
    nflows.replace(model)               nflows' AdditiveCouplingTransform
    timm.make_reversible(model)         the blocks of a ViT or a ResNet, into another function

The changed modules keep their parameters, buffers, hooks and names: only their class becomes a subclass, whose forward
runs on this package's driver. A changed model can be copied and pickled. Nothing happens silently: each function
returns a `Replaced`, and raises a ValueError if the model contains nothing to change.

Importing this package imports none of the others, nor torch; a function imports its package when it is called, and
raises `MissingPackageError` with the command that installs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revkernels.integrations._swap import Replaced

__all__ = ["MissingPackageError", "Replaced", "freia", "nflows", "pyg", "restore", "timm", "transformers"]


class MissingPackageError(ImportError):
    """The package whose models a function changes is not installed; the message has the command that installs it."""


def restore(model: Any) -> list[str]:
    """Restore the class of every changed module of ``model``, and return their names.

    Parameters and buffers stay as trained. Also works for a copy, and for a pickled model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: no module of it was changed; or something else changed one again (such as fully_shard).
    """
    from revkernels.integrations._swap import restore

    return restore(model)


def __getattr__(name: str) -> Any:
    if name == "Replaced":
        from revkernels.integrations._swap import Replaced

        return Replaced
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
