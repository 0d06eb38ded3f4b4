// SPDX-License-Identifier: Apache-2.0
// Normalisation with activation on the host: runs the passes and the steps between them.
//
//                                   forward                   backward
//     layer and RMS norm            rows                      gradient_rows
//     batch and group norm          measure; apply            gradient_sums; gradient
//     the same, statistics given    apply
//
// The passes are in norm_loops.h and norm_backward_loops.h, their arithmetic in ops/norm_act.h.
// norm_plan.cpp cuts the work into strips and blocks.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/backends.h"
#include "core/scalar.h"
#include "core/views.h"
#include "cpu/loops.h"
#include "cpu/norm_plan.h"

namespace revk::cpu {
namespace {

// Uninitialised memory, aligned for the widest vectors.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : storage_(new char[size_t(bytes) + 64]),
        data_(reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(storage_.get()) + 63) &
                                      ~uintptr_t(63))) {}
  char* data() const { return data_; }

 private:
  std::unique_ptr<char[]> storage_;
  char* data_;
};

// One parallel region for all passes of a call. Each thread takes one contiguous share of a pass,
// so that it walks memory in order and finds its share of the next pass in its cache.
class Team {
 public:
  // The team serves both jobs' passes.
  Team(const NormJob& first, const NormJob& second, int32_t threads)
      : each_((std::max(scratch_bytes(first), scratch_bytes(second)) + 63) / 64 * 64) {
    const int64_t elements = first.instances * first.size[0] * first.size[1] * first.size[2];
    if (elements < kSerial) return;
    size_ = team_size(threads, first.instances * first.splits * first.units);
  }

  class Member {
   public:
    Member(int64_t self, int64_t members, char* scratch)
        : self_(self), members_(members), scratch_(scratch) {}
    int64_t begin(int64_t count) const {
      return count / members_ * self_ + std::min(self_, count % members_);
    }
    int64_t end(int64_t count) const {
      return begin(count) + count / members_ + (self_ < count % members_ ? 1 : 0);
    }
    void wait() const {
      if (members_ > 1) {
#pragma omp barrier
      }
    }
    void over_blocks(NormPass pass, const NormJob& job) const {
      run(pass, job, job.instances * job.splits * job.blocks);
    }
    void over_strips(NormPass pass, const NormJob& job) const {
      run(pass, job, job.instances * job.splits * job.units);
    }

   private:
    void run(NormPass pass, const NormJob& job, int64_t count) const {
      if (begin(count) < end(count)) pass(job, begin(count), end(count), scratch_);
    }
    int64_t self_, members_;
    char* scratch_;
  };

  // Runs body(member) on every thread. It does not throw: all memory is allocated before.
  template <class Body>
  void run(Body&& body) {
    const Memory scratch(each_ * size_);
    if (size_ == 1) return body(Member(0, 1, scratch.data()));
#pragma omp parallel num_threads(size_)
    body(Member(omp_get_thread_num(), omp_get_num_threads(),
                scratch.data() + omp_get_thread_num() * each_));
  }

 private:
  const int64_t each_;
  int size_ = 1;
};

template <class Body>
void with_dtype(int32_t dtype, Body&& body) {
  switch (dtype) {
    case REVK_FLOAT64:
      return body(double{});
    case REVK_FLOAT32:
      return body(float{});
    case REVK_BFLOAT16:
      return body(bfloat16{});
    default:
      return body(float16{});
  }
}

// weight or bias in the compute type, or the neutral value if absent.
template <class A>
void read_parameter(A* to, const void* from, int32_t dtype, int64_t count, A absent) {
  if (from == nullptr) {
    std::fill(to, to + count, absent);
    return;
  }
  with_dtype(dtype, [&](auto type) {
    const auto* const values = static_cast<const decltype(type)*>(from);
    for (int64_t c = 0; c < count; ++c) to[c] = A(widen(values[c]));
  });
}

template <class A>
void read_parameters(NormJob& job, const revk_norm& norm, char* memory) {
  A *const weight = reinterpret_cast<A*>(memory), *const bias = weight + job.channels;
  read_parameter(weight, norm.weight, norm.parameter_dtype, job.channels, A(1));
  read_parameter(bias, norm.bias, norm.parameter_dtype, job.channels, A(-0.0));
  job.weight = weight;
  job.bias = bias;
}

// The number of elements of one channel in a block.
int64_t block_count(const NormJob& job, int64_t block) {
  const int64_t size = job.by_lane ? job.size[1] : job.size[2];
  const int64_t from = block * job.block_units;
  const int64_t to = std::min(from + job.block_units, job.units);
  // Each group of chunks covers `size`; the last chunk of a group holds the remainder.
  const auto before = [&](int64_t unit) {
    return unit / job.chunks * size + unit % job.chunks * job.chunk;
  };
  return (before(to) - before(from)) * job.fold * job.plane;
}

// Merges the blocks' means and sums of squared deviations into the first block's, in order
// (Chan et al. 1979).
void merge_statistics(const NormJob& job, int64_t instance, int64_t begin, int64_t end) {
  double* const first = job.sums + instance * job.blocks * 2 * job.channels;
  double *const means = first, *const squares = first + job.channels;
  double count = double(block_count(job, 0));
  for (int64_t block = 1; block < job.blocks; ++block) {
    const double* const other = first + block * 2 * job.channels;
    const double added = double(block_count(job, block)), share = added / (count + added);
    for (int64_t c = begin; c < end; ++c) {
      const double apart = other[c] - means[c];
      means[c] += apart * share;
      squares[c] += other[job.channels + c] + apart * apart * (count * share);
    }
    count += added;
  }
}

// Merges an instance's block sums into the first block's, in order.
void merge_sums(const NormJob& job, int64_t instance, int64_t begin, int64_t end) {
  double* const first = job.sums + instance * job.blocks * 2 * job.channels;
  for (int64_t block = 1; block < job.blocks; ++block) {
    const double* const other = first + block * 2 * job.channels;
    for (int64_t c = begin; c < end; ++c) {
      first[c] += other[c];
      first[job.channels + c] += other[job.channels + c];
    }
  }
}

void update_running(void* running, int32_t dtype, int64_t c, double momentum, double batch) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    T* const value = static_cast<T*>(running) + c;
    *value = narrow<T>((1.0 - momentum) * double(widen(*value)) + momentum * batch);
  });
}

template <class A>
void finish_channels(const NormJob& job, const revk_norm& norm, int64_t begin, int64_t end) {
  merge_statistics(job, 0, begin, end);
  const double n = double(job.size[0] * job.size[1] * job.size[2] / job.channels);
  for (int64_t c = begin; c < end; ++c) {
    const double mean = job.sums[c], square = std::max(job.sums[job.channels + c], 0.0);
    // max(NaN, 0) is NaN: std::max returns its first argument unless that is smaller.
    static_cast<A*>(norm.mean)[c] = A(mean);
    static_cast<A*>(norm.rstd)[c] = A(1.0 / std::sqrt(square / n + norm.eps));
    if (norm.running_mean == nullptr) continue;
    update_running(norm.running_mean, norm.running_dtype, c, norm.momentum, mean);
    update_running(norm.running_var, norm.running_dtype, c, norm.momentum,
                   square / (n > 1.0 ? n - 1.0 : 1.0));
  }
}

template <class A>
void finish_groups(const NormJob& job, const revk_norm& norm, int64_t instance) {
  merge_statistics(job, instance, 0, job.channels);
  const double* const means = job.sums + instance * job.blocks * 2 * job.channels;
  const double* const squares = means + job.channels;
  const double n = double(job.size[0] * job.size[1] * job.size[2] / job.channels);
  const int64_t each = job.channels / job.groups;
  for (int64_t g = 0; g < job.groups; ++g) {
    double mean = means[g * each], square = squares[g * each];
    for (int64_t k = 1; k < each; ++k) {
      const double apart = means[g * each + k] - mean;
      mean += apart / double(k + 1);
      square += squares[g * each + k] + apart * apart * (n * double(k) / double(k + 1));
    }
    const int64_t place = instance * job.groups + g;
    static_cast<A*>(norm.mean)[place] = A(mean);
    static_cast<A*>(norm.rstd)[place] =
        A(1.0 / std::sqrt(std::max(square, 0.0) / (n * double(each)) + norm.eps));
  }
}

template <class A>
void forward(const NormActCall& call, const revk_where& where) {
  const NormLoops& loops = loops_in_use().norm;
  const bool by_rows = over_channels(call.norm);
  const bool measures = !by_rows && call.norm.statistics_given == 0;
  NormJob apply = plan_apply(call, !measures);
  NormJob measure = measures ? plan_measure(call) : apply;
  if (measures && measure.coupling != int32_t(call.coupling))
    (call.coupling == NormActCall::kCouple ? couple : uncouple)(call.s, call.x, call.f, nullptr,
                                                                where);
  const int64_t parameters = 2 * call.s.channels * 8;
  const int64_t sums = measures ? measure.instances * measure.blocks * 2 * call.s.channels * 8 : 0;
  const Memory memory(parameters + sums);
  read_parameters<A>(apply, call.norm, memory.data());
  measure.sums = reinterpret_cast<double*>(memory.data() + parameters);
  Team team(measure, apply, where.threads);
  team.run([&](const Team::Member& member) {
    if (by_rows) return member.over_blocks(loops.rows, apply);
    if (measures) {
      member.over_blocks(loops.measure, measure);
      member.wait();
      if (measure.groups == 0) {
        finish_channels<A>(measure, call.norm, member.begin(measure.channels),
                           member.end(measure.channels));
      } else {
        for (int64_t i = member.begin(measure.instances); i < member.end(measure.instances); ++i)
          finish_groups<A>(measure, call.norm, i);
      }
      member.wait();
    }
    member.over_strips(loops.apply, apply);
  });
}

// Writes the sums over all instances in the compute type: [channels].
template <class A>
void deliver(const NormJob& job, const revk_norm_gradient& gradient, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double dbias = 0.0, dweight = 0.0;
    for (int64_t i = 0; i < job.instances; ++i) {
      const double* const sums = job.sums + i * job.blocks * 2 * job.channels;
      dbias += sums[c];
      dweight += sums[job.channels + c];
    }
    if (gradient.dbias != nullptr) static_cast<A*>(gradient.dbias)[c] = A(dbias);
    if (gradient.dweight != nullptr) static_cast<A*>(gradient.dweight)[c] = A(dweight);
  }
}

// Each group's means of g * xhat and of g, from its channels' sums.
template <class A>
void group_means(const NormJob& job, int64_t instance, A* mean_gx, A* mean_g) {
  const double* const dbias = job.sums + instance * job.blocks * 2 * job.channels;
  const double* const dweight = dbias + job.channels;
  const A* const weight = static_cast<const A*>(job.weight);
  const int64_t each = job.channels / job.groups;
  const double n = double(job.size[0] * job.size[1] * job.size[2] / job.groups);
  for (int64_t g = 0; g < job.groups; ++g) {
    double sum = 0.0, slope = 0.0;
    for (int64_t c = g * each; c < (g + 1) * each; ++c) {
      sum += double(weight[c]) * dbias[c];
      slope += double(weight[c]) * dweight[c];
    }
    mean_gx[instance * job.groups + g] = A(slope / n);
    mean_g[instance * job.groups + g] = A(sum / n);
  }
}

template <class A>
void backward(const NormActBackwardCall& call, const revk_where& where) {
  const NormLoops& loops = loops_in_use().norm;
  const revk_norm_gradient& gradient = call.gradient;
  const bool by_rows = over_channels(call.norm);
  const bool sums_up = gradient.sums != REVK_SUMS_GIVEN;
  const bool writes_dx = gradient.sums != REVK_SUMS_ONLY;
  NormJob job = writes_dx ? plan_gradient(call) : plan_sums(call);
  NormJob summing = by_rows || !writes_dx ? job : plan_sums(call);
  const bool grouped = job.groups > 0;
  const int64_t parameters = (2 * job.channels + 2 * job.instances * job.groups) * 8;
  const int64_t sums = sums_up ? job.instances * summing.blocks * 2 * job.channels * 8 : 0;
  const Memory memory(parameters + sums);
  read_parameters<A>(job, call.norm, memory.data());
  summing.weight = job.weight;
  summing.bias = job.bias;
  A* const mean_gx = reinterpret_cast<A*>(memory.data() + 2 * job.channels * 8);
  A* const mean_g = mean_gx + job.instances * job.groups;
  summing.sums = reinterpret_cast<double*>(memory.data() + parameters);
  job.dweight = grouped ? mean_gx : gradient.dweight;
  job.dbias = grouped ? mean_g : gradient.dbias;
  job.gradient = grouped             ? NormGradient::kGroup
                 : gradient.constant ? NormGradient::kConstant
                                     : NormGradient::kBatch;
  Team team(summing, job, where.threads);
  team.run([&](const Team::Member& member) {
    const int64_t begin = member.begin(job.channels), end = member.end(job.channels);
    if (sums_up) {
      member.over_blocks(by_rows ? loops.gradient_rows : loops.gradient_sums, summing);
      member.wait();
      if (grouped) {
        for (int64_t i = member.begin(job.instances); i < member.end(job.instances); ++i) {
          merge_sums(summing, i, 0, job.channels);
          group_means(summing, i, mean_gx, mean_g);
        }
        member.wait();
      } else {
        merge_sums(summing, 0, begin, end);
      }
      deliver<A>(summing, gradient, begin, end);
      member.wait();
    }
    if (!by_rows && writes_dx) member.over_strips(loops.gradient, job);
  });
}

}  // namespace

void norm_act(const NormActCall& call, const revk_where& where) {
  call.compute_dtype == REVK_FLOAT64 ? forward<double>(call, where) : forward<float>(call, where);
}

void norm_act_backward(const NormActBackwardCall& call, const revk_where& where) {
  call.compute_dtype == REVK_FLOAT64 ? backward<double>(call, where) : backward<float>(call, where);
}

}  // namespace revk::cpu
