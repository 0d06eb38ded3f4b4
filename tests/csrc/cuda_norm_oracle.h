// SPDX-License-Identifier: Apache-2.0
// Normalisation and activation once more, element by element: statistics and sums in float64 from
// what is stored, z by the operations that revkernels.h writes down, each rounding in the compute
// type. Shares nothing with csrc but the C header.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda_oracle.h"
#include "cuda_test.h"
#include "revkernels/revkernels.h"

namespace oracle {

// A dense array of one type, of exactly the bytes that it needs.
class Cells {
 public:
  Cells(int dtype, int64_t count)
      : dtype(dtype), count(count), memory_(size_t(count * size_of(dtype))) {}
  void* data() { return memory_.data(); }
  double get(int64_t at) { return read(dtype, &memory_[size_t(at * size_of(dtype))]); }
  void set(int64_t at, double value) { write(dtype, &memory_[size_t(at * size_of(dtype))], value); }
  template <class Random>
  void fill(Random& random, double mean, double deviation) {
    std::normal_distribution<double> normal(mean, deviation);
    for (int64_t i = 0; i < count; ++i) set(i, normal(random));
  }
  bool operator==(const Cells& other) const { return memory_ == other.memory_; }

  const int dtype;
  const int64_t count;

 private:
  std::vector<char> memory_;
};

// One rounding in the compute type.
inline double rounded(bool wide, double value) { return wide ? value : double(float(value)); }
// The relative spacing of a type's values, and of its smallest ones.
inline double spacing(int dtype) {
  const int digits = dtype == REVK_FLOAT64 ? 53 : dtype == REVK_FLOAT32 ? 24 : 8;
  return std::ldexp(1.0, 1 - (dtype == REVK_FLOAT16 ? 11 : digits));
}
inline double smallest(int dtype) { return dtype == REVK_FLOAT16 ? 6e-8 : 1e-37; }

inline double activated(int activation, double z) {
  const double u = std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z);
  // z/2 * (1 + tanh(u)), without the cancellation where tanh is close to -1.
  if (activation == REVK_GELU_TANH) return z / (1 + std::exp(-2 * u));
  if (activation == REVK_RELU) return z <= 0 ? 0 : z;
  if (activation == REVK_GELU) return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
  if (activation == REVK_SILU) return z / (1 + std::exp(-z));
  return z;
}
inline double slope(int activation, double z) {
  if (activation == REVK_RELU) return z <= 0 ? 0 : 1;
  if (activation == REVK_IDENTITY) return 1;
  if (activation == REVK_GELU)
    return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
  if (activation == REVK_GELU_TANH) {
    const double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
    return 0.5 * (1 + t) + z / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
  }
  const double s = 1 / (1 + std::exp(-z));
  return s * (1 + z * (1 - s));
}

// revk_norm with what it points to, and the elements behind each statistic.
class Norm {
 public:
  Norm(int kind, int activation, int groups, Shape shape, bool wide, int parameter_dtype)
      : kind(kind),
        activation(activation),
        groups(kind == REVK_GROUP_NORM ? groups : 0),
        shape(shape),
        wide(wide),
        mean(wide ? REVK_FLOAT64 : REVK_FLOAT32, statistics()),
        rstd(mean),
        weight(parameter_dtype, shape.channels),
        bias(parameter_dtype, shape.channels),
        running_mean(REVK_FLOAT32, shape.channels),
        running_var(REVK_FLOAT32, shape.channels) {}

  int64_t statistics() const {
    if (kind == REVK_BATCH_NORM) return shape.channels;
    return shape.outer * (kind == REVK_GROUP_NORM ? groups : shape.inner);
  }
  int64_t statistic(int64_t o, int64_t c, int64_t i) const {
    if (kind == REVK_BATCH_NORM) return c;
    if (kind == REVK_GROUP_NORM) return o * groups + c / (shape.channels / groups);
    // Layer and RMS norm: with strides of their own, here inner before outer.
    return i * shape.outer + o;
  }
  double behind_each() const {
    return double(shape.outer * shape.channels * shape.inner) / double(statistics());
  }

  revk_norm view(bool given, Cells& workspace) {
    revk_norm norm{};
    norm.struct_size = int32_t(sizeof norm);
    norm.kind = kind, norm.activation = activation, norm.groups = groups;
    norm.eps = eps;
    if (has_weight) norm.weight = weight.data();
    if (has_bias) norm.bias = bias.data();
    if (kind != REVK_RMS_NORM) norm.mean = mean.data();
    norm.rstd = rstd.data();
    norm.statistics_outer_stride = 1, norm.statistics_inner_stride = shape.outer;
    if (runs) norm.running_mean = running_mean.data(), norm.running_var = running_var.data();
    norm.momentum = 0.25;
    norm.parameter_dtype = weight.dtype, norm.running_dtype = running_mean.dtype;
    norm.statistics_given = given;
    norm.workspace = workspace.count ? workspace.data() : nullptr;
    norm.workspace_bytes = workspace.count * 8;
    return norm;
  }

  // The mean and biased variance of every set, of x as stored.
  void moments(Array& x, std::vector<double>& means, std::vector<double>& variances) const {
    const size_t sets = size_t(statistics());
    std::vector<long double> sums(sets, 0), squares(sets, 0);
    const long double count = behind_each();
    for_each([&](int64_t o, int64_t c, int64_t i) {
      if (kind != REVK_RMS_NORM) sums[size_t(statistic(o, c, i))] += x.get(o, c, i);
    });
    for_each([&](int64_t o, int64_t c, int64_t i) {
      const size_t at = size_t(statistic(o, c, i));
      const long double away = x.get(o, c, i) - sums[at] / count;
      squares[at] += away * away;
    });
    means.clear(), variances.clear();
    for (size_t at = 0; at < sets; ++at)
      means.push_back(double(sums[at] / count)), variances.push_back(double(squares[at] / count));
  }

  // By the statistics as they are in memory, each operation rounding.
  double xhat(double x, int64_t at) {
    if (kind != REVK_RMS_NORM) x = rounded(wide, x - mean.get(at));
    return rounded(wide, x * rstd.get(at));
  }
  double z(double xhat, int64_t c) {
    if (has_weight) xhat = rounded(wide, xhat * rounded(wide, weight.get(c)));
    return has_bias ? rounded(wide, xhat + rounded(wide, bias.get(c))) : xhat;
  }
  double weight_of(int64_t c) { return has_weight ? rounded(wide, weight.get(c)) : 1.0; }
  bool exact() const { return activation == REVK_IDENTITY || activation == REVK_RELU; }

  template <class Body>
  void for_each(Body&& body) const {
    for (int64_t o = 0; o < shape.outer; ++o)
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.inner; ++i) body(o, c, i);
  }

  const int kind, activation, groups;
  const Shape shape;
  const bool wide;
  bool has_weight = true, has_bias = true, runs = false;
  double eps = 1e-5;
  Cells mean, rstd, weight, bias, running_mean, running_var;
};

inline bool near(double got, double want, double tolerance) {
  return std::fabs(got - want) <= tolerance || (std::isnan(got) && std::isnan(want));
}

inline void fill(Array& array, std::mt19937& random, double mean, double deviation) {
  std::normal_distribution<double> normal(mean, deviation);
  array.fill(random, false);
  for (int64_t o = 0; o < array.shape.outer; ++o)
    for (int64_t c = 0; c < array.shape.channels; ++c)
      for (int64_t i = 0; i < array.shape.inner; ++i)
        write(array.dtype, array.at(o, c, i), normal(random));
}

// Statistics as a forward would leave them.
inline void make_statistics(Norm& norm, Array& x) {
  std::vector<double> means, variances;
  norm.moments(x, means, variances);
  for (int64_t at = 0; at < norm.statistics(); ++at)
    norm.mean.set(at, means[size_t(at)]),
        norm.rstd.set(at, 1 / std::sqrt(variances[size_t(at)] + norm.eps));
}

inline void check_statistics(Norm& norm, Array& s, const Cells& before_mean,
                             const Cells& before_var, const std::string& name) {
  std::vector<double> means, variances;
  norm.moments(s, means, variances);
  const double eps = norm.wide ? 1e-15 : 6e-8, n = norm.behind_each();
  bool right = true, ran = true;
  Cells running_mean = before_mean, running_var = before_var;
  for (int64_t at = 0; at < norm.statistics(); ++at) {
    const double mean = means[size_t(at)], variance = variances[size_t(at)];
    const double deviation = std::sqrt(variance + norm.eps);
    if (norm.kind != REVK_RMS_NORM)
      right = right && near(norm.mean.get(at), mean, eps * (2 * std::fabs(mean) + 20 * deviation));
    // A layer norm's mean is subtracted as rounded. Slices' means are float64: what they lose
    // counts where all else is float64 too.
    const double condition = eps * std::fabs(mean) / deviation;
    const double lost = condition * condition + (norm.wide ? condition : 0);
    right = right && near(norm.rstd.get(at) * deviation, 1, 20 * eps + 2 * lost);
    if (!norm.runs) continue;
    const double blended = 0.75 * running_mean.get(at) + 0.25 * mean,
                 blended_var =
                     0.75 * running_var.get(at) + 0.25 * variance * n / std::max(n - 1, 1.0);
    ran = ran && near(norm.running_mean.get(at), blended, 1e-6 * (1 + std::fabs(blended))) &&
          near(norm.running_var.get(at), blended_var, 1e-5 * (1 + blended_var));
  }
  test::expect(right, name + ": statistics");
  test::expect(ran, name + ": running statistics");
}

// What the norms are tried on.
struct Case {
  const char* name;
  Shape shape;
  Strides stream, branch;
  int groups;
};

inline Strides dense(Shape s) { return {s.channels * s.inner, s.inner, 1, 0}; }
inline Strides last(Shape s) { return {s.channels * s.inner, 1, s.channels, 0}; }
inline Case dense_case(const char* name, Shape s, int groups) {
  return {name, s, dense(s), dense(s), groups};
}
inline Case last_case(const char* name, Shape s, int groups) {
  return {name, s, last(s), last(s), groups};
}

const Case kCases[] = {
    last_case("tokens", {6, 24, 1}, 3),
    last_case("tokens, 7 channels", {37, 7, 1}, 7),
    last_case("channels-last", {2, 16, 9}, 2),
    {"channels-last halves", {2, 16, 9}, {288, 1, 32, 16}, {144, 1, 16, 0}, 4},
    last_case("channels-last, 96 channels", {2, 96, 5}, 3),
    last_case("channels-last, 5 channels", {3, 5, 4}, 1),
    dense_case("NCHW", {2, 8, 16}, 4),
    {"NCHW halves", {3, 4, 16}, {128, 16, 1, 64}, {64, 16, 1, 0}, 2},
    dense_case("NCHW 7x7", {2, 6, 49}, 2),
    {"NCHW, other operand channels-last", {2, 8, 16}, dense({2, 8, 16}), last({2, 8, 16}), 2},
    {"every second", {2, 3, 10}, {60, 20, 2, 0}, {30, 10, 1, 0}, 3},
    {"misaligned", {4, 16, 2}, {33, 1, 16, 1}, last({4, 16, 2}), 2},
    {"misaligned rows", {4, 16, 3}, {64, 1, 17, 0}, last({4, 16, 3}), 2},
    dense_case("one element", {1, 1, 1}, 1),
    dense_case("many images", {70, 2, 8}, 1),
    last_case("many rows", {300, 8, 1}, 2),
    last_case("one long line", {1, 8, 1100}, 2),
    dense_case("long planes", {1, 2, 2400}, 1),
    last_case("more channels than a team holds", {3, 2064, 1}, 3),
    // As long, but positions and statistics at equal distances, as a dense tensor's are.
    last_case("more channels than a team holds, straight", {1, 2064, 3}, 3),
    last_case("two packets a thread", {3, 400, 2}, 5),
    last_case("three packets a thread", {3, 640, 2}, 5),
    last_case("a block a position", {3, 1032, 2}, 3),
    last_case("two packets a thread, several rounds", {90, 384, 1}, 3),
};

}  // namespace oracle
