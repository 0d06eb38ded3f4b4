// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime, as far as a kernel launch needs it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace revk::cuda {

// Throws revk::Error naming `what` and the runtime's reason, and takes the reason out of the
// runtime's own memory, so that the caller's next cudaGetLastError does not find it again.
void check(cudaError_t status, const char* what);

// Makes `device` current, and the one that was before on the way out.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: nothing to restore
};

int multiprocessors(int device);  // asked once a device, then remembered

}  // namespace revk::cuda
