// SPDX-License-Identifier: Apache-2.0
// What the norm's forward and backward loops share, compiled once per instruction set: sums of a
// row, parameters beside the lanes they belong to, activations.
#pragma once

#include "cpu/norm_operands.h"
#include "ops/norm_act.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Partial sums of a row: how many there are is part of the result, so it is the same everywhere.
// Short rows pay for adding them up.
constexpr int kPartials = 32;

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

// body(i, k) for every i, k being its partial sum. `rows` are those that come from memory.
template <class Body, class... T>
inline void in_partials(int64_t count, Body&& body, const T*... rows) {
  int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    (ask_ahead(rows + i, kPartials), ...);
    REVK_INDEPENDENT
    for (int64_t k = 0; k < kPartials; ++k) body(i + k, k);
  }
  const int64_t rest = count - i;
  REVK_INDEPENDENT
  for (int64_t k = 0; k < rest; ++k) body(i + k, k);
}

template <class A, class X>
inline A sum_of(const X* x, int64_t count) {
  alignas(64) A partial[kPartials] = {};
  const auto element = [&](int64_t i, int64_t k) { partial[k] += A(widen(x[i])); };
  in_partials(count, element, x);
  return total(partial);
}

// Sums of x - shift and of its square. With a shift near the mean neither loses digits.
template <class A, class X>
inline void sum_deviations(const X* x, int64_t count, A shift, double& sum, double& square) {
  alignas(64) A first[kPartials] = {}, second[kPartials] = {};
  const auto element = [&](int64_t i, int64_t k) {
    const A deviation = A(widen(x[i])) - shift;
    first[k] += deviation;
    second[k] += deviation * deviation;
  };
  in_partials(count, element, x);
  sum += double(total(first));
  square += double(total(second));
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

template <Vary kVary, class Activation, class H, class X, class A>
void normalise(Rows<H> h, Rows<const X> x, const NormScratch<A>& p, int64_t row, Shape shape) {
  const A *const mean = p.mean, *const rstd = p.rstd, *const weight = p.weight,
                 *const bias = p.bias;
  for (int64_t r = 0; r < shape.rows; ++r) {
    H* const to = h.data + r * h.step;
    const X* const from = x.data + r * x.step;
    const int64_t own = kVary == Vary::kAll ? 0 : row + r;  // of the row's own parameters
    const int64_t weights = kVary == Vary::kNone ? own : 0;
    const A row_mean = mean[own], row_rstd = rstd[own];
    const A row_weight = weight[weights], row_bias = bias[weights];
    const auto chunk = [&](int64_t begin, int64_t end) {
      REVK_INDEPENDENT
      for (int64_t c = begin; c < end; ++c) {
        const ops::Normal<A> normal{kVary == Vary::kAll ? mean[c] : row_mean,
                                    kVary == Vary::kAll ? rstd[c] : row_rstd,
                                    kVary == Vary::kNone ? row_weight : weight[c],
                                    kVary == Vary::kNone ? row_bias : bias[c]};
        to[c] = narrow<H>(Activation::value(normal.z(normal.xhat(A(widen(from[c]))))));
      }
    };
    in_chunks(shape.cols, chunk, from);
  }
}

// Calls body with the activation, of those that have loops of their own.
template <class Body>
inline void with_transcendental(int32_t activation, Body&& body) {
  if (activation == REVK_GELU) return body(ops::Gelu{});
  if (activation == REVK_GELU_TANH) return body(ops::GeluTanh{});
  body(ops::Silu{});
}

// These two are given and give the compute type: with a narrower type beside it, compilers take
// twice as many elements at a time, and run out of registers.

// h of a dense z, which may be h.
template <class Activation, class A>
void activate_rows(Rows<A> h, const A* z, Shape shape, Upcoming upcoming) {
  for (int64_t r = 0; r < shape.rows; ++r, z += shape.cols) {
    A* const to = h.data + r * h.step;
    const auto chunk = [&](int64_t begin, int64_t end) {
      upcoming.ask(r, begin, end);
      REVK_INDEPENDENT
      for (int64_t c = begin; c < end; ++c) to[c] = Activation::value(z[c]);
    };
    in_chunks(shape.cols, chunk);
  }
}

// z <- dz
template <class Activation, class A>
void differentiate_rows(A* z, Rows<const A> dh, Shape shape, Upcoming upcoming) {
  for (int64_t r = 0; r < shape.rows; ++r, z += shape.cols) {
    const A* const above = dh.data + r * dh.step;
    const auto chunk = [&](int64_t begin, int64_t end) {
      upcoming.ask(r, begin, end);
      REVK_INDEPENDENT
      for (int64_t c = begin; c < end; ++c) z[c] = Activation::gradient(z[c], above[c]);
    };
    in_chunks(shape.cols, chunk);
  }
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
