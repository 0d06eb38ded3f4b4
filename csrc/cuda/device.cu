// SPDX-License-Identifier: Apache-2.0
// The CUDA device: whether one is available, which one is current, how many multiprocessors it has.
#include <atomic>
#include <string>

#include "core/backends.h"
#include "core/error.h"
#include "cuda/device.cuh"

namespace revk::cuda {
namespace {

// The oldest supported major compute capability: bfloat16 needs 8.0.
constexpr int kOldest = 8;

std::string ask_why_missing() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) cudaGetLastError();  // clear the error that the query caused
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver";
    return "the NVIDIA driver is for CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", older than the CUDA " +
           std::to_string(CUDART_VERSION / 1000) + "." +
           std::to_string(CUDART_VERSION % 1000 / 10) + " of this build";
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) return "no CUDA device";
  if (status != cudaSuccess)
    return std::string("the CUDA runtime says: ") + cudaGetErrorString(status);
  for (int device = 0; device < count; ++device) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        major >= kOldest)
      return "";
  }
  return "no CUDA device of compute capability " + std::to_string(kOldest) + ".0 or later";
}

}  // namespace

const char* missing() {
  static const std::string reason = ask_why_missing();
  return reason.empty() ? nullptr : reason.c_str();
}

const char* archs() { return REVK_CUDA_ARCHS; }

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw cuda_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" +
                   cudaGetErrorName(status) + ")");
}

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "the current CUDA device");
  if (current == device) return;
  const cudaError_t status = cudaSetDevice(device);
  if (status == cudaErrorInvalidDevice) {
    cudaGetLastError();
    throw invalid("where: device is " + std::to_string(device) + ", there is no such CUDA device");
  }
  check(status, "making the CUDA device current");
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void synchronize(const revk_where& where) {
  const DeviceGuard guard(where.device);
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(where.stream)), "waiting for the stream");
}

int multiprocessors(int device) {
  constexpr int kRemembered = 64;
  static std::atomic<int> known[kRemembered];
  if (device < kRemembered && known[device] > 0) return known[device];
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "the number of multiprocessors");
  if (device < kRemembered) known[device] = count;
  return count;
}

}  // namespace revk::cuda
