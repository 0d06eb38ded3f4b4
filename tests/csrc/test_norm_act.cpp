// SPDX-License-Identifier: Apache-2.0
// The norms' C entries: what they refuse, their structs from other versions, empty arrays; and the
// activations' accuracy, which csrc/ops/norm_act.h states.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/structs.h"
#include "ops/norm_act.h"
#include "revkernels/revkernels.h"

namespace {

int failures = 0;

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      ++failures;                                                                                  \
      std::fprintf(stderr, "%s:%d: %s is false. Last error: %s\n", __FILE__, __LINE__, #condition, \
                   revk_last_error());                                                             \
    }                                                                                              \
  } while (false)

bool says(const char* text) {
  return std::string(revk_last_error()).find(text) != std::string::npos;
}

constexpr int64_t kRows = 4, kChannels = 6;

// Four rows of six channels and everything that a call on them needs.
struct Arrays {
  std::vector<float> x, f, h, mean, rstd, weight, sums;
  revk_where where{int32_t(sizeof(revk_where)), -1, nullptr, 0};
  revk_norm norm{};
  revk_norm_gradient gradient{};

  Arrays() : f(24, 1.0f), h(24, 7.0f), mean(6, 7.0f), rstd(6, 7.0f), weight(6, 1.0f), sums(12) {
    for (int i = 0; i < 24; ++i) x.push_back(float(i * i % 17));
    norm.struct_size = int32_t(sizeof norm);
    norm.kind = REVK_BATCH_NORM;
    norm.activation = REVK_RELU;
    norm.eps = 1e-5;
    norm.parameter_dtype = norm.running_dtype = REVK_FLOAT32;
    norm.weight = weight.data();
    norm.mean = mean.data();
    norm.rstd = rstd.data();
    gradient.struct_size = int32_t(sizeof gradient);
    gradient.dweight = sums.data();
    gradient.dbias = sums.data() + 6;
  }
  static revk_view view(std::vector<float>& of) {
    return {int32_t(sizeof(revk_view)), REVK_FLOAT32, of.data(), kRows, kChannels, 1, 6, 1, 1};
  }
  revk_status run(const revk_norm& with) {
    const revk_view to = view(h), from = view(x);
    return revk_norm_act(&to, &from, &with, &where);
  }
  bool untouched() const {
    return h == std::vector<float>(24, 7.0f) && rstd == std::vector<float>(6, 7.0f) &&
           mean == std::vector<float>(6, 7.0f);
  }
  bool refuses(const revk_norm& with, const char* text) {
    return run(with) == REVK_INVALID_ARGUMENT && says(text) && untouched();
  }
};

void test_norm_refusals() {
  Arrays a;
  revk_norm bad = a.norm;
  bad.struct_size = 8;
  CHECK(a.refuses(bad, "norm: struct_size is 8"));
  bad = a.norm, bad.kind = 4;
  CHECK(a.refuses(bad, "norm: kind is 4, 0..3"));
  bad = a.norm, bad.activation = -1;
  CHECK(a.refuses(bad, "norm: activation is -1"));
  bad = a.norm, bad.parameter_dtype = 7;
  CHECK(a.refuses(bad, "norm: parameter_dtype is 7"));
  bad = a.norm, bad.reserved = 1;
  CHECK(a.refuses(bad, "norm: reserved is 1"));
  bad = a.norm, bad.eps = -1.0;
  CHECK(a.refuses(bad, "norm: eps is -1"));
  bad = a.norm, bad.momentum = std::nan("");
  CHECK(a.refuses(bad, "norm: momentum is"));
  bad = a.norm, bad.groups = 2;
  CHECK(a.refuses(bad, "norm: groups is 2, 0 is needed for a batch norm"));
  bad = a.norm, bad.kind = REVK_GROUP_NORM, bad.groups = 4;
  CHECK(a.refuses(bad, "norm: groups is 4, a divisor of the 6 channels of x"));
  bad = a.norm, bad.rstd = nullptr;
  CHECK(a.refuses(bad, "norm: rstd is NULL"));
  bad = a.norm, bad.mean = nullptr;
  CHECK(a.refuses(bad, "norm: mean is NULL"));
  bad = a.norm, bad.kind = REVK_RMS_NORM;
  CHECK(a.refuses(bad, "norm: mean is given, NULL is needed"));
  bad = a.norm, bad.running_mean = a.f.data();
  CHECK(a.refuses(bad, "norm: one of running_mean and running_var is NULL"));
  bad = a.norm, bad.weight = reinterpret_cast<char*>(a.weight.data()) + 1;
  CHECK(a.refuses(bad, "norm: weight is not aligned"));
  bad = a.norm, bad.mean = a.norm.rstd;
  CHECK(a.refuses(bad, "is written and overlaps"));
  bad = a.norm, bad.rstd = a.x.data() + 3;
  CHECK(a.refuses(bad, "norm: rstd is written and overlaps x"));
  bad = a.norm, bad.weight = a.h.data() + 3;
  CHECK(a.refuses(bad, "h: is written and overlaps norm's weight"));
  // Statistics of a layer norm whose indices share an element.
  bad = a.norm, bad.kind = REVK_LAYER_NORM, bad.statistics_outer_stride = 0;
  CHECK(a.refuses(bad, "several indices of"));
  bad.statistics_outer_stride = -1;
  CHECK(a.refuses(bad, "norm: statistics_outer_stride is -1, 0 or more is needed"));
  const revk_view x = Arrays::view(a.x), h = Arrays::view(a.h), f = Arrays::view(a.f);
  CHECK(revk_norm_act(&x, &x, &a.norm, &a.where) == REVK_INVALID_ARGUMENT &&
        says("h: is written and overlaps x"));
  CHECK(revk_norm_act(&h, &x, nullptr, &a.where) == REVK_INVALID_ARGUMENT && says("norm is NULL"));
  CHECK(revk_couple_norm_act(&h, &f, &x, &f, &a.norm, &a.where) == REVK_INVALID_ARGUMENT &&
        says("y: is written and overlaps f"));
  CHECK(revk_norm_workspace(&x, &a.norm, &a.where) == 0);
  bad = a.norm, bad.kind = 9;
  CHECK(revk_norm_workspace(&x, &bad, &a.where) == -1 && says("norm: kind is 9"));
  CHECK(a.untouched());
}

void test_gradient_refusals() {
  Arrays a;
  const revk_view x = Arrays::view(a.x), dh = Arrays::view(a.f), dx = Arrays::view(a.h);
  revk_norm norm = a.norm;
  norm.statistics_given = 1;
  const auto refused = [&](const revk_norm& with, const revk_norm_gradient& g, const revk_view* to,
                           const char* text) {
    return revk_norm_act_backward(to, nullptr, &dh, &x, &with, &g, &a.where) ==
               REVK_INVALID_ARGUMENT &&
           says(text) && a.untouched();
  };
  CHECK(refused(a.norm, a.gradient, &dx, "statistics_given is 0, 1 is needed"));
  revk_norm_gradient bad = a.gradient;
  bad.sums = 3;
  CHECK(refused(norm, bad, &dx, "gradient: sums is 3"));
  bad = a.gradient, bad.count = -1;
  CHECK(refused(norm, bad, &dx, "gradient: count is -1"));
  bad = a.gradient, bad.dweight = nullptr;
  CHECK(refused(norm, bad, &dx, "gradient: dweight is NULL; a batch norm needs it"));
  bad = a.gradient, bad.dbias = a.gradient.dweight;
  CHECK(refused(norm, bad, &dx, "is written and overlaps"));
  bad = a.gradient, bad.sums = REVK_SUMS_ONLY;
  CHECK(refused(norm, bad, &dx, "dx is given, NULL is needed for REVK_SUMS_ONLY"));
  CHECK(refused(norm, a.gradient, nullptr, "dx is NULL"));
  revk_norm layer = norm;
  layer.kind = REVK_LAYER_NORM, layer.statistics_outer_stride = 1;
  bad = a.gradient, bad.sums = REVK_SUMS_GIVEN;
  CHECK(refused(layer, bad, &dx, "sums must be REVK_SUMS_COMPUTED for a layer norm"));
  bad = a.gradient, bad.constant = 1;
  CHECK(refused(layer, bad, &dx, "constant must be 0 for a layer norm"));
}

void test_structs() {
  if (sizeof(void*) == 8)
    CHECK(revk::kFirstSize<revk_norm> == 128 && revk::kFirstSize<revk_norm_gradient> == 40);
  Arrays a;
  struct {
    revk_norm known;
    int64_t added;
  } newer{a.norm, 0};
  newer.known.struct_size = int32_t(sizeof newer);
  CHECK(a.run(newer.known) == REVK_OK && !a.untouched());
  Arrays b;
  newer.known = b.norm, newer.known.struct_size = int32_t(sizeof newer), newer.added = 1;
  CHECK(b.run(newer.known) == REVK_UNSUPPORTED && says("norm: sets a field") && b.untouched());
}

// Without elements statistics are those of an empty sum, and the gradients of parameters 0.
void test_empty() {
  Arrays a;
  revk_view x = Arrays::view(a.x), h = Arrays::view(a.h), dx = Arrays::view(a.f);
  x.outer = h.outer = dx.outer = 0;
  CHECK(revk_norm_act(&h, &x, &a.norm, &a.where) == REVK_OK);
  CHECK(a.mean == std::vector<float>(6, 0.0f));
  CHECK(a.rstd == std::vector<float>(6, float(1 / std::sqrt(1e-5))));
  a.norm.statistics_given = 1;
  a.sums.assign(12, 7.0f);
  CHECK(revk_norm_act_backward(&dx, nullptr, &h, &x, &a.norm, &a.gradient, &a.where) == REVK_OK);
  CHECK(a.sums == std::vector<float>(12, 0.0f));
}

// Two rows by hand: mean (0 + 4) / 2, deviation 2.
void test_by_hand() {
  std::vector<float> x{0, 4}, h(2), mean(1), rstd(1), sums(2), dh{1, 1}, dx{10, 10};
  Arrays a;
  a.norm.eps = 0.0, a.norm.weight = nullptr;
  a.norm.mean = mean.data(), a.norm.rstd = rstd.data();
  const auto view = [](std::vector<float>& of) {
    return revk_view{int32_t(sizeof(revk_view)), REVK_FLOAT32, of.data(), 2, 1, 1, 1, 1, 1};
  };
  const revk_view from = view(x), to = view(h), above = view(dh), below = view(dx);
  CHECK(revk_norm_act(&to, &from, &a.norm, &a.where) == REVK_OK);
  CHECK(mean[0] == 2.0f && rstd[0] == 0.5f && h[0] == 0.0f && h[1] == 1.0f);
  a.norm.statistics_given = 1;
  a.gradient.dweight = sums.data(), a.gradient.dbias = sums.data() + 1;
  CHECK(revk_norm_act_backward(&below, &below, &above, &from, &a.norm, &a.gradient, &a.where) ==
        REVK_OK);
  // dz = (0, 1): dweight 1, dbias 1, gradient 0.5 * (dz - (1 + xhat) / 2) = (0, 0)
  CHECK(sums[0] == 1.0f && sums[1] == 1.0f && dx[0] == 10.0f && dx[1] == 10.0f);
}

template <class Function>
double worst_error(Function function, bool relative) {
  double worst = 0.0;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += 9973) {
    const float z = revk::bits_as<float>(uint32_t(bits));
    if (!(std::fabs(z) < 1e30f)) continue;
    const double exact = function(double(z)), got = double(function(z));
    if (relative && std::fabs(exact) < 1e-36) continue;
    const double unit =
        relative ? std::ldexp(1.0, std::ilogb(exact) - 23) : std::fmax(1.0, std::fabs(exact));
    const double error = std::fabs(got - exact) / unit;
    worst = error <= worst ? worst : error;  // a NaN stays
  }
  return worst;
}

void test_activations() {
  using namespace revk::ops;
  CHECK(worst_error([](auto z) { return Gelu::value(z); }, true) <= 6.0);
  CHECK(worst_error([](auto z) { return GeluTanh::value(z); }, true) <= 3.1);
  CHECK(worst_error([](auto z) { return Silu::value(z); }, true) <= 3.1);
  CHECK(worst_error([](auto z) { return detail::decay_of(z); }, true) <= 1.1);
  CHECK(worst_error([](auto z) { return Gelu::gradient(z, decltype(z)(1)); }, false) <= 2e-7);
  CHECK(worst_error([](auto z) { return GeluTanh::gradient(z, decltype(z)(1)); }, false) <= 2e-7);
  CHECK(worst_error([](auto z) { return Silu::gradient(z, decltype(z)(1)); }, false) <= 2e-7);
  const float inf = INFINITY, nan = NAN;
  CHECK(Gelu::value(inf) == inf && GeluTanh::value(inf) == inf && Silu::value(inf) == inf);
  CHECK(std::isnan(Gelu::value(nan)) && std::isnan(GeluTanh::value(nan)) &&
        std::isnan(Silu::value(nan)) && std::isnan(Relu::value(nan)));
  CHECK(std::isnan(Gelu::gradient(nan, 1.0f)) && std::isnan(Silu::gradient(nan, 1.0f)));
  CHECK(Gelu::value(40.0f) == 40.0f && Gelu::value(-40.0f) == 0.0f);
  CHECK(Gelu::gradient(-inf, 1.0f) == 0.0f && Silu::gradient(inf, 1.0f) == 1.0f);
  CHECK(Relu::value(-0.0f) == 0.0f && Relu::gradient(0.0f, 5.0f) == 0.0f);
  // The double functions by another formula.
  for (double z = -6.0; z < 6.0; z += 0.37) {
    const double cdf = 0.5 * (1.0 + std::erf(z / std::sqrt(2.0)));
    const double u = std::sqrt(2.0 / std::acos(-1.0)) * (z + 0.044715 * z * z * z);
    CHECK(std::fabs(Gelu::value(z) - z * cdf) < 1e-14);
    CHECK(std::fabs(GeluTanh::value(z) - 0.5 * z * (1.0 + std::tanh(u))) < 1e-14);
    CHECK(std::fabs(Silu::value(z) - z / (1.0 + std::exp(-z))) < 1e-14);
    const double d = 1e-6;
    CHECK(std::fabs(Gelu::gradient(z, 1.0) - (Gelu::value(z + d) - Gelu::value(z - d)) / (2 * d)) <
          1e-8);
    CHECK(std::fabs(Silu::gradient(z, 1.0) - (Silu::value(z + d) - Silu::value(z - d)) / (2 * d)) <
          1e-8);
    CHECK(std::fabs(GeluTanh::gradient(z, 1.0) -
                    (GeluTanh::value(z + d) - GeluTanh::value(z - d)) / (2 * d)) < 1e-8);
  }
}

}  // namespace

int main() {
  test_norm_refusals();
  test_gradient_refusals();
  test_structs();
  test_empty();
  test_by_hand();
  test_activations();
  if (failures == 0) std::puts("all passed");
  return failures != 0;
}
