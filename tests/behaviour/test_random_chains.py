# SPDX-License-Identifier: Apache-2.0
"""Random chains against plain PyTorch: whatever was not thought of."""

import dataclasses
import functools
import math
import warnings

import pytest
from hypothesis import HealthCheck, given, seed, settings

from behaviour import test_the_tests as faults
from behaviour.common import TOLERANCE, WIDE, assert_same, torch
from behaviour.random_cases import SCENARIOS, cases
from behaviour.random_networks import networks_of
from behaviour.random_scenarios import algorithm_1, amplification, outcome_of
from revkernels.errors import ReconstructionError

#: A checkpoint's own recompute and a chain inside a branch are not what `algorithm_1` does.
SINGLE = {
    "dtypes": (torch.float32, torch.bfloat16),
    "scenarios": ["one step"],
    "without": ("checkpoint", "reentrant checkpoint", "chain"),
    "rank": 4,  # torch's backward of a bfloat16 Conv3d in channels_last_3d is wrong (2.13, CPU)
}
single, exact = cases(**SINGLE), cases(**SINGLE, simple=True)
any_depth = cases(depths=(0, 8)) | cases(**SINGLE, depths=(0, 8)) | exact


def check(case):
    """Run the case on both networks: the same outputs, gradients, buffers and generators come of it."""
    net, plain = networks_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outcome_of(net, case)
        rebuilt = case.dtype != WIDE and case.activations == "reconstruct"
        expected = (algorithm_1 if rebuilt else outcome_of)(plain, case)
        try:
            assert_same(got, expected, TOLERANCE)  # far below a rounding of single precision: to the bit
        except AssertionError:
            assert_same(got, expected, max(TOLERANCE, allowed(case)))


def allowed(case):
    """What roundings may make of the outcome, relative: 16 a half-step, multiplied by what the network amplifies them.

    In double precision they are those of the rebuilt streams. In the others `algorithm_1` rounds the same way: what
    remains is the order in which the gradients of what is shared are added, and the layout that a convolution computes
    in. (Autocast adds what it has cast.) What is amplified beyond bounds is compared for shape and dtype only.
    """
    mixed = case.autocast or case.has("autocast", "narrow")
    unit = torch.finfo(case.dtype if case.dtype == WIDE or not mixed else torch.bfloat16).eps / 2
    fused = case.norms() or case.has("basic", "bottleneck")  # which rounds otherwise than torch's norms
    if (
        case.dtype != WIDE
        and case.activations == "reconstruct"
        and case.backend == "cpu"
        and case.simple()
        and not fused
    ):
        return 0.0  # our own node adds two gradients; torch's engine adds them one by one as they come
    most = {WIDE: 1e-6}.get(case.dtype, math.inf)
    amplified = max(1.0, amplification(dataclasses.replace(case, dtype=WIDE)))
    return min(16 * unit * (1 + len(case.parts())) * amplified, most)


QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


def run(strategy, number, action):
    """Do ``action`` with the same ``number`` of cases every time."""
    seed(20261)(settings(max_examples=number, **QUIET)(given(strategy)(action)))()


#: 200 cases in all.
RUNS = {scenario: (cases(scenarios=[scenario]), 9) for scenario in SCENARIOS}
RUNS |= {"single precision": (single, 23), "single precision, to the bit": (exact, 200 - 23 - 9 * len(SCENARIOS))}


@pytest.mark.parametrize("name", RUNS)
def test_random_chains(name, compiled):
    """200 cases, always the same ones."""
    run(*RUNS[name], lambda case: check(case))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("compiled")
@settings(max_examples=5000, **QUIET)
@given(any_depth)
def test_many_random_chains(case):
    """Others every time."""
    check(case)


FAULTS = [
    faults.generator_not_restored,
    faults.statistics_not_protected,
    faults.autocast_dropped,
    faults.side_inputs_detached,
    faults.branches_swapped,
]


@functools.cache
def the_cases():
    """Those of `test_random_chains`."""
    found = []
    for strategy, number in RUNS.values():
        run(strategy, number, lambda case: found.append(case))  # a built-in has no code to be shown
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, compiled, monkeypatch):
    """By one of the 200 cases, which passes without it."""
    for case in the_cases():
        with monkeypatch.context() as plant:
            fault(plant)
            try:
                check(case)
            except (AssertionError, ReconstructionError):
                break
    else:
        raise AssertionError("none of the cases finds it")
    check(case)
