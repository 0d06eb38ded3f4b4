# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in the CUDA kernels' source, one each, and the test on the host that must notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One change to the kernels' source, what to compile with it, and the test that must notice."""

    name: str
    file: str
    old: str
    new: str
    part: str
    tests: tuple[str, ...]

    def plant(self, csrc):
        path = csrc / "cuda" / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.name}: {self.old!r} is in {self.file} {text.count(self.old)} times"
        path.write_text(text.replace(self.old, self.new))


MIXED = "couple, float32 += bfloat16"
INT16 = "coupling_int16", ("couple, int16 += float32",)
FORWARD = "norm_act", ("norm_act, briefly",)
BACKWARD = "norm_act_backward", ("norm_act_backward, briefly",)
FAR_MEAN = "norm_act", ("norm_act, mean 1e4",)
NORM_FAULTS = [
    Fault("norm: misaligned words", "norm_act_plan.cuh", "(across == 1 || whole(", "(true || whole(", *FORWARD),
    Fault("norm: rows, their statistics apart", "norm_act.cu", "    lay_along(call.norm);\n", "", *FORWARD),
    Fault("norm: rows, their gradients apart", "norm_act_backward.cu", "    lay_along(call.norm);\n", "", *BACKWARD),
    Fault("norm: lines at any distance", "norm_act_plan.cuh", "outer == line * inner", "true", *FORWARD),
    Fault(
        "norm: units lost",
        "norm_act_plan.cuh",
        "divided_up(plan.units, plan.lanes",
        "(plan.units / plan.lanes",
        *FORWARD,
    ),
    Fault("norm: one line of a slice", "norm_act_units.cuh", "at[k] += fields[k]->wrap;", "at[k] += 0;", *BACKWARD),
    Fault(
        "norm: loads over what is in use",
        "norm_act_units.cuh",
        "% kStages, last}",
        "% kStages, now + 0 * last}",
        *FORWARD,
    ),
    Fault(
        "norm: a stage not waited for",
        "norm_act_units.cuh",
        "wait_for_copies<kStages - 1>();",
        "wait_for_copies<kStages>();",
        *FORWARD,
    ),
    Fault(
        "norm: stages not told apart", "norm_act_units.cuh", "    close_copies();\n    ahead.", "    ahead.", *BACKWARD
    ),
    Fault(
        "norm: a position not waited for",
        "norm_act_teams.cuh",
        "wait_for_copies<0>();\n    for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {\n"
        "      if constexpr (kChunks == 0) {\n        read(",
        "for_each_chunk<kSize, kChunks>(plan, turn, [&](int j, int64_t c) {\n"
        "      if constexpr (kChunks == 0) {\n        read(",
        *BACKWARD,
    ),
    Fault(
        "norm: another position under way",
        "norm_act_teams.cuh",
        "turn = Turn::of(plan, round + gridDim.x);\n    start(turn);\n    if (rms) {",
        "turn = Turn::of(plan, round + 1);\n    start(turn);\n    if (rms) {",
        *FORWARD,
    ),
    Fault(
        "norm: statistics of the position before",
        "norm_act_teams.cuh",
        "next_rstd = scaling.rstd[at];",
        "next_rstd = next_rstd > 0 ? next_rstd : scaling.rstd[at];",
        *BACKWARD,
    ),
    Fault(
        "norm: a slice past the last",
        "norm_act_units.cuh",
        "gridDim.x - 1 - blockIdx.x",
        "(gridDim.x - blockIdx.x) % gridDim.x / 2",
        *FORWARD,
    ),
    Fault(
        "norm: packets kept twice", "norm_act_team_walk.cuh", "body(j, first + j * span);", "body(j, first);", *FORWARD
    ),
    Fault(
        "norm: packets stored in the first one's place",
        "norm_act_team_walk.cuh",
        "int32_t(field.inner) + c * size;",
        "int32_t(field.inner) + plan.lanes.x() * kSize * size;",
        "norm_act",
        ("norm_act, one line",),
    ),
    Fault(
        "norm: sums of the first packet alone",
        "norm_act_teams.cuh",
        "(plan.lanes.x() + j * plan.lanes.xs()) * kSize",
        "plan.lanes.x() * kSize",
        "norm_act_backward",
        ("norm_act_backward",),  # the brief one has no such sums
    ),
    Fault(
        "norm: no barrier in sums",
        "norm_act_sums.cuh",
        "-= log_fold;\n    __syncthreads();",
        "-= log_fold;",
        *FORWARD,
    ),
    Fault("norm: sums past the lanes", "norm_act_sums.cuh", "m < 1 << log_fold", "m <= 1 << log_fold", *BACKWARD),
    Fault("norm: no shift", "norm_act_slices.cuh", "lanes.rows ? value[e] : value[0];", "A(0);", *FAR_MEAN),
    Fault(
        "norm: each lane's own origin",
        "norm_act_slices.cuh",
        "shared.sums[e][lanes.x() * lanes.x_stride()]",
        "0",
        *FAR_MEAN,
    ),
    Fault("norm: slices of one weight", "norm_act_finish.cuh", "count * away * away", "away * away", *FORWARD),
    Fault("norm: biased running variance", "norm_act_finish.cuh", "to.count - 1.0 :", "to.count :", *FORWARD),
    Fault("norm: means without weight", "norm_act_finish.cuh", "by * sums[1]", "sums[1]", *BACKWARD),
    Fault("norm: one channel's weight", "norm_act_element.cuh", "[rows ? c + e : c]", "[c]", *FORWARD),
    Fault("norm: one element's statistics", "norm_act_element.cuh", "shared || e == 0", "true", *FORWARD),
    Fault(
        "norm: h from what was not stored",
        "norm_act_packet.cuh",
        "widen_pair(word[0].part[p], values[2 * p], values[2 * p + 1], T{});",
        "",
        *FORWARD,
    ),
    Fault("norm: sums of other teams", "norm_act_team_walk.cuh", "away = near / 2;", "away = kWarp / 2;", *FORWARD),
    Fault(
        "norm: sums not yet read",
        "norm_act_team_walk.cuh",
        "  __syncthreads();  // all threads have read the last sum",
        "  // all threads have read the last sum",
        *BACKWARD,
    ),
    Fault(
        "norm: means over partial sums",
        "norm_act_backward.cu",
        "partial_ + partial_count(",
        "partial_ + 0 * (",
        *BACKWARD,
    ),
    Fault(
        "norm: own count for given sums",
        "norm_act_backward.cu",
        "call_.gradient.count",
        "extent_.positions()",
        *BACKWARD,
    ),
]
FAULTS = [
    Fault("tail not stored", "packet.cuh", "if (e < count) to[e]", "if (false) to[e]", "coupling", (MIXED,)),
    Fault("tail stored whole", "packet.cuh", "if (e < count) to[e]", "to[e]", "coupling", (MIXED,)),
    Fault(
        "misaligned words",
        "layout.cuh",
        "!whole(operand.plane * size) || !whole(operand.row * size)",
        "false",
        "coupling",
        (MIXED,),
    ),
    Fault("plane stride for rows", "layout.cuh", "row * operand.row", "row * operand.plane", "coupling", (MIXED,)),
    Fault(
        "32-bit offsets",
        "layout.cuh",
        "return plane * operand.plane",
        "return int32_t(operand.row) * row + plane",
        "coupling",
        ("far apart",),
    ),
    Fault("loop too far", "launch.cuh", "item += span", "item += 2 * span", "coupling", ("many blocks",)),
    Fault("one block's loop", "launch.cuh", "int64_t(gridDim.x) * kThreads", "kThreads", "coupling", ("many blocks",)),
    Fault("checksum without position", "extras.cuh", "uint64_t(index_++)", "uint64_t(index_)", "coupling", (MIXED,)),
    Fault("no second channel", "extras.cuh", "channel_ = 0;\n", "channel_ = 1;\n", "coupling", (MIXED,)),
    Fault("no barrier", "reduce.cuh", "__syncthreads();", "", "launch_test", ("reductions",)),
    Fault("half a warp", "reduce.cuh", "away = kWarp / 2", "away = kWarp / 4", "launch_test", ("reductions",)),
    Fault("divider off by one", "divider.cuh", "uint64_t(by)) + 1;", "uint64_t(by));", "launch_test", ("divider",)),
    Fault("merges too much", "layout.cuh", "follows = follows &&", "follows = true ||", "launch_test", ("merging",)),
    Fault(
        "wrong array of a list",
        "accumulate.cu",
        "first_chunk[middle] <= chunk",
        "first_chunk[middle] < chunk",
        "accumulate",
        ("accumulate, long lists",),
    ),
    Fault(
        "lists of one launch",
        "accumulate.cu",
        "from += kShares",
        "from += flat.size()",
        "accumulate",
        ("accumulate, long lists",),
    ),
    Fault("int16: one sign", "coupling_int16.cu", "subtract ? -extras", "false ? -extras", *INT16),
    Fault("int16: amax of what wrapped", "coupling_int16.cu", "fixed.unwrapped(q, n)", "A(stored)", *INT16),
    Fault(
        "int16: value in the result's place",
        "coupling_int16.cu",
        "spot.offset(value), stream",
        "spot.offset(out), stream",
        *INT16,
    ),
    Fault(
        "int16: every element has a value",
        "coupling_int16.cu",
        "value.store(to, count)",
        "value.store(to, kSize)",
        *INT16,
    ),
    Fault(
        "int16: a value in float32",
        "coupling_int16.cu",
        "stored, double(fixed.down)), unseen",
        "stored, float(fixed.down)), unseen",
        *INT16,
    ),
    Fault("int16: an order that checksums lose", "coupling_int16.cu", "&value}, !by_index)", "&value}, true)", *INT16),
    Fault("int16: no limit", "../ops/coupling.h", "n < kMost ? n : kMost", "n", *INT16),
    Fault(
        "int16: saturates",
        "../ops/coupling.h",
        "return int16_t(uint16_t(uint32_t(int32_t(q)) + uint32_t(int32_t(m))));",
        "const int32_t s = q + int32_t(m);\n    return int16_t(s > 32767 ? 32767 : s < -32768 ? -32768 : s);",
        *INT16,
    ),
    Fault(
        "device not restored",
        "device.cu",
        "if (before_ >= 0) cudaSetDevice(before_);",
        "",
        "device",
        ("device and stream",),
    ),
]
