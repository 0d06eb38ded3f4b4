// SPDX-License-Identifier: Apache-2.0
// Strided memory of any dtype as dense rows of the compute type, compiled once per instruction set.
//
// A tile's operands are used in place if they are dense and of the compute type. Otherwise they
// pass through a buffer in L1, widened on the way in and narrowed on the way out. So the arithmetic
// is one vectorised loop over floats or doubles, and a combination of dtypes costs a load, not a
// template.
//
// Nothing of the standard library is instantiated here: the linker could keep an inline function
// compiled with AVX-512 for every file.
#pragma once

#include <stdint.h>

#if defined(__F16C__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/scalar.h"
#include "cpu/job.h"
#include "revkernels/revkernels.h"

#if defined(__clang__)
#define REVK_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define REVK_INDEPENDENT _Pragma("GCC ivdep")
#endif

// For loops over a tile: inlined into the functions that walk the tiles they would run out of
// registers.
#define REVK_APART __attribute__((noinline))

namespace revk::cpu::REVK_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Dense rows

// ask_ahead prefetches kAhead bytes ahead in a row. Without it a loop keeps fewer cache lines in
// flight than memory could deliver: as many loads as fit into the out-of-order window, and hardly
// any of the lines that it writes (Zen 3: 0.58 ns per element for such a loop writing to uncached
// memory, 0.35 to 0.40 with the prefetch).
constexpr int64_t kAhead = 2048, kLine = 64;

template <class T>
inline void ask_ahead(const T* row, int64_t count) {
  const char* const ahead = reinterpret_cast<const char*>(row) + kAhead;
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += kLine) __builtin_prefetch(ahead + i);
}

// Calls body(begin, end) for a row's elements in chunks of 1024 bytes, or for narrow types as many
// elements as of float. Prefetching more lines at once makes them wait for each other (float64 on
// Zen 3: a tenth of a coupling's time). `rows` are the rows to prefetch.
template <class... T>
constexpr int64_t elements_in_a_chunk() {
  int64_t size = sizeof(float);
  ((size = int64_t(sizeof(T)) > size ? int64_t(sizeof(T)) : size), ...);
  return 1024 / size;
}

template <class Body, class... T>
inline void in_chunks(int64_t count, Body&& body, const T*... rows) {
  constexpr int64_t kChunk = elements_in_a_chunk<T...>();
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = least(begin + kChunk, count);
    (ask_ahead(rows + begin, end - begin), ...);
    body(begin, end);
  }
}

template <class A, class T>
inline A widen_to(T value) {
  return A(widen(value));
}

template <class A, class T>
inline void widen_row(A* to, const T* from, int64_t count) {
  REVK_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] = widen_to<A>(from[i]);
}

template <class T, class A>
inline void narrow_row(T* to, const A* from, int64_t count) {
  REVK_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(from[i]);
}

#if defined(__AVX512F__)
inline __mmask16 first_of_16(int64_t count) { return __mmask16((1u << count) - 1u); }
#endif

#if defined(__F16C__)
// The conversion instructions round like scalar.h. The row's last elements go through scalar.h, or
// through a masked vector.
inline void widen_row(float* to, const float16* from, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(
        to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  const __mmask16 rest = first_of_16(count - i);
  _mm512_mask_storeu_ps(to + i, rest, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, from + i)));
#else
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; ++i) to[i] = widen(from[i]);
#endif
}

inline void narrow_row(float16* to, const float* from, int64_t count) {
  constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from + i), kNearestEven));
  const __mmask16 rest = first_of_16(count - i);
  _mm256_mask_storeu_epi16(to + i, rest,
                           _mm512_cvtps_ph(_mm512_maskz_loadu_ps(rest, from + i), kNearestEven));
#else
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearestEven));
  for (; i < count; ++i) to[i] = narrow<float16>(from[i]);
#endif
}
#endif

// Tiles

struct Shape {
  int64_t rows, cols;
};

// A tile in the compute type: rows of unit stride.
template <class A>
struct Rows {
  A* data;
  int64_t step;  // elements from row to row
};

template <class A, class T>
void gather(A* to, const char* from, const int64_t* step, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r, from += step[1], to += shape.cols) {
    if (step[2] == int64_t(sizeof(T))) {
      widen_row(to, reinterpret_cast<const T*>(from), shape.cols);
    } else {
      const char* at = from;
      for (int64_t c = 0; c < shape.cols; ++c, at += step[2])
        to[c] = widen_to<A>(*reinterpret_cast<const T*>(at));
    }
  }
}

template <class T, class A>
void scatter(char* to, const A* from, const int64_t* step, Shape shape) {
  for (int64_t r = 0; r < shape.rows; ++r, to += step[1], from += shape.cols) {
    if (step[2] == int64_t(sizeof(T))) {
      narrow_row(reinterpret_cast<T*>(to), from, shape.cols);
    } else {
      char* at = to;
      for (int64_t c = 0; c < shape.cols; ++c, at += step[2])
        *reinterpret_cast<T*>(at) = narrow<T>(from[c]);
    }
  }
}

template <class A>
constexpr int32_t kDtypeOf = sizeof(A) == 8 ? REVK_FLOAT64 : REVK_FLOAT32;

template <class A>
inline bool usable_in_place(const Operand& operand) {
  return operand.dtype == kDtypeOf<A> && operand.step[2] == int64_t(sizeof(A)) &&
         operand.step[1] % int64_t(sizeof(A)) == 0;
}

// A float64 operand of a coupling makes the arithmetic float64; a gradient of float64 does not.
inline void gather_any(double* to, const char* from, const Operand& operand, Shape shape) {
  switch (operand.dtype) {
    case REVK_FLOAT64:
      return gather<double, double>(to, from, operand.step, shape);
    case REVK_FLOAT32:
      return gather<double, float>(to, from, operand.step, shape);
    case REVK_BFLOAT16:
      return gather<double, bfloat16>(to, from, operand.step, shape);
    default:
      return gather<double, float16>(to, from, operand.step, shape);
  }
}
inline void gather_any(float* to, const char* from, const Operand& operand, Shape shape) {
  switch (operand.dtype) {
    case REVK_FLOAT64:
      return gather<float, double>(to, from, operand.step, shape);
    case REVK_FLOAT32:
      return gather<float, float>(to, from, operand.step, shape);
    case REVK_BFLOAT16:
      return gather<float, bfloat16>(to, from, operand.step, shape);
    default:
      return gather<float, float16>(to, from, operand.step, shape);
  }
}

template <class A>
inline void scatter_any(char* to, const A* from, const Operand& operand, Shape shape) {
  switch (operand.dtype) {
    case REVK_FLOAT64:
      return scatter<double>(to, from, operand.step, shape);
    case REVK_FLOAT32:
      return scatter<float>(to, from, operand.step, shape);
    case REVK_BFLOAT16:
      return scatter<bfloat16>(to, from, operand.step, shape);
    default:
      return scatter<float16>(to, from, operand.step, shape);
  }
}

template <class A>
inline Rows<const A> load(const Operand& operand, const char* at, Shape shape, A* buffer,
                          bool copy) {
  if (!copy && usable_in_place<A>(operand))
    return {reinterpret_cast<const A*>(at), operand.step[1] / int64_t(sizeof(A))};
  gather_any(buffer, at, operand, shape);
  return {buffer, shape.cols};
}

template <class A, class Op>
inline void combine(Op op, Rows<A> out, Rows<const A> x, Rows<const A> f, Shape shape) {
  if (out.step == shape.cols && x.step == shape.cols && f.step == shape.cols)
    shape = {1, shape.rows * shape.cols};
  for (int64_t r = 0; r < shape.rows; ++r) {
    A* const to = out.data + r * out.step;
    const A* const from = x.data + r * x.step;
    const A* const branch = f.data + r * f.step;
    const auto chunk = [&](int64_t begin, int64_t end) {
      // `to` is `from` itself or does not overlap it.
      REVK_INDEPENDENT
      for (int64_t c = begin; c < end; ++c) to[c] = op(from[c], branch[c]);
    };
    if (to == from)
      in_chunks(shape.cols, chunk, from, branch);
    else
      in_chunks(shape.cols, chunk, from, branch, to);
  }
}

// Copies bytes from L1 with streaming stores, which do not read a line before overwriting it. The
// writer calls end_stream() before other threads may read.
inline void stream_row(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = least(-reinterpret_cast<intptr_t>(to) & (kLine - 1), bytes);
  __builtin_memcpy(to, from, size_t(head));
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    for (int64_t k = i; k < i + kLine; k += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k)));
#endif
  }
  __builtin_memcpy(to + i, from + i, size_t(bytes - i));
#else
  __builtin_memcpy(to, from, size_t(bytes));
#endif
}

inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace revk::cpu::REVK_ISA
