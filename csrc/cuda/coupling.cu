// SPDX-License-Identifier: Apache-2.0
// The additive coupling, its inverse and the reverse step on a GPU (Gomez et al. 2017, eq. 6, eq. 7
// and Algorithm 1).
//
// The packet kernels are compiled for each pair of stream and branch types, because all of a
// thread's loads must be in flight before its first conversion. The strided kernels are bound by
// scattered accesses anyway: they branch on the types at run time, so there is one per compute type
// instead of sixteen.
#include <array>

#include "core/backends.h"
#include "core/scalar.h"
#include "cuda/coupling_int16.cuh"
#include "cuda/extras.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout.cuh"
#include "cuda/packet.cuh"
#include "ops/coupling.h"

namespace revk::cuda {
namespace {

template <class Step, class Stream, class Branch, class Extras>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Extras>)
    couple_packets(const __grid_constant__ Layout<3> layout,
                   const __grid_constant__ Extras extras) {
  using A = typename compute_type<Stream, Branch>::type;
  constexpr int kSize = kPacket<Stream, Branch>;
  const Operand &out = layout.operand[0], &x = layout.operand[1], &f = layout.operand[2];
  Walk<Extras> walk(extras);
  for_each_item<kSize>(layout, [&](const Spot& spot, int count) {
    Packet<Stream, kSize> stream;
    Packet<Branch, kSize> branch;
    stream.load(static_cast<const Stream*>(x.data) + spot.offset(x), count);
    branch.load(static_cast<const Branch*>(f.data) + spot.offset(f), count);
    walk.begin(spot.index);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (!Walk<Extras>::kPlain && e >= count) continue;
      const A result =
          Step{}(A(widen(stream.element[e])), walk.branch(A(widen(branch.element[e]))));
      stream.element[e] = narrow<Stream>(result);
      walk.result(stream.element[e]);
    }
    stream.store(static_cast<Stream*>(out.data) + spot.offset(out), count);
  });
  walk.finish();
}

// y <- y - f and dy <- dy + df.
template <class Stream, class Branch, class Extras>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Extras>)
    reverse_packets(const __grid_constant__ Layout<4> layout,
                    const __grid_constant__ Extras extras) {
  using A = typename compute_type<Stream, Branch>::type;
  constexpr int kSize = kPacket<Stream, Branch>;
  const Operand &y = layout.operand[0], &f = layout.operand[1], &dy = layout.operand[2],
                &df = layout.operand[3];
  Walk<Extras> walk(extras);
  for_each_item<kSize>(layout, [&](const Spot& spot, int count) {
    Packet<Stream, kSize> stream, gradient;
    Packet<Branch, kSize> branch, branch_gradient;
    stream.load(static_cast<const Stream*>(y.data) + spot.offset(y), count);
    branch.load(static_cast<const Branch*>(f.data) + spot.offset(f), count);
    gradient.load(static_cast<const Stream*>(dy.data) + spot.offset(dy), count);
    branch_gradient.load(static_cast<const Branch*>(df.data) + spot.offset(df), count);
    walk.begin(spot.index);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (!Walk<Extras>::kPlain && e >= count) continue;
      const A result =
          ops::Uncouple{}(A(widen(stream.element[e])), walk.branch(A(widen(branch.element[e]))));
      stream.element[e] = narrow<Stream>(result);
      walk.result(stream.element[e]);
      gradient.element[e] = narrow<Stream>(
          ops::Couple{}(A(widen(gradient.element[e])), A(widen(branch_gradient.element[e]))));
    }
    stream.store(static_cast<Stream*>(y.data) + spot.offset(y), count);
    gradient.store(static_cast<Stream*>(dy.data) + spot.offset(dy), count);
  });
  walk.finish();
}

// out = Step(x, f) for one element of any types; A is their compute type.
template <class Step, class A, class Extras>
__device__ void couple_one(const Operand& out, const Operand& x, const Operand& f, const Spot& spot,
                           Walk<Extras>& walk) {
  const A result = Step{}(load_any<A>(x.data, spot.offset(x), x.dtype),
                          walk.branch(load_any<A>(f.data, spot.offset(f), f.dtype)));
  store_any(out.data, spot.offset(out), out.dtype, result, walk);
}

template <class Step, class A, class Extras>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Extras>)
    couple_strided(const __grid_constant__ Layout<3> layout,
                   const __grid_constant__ Extras extras) {
  Walk<Extras> walk(extras);
  for_each_item<1>(layout, [&](const Spot& spot, int) {
    walk.begin(spot.index);
    couple_one<Step, A>(layout.operand[0], layout.operand[1], layout.operand[2], spot, walk);
  });
  walk.finish();
}

template <class A, class Extras>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<Extras>)
    reverse_strided(const __grid_constant__ Layout<4> layout,
                    const __grid_constant__ Extras extras) {
  Walk<Extras> walk(extras);
  Walk<Plain> alone{Plain{}};
  for_each_item<1>(layout, [&](const Spot& spot, int) {
    const Operand &y = layout.operand[0], &f = layout.operand[1], &dy = layout.operand[2],
                  &df = layout.operand[3];
    walk.begin(spot.index);
    couple_one<ops::Uncouple, A>(y, y, f, spot, walk);
    couple_one<ops::Couple, A>(dy, dy, df, spot, alone);
  });
  walk.finish();
}

// Calls body(Stream{}, Branch{}, extras) with compile-time types.
template <class Body>
void with_types(const revk_view& stream, const revk_view& branch, const revk_coupling* coupling,
                Body&& body) {
  with_type(stream.dtype, [&](auto s) {
    with_type(branch.dtype, [&](auto b) {
      using A = typename compute_type<decltype(s), decltype(b)>::type;
      if (coupling)
        body(s, b, Extras<A>(branch, *coupling));
      else
        body(s, b, Plain{});
    });
  });
}

template <class Step>
void couple_with(const char* name, const revk_view& out, const revk_view& x, const revk_view& f,
                 const revk_coupling* coupling, const revk_where& where) {
  with_types(x, f, coupling, [&](auto stream, auto branch, const auto& extras) {
    using Stream = decltype(stream);
    using Branch = decltype(branch);
    using E = std::decay_t<decltype(extras)>;
    Layout<3> layout = merge<3>({&out, &x, &f}, !coupling);
    if (out.dtype == x.dtype && takes_words(layout, kPacket<Stream, Branch>)) {
      cut(layout, kPacket<Stream, Branch>);
      launch(name, couple_packets<Step, Stream, Branch, E>, layout.items, where, layout, extras);
    } else {
      cut(layout, 1);
      launch(name, couple_strided<Step, typename compute_type<Stream, Branch>::type, E>,
             layout.items, where, layout, extras);
    }
  });
}

}  // namespace

void couple(const revk_view& out, const revk_view& x, const revk_view& f,
            const revk_coupling* coupling, const revk_where& where) {
  if (x.dtype == REVK_INT16) return couple_int16("couple", false, out, x, f, *coupling, where);
  couple_with<ops::Couple>("couple", out, x, f, coupling, where);
}

void uncouple(const revk_view& out, const revk_view& y, const revk_view& f,
              const revk_coupling* coupling, const revk_where& where) {
  if (y.dtype == REVK_INT16) return couple_int16("uncouple", true, out, y, f, *coupling, where);
  couple_with<ops::Uncouple>("uncouple", out, y, f, coupling, where);
}

// One launch if both halves have the same pair of types, as in training; otherwise two launches,
// which move the same number of bytes. An int16 y has a dy of another type.
void reverse_step(const revk_view& y, const revk_view& f, const revk_view& dy, const revk_view& df,
                  const revk_coupling* coupling, const revk_where& where) {
  if (y.dtype != dy.dtype || f.dtype != df.dtype) {
    uncouple(y, y, f, coupling, where);
    return couple(dy, dy, df, nullptr, where);
  }
  with_types(y, f, coupling, [&](auto stream, auto branch, const auto& extras) {
    using Stream = decltype(stream);
    using Branch = decltype(branch);
    using E = std::decay_t<decltype(extras)>;
    Layout<4> layout = merge<4>({&y, &f, &dy, &df}, !coupling);
    if (takes_words(layout, kPacket<Stream, Branch>)) {
      cut(layout, kPacket<Stream, Branch>);
      launch("reverse_step", reverse_packets<Stream, Branch, E>, layout.items, where, layout,
             extras);
    } else {
      cut(layout, 1);
      launch("reverse_step", reverse_strided<typename compute_type<Stream, Branch>::type, E>,
             layout.items, where, layout, extras);
    }
  });
}

}  // namespace revk::cuda
