# SPDX-License-Identifier: Apache-2.0
"""Which layers of a branch run as one kernel, alone or together with the coupling in front of them."""
