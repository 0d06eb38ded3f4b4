# SPDX-License-Identifier: Apache-2.0
"""torchvision beside a torch that it was not built for, since timm imports it.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its library of operators does not load, and then
importing it fails ("operator torchvision::nms does not exist"), because it describes two operators that are not there.
Declared, without anything behind them, they let the import through; timm uses neither. `make test-all` installs it in a
folder of its own, out of the way of packages that use torchvision where they find it (transformers is one).
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(sys.prefix) / "beside"
_declared = []  # a torch.library.Library undoes its definitions when it goes


def timm_or_skip():
    """Import timm and return it, or skip the tests of the file and say why."""
    if importlib.util.find_spec("torchvision") is None and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
    found = importlib.util.find_spec("torchvision")
    if found is not None and "torchvision" not in sys.modules and not _loads(Path(found.origin).parent):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    return pytest.importorskip("timm", reason="needs timm and torchvision: make test-all installs them")


def _loads(package):
    """Whether torchvision's operators come with it."""
    try:
        torch.ops.load_library(next(package.glob("_C*.so")))
    except (OSError, StopIteration):
        return False
    return True
