// SPDX-License-Identifier: Apache-2.0
// A norm's work on the host, as plain data. The loops that read it are compiled once per
// instruction set.
//
// Memory is viewed as [instance][size 0][size 1][size 2]. Channels lie along size 2, as "lanes" of
// a row, if they are adjacent in memory (channels-last images, tokens); otherwise along size 1,
// each row being a "run" of one channel (NCHW). An NCHW sample with few elements per channel (a
// plane of 4 x 4) is a row of lanes too, with several adjacent lanes per channel. An instance has
// its own statistics: a sample of a group norm; otherwise there is one instance.
//
// Work is partitioned by the shape alone, never by the number of threads, so that sums are the same
// for any number. A strip is a block of sizes 1 and 2. Strips are numbered by instance, by split (a
// range of channels) and by unit (everything else). Consecutive units of one split form a block,
// whose sums are kept.
#pragma once

#include <cstdint>

#include "core/scalar.h"
#include "cpu/job.h"

namespace revk::cpu {

// Elements of a tile; its buffers fit in the L1 cache. A shorter tile means shorter gaps in memory
// traffic during the arithmetic; below this size a tile's fixed cost dominates.
constexpr int64_t kNormTile = 1024;
// The same for the statistics pass. A block's first tile gives the shift: the longer it is, the
// smaller the error for a channel whose first elements are outliers.
constexpr int64_t kNormMeasured = 2048;
// Approximate elements of a strip and of a block.
constexpr int64_t kNormStrip = 16 * 1024;
constexpr int64_t kNormBlock = 64 * 1024;
// Rows summed in the compute type before they are added to a double.
constexpr int64_t kNormFlush = 32;

// An output of at least this many bytes is written with streaming stores. A smaller one may still
// be cached when it is read next; of a larger one the caches keep too little to pay for reading
// each line before overwriting it.
constexpr int64_t kNormStream = 16 << 20;

struct NormOperand : Operand {
  int64_t instance_step;  // bytes
  bool streams;           // an output written with streaming stores
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
  int64_t plane;             // adjacent lanes per channel
  // A split covers `span` of the channel dimension, a unit `chunk` of the other.
  int64_t span, splits, chunk, chunks, units, block_units, blocks;

  NormOperand h, s, x, f;    // forward
  NormOperand dx, base, dh;  // backward, with s as its x; data NULL: absent

  // In the compute type. weight and bias: [channels].
  const void *weight, *bias;
  // [channels], [instances][groups], or for layer and RMS norm at statistics_step
  void *mean, *rstd;
  int64_t statistics_step[2];  // elements, along sizes 0 and 1
  // Backward: [channels] (batch) or [instances][groups] (group: means of g * xhat and g).
  const void *dweight, *dbias;
  double count, eps;

  double* sums;           // [instances][blocks][2][channels]
  int64_t buffer, lanes;  // elements of a buffer and of a parameter array in the scratch
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

// A thread's scratch. buffer and lanes are multiples of 16, so every array is aligned.
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
  // Blocks: statistics (mean, sum of squared deviations), after the coupling if there is one.
  NormPass measure;
  // Strips: normalisation, with the coupling where statistics are given.
  NormPass apply;
  // Blocks of a layer or RMS norm: the whole forward.
  NormPass rows;
  // Blocks: sums of dz and of dz * xhat. Strips: dx. Blocks of a layer or RMS norm: both.
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
