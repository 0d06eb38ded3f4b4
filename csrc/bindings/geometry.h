// SPDX-License-Identifier: Apache-2.0
// Maps n dimensions to the C interface's three: arrays of one shape are walked in the written
// array's memory order, adjacent dimensions are merged where all arrays allow it, and the rest is
// looped.
#pragma once

#include "bindings/arrays.h"

namespace revk::python {

constexpr int kMaxArrays = 5;

// The dimensions that a scale runs along; -1: none. A dimension with a role keeps its own place in
// the view.
struct Roles {
  int channel = -1;
  int sample = -1;
  // A checksum counts elements in memory order, so the view must not be rearranged.
  bool ordered = false;
};

class Geometry {
 public:
  // `arrays[0]` is the written one. No array is empty. Raises ValueError if the roles and `ordered`
  // cannot be satisfied together.
  Geometry(const Array* const* arrays, int count, const Roles& roles);

  int64_t rows_per_sample() const { return rows_per_sample_; }

  // Calls body(views) for every sub-array of at most three dimensions; most arrays have only one.
  template <class Body>
  void for_each(Body&& body) const {
    revk_view views[kMaxArrays];
    int64_t index[kMaxRank] = {};
    for (bool more = true; more; more = next(index)) {
      fill(views, index);
      body(static_cast<const revk_view*>(views));
    }
  }

 private:
  struct Dim {
    int64_t size;
    int64_t stride[kMaxArrays];
    int64_t rows;  // sample rows merged into this dimension
    bool channel, sample;
  };

  void collect(const Roles& roles);
  bool assign_in_order(const Roles& roles);
  void assign_by_role(const Roles& roles);
  bool fits(const Dim& dim, int slot, const Roles& roles) const;
  bool next(int64_t* index) const;
  void fill(revk_view* views, const int64_t* index) const;

  const Array* const* arrays_;
  int count_;
  int rank_ = 0;
  Dim dims_[kMaxRank];
  int slots_[3] = {-1, -1, -1};  // outer, channels, inner: which of dims_; -1: size 1
  int looped_[kMaxRank];
  int loops_ = 0;
  int64_t rows_per_sample_ = 1;
};

}  // namespace revk::python
