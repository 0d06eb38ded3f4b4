// SPDX-License-Identifier: Apache-2.0
// Prefetches packets with cp.async from global to shared memory, bypassing registers, so that a
// multiprocessor has tens of thousands of bytes in flight whatever its threads are doing. Together
// with three resident blocks, this keeps memory busy.
//
// Refilling a cell needs no barrier or fence. Only one thread reads or writes a cell, and it reads
// (unpack) before it refills (load): the memory clobber keeps that order in the compiler, and PTX
// orders a cp.async after prior instructions of its thread. wait_for_copies orders it before the
// next read.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/norm_act_packet.cuh"
#include "cuda/packet.cuh"
#include "cuda/reduce.cuh"

namespace revk::cuda {

// 16-byte words per packet of type T: 8 elements, or 2 of float64. 0 for single elements.
template <class A, int kSize, class T>
constexpr int kWordsOf = kSize == 1 || std::is_same_v<T, None> ? 0
                         : sizeof(A) == 8                      ? 1
                         : std::is_same_v<T, Any>              ? 2
                                                               : kSize * int(sizeof(T)) / kWord;
template <class A, int kSize, class... Types>
constexpr int kWordsOfAll = (0 + ... + kWordsOf<A, kSize, Types>);

// copy_ahead starts an asynchronous copy from global to shared memory. close_copies commits the
// copies since the last call as one group; wait_for_copies returns when at most kGroups of this
// thread's groups are pending. The data is visible to this thread only.
//
// In a packet of two words each copy takes every other 16 bytes, so the L1 cache should keep the
// sectors for the second copy: bypassing L1 was measured at half the speed.
template <int kWords>
__device__ void copy_ahead(Word& to, const Word& from) {
#if defined(__CUDA_ARCH__)
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(&to));
  if constexpr (kWords > 1)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(&from) : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(&from) : "memory");
#elif !defined(__CUDACC__)
  __pipeline_memcpy_async(&to, &from, sizeof to);  // the host tests' version
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

// A pipeline stage: its number, and this thread's first cell of it in shared memory. A thread's
// next cell is kThreads further.
struct Stage {
  int number, cell;
};

// One operand's packet per pipeline stage, in shared memory instead of registers. Each thread has
// its own cells.
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
// Single elements stay in registers.
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
