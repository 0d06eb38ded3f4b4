# SPDX-License-Identifier: Apache-2.0
"""The classes of other reversible libraries, with their names and signatures, on this package's driver.

Change the import and keep the model: ``from revkernels.compat import memcnn``. Each module lists its differences;
``docs/migration.md`` has tables. Importing this package imports none of the libraries, nor torch.
"""

__all__ = ["UnsupportedError", "memcnn", "pyg", "reformer", "revlib", "revnet_zero", "revtorch"]


class UnsupportedError(ValueError, NotImplementedError):
    """An option of the other library without a counterpart here. (Some of them raise NotImplementedError.)"""
