# SPDX-License-Identifier: Apache-2.0
"""What a user may do with a reversible network, each situation against the same network in plain PyTorch."""
