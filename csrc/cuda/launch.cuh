// SPDX-License-Identifier: Apache-2.0
// The loop and the launch that every kernel shares. Nothing here waits, allocates or touches
// another stream than the caller's, so that every kernel can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "core/scalar.h"
#include "cuda/device.cuh"
#include "cuda/layout.cuh"
#include "cuda/reduce.cuh"
#include "revkernels/revkernels.h"

namespace revk::cuda {

// Enough blocks to fill every multiprocessor a few times over: a block
// that ends early is replaced at once, and the loop's own cost (one
// block-wide reduction, one pair of atomics) is spread over many items.
constexpr int kBlocksPerMultiprocessor = 32;

// Calls body(spot, count) for each of this thread's
// items, `count` being kPacketSize except at a row's end.
template <int kPacketSize, int kOperands, class Body>
__device__ void for_each_item(const Layout<kOperands>& layout, Body&& body) {
  const int64_t span = int64_t(gridDim.x) * kThreads;
// A packet is enough loads at a time; a second copy of the body would be registers and spills.
#pragma unroll 1
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < layout.items;
       item += span) {
    const Spot spot = locate(layout, item, kPacketSize);
    const int64_t left = layout.row_size - spot.first;
    body(spot, left < kPacketSize ? int(left) : kPacketSize);
  }
}

// Starts `kernel` on the caller's stream with that many blocks. No blocks, no launch.
template <class... Parameters>
void launch_blocks(const char* name, void (*kernel)(Parameters...), int64_t blocks,
                   const revk_where& where, std::common_type_t<Parameters>... arguments) {
  if (blocks == 0) return;
  // The most of a grid. A larger number would be cut off to 32 bits, and run as a smaller one.
  if (blocks > INT32_MAX)
    throw unsupported(std::string(name) + ": this shape needs " + std::to_string(blocks) +
                      " blocks, a CUDA grid has 2147483647 at most");
  const DeviceGuard guard(where.device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Parameters>(arguments)...), name);
}

// The same with a thread for each item, as far as the device's size makes that useful: the loop
// does the rest.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t items, const revk_where& where,
            std::common_type_t<Parameters>... arguments) {
  if (items == 0) return;
  const int64_t most = int64_t(multiprocessors(where.device)) * kBlocksPerMultiprocessor;
  launch_blocks(name, kernel, std::min((items + kThreads - 1) / kThreads, most), where,
                std::forward<Parameters>(arguments)...);
}

// Calls body(T{}) with the type behind a dtype code.
template <class Body>
void with_type(int32_t dtype, Body&& body) {
  switch (dtype) {
    case REVK_FLOAT64:
      return body(double{});
    case REVK_FLOAT32:
      return body(float{});
    case REVK_BFLOAT16:
      return body(bfloat16{});
    case REVK_FLOAT16:
      return body(float16{});
    default:
      throw invalid("dtype: got code " + std::to_string(dtype) + ", needs one of revk_dtype");
  }
}

}  // namespace revk::cuda
