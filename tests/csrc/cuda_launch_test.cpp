// SPDX-License-Identifier: Apache-2.0
// csrc/cuda's smaller parts on the host: the divider, places
// in huge arrays, reductions, the device guard, errors.
#include <cmath>
#include <cstring>
#include <random>
#include <string>

#include "core/backends.h"
#include "core/error.h"
#include "cuda/divider.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/reduce.cuh"
#include "cuda_test.h"

namespace {

using namespace revk::cuda;

const test::Register kDivider("divider", [] {
  std::mt19937_64 random(9);
  for (int turn = 0; turn < 20000; ++turn) {
    const int64_t by = 1 + int64_t(random() >> (1 + random() % 62)) % INT64_MAX;
    const Divider divider(by);
    const int64_t numbers[] = {0,
                               by - 1,
                               by,
                               INT64_MAX,
                               INT64_MAX / by * by,
                               INT64_MAX / by * by - 1,
                               int64_t(random() >> (1 + random() % 62))};
    for (const int64_t n : numbers)
      if (divider.divide(n) != n / by)
        test::expect(false, std::to_string(n) + " / " + std::to_string(by));
  }
  for (const int64_t by :
       {int64_t(1), int64_t(2), int64_t(3), int64_t(7), int64_t(1) << 62, INT64_MAX})
    for (const int64_t n : {int64_t(0), int64_t(1), int64_t(6), INT64_MAX - 1, INT64_MAX})
      test::expect(Divider(by).divide(n) == n / by, std::to_string(n) + " / " + std::to_string(by));
});

revk_view view_of(void* data, int64_t outer, int64_t channels, int64_t inner, int64_t outer_stride,
                  int64_t channel_stride, int64_t inner_stride) {
  return {int32_t(sizeof(revk_view)),
          REVK_BFLOAT16,
          data,
          outer,
          channels,
          inner,
          outer_stride,
          channel_stride,
          inner_stride};
}

const test::Register kLocate("places in huge arrays", [] {
  const int64_t outer = 70001, channels = 3001,
                inner = 50000;  // 10^13 elements; packets of 8 fit the rows
  const int64_t row = inner + 16, plane = channels * row + 64;
  const revk_view view = view_of(nullptr, outer, channels, inner, plane, row, 1);
  Layout<1> layout = merge<1>({&view}, true);
  test::expect(takes_words(layout, 8), "rows of packets");
  cut(layout, 8);
  test::expect(layout.items == outer * channels * (inner / 8), "the number of items");
  std::mt19937_64 random(10);
  for (int turn = 0; turn < 10000; ++turn) {
    const int64_t o = int64_t(random() % outer), c = int64_t(random() % channels),
                  j = int64_t(random() % (inner / 8));
    const Spot spot = locate(layout, (o * channels + c) * (inner / 8) + j, 8);
    if (spot.index != (o * channels + c) * inner + j * 8 ||
        spot.offset(layout.operand[0]) != o * plane + c * row + j * 8)
      test::expect(false, "item " + std::to_string(turn));
  }
});

const test::Register kMerge("merging", [] {
  const auto rows = [](const revk_view& view, bool in_memory_order) {
    const Layout<1> layout = merge<1>({&view}, in_memory_order);
    return std::to_string(layout.planes) + "x" + std::to_string(layout.rows) + "x" +
           std::to_string(layout.row_size);
  };
  test::expect(rows(view_of(nullptr, 2, 3, 4, 12, 4, 1), true) == "1x1x24", "dense");
  test::expect(rows(view_of(nullptr, 2, 3, 4, 24, 4, 1), true) == "1x2x12", "half of an image");
  test::expect(rows(view_of(nullptr, 2, 3, 4, 12, 1, 3), true) == "1x1x24",
               "channels-last, in memory order");
  test::expect(rows(view_of(nullptr, 2, 3, 4, 12, 1, 3), false) == "2x3x4",
               "channels-last, in the view's order");
  test::expect(rows(view_of(nullptr, 6, 4, 1, 8, 1, 77), true) == "1x6x4",
               "rows of half the channels");
  test::expect(rows(view_of(nullptr, 1, 1, 1, 5, 6, 7), true) == "1x1x1", "one element");
});

// What a block's threads bring, reduced; run as a kernel, so that the barriers are real.
uint64_t reduced_sum;
uint32_t reduced_max;
void reduce_kernel(const uint64_t* values) {
  const uint64_t sum = reduce_block(values[threadIdx.x], Sum{});
  const uint32_t max = reduce_block(uint32_t(values[threadIdx.x]), Max{});
  if (threadIdx.x == 0) reduced_sum = sum, reduced_max = max;
}

const test::Register kReduce("reductions", [] {
  std::mt19937_64 random(11);
  for (int turn = 0; turn < 20; ++turn) {
    shim::machine.backwards = turn % 2;
    uint64_t values[kThreads], sum = 0;
    uint32_t max = 0;
    for (uint64_t& value : values)
      value = random(), sum += value, max = std::max(max, uint32_t(value));
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(kThreads);
    cudaLaunchKernelEx(&config, reduce_kernel, static_cast<const uint64_t*>(values));
    test::expect(reduced_sum == sum && reduced_max == max, "256 values of one block");
  }
  shim::machine.backwards = false;
});

const test::Register kRaise("amax's atomic", [] {
  const auto raised = [](float before, float by) {
    uint32_t bits;
    std::memcpy(&bits, &by, 4);
    raise_to(&before, bits);
    return before;
  };
  test::expect(raised(0.0f, 2.0f) == 2.0f && raised(3.0f, 2.0f) == 3.0f, "the larger one");
  test::expect(raised(-0.0f, 2.0f) == 2.0f && raised(-INFINITY, 0.5f) == 0.5f, "from below zero");
  test::expect(std::isnan(raised(5.0f, NAN)) && std::isnan(raised(INFINITY, NAN)), "NaN comes in");
  test::expect(std::isnan(raised(NAN, 5.0f)) && std::isnan(raised(-NAN, 5.0f)), "NaN stays");
});

struct Small {
  alignas(16) float x[8] = {1, 2, 3}, f[8] = {1, 1, 1};
  void couple(int device, void* stream) {
    const auto view = [](float* data) {
      return revk_view{int32_t(sizeof(revk_view)), REVK_FLOAT32, data, 1, 1, 8, 8, 8, 1};
    };
    revk::cuda::couple(view(x), view(x), view(f), nullptr,
                       {int32_t(sizeof(revk_where)), device, stream, 0});
  }
};

const test::Register kDevice("device and stream", [] {
  shim::Machine& machine = shim::machine;
  Small small;
  machine.current_device = 0, machine.launches.clear();
  void* const stream = &small;
  small.couple(1, stream);
  test::expect(machine.launches.size() == 1 && machine.launches[0].device == 1,
               "launched on the caller's device");
  test::expect(machine.launches[0].stream == stream, "launched on the caller's stream");
  test::expect(machine.current_device == 0, "the current device is as before");
  const int questions = machine.attribute_questions;
  small.couple(1, stream);
  test::expect(machine.attribute_questions == questions, "the device's size is asked once");
  machine.waits.clear();
  revk::cuda::synchronize({int32_t(sizeof(revk_where)), 1, stream, 0});
  test::expect(
      machine.waits.size() == 1 && machine.waits[0].first == 1 && machine.waits[0].second == stream,
      "waits for the caller's stream of the caller's device");
  test::expect(machine.current_device == 0, "the current device is as before the wait");
});

// The text of the error that a launch ends in.
std::string failure(int device, revk_status expected) {
  Small small;
  try {
    small.couple(device, nullptr);
  } catch (const revk::Error& error) {
    test::expect(error.status == expected, "the status");
    test::expect(cudaGetLastError() == cudaSuccess, "the runtime's own memory is clean");
    test::expect(shim::machine.current_device == 0, "the current device is as before the error");
    return error.what();
  }
  return "no error";
}

const test::Register kErrors("errors", [] {
  const std::string no_device = failure(7, REVK_INVALID_ARGUMENT);
  test::expect(no_device.find("device is 7") != std::string::npos, no_device);
  shim::machine.launch_says = cudaErrorInvalidValue;
  const std::string refused = failure(1, REVK_CUDA_ERROR);
  test::expect(refused == "couple: invalid argument (cudaErrorInvalidValue)", refused);
  try {
    revk::cuda::synchronize({int32_t(sizeof(revk_where)), 1, nullptr, 0});
    test::expect(false, "a wait that failed says so");
  } catch (const revk::Error& error) {
    const std::string text = error.what();
    test::expect(text == "waiting for the stream: invalid argument (cudaErrorInvalidValue)", text);
    test::expect(error.status == REVK_CUDA_ERROR, "the status of the wait");
  }
  shim::machine.launch_says = cudaSuccess;
});

void no_kernel(int) {}

const test::Register kGrid("grids of 31 bits", [] {
  const revk_where here{int32_t(sizeof(revk_where)), 0, nullptr, 0};
  for (const int64_t blocks : {int64_t(1) << 31, (int64_t(1) << 32) + 1}) {
    shim::machine.launches.clear();
    std::string text = "no error";
    try {
      launch_blocks("norm_act", no_kernel, blocks, here, 0);
    } catch (const revk::Error& error) {
      text = error.what();
      test::expect(error.status == REVK_UNSUPPORTED, "the status of too many blocks");
    }
    test::expect(text.find(std::to_string(blocks) + " blocks") != std::string::npos, text);
    test::expect(shim::machine.launches.empty(), "too many blocks are not launched");
  }
});

// What no memory here would hold: nothing is launched, but cut up.
const test::Register kHuge("plans of huge shapes", [] {
  const int64_t million = 1000000, large = (int64_t(1) << 36) / 3;
  const Extent shapes[] = {{million, 2, 1},
                           {1, million, 1},
                           {1, 1, 10 * million},
                           {10 * million, 1, 1},
                           {1, 10 * million, 1},
                           {million, 64, 7},
                           {million, 3, 1},
                           {1, 2, large},
                           {large, 2, 1},
                           {3, 5, large},
                           {1, large, 1},
                           {65536, 2048, 49},
                           {2, 4096, 1 << 20},
                           {1, 1024, 3 * (1 << 22)},
                           {1, 1, 1}};
  for (const Extent& extent : shapes)
    for (const bool rows : {false, true})
      for (const int packet : {1, 2, 8}) {
        if ((rows ? extent.channels : extent.inner) % packet != 0) continue;
        if (!rows && extent.inner == 1) continue;  // as choose_walk has it
        const std::string name = std::to_string(extent.outer) + " x " +
                                 std::to_string(extent.channels) + " x " +
                                 std::to_string(extent.inner) + ", packets of " +
                                 std::to_string(packet) + (rows ? " in rows" : "");
        for (const bool alone : {false, true}) {
          const Slicing plan = slice(extent, rows, packet, alone);
          const int64_t units = plan.inner_per_slice / plan.unit * plan.outer_per_slice;
          test::expect(plan.blocks() > 0 && (plan.blocks() <= INT32_MAX || alone),
                       name + ": blocks");
          test::expect(units <= 2 * kMostUnits * plan.ys, name + ": units of a slice");
          test::expect(plan.outer_per_slice == 1 || plan.inner_per_slice == extent.inner,
                       name + ": whole lines");
          test::expect(!alone || plan.outer_per_slice == 1, name + ": one sample a slice");
          test::expect(plan.inner_slices.divisor * plan.inner_per_slice >= extent.inner &&
                           (plan.inner_slices.divisor - 1) * plan.inner_per_slice < extent.inner,
                       name + ": all of a line, and no slice empty");
          test::expect(
              plan.tiles.divisor * plan.lanes.xs() * (rows ? packet : 1) >= extent.channels,
              name + ": all channels");
          test::expect(
              partial_count(plan.slices, extent.channels) / 2 <=
                  2 * (extent.positions() * extent.channels + kManyBlocks * extent.channels),
              name + ": the workspace");
        }
        for (const bool backward : {false, true}) {
          const Teams teams = make_teams(extent, rows, packet, backward);
          const int64_t blocks = summing_blocks(teams);
          test::expect(blocks > 0 && blocks <= teams.rounds && blocks <= INT32_MAX,
                       name + ": blocks of teams");
          test::expect(teams.chunks * teams.lanes.xs() * packet >= extent.channels &&
                           teams.rounds * teams.lanes.ys() >= extent.positions(),
                       name + ": all channels and positions of teams");
        }
      }
});

const test::Register kMissing("missing",
                              [] { test::expect(missing() == nullptr, "a usable device"); });

// The library asks once, so each answer needs a process of its own: these run only when named.
const test::Register kNoDriver(
    "missing: no driver",
    [] {
      shim::machine.count_says = cudaErrorInsufficientDriver, shim::machine.driver = 0;
      test::expect(missing() == std::string("no NVIDIA driver"), missing());
      test::expect(cudaGetLastError() == cudaSuccess, "the question leaves no error behind");
    },
    false);
const test::Register kOldDriver(
    "missing: old driver",
    [] {
      shim::machine.count_says = cudaErrorInsufficientDriver, shim::machine.driver = 12020;
      test::expect(
          missing() ==
              std::string(
                  "the NVIDIA driver is for CUDA 12.2, older than the CUDA 13.0 of this build"),
          missing());
    },
    false);
const test::Register kNoDevice(
    "missing: no device",
    [] {
      shim::machine.count_says = cudaErrorNoDevice;
      test::expect(missing() == std::string("no CUDA device"), missing());
    },
    false);
const test::Register kOldDevice(
    "missing: old device",
    [] {
      shim::machine.major = 7;
      test::expect(missing() == std::string("no CUDA device of compute capability 8.0 or later"),
                   missing());
    },
    false);

}  // namespace
