// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/norm_act.cu and norm_act_backward.cu on the host: every kind of norm on layouts with
// every kind of trouble, activations, types and options in turn, both orders of blocks and threads.
// What the header fixes to the bit is compared by bits; sums against float64, with the rounding of
// the compute type as tolerance.
#include <random>
#include <string>
#include <vector>

#include "core/backends.h"
#include "cuda_norm_oracle.h"
#include "cuda_oracle.h"
#include "cuda_test.h"

namespace {

using oracle::Array;
using oracle::Case;
using oracle::Cells;
using oracle::dense_case;
using oracle::fill;
using oracle::kCases;
using oracle::last_case;
using oracle::make_statistics;
using oracle::near;
using oracle::Norm;
using oracle::Shape;
using oracle::Strides;

const char* const kKinds[] = {"batch", "layer", "rms", "group"};
const char* const kTypes[] = {"float64", "float32", "bfloat16", "float16"};

revk_where where() { return {int32_t(sizeof(revk_where)), 0, nullptr, 0}; }

// The workspace, filled with NaN: nobody may count on zeros.
Cells workspace(Array& x, Norm& norm) {
  Cells none(REVK_FLOAT64, 0);
  const int64_t bytes = revk::cuda::norm_workspace(x.view(), norm.view(false, none), where());
  test::expect(bytes >= 0 && bytes % 8 == 0, "bytes of the workspace");
  Cells cells(REVK_FLOAT64, bytes / 8);
  for (int64_t i = 0; i < cells.count; ++i) cells.set(i, NAN);
  return cells;
}

// What one call is made with.
struct Options {
  int kind, activation, stream, branch, h;
  int coupling;  // revk::NormActCall::Coupling
  bool in_place, given, parameters, runs;
  double mean, deviation;
};

std::string title(const Case& c, const Options& o) {
  return std::string(c.name) + ", " + kKinds[o.kind] + ", activation " +
         std::to_string(o.activation) + ", " + kTypes[o.stream] + " " + kTypes[o.branch] + " -> " +
         kTypes[o.h] + (o.coupling ? o.in_place ? ", coupled in place" : ", coupled" : "") +
         (o.given ? ", given" : "") + (shim::machine.backwards ? ", backwards" : "");
}

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

// How a backward is called.
struct Way {
  const char* name;
  int base;  // 0: none, 1: apart, 2: dx itself
  int sums;
  bool constant, parameters, wanted;
};

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

// Types that go in words, float64 in words, and mixtures that do not; the turn picks.
Options some(int kind, int turn, std::mt19937& random) {
  const int types[][3] = {
      {REVK_FLOAT32, REVK_BFLOAT16, REVK_BFLOAT16}, {REVK_BFLOAT16, REVK_BFLOAT16, REVK_FLOAT16},
      {REVK_FLOAT32, REVK_FLOAT32, REVK_FLOAT32},   {REVK_FLOAT64, REVK_FLOAT64, REVK_FLOAT64},
      {REVK_FLOAT16, REVK_FLOAT32, REVK_FLOAT64},   {REVK_FLOAT64, REVK_FLOAT16, REVK_FLOAT32}};
  const int* type = types[turn % 6];
  Options o{};
  o.kind = kind, o.activation = int(random() % 5);
  o.stream = type[0], o.branch = type[1], o.h = type[2];
  o.coupling = turn % 3, o.in_place = random() % 2;
  o.given = random() % 3 == 0, o.parameters = random() % 4 != 0, o.runs = random() % 2;
  o.mean = 0.5, o.deviation = 2;
  shim::machine.backwards = random() % 2;
  return o;
}

const Way kWays[] = {
    {"plain", 0, REVK_SUMS_COMPUTED, false, true, true},
    {"accumulated", 2, REVK_SUMS_COMPUTED, false, true, true},
    {"base apart", 1, REVK_SUMS_COMPUTED, false, false, false},
    {"constant", 2, REVK_SUMS_COMPUTED, true, true, true},
    {"constant, sums not wanted", 0, REVK_SUMS_COMPUTED, true, false, false},
    {"sums only", 0, REVK_SUMS_ONLY, false, true, true},
    {"sums given", 1, REVK_SUMS_GIVEN, false, true, true},
};

void try_forwards(int each) {
  std::mt19937 random(21);
  int turn = 0;
  for (const Case& c : kCases)
    for (int kind = 0; kind < 4; ++kind)
      for (int more = 0; more < each; ++more) try_forward(c, some(kind, turn++, random), random);
}

void try_backwards(int each) {
  std::mt19937 random(22);
  int turn = 0;
  for (const Case& c : kCases)
    for (int kind = 0; kind < 4; ++kind)
      for (int more = 0; more < each; ++more, ++turn)
        try_backward(c, some(kind, turn, random),
                     kWays[random() % (kind == REVK_BATCH_NORM ? 7 : 4)], random);
}

// These run when named, beside the other kernels' tests.
const test::Register kForward("norm_act", [] { try_forwards(2); }, false);
const test::Register kBackward("norm_act_backward", [] { try_backwards(2); }, false);
// For planted faults, of which there are many.
const test::Register kSomeForward("norm_act, briefly", [] { try_forwards(1); }, false);
const test::Register kSomeBackward("norm_act_backward, briefly", [] { try_backwards(1); }, false);

// A mean ten thousand times the deviation: what sums of squares would lose altogether.
const test::Register kFarMean(
    "norm_act, mean 1e4",
    [] {
      std::mt19937 random(24);
      const Case cases[] = {last_case("rows", {100, 8, 4}, 2),
                            dense_case("planes", {3, 4, 400}, 2)};
      for (const Case& c : cases)
        for (int kind = 0; kind < 4; ++kind)
          for (const int coupling : {0, 1}) {
            Options o = some(kind, 2 + coupling, random);  // float32, and float64 coupled
            o.coupling = coupling, o.given = false, o.mean = 1e4, o.deviation = 1;
            try_forward(c, o, random);
            try_backward(c, o, kWays[1], random);
          }
    },
    false);

// Values that are infinite or NaN make their own statistics NaN, and no others.
const test::Register kNaN(
    "norm_act, NaN",
    [] {
      std::mt19937 random(25);
      const Case c = last_case("rows", {40, 8, 2}, 4);
      for (int kind = 0; kind < 4; ++kind)
        for (const double odd : {double(NAN), double(INFINITY)}) {
          Array x(REVK_FLOAT32, c.shape, c.stream), h(REVK_FLOAT32, c.shape, c.stream);
          fill(x, random, 0, 1), fill(h, random, 0, 1);
          oracle::write(REVK_FLOAT32, x.at(3, 5, 1), odd);
          Norm norm(kind, REVK_RELU, c.groups, c.shape, false, REVK_FLOAT32);
          norm.has_weight = norm.has_bias = false;
          Cells space = workspace(x, norm);
          revk::NormActCall call{};
          call.h = h.view(), call.s = x.view(), call.norm = norm.view(false, space);
          call.compute_dtype = REVK_FLOAT32;
          revk::cuda::norm_act(call, where());
          const int64_t spoilt = norm.statistic(3, 5, 1);
          bool right = true;
          norm.for_each([&](int64_t o, int64_t k, int64_t i) {
            const bool mine = norm.statistic(o, k, i) == spoilt, nan = std::isnan(h.get(o, k, i));
            // An infinite mean square makes the finite elements of an RMS norm 0.
            if (kind != REVK_RMS_NORM || std::isnan(odd)) right = right && mine == nan;
            if (!mine) right = right && !nan;
          });
          test::expect(right && std::isnan(h.get(3, 5, 1)),
                       std::string(kKinds[kind]) + " with " + std::to_string(odd));
        }
    },
    false);

// Tokens of a dense tensor, and halves of them: one line, in which an address takes one
// multiplication. Teams of a warp with one packet a thread, two and three, of two warps, and of a
// block; several positions a team.
const test::Register kOneLine(
    "norm_act, one line",
    [] {
      std::mt19937 random(27);
      const int types[][2] = {{REVK_FLOAT32, REVK_BFLOAT16},
                              {REVK_FLOAT32, REVK_FLOAT32},
                              {REVK_FLOAT16, REVK_FLOAT16}};
      const Shape shapes[] = {{1, 256, 45},  {1, 384, 61}, {1, 392, 57}, {1, 640, 53},
                              {1, 1024, 29}, {1, 1536, 5}, {1, 2064, 3}};
      int turn = 0;
      for (const Shape& shape : shapes) {
        Case c = last_case("one line", shape, 1);
        if (shape.channels == 392) c.stream.inner = 784, c.stream.offset = 392;
        for (const auto& [stream, branch] : types) {
          const int kind = turn % 2 ? REVK_LAYER_NORM : REVK_RMS_NORM;
          Options o = some(kind, turn, random);
          o.stream = stream, o.branch = o.h = branch, o.given = false;
          try_forward(c, o, random);
          o.branch = stream;  // the type of dx
          try_backward(c, o, kWays[turn++ % 3], random);
        }
      }
    },
    false);

// The device's size and the order of blocks change nothing, and no launch goes anywhere else.
const test::Register kSame(
    "norm_act, the same everywhere",
    [] {
      const Case cases[] = {last_case("rows", {70, 64, 3}, 2),
                            dense_case("planes", {3, 2, 3000}, 2)};
      for (const Case& c : cases)
        for (int kind = 0; kind < 4; ++kind) {
          std::vector<Cells> results[2];
          for (int device = 0; device < 2; ++device) {
            std::mt19937 random(26);
            Array x(REVK_FLOAT32, c.shape, c.stream), h(REVK_BFLOAT16, c.shape, c.branch),
                dx(REVK_FLOAT32, c.shape, c.stream);
            fill(x, random, 1, 1), fill(h, random, 0, 1), fill(dx, random, 0, 1);
            Norm norm(kind, REVK_SILU, c.groups, c.shape, false, REVK_FLOAT32);
            norm.weight.fill(random, 1, 1), norm.bias.fill(random, 0, 1);
            Cells space = workspace(x, norm), dweight(REVK_FLOAT32, c.shape.channels),
                  dbias(dweight);
            shim::machine.backwards = device == 1;
            shim::machine.launches.clear();
            revk::NormActCall call{};
            call.h = h.view(), call.s = x.view(), call.norm = norm.view(false, space);
            call.compute_dtype = REVK_FLOAT32;
            revk_where there = where();
            there.device = device, there.stream = &c - cases ? &there : nullptr;
            shim::machine.multiprocessors = 1 + 6 * device;
            revk::cuda::norm_act(call, there);
            revk::NormActBackwardCall back{};
            back.dx = dx.view(), back.dh = h.view(), back.x = x.view();
            back.norm = norm.view(true, space);
            back.gradient.dweight = dweight.data(), back.gradient.dbias = dbias.data();
            back.gradient.count = c.shape.outer * c.shape.inner;
            back.compute_dtype = REVK_FLOAT32;
            revk::cuda::norm_act_backward(back, there);
            for (const auto& launched : shim::machine.launches)
              test::expect(launched.device == device && launched.stream == there.stream,
                           "launched on the caller's device and stream");
            unsigned most = 0;
            for (const auto& launched : shim::machine.launches)
              most = std::max(most, launched.blocks);
            test::expect(most > 1, "more than one block");
            Cells all(REVK_FLOAT32, c.shape.outer * c.shape.channels * c.shape.inner);
            int64_t at = 0;
            norm.for_each([&](int64_t o, int64_t k, int64_t i) { all.set(at++, dx.get(o, k, i)); });
            for (const Cells& cells : {norm.mean, norm.rstd, dweight, dbias, all})
              results[device].push_back(cells);
          }
          for (size_t i = 0; i < results[0].size(); ++i)
            test::expect(results[0][i] == results[1][i], std::string(c.name) + ", " + kKinds[kind] +
                                                             ": result " + std::to_string(i));
        }
    },
    false);

}  // namespace
