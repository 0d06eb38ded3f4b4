// SPDX-License-Identifier: Apache-2.0
// Exceptions inside the library; statuses and the thread's error text at the C boundary.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "revkernels/revkernels.h"

namespace revk {

class Error : public std::runtime_error {
 public:
  Error(revk_status status, const std::string& text) : std::runtime_error(text), status(status) {}
  const revk_status status;
};

inline Error invalid(const std::string& text) { return Error(REVK_INVALID_ARGUMENT, text); }
inline Error unsupported(const std::string& text) { return Error(REVK_UNSUPPORTED, text); }
inline Error cuda_error(const std::string& text) { return Error(REVK_CUDA_ERROR, text); }

// Runs the body of one extern "C" entry; no exception crosses the C boundary. Success leaves
// `last_error` untouched, so that a caller may read it after a batch of calls.
template <class Body>
revk_status guard(std::string& last_error, Body&& body) noexcept {
  const auto remember = [&last_error](const char* text) noexcept {
    try {
      last_error = text;
    } catch (...) {
      last_error.clear();  // no memory left even for the text
    }
  };
  try {
    std::forward<Body>(body)();
    return REVK_OK;
  } catch (const Error& error) {
    remember(error.what());
    return error.status;
  } catch (const std::exception& error) {
    remember(error.what());
    return REVK_INTERNAL_ERROR;
  } catch (...) {
    remember("unknown C++ exception");
    return REVK_INTERNAL_ERROR;
  }
}

}  // namespace revk
