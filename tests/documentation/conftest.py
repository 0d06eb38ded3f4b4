# SPDX-License-Identifier: Apache-2.0
"""Blocks of the documentation work on tiny tensors."""

from one_thread import one_thread  # noqa: F401
