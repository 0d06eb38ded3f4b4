// SPDX-License-Identifier: Apache-2.0
// Couplings of int16 streams on a GPU. One kernel per branch type: the sign is in the factor 2^k,
// and the value's type, which only a store waits for, is a run-time branch.
#include <array>

#include "core/scalar.h"
#include "cuda/coupling_int16.cuh"
#include "cuda/extras.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout.cuh"
#include "cuda/packet.cuh"
#include "ops/coupling.h"

namespace revk::cuda {
namespace {

// out, x, f and value. Without a value, `out` takes its place; its int16 dtype marks that.
using Int16Layout = Layout<4>;

template <class A>
__device__ int16_t add(int16_t q, A f, const ops::FixedPoint<A>& fixed, Walk<Extras<A>>& walk) {
  const A n = fixed.steps(walk.scaled(f));
  const int16_t stored = fixed.sum(q, n);
  walk.result(stored, float(fixed.unwrapped(q, n) * fixed.down));
  return stored;
}

template <class T, class W, int kSize>
__device__ void store_value(T* to, const Packet<int16_t, kSize>& stored, W down, int count) {
  Packet<T, kSize> value;
#pragma unroll
  for (int e = 0; e < kSize; ++e)
    value.element[e] = narrow<T>(ops::fixed_value(stored.element[e], down));
  value.store(to, count);
}

template <int kSize>
__device__ void store_value_any(const Operand& value, int64_t at,
                                const Packet<int16_t, kSize>& stored, double down, int count) {
  switch (value.dtype) {
    case REVK_FLOAT64:
      return store_value(static_cast<double*>(value.data) + at, stored, down, count);
    case REVK_FLOAT32:
      return store_value(static_cast<float*>(value.data) + at, stored, float(down), count);
    case REVK_BFLOAT16:
      return store_value(static_cast<bfloat16*>(value.data) + at, stored, float(down), count);
    case REVK_FLOAT16:
      return store_value(static_cast<float16*>(value.data) + at, stored, float(down), count);
  }
}

template <class Branch, class A>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Extras<A>>)
    couple_int16_packets(const __grid_constant__ Int16Layout layout,
                         const __grid_constant__ Extras<A> extras,
                         const __grid_constant__ ops::FixedPoint<A> fixed) {
  constexpr int kSize = kPacket<int16_t, Branch>;
  const Operand &out = layout.operand[0], &x = layout.operand[1], &f = layout.operand[2],
                &value = layout.operand[3];
  Walk<Extras<A>> walk(extras);
  for_each_item<kSize>(layout, [&](const Spot& spot, int count) {
    Packet<int16_t, kSize> stream;
    Packet<Branch, kSize> branch;
    stream.load(static_cast<const int16_t*>(x.data) + spot.offset(x), count);
    branch.load(static_cast<const Branch*>(f.data) + spot.offset(f), count);
    walk.begin(spot.index);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (e >= count) continue;
      stream.element[e] = add(stream.element[e], A(widen(branch.element[e])), fixed, walk);
    }
    stream.store(static_cast<int16_t*>(out.data) + spot.offset(out), count);
    store_value_any(value, spot.offset(value), stream, double(fixed.down), count);
  });
  walk.finish();
}

template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Extras<A>>)
    couple_int16_strided(const __grid_constant__ Int16Layout layout,
                         const __grid_constant__ Extras<A> extras,
                         const __grid_constant__ ops::FixedPoint<A> fixed) {
  const Operand &out = layout.operand[0], &x = layout.operand[1], &f = layout.operand[2],
                &value = layout.operand[3];
  Walk<Extras<A>> walk(extras);
  Walk<Plain> unseen{Plain{}};
  for_each_item<1>(layout, [&](const Spot& spot, int) {
    walk.begin(spot.index);
    const int16_t q = static_cast<const int16_t*>(x.data)[spot.offset(x)];
    const int16_t stored = add(q, load_any<A>(f.data, spot.offset(f), f.dtype), fixed, walk);
    static_cast<int16_t*>(out.data)[spot.offset(out)] = stored;
    if (value.dtype == REVK_FLOAT64)
      store_any(value.data, spot.offset(value), value.dtype,
                ops::fixed_value(stored, double(fixed.down)), unseen);
    else if (value.dtype != REVK_INT16)
      store_any(value.data, spot.offset(value), value.dtype,
                ops::fixed_value(stored, float(fixed.down)), unseen);
  });
  walk.finish();
}

}  // namespace

void couple_int16(const char* name, bool subtract, const revk_view& out, const revk_view& x,
                  const revk_view& f, const revk_coupling& coupling, const revk_where& where) {
  const bool by_index = coupling.channel_scale != nullptr || coupling.sample_scale != nullptr ||
                        coupling.checksum != nullptr;
  const revk_view& value = coupling.value != nullptr ? *coupling.value : out;
  Int16Layout layout = merge<4>({&out, &x, &f, &value}, !by_index);
  with_type(f.dtype, [&](auto branch) {
    using Branch = decltype(branch);
    using A = typename compute_type<float, Branch>::type;
    constexpr int kSize = kPacket<int16_t, Branch>;
    const Extras<A> extras(f, coupling);
    const ops::FixedPoint<A> fixed{subtract ? -extras.grid.up : extras.grid.up, extras.grid.down};
    if (takes_words(layout, kSize)) {
      cut(layout, kSize);
      launch(name, couple_int16_packets<Branch, A>, layout.items, where, layout, extras, fixed);
    } else {
      cut(layout, 1);
      launch(name, couple_int16_strided<A>, layout.items, where, layout, extras, fixed);
    }
  });
}

}  // namespace revk::cuda
