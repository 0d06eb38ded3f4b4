// SPDX-License-Identifier: Apache-2.0
// The norm's backward loops, compiled once per instruction set.
#pragma once

#include "cpu/norm_rows.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Loops take NormScratch by value: behind a reference, the compiler must assume that stores may
// change its pointers.

// Sums of dz and of dz * xhat

// Adjacent channels: one sum per lane.
template <class Activation, class D, class X, class A>
REVK_APART void sum_lanes(Rows<const D> dh, Rows<const X> x, NormScratch<A> p, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    const X* const from = x.data + r * x.step;
    const D* const above = dh.data + r * dh.step;
    const auto chunk = [&](int64_t begin, int64_t end) {
      REVK_INDEPENDENT
      for (int64_t l = begin; l < end; ++l) {
        const ops::Normal<A> normal{p.mean[l], p.rstd[l], p.weight[l], p.bias[l]};
        const A xhat = normal.xhat(A(widen(from[l])));
        const A dz = Activation::gradient(normal.z(xhat), A(widen(above[l])));
        p.first[l] += dz;
        p.second[l] += dz * xhat;
      }
    };
    in_chunks(shape.cols, chunk, from, above);
  }
}

// A channel per run: one sum per row of the tile.
template <class Activation, class D, class X, class A>
REVK_APART void sum_runs(Rows<const D> dh, Rows<const X> x, NormScratch<A> p, int64_t row,
                         Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    const X* const from = x.data + r * x.step;
    const D* const above = dh.data + r * dh.step;
    const int64_t c = row + r;
    const ops::Normal<A> own{p.mean[c], p.rstd[c], p.weight[c], p.bias[c]};
    const auto add = [&](auto e, auto& first, auto& second, int64_t i) {
      const ops::Normal<typename decltype(e)::Number> normal{e.all(own.mean), e.all(own.rstd),
                                                             e.all(own.weight), e.all(own.bias)};
      const auto xhat = normal.xhat(e.load(from + i));
      const auto dz = Activation::gradient(normal.z(xhat), e.load(above + i));
      first += dz;
      second += dz * xhat;
    };
    const TwoSums<A> sums = two_sums<A>(shape.cols, add, from, above);
    p.sum[c] += double(sums.first);
    p.square[c] += double(sums.second);
  }
}

// Calls body(x, dh) for a tile, with dz in place of dh if the activation is transcendental (the
// loops then see the identity). `direct`: both are bfloat16, used in place.
template <Vary kVary, class A, class Body>
void with_operands(const NormJob& job, const Strip& strip, int64_t row, int64_t col, Shape shape,
                   const NormScratch<A>& p, bool direct, int64_t statistics_row, Body&& body) {
  char *const x = at(job.s, strip, row, col), *const dh = at(job.dh, strip, row, col);
  const auto with_both = [&](auto x, auto above) {
    if (!is_transcendental(job.activation)) return body(x, above);
    normalise<kVary, ops::Identity>(Rows<A>{p.z, shape.cols}, x, p, statistics_row, shape);
    Upcoming upcoming;
    const NormOperand* const inputs[] = {&job.s, &job.dh, &job.base};
    for (const NormOperand* const input : inputs) upcoming.add(*input, strip, row, col, shape);
    with_transcendental(job.activation, [&](auto activation) {
      differentiate_rows<decltype(activation)>(p.z, above, shape, upcoming);
    });
    body(x, Rows<const A>{p.z, shape.cols});
  };
  if constexpr (sizeof(A) == sizeof(float)) {
    if (direct)
      return with_both(rows_of<const bfloat16>(job.s, x), rows_of<const bfloat16>(job.dh, dh));
  }
  with_both(load(job.s, x, shape, p.s, false), load(job.dh, dh, shape, p.f, false));
}

template <class A>
void flush_lanes(const NormScratch<A>& scratch, int64_t count) {
  flush(scratch.sum, scratch.first, count);
  flush(scratch.square, scratch.second, count);
}

// Stores a block's sums: dbias, then dweight.
template <class A>
void store_block(const NormJob& job, const Strip& strip, int64_t block,
                 const NormScratch<A>& scratch) {
  double* const dbias = job.sums + (strip.instance * job.blocks + block) * 2 * job.channels +
                        first_channel(job, strip);
  double* const dweight = dbias + job.channels;
  const int64_t channels = channels_of(job, strip);
  for (int64_t l = 0; job.plane > 1 && l < job.fold * channels; ++l) {
    double first = 0.0, second = 0.0;
    for (int64_t k = l * job.plane; k < (l + 1) * job.plane; ++k)
      first += scratch.sum[k], second += scratch.square[k];
    scratch.sum[l] = first, scratch.square[l] = second;
  }
  for (int64_t c = 0; c < channels; ++c) dbias[c] = scratch.sum[c], dweight[c] = scratch.square[c];
  for (int64_t k = 1; k < job.fold; ++k)
    for (int64_t c = 0, l = k * channels; c < channels; ++c, ++l)
      dbias[c] += scratch.sum[l], dweight[c] += scratch.square[l];
}

template <class A>
void clear_sums(const NormJob& job, const NormScratch<A>& scratch) {
  for (int64_t i = 0; i < job.span; ++i) {
    scratch.sum[i] = scratch.square[i] = 0.0;
    scratch.first[i] = scratch.second[i] = A(0);
  }
}

template <class A>
void gradient_sums(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  const bool direct = lies_as<bfloat16>(job.s) && lies_as<bfloat16>(job.dh);
  for_blocks(
      job, begin, end,
      [&](int64_t instance, int64_t split, int64_t block, int64_t from, int64_t to) {
        clear_sums(job, scratch);
        const Strip head = strip_at(job, instance, split, from);
        spread_normal(scratch, job, head);
        int64_t unflushed = 0;
        for (int64_t unit = from; unit < to; ++unit) {
          const Strip strip = strip_at(job, instance, split, unit);
          for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
            const auto sum = [&](auto x, auto dh) {
              with_mask(job.activation, [&](auto activation) {
                if (job.by_lane)
                  sum_lanes<decltype(activation)>(dh, x, scratch, shape);
                else
                  sum_runs<decltype(activation)>(dh, x, scratch, row, shape);
              });
            };
            if (job.by_lane)
              with_operands<Vary::kAll>(job, strip, row, col, shape, scratch, direct, 0, sum);
            else
              with_operands<Vary::kNone>(job, strip, row, col, shape, scratch, direct, row, sum);
            unflushed += job.by_lane ? shape.rows : 0;
            if (unflushed >= kNormFlush) {
              flush_lanes(scratch, shape.cols);
              unflushed = 0;
            }
          });
        }
        if (job.by_lane) flush_lanes(scratch, head.cols);
        store_block(job, head, block, scratch);
      });
}

// dx

// Here p.dweight and p.dbias are the means of g * xhat and of g, where g is dz, or dz * weight for
// group, layer and RMS norms; p.shift is the batch norm's factor, weight * rstd.
template <NormGradient kKind, Vary kVary, class Activation, class B, class D, class A>
REVK_APART void gradient_tile(Rows<B> dx, Rows<const B> base, Rows<const D> dh, Rows<const B> x,
                              NormScratch<A> p, int64_t row, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    B* const to = dx.data + r * dx.step;
    const B *const from = x.data + r * x.step, *const before = base.data + r * base.step;
    const D* const above = dh.data + r * dh.step;
    using Statistic = Parameter<kVary == Vary::kAll, A>;
    using Affine = Parameter<kVary != Vary::kNone, A>;
    const Statistic mean(p.mean, row + r), rstd(p.rstd, row + r), factor(p.shift, row + r),
        mean_g(p.dbias, row + r), mean_gx(p.dweight, row + r);
    const Affine weight(p.weight, row + r), bias(p.bias, row + r);
    const auto element = [&](auto e, int64_t c) {
      using V = typename decltype(e)::Number;
      const ops::Normal<V> normal{mean.at(e, c), rstd.at(e, c), weight.at(e, c), bias.at(e, c)};
      const V xhat = normal.xhat(e.load(from + c));
      const V dz = Activation::gradient(normal.z(xhat), e.load(above + c));
      V gradient;
      if constexpr (kKind == NormGradient::kConstant)
        gradient = factor.at(e, c) * dz;
      else if constexpr (kKind == NormGradient::kBatch)
        gradient =
            ops::MeansGradient<V>{factor.at(e, c), mean_g.at(e, c), mean_gx.at(e, c)}(dz, xhat);
      else
        gradient = ops::MeansGradient<V>{normal.rstd, mean_g.at(e, c), mean_gx.at(e, c)}(
            dz * normal.weight, xhat);
      e.store(to + c, e.load(before + c) + gradient);
    };
    const auto chunk = [&](int64_t begin, int64_t end) { by_vectors<A>(begin, end, element); };
    // `to` is prefetched for base, which usually is the same array.
    if constexpr (kVary == Vary::kWeights)  // sum_rows has read x and dh
      in_chunks(shape.cols, chunk, to);
    else
      in_chunks(shape.cols, chunk, from, above, to);
  }
}

// Whether x, dh, dx and base are all bfloat16, used in place.
inline bool are_bfloats(const NormJob& job) {
  return lies_as<bfloat16>(job.s) && lies_as<bfloat16>(job.dh) && lies_as<bfloat16>(job.dx) &&
         (job.base.data == nullptr || lies_as<bfloat16>(job.base));
}

// base's tile; without a base, a row of -0, which changes nothing when added.
inline Rows<const bfloat16> load_base(const NormOperand& base, char* at, Shape shape,
                                      bfloat16* buffer) {
  if (base.data != nullptr) return rows_of<const bfloat16>(base, at);
  for (int64_t c = 0; c < shape.cols; ++c) buffer[c] = narrow<bfloat16>(-0.0f);
  return {buffer, 0};
}
template <class A>
inline Rows<const A> load_base(const NormOperand& base, char* at, Shape shape, A* buffer) {
  if (base.data != nullptr) return load(base, at, shape, buffer, false);
  for (int64_t c = 0; c < shape.cols; ++c) buffer[c] = A(-0.0);
  return {buffer, 0};
}

// Calls make(dx, base) for a tile, both in x's element type.
template <class B, class A, class Make>
inline void make_dx(Rows<const B>, const NormJob& job, const Strip& strip, int64_t row, int64_t col,
                    Shape shape, const NormScratch<A>& scratch, Make&& make) {
  char* const to = at(job.dx, strip, row, col);
  B *const buffer = reinterpret_cast<B*>(scratch.out), *const zeros =
                                                           reinterpret_cast<B*>(scratch.x);
  const Rows<B> dx = place_of(job.dx, to, buffer, shape);
  make(dx, load_base(job.base, at(job.base, strip, row, col), shape, zeros));
  finish(job.dx, to, buffer, dx, shape);
}

template <NormGradient kKind, Vary kVary, class A>
void differentiate_tile(const NormJob& job, const Strip& strip, int64_t row, int64_t col,
                        Shape shape, const NormScratch<A>& p, bool direct, int64_t statistics_row) {
  const auto with_dh = [&](auto x, auto dh) {
    make_dx(x, job, strip, row, col, shape, p, [&](auto dx, auto base) {
      with_mask(job.activation, [&](auto activation) {
        gradient_tile<kKind, kVary, decltype(activation)>(dx, base, dh, x, p, statistics_row,
                                                          shape);
      });
    });
  };
  with_operands<kVary>(job, strip, row, col, shape, p, direct, statistics_row, with_dh);
}

template <NormGradient kKind, class A>
void gradient_of(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  const bool direct = are_bfloats(job);
  for_strips(job, begin, end, [&](const Strip& strip, bool fresh) {
    if (fresh) {
      spread_normal(scratch, job, strip);
      for (int64_t i = 0; i < job.span; ++i) scratch.shift[i] = scratch.weight[i] * scratch.rstd[i];
      if (kKind == NormGradient::kBatch) {
        spread(scratch.dweight, job.dweight, job, strip);
        spread(scratch.dbias, job.dbias, job, strip);
        for (int64_t i = 0; i < job.span; ++i)
          scratch.dweight[i] /= A(job.count), scratch.dbias[i] /= A(job.count);
      } else if (kKind == NormGradient::kGroup) {
        spread_groups(scratch.dweight, job.dweight, job, strip);
        spread_groups(scratch.dbias, job.dbias, job, strip);
      }
    }
    for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
      if (job.by_lane)
        differentiate_tile<kKind, Vary::kAll>(job, strip, row, col, shape, scratch, direct, 0);
      else
        differentiate_tile<kKind, Vary::kNone>(job, strip, row, col, shape, scratch, direct, row);
    });
  });
  end_stream();
}

template <class A>
void gradient(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  switch (job.gradient) {
    case NormGradient::kBatch:
      return gradient_of<NormGradient::kBatch, A>(job, begin, end, memory);
    case NormGradient::kConstant:
      return gradient_of<NormGradient::kConstant, A>(job, begin, end, memory);
    default:
      return gradient_of<NormGradient::kGroup, A>(job, begin, end, memory);
  }
}

// Layer and RMS norm

// The rows' means of g and of g * xhat, and their terms of the parameters' gradients.
template <class Activation, class D, class X, class A>
REVK_APART void sum_rows(Rows<const D> dh, Rows<const X> x, bool has_mean, Shape shape,
                         NormScratch<A> p) {
  const int64_t channels = shape.cols;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const X* const from = x.data + r * x.step;
    const D* const above = dh.data + r * dh.step;
    const A mean = p.mean[r], rstd = p.rstd[r];
    double sum = 0.0, slope = 0.0;
    for (int64_t begin = 0; begin < channels; begin += kNormTile) {
      const auto add = [&](auto e, auto& of_g, auto& of_gx, int64_t i) {
        const int64_t c = begin + i;
        const ops::Normal<typename decltype(e)::Number> normal{
            e.all(mean), e.all(rstd), e.load(p.weight + c), e.load(p.bias + c)};
        const auto xhat = normal.xhat(e.load(from + c));
        const auto dz = Activation::gradient(normal.z(xhat), e.load(above + c));
        const auto g = dz * normal.weight;
        e.store(p.first + c, e.load(p.first + c) + dz);
        e.store(p.second + c, e.load(p.second + c) + dz * xhat);
        of_g += g;
        of_gx += g * xhat;
      };
      const int64_t count = least(kNormTile, channels - begin);
      const TwoSums<A> sums = two_sums<A>(count, add, from + begin, above + begin);
      sum += double(sums.first);
      slope += double(sums.second);
    }
    p.dbias[r] = has_mean ? A(sum / double(channels)) : A(0);
    p.dweight[r] = A(slope / double(channels));
  }
}

template <class A>
void gradient_rows(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  spread(scratch.weight, job.weight, job, strip_at(job, 0, 0, 0));
  spread(scratch.bias, job.bias, job, strip_at(job, 0, 0, 0));
  const bool direct = are_bfloats(job);
  const A *const means = static_cast<const A*>(job.mean), *const rstds =
                                                              static_cast<const A*>(job.rstd);
  for_blocks(job, begin, end, [&](int64_t, int64_t, int64_t block, int64_t from, int64_t to) {
    clear_sums(job, scratch);
    int64_t unflushed = 0;
    for (int64_t unit = from; unit < to; ++unit) {
      const Strip strip = strip_at(job, 0, 0, unit);
      for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
        for (int64_t r = 0; r < shape.rows; ++r) {
          const int64_t place = strip.start[0] * job.statistics_step[0] +
                                (strip.start[1] + row + r) * job.statistics_step[1];
          scratch.mean[r] = job.has_mean ? means[place] : A(0);
          scratch.rstd[r] = rstds[place];
        }
        // All rows' sums first, so that one row need not wait for the end of another's.
        const auto with_dh = [&](auto x, auto dh) {
          make_dx(x, job, strip, row, col, shape, scratch, [&](auto dx, auto base) {
            with_mask(job.activation, [&](auto activation) {
              using Activation = decltype(activation);
              sum_rows<Activation>(dh, x, job.has_mean, shape, scratch);
              gradient_tile<NormGradient::kGroup, Vary::kWeights, Activation>(dx, base, dh, x,
                                                                              scratch, 0, shape);
            });
          });
        };
        with_operands<Vary::kWeights>(job, strip, row, col, shape, scratch, direct, 0, with_dh);
        unflushed += shape.rows;
        if (unflushed >= kNormFlush) {
          flush_lanes(scratch, job.channels);
          unflushed = 0;
        }
      });
    }
    flush_lanes(scratch, job.channels);
    store_block(job, strip_at(job, 0, 0, from), block, scratch);
  });
  end_stream();
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
