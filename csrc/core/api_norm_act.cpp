// SPDX-License-Identifier: Apache-2.0
// The norms' extern "C" entries: guard, check, dispatch. Nothing is written before all checks have
// passed.
#include <cmath>
#include <vector>

#include "core/entry.h"
#include "core/views.h"

namespace revk {
namespace {

// A plain array that a struct points to.
struct Plain {
  const char* name;
  void* data;
  int64_t item;
  int rank;
  int64_t sizes[2], strides[2];

  Layout layout() const { return {reinterpret_cast<uintptr_t>(data), item, rank, sizes, strides}; }
};

Plain dense(const char* name, const void* data, int64_t item, int64_t count) {
  return {name, const_cast<void*>(data), item, 1, {count, 1}, {1, 1}};
}

void check_plain(const char* owner, const Plain& array, const char* needed) {
  const auto fail = [&](const std::string& reason) {
    throw invalid(std::string(owner) + ": " + array.name + " " + reason);
  };
  const Layout layout = array.layout();
  const int64_t span = layout.span();
  if (span < 0 || layout.address + uintptr_t(span) < layout.address)
    fail("reaches past the end of the address space");
  if (array.data == nullptr && span > 0 && needed != nullptr)
    fail(std::string("is NULL; ") + needed + " needs it");
  if (layout.address % uintptr_t(array.item) != 0) fail("is not aligned to its element");
}

int32_t in_range(const char* owner, const char* name, int32_t value, int32_t most) {
  if (value < 0 || value > most)
    throw invalid(std::string(owner) + ": " + name + " is " + std::to_string(value) + ", 0.." +
                  std::to_string(most) + " is needed");
  return value;
}
void not_negative(const char* owner, const char* name, int64_t value) {
  if (value < 0)
    throw invalid(std::string(owner) + ": " + name + " is " + std::to_string(value) +
                  ", 0 or more is needed");
}

const char* const kKindNames[] = {"a batch norm", "a layer norm", "an RMS norm", "a group norm"};

// A validated norm over a view's shape, with every array that it points to.
struct CheckedNorm {
  revk_norm value;
  std::vector<Plain> read, written;

  // Without a shape nothing that depends on one is checked.
  CheckedNorm(const revk_norm* given, const NamedView& x, int32_t compute_dtype) : value() {
    if (given == nullptr) throw invalid("norm is NULL, a revk_norm is needed");
    value = read_struct<revk_norm>("norm", given);
    in_range("norm", "kind", value.kind, REVK_GROUP_NORM);
    in_range("norm", "activation", value.activation, REVK_SILU);
    in_range("norm", "parameter_dtype", value.parameter_dtype, REVK_FLOAT16);
    in_range("norm", "running_dtype", value.running_dtype, REVK_FLOAT16);
    in_range("norm", "statistics_given", value.statistics_given, 1);
    in_range("norm", "reserved", value.reserved, 0);
    if (!(value.eps >= 0.0) || std::isinf(value.eps))
      throw invalid("norm: eps is " + std::to_string(value.eps) +
                    ", a finite number of 0 or more is needed");
    if (!std::isfinite(value.momentum))
      throw invalid("norm: momentum is " + std::to_string(value.momentum) +
                    ", a finite number is needed");
    const int64_t channels = x.sizes[1];
    if (value.kind == REVK_GROUP_NORM) {
      if (value.groups < 1 || channels % value.groups != 0)
        throw invalid("norm: groups is " + std::to_string(value.groups) + ", a divisor of the " +
                      std::to_string(channels) + " channels of " + x.name + " is needed");
    } else if (value.groups != 0) {
      throw invalid("norm: groups is " + std::to_string(value.groups) + ", 0 is needed for " +
                    kKindNames[value.kind]);
    }
    const int64_t item = item_size(compute_dtype);
    add_parameters(channels);
    add_statistics(x, item);
    add_running(channels);
  }

  // `view` is written: it shares no memory with the norm's arrays.
  void apart_from(const NamedView& view) const {
    for (const auto* list : {&read, &written})
      for (const Plain& array : *list)
        if (array.data != nullptr && overlaps(view.layout, array.layout()))
          view.fail("is written and overlaps norm's " + std::string(array.name) +
                    "; they need separate memory");
  }
  // `view` is read: it shares no memory with the norm's written arrays.
  void written_apart_from(const NamedView& view) const {
    for (const Plain& array : written)
      if (array.data != nullptr && overlaps(view.layout, array.layout()))
        throw invalid("norm: " + std::string(array.name) + " is written and overlaps " + view.name +
                      "; they need separate memory");
  }
  void apart_from_themselves() const {
    for (size_t i = 0; i < written.size(); ++i) {
      if (overlaps_itself(written[i].layout()))
        throw invalid("norm: several indices of " + std::string(written[i].name) +
                      ", which is written, share one element");
      for (size_t k = 0; k < i; ++k) check_pair(written[i], written[k]);
      for (const Plain& array : read) check_pair(written[i], array);
    }
  }
  static void check_pair(const Plain& written, const Plain& other) {
    if (written.data != nullptr && other.data != nullptr &&
        overlaps(written.layout(), other.layout()))
      throw invalid("norm: " + std::string(written.name) + " is written and overlaps " +
                    other.name + "; they need separate memory");
  }

 private:
  void add_parameters(int64_t channels) {
    const int64_t item = item_size(value.parameter_dtype);
    for (const Plain& array : {dense("weight", value.weight, item, channels),
                               dense("bias", value.bias, item, channels)}) {
      check_plain("norm", array, nullptr);
      if (array.data != nullptr) read.push_back(array);
    }
  }
  void add_statistics(const NamedView& x, int64_t item) {
    Plain rstd{"rstd", value.rstd, item, 1, {1, 1}, {1, 1}};
    if (value.kind == REVK_BATCH_NORM) {
      rstd.sizes[0] = x.sizes[1];
    } else if (value.kind == REVK_GROUP_NORM) {
      rstd.rank = 2;
      rstd.sizes[0] = x.sizes[0], rstd.sizes[1] = value.groups;
      rstd.strides[0] = value.groups;
    } else {
      not_negative("norm", "statistics_outer_stride", value.statistics_outer_stride);
      not_negative("norm", "statistics_inner_stride", value.statistics_inner_stride);
      rstd.rank = 2;
      rstd.sizes[0] = x.sizes[0], rstd.sizes[1] = x.sizes[2];
      value.statistics_outer_stride = rstd.strides[0] =
          usable_stride(x.sizes[0], value.statistics_outer_stride);
      value.statistics_inner_stride = rstd.strides[1] =
          usable_stride(x.sizes[2], value.statistics_inner_stride);
    }
    Plain mean = rstd;
    mean.name = "mean";
    mean.data = value.mean;
    if (value.kind == REVK_RMS_NORM && value.mean != nullptr)
      throw invalid("norm: mean is given, NULL is needed for an RMS norm");
    auto& list = value.statistics_given != 0 ? read : written;
    check_plain("norm", rstd, kKindNames[value.kind]);
    list.push_back(rstd);
    if (value.kind == REVK_RMS_NORM) return;
    check_plain("norm", mean, kKindNames[value.kind]);
    list.push_back(mean);
  }
  void add_running(int64_t channels) {
    if ((value.running_mean == nullptr) != (value.running_var == nullptr))
      throw invalid("norm: one of running_mean and running_var is NULL; both or none must be");
    if (value.running_mean == nullptr) return;
    if (value.kind != REVK_BATCH_NORM)
      throw invalid(std::string("norm: running_mean is given, NULL is needed for ") +
                    kKindNames[value.kind]);
    const int64_t item = item_size(value.running_dtype);
    for (const Plain& array : {dense("running_mean", value.running_mean, item, channels),
                               dense("running_var", value.running_var, item, channels)}) {
      check_plain("norm", array, nullptr);
      if (value.statistics_given == 0) written.push_back(array);
    }
  }
};

void check_workspace(const revk_norm& norm, const NamedView& x, const revk_where& where) {
  if (where.device < 0) return;
  const int64_t needed = cuda::norm_workspace(x.view, norm, where);
  if (needed > 0 && (norm.workspace == nullptr || norm.workspace_bytes < needed))
    throw invalid("norm: workspace has " +
                  std::to_string(norm.workspace == nullptr ? 0 : norm.workspace_bytes) +
                  " bytes, revk_norm_workspace() asks for " + std::to_string(needed));
  if (reinterpret_cast<uintptr_t>(norm.workspace) % 16 != 0)
    throw invalid("norm: workspace is not aligned to 16 bytes");
}

template <class A>
void fill(void* data, int64_t count, A value) {
  A* const to = static_cast<A*>(data);
  for (int64_t i = 0; data != nullptr && i < count; ++i) to[i] = value;
}

// Statistics of zero elements (mean 0, variance 0). Host only: on a device the caller fills them.
// Running statistics stay as they are.
template <class A>
void fill_statistics(const revk_norm& norm, const NamedView& x) {
  const A rstd = A(1.0 / std::sqrt(norm.eps));
  if (norm.kind == REVK_BATCH_NORM || norm.kind == REVK_GROUP_NORM) {
    const int64_t count = norm.kind == REVK_BATCH_NORM ? x.sizes[1] : x.sizes[0] * norm.groups;
    fill(norm.mean, count, A(0));
    fill(norm.rstd, count, rstd);
    return;
  }
  if (x.sizes[2] == 0) return;  // the number of empty rows is unbounded
  for (int64_t o = 0; o < x.sizes[0]; ++o)
    for (int64_t i = 0; i < x.sizes[2]; ++i) {
      const int64_t place = o * norm.statistics_outer_stride + i * norm.statistics_inner_stride;
      fill(norm.mean == nullptr ? nullptr : static_cast<A*>(norm.mean) + place, 1, A(0));
      fill(static_cast<A*>(norm.rstd) + place, 1, rstd);
    }
}

void normalise_empty(const CheckedNorm& norm, const NamedView& x, int32_t dtype,
                     const revk_where& where) {
  if (where.device >= 0 || norm.value.statistics_given != 0) return;
  dtype == REVK_FLOAT64 ? fill_statistics<double>(norm.value, x)
                        : fill_statistics<float>(norm.value, x);
}

void normalise(const NamedView& h, const NamedView& s, const NamedView* x, const NamedView* f,
               NormActCall::Coupling coupling, const revk_norm* given,
               const revk_where* given_where) {
  const revk_where where = read_where(given_where);
  NormActCall call{};
  call.coupling = coupling;
  call.compute_dtype = f == nullptr ? compute_dtype(s.view.dtype, s.view.dtype)
                                    : compute_dtype(x->view.dtype, f->view.dtype);
  h.same_shape_as(s);
  h.apart_from_itself();
  h.apart_from(s);
  if (f != nullptr) {
    if (s.view.dtype == REVK_FLOAT64 && call.compute_dtype != REVK_FLOAT64)
      s.fail("dtype is float64, but the arithmetic of " + x->name + " and f is float32");
    x->same_shape_as(s);
    f->same_shape_as(s);
    s.apart_from_itself();
    if (!s.is(*x)) s.apart_from(*x);
    s.apart_from(*f);
    h.apart_from(*x);
    h.apart_from(*f);
    call.x = x->view;
    call.f = f->view;
  }
  const CheckedNorm norm(given, s, call.compute_dtype);
  norm.apart_from(h);
  norm.apart_from_themselves();
  if (f == nullptr) {
    norm.written_apart_from(s);
  } else {
    norm.apart_from(s);
    norm.written_apart_from(*x);
    norm.written_apart_from(*f);
  }
  if (norm.value.statistics_given == 0 && !over_channels(norm.value))
    check_workspace(norm.value, s, where);
  if (s.layout.empty()) return normalise_empty(norm, s, call.compute_dtype, where);
  call.h = h.view;
  call.s = s.view;
  call.norm = norm.value;
  (where.device < 0 ? cpu::norm_act : cuda::norm_act)(call, where);
}

// Checks the struct against the shape and the norm, and replaces count 0 by the view's count.
revk_norm_gradient read_gradient(const revk_norm_gradient* given, const revk_norm& norm,
                                 const NamedView& x, int64_t item) {
  if (given == nullptr) throw invalid("gradient is NULL, a revk_norm_gradient is needed");
  revk_norm_gradient gradient = read_struct<revk_norm_gradient>("gradient", given);
  in_range("gradient", "sums", gradient.sums, REVK_SUMS_GIVEN);
  in_range("gradient", "constant", gradient.constant, 1);
  in_range("gradient", "reserved", gradient.reserved, 0);
  const bool batch = norm.kind == REVK_BATCH_NORM;
  if (!batch && gradient.sums != REVK_SUMS_COMPUTED)
    throw invalid(std::string("gradient: sums must be REVK_SUMS_COMPUTED for ") +
                  kKindNames[norm.kind]);
  if (!batch && gradient.constant != 0)
    throw invalid(std::string("gradient: constant must be 0 for ") + kKindNames[norm.kind]);
  if (gradient.count < 0)
    throw invalid("gradient: count is " + std::to_string(gradient.count) + ", 0 or more is needed");
  if (gradient.count == 0) gradient.count = x.layout.empty() ? 1 : x.sizes[0] * x.sizes[2];
  for (const Plain& array : {dense("dweight", gradient.dweight, item, x.sizes[1]),
                             dense("dbias", gradient.dbias, item, x.sizes[1])})
    check_plain("gradient", array, batch ? kKindNames[REVK_BATCH_NORM] : nullptr);
  return gradient;
}

}  // namespace
}  // namespace revk

using namespace revk;

extern "C" {

revk_status revk_norm_act(const revk_view* h, const revk_view* x, const revk_norm* norm,
                          const revk_where* where) {
  return guard(last_error(), [&] {
    const NamedView to("h", h), from("x", x);
    normalise(to, from, nullptr, nullptr, NormActCall::kNone, norm, where);
  });
}

revk_status revk_couple_norm_act(const revk_view* h, const revk_view* y, const revk_view* x,
                                 const revk_view* f, const revk_norm* norm,
                                 const revk_where* where) {
  return guard(last_error(), [&] {
    const NamedView to("h", h), stream("y", y), from("x", x), branch("f", f);
    normalise(to, stream, &from, &branch, NormActCall::kCouple, norm, where);
  });
}

revk_status revk_uncouple_norm_act(const revk_view* h, const revk_view* x, const revk_view* y,
                                   const revk_view* f, const revk_norm* norm,
                                   const revk_where* where) {
  return guard(last_error(), [&] {
    const NamedView to("h", h), stream("x", x), from("y", y), branch("f", f);
    normalise(to, stream, &from, &branch, NormActCall::kUncouple, norm, where);
  });
}

revk_status revk_norm_act_backward(const revk_view* dx, const revk_view* base, const revk_view* dh,
                                   const revk_view* x, const revk_norm* norm,
                                   const revk_norm_gradient* gradient, const revk_where* where) {
  return guard(last_error(), [&] {
    const revk_where place = read_where(where);
    const NamedView from("x", x), above("dh", dh);
    above.same_shape_as(from);
    NormActBackwardCall call{};
    call.compute_dtype = compute_dtype(from.view.dtype, from.view.dtype);
    const int64_t item = item_size(call.compute_dtype);
    CheckedNorm checked(norm, from, call.compute_dtype);
    if (checked.value.statistics_given == 0)
      throw invalid("norm: statistics_given is 0, 1 is needed: those of the forward");
    call.gradient = read_gradient(gradient, checked.value, from, item);
    const bool given = call.gradient.sums == REVK_SUMS_GIVEN;
    for (const Plain& array : {dense("dweight", call.gradient.dweight, item, from.sizes[1]),
                               dense("dbias", call.gradient.dbias, item, from.sizes[1])})
      if (array.data != nullptr) (given ? checked.read : checked.written).push_back(array);
    checked.apart_from_themselves();
    checked.written_apart_from(from);
    checked.written_apart_from(above);
    if (call.gradient.sums == REVK_SUMS_ONLY) {
      if (dx != nullptr) throw invalid("dx is given, NULL is needed for REVK_SUMS_ONLY");
      if (base != nullptr) throw invalid("base is given, NULL is needed for REVK_SUMS_ONLY");
    } else {
      const NamedView to("dx", dx);
      to.same_shape_as(from);
      to.apart_from_itself();
      to.apart_from(from);
      if (checked.value.kind != REVK_BATCH_NORM || !to.is(above)) to.apart_from(above);
      checked.apart_from(to);
      if (base != nullptr) {
        const NamedView before("base", base);
        before.same_shape_as(from);
        if (!to.is(before)) to.apart_from(before);
        checked.written_apart_from(before);
        call.base = before.view;
      }
      call.dx = to.view;
    }
    check_workspace(checked.value, from, place);
    if (from.layout.empty()) {
      if (place.device >= 0 || given) return;
      for (void* sum : {call.gradient.dweight, call.gradient.dbias})
        if (sum != nullptr) std::memset(sum, 0, size_t(from.sizes[1] * item));
      return;
    }
    call.dh = above.view;
    call.x = from.view;
    call.norm = checked.value;
    (place.device < 0 ? cpu::norm_act_backward : cuda::norm_act_backward)(call, place);
  });
}

int64_t revk_norm_workspace(const revk_view* x, const revk_norm* norm, const revk_where* where) {
  int64_t bytes = -1;
  guard(last_error(), [&] {
    const revk_where place = read_where(where);
    const NamedView from("x", x);
    if (norm == nullptr) throw invalid("norm is NULL, a revk_norm is needed");
    const revk_norm value = read_struct<revk_norm>("norm", norm);
    in_range("norm", "kind", value.kind, REVK_GROUP_NORM);
    if (value.kind == REVK_GROUP_NORM && (value.groups < 1 || from.sizes[1] % value.groups != 0))
      throw invalid("norm: groups is " + std::to_string(value.groups) + ", a divisor of the " +
                    std::to_string(from.sizes[1]) + " channels of x is needed");
    bytes =
        place.device < 0 || from.layout.empty() ? 0 : cuda::norm_workspace(from.view, value, place);
  });
  return bytes;
}

}  // extern "C"
