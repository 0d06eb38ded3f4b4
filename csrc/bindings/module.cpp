// SPDX-License-Identifier: Apache-2.0
// Python bindings of the C interface: reads the arrays, checks them under their Python names, makes
// views, calls.
#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/checks.h"
#include "bindings/coupling_options.h"
#include "bindings/geometry.h"
#include "bindings/module_tree.h"
#include "bindings/norm_act.h"
#include "core/backends.h"

namespace revk::python {
namespace {

using Couple = revk_status (*)(const revk_view*, const revk_view*, const revk_view*,
                               const revk_coupling*, const revk_where*);

void couple_with(Couple kernel, const char* x_name, py::handle out, py::handle x, py::handle f,
                 py::handle options) {
  Array from, branch, separate;
  const bool in_place = out.ptr() == x.ptr();
  read_array(from, x_name, x, Takes::kStream);
  read_array(branch, "f", f);
  if (!in_place) read_array(separate, "out", out, Takes::kStream);
  const Array& written = in_place ? from : separate;
  check_alike(from, branch);
  if (!in_place) {
    check_alike(from, written);
    if (from.dtype != written.dtype || !same_memory(written.layout(), from.layout()))
      check_apart(written, from);
  }
  check_written(written);
  check_apart(written, branch);
  CouplingOptions coupling(options, {&written, &from, &branch}, branch);
  const int64_t elements = written.count();
  if (elements == 0) return;

  const Array* const arrays[] = {&written, &from, &branch, coupling.value()};
  const Geometry geometry(arrays, coupling.value() != nullptr ? 4 : 3, coupling.roles());
  coupling.set_rows_per_sample(geometry.rows_per_sample());
  const revk_where where = where_of(written, elements);
  revk_status status = REVK_OK;
  {
    const Unlocked unlocked(is_long(written, elements));
    geometry.for_each([&](const revk_view* views) {
      if (status == REVK_OK)
        status = kernel(&views[0], &views[1], &views[2], coupling.get(&views[3]), &where);
    });
  }
  finish(status, written, where);
}

void reverse_step(py::handle y, py::handle f, py::handle dy, py::handle df, py::handle options) {
  Array stream, branch, gradient, part;
  read_array(stream, "y", y, Takes::kStream);
  read_array(branch, "f", f);
  read_array(gradient, "dy", dy);
  read_array(part, "df", df);
  for (const Array* other : {&branch, &gradient, &part}) {
    check_alike(stream, *other);
    check_apart(stream, *other);
  }
  check_written(stream);
  check_written(gradient);
  check_apart(gradient, branch);
  check_apart(gradient, part);
  CouplingOptions coupling(options, {&stream, &stream, &branch, &gradient, &part}, branch);
  const int64_t elements = stream.count();
  if (elements == 0) return;

  const Array* const arrays[] = {&stream, &branch, &gradient, &part, coupling.value()};
  const Geometry geometry(arrays, coupling.value() != nullptr ? 5 : 4, coupling.roles());
  coupling.set_rows_per_sample(geometry.rows_per_sample());
  const revk_where where = where_of(stream, 2 * elements);
  revk_status status = REVK_OK;
  {
    const Unlocked unlocked(is_long(stream, 2 * elements));
    geometry.for_each([&](const revk_view* v) {
      if (status == REVK_OK)
        status = revk_reverse_step(&v[0], &v[1], &v[2], &v[3], coupling.get(&v[4]), &where);
    });
  }
  finish(status, stream, where);
}

// Raises for overlapping arrays by the caller's names: the C entry numbers views, and an array may
// be several views.
void check_all_apart(const py::sequence& totals, const py::sequence& parts) {
  for (size_t i = 0; i < totals.size(); ++i) {
    Array total, other;
    const std::string name = "total[" + std::to_string(i) + "]";
    read_array(total, name.c_str(), totals[i]);
    for (size_t k = 0; k < totals.size(); ++k) {
      const std::string index = "[" + std::to_string(k) + "]";
      const std::string total_name = "total" + index, part_name = "part" + index;
      if (k > i) {
        read_array(other, total_name.c_str(), totals[k]);
        check_apart(total, other);
      }
      read_array(other, part_name.c_str(), parts[k]);
      check_apart(total, other);
    }
  }
}

void accumulate(const py::sequence& totals, const py::sequence& parts) {
  const size_t count = totals.size();
  if (parts.size() != count)
    value_error("part has " + std::to_string(parts.size()) + " arrays, total has " +
                std::to_string(count) + ": they must be equal");
  std::vector<revk_view> written, read;
  std::vector<std::shared_ptr<void>> owners;  // of arrays borrowed for the call
  revk_where where{};
  int64_t elements = 0;
  Array total, part, leader{};
  for (size_t i = 0; i < count; ++i) {
    const std::string suffix = count == 1 ? "" : "[" + std::to_string(i) + "]";
    const std::string total_name = "total" + suffix, part_name = "part" + suffix;
    read_array(total, total_name.c_str(), totals[i]);
    read_array(part, part_name.c_str(), parts[i]);
    check_alike(total, part);
    check_written(total);
    check_apart(total, part);
    if (i == 0) {
      leader = total;
      leader.name = "total[0]";
    }
    check_together(leader, total);
    for (const Array* array : {&total, &part})
      if (array->owner) owners.push_back(array->owner);
    if (total.count() == 0) continue;
    elements += total.count();
    const Array* const arrays[] = {&total, &part};
    Geometry(arrays, 2, Roles{}).for_each([&](const revk_view* views) {
      written.push_back(views[0]);
      read.push_back(views[1]);
    });
  }
  if (written.empty()) return;
  where = where_of(leader, elements);
  revk_status status;
  {
    const Unlocked unlocked(is_long(leader, elements));
    status = revk_accumulate(written.data(), read.data(), int64_t(written.size()), &where);
  }
  if (status == REVK_INVALID_ARGUMENT && count > 1) check_all_apart(totals, parts);
  finish(status, leader, where);
}

// How a call sees an array of a foreign library: (address, shape, strides, dtype, device, why it
// must not be written or None). Reads the array like a call.
py::tuple describe(const char* name, py::handle object) {
  Array array;
  read_array(array, name, object, Takes::kKnown);
  py::tuple shape(array.rank), strides(array.rank);
  for (int k = 0; k < array.rank; ++k) {
    shape[k] = array.sizes[k];
    strides[k] = array.strides[k];
  }
  return py::make_tuple(reinterpret_cast<uintptr_t>(array.data), shape, strides,
                        array.dtype == kWordDtype ? "int64" : dtype_name(array.dtype),
                        device_text(array.device), array.frozen);
}

}  // namespace
}  // namespace revk::python

PYBIND11_MODULE(_native, m) {
  using namespace revk::python;
  m.doc() = "The compiled kernels; use revkernels.ops.";
  m.def(
      "couple",
      [](py::handle out, py::handle x, py::handle f, py::handle coupling) {
        couple_with(revk_couple, "x", out, x, f, coupling);
      },
      py::arg("out"), py::arg("x"), py::arg("f"), py::arg("coupling") = py::none());
  m.def(
      "uncouple",
      [](py::handle out, py::handle y, py::handle f, py::handle coupling) {
        couple_with(revk_uncouple, "y", out, y, f, coupling);
      },
      py::arg("out"), py::arg("y"), py::arg("f"), py::arg("coupling") = py::none());
  m.def("reverse_step", &reverse_step, py::arg("y"), py::arg("f"), py::arg("dy"), py::arg("df"),
        py::arg("coupling") = py::none());
  m.def("accumulate", &accumulate, py::arg("totals"), py::arg("parts"));
  bind_norm_act(m);
  bind_module_tree(m);
  m.def("describe", &describe, py::arg("name"), py::arg("array"));
  m.def("set_threads", &set_threads, py::arg("threads"));
  m.def("threads", &threads);
  m.def("version", &revk_version);
  m.def("cpu_isa", &revk_cpu_isa);
  m.def("cuda_archs", &revk_cuda_archs);
  m.def("cuda_missing", &revk_cuda_missing);
  m.def("set_isa", &revktest_set_isa,
        "For tests: False if this machine lacks the instruction set.");
}
