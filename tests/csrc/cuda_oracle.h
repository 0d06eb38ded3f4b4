// SPDX-License-Identifier: Apache-2.0
// What the kernels must give, written once more: one element at a time, through float64, with
// formats described by their parameters. Shares nothing with csrc but the C header.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "revkernels/revkernels.h"

namespace oracle {

inline const char* const kTypes[] = {"float64", "float32", "bfloat16", "float16"};

inline revk_where where(int device = 0, void* stream = nullptr) {
  return {int32_t(sizeof(revk_where)), device, stream, 0};
}

inline int size_of(int dtype) { return dtype == REVK_FLOAT64 ? 8 : dtype == REVK_FLOAT32 ? 4 : 2; }
inline bool is_wide(int a, int b) { return a == REVK_FLOAT64 || b == REVK_FLOAT64; }

// The two half formats: value = fraction * 2^exponent,
// with `fraction_bits` stored below the leading one.
struct Half {
  int fraction_bits, bias;
  int exponents() const {
    return (1 << (15 - fraction_bits)) - 1;
  }  // this exponent field means inf or NaN

  double decode(uint16_t bits) const {
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    const int field = (bits & 0x7fff) >> fraction_bits,
              fraction = bits & ((1 << fraction_bits) - 1);
    if (field == exponents()) return fraction ? NAN : sign * INFINITY;
    const int whole = field ? fraction + (1 << fraction_bits) : fraction;
    return sign * std::ldexp(double(whole), (field ? field : 1) - bias - fraction_bits);
  }
  uint16_t encode(double value) const {  // rounds to nearest, ties to even
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const uint16_t infinity = uint16_t(exponents() << fraction_bits);
    if (std::isnan(value)) return sign | infinity | 1;
    if (std::isinf(value)) return sign | infinity;
    if (value == 0) return sign;
    int exponent = 0;
    std::frexp(value, &exponent);  // |value| in [2^(exponent-1), 2^exponent)
    const int last =
        std::max(exponent - 1, 1 - bias) - fraction_bits;  // the last place weighs 2^last
    const double places = std::nearbyint(std::ldexp(std::fabs(value), -last));
    // Counting in last places walks through the formats' bit patterns in order, into the next
    // exponent and infinity.
    const int64_t below = int64_t(last + fraction_bits + bias - 1) << fraction_bits;
    const int64_t bits = below + int64_t(places);
    return sign | uint16_t(bits > infinity ? infinity : bits);
  }
};
inline Half half_of(int dtype) { return dtype == REVK_BFLOAT16 ? Half{7, 127} : Half{10, 15}; }

inline double read(int dtype, const char* from) {
  double d;
  float s;
  uint16_t h;
  int16_t q;
  if (dtype == REVK_INT16) return std::memcpy(&q, from, 2), double(q);
  if (dtype == REVK_FLOAT64) return std::memcpy(&d, from, 8), d;
  if (dtype == REVK_FLOAT32) return std::memcpy(&s, from, 4), s;
  return std::memcpy(&h, from, 2), half_of(dtype).decode(h);
}
inline void write(int dtype, char* to, double value) {
  const float s = float(value);
  if (dtype == REVK_INT16) {
    const int16_t q = int16_t(value);
    std::memcpy(to, &q, 2);
    return;
  }
  if (dtype == REVK_FLOAT64) std::memcpy(to, &value, 8);
  if (dtype == REVK_FLOAT32) std::memcpy(to, &s, 4);
  if (size_of(dtype) == 2) {
    const uint16_t h = half_of(dtype).encode(value);
    std::memcpy(to, &h, 2);
  }
}
inline uint64_t bits(int dtype, const char* from) {
  uint64_t value = 0;
  std::memcpy(&value, from,
              size_t(size_of(dtype)));  // little endian, as every machine with a GPU is
  return value;
}

struct Shape {
  int64_t outer, channels, inner;
};
struct Strides {
  int64_t outer, channel, inner, offset;  // in elements; offset from a 16-byte boundary
};

// What lies before and between the view's elements is compared too.
// AddressSanitizer guards the end, and needs memory of exactly the
// view's extent for that; without it, some bytes more are compared.
class Array {
 public:
  Array(int dtype, Shape shape, Strides strides) : dtype(dtype), shape(shape), strides(strides) {
    const int64_t last = strides.offset + (shape.outer - 1) * strides.outer +
                         (shape.channels - 1) * strides.channel + (shape.inner - 1) * strides.inner;
    const bool empty = shape.outer == 0 || shape.channels == 0 || shape.inner == 0;
    memory_.resize(size_t(empty ? 0 : last + 1) * size_t(size_of(dtype)) + kGuard);
  }

  template <class Random>
  void fill(Random& random, bool specials) {
    const double odd[] = {0.0,     -0.0,   INFINITY, -INFINITY, NAN,   65504.0,
                          65520.0, 3.3e38, 1e-7,     6e-8,      1e-40, -1.5e-45};
    std::normal_distribution<double> normal(0, 2);
    for (size_t at = 0; at + kGuard < memory_.size(); at += size_t(size_of(dtype))) {
      if (dtype == REVK_INT16) {
        const int ends[] = {-32768, -32767, -1, 0, 1, 32767};
        write(dtype, &memory_[at],
              specials && random() % 4 == 0 ? ends[random() % 6] : int(random() % 65536) - 32768);
        continue;
      }
      const double value = specials && random() % 4 == 0 ? odd[random() % 12] : normal(random);
      write(dtype, &memory_[at], value);
    }
  }

  char* at(int64_t o, int64_t c, int64_t i) {
    return memory_.data() +
           (strides.offset + o * strides.outer + c * strides.channel + i * strides.inner) *
               size_of(dtype);
  }
  double get(int64_t o, int64_t c, int64_t i) { return read(dtype, at(o, c, i)); }

  revk_view view() {
    return {int32_t(sizeof(revk_view)),
            dtype,
            at(0, 0, 0),
            shape.outer,
            shape.channels,
            shape.inner,
            strides.outer,
            strides.channel,
            strides.inner};
  }

  // Bit for bit, gaps included; any NaN equals any NaN.
  bool same(Array other) {
    if (memory_.size() != other.memory_.size()) return false;
    for (int64_t o = 0; o < shape.outer; ++o)
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.inner; ++i)
          if (std::isnan(get(o, c, i)) && std::isnan(other.get(o, c, i)))
            std::memcpy(other.at(o, c, i), at(o, c, i), size_t(size_of(dtype)));
    return memory_.empty() ||
           std::memcmp(memory_.data(), other.memory_.data(), memory_.size()) == 0;
  }

  const int dtype;
  const Shape shape;
  const Strides strides;

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 128;
#endif
  std::vector<char> memory_;
};

// The coupling struct and what it points to.
struct Setup {
  const char* name;
  bool channel, sample;
  int grid;
  bool checksum, amax;
};
class Company {
 public:
  template <class Random>
  Company(const Setup& setup, bool wide, Shape shape, Random& random)
      : setup_(setup), wide_(wide), rows_(shape.outer % 2 ? 1 : 2) {
    channel_ = values(shape.channels, random);
    sample_ = values(shape.outer / rows_, random);
    store(channel_, channel_memory_);
    store(sample_, sample_memory_);
  }

  bool plain() const {
    return setup_.grid == REVK_NO_GRID && !setup_.channel && !setup_.sample && !checks();
  }
  bool checks() const { return setup_.checksum || setup_.amax; }
  revk_coupling coupling() {
    return {int32_t(sizeof(revk_coupling)),
            setup_.grid,
            setup_.channel ? channel_memory_.data() : nullptr,
            setup_.sample ? sample_memory_.data() : nullptr,
            rows_,
            setup_.checksum ? &checksum : nullptr,
            setup_.amax ? &amax : nullptr,
            nullptr};
  }

  // f on its way in, then the sum or difference, in float64 or in float32 throughout.
  double combine(double x, double f, bool subtract, int64_t o, int64_t c) const {
    return wide_ ? in<double>(x, f, subtract, o, c)
                 : double(in<float>(float(x), float(f), subtract, o, c));
  }

  // An int16 stream: n, in float64 or in float32 throughout.
  double steps(double f, int64_t o, int64_t c) const {
    return wide_ ? grid_steps<double>(f, o, c) : double(grid_steps<float>(float(f), o, c));
  }
  // |q + n| or |q - n| before it wraps, as a number in float32.
  float unwrapped(double q, double n, bool subtract) const {
    const double unit = std::ldexp(1.0, -setup_.grid);
    if (wide_) return float(std::fabs(subtract ? q - n : q + n) * unit);
    return std::fabs(subtract ? float(q) - float(n) : float(q) + float(n)) * float(unit);
  }

  // Whether checksum and amax are right for this result.
  bool agrees(Array& result) const {
    float most = kAmaxBefore;
    for (int64_t o = 0; o < result.shape.outer; ++o)
      for (int64_t c = 0; c < result.shape.channels; ++c)
        for (int64_t i = 0; i < result.shape.inner; ++i)
          most = larger(most, float(std::fabs(result.get(o, c, i))));
    return agrees(result, most);
  }
  static float larger(float a, float b) {
    return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b);
  }
  bool agrees(Array& result, float most) const {
    uint64_t sum = kChecksumBefore, index = 0;
    for (int64_t o = 0; o < result.shape.outer; ++o)
      for (int64_t c = 0; c < result.shape.channels; ++c)
        for (int64_t i = 0; i < result.shape.inner; ++i)
          sum += bits(result.dtype, result.at(o, c, i)) * (2 * index++ + 1);
    if (checksum != (setup_.checksum ? sum : kChecksumBefore)) return false;
    if (!setup_.amax) return amax == kAmaxBefore;
    return amax == most || (std::isnan(amax) && std::isnan(most));
  }

  static constexpr uint64_t kChecksumBefore = 0xfedcba9876543210u;
  static constexpr float kAmaxBefore = 0.125f;
  uint64_t checksum = kChecksumBefore;
  float amax = kAmaxBefore;

 private:
  template <class A>
  A scaled(A f, int64_t o, int64_t c) const {
    A scale = 1;
    if (setup_.channel) scale = A(channel_[size_t(c)]);
    if (setup_.sample) scale = scale * A(sample_[size_t(o / rows_)]);
    return setup_.channel || setup_.sample ? scale * f : f;
  }
  template <class A>
  A grid_steps(A f, int64_t o, int64_t c) const {
    return A(std::nearbyint(scaled(f, o, c) * A(std::ldexp(1.0, setup_.grid))));
  }
  template <class A>
  A in(A x, A f, bool subtract, int64_t o, int64_t c) const {
    f = setup_.grid == REVK_NO_GRID ? scaled(f, o, c)
                                    : grid_steps(f, o, c) * A(std::ldexp(1.0, -setup_.grid));
    return subtract ? x - f : x + f;
  }
  template <class Random>
  std::vector<double> values(int64_t count, Random& random) {
    std::normal_distribution<double> normal(1, 0.5);
    std::vector<double> result;
    for (int64_t i = 0; i < count; ++i)
      result.push_back(wide_ ? normal(random) : double(float(normal(random))));
    return result;
  }
  void store(const std::vector<double>& from, std::vector<char>& to) const {
    const int dtype = wide_ ? REVK_FLOAT64 : REVK_FLOAT32;
    to.resize(from.size() * size_t(size_of(dtype)));
    for (size_t i = 0; i < from.size(); ++i) write(dtype, &to[i * size_t(size_of(dtype))], from[i]);
  }

  const Setup setup_;
  const bool wide_;
  const int64_t rows_;
  std::vector<double> channel_, sample_;
  std::vector<char> channel_memory_, sample_memory_;
};

// out <- x +- f', element by element. `out` may be `x`.
inline void couple(Array& out, Array& x, Array& f, bool subtract, const Company& company) {
  for (int64_t o = 0; o < out.shape.outer; ++o)
    for (int64_t c = 0; c < out.shape.channels; ++c)
      for (int64_t i = 0; i < out.shape.inner; ++i)
        write(out.dtype, out.at(o, c, i),
              company.combine(x.get(o, c, i), f.get(o, c, i), subtract, o, c));
}

// out <- x +- f' in int16, and `value`, if there is one. Returns the amax.
inline float couple_int16(Array& out, Array& x, Array& f, bool subtract, const Company& company,
                          int grid, Array* value) {
  float most = Company::kAmaxBefore;
  for (int64_t o = 0; o < out.shape.outer; ++o)
    for (int64_t c = 0; c < out.shape.channels; ++c)
      for (int64_t i = 0; i < out.shape.inner; ++i) {
        const double q = x.get(o, c, i), n = company.steps(f.get(o, c, i), o, c);
        most = Company::larger(most, company.unwrapped(q, n, subtract));
        const double limit = 8388608;
        const double m = std::isnan(n) ? 0 : std::min(std::max(n, -limit), limit);
        int64_t sum = int64_t(q) + (subtract ? -int64_t(m) : int64_t(m));
        sum = ((sum + 32768) % 65536 + 65536) % 65536 - 32768;
        write(REVK_INT16, out.at(o, c, i), double(sum));
        if (value) write(value->dtype, value->at(o, c, i), std::ldexp(double(sum), -grid));
      }
  return most;
}

}  // namespace oracle
