// SPDX-License-Identifier: Apache-2.0
// Element-wise normalisation and activation, in the compute type A (float or double). Loops, dtypes
// and memory access are the backends'; all backends share this file. No operation is fused (unless
// it says so) or reordered, so that backends agree bit for bit where no transcendental function is
// called.
//
// An operand that a norm lacks has a neutral value that keeps every bit: mean 0, weight 1, bias -0.
#pragma once

#include <cmath>

#include "core/scalar.h"

namespace revk::ops {

// The parameters that normalise one element.
template <class A>
struct Normal {
  A mean, rstd, weight, bias;

  REVK_HD A xhat(A x) const { return (x - mean) * rstd; }
  REVK_HD A z(A xhat) const { return xhat * weight + bias; }
};

// dx of every norm that computes its own statistics: `scale` times g minus its mean and minus its
// projection on xhat. Where weight varies within one set of statistics (layer, RMS, group),
// g = dz * weight and scale = rstd; for a batch norm g = dz and scale = weight * rstd. The means
// are those of g and of g * xhat; an RMS norm has mean_g 0.
template <class A>
struct MeansGradient {
  A scale, mean_g, mean_gx;

  REVK_HD A operator()(A g, A xhat) const { return scale * (g - mean_g - xhat * mean_gx); }
};

// Transcendental functions. On the host they are free of branches and calls, and written for any
// float32 number type F: one float, or several together, for which cpu/bundles.h has the operations
// used here; float64 uses the C library. float32 errors against float64, measured over one float
// in 61 (tests/csrc/test_norm_act.cpp takes one in 9973) where the result is 1e-36 or more: exp
// within 1.1 units in the last place, silu and gelu_tanh within 3.1, gelu within 6; their
// derivatives, which have a zero, within 2e-7 times max(1, |derivative|).
//
// On a device float32 uses CUDA's expf, and gelu_tanh computes its argument in float32.

namespace detail {

// a * b + c, rounded once; called explicitly, because everything else is compiled without
// contraction. Without the instruction: the product is exact in float64, and a sum rounded to odd
// may be rounded again (see round_to_odd).
REVK_HD float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
  return __builtin_fmaf(a, b, c);
#else
  const double product = double(a) * double(b), sum = product + double(c);
  const double added = sum - product;  // rest: the sum's rounding error, exactly
  const double rest = (product - (sum - added)) + (double(c) - added);
  const uint64_t bits = bits_as<uint64_t>(sum);
  const bool nudged = (rest < 0.0 || rest > 0.0) && (bits & 1u) == 0;
  const uint64_t odd = (rest > 0.0) == (sum > 0.0) ? bits + 1 : bits - 1;
  return float(bits_as<double>(nudged ? odd : bits));
#endif
}

REVK_HD double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

template <class A>
REVK_HD A where(bool mask, A a, A b) {
  return mask ? a : b;
}
// Both propagate NaN in x.
template <class A>
REVK_HD A at_most(A x, A most) {
  return x > most ? most : x;
}
template <class A>
REVK_HD A at_least(A x, A least) {
  return x < least ? least : x;
}
REVK_HD float magnitude(float x) { return bits_as<float>(bits_as<uint32_t>(x) & 0x7fffffffu); }
REVK_HD double magnitude(double x) { return x < 0.0 ? -x : x; }

// 1.5 * 2^23, whose unit in the last place is 1: adding it rounds to an integer and leaves that
// integer in the low bits.
constexpr float kShifter = 12582912.0f;

// 2^(n-127) of kShifter + n, 0 <= n < 255; 0 for n = 0.
REVK_HD float to_exponent(float shifted) {
  return bits_as<float>(bits_as<uint32_t>(shifted) << 23);
}

// exp(-(b + lost) / 2) = p * 2^n for 0 <= b <= 326 and |lost| <= 0.12, n an integer. Returns p,
// which carries NaN, and sets `shifted` to kShifter + bias + n. `lost` is the rounding error of b,
// 0 if b is exact.
template <class F>
REVK_HD F exp_of_half(F b, F lost, float bias, F& shifted) {
  shifted = fused(b, -0.721347520f, kShifter + bias);
  const F n = shifted - (kShifter + bias);
  // r is -2 times the remaining exponent; its powers of -1/2 are folded into the coefficients,
  // which is exact. ln 2 is split in two, the first part short enough that its multiples are exact.
  const F r = fused(n, -4.24388880e-4f, fused(n, 1.38671875f, b)) + lost;
  F p = -1.37904671e-3f / 32.0f;
  p = fused(p, r, 8.38041306e-3f / 16.0f);
  p = fused(p, r, -4.16697077e-2f / 8.0f);
  p = fused(p, r, 1.66664079e-1f / 4.0f);
  p = fused(p, r, -4.99999851e-1f / 2.0f);
  return fused(fused(p, r * r, r), -0.5f, 1.0f);
}

// 2^n as the product 2^(n+64) * 2^-64, because n goes below the exponent range.
template <class F>
REVK_HD F decay_of_half(F b, F lost) {
  F shifted;
  const F p = exp_of_half(b, lost, 191.0f, shifted);
  return p * to_exponent(shifted) * 5.42101086e-20f;
}

// The same, but 0 where 2^n is subnormal: a subnormal costs a processor about a hundred cycles,
// wasted where a factor below 1 follows.
template <class F>
REVK_HD F normal_decay_of_half(F b, F lost) {
  F shifted;
  const F p = exp_of_half(b, lost, 127.0f, shifted);
  return p * to_exponent(at_least(shifted, kShifter));
}

// exp(-|x|), from which sigmoid(x) and 1 - sigmoid(x) follow without cancellation or overflow.
template <class F>
REVK_HD F decay_of(F x) {
#if defined(__CUDA_ARCH__)
  return ::expf(-magnitude(x));
#else
  const F a = at_most(magnitude(x), 104.0f);
  return decay_of_half<F>(a + a, 0.0f);
#endif
}
REVK_HD double decay_of(double x) { return ::exp(-magnitude(x)); }

// The normal distribution's tail Phi(-|z|), accurate relative to its own size, so that gelu keeps
// its digits where it is tiny. `reach` is |z|, limited to where the density is 0. `decay` is
// exp(-z^2/2), from which float32 computes the tail and the density.
REVK_HD double tail_of(double z, double& reach, double&) {
  const double a = magnitude(z);
  reach = at_most(a, 1000.0);
  return 0.5 * ::erfc(a * 0.70710678118654752440);
}
REVK_HD double density(double reach, double) {
  return 0.39894228040143267794 * ::exp(-0.5 * reach * reach);
}

template <class F>
REVK_HD F tail_of(F z, F& reach, F& decay) {
  const F a = at_most(magnitude(z), 15.0f);  // exp(-112.5) is 0
  reach = a;
  const F b = a * a;
  decay = normal_decay_of_half(b, fused(a, a, -b));  // b with its rounding error: a^2 exactly
  // Phi(-a) * exp(a^2 / 2), a smooth function, as a rational fit for 0 <= a <= 15. Even and odd
  // powers are separate, for fewer roundings in sequence.
  const F p = fused(fused(4.08816462e-2f, b, 4.39285429e-1f), a,
                    fused(fused(4.15330732e-3f, b, 1.83970653e-1f), b, 0.5f));
  const F q = fused(fused(fused(1.04106859e-2f, b, 4.71412697e-1f), b, 1.67645587f), a,
                    fused(fused(1.02481206e-1f, b, 1.20555450f), b, 1.0f));
  return p / q * decay;
}
template <class F>
REVK_HD F density(F, F decay) {
  return 0.398942280f * decay;
}

// Bounds z where the gradient has long reached its limit, to avoid infinity times 0.
template <class A>
REVK_HD A bounded(A z) {
  return at_least(at_most(z, A(1000)), A(-1000));
}

}  // namespace detail

using detail::where;

// Activations: value(z), and gradient(z, dh) = dh * value'(z). The value at -infinity follows the
// formula, infinity times 0, and is NaN, as in torch; the gradient there is its limit.

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

// NaN stays NaN and passes its gradient on. A may be a vector.
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
    A reach, decay;
    const A beyond = detail::tail_of(z, reach, decay);
    return z * where(z < A(0), beyond, A(1) - beyond);
  }
  template <class A>
  static REVK_HD A gradient(A z, A dh) {
    A reach, decay;
    const A beyond = detail::tail_of(z, reach, decay);
    const A slope = reach * detail::density(reach, decay);
    return dh * where(z < A(0), beyond - slope, (A(1) - beyond) + slope);
  }
};

// z/2 * (1 + tanh(u)) = z * sigmoid(2u), u = sqrt(2/pi) * (z + 0.044715 z^3). The second form keeps
// its digits where tanh is close to -1.
struct GeluTanh {
  // exp(-|2u|)
  static REVK_HD double decay(double z) {
    return detail::decay_of(z * (1.5957691216057307118 + 0.071354816272600252722 * (z * z)));
  }
  template <class F>
  static REVK_HD F decay(F z) {
#if defined(__CUDA_ARCH__)
    return detail::decay_of(z * (1.59576912f + 0.0713548163f * (z * z)));
#else
    // The error of exp, in units in the last place, grows with the size of 2u. So every product,
    // sum and constant carries its rounding error along.
    using detail::at_most, detail::fused, detail::magnitude;
    const F c = 3.19153833f, d = 0.142709633f;             // of 4u
    const F a = at_most(magnitude(z), 10.75f), b = a * a;  // exp(-105) is 0
    const F cube = d * b, sum = c + cube, rest = sum - c;
    const F lost = fused(d, b, -cube) + fused(d, fused(a, a, -b), 4.79766479e-9f * b);
    const F low = ((c - (sum - rest)) + (cube - rest)) + (lost - 9.06813606e-8f), high = a * sum;
    return detail::decay_of_half(high, fused(a, low, fused(a, sum, -high)));
#endif
  }
  template <class A>
  static REVK_HD A value(A z) {
    const A e = decay(z);
    return where(z < A(0), z * e, z) / (A(1) + e);
  }
  template <class A>
  static REVK_HD A gradient(A z, A dh) {
    z = detail::bounded(z);
    const A e = decay(z), whole = A(1) / (A(1) + e);
    const A slope = A(1.5957691216057307118) + A(0.21406444881780075817) * (z * z);  // d(2u)/dz
    return dh * (where(z < A(0), e * whole, whole) + (z * slope) * (e * (whole * whole)));
  }
};

// z / (1 + exp(-z))
struct Silu {
  template <class A>
  static REVK_HD A value(A z) {
    const A e = detail::decay_of(z);
    return where(z < A(0), z * e, z) / (A(1) + e);
  }
  template <class A>
  static REVK_HD A gradient(A z, A dh) {
    z = detail::bounded(z);
    const A e = detail::decay_of(z), whole = A(1) / (A(1) + e);
    return dh * (where(z < A(0), e * whole, whole) + z * (e * (whole * whole)));
  }
};

}  // namespace revk::ops
