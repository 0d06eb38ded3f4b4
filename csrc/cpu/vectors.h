// SPDX-License-Identifier: Apache-2.0
// Loops along a row in vectors of the compute type, compiled once per instruction set.
//
// Compilers vectorise such loops badly where bfloat16 is read or written (they pack the masks of
// every comparison) and where a row is short (they keep its partial sums in memory).
#pragma once

#include "cpu/rows.h"

// Values that must stay in registers must not be passed to a function by address.
#define REVK_INLINED __attribute__((always_inline))

namespace revk::cpu::REVK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// `Anywhere` is a vector in memory, which need not be aligned.
template <class T>
struct VectorTypes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Anywhere __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorTypes<T>::Vector;

// What a loop's body computes with: one element, or a vector of them (Elements). The arithmetic and
// the roundings are the same.
template <class A>
struct Element {
  using Number = A;
  static constexpr int kCount = 1;

  template <class T>
  static A load(const T* from) {
    return A(widen(*from));
  }
  template <class T>
  static void store(T* to, A value) {
    *to = narrow<T>(value);
  }
  // Stores the value and returns it as stored.
  static float stored(bfloat16* to, float value) {
    const uint32_t rounded = rounded_to_bfloat16(value);
    to->bits = uint16_t(rounded >> 16);
    return bits_as<float>(rounded);
  }
  static A all(A value) { return value; }
};

template <class A>
struct Elements {
  using Number = Vector<A>;
  using Bits = Vector<uint32_t>;
  static constexpr int kCount = kVectorBytes / int(sizeof(A));
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

  static Number load(const A* from) {
    return *reinterpret_cast<const typename VectorTypes<A>::Anywhere*>(from);
  }
  static Number load(const bfloat16* from) {
    static_assert(sizeof(A) == sizeof(float));
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Number(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Number(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
    return Number(__builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Bits) << 16);
#endif
  }

  static void store(A* to, Number value) {
    *reinterpret_cast<typename VectorTypes<A>::Anywhere*>(to) = value;
  }
  static void store(bfloat16* to, Number value) { store_upper(to, above_rounded_off(value)); }
  static Number stored(bfloat16* to, Number value) {
    const Bits rounded = above_rounded_off(value);
    store_upper(to, rounded);
    return Number(rounded & 0xffff0000u);
  }

  static Number all(A value) { return value - Number{}; }  // value + 0 would lose the sign of -0

 protected:
  // As in scalar.h.
  static Bits above_rounded_off(Number value) {
    static_assert(sizeof(A) == sizeof(float));
    const Bits bits = Bits(value);
    return value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static void store_upper(bfloat16* to, Bits bits) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(__m512i(bits), 16)));
#elif defined(__AVX2__)
    const __m256i upper = _mm256_srli_epi32(__m256i(bits), 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
#else
    *reinterpret_cast<Narrow*>(to) = __builtin_convertvector(bits >> 16, Narrow);
#endif
  }
};

#if defined(__AVX512F__)
#define REVK_VECTOR_PARTS

// The first elements of a vector, fewer than it has. The others load as 0 and are not stored.
template <class A>
struct Part : Elements<A> {
  using Number = Vector<A>;
  __mmask16 mask;

  explicit Part(int64_t count) : mask(first_of_16(count)) {}

  Number load(const float* from) const { return Number(_mm512_maskz_loadu_ps(mask, from)); }
  Number load(const double* from) const {
    return Number(_mm512_maskz_loadu_pd(__mmask8(mask), from));
  }
  Number load(const bfloat16* from) const {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, from);
    return Number(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  void store(float* to, Number value) const { _mm512_mask_storeu_ps(to, mask, __m512(value)); }
  void store(double* to, Number value) const {
    _mm512_mask_storeu_pd(to, __mmask8(mask), __m512d(value));
  }
  void store(bfloat16* to, Number value) const {
    store_upper(to, Elements<A>::above_rounded_off(value));
  }
  Number stored(bfloat16* to, Number value) const {
    const auto rounded = Elements<A>::above_rounded_off(value);
    store_upper(to, rounded);
    return Number(rounded & 0xffff0000u);
  }
  // `value` with the other elements set to 0.
  Number only(Number value) const {
    if constexpr (sizeof(A) == sizeof(double))
      return Number(_mm512_maskz_mov_pd(__mmask8(mask), __m512d(value)));
    else
      return Number(_mm512_maskz_mov_ps(mask, __m512(value)));
  }

 private:
  void store_upper(bfloat16* to, typename Elements<A>::Bits bits) const {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(__m512i(bits), 16)));
  }
};
// Handles the elements that do not fill a vector.
template <class A>
using RestOf = Part<A>;
#else
template <class A>
using RestOf = Element<A>;
#endif

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define REVK_VECTOR_FMA

// a * b + c, rounded once
REVK_INLINED inline Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_fmadd_ps(a, b, c));
#else
  return Vector<float>(_mm256_fmadd_ps(a, b, c));
#endif
}
// Both propagate a NaN in x: these instructions return their second operand if either is NaN.
REVK_INLINED inline Vector<float> at_most(Vector<float> x, Vector<float> most) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_min_ps(most, x));
#else
  return Vector<float>(_mm256_min_ps(most, x));
#endif
}
REVK_INLINED inline Vector<float> at_least(Vector<float> x, Vector<float> least) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_max_ps(least, x));
#else
  return Vector<float>(_mm256_max_ps(least, x));
#endif
}
#endif

// Calls body(E, i) for elements begin..end-1, E::kCount of them from i on: first in `Vectors`, then
// the rest in a partial vector or one by one.
template <class A, class Vectors = Elements<A>, class Rest = RestOf<A>, class Body>
REVK_INLINED inline void by_vectors(int64_t begin, int64_t end, Body&& body) {
  int64_t i = begin;
  for (; i + Vectors::kCount <= end; i += Vectors::kCount) body(Vectors{}, i);
  if constexpr (Rest::kCount > 1) {
    if (i < end) body(Rest(end - i), i);
    return;
  }
  for (; i < end; ++i) {
    asm("");  // too few to be vectorised
    body(Element<A>{}, i);
  }
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
