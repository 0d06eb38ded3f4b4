// SPDX-License-Identifier: Apache-2.0
// The loop and the launch that all kernels share. Nothing here synchronises, allocates or touches
// another stream than the caller's, so every kernel can be captured in a CUDA graph.
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

// Enough blocks to fill every multiprocessor several times: a finished block is replaced at once,
// and the loop's fixed cost (one block-wide reduction, one pair of atomics) is spread over many
// items.
constexpr int kBlocksPerMultiprocessor = 32;

// Calls body(spot, count) for each of this thread's items; `count` is kPacketSize except at a row's
// end.
template <int kPacketSize, int kOperands, class Body>
__device__ void for_each_item(const Layout<kOperands>& layout, Body&& body) {
  const int64_t span = int64_t(gridDim.x) * kThreads;
// One packet already has enough loads in flight; unrolling would cost registers and spill.
#pragma unroll 1
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < layout.items;
       item += span) {
    const Spot spot = locate(layout, item, kPacketSize);
    const int64_t left = layout.row_size - spot.first;
    body(spot, left < kPacketSize ? int(left) : kPacketSize);
  }
}

// Launches `kernel` on the caller's stream with `blocks` blocks. No launch for 0 blocks.
template <class... Parameters>
void launch_blocks(const char* name, void (*kernel)(Parameters...), int64_t blocks,
                   const revk_where& where, std::common_type_t<Parameters>... arguments) {
  if (blocks == 0) return;
  // The largest grid. A larger number would be truncated to 32 bits and launch too few blocks.
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

// Launches one thread per item, but no more blocks than the device can use: the loop handles the
// rest.
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
