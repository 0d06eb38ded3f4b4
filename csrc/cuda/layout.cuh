// SPDX-License-Identifier: Apache-2.0
// How a launch walks its operands: planes of rows of elements, with one shape for all operands and
// separate strides. The host merges contiguous dimensions, so that a dense array is one long row
// and half of an NCHW batch is one row per image.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "core/scalar.h"
#include "cuda/divider.cuh"
#include "revkernels/revkernels.h"

namespace revk::cuda {

constexpr int kWord = 16;  // bytes in a thread's widest access

struct Operand {
  void* data;
  int64_t plane, row, step;  // strides in elements
  int32_t dtype;
};

// Work item i is `packet` adjacent elements of one row (fewer at the row's end).
template <int kOperands>
struct Layout {
  int64_t items;     // packets in all rows
  int64_t planes;    // 1: locate() needs no second division
  int64_t rows;      // of a plane
  int64_t row_size;  // elements of a row
  Divider packets_per_row, rows_per_plane;
  Operand operand[kOperands];
};

// The start of one item.
struct Spot {
  int64_t plane, row, first;  // coordinates of the item's first element
  int64_t index;              // its row-major index in the view

  __device__ int64_t offset(const Operand& operand) const {
    return plane * operand.plane + row * operand.row + first * operand.step;
  }
};

template <int kOperands>
__device__ Spot locate(const Layout<kOperands>& layout, int64_t item, int packet) {
  // The row's index over all planes.
  const int64_t across = layout.packets_per_row.divide(item);
  Spot spot{0, across, (item - across * layout.packets_per_row.divisor) * packet, 0};
  spot.index = across * layout.row_size + spot.first;
  if (layout.planes > 1) {
    spot.plane = layout.rows_per_plane.divide(across);
    spot.row = across - spot.plane * layout.rows;
  }
  return spot;
}

__host__ __device__ inline int64_t element_size(int32_t dtype) {
  return dtype == REVK_FLOAT64 ? 8 : dtype == REVK_FLOAT32 ? 4 : 2;
}

// The views' common shape, with adjacent dimensions merged where every operand allows it.
// `in_memory_order` also sorts the dimensions by the first operand's strides, which renumbers the
// elements; a coupling with scales or a checksum needs the view's own order.
template <int kOperands>
Layout<kOperands> merge(const std::array<const revk_view*, kOperands>& views,
                        bool in_memory_order) {
  struct Dimension {
    int64_t size;
    std::array<int64_t, kOperands> stride;
  };
  std::array<Dimension, 3> dims;
  for (int k = 0; k < kOperands; ++k) {
    const revk_view& view = *views[k];
    const int64_t sizes[] = {view.outer, view.channels, view.inner};
    const int64_t strides[] = {view.outer_stride, view.channel_stride, view.inner_stride};
    for (int d = 0; d < 3; ++d) dims[d].size = sizes[d], dims[d].stride[k] = strides[d];
  }
  int count = 0;
  for (int d = 0; d < 3; ++d)
    if (dims[d].size != 1) std::swap(dims[count++], dims[d]);
  if (in_memory_order)
    std::stable_sort(
        dims.begin(), dims.begin() + count,
        [](const Dimension& a, const Dimension& b) { return a.stride[0] > b.stride[0]; });
  int merged = 0;
  for (int d = 1; d < count; ++d) {
    bool follows = true;
    for (int k = 0; k < kOperands; ++k)
      follows = follows && dims[merged].stride[k] == dims[d].stride[k] * dims[d].size;
    if (follows)
      dims[merged].size *= dims[d].size, dims[merged].stride = dims[d].stride;
    else
      dims[++merged] = dims[d];
  }
  count = count ? merged + 1 : 0;

  Layout<kOperands> layout{};
  const Dimension none{1, {}};
  const Dimension& row = count > 0 ? dims[count - 1] : none;
  const Dimension& plane_row = count > 1 ? dims[count - 2] : none;
  const Dimension& plane = count > 2 ? dims[0] : none;
  layout.planes = plane.size, layout.rows = plane_row.size, layout.row_size = row.size;
  layout.rows_per_plane = Divider(layout.rows);
  for (int k = 0; k < kOperands; ++k)
    layout.operand[k] = {views[k]->data, plane.stride[k], plane_row.stride[k],
                         count ? row.stride[k] : 1, views[k]->dtype};
  return layout;
}

// Splits the rows into items of `packet` elements.
template <int kOperands>
void cut(Layout<kOperands>& layout, int packet) {
  const int64_t per_row = (layout.row_size + packet - 1) / packet;
  layout.packets_per_row = Divider(per_row);
  layout.items = per_row * layout.rows * layout.planes;
}

// Whether every packet of every operand is contiguous and starts on a 16-byte boundary, and rows
// hold at least one packet.
template <int kOperands>
bool takes_words(const Layout<kOperands>& layout, int packet) {
  if (layout.row_size < packet) return false;
  const auto whole = [](int64_t bytes) { return bytes % kWord == 0; };
  for (const Operand& operand : layout.operand) {
    const int64_t size = element_size(operand.dtype);
    if (operand.step != 1 || !whole(int64_t(reinterpret_cast<uintptr_t>(operand.data))))
      return false;
    if (!whole(operand.plane * size) || !whole(operand.row * size)) return false;
  }
  return true;
}

}  // namespace revk::cuda
