// SPDX-License-Identifier: Apache-2.0
// Loads and stores between memory and compute-type registers.
#pragma once

#include <cstdint>

#include "core/scalar.h"
#include "cuda/layout.cuh"

namespace revk::cuda {

struct alignas(kWord) Word {
  uint32_t part[4];
};

// Returns a reference, because the host tests' sanitizer checks the alignment of references.
template <class AnyWord>
__device__ AnyWord& at(AnyWord* words, int w) {
  return words[w];
}

// Elements per packet: a 16-byte access of the narrower type, and one, two or four such accesses of
// the wider type (an fp32 stream += a bf16 branch: 8 elements, 16 bytes of bf16, 2 x 16 bytes of
// fp32).
template <class Stream, class Branch>
constexpr int kPacket =
    kWord / int(sizeof(Stream) < sizeof(Branch) ? sizeof(Stream) : sizeof(Branch));

// `count` < kSize at the end of a row; the remaining elements are zero and not touched in memory.
// Every loop unrolls fully: an index unknown at compile time would put the array into local memory.
template <class T, int kSize>
struct Packet {
  static_assert(kSize * sizeof(T) % kWord == 0, "a packet is whole words");
  union {
    Word word[kSize * sizeof(T) / kWord];
    T element[kSize];
  };

  __device__ void load(const T* from, int count) {
    if (count == kSize) {
#pragma unroll
      for (int w = 0; w < int(sizeof(word) / kWord); ++w)
        word[w] = at(reinterpret_cast<const Word*>(from), w);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) element[e] = e < count ? from[e] : T{};
    }
  }
  __device__ void store(T* to, int count) const {
    if (count == kSize) {
#pragma unroll
      for (int w = 0; w < int(sizeof(word) / kWord); ++w)
        at(reinterpret_cast<Word*>(to), w) = word[w];
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        if (e < count) to[e] = element[e];
    }
  }
};

// Loads one element whose type is known at run time only. The strided path pays a uniform branch
// per access, and one kernel serves every combination of types.
template <class A>
__device__ A load_any(const void* data, int64_t at, int32_t dtype) {
  switch (dtype) {
    case REVK_FLOAT64:
      return A(static_cast<const double*>(data)[at]);
    case REVK_FLOAT32:
      return A(static_cast<const float*>(data)[at]);
    case REVK_BFLOAT16:
      return A(widen(static_cast<const bfloat16*>(data)[at]));
    default:
      return A(widen(static_cast<const float16*>(data)[at]));
  }
}

__device__ inline uint64_t stored_bits(double value) { return bits_as<uint64_t>(value); }
__device__ inline uint64_t stored_bits(float value) { return bits_as<uint32_t>(value); }
__device__ inline uint64_t stored_bits(bfloat16 value) { return value.bits; }
__device__ inline uint64_t stored_bits(float16 value) { return value.bits; }
__device__ inline uint64_t stored_bits(int16_t value) { return uint16_t(value); }

template <class T, class A, class Walk>
__device__ void store_one(void* data, int64_t at, A value, Walk& walk) {
  const T stored = narrow<T>(value);
  static_cast<T*>(data)[at] = stored;
  walk.result(stored);
}

template <class A, class Walk>
__device__ void store_any(void* data, int64_t at, int32_t dtype, A value, Walk& walk) {
  switch (dtype) {
    case REVK_FLOAT64:
      return store_one<double>(data, at, value, walk);
    case REVK_FLOAT32:
      return store_one<float>(data, at, value, walk);
    case REVK_BFLOAT16:
      return store_one<bfloat16>(data, at, value, walk);
    default:
      return store_one<float16>(data, at, value, walk);
  }
}

}  // namespace revk::cuda
