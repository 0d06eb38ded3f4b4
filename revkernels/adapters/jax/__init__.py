# SPDX-License-Identifier: Apache-2.0
"""The kernels under JAX: XLA custom calls, and reversible chains built on them.

    from revkernels.adapters import jax as rj

    apply = rj.reversible(fs, gs)                      # fs[k](f_params[k], x), gs[k](g_params[k], x)
    y1, y2 = apply(f_params, g_params, x1, x2)         # under jit, grad and vmap as any function

The kernels are `couple`, `couple_`, `uncouple`, `uncouple_`, `reverse_step_`, `accumulate_`, `norm_act`,
`couple_norm_act`, `uncouple_norm_act_` and `norm_act_backward_`, on CPUs and on CUDA devices. The first call compiles a
small library against the headers of jaxlib and caches it (`load`).
"""

try:
    import jax as _jax
except ImportError as error:
    raise ImportError("revkernels.adapters.jax needs JAX 0.6 or later: pip install 'revkernels[jax]'") from error
if _jax.__version_info__ < (0, 6):
    raise ImportError(
        f"revkernels.adapters.jax needs JAX 0.6 or later, whose jax.ffi it builds on; this is JAX {_jax.__version__}"
    )

from revkernels.adapters.jax.build import cache_folder, load
from revkernels.adapters.jax.norm_ops import (
    couple_norm_act,
    norm_act,
    norm_act_backward_,
    uncouple_norm_act_,
)
from revkernels.adapters.jax.ops import (
    accumulate_,
    couple,
    couple_,
    reverse_step_,
    uncouple,
    uncouple_,
)
from revkernels.adapters.jax.reversible import reversible
from revkernels.adapters.jax.scan import reversible_scan

__all__ = [
    "accumulate_",
    "cache_folder",
    "couple",
    "couple_",
    "couple_norm_act",
    "load",
    "norm_act",
    "norm_act_backward_",
    "reverse_step_",
    "reversible",
    "reversible_scan",
    "uncouple",
    "uncouple_",
    "uncouple_norm_act_",
]
