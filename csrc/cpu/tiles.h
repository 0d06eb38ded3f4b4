// SPDX-License-Identifier: Apache-2.0
// The loops over a job's tiles, compiled once per instruction set (isa_*.cpp define REVK_ISA,
// cmake/CpuKernels.cmake gives them their compiler flags).
#pragma once

#include "cpu/tiles_extras.h"
#include "cpu/tiles_int16.h"
#include "cpu/vectors.h"
#include "ops/coupling.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Both operands and the result in one half type, the most common case after float: directly from
// memory to memory, because L1 buffers cost more than the arithmetic.
template <class Op>
inline void combine_row(Op op, bfloat16* to, const bfloat16* x, const bfloat16* f, int64_t count) {
  const auto element = [&](auto e, int64_t i) {
    e.store(to + i, op(e.load(x + i), e.load(f + i)));
  };
  const auto chunk = [&](int64_t begin, int64_t end) { by_vectors<float>(begin, end, element); };
  if (to == x)
    in_chunks(count, chunk, x, f);
  else
    in_chunks(count, chunk, x, f, to);
}

#if !defined(__F16C__)
template <class Op>
inline void combine_row(Op op, float16* to, const float16* x, const float16* f, int64_t count) {
  REVK_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<float16>(op(widen(x[i]), widen(f[i])));
}
#else
template <class Op>
inline void combine_row(Op op, float16* to, const float16* x, const float16* f, int64_t count) {
  constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t i = 0;
#if defined(__AVX512F__)
  const auto load16 = [](const float16* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  };
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_cvtps_ph(op(load16(x + i), load16(f + i)), kNearestEven));
#endif
  const auto load8 = [](const float16* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  };
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(op(load8(x + i), load8(f + i)), kNearestEven));
  for (; i < count; ++i) to[i] = narrow<float16>(op(widen(x[i]), widen(f[i])));
}
#endif

template <class T, class Op>
inline void combine_halves(Op op, char* to, const char* x, const char* f, const Job& job,
                           Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    combine_row(op, reinterpret_cast<T*>(to + r * job.out.step[1]),
                reinterpret_cast<const T*>(x + r * job.x.step[1]),
                reinterpret_cast<const T*>(f + r * job.f.step[1]), shape.cols);
  }
}

inline bool all_dense(const Job& job, int32_t dtype) {
  return job.out.dtype == dtype && job.x.dtype == dtype && job.f.dtype == dtype &&
         job.out.step[2] == 2 && job.x.step[2] == 2 && job.f.step[2] == 2;
}

template <class A>
void put_on_grid(A* f, int32_t exponent, Shape shape) {
  const ops::Grid<A> grid{A(__builtin_ldexp(1.0, exponent)), A(__builtin_ldexp(1.0, -exponent))};
  REVK_INDEPENDENT
  for (int64_t i = 0; i < shape.rows * shape.cols; ++i) f[i] = grid(f[i]);
}

// One tile, all tiles

template <class A, class Op>
void run_tile(Op op, const Job& job, const int64_t* start, Shape shape, Buffers<A>& buffers,
              Report& report) {
  const auto at = [start](const Operand& operand) {
    return operand.data + start[0] * operand.step[0] + start[1] * operand.step[1] +
           start[2] * operand.step[2];
  };
  const Extras* const extras = job.extras;
  const bool scales = extras && (extras->channel_scale || extras->sample_scale);
  const bool grids = extras && extras->grid_exponent != REVK_NO_GRID;

  if constexpr (sizeof(A) == sizeof(float)) {
    if (!extras && all_dense(job, REVK_BFLOAT16))
      return combine_halves<bfloat16>(op, at(job.out), at(job.x), at(job.f), job, shape);
    if (!extras && all_dense(job, REVK_FLOAT16))
      return combine_halves<float16>(op, at(job.out), at(job.x), at(job.f), job, shape);
  }
  const Rows<const A> f = load(job.f, at(job.f), shape, buffers.f, scales || grids);
  if (scales) scale(buffers.f, *extras, start, shape);
  if (grids) put_on_grid(buffers.f, extras->grid_exponent, shape);
  const Rows<const A> x = load(job.x, at(job.x), shape, buffers.x, false);

  char* const to = at(job.out);
  if (usable_in_place<A>(job.out)) {
    combine(op, {reinterpret_cast<A*>(to), job.out.step[1] / int64_t(sizeof(A))}, x, f, shape);
  } else {
    combine(op, {buffers.out, shape.cols}, x, f, shape);
    scatter_any(to, buffers.out, job.out, shape);
  }
  if (!extras || !(extras->checksum || extras->amax)) return;
  switch (job.out.dtype) {
    case REVK_FLOAT64:
      return report_tile<uint64_t>(report, to, job.out, *extras, start, shape, extras->amax);
    case REVK_FLOAT32:
      return report_tile<uint32_t>(report, to, job.out, *extras, start, shape, extras->amax);
    default:
      return report_tile<uint16_t>(report, to, job.out, *extras, start, shape, extras->amax);
  }
}

template <class A, class Op>
void run(Op op, const Job& job, int64_t begin, int64_t end, Report& report) {
  Buffers<A> buffers;
  const int64_t plane = job.tiles_down * job.tiles_across;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t in_plane = tile % plane;
    const int64_t start[3] = {tile / plane, in_plane / job.tiles_across * job.tile_rows,
                              in_plane % job.tiles_across * job.tile_cols};
    const Shape shape{least(job.tile_rows, job.size[1] - start[1]),
                      least(job.tile_cols, job.size[2] - start[2])};
    if (job.out.dtype == REVK_INT16)
      run_int16_tile<A>(job, start, shape, buffers, report);
    else
      run_tile<A>(op, job, start, shape, buffers, report);
  }
}

}  // namespace

void run_tiles(const Job& job, int64_t begin, int64_t end, Report& report) {
  if (job.wide)
    job.subtract ? run<double>(ops::Uncouple{}, job, begin, end, report)
                 : run<double>(ops::Couple{}, job, begin, end, report);
  else
    job.subtract ? run<float>(ops::Uncouple{}, job, begin, end, report)
                 : run<float>(ops::Couple{}, job, begin, end, report);
}

}  // namespace revk::cpu::REVK_ISA
