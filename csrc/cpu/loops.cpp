// SPDX-License-Identifier: Apache-2.0
// Instruction set dispatch, jobs from views, and running jobs on threads.
#include "cpu/loops.h"

#include <omp.h>
#if defined(REVK_X86_ISAS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sys/stat.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/backends.h"
#include "core/views.h"

namespace revk::cpu {
namespace {

// A tile without buffers: long enough to amortise its start and end, short enough to share out
// evenly.
constexpr int64_t kLargeTile = 16 * 1024;

// Instruction sets, best first

struct Isa {
  const char* name;
  Loops loops;
  bool (*supported)();
};

#if defined(REVK_X86_ISAS)
// Tests every flag that cmake/CpuKernels.cmake compiles with, because a hypervisor may mask any of
// them; F16C by its CPUID bit, which older compilers' __builtin_cpu_supports does not know.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

constexpr Isa kIsas[] = {
#if defined(REVK_X86_ISAS)
    {"avx512", {avx512::run_tiles, avx512::kNormLoops}, has_avx512},
    {"avx2", {avx2::run_tiles, avx2::kNormLoops}, has_avx2},
#endif
    {"baseline", {baseline::run_tiles, baseline::kNormLoops}, [] { return true; }},
};

const Isa* best_isa() {
#if defined(REVK_X86_ISAS)
  __builtin_cpu_init();
#endif
  for (const Isa& isa : kIsas)
    if (isa.supported()) return &isa;
  return nullptr;  // not reached: the baseline is always supported
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{best_isa()};
  return isa;
}

// Views to jobs

// One dimension, with the steps of everything that advances along it.
struct Dim {
  int64_t size;
  int64_t step[7];  // out, x, f in bytes; channel, outer, index; value in bytes
};

bool continues(const Dim& outer, const Dim& inner) {
  for (int k = 0; k < 7; ++k)
    if (outer.step[k] != inner.step[k] * inner.size) return false;
  return true;
}

// Sorts the dimensions by out's memory order and merges them into as few as the operands allow.
int order_and_merge(Dim* dims, int rank) {
  std::stable_sort(dims, dims + rank,
                   [](const Dim& a, const Dim& b) { return a.step[0] > b.step[0]; });
  int kept = 0;
  for (int k = 0; k < rank; ++k) {
    if (dims[k].size == 1) continue;
    if (kept > 0 && continues(dims[kept - 1], dims[k])) {
      const int64_t size = dims[kept - 1].size * dims[k].size;
      dims[kept - 1] = dims[k];
      dims[kept - 1].size = size;
    } else {
      dims[kept++] = dims[k];
    }
  }
  return kept;
}

// Whether no operand needs a buffer (tiles.h tests the same per operand), so that a tile may exceed
// the buffers.
bool runs_in_place(const Job& job) {
  const int32_t dtype = job.out.dtype;
  const bool native = dtype == (job.wide ? REVK_FLOAT64 : REVK_FLOAT32);
  const bool half = dtype == REVK_BFLOAT16 || dtype == REVK_FLOAT16;
  if (job.extras != nullptr || !(native || half)) return false;
  for (const Operand* operand : {&job.out, &job.x, &job.f})
    if (operand->dtype != dtype || operand->step[2] != item_size(dtype)) return false;
  return true;
}

void choose_tiles(Job& job) {
  const int64_t tile = runs_in_place(job) ? kLargeTile : kTile;
  job.tile_cols = std::min(job.size[2], tile);
  job.tile_rows = std::min(job.size[1], tile / job.tile_cols);
  // An operand that is dense along the other dimension (a channels-last branch with an NCHW stream)
  // is read in square blocks, so that a cache line is fetched once, not once per row.
  constexpr int64_t kSquare = 32;
  const Operand* const beside[] = {&job.x, &job.f, job.extras ? &job.extras->value : &job.f};
  for (const Operand* operand : beside)
    if (operand->step[1] < operand->step[2] && job.size[1] > 1 && job.size[2] > kSquare) {
      job.tile_cols = kSquare;
      job.tile_rows = std::min(job.size[1], kTile / kSquare);
    }
  job.tiles_down = (job.size[1] + job.tile_rows - 1) / job.tile_rows;
  job.tiles_across = (job.size[2] + job.tile_cols - 1) / job.tile_cols;
  job.tiles = job.size[0] * job.tiles_down * job.tiles_across;
}

}  // namespace

const Loops& loops_in_use() { return chosen().load(std::memory_order_relaxed)->loops; }
const char* isa() { return chosen().load(std::memory_order_relaxed)->name; }

bool set_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0 && isa.supported()) {
      chosen().store(&isa, std::memory_order_relaxed);
      return true;
    }
  return false;
}

namespace {

// A forked child has none of its parent's threads, but libgomp would wait for those of its team
// forever. There is no way to tell whose threads they were, so a child of a parent with threads
// runs single-threaded.
std::atomic<bool> alone{false};

#if defined(__linux__)
bool had_threads = false;  // written by the thread that forks, read by the child

struct AtFork {
  AtFork() {
    const auto before = [] {
      struct stat tasks;  // its link count is two more than the number of threads
      had_threads = stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink > 3;
    };
    const auto in_child = [] { alone.store(alone.load() || had_threads); };
    pthread_atfork(before, nullptr, in_child);
  }
} const at_fork;
#endif

}  // namespace

// libgomp ends the process if it cannot create threads. Many more threads than processors gain
// nothing, and results do not depend on the number.
int team_size(int32_t threads, int64_t shares) {
  if (alone.load(std::memory_order_relaxed)) return 1;
  const int usual = omp_get_max_threads();
  if (threads > usual) threads = std::min(threads, std::max(usual, 8 * omp_get_num_procs()));
  return int(std::clamp<int64_t>(threads > 0 ? threads : usual, 1, std::max<int64_t>(shares, 1)));
}

Job make_job(const revk_view& out, const revk_view& x, const revk_view& f, bool subtract,
             const revk_coupling* coupling, Extras& extras) {
  const revk_view* const views[3] = {&out, &x, &f};
  Dim dims[3] = {{out.outer, {}}, {out.channels, {}}, {out.inner, {}}};
  for (int v = 0; v < 3; ++v) {
    const int64_t item = item_size(views[v]->dtype);
    dims[0].step[v] = views[v]->outer_stride * item;
    dims[1].step[v] = views[v]->channel_stride * item;
    dims[2].step[v] = views[v]->inner_stride * item;
  }
  if (coupling != nullptr) {  // an unused index must not keep dimensions apart
    if (coupling->channel_scale != nullptr) dims[1].step[3] = 1;
    if (coupling->sample_scale != nullptr) dims[0].step[4] = 1;
    if (coupling->checksum != nullptr) {
      dims[0].step[5] = out.channels * out.inner;
      dims[1].step[5] = out.inner;
      dims[2].step[5] = 1;
    }
    if (coupling->value != nullptr) {
      const int64_t item = item_size(coupling->value->dtype);
      dims[0].step[6] = coupling->value->outer_stride * item;
      dims[1].step[6] = coupling->value->channel_stride * item;
      dims[2].step[6] = coupling->value->inner_stride * item;
    }
  }
  const int rank = order_and_merge(dims, 3);

  Job job{};
  extras = Extras{};
  Operand* const operands[3] = {&job.out, &job.x, &job.f};
  int64_t* const indices[3] = {extras.channel_step, extras.outer_step, extras.index_step};
  for (int v = 0; v < 3; ++v) {
    operands[v]->data = static_cast<char*>(views[v]->data);
    operands[v]->dtype = views[v]->dtype;
  }
  for (int k = 0; k < 3; ++k) job.size[k] = 1;
  for (int k = 0; k < rank; ++k) {
    const int to = 3 - rank + k;
    job.size[to] = dims[k].size;
    for (int v = 0; v < 3; ++v) {
      operands[v]->step[to] = dims[k].step[v];
      indices[v][to] = dims[k].step[3 + v];
    }
    extras.value.step[to] = dims[k].step[6];
  }
  if (rank == 0)  // a single element is a dense row of one
    for (int v = 0; v < 3; ++v) operands[v]->step[2] = item_size(views[v]->dtype);
  job.subtract = subtract;
  job.wide = compute_dtype(x.dtype, f.dtype) == REVK_FLOAT64;
  if (coupling != nullptr) {
    extras.channel_scale = coupling->channel_scale;
    extras.sample_scale = coupling->sample_scale;
    extras.rows_per_sample = coupling->rows_per_sample;
    extras.grid_exponent = coupling->grid_exponent;
    extras.checksum = coupling->checksum != nullptr;
    extras.amax = coupling->amax != nullptr;
    if (coupling->value != nullptr) {
      extras.value.data = static_cast<char*>(coupling->value->data);
      extras.value.dtype = coupling->value->dtype;
    }
    job.extras = &extras;
  }
  choose_tiles(job);
  return job;
}

Report run_jobs(const Job* jobs, int64_t count, int32_t threads) {
  const RunTiles run_tiles = loops_in_use().run_tiles;
  Report report;
  int64_t elements = 0, tiles = 0;
  for (int64_t j = 0; j < count; ++j) {
    elements += jobs[j].size[0] * jobs[j].size[1] * jobs[j].size[2];
    tiles += jobs[j].tiles;
  }
  const int team = elements < kSerial ? 1 : team_size(threads, tiles);
  if (team == 1) {
    for (int64_t j = 0; j < count; ++j) run_tiles(jobs[j], 0, jobs[j].tiles, report);
    return report;
  }
  uint64_t checksum = 0, amax_bits = 0;
#pragma omp parallel num_threads(team) reduction(+ : checksum) reduction(max : amax_bits)
  {
    const int64_t members = omp_get_num_threads(), self = omp_get_thread_num();
    const int64_t begin = tiles / members * self + std::min<int64_t>(self, tiles % members);
    const int64_t end = begin + tiles / members + (self < tiles % members ? 1 : 0);
    Report own;
    int64_t first = 0;  // the job's first tile in the count over all jobs
    for (int64_t j = 0; j < count && first < end; ++j) {
      const int64_t from = std::max<int64_t>(begin - first, 0);
      const int64_t to = std::min(end - first, jobs[j].tiles);
      if (from < to) run_tiles(jobs[j], from, to, own);
      first += jobs[j].tiles;
    }
    checksum = own.checksum;
    amax_bits = own.amax_bits;
  }
  report.checksum = checksum;
  report.amax_bits = amax_bits;
  return report;
}

}  // namespace revk::cpu
