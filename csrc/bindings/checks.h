// SPDX-License-Identifier: Apache-2.0
// Shared by the bindings of all kernels: checks with the Python caller's argument names, device and
// stream of a call, and statuses as exceptions.
#pragma once

#include <optional>

#include "bindings/arrays.h"

namespace revk::python {

// Below this many elements a call takes less time than handing over the interpreter lock.
constexpr int64_t kKeepLock = 32 * 1024;

void raise_on_error(revk_status status);

// check_together: both on one device, and from compatible libraries. torch's tensors and CuPy's
// arrays go only with their own kind, because each library has its own stream; all others go
// together. check_alike: also of one shape.
void check_together(const Array& leader, const Array& other);
void check_alike(const Array& leader, const Array& other);
void check_writable(const Array& written);
void check_written(const Array& written);
void check_apart(const Array& written, const Array& other);

revk_where where_of(const Array& written, int64_t elements);
// Ends a call: synchronises if the arrays' library cannot know when the kernels are done, and
// raises the call's error.
void finish(revk_status status, const Array& written, const revk_where& where);

// Host threads for arrays of libraries without such a setting; 0: the OpenMP default.
void set_threads(int32_t threads);
int32_t threads();

// Releases the interpreter lock: kernels do not call into Python, so other Python threads may run.
class Unlocked {
 public:
  explicit Unlocked(bool large) {
    if (large) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};
inline bool is_long(const Array& written, int64_t elements) {
  return written.device >= 0 || elements >= kKeepLock;
}

}  // namespace revk::python
