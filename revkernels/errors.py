# SPDX-License-Identifier: Apache-2.0
"""Errors without a built-in name. Bad arguments raise ValueError or TypeError."""


class ReconstructionError(RuntimeError):
    """A stream cannot be reconstructed as it was. Raised at run time; the message names the half-step and the cause.

    Causes: a parameter, buffer or side input changed between forward and backward; the recompute of a branch saves
    other tensors than its forward did; a branch writes to its input.
    """


class BackendError(ValueError):
    """The requested backend does not exist, cannot run here, or does not support this kind of array."""
