# SPDX-License-Identifier: Apache-2.0
"""Residual functions and streams for the tests of `revkernels.adapters.numpy`."""

import numpy as np


class Tanh:
    """f = tanh(x W + b), from ``width`` columns to ``out``: its derivative, and how often its forward was made."""

    def __init__(self, width, seed, dtype="f8", out=None):
        rng, out = np.random.default_rng(seed), width if out is None else out
        self.W, self.b = (0.4 * rng.standard_normal(shape).astype(dtype) for shape in ((width, out), (out,)))
        self.forwards = 0

    def __call__(self, x):
        self.forwards += 1
        return np.tanh(x @ self.W + self.b)

    def vjp(self, x):
        f = self(x)

        def pullback(df):
            dz = df * (1 - f * f)
            return dz @ self.W.T, (x.T @ dz, dz.sum(0))

        return f, pullback


def blocks_of(count, width=4, dtype="f8"):
    return [(Tanh(width, 2 * k, dtype), Tanh(width, 2 * k + 1, dtype)) for k in range(count)]


def streams(number, rows=5, width=4, dtype="f8", seed=7):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows, width)).astype(dtype) for _ in range(number)]
