// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA for g++ to compile and run the kernels of csrc/cuda as they are, on host memory.
// Found by `#include <cuda_runtime.h>` when this folder comes first on the include path.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "fibres.h"

#define CUDART_VERSION 13000
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shim_shared")))

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ---- The runtime. It keeps a log, and fails on demand.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace shim {
struct Machine {
  int devices = 2, multiprocessors = 1, major = 9, driver = 13000;
  cudaError_t count_says = cudaSuccess, launch_says = cudaSuccess;
  bool backwards = false;  // the order of blocks, and of threads between waits
  int current_device = 0, attribute_questions = 0;
  cudaError_t last_error = cudaSuccess;
  struct Launch {
    int device;
    unsigned blocks, threads;
    cudaStream_t stream;
  };
  std::vector<Launch> launches;
  std::vector<std::pair<int, cudaStream_t>> waits;  // for a stream of a device

  cudaError_t say(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
  }
};
inline Machine machine;
}  // namespace shim

// A thread's copies to shared memory that are under way. They are made as late as they may be, when
// the thread waits for them, and until then there is garbage: whoever reads too early, starts one
// over what is still to be read, or writes where one still reads, gives other results.
namespace shim {
class Copies {
 public:
  void start(void* to, const void* from, size_t bytes) {
    std::memset(to, 0xa5, bytes);
    open_.push_back({to, from, bytes});
  }
  void close() { groups_.push_back(std::exchange(open_, {})); }
  void wait(size_t most) {
    for (; groups_.size() > most; groups_.pop_front())
      for (const Copy& copy : groups_.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  void drop() { open_.clear(), groups_.clear(); }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};
inline Copies copies[1024];  // of each thread of a block
}  // namespace shim

extern char __start_shim_shared[] __attribute__((weak));
extern char __stop_shim_shared[] __attribute__((weak));

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidValue ? "invalid argument" : "another error";
}
inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorOther";
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(shim::machine.last_error, cudaSuccess);
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = shim::machine.count_says == cudaSuccess ? shim::machine.devices : 0;
  return shim::machine.say(shim::machine.count_says);
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = shim::machine.driver;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = shim::machine.current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= shim::machine.devices)
    return shim::machine.say(cudaErrorInvalidDevice);
  shim::machine.current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (shim::machine.launch_says != cudaSuccess) return shim::machine.say(shim::machine.launch_says);
  shim::machine.waits.emplace_back(shim::machine.current_device, stream);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  ++shim::machine.attribute_questions;
  *value = attribute == cudaDevAttrMultiProcessorCount ? shim::machine.multiprocessors
                                                       : shim::machine.major;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  shim::Machine& machine = shim::machine;
  if (machine.launch_says != cudaSuccess) return machine.say(machine.launch_says);
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || blocks > INT32_MAX || threads == 0 || threads > 1024)
    return machine.say(cudaErrorInvalidValue);
  machine.launches.push_back({machine.current_device, blocks, threads, config->stream});
  gridDim = config->gridDim, blockDim = config->blockDim;
  const auto enter = [](int thread) { threadIdx.x = unsigned(thread); };
  for (unsigned turn = 0; turn < blocks; ++turn) {
    blockIdx.x = machine.backwards ? blocks - 1 - turn : turn;
    if (__start_shim_shared)
      std::memset(__start_shim_shared, 0xa5, size_t(__stop_shim_shared - __start_shim_shared));
    for (unsigned thread = 0; thread < threads; ++thread) shim::copies[thread].drop();
    shim::Block::current().run(
        int(threads), machine.backwards, [&] { kernel(arguments...); }, enter);
  }
  return cudaSuccess;
}

// ---- What a kernel may call.

inline void __syncthreads() { shim::Block::current().barrier(); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  shim::copies[threadIdx.x].start(to, from, bytes);
}
inline void __pipeline_commit() { shim::copies[threadIdx.x].close(); }
inline void __pipeline_wait_prior(size_t most) { shim::copies[threadIdx.x].wait(most); }

namespace shim {
template <class T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 4 or 8 bytes");
  if (mask != ~0u) std::abort();  // partial warps are not emulated
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Block::current().shuffle(bits, from);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace shim

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned away) {
  return shim::shuffle(mask, value, shim::Block::current().lane() + int(away));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int away) {
  return shim::shuffle(mask, value, shim::Block::current().lane() ^ away);
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return std::exchange(*at, *at + value);
}
inline int atomicMax(int* at, int value) { return std::exchange(*at, std::max(*at, value)); }
