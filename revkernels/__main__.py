# SPDX-License-Identifier: Apache-2.0
"""``python -m revkernels``: the same as the console script ``revkernels``."""

import sys

from revkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
