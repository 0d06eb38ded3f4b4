// SPDX-License-Identifier: Apache-2.0
// A strip's tiles, and their operands as rows for the norm's loops. Compiled once per instruction
// set.
//
// Dense bfloat16 is widened and narrowed within the loops: a pass through a buffer costs more than
// the arithmetic and leaves memory idle. Other operands that are not of the compute type pass
// through buffers.
#pragma once

#include "cpu/norm_job.h"
#include "cpu/vectors.h"
#include "ops/coupling.h"

namespace revk::cpu::REVK_ISA {
namespace {

inline char* at(const NormOperand& operand, const Strip& strip, int64_t row, int64_t col) {
  return operand.data + strip.instance * operand.instance_step + strip.start[0] * operand.step[0] +
         (strip.start[1] + row) * operand.step[1] + (strip.start[2] + col) * operand.step[2];
}

// Calls body(row, col, shape) for every tile of a strip; row and col count from its start.
template <class Body>
inline void for_tiles(const NormJob& job, const Strip& strip, Body&& body) {
  const int64_t cols = least(strip.cols, job.buffer), rows = job.buffer / cols;
  for (int64_t row = 0; row < strip.rows; row += rows)
    for (int64_t col = 0; col < strip.cols; col += cols)
      body(row, col, Shape{least(rows, strip.rows - row), least(cols, strip.cols - col)});
}

// Calls body(instance, split, block, begin, end) for blocks begin..end-1, with the units of each.
template <class Body>
inline void for_blocks(const NormJob& job, int64_t begin, int64_t end, Body&& body) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % job.blocks, part = task / job.blocks;
    const int64_t from = block * job.block_units;
    body(part / job.splits, part % job.splits, block, from,
         least(from + job.block_units, job.units));
  }
}

// Calls body(strip, fresh) for strips begin..end-1, the last first: what the previous pass touched
// last may still be in the cache. `fresh`: the first visited of its instance and split.
template <class Body>
inline void for_strips(const NormJob& job, int64_t begin, int64_t end, Body&& body) {
  int64_t last = -1;
  for (int64_t task = end - 1; task >= begin; --task) {
    const int64_t part = task / job.units;
    body(strip_at(job, part / job.splits, part % job.splits, task % job.units), part != last);
    last = part;
  }
}

// The inputs of the next tile. Compute-bound loops prefetch them, so that memory is not idle
// meanwhile. At a strip's end this prefetches lines that nobody reads.
class Upcoming {
 public:
  void add(const NormOperand& operand, const Strip& strip, int64_t row, int64_t col, Shape shape) {
    if (operand.data == nullptr || operand.step[2] > int64_t(sizeof(double))) return;
    const bool down = shape.cols == strip.cols;
    inputs_[count_++] = {
        at(operand, strip, row + (down ? shape.rows : 0), col + (down ? 0 : shape.cols)),
        operand.step[1], operand.step[2]};
  }
  void ask(int64_t row, int64_t begin, int64_t end) const {
    for (int i = 0; i < count_; ++i) {
      const Input& input = inputs_[i];
      const char* const from = input.data + row * input.row_step;
      for (int64_t at = begin * input.step; at < end * input.step; at += kLine)
        __builtin_prefetch(from + at);
    }
  }

 private:
  struct Input {
    const char* data;
    int64_t row_step, step;  // bytes
  };
  Input inputs_[3];
  int count_ = 0;
};

// Whether the loops can use the operand in place, as elements of T.
template <class T>
inline bool lies_as(const NormOperand& operand) {
  if constexpr (sizeof(T) == sizeof(bfloat16))
    return operand.dtype == REVK_BFLOAT16 && operand.step[2] == int64_t(sizeof(T));
  else
    return usable_in_place<T>(operand);
}

template <class T>
inline Rows<T> rows_of(const NormOperand& operand, char* at) {
  return {reinterpret_cast<T*>(at), operand.step[1] / int64_t(sizeof(T))};
}

// Where an output's tile is computed: in place, or in an L1 buffer if it is to be converted or
// streamed, which finish() does.
template <class T>
inline Rows<T> place_of(const NormOperand& operand, char* to, T* buffer, Shape shape) {
  if (lies_as<T>(operand) && !operand.streams) return rows_of<T>(operand, to);
  return {buffer, shape.cols};
}

template <class T>
inline void finish(const NormOperand& operand, char* to, const T* buffer, Rows<T> made,
                   Shape shape) {
  if (made.data != buffer) return;
  if (!lies_as<T>(operand)) {
    if constexpr (sizeof(T) != sizeof(bfloat16)) scatter_any(to, buffer, operand, shape);
    return;
  }
  if (operand.step[1] == shape.cols * int64_t(sizeof(T))) shape = {1, shape.rows * shape.cols};
  for (int64_t r = 0; r < shape.rows; ++r, to += operand.step[1], buffer += shape.cols)
    stream_row(to, reinterpret_cast<const char*>(buffer), shape.cols * int64_t(sizeof(T)));
}

// Computes s's tile from x and f, writes it, and returns it as stored.
template <class Op>
REVK_APART Rows<const float> coupled_bfloats(Op op, const NormJob& job, char* to, char* from,
                                             char* branch, Shape shape,
                                             const NormScratch<float>& scratch) {
  const Rows<bfloat16> x = rows_of<bfloat16>(job.x, from), f = rows_of<bfloat16>(job.f, branch);
  bfloat16* const buffer = reinterpret_cast<bfloat16*>(scratch.out);
  const Rows<bfloat16> s = place_of(job.s, to, buffer, shape);
  for (int64_t r = 0; r < shape.rows; ++r) {
    bfloat16* const row = s.data + r * s.step;
    const bfloat16 *const before = x.data + r * x.step, *const added = f.data + r * f.step;
    float* const stored = scratch.s + r * shape.cols;
    const auto chunk = [&](int64_t begin, int64_t end) {
      by_vectors<float>(begin, end, [&](auto e, int64_t c) {
        const auto sum = op(e.load(before + c), e.load(added + c));
        e.store(stored + c, e.stored(row + c, sum));
      });
    };
    in_chunks(shape.cols, chunk, before, added);
  }
  finish(job.s, to, buffer, s, shape);
  return {scratch.s, shape.cols};
}

template <class A, class Op>
inline Rows<const A> coupled(Op op, const NormJob& job, const Strip& strip, int64_t row,
                             int64_t col, Shape shape, const NormScratch<A>& scratch) {
  char *const to = at(job.s, strip, row, col), *const from = at(job.x, strip, row, col),
              *const branch = at(job.f, strip, row, col);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (lies_as<bfloat16>(job.s) && lies_as<bfloat16>(job.x) && lies_as<bfloat16>(job.f))
      return coupled_bfloats(op, job, to, from, branch, shape, scratch);
  }
  const Rows<const A> x = load(job.x, from, shape, scratch.x, false);
  const Rows<const A> f = load(job.f, branch, shape, scratch.f, false);
  const Rows<A> sum = place_of(job.s, to, scratch.s, shape);
  combine(op, sum, x, f, shape);
  finish(job.s, to, scratch.s, sum, shape);
  if (sum.data == scratch.s && job.s.dtype != kDtypeOf<A>) gather_any(scratch.s, to, job.s, shape);
  return {sum.data, sum.step};
}

// The tile of the norm's input.
template <class A>
inline Rows<const A> source(const NormJob& job, const Strip& strip, int64_t row, int64_t col,
                            Shape shape, const NormScratch<A>& scratch) {
  if (job.coupling == 0) return load(job.s, at(job.s, strip, row, col), shape, scratch.s, false);
  if (job.coupling == 1) return coupled(ops::Couple{}, job, strip, row, col, shape, scratch);
  return coupled(ops::Uncouple{}, job, strip, row, col, shape, scratch);
}

// Calls body(source); bfloat16 is used in place if there is no coupling.
template <class A, class Body>
inline void with_source(const NormJob& job, const Strip& strip, int64_t row, int64_t col,
                        Shape shape, const NormScratch<A>& scratch, Body&& body) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (job.coupling == 0 && lies_as<bfloat16>(job.s))
      return body(rows_of<const bfloat16>(job.s, at(job.s, strip, row, col)));
  }
  body(source(job, strip, row, col, shape, scratch));
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
