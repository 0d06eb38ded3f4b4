// SPDX-License-Identifier: Apache-2.0
// What the bindings of all kernels share: checks under the names that the Python caller knows, the
// call's surroundings, and statuses as exceptions.
#pragma once

#include <optional>

#include "bindings/arrays.h"

namespace revk::python {

// Below this many elements a call is over sooner than the interpreter lock is handed around.
constexpr int64_t kKeepLock = 32 * 1024;

void raise_on_error(revk_status status);

// On one device, and from libraries that go together: torch's tensors and CuPy's arrays each among
// themselves, for each library has a stream of its own; all others with each other. Of one shape
// besides.
void check_together(const Array& leader, const Array& other);
void check_alike(const Array& leader, const Array& other);
void check_writable(const Array& written);
void check_written(const Array& written);
void check_apart(const Array& written, const Array& other);

revk_where where_of(const Array& written, int64_t elements);
// Ends a call: waits where the arrays' library has no other way to know when the kernels are done,
// and raises what failed.
void finish(revk_status status, const Array& written, const revk_where& where);

// Host threads for arrays of libraries that do not say; 0: the OpenMP default.
void set_threads(int32_t threads);
int32_t threads();

// The kernels block on nothing but their own work, so other Python threads run meanwhile.
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
