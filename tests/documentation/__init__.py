# SPDX-License-Identifier: Apache-2.0
"""The documentation: every fenced block is run, and the site is built."""
