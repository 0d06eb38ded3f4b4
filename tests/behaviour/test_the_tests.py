# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the driver, one at a time: the check that should find each of them does.

Most are what other libraries get wrong today.
"""

import contextlib
import functools
import inspect

import pytest

from behaviour.common import KINDS, assert_raises, check_step, tensors_in, torch
from behaviour.test_arguments import check_arguments, check_auxiliary_outputs
from behaviour.test_branches import check_spectral_norm
from behaviour.test_costs import Counting, check_calls, check_memory_is_flat
from behaviour.test_depths import check_input_is_not_written_to, check_pair_is_not_copied
from behaviour.test_failures import check_change_is_found
from behaviour.test_gradients import check_second_order
from behaviour.test_hooks import check_forward_hooks, check_stashed_gradients, check_stashed_streams
from behaviour.test_modes import check_functional_call, check_inverse, check_without_gradients
from behaviour.test_norms import check_statistics
from behaviour.test_precision import bf16, check_autocast
from behaviour.test_random_numbers import check_dropout, check_two_forwards
from revkernels.autograd import (
    accumulate,
    coupling,
    driver_backward,
    driver_forward,
    inverse,
    norm_act,
    recomputing,
    step_record,
)
from revkernels.autograd.fused import fusion
from revkernels.autograd.state import rng_and_autocast, snapshot
from revkernels.errors import ReconstructionError
from revkernels.nn import chain, reversible

RECONSTRUCT = {"backend": "cpu", "activations": "reconstruct"}
ROWS = {}  # what is planted -> (plant, check)


def found_by(check):
    """Register a fault with the check that finds it, a function of the kind of branches or of nothing."""

    def register(plant):
        ROWS[f"{check.__name__}: {plant.__name__}"] = plant, check
        return plant

    return register


def row_1(kind):
    check_step(*kind.twins(2, **RECONSTRUCT), kind.x())


def row_1_norms():
    check_step(*KINDS["basic"].twins(2, **RECONSTRUCT), KINDS["basic"].x())


def row_2():
    check_memory_is_flat("cpu", depths=(4, 8))


def row_3(kind):
    check_calls(kind.within(Counting).twins(3, backend="cpu")[0], kind.x(), recomputes=1)


def row_4(kind):
    check_statistics(kind, **RECONSTRUCT)


def row_6(kind):
    check_dropout(kind, **RECONSTRUCT, p=0.5)


def row_7(kind):
    check_two_forwards(kind, **RECONSTRUCT)


def row_8(kind):
    check_autocast(kind, bf16, contextlib.nullcontext, **RECONSTRUCT)


def row_15(kind):
    check_second_order(kind, **RECONSTRUCT)


def row_16(kind):
    check_without_gradients(kind, torch.no_grad, True, True, **RECONSTRUCT)


def row_17(kind):
    check_input_is_not_written_to(kind, **RECONSTRUCT)


def row_20(kind):
    check_arguments(kind, **RECONSTRUCT)


def row_21(kind):
    check_auxiliary_outputs(kind, False, True, **RECONSTRUCT)


def row_22(kind):
    check_forward_hooks(kind, **RECONSTRUCT)


def row_22_streams(kind):
    check_stashed_streams(kind.twins(4, **RECONSTRUCT)[0], kind.pair())


def row_22_gradients(kind):
    check_stashed_gradients(kind.twins(4, **RECONSTRUCT)[0], kind.x())


def row_22_norms():
    check_stashed_gradients(KINDS["basic"].twins(4, **RECONSTRUCT)[0], KINDS["basic"].x(), of=lambda branch: branch[-1])


def row_26(kind):
    check_functional_call(kind, **RECONSTRUCT)


def row_28(kind):
    check_inverse(kind, torch.no_grad, True, **RECONSTRUCT)


def row_33_parameters():
    check_change_is_found("parameter", **RECONSTRUCT)


def row_33_side_inputs():
    check_change_is_found("side input", **RECONSTRUCT)


def row_34(kind):
    check_spectral_norm(kind, **RECONSTRUCT)


def row_36():
    check_pair_is_not_copied(**RECONSTRUCT)


@found_by(row_1)
def branches_swapped(plant):
    """As with stored activations in neither order: F is run where G should be."""
    branches = reversible.ReversibleBlock.branches
    plant.setattr(reversible.ReversibleBlock, "branches", property(lambda self: branches.fget(self)[::-1]))


@found_by(row_1)
def nothing_rebuilt(plant):
    """The recompute reads the outputs."""
    plant.setattr(
        driver_forward.Reversal,
        "_read",
        lambda self, sources: self._split(*self._kept.grad_fn.saved_tensors)[sources[0]],
    )


@found_by(row_2)
def frames_kept(plant):
    rebuild = driver_forward.Reversal._rebuild
    kept = []

    def hoarding(self, k):
        kept.append(self._frame)
        rebuild(self, k)

    plant.setattr(driver_forward.Reversal, "_rebuild", hoarding)


@found_by(row_3)
def recomputed_twice(plant):
    rebuild = driver_forward.Reversal._rebuild

    def twice(self, k):
        step = self._steps[k]
        with contextlib.ExitStack() as stack:
            stack.callback(recomputing.set_recomputing, False)
            recomputing.set_recomputing(True)
            self._call(step.half_step, self._read(step.half_step.sources))
        rebuild(self, k)

    plant.setattr(driver_forward.Reversal, "_rebuild", twice)


@found_by(row_4)
def statistics_not_protected(plant):
    """Updated by the recompute too, where it runs the norm as a layer."""
    plant.setattr(snapshot.Snapshot, "_take_buffers", lambda self, module, hidden: None)
    plant.setattr(fusion, "kernels_for", lambda x: None)


@found_by(row_4)
def batch_counted_again(plant):
    """A fused norm computes its statistics in the recompute too."""
    tape = step_record.RecordedStep.tape
    plant.setattr(step_record.RecordedStep, "tape", lambda self, replaying: tape(self, False))


@found_by(row_4)
def batch_not_counted(plant):
    plant.setattr(fusion, "_count", lambda layer, batches: layer.momentum or 0.0)


@found_by(row_1_norms)
def norm_gradient_not_accumulated(plant):
    """A stream's gradient is what came through the branch alone."""
    gradients = norm_act._gradients
    plant.setattr(norm_act, "_gradients", lambda ctx, ds, dh, *into: gradients(ctx, None, dh))


@found_by(row_22_norms)
def norm_gradient_always_accumulated(plant):
    """In place, into a gradient that somebody holds."""
    plant.setattr(norm_act, "owned", lambda gradient: True)


@found_by(row_6)
def generator_not_restored(plant):
    plant.setattr(driver_forward, "drawn", lambda before, after, plain: [])


@found_by(row_6)
def generator_left_where_the_recompute_put_it(plant):
    def restore(self, drawn, undo):
        for generator, state, _ in drawn:
            if state is not None:
                generator.set_state(state)

    plant.setattr(rng_and_autocast.Surroundings, "restore", restore)


@found_by(row_7)
def generator_of_the_latest_forward(plant):
    """The state is kept at the block, where the next forward overwrites it."""
    record, rebuild = driver_forward.Reversal._record, driver_forward.Reversal._rebuild
    latest = {}

    def recording(self, *args):
        f = record(self, *args)
        latest[len(self._steps) - 1] = self._steps[-1].drawn
        return f

    def watching(self, k):
        self._steps[k].drawn = latest[k]
        rebuild(self, k)

    plant.setattr(driver_forward.Reversal, "_record", recording)
    plant.setattr(driver_forward.Reversal, "_rebuild", watching)


@found_by(row_8)
def autocast_dropped(plant):
    init = rng_and_autocast.Surroundings.__init__

    def forgetful(self, *args):
        init(self, *args)
        self.autocast = []

    plant.setattr(rng_and_autocast.Surroundings, "__init__", forgetful)


@found_by(row_15)
def gradients_added_without_a_graph(plant):
    gather = coupling.gather

    def detached(ds, dh, kernels):
        total = gather(ds, dh, kernels)
        return None if total is None else total.detach()

    plant.setattr(coupling, "gather", detached)


@found_by(row_16)
@found_by(row_17)
def input_written_to(plant):
    """The coupling in place, as in the formula."""

    def in_place(ctx, a, f, kernels, coupling):
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        s = a.detach()
        kernels.couple(s, s, f, None)
        return s, s.detach()

    plant.setattr(coupling.Couple, "forward", staticmethod(in_place))
    plant.setattr(driver_forward, "entry_of", lambda step, kernels: None)


@found_by(row_20)
def side_inputs_detached(plant):
    """Their gradients are lost, as in an autograd.Function that does not take them."""
    half_step = reversible.HalfStep

    def detached(branch, target, sources, args, kwargs):
        kwargs = {name: value.detach() if torch.is_tensor(value) else value for name, value in kwargs.items()}
        return half_step(branch, target, sources, args, kwargs)

    plant.setattr(reversible, "HalfStep", detached)


@found_by(row_21)
def auxiliary_outputs_detached(plant):
    check = driver_forward.check_aux

    def detached(*args):
        f, aux = check(*args)
        return f, tensors_in(aux)[0].detach()

    plant.setattr(driver_forward, "check_aux", detached)


@found_by(row_22)
def forward_called_instead_of_the_module(plant):
    """Hooks of F and G never fire."""
    half_step = reversible.HalfStep
    plant.setattr(reversible, "HalfStep", lambda branch, *rest: half_step(branch.forward, *rest))


@found_by(row_22)
def recompute_not_told_apart(plant):
    plant.setattr(recomputing, "_local", type("Forgetful", (), {"__setattr__": lambda *_: None})())


@found_by(row_22_streams)
def streams_always_free(plant):
    plant.setattr(driver_backward, "memory_is_free", lambda tensor: True)


@found_by(row_22_gradients)
def gradients_always_free(plant):
    plant.setattr(accumulate, "_is_free", lambda gradient, free: True)


@found_by(row_26)
def parameters_of_today(plant):
    """The recompute uses what hangs at the module now, not what the forward used."""
    restore = snapshot.Snapshot.restore

    def forgetful(self, undo, is_same):
        self.constant = self.fixed = []
        restore(self, undo, is_same)

    plant.setattr(snapshot.Snapshot, "restore", forgetful)


@found_by(row_28)
def inverse_counts_the_batch(plant):
    class Nothing(snapshot.Snapshot):
        def restore(self, undo):
            pass

    plant.setattr(inverse, "Snapshot", Nothing)


@found_by(row_33_parameters)
@found_by(row_33_side_inputs)
def versions_not_checked(plant):
    plant.setattr(snapshot.Snapshot, "problem", lambda self: None)
    plant.setattr(rng_and_autocast.Surroundings, "problem", lambda self: None)


@found_by(row_34)
def written_buffers_not_rewound(plant):
    complete = snapshot.Snapshot.complete

    def forgetful(self, counted=()):
        complete(self, counted)
        self.rewound = []

    plant.setattr(snapshot.Snapshot, "complete", forgetful)


@found_by(row_36)
def pair_copied(plant):
    plant.setattr(chain, "dense", lambda stream: stream.clone())


@pytest.mark.parametrize("fault", ROWS)
def test_a_planted_fault_is_found(fault, compiled, monkeypatch):
    """The check passes without the fault and fails with it: by itself, or because the driver notices."""
    plant, check = ROWS[fault]
    kinds = [KINDS["mlp"], KINDS["basic"]] if inspect.signature(check).parameters else []
    for given in [(kind,) for kind in kinds] or [()]:
        check(*given)
        with monkeypatch.context() as patches:
            plant(patches)
            assert_raises((AssertionError, ReconstructionError), [], functools.partial(check, *given))
        check(*given)
