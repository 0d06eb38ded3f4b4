// SPDX-License-Identifier: Apache-2.0
// A norm's work on the host, as plain data: the loops that read it are compiled once per
// instruction set.
//
// Memory is seen as [instance][size 0][size 1][size 2]. Channels lie along size 2, in rows of
// "lanes", where they lie side by side in memory (channels-last images, tokens); along size 1, in
// "runs" of one channel, where they do not (NCHW). A sample of NCHW whose channels are few elements
// each, a plane of 4 x 4, is a row of lanes too, with as many lanes beside each other to a channel.
// An instance has statistics of its own: a sample of a group norm; elsewhere there is one.
//
// Work is cut up by the shape alone, never by the number of threads, so that sums come out the
// same for any number: a strip is a block of sizes 1 and 2; strips are counted by instance, by
// split (a range of channels) and by unit (everything else); consecutive units of one split make up
// a block, whose sums are kept.
#pragma once

#include <cstdint>

#include "core/scalar.h"
#include "cpu/job.h"

namespace revk::cpu {

// Elements of a tile: its buffers stay in the L1 cache. A shorter tile leaves memory idle for less
// long while the arithmetic works on it; below this the tile's own cost counts.
constexpr int64_t kNormTile = 1024;
// The same where statistics are summed. A block's first tile gives the shift; the longer it is, the
// less is lost in a channel that starts far out.
constexpr int64_t kNormMeasured = 2048;
// Elements of a strip and of a block, about.
constexpr int64_t kNormStrip = 16 * 1024;
constexpr int64_t kNormBlock = 64 * 1024;
// Rows that are summed up in the compute type before they are added to a double.
constexpr int64_t kNormFlush = 32;

// Bytes of an output that is written past the caches. Whoever reads a smaller one may find it
// there; of a larger one the caches keep too little to pay for reading each line before it is
// overwritten.
constexpr int64_t kNormStream = 16 << 20;

struct NormOperand : Operand {
  int64_t instance_step;  // bytes
  bool streams;           // an output that is written past the caches
};

enum class NormGradient : int32_t { kBatch, kConstant, kGroup };

struct NormJob {
  bool by_lane;  // channels along size 2
  bool wide;     // the arithmetic is float64
  bool given;    // statistics are read
  bool has_mean;
  int32_t coupling;  // 0: none, 1: s = x + f, 2: s = x - f
  int32_t activation;
  NormGradient gradient;
  int64_t instances, size[3];
  int64_t channels, groups;  // groups 0: each channel has statistics of its own
  int64_t fold;              // dense rows side by side in one row of lanes
  int64_t plane;             // lanes beside each other that are one channel
  // A split has `span` of the channels' dimension, a unit `chunk` of the other.
  int64_t span, splits, chunk, chunks, units, block_units, blocks;

  NormOperand h, s, x, f;    // forward
  NormOperand dx, base, dh;  // backward, with s its x; without data: absent

  // Of the compute type. weight and bias: [channels].
  const void *weight, *bias;
  // [channels], [instances][groups], or for rows at their steps
  void *mean, *rstd;
  int64_t statistics_step[2];  // elements, along sizes 0 and 1
  // Backward: [channels] (batch) or [instances][groups] (group: means of g * xhat and g).
  const void *dweight, *dbias;
  double count, eps;

  double* sums;           // [instances][blocks][2][channels]
  int64_t buffer, lanes;  // elements of a buffer and of a parameter array in a thread's scratch
};

struct Strip {
  int64_t instance, start[3];  // start[0] is an index of size 0
  int64_t rows, cols;
};

REVK_HD int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

REVK_HD Strip strip_at(const NormJob& job, int64_t instance, int64_t split, int64_t unit) {
  const int64_t along = unit % job.chunks * job.chunk, across = split * job.span;
  Strip strip{instance, {unit / job.chunks, 0, 0}, 0, 0};
  strip.start[1] = job.by_lane ? along : across;
  strip.start[2] = job.by_lane ? across : along;
  strip.rows = lesser(job.by_lane ? job.chunk : job.span, job.size[1] - strip.start[1]);
  strip.cols = lesser(job.by_lane ? job.span : job.chunk, job.size[2] - strip.start[2]);
  return strip;
}

// A thread's scratch. buffer and lanes are multiples of 16, so that every array is aligned.
template <class A>
struct NormScratch {
  A *s, *x, *f, *out, *z;                                                     // [buffer]
  A *mean, *rstd, *weight, *bias, *dweight, *dbias, *shift, *first, *second;  // [lanes]
  double *sum, *square;                                                       // [lanes]

  REVK_HD NormScratch(const NormJob& job, char* at) {
    A* next = reinterpret_cast<A*>(at);
    A** const buffers[] = {&s, &x, &f, &out, &z};
    for (A** const buffer : buffers) *buffer = next, next += job.buffer;
    A** const arrays[] = {&mean, &rstd, &weight, &bias, &dweight, &dbias, &shift, &first, &second};
    for (A** const array : arrays) *array = next, next += job.lanes;
    sum = reinterpret_cast<double*>(next);
    square = sum + job.lanes;
  }
};

REVK_HD int64_t scratch_bytes(const NormJob& job) {
  const int64_t item = job.wide ? 8 : 4;
  return 5 * job.buffer * item + (9 * item + 16) * job.lanes;
}

// A pass over strips or blocks begin..end-1. The scratch is aligned to 64 bytes.
using NormPass = void (*)(const NormJob& job, int64_t begin, int64_t end, char* scratch);

struct NormLoops {
  // Blocks: statistics (mean and sum of squared deviations), after the coupling if there is one.
  NormPass measure;
  // Strips: normalise; with the coupling where statistics are given.
  NormPass apply;
  // Blocks of layer and RMS norm: the whole forward.
  NormPass rows;
  // Blocks: sums of dz and of dz * xhat. Strips: dx. Blocks of rows: both.
  NormPass gradient_sums, gradient, gradient_rows;
};

namespace baseline {
extern const NormLoops kNormLoops;
}
namespace avx2 {
extern const NormLoops kNormLoops;
}
namespace avx512 {
extern const NormLoops kNormLoops;
}

}  // namespace revk::cpu
