# SPDX-License-Identifier: Apache-2.0
"""The classes of other reversible libraries, with their names and signatures, on this package's driver.

Change the import and keep the model: ``from revkernels.compat import memcnn``. Each module says where it differs;
``docs/migration.md`` has the tables. Importing this package imports none of them, and no torch.
"""

__all__ = ["UnsupportedError", "memcnn", "pyg", "reformer", "revlib", "revnet_zero", "revtorch"]


class UnsupportedError(ValueError, NotImplementedError):
    """An option of the other library that has no counterpart here. (Some of them raise NotImplementedError.)"""
