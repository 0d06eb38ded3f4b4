// SPDX-License-Identifier: Apache-2.0
// The arithmetic of ops/norm_act.h on packets, and the parameters of a packet's elements.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/norm_act_packet.cuh"
#include "cuda/norm_act_plan.cuh"
#include "ops/norm_act.h"

namespace revk::cuda {

// revk_norm in the kernels' form.
template <class A>
struct Scaling {
  const void *weight, *bias;
  A *mean, *rstd;
  int64_t outer, group, inner;  // strides of the statistics
  Divider group_size;           // channels that share statistics, if channels have statistics
  int32_t parameter_dtype, activation;
  bool by_position;  // statistics vary by position, not by channel

  Scaling(const revk_view& x, const revk_norm& norm)
      : weight(norm.weight),
        bias(norm.bias),
        mean(static_cast<A*>(norm.mean)),
        rstd(static_cast<A*>(norm.rstd)),
        outer(0),
        group(1),
        inner(0),
        group_size(1),
        parameter_dtype(norm.parameter_dtype),
        activation(norm.activation),
        by_position(over_channels(norm)) {
    if (by_position)
      outer = norm.statistics_outer_stride, group = 0, inner = norm.statistics_inner_stride;
    if (norm.kind == REVK_GROUP_NORM)
      outer = norm.groups, group_size = Divider(x.channels / norm.groups);
  }

  // The index of one element's statistics.
  __device__ int64_t place(int64_t o, int64_t c, int64_t i) const {
    return o * outer + group_size.divide(c) * group + i * inner;
  }
};

// The parameters that normalise one packet's elements.
template <class A, int kSize>
struct Normals {
  A mean[kSize], rstd[kSize], weight[kSize], bias[kSize];

  __device__ ops::Normal<A> of(int e) const { return {mean[e], rstd[e], weight[e], bias[e]}; }

  // From channel c on; for rows the packet runs over channels.
  __device__ void read_parameters(const Scaling<A>& scaling, bool rows, int64_t c) {
    read(scaling.weight, scaling.parameter_dtype, rows, c, A(1), weight);
    read(scaling.bias, scaling.parameter_dtype, rows, c, -A(0), bias);
  }
  __device__ void read_statistics(const Scaling<A>& scaling, bool rows, int64_t o, int64_t c,
                                  int64_t i) {
    const bool shared = rows == scaling.by_position;  // by the whole packet
    const int64_t first = scaling.place(o, c, i);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const int64_t place =
          shared || e == 0 ? first : scaling.place(o, rows ? c + e : c, rows ? i : i + e);
      mean[e] = scaling.mean ? scaling.mean[place] : A(0);
      rstd[e] = scaling.rstd[place];
    }
  }

 private:
  // Branches on the type once, so that all loads are in flight before the first is waited for.
  __device__ static void read(const void* from, int32_t dtype, bool rows, int64_t c, A neutral,
                              A (&to)[kSize]) {
    if (from == nullptr) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) to[e] = neutral;
      return;
    }
    switch (dtype) {
      case REVK_FLOAT64:
        return read_as<double>(from, rows, c, to);
      case REVK_FLOAT32:
        return read_as<float>(from, rows, c, to);
      case REVK_BFLOAT16:
        return read_as<bfloat16>(from, rows, c, to);
      default:
        return read_as<float16>(from, rows, c, to);
    }
  }
  template <class T>
  __device__ static void read_as(const void* from, bool rows, int64_t c, A (&to)[kSize]) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) to[e] = A(widen(static_cast<const T*>(from)[rows ? c + e : c]));
  }
};

// One value per channel of kLanes lanes, in shared memory, laid out so that adjacent lanes read
// adjacent cells.
template <class A, int kSize, int kLanes>
struct PerChannel {
  static constexpr int kGroup = kSize * int(sizeof(A)) > kWord ? kWord / int(sizeof(A)) : kSize;
  struct alignas(kGroup * sizeof(A)) Group {
    A of[kGroup];
  } cells[kSize / kGroup][kLanes];

  __device__ void write(int lane, int e, A value) {
    cells[e / kGroup][lane].of[e % kGroup] = value;
  }
  __device__ void write(int lane, const A (&values)[kSize]) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) write(lane, e, values[e]);
  }
  // Element e, called in order of e: kGroup elements are read at once and kept.
  __device__ A read(int lane, int e, Group& kept) const {
    if (e % kGroup == 0) kept = cells[e / kGroup][lane];
    return kept.of[e % kGroup];
  }
};

// Calls body(activation) with the type of a revk_activation: a uniform branch.
template <class Body>
__device__ void with_activation(int32_t activation, Body&& body) {
  // Ordered by the cost of the activation, the cheapest first.
  if (activation == REVK_RELU) return body(ops::Relu{});
  if (activation == REVK_IDENTITY) return body(ops::Identity{});
  if (activation == REVK_GELU) return body(ops::Gelu{});
  if (activation == REVK_GELU_TANH) return body(ops::GeluTanh{});
  body(ops::Silu{});
}

// Keeps the compiler from interleaving several elements of an activation that would then spill.
template <class Activation>
__device__ void one_by_one() {
  if constexpr (!std::is_same_v<Activation, ops::Identity> &&
                !std::is_same_v<Activation, ops::Relu>)
    asm volatile("" ::: "memory");
}

// values <- activation(z)
template <class A, int kSize>
__device__ void activate(const Normals<A, kSize>& normals, int32_t activation, A (&values)[kSize]) {
  with_activation(activation, [&](auto kind) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const ops::Normal<A> normal = normals.of(e);
      values[e] = decltype(kind)::value(normal.z(normal.xhat(values[e])));
    }
  });
}

}  // namespace revk::cuda
