// SPDX-License-Identifier: Apache-2.0
// h = activation(norm(x)) on a GPU, optionally after a coupling. The backward is in
// norm_act_backward.cu.
//
//     statistics given              one pass
//     layer and RMS norm            one pass, a team of threads per position
//     batch and group norm          s and partial moments; the statistics; h
//
// The kernels are in norm_act_slices.cuh (a block processes a slice of the positions for some
// channels), norm_act_teams.cuh (a team of threads processes a position) and norm_act_finish.cuh
// (partial results to statistics). They use norm_act_plan.cuh (which threads process which
// elements), norm_act_units.cuh and norm_act_team_walk.cuh (the loops), norm_act_ahead.cuh
// (prefetch), norm_act_packet.cuh (loads and stores), norm_act_element.cuh and norm_act_sums.cuh
// (the arithmetic).
#include <array>
#include <type_traits>

#include "core/backends.h"
#include "cuda/launch.cuh"
#include "cuda/norm_act_finish.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/norm_act_slices.cuh"
#include "cuda/norm_act_teams.cuh"

namespace revk::cuda {
namespace {

template <class A, int kSize>
void forward(const NormActCall& call, bool rows, const revk_where& where) {
  const revk_norm& norm = call.norm;
  const Extent extent{call.s.outer, call.s.channels, call.s.inner};
  const bool coupled = call.coupling != NormActCall::kNone;
  const bool group = norm.kind == REVK_GROUP_NORM;
  const Slicing plan = slice(extent, rows, kSize, group);
  const Field s = plan.field(call.s), h = plan.field(call.h);
  const Stream stored = Stream::of(s);
  const Stream stream =
      coupled ? Stream{plan.field(call.x), plan.field(call.f), s, call.coupling} : stored;
  const Scaling<A> scaling(call.s, norm);
  // In training, x and s have one type, and f and h have one type.
  const bool alike = s.dtype == stream.x.dtype && (!coupled || stream.f.dtype == h.dtype);
  if (over_channels(norm) && !norm.statistics_given) {
    Teams teams = make_teams(extent, rows, kSize, false);
    teams.straight = runs_straight(teams, scaling.outer, scaling.inner);
    for (const Field* field : {&stream.x, &stream.f, &s, &h})
      teams.straight = teams.straight && runs_straight(teams, field->outer, field->inner);
    return with_chunks<kSize, kMostChunks>(teams, [&](auto chunks) {
      // Kernels that keep nothing in registers load through run-time types only.
      constexpr int kKnown = decltype(chunks)::value > 0 ? kSize : 1;
      with_types_of_training<kKnown>(alike ? s.dtype : -1, h.dtype, [&](auto x, auto f) {
        launch_blocks("norm_act",
                      norm_teams<A, kSize, decltype(chunks)::value, decltype(x), decltype(f)>,
                      team_blocks(teams, where), where, teams, stream, h, scaling, A(norm.eps));
      });
    });
  }
  // Computes h from `from`; X, F and H are the types of x, f and h.
  const auto apply = [&](const Slicing& slices, const Stream& from, auto x, auto f, auto h_type) {
    launch_blocks("norm_act", norm_apply<A, kSize, decltype(x), decltype(f), decltype(h_type)>,
                  slices.blocks(), where, slices, from, h, scaling);
  };
  const auto apply_uncoupled = [&](const Slicing& slices) {
    with_types_of_training<kSize>(
        s.dtype, h.dtype, [&](auto x, auto h_type) { apply(slices, stored, x, None{}, h_type); });
  };
  if (norm.statistics_given) {
    if (!coupled) return apply_uncoupled(plan);
    return with_types_of_training<kSize>(alike ? s.dtype : -1, h.dtype,
                                         [&](auto x, auto f) { apply(plan, stream, x, f, f); });
  }

  double* const partial = static_cast<double*>(norm.workspace);
  const auto moments = [&](auto x, auto f) {
    launch_blocks("norm_act", norm_moments<A, kSize, decltype(x), decltype(f)>, plan.blocks(),
                  where, plan, stream, partial);
  };
  if (coupled)
    with_types_of_training<kSize>(s.dtype, s.dtype == stream.x.dtype ? stream.f.dtype : -1,
                                  moments);
  else
    with_types_of_training<kSize>(s.dtype, s.dtype, [&](auto x, auto) { moments(x, None{}); });
  const Entries entries = group
                              ? entries_of_groups(partial, extent.outer, plan.inner_slices.divisor,
                                                  extent.channels, norm.groups)
                              : entries_of_channels(partial, plan.slices, extent.channels);
  const double count = group ? double(extent.inner) * double(extent.channels / norm.groups)
                             : double(extent.positions());
  const Statistics<A> statistics{scaling.mean,  scaling.rstd,      count,
                                 norm.eps,      norm.running_mean, norm.running_var,
                                 norm.momentum, norm.running_dtype};
  launch_blocks("norm_act", norm_finish_statistics<A>, entries.blocks(), where, entries, plan,
                statistics);
  apply_uncoupled(plan.from_the_end());
}

template <class A>
void forward(const NormActCall& call, const revk_where& where) {
  const bool coupled = call.coupling != NormActCall::kNone;
  const Walk3 walk = choose_walk<A, 4>(
      {&call.s, &call.h, coupled ? &call.x : nullptr, coupled ? &call.f : nullptr});
  // Teams use packets for rows only.
  const bool teams = over_channels(call.norm) && !call.norm.statistics_given;
  if (walk.words && (walk.rows || !teams))
    forward<A, kPacketOf<A>>(call, walk.rows, where);
  else
    forward<A, 1>(call, walk.rows, where);
}

}  // namespace

void norm_act(const NormActCall& given, const revk_where& where) {
  NormActCall call = given;
  if (call.s.outer == 0 || call.s.channels == 0 || call.s.inner == 0) return;
  if (are_rows(call.s, call.norm)) {
    for (revk_view* view : {&call.h, &call.s, &call.x, &call.f}) lay_along(*view);
    lay_along(call.norm);
  }
  if (call.compute_dtype == REVK_FLOAT64)
    forward<double>(call, where);
  else
    forward<float>(call, where);
}

// Depends on the shape only, and covers every way to walk it: the call's other operands may have
// other layouts and types.
int64_t norm_workspace(const revk_view& x, const revk_norm& norm, const revk_where&) {
  const bool along = are_rows(x, norm);
  const Extent extent{along ? 1 : x.outer, x.channels, along ? x.outer : x.inner};
  if (extent.positions() == 0 || extent.channels == 0) return 0;
  const bool group = norm.kind == REVK_GROUP_NORM;
  int64_t slices = 0;
  for (const bool rows : {false, true})
    for (const int packet : {1, kPacketOf<double>, kPacketOf<float>}) {
      slices = std::max(slices, slice(extent, rows, packet, group).slices);
      if (over_channels(norm))
        slices = std::max(slices, summing_blocks(make_teams(extent, rows, packet, true)));
    }
  const int64_t means = group ? extent.outer * norm.groups : 0;
  return 8 * (partial_count(slices, extent.channels) + 2 * means);
}

}  // namespace revk::cuda
