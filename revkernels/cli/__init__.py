# SPDX-License-Identifier: Apache-2.0
"""The command line: ``revkernels info | check | demo | drift | exact | bench``, and the paths of the C interface.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> int``. Only the requested command's module is
imported, so `info` starts without torch and a missing extra breaks no other command.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from revkernels._version import __version__
from revkernels.errors import BackendError

__all__ = ["main"]

COMMANDS = {
    "info": "version, backends and why one is missing, compiled architectures",
    "check": "run every available backend against the NumPy oracle on this machine",
    "demo": "train a RevNet on real handwritten digits, stored and reversible",
    "drift": "measure how far reconstructed activations and gradients are from stored ones, by depth or in a training",
    "exact": "train on real digits with float and with exact couplings, and measure the drift of both",
    "bench": "benchmarks: kernels, training steps, memory, other libraries",
}

#: Options that print one absolute path, each from a function of `revkernels.native`.
PATHS = {
    "--cmake-dir": ("cmake_dir", "what -Drevkernels_DIR= takes, for find_package(revkernels CONFIG)"),
    "--pkgconfig-dir": ("pkgconfig_dir", "what PKG_CONFIG_PATH takes"),
    "--include-dir": ("include_dir", "the folder of revkernels/revkernels.h"),
    "--library": ("library", "the C library's file"),
}

#: What a command needs besides NumPy, and the extra that installs it.
_EXTRAS = {"torch": "torch", "triton": "triton", "sklearn": "demo", "matplotlib": "demo"}

#: torch's RuntimeError texts for missing memory: of the host and of a GPU.
_NO_MEMORY = ("can't allocate memory", "out of memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0 success, 1 a failed check, 2 an invalid or impossible call, 130 ended by Ctrl-C, 141 the
    reader has gone (``revkernels info | head``).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        _parser(None).print_help(sys.stderr)
        return 2
    chosen = words[0] if words[0] in COMMANDS else None
    try:
        return _serve(chosen, words)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        extra = _EXTRAS[package]
        return _refuse(chosen, f"it needs {package}, which is not installed: pip install 'revkernels[{extra}]'")
    except BackendError as error:
        return _refuse(chosen, str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        return _refuse(chosen, f"there is not enough memory: {error}")
    except KeyboardInterrupt:
        _refuse(chosen, "interrupted")
        return 130  # 128 + SIGINT, as in a shell
    except BrokenPipeError:
        _forget_output()
        return 141  # 128 + SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _forget_output()
        return _refuse(chosen, f"what it has to say cannot be written: {error.strerror}")


def _serve(chosen: str | None, words: Sequence[str]) -> int:
    try:
        args = _parser(chosen).parse_args(words)
        return args.run(args)
    finally:
        if sys.stdout is not None:  # None if it is closed
            sys.stdout.flush()  # at Python's exit it would be too late for a one-line error


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="revkernels", description="Fused kernels for reversible residual networks (RevNet)."
    )
    parser.add_argument("--version", action="version", version=f"revkernels {__version__}")
    for option, (function, about) in PATHS.items():
        parser.add_argument(option, action=_PrintPath, const=function, nargs=0, help=f"print {about}, and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if name == chosen:
            module = importlib.import_module(f"revkernels.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


class _PrintPath(argparse.Action):
    """Print what the function of `revkernels.native` named by ``const`` returns, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from revkernels import native

        print(getattr(native, str(self.const))())
        parser.exit()


def _forget_output() -> None:
    """Discard what Python still holds for stdout: at exit it would try to write it and fail again."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _refuse(command: str | None, why: str) -> int:
    print(f"{'revkernels' if command is None else f'revkernels {command}'}: {why}", file=sys.stderr)
    return 2
