// SPDX-License-Identifier: Apache-2.0
// totals[i] <- totals[i] + parts[i] for a list. Gradients are hundreds of small arrays, and a
// launch for each would cost more than the additions; so one launch takes as many as fit into a
// kernel's arguments.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/backends.h"
#include "core/scalar.h"
#include "cuda/launch.cuh"
#include "cuda/layout.cuh"
#include "cuda/packet.cuh"
#include "ops/coupling.h"

namespace revk::cuda {
namespace {

// Fits into 4 KB, the limit of a kernel's arguments before CUDA 12.1 and on older drivers.
constexpr int kShares = 112;
constexpr int kPacketsAThread = 4;  // per chunk: enough to pay for finding the chunk's array

// Dense arrays of one pair of types, cut into consecutively numbered chunks.
struct Shares {
  int64_t chunks;
  int32_t count;
  bool words[kShares];  // both pointers lie on 16-byte boundaries
  int64_t first_chunk[kShares];
  int64_t size[kShares];  // in elements
  void* total[kShares];
  const void* part[kShares];
};
static_assert(sizeof(Shares) <= 4096, "a kernel's arguments");

template <class Total, class Part>
__device__ Total sum(Total total, Part part) {
  using A = typename compute_type<Total, Part>::type;
  return narrow<Total>(ops::Couple{}(A(widen(total)), A(widen(part))));
}

template <class Total, class Part>
__global__ void __launch_bounds__(kThreads)
    accumulate_shares(const __grid_constant__ Shares shares) {
  constexpr int kSize = kPacket<Total, Part>;
  constexpr int64_t kChunk = int64_t(kThreads) * kSize * kPacketsAThread;
  for (int64_t chunk = blockIdx.x; chunk < shares.chunks; chunk += gridDim.x) {
    int share = 0;
    for (int beyond = shares.count; beyond - share > 1;) {
      const int middle = (share + beyond) / 2;
      if (shares.first_chunk[middle] <= chunk)
        share = middle;
      else
        beyond = middle;
    }
    Total* const total = static_cast<Total*>(shares.total[share]);
    const Part* const part = static_cast<const Part*>(shares.part[share]);
    const int64_t start = (chunk - shares.first_chunk[share]) * kChunk;
    const int64_t left = shares.size[share] - start, end = start + (left < kChunk ? left : kChunk);
    if (!shares.words[share]) {
      for (int64_t i = start + threadIdx.x; i < end; i += kThreads)
        total[i] = sum(total[i], part[i]);
      continue;
    }
#pragma unroll 1
    for (int64_t i = start + int64_t(threadIdx.x) * kSize; i < end; i += kThreads * kSize) {
      const int count = end - i < kSize ? int(end - i) : kSize;
      Packet<Total, kSize> sums;
      Packet<Part, kSize> parts;
      sums.load(total + i, count);
      parts.load(part + i, count);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums.element[e] = sum(sums.element[e], parts.element[e]);
      sums.store(total + i, count);
    }
  }
}

bool is_flat(const Layout<2>& layout) {
  const bool one_row = layout.rows == 1 && layout.planes == 1;
  return one_row && layout.operand[0].step == 1 && layout.operand[1].step == 1;
}

// Launches all flat pairs of one pair of types, kShares per launch.
template <class Total, class Part>
void launch_shares(const std::vector<Layout<2>>& flat, const revk_where& where) {
  constexpr int64_t kChunk = int64_t(kThreads) * kPacket<Total, Part> * kPacketsAThread;
  for (size_t from = 0; from < flat.size(); from += kShares) {
    Shares shares{};
    shares.count = int32_t(std::min<size_t>(kShares, flat.size() - from));
    for (int i = 0; i < shares.count; ++i) {
      const Layout<2>& pair = flat[from + i];
      shares.first_chunk[i] = shares.chunks;
      shares.size[i] = pair.row_size;
      shares.total[i] = pair.operand[0].data;
      shares.part[i] = pair.operand[1].data;
      shares.words[i] = takes_words(pair, 1);
      shares.chunks += (pair.row_size + kChunk - 1) / kChunk;
    }
    launch("accumulate", accumulate_shares<Total, Part>, shares.chunks * kThreads, where, shares);
  }
}

}  // namespace

// One launch per pair of types and kShares arrays; an array that is not dense gets its own launch.
void accumulate(const revk_view* totals, const revk_view* parts, int64_t count,
                const revk_where& where) {
  constexpr int kTypes = 4;
  std::vector<Layout<2>> flat[kTypes][kTypes];
  for (int64_t i = 0; i < count; ++i) {
    const revk_view &total = totals[i], &part = parts[i];
    if (total.outer == 0 || total.channels == 0 || total.inner == 0) continue;
    const Layout<2> pair = merge<2>({&total, &part}, true);
    if (is_flat(pair) && count > 1)
      flat[total.dtype][part.dtype].push_back(pair);
    else
      couple(total, total, part, nullptr, where);
  }
  for (int total = 0; total < kTypes; ++total)
    for (int part = 0; part < kTypes; ++part)
      if (!flat[total][part].empty())
        with_type(total, [&](auto t) {
          with_type(part, [&](auto p) {
            launch_shares<decltype(t), decltype(p)>(flat[total][part], where);
          });
        });
}

}  // namespace revk::cuda
