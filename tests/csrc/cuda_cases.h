// SPDX-License-Identifier: Apache-2.0
// Layouts with every kind of trouble, for the tests of the couplings.
#pragma once

#include "cuda_oracle.h"

namespace cases {

using oracle::kTypes;
using oracle::Shape;
using oracle::Strides;
using oracle::where;

struct Case {
  const char* name;
  Shape shape;
  Strides stream, branch;
};

inline Strides dense(Shape shape, int64_t offset = 0) {
  return {shape.channels * shape.inner, shape.inner, 1, offset};
}
inline Case dense_case(const char* name, Shape shape) {
  return {name, shape, dense(shape), dense(shape)};
}
inline Case same_strides(const char* name, Shape shape, Strides strides) {
  return {name, shape, strides, strides};
}

const Case kCases[] = {
    dense_case("one element", {1, 1, 1}),
    dense_case("under a packet", {1, 1, 3}),
    dense_case("one packet", {1, 1, 8}),
    dense_case("packet and tail", {1, 1, 9}),
    dense_case("a block and tail", {1, 1, 2055}),
    dense_case("three dimensions", {2, 3, 16}),
    dense_case("rows of tokens", {6, 24, 1}),
    dense_case("rows of 6 channels", {8, 6, 1}),
    dense_case("three odd dimensions", {4, 5, 3}),
    same_strides("NCHW, second half", {3, 4, 16}, {128, 16, 1, 64}),
    same_strides("NCHW 7x7, second half", {2, 8, 49}, {784, 49, 1, 392}),
    same_strides("NCHW 5x1, odd half", {2, 3, 5}, {30, 5, 1, 15}),
    same_strides("channels-last half", {12, 16, 1}, {32, 1, 1, 16}),
    same_strides("channels-last odd half", {10, 3, 1}, {6, 1, 1, 3}),
    same_strides("channels-last as NCHW", {2, 8, 9}, {72, 1, 8, 0}),
    {"half += dense", {4, 4, 16}, {128, 16, 1, 64}, {64, 16, 1, 0}},
    {"NCHW += channels-last", {2, 8, 6}, {48, 6, 1, 0}, {48, 1, 8, 0}},
    same_strides("cropped image", {3, 4, 16}, {192, 32, 1, 0}),
    same_strides("cropped, with tails", {2, 5, 20}, {256, 32, 1, 32}),
    same_strides("misaligned", {1, 1, 1000}, {1000, 1000, 1, 1}),
    {"branch misaligned", {1, 1, 300}, {300, 300, 1, 0}, {300, 300, 1, 1}},
    same_strides("rows misaligned", {1, 7, 33}, {231, 33, 1, 0}),
    same_strides("row stride misaligned", {2, 3, 16}, {51, 17, 1, 0}),
    same_strides("every second", {2, 3, 10}, {60, 20, 2, 0}),
    {"branch one a channel", {4, 8, 16}, {128, 16, 1, 0}, {0, 1, 0, 0}},
    {"branch one a row", {4, 8, 16}, {128, 16, 1, 0}, {0, 0, 1, 0}},
    same_strides("odd strides of size 1", {1, 5, 1}, {7, 3, 11, 0}),
};

}  // namespace cases
