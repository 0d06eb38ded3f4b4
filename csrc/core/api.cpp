// SPDX-License-Identifier: Apache-2.0
// Every extern "C" entry: guard, check, dispatch. Nothing is written before all checks have passed.
#include <algorithm>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <optional>
#include <vector>

#include "core/entry.h"
#include "core/views.h"

namespace revk {
namespace {

using Views = std::initializer_list<const NamedView*>;

// A validated coupling as the kernels take it: nullptr if it adds nothing to the plain sum,
// rows_per_sample >= 1, `value` in this library's version. `written` begins with the result.
class CheckedCoupling {
 public:
  CheckedCoupling(const revk_coupling* given, Views written, Views read, int32_t scale_dtype)
      : out_(**written.begin()), written_(written), read_(read), options_() {
    const bool fixed = out_.view.dtype == REVK_INT16;
    if (given == nullptr) {
      if (fixed)
        throw invalid("coupling is NULL, but " + out_.name +
                      " is int16; a grid_exponent is needed");
      return;
    }
    options_ = read_struct<revk_coupling>("coupling", given);
    const int32_t k = options_.grid_exponent;
    if (k != REVK_NO_GRID && (k < -126 || k > 126))
      throw invalid("coupling: grid_exponent is " + std::to_string(k) +
                    ", -126..126 or REVK_NO_GRID is needed");
    if (fixed && k == REVK_NO_GRID)
      throw invalid("coupling: grid_exponent is REVK_NO_GRID, but " + out_.name +
                    " is int16; -126..126 is needed");
    if (options_.rows_per_sample < 0)
      throw invalid("coupling: rows_per_sample is " + std::to_string(options_.rows_per_sample) +
                    ", 0 or more is needed");
    options_.rows_per_sample = std::max<int64_t>(options_.rows_per_sample, 1);
    if (options_.sample_scale != nullptr && out_.sizes[0] % options_.rows_per_sample != 0)
      throw invalid("coupling: rows_per_sample is " + std::to_string(options_.rows_per_sample) +
                    ", a divisor of outer = " + std::to_string(out_.sizes[0]) + " is needed");
    if (options_.value != nullptr) check_value(fixed);
    const int64_t samples = out_.sizes[0] / options_.rows_per_sample;
    const int64_t scale = item_size(scale_dtype);
    const Array scales[] = {{"channel_scale", options_.channel_scale, scale, out_.sizes[1]},
                            {"sample_scale", options_.sample_scale, scale, samples}};
    const Array checksum("checksum", options_.checksum, 8, 1), amax("amax", options_.amax, 4, 1);
    for (const Array* array : {&scales[0], &scales[1], &checksum, &amax}) check_array(*array);
    for (const Array* report : {&checksum, &amax}) {  // these are written too
      for (const NamedView* view : read_) check_apart(*report, view->layout, view->name);
      for (const Array& array : scales) check_apart(*report, array.layout, array.name);
    }
    check_apart(checksum, amax.layout, amax.name);
    plain_ = options_.channel_scale == nullptr && options_.sample_scale == nullptr &&
             options_.checksum == nullptr && options_.amax == nullptr && k == REVK_NO_GRID;
  }
  CheckedCoupling(const CheckedCoupling&) = delete;  // options_ points into the object
  CheckedCoupling& operator=(const CheckedCoupling&) = delete;

  const revk_coupling* get() const { return plain_ ? nullptr : &options_; }

 private:
  void check_value(bool fixed) {
    if (!fixed)
      throw invalid("coupling: value is given, but " + out_.name + " is " +
                    dtype_name(out_.view.dtype) + "; NULL is needed but for an int16 stream");
    value_.emplace("value", options_.value);
    value_->same_shape_as(out_);
    value_->apart_from_itself();
    for (const Views& views : {written_, read_})
      for (const NamedView* view : views) value_->apart_from(*view);
    options_.value = &value_->view;
  }
  // A plain array that the struct points to; NULL means no elements.
  struct Array {
    Array(const char* name, const void* data, int64_t item, int64_t elements)
        : name(name),
          count(data == nullptr ? 0 : elements),
          layout{reinterpret_cast<uintptr_t>(data), item, 1, &count, &stride} {}
    Array(const Array&) = delete;  // layout points into the object
    const char* const name;
    const int64_t count, stride = 1;
    const Layout layout;
  };
  void check_array(const Array& array) const {
    if (array.layout.address % uintptr_t(array.layout.item) != 0)
      throw invalid(std::string("coupling: ") + array.name + " is not aligned to its element");
    for (const NamedView* view : written_) written_apart(array, *view);
    if (value_) written_apart(array, *value_);
  }
  static void written_apart(const Array& array, const NamedView& written) {
    if (overlaps(written.layout, array.layout))
      throw invalid("coupling: " + std::string(array.name) + " overlaps " + written.name +
                    ", which is written; they need separate memory");
  }
  static void check_apart(const Array& written, const Layout& other, const std::string& name) {
    if (overlaps(written.layout, other))
      throw invalid("coupling: " + std::string(written.name) + " is written and overlaps " + name +
                    "; they need separate memory");
  }

  const NamedView& out_;
  const Views written_, read_;
  revk_coupling options_;
  std::optional<NamedView> value_;
  bool plain_ = true;
};

// Both streams are int16, or neither.
void check_stream(const NamedView& out, const NamedView& x) {
  if ((out.view.dtype == REVK_INT16) != (x.view.dtype == REVK_INT16))
    throw invalid(out.name + ": dtype is " + dtype_name(out.view.dtype) + ", but " + x.name +
                  " has " + dtype_name(x.view.dtype) + "; int16 is needed for both or for neither");
}

using Couple = void (*)(const revk_view&, const revk_view&, const revk_view&, const revk_coupling*,
                        const revk_where&);

void couple_with(Couple on_cpu, Couple on_cuda, const NamedView& out, const NamedView& x,
                 const NamedView& f, const revk_coupling* coupling, const revk_where* given_where) {
  const revk_where where = read_where(given_where);
  x.same_shape_as(out);
  f.same_shape_as(out);
  check_stream(out, x);
  out.apart_from_itself();
  if (!out.is(x)) out.apart_from(x);
  out.apart_from(f);
  const Views written{&out}, read{&x, &f};
  const CheckedCoupling checked(coupling, written, read, compute_dtype(x.view.dtype, f.view.dtype));
  if (out.layout.empty()) return;
  (where.device < 0 ? on_cpu : on_cuda)(out.view, x.view, f.view, checked.get(), where);
}

// `count` consecutive views; the first one's struct_size is the step. A deque never moves a view.
std::deque<NamedView> read_list(const char* name, const revk_view* first, int64_t count) {
  const int32_t step = size_of_struct(first);
  std::deque<NamedView> list;
  for (int64_t i = 0; i < count; ++i) {
    const std::string called = std::string(name) + "[" + std::to_string(i) + "]";
    const char* const at = reinterpret_cast<const char*>(first) + i * step;
    if (size_of_struct(at) != step)
      throw invalid(called + ": struct_size is " + std::to_string(size_of_struct(at)) + ", " +
                    name + "[0] has " + std::to_string(step) + "; equal sizes are needed");
    list.emplace_back(called, reinterpret_cast<const revk_view*>(at));
  }
  return list;
}

std::vector<revk_view> plain_views(const std::deque<NamedView>& list) {
  std::vector<revk_view> views;
  views.reserve(list.size());
  for (const NamedView& named : list) views.push_back(named.view);
  return views;
}

// No total shares memory with any other array of the call. A sweep in address order compares only
// ranges that intersect.
void check_apart(const std::deque<NamedView>& totals, const std::deque<NamedView>& parts) {
  struct Entry {
    const NamedView* view;
    bool written;
    uintptr_t begin, end;
  };
  std::vector<Entry> entries, open;
  const auto add = [&entries](const NamedView& view, bool written) {
    const int64_t span = view.layout.span();
    if (span == 0) return;
    entries.push_back({&view, written, view.layout.address, view.layout.address + uintptr_t(span)});
  };
  for (const NamedView& total : totals) add(total, true);
  for (const NamedView& part : parts) add(part, false);
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.begin < b.begin; });
  for (const Entry& entry : entries) {
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&entry](const Entry& past) { return past.end <= entry.begin; }),
               open.end());
    for (const Entry& other : open) {
      if (entry.written)
        entry.view->apart_from(*other.view);
      else if (other.written)
        other.view->apart_from(*entry.view);
    }
    open.push_back(entry);
  }
}

}  // namespace
}  // namespace revk

using namespace revk;

extern "C" {

revk_status revk_couple(const revk_view* y, const revk_view* x, const revk_view* f,
                        const revk_coupling* coupling, const revk_where* where) {
  return guard(last_error(), [&] {
    const NamedView to("y", y, NamedView::kStream), from("x", x, NamedView::kStream),
        branch("f", f);
    couple_with(cpu::couple, cuda::couple, to, from, branch, coupling, where);
  });
}

revk_status revk_uncouple(const revk_view* x, const revk_view* y, const revk_view* f,
                          const revk_coupling* coupling, const revk_where* where) {
  return guard(last_error(), [&] {
    const NamedView to("x", x, NamedView::kStream), from("y", y, NamedView::kStream),
        branch("f", f);
    couple_with(cpu::uncouple, cuda::uncouple, to, from, branch, coupling, where);
  });
}

revk_status revk_reverse_step(const revk_view* y, const revk_view* f, const revk_view* dy,
                              const revk_view* df, const revk_coupling* coupling,
                              const revk_where* where) {
  return guard(last_error(), [&] {
    const NamedView to_y("y", y, NamedView::kStream), from_f("f", f), to_dy("dy", dy),
        from_df("df", df);
    const revk_where place = read_where(where);
    for (const NamedView* other : {&from_f, &to_dy, &from_df}) {
      other->same_shape_as(to_y);
      to_y.apart_from(*other);
    }
    to_y.apart_from_itself();
    to_dy.apart_from_itself();
    to_dy.apart_from(from_f);
    to_dy.apart_from(from_df);
    const int32_t scale_dtype = compute_dtype(to_y.view.dtype, from_f.view.dtype);
    const Views written{&to_y, &to_dy}, read{&from_f, &from_df};
    const CheckedCoupling checked(coupling, written, read, scale_dtype);
    if (to_y.layout.empty()) return;
    const auto kernel = place.device < 0 ? cpu::reverse_step : cuda::reverse_step;
    kernel(to_y.view, from_f.view, to_dy.view, from_df.view, checked.get(), place);
  });
}

revk_status revk_accumulate(const revk_view* totals, const revk_view* parts, int64_t count,
                            const revk_where* where) {
  return guard(last_error(), [&] {
    const revk_where place = read_where(where);
    if (count < 0) throw invalid("count is " + std::to_string(count) + ", 0 or more is needed");
    if (count == 0) return;
    if (totals == nullptr) throw invalid("totals is NULL, an array of revk_view is needed");
    if (parts == nullptr) throw invalid("parts is NULL, an array of revk_view is needed");
    const std::deque<NamedView> written = read_list("totals", totals, count);
    const std::deque<NamedView> read = read_list("parts", parts, count);
    for (size_t i = 0; i < written.size(); ++i) {
      read[i].same_shape_as(written[i]);
      written[i].apart_from_itself();
    }
    check_apart(written, read);
    const std::vector<revk_view> sums = plain_views(written), added = plain_views(read);
    const auto kernel = place.device < 0 ? cpu::accumulate : cuda::accumulate;
    kernel(sums.data(), added.data(), count, place);
  });
}

revk_status revk_synchronize(const revk_where* where) {
  return guard(last_error(), [&] {
    const revk_where place = read_where(where);
    if (place.device >= 0) cuda::synchronize(place);
  });
}

const char* revk_last_error(void) { return last_error().c_str(); }
int32_t revk_abi_version(void) { return REVK_ABI_VERSION; }
const char* revk_version(void) { return REVK_VERSION; }
const char* revk_cpu_isa(void) { return cpu::isa(); }
const char* revk_cuda_archs(void) { return cuda::archs(); }
const char* revk_cuda_missing(void) { return cuda::missing(); }
bool revktest_set_isa(const char* name) { return cpu::set_isa(name); }

}  // extern "C"
