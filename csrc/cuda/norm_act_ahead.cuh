// SPDX-License-Identifier: Apache-2.0
// Packets that are under way while others are worked on: copied from global to shared memory
// without a stop in registers, so that a multiprocessor has tens of thousands of bytes on their way
// whatever its threads are busy with. That, and room for three blocks, is what keeps the memory
// busy.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/norm_act_packet.cuh"
#include "cuda/packet.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// Words of one packet of type T: of 8 elements, or of 2 of float64. Single elements are none.
template <class A, int kSize, class T>
constexpr int kWordsOf = kSize == 1 || std::is_same_v<T, None> ? 0
                         : sizeof(A) == 8                      ? 1
                         : std::is_same_v<T, Any>              ? 2
                                                               : kSize * int(sizeof(T)) / kWord;
template <class A, int kSize, class... Types>
constexpr int kWordsOfAll = (0 + ... + kWordsOf<A, kSize, Types>);

// Starts a copy from global to shared memory that passes no register; `close_copies` makes those
// since the last one a group, and `wait_for_copies` returns when no more than kGroups of this
// thread's groups are under way. What has arrived is there for this thread alone.
//
// Of a packet of two words each copy takes every other 16 bytes: the L1 cache is to keep the
// sectors for the second one. Past it such packets were measured at half of the speed.
template <int kWords>
__device__ void copy_ahead(Word& to, const Word& from) {
#if defined(__CUDA_ARCH__)
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(&to));
  if constexpr (kWords > 1)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(&from) : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(&from) : "memory");
#elif !defined(__CUDACC__)
  __pipeline_memcpy_async(&to, &from, sizeof to);  // the tests' on the host
#endif
}
__device__ inline void close_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  __pipeline_commit();
#endif
}
template <int kGroups>
__device__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#elif !defined(__CUDACC__)
  __pipeline_wait_prior(kGroups);
#endif
}

// One of the places for what is under way: its number, and this thread's first cell in shared
// memory; its next is kThreads on.
struct Stage {
  int number, cell;
};

// A packet of one operand that a thread has under way in each stage: in shared memory, so that many
// of them take no registers. Each thread has its cells to itself.
template <class A, int kSize, class T, int kStages>
struct Ahead {
  static constexpr int kWords = kWordsOf<A, kSize, T>;
  Word* const cells;

  __device__ explicit Ahead(Word (*cells)[kThreads]) : cells(*cells) {}
  __device__ void load(Stage stage, int64_t from, int32_t dtype) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      if (w == 0 || !std::is_same_v<T, Any> || dtype == REVK_FLOAT32)
        copy_ahead<kWords>(cells[stage.cell + w * kThreads], at(pointer<const Word>(from), w));
  }
  __device__ void unpack(Stage stage, A (&to)[kSize], int32_t dtype) const {
    Raw<A, kSize, T> raw;
#pragma unroll
    for (int w = 0; w < kWords; ++w) raw.word[w] = cells[stage.cell + w * kThreads];
    raw.unpack(to, dtype);
  }
};
// In registers, which are enough for single elements.
template <class A, class T, int kStages>
struct Ahead<A, 1, T, kStages> {
  Raw<A, 1> raw[kStages];

  __device__ explicit Ahead(Word (*)[kThreads]) {}
  __device__ void load(Stage stage, int64_t from, int32_t dtype) {
    raw[stage.number].load(from, dtype);
  }
  __device__ void unpack(Stage stage, A (&to)[1], int32_t dtype) const {
    raw[stage.number].unpack(to, dtype);
  }
};

}  // namespace revk::cuda
