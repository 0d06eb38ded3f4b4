// SPDX-License-Identifier: Apache-2.0
// Reduces one value per thread to one value per block. Sums are integers and maxima are exact, so
// no order of blocks or threads changes a result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace revk::cuda {

constexpr int kThreads = 256;  // per block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Max {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a > b ? a : b; }
};

// Reduces over all threads of the block; T{} is the identity. Only thread 0 gets the result. Every
// thread must call it, and only once per (T, Join) in a kernel: a second call would need a barrier
// before it.
template <class T, class Join>
__device__ T reduce_block(T value, Join join) {
  __shared__ T partial[kWarps];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
  for (int away = kWarp / 2; away > 0; away /= 2)
    value = join(value, __shfl_down_sync(~0u, value, away));
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  if (warp > 0) return T{};
  value = lane < kWarps ? partial[lane] : T{};
#pragma unroll
  for (int away = kWarps / 2; away > 0; away /= 2)
    value = join(value, __shfl_down_sync(~0u, value, away));
  return value;
}

__device__ inline void add_to(uint64_t* total, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(value));
}

// *total = max(*total, value) for float bits with the sign cleared. Such bits order as signed
// integers, with NaN above infinity, and above any negative start value. Only a negative NaN
// already in *total orders below them; it is replaced by a NaN.
__device__ inline void raise_to(float* total, uint32_t magnitude) {
  constexpr uint32_t kMinusInfinity = 0xff800000u, kNaN = 0x7fc00000u;
  int* bits = reinterpret_cast<int*>(total);
  const uint32_t before = uint32_t(atomicMax(bits, int(magnitude)));
  if (before > kMinusInfinity) atomicMax(bits, int(kNaN));
}

}  // namespace revk::cuda
