// SPDX-License-Identifier: Apache-2.0
// A tile of a coupling whose stream is int16, in fixed point. Compiled once per instruction set.
#pragma once

#include "cpu/tiles_extras.h"
#include "ops/coupling.h"

namespace revk::cpu::REVK_ISA {
namespace {

template <int kBytes>
struct Unsigned {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};

// to = from + f. Returns the largest |from + n| before wrapping, as bits of A, if kReports.
template <bool kReports, class A>
inline uint64_t add_fixed(int16_t* to, const int16_t* from, const A* f, ops::FixedPoint<A> fixed,
                          int64_t count) {
  using U = typename Unsigned<sizeof(A)>::type;
  constexpr U kMagnitude = U(~(U(1) << (8 * sizeof(U) - 1)));
  U most = 0;
  const auto chunk = [&](int64_t begin, int64_t end) {
    // `to` is `from` itself or does not overlap it.
    REVK_INDEPENDENT
    for (int64_t c = begin; c < end; ++c) {
      const A n = fixed.steps(f[c]);
      const int16_t q = from[c];
      to[c] = fixed.sum(q, n);
      if constexpr (kReports) {
        const U magnitude = bits_as<U>(fixed.unwrapped(q, n)) & kMagnitude;
        most = magnitude > most ? magnitude : most;
      }
    }
  };
  in_chunks(count, chunk, from, f);
  return most;
}

// Copies between strided memory and a dense row.
inline void gather_fixed(int16_t* to, const char* from, int64_t step, int64_t count) {
  for (int64_t c = 0; c < count; ++c) to[c] = *reinterpret_cast<const int16_t*>(from + c * step);
}
inline void scatter_fixed(char* to, const int16_t* from, int64_t step, int64_t count) {
  for (int64_t c = 0; c < count; ++c) *reinterpret_cast<int16_t*>(to + c * step) = from[c];
}

// Writes a row's numbers as T, computed in W.
template <class T, class W>
inline void write_value(char* to, const int16_t* stored, W down, int64_t step, int64_t count) {
  if (step == int64_t(sizeof(T))) {
    T* const row = reinterpret_cast<T*>(to);
    REVK_INDEPENDENT
    for (int64_t c = 0; c < count; ++c) row[c] = narrow<T>(ops::fixed_value(stored[c], down));
  } else {
    for (int64_t c = 0; c < count; ++c)
      *reinterpret_cast<T*>(to + c * step) = narrow<T>(ops::fixed_value(stored[c], down));
  }
}
inline void write_value_any(char* to, const int16_t* stored, double down, const Operand& value,
                            int64_t count) {
  switch (value.dtype) {
    case REVK_FLOAT64:
      return write_value<double>(to, stored, down, value.step[2], count);
    case REVK_FLOAT32:
      return write_value<float>(to, stored, float(down), value.step[2], count);
    case REVK_BFLOAT16:
      return write_value<bfloat16>(to, stored, float(down), value.step[2], count);
    default:
      return write_value<float16>(to, stored, float(down), value.step[2], count);
  }
}

template <class A>
void run_int16_tile(const Job& job, const int64_t* start, Shape shape, Buffers<A>& buffers,
                    Report& report) {
  const auto at = [start](const Operand& operand) {
    return operand.data + start[0] * operand.step[0] + start[1] * operand.step[1] +
           start[2] * operand.step[2];
  };
  const Extras& extras = *job.extras;
  const bool scales = extras.channel_scale || extras.sample_scale;
  Rows<const A> f = load(job.f, at(job.f), shape, buffers.f, scales);
  if (scales) scale(buffers.f, extras, start, shape);

  const double up = __builtin_ldexp(1.0, extras.grid_exponent);
  const double down = __builtin_ldexp(1.0, -extras.grid_exponent);
  const ops::FixedPoint<A> fixed{A(job.subtract ? -up : up), A(down)};
  int16_t* const gathered = reinterpret_cast<int16_t*>(buffers.x);
  int16_t* const made = reinterpret_cast<int16_t*>(buffers.out);
  const bool reads = job.x.step[2] == 2, writes = job.out.step[2] == 2;
  const bool values = extras.value.data != nullptr;
  const char* x = at(job.x);
  char* out = at(job.out);
  char* value = values ? at(extras.value) : nullptr;
  for (int64_t r = 0; r < shape.rows; ++r) {
    if (!reads) gather_fixed(gathered, x, job.x.step[2], shape.cols);
    const int16_t* const from = reads ? reinterpret_cast<const int16_t*>(x) : gathered;
    int16_t* const to = writes ? reinterpret_cast<int16_t*>(out) : made;
    if (extras.amax) {
      const uint64_t most = add_fixed<true>(to, from, f.data, fixed, shape.cols);
      report.amax_bits = most > report.amax_bits ? most : report.amax_bits;
    } else {
      add_fixed<false>(to, from, f.data, fixed, shape.cols);
    }
    if (!writes) scatter_fixed(out, to, job.out.step[2], shape.cols);
    if (values) {
      write_value_any(value, to, down, extras.value, shape.cols);
      value += extras.value.step[1];
    }
    x += job.x.step[1], out += job.out.step[1], f.data += f.step;
  }
  if (extras.checksum)
    report_tile<uint16_t>(report, at(job.out), job.out, extras, start, shape, false);
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
