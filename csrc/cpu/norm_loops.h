// SPDX-License-Identifier: Apache-2.0
// The norm's forward loops, compiled once per instruction set.
#pragma once

#include "cpu/norm_rows.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Statistics

// A shift near the mean, from a block's first tile of a channel.
template <class A, class X>
void choose_shift(const NormJob& job, Rows<const X> s, int64_t row, Shape shape, A* shift) {
  if (!job.by_lane) {
    for (int64_t r = 0; r < shape.rows; ++r)
      shift[row + r] = sum_of<A>(s.data + r * s.step, shape.cols) / A(shape.cols);
    return;
  }
  for (int64_t l = 0; l < shape.cols; ++l) shift[l] = A(widen(s.data[l]));
  for (int64_t r = 1; r < shape.rows; ++r)
    for (int64_t l = 0; l < shape.cols; ++l) shift[l] += A(widen(s.data[r * s.step + l]));
  for (int64_t l = 0; l < shape.cols; ++l) shift[l] /= A(shape.rows);
}

// Merges the lanes of each plane (means and squared deviations over n elements each) into one; the
// l-th plane's result goes to lane l.
inline void merge_planes(const NormJob& job, int64_t planes, double n, double* means,
                         double* squares) {
  for (int64_t l = 0; l < planes; ++l) {
    const double *const own = means + l * job.plane, *const square = squares + l * job.plane;
    double total = 0.0, apart = 0.0, inside = 0.0;
    for (int64_t k = 0; k < job.plane; ++k) total += own[k];
    const double mean = total / double(job.plane);
    for (int64_t k = 0; k < job.plane; ++k) {
      apart += (own[k] - mean) * (own[k] - mean);
      inside += square[k];
    }
    means[l] = mean;
    squares[l] = inside + apart * n;
  }
}

// Turns the block's sums around the shifts into each channel's mean and sum of squared deviations.
template <class A>
void finish_block(const NormJob& job, const Strip& strip, int64_t count,
                  const NormScratch<A>& scratch, double* means, double* squares) {
  double n = double(count), *const mean = scratch.sum, *const square = scratch.square;
  const int64_t channels = channels_of(job, strip), lanes = job.fold * channels * job.plane;
  const A* const shift = scratch.shift;
  REVK_INDEPENDENT
  for (int64_t l = 0; l < lanes; ++l) {
    const double sum = mean[l], off = sum / n;
    mean[l] = double(shift[l]) + off;
    square[l] -= sum * off;
  }
  if (job.plane > 1) {
    merge_planes(job, job.fold * channels, n, mean, square);
    n *= double(job.plane);
  }
  for (int64_t c = 0; c < channels; ++c) means[c] = mean[c], squares[c] = square[c];
  for (int64_t k = 1; k < job.fold; ++k) {  // the lanes of folded rows, each with its own shift
    const double share = 1.0 / double(k + 1), weight = n * double(k) * share;
    for (int64_t c = 0, l = k * channels; c < channels; ++c, ++l) {
      const double apart = mean[l] - means[c];
      means[c] += apart * share;
      squares[c] += square[l] + apart * apart * weight;
    }
  }
}

// Adds a tile to the sums: per lane in the compute type, or per row.
template <class A, class X>
REVK_APART void sum_tile(const NormJob& job, Rows<const X> s, int64_t row, Shape shape,
                         const NormScratch<A>& scratch) {
  A *const first = scratch.first, *const second = scratch.second;
  const A* const shift = scratch.shift;
  for (int64_t r = 0; r < shape.rows; ++r) {
    const X* const x = s.data + r * s.step;
    if (!job.by_lane) {
      sum_deviations(x, shape.cols, shift[row + r], scratch.sum[row + r], scratch.square[row + r]);
      continue;
    }
    const auto chunk = [&](int64_t begin, int64_t end) {
      REVK_INDEPENDENT
      for (int64_t l = begin; l < end; ++l) {
        const A deviation = A(widen(x[l])) - shift[l];
        first[l] += deviation;
        second[l] += deviation * deviation;
      }
    };
    in_chunks(shape.cols, chunk, x);
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
                   const bool is_first = unit == from && (job.by_lane ? row : col) == 0;
                   with_source(job, strip, row, col, shape, scratch, [&](auto s) {
                     if (is_first) choose_shift(job, s, row, shape, scratch.shift);
                     sum_tile(job, s, row, shape, scratch);
                   });
                   unflushed += job.by_lane ? shape.rows : 0;
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
                                    first_channel(job, strip);
               finish_block(job, strip, count, scratch, sums, sums + job.channels);
             });
  end_stream();
}

// Application

// h's tile, with elements of type H.
template <Vary kVary, class H, class X, class A>
void normalise_as(const NormJob& job, char* to, H* buffer, Shape shape, Rows<const X> x,
                  const NormScratch<A>& p, int64_t statistics_row, Upcoming upcoming) {
  const Rows<H> h = place_of(job.h, to, buffer, shape);
  if (job.activation == REVK_RELU) {
    normalise<kVary, ops::Relu>(h, x, p, statistics_row, shape);
  } else if (job.activation == REVK_IDENTITY) {
    normalise<kVary, ops::Identity>(h, x, p, statistics_row, shape);
  } else {
    const Rows<A> z{p.z, shape.cols};
    normalise<kVary, ops::Identity>(z, x, p, statistics_row, shape);
    with_transcendental(job.activation, [&](auto activation) {
      activate_rows<decltype(activation)>(h, p.z, shape, upcoming);
    });
  }
  finish(job.h, to, buffer, h, shape);
}

template <Vary kVary, class X, class A>
void normalise_tile(const NormJob& job, const Strip& strip, int64_t row, int64_t col, Shape shape,
                    Rows<const X> x, const NormScratch<A>& p, int64_t statistics_row) {
  char* const to = at(job.h, strip, row, col);
  Upcoming upcoming;
  upcoming.add(job.coupling == 0 ? job.s : job.x, strip, row, col, shape);
  if (job.coupling != 0) upcoming.add(job.f, strip, row, col, shape);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (lies_as<bfloat16>(job.h))
      return normalise_as<kVary>(job, to, reinterpret_cast<bfloat16*>(p.out), shape, x, p,
                                 statistics_row, upcoming);
  }
  normalise_as<kVary>(job, to, p.out, shape, x, p, statistics_row, upcoming);
}

template <class A>
void apply(const NormJob& job, int64_t begin, int64_t end, char* memory) {
  const NormScratch<A> scratch(job, memory);
  for_strips(job, begin, end, [&](const Strip& strip, bool fresh) {
    if (fresh) spread_normal(scratch, job, strip);
    for_tiles(job, strip, [&](int64_t row, int64_t col, Shape shape) {
      with_source(job, strip, row, col, shape, scratch, [&](auto s) {
        if (job.by_lane)
          normalise_tile<Vary::kAll>(job, strip, row, col, shape, s, scratch, 0);
        else
          normalise_tile<Vary::kNone>(job, strip, row, col, shape, s, scratch, row);
      });
    });
  });
  end_stream();
}

// Layer and RMS norm: a row holds all the data of its statistics and is still in L1 when they are
// known.

// Statistics of a tile's rows. Each step loops over all rows, so that one row need not wait for the
// end of another's sums.
//
// The shift is the mean of a row's first eighth, which saves most of a pass. If it is at distance D
// from the row's mean, the variance is at least D^2 / 8: squares around such a shift, and so their
// rounding error, are at most nine times those around the mean.
template <class A, class X>
REVK_APART void measure_rows(const NormJob& job, Rows<const X> s, Shape shape,
                             const NormScratch<A>& to) {
  const int64_t eighth = (job.channels / 8 + kPartials - 1) / kPartials * kPartials;
  const int64_t few = least(job.channels, eighth > 0 ? eighth : kPartials);
  for (int64_t r = 0; r < shape.rows; ++r) {
    to.shift[r] = job.has_mean ? sum_of<A>(s.data + r * s.step, few) / A(few) : A(0);
    to.sum[r] = to.square[r] = 0.0;
  }
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t c = 0; c < job.channels; c += kNormTile)
      sum_deviations(s.data + r * s.step + c, least(kNormTile, job.channels - c), to.shift[r],
                     to.sum[r], to.square[r]);
  const double n = double(job.channels);
  for (int64_t r = 0; r < shape.rows; ++r) {
    const double off = job.has_mean ? to.sum[r] / n : 0.0, variance = to.square[r] / n - off * off;
    to.mean[r] = A(double(to.shift[r]) + off);
    to.rstd[r] = A(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + job.eps));
  }
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
        A* const means = static_cast<A*>(job.mean);
        A* const rstds = static_cast<A*>(job.rstd);
        const int64_t first = strip.start[0] * job.statistics_step[0] +
                              (strip.start[1] + row) * job.statistics_step[1];
        with_source(job, strip, row, col, shape, scratch, [&](auto s) {
          if (!job.given) measure_rows(job, s, shape, scratch);
          for (int64_t r = 0; r < shape.rows; ++r) {
            const int64_t place = first + r * job.statistics_step[1];
            if (job.given) {
              scratch.mean[r] = job.has_mean ? means[place] : A(0);
              scratch.rstd[r] = rstds[place];
            } else {
              if (job.has_mean) means[place] = scratch.mean[r];
              rstds[place] = scratch.rstd[r];
            }
          }
          normalise_tile<Vary::kWeights>(job, strip, row, col, shape, s, scratch, 0);
        });
      });
    }
  });
  end_stream();
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
