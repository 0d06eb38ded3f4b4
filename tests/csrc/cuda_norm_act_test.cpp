// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/norm_act.cu on the host: every kind of norm on layouts with every kind of trouble,
// activations, types and options in turn, both orders of blocks and threads.
#include <cmath>
#include <cstring>
#include <random>
#include <string>

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

void try_forward(const Case& c, const Options& options, std::mt19937& random) {
  using Call = revk::NormActCall;
  const bool coupled = options.coupling != Call::kNone,
             subtract = options.coupling == Call::kUncouple;
  const bool wide =
      coupled ? oracle::is_wide(options.stream, options.branch) : options.stream == REVK_FLOAT64;
  Array x(options.stream, c.shape, c.stream), f(options.branch, c.shape, c.branch);
  Array s(options.stream, c.shape, c.stream), h(options.h, c.shape, c.branch);
  fill(x, random, options.mean, options.deviation);
  for (Array* array : {&f, &s, &h}) fill(*array, random, 0.1, 1);
  Norm norm(options.kind, options.activation, c.groups, c.shape, wide,
            options.runs ? REVK_BFLOAT16
            : wide       ? REVK_FLOAT64
                         : REVK_FLOAT32);
  norm.weight.fill(random, 1, 0.5), norm.bias.fill(random, 0, 0.5);
  norm.has_weight = norm.has_bias = options.parameters;
  norm.runs = options.runs && options.kind == REVK_BATCH_NORM && !options.given;
  norm.running_mean.fill(random, 0, 1), norm.running_var.fill(random, 2, 0.1);
  const Cells running_mean = norm.running_mean, running_var = norm.running_var;

  Array& stored = coupled && !options.in_place ? s : x;
  Array want_s = stored, want_h = h, x_before = x, f_before = f;
  if (coupled)
    for (int64_t o = 0; o < c.shape.outer; ++o)
      for (int64_t k = 0; k < c.shape.channels; ++k)
        for (int64_t i = 0; i < c.shape.inner; ++i) {
          const double branch = subtract ? -f.get(o, k, i) : f.get(o, k, i);
          oracle::write(options.stream, want_s.at(o, k, i),
                        oracle::rounded(wide, x.get(o, k, i) + branch));
        }
  if (options.given) make_statistics(norm, want_s);
  // One pass has no partial results.
  const bool one_pass =
      options.given || options.kind == REVK_LAYER_NORM || options.kind == REVK_RMS_NORM;
  Cells space = one_pass ? Cells(REVK_FLOAT64, 0) : workspace(stored, norm);
  Call call{};
  call.h = h.view(), call.s = stored.view(), call.norm = norm.view(options.given, space);
  if (coupled) call.x = x.view(), call.f = f.view();
  call.coupling = Call::Coupling(options.coupling);
  call.compute_dtype = wide ? REVK_FLOAT64 : REVK_FLOAT32;
  revk::cuda::norm_act(call, where());

  const std::string name = title(c, options);
  test::expect(stored.same(want_s), name + ": s");
  test::expect(f.same(f_before), name + ": f was written");
  if (&stored != &x) test::expect(x.same(x_before), name + ": x was written");
  if (!options.given) oracle::check_statistics(norm, stored, running_mean, running_var, name);
  bool right = true;
  norm.for_each([&](int64_t o, int64_t k, int64_t i) {
    const double z = norm.z(norm.xhat(stored.get(o, k, i), norm.statistic(o, k, i)), k);
    const double want = oracle::activated(options.activation, z);
    const double tolerance =
        std::fabs(want) * (oracle::spacing(options.h) + (wide ? 1e-14 : 1e-5)) +
        oracle::smallest(options.h);
    if (!norm.exact()) {
      right = right && near(h.get(o, k, i), want, tolerance);
      std::memcpy(want_h.at(o, k, i), h.at(o, k, i), size_t(oracle::size_of(options.h)));
    } else {
      oracle::write(options.h, want_h.at(o, k, i), want);
    }
  });
  test::expect(right && h.same(want_h), name + ": h");
}

namespace {

void try_forwards(int each) {
  std::mt19937 random(21);
  int turn = 0;
  for (const Case& c : kCases)
    for (int kind = 0; kind < 4; ++kind)
      for (int more = 0; more < each; ++more) try_forward(c, some(kind, turn++, random), random);
}

// This runs when named, beside the other kernels' tests.
const test::Register kForward("norm_act", [] { try_forwards(2); }, false);
// For planted faults, of which there are many.
const test::Register kSomeForward("norm_act, briefly", [] { try_forwards(1); }, false);

}  // namespace
}  // namespace norms
