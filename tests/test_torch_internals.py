# SPDX-License-Identifier: Apache-2.0
"""Torch's private names: every one that the package uses is listed here with its purpose, and exists.

A torch release without one of them fails here first, by name. Optional names are looked up with getattr; the package
works without them.
"""

import ast
import importlib
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

PACKAGE = Path(__file__).resolve().parent.parent / "revkernels"

USED = {
    "torch.UntypedStorage._new_with_weak_ptr": "diagnostics: which storages are alive",
    "torch._C.DisableTorchFunction": "work that no function mode of the caller's may see",
    "torch._C._are_functorch_transforms_active": "plain torch calls under torch.func",
    "torch._C._autograd": "saved-tensor hooks in force; a profiler around one operator",
    "torch._C._current_graph_task_id": "which backward asks for a saved tensor",
    "torch._C._dynamo.eval_frame.set_eval_frame": "torch.compile: the driver stays outside the graph",
    "torch._C._has_storage": "batched gradients",
    "torch._C._len_torch_dispatch_stack": "reading generators under FakeTensorMode",
    "torch._C._profiler.ActiveProfilerType.LEGACY": "memory budgets: bytes inside operators",
    "torch._C._profiler._ExperimentalConfig": "memory budgets: bytes inside operators",
    "torch._C._set_grad_enabled": "the grad mode, without a context manager",
    "torch._dynamo.decorators.skip": "torch.compile: the driver stays outside the graph",
    "torch._dynamo.reset": "benchmarks",
    "torch._dynamo.trace_rules.add": "torch.compile: the driver stays outside the graph",
    "torch._functorch.config.patch": "benchmarks: torch's activation memory budget",
    "torch._ops.OpOverload": "memory budgets: operators whose outputs may be kept",
    "torch.autograd.Variable._execution_engine.queue_callback": "the end of a backward",
    "torch.autograd._get_sequence_nr": "nodes made since a branch began",
    "torch.autograd.forward_ad._current_level": "forward-mode derivatives are refused",
    "torch.autograd.graph._engine_run_backward.__code__": "whether a thread waits for the engine",
    "torch.nn.Module._call_impl": "whether modules are called as torch calls them",
    "torch.nn.modules.batchnorm._BatchNorm": "the kinds of batch norms",
    "torch.nn.modules.conv._ConvNd": "the kinds of convolutions",
    "torch.nn.modules.instancenorm._InstanceNorm.forward": "running statistics of instance norms",
    "torch.nn.modules.module._global_backward_hooks": "hooks on all modules",
    "torch.nn.modules.module._global_backward_pre_hooks": "hooks on all modules",
    "torch.nn.modules.module._global_forward_hooks": "hooks on all modules",
    "torch.nn.modules.module._global_forward_pre_hooks": "hooks on all modules",
    "torch.jit._state._python_cu": "whether anything is scripted",
    "torch.nn.utils.parametrize._cache": "parametrized weights inside parametrize.cached()",
    "torch.nn.utils.parametrize._cache_enabled": "whether parametrized weights are cached",
    "torch.ops.aten._to_copy.default": "memory budgets: casts",
    "torch.utils._python_dispatch.TorchDispatchMode": "memory budgets, refusing to draw, diagnostics",
    "torch.utils._python_dispatch._get_current_dispatch_mode": "modes that an interrupt has left behind",
    "torch.utils._python_dispatch._pop_mode": "the same",
    "torch.utils._python_dispatch._disable_current_modes": "work that no mode of the caller's may see",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "exact couplings refuse such tensors",
    "torch.utils._pytree.tree_flatten": "arguments of nn.checkpoint",
    "torch.utils._pytree.tree_leaves": "torch.compile: the shapes that a branch is given",
    "torch.utils._pytree.tree_unflatten": "arguments of nn.checkpoint",
}
OPTIONAL = {
    "torch._C._storage_Use_Count": "whether a gradient may be written over; without it, none is",
    "torch.Tensor._use_count": "the same",
    "torch._C._cuda_getCurrentRawStream": "the current stream, a microsecond sooner",
}


def private_names(path):
    """Dotted names of torch's in a file that have a private part, without those that are the beginning of another."""
    tree = ast.parse(path.read_text())
    known, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname or "torch": a.name if a.asname else "torch" for a in node.names if _is_torchs(a.name)}
        elif isinstance(node, ast.ImportFrom) and _is_torchs(node.module or ""):
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            known |= names
            found |= set(names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in known:
                found.add(".".join((known[first], *rest)))
    private = {name for name in found if any(part[0] == "_" != part[:2][-1] for part in name.split("."))}
    return {name for name in private if not any(other.startswith(f"{name}.") for other in private)}


def _is_torchs(module):
    return module.split(".")[0] == "torch"


def test_all_are_listed():
    found = set().union(*map(private_names, PACKAGE.rglob("*.py")))
    beginnings = {name for name in found if any(other.startswith(f"{name}.") for other in USED)}
    assert found - beginnings == set(USED)


@pytest.mark.parametrize("name", USED)
def test_torch_has_it(name):
    module, _, rest = name.rpartition(".")
    names = [rest]
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ImportError:
            module, _, rest = module.rpartition(".")
            names.insert(0, rest)
    for part in names:
        found = getattr(found, part)


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_names_are_looked_up(name):
    last = name.rpartition(".")[2]
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    assert any(f'"{last}", None' in source for source in sources)
    assert not any(f".{last}(" in source for source in sources)
