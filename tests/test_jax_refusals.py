# SPDX-License-Identifier: Apache-2.0
"""What a reversible chain refuses under JAX, and how it says so."""

import numpy as np
import pytest
from jax_cases import chain_params, jax, jnp, mlp, mlp_params, stacked, stream_pair

import revkernels as rk
from revkernels.adapters import jax as rj

F, G = chain_params(mlp_params, 2, 4)
X1, X2 = stream_pair((3, 4))
CHAIN = rj.reversible([mlp, mlp], [mlp, mlp])
STACK = rj.reversible_scan(mlp, mlp)
FS, GS = stacked(F), stacked(G)
SWAPPED = np.dtype("float32").newbyteorder()


def broken(branch):
    return rj.reversible([mlp, mlp], [mlp, branch])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rj.reversible(mlp, mlp), TypeError, "fs is a function; it must be a list"),
        (lambda: rj.reversible([mlp], [3]), TypeError, r"gs\[0\] is a int"),
        (lambda: rj.reversible([mlp], []), ValueError, "gs has 0 functions, fs has 1"),
        (lambda: rj.reversible_scan(mlp, None), TypeError, "g is a NoneType"),
        (lambda: rj.reversible([mlp], [mlp], backend="cuda"), rk.BackendError, "backend is 'cuda'"),
        (lambda: rj.reversible([mlp], [mlp], coupling="exactly"), ValueError, "coupling is 'exactly'"),
        (lambda: rj.reversible([mlp], [mlp], coupling="exact"), ValueError, r"needs its k.*Exact\(k=14\)"),
        (lambda: rj.reversible([mlp], [mlp], coupling=rk.Exact()), ValueError, "needs its k"),
        (lambda: CHAIN(F[:1], G, X1, X2), ValueError, "f_params has 1 entries, fs has 2"),
        (lambda: CHAIN(F, {0: G[0]}, X1, X2), TypeError, "g_params is a dict"),
        (lambda: CHAIN(F, G, X1, X2[:1]), ValueError, r"x2 has shape \(1, 4\), x1 has \(3, 4\)"),
        (lambda: CHAIN(F, G, X1, X2.astype("float16")), ValueError, "x1 is float32, x2 is float16"),
        (lambda: CHAIN(F, G, X1.astype(int), X2), TypeError, "x1 is int32"),
        (lambda: CHAIN(F, G, (X1, X2), X2), TypeError, "x1 is a tuple"),
        (
            lambda: CHAIN(F, G, X1, np.zeros((3, 4), SWAPPED)),
            TypeError,
            r"x2 is byte-swapped \([<>]f4\); it must be in",
        ),
        (lambda: rj.couple(np.zeros((3, 4), SWAPPED), X1), TypeError, "x is byte-swapped"),
        (lambda: CHAIN.inverse(F, G, X1, X2[0]), ValueError, "y2 has shape"),
        (lambda: broken(lambda p, x: x[0])(F, G, X1, X2), ValueError, r"gs\[1\] returned shape \(4,\); its stream has"),
        (lambda: broken(lambda p, x: (x, x))(F, G, X1, X2), TypeError, r"gs\[1\] returned a tuple"),
        (lambda: broken(lambda p, x: x > 0)(F, G, X1, X2), TypeError, r"gs\[1\] returned bool"),
        (lambda: broken(lambda p, x: x[0]).inverse(F, G, X1, X2), ValueError, r"gs\[1\] returned shape"),
        (lambda: STACK(F, G, X1, X2), ValueError, "the first sizes must be equal"),
        (lambda: STACK(FS, jax.tree.map(lambda a: a[:1], GS), X1, X2), ValueError, "g_params has an array of shape"),
        (lambda: STACK({"a": jnp.float32(1)}, GS, X1, X2), ValueError, r"f_params has an array of shape \(\)"),
        (lambda: STACK(None, None, X1, X2), ValueError, "have no arrays"),
        (lambda: rj.reversible_scan(mlp, lambda p, x: x.T)(FS, GS, X1, X2), ValueError, "g returned shape"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_forward_mode_is_jax_s_own_refusal():
    """A `jax.custom_vjp` has no other derivative."""
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: CHAIN(F, G, x, X2), (X1,), (X1,))


def test_what_is_closed_over_has_no_gradient():
    """A parameter that a branch finds elsewhere than in its arguments; where nobody differentiates by it, it is one."""

    def chain(w, x):
        return rj.reversible([lambda p, x: x @ w], [mlp])([None], [G[0]], x, X2)[0].sum()

    for way in (lambda f: f, jax.jit):
        with pytest.raises(jax.errors.UnexpectedTracerError):
            way(jax.grad(chain))(jnp.eye(4), X1)
    assert jax.jit(lambda w: jax.grad(chain, 1)(w, X1))(jnp.eye(4)).shape == X1.shape
