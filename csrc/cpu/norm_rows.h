// SPDX-License-Identifier: Apache-2.0
// What the norm's forward and backward loops share, compiled once per instruction set: tiles of a
// strip, sums of a row, parameters beside the lanes they belong to.
#pragma once

#include "cpu/norm_job.h"
#include "cpu/rows.h"
#include "ops/coupling.h"
#include "ops/norm_act.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Partial sums of a row: how many there are is part of the result, so it is the same everywhere.
constexpr int kPartials = 64;

template <int kWidth, class A>
inline A total_of(A* partial) {
  if constexpr (kWidth > 1) {
    constexpr int kHalf = kWidth / 2;  // a constant, so that no level is a loop
    REVK_INDEPENDENT
    for (int i = 0; i < kHalf; ++i) partial[i] += partial[i + kHalf];
    return total_of<kHalf>(partial);
  }
  return partial[0];
}

template <class A>
inline A total(A* partial) {
  return total_of<kPartials>(partial);
}

// body(i, k) for every i, k being its partial sum
template <class Body>
inline void in_partials(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    REVK_INDEPENDENT
    for (int64_t k = 0; k < kPartials; ++k) body(i + k, k);
  }
  const int64_t rest = count - i;
  REVK_INDEPENDENT
  for (int64_t k = 0; k < rest; ++k) body(i + k, k);
}

template <class A>
inline A sum_of(const A* x, int64_t count) {
  alignas(64) A partial[kPartials] = {};
  in_partials(count, [&](int64_t i, int64_t k) { partial[k] += x[i]; });
  return total(partial);
}

// Sums of x - shift and of its square. With a shift near the mean neither loses digits.
template <class A>
inline void sum_deviations(const A* x, int64_t count, A shift, double& sum, double& square) {
  alignas(64) A first[kPartials] = {}, second[kPartials] = {};
  in_partials(count, [&](int64_t i, int64_t k) {
    const A deviation = x[i] - shift;
    first[k] += deviation;
    second[k] += deviation * deviation;
  });
  sum += double(total(first));
  square += double(total(second));
}

inline char* at(const NormOperand& operand, const Strip& strip, int64_t row, int64_t col) {
  return operand.data + strip.instance * operand.instance_step + strip.start[0] * operand.step[0] +
         (strip.start[1] + row) * operand.step[1] + (strip.start[2] + col) * operand.step[2];
}

// body(row, col, shape) for every tile of a strip; row and col count from its start.
template <class Body>
inline void for_tiles(const NormJob& job, const Strip& strip, Body&& body) {
  const int64_t cols = least(strip.cols, job.buffer), rows = job.buffer / cols;
  for (int64_t row = 0; row < strip.rows; row += rows)
    for (int64_t col = 0; col < strip.cols; col += cols)
      body(row, col, Shape{least(rows, strip.rows - row), least(cols, strip.cols - col)});
}

// body(instance, split, block, begin, end) for blocks begin..end-1, with the units of each.
template <class Body>
inline void for_blocks(const NormJob& job, int64_t begin, int64_t end, Body&& body) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % job.blocks, part = task / job.blocks;
    const int64_t from = block * job.block_units;
    body(part / job.splits, part % job.splits, block, from,
         least(from + job.block_units, job.units));
  }
}

// body(strip, fresh) for strips begin..end-1, the last first: what was touched last in the pass
// before may still be in the cache. `fresh`: the first of its instance and split.
template <class Body>
inline void for_strips(const NormJob& job, int64_t begin, int64_t end, Body&& body) {
  int64_t last = -1;
  for (int64_t task = end - 1; task >= begin; --task) {
    const int64_t part = task / job.units;
    body(strip_at(job, part / job.splits, part % job.splits, task % job.units), part != last);
    last = part;
  }
}

// x and f of bfloat16 to s of bfloat16, and what was stored back in float, in one loop: the way
// through a buffer for each costs more than the arithmetic.
template <class Op>
inline void couple_bfloats(Op op, const NormJob& job, char* to, const char* x, const char* f,
                           float* stored, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r, stored += shape.cols) {
    bfloat16* const row = reinterpret_cast<bfloat16*>(to + r * job.s.step[1]);
    const bfloat16* const from = reinterpret_cast<const bfloat16*>(x + r * job.x.step[1]);
    const bfloat16* const branch = reinterpret_cast<const bfloat16*>(f + r * job.f.step[1]);
    REVK_INDEPENDENT
    for (int64_t c = 0; c < shape.cols; ++c) {
      row[c] = narrow<bfloat16>(op(widen(from[c]), widen(branch[c])));
      stored[c] = widen(row[c]);
    }
  }
}

inline bool is_dense_bfloat(const NormOperand& operand) {
  return operand.dtype == REVK_BFLOAT16 && operand.step[2] == 2;
}

// s's tile made of x and f, written, and taken as it was stored.
template <class A, class Op>
inline Rows<const A> coupled(Op op, const NormJob& job, const Strip& strip, int64_t row,
                             int64_t col, Shape shape, const NormScratch<A>& scratch) {
  char* const to = at(job.s, strip, row, col);
  const char *const from = at(job.x, strip, row, col), *const branch = at(job.f, strip, row, col);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (is_dense_bfloat(job.s) && is_dense_bfloat(job.x) && is_dense_bfloat(job.f)) {
      couple_bfloats(op, job, to, from, branch, scratch.s, shape);
      return {scratch.s, shape.cols};
    }
  }
  const Rows<const A> x = load(job.x, from, shape, scratch.x, false);
  const Rows<const A> f = load(job.f, branch, shape, scratch.f, false);
  const bool direct = usable_in_place<A>(job.s);
  const Rows<A> sum = direct ? Rows<A>{reinterpret_cast<A*>(to), job.s.step[1] / int64_t(sizeof(A))}
                             : Rows<A>{scratch.s, shape.cols};
  combine(op, sum, x, f, shape);
  if (!direct) {
    scatter_any(to, scratch.s, job.s, shape);
    if (job.s.dtype != kDtypeOf<A>) gather_any(scratch.s, to, job.s, shape);
  }
  return {sum.data, sum.step};
}

// The tile of what is normalised.
template <class A>
inline Rows<const A> source(const NormJob& job, const Strip& strip, int64_t row, int64_t col,
                            Shape shape, const NormScratch<A>& scratch) {
  if (job.coupling == 0) return load(job.s, at(job.s, strip, row, col), shape, scratch.s, false);
  if (job.coupling == 1) return coupled(ops::Couple{}, job, strip, row, col, shape, scratch);
  return coupled(ops::Uncouple{}, job, strip, row, col, shape, scratch);
}

// The parameters of a strip's channels, one beside each lane (or row): folded rows repeat them.
template <class A>
inline void spread(A* to, const void* from, const NormJob& job, const Strip& strip) {
  const A* const values = static_cast<const A*>(from);
  if (!job.by_lane) {
    for (int64_t r = 0; r < strip.rows; ++r) to[r] = values[strip.start[1] + r];
    return;
  }
  if (job.fold == 1) {
    for (int64_t l = 0; l < strip.cols; ++l) to[l] = values[strip.start[2] + l];
    return;
  }
  for (int64_t k = 0; k < job.fold; ++k, to += job.channels)
    for (int64_t c = 0; c < job.channels; ++c) to[c] = values[c];
}

// The same of values that a group of channels shares.
template <class A>
inline void spread_groups(A* to, const void* from, const NormJob& job, const Strip& strip) {
  if (job.groups == 0) return spread(to, from, job, strip);
  const A* const values = static_cast<const A*>(from) + strip.instance * job.groups;
  const int64_t each = job.channels / job.groups;
  const int64_t first = strip.start[job.by_lane ? 2 : 1];
  const int64_t count = job.by_lane ? strip.cols : strip.rows;
  for (int64_t i = 0, c = first % job.channels; i < count; ++i) {
    to[i] = values[c / each];
    if (++c == job.channels) c = 0;
  }
}

template <class A>
inline void spread_normal(const NormScratch<A>& to, const NormJob& job, const Strip& strip) {
  if (job.has_mean) {
    spread_groups(to.mean, job.mean, job, strip);
  } else {
    for (int64_t i = 0; i < job.span; ++i) to.mean[i] = A(0);
  }
  spread_groups(to.rstd, job.rstd, job, strip);
  spread(to.weight, job.weight, job, strip);
  spread(to.bias, job.bias, job, strip);
}

// Which parameters differ from column to column: all, none, or weight and bias alone.
enum class Vary { kAll, kNone, kWeights };

// Activations that cost more than they load are applied in a loop of their own, once a tile of z is
// in L1; the others within the loops that make and use z.
inline bool is_transcendental(int32_t activation) {
  return activation != REVK_IDENTITY && activation != REVK_RELU;
}

template <Vary kVary, class Activation, class A>
void normalise(Rows<A> h, Rows<const A> x, const NormScratch<A>& p, int64_t row, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    A* const to = h.data + r * h.step;
    const A* const from = x.data + r * x.step;
    if constexpr (kVary == Vary::kNone) {
      const ops::Normal<A> normal{p.mean[row + r], p.rstd[row + r], p.weight[row + r],
                                  p.bias[row + r]};
      REVK_INDEPENDENT
      for (int64_t c = 0; c < shape.cols; ++c)
        to[c] = Activation::value(normal.z(normal.xhat(from[c])));
    } else {
      const A *const mean = p.mean, *const rstd = p.rstd, *const weight = p.weight,
                     *const bias = p.bias;
      const A row_mean = mean[row + r], row_rstd = rstd[row + r];
      REVK_INDEPENDENT
      for (int64_t c = 0; c < shape.cols; ++c) {
        const ops::Normal<A> normal{kVary == Vary::kAll ? mean[c] : row_mean,
                                    kVary == Vary::kAll ? rstd[c] : row_rstd, weight[c], bias[c]};
        to[c] = Activation::value(normal.z(normal.xhat(from[c])));
      }
    }
  }
}

template <class Activation, class A>
void activate_rows(Rows<A> z, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    A* const row = z.data + r * z.step;
    REVK_INDEPENDENT
    for (int64_t c = 0; c < shape.cols; ++c) row[c] = Activation::value(row[c]);
  }
}

template <class A>
void activate(int32_t activation, Rows<A> z, Shape shape) {
  if (activation == REVK_GELU) return activate_rows<ops::Gelu>(z, shape);
  if (activation == REVK_GELU_TANH) return activate_rows<ops::GeluTanh>(z, shape);
  return activate_rows<ops::Silu>(z, shape);
}

// z <- dz
template <class Activation, class A>
void differentiate_rows(A* z, Rows<const A> dh, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r, z += shape.cols) {
    const A* const above = dh.data + r * dh.step;
    REVK_INDEPENDENT
    for (int64_t c = 0; c < shape.cols; ++c) z[c] = Activation::gradient(z[c], above[c]);
  }
}

// What the backward loops take for dh: of a transcendental activation dz itself, made in scratch.z,
// so that to them it is the identity.
template <Vary kVary, class A>
Rows<const A> differentiated(int32_t activation, Rows<const A> dh, Rows<const A> x,
                             const NormScratch<A>& p, int64_t row, Shape shape) {
  if (!is_transcendental(activation)) return dh;
  normalise<kVary, ops::Identity>({p.z, shape.cols}, x, p, row, shape);
  if (activation == REVK_GELU)
    differentiate_rows<ops::Gelu>(p.z, dh, shape);
  else if (activation == REVK_GELU_TANH)
    differentiate_rows<ops::GeluTanh>(p.z, dh, shape);
  else
    differentiate_rows<ops::Silu>(p.z, dh, shape);
  return {p.z, shape.cols};
}

// Calls body with what is left of the activation for the backward loops.
template <class Body>
inline void with_mask(int32_t activation, Body&& body) {
  if (activation == REVK_RELU) return body(ops::Relu{});
  return body(ops::Identity{});
}

inline int64_t channels_of(const NormJob& job, const Strip& strip) {
  return job.by_lane ? strip.cols : strip.rows;
}

template <class A>
inline void flush(double* to, A* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += double(from[i]), from[i] = A(0);
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
