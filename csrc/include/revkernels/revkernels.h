/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface of revkernels: reversible residual networks (Gomez et al., NeurIPS 2017).
 *
 * Plain C99. Nothing here knows a framework: memory is a pointer with a shape and strides, a place
 * is a device with a stream. Every function checks its arguments before it writes anything, returns
 * a status, and leaves the reason for a failure in revk_last_error(). All functions may be called
 * from any thread.
 */
#ifndef REVKERNELS_REVKERNELS_H_
#define REVKERNELS_REVKERNELS_H_

#include <stdint.h>

#if defined(_WIN32)
#define REVK_API __declspec(dllexport)
#else
#define REVK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define REVK_ABI_VERSION 1

typedef enum revk_status {
  REVK_OK = 0,
  REVK_INVALID_ARGUMENT = 1, /* the caller's mistake; nothing was written */
  REVK_UNSUPPORTED = 2,      /* this build or this machine cannot do it; nothing was written */
  REVK_CUDA_ERROR = 3,       /* the CUDA runtime refused */
  REVK_INTERNAL_ERROR = 4    /* out of memory, or a fault in the library */
} revk_status;

typedef enum revk_dtype {
  REVK_FLOAT64 = 0,
  REVK_FLOAT32 = 1,
  REVK_BFLOAT16 = 2,
  REVK_FLOAT16 = 3
} revk_dtype;

/* Every struct begins with its own size, so that later versions can add fields at the end: zero the
 * struct, then set struct_size = sizeof(the struct). A newer library takes the fields that its
 * caller's header lacks as zero, and zero keeps the old meaning. An older library accepts a larger
 * struct as long as the fields that it does not know are zero; otherwise it answers
 * REVK_UNSUPPORTED. */

/* An array seen as (outer, channels, inner). Strides count elements and are not negative. A dense
 * array of n elements may be given as (1, 1, n); an NCHW image is (N, C, H*W), a channels-last
 * image or rows of tokens (N*H*W, C, 1). */
typedef struct revk_view {
  int32_t struct_size;
  int32_t dtype; /* a revk_dtype */
  void* data;
  int64_t outer, channels, inner;
  int64_t outer_stride, channel_stride, inner_stride;
} revk_view;

/* Where the memory lies and what runs the work. */
typedef struct revk_where {
  int32_t struct_size;
  int32_t device;  /* -1: host memory; otherwise the CUDA device's index */
  void* stream;    /* a cudaStream_t; NULL is the default stream. Unused on the host */
  int32_t threads; /* host threads; 0: the OpenMP default. Results never depend on it */
} revk_where;

#define REVK_NO_GRID INT32_MIN

/* What a coupling does to f on its way, and what it reports of the result. NULL in place of the
 * struct is the plain coupling. The addition is made in float64 if either operand is float64, else
 * in float32, and rounded once.
 *
 *     f'     = rint(channel_scale[c] * sample_scale[o / rows_per_sample] * f * 2^k) * 2^-k
 *     result = x + f'   (couple)      or      y - f'   (uncouple, reverse_step)
 */
typedef struct revk_coupling {
  int32_t struct_size;
  int32_t grid_exponent; /* k, -126..126; REVK_NO_GRID leaves f as it is */
  /* Layer scale, [channels], and stochastic depth, [outer / rows_per_sample]. NULL: 1. Both are
   * float64 if either operand is float64, else float32. */
  const void* channel_scale;
  const void* sample_scale;
  int64_t rows_per_sample; /* rows of `outer` that share one sample_scale; 0 counts as 1 */
  /* Both live where the views live, are added to (the caller zeroes them), and may be NULL:
   * checksum += sum over i of bits(result[i]) * (2*i + 1) modulo 2^64, i the row-major index in the
   * view, bits() the stored element as an unsigned integer;
   * amax = max(amax, |result[i]|), NaN if any result is NaN. */
  uint64_t* checksum;
  float* amax;
} revk_coupling;

/* y = x + f   (paper eq. 6, forward). y may be x itself: then the work is done in place. Shapes are
 * equal; dtypes and strides may differ. */
REVK_API revk_status revk_couple(const revk_view* y, const revk_view* x, const revk_view* f,
                                 const revk_coupling* coupling, const revk_where* where);

/* x = y - f   (paper eq. 7, inverse). x may be y itself. */
REVK_API revk_status revk_uncouple(const revk_view* x, const revk_view* y, const revk_view* f,
                                   const revk_coupling* coupling, const revk_where* where);

/* y <- y - f and dy <- dy + df in one pass (Algorithm 1, lines 4-5 and 6-7). `coupling` acts on f
 * alone. */
REVK_API revk_status revk_reverse_step(const revk_view* y, const revk_view* f, const revk_view* dy,
                                       const revk_view* df, const revk_coupling* coupling,
                                       const revk_where* where);

/* totals[i] <- totals[i] + parts[i] for i in 0..count-1; all of them in as few launches as the
 * device allows. The views of a list share one struct_size. */
REVK_API revk_status revk_accumulate(const revk_view* totals, const revk_view* parts, int64_t count,
                                     const revk_where* where);

/* This thread's last failure, in words; "" if there was none. Never NULL. */
REVK_API const char* revk_last_error(void);

/* REVK_ABI_VERSION of the library. */
REVK_API int32_t revk_abi_version(void);
/* "0.1.0" */
REVK_API const char* revk_version(void);
/* "avx512", "avx2" or "baseline": the loops in use on this machine. */
REVK_API const char* revk_cpu_isa(void);
/* "80;90;100;ptx100" as compiled; "" in a build without CUDA. */
REVK_API const char* revk_cuda_archs(void);
/* NULL if CUDA kernels can run here; otherwise why not, in words (not compiled, no driver, no
 * device). */
REVK_API const char* revk_cuda_missing(void);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* REVKERNELS_REVKERNELS_H_ */
