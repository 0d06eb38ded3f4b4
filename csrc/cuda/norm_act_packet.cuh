// SPDX-License-Identifier: Apache-2.0
// Packets whose type is known at run time only: norms have up to four operands of four types each,
// and a kernel for every combination would be hundreds. The words of all operands are loaded before
// the first is looked at, so that the uniform branch on the type costs no latency.
#pragma once

#include <cstdint>

#include "core/scalar.h"
#include "cuda/layout.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/packet.cuh"
#include "ops/coupling.h"

namespace revk::cuda {

template <class T>
__device__ const T* element_at(const Field& field, int64_t offset) {
  return static_cast<const T*>(field.data) + offset;
}

// What a thread has read of one operand and not yet looked at: here a single element of any type.
template <class A, int kSize>
struct Raw {
  static_assert(kSize == 1, "packets are specialised below");
  A value;

  __device__ void load(const Field& field, int64_t offset) {
    value = load_any<A>(field.data, offset, field.dtype);
  }
  __device__ void unpack(A (&to)[1], const Field&) const { to[0] = value; }
};

// 8 elements: one word of a half type, or two of float32.
template <>
struct Raw<float, 8> {
  union {
    Word word[2];
    float single[8];
    uint16_t half[16];
  };

  __device__ void load(const Field& field, int64_t offset) {
    const bool wide = field.dtype == REVK_FLOAT32;
    const Word* from = reinterpret_cast<const Word*>(static_cast<const char*>(field.data) +
                                                     offset * (wide ? 4 : 2));
    word[0] = at(from, 0);
    if (wide) word[1] = at(from, 1);
  }
  __device__ void unpack(float (&to)[8], const Field& field) const {
    if (field.dtype == REVK_FLOAT32) {
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = single[e];
    } else if (field.dtype == REVK_BFLOAT16) {
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = widen(bfloat16{half[e]});
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = widen(float16{half[e]});
    }
  }
};

template <>
struct Raw<double, 2> {
  union {
    Word word[1];
    double value[2];
  };

  __device__ void load(const Field& field, int64_t offset) {
    word[0] = at(reinterpret_cast<const Word*>(element_at<double>(field, offset)), 0);
  }
  __device__ void unpack(double (&to)[2], const Field&) const {
    to[0] = value[0], to[1] = value[1];
  }
};

template <class T, class A>
__device__ A put(const Field& field, int64_t offset, A value) {
  const T stored = narrow<T>(value);
  static_cast<T*>(field.data)[offset] = stored;
  return A(widen(stored));
}

// Writes the values, and leaves in them what was stored.
template <class A>
__device__ void store_rounded(const Field& field, int64_t offset, A (&values)[1]) {
  switch (field.dtype) {
    case REVK_FLOAT64:
      values[0] = put<double>(field, offset, values[0]);
      return;
    case REVK_FLOAT32:
      values[0] = put<float>(field, offset, values[0]);
      return;
    case REVK_BFLOAT16:
      values[0] = put<bfloat16>(field, offset, values[0]);
      return;
    default:
      values[0] = put<float16>(field, offset, values[0]);
  }
}

__device__ inline void store_rounded(const Field& field, int64_t offset, float (&values)[8]) {
  Raw<float, 8> raw;
  const bool wide = field.dtype == REVK_FLOAT32;
  if (wide) {
#pragma unroll
    for (int e = 0; e < 8; ++e) raw.single[e] = values[e];
  } else if (field.dtype == REVK_BFLOAT16) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      raw.half[e] = narrow<bfloat16>(values[e]).bits;
      values[e] = widen(bfloat16{raw.half[e]});
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      raw.half[e] = narrow<float16>(values[e]).bits;
      values[e] = widen(float16{raw.half[e]});
    }
  }
  Word* to = reinterpret_cast<Word*>(static_cast<char*>(field.data) + offset * (wide ? 4 : 2));
  at(to, 0) = raw.word[0];
  if (wide) at(to, 1) = raw.word[1];
}

__device__ inline void store_rounded(const Field& field, int64_t offset, double (&values)[2]) {
  Raw<double, 2> raw;
  raw.value[0] = values[0], raw.value[1] = values[1];
  at(reinterpret_cast<Word*>(static_cast<double*>(field.data) + offset), 0) = raw.word[0];
}

// What all forward kernels begin with: s as it is, or s = x +- f.
struct Stream {
  Field x, f, s;  // x and f only where there is a coupling
  NormActCall::Coupling coupling;

  // The packet at these coordinates, coupled and written where that is asked for.
  template <class A, int kSize>
  __device__ void read(int64_t o, int64_t c, int64_t i, A (&values)[kSize]) const {
    Raw<A, kSize> stream;
    if (coupling == NormActCall::kNone) {
      stream.load(s, s.offset(o, c, i));
      stream.unpack(values, s);
      return;
    }
    Raw<A, kSize> branch;
    stream.load(x, x.offset(o, c, i));
    branch.load(f, f.offset(o, c, i));
    A added[kSize];
    stream.unpack(values, x);
    branch.unpack(added, f);
    const bool plus = coupling == NormActCall::kCouple;
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      values[e] = plus ? ops::Couple{}(values[e], added[e]) : ops::Uncouple{}(values[e], added[e]);
    store_rounded(s, s.offset(o, c, i), values);
  }
};

}  // namespace revk::cuda
