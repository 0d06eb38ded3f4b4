// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/coupling.cu on the host: every pair of types, layouts with every kind of trouble, every
// part of the coupling struct, both orders of blocks and threads, bit for bit.
#include <sys/mman.h>

#include <array>
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
using oracle::Shape;
using namespace cases;

const Setup kSetups[] = {
    {"plain", false, false, REVK_NO_GRID, false, false},
    {"grid", false, false, 6, false, false},
    {"channel scale", true, false, REVK_NO_GRID, false, false},
    {"sample scale", false, true, REVK_NO_GRID, false, false},
    {"checksum", false, false, REVK_NO_GRID, true, false},
    {"amax", false, false, REVK_NO_GRID, false, true},
    {"everything", true, true, 3, true, true},
    {"coarse grid", false, true, -2, true, true},
};

std::string title(const char* what, const Case& c, int stream, int branch, const Setup& setup) {
  return std::string(what) + ", " + c.name + ", " + kTypes[stream] + " with " + kTypes[branch] +
         ", " + setup.name + (shim::machine.backwards ? ", backwards" : "");
}

// out = x +- f in memory of its own, and x +- f in place.
void try_couple(const Case& c, int stream, int branch, const Setup& setup, bool subtract,
                bool in_place, std::mt19937& random) {
  Array x(stream, c.shape, c.stream), out(stream, c.shape, c.stream), f(branch, c.shape, c.branch);
  const bool specials = random() % 2;
  x.fill(random, specials), f.fill(random, specials), out.fill(random, false);
  Company company(setup, oracle::is_wide(stream, branch), c.shape, random);
  Array want = in_place ? x : out, x_before = x, f_before = f;
  oracle::couple(want, in_place ? want : x, f, subtract, company);

  Array& got = in_place ? x : out;
  const revk_view got_view = got.view(), x_view = x.view(), f_view = f.view();
  const revk_coupling coupling = company.coupling();
  (subtract ? revk::cuda::uncouple : revk::cuda::couple)(
      got_view, x_view, f_view, company.plain() ? nullptr : &coupling, where());
  const std::string name = title(subtract ? "uncouple" : "couple", c, stream, branch, setup);
  test::expect(got.same(want), name + (in_place ? ", in place" : ""));
  test::expect(company.agrees(got), name + ": checksum or amax");
  test::expect(f.same(f_before) && (in_place || x.same(x_before)), name + ": an input was written");
}

void try_reverse(const Case& c, int stream, int branch, int gradient, int branch_gradient,
                 const Setup& setup, std::mt19937& random) {
  Array y(stream, c.shape, c.stream), f(branch, c.shape, c.branch);
  Array dy(gradient, c.shape, c.stream), df(branch_gradient, c.shape, c.branch);
  for (Array* array : {&y, &f, &dy, &df}) array->fill(random, random() % 2);
  Company company(setup, oracle::is_wide(stream, branch), c.shape, random);
  Company alone(kSetups[0], oracle::is_wide(gradient, branch_gradient), c.shape, random);
  Array x = y, dx = dy;
  oracle::couple(x, x, f, true, company);
  oracle::couple(dx, dx, df, false, alone);

  const revk_view views[] = {y.view(), f.view(), dy.view(), df.view()};
  const revk_coupling coupling = company.coupling();
  revk::cuda::reverse_step(views[0], views[1], views[2], views[3],
                           company.plain() ? nullptr : &coupling, where());
  const std::string name = title("reverse_step", c, stream, branch, setup);
  test::expect(y.same(x), name + ": y");
  test::expect(dy.same(dx), name + ": dy");
  test::expect(company.agrees(y), name + ": checksum or amax");
}

// Every pair of types on every layout, plain and with one of the setups in turn: each layout meets
// each setup, and so does each pair of types.
template <class Try>
void for_each_combination(unsigned seed, Try&& attempt) {
  std::mt19937 random(seed);
  int turn = 0;
  for (int stream = 0; stream < 4; ++stream)
    for (int branch = 0; branch < 4; ++branch, ++turn)
      for (const Case& c : kCases)
        for (const Setup& setup : {kSetups[0], kSetups[1 + turn++ % 7]}) {
          shim::machine.backwards = random() % 2;
          attempt(c, stream, branch, setup, random);
        }
}

void try_some_couple(const Case& c, int stream, int branch, const Setup& setup,
                     std::mt19937& random) {
  const bool subtract = random() % 2, in_place = random() % 2;
  try_couple(c, stream, branch, setup, subtract, in_place, random);
}

const test::Register kCouple("couple", [] { for_each_combination(1, try_some_couple); });

const test::Register kReverse("reverse_step", [] {
  for_each_combination(
      2, [](const Case& c, int stream, int branch, const Setup& setup, std::mt19937& random) {
        try_reverse(c, stream, branch, stream, branch, setup, random);
      });
});

// For builds that have no other types: one pair, but every layout with every setup.
const test::Register kMixed("couple, float32 += bfloat16", [] {
  std::mt19937 random(3);
  for (const Case& c : kCases)
    for (const Setup& setup : kSetups) {
      shim::machine.backwards = random() % 2;
      try_some_couple(c, REVK_FLOAT32, REVK_BFLOAT16, setup, random);
    }
});

const test::Register kReverseTypes("reverse_step, four types", [] {
  std::mt19937 random(3);
  for (int gradient = 0; gradient < 4; ++gradient)
    for (int branch_gradient = 0; branch_gradient < 4; ++branch_gradient)
      try_reverse(kCases[9], REVK_FLOAT32, REVK_BFLOAT16, gradient, branch_gradient, kSetups[6],
                  random);
});

const test::Register kOutTypes("couple, out of another type", [] {
  std::mt19937 random(4);
  const Case& c = kCases[5];
  for (int to = 0; to < 4; ++to)
    for (int stream = 0; stream < 4; ++stream)
      for (int branch = 0; branch < 4; ++branch) {
        Array x(stream, c.shape, c.stream), f(branch, c.shape, c.branch),
            out(to, c.shape, c.stream);
        x.fill(random, true), f.fill(random, true);
        Company company(kSetups[6], oracle::is_wide(stream, branch), c.shape, random);
        Array want = out;
        oracle::couple(want, x, f, false, company);
        const revk_coupling coupling = company.coupling();
        revk::cuda::couple(out.view(), x.view(), f.view(), &coupling, where());
        test::expect(out.same(want) && company.agrees(out),
                     title(kTypes[to], c, stream, branch, kSetups[6]));
      }
});

// More items than threads: every block goes round its loop
// several times, and all of them add to one checksum.
const test::Register kMany("many blocks", [] {
  std::mt19937 random(5);
  const Case cases[] = {dense_case("100,003 elements", {1, 1, 100003}),
                        same_strides("60 x 8 x 49 half", {60, 8, 49}, {784, 49, 1, 392}),
                        same_strides("strided", {3, 5, 1001}, {12500, 2500, 2, 0})};
  for (const Case& c : cases)
    for (const Setup& setup : {kSetups[0], kSetups[6]}) {
      shim::machine.backwards = setup.checksum;
      shim::machine.launches.clear();
      try_couple(c, REVK_FLOAT32, REVK_BFLOAT16, setup, setup.checksum, true, random);
      test::expect(shim::machine.launches.size() == 1 && shim::machine.launches[0].blocks > 1,
                   "one launch, more than one block");
      try_reverse(c, REVK_BFLOAT16, REVK_BFLOAT16, REVK_BFLOAT16, REVK_BFLOAT16, setup, random);
    }
});

// Rows further apart than 2^31 elements, in memory that exists only where it is touched.
const test::Register kFar("far apart", [] {
  const int64_t apart = (int64_t(1) << 31) + 64, rows = 3, columns = 40;
  const size_t bytes = size_t((rows - 1) * apart + columns) * 2;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  test::expect(memory != MAP_FAILED, "address space for rows far apart");
  if (memory == MAP_FAILED) return;
  uint16_t* far = static_cast<uint16_t*>(memory);
  std::mt19937 random(6);
  for (const int64_t inner_step : {1, 2}) {
    const Shape shape{1, rows, columns / inner_step};
    Array f(REVK_BFLOAT16, shape, dense(shape)), near(REVK_BFLOAT16, shape, dense(shape));
    f.fill(random, false), near.fill(random, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < shape.inner; ++i)
        std::memcpy(&far[r * apart + i * inner_step], near.at(0, r, i), 2);
    Company company(kSetups[0], false, shape, random);
    oracle::couple(near, near, f, false, company);
    const revk_view view{
        int32_t(sizeof(revk_view)), REVK_BFLOAT16, far, 1, rows, shape.inner, 0, apart, inner_step};
    revk::cuda::couple(view, view, f.view(), nullptr, where());
    bool same = true;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < shape.inner; ++i)
        same = same && std::memcmp(&far[r * apart + i * inner_step], near.at(0, r, i), 2) == 0;
    test::expect(same, "rows 2^31 elements apart, step " + std::to_string(inner_step));
  }
  munmap(memory, bytes);
});

}  // namespace
