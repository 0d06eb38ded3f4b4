// SPDX-License-Identifier: Apache-2.0
// The norm's forward loops, compiled once per instruction set.
#pragma once

#include "cpu/norm_rows.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Statistics

// A shift near the mean, from the first tile that a block sees of a channel.
template <class A>
void choose_shift(const NormJob& job, Rows<const A> s, int64_t row, Shape shape, A* shift) {
  if (!job.by_lane) {
    for (int64_t r = 0; r < shape.rows; ++r)
      shift[row + r] = sum_of(s.data + r * s.step, shape.cols) / A(shape.cols);
    return;
  }
  for (int64_t l = 0; l < shape.cols; ++l) shift[l] = s.data[l];
  for (int64_t r = 1; r < shape.rows; ++r)
    for (int64_t l = 0; l < shape.cols; ++l) shift[l] += s.data[r * s.step + l];
  for (int64_t l = 0; l < shape.cols; ++l) shift[l] /= A(shape.rows);
}

// The block's sums around the shifts as each channel's mean and sum of squared deviations.
template <class A>
void finish_block(const NormJob& job, const Strip& strip, int64_t count,
                  const NormScratch<A>& scratch, double* means, double* squares) {
  const double n = double(count), *const sum = scratch.sum, *const square = scratch.square;
  const A* const shift = scratch.shift;
  const int64_t channels = job.by_lane && job.fold > 1 ? job.channels : channels_of(job, strip);
  for (int64_t c = 0; c < channels; ++c) {
    means[c] = double(shift[c]) + sum[c] / n;
    squares[c] = square[c] - sum[c] * (sum[c] / n);
  }
  if (!job.by_lane) return;
  for (int64_t k = 1; k < job.fold; ++k) {  // the lanes of folded rows, each with its own shift
    const double share = 1.0 / double(k + 1), weight = n * double(k) * share;
    for (int64_t c = 0, l = k * job.channels; c < channels; ++c, ++l) {
      const double apart = double(shift[l]) + sum[l] / n - means[c];
      means[c] += apart * share;
      squares[c] += square[l] - sum[l] * (sum[l] / n) + apart * apart * weight;
    }
  }
}

template <class A>
void measure(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  for_blocks(job, begin, end,
             [&](int64_t instance, int64_t split, int64_t block, int64_t from, int64_t to) {
               for (int64_t i = 0; i < job.span; ++i) {
                 scratch.sum[i] = scratch.square[i] = 0.0;
                 scratch.first[i] = scratch.second[i] = A(0);
               }
               int64_t count = 0, unflushed = 0;
               for (int64_t unit = from; unit < to; ++unit) {
                 const Strip strip = strip_at(job, instance, split, unit);
                 for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
                   const Rows<const A> s = source(job, strip, row, col, shape, scratch);
                   const bool is_first = unit == from && (job.by_lane ? row : col) == 0;
                   if (is_first) choose_shift(job, s, row, shape, scratch.shift);
                   if (!job.by_lane) {
                     for (int64_t r = 0; r < shape.rows; ++r)
                       sum_deviations(s.data + r * s.step, shape.cols, scratch.shift[row + r],
                                      scratch.sum[row + r], scratch.square[row + r]);
                     return;
                   }
                   for (int64_t r = 0; r < shape.rows; ++r) {
                     const A* const x = s.data + r * s.step;
                     A *const first = scratch.first, *const second = scratch.second;
                     const A* const shift = scratch.shift;
                     REVK_INDEPENDENT
                     for (int64_t l = 0; l < shape.cols; ++l) {
                       const A deviation = x[l] - shift[l];
                       first[l] += deviation;
                       second[l] += deviation * deviation;
                     }
                   }
                   unflushed += shape.rows;
                   if (unflushed >= kNormFlush) {
                     flush(scratch.sum, scratch.first, shape.cols);
                     flush(scratch.square, scratch.second, shape.cols);
                     unflushed = 0;
                   }
                 });
                 count += job.by_lane ? strip.rows : strip.cols;
               }
               const Strip strip = strip_at(job, instance, split, from);
               if (job.by_lane) {
                 flush(scratch.sum, scratch.first, strip.cols);
                 flush(scratch.square, scratch.second, strip.cols);
               }
               double* const sums = job.sums + (instance * job.blocks + block) * 2 * job.channels +
                                    strip.start[job.by_lane ? 2 : 1];
               finish_block(job, strip, count, scratch, sums, sums + job.channels);
             });
}

// Application

template <Vary kVary, class A>
void normalise_tile(const NormJob& job, const Strip& strip, int64_t row, int64_t col, Shape shape,
                    Rows<const A> x, const NormScratch<A>& p, int64_t statistics_row) {
  char* const to = at(job.h, strip, row, col);
  const bool direct = usable_in_place<A>(job.h);
  const Rows<A> h = direct ? Rows<A>{reinterpret_cast<A*>(to), job.h.step[1] / int64_t(sizeof(A))}
                           : Rows<A>{p.out, shape.cols};
  if (job.activation == REVK_RELU)
    normalise<kVary, ops::Relu>(h, x, p, statistics_row, shape);
  else
    normalise<kVary, ops::Identity>(h, x, p, statistics_row, shape);
  if (is_transcendental(job.activation)) activate(job.activation, h, shape);
  if (!direct) scatter_any(to, p.out, job.h, shape);
}

template <class A>
void apply(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  for_strips(job, begin, end, [&](const Strip& strip, bool fresh) {
    if (fresh) spread_normal(scratch, job, strip);
    for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
      const Rows<const A> s = source(job, strip, row, col, shape, scratch);
      if (job.by_lane)
        normalise_tile<Vary::kAll>(job, strip, row, col, shape, s, scratch, 0);
      else
        normalise_tile<Vary::kNone>(job, strip, row, col, shape, s, scratch, row);
    });
  });
}

// Layer and RMS norm: a row has all that its statistics need, and is still in L1 when they are
// known.

template <class A>
void measure_row(const NormJob& job, const A* x, A& mean, A& rstd) {
  const double n = double(job.channels);
  A shift = A(0);
  if (job.has_mean)
    shift = sum_of(x, least(job.channels, kNormTile)) / A(least(job.channels, kNormTile));
  double sum = 0.0, square = 0.0;
  for (int64_t c = 0; c < job.channels; c += kNormTile)
    sum_deviations(x + c, least(kNormTile, job.channels - c), shift, sum, square);
  if (!job.has_mean) {
    rstd = A(1.0 / __builtin_sqrt(square / n + job.eps));
    return;
  }
  const double off = sum / n, variance = square / n - off * off;
  mean = A(double(shift) + off);
  rstd = A(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + job.eps));
}

template <class A>
void rows(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  spread(scratch.weight, job.weight, job, strip_at(job, 0, 0, 0));
  spread(scratch.bias, job.bias, job, strip_at(job, 0, 0, 0));
  for_blocks(job, begin, end, [&](int64_t, int64_t, int64_t, int64_t from, int64_t to) {
    for (int64_t unit = from; unit < to; ++unit) {
      const Strip strip = strip_at(job, 0, 0, unit);
      for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
        const Rows<const A> s = source(job, strip, row, col, shape, scratch);
        const int64_t first = strip.start[0] * job.statistics_step[0] +
                              (strip.start[1] + row) * job.statistics_step[1];
        A* const means = static_cast<A*>(job.mean);
        A* const rstds = static_cast<A*>(job.rstd);
        for (int64_t r = 0; r < shape.rows; ++r) {
          const int64_t place = first + r * job.statistics_step[1];
          A mean = A(0), rstd;
          if (job.given) {
            if (job.has_mean) mean = means[place];
            rstd = rstds[place];
          } else {
            measure_row(job, s.data + r * s.step, mean, rstd);
            if (job.has_mean) means[place] = mean;
            rstds[place] = rstd;
          }
          scratch.mean[r] = mean;
          scratch.rstd[r] = rstd;
        }
        normalise_tile<Vary::kWeights>(job, strip, row, col, shape, s, scratch, 0);
      });
    }
  });
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
