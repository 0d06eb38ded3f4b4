// SPDX-License-Identifier: Apache-2.0
// Sums along a row in several partial sums held in registers. Compiled once per instruction set.
#pragma once

#include "cpu/vectors.h"

namespace revk::cpu::REVK_ISA {
namespace {

// Partial sums per row. The number affects the rounding, so every instruction set uses the same.
// Short rows pay for adding them up.
constexpr int kPartials = 32;

// Two sums at once, each in kCount vectors. Members instead of an array, so that each stays in a
// register.
template <class A, int kCount>
struct Pairs {
  Pairs<A, kCount / 2> low, high;

  // body(first, second, k) for the k-th vector of both.
  template <class Body>
  void each(Body&& body, int k = 0) {
    low.each(body, k);
    high.each(body, k + kCount / 2);
  }
  friend Pairs operator+(const Pairs& a, const Pairs& b) {
    return {a.low + b.low, a.high + b.high};
  }
  Pairs<A, 1> total() const { return (low + high).total(); }
};

template <class A>
struct Pairs<A, 1> {
  Vector<A> first = {}, second = {};

  template <class Body>
  void each(Body&& body, int k = 0) {
    body(first, second, k);
  }
  friend Pairs operator+(const Pairs& a, const Pairs& b) {
    return {a.first + b.first, a.second + b.second};
  }
  Pairs total() const { return *this; }
};

// The sum of a vector's elements, by adding halves.
template <class A, int kBytes, class V>
REVK_INLINED inline A total_of(V vector) {
  if constexpr (kBytes > 16) {
    typedef A Half __attribute__((vector_size(kBytes / 2), may_alias));
    const Half* const halves = reinterpret_cast<const Half*>(&vector);
    return total_of<A, kBytes / 2>(halves[0] + halves[1]);
  } else if constexpr (sizeof(A) == 8) {
    return vector[0] + vector[1];
  } else {
    return (vector[0] + vector[2]) + (vector[1] + vector[3]);
  }
}

template <class A>
struct TwoSums {
  A first, second;
};

// Two sums over i < count. body(E, first, second, i) adds elements i..i+E::kCount-1 to them and
// loads through E. `rows` are the rows to prefetch from memory.
template <class A, class Body, class... T>
REVK_INLINED inline TwoSums<A> two_sums(int64_t count, Body&& body, const T*... rows) {
  using Wide = Elements<A>;
  Pairs<A, kPartials / Wide::kCount> sums;
  int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    (ask_ahead(rows + i, kPartials), ...);
    sums.each([&](auto& first, auto& second, int k) {
      body(Wide{}, first, second, i + k * Wide::kCount);
    });
  }
  const int64_t rest = count - i, whole = rest & -Wide::kCount;
  if (whole > 0) {
    sums.each([&](auto& first, auto& second, int k) {
      if ((k + 1) * Wide::kCount <= whole) body(Wide{}, first, second, i + k * Wide::kCount);
    });
  }
#if defined(REVK_VECTOR_PARTS)
  if (rest > whole) {
    const Part<A> part(rest - whole);
    Pairs<A, 1> last;
    body(part, last.first, last.second, i + whole);
    last = {part.only(last.first), part.only(last.second)};
    sums.each([&](auto& first, auto& second, int k) {
      if (k * Wide::kCount == whole) first += last.first, second += last.second;
    });
  }
#else
  if (rest > whole) {  // too few for a vector: through memory
    alignas(64) A first[kPartials], second[kPartials];
    sums.each([&](auto& one, auto& two, int k) {
      Wide::store(first + k * Wide::kCount, one);
      Wide::store(second + k * Wide::kCount, two);
    });
    for (int64_t k = whole; k < rest; ++k) {
      asm("");  // not to be vectorised
      body(Element<A>{}, first[k], second[k], i + k);
    }
    sums.each([&](auto& one, auto& two, int k) {
      one = Wide::load(first + k * Wide::kCount);
      two = Wide::load(second + k * Wide::kCount);
    });
  }
#endif
  const Pairs<A, 1> pair = sums.total();
  return {total_of<A, kVectorBytes>(pair.first), total_of<A, kVectorBytes>(pair.second)};
}

template <class A, class X>
REVK_INLINED inline A sum_of(const X* x, int64_t count) {
  const auto add = [&](auto e, auto& sum, auto&, int64_t i) { sum += e.load(x + i); };
  return two_sums<A>(count, add, x).first;
}

// Sums of x - shift and of its square. With a shift near the mean neither sum loses digits.
template <class A, class X>
REVK_INLINED inline void sum_deviations(const X* x, int64_t count, A shift, double& sum,
                                        double& square) {
  const auto add = [&](auto e, auto& first, auto& second, int64_t i) {
    const auto deviation = e.load(x + i) - shift;
    first += deviation;
    second += deviation * deviation;
  };
  const TwoSums<A> sums = two_sums<A>(count, add, x);
  sum += double(sums.first);
  square += double(sums.second);
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
