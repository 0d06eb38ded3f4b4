// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/accumulate.cu on the host: lists of every pair of types, sizes and alignments, and how
// many launches they cost.
#include <random>
#include <string>
#include <vector>

#include "core/backends.h"
#include "cuda_oracle.h"
#include "cuda_runtime.h"
#include "cuda_test.h"

namespace {

using oracle::Array;
using oracle::Shape;
using oracle::Strides;

constexpr oracle::Setup kPlain{"plain", false, false, REVK_NO_GRID, false, false};

// A list of pairs, accumulated by the kernel and by the oracle.
class List {
 public:
  void add(int total, int part, Shape shape, Strides total_strides, Strides part_strides) {
    totals_.emplace_back(total, shape, total_strides);
    parts_.emplace_back(part, shape, part_strides);
    totals_.back().fill(random_, true), parts_.back().fill(random_, true);
  }
  void add_dense(int total, int part, int64_t size, int64_t total_offset = 0,
                 int64_t part_offset = 0) {
    add(total, part, {1, 1, size}, {size, size, 1, total_offset}, {size, size, 1, part_offset});
  }

  // The number of launches.
  size_t run_and_compare(const std::string& name) {
    std::vector<Array> want = totals_, parts_before = parts_;
    std::vector<revk_view> total_views, part_views;
    for (size_t i = 0; i < want.size(); ++i) {
      const oracle::Company alone(kPlain, oracle::is_wide(want[i].dtype, parts_[i].dtype),
                                  want[i].shape, random_);
      oracle::couple(want[i], want[i], parts_[i], false, alone);
      total_views.push_back(totals_[i].view()), part_views.push_back(parts_[i].view());
    }
    shim::machine.launches.clear();
    const revk_where where{int32_t(sizeof(revk_where)), 0, nullptr, 0};
    revk::cuda::accumulate(total_views.data(), part_views.data(), int64_t(want.size()), where);
    for (size_t i = 0; i < want.size(); ++i) {
      test::expect(totals_[i].same(want[i]), name + ", array " + std::to_string(i));
      test::expect(parts_[i].same(parts_before[i]), name + ", a part was written");
    }
    return shim::machine.launches.size();
  }

 private:
  std::mt19937 random_{7};
  std::vector<Array> totals_, parts_;
};

const test::Register kPairs("accumulate, pairs of types", [] {
  for (const bool backwards : {false, true}) {
    shim::machine.backwards = backwards;
    for (int total = 0; total < 4; ++total)
      for (int part = 0; part < 4; ++part) {
        List list;
        for (const int64_t size : {1, 7, 8, 9, 255, 2048, 9001}) list.add_dense(total, part, size);
        list.add_dense(total, part, 100, 1, 0);
        list.add_dense(total, part, 100, 0, 1);
        list.add_dense(total, part, 5000, 3, 3);
        test::expect(list.run_and_compare("a list") == 1,
                     "a list of one pair of types is one launch");
      }
  }
});

const test::Register kLong("accumulate, long lists", [] {
  List list;
  std::mt19937 random(8);
  for (int i = 0; i < 300; ++i)
    list.add_dense(REVK_FLOAT32, REVK_BFLOAT16, 1 + int64_t(random() % 700));
  test::expect(list.run_and_compare("300 arrays") == 3,
               "300 arrays of one pair of types are three launches");
});

const test::Register kMixed("accumulate, mixed lists", [] {
  List list;
  list.add_dense(REVK_FLOAT32, REVK_FLOAT32, 33);
  list.add_dense(REVK_FLOAT32, REVK_BFLOAT16, 12);
  list.add(REVK_FLOAT32, REVK_FLOAT32, {2, 3, 8}, {96, 16, 1, 0},
           {24, 8, 1, 0});  // not dense: a launch of its own
  list.add(REVK_FLOAT16, REVK_FLOAT16, {0, 3, 8}, {24, 8, 1, 0}, {24, 8, 1, 0});  // empty: none
  list.add(REVK_FLOAT32, REVK_FLOAT32, {2, 3, 8}, {24, 1, 3, 0},
           {24, 1, 3, 0});  // dense in another order
  list.add_dense(REVK_FLOAT32, REVK_FLOAT32, 44);
  test::expect(list.run_and_compare("mixed") == 3,
               "two pairs of types and one strided array are three launches");
  List single;
  single.add_dense(REVK_BFLOAT16, REVK_FLOAT32, 1001);
  test::expect(single.run_and_compare("single") == 1, "one array is one launch");
  List empty;
  empty.add_dense(REVK_FLOAT32, REVK_FLOAT32, 0);
  empty.add_dense(REVK_FLOAT32, REVK_FLOAT32, 0);
  test::expect(empty.run_and_compare("empty") == 0, "nothing to add, nothing to launch");
});

const test::Register kBig("accumulate, many chunks", [] {
  for (const bool backwards : {false, true}) {
    shim::machine.backwards = backwards;
    List list;
    list.add_dense(REVK_FLOAT32, REVK_FLOAT32, 5);
    list.add_dense(REVK_FLOAT32, REVK_FLOAT32, 150001);
    list.add_dense(REVK_FLOAT32, REVK_FLOAT32, 30001, 1, 1);
    list.add_dense(REVK_FLOAT32, REVK_FLOAT32, 4096);
    list.run_and_compare("many chunks");
    test::expect(shim::machine.launches.size() == 1 && shim::machine.launches[0].blocks == 32,
                 "one launch, as many blocks as the device takes, each with several chunks");
  }
});

}  // namespace
