# SPDX-License-Identifier: Apache-2.0
"""Reversible networks in two processes: DDP, FSDP2 and sharded checkpoints, against plain PyTorch in one process."""
