// SPDX-License-Identifier: Apache-2.0
// The norm's backward loops, compiled once per instruction set.
#pragma once

#include "cpu/norm_rows.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Sums of dz and of dz * xhat

// Channels side by side: a sum for each lane.
template <class Activation, class A>
void sum_lanes(Rows<const A> dh, Rows<const A> x, const NormScratch<A>& p, Shape shape) {
  A *const first = p.first, *const second = p.second;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const A *const from = x.data + r * x.step, *const above = dh.data + r * dh.step;
    REVK_INDEPENDENT
    for (int64_t l = 0; l < shape.cols; ++l) {
      const ops::Normal<A> normal{p.mean[l], p.rstd[l], p.weight[l], p.bias[l]};
      const A xhat = normal.xhat(from[l]), dz = Activation::gradient(normal.z(xhat), above[l]);
      first[l] += dz;
      second[l] += dz * xhat;
    }
  }
}

// A channel in a run: a sum for each row of the tile.
template <class Activation, class A>
void sum_runs(Rows<const A> dh, Rows<const A> x, const NormScratch<A>& p, int64_t row,
              Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    const A *const from = x.data + r * x.step, *const above = dh.data + r * dh.step;
    const int64_t c = row + r;
    const ops::Normal<A> normal{p.mean[c], p.rstd[c], p.weight[c], p.bias[c]};
    alignas(64) A first[kPartials] = {}, second[kPartials] = {};
    in_partials(shape.cols, [&](int64_t i, int64_t k) {
      const A xhat = normal.xhat(from[i]), dz = Activation::gradient(normal.z(xhat), above[i]);
      first[k] += dz;
      second[k] += dz * xhat;
    });
    p.sum[c] += double(total(first));
    p.square[c] += double(total(second));
  }
}

// dh's tile, or dz where the loops are not to differentiate the activation themselves.
template <class A>
Rows<const A> load_dz(const NormJob& job, const Strip& strip, int64_t row, int64_t col, Shape shape,
                      Rows<const A> x, const NormScratch<A>& scratch) {
  const Rows<const A> dh = load(job.dh, at(job.dh, strip, row, col), shape, scratch.f, false);
  if (job.by_lane) return differentiated<Vary::kAll>(job.activation, dh, x, scratch, 0, shape);
  return differentiated<Vary::kNone>(job.activation, dh, x, scratch, row, shape);
}

template <class A>
void flush_lanes(const NormScratch<A>& scratch, int64_t count) {
  flush(scratch.sum, scratch.first, count);
  flush(scratch.square, scratch.second, count);
}

// What a block has summed up, to its place: dbias, then dweight.
template <class A>
void store_block(const NormJob& job, const Strip& strip, int64_t block,
                 const NormScratch<A>& scratch) {
  double* const dbias = job.sums + (strip.instance * job.blocks + block) * 2 * job.channels +
                        strip.start[job.by_lane ? 2 : 1];
  double* const dweight = dbias + job.channels;
  const int64_t count = channels_of(job, strip) / (job.by_lane ? job.fold : 1);
  for (int64_t c = 0; c < count; ++c) dbias[c] = scratch.sum[c], dweight[c] = scratch.square[c];
  if (!job.by_lane) return;
  for (int64_t k = 1; k < job.fold; ++k)
    for (int64_t c = 0, l = k * job.channels; c < count; ++c, ++l)
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
  for_blocks(job, begin, end,
             [&](int64_t instance, int64_t split, int64_t block, int64_t from, int64_t to) {
               clear_sums(job, scratch);
               const Strip head = strip_at(job, instance, split, from);
               spread_normal(scratch, job, head);
               int64_t unflushed = 0;
               for (int64_t unit = from; unit < to; ++unit) {
                 const Strip strip = strip_at(job, instance, split, unit);
                 for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
                   const Rows<const A> x = source(job, strip, row, col, shape, scratch);
                   const Rows<const A> dh = load_dz(job, strip, row, col, shape, x, scratch);
                   with_mask(job.activation, [&](auto activation) {
                     if (job.by_lane)
                       sum_lanes<decltype(activation)>(dh, x, scratch, shape);
                     else
                       sum_runs<decltype(activation)>(dh, x, scratch, row, shape);
                   });
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

// In these loops p.dweight and p.dbias are a batch norm's sums, or a group norm's means of g * xhat
// and of g; p.shift is the batch norm's factor, weight * rstd.
template <NormGradient kKind, Vary kVary, class Activation, class A>
void gradient_tile(Rows<A> dx, Rows<const A> base, Rows<const A> dh, Rows<const A> x,
                   const NormScratch<A>& p, int64_t row, A count, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    A* const to = dx.data + r * dx.step;
    const A *const from = x.data + r * x.step, *const above = dh.data + r * dh.step;
    const A* const before = base.data + r * base.step;
    const auto element = [&](int64_t c, int64_t i) {
      const ops::Normal<A> normal{p.mean[i], p.rstd[i], p.weight[i], p.bias[i]};
      const A xhat = normal.xhat(from[c]), dz = Activation::gradient(normal.z(xhat), above[c]);
      A gradient;
      if constexpr (kKind == NormGradient::kBatch)
        gradient = ops::BatchGradient<A>{p.shift[i], p.dweight[i], p.dbias[i], count}(dz, xhat);
      else if constexpr (kKind == NormGradient::kConstant)
        gradient = p.shift[i] * dz;
      else
        gradient = ops::RowGradient<A>{p.rstd[i], p.dbias[i], p.dweight[i]}(dz * p.weight[i], xhat);
      to[c] = before[c] + gradient;
    };
    REVK_INDEPENDENT
    for (int64_t c = 0; c < shape.cols; ++c) element(c, kVary == Vary::kAll ? c : row + r);
  }
}

// base's tile; without one, a row of the zero that changes nothing when it is added: -0.
template <class A>
inline Rows<const A> load_base(const NormJob& job, const Strip& strip, int64_t row, int64_t col,
                               Shape shape, A* buffer) {
  if (job.base.data != nullptr)
    return load(job.base, at(job.base, strip, row, col), shape, buffer, false);
  for (int64_t c = 0; c < shape.cols; ++c) buffer[c] = A(-0.0);
  return {buffer, 0};
}

template <class A>
inline Rows<A> place_of(const NormOperand& operand, char* to, A* buffer, Shape shape) {
  if (usable_in_place<A>(operand))
    return {reinterpret_cast<A*>(to), operand.step[1] / int64_t(sizeof(A))};
  return {buffer, shape.cols};
}

template <NormGradient kKind, class A>
void gradient_of(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  for_strips(job, begin, end, [&](const Strip& strip, bool fresh) {
    if (fresh) {
      spread_normal(scratch, job, strip);
      for (int64_t i = 0; i < job.span; ++i) scratch.shift[i] = scratch.weight[i] * scratch.rstd[i];
      if (kKind == NormGradient::kBatch) {
        spread(scratch.dweight, job.dweight, job, strip);
        spread(scratch.dbias, job.dbias, job, strip);
      } else if (kKind == NormGradient::kGroup) {
        spread_groups(scratch.dweight, job.dweight, job, strip);
        spread_groups(scratch.dbias, job.dbias, job, strip);
      }
    }
    for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
      const Rows<const A> x = source(job, strip, row, col, shape, scratch);
      const Rows<const A> dh = load_dz(job, strip, row, col, shape, x, scratch);
      const Rows<const A> base = load_base(job, strip, row, col, shape, scratch.x);
      char* const to = at(job.dx, strip, row, col);
      const Rows<A> dx = place_of(job.dx, to, scratch.out, shape);
      with_mask(job.activation, [&](auto activation) {
        using Activation = decltype(activation);
        if (job.by_lane)
          gradient_tile<kKind, Vary::kAll, Activation>(dx, base, dh, x, scratch, 0, A(job.count),
                                                       shape);
        else
          gradient_tile<kKind, Vary::kNone, Activation>(dx, base, dh, x, scratch, row, A(job.count),
                                                        shape);
      });
      if (dx.data == scratch.out) scatter_any(to, scratch.out, job.dx, shape);
    });
  });
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

// Layer and RMS norm, row by row: g and xhat of a row wait in L1 for their means.
template <class Activation, class A>
void gradient_row(const NormJob& job, A* dx, const A* base, const A* dh, const A* x, A mean, A rstd,
                  const NormScratch<A>& p, A* g, A* xhat) {
  // Named here, for the compiler cannot know that no store changes `p` or `job`.
  A *const first = p.first, *const second = p.second;
  const A *const weight = p.weight, *const bias = p.bias;
  const int64_t channels = job.channels;
  REVK_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c) {
    const ops::Normal<A> normal{mean, rstd, weight[c], bias[c]};
    const A standard = normal.xhat(x[c]), dz = Activation::gradient(normal.z(standard), dh[c]);
    xhat[c] = standard;
    g[c] = dz * normal.weight;
    first[c] += dz;
    second[c] += dz * standard;
  }
  double sum = 0.0, slope = 0.0;
  for (int64_t from = 0; from < channels; from += kNormTile) {
    alignas(64) A of_g[kPartials] = {}, of_gx[kPartials] = {};
    in_partials(least(kNormTile, channels - from), [&](int64_t i, int64_t k) {
      of_g[k] += g[from + i];
      of_gx[k] += g[from + i] * xhat[from + i];
    });
    sum += double(total(of_g));
    slope += double(total(of_gx));
  }
  const double n = double(channels);
  const ops::RowGradient<A> gradient{rstd, job.has_mean ? A(sum / n) : A(0), A(slope / n)};
  REVK_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c) dx[c] = base[c] + gradient(g[c], xhat[c]);
}

template <class A>
void gradient_rows(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  spread(scratch.weight, job.weight, job, strip_at(job, 0, 0, 0));
  spread(scratch.bias, job.bias, job, strip_at(job, 0, 0, 0));
  const A *const means = static_cast<const A*>(job.mean), *const rstds =
                                                              static_cast<const A*>(job.rstd);
  for_blocks(job, begin, end, [&](int64_t, int64_t, int64_t block, int64_t from, int64_t to) {
    clear_sums(job, scratch);
    int64_t unflushed = 0;
    for (int64_t unit = from; unit < to; ++unit) {
      const Strip strip = strip_at(job, 0, 0, unit);
      for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
        const Rows<const A> x = source(job, strip, row, col, shape, scratch);
        for (int64_t r = 0; r < shape.rows; ++r) {
          const int64_t place = strip.start[0] * job.statistics_step[0] +
                                (strip.start[1] + row + r) * job.statistics_step[1];
          scratch.mean[r] = job.has_mean ? means[place] : A(0);
          scratch.rstd[r] = rstds[place];
        }
        const Rows<const A> dh = differentiated<Vary::kWeights>(
            job.activation, load(job.dh, at(job.dh, strip, row, col), shape, scratch.f, false), x,
            scratch, 0, shape);
        const Rows<const A> base = load_base(job, strip, row, col, shape, scratch.x);
        char* const to_dx = at(job.dx, strip, row, col);
        const Rows<A> dx = place_of(job.dx, to_dx, scratch.out, shape);
        with_mask(job.activation, [&](auto activation) {
          for (int64_t r = 0; r < shape.rows; ++r)
            gradient_row<decltype(activation)>(
                job, dx.data + r * dx.step, base.data + r * base.step, dh.data + r * dh.step,
                x.data + r * x.step, scratch.mean[r], scratch.rstd[r], scratch, scratch.dbias,
                scratch.dweight);
        });
        if (dx.data == scratch.out) scatter_any(to_dx, scratch.out, job.dx, shape);
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
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
