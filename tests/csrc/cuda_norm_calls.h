// SPDX-License-Identifier: Apache-2.0
// One call of norm_act or norm_act_backward on the host: what it may be made with, and what tries
// it. What the header fixes to the bit is compared by bits; sums against float64, with the rounding
// of the compute type as tolerance.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>

#include "core/backends.h"
#include "cuda_norm_oracle.h"
#include "cuda_oracle.h"
#include "cuda_test.h"

namespace norms {

using oracle::Array;
using oracle::Case;
using oracle::Cells;
using oracle::kTypes;
using oracle::Norm;
using oracle::where;

inline const char* const kKinds[] = {"batch", "layer", "rms", "group"};

// The workspace, filled with NaN: nobody may count on zeros.
inline Cells workspace(Array& x, Norm& norm) {
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

inline std::string title(const Case& c, const Options& o) {
  return std::string(c.name) + ", " + kKinds[o.kind] + ", activation " +
         std::to_string(o.activation) + ", " + kTypes[o.stream] + " " + kTypes[o.branch] + " -> " +
         kTypes[o.h] + (o.coupling ? o.in_place ? ", coupled in place" : ", coupled" : "") +
         (o.given ? ", given" : "") + (shim::machine.backwards ? ", backwards" : "");
}

// Types that go in words, float64 in words, and mixtures that do not; the turn picks.
inline Options some(int kind, int turn, std::mt19937& random) {
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

// How a backward is called.
struct Way {
  const char* name;
  int base;  // 0: none, 1: apart, 2: dx itself
  int sums;
  bool constant, parameters, wanted;
};

inline const Way kWays[] = {
    {"plain", 0, REVK_SUMS_COMPUTED, false, true, true},
    {"accumulated", 2, REVK_SUMS_COMPUTED, false, true, true},
    {"base apart", 1, REVK_SUMS_COMPUTED, false, false, false},
    {"constant", 2, REVK_SUMS_COMPUTED, true, true, true},
    {"constant, sums not wanted", 0, REVK_SUMS_COMPUTED, true, false, false},
    {"sums only", 0, REVK_SUMS_ONLY, false, true, true},
    {"sums given", 1, REVK_SUMS_GIVEN, false, true, true},
};

// One call beside the oracle: in cuda_norm_act_test.cpp and cuda_norm_act_backward_test.cpp.
void try_forward(const Case& c, const Options& options, std::mt19937& random);
void try_backward(const Case& c, const Options& options, const Way& way, std::mt19937& random);

}  // namespace norms
