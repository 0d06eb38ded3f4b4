# SPDX-License-Identifier: Apache-2.0
"""What a call that the model does not refuse leaves in the arena, by `revkernels.reference`.

Couplings and accumulation are compared bit for bit. Norms too, given the statistics and sums that the call itself left,
where no function is approximated; the rest within a coarse bound (`abi.norm_oracle`).
"""

import ml_dtypes
import numpy as np
from native_oracle import assert_same_bits

from abi import model, norm_oracle, structs
from revkernels import reference

NUMPY = {name: np.dtype(name) for name in ("float64", "float32", "float16", "int16")}
NUMPY["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


def stored(content, array):
    """The elements of an array, in its shape and dtype."""
    if array.empty:  # its other sizes may be beyond NumPy
        return np.zeros(0, NUMPY[array.dtype])
    raw = np.frombuffer(content, np.uint8)[array.starts()[..., None] + np.arange(array.item)]
    return raw.view(NUMPY[array.dtype])[..., 0]


class Outcome:
    """The arena before and after a call, and which bytes of it have been accounted for."""

    def __init__(self, before, after):
        self.before, self.after, self.known = before, after, np.zeros(len(before), bool)

    def was(self, array):
        with np.errstate(invalid="ignore"):
            return stored(self.before, array).astype(np.float64)

    def now(self, array):
        with np.errstate(invalid="ignore"):
            return stored(self.after, array).astype(np.float64)

    def equals(self, array, expected):
        """An array holds these float64 values, every bit of them."""
        self.known |= array.mask()
        if array.empty:
            return
        assert_same_bits(self.now(array), np.broadcast_to(np.asarray(expected, np.float64), array.sizes))

    def near(self, array, expected, bound):
        """An array is within a bound of these values; of what is not finite, or not bounded, nothing is said."""
        self.known |= array.mask()
        if array.empty:
            return
        expected, bound = (np.broadcast_to(v, array.sizes).astype(np.float64) for v in (expected, bound))
        clear = np.isfinite(expected) & np.isfinite(bound)
        found = self.now(array)[clear]
        wrong = ~(np.abs(found - expected[clear]) <= bound[clear])
        first = [values[wrong][:1].tolist() for values in (found, expected[clear], bound[clear])]
        assert not wrong.any(), f"{array.name}: {wrong.sum()} are wrong, (found, expected, bound) is {first}"

    def finish(self):
        before, after = (np.frombuffer(content, np.uint8) for content in (self.before, self.after))
        touched = np.flatnonzero((before != after) & ~self.known)
        assert touched.size == 0, f"bytes that the call has nothing to do with are written, the first at {touched[0]}"


def check(entry, facts, before, after):
    """Hold what a call has left in the arena against the reference."""
    outcome = Outcome(before, after)
    if entry in ("revk_couple", "revk_uncouple"):
        _check_coupled(facts, outcome)
    elif entry == "revk_reverse_step":
        _check_coupled(facts, outcome)
        _check_accumulated([facts.dy], [facts.df], outcome)
    elif entry == "revk_accumulate":
        _check_accumulated(facts.totals, facts.parts, outcome)
    elif entry == "revk_norm_act":
        norm_oracle.check_forward(facts, outcome, outcome.was(facts.s))
    elif entry in ("revk_couple_norm_act", "revk_uncouple_norm_act"):
        _check_coupled(facts, outcome)
        norm_oracle.check_forward(facts, outcome, outcome.now(facts.s))
    elif entry == "revk_norm_act_backward":
        norm_oracle.check_backward(facts, outcome)
    else:
        silent = ("revk_norm_workspace", "revk_synchronize")  # which write nothing
        assert entry in silent, f"no oracle for {entry}: add it to tests/abi/oracle.py"
    outcome.finish()


def _options(coupling, outcome):
    """A coupling's fields as the reference takes them."""
    if coupling is None:
        return {}
    options = {"channel_dim": 1}
    if coupling["grid_exponent"] != structs.NO_GRID:
        options["grid_exponent"] = coupling["grid_exponent"]
    if coupling["channel_scale"] is not None:
        options["channel_scale"] = outcome.was(coupling["channel_scale"])
    if coupling["sample_scale"] is not None:
        scale = outcome.was(coupling["sample_scale"])
        options["sample_scale"] = np.repeat(scale, max(coupling["rows_per_sample"], 1))
    return options


def _check_coupled(facts, outcome):
    """out = x + f or x - f, and what the coupling reports of it."""
    out, x, f, coupling = facts.out, facts.x, facts.f, facts.coupling
    if out.empty:  # of nothing, nothing is reported
        return
    operation = reference.uncouple if facts.subtract else reference.couple
    options = _options(coupling, outcome)
    if out.dtype == "int16":
        result = operation(outcome.was(x), outcome.was(f), "int16", f.dtype, **options)
    else:
        wide = model.wide_of(x, f)
        result = reference.round_to(operation(outcome.was(x), outcome.was(f), wide, wide, **options), out.dtype)
    outcome.equals(out, result)
    if coupling is None:
        return
    if coupling["value"] is not None:
        value = coupling["value"]
        outcome.equals(value, reference.value_of(result, coupling["grid_exponent"], value.dtype))
    if coupling["checksum"] is not None:
        outcome.known |= coupling["checksum"].mask()
        at = coupling["checksum"].pointer // 8
        start, found = (int(np.frombuffer(content, np.uint64)[at]) for content in (outcome.before, outcome.after))
        bits = stored(outcome.after, out).view(f"u{out.item}").ravel()
        assert found == (start + sum(int(b) * (2 * i + 1) for i, b in enumerate(bits))) % 2**64, "checksum"
    if coupling["amax"] is not None:
        start = outcome.was(coupling["amax"])[0]
        with np.errstate(over="ignore"):
            seen = reference.amax_of(result)
        if out.dtype == "int16":
            seen = reference.amax_before_wrapping(outcome.was(x), outcome.was(f), facts.subtract, f.dtype, **options)
        outcome.equals(coupling["amax"], np.nan if np.isnan([start, seen]).any() else max(start, seen))


def _check_accumulated(totals, parts, outcome):
    for total, part in zip(totals, parts, strict=True):
        if not total.empty:
            sums = reference.accumulate(outcome.was(total), outcome.was(part), total.dtype, part.dtype)
            outcome.equals(total, sums)
