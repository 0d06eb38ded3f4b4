// SPDX-License-Identifier: Apache-2.0
// A job on the host: out = x + f or x - f over strided memory. couple and uncouple are one job,
// reverse_step is two, accumulate is a list. Plain data: the loops that read it are compiled once
// per instruction set.
#pragma once

#include <cstdint>

namespace revk::cpu {

// Elements of a tile: three buffers of the compute type fit in the L1 cache beside the operands'
// own lines.
constexpr int64_t kTile = 1024;

struct Operand {
  char* data;
  int64_t step[3];  // bytes, in the job's order of dimensions
  int32_t dtype;
};

// A coupling's options beyond the plain sum. The steps tell how an index grows along the job's
// dimensions.
struct Extras {
  const void* channel_scale;  // of the compute type; nullptr: 1
  const void* sample_scale;
  int64_t rows_per_sample;
  int64_t channel_step[3], outer_step[3], index_step[3];
  int32_t grid_exponent;  // REVK_NO_GRID: no grid
  bool checksum, amax;
  Operand value;  // an int16 stream's numbers; data nullptr: none
};

struct Job {
  int64_t size[3];  // in the order of out's memory, outermost first
  Operand out, x, f;
  bool subtract;
  bool wide;                         // the arithmetic is float64
  const Extras* extras;              // nullptr: the plain sum
  int64_t tile_rows, tile_cols;      // a tile is a block of the last two dimensions
  int64_t tiles_down, tiles_across;  // tiles per plane
  int64_t tiles;
};

// A thread's checksum and amax. Integer sums and maxima are the same in any order.
struct Report {
  uint64_t checksum = 0;
  // The largest |result| as stored: with the sign cleared, floats order like their bits, NaN on
  // top. For an int16 stream: the largest before wrapping, in steps, in the compute type.
  uint64_t amax_bits = 0;
};

using RunTiles = void (*)(const Job& job, int64_t begin, int64_t end, Report& report);

// One per instruction set, from tiles.h.
namespace baseline {
void run_tiles(const Job& job, int64_t begin, int64_t end, Report& report);
}
namespace avx2 {
void run_tiles(const Job& job, int64_t begin, int64_t end, Report& report);
}
namespace avx512 {
void run_tiles(const Job& job, int64_t begin, int64_t end, Report& report);
}

}  // namespace revk::cpu
