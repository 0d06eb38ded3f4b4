// SPDX-License-Identifier: Apache-2.0
// A coupling's options on a tile: scales of the branch, checksum and amax of the result. Compiled
// once per instruction set.
#pragma once

#include "cpu/rows.h"
#include "ops/coupling.h"

namespace revk::cpu::REVK_ISA {
namespace {

template <class A>
struct alignas(64) Buffers {
  A x[kTile], f[kTile], out[kTile];
};

template <class A>
void scale(A* f, const Extras& extras, const int64_t* start, Shape shape) {
  const A* const by_channel = static_cast<const A*>(extras.channel_scale);
  const A* const by_sample = static_cast<const A*>(extras.sample_scale);
  const auto at = [start](const int64_t* step, int64_t r, int64_t c) {
    return start[0] * step[0] + (start[1] + r) * step[1] + (start[2] + c) * step[2];
  };
  const auto sample = [&](int64_t r, int64_t c) {
    return by_sample ? by_sample[at(extras.outer_step, r, c) / extras.rows_per_sample] : A(1);
  };
  const bool sample_varies = by_sample && extras.outer_step[2] != 0;
  const bool channel_varies = by_channel && extras.channel_step[2] != 0;
  for (int64_t r = 0; r < shape.rows; ++r, f += shape.cols) {
    const A* const channels = by_channel ? by_channel + at(extras.channel_step, r, 0) : nullptr;
    if (sample_varies) {
      for (int64_t c = 0; c < shape.cols; ++c)
        f[c] =
            ops::scaled(f[c], channels ? channels[c * extras.channel_step[2]] : A(1), sample(r, c));
    } else if (channel_varies) {  // its step is 1
      const A factor = sample(r, 0);
      REVK_INDEPENDENT
      for (int64_t c = 0; c < shape.cols; ++c) f[c] = ops::scaled(f[c], channels[c], factor);
    } else {
      const A channel = channels ? *channels : A(1), factor = sample(r, 0);
      REVK_INDEPENDENT
      for (int64_t c = 0; c < shape.cols; ++c) f[c] = ops::scaled(f[c], channel, factor);
    }
  }
}

// Reads the tile as stored, as bits of type U; if `amax`, these are the bits of a float.
template <class U>
void report_tile(Report& report, const char* tile, const Operand& out, const Extras& extras,
                 const int64_t* start, Shape shape, bool amax) {
  const int64_t* const by = extras.index_step;
  constexpr U kMagnitude = U(~(U(1) << (8 * sizeof(U) - 1)));
  for (int64_t r = 0; r < shape.rows; ++r, tile += out.step[1]) {
    const uint64_t first = uint64_t(start[0] * by[0] + (start[1] + r) * by[1] + start[2] * by[2]);
    uint64_t sum = 0, most = 0;
    if (out.step[2] == int64_t(sizeof(U))) {
      const U* const bits = reinterpret_cast<const U*>(tile);
      if (extras.checksum)
        for (int64_t c = 0; c < shape.cols; ++c)
          sum += ops::checksum_term(bits[c], first + uint64_t(c * by[2]));
      U top = 0;
      if (amax)
        for (int64_t c = 0; c < shape.cols; ++c) {
          const U magnitude = U(bits[c] & kMagnitude);
          top = magnitude > top ? magnitude : top;
        }
      most = top;
    } else {
      for (int64_t c = 0; c < shape.cols; ++c) {
        const U bits = *reinterpret_cast<const U*>(tile + c * out.step[2]);
        const uint64_t magnitude = bits & kMagnitude;
        sum += ops::checksum_term(bits, first + uint64_t(c * by[2]));
        most = amax && magnitude > most ? magnitude : most;
      }
    }
    report.checksum += sum;
    report.amax_bits = most > report.amax_bits ? most : report.amax_bits;
  }
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
