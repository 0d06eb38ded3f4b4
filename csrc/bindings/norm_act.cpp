// SPDX-License-Identifier: Apache-2.0
// Python bindings of the norms with activation.
#include "bindings/norm_act.h"

#include <cmath>

#include "bindings/checks.h"
#include "bindings/norm_geometry.h"
#include "bindings/norm_options.h"
#include "bindings/python.h"

namespace revk::python {
namespace {

// Memory for partial results on a CUDA device, allocated by the arrays' own library in the order of
// the kernels' stream, and released at the end of the call.
struct Workspace {
  py::object owner;
  Array memory;

  // `written` is an array of the call, `object` its Python object. `one_pass`: no memory is needed.
  Workspace(revk_norm& norm, const revk_view& x, const Array& written, py::handle object,
            const revk_where& where, bool one_pass = false) {
    if (written.device < 0 || one_pass) return;
    const int64_t bytes = revk_norm_workspace(&x, &norm, &where);
    if (bytes < 0) raise_on_error(REVK_INVALID_ARGUMENT);
    if (bytes == 0) return;
    norm.workspace_bytes = bytes;
    const bool torch = written.library == Library::kTorch;
    static PyObject* const of_torch =
        keep(py::module_::import("revkernels.native"), "_torch_workspace");
    static PyObject* const of_others = keep(py::module_::import("revkernels.native"), "_workspace");
    owner = torch ? py::reinterpret_borrow<py::object>(of_torch)(bytes, written.device)
                  : py::reinterpret_borrow<py::object>(of_others)(written.name, object, bytes,
                                                                  written.device);
    if (torch) {
      norm.workspace = PyLong_AsVoidPtr(py::object(owner.attr("data_ptr")()).ptr());
      return;
    }
    read_array(memory, "workspace", owner, Takes::kBytes);
    check_together(written, memory);
    check_writable(memory);
    norm.workspace = memory.data;
  }
};

// Fills an empty array's statistics or sums on a device, which the library does not write itself.
void fill_on_device(py::handle array, double value) {
  if (array.is_none()) return;
  if (py::hasattr(array, "fill_"))
    array.attr("fill_")(value);  // torch
  else
    array[py::ellipsis()] = py::float_(value);
}

// Kernels

enum class Kind { kPlain, kCouple, kUncouple };

// s is the norm's input; with a coupling it is computed from `from` and `branch`.
void forward(Kind kind, py::handle h_object, py::handle s_object, py::handle from_object,
             py::handle f_object, py::handle norm_object, py::handle mean, py::handle rstd,
             py::handle given_object) {
  const bool coupled = kind != Kind::kPlain, given = truth(given_object);
  const char* const s_name = kind == Kind::kCouple ? "y" : "x";
  const char* const from_name = kind == Kind::kCouple ? "x" : "y";
  const bool in_place = coupled && s_object.ptr() == from_object.ptr();
  Array h, s, from, branch;
  if (coupled && !in_place) read_array(from, from_name, from_object);
  read_array(s, in_place ? from_name : s_name, s_object);
  if (coupled) read_array(branch, "f", f_object);
  read_array(h, "h", h_object);
  const Array& source = in_place ? s : from;
  check_alike(coupled ? source : s, h);
  int32_t dtype = compute_dtype(s.dtype, s.dtype);
  if (coupled) {
    check_alike(source, branch);
    if (!in_place) check_alike(source, s);
    dtype = compute_dtype(source.dtype, branch.dtype);
    if (s.dtype == REVK_FLOAT64 && dtype != REVK_FLOAT64)
      type_error(std::string(s.name) + " is float64; it must be narrower, or " + source.name +
                 " or f float64 too");
  }
  NormArrays sides;
  NormOptions options(norm_object, coupled ? source : s, dtype, mean, rstd, given, sides);
  check_written(h);
  check_apart(h, s);
  if (coupled) {
    check_written(s);
    if (!in_place) {
      if (s.dtype != source.dtype || !same_memory(s.layout(), source.layout()))
        check_apart(s, source);
      check_apart(h, source);
      sides.check_against(source, false);
    }
    check_apart(s, branch);
    check_apart(h, branch);
    sides.check_against(branch, false);
  }
  sides.check_against(h, true);
  sides.check_against(s, coupled);
  sides.check_among();

  revk_norm& norm = options.norm;
  const int64_t elements = s.count();
  if (elements == 0 && s.device >= 0) {
    if (given) return;
    fill_on_device(mean, 0.0);
    return fill_on_device(rstd, 1.0 / std::sqrt(norm.eps));
  }
  const Array* const arrays[] = {&s, &h, &source, &branch};
  revk_view views[4];
  norm_geometry(arrays, coupled ? 4 : 2, options.axis, norm, views);
  const revk_where where = where_of(s, elements);
  const bool over_channels = norm.kind == REVK_LAYER_NORM || norm.kind == REVK_RMS_NORM;
  const Workspace workspace(norm, views[0], h, h_object, where, given || over_channels);
  revk_status status;
  {
    const Unlocked unlocked(is_long(s, elements));
    if (kind == Kind::kPlain)
      status = revk_norm_act(&views[1], &views[0], &norm, &where);
    else
      status = (kind == Kind::kCouple ? revk_couple_norm_act : revk_uncouple_norm_act)(
          &views[1], &views[0], &views[2], &views[3], &norm, &where);
  }
  finish(status, s, where);
}

void norm_act_backward(py::handle dx_object, py::handle base_object, py::handle dh_object,
                       py::handle x_object, py::handle norm_object, py::handle mean,
                       py::handle rstd, py::handle dweight, py::handle dbias, py::handle sums,
                       py::handle count, py::handle constant) {
  Array dx, base, dh, x;
  read_array(x, "x", x_object);
  read_array(dh, "dh", dh_object);
  check_alike(x, dh);
  revk_norm_gradient gradient{};
  gradient.struct_size = int32_t(sizeof(revk_norm_gradient));
  const int64_t mode = integer(sums, "sums", "0, 1 or 2");
  if (mode < REVK_SUMS_COMPUTED || mode > REVK_SUMS_GIVEN)
    value_error("sums is " + std::to_string(mode) + "; it must be 0, 1 or 2");
  gradient.sums = int32_t(mode);
  gradient.count = integer(count, "count", "an int");
  if (gradient.count < 0)
    value_error("count is " + std::to_string(gradient.count) + "; it must be 0 or more");
  gradient.constant = truth(constant) ? 1 : 0;
  const bool writes_dx = mode != REVK_SUMS_ONLY, sums_given = mode == REVK_SUMS_GIVEN;
  if (writes_dx == dx_object.is_none())
    value_error(writes_dx
                    ? "dx is None; it must be an array, for the sums are not all that is asked for"
                    : "dx is given; it must be None where the sums alone are asked for");
  const bool has_base = !base_object.is_none();
  if (has_base && !writes_dx) value_error("base is given; it must be None where dx is None");
  const bool in_place = has_base && base_object.ptr() == dx_object.ptr();
  if (writes_dx) {
    read_array(dx, "dx", dx_object);
    check_alike(x, dx);
  }
  if (has_base && !in_place) {
    read_array(base, "base", base_object);
    check_alike(x, base);
  }

  const int32_t dtype = compute_dtype(x.dtype, x.dtype);
  NormArrays sides;
  NormOptions options(norm_object, x, dtype, mean, rstd, true, sides);
  const bool batch = options.norm.kind == REVK_BATCH_NORM;
  if (!batch && mode != REVK_SUMS_COMPUTED)
    value_error("sums is " + std::to_string(mode) + "; it must be 0 but for a batch norm");
  if (!batch && gradient.constant != 0)
    value_error("constant is True; that is for a batch norm alone");
  const auto read_sum = [&](const char* name, py::handle object) -> void* {
    if (object.is_none()) {
      if (batch) type_error(std::string(name) + " is None; it must be an array for a batch norm");
      return nullptr;
    }
    const Array* const array = sides.add(name, object, x, &options.channels, 1, !sums_given);
    check_dtype(*array, dtype);
    return array->data;
  };
  gradient.dweight = read_sum("dweight", dweight);
  gradient.dbias = read_sum("dbias", dbias);
  if (writes_dx) {
    check_written(dx);
    check_apart(dx, x);
    if (!batch || dx.dtype != dh.dtype || !same_memory(dx.layout(), dh.layout()))
      check_apart(dx, dh);
    if (has_base && !in_place) {
      if (dx.dtype != base.dtype || !same_memory(dx.layout(), base.layout())) check_apart(dx, base);
      sides.check_against(base, false);
    }
    sides.check_against(dx, true);
  }
  sides.check_against(x, false);
  sides.check_against(dh, false);
  sides.check_among();

  const int64_t elements = x.count();
  if (elements == 0 && x.device >= 0) {
    if (sums_given) return;
    fill_on_device(dweight, 0.0);
    return fill_on_device(dbias, 0.0);
  }
  const Array* arrays[4] = {&x, &dh};
  int operands = 2;
  if (writes_dx) arrays[operands++] = &dx;
  if (has_base) arrays[operands++] = in_place ? &dx : &base;
  revk_view views[4];
  norm_geometry(arrays, operands, options.axis, options.norm, views);
  const revk_where where = where_of(x, elements);
  const Workspace workspace(options.norm, views[0], writes_dx ? dx : x,
                            writes_dx ? dx_object : x_object, where);
  revk_status status;
  {
    const Unlocked unlocked(is_long(x, elements));
    status = revk_norm_act_backward(writes_dx ? &views[2] : nullptr, has_base ? &views[3] : nullptr,
                                    &views[1], &views[0], &options.norm, &gradient, &where);
  }
  finish(status, x, where);
}

}  // namespace

void bind_norm_act(py::module_& m) {
  m.def(
      "norm_act",
      [](py::handle h, py::handle x, py::handle norm, py::handle mean, py::handle rstd,
         py::handle given) {
        forward(Kind::kPlain, h, x, py::none(), py::none(), norm, mean, rstd, given);
      },
      py::arg("h"), py::arg("x"), py::arg("norm"), py::arg("mean"), py::arg("rstd"),
      py::arg("given"));
  m.def(
      "couple_norm_act",
      [](py::handle h, py::handle y, py::handle x, py::handle f, py::handle norm, py::handle mean,
         py::handle rstd,
         py::handle given) { forward(Kind::kCouple, h, y, x, f, norm, mean, rstd, given); },
      py::arg("h"), py::arg("y"), py::arg("x"), py::arg("f"), py::arg("norm"), py::arg("mean"),
      py::arg("rstd"), py::arg("given"));
  m.def(
      "uncouple_norm_act",
      [](py::handle h, py::handle x, py::handle y, py::handle f, py::handle norm, py::handle mean,
         py::handle rstd,
         py::handle given) { forward(Kind::kUncouple, h, x, y, f, norm, mean, rstd, given); },
      py::arg("h"), py::arg("x"), py::arg("y"), py::arg("f"), py::arg("norm"), py::arg("mean"),
      py::arg("rstd"), py::arg("given"));
  m.def("norm_act_backward", &norm_act_backward, py::arg("dx"), py::arg("base"), py::arg("dh"),
        py::arg("x"), py::arg("norm"), py::arg("mean"), py::arg("rstd"), py::arg("dweight"),
        py::arg("dbias"), py::arg("sums"), py::arg("count"), py::arg("constant"));
}

}  // namespace revk::python
