// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/coupling_int16.cu on the host: every type of the branch and of the value, layouts with
// every kind of trouble, bit for bit, and back again.
#include <random>
#include <string>

#include "core/backends.h"
#include "cuda_cases.h"
#include "cuda_oracle.h"
#include "cuda_runtime.h"
#include "cuda_test.h"

namespace {

using oracle::Array;
using oracle::Company;
using oracle::Setup;
using namespace cases;

// Branches are some units in size: from no step to far beyond what is counted.
const Setup kSetups[] = {
    {"grid", false, false, 13, false, false},
    {"coarse grid, amax", false, false, -2, false, true},
    {"checksum", false, false, 9, true, false},
    {"channel scale", true, false, 12, false, true},
    {"sample scale", false, true, 15, false, true},
    {"everything", true, true, 13, true, true},
    {"everything, limited", true, true, 23, true, true},
    {"smallest step", false, false, 126, true, true},
    {"largest step", false, false, -126, true, true},
};
constexpr int kNoValue = -1;

void try_couple(const Case& c, int branch, const Setup& setup, int value_type, bool subtract,
                bool in_place, std::mt19937& random) {
  Array x(REVK_INT16, c.shape, c.stream), out(REVK_INT16, c.shape, c.stream);
  Array f(branch, c.shape, c.branch);
  Array value(value_type == kNoValue ? REVK_FLOAT32 : value_type, c.shape,
              random() % 2 ? c.stream : dense(c.shape, int64_t(random() % 2)));
  const bool specials = random() % 2;
  x.fill(random, specials), f.fill(random, specials);
  out.fill(random, false), value.fill(random, false);
  Company company(setup, branch == REVK_FLOAT64, c.shape, random);
  const Array start = x, f_before = f;
  Array want = in_place ? x : out, want_value = value;
  const bool values = value_type != kNoValue;
  const float most = oracle::couple_int16(want, x, f, subtract, company, setup.grid,
                                          values ? &want_value : nullptr);

  Array& got = in_place ? x : out;
  const revk_view got_view = got.view(), x_view = x.view(), f_view = f.view();
  const revk_view value_view = value.view();
  revk_coupling coupling = company.coupling();
  coupling.value = values ? &value_view : nullptr;
  const auto run = subtract ? revk::cuda::uncouple : revk::cuda::couple;
  const auto undo = subtract ? revk::cuda::couple : revk::cuda::uncouple;
  run(got_view, x_view, f_view, &coupling, where());
  const std::string name =
      std::string(subtract ? "uncouple" : "couple") + ", " + c.name + ", " + kTypes[branch] + ", " +
      setup.name + (values ? std::string(", value ") + kTypes[value_type] : "") +
      (in_place ? ", in place" : "") + (shim::machine.backwards ? ", backwards" : "");
  test::expect(got.same(want), name);
  test::expect(value.same(want_value), name + ": value");
  test::expect(company.agrees(got, most), name + ": checksum or amax");
  test::expect(f.same(f_before) && (in_place || x.same(start)), name + ": an input was written");

  coupling.checksum = nullptr, coupling.amax = nullptr, coupling.value = nullptr;
  undo(got_view, got_view, f_view, &coupling, where());
  bool back = true;
  Array first = start;
  for (int64_t o = 0; o < c.shape.outer; ++o)
    for (int64_t ch = 0; ch < c.shape.channels; ++ch)
      for (int64_t i = 0; i < c.shape.inner; ++i)
        back = back && got.get(o, ch, i) == first.get(o, ch, i);
  test::expect(back, name + ": there and back");
}

void try_reverse(const Case& c, int branch, int gradient, const Setup& setup, int value_type,
                 std::mt19937& random) {
  Array y(REVK_INT16, c.shape, c.stream), f(branch, c.shape, c.branch);
  Array dy(gradient, c.shape, c.stream), df(branch, c.shape, c.branch);
  Array value(value_type, c.shape, dense(c.shape));
  for (Array* array : {&y, &f, &dy, &df, &value}) array->fill(random, random() % 2);
  Company company(setup, branch == REVK_FLOAT64, c.shape, random);
  const Setup plain{"plain", false, false, REVK_NO_GRID, false, false};
  Company alone(plain, oracle::is_wide(gradient, branch), c.shape, random);
  Array x = y, dx = dy, want_value = value;
  const float most = oracle::couple_int16(x, x, f, true, company, setup.grid, &want_value);
  oracle::couple(dx, dx, df, false, alone);

  const revk_view views[] = {y.view(), f.view(), dy.view(), df.view(), value.view()};
  revk_coupling coupling = company.coupling();
  coupling.value = &views[4];
  revk::cuda::reverse_step(views[0], views[1], views[2], views[3], &coupling, where());
  const std::string name = std::string("reverse_step, ") + c.name + ", " + kTypes[branch] + ", " +
                           kTypes[gradient] + ", " + setup.name;
  test::expect(y.same(x), name + ": y");
  test::expect(dy.same(dx), name + ": dy");
  test::expect(value.same(want_value), name + ": value");
  test::expect(company.agrees(y, most), name + ": checksum or amax");
}

void try_in_turn(const Case& c, int branch, int& turn, std::mt19937& random) {
  const Setup& setup = kSetups[turn++ % 9];
  const int value_type = turn % 5 - 1;
  shim::machine.backwards = random() % 2;
  const bool subtract = random() % 2, in_place = random() % 2;
  try_couple(c, branch, setup, value_type, subtract, in_place, random);
}

const test::Register kCouple("couple, int16", [] {
  std::mt19937 random(11);
  int turn = 0;
  for (int branch = 0; branch < 4; ++branch)
    for (const Case& c : kCases)
      for (int i = 0; i < 4; ++i) try_in_turn(c, branch, turn, random);
});

// For builds that have no other types: every layout with every setup.
const test::Register kBriefly("couple, int16 += float32", [] {
  std::mt19937 random(12);
  int turn = 0;
  for (const Case& c : kCases)
    for (int i = 0; i < 9; ++i) try_in_turn(c, REVK_FLOAT32, turn, random);
});

const test::Register kReverse("reverse_step, int16", [] {
  std::mt19937 random(13);
  int turn = 0;
  for (int branch = 0; branch < 4; ++branch)
    for (int gradient = 0; gradient < 4; ++gradient)
      for (const Case& c : kCases)
        if (turn++ % 3 == 0) try_reverse(c, branch, gradient, kSetups[turn % 9], turn % 4, random);
});

// More items than threads, and one launch, whatever it reports.
const test::Register kMany("many blocks, int16", [] {
  std::mt19937 random(14);
  const Case many[] = {dense_case("100,003 elements", {1, 1, 100003}),
                       same_strides("60 x 8 x 49 half", {60, 8, 49}, {784, 49, 1, 392}),
                       same_strides("strided", {3, 5, 1001}, {12500, 2500, 2, 0})};
  for (const Case& c : many)
    for (const int setup : {0, 5}) {
      shim::machine.backwards = setup == 5;
      shim::machine.launches.clear();
      try_couple(c, REVK_BFLOAT16, kSetups[setup], REVK_BFLOAT16, setup == 5, true, random);
      test::expect(shim::machine.launches.size() == 2 && shim::machine.launches[0].blocks > 1,
                   "one launch there and one back, of more than one block");
    }
});

}  // namespace
