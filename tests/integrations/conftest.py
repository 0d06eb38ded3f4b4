# SPDX-License-Identifier: Apache-2.0
"""Networks of other packages are tried with the packages themselves, from PyPI: a test without its own is skipped."""

from one_thread import one_thread  # noqa: F401
