// SPDX-License-Identifier: Apache-2.0
// Shared by the norm's forward and backward loops: parameters per lane, activations. Compiled once
// per instruction set.
#pragma once

#include "cpu/bundles.h"
#include "cpu/norm_operands.h"
#include "cpu/partials.h"
#include "ops/norm_act.h"

namespace revk::cpu::REVK_ISA {
namespace {

// The number of channels in a strip, and the first of them.
inline int64_t channels_of(const NormJob& job, const Strip& strip) {
  if (!job.by_lane) return strip.rows;
  return job.fold > 1 ? job.channels : strip.cols / job.plane;
}
inline int64_t first_channel(const NormJob& job, const Strip& strip) {
  return job.by_lane ? strip.start[2] / job.plane : strip.start[1];
}

// Spreads the parameters of a strip's channels over the lanes (or rows); folded rows repeat them.
template <class A>
inline void spread(A* to, const void* from, const NormJob& job, const Strip& strip) {
  const A* const values = static_cast<const A*>(from);
  const int64_t first = first_channel(job, strip), channels = channels_of(job, strip);
  for (int64_t k = 0; k < job.fold; ++k, to += channels * job.plane) {
    if (job.plane == 1) {
      for (int64_t c = 0; c < channels; ++c) to[c] = values[first + c];
      continue;
    }
    for (int64_t c = 0, l = 0; c < channels; ++c)
      for (const int64_t next = l + job.plane; l < next; ++l) to[l] = values[first + c];
  }
}

// The same for values shared by a group of channels.
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

// Which parameters vary along columns: all, none, or weight and bias alone.
enum class Vary { kAll, kNone, kWeights };

// Transcendental activations cost more than memory access. They get a loop of their own, over a
// tile of z in L1; the others run within the loops that make and use z.
inline bool is_transcendental(int32_t activation) {
  return activation != REVK_IDENTITY && activation != REVK_RELU;
}

// A parameter in a loop: one per lane, or the row's. The row's is read before the loop, because the
// compiler must assume that the loop's stores may change it.
template <bool kOfLanes, class A>
struct Parameter {
  const A* lanes;
  A of_row;

  Parameter(const A* values, int64_t row) : lanes(values), of_row(values[kOfLanes ? 0 : row]) {}
  template <class E>
  REVK_INLINED typename E::Number at(E e, int64_t lane) const {
    if constexpr (kOfLanes) return e.load(lanes + lane);
    return e.all(of_row);
  }
};

template <Vary kVary, class Activation, class H, class X, class A>
REVK_APART void normalise(Rows<H> h, Rows<const X> x, const NormScratch<A>& p, int64_t row,
                          Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    H* const to = h.data + r * h.step;
    const X* const from = x.data + r * x.step;
    const Parameter<kVary == Vary::kAll, A> mean(p.mean, row + r), rstd(p.rstd, row + r);
    const Parameter<kVary != Vary::kNone, A> weight(p.weight, row + r), bias(p.bias, row + r);
    const auto element = [&](auto e, int64_t c) {
      const ops::Normal<typename decltype(e)::Number> normal{mean.at(e, c), rstd.at(e, c),
                                                             weight.at(e, c), bias.at(e, c)};
      e.store(to + c, Activation::value(normal.z(normal.xhat(e.load(from + c)))));
    };
    const auto chunk = [&](int64_t begin, int64_t end) { by_vectors<A>(begin, end, element); };
    in_chunks(shape.cols, chunk, from, to);
  }
}

// Calls body with the activation type, for the activations with loops of their own.
template <class Body>
inline void with_transcendental(int32_t activation, Body&& body) {
  if (activation == REVK_GELU) return body(ops::Gelu{});
  if (activation == REVK_GELU_TANH) return body(ops::GeluTanh{});
  body(ops::Silu{});
}

// h of a dense z
template <class Activation, class H, class A>
REVK_APART void activate_rows(Rows<H> h, const A* z, Shape shape, Upcoming upcoming) {
  for (int64_t r = 0; r < shape.rows; ++r, z += shape.cols) {
    H* const to = h.data + r * h.step;
    const auto element = [&](auto e, int64_t c) REVK_INLINED {
      const auto value = Activation::value(e.load(z + c));
      e.store(to + c, value);
    };
    const auto chunk = [&](int64_t begin, int64_t end) {
      upcoming.ask(r, begin, end);
      by_bundles<A>(begin, end, element);
    };
    in_chunks(shape.cols, chunk);
  }
}

// z <- dz
template <class Activation, class D, class A>
REVK_APART void differentiate_rows(A* z, Rows<const D> dh, Shape shape, Upcoming upcoming) {
  for (int64_t r = 0; r < shape.rows; ++r, z += shape.cols) {
    const D* const above = dh.data + r * dh.step;
    const auto element = [&](auto e, int64_t c) REVK_INLINED {
      e.store(z + c, Activation::gradient(e.load(z + c), e.load(above + c)));
    };
    const auto chunk = [&](int64_t begin, int64_t end) {
      upcoming.ask(r, begin, end);
      by_bundles<A>(begin, end, element);
    };
    in_chunks(shape.cols, chunk);
  }
}

// Calls body with the activation that the backward loops still have to apply.
template <class Body>
inline void with_mask(int32_t activation, Body&& body) {
  if (activation == REVK_RELU) return body(ops::Relu{});
  return body(ops::Identity{});
}

template <class A>
inline void flush(double* to, A* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += double(from[i]), from[i] = A(0);
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
