// SPDX-License-Identifier: Apache-2.0
// Reads and checks a revkernels.Coupling.
#include "bindings/coupling_options.h"

#include "bindings/checks.h"

namespace revk::python {

CouplingOptions::CouplingOptions(py::handle object, std::initializer_list<const Array*> operands,
                                 const Array& f)
    : written_(**operands.begin()) {
  const Array& x = *operands.begin()[1];
  const bool fixed = x.dtype == REVK_INT16;
  const py::object exponent =
      object.is_none() ? py::none() : py::object(object.attr("grid_exponent"));
  if (fixed && exponent.is_none())
    type_error(std::string(x.name) +
               " is int16; it must be float64, float32, bfloat16 or float16, or int16 with a "
               "Coupling that has a grid_exponent");
  if ((written_.dtype == REVK_INT16) != fixed)
    type_error(std::string(written_.name) + " is " + dtype_name(written_.dtype) + ", " + x.name +
               " is " + dtype_name(x.dtype) + ": they must both be int16, or neither");
  if (object.is_none()) return;
  given_ = true;
  coupling_.struct_size = int32_t(sizeof(revk_coupling));
  coupling_.grid_exponent = exponent.is_none() ? REVK_NO_GRID : exponent.cast<int32_t>();
  const int32_t scale_dtype = compute_dtype(x.dtype, f.dtype);
  const py::object by_channel = object.attr("channel_scale");
  if (!by_channel.is_none()) {
    const int given_dim = object.attr("channel_dim").cast<int>();
    roles_.channel = given_dim < 0 ? given_dim + written_.rank : given_dim;
    if (roles_.channel < 0 || roles_.channel >= written_.rank)
      value_error("channel_dim is " + std::to_string(given_dim) + "; x has " +
                  std::to_string(written_.rank) + " dimensions");
    coupling_.channel_scale = scale("channel_scale", by_channel, roles_.channel, scale_dtype);
  }
  const py::object by_sample = object.attr("sample_scale");
  if (!by_sample.is_none()) {
    if (written_.rank == 0) value_error("sample_scale is given, but x has no dimensions");
    if (roles_.channel == 0)
      value_error("channel_dim is 0; with a sample_scale it must be another dimension");
    roles_.sample = 0;
    coupling_.sample_scale = scale("sample_scale", by_sample, 0, scale_dtype);
  }
  coupling_.checksum =
      static_cast<uint64_t*>(cell("checksum", object.attr("checksum"), kWordDtype));
  coupling_.amax = static_cast<float*>(cell("amax", object.attr("amax"), REVK_FLOAT32));
  roles_.ordered = coupling_.checksum != nullptr;
  read_value(object.attr("value"), operands);
}

void* CouplingOptions::scale(const char* name, py::handle object, int dim, int32_t dtype) {
  Array array;
  read_array(array, name, object);
  check_together(written_, array);
  check_apart(written_, array);
  if (array.dtype != dtype)
    type_error(std::string(name) + " is " + dtype_name(array.dtype) + "; it must be " +
               dtype_name(dtype) + ", the type these operands are added in");
  if (array.rank != 1 || array.sizes[0] != written_.sizes[dim])
    value_error(std::string(name) + " has shape " + array.shape() + "; it must be (" +
                std::to_string(written_.sizes[dim]) + ",), x's dimension " + std::to_string(dim));
  if (array.sizes[0] > 1 && array.strides[0] != 1)
    value_error(std::string(name) + " has stride " + std::to_string(array.strides[0]) +
                "; it must be dense");
  if (array.owner) owners_.push_back(array.owner);
  return array.data;
}

void* CouplingOptions::cell(const char* name, py::handle object, int32_t dtype) {
  if (object.is_none()) return nullptr;
  Array array;
  read_array(array, name, object, dtype == kWordDtype ? Takes::kWords : Takes::kFloats);
  check_together(written_, array);
  check_apart(written_, array);
  if (array.dtype != dtype)
    type_error(std::string(name) + " is " + dtype_name(array.dtype) + "; it must be float32");
  if (array.count() != 1)
    value_error(std::string(name) + " has shape " + array.shape() + "; it must hold one element");
  check_writable(array);
  if (array.owner) owners_.push_back(array.owner);
  return array.data;
}

void CouplingOptions::read_value(py::handle object, std::initializer_list<const Array*> operands) {
  if (object.is_none()) return;
  if (written_.dtype != REVK_INT16)
    value_error("value is given, and " + std::string(written_.name) + " is " +
                dtype_name(written_.dtype) + "; it must be None but for an int16 stream");
  read_array(value_, "value", object);
  check_alike(written_, value_);
  check_written(value_);
  for (const Array* operand : operands) check_apart(value_, *operand);
  has_value_ = true;
}

}  // namespace revk::python
