// SPDX-License-Identifier: Apache-2.0
// dx = base + the gradient of h = activation(norm(x)), and the gradients of the norm's parameters.
//
//     layer and RMS norm            norm_gradient_teams, which also sums for the parameters
//     batch and group norm          norm_gradient_sums, per slice; norm_finish_sums; norm_gradient
//
// norm_act.cu says which files the kernels are in.
#include <array>

#include "core/backends.h"
#include "cuda/launch.cuh"
#include "cuda/norm_act_finish.cuh"
#include "cuda/norm_act_plan.cuh"
#include "cuda/norm_act_slices.cuh"
#include "cuda/norm_act_teams.cuh"

namespace revk::cuda {
namespace {

constexpr char kName[] = "norm_act_backward";

template <class A, int kSize>
class Backward {
 public:
  Backward(const NormActBackwardCall& call, bool rows, const revk_where& where)
      : call_(call),
        where_(where),
        extent_{call.x.outer, call.x.channels, call.x.inner},
        group_(call.norm.kind == REVK_GROUP_NORM),
        rows_(rows),
        slicing_(slice(extent_, rows, kSize, group_)),
        scaling_(call.x, call.norm),
        dh_(slicing_.field(call.dh)),
        x_(slicing_.field(call.x)),
        partial_(static_cast<double*>(call.norm.workspace)),
        dweight_(static_cast<A*>(call.gradient.dweight)),
        dbias_(static_cast<A*>(call.gradient.dbias)) {}

  void run() const {
    const int32_t sums = call_.gradient.sums;
    const bool constant = call_.gradient.constant != 0;
    const bool wanted = (dweight_ || dbias_) && sums != REVK_SUMS_GIVEN;
    if (over_channels(call_.norm) && !constant) return over_teams(wanted);

    const bool means = group_ && !constant;
    if (wanted || means) sum_slices();
    if (wanted) finish_sums(slicing_.slices);
    if (sums == REVK_SUMS_ONLY) return;
    GradientSums<A> used{dbias_, dweight_, A(call_.gradient.count), Gradient::kBatch};
    if (constant) used.kind = Gradient::kConstant;
    if (means) used = finish_means();
    const Slicing plan = wanted || means ? slicing_.from_the_end() : slicing_;
    const Field dx = slicing_.field(call_.dx), before = base();
    with_types_of_training<kSize>(
        alike(dx, before) ? known_type() : -1, dh_.dtype, [&](auto x, auto dh) {
          launch_blocks(kName, norm_gradient<A, kSize, decltype(x), decltype(dh)>,
                        slicing_.blocks(), where_, plan, dx, before, dh_, x_, scaling_, used);
        });
  }

 private:
  bool alike(const Field& dx, const Field& before) const {
    return dx.dtype == x_.dtype && (!before.data || before.dtype == x_.dtype);
  }
  // The type of x if the slices' kernels support it at compile time: see by_position.
  int32_t known_type() const { return scaling_.by_position ? -1 : x_.dtype; }
  Field base() const { return call_.base.data ? slicing_.field(call_.base) : Field{}; }

  void over_teams(bool wanted) const {
    Teams plan = make_teams(extent_, rows_, kSize, true);
    const bool beside = wanted && sums_beside(plan);
    const int64_t blocks = beside ? summing_blocks(plan) : team_blocks(plan, where_);
    const Field dx = slicing_.field(call_.dx), before = base();
    plan.straight = runs_straight(plan, scaling_.outer, scaling_.inner);
    for (const Field* field : {&x_, &dh_, &dx, &before})
      if (field->data)
        plan.straight = plan.straight && runs_straight(plan, field->outer, field->inner);
    with_chunks<kSize, kMostChunksBack>(plan, [&](auto chunks) {
      // Kernels that keep nothing in registers load through run-time types only.
      constexpr int kKnown = decltype(chunks)::value > 0 ? kSize : 1;
      with_types_of_training<kKnown>(
          alike(dx, before) ? x_.dtype : -1, dh_.dtype, [&](auto x, auto dh) {
            launch_blocks(
                kName,
                norm_gradient_teams<A, kSize, decltype(chunks)::value, decltype(x), decltype(dh)>,
                blocks, where_, plan, dx, before, dh_, x_, scaling_, beside ? partial_ : nullptr);
          });
    });
    if (beside) {
      finish_sums(blocks);
    } else if (wanted) {
      sum_slices();
      finish_sums(slicing_.slices);
    }
  }

  void sum_slices() const {
    with_types_of_training<kSize>(known_type(), dh_.dtype, [&](auto x, auto dh) {
      launch_blocks(kName, norm_gradient_sums<A, kSize, decltype(x), decltype(dh)>,
                    slicing_.blocks(), where_, slicing_, dh_, x_, scaling_, partial_);
    });
  }
  void finish_sums(int64_t slices) const {
    const Entries entries = entries_of_channels(partial_, slices, extent_.channels);
    launch_blocks(kName, norm_finish_sums<A>, entries.blocks(), where_, entries,
                  static_cast<const void*>(nullptr), int32_t(0), 1.0, dbias_, dweight_);
  }
  // Each group's means of g and of g * xhat: sums over its channels, each times its weight.
  GradientSums<A> finish_means() const {
    A* const mean_g =
        reinterpret_cast<A*>(partial_ + partial_count(slicing_.slices, extent_.channels));
    A* const mean_gx = mean_g + extent_.outer * call_.norm.groups;
    const Entries entries =
        entries_of_groups(partial_, extent_.outer, slicing_.inner_slices.divisor, extent_.channels,
                          call_.norm.groups);
    const double count = double(extent_.inner) * double(extent_.channels / call_.norm.groups);
    launch_blocks(kName, norm_finish_sums<A>, entries.blocks(), where_, entries, call_.norm.weight,
                  call_.norm.parameter_dtype, count, mean_g, mean_gx);
    return {mean_g, mean_gx, A(1), Gradient::kGroup};
  }

  const NormActBackwardCall& call_;
  const revk_where& where_;
  const Extent extent_;
  const bool group_, rows_;
  const Slicing slicing_;
  const Scaling<A> scaling_;
  const Field dh_, x_;
  double* const partial_;
  A *const dweight_, *const dbias_;
};

template <class A>
void backward(const NormActBackwardCall& call, const revk_where& where) {
  const bool writes = call.gradient.sums != REVK_SUMS_ONLY;
  const Walk3 walk = choose_walk<A, 4>(
      {&call.x, &call.dh, writes ? &call.dx : nullptr, writes ? &call.base : nullptr});
  // Teams use packets for rows only.
  const bool teams = over_channels(call.norm) && !call.gradient.constant;
  if (walk.words && (walk.rows || !teams))
    Backward<A, kPacketOf<A>>(call, walk.rows, where).run();
  else
    Backward<A, 1>(call, walk.rows, where).run();
}

}  // namespace

void norm_act_backward(const NormActBackwardCall& given, const revk_where& where) {
  NormActBackwardCall call = given;
  if (call.x.outer == 0 || call.x.channels == 0 || call.x.inner == 0) return;
  if (are_rows(call.x, call.norm)) {
    for (revk_view* view : {&call.dx, &call.base, &call.dh, &call.x}) lay_along(*view);
    lay_along(call.norm);
  }
  if (call.compute_dtype == REVK_FLOAT64)
    backward<double>(call, where);
  else
    backward<float>(call, where);
}

}  // namespace revk::cuda
