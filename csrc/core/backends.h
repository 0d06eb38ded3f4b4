// SPDX-License-Identifier: Apache-2.0
// What api.cpp asks of a backend. Both backends have the same kernels.
//
// api.cpp has checked everything before a kernel is called, so a kernel need not look again:
// - every struct is this library's own version, whatever version the caller has;
// - every view, a coupling's `value` too, has a known dtype, sizes >= 0, strides >= 0, an aligned
// pointer, and one shape with
//   its fellows;
// - a written operand overlaps nothing, itself included, except that `out` may be `x` exactly
//   (data, strides, dtype);
// - `couple`, `uncouple` and `reverse_step` are not called on empty views; in `accumulate`, single
//   pairs may be empty;
// - `coupling` is nullptr for the plain coupling; otherwise rows_per_sample >= 1 and grid_exponent
//   is in range;
// - a coupling's `x` (or `y`) and `out` are int16 both or neither, and nothing else is; with int16,
//   `coupling` has a grid_exponent, and a `value` only then;
// - strides come in any order: (N, C, H*W) with channel_stride 1 is an image in channels-last
//   memory. A kernel that wants to walk memory in order reorders the dimensions itself; the
//   checksum's index stays the view's row-major one.
//
// In a norm's calls: what api.cpp has checked besides is written beside each field below.
//
// A kernel reports a failure by throwing revk::Error (core/error.h); the guard in api.cpp turns it
// into a status.
#pragma once

#include "revkernels/revkernels.h"

namespace revk {

// Layer and RMS norm: statistics of every position, over its channels.
inline bool over_channels(const revk_norm& norm) {
  return norm.kind == REVK_LAYER_NORM || norm.kind == REVK_RMS_NORM;
}

// h = activation(norm(s)). Without f, s is read (norm_act). With f, s = x + f or x - f is written
// first, in x's place or apart, and h is made of s as it was stored. Not called on empty views.
struct NormActCall {
  revk_view h, s;
  revk_view x, f;  // dtype and strides of their own; unused without coupling
  enum Coupling { kNone, kCouple, kUncouple } coupling;
  // Pointers aligned, workspace large enough unless one pass does it all: over channels, or with
  // statistics given; groups 0 but of a group norm.
  revk_norm norm;
  int32_t compute_dtype;  // REVK_FLOAT32 or REVK_FLOAT64
};

// dx = base + gradient. Not called on empty views.
struct NormActBackwardCall {
  revk_view dx;    // unused if gradient.sums is REVK_SUMS_ONLY
  revk_view base;  // data NULL: zero. May be dx exactly, and so may dh of a batch norm
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
const char* isa();               // the name of the loops in use
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
// nullptr if kernels can run here; otherwise why not. The text lives as long as the library.
const char* missing();
const char* archs();  // "80;90;100;ptx100" as compiled; "" in a build without CUDA
}  // namespace cuda

}  // namespace revk

// Exported for the Python module's tests. No part of the C interface, hence another prefix.
extern "C" REVK_API bool revktest_set_isa(const char* name);
