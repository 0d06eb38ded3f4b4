// SPDX-License-Identifier: Apache-2.0
// Packets whose types are known at compile time or at run time only. Norms have up to four operands
// of four types each, and a kernel per combination would make hundreds. The combinations used in
// training have kernels of their own; the others branch on the types after the loads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/scalar.h"
#include "cuda/layout.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/packet.cuh"
#include "ops/coupling.h"

namespace revk::cuda {

struct Any {};   // a type known at run time only
struct None {};  // no operand

// A pointer to global memory at `address`; the compiler must know the state space to use global
// accesses.
template <class T>
__device__ T* pointer(int64_t address) {
#if defined(__CUDA_ARCH__)
  return static_cast<T*>(__cvta_global_to_generic(size_t(address)));
#else
  return reinterpret_cast<T*>(intptr_t(address));
#endif
}

// One 16-byte store: the compiler splits an assignment into float stores, some of them partial.
__device__ inline void store_word(int64_t to, int w, const Word& word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to + w * kWord), "r"(word.part[0]),
               "r"(word.part[1]), "r"(word.part[2]), "r"(word.part[3])
               : "memory");
#else
  at(pointer<Word>(to), w) = word;
#endif
}

// Two elements of a half type in one register, the first in the lower half.
__device__ inline void widen_pair(uint32_t pair, float& first, float& second, bfloat16) {
  first = bits_as<float>(pair << 16), second = bits_as<float>(pair & 0xffff0000u);
}
__device__ inline void widen_pair(uint32_t pair, float& first, float& second, float16) {
  first = widen(float16{uint16_t(pair)}), second = widen(float16{uint16_t(pair >> 16)});
}
template <class T>
__device__ uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return narrow<T>(first).bits | uint32_t(narrow<T>(second).bits) << 16;
#endif
}

// What a thread has loaded of one operand and not yet unpacked: here a single element.
template <class A, int kSize, class T = Any>
struct Raw {
  static_assert(kSize == 1 && std::is_same_v<T, Any>, "packets are specialised below");
  A value;

  __device__ void load(int64_t from, int32_t dtype) {
    value = load_any<A>(pointer<char>(from), 0, dtype);
  }
  __device__ void unpack(A (&to)[1], int32_t) const { to[0] = value; }
};

// 8 elements: one word of a half type, or two of float32.
template <class T>
struct Raw<float, 8, T> {
  Word word[sizeof(T) / 2];

  __device__ void load(int64_t from, int32_t) {
#pragma unroll
    for (int w = 0; w < int(sizeof(T) / 2); ++w) word[w] = at(pointer<const Word>(from), w);
  }
  __device__ void unpack(float (&to)[8], int32_t) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = bits_as<float>(word[e / 4].part[e % 4]);
    } else {
#pragma unroll
      for (int p = 0; p < 4; ++p) widen_pair(word[0].part[p], to[2 * p], to[2 * p + 1], T{});
    }
  }
  // Packs the values, and replaces them by the rounded values.
  __device__ void pack(float (&values)[8]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int e = 0; e < 8; ++e) word[e / 4].part[e % 4] = bits_as<uint32_t>(values[e]);
    } else {
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        word[0].part[p] = narrow_pair<T>(values[2 * p], values[2 * p + 1]);
        widen_pair(word[0].part[p], values[2 * p], values[2 * p + 1], T{});
      }
    }
  }
  __device__ void store(int64_t to) const {
#pragma unroll
    for (int w = 0; w < int(sizeof(T) / 2); ++w) store_word(to, w, word[w]);
  }
};

template <>
struct Raw<float, 8, Any> {
  Word word[2];

  __device__ void load(int64_t from, int32_t dtype) {
    const Word* const words = pointer<const Word>(from);
    const bool wide = dtype == REVK_FLOAT32;
    word[0] = at(words, 0);
    if (wide) word[1] = at(words, 1);
  }
  __device__ void unpack(float (&to)[8], int32_t dtype) const {
    if (dtype == REVK_FLOAT32)
      Raw<float, 8, float>{{word[0], word[1]}}.unpack(to, dtype);
    else if (dtype == REVK_BFLOAT16)
      Raw<float, 8, bfloat16>{{word[0]}}.unpack(to, dtype);
    else
      Raw<float, 8, float16>{{word[0]}}.unpack(to, dtype);
  }
};

template <>
struct Raw<double, 2, Any> {
  Word word[1];

  __device__ void load(int64_t from, int32_t) { word[0] = at(pointer<const Word>(from), 0); }
  __device__ void unpack(double (&to)[2], int32_t) const {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      to[e] = bits_as<double>(word[0].part[2 * e] | uint64_t(word[0].part[2 * e + 1]) << 32);
  }
};

template <class T, class A>
__device__ A put(int64_t to, A value) {
  const T stored = narrow<T>(value);
  *pointer<T>(to) = stored;
  return A(widen(stored));
}

// Writes the values, and replaces them by the stored values.
template <class A>
__device__ void store_rounded(int64_t to, int32_t dtype, A (&values)[1]) {
  switch (dtype) {
    case REVK_FLOAT64:
      values[0] = put<double>(to, values[0]);
      return;
    case REVK_FLOAT32:
      values[0] = put<float>(to, values[0]);
      return;
    case REVK_BFLOAT16:
      values[0] = put<bfloat16>(to, values[0]);
      return;
    default:
      values[0] = put<float16>(to, values[0]);
  }
}

template <class T>
__device__ void store_packet(int64_t to, float (&values)[8]) {
  Raw<float, 8, T> raw;
  raw.pack(values);
  raw.store(to);
}
__device__ inline void store_rounded(int64_t to, int32_t dtype, float (&values)[8]) {
  if (dtype == REVK_FLOAT32)
    store_packet<float>(to, values);
  else if (dtype == REVK_BFLOAT16)
    store_packet<bfloat16>(to, values);
  else
    store_packet<float16>(to, values);
}

__device__ inline void store_rounded(int64_t to, int32_t, double (&values)[2]) {
  Word word;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const uint64_t bits = bits_as<uint64_t>(values[e]);
    word.part[2 * e] = uint32_t(bits), word.part[2 * e + 1] = uint32_t(bits >> 32);
  }
  store_word(to, 0, word);
}

// The same for a type that may be known at compile time.
template <class T, class A, int kSize>
__device__ void store_as(int64_t to, int32_t dtype, A (&values)[kSize]) {
  if constexpr (std::is_same_v<T, Any>)
    store_rounded(to, dtype, values);
  else
    store_packet<T>(to, values);
}

// Calls body(X{}, Y{}) with the types of two dtypes if they occur in training (x a stream, y a
// branch's output: the same type, or y a half type); otherwise with Any.
template <int kSize, class Body>
void with_types_of_training(int32_t x, int32_t y, Body&& body) {
  if constexpr (kSize == 8) {
    if (x == REVK_FLOAT32 && y == REVK_FLOAT32) return body(float{}, float{});
    if (x == REVK_FLOAT32 && y == REVK_BFLOAT16) return body(float{}, bfloat16{});
    if (x == REVK_FLOAT32 && y == REVK_FLOAT16) return body(float{}, float16{});
    if (x == REVK_BFLOAT16 && y == REVK_BFLOAT16) return body(bfloat16{}, bfloat16{});
    if (x == REVK_FLOAT16 && y == REVK_FLOAT16) return body(float16{}, float16{});
  }
  body(Any{}, Any{});
}

// The input of all forward kernels: s as it is, or s = x +- f.
struct Stream {
  Field x, f, s;  // without a coupling all three are s
  NormActCall::Coupling coupling;

  __host__ __device__ static Stream of(const Field& s) { return {s, s, s, NormActCall::kNone}; }

  // values <- s, from x in `values` and f in `added`; also written to `to`, as type X.
  template <class X, class A, int kSize>
  __device__ void join(A (&values)[kSize], const A (&added)[kSize], int64_t to) const {
    const bool plus = coupling == NormActCall::kCouple;
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      values[e] = plus ? ops::Couple{}(values[e], added[e]) : ops::Uncouple{}(values[e], added[e]);
    store_as<X>(to, s.dtype, values);
  }
  // s at these coordinates, with types known at run time.
  template <class A, int kSize>
  __device__ void read(int64_t o, int64_t c, int64_t i, A (&values)[kSize]) const {
    Raw<A, kSize> raw_x, raw_f;
    raw_x.load(x.at(o, c, i), x.dtype);
    if (coupling != NormActCall::kNone) raw_f.load(f.at(o, c, i), f.dtype);
    raw_x.unpack(values, x.dtype);
    if (coupling == NormActCall::kNone) return;
    A added[kSize];
    raw_f.unpack(added, f.dtype);
    join<Any>(values, added, s.at(o, c, i));
  }
};

}  // namespace revk::cuda
