// SPDX-License-Identifier: Apache-2.0
// The CUDA tests on the host as a program: those that are
// linked with this, all of them or the ones that are named.
#include "cuda_test.h"

int main(int count, char** names) { return test::run(count, names); }
