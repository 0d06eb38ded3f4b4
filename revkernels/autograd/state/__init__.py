# SPDX-License-Identifier: Apache-2.0
"""What a branch must find again when it is run once more, how that is put there, and what of it is refused."""
