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

#if defined(_WIN32) && defined(revkernels_EXPORTS) /* CMake sets it where the library is built */
#define REVK_API __declspec(dllexport)
#elif defined(_WIN32)
#define REVK_API __declspec(dllimport)
#else
#define REVK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows with a change after which programs must be compiled again. The library's file name carries
 * it (librevkernels.so.1), and so do its symbols' versions (REVK_1). Added functions, fields and
 * values of an enum are no such change. */
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
  REVK_FLOAT16 = 3,
  REVK_INT16 = 4 /* fixed point; only the stream of a coupling that has a grid_exponent */
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
/* Start values: revk_coupling coupling = REVK_COUPLING_INIT. One that is zeroed instead has the
 * grid_exponent 0, which rounds f to whole numbers. */
#define REVK_COUPLING_INIT {(int32_t)sizeof(revk_coupling), REVK_NO_GRID, 0, 0, 0, 0, 0, 0}

/* What a coupling does to f on its way, and what it reports of the result. NULL in place of the
 * struct is the plain coupling. The addition is made in float64 if either operand is float64, else
 * in float32, and rounded once.
 *
 *     f'     = rint(channel_scale[c] * sample_scale[o / rows_per_sample] * f * 2^k) * 2^-k
 *     result = x + f'   (couple)      or      y - f'   (uncouple, reverse_step)
 *
 * With a grid_exponent the stream, that is x (or y) and the result, may be REVK_INT16: a stored q
 * stands for the number q * 2^-k. f, dy and df stay floating-point. With A = float64 if f is
 * float64, else float32,
 *
 *     n      = rint(channel_scale[c] * sample_scale[o / rows_per_sample] * f * 2^k)      in A
 *     m      = n; 0 if n is NaN, -2^23 or 2^23 if n lies beyond these                an integer
 *     result = q + m   (couple)       or      q - m   (uncouple, reverse_step)
 *
 * modulo 2^16, in two's complement, so that uncouple gives back every bit that couple was given,
 * even of what wrapped.
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
   * amax = max(amax, |result[i]|), NaN if any result is NaN. Of an int16 stream the result is meant
   * before it wraps, and with n in m's place: |A(q) + n| * 2^-k, or |A(q) - n| * 2^-k, the sum and
   * the product each rounded in A, the product then to float32. Where the stream wraps, that is
   * more than 32767 * 2^-k; where it does not, only -32768 is. */
  uint64_t* checksum;
  float* amax;
  /* For int16 streams; NULL: none. A floating-point view of the result's shape, anywhere apart from
   * all other memory of the call. It receives result * 2^-k, rounded once to its dtype. */
  const revk_view* value;
} revk_coupling;

/* y = x + f   (paper eq. 6, forward). y may be x itself: then the work is done in place. Shapes are
 * equal; dtypes and strides may differ. */
REVK_API revk_status revk_couple(const revk_view* y, const revk_view* x, const revk_view* f,
                                 const revk_coupling* coupling, const revk_where* where);

/* x = y - f   (paper eq. 7, inverse). x may be y itself. */
REVK_API revk_status revk_uncouple(const revk_view* x, const revk_view* y, const revk_view* f,
                                   const revk_coupling* coupling, const revk_where* where);

/* y <- y - f and dy <- dy + df in one pass (Algorithm 1, lines 3 to 6: 3 and 5 of one
 * half of a block, 4 and 6 of the other). `coupling` acts on f alone. */
REVK_API revk_status revk_reverse_step(const revk_view* y, const revk_view* f, const revk_view* dy,
                                       const revk_view* df, const revk_coupling* coupling,
                                       const revk_where* where);

/* totals[i] <- totals[i] + parts[i] for i in 0..count-1; all of them in as few launches as the
 * device allows. The views of a list share one struct_size. */
REVK_API revk_status revk_accumulate(const revk_view* totals, const revk_view* parts, int64_t count,
                                     const revk_where* where);

/* Normalisation and activation, the neighbours of a coupling in a pre-activation branch:
 *
 *     xhat = (x - mean) * rstd          rstd = 1 / sqrt(variance + eps), variance biased
 *     z    = xhat * weight + bias
 *     h    = activation(z)
 *
 * Each operation rounds, in the compute type: float64 if x or f is float64, else float32. h is
 * rounded once to its view's dtype. The mean of an RMS norm is 0 and its variance the mean of x^2.
 * Sums over many elements keep their precision where the mean is large against the deviation, and
 * come out the same for any number of threads. */
typedef enum revk_norm_kind {
  REVK_BATCH_NORM = 0, /* a channel's statistics, over outer and inner */
  REVK_LAYER_NORM = 1, /* those of one (outer, inner), over channels */
  REVK_RMS_NORM = 2,   /* likewise, without a mean */
  REVK_GROUP_NORM = 3  /* those of one (outer, group), over the group's channels and inner */
} revk_norm_kind;

typedef enum revk_activation {
  REVK_IDENTITY = 0,
  REVK_RELU = 1,
  REVK_GELU = 2,      /* z * Phi(z) */
  REVK_GELU_TANH = 3, /* z/2 * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z^3))) */
  REVK_SILU = 4       /* z / (1 + exp(-z)) */
} revk_activation;

typedef struct revk_norm {
  int32_t struct_size;
  int32_t kind;       /* a revk_norm_kind */
  int32_t activation; /* a revk_activation */
  int32_t groups;     /* of a group norm: a divisor of channels. 0 otherwise */
  double eps;
  const void* weight; /* [channels], dense; NULL: 1 */
  const void* bias;   /* [channels], dense; NULL: 0 */
  /* Statistics, of the compute type: [channels] dense, for a group norm [outer][groups] dense, for
   * layer and RMS norm one for each (outer, inner) at the two strides below (in elements). The mean
   * of an RMS norm is NULL. */
  void* mean;
  void* rstd;
  int64_t statistics_outer_stride, statistics_inner_stride;
  /* Batch norm with statistics computed: running <- (1 - momentum) * running + momentum * batch,
   * the variance unbiased (n / (n - 1)). [channels], dense; both NULL: none are kept. */
  void* running_mean;
  void* running_var;
  double momentum;
  int32_t parameter_dtype;  /* of weight and bias */
  int32_t running_dtype;    /* of running_mean and running_var */
  int32_t statistics_given; /* 0: mean and rstd are computed and written; 1: they are read */
  int32_t reserved;         /* 0 */
  /* Memory for partial results on the device, revk_norm_workspace() bytes; NULL if that is 0. */
  void* workspace;
  int64_t workspace_bytes;
} revk_norm;

typedef enum revk_norm_sums {
  REVK_SUMS_COMPUTED = 0, /* dweight and dbias are computed, written and used */
  REVK_SUMS_ONLY = 1,     /* they are computed and written, and no dx: the first half of a batch
                             norm whose batch is spread over processes */
  REVK_SUMS_GIVEN = 2     /* they are read: the second half */
} revk_norm_sums;

/* Gradients of a norm's parameters, of the compute type, [channels], dense:
 *     dz = dh * activation'(z)        dweight = sum of dz * xhat        dbias = sum of dz */
typedef struct revk_norm_gradient {
  int32_t struct_size;
  int32_t sums;  /* a revk_norm_sums; other than REVK_SUMS_COMPUTED for a batch norm alone */
  void* dweight; /* never NULL for a batch norm; NULL elsewhere: not wanted */
  void* dbias;
  int64_t count;    /* elements behind given sums, of one channel; 0: those of the view */
  int32_t constant; /* 1: the statistics do not depend on x (batch norm in evaluation) */
  int32_t reserved; /* 0 */
} revk_norm_gradient;

/* h = activation(norm(x)). h is apart from x. */
REVK_API revk_status revk_norm_act(const revk_view* h, const revk_view* x, const revk_norm* norm,
                                   const revk_where* where);

/* y = x + f, h = activation(norm(y)), y as it was stored: the same bits as revk_couple and then
 * revk_norm_act. y may be x itself. */
REVK_API revk_status revk_couple_norm_act(const revk_view* h, const revk_view* y,
                                          const revk_view* x, const revk_view* f,
                                          const revk_norm* norm, const revk_where* where);

/* x = y - f, h = activation(norm(x)). x may be y itself. */
REVK_API revk_status revk_uncouple_norm_act(const revk_view* h, const revk_view* x,
                                            const revk_view* y, const revk_view* f,
                                            const revk_norm* norm, const revk_where* where);

/* dx = base + the gradient of x, dh that of h; `norm` with the forward's statistics, given.
 * base NULL is 0; base may be dx itself: the gradient is then accumulated (Algorithm 1, lines 5 and
 * 6). So may dh, of a batch norm. With m(.) the mean over the elements that share the statistics,
 * and g = weight * dz,
 *
 *     gradient = rstd * (g - m(g) - xhat * m(g * xhat))
 *
 * (RMS norm: without m(g); constant statistics: rstd * g). dx is NULL for REVK_SUMS_ONLY. The
 * compute type is float64 if x is float64, else float32. */
REVK_API revk_status revk_norm_act_backward(const revk_view* dx, const revk_view* base,
                                            const revk_view* dh, const revk_view* x,
                                            const revk_norm* norm,
                                            const revk_norm_gradient* gradient,
                                            const revk_where* where);

/* Bytes of norm->workspace that any of the above needs for such an x; 0 on the host. -1 if an
 * argument is wrong. Of the forwards, those of layer and RMS norm and those with statistics given
 * need none at all. */
REVK_API int64_t revk_norm_workspace(const revk_view* x, const revk_norm* norm,
                                     const revk_where* where);

/* Returns when all work on where's stream is done; at once for the host, whose calls have done
 * theirs. For callers that have nothing to order their own work with. Not while the stream is being
 * captured into a graph. */
REVK_API revk_status revk_synchronize(const revk_where* where);

/* This thread's last failure, in words; "" if there was none. Never NULL. A success leaves it as it
 * is; it lives until the thread's next failure, or the thread's end. */
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
