// SPDX-License-Identifier: Apache-2.0
// Shared by all extern "C" entries: the thread's error text, and the checks of revk_where.
#pragma once

#include <string>

#include "core/backends.h"
#include "core/error.h"
#include "core/structs.h"

namespace revk {

// This thread's last error text, shared by all entries in all files.
inline std::string& last_error() {
  thread_local std::string text;
  return text;
}

inline revk_where read_where(const revk_where* given) {
  if (given == nullptr) throw invalid("where is NULL, a revk_where is needed");
  const revk_where where = read_struct<revk_where>("where", given);
  if (where.device < -1)
    throw invalid("where: device is " + std::to_string(where.device) +
                  ", -1 (the host) or a CUDA device's index is needed");
  if (where.threads < 0)
    throw invalid("where: threads is " + std::to_string(where.threads) + ", 0 or more is needed");
  if (where.device >= 0) {
    const char* const reason = cuda::missing();
    if (reason != nullptr) throw unsupported(std::string("CUDA cannot run here: ") + reason);
  }
  return where;
}

}  // namespace revk
