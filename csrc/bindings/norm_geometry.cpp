// SPDX-License-Identifier: Apache-2.0
// Maps a norm's n-dimensional arrays to the C interface's three dimensions.
#include "bindings/norm_geometry.h"

#include <algorithm>

namespace revk::python {
namespace {

struct Dim {
  int64_t size = 1;
  int64_t stride[kMaxNormArrays] = {};
  int64_t statistics = 0;
};

// Merges adjacent dimensions where every array allows it. Returns the number left; at most `most`
// of them are written to `to`.
int merge(const Dim* dims, const int* order, int rank, int count, Dim* to, int most) {
  int kept = 0;
  for (int i = 0; i < rank; ++i) {
    const Dim& dim = dims[order[i]];
    if (kept > 0 && kept <= most) {
      Dim& before = to[kept - 1];
      bool merges = before.statistics == dim.statistics * dim.size;
      for (int a = 0; a < count; ++a)
        merges = merges && before.stride[a] == dim.stride[a] * dim.size;
      if (merges) {
        const int64_t size = before.size * dim.size;
        before = dim;
        before.size = size;
        continue;
      }
    }
    if (kept < most) to[kept] = dim;
    ++kept;
  }
  return kept;
}

[[noreturn]] void refuse(const Array* const* arrays, int count, int axis, bool grouped) {
  std::string shown;
  for (int a = 0; a < count; ++a) {
    Array strides = *arrays[a];
    std::copy(strides.strides, strides.strides + strides.rank, strides.sizes);
    shown += ", " + std::string(strides.name) + " has strides " + strides.shape();
  }
  value_error(std::string(arrays[0]->name) + " has shape " + arrays[0]->shape() + shown +
              ": the dimensions beside channels (dimension " + std::to_string(axis) +
              ") must merge into " + (grouped ? "one beside the samples" : "two") +
              " in all of them");
}

}  // namespace

void norm_geometry(const Array* const* arrays, int count, int axis, revk_norm& norm,
                   revk_view* views) {
  const Array& lead = *arrays[0];
  const bool grouped = norm.kind == REVK_GROUP_NORM;
  const bool by_rows = norm.kind == REVK_LAYER_NORM || norm.kind == REVK_RMS_NORM;
  const auto dim_at = [&](int k) {
    Dim dim;
    dim.size = lead.sizes[k];
    for (int a = 0; a < count; ++a) dim.stride[a] = arrays[a]->strides[k];
    return dim;
  };
  const Dim channel = dim_at(axis);
  const Dim sample = grouped ? dim_at(0) : Dim{};
  Dim dims[kMaxRank], parts[2];
  int order[kMaxRank] = {}, rank = 0;
  int64_t statistics = 1;
  for (int k = lead.rank - 1; k >= 0; --k) {
    if (k == axis || (grouped && k == 0)) continue;
    Dim dim = dim_at(k);
    if (by_rows) dim.statistics = statistics;
    statistics *= dim.size;
    if (dim.size != 1) dims[rank++] = dim;
  }
  for (int i = 0; i < rank; ++i) order[i] = rank - 1 - i;  // outermost first
  const int most = grouped ? 1 : 2;
  int kept = lead.count() == 0 ? most : merge(dims, order, rank, count, parts, most);
  if (kept > most) {  // memory order may merge more
    std::stable_sort(order, order + rank,
                     [&dims](int a, int b) { return dims[a].stride[0] > dims[b].stride[0]; });
    kept = merge(dims, order, rank, count, parts, most);
    if (kept > most) refuse(arrays, count, axis, grouped);
  }
  Dim outer = grouped ? sample : kept == 2 ? parts[0] : Dim{};
  Dim inner = grouped ? (kept == 1 ? parts[0] : Dim{}) : kept > 0 ? parts[kept - 1] : Dim{};
  if (lead.count() == 0) {  // nothing to walk; the sizes alone determine the statistics
    outer = grouped ? sample : Dim{};
    inner = Dim{};
    inner.size = statistics;
    inner.statistics = 1;
  }
  norm.statistics_outer_stride = by_rows ? outer.statistics : 0;
  norm.statistics_inner_stride = by_rows ? inner.statistics : 0;
  for (int a = 0; a < count; ++a)
    views[a] = {int32_t(sizeof(revk_view)),
                arrays[a]->dtype,
                arrays[a]->data,
                outer.size,
                channel.size,
                inner.size,
                outer.stride[a],
                channel.stride[a],
                inner.stride[a]};
}

}  // namespace revk::python
