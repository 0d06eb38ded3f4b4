# SPDX-License-Identifier: Apache-2.0
"""What is restored for a branch's recompute, how that is done, and what is refused."""
