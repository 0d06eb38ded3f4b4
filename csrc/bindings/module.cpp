// SPDX-License-Identifier: Apache-2.0
// The Python face of the C interface: reads the arrays,
// checks them under their Python names, makes views, calls.
#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/checks.h"
#include "bindings/geometry.h"
#include "bindings/norm_act.h"
#include "core/backends.h"

namespace revk::python {
namespace {

// The coupling's options

struct Options {
  revk_coupling coupling;
  Roles roles;
  const revk_coupling* get() const { return given ? &coupling : nullptr; }
  bool given = false;

  Options(py::handle object, const Array& written, const Array& x, const Array& f) : coupling() {
    if (object.is_none()) return;
    given = true;
    coupling.struct_size = int32_t(sizeof(revk_coupling));
    const py::object exponent = object.attr("grid_exponent");
    coupling.grid_exponent = exponent.is_none() ? REVK_NO_GRID : exponent.cast<int32_t>();
    const int32_t scale_dtype = compute_dtype(x.dtype, f.dtype);
    const py::object by_channel = object.attr("channel_scale");
    if (!by_channel.is_none()) {
      const int given_dim = object.attr("channel_dim").cast<int>();
      roles.channel = given_dim < 0 ? given_dim + written.rank : given_dim;
      if (roles.channel < 0 || roles.channel >= written.rank)
        value_error("channel_dim is " + std::to_string(given_dim) + "; x has " +
                    std::to_string(written.rank) + " dimensions");
      coupling.channel_scale =
          scale("channel_scale", by_channel, written, roles.channel, scale_dtype);
    }
    const py::object by_sample = object.attr("sample_scale");
    if (!by_sample.is_none()) {
      if (written.rank == 0) value_error("sample_scale is given, but x has no dimensions");
      if (roles.channel == 0)
        value_error("channel_dim is 0; with a sample_scale it must be another dimension");
      roles.sample = 0;
      coupling.sample_scale = scale("sample_scale", by_sample, written, 0, scale_dtype);
    }
    coupling.checksum =
        static_cast<uint64_t*>(cell("checksum", object.attr("checksum"), written, kWordDtype));
    coupling.amax = static_cast<float*>(cell("amax", object.attr("amax"), written, REVK_FLOAT32));
    roles.ordered = coupling.checksum != nullptr;
  }

 private:
  static void* scale(const char* name, py::handle object, const Array& written, int dim,
                     int32_t dtype) {
    Array array;
    read_array(array, name, object);
    check_together(written, array);
    check_apart(written, array);
    if (array.dtype != dtype)
      type_error(std::string(name) + " is " + dtype_name(array.dtype) + "; it must be " +
                 dtype_name(dtype) + ", the type these operands are added in");
    if (array.rank != 1 || array.sizes[0] != written.sizes[dim])
      value_error(std::string(name) + " has shape " + array.shape() + "; it must be (" +
                  std::to_string(written.sizes[dim]) + ",), x's dimension " + std::to_string(dim));
    if (array.sizes[0] > 1 && array.strides[0] != 1)
      value_error(std::string(name) + " has stride " + std::to_string(array.strides[0]) +
                  "; it must be dense");
    return array.data;
  }
  static void* cell(const char* name, const py::object& object, const Array& written,
                    int32_t dtype) {
    if (object.is_none()) return nullptr;
    Array array;
    read_array(array, name, object, dtype == kWordDtype);
    check_together(written, array);
    check_apart(written, array);
    if (array.dtype != dtype)
      type_error(std::string(name) + " is " + dtype_name(array.dtype) + "; it must be float32");
    if (array.count() != 1)
      value_error(std::string(name) + " has shape " + array.shape() + "; it must hold one element");
    if (!array.writable)
      value_error(std::string(name) + " is read-only; it must be writable, for it is added to");
    return array.data;
  }
};

// Kernels

using Couple = revk_status (*)(const revk_view*, const revk_view*, const revk_view*,
                               const revk_coupling*, const revk_where*);

void couple_with(Couple kernel, const char* x_name, py::handle out, py::handle x, py::handle f,
                 py::handle options) {
  Array from, branch, separate;
  const bool in_place = out.ptr() == x.ptr();
  read_array(from, x_name, x);
  read_array(branch, "f", f);
  if (!in_place) read_array(separate, "out", out);
  const Array& written = in_place ? from : separate;
  check_alike(from, branch);
  if (!in_place) {
    check_alike(from, written);
    if (from.dtype != written.dtype || !same_memory(written.layout(), from.layout()))
      check_apart(written, from);
  }
  check_written(written);
  check_apart(written, branch);
  Options coupling(options, written, from, branch);
  const int64_t elements = written.count();
  if (elements == 0) return;

  const Array* const arrays[] = {&written, &from, &branch};
  const Geometry geometry(arrays, 3, coupling.roles);
  coupling.coupling.rows_per_sample = geometry.rows_per_sample();
  const revk_where where = where_of(written, elements);
  revk_status status = REVK_OK;
  {
    const Unlocked unlocked(is_long(written, elements));
    geometry.for_each([&](const revk_view* views) {
      if (status == REVK_OK)
        status = kernel(&views[0], &views[1], &views[2], coupling.get(), &where);
    });
  }
  raise_on_error(status);
}

void reverse_step(py::handle y, py::handle f, py::handle dy, py::handle df, py::handle options) {
  Array stream, branch, gradient, part;
  read_array(stream, "y", y);
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
  Options coupling(options, stream, stream, branch);
  const int64_t elements = stream.count();
  if (elements == 0) return;

  const Array* const arrays[] = {&stream, &branch, &gradient, &part};
  const Geometry geometry(arrays, 4, coupling.roles);
  coupling.coupling.rows_per_sample = geometry.rows_per_sample();
  const revk_where where = where_of(stream, 2 * elements);
  revk_status status = REVK_OK;
  {
    const Unlocked unlocked(is_long(stream, 2 * elements));
    geometry.for_each([&](const revk_view* v) {
      if (status == REVK_OK)
        status = revk_reverse_step(&v[0], &v[1], &v[2], &v[3], coupling.get(), &where);
    });
  }
  raise_on_error(status);
}

void accumulate(const py::sequence& totals, const py::sequence& parts) {
  const size_t count = totals.size();
  if (parts.size() != count)
    value_error("part has " + std::to_string(parts.size()) + " arrays, total has " +
                std::to_string(count) + ": they must be equal");
  std::vector<revk_view> written, read;
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
  raise_on_error(status);
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
  m.def("version", &revk_version);
  m.def("cpu_isa", &revk_cpu_isa);
  m.def("cuda_archs", &revk_cuda_archs);
  m.def("cuda_missing", &revk_cuda_missing);
  m.def("set_isa", &revktest_set_isa,
        "For tests: False if this machine lacks the instruction set.");
}
