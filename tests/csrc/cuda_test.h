// SPDX-License-Identifier: Apache-2.0
// A named test that counts its failures. No framework, so that g++ alone is enough.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace test {

inline int failures = 0, checks = 0;
struct Test {
  std::string name;
  std::function<void()> body;
  bool unasked;  // runs when no name is given
};
inline std::vector<Test> all;

inline void expect(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

struct Register {
  Register(const char* name, std::function<void()> body, bool unasked = true) {
    all.push_back({name, std::move(body), unasked});
  }
};

// Runs the tests whose name is given, or all of them.
// 0 if all checks held and there was at least one.
inline int run(int count, char** names) {
  for (auto& [name, body, unasked] : all) {
    bool wanted = count < 2 && unasked;
    for (int i = 1; i < count; ++i) wanted = wanted || name == names[i];
    if (!wanted) continue;
    const int before = failures, checks_before = checks;
    shim::machine = {};
    body();
    std::printf("%-28s %6d checks, %d failed\n", name.c_str(), checks - checks_before,
                failures - before);
  }
  return failures || !checks ? 1 : 0;
}

}  // namespace test
