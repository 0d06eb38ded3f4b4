// SPDX-License-Identifier: Apache-2.0
// Normalisation and activation, element by element, in the compute type A (float or double). Loops,
// dtypes and memory are left to the backends, which all share this file. No operation is fused
// (unless it says so) or reordered, so that backends agree bit for bit where no transcendental
// function is called.
//
// An operand that a norm lacks has a neutral value that keeps every bit: mean 0, weight 1, bias -0.
#pragma once

#include <cmath>

#include "core/scalar.h"

namespace revk::ops {

// What one element is normalised with.
template <class A>
struct Normal {
  A mean, rstd, weight, bias;

  REVK_HD A xhat(A x) const { return (x - mean) * rstd; }
  REVK_HD A z(A xhat) const { return xhat * weight + bias; }
};

// dx of every norm with statistics of its own: `scale` times what is left of g when its mean and
// its share along xhat are taken away. Where weight varies within one set of statistics (layer,
// RMS, group) g = dz * weight and scale = rstd; of a batch norm g = dz and scale = weight * rstd.
// The means are those of g and of g * xhat; an RMS norm has mean_g 0.
template <class A>
struct MeansGradient {
  A scale, mean_g, mean_gx;

  REVK_HD A operator()(A g, A xhat) const { return scale * (g - mean_g - xhat * mean_gx); }
};

// Transcendental functions. On the host they have no branch and no call, so that a compiler
// vectorises a loop over them; float64 takes the C library's. In float32, measured against float64
// over one float in 61 (tests/csrc/test_norm_act.cpp looks at one in 9973), where the result is
// 1e-36 or more: exp is within 1.1 units in the last place, silu and gelu_tanh within 3.1, gelu
// within 6; their derivatives, which have a zero, within 2e-7 times max(1, |derivative|).
//
// On a device float32 takes CUDA's expf, and gelu_tanh its argument in float32.

namespace detail {

// a * b + c, rounded once: written out where it is meant, for everything else here is compiled
// without contraction. Without the instruction: the product is exact in float64, and a sum that is
// rounded to odd there may be rounded again (see round_to_odd).
REVK_HD float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
  return __builtin_fmaf(a, b, c);
#else
  const double product = double(a) * double(b), sum = product + double(c);
  const double added = sum - product;  // the rest is the sum's rounding error, exactly
  const double rest = (product - (sum - added)) + (double(c) - added);
  const uint64_t bits = bits_as<uint64_t>(sum);
  const bool nudged = (rest < 0.0 || rest > 0.0) && (bits & 1u) == 0;
  const uint64_t odd = (rest > 0.0) == (sum > 0.0) ? bits + 1 : bits - 1;
  return float(bits_as<double>(nudged ? odd : bits));
#endif
}

REVK_HD double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// A product p * 2^n, n an integer.
struct Scaled {
  float p;
  int32_t n;
};

// exp(high + low) for -163 <= high <= 0 and |low| <= 0.06: high's error is nil if it is exact, as
// -z^2/2 can be made. NaN is in p.
REVK_HD Scaled exp_of_sum(float high, float low) {
  // 1.5 * 2^23: its unit in the last place is 1, so that adding it rounds, and leaves the integer
  // in the last bits.
  const float shifter = 12582912.0f, shifted = fused(high, 1.44269504f, shifter);
  const float n = shifted - shifter;
  // ln 2 in two parts, the first short enough that its multiples are exact.
  const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, high)) + low;
  float p = 1.37904671e-3f;
  p = fused(p, r, 8.38041306e-3f);
  p = fused(p, r, 4.16697077e-2f);
  p = fused(p, r, 1.66664079e-1f);
  p = fused(p, r, 4.99999851e-1f);
  p = fused(p, r * r, r) + 1.0f;
  return {p, int32_t(bits_as<uint32_t>(shifted) - bits_as<uint32_t>(shifter))};
}

// 2^n as a product of two, for n reaches beyond the exponents: 2^(n+64) * 2^-64.
REVK_HD float decay_of_sum(float high, float low) {
  const Scaled made = exp_of_sum(high, low);
  return (made.p * bits_as<float>(uint32_t(made.n + 191) << 23)) * 5.42101086e-20f;
}

// The same, but 0 where 2^n is no normal number: subnormal ones cost a processor a hundred cycles
// each, which is wasted where a factor below 1 is still to come.
REVK_HD float normal_decay_of_sum(float high, float low) {
  const Scaled made = exp_of_sum(high, low);
  return made.p * bits_as<float>(uint32_t(made.n < -127 ? 0 : made.n + 127) << 23);
}

// exp(x) for x <= 0
REVK_HD float decay(float x) {
#if defined(__CUDA_ARCH__)
  return ::expf(x);
#else
  return decay_of_sum(x < -104.0f ? -104.0f : x, 0.0f);  // a comparison that lets NaN pass
#endif
}
REVK_HD double decay(double x) { return ::exp(x); }

// The normal distribution's tail, Phi(-|z|) = scale * decay with decay = exp(-z^2/2): both relative
// to their own size, so that gelu keeps its digits where Phi is tiny. `reach` is |z|, or a limit
// beyond which the density is 0.
template <class A>
struct Tail {
  A reach, scale, decay;
};

REVK_HD Tail<double> tail_of(double z) {
  // Not scaled: erfc underflows where the product with exp would, and loses nothing before.
  const double a = z < 0.0 ? -z : z;
  return {a > 1000.0 ? 1000.0 : a, 0.5 * ::erfc(a * 0.70710678118654752440), 1.0};
}
REVK_HD double density(Tail<double> tail) {
  return 0.39894228040143267794 * ::exp(-0.5 * tail.reach * tail.reach);
}

REVK_HD Tail<float> tail_of(float z) {
  float a = bits_as<float>(bits_as<uint32_t>(z) & 0x7fffffffu);
  a = a > 15.0f ? 15.0f : a;  // exp(-112.5) is 0
  // -a^2 / 2 exactly, as a product and what it lost by rounding.
  const float half = -0.5f * a, high = half * a;
  const float exponential = normal_decay_of_sum(high, fused(half, a, -high));
  // Phi(-a) * exp(a^2 / 2), a smooth function, as a ratio fitted to it for 0 <= a <= 15; even
  // and odd powers apart: fewer roundings one after another.
  const float b = a * a;
  const float p = fused(fused(4.08816462e-2f, b, 4.39285429e-1f), a,
                        fused(fused(4.15330732e-3f, b, 1.83970653e-1f), b, 0.5f));
  const float q = fused(fused(fused(1.04106859e-2f, b, 4.71412697e-1f), b, 1.67645587f), a,
                        fused(fused(1.02481206e-1f, b, 1.20555450f), b, 1.0f));
  return {a, p / q, exponential};
}
REVK_HD float density(Tail<float> tail) { return 0.398942280f * tail.decay; }

// exp(-|x|), of which sigmoid(x) and 1 - sigmoid(x) are made without cancellation or overflow.
template <class A>
REVK_HD A decay_of(A x) {
  return decay(x < A(0) ? x : -x);
}

// Where a gradient has long reached its limit, so that the limit is not infinity times 0.
template <class A>
REVK_HD A bounded(A z) {
  const A most = A(1000);
  z = z > most ? most : z;
  return z < -most ? -most : z;
}

}  // namespace detail

// Activations: value(z), and gradient(z, dh) = dh * value'(z). A value at -infinity follows the
// formula, infinity times 0, and is NaN, as it is in torch; a gradient there is its limit.

struct Identity {
  template <class A>
  static REVK_HD A value(A z) {
    return z;
  }
  template <class A>
  static REVK_HD A gradient(A, A dh) {
    return dh;
  }
};

// NaN stays NaN, and lets its gradient pass. A may be a vector.
struct Relu {
  template <class A>
  static REVK_HD A value(A z) {
    return z <= A{} ? A{} : z;
  }
  template <class A>
  static REVK_HD A gradient(A z, A dh) {
    return z <= A{} ? A{} : dh;
  }
};

// z * Phi(z)
struct Gelu {
  template <class A>
  static REVK_HD A value(A z) {
    const detail::Tail<A> tail = detail::tail_of(z);
    const A beyond = tail.scale * tail.decay;
    return z * (z < A(0) ? beyond : A(1) - beyond);
  }
  template <class A>
  static REVK_HD A gradient(A z, A dh) {
    const detail::Tail<A> tail = detail::tail_of(z);
    const A beyond = tail.scale * tail.decay, slope = tail.reach * detail::density(tail);
    return dh * (z < A(0) ? beyond - slope : (A(1) - beyond) + slope);
  }
};

// z/2 * (1 + tanh(u)) = z * sigmoid(2u), u = sqrt(2/pi) * (z + 0.044715 z^3): the second form keeps
// its digits where tanh is close to -1.
struct GeluTanh {
  // exp(-|2u|)
  static REVK_HD double decay(double z) {
    return detail::decay_of(z * (1.5957691216057307118 + 0.071354816272600252722 * (z * z)));
  }
  static REVK_HD float decay(float z) {
#if defined(__CUDA_ARCH__)
    return detail::decay_of(z * (1.59576912f + 0.0713548163f * (z * z)));
#else
    // 2u in float alone would cost exp as many units in the last place as 2u is large.
    const double wide = double(z),
                 twice_u = wide * (1.5957691216057307118 + 0.071354816272600252722 * (wide * wide));
    const double exponent = twice_u < 0.0 ? twice_u : -twice_u;
    const double least = exponent < -104.0 ? -104.0 : exponent;
    const float high = float(least);
    return detail::decay_of_sum(high, float(least - double(high)));
#endif
  }
  template <class A>
  static REVK_HD A value(A z) {
    const A e = decay(z);
    return (z < A(0) ? z * e : z) / (A(1) + e);
  }
  template <class A>
  static REVK_HD A gradient(A z, A dh) {
    z = detail::bounded(z);
    const A e = decay(z), whole = A(1) / (A(1) + e);
    const A slope = A(1.5957691216057307118) + A(0.21406444881780075817) * (z * z);  // d(2u)/dz
    return dh * ((z < A(0) ? e * whole : whole) + (z * slope) * (e * (whole * whole)));
  }
};

// z / (1 + exp(-z))
struct Silu {
  template <class A>
  static REVK_HD A value(A z) {
    const A e = detail::decay_of(z);
    return (z < A(0) ? z * e : z) / (A(1) + e);
  }
  template <class A>
  static REVK_HD A gradient(A z, A dh) {
    z = detail::bounded(z);
    const A e = detail::decay_of(z), whole = A(1) / (A(1) + e);
    return dh * ((z < A(0) ? e * whole : whole) + z * (e * (whole * whole)));
  }
};

}  // namespace revk::ops
