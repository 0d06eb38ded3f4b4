# SPDX-License-Identifier: Apache-2.0
"""Functions that run in every process of a group at once, by name."""

import inspect
import itertools
from collections.abc import Callable

BACKENDS = ("eager", "cpu")
ACTIVATIONS = ("reconstruct", "store")


class Cases(dict[str, Callable]):
    """What a test file wants run in a process group: name -> function without arguments."""

    def over(self, **axes):
        """Add the decorated function once for each combination of the arguments, under a name that tells them."""

        def add(function):
            for values in itertools.product(*axes.values()):
                chosen = dict(zip(axes, values, strict=True))
                name = "-".join([function.__name__, *map(str, values)])
                self[name] = _Case(function, chosen)
            return function

        return add

    def add(self, function):
        """Add the decorated function as one case."""
        return self.over()(function)


class _Case:
    def __init__(self, function, chosen):
        self.function, self.chosen = function, chosen

    def __call__(self):
        wanted = inspect.signature(self.function).parameters
        if "options" in wanted:  # backend and activations are for `ReversibleSequential`, most of the time
            options = {name: self.chosen[name] for name in ("backend", "activations") if name in self.chosen}
            return self.function(options=options, **{k: v for k, v in self.chosen.items() if k not in options})
        return self.function(**self.chosen)

    @property
    def backend(self):
        """The backend that this case cannot do without."""
        return self.chosen.get("backend", "eager")
