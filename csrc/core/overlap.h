// SPDX-License-Identifier: Apache-2.0
// Tests whether two strided arrays share memory. The test is exact, not by bounding ranges: the two
// halves of an image interleave without sharing an element, and updating one from the other in
// place is an ordinary call.
//
// Two elements meet where a sum of strides hits a target: sum c[k] * v[k] in [lo, hi] with 0 <=
// v[k] <= u[k]. For nested strides every level leaves one or two candidates, and equal strides
// merge into one unknown, so the search takes a handful of steps. A budget bounds it; running out
// of budget counts as overlapping.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace revk {

// An array's memory: sizes and strides in elements, strides >= 0.
struct Layout {
  uintptr_t address;
  int64_t item;  // bytes per element
  int rank;
  const int64_t* sizes;
  const int64_t* strides;

  bool empty() const {
    for (int k = 0; k < rank; ++k)
      if (sizes[k] == 0) return true;
    return false;
  }
  // Bytes from the start of the first element to the end of the last; -1 if not representable.
  int64_t span() const {
    if (empty()) return 0;
    int64_t last = 0;
    for (int k = 0; k < rank; ++k) {
      int64_t reach;
      if (__builtin_mul_overflow(sizes[k] - 1, strides[k], &reach) ||
          __builtin_add_overflow(last, reach, &last))
        return -1;
    }
    int64_t bytes;
    if (__builtin_add_overflow(last, int64_t{1}, &bytes) ||
        __builtin_mul_overflow(bytes, item, &bytes) || bytes > INT64_MAX / 4)
      return -1;
    return bytes;
  }
};

namespace overlap_detail {

struct Term {
  int64_t step, most;  // step * v, 0 <= v <= most
};

class Sum {
 public:
  void add(int64_t step, int64_t most) {
    if (step > 0 && most > 0) terms_.push_back({step, most});
  }
  // Adds an array's dimensions, in bytes. A dimension of size 1 is skipped: its stride is never
  // used, may be any number, and could overflow in bytes.
  void add(const Layout& layout) {
    for (int k = 0; k < layout.rank; ++k)
      if (layout.sizes[k] > 1) add(layout.strides[k] * layout.item, layout.sizes[k] - 1);
  }

  // Whether some choice of the v lands in [low, high].
  bool reaches(int64_t low, int64_t high) {
    std::sort(terms_.begin(), terms_.end(), [](Term a, Term b) { return a.step > b.step; });
    size_t kept = 0;
    for (const Term& term : terms_) {
      if (kept > 0 && terms_[kept - 1].step == term.step)
        terms_[kept - 1].most += term.most;
      else
        terms_[kept++] = term;
    }
    terms_.resize(kept);
    tail_.assign(kept + 1, {0, 0});
    for (size_t k = kept; k-- > 0;) {
      tail_[k].most = tail_[k + 1].most + terms_[k].step * terms_[k].most;
      tail_[k].divisor = gcd(terms_[k].step, tail_[k + 1].divisor);
    }
    budget_ = 100000;
    return search(0, low, high);
  }

 private:
  struct Tail {
    int64_t most, divisor;  // of the terms from k on
  };

  static int64_t gcd(int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  }

  bool search(size_t k, int64_t low, int64_t high) {
    if (low <= 0 && high >= 0) return true;
    if (high < 0 || low > tail_[k].most || k == terms_.size()) return false;
    const int64_t divisor = tail_[k].divisor;  // here low > 0
    if ((low + divisor - 1) / divisor * divisor > std::min(high, tail_[k].most)) return false;
    const Term term = terms_[k];
    const int64_t missing = low - tail_[k + 1].most;
    const int64_t last = std::min(term.most, high / term.step);
    for (int64_t v = missing > 0 ? (missing + term.step - 1) / term.step : 0; v <= last; ++v) {
      if (--budget_ < 0) return true;
      if (search(k + 1, low - v * term.step, high - v * term.step)) return true;
    }
    return false;
  }

  std::vector<Term> terms_;
  std::vector<Tail> tail_;
  int64_t budget_ = 0;
};

}  // namespace overlap_detail

inline bool same_memory(const Layout& a, const Layout& b) {
  if (a.address != b.address || a.item != b.item || a.rank != b.rank) return false;
  for (int k = 0; k < a.rank; ++k)
    if (a.sizes[k] != b.sizes[k] || (a.sizes[k] > 1 && a.strides[k] != b.strides[k])) return false;
  return true;
}

// Whether a and b share a byte. Both spans must be valid (>= 0).
inline bool overlaps(const Layout& a, const Layout& b) {
  const int64_t a_span = a.span(), b_span = b.span();
  if (a_span == 0 || b_span == 0) return false;
  if (a.address + uintptr_t(a_span) <= b.address || b.address + uintptr_t(b_span) <= a.address)
    return false;
  // Byte positions p in a, q in b with q - (a.item - 1) <= p <= q + (b.item - 1). b's indices are
  // negated, so that every step is positive.
  const int64_t base = int64_t(a.address - b.address) - (b_span - b.item);
  overlap_detail::Sum sum;
  sum.add(a);
  sum.add(b);
  return sum.reaches(-base - (a.item - 1), -base + (b.item - 1));
}

// Whether two different indices name the same element.
inline bool overlaps_itself(const Layout& a) {
  if (a.empty()) return false;
  int64_t inner_reach = 0;  // the common case first: dimensions in memory order
  for (int k = a.rank - 1; k >= 0; --k) {
    if (a.sizes[k] == 1) continue;
    if (a.strides[k] <= inner_reach) {
      inner_reach = -1;
      break;
    }
    inner_reach += a.strides[k] * (a.sizes[k] - 1);
  }
  if (inner_reach >= 0) return false;
  std::vector<overlap_detail::Term> dims;  // step, size - 1
  for (int k = 0; k < a.rank; ++k)
    if (a.sizes[k] > 1) dims.push_back({a.strides[k], a.sizes[k] - 1});
  std::sort(dims.begin(), dims.end(), [](auto p, auto q) { return p.step < q.step; });
  int64_t reach = 0;
  bool nested = true;
  for (const auto& dim : dims) {
    nested = nested && dim.step > reach;
    reach += dim.step * dim.most;
  }
  if (nested) return false;
  // Two indices that first differ in dimension k, by 1 <= d <= most: d * step plus any differences
  // in later dimensions is 0.
  for (size_t k = 0; k < dims.size(); ++k) {
    if (dims[k].step == 0) return true;
    overlap_detail::Sum sum;
    sum.add(dims[k].step, dims[k].most - 1);
    int64_t target = -dims[k].step;
    for (size_t j = k + 1; j < dims.size(); ++j) {
      sum.add(dims[j].step, 2 * dims[j].most);
      target += dims[j].step * dims[j].most;
    }
    if (sum.reaches(target, target)) return true;
  }
  return false;
}

}  // namespace revk
