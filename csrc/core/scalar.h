// SPDX-License-Identifier: Apache-2.0
// Scalar types shared by host and device, and the only two conversions: widen (exact) and narrow
// (rounds once, to nearest even). On the host both use integer arithmetic and give the same bits
// under every compiler; a GPU has instructions that give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define REVK_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline is required, not a hint: the CPU loops are compiled once per instruction set, and
// the linker could keep an out-of-line copy from the AVX-512 file for all of them.
#define REVK_HD inline __attribute__((always_inline))
#else
#define REVK_HD inline
#endif

namespace revk {

template <class To, class From>
REVK_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

REVK_HD double widen(double value) { return value; }
REVK_HD float widen(float value) { return value; }
REVK_HD float widen(bfloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }
REVK_HD float widen(float16 value) {
#if defined(__CUDA_ARCH__)
  float wide;  // one instruction instead of a dozen; exact, subnormals included
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  if (magnitude >= 0x0400u)
    return bits_as<float>(sign | ((magnitude << 13) + (112u << 23)));  // normal
  const float tiny = float(magnitude) * 5.9604644775390625e-8f;  // subnormal: a multiple of 2^-24
  return bits_as<float>(bits_as<uint32_t>(tiny) | sign);
#endif
}

// `value` rounded to bfloat16, in the upper half of the result; the lower half is unspecified. NaN
// stays a quiet NaN.
REVK_HD uint32_t above_rounded_off(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  return value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// `value` rounded to bfloat16, as float32 bits: the lower half is 0. For callers that need both the
// stored number and its value.
REVK_HD uint32_t rounded_to_bfloat16(float value) { return above_rounded_off(value) & 0xffff0000u; }

template <class To>
REVK_HD To narrow(double value);
template <class To>
REVK_HD To narrow(float value);

template <>
REVK_HD double narrow<double>(double value) {
  return value;
}
template <>
REVK_HD float narrow<float>(float value) {
  return value;
}
template <>
REVK_HD float narrow<float>(double value) {
  return float(value);
}
template <>
REVK_HD double narrow<double>(float value) {
  return double(value);
}
template <>
REVK_HD bfloat16 narrow<bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
  bfloat16 half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  return bfloat16{uint16_t(above_rounded_off(value) >> 16)};
#endif
}
template <>
REVK_HD float16 narrow<float16>(float value) {
#if defined(__CUDA_ARCH__)
  float16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  const uint32_t bits = bits_as<uint32_t>(value), sign = (bits >> 16) & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return float16{uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u)
    return float16{uint16_t(sign | 0x7c00u)};  // rounds past 65504: infinity
  if (magnitude >= 0x38800000u) {              // normal
    const uint32_t rebased = magnitude - (112u << 23);
    return float16{uint16_t(sign | (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13)};
  }
  // Subnormal: adding 0.5 puts the sum's last place at 2^-24, so that the addition rounds.
  const float aligned = bits_as<float>(magnitude) + 0.5f;
  return float16{uint16_t(sign | (bits_as<uint32_t>(aligned) - 0x3f000000u))};
#endif
}
// float64 narrows to a half type by way of float32. The first rounding is to odd, which makes the
// second rounding safe (Boldo and Melquiond 2008).
REVK_HD float round_to_odd(double value) {
  const float nearest = float(value);
  if (!(value - value == 0.0) || double(nearest) == value) return nearest;  // inf, NaN, exact
  const uint32_t bits = bits_as<uint32_t>(nearest);
  if (bits & 1u) return nearest;
  // Whether `nearest` is farther from zero than `value`.
  const bool away = (double(nearest) > value) == (value > 0.0);
  return bits_as<float>(away ? bits - 1u : bits + 1u);
}
template <>
REVK_HD bfloat16 narrow<bfloat16>(double value) {
  return narrow<bfloat16>(round_to_odd(value));
}
template <>
REVK_HD float16 narrow<float16>(double value) {
  return narrow<float16>(round_to_odd(value));
}

// The compute type of two operands: float64 if either is float64, else float32.
template <class A, class B>
struct compute_type {
  using type = float;
};
template <class B>
struct compute_type<double, B> {
  using type = double;
};
template <class A>
struct compute_type<A, double> {
  using type = double;
};
template <>
struct compute_type<double, double> {
  using type = double;
};

}  // namespace revk
