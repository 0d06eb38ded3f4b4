// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/norm_act_backward.cu on the host: every kind of norm on layouts with every kind of
// trouble, activations, types and ways to call it in turn, both orders of blocks and threads.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/backends.h"
#include "cuda_norm_calls.h"
#include "cuda_norm_oracle.h"
#include "cuda_oracle.h"
#include "cuda_test.h"

namespace norms {

using oracle::fill;
using oracle::kCases;
using oracle::make_statistics;
using oracle::near;

void try_backward(const Case& c, const Options& options, const Way& way, std::mt19937& random) {
  const bool wide = options.stream == REVK_FLOAT64, batch = options.kind == REVK_BATCH_NORM;
  Array x(options.stream, c.shape, c.stream), dh(options.h, c.shape, c.branch);
  Array dx(options.branch, c.shape, c.stream), base(options.branch, c.shape, c.stream);
  fill(x, random, options.mean, options.deviation);
  for (Array* array : {&dh, &dx, &base}) fill(*array, random, 0.1, 1);
  Norm norm(options.kind, options.activation, c.groups, c.shape, wide, REVK_FLOAT32);
  norm.weight.fill(random, 1, 0.5), norm.bias.fill(random, 0, 0.5);
  norm.has_weight = norm.has_bias = way.parameters;
  make_statistics(norm, x);
  const int compute = wide ? REVK_FLOAT64 : REVK_FLOAT32;
  Cells dweight(compute, c.shape.channels), dbias(dweight);
  dweight.fill(random, 0, 5), dbias.fill(random, 0, 5);
  Cells space = workspace(x, norm);

  // float64, from xhat as it rounds; dz as it rounds where that is exact.
  const double n = norm.behind_each(), eps = wide ? 1e-15 : 6e-8;
  const size_t channels = size_t(c.shape.channels), sets = size_t(norm.statistics());
  std::vector<double> sum_dz(channels), sum_dzx(channels), size_dz(channels), size_dzx(channels),
      sum_g(sets), sum_gx(sets), size_g(sets), size_gx(sets);
  const auto dz_of = [&](int64_t o, int64_t k, int64_t i, double xhat) {
    const double slope = oracle::slope(options.activation, norm.z(xhat, k));
    return slope == 0 ? 0.0 : oracle::rounded(wide, dh.get(o, k, i)) * slope;  // no -0 from ReLU
  };
  norm.for_each([&](int64_t o, int64_t k, int64_t i) {
    const size_t at = size_t(norm.statistic(o, k, i)), channel = size_t(k);
    const double xhat = norm.xhat(x.get(o, k, i), int64_t(at)), dz = dz_of(o, k, i, xhat);
    const double g = dz * norm.weight_of(k);
    sum_dz[channel] += dz, sum_dzx[channel] += dz * xhat;
    size_dz[channel] += std::fabs(dz) + 0.1, size_dzx[channel] += std::fabs(dz * xhat) + 0.1;
    sum_g[at] += g, sum_gx[at] += g * xhat;
    size_g[at] += std::fabs(g) + 0.1, size_gx[at] += std::fabs(g * xhat) + 0.1;
  });

  const bool writes = way.sums != REVK_SUMS_ONLY;
  Array want = dx, before = way.base == 2 ? dx : base, dx_before = dx, base_before = base;
  revk::NormActBackwardCall call{};
  if (writes) call.dx = dx.view();
  if (writes && way.base) call.base = way.base == 2 ? dx.view() : base.view();
  call.dh = dh.view(), call.x = x.view();
  call.norm = norm.view(true, space);
  call.gradient.struct_size = int32_t(sizeof call.gradient);
  call.gradient.sums = way.sums, call.gradient.constant = way.constant;
  const double count = way.sums == REVK_SUMS_GIVEN ? 3 * n : n;
  call.gradient.count = int64_t(count);
  if (way.wanted || batch) call.gradient.dweight = dweight.data();
  if ((way.wanted && options.parameters) || batch) call.gradient.dbias = dbias.data();
  call.compute_dtype = compute;
  revk::cuda::norm_act_backward(call, where());

  const std::string name = title(c, options) + ", backward, " + way.name;
  test::expect(base.same(base_before), name + ": base was written");
  if (!writes) test::expect(dx.same(dx_before), name + ": dx was written");
  const double exactly = norm.exact() ? eps : wide ? 1e-13 : 2e-6;
  if (way.sums != REVK_SUMS_GIVEN) {
    bool right = true;
    for (size_t k = 0; k < channels; ++k) {
      if (call.gradient.dweight)
        right =
            right && near(dweight.get(int64_t(k)), sum_dzx[k], (exactly + 8 * eps) * size_dzx[k]);
      if (call.gradient.dbias)
        right = right && near(dbias.get(int64_t(k)), sum_dz[k], (exactly + 8 * eps) * size_dz[k]);
    }
    test::expect(right, name + ": dweight or dbias");
  }
  if (!writes) return;
  bool right = true;
  const auto round = [&](double value) { return oracle::rounded(wide, value); };
  norm.for_each([&](int64_t o, int64_t k, int64_t i) {
    const int64_t at = norm.statistic(o, k, i);
    const double xhat = norm.xhat(x.get(o, k, i), at), dz = dz_of(o, k, i, xhat);
    const double weight = norm.weight_of(k), rstd = norm.rstd.get(at);
    const double scale = round(weight * rstd);
    double gradient, size;
    if (way.constant) {
      gradient = round(scale * dz), size = std::fabs(gradient);
    } else if (batch) {
      const double mean_g = round(dbias.get(k) / count), mean_gx = round(dweight.get(k) / count);
      gradient = round(scale * round(round(dz - mean_g) - round(xhat * mean_gx)));
      size = std::fabs(scale) * (std::fabs(dz) + std::fabs(mean_g) + std::fabs(xhat * mean_gx));
    } else {
      const double mean_g = norm.kind == REVK_RMS_NORM ? 0 : sum_g[size_t(at)] / n,
                   mean_gx = sum_gx[size_t(at)] / n, g = dz * weight;
      gradient = rstd * (g - mean_g - xhat * mean_gx);
      size =
          rstd * (std::fabs(g) + (size_g[size_t(at)] + std::fabs(xhat) * size_gx[size_t(at)]) / n);
    }
    size += std::fabs(scale * dh.get(o, k, i));  // a small slope is a difference of larger terms
    const double start = way.base ? before.get(o, k, i) : 0;
    const double result = way.base ? round(start + gradient) : gradient;
    if (norm.exact() && (way.constant || batch)) {
      oracle::write(options.branch, want.at(o, k, i), result);
      return;
    }
    const double tolerance = (exactly + 8 * eps) * (size + std::fabs(start)) +
                             oracle::spacing(options.branch) * std::fabs(result) +
                             oracle::smallest(options.branch);
    right = right && near(dx.get(o, k, i), result, tolerance);
    std::memcpy(want.at(o, k, i), dx.at(o, k, i), size_t(oracle::size_of(options.branch)));
  });
  test::expect(right && dx.same(want), name + ": dx");
}

namespace {

void try_backwards(int each) {
  std::mt19937 random(22);
  int turn = 0;
  for (const Case& c : kCases)
    for (int kind = 0; kind < 4; ++kind)
      for (int more = 0; more < each; ++more, ++turn)
        try_backward(c, some(kind, turn, random),
                     kWays[random() % (kind == REVK_BATCH_NORM ? 7 : 4)], random);
}

// This runs when named, beside the other kernels' tests.
const test::Register kBackward("norm_act_backward", [] { try_backwards(2); }, false);
// For planted faults, of which there are many.
const test::Register kSomeBackward("norm_act_backward, briefly", [] { try_backwards(1); }, false);

}  // namespace
}  // namespace norms
