# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the driver, one at a time: the check that should find each of them does."""

import contextlib

import pytest

from behaviour.common import assert_raises, mlp, pairs_of, rows, twins
from behaviour.test_costs import Counting, check_calls, check_memory_is_flat, slim_branch
from behaviour.test_failures import check_change_is_found
from behaviour.test_hooks import check_stashed_gradients, check_stashed_streams
from behaviour.test_norms import check_statistics
from behaviour.test_precision import bf16, check_autocast
from behaviour.test_random_numbers import check_dropout
from revkernels.autograd import accumulate, reversal, snapshot, surroundings
from revkernels.errors import ReconstructionError

RECONSTRUCT = {"backend": "cpu", "activations": "reconstruct"}


def generator_not_restored(plant):
    plant.setattr(reversal, "drawn", lambda before, after: [])


def statistics_not_protected(plant):
    plant.setattr(snapshot.Snapshot, "_take_buffers", lambda self, module: None)


def autocast_dropped(plant):
    init = surroundings.Surroundings.__init__

    def forgetful(self, *args):
        init(self, *args)
        self.autocast = []

    plant.setattr(surroundings.Surroundings, "__init__", forgetful)


def frames_kept(plant):
    rebuild = reversal.Reversal._rebuild
    kept = []

    def hoarding(self, k):
        kept.append(self._frame)
        rebuild(self, k)

    plant.setattr(reversal.Reversal, "_rebuild", hoarding)


def versions_not_checked(plant):
    plant.setattr(snapshot.Snapshot, "problem", lambda self: None)
    plant.setattr(surroundings.Surroundings, "problem", lambda self: None)


def streams_always_free(plant):
    plant.setattr(reversal, "memory_is_free", lambda tensor: True)


def gradients_always_free(plant):
    plant.setattr(accumulate, "_is_free", lambda gradient: True)


def recomputed_twice(plant):
    rebuild = reversal.Reversal._rebuild

    def twice(self, k):
        step = self._steps[k]
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, reversal._local, "recomputing", False)
            reversal._local.recomputing = True
            step.branch(self._rebuilt[0].detach(), *step.args, **step.kwargs)
        rebuild(self, k)

    plant.setattr(reversal.Reversal, "_rebuild", twice)


def check_side_input():
    check_change_is_found("side input", **RECONSTRUCT)


def check_parameter():
    check_change_is_found("parameter", **RECONSTRUCT)


def check_one_extra_forward():
    net, _ = twins(pairs_of(lambda: Counting(slim_branch()), 3), backend="cpu")
    check_calls(net, rows(3, 128), recomputes=1)


FOUND_BY = {
    "row 6: generator not restored": (generator_not_restored, lambda: check_dropout(**RECONSTRUCT, p=0.5)),
    "row 4: statistics not protected": (statistics_not_protected, lambda: check_statistics(**RECONSTRUCT)),
    "row 8: autocast dropped": (autocast_dropped, lambda: check_autocast(bf16, contextlib.nullcontext, **RECONSTRUCT)),
    "row 2: frames kept": (frames_kept, lambda: check_memory_is_flat("cpu", depths=(4, 8))),
    "row 33: parameters not checked": (versions_not_checked, check_parameter),
    "row 33: side inputs not checked": (versions_not_checked, check_side_input),
    "row 22: streams always free": (streams_always_free, lambda: check_stashed_streams(four_blocks())),
    "row 22: gradients always free": (gradients_always_free, lambda: check_stashed_gradients(four_blocks())),
    "row 3: recomputed twice": (recomputed_twice, check_one_extra_forward),
}


def four_blocks():
    return twins(pairs_of(mlp, 4), **RECONSTRUCT)[0]


@pytest.mark.parametrize("fault", FOUND_BY)
def test_a_planted_fault_is_found(fault, compiled, monkeypatch):
    """The check passes without the fault and fails with it: by itself, or because the driver notices."""
    plant, check = FOUND_BY[fault]
    check()
    with monkeypatch.context() as patches:
        plant(patches)
        assert_raises((AssertionError, ReconstructionError), [], check)
    check()
