# SPDX-License-Identifier: Apache-2.0
"""The errors that have no built-in name. Bad arguments are ValueError or TypeError."""


class ReconstructionError(RuntimeError):
    """A stream cannot be rebuilt as it was: found while running, and the message names the half-step and the cause.

    Raised when a parameter, buffer or side input changed between forward and backward, when the recompute of a branch
    saves other tensors than its forward did, or when a branch writes to its input.
    """


class BackendError(ValueError):
    """The backend asked for does not exist, cannot run here, or does not take this kind of array."""
