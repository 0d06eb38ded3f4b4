// SPDX-License-Identifier: Apache-2.0
// The interface between api.cpp and a backend. Both backends have the same kernels.
//
// api.cpp has checked everything before it calls a kernel, so a kernel need not check again:
// - every struct is this library's own version, whatever version the caller has;
// - every view, and a coupling's `value`, has a known dtype, sizes >= 0, strides >= 0, an aligned
//   pointer and the same shape as the call's other views;
// - a written operand overlaps nothing, itself included, except that `out` may be exactly `x`
//   (data, strides, dtype);
// - `couple`, `uncouple` and `reverse_step` are not called on empty views; `accumulate` may get
//   empty pairs;
// - `coupling` is nullptr for the plain coupling; otherwise rows_per_sample >= 1 and grid_exponent
//   is in range;
// - a coupling's `x` (or `y`) and `out` are both int16 or neither, and no other operand is; with
//   int16, `coupling` has a grid_exponent and may have a `value`, otherwise it has no `value`;
// - strides come in any order: (N, C, H*W) with channel_stride 1 is a channels-last image. A kernel
//   that wants to walk memory in order reorders the dimensions itself; the checksum's index stays
//   the view's row-major index.
//
// For a norm's calls, the further guarantees stand at each field below.
//
// A kernel reports a failure by throwing revk::Error (core/error.h); the guard in api.cpp turns it
// into a status.
#pragma once

#include "revkernels/revkernels.h"

namespace revk {

// Layer and RMS norm: one set of statistics per position, over its channels.
inline bool over_channels(const revk_norm& norm) {
  return norm.kind == REVK_LAYER_NORM || norm.kind == REVK_RMS_NORM;
}

// h = activation(norm(s)). Without f, s is read (norm_act). With f, s = x + f or x - f is written
// first, in x's place or elsewhere, and h is computed from s as stored. Not called on empty views.
struct NormActCall {
  revk_view h, s;
  revk_view x, f;  // may differ in dtype and strides; unused without coupling
  enum Coupling { kNone, kCouple, kUncouple } coupling;
  // Pointers are aligned. The workspace is large enough, except for single-pass calls (statistics
  // over channels, or given), which need none. groups is 0 except for a group norm.
  revk_norm norm;
  int32_t compute_dtype;  // REVK_FLOAT32 or REVK_FLOAT64
};

// dx = base + gradient. Not called on empty views.
struct NormActBackwardCall {
  revk_view dx;    // unused if gradient.sums is REVK_SUMS_ONLY
  revk_view base;  // data NULL: zero. base, or a batch norm's dh, may be exactly dx
  revk_view dh, x;
  revk_norm norm;
  revk_norm_gradient gradient;  // count >= 1
  int32_t compute_dtype;
};

namespace cpu {
void couple(const revk_view& out, const revk_view& x, const revk_view& f,
            const revk_coupling* coupling, const revk_where& where);
void uncouple(const revk_view& out, const revk_view& y, const revk_view& f,
              const revk_coupling* coupling, const revk_where& where);
void reverse_step(const revk_view& y, const revk_view& f, const revk_view& dy, const revk_view& df,
                  const revk_coupling* coupling, const revk_where& where);
void accumulate(const revk_view* totals, const revk_view* parts, int64_t count,
                const revk_where& where);
void norm_act(const NormActCall& call, const revk_where& where);
void norm_act_backward(const NormActBackwardCall& call, const revk_where& where);
const char* isa();               // the name of the instruction set in use
bool set_isa(const char* name);  // for tests: false if this machine or build lacks them
}  // namespace cpu

namespace cuda {
void couple(const revk_view& out, const revk_view& x, const revk_view& f,
            const revk_coupling* coupling, const revk_where& where);
void uncouple(const revk_view& out, const revk_view& y, const revk_view& f,
              const revk_coupling* coupling, const revk_where& where);
void reverse_step(const revk_view& y, const revk_view& f, const revk_view& dy, const revk_view& df,
                  const revk_coupling* coupling, const revk_where& where);
void accumulate(const revk_view* totals, const revk_view* parts, int64_t count,
                const revk_where& where);
void norm_act(const NormActCall& call, const revk_where& where);
void norm_act_backward(const NormActBackwardCall& call, const revk_where& where);
int64_t norm_workspace(const revk_view& x, const revk_norm& norm, const revk_where& where);
void synchronize(const revk_where& where);
// nullptr if kernels can run here; otherwise the reason, as a static string.
const char* missing();
const char* archs();  // "80;90;100;ptx100" as compiled; "" in a build without CUDA
}  // namespace cuda

}  // namespace revk

// Exported for the Python module's tests. Not part of the C interface, hence the other prefix.
extern "C" REVK_API bool revktest_set_isa(const char* name);
