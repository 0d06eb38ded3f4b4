// SPDX-License-Identifier: Apache-2.0
// Several vectors of floats as one number, compiled once per instruction set.
//
// A transcendental function is one long dependency chain, and a processor's out-of-order window is
// too short to overlap it with the next vector's. So four vectors take every step together.
#pragma once

#include "cpu/vectors.h"

namespace revk::cpu::REVK_ISA {
namespace {

#if defined(REVK_VECTOR_FMA)
// The number type that ops/norm_act.h computes with: kVectors vectors of floats.
template <int kVectors>
struct Bundle {
  using V = Vector<float>;
  using I = Vector<int32_t>;
  using U = Vector<uint32_t>;
  struct Mask {
    I of[kVectors];
  };
  V of[kVectors];

  Bundle() = default;
  REVK_INLINED Bundle(float value) {
    *this = made([&](int) { return Elements<float>::all(value); });
  }

  template <class Make>
  static REVK_INLINED Bundle made(Make&& make) {
    Bundle result;
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) result.of[k] = make(k);
    return result;
  }
  template <class Make>
  static REVK_INLINED Mask masked(Make&& make) {
    Mask result;
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) result.of[k] = make(k);
    return result;
  }

  friend REVK_INLINED Bundle operator+(const Bundle& a, const Bundle& b) {
    return made([&](int k) { return a.of[k] + b.of[k]; });
  }
  friend REVK_INLINED Bundle operator-(const Bundle& a, const Bundle& b) {
    return made([&](int k) { return a.of[k] - b.of[k]; });
  }
  friend REVK_INLINED Bundle operator*(const Bundle& a, const Bundle& b) {
    return made([&](int k) { return a.of[k] * b.of[k]; });
  }
  friend REVK_INLINED Bundle operator/(const Bundle& a, const Bundle& b) {
    return made([&](int k) { return a.of[k] / b.of[k]; });
  }
  friend REVK_INLINED Bundle operator-(const Bundle& a) {
    return made([&](int k) { return -a.of[k]; });
  }
  friend REVK_INLINED Mask operator<(const Bundle& a, const Bundle& b) {
    return masked([&](int k) { return a.of[k] < b.of[k]; });
  }
  friend REVK_INLINED Bundle where(const Mask& mask, const Bundle& a, const Bundle& b) {
    return made([&](int k) { return mask.of[k] ? a.of[k] : b.of[k]; });
  }
  friend REVK_INLINED Bundle magnitude(const Bundle& a) {
    return made([&](int k) { return V(U(a.of[k]) & 0x7fffffffu); });
  }
  friend REVK_INLINED Bundle to_exponent(const Bundle& a) {
    return made([&](int k) { return V(U(a.of[k]) << 23); });
  }
  friend REVK_INLINED Bundle fused(const Bundle& a, const Bundle& b, const Bundle& c) {
    return made([&](int k) { return fused(a.of[k], b.of[k], c.of[k]); });
  }
  friend REVK_INLINED Bundle at_most(const Bundle& a, const Bundle& most) {
    return made([&](int k) { return at_most(a.of[k], most.of[k]); });
  }
  friend REVK_INLINED Bundle at_least(const Bundle& a, const Bundle& least) {
    return made([&](int k) { return at_least(a.of[k], least.of[k]); });
  }
};

// The element type of a loop's body (vectors.h): kVectors vectors of elements.
template <int kVectors>
struct Bundles {
  using Number = Bundle<kVectors>;
  using Each = Elements<float>;
  static constexpr int kCount = kVectors * Each::kCount;

  template <class T>
  static REVK_INLINED Number load(const T* from) {
    return Number::made([&](int k) { return Each::load(from + k * Each::kCount); });
  }
  template <class T>
  static REVK_INLINED void store(T* to, const Number& value) {
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) Each::store(to + k * Each::kCount, value.of[k]);
  }
};

#if defined(REVK_VECTOR_PARTS)
// The first elements of a vector, as a bundle of one.
struct BundleRest {
  using Number = Bundle<1>;
  static constexpr int kCount = Part<float>::kCount;
  Part<float> part;

  explicit BundleRest(int64_t count) : part(count) {}
  template <class T>
  REVK_INLINED Number load(const T* from) const {
    return Number::made([&](int) { return part.load(from); });
  }
  template <class T>
  REVK_INLINED void store(T* to, const Number& value) const {
    part.store(to, value.of[0]);
  }
};
#else
using BundleRest = Element<float>;
#endif
#endif

// Calls body(E, i) for elements begin..end-1, E::kCount of them from i on. Like by_vectors, for
// long dependency chains.
template <class A, class Body>
REVK_INLINED inline void by_bundles(int64_t begin, int64_t end, Body&& body) {
#if defined(REVK_VECTOR_FMA)
  if constexpr (sizeof(A) == sizeof(float)) {
    int64_t i = begin;
    for (; i + Bundles<4>::kCount <= end; i += Bundles<4>::kCount) body(Bundles<4>{}, i);
    return by_vectors<A, Bundles<1>, BundleRest>(i, end, body);
  }
#endif
  REVK_INDEPENDENT
  for (int64_t i = begin; i < end; ++i) body(Element<A>{}, i);
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
