/* SPDX-License-Identifier: Apache-2.0
 *
 * One reversible block in plain C: couple, undo, and the reverse step on the half of a buffer. */
#include <revkernels/revkernels.h>
#include <stdio.h>
#include <string.h>

enum { kRows = 3, kCols = 4 };

/* Rows of kCols floats, `stride` apart. */
static revk_view rows(float* data, int64_t stride) {
  revk_view view;
  memset(&view, 0, sizeof view);
  view.struct_size = (int32_t)sizeof view;
  view.dtype = REVK_FLOAT32;
  view.data = data;
  view.outer = kRows, view.channels = kCols, view.inner = 1;
  view.outer_stride = stride, view.channel_stride = 1;
  return view;
}

static int fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, revk_last_error());
  return 1;
}

int main(void) {
  float x[kRows * kCols], f[kRows * kCols], y[kRows * 2 * kCols], dy[kRows * kCols];
  revk_where where;
  revk_view whole, branch, half, gradient;
  int i;

  memset(&where, 0, sizeof where);
  where.struct_size = (int32_t)sizeof where;
  where.device = -1;
  memset(y, 0, sizeof y);
  for (i = 0; i < kRows * kCols; ++i) x[i] = (float)i, f[i] = 0.5f, dy[i] = 1.0f;
  whole = rows(x, kCols), branch = rows(f, kCols), half = rows(y, 2 * kCols),
  gradient = rows(dy, kCols);

  if (revk_abi_version() != REVK_ABI_VERSION) return fail("another ABI");
  if (revk_couple(&half, &whole, &branch, NULL, &where) != REVK_OK) return fail("couple");
  for (i = 0; i < kRows * 2 * kCols; ++i) {
    const int row = i / (2 * kCols), col = i % (2 * kCols);
    const float want = col < kCols ? (float)(row * kCols + col) + 0.5f : 0.0f;
    if (y[i] != want) return fail("couple wrote something else");
  }
  if (revk_reverse_step(&half, &branch, &gradient, &whole, NULL, &where) != REVK_OK)
    return fail("reverse_step");
  for (i = 0; i < kRows * kCols; ++i) {
    if (y[i / kCols * 2 * kCols + i % kCols] != x[i]) return fail("y is not x again");
    if (dy[i] != 1.0f + x[i]) return fail("dy is wrong");
  }

  /* A mistake comes back as a status and a sentence, and nothing is written. */
  if (revk_couple(&half, &half, &half, NULL, &where) != REVK_INVALID_ARGUMENT)
    return fail("overlap accepted");
  printf("revkernels %s, %s: %s\n", revk_version(), revk_cpu_isa(), revk_last_error());
  return 0;
}
