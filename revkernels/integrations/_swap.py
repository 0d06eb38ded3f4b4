# SPDX-License-Identifier: Apache-2.0
"""Swaps the class of modules, and reports it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from revkernels import backends
from revkernels.integrations import MissingPackageError
from revkernels.nn.streams import ACTIVATIONS

_classes: dict[tuple[type, type], type] = {}


class Swapped(nn.Module):
    """Base of all classes that modules are swapped to: ``type(module)`` is a subclass of one of these and of
    ``original``, the class it had, of which it is still an instance.

    Attributes:
        original: the class that the module had.
        way: the subclass of this one that it was swapped to.
    """

    original: ClassVar[Any]
    way: ClassVar[Any]
    revkernels_options: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A dynamically made class is not found by name: copies and pickles make it anew."""
        made: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, (_, *rest), *state = made
        return _new, (self.way, self.original, *rest), *state


def swap(module: nn.Module, way: type, **options: Any) -> None:
    """Put ``way`` in front of the module's class. ``options`` become its ``revkernels_options``."""
    module.__class__ = _class_of(way, type(module))
    module.__dict__["revkernels_options"] = options


def _class_of(way: type, original: type) -> type:
    found = _classes.get((way, original))
    if found is None:
        names = {"original": original, "way": way, "__doc__": way.__doc__, "__module__": way.__module__}
        found = _classes[way, original] = type(f"revkernels_{original.__name__}", (way, original), names)
    return found


def _new(way: type, original: type, *args: Any) -> Any:
    cls = _class_of(way, original)
    return cls.__new__(cls, *args)


def restore(model: Any) -> list[str]:
    """See `revkernels.integrations.restore`."""
    check(model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Swapped)]
    if not found:
        raise ValueError("no module of model was changed by revkernels.integrations: there is nothing to restore")
    for name, module in found:
        if type(module) is not _class_of(module.way, module.original):
            raise ValueError(
                f"{name or 'model'} has become a {type(module).__name__} since it was changed: that has to be undone "
                f"first"
            )
    for _, module in found:
        module.__class__ = module.original
        del module.__dict__["revkernels_options"]
    return [name for name, _ in found]


@dataclass
class Replaced:
    """What was changed in a model; prints as a report.

    Attributes:
        package: the package that the model is built with, and its version.
        modules: maps names (as in ``named_modules``) of the changed modules to what they are now.
        left: maps names of similar modules that were not changed to the reason.
        notes: further remarks.
        model: the model.
    """

    package: str
    modules: dict[str, str]
    left: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    model: Any = field(default=None, repr=False)

    def restore(self) -> list[str]:
        """Undo the change in the model: see `revkernels.integrations.restore`."""
        return restore(self.model)

    def __str__(self) -> str:
        lines = [f"{self.package}: {len(self.modules)} modules changed, {len(self.left)} left"]
        for mark, named in (("+", self.modules), ("-", self.left)):
            lines += [f"  {mark} {', '.join(names)}: {text}" for text, names in _by_text(named).items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _by_text(named: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, text in named.items():
        found.setdefault(text, []).append(name or "model")
    return {text: names if len(names) <= 4 else [*names[:2], "...", names[-1]] for text, names in found.items()}


#: Inspects a module: (the way to swap it, a description), or (None, why not), or None if it is irrelevant.
Look = Callable[[nn.Module], tuple[type | None, str] | None]


def replace(
    model: Any, package: str, look: Look, wanted: str, needed: type, options: Any, notes: Iterable[str] = ()
) -> Replaced:
    """Swap every module of ``model`` for which ``look`` finds a way, and report it.

    Args:
        wanted: a description of what is looked for; ``needed`` is its way: if no module has it, nothing is changed.
        options: see `check`.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: an option does not exist; nothing was found.
    """
    check(model, **options)
    modules, left, ways = {}, {}, []
    for name, module in model.named_modules():
        found = (None, "changed before") if isinstance(module, Swapped) else look(module)
        if found is None:
            continue
        way, text = found
        if way is None:
            left[name] = text
        else:
            modules[name] = text
            ways.append((module, way))
    if all(way is not needed for _, way in ways):
        raise nothing_found(model, wanted, left)
    for module, way in ways:
        swap(module, way, **options)
    return Replaced(package_and_version(package), modules, left, tuple(notes), model)


def nothing_found(model: nn.Module, wanted: str, left: Mapping[str, str]) -> ValueError:
    """The error for a model that contains nothing to change."""
    reasons = "; ".join(f"{', '.join(names)}: {text}" for text, names in _by_text(left).items())
    return ValueError(
        f"nothing to change in this {type(model).__name__}: {wanted} is looked for"
        + (f", and none of those found will do ({reasons})" if left else ", and there is none")
    )


def package_and_version(package: str) -> str:
    """Such as "timm 1.0.31"."""
    return f"{package} {importlib.metadata.version(package)}"


def check(model: Any, activations: Any = "reconstruct", backend: Any = None) -> None:
    """Check that ``model`` is an nn.Module and the options are possible for modules called one by one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be an nn.Module")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}; it must be {' or '.join(map(repr, ACTIVATIONS))}")
    if backend is not None:
        backends.require(backend)


def needs(module: str, package: str) -> Any:
    """Import ``module``, of the ``package`` on PyPI, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # a dependency of the package
        raise MissingPackageError(
            f"this needs the package {package}, which is not installed: pip install {package}"
        ) from error


def own(module: nn.Module, base: type, *methods: str) -> str:
    """Return which of the methods, all of which would be bypassed, differs from ``base``'s; "" if none does.

    This includes a method set on the module itself, such as accelerate's hooks.
    """
    for name in methods:
        if name in module.__dict__:
            return f"this {base.__name__} was given a {name} of its own"
        if getattr(type(module), name) is not getattr(base, name):
            return f"{type(module).__name__} has a {name} of its own"
    return ""
