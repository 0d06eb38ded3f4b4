// SPDX-License-Identifier: Apache-2.0
// The C interface's checks, the overlap solver against
// brute force, and the scalar conversions, without Python.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/overlap.h"
#include "core/scalar.h"
#include "core/structs.h"
#include "revkernels/revkernels.h"

struct Grown {  // a struct whose second version has one field more
  int32_t struct_size, first;
  int64_t added;
};
template <>
constexpr size_t revk::kFirstSize<Grown> = offsetof(Grown, first) + sizeof(int32_t);

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

revk_view view(void* data, int64_t count, int32_t dtype = REVK_FLOAT32) {
  return {int32_t(sizeof(revk_view)), dtype, data, 1, 1, count, count, count, 1};
}
revk_where host() { return {int32_t(sizeof(revk_where)), -1, nullptr, 0}; }
bool says(const char* text) {
  return std::string(revk_last_error()).find(text) != std::string::npos;
}

// Every refusal names its argument and leaves the memory as it was.
void test_refusals() {
  std::vector<float> x(8, 1.0f), f(8, 2.0f);
  const revk_where where = host();
  const auto refused = [&](revk_view a, revk_view b, const char* text) {
    const bool ok = revk_couple(&a, &a, &b, nullptr, &where) == REVK_INVALID_ARGUMENT && says(text);
    return ok && x == std::vector<float>(8, 1.0f);
  };
  const revk_view good = view(x.data(), 8), branch = view(f.data(), 8);
  revk_view bad = branch;
  bad.struct_size = 4;
  CHECK(refused(good, bad, "f: struct_size is 4"));
  bad = branch, bad.dtype = 9;
  CHECK(refused(good, bad, "f: dtype is 9"));
  bad = branch, bad.inner = 7;
  CHECK(refused(good, bad, "f: shape is (1, 1, 7), but y has (1, 1, 8)"));
  bad = branch, bad.inner_stride = -1;
  CHECK(refused(good, bad, "f: stride -1 is negative"));
  bad = branch, bad.inner = -8;
  CHECK(refused(good, bad, "is negative"));
  bad = branch, bad.data = nullptr;
  CHECK(refused(good, bad, "f: data is NULL"));
  bad = branch, bad.data = reinterpret_cast<char*>(f.data()) + 1, bad.inner = 4;
  CHECK(refused(view(x.data(), 4), bad, "f: data is not aligned"));
  bad = branch, bad.inner_stride = INT64_MAX / 4;
  CHECK(refused(good, bad, "f: shape (1, 1, 8) with its strides reaches past"));
  CHECK(refused(view(x.data(), 4), view(x.data() + 3, 4), "y: is written and overlaps f"));
  bad = good, bad.inner_stride = 0;
  CHECK(refused(bad, branch, "y: is written, but several of its indices share one element"));
  CHECK(revk_couple(nullptr, &good, &branch, nullptr, &where) == REVK_INVALID_ARGUMENT &&
        says("y is NULL"));
  CHECK(revk_couple(&good, &good, &branch, nullptr, nullptr) == REVK_INVALID_ARGUMENT &&
        says("where is NULL"));
  revk_where elsewhere = where;
  elsewhere.device = -2;
  CHECK(revk_couple(&good, &good, &branch, nullptr, &elsewhere) == REVK_INVALID_ARGUMENT);
  if (revk_cuda_missing() != nullptr) {
    elsewhere.device = 0;
    CHECK(revk_couple(&good, &good, &branch, nullptr, &elsewhere) == REVK_UNSUPPORTED &&
          says("CUDA cannot run"));
    CHECK(revk_synchronize(&elsewhere) == REVK_UNSUPPORTED && says("CUDA cannot run"));
  }
  CHECK(revk_synchronize(&where) == REVK_OK);
  CHECK(revk_synchronize(nullptr) == REVK_INVALID_ARGUMENT && says("where is NULL"));
  CHECK(revk_accumulate(&good, nullptr, 1, &where) == REVK_INVALID_ARGUMENT &&
        says("parts is NULL"));
  CHECK(revk_accumulate(nullptr, nullptr, 0, &where) == REVK_OK);
  CHECK(revk_accumulate(&good, &branch, -1, &where) == REVK_INVALID_ARGUMENT);
  CHECK(x == std::vector<float>(8, 1.0f));
}

// A struct of a newer caller: its fields lie behind the ones that this library knows.
template <class Struct>
struct Newer {
  Struct known;
  int64_t added;
};
template <class Struct>
Newer<Struct> newer(Struct known, int64_t added) {
  known.struct_size = int32_t(sizeof(Newer<Struct>));
  return {known, added};
}

void test_structs_of_a_newer_caller() {
  std::vector<float> x(8, 1.0f), f(8, 2.0f);
  revk_coupling grid{};
  grid.grid_exponent = 0;
  for (int64_t which = 0; which < 4; ++which) {  // which struct sets the added field; 3: none
    const auto y = newer(view(x.data(), 8), 0), branch = newer(view(f.data(), 8), which == 0);
    const auto coupling = newer(grid, which == 1);
    const auto where = newer(host(), which == 2);
    const revk_status status =
        revk_couple(&y.known, &y.known, &branch.known, &coupling.known, &where.known);
    CHECK(status == (which == 3 ? REVK_OK : REVK_UNSUPPORTED));
    CHECK(x == std::vector<float>(8, which == 3 ? 3.0f : 1.0f));
    const char* const names[] = {"f", "coupling", "where"};
    if (which < 3) CHECK(says((std::string(names[which]) + ": sets a field").c_str()));
  }

  // A list is stepped through by the caller's size of a view.
  const revk_where where = host();
  Newer<revk_view> totals[] = {newer(view(x.data(), 4), 0), newer(view(x.data() + 4, 4), 0)};
  const revk_view parts[] = {view(f.data(), 4), view(f.data() + 4, 4)};
  CHECK(revk_accumulate(&totals[0].known, parts, 2, &where) == REVK_OK);
  CHECK(x == std::vector<float>(8, 5.0f));
  totals[1].added = 1;
  CHECK(revk_accumulate(&totals[0].known, parts, 2, &where) == REVK_UNSUPPORTED &&
        says("totals[1]: sets a field"));
  totals[1] = newer(view(x.data() + 4, 4), 0), totals[1].known.struct_size = sizeof(revk_view);
  CHECK(revk_accumulate(&totals[0].known, parts, 2, &where) == REVK_INVALID_ARGUMENT &&
        says("totals[1]: struct_size is 64, totals[0] has 72"));
  CHECK(x == std::vector<float>(8, 5.0f));
  revk_view endless = view(x.data(), 8);
  endless.struct_size = INT32_MAX;
  CHECK(revk_couple(&endless, &endless, parts, nullptr, &where) == REVK_INVALID_ARGUMENT);
}

// The other way round: this library's struct has grown since the caller was compiled.
void test_structs_of_an_older_caller() {
  struct {
    int32_t struct_size, first;
    int64_t of_someone_else;
  } memory{8, 7, -1};
  const Grown old = revk::read_struct<Grown>("old", &memory);
  CHECK(old.struct_size == 16 && old.first == 7 && old.added == 0);
  memory.struct_size = 16;
  CHECK(revk::read_struct<Grown>("new", &memory).added == -1);
  memory.struct_size = 7;
  bool refused = false;
  try {
    revk::read_struct<Grown>("short", &memory);
  } catch (const revk::Error& error) {
    refused = error.status == REVK_INVALID_ARGUMENT;
  }
  CHECK(refused);

  // The first version's sizes are the ABI: on the machines that have 64-bit pointers, these.
  if (sizeof(void*) == 8)
    CHECK(revk::kFirstSize<revk_view> == 64 && revk::kFirstSize<revk_where> == 20 &&
          revk::kFirstSize<revk_coupling> == 48);
}

void test_coupling_refusals() {
  std::vector<float> x(6, 1.0f), f(6, 2.0f);
  const revk_where where = host();
  revk_view y{int32_t(sizeof(revk_view)), REVK_FLOAT32, x.data(), 2, 3, 1, 3, 1, 1}, branch = y;
  branch.data = f.data();
  const auto refused = [&](const revk_coupling& coupling, const char* text) {
    return revk_couple(&y, &y, &branch, &coupling, &where) == REVK_INVALID_ARGUMENT && says(text);
  };
  const revk_coupling plain = REVK_COUPLING_INIT;
  CHECK(plain.struct_size == int32_t(sizeof plain) && plain.grid_exponent == REVK_NO_GRID);
  CHECK(plain.channel_scale == nullptr && plain.amax == nullptr && plain.value == nullptr);
  revk_coupling good{};
  good.struct_size = int32_t(sizeof good);
  good.grid_exponent = REVK_NO_GRID;
  revk_coupling bad = good;
  bad.struct_size = 0;
  CHECK(refused(bad, "coupling: struct_size is 0"));
  bad = good, bad.grid_exponent = -127;
  CHECK(refused(bad, "grid_exponent is -127"));
  bad = good, bad.sample_scale = f.data(), bad.rows_per_sample = 4;
  CHECK(refused(bad, "rows_per_sample is 4, a divisor of outer = 2"));
  bad = good, bad.channel_scale = x.data() + 5;
  CHECK(refused(bad, "channel_scale overlaps y"));
  bad = good, bad.amax = x.data();
  CHECK(refused(bad, "amax overlaps y"));
  CHECK(x == std::vector<float>(6, 1.0f));
  CHECK(revk_couple(&y, &y, &branch, &good, &where) == REVK_OK);
  CHECK(x == std::vector<float>(6, 3.0f));
}

void test_int16_streams() {
  std::vector<int16_t> q(6, 32767), was = q;
  std::vector<float> f(6, 0.75f), value(6, 0.0f);
  uint64_t checksum = 0;
  const revk_where where = host();
  const revk_view y{int32_t(sizeof(revk_view)), REVK_INT16, q.data(), 2, 3, 1, 3, 1, 1};
  revk_view branch = y, numbers = y;
  branch.dtype = numbers.dtype = REVK_FLOAT32;
  branch.data = f.data(), numbers.data = value.data();
  revk_coupling good{};
  good.struct_size = int32_t(sizeof good);
  good.grid_exponent = 2, good.checksum = &checksum, good.value = &numbers;
  const auto refused = [&](const revk_view& a, const revk_view& b, const revk_view& c,
                           const revk_coupling* coupling, const char* text) {
    const bool ok = revk_couple(&a, &b, &c, coupling, &where) == REVK_INVALID_ARGUMENT &&
                    says(text) &&
                    revk_uncouple(&a, &b, &c, coupling, &where) == REVK_INVALID_ARGUMENT;
    return ok && q == was && value == std::vector<float>(6, 0.0f) && checksum == 0;
  };
  CHECK(refused(y, y, branch, nullptr, "coupling is NULL, but y is int16; a grid_exponent"));
  revk_coupling bad = good;
  bad.grid_exponent = REVK_NO_GRID;
  CHECK(refused(y, y, branch, &bad, "grid_exponent is REVK_NO_GRID, but y is int16"));
  CHECK(refused(y, y, y, &good, "f: dtype is int16, a floating-point revk_dtype"));
  CHECK(refused(numbers, y, branch, &good, "y: dtype is float32, but x has int16"));
  CHECK(refused(y, numbers, branch, &good, "y: dtype is int16, but x has float32"));
  CHECK(refused(branch, branch, numbers, &good, "value is given, but y is float32"));
  revk_view other = numbers;
  bad = good, bad.value = &other;
  other.dtype = REVK_INT16;
  CHECK(refused(y, y, branch, &bad, "value: dtype is int16, a floating-point"));
  other = numbers, other.channels = 2;
  CHECK(refused(y, y, branch, &bad, "value: shape is (2, 2, 1), but y has (2, 3, 1)"));
  other = numbers, other.outer_stride = 2;
  CHECK(refused(y, y, branch, &bad, "value: is written, but several"));
  other = numbers, other.data = f.data();
  CHECK(refused(y, y, branch, &bad, "value: is written and overlaps f"));
  other = numbers, other.data = q.data(), other.dtype = REVK_BFLOAT16;
  CHECK(refused(y, y, branch, &bad, "value: is written and overlaps y"));
  bad = good, bad.amax = value.data() + 5;
  CHECK(refused(y, y, branch, &bad, "amax overlaps value"));
  bad = good, bad.channel_scale = value.data();
  CHECK(refused(y, y, branch, &bad, "channel_scale overlaps value"));
  other = numbers, other.struct_size = 4, bad = good, bad.value = &other;
  CHECK(refused(y, y, branch, &bad, "value: struct_size is 4"));
  CHECK(revk_reverse_step(&branch, &numbers, &y, &numbers, nullptr, &where) ==
            REVK_INVALID_ARGUMENT &&
        says("dy: dtype is int16"));
  CHECK(revk_accumulate(&y, &branch, 1, &where) == REVK_INVALID_ARGUMENT &&
        says("totals[0]: dtype is int16"));
  CHECK(revk_accumulate(&branch, &y, 1, &where) == REVK_INVALID_ARGUMENT &&
        says("parts[0]: dtype is int16"));
  revk_norm norm{};
  norm.struct_size = int32_t(sizeof norm), norm.kind = REVK_LAYER_NORM;
  CHECK(revk_norm_act(&y, &branch, &norm, &where) == REVK_INVALID_ARGUMENT &&
        says("dtype is int16"));
  CHECK(q == was && f == std::vector<float>(6, 0.75f));

  CHECK(revk_couple(&y, &y, &branch, &good, &where) == REVK_OK);
  CHECK(q == std::vector<int16_t>(6, -32766) && value == std::vector<float>(6, -8191.5f));
  CHECK(checksum == 32770u * 36);
  // A caller whose struct ends before `value`, and memory behind it that is no view.
  value.assign(6, 0.0f);
  bad = good, bad.struct_size = int32_t(revk::kFirstSize<revk_coupling>);
  bad.value = reinterpret_cast<const revk_view*>(uintptr_t(3));
  CHECK(revk_uncouple(&y, &y, &branch, &bad, &where) == REVK_OK);
  CHECK(q == was && value == std::vector<float>(6, 0.0f));
}

// Two lists of three dimensions in a small memory, by enumeration.
void test_overlap_is_exact() {
  std::mt19937 random(0);
  const auto draw = [&random](int low, int high) {
    return low + int(random() % unsigned(high - low + 1));
  };
  int met = 0, apart = 0;
  for (int round = 0; round < 20000; ++round) {
    int64_t sizes[2][3], strides[2][3];
    revk::Layout layouts[2];
    std::set<int64_t> bytes[2];
    size_t elements[2] = {1, 1};
    for (int a = 0; a < 2; ++a) {
      const int64_t item = int64_t{2} << draw(0, 2), start = item * draw(0, 24 / int(item) * 4);
      for (int k = 0; k < 3; ++k) sizes[a][k] = draw(1, 4), strides[a][k] = draw(0, 12);
      layouts[a] = {uintptr_t(4096 + start), item, 3, sizes[a], strides[a]};
      for (int64_t i = 0; i < sizes[a][0]; ++i)
        for (int64_t j = 0; j < sizes[a][1]; ++j)
          for (int64_t k = 0; k < sizes[a][2]; ++k)
            for (int64_t b = 0; b < item; ++b)
              bytes[a].insert(
                  start + item * (i * strides[a][0] + j * strides[a][1] + k * strides[a][2]) + b);
      elements[a] = size_t(sizes[a][0] * sizes[a][1] * sizes[a][2] * item);
      CHECK(revk::overlaps_itself(layouts[a]) == (bytes[a].size() != elements[a]));
    }
    bool share = false;
    for (const int64_t byte : bytes[0]) share = share || bytes[1].count(byte) > 0;
    CHECK(revk::overlaps(layouts[0], layouts[1]) == share);
    ++(share ? met : apart);
  }
  CHECK(met > 1000 && apart > 1000);
}

void test_scalars() {
  using namespace revk;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float16 half{uint16_t(bits)};
    const bfloat16 brain{uint16_t(bits)};
    if (!std::isnan(widen(half))) CHECK(narrow<float16>(widen(half)).bits == bits);
    if (!std::isnan(widen(brain))) CHECK(narrow<bfloat16>(widen(brain)).bits == bits);
    CHECK(std::isnan(widen(half)) == ((bits & 0x7fff) > 0x7c00));
  }
  CHECK(std::isnan(widen(narrow<bfloat16>(bits_as<float>(0x7f800001u)))));
  CHECK(std::isnan(widen(narrow<float16>(bits_as<float>(0xff800001u)))));
  // 1 + 2^-8 is a tie in bfloat16; a float64 just above
  // it must not be rounded twice, first onto the tie.
  CHECK(widen(narrow<bfloat16>(1 + std::ldexp(1.0, -8))) == 1.0f);
  CHECK(widen(narrow<bfloat16>(1 + std::ldexp(1.0, -8) + std::ldexp(1.0, -40))) == 1.0078125f);
  CHECK(std::isinf(narrow<float>(1e300)) && std::isinf(widen(narrow<float16>(65520.0))));
}

void test_lists_on_any_number_of_threads() {
  std::vector<float> total(100000, 1.0f), part(100000, 0.25f);
  std::vector<revk_view> totals, parts;
  for (int64_t at = 0, size = 1; at + size <= 100000; at += size, size = size % 997 + 13) {
    totals.push_back(view(total.data() + at, size));
    parts.push_back(view(part.data() + at, size));
  }
  for (int32_t threads : {0, 1, 2, 3}) {
    revk_where where = host();
    where.threads = threads;
    CHECK(revk_accumulate(totals.data(), parts.data(), int64_t(totals.size()), &where) == REVK_OK);
  }
  const revk_view last = totals.back();
  const float* const end = static_cast<float*>(last.data) + last.inner;
  for (const float* at = total.data(); at < end; ++at) CHECK(*at == 2.0f);
}

}  // namespace

int main() {
  test_refusals();
  test_coupling_refusals();
  test_int16_streams();
  test_structs_of_a_newer_caller();
  test_structs_of_an_older_caller();
  test_overlap_is_exact();
  test_scalars();
  test_lists_on_any_number_of_threads();
  std::printf("%s\n", failures ? "failed" : "all passed");
  return failures ? 1 : 0;
}
