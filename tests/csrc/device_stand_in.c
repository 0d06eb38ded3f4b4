/* SPDX-License-Identifier: Apache-2.0
 *
 * A stand-in for the CUDA side of the C library, to be preloaded before it: the Python module then
 * talks to a device whose memory is the host's. Calls for device 0 or 1 are written down, with the
 * stream that they would go on, and made by the library's own host kernels. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "revkernels/revkernels.h"

enum { kWorkspace = 192 };

static char journal[1 << 16];

/* What has been written down since the last question. */
__attribute__((visibility("default"))) const char* stand_in_journal(void) {
  static char answer[sizeof journal];
  memcpy(answer, journal, sizeof journal);
  journal[0] = 0;
  return answer;
}

static void note(const char* name, const revk_where* where, const void* workspace) {
  const size_t used = strlen(journal);
  snprintf(journal + used, sizeof journal - used, "%s %d %" PRIuPTR " %" PRIuPTR "\n", name,
           where->device, (uintptr_t)where->stream, (uintptr_t)workspace);
}

#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)

static void* own(const char* name) {
  static const char file[] = "librevkernels.so." TEXT(REVK_ABI_VERSION);
  void* const library = dlopen(file, RTLD_NOLOAD | RTLD_NOW);
  void* const function = library != NULL ? dlsym(library, name) : NULL;
  if (function == NULL) abort();
  return function;
}

static revk_where on_host(const revk_where* where) {
  revk_where host = *where;
  host.device = -1;
  host.stream = NULL;
  return host;
}

/* The workspace is proved to be memory, and the norm goes to the host without it. A forward in one
 * pass has none. */
static revk_norm use_workspace(const revk_norm* given, const revk_where* where, int forward) {
  revk_norm norm = *given;
  if (where->device < 0) return norm;
  const int rows = norm.kind == REVK_LAYER_NORM || norm.kind == REVK_RMS_NORM;
  if (forward && (rows || norm.statistics_given)) {
    if (norm.workspace != NULL || norm.workspace_bytes != 0) abort();
    return norm;
  }
  if (norm.workspace == NULL || norm.workspace_bytes != kWorkspace) abort();
  memset(norm.workspace, 0x5a, kWorkspace);
  norm.workspace = NULL;
  norm.workspace_bytes = 0;
  return norm;
}

#define CALL(name, types, ...)                                    \
  const revk_where host = on_host(where);                         \
  if (where->device >= 0) note(#name, where, NULL);               \
  return ((revk_status(*) types)own("revk_" #name))(__VA_ARGS__); \
  (void)0

#define NORM_CALL(name, forward, types, ...)                      \
  const revk_where host = on_host(where);                         \
  const revk_norm norm = use_workspace(given, where, forward);    \
  if (where->device >= 0) note(#name, where, given->workspace);   \
  return ((revk_status(*) types)own("revk_" #name))(__VA_ARGS__); \
  (void)0

typedef const revk_view* V;
typedef const revk_where* W;
typedef const revk_coupling* C;

REVK_API revk_status revk_couple(V y, V x, V f, C coupling, W where) {
  CALL(couple, (V, V, V, C, W), y, x, f, coupling, &host);
}
REVK_API revk_status revk_uncouple(V x, V y, V f, C coupling, W where) {
  CALL(uncouple, (V, V, V, C, W), x, y, f, coupling, &host);
}
REVK_API revk_status revk_reverse_step(V y, V f, V dy, V df, C coupling, W where) {
  CALL(reverse_step, (V, V, V, V, C, W), y, f, dy, df, coupling, &host);
}
REVK_API revk_status revk_accumulate(V totals, V parts, int64_t count, W where) {
  CALL(accumulate, (V, V, int64_t, W), totals, parts, count, &host);
}
REVK_API revk_status revk_norm_act(V h, V x, const revk_norm* given, W where) {
  NORM_CALL(norm_act, 1, (V, V, const revk_norm*, W), h, x, &norm, &host);
}
REVK_API revk_status revk_couple_norm_act(V h, V y, V x, V f, const revk_norm* given, W where) {
  NORM_CALL(couple_norm_act, 1, (V, V, V, V, const revk_norm*, W), h, y, x, f, &norm, &host);
}
REVK_API revk_status revk_uncouple_norm_act(V h, V x, V y, V f, const revk_norm* given, W where) {
  NORM_CALL(uncouple_norm_act, 1, (V, V, V, V, const revk_norm*, W), h, x, y, f, &norm, &host);
}
REVK_API revk_status revk_norm_act_backward(V dx, V base, V dh, V x, const revk_norm* given,
                                            const revk_norm_gradient* gradient, W where) {
  NORM_CALL(norm_act_backward, 0, (V, V, V, V, const revk_norm*, const revk_norm_gradient*, W), dx,
            base, dh, x, &norm, gradient, &host);
}
REVK_API int64_t revk_norm_workspace(V x, const revk_norm* norm, W where) {
  (void)x, (void)norm;
  return where->device >= 0 ? kWorkspace : 0;
}
REVK_API revk_status revk_synchronize(W where) {
  if (where->device >= 0) note("synchronize", where, NULL);
  return REVK_OK;
}
REVK_API const char* revk_cuda_missing(void) { return NULL; }
