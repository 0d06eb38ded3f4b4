// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/norm_act.cu and norm_act_backward.cu on the host, where values or shapes are special: a
// mean far from zero, NaN, one line; and the same on every device and in every order of blocks.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/backends.h"
#include "cuda_norm_calls.h"
#include "cuda_norm_oracle.h"
#include "cuda_oracle.h"
#include "cuda_test.h"

namespace {

using norms::kKinds;
using norms::kWays;
using norms::Options;
using norms::some;
using norms::try_backward;
using norms::try_forward;
using norms::where;
using norms::workspace;
using oracle::Array;
using oracle::Case;
using oracle::Cells;
using oracle::dense_case;
using oracle::fill;
using oracle::last_case;
using oracle::Norm;
using oracle::Shape;

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
