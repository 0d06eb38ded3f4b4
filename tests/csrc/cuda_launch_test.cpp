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
#include "cuda/layout.cuh"
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
