# SPDX-License-Identifier: Apache-2.0
"""Fused CPU, CUDA and Triton kernels for reversible residual networks (RevNet, Gomez et al., NeurIPS 2017).

``import revkernels as rk`` needs NumPy alone; ``rk.ops`` has the kernels as functions on arrays. The rest is imported
when it is first used, by name or as ``rk.nn``:

    revkernels.nn               reversible networks as torch modules
    revkernels.models           RevNets, and a reversible vision transformer
    revkernels.diagnostics      where the bytes of a training step are, what rounding does
    revkernels.integrations     models of other packages, changed in place
    revkernels.compat           other reversible libraries' classes, under their names
    revkernels.adapters.numpy   chains on NumPy's and CuPy's arrays
    revkernels.adapters.jax     the kernels and chains under JAX
"""

import importlib
from typing import TYPE_CHECKING, Any

from revkernels import ops
from revkernels._version import __version__
from revkernels.backends import use_backend
from revkernels.budget import MemoryBudget
from revkernels.coupling import Coupling
from revkernels.errors import BackendError, ReconstructionError
from revkernels.exact import Exact
from revkernels.information import info
from revkernels.norm import Norm, Statistics
from revkernels.threads import get_num_threads, set_num_threads

__all__ = [
    "BackendError",
    "Coupling",
    "Exact",
    "MemoryBudget",
    "Norm",
    "ReconstructionError",
    "Statistics",
    "__version__",
    "get_num_threads",
    "info",
    "ops",
    "set_num_threads",
    "use_backend",
]

_LATER = ("adapters", "compat", "diagnostics", "integrations", "models", "nn")

if TYPE_CHECKING:
    from revkernels import adapters, compat, diagnostics, integrations, models, nn  # noqa: F401
else:  # of __getattr__ a type checker would believe that it has any name

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return importlib.import_module(f"revkernels.{name}")
        raise AttributeError(f"module 'revkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_LATER]
