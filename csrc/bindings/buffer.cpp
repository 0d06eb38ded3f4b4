// SPDX-License-Identifier: Apache-2.0
// Reads arrays through Python's buffer protocol.
#include "bindings/buffer.h"

#include <algorithm>
#include <cstring>

#include "bindings/python.h"

namespace revk::python {
namespace {

void release(Py_buffer* view) {
  PyBuffer_Release(view);
  delete view;
}

// The dtype of a struct-module format: one letter, optionally after a byte-order mark.
int32_t buffer_dtype(const Array& array, const Py_buffer& view, Takes takes) {
  const std::string format = view.format != nullptr ? view.format : "B";
  const char mark = format.size() == 2 ? format[0] : '@';
  const char letter = format.empty() ? 'B' : format.back();
  constexpr bool little = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  const bool single = format.size() == 1 || (format.size() == 2 && std::strchr("@=<>!", mark));
  int32_t dtype = -1;
  int64_t item = view.itemsize;
  switch (single ? letter : '?') {
    case 'd':
      dtype = REVK_FLOAT64;
      break;
    case 'f':
      dtype = REVK_FLOAT32;
      break;
    case 'e':
      dtype = REVK_FLOAT16;
      break;
    case 'h':
      dtype = REVK_INT16;
      break;
    case 'l':
    case 'L':
    case 'q':
    case 'Q':
      if (item == 8) dtype = kWordDtype;
      break;
    case 'B':
      dtype = kByteDtype;
      break;
    default:
      break;
  }
  if (dtype < 0 || !takes_dtype(takes, dtype))
    wrong_dtype(array, "a buffer of format '" + format + "'", takes);
  if (mark == (little ? '>' : '<') || (little && mark == '!'))
    type_error(std::string(array.name) + " is byte-swapped (format '" + format +
               "'); it must be in the machine's byte order");
  return dtype;
}

}  // namespace

void read_buffer(Array& array, py::handle object, Takes takes) {
  auto* const view = new Py_buffer{};
  if (PyObject_GetBuffer(object.ptr(), view, PyBUF_RECORDS_RO) != 0) {
    delete view;
    rethrow(array, object, "buffer", py::error_already_set());
  }
  array.owner = std::shared_ptr<Py_buffer>(view, release);
  array.library = Library::kBuffer;
  array.device = -1;
  array.frozen = view->readonly != 0 ? kReadOnly : nullptr;
  array.dtype = buffer_dtype(array, *view, takes);
  if (view->itemsize != array.item())
    type_error(std::string(array.name) + " has elements of " + std::to_string(view->itemsize) +
               " bytes; its format's must have " + std::to_string(array.item()));
  array.data = view->buf;
  check_rank(array, view->ndim);
  array.rank = view->ndim;
  if (array.rank > 0 && view->shape == nullptr)
    value_error(std::string(array.name) + " exports a buffer without a shape; it must have one");
  std::copy(view->shape, view->shape + array.rank, array.sizes);
  // Strides were requested, but ctypes gives none: its arrays are dense.
  int64_t dense = array.item();
  for (int k = array.rank - 1; k >= 0; --k) {
    array.strides[k] = view->strides != nullptr ? view->strides[k] : dense;
    dense *= array.sizes[k];
  }
  strides_from_bytes(array);
  check_aligned(array);
}

}  // namespace revk::python
