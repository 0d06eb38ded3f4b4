# SPDX-License-Identifier: Apache-2.0
"""What the contexts around a branch set in this thread, for putting it back after an interrupt."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode

from revkernels.autograd.fused.norm_context import ambient
from revkernels.autograd.recomputing import says_within, set_within
from revkernels.autograd.state.locks import leave_turns, turns_taken

_graph = torch._C._autograd
_top_hooks = getattr(_graph, "_top_saved_tensors_default_hooks", lambda _: None)  # torch 2.6 does not tell


class ThreadState:
    """The state when this is made; `put_back`, in an ``except`` around the contexts, returns to it.

    Python raises the exception of a signal's handler also as a context's ``__exit__`` begins and as its ``__enter__``
    is about to end, and ``with`` then undoes nothing: saved-tensor hooks would stay and take what other networks save.
    """

    __slots__ = ("gradients", "hooks", "modes", "norms", "turns", "within")

    def __init__(self) -> None:
        self.norms = ambient.kernels, ambient.tape
        self.gradients = torch.is_grad_enabled()
        self.within = says_within()
        self.hooks = _top_hooks(True)
        self.modes = torch._C._len_torch_dispatch_stack()
        self.turns = turns_taken()

    def put_back(self) -> None:
        """Leave what was entered since. Does nothing after an exception that has left every context by itself."""
        ambient.kernels, ambient.tape = self.norms
        set_within(self.within)
        torch._C._set_grad_enabled(self.gradients)
        while (top := _top_hooks(True)) is not None and (self.hooks is None or top[1] is not self.hooks[1]):
            _graph._pop_saved_tensors_default_hooks()
        while torch._C._len_torch_dispatch_stack() > self.modes:
            try:
                _get_current_dispatch_mode().__exit__(None, None, None)  # type: ignore[union-attr]
            except IndexError:  # it had begun to leave: its flags are back
                _pop_mode()
        leave_turns(self.turns)
