// SPDX-License-Identifier: Apache-2.0
// Packets, of types that the compiler knows or that are known at run time only: norms have up to
// four operands of four types each, and a kernel for every combination would be hundreds. Those of
// training have theirs; the others branch on the types, behind the loads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/scalar.h"
#include "cuda/layout.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/packet.cuh"
#include "ops/coupling.h"

namespace revk::cuda {

struct Any {};   // a type that is known at run time only
struct None {};  // no operand

// What a thread has read of one operand and not yet looked at: here a single element.
template <class A, int kSize, class T = Any>
struct Raw {
  static_assert(kSize == 1 && std::is_same_v<T, Any>, "packets are specialised below");
  A value;

  __device__ void load(const Field& field, int64_t offset) {
    value = load_any<A>(field.at<char>(offset), 0, field.dtype);
  }
  __device__ void unpack(A (&to)[1], const Field&) const { to[0] = value; }
};

// 8 elements: one word of a half type, or two of float32.
template <class T>
struct Raw<float, 8, T> {
  union {
    Word word[sizeof(T) / 2];
    T element[8];
  };

  __device__ void load(const Field& field, int64_t offset) {
#pragma unroll
    for (int w = 0; w < int(sizeof(T) / 2); ++w) word[w] = at(field.at<const Word>(offset), w);
  }
  __device__ void unpack(float (&to)[8], const Field&) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = widen(element[e]);
  }
};

template <>
struct Raw<float, 8, Any> {
  union {
    Word word[2];
    float single[8];
    uint16_t half[16];
  };

  __device__ void load(const Field& field, int64_t offset) {
    const bool wide = field.dtype == REVK_FLOAT32;
    const Word* from = field.at<const Word>(offset);
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
struct Raw<double, 2, Any> {
  union {
    Word word[1];
    double value[2];
  };

  __device__ void load(const Field& field, int64_t offset) {
    word[0] = at(field.at<const Word>(offset), 0);
  }
  __device__ void unpack(double (&to)[2], const Field&) const {
    to[0] = value[0], to[1] = value[1];
  }
};

// What a packet takes in registers, in bytes; not knowing its type takes some more.
template <int kSize, class T>
constexpr int kBytes = std::is_same_v<T, None>  ? 0
                       : std::is_same_v<T, Any> ? 40
                                                : kSize * int(sizeof(T));
// Units that a thread of the slices' kernels loads before it looks at the first, each having
// operands of these types: enough to keep the memory busy, and not so many that they spill.
template <int kSize, class... Types>
constexpr int kAtOnce = kSize == 1                               ? 4
                        : (0 + ... + kBytes<kSize, Types>) <= 16 ? 4
                        : (0 + ... + kBytes<kSize, Types>) <= 64 ? 2
                                                                 : 1;

template <class T, class A>
__device__ A put(const Field& field, int64_t offset, A value) {
  const T stored = narrow<T>(value);
  *field.at<T>(offset) = stored;
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
  Word* to = field.at<Word>(offset);
  at(to, 0) = raw.word[0];
  if (wide) at(to, 1) = raw.word[1];
}

__device__ inline void store_rounded(const Field& field, int64_t offset, double (&values)[2]) {
  Raw<double, 2> raw;
  raw.value[0] = values[0], raw.value[1] = values[1];
  at(field.at<Word>(offset), 0) = raw.word[0];
}

// The same for a type that the compiler may know.
template <class T, class A, int kSize>
__device__ void store_as(const Field& field, int64_t offset, A (&values)[kSize]) {
  if constexpr (std::is_same_v<T, Any>) {
    store_rounded(field, offset, values);
  } else {
    Raw<A, kSize, T> raw;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      raw.element[e] = narrow<T>(values[e]);
      values[e] = widen(raw.element[e]);
    }
#pragma unroll
    for (int w = 0; w < int(sizeof(T) / 2); ++w) at(field.at<Word>(offset), w) = raw.word[w];
  }
}

// Calls body(X{}, Y{}) with the types behind two dtypes where they are those of training: a stream
// and what a branch gives, both alike or the latter of a half type; else with Any.
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

// What all forward kernels begin with: s as it is, or s = x +- f.
struct Stream {
  Field x, f, s;  // without a coupling all three are s
  NormActCall::Coupling coupling;

  __host__ __device__ static Stream of(const Field& s) { return {s, s, s, NormActCall::kNone}; }

  // What has been loaded of one packet. X is the type of x and of s; F is that of f, or None.
  template <class A, int kSize, class X, class F>
  struct Loaded {
    Raw<A, kSize, X> x;
    Raw<A, kSize, std::conditional_t<std::is_same_v<F, None>, X, F>> f;
  };
  template <class A, int kSize, class X, class F>
  __device__ void load(Loaded<A, kSize, X, F>& loaded, int64_t x_at, int64_t f_at) const {
    loaded.x.load(x, x_at);
    if (coupled<F>()) loaded.f.load(f, f_at);
  }
  // The packet, coupled and written where that is asked for.
  template <class A, int kSize, class X, class F>
  __device__ void finish(const Loaded<A, kSize, X, F>& loaded, int64_t s_at,
                         A (&values)[kSize]) const {
    loaded.x.unpack(values, x);
    if (!coupled<F>()) return;
    A added[kSize];
    loaded.f.unpack(added, f);
    const bool plus = coupling == NormActCall::kCouple;
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      values[e] = plus ? ops::Couple{}(values[e], added[e]) : ops::Uncouple{}(values[e], added[e]);
    store_as<X>(s, s_at, values);
  }
  // Both, at these coordinates.
  template <class A, int kSize>
  __device__ void read(int64_t o, int64_t c, int64_t i, A (&values)[kSize]) const {
    Loaded<A, kSize, Any, Any> loaded;
    load(loaded, x.offset(o, c, i), f.offset(o, c, i));
    finish(loaded, s.offset(o, c, i), values);
  }

 private:
  template <class F>
  __device__ bool coupled() const {
    if (std::is_same_v<F, None>) return false;
    return !std::is_same_v<F, Any> || coupling != NormActCall::kNone;
  }
};

}  // namespace revk::cuda
