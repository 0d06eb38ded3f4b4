// SPDX-License-Identifier: Apache-2.0
// Maps n-dimensional arrays to the C interface's three dimensions.
#include "bindings/geometry.h"

#include <algorithm>

namespace revk::python {

Geometry::Geometry(const Array* const* arrays, int count, const Roles& roles)
    : arrays_(arrays), count_(count) {
  collect(roles);
  if (!assign_in_order(roles)) {
    if (roles.ordered)
      value_error(std::string(arrays[0]->name) + " with shape " + arrays[0]->shape() +
                  " has too many separate strides for a checksum; it must merge into three "
                  "dimensions, or be dense");
    assign_by_role(roles);
  }
  const int outer = slots_[0];
  if (roles.sample >= 0)  // a batch of one sample has no dimension of its own
    rows_per_sample_ =
        outer >= 0 ? (dims_[outer].sample ? dims_[outer].rows : dims_[outer].size) : 1;
}

// Sorts by the written array's strides, drops dimensions of size 1, merges adjacent dimensions.
void Geometry::collect(const Roles& roles) {
  const Array& written = *arrays_[0];
  int order[kMaxRank], kept = 0;
  for (int k = 0; k < written.rank; ++k)
    if (written.sizes[k] > 1) order[kept++] = k;
  const auto outer_first = [&written](int a, int b) {
    return written.strides[a] > written.strides[b];
  };
  if (!std::is_sorted(order, order + kept, outer_first))
    std::stable_sort(order, order + kept, outer_first);
  for (int i = 0; i < kept; ++i) {
    const int k = order[i];
    Dim dim;
    dim.size = written.sizes[k];
    dim.rows = 1;
    dim.channel = k == roles.channel;
    dim.sample = k == roles.sample;
    for (int a = 0; a < count_; ++a) dim.stride[a] = arrays_[a]->strides[k];
    if (rank_ > 0) {
      Dim& before = dims_[rank_ - 1];
      bool merges = !before.channel && !dim.channel && !dim.sample;
      for (int a = 0; a < count_ && merges; ++a)
        merges = before.stride[a] == dim.stride[a] * dim.size;
      if (merges) {
        before.size *= dim.size;
        before.rows *= dim.size;
        std::copy(dim.stride, dim.stride + count_, before.stride);
        continue;
      }
    }
    dims_[rank_++] = dim;
  }
}

bool Geometry::fits(const Dim& dim, int slot, const Roles& roles) const {
  const bool channel_slot = slot == 1 && roles.channel >= 0;
  const bool sample_slot = slot == 0 && roles.sample >= 0 && arrays_[0]->sizes[roles.sample] > 1;
  return dim.channel == channel_slot && dim.sample == sample_slot;
}

bool Geometry::assign_in_order(const Roles& roles) {
  if (rank_ > 3) return false;
  // The ways to choose rank_ of the three slots, those with the innermost slots first.
  static constexpr int kChoices[4][3][3] = {
      {{}, {}, {}}, {{2}, {1}, {0}}, {{1, 2}, {0, 2}, {0, 1}}, {{0, 1, 2}, {0, 1, 2}, {0, 1, 2}}};
  for (const auto& choice : kChoices[rank_]) {
    bool all = true;
    for (int k = 0; k < rank_; ++k) all = all && fits(dims_[k], choice[k], roles);
    if (!all) continue;
    for (int k = 0; k < rank_; ++k) slots_[choice[k]] = k;
    return true;
  }
  return false;
}

// The view's order is not memory order, which the kernels handle; leftover outer dimensions are
// looped.
void Geometry::assign_by_role(const Roles& roles) {
  bool free_slot[3] = {true, true, true};
  if (roles.channel >= 0) free_slot[1] = false;
  for (int k = 0; k < rank_; ++k) {
    if (dims_[k].channel) slots_[1] = k;
    if (dims_[k].sample) slots_[0] = k, free_slot[0] = false;
  }
  for (int k = rank_ - 1, slot = 2; k >= 0; --k) {
    if (dims_[k].channel || dims_[k].sample) continue;
    while (slot >= 0 && !free_slot[slot]) --slot;
    if (slot >= 0)
      slots_[slot--] = k;
    else
      looped_[loops_++] = k;
  }
}

bool Geometry::next(int64_t* index) const {
  for (int i = 0; i < loops_; ++i) {  // looped_ holds the innermost first
    if (++index[i] < dims_[looped_[i]].size) return true;
    index[i] = 0;
  }
  return false;
}

void Geometry::fill(revk_view* views, const int64_t* index) const {
  int64_t sizes[3];
  for (int s = 0; s < 3; ++s) sizes[s] = slots_[s] < 0 ? 1 : dims_[slots_[s]].size;
  for (int a = 0; a < count_; ++a) {
    const Array& array = *arrays_[a];
    int64_t strides[3], offset = 0;
    for (int s = 0; s < 3; ++s) strides[s] = slots_[s] < 0 ? 0 : dims_[slots_[s]].stride[a];
    for (int i = 0; i < loops_; ++i) offset += index[i] * dims_[looped_[i]].stride[a];
    views[a] = {int32_t(sizeof(revk_view)),
                array.dtype,
                static_cast<char*>(array.data) + offset * item_size(array.dtype),
                sizes[0],
                sizes[1],
                sizes[2],
                strides[0],
                strides[1],
                strides[2]};
  }
}

}  // namespace revk::python
