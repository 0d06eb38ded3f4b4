# SPDX-License-Identifier: Apache-2.0
"""The version, kept by itself so that the build can read it without importing anything."""

__version__ = "0.1.0"
