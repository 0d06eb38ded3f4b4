// SPDX-License-Identifier: Apache-2.0
// The parts of the CUDA runtime that a kernel launch needs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace revk::cuda {

// Throws revk::Error naming `what` and the runtime's error, and clears that error, so that the
// caller's next cudaGetLastError does not report it again.
void check(cudaError_t status, const char* what);

// Makes `device` current, and restores the previous device on destruction.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: nothing to restore
};

int multiprocessors(int device);  // queried once per device, then cached

}  // namespace revk::cuda
